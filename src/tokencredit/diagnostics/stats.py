"""Statistics of every table: intervals over seeds and problems, bootstraps over prompts, ranks.

`seed_interval` is for means over seeds, `interval` for means over problems, `bootstrap` for statistics that are not
means: cosines, ratios and correlations of sums over prompts.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokencredit.errors import TokenCreditError
from tokencredit.seeds import derive

LEVEL = 0.95
NAN = math.nan

Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
Statistic = Callable[[Float[np.ndarray, "resample unit"]], Float[np.ndarray, " resample"]]


class Interval(NamedTuple):
    """A mean and its interval; `low` and `high` are NaN when there is only one unit."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low > 0 or self.high < 0


class Estimate(NamedTuple):
    """A statistic and its interval over units; NaN where it is not defined."""

    value: float
    low: float
    high: float


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

    is_flat = len(values) > 0 and np.ndim(values[0]) == 0
    table = _table_of(np.asarray(values, dtype=np.float64)[:, None] if is_flat else values)
    _check_level(level)
    if table.size == 0:
        return Interval(NAN, NAN, NAN)
    mean = float(table.mean())
    if len(table) < 2:
        return Interval(mean, NAN, NAN)
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


def interval(values: Values, level: float = LEVEL, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` and its percentile bootstrap interval.

        x̄*_b = Σ_s Σ_p u_s v_p x_sp / (S P),   u, v multinomial counts;   [q_{(1−level)/2}, q_{(1+level)/2}] of x̄*

    `values` is one number per unit, or [seed, problem], where the same problems were put to every seed: seeds and
    problems are then resampled independently of each other. An axis of length one is not resampled. With few seeds
    (below about eight) percentile intervals are too narrow: take `seed_interval`.
    """
    table = _table_of(values)
    _check_level(level)
    if table.size == 0:
        return Interval(NAN, NAN, NAN)
    mean = float(table.mean())
    if table.size == 1:
        return Interval(mean, NAN, NAN)
    rng = np.random.default_rng(derive("bootstrap", seed))
    seeds, problems = (_draw_counts(rng, length, resamples) / length for length in table.shape)
    low, high = _percentiles(((seeds @ table) * problems).sum(1), level)
    return Interval(mean, low, high)


def resample_weights(units: int, resamples: int, *stream: str | int) -> Float[np.ndarray, "resample unit"]:
    """How often each unit is drawn in each resample; the same for the same stream, so that methods are paired."""
    if units < 1 or resamples < 1:
        raise TokenCreditError(f"a bootstrap needs units and resamples, got {units} and {resamples}")
    rng = np.random.default_rng(derive("resample weights", *stream))
    return _draw_counts(rng, units, resamples).astype(np.float64)


def bootstrap(statistic: Statistic, weights: Float[np.ndarray, "resample unit"], level: float = LEVEL) -> Estimate:
    """The statistic with every unit once, and the percentile interval over resamples."""
    return estimate(float(statistic(np.ones((1, weights.shape[1])))[0]), statistic(weights), level)


def estimate(value: float, draws: Float[np.ndarray, " resample"], level: float = LEVEL) -> Estimate:
    """A value and the percentile interval of its resamples; those that are not defined are left out.

    NaN limits where none is defined.
    """
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or draws.size == 0:
        return Estimate(value, NAN, NAN)
    return Estimate(value, *_percentiles(draws, level))


def resampled_inner(
    gram: Float[np.ndarray, "*stack unit unit"], weights: Float[np.ndarray, "resample unit"]
) -> Float[np.ndarray, "resample *stack"]:
    """⟨Σ_p g_p, Σ_q h_q⟩ over the units of a resample, from the inner products ⟨g_p, h_q⟩ of the units.

        Σ_{p ≠ q} w_p w_q ⟨g_p, h_q⟩ + Σ_p w_p ⟨g_p, h_p⟩

    A unit that is drawn twice stands for two units that are alike in distribution, not for one with twice the noise;
    with w_p² on the diagonal, the noise in ‖Σ g‖² would be counted double and every cosine would come out too small.
    """
    whole = ((weights @ gram) * weights).sum(-1)  # [*stack, resample]
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1) @ (weights**2 - weights).T
    return np.moveaxis(whole - diagonal, -1, 0)


def ratio_of_sums(numerators: Float[np.ndarray, " unit"], denominators: Float[np.ndarray, " unit"]) -> Statistic:
    """Σ w·numerators / Σ w·denominators, NaN where the denominator is 0."""

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        return divided(weights @ numerators, weights @ denominators)

    return statistic


def divided(top: Float[np.ndarray, "*shape"], bottom: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """top / bottom, NaN where the bottom is not positive."""
    defined = bottom > 0
    return np.where(defined, top / np.where(defined, bottom, 1.0), np.nan)


def average_ranks(values: Float[np.ndarray, " token"]) -> Float[np.ndarray, " token"]:
    """Ranks from 0 to 1, equal values sharing their mean rank."""
    from scipy.stats import rankdata

    return (rankdata(values) - 1.0) / max(values.size, 1)


def _draw_counts(rng: np.random.Generator, length: int, resamples: int) -> np.ndarray:
    """How often each of `length` units is drawn in `length` draws, for each resample."""
    return rng.multinomial(length, np.full(length, 1.0 / length), size=resamples)


def _percentiles(draws: Float[np.ndarray, " resample"], level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise TokenCreditError(f"`level` must be in (0, 1), got {level}")


def _table_of(values: Values) -> Float[np.ndarray, "seed problem"]:
    """Values as a table [seed, problem]; one axis is one seed."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except ValueError as error:
        raise TokenCreditError(
            f"values must be [unit] or [seed, problem] with as many problems for every seed: {error}"
        ) from error
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2:
        raise TokenCreditError(f"values must be [unit] or [seed, problem], got shape {list(table.shape)}")
    if not np.isfinite(table).all():
        raise TokenCreditError(f"values must be finite, got {table[~np.isfinite(table)][0]}")
    return table


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
