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
    """The statistic with every unit once, and the percentile interval over resamples."""
    return estimate(float(statistic(np.ones((1, weights.shape[1])))[0]), statistic(weights), level)


def estimate(value: float, draws: Float[np.ndarray, " resample"], level: float = 0.95) -> Estimate:
    """A value and the percentile interval of its resamples; those that are not defined are left out.

    NaN limits where none is defined.
    """
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or draws.size == 0:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


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
