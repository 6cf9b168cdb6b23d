"""Small real runs: a fresh tiny model on countdown, a few steps."""

import json
from pathlib import Path
from typing import Any

from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.tasks import get_task
from tokencredit.runs import folders
from tokencredit.runs.config.load import load_config
from tokencredit.runs.train import train_run


def save_model(folder: Path) -> Path:
    tokenizer = build_tokenizer(get_task("countdown").alphabet)
    build_model(tokenizer, layers=1, width=16, heads=2, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resolve(given: Any, overrides: list[str] | None = None) -> dict[str, Any]:
    """A config as it is stored beside the results."""
    return load_config(given, overrides).to_mapping()


def small_config(model: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "countdown",
        "model": str(model),
        "credit": "hapo",
        "steps": 4,
        "prompts_per_step": 2,
        "dataset": {"count": 16},
        "evaluation": {"every": 2, "problems": 3},
        "records": {"every": 1},
        "trainer": {"num_generations": 4, "save_steps": 2, "learning_rate": 1e-3, "max_completion_length": 6},
    }
    return base | changes


def write_yaml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def run(folder: Path, config: dict[str, Any], progress: Any = None) -> dict[str, Any]:
    return train_run(config, folder, progress)


TIMES = ("step_time", "train_runtime")


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl that is not a time."""
    lines = folders.read_metrics(folder)
    return [line | {"metrics": {k: v for k, v in line["metrics"].items() if k not in TIMES}} for line in lines]


class Killed(BaseException):
    """What a test raises in the middle of a run."""
