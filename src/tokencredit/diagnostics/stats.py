"""Bootstrap of statistics that are no means: cosines, ratios and correlations of sums over units (prompts)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokencredit.errors import TokenCreditError
from tokencredit.seeds import derive


class Estimate(NamedTuple):
    """A statistic and its interval over units; NaN where it is not defined."""

    value: float
    low: float
    high: float


Statistic = Callable[[Float[np.ndarray, "resample unit"]], Float[np.ndarray, " resample"]]


def resample_weights(units: int, resamples: int, *stream: str | int) -> Float[np.ndarray, "resample unit"]:
    """How often each unit is drawn in each resample; the same for the same stream, so that methods are paired."""
    if units < 1 or resamples < 1:
        raise TokenCreditError(f"a bootstrap needs units and resamples, got {units} and {resamples}")
    rng = np.random.default_rng(derive("resample weights", *stream))
    return rng.multinomial(units, np.full(units, 1.0 / units), size=resamples).astype(np.float64)


def bootstrap(statistic: Statistic, weights: Float[np.ndarray, "resample unit"], level: float = 0.95) -> Estimate:
    """The statistic with every unit once, and the percentile interval over resamples.

    Resamples in which it is not defined are left out. One unit gives no interval.
    """
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    if weights.shape[1] == 1 or not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    draws = statistic(weights)
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if draws.size else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


def resampled_inner(
    gram: Float[np.ndarray, "unit other"], weights: Float[np.ndarray, "resample unit"]
) -> Float[np.ndarray, " resample"]:
    """⟨Σ_p g_p, Σ_q h_q⟩ over the units of a resample, from the inner products ⟨g_p, h_q⟩ of the units.

        Σ_{p ≠ q} w_p w_q ⟨g_p, h_q⟩ + Σ_p w_p ⟨g_p, h_p⟩

    A unit that is drawn twice stands for two units that are alike in distribution, not for one with twice the noise;
    with w_p² on the diagonal, the noise in ‖Σ g‖² would be counted double and every cosine would come out too small.
    """
    diagonal = np.diagonal(gram)
    return np.einsum("rp,pq,rq->r", weights, gram, weights, optimize=True) - (weights**2 - weights) @ diagonal


def ratio_of_sums(numerators: Float[np.ndarray, " unit"], denominators: Float[np.ndarray, " unit"]) -> Statistic:
    """Σ w·numerators / Σ w·denominators, NaN where the denominator is 0."""

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        return divided(weights @ numerators, weights @ denominators)

    return statistic


def divided(top: Float[np.ndarray, "*shape"], bottom: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """top / bottom, NaN where the bottom is not positive."""
    defined = bottom > 0
    return np.where(defined, top / np.where(defined, bottom, 1.0), np.nan)
