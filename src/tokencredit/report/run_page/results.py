"""What came out: success of every method with intervals, paired differences, and curves over training."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokencredit.diagnostics.stats import Interval, Values, paired_seed_interval, seed_interval
from tokencredit.report.plots import Curve
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
    rows: list[Result] = []
    reference: dict[int | None, float] | None = None
    for label, group in by_label(runs).items():
        series = {run.seed: run.series("train", "reward", "rewards/mean") for run in group}
        rewards = {seed: [of[step] for step in sorted(of)] for seed, of in series.items() if of}
        steps = [step for of in series.values() for step in of]
        end = {seed: float(np.mean(values[-EDGE:])) for seed, values in rewards.items()}
        difference, paired = (None, 0) if reference is None else _training_difference(reference, end)
        rows.append(
            Result(
                label=label,
                seeds=len(end),
                first_step=min(steps, default=0),
                last_step=max(steps, default=0),
                start=_interval([float(np.mean(values[:EDGE])) for values in rewards.values()]),
                end=_interval(list(end.values())),
                difference=difference,
                paired_seeds=paired,
            )
        )
        reference = end if reference is None else reference
    return rows


def _training_difference(
    reference: Mapping[int | None, float], end: Mapping[int | None, float]
) -> tuple[Interval | None, int]:
    shared = [seed for seed in end if seed in reference]
    if not shared:
        return None, 0
    return paired_seed_interval([reference[seed] for seed in shared], [end[seed] for seed in shared]), len(shared)


def interval_scope(runs: Sequence[Run]) -> str:
    """What the intervals of the results are over, in words."""
    has_problems = any(len(values) > 1 for run in runs for values in run.evaluations.values())
    return "seeds and problems" if measure_of(runs).evaluated and has_problems else "seeds"


def results(runs: Sequence[Run]) -> list[Result]:
    """Success at the start and at the end, per method: the first and the last step evaluated in all of its runs.

    Intervals are 95 % t intervals over seeds and problems, none with one seed; see `diagnostics.stats.seed_interval`.
    """
    rows: list[Result] = []
    reference: list[Run] | None = None
    for label, group in by_label(runs).items():
        evaluated = [run for run in group if run.evaluations]
        steps = _common_steps(evaluated)
        difference, paired = (None, 0) if reference is None else _difference(reference, evaluated)
        rows.append(
            Result(
                label=label,
                seeds=len(evaluated),
                first_step=min(steps, default=0),
                last_step=max(steps, default=0),
                start=_interval(scores(evaluated, min(steps, default=None))),
                end=_interval(scores(evaluated, max(steps, default=None))),
                difference=difference,
                paired_seeds=paired,
            )
        )
        reference = evaluated if reference is None else reference
    return rows


def as_json(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as JSON-like data; a bound that does not exist is null."""
    return [{key: _plain(value) for key, value in row._asdict().items()} for row in rows]


def _plain(value: Any) -> Any:
    if not isinstance(value, Interval):
        return value
    return {name: None if math.isnan(bound) else bound for name, bound in value._asdict().items()}


def _interval(values: Values) -> Interval | None:
    return seed_interval(values) if len(values) else None


def scores(runs: Sequence[Run], step: int | None) -> np.ndarray:
    """[seed, problem] at `step`, empty without one; the mean of each seed where seeds do not share all problems."""
    if step is None:
        return np.zeros((0, 0))
    rows = [run.evaluations[step] for run in runs]
    problems = [run.problems_at(step) for run in runs]
    if len({len(row) for row in rows}) > 1 or any(item != problems[0] for item in problems):
        rows = [[float(np.mean(row))] for row in rows]
    return np.array(rows, dtype=np.float64)


def success_curves(runs: Sequence[Run]) -> list[Curve]:
    """The values of every evaluation, intervals over seeds × problems."""
    curves = []
    for label, group in by_label(runs).items():
        steps = sorted({step for run in group for step in run.evaluations})
        points = {step: scores([run for run in group if step in run.evaluations], step) for step in steps}
        curves.append(_curve(label, points))
    return [curve for curve in curves if curve.steps]


def metric_curves(runs: Sequence[Run], values: Callable[[Run], Mapping[int, float]]) -> list[Curve]:
    """A number of every training step, averaged over stretches of steps; bands from the least to the greatest seed.

    `values(run)` is step → number. A point is the mean over the seeds that reached it. Sixty t intervals from two seeds
    would cover the picture and say nothing, so a band only shows what the seeds did.
    """
    per_run = {id(run): values(run) for run in runs}
    last = max((step for series in per_run.values() for step in series), default=0)
    width = max(1, math.ceil(last / POINTS))
    curves = []
    for label, group in by_label(runs).items():
        binned: dict[float, list[float]] = {}
        for run in group:
            for centre, value in _mean_by_stretch(per_run[id(run)], width).items():
                binned.setdefault(centre, []).append(value)
        curves.append(_curve(label, dict(sorted(binned.items())), _range_of_seeds))
    return [curve for curve in curves if curve.steps]


def _mean_by_stretch(series: Mapping[int, float], width: int) -> dict[float, float]:
    """Means over stretches of `width` steps, keyed by their centre."""
    bins: dict[int, list[float]] = {}
    for step, value in series.items():
        bins.setdefault(step // width, []).append(value)
    return {(number + 0.5) * width - 0.5: float(np.mean(values)) for number, values in bins.items()}


def _range_of_seeds(values: Values) -> Interval:
    """Mean, least and greatest of the seeds; no band for one seed."""
    numbers = np.asarray(values, dtype=float)
    low, high = (numbers.min(), numbers.max()) if len(numbers) > 1 else (math.nan, math.nan)
    return Interval(float(numbers.mean()), float(low), float(high))


def _curve(label: str, points: Mapping[Any, Values], interval: Callable[[Values], Interval] = seed_interval) -> Curve:
    """A curve from step → values of the seeds at it."""
    intervals = [interval(values) for values in points.values()]
    columns = list(zip(*intervals, strict=True)) or [(), (), ()]
    return Curve(label, [float(step) for step in points], *(list(column) for column in columns))


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
    return paired_seed_interval(one, two), len(pairs)
