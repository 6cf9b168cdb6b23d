"""Rewards that a config names as module:function, some of which break one rank."""

import os
import signal
from pathlib import Path


def odd_digits(completions, **columns):
    """A reward that varies within groups."""
    return [sum(character in "13579" for character in text) / 6.0 for text in completions]


def nan_on_rank_one(completions, **columns):
    """NaN for the last response of rank 1 at the second step."""
    rewards = odd_digits(completions)
    if os.environ["RANK"] == "1" and columns["trainer_state"].global_step == 1:
        rewards[-1] = float("nan")
    return rewards


def killed_once(completions, **columns):
    """Rank 1 is killed in the fourth step, unless the file that says it was is there."""
    marker = Path(os.environ["KILLED_ONCE"])
    if os.environ.get("RANK") == "1" and columns["trainer_state"].global_step == 3 and not marker.exists():
        marker.write_text("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    return odd_digits(completions)
