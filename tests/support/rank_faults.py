"""What ranks do in the tests of faults: the command line, and runs with rows that hold no token."""

import json
from pathlib import Path
from typing import Any

import rank_runs
import torch

from tokencredit.cli.main import main
from tokencredit.lab.model import build_model, build_tokenizer

PROMPTS = 22  # five steps of four, and two left over; a host that resumes in a later epoch repeats the first


def save_model(folder: Path) -> Path:
    tokenizer = build_tokenizer("0123456789+-=,")
    build_model(tokenizer, layers=1, width=16, heads=2, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder: Path, reward: str = "odd_digits", **changes: Any) -> Path:
    """A config of five steps, four prompts to a step, responses of at most six characters."""
    rows = [{"prompt": f"{number}+{number}="} for number in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": str(save_model(folder / "model")),
        "dataset": {"path": str(folder / "prompts.jsonl")},
        "reward": f"fault_rewards:{reward}",
        "credit": "hapo",
        "steps": 5,
        "prompts_per_step": 4,
        "records": {"every": 1},
        # One micro-batch a step for every number of processes: TRL averages its metrics over micro-batches.
        "trainer": {
            "num_generations": 4,
            "gradient_accumulation_steps": 1,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "max_completion_length": 6,
        },
    }
    path = folder / f"{reward}.yaml"
    path.write_text(json.dumps(config | changes))  # JSON is YAML
    return path


def command(*arguments: str) -> int:
    """`tokencredit ARGUMENTS` in this rank."""
    return main(arguments)


def rollout_without_tokens(prompts: list[str], host: Any) -> dict[str, Any]:
    """The second half of the rows is cut off before EOS, row 0 holds nothing but EOS."""
    found = rank_runs.rollout(prompts, host)
    first = host.accelerator.process_index * len(prompts)
    rows = range(first, first + len(prompts))
    cut = [
        [2] * 8 if row >= rank_runs.ROWS // 2 else [1] if row == 0 else found["completion_ids"][row - first]
        for row in rows
    ]
    return found | {"completion_ids": cut, "logprobs": [[0.0] * len(row) for row in cut]}


def train_without_tokens(folder: Path, world: int) -> None:
    """Presets over groups, the batch and responses where the second of two ranks holds no chosen token at all."""
    found = {}
    for credit in ("hapo", "gtpo", "empg", "forking_tokens", "surprisal"):
        settings = {"mask_truncated_completions": True}
        run = rank_runs.train(
            folder / credit, [credit] * 2, "plain", world, settings=settings, rollout_func=rollout_without_tokens
        )
        found[credit] = run
    if world == 1 or torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    if world > 1:
        torch.distributed.barrier()
