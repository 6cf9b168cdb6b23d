"""Percentile bootstrap intervals over seeds and problems."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokencredit.errors import TokenCreditError
from tokencredit.seeds import derive

Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray


class Interval(NamedTuple):
    """A mean and its interval; `low` and `high` are NaN when one unit is all there is."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def interval(values: Values, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` and its percentile bootstrap interval.

        x̄*_b = Σ_s Σ_p u_s v_p x_sp / (S P),   u, v multinomial counts;   [q_{(1−level)/2}, q_{(1+level)/2}] of x̄*

    `values` is one number a unit, or [seed, problem], where the same problems were put to every seed: seeds and
    problems are then resampled independently of each other. An axis of length one is not resampled, so with one seed
    the interval is about other problems only. With few seeds (below about eight) percentile intervals are too narrow:
    `diagnostics.intervals.seed_interval` is for seeds.
    """
    table = table_of(values)
    if not 0 < level < 1:
        raise TokenCreditError(f"`level` must be in (0, 1), got {level}")
    if table.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    mean = float(table.mean())
    if table.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    rng = np.random.default_rng(derive("bootstrap", seed))
    seeds, problems = (_weights(rng, length, resamples) for length in table.shape)
    means = ((seeds @ table) * problems).sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_bootstrap(
    first: Values, second: Values, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `second − first` and its interval, units paired: the same seeds and the same problems.

    Shapes must agree; see `interval` for what is resampled.
    """
    one, two = table_of(first), table_of(second)
    if one.shape != two.shape:
        raise TokenCreditError(
            f"paired values must have one shape, got {list(one.shape)} and {list(two.shape)} ([seed, problem])",
            hint="compare the seeds and problems that both have",
        )
    return interval(two - one, level, resamples, seed)


def table_of(values: Values) -> Float[np.ndarray, "seed problem"]:
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


def _weights(rng: np.random.Generator, length: int, resamples: int) -> Float[np.ndarray, "resample unit"]:
    """How often each unit is drawn, as a share; an axis of length one keeps its weight of one."""
    return rng.multinomial(length, np.full(length, 1.0 / length), size=resamples) / length
