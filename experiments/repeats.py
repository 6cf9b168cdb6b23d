"""Do several runs of one comparison agree? The same comparison on other pairs of seeds, and on all of them together.

`tokencredit compare --seeds 2` always takes seeds 0 and 1, so its interval is about those two. Here every pair gives
the interval that `compare` would print for it, and the last line is over all seeds. Killed, it goes on where it was.

    python experiments/repeats.py
    python experiments/repeats.py --config examples/quickstart.yaml --credit grpo hapo --first 0 10 20 30 --seeds 2
"""

import argparse
from pathlib import Path
from typing import Any

from tokencredit.cli.compare import parse_credit, show
from tokencredit.runs.compare import compare_runs, plan_runs
from tokencredit.runs.config.load import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--credit", nargs="+", default=["grpo", "hapo"], help="the first is the baseline")
    parser.add_argument("--first", type=int, nargs="+", default=[0, 10, 20, 30], help="the first seed of each run")
    parser.add_argument("--seeds", type=int, default=2, help="of each run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/repeats"))
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    credits = [parse_credit(text) for text in args.credit]
    blocks = [list(range(first, first + args.seeds)) for first in args.first]
    everything = sorted({seed for block in blocks for seed in block})
    for seeds in [*blocks, everything]:
        plans = plan_runs(config, credits, seeds)
        print_rows(seeds, compare_runs(plans, args.out, args.jobs)["results"])


def print_rows(seeds: list[int], rows: list[dict[str, Any]]) -> None:
    """End of every method, and its paired difference to the first."""
    for row in rows:
        ends = f"{row['label']:12s} end {show(row['end'])}"
        print(f"seeds {' '.join(map(str, seeds)):24s} {ends}  difference {show(row['difference'])}", flush=True)


if __name__ == "__main__":
    main()
