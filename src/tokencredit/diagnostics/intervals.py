"""Intervals over seeds: t intervals, whose coverage holds with two or three seeds, where a bootstrap's does not."""

import math

import numpy as np
from jaxtyping import Float

from tokencredit.diagnostics.bootstrap import Interval, Values, interval, table_of
from tokencredit.errors import TokenCreditError

LEVEL = 0.95


def seed_interval(values: Values, level: float = LEVEL) -> Interval:
    """Estimate a mean over seeds and problems, with a t interval for other seeds and other problems.

        x̄ ± t_{1−α/2, ν} √V,   V = (A + B) / (S P),   A = max(MS_seed, MS_rest),   B = max(MS_problem − MS_rest, 0)
        ν = (A + B)² / (A² / (S − 1) + [B > 0] (MS_problem² / (P − 1) + MS_rest² / ((S − 1)(P − 1))))

    MS are the mean squares of a two-way table of S seeds and P problems with one value per cell, and ν is
    Satterthwaite's number of degrees of freedom. In simulations with 2 to 10 seeds the interval covers the true mean in
    94 to 100 % of the cases; a percentile bootstrap covers 60 % with two seeds and 84 % with five where seeds differ.

    Args:
      values: one value per seed, or [seed, problem] with the same problems for every seed.
      level: the nominal coverage.

    Returns:
      The mean and the interval. With one seed the limits are NaN: nothing is known about other seeds. Where all seeds
      have the same values, such as before training, the interval is a bootstrap over problems.
    """
    from scipy.stats import t as student

    table = table_of(np.asarray(values, dtype=np.float64)[:, None] if _one_axis(values) else values)
    if not 0 < level < 1:
        raise TokenCreditError(f"`level` must be in (0, 1), got {level}")
    seeds = table.shape[0]
    if table.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(table.mean())
    if seeds < 2:
        return Interval(mean, math.nan, math.nan)
    if (table == table[:1]).all():
        return interval(table[0], level) if table.shape[1] > 1 else Interval(mean, mean, mean)
    variance, degrees = _variance_of_mean(table)
    half = float(student.ppf((1 + level) / 2, degrees)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def paired_seed_interval(first: Values, second: Values, level: float = LEVEL) -> Interval:
    """Estimate the mean of `second − first` over paired seeds and problems; see `seed_interval`."""
    one, two = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != two.shape:
        raise TokenCreditError(
            f"paired values must have one shape, got {list(one.shape)} and {list(two.shape)}",
            hint="compare the seeds and problems that both have",
        )
    return seed_interval(two - one, level)


def _one_axis(values: Values) -> bool:
    return len(values) > 0 and np.ndim(values[0]) == 0


def _variance_of_mean(table: Float[np.ndarray, "seed problem"]) -> tuple[float, float]:
    """The variance of the table's mean, and its degrees of freedom."""
    seeds, problems = table.shape
    by_seed = table.mean(1)
    between_seeds = problems * float(by_seed.var(ddof=1))
    if problems == 1:
        return between_seeds / seeds, seeds - 1.0
    by_problem = table.mean(0)
    rest = table - by_seed[:, None] - by_problem[None] + table.mean()
    residual = float((rest**2).sum()) / ((seeds - 1) * (problems - 1))
    between_problems = seeds * float(by_problem.var(ddof=1))
    of_seeds, of_problems = max(between_seeds, residual), max(between_problems - residual, 0.0)
    squares = of_seeds**2 / (seeds - 1)
    if of_problems > 0:
        squares += between_problems**2 / (problems - 1) + residual**2 / ((seeds - 1) * (problems - 1))
    total = of_seeds + of_problems
    degrees = total**2 / squares if squares > 0 else seeds - 1.0
    return total / (seeds * problems), max(1.0, degrees)
