"""What an evaluation reports, and how its task scores become one number in points."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.recipes.pool.samples import Positions


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGoal:
    """Weight of a task, the score of guessing, and a floor: a number of points, or control−x."""

    weight: float | int = 1.0
    chance: float | int = 0.0
    floor: float | int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weighted mean over tasks of the chance-corrected score, times `scale` (100: points).

    Without declared tasks, every reported task counts alike.
    """

    tasks: Mapping[str, TaskGoal] = field(default_factory=dict)
    scale: float = 100.0

    def points(self, metrics: Metrics) -> dict[str, float]:
        """Points of each task that counts, (s − c)/(1 − c) · scale."""
        goals = self.tasks or {name: TaskGoal() for name in metrics.tasks}
        missing = [name for name in goals if name not in metrics.tasks]
        if missing:
            raise EvaluationFailed(f"metrics lack task {missing[0]!r}; reported: {', '.join(sorted(metrics.tasks))}")
        points = {}
        for name, goal in goals.items():
            score = metrics.tasks[name].score
            if not isfinite(score):
                raise EvaluationFailed(f"score of {name!r} is {score}")
            points[name] = (score - goal.chance) / (1 - goal.chance) * self.scale
        return points

    def total(self, points: Mapping[str, float]) -> float:
        weights = {name: self.tasks[name].weight if self.tasks else 1.0 for name in points}
        return sum(weights[name] * value for name, value in points.items()) / sum(weights.values())

    def below_floor(self, points: Mapping[str, float], control: Mapping[str, float] | None) -> list[str]:
        """Tasks whose floor is violated; a floor relative to the control binds once the control is known."""
        below = []
        for name, goal in self.tasks.items():
            if isinstance(goal.floor, str):
                limit = None if control is None else control[name] - float(goal.floor.removeprefix("control-"))
            else:
                limit = goal.floor
            if limit is not None and points[name] < limit:
                below.append(name)
        return below


def make_objective(config: Mapping[str, Any]) -> Objective:
    """From the `objective` block of a search file."""
    tasks = {}
    declared = config.get("tasks") or {}
    if not isinstance(declared, Mapping):
        raise TokenCreditError(f"`objective.tasks` must be a mapping from task to goal, got {declared!r}")
    for name, goal in declared.items():
        if goal is not None and not isinstance(goal, Mapping):
            raise TokenCreditError(f"task {name} of the objective must be a mapping, got {goal!r}")
        for key in goal or {}:
            if key not in {"weight", "chance", "floor"}:
                raise unknown(f"key of task {name}", key, ("weight", "chance", "floor"))
        for key, default in (("weight", 1.0), ("chance", 0.0)):
            if not _is_finite(value := (goal or {}).get(key, default)):
                raise TokenCreditError(f"`{key}` of task {name} must be a number, got {value!r}")
        floor = (goal or {}).get("floor")
        if floor is not None and not isinstance(floor, str) and not _is_finite(floor):
            raise TokenCreditError(f"`floor` of task {name} must be a number or control-NUMBER, got {floor!r}")
        made = TaskGoal(**(goal or {}))
        if not made.weight >= 0:
            raise TokenCreditError(f"`weight` of task {name} must be at least 0, got {made.weight}")
        if not 0 <= made.chance < 1:
            raise TokenCreditError(f"`chance` of task {name} must be in [0, 1), got {made.chance}")
        if isinstance(made.floor, str):
            _check_floor(name, made.floor)
        tasks[name] = made
    if tasks and not sum(goal.weight for goal in tasks.values()) > 0:
        raise TokenCreditError("the weights of the tasks of the objective are all 0")
    return Objective(tasks=tasks, scale=float(config.get("scale", 100.0)))


def _check_floor(task: str, floor: str) -> None:
    rest = floor.removeprefix("control-")
    if rest == floor or not rest.replace(".", "", 1).isdigit():
        raise TokenCreditError(f"`floor` of task {task} must be a number or control-NUMBER, got {floor!r}")


def metrics_to_json(metrics: Metrics) -> dict[str, Any]:
    """What `metrics_from_json` reads back; items are kept apart."""
    tasks = {
        name: {"score": task.score, "n": task.n, "parse_fail": task.parse_fail} for name, task in metrics.tasks.items()
    }
    return {"tasks": tasks, "train": dict(metrics.train)}


def metrics_from_json(content: Any) -> Metrics:
    """From `metrics.json`; a missing or non-finite score fails the evaluation."""
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise EvaluationFailed("metrics.json must hold `tasks`, a mapping from task to score")
    tasks = {}
    for name, task in content["tasks"].items():
        score = task.get("score") if isinstance(task, dict) else None
        if score is None or not _is_finite(score):
            raise EvaluationFailed(f"score of {name!r} must be a finite number, got {str(score)[:60]}")
        counts = {key: task.get(key) or 0 for key in ("n", "parse_fail")}
        if not all(_is_finite(count) for count in counts.values()):
            raise EvaluationFailed(f"`n` and `parse_fail` of {name!r} must be whole numbers")
        tasks[name] = TaskScore(score=float(score), n=int(counts["n"]), parse_fail=int(counts["parse_fail"]))
    train = content.get("train")
    facts = {key: float(value) for key, value in train.items() if _is_finite(value)} if isinstance(train, dict) else {}
    return Metrics(tasks=tasks, train=facts)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # also a whole number that no float holds
