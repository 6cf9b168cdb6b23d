"""What came out: success of every method with intervals, paired differences, and curves over training."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokencredit.diagnostics.bootstrap import Interval, interval, paired_bootstrap
from tokencredit.report.runs import Run, by_label

POINTS = 60  # points of a training curve; steps between are averaged


class Result(NamedTuple):
    """One method. `difference` is to the first method, on shared seeds and at the last step that both reached."""

    label: str
    seeds: int
    first_step: int
    last_step: int
    start: Interval | None
    end: Interval | None
    difference: Interval | None
    paired_seeds: int


class Curve(NamedTuple):
    """Mean over seeds and its interval at each step (NaN where one seed is all there is)."""

    label: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def results(runs: Sequence[Run]) -> list[Result]:
    """Success at the start and at the end, per method: the first and the last step evaluated in all of its runs.

    Intervals are 95 % bootstrap over seeds × problems; see `diagnostics.bootstrap`.
    """
    groups = {label: [run for run in group if run.evaluations] for label, group in by_label(runs).items()}
    found: list[Result] = []
    reference: list[Run] | None = None
    for label, group in groups.items():
        steps = _common_steps(group)
        difference, paired = (None, 0) if reference is None else _difference(reference, group)
        found.append(
            Result(
                label=label,
                seeds=len(group),
                first_step=min(steps, default=0),
                last_step=max(steps, default=0),
                start=interval(scores(group, min(steps))) if steps else None,
                end=interval(scores(group, max(steps))) if steps else None,
                difference=difference,
                paired_seeds=paired,
            )
        )
        reference = group if reference is None else reference
    return found


def as_json(found: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as JSON-like data; a bound that does not exist is null."""
    return [
        {
            key: {name: None if math.isnan(x) else x for name, x in value._asdict().items()}
            if isinstance(value, Interval)
            else value
            for key, value in row._asdict().items()
        }
        for row in found
    ]


def scores(runs: Sequence[Run], step: int) -> np.ndarray:
    """[seed, problem] at `step`; the mean of each seed alone where seeds were not given equally many problems."""
    rows = [run.evaluations[step] for run in runs]
    if len({len(row) for row in rows}) > 1:
        rows = [[float(np.mean(row))] for row in rows]
    return np.array(rows, dtype=np.float64)


def success_curves(runs: Sequence[Run]) -> list[Curve]:
    """Success at every evaluation, intervals over seeds × problems."""
    found = []
    for label, group in by_label(runs).items():
        steps = sorted({step for run in group for step in run.evaluations})
        points = {
            step: interval(scores([run for run in group if step in run.evaluations], step), resamples=500)
            for step in steps
        }
        found.append(_curve(label, points))
    return [curve for curve in found if curve.steps]


def metric_curves(runs: Sequence[Run], values: Callable[[Run], Mapping[int, float]]) -> list[Curve]:
    """A number of every training step, averaged over stretches of steps; intervals over seeds.

    `values(run)` is step → number. A point is the mean over the seeds that reached it.
    """
    per_run = {id(run): values(run) for run in runs}
    last = max((step for series in per_run.values() for step in series), default=0)
    width = max(1, math.ceil(last / POINTS))
    found = []
    for label, group in by_label(runs).items():
        binned: dict[float, list[float]] = {}
        for run in group:
            for centre, value in _stretches(per_run[id(run)], width).items():
                binned.setdefault(centre, []).append(value)
        points = {step: interval(binned[step], resamples=500) for step in sorted(binned)}
        found.append(_curve(label, points))
    return [curve for curve in found if curve.steps]


def _stretches(series: Mapping[int, float], width: int) -> dict[float, float]:
    """Means over stretches of `width` steps, keyed by their centre."""
    bins: dict[int, list[float]] = {}
    for step, value in series.items():
        bins.setdefault(step // width, []).append(value)
    return {(number + 0.5) * width - 0.5: float(np.mean(values)) for number, values in bins.items()}


def _curve(label: str, points: Mapping[Any, Interval]) -> Curve:
    steps = [float(step) for step in points]
    columns = list(zip(*points.values(), strict=True)) or [(), (), ()]
    return Curve(label, steps, *(list(column) for column in columns))


def _common_steps(runs: Sequence[Run]) -> set[int]:
    return set.intersection(*(set(run.evaluations) for run in runs)) if runs else set()


def _difference(reference: Sequence[Run], group: Sequence[Run]) -> tuple[Interval | None, int]:
    first, second = ({run.seed: run for run in side} for side in (reference, group))
    shared = sorted(first.keys() & second.keys(), key=lambda seed: (seed is None, seed or 0))
    pairs = [(first[seed], second[seed]) for seed in shared]
    steps = _common_steps([run for pair in pairs for run in pair])
    if not steps:
        return None, 0
    one, two = (scores(side, max(steps)) for side in zip(*pairs, strict=True))
    if one.shape != two.shape:
        one, two = one.mean(1, keepdims=True), two.mean(1, keepdims=True)
    return paired_bootstrap(one, two), len(pairs)
