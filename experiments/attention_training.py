"""Does reweighting by attention entropy learn better, and is it more than the size of its step?

The published rule, its reverse, both static arms, the controls of mass, and the hard subsets, each against GRPO, and
perfect credit for the headroom: equal budgets, paired seeds, as `tokencredit compare` runs them. The schedule ends
after the paper's share of the run, 80 of about 150 steps. After the table come the paired differences that the rule in
docs/methods/attention.md asks for. Killed, it goes on where it was. A step of 16 × 16 takes about two seconds on one
core.

    python experiments/attention_training.py --steps 40 --seeds 5
    python experiments/attention_training.py --steps 40 --seeds 5 --arms attention attention_mean_weight
"""

import argparse
from pathlib import Path
from typing import Any

from tokencredit.cli.compare import conclusions, print_table, show
from tokencredit.runs.compare import Plan, compare_runs, plan_runs, results
from tokencredit.runs.config.load import load_config

PUBLISHED_SHARE = 80 / 150
MOVING = (
    "attention",
    "attention_high_to_low",
    "attention_mass_per_response",
    "attention_mass_per_batch",
    "attention_mean_weight",
)
STILL = (
    "grpo",
    "exact",
    "static_anchor",
    "static_explorer",
    "anchors",
    "explorers",
    "random_tokens",
    "first_fifth",
    "last_fifth",
)


PAIRS = (
    ("attention", "attention_mean_weight"),
    ("attention", "attention_high_to_low"),
    ("attention", "attention_mass_per_response"),
    ("attention", "attention_mass_per_batch"),
    ("attention", "static_anchor"),
    ("attention", "static_explorer"),
    ("anchors", "random_tokens"),
    ("explorers", "random_tokens"),
    ("first_fifth", "random_tokens"),
    ("last_fifth", "random_tokens"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=[*STILL, *MOVING])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/attention"))
    args = parser.parse_args()
    settings = [f"steps={args.steps}", f"prompts_per_step={args.prompts}", f"evaluation.every={args.steps // 2}"]
    config = load_config(args.config, settings)
    arms = {name: plan_runs(config, [arm(name)], range(args.seeds)) for name in args.arms}
    by_seed = [plan for seed in zip(*arms.values(), strict=True) for plan in seed]
    comparison = compare_runs(by_seed, args.out, args.jobs)
    print_table(comparison["results"])
    for line in conclusions(comparison):
        print(line)
    for name, control in PAIRS:
        if name in arms and control in arms:
            print(f"{name} - {control}: {show(difference(arms[name], arms[control], args.out))}")


def arm(name: str) -> Any:
    """A preset as `credit:` takes it; one that moves has its schedule over the paper's share of the run."""
    return {name: {"warmup_share": round(PUBLISHED_SHARE, 2)}} if name in MOVING else name


def difference(runs: list[Plan], control: list[Plan], folder: Path) -> Any:
    """The paired difference of two arms at the end of training."""
    return results([*control, *runs], folder)[1]["difference"]


if __name__ == "__main__":
    main()
