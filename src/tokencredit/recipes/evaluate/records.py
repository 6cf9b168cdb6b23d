"""What an evaluator is asked and what it reports; a finished run is read from its folder instead of paid for again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, read_json, write_json
from tokencredit.recipes.pool.samples import Positions
from tokencredit.settings import is_number

RESULT = "result.json"  # written by us when a run is complete, unlike the command's metrics.json


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Mean score of a task in [0, 1], over n problems."""

    score: float
    n: int = 0
    parse_fail: int = 0  # answers that could not be read; they count as wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Scores of one fine-tuned model. `items` are {(task, item): score}, for paired intervals."""

    tasks: Mapping[str, TaskScore]
    items: Mapping[tuple[str, str], float] = field(default_factory=dict)
    train: Mapping[str, float] = field(default_factory=dict)

    def task_mappings(self) -> dict[str, dict[str, float]]:
        """The scores of the tasks as JSON holds them."""
        return {name: asdict(task) for name, task in self.tasks.items()}

    def item_rows(self) -> list[list[Any]]:
        """The scores of the items as JSON holds them."""
        return [[task, item, score] for (task, item), score in self.items.items()]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One run to pay for: fine-tune on a subset with a seed, evaluate on a split."""

    positions: Positions
    subset_hash: str
    seed: int
    split: str
    folder: Path  # of this run alone; what is finished there is never paid for again
    recipe: str = ""


@runtime_checkable
class Evaluator(Protocol):
    """Fine-tunes and evaluates. `key` names everything that moves a number besides subset, seed and split."""

    @property
    def key(self) -> str: ...

    def __call__(self, request: Request) -> Metrics: ...


class EvaluationFailed(Exception):
    """One run failed for good, after its retry; the text is the reason. It costs budget and teaches nothing."""


def key_of(*parts: object) -> str:
    """A fingerprint of whatever moves an evaluator's numbers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def metrics_from_json(content: Any) -> Metrics:
    """From `metrics.json`; a missing or non-finite score fails the evaluation."""
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise EvaluationFailed("metrics.json must hold `tasks`, a mapping from task to score")
    tasks = {}
    for name, task in content["tasks"].items():
        score = task.get("score") if isinstance(task, dict) else None
        if score is None or not is_number(score):
            raise EvaluationFailed(f"score of {name!r} must be a finite number, got {str(score)[:60]}")
        counts = {key: task.get(key) or 0 for key in ("n", "parse_fail")}
        if not all(map(is_number, counts.values())):
            raise EvaluationFailed(f"`n` and `parse_fail` of {name!r} must be whole numbers")
        tasks[name] = TaskScore(score=float(score), n=int(counts["n"]), parse_fail=int(counts["parse_fail"]))
    train = content.get("train")
    facts = train.items() if isinstance(train, dict) else ()
    return Metrics(tasks=tasks, train={key: float(value) for key, value in facts if is_number(value)})


def run_once(request: Request, run: Callable[[Request], Metrics]) -> Metrics:
    """Run and keep the result in the run's folder, or read it there where an earlier call finished."""
    path = request.folder / RESULT
    if not path.is_file():
        make_folder(request.folder)
        metrics = run(request)
        facts = {"tasks": metrics.task_mappings(), "train": dict(metrics.train)}
        write_json(path, {"metrics": facts, "items": metrics.item_rows()})
        return metrics
    content = read_json(path)
    try:
        metrics = metrics_from_json(content["metrics"])
        items = {(task, item): float(score) for task, item, score in content.get("items", [])}
    except (EvaluationFailed, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenCreditError(
            f"{path} was changed or is damaged", hint="remove it to pay for the run again"
        ) from error
    return Metrics(tasks=metrics.tasks, items=items, train=metrics.train)
