"""How a method's gradient estimates relate to the exact gradient, from inner products alone.

A gradient is a sum over units (prompts). With ĝ_kp the estimate of unit p in replicate batch k and e_q the exact
gradient of unit q, the inner products ⟨ĝ_kp, ĝ_k'q⟩, ⟨ĝ_kp, e_q⟩ and ⟨e_p, e_q⟩ give every figure, and every bootstrap
resample of it, without the gradients themselves.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tokencredit.diagnostics.stats import Statistic, divided, resampled_inner


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grams:
    """Inner products of one method's gradient estimates, per replicate batch and unit, and of one target."""

    own: Float[np.ndarray, "replicate replicate unit unit"]
    cross: Float[np.ndarray, "replicate unit unit"]
    target: Float[np.ndarray, "unit unit"]

    @property
    def replicates(self) -> int:
        return self.cross.shape[0]


def direction(grams: Grams) -> Statistic:
    """Cosine of one batch's estimate with the target, averaged over the replicate batches.

    mean_k ⟨ĝ_k, e⟩ / (‖ĝ_k‖ ‖e‖)
    """

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        norm = resampled_inner(grams.target, weights)
        cosines = [
            divided(
                resampled_inner(grams.cross[k], weights),
                np.sqrt(np.maximum(resampled_inner(grams.own[k, k], weights) * norm, 0.0)),
            )
            for k in range(grams.replicates)
        ]
        return np.mean(cosines, axis=0)

    return statistic


def average_direction(grams: Grams) -> Statistic:
    """Cosine of the average over the replicate batches with the target."""

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        norm = resampled_inner(grams.target, weights) * resampled_inner(grams.own.mean((0, 1)), weights)
        return divided(resampled_inner(grams.cross.mean(0), weights), np.sqrt(np.maximum(norm, 0.0)))

    return statistic


def expected_direction(grams: Grams) -> Statistic:
    """Cosine of the expected estimate with the target: what is left of the error without sampling noise.

        ⟨ḡ, e⟩ / (‖e‖ √S),     S = mean_{k ≠ k'} ⟨ĝ_k, ĝ_k'⟩, an unbiased estimate of ‖E ĝ‖²

    An unbiased method has 1 up to the error of S, so it may exceed 1. NaN with one replicate or S ≤ 0.
    """

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        norm = resampled_inner(grams.target, weights) * _signal(grams, weights)
        return divided(resampled_inner(grams.cross.mean(0), weights), np.sqrt(np.maximum(norm, 0.0)))

    return statistic


def signal_to_noise(grams: Grams) -> Statistic:
    """‖E ĝ‖² / tr Var ĝ of one batch, prompts fixed; both estimated without bias. NaN with one replicate."""

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        signal = _signal(grams, weights)
        square = np.mean([resampled_inner(grams.own[k, k], weights) for k in range(grams.replicates)], axis=0)
        return divided(np.maximum(signal, 0.0), square - signal)

    return statistic


def _signal(grams: Grams, weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
    pairs = [(k, other) for k in range(grams.replicates) for other in range(grams.replicates) if k != other]
    if not pairs:
        return np.full(len(weights), np.nan)
    return np.mean([resampled_inner(grams.own[k, other], weights) for k, other in pairs], axis=0)
