"""Does reweighting by attention entropy learn better, and is it more than the size of its step?

The published rule, its reverse, both static arms, the controls of mass, and the hard subsets, each against GRPO: equal
budgets, paired seeds (`tokencredit compare`). The schedule ends after the paper's share of the run, 80 of about 150
steps. Killed, it goes on where it was. A step of 16 × 16 takes about two seconds on one core.

    python experiments/attention_training.py --steps 40 --seeds 5
    python experiments/attention_training.py --steps 40 --seeds 5 --arms attention attention_mean_weight
"""

import argparse
import json
import sys
from typing import Any

from tokencredit.cli.main import main as tokencredit

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
    "static_anchor",
    "static_explorer",
    "anchors",
    "explorers",
    "random_tokens",
    "first_fifth",
    "last_fifth",
)


def arm(name: str) -> Any:
    """A preset as `--credit` takes it; one that moves has its schedule over the paper's share of the run."""
    return json.dumps({name: {"warmup_share": round(PUBLISHED_SHARE, 2)}}) if name in MOVING else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=[*STILL, *MOVING])
    parser.add_argument("--out", default="runs/attention")
    args = parser.parse_args()
    settings = [f"steps={args.steps}", f"prompts_per_step={args.prompts}", f"evaluation.every={args.steps // 2}"]
    command = ["compare", args.config, *(part for setting in settings for part in ("--set", setting))]
    command += ["--seeds", str(args.seeds), "--out", args.out, "--credit", *map(arm, args.arms)]
    sys.exit(tokencredit(command))


if __name__ == "__main__":
    main()
