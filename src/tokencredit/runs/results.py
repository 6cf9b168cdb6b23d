"""Results of a comparison: a row per method with t intervals over seeds, and whether there was anything to gain."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.diagnostics.bootstrap import Interval
from tokencredit.diagnostics.intervals import paired_seed_interval, seed_interval
from tokencredit.methods.table import BASELINE, EXACT
from tokencredit.runs import folders

LAST = 10  # steps of training that the training reward is the mean of


class _Method(NamedTuple):
    """The metrics of a method's runs by seed."""

    label: str
    runs: dict[int, list[dict[str, Any]]]

    def evaluations(self) -> list[list[dict[str, Any]]]:
        return [[line["metrics"] for line in lines if line["kind"] == "eval"] for lines in self.runs.values()]


def results(plans: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    """Summarise a comparison: a row per method.

    A row has `label`, `seeds`, `measure` ("success" where every reward is 0 or 1, "mean reward" elsewhere, None without
    an evaluation), `start` and `end` of the measure, `difference` of the end to the first method, `reward` (mean
    training reward of the last ten steps), `reward_interval` and `reward_difference`. Intervals are 95 % t intervals
    over seeds; with one seed there are none.
    """
    by_label: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for plan in plans:
        by_label.setdefault(plan.label, {})[plan.seed] = folders.read_metrics(folder / plan.path)
    methods = [_Method(label, runs) for label, runs in by_label.items()]
    measure = _measure(methods)
    first = methods[0]
    return [_row(method, first, measure) for method in methods]


def _measure(methods: Sequence[_Method]) -> str | None:
    evaluations = [metrics for method in methods for lines in method.evaluations() for metrics in lines]
    if not evaluations:
        return None
    return "success" if all(metrics.get("binary", True) for metrics in evaluations) else "mean reward"


def _row(method: _Method, first: _Method, measure: str | None) -> dict[str, Any]:
    rewards, others = ([_last_reward(lines) for lines in side.runs.values()] for side in (method, first))
    row: dict[str, Any] = {"label": method.label, "seeds": len(method.runs), "measure": measure, "difference": None}
    row["reward"] = sum(rewards) / len(rewards)
    row["reward_interval"] = _as_json(seed_interval(rewards))
    row["reward_difference"] = None if method is first else _as_json(paired_seed_interval(others, rewards))
    if all(method.evaluations()):
        start, end = _values(method, 0), _values(method, -1)
        row |= {"start": _interval(start), "end": _interval(end)}
        if method is not first and all(first.evaluations()):
            row["difference"] = _difference(_values(first, -1), end)
    return row


def _values(method: _Method, number: int) -> list[dict[int, float]]:
    """For each seed, the value of every problem at an evaluation."""
    found = []
    for lines in method.evaluations():
        metrics = lines[number]
        problems = metrics.get("problems") or range(len(metrics["per_problem"]))
        found.append(dict(zip(problems, metrics["per_problem"], strict=True)))
    return found


def _table(values: Sequence[Mapping[int, float]], shared: Sequence[int]) -> list[list[float]]:
    return [[row[problem] for problem in shared] for row in values]


def _shared(*sides: Sequence[Mapping[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(row) for side in sides for row in side)))


def _interval(values: Sequence[Mapping[int, float]]) -> dict[str, float | None] | None:
    shared = _shared(values)
    return _as_json(seed_interval(_table(values, shared))) if shared else None


def _difference(
    first: Sequence[Mapping[int, float]], second: Sequence[Mapping[int, float]]
) -> dict[str, float | None] | None:
    shared = _shared(first, second)
    return _as_json(paired_seed_interval(_table(first, shared), _table(second, shared))) if shared else None


def _last_reward(lines: Sequence[Mapping[str, Any]]) -> float:
    """Mean training reward of the last ten steps."""
    rewards = [line["metrics"]["reward"] for line in lines if line["kind"] == "train" and "reward" in line["metrics"]]
    return sum(rewards[-LAST:]) / max(1, len(rewards[-LAST:]))


def _as_json(found: Interval) -> dict[str, float | None]:
    """NaN bounds (one seed) become null: JSON has no NaN."""
    values = {"mean": found.mean, "low": found.low, "high": found.high}
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


def headroom(rows: Sequence[Mapping[str, Any]], plans: Sequence[Any], folder: Path) -> dict[str, Any] | None:
    """Compare perfect credit with GRPO: where `exact` gains nothing, no method can be told from another.

    Returns:
      `difference` of `exact` to `grpo` at the end of training, and `verdict`; None unless both are compared and
      evaluated.
    """
    labels = {row["label"] for row in rows}
    if not {BASELINE, EXACT} <= labels or not all(row.get("end") for row in rows if row["label"] in (BASELINE, EXACT)):
        return None
    pair = {label: _Method(label, {}) for label in (BASELINE, EXACT)}
    for plan in plans:
        if plan.label in pair:
            pair[plan.label].runs[plan.seed] = folders.read_metrics(folder / plan.path)
    difference = _difference(_values(pair[BASELINE], -1), _values(pair[EXACT], -1))
    return None if difference is None else {"difference": difference, "verdict": verdict(difference)}


def verdict(difference: Mapping[str, float | None]) -> str:
    """Say whether perfect credit gained something; see `headroom`."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "unknown: one seed has no interval"
    if low > 0:
        return "headroom: perfect credit gains"
    return "undecidable here: no headroom"
