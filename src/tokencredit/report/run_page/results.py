"""What came out: success of every method with intervals, paired differences, and curves over training."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokencredit.diagnostics.bootstrap import Interval, interval, paired_bootstrap
from tokencredit.report.run_page.folders import Run, by_label

EDGE = 10  # logged steps at the start and at the end whose reward stands in where nothing was evaluated
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


class Measure(NamedTuple):
    """What the results of a page are: how they are named, whether they are shares, and where they come from."""

    name: str
    percent: bool
    evaluated: bool


def measure_of(runs: Sequence[Run]) -> Measure:
    """Success where all evaluations are shares of right answers, else mean reward; training reward without any."""
    evaluated = [run for run in runs if run.evaluations]
    if not evaluated:
        return Measure("training reward", percent=False, evaluated=False)
    if all(run.measures_success for run in evaluated):
        return Measure("success", percent=True, evaluated=True)
    return Measure("mean reward", percent=False, evaluated=True)


def summary(runs: Sequence[Run]) -> list[Result]:
    """The rows of the results table: evaluations, or rewards of training where nothing was evaluated."""
    return results(runs) if measure_of(runs).evaluated else training_results(runs)


def training_results(runs: Sequence[Run]) -> list[Result]:
    """Mean reward of the sampled responses over the first and the last logged steps of training, over seeds.

    The difference is to the first method, on shared seeds, at the end.
    """
    found: list[Result] = []
    reference: dict[int | None, float] | None = None
    for label, group in by_label(runs).items():
        rewards = {run.seed: run.series("train", "reward", "rewards/mean") for run in group}
        rewards = {seed: series for seed, series in rewards.items() if series}
        edges = {seed: [series[step] for step in sorted(series)] for seed, series in rewards.items()}
        end = {seed: float(np.mean(values[-EDGE:])) for seed, values in edges.items()}
        steps = [step for series in rewards.values() for step in series]
        shared = [] if reference is None else [seed for seed in end if seed in reference]
        found.append(
            Result(
                label=label,
                seeds=len(end),
                first_step=min(steps, default=0),
                last_step=max(steps, default=0),
                start=interval([float(np.mean(values[:EDGE])) for values in edges.values()]) if end else None,
                end=interval(list(end.values())) if end else None,
                difference=paired_bootstrap([reference[seed] for seed in shared], [end[seed] for seed in shared])
                if shared and reference is not None
                else None,
                paired_seeds=len(shared),
            )
        )
        reference = end if reference is None else reference
    return found


def interval_over(runs: Sequence[Run]) -> str:
    """What the intervals of the results resample, in words."""
    if not measure_of(runs).evaluated:
        return "seeds"
    seeds = max(len([run for run in group if run.evaluations]) for group in by_label(runs).values())
    single = all(len(values) == 1 for run in runs for values in run.evaluations.values())
    if single:
        return "seeds"
    return "problems (there is one seed: another one may differ by more)" if seeds == 1 else "seeds and problems"


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
    """[seed, problem] at `step`; the mean of each seed alone where seeds do not share all problems."""
    rows = [run.evaluations[step] for run in runs]
    problems = [run.problems_at(step) for run in runs]
    if len({len(row) for row in rows}) > 1 or any(item != problems[0] for item in problems):
        rows = [[float(np.mean(row))] for row in rows]
    return np.array(rows, dtype=np.float64)


def success_curves(runs: Sequence[Run]) -> list[Curve]:
    """The values of every evaluation, intervals over seeds × problems."""
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
    at = max(steps)
    if one.shape != two.shape or pairs[0][0].problems_at(at) != pairs[0][1].problems_at(at):
        one, two = one.mean(1, keepdims=True), two.mean(1, keepdims=True)
    return paired_bootstrap(one, two), len(pairs)
