"""How the scores of tasks become one number in points, and which of them fell below their floor."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tokencredit.errors import TokenCreditError, shown
from tokencredit.recipes.evaluate.records import EvaluationFailed, Metrics
from tokencredit.settings import Number, Settings, Words, is_number


def _check_floor(floor: str) -> str:
    rest = floor.removeprefix("control-")
    if rest == floor or not rest.replace(".", "", 1).isdigit():
        raise ValueError
    return floor


class TaskGoal(Settings):
    """Weight of a task, the score of guessing, and a floor: a number of points, or control−x."""

    section: ClassVar[str] = "objective.tasks"
    key_kind: ClassVar[str] = "key of a task"

    weight: Annotated[int | float, Field(ge=0, lt=1e300), Words("a number of at least 0")] = 1.0
    chance: Annotated[int | float, Field(ge=0, lt=1), Words("a number in [0, 1)")] = 0.0
    floor: Number | Annotated[str, AfterValidator(_check_floor), Words("control-NUMBER")] | None = None


def _read_goals(tasks: Any) -> dict[str, TaskGoal]:
    if not isinstance(tasks or {}, Mapping):
        raise TokenCreditError(f"`objective.tasks` must be a mapping from task to goal, got {shown(tasks)}")
    goals = {}
    for name, goal in (tasks or {}).items():
        try:
            goals[name] = TaskGoal.read(goal or {})
        except TokenCreditError as error:
            raise TokenCreditError(f"task {name} of the objective: {error.message}", hint=error.hint) from error
    return goals


class Objective(Settings):
    """`objective:` of a search file: the weighted mean of the tasks' chance-corrected scores, times `scale`.

    With scale 100 these are points. Without declared tasks, every reported task counts alike. `noise_sd` is the
    standard deviation of one evaluation, in points.
    """

    section: ClassVar[str] = "objective"

    tasks: Annotated[Mapping[str, Any], BeforeValidator(_read_goals)] = {}  # TaskGoal by task
    noise_sd: Annotated[int | float, Field(ge=0, lt=1e12), Words("a number of at least 0")] = 0.5
    scale: Annotated[int | float, Field(gt=0, lt=1e12), Words("a number above 0")] = 100.0

    @model_validator(mode="after")
    def _check_weights(self) -> "Objective":
        if self.tasks and not sum(goal.weight for goal in self.tasks.values()) > 0:
            raise TokenCreditError("the weights of the tasks of the objective are all 0")
        return self

    def points(self, metrics: Metrics) -> dict[str, float]:
        """Points of each task that counts, (s − c)/(1 − c) · scale."""
        goals = self.tasks or {name: TaskGoal() for name in metrics.tasks}
        missing = [name for name in goals if name not in metrics.tasks]
        if missing:
            raise EvaluationFailed(f"metrics lack task {missing[0]!r}; reported: {', '.join(sorted(metrics.tasks))}")
        points = {}
        for name, goal in goals.items():
            score = metrics.tasks[name].score
            if not is_number(score):
                raise EvaluationFailed(f"score of {name!r} is {score}")
            points[name] = (score - goal.chance) / (1 - goal.chance) * self.scale
        return points

    def total(self, points: Mapping[str, float]) -> float:
        """The weighted mean of the points."""
        weights = {name: self.tasks[name].weight if self.tasks else 1.0 for name in points}
        return sum(weights[name] * value for name, value in points.items()) / sum(weights.values())

    def below_floor(self, points: Mapping[str, float], control: Mapping[str, float] | None) -> list[str]:
        """Tasks whose floor is violated; a floor relative to the control binds once the control is known."""
        below = []
        for name, goal in self.tasks.items():
            limit = goal.floor
            if isinstance(limit, str):
                limit = None if control is None else control[name] - float(limit.removeprefix("control-"))
            if limit is not None and points[name] < limit:
                below.append(name)
        return below

    def item_weights(self, tasks: list[str]) -> dict[str, float]:
        """Points of the total that one unit of a task's score is worth, for the tasks that items were reported of."""
        goals = {task: self.tasks.get(task) or TaskGoal(weight=int(not self.tasks)) for task in tasks}
        whole = sum(goal.weight for goal in goals.values())
        return {task: self.scale / (1 - goal.chance) * goal.weight / whole for task, goal in goals.items()}
