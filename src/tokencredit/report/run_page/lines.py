"""Lines of numbers that a run logged: `metrics.jsonl` of ours, and the log history of a trainer."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.errors import TokenCreditError, shown
from tokencredit.files import read_text

LARGEST_STEP = 2**53  # beyond it neighbouring steps are one float
LARGEST = 1e100  # a number beyond it is taken as not finite: sums and squares of it would overflow


class Line(NamedTuple):
    """The numbers of one step.

    An evaluation may have the mean reward of every problem; `problems` are then their numbers where some were left out.
    `is_success` says whether those rewards are shares of right answers, from 0 to 1; None where the line does not say.
    """

    step: int
    kind: str
    metrics: Mapping[str, float]
    per_problem: Sequence[float] | None = None
    problems: Sequence[int] | None = None
    is_success: bool | None = None


def read_lines(path: Path) -> list[Line]:
    """Read `metrics.jsonl`, lines by step.

    A later line of the same step and kind adds to an earlier one. A torn last line is left out.

    Raises:
      TokenCreditError: a line before the last cannot be read; the error names it.
    """
    if not path.exists():
        return []
    found = []
    texts = read_text(path, "metrics").split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            found.append(_line(json.loads(text)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if number == len(texts):  # no newline behind it: the run was killed while writing, or writes right now
                break
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TokenCreditError(f"{path}, line {number}: {reason}", hint="delete the line") from error
    return merged(found)


def read_history(content: Mapping[str, Any], path: Path) -> list[Line]:
    """Read the log history of a `trainer_state.json`; `eval_…` numbers become an evaluation of mean rewards."""
    history = content.get("log_history", [])
    if not isinstance(history, list):
        raise TokenCreditError(f"{path}: `log_history` must be a list, got {shown(history)}")
    found = []
    for number, entry in enumerate(history):
        if not isinstance(entry, Mapping) or not _is_step(entry.get("step")):
            raise TokenCreditError(f"{path}: entry {number} of `log_history` has no step, got {shown(entry)}")
        numbers = {name: float(value) for name, value in entry.items() if name != "step" and _is_number(value)}
        evaluated = {name.removeprefix("eval_"): x for name, x in numbers.items() if name.startswith("eval_")}
        trained = {name: value for name, value in numbers.items() if not name.startswith("eval_")}
        if "reward" in evaluated:
            found.append(Line(entry["step"], "eval", evaluated, is_success=False))
        if trained and not evaluated:
            found.append(Line(entry["step"], "train", trained))
    return merged(found)


def merged(lines: Iterable[Line]) -> list[Line]:
    """One line per step and kind, by step; later lines win."""
    by_place: dict[tuple[int, str], Line] = {}
    for line in lines:
        before = by_place.get((line.step, line.kind))
        if before is not None:
            newer = line if line.per_problem or not before.per_problem else before
            line = newer._replace(metrics={**before.metrics, **line.metrics})
        by_place[line.step, line.kind] = line
    return sorted(by_place.values(), key=lambda line: (line.step, line.kind))


def _line(content: dict[str, Any]) -> Line:
    metrics = content["metrics"]
    if not _is_step(content["step"]):
        raise ValueError(f"`step` must be a whole number from 0, got {shown(content['step'])}")
    if not isinstance(metrics, Mapping):
        raise ValueError(f"`metrics` must be a mapping, got {shown(metrics)}")
    per_problem = content.get("per_problem") or metrics.get("per_problem") or None
    if per_problem and not (isinstance(per_problem, list) and all(map(_is_number, per_problem))):
        raise ValueError(f"`per_problem` must be a list of finite numbers, got {shown(per_problem)}")
    problems, binary = metrics.get("problems"), metrics.get("binary")
    if not isinstance(problems, list):
        problems = None
    return Line(
        step=content["step"],
        kind=str(content["kind"]),
        metrics={name: float(value) for name, value in metrics.items() if _is_number(value)},
        per_problem=per_problem and [float(value) for value in per_problem],
        problems=problems,
        is_success=binary if isinstance(binary, bool) else None,
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_STEP


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return isinstance(value, float) and math.isfinite(value) and abs(value) <= LARGEST
