"""How a method's gradient estimates relate to the exact gradient, from inner products alone.

A gradient is a sum over units (prompts). With ĝ_kp the estimate of unit p in replicate batch k and e_q the exact
gradient of unit q, the inner products ⟨ĝ_kp, ĝ_k'q⟩, ⟨ĝ_kp, e_q⟩ and ⟨e_p, e_q⟩ give every figure, and every bootstrap
resample of it, without the gradients themselves. Each figure is a function of `Products`, the inner products of sums.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tokencredit.diagnostics.stats import divided, resampled_inner


class Products(NamedTuple):
    """⟨ĝ_k, ĝ_k'⟩, ⟨ĝ_k, e⟩ and ⟨e, e⟩ of the sums over the units of each resample."""

    own: Float[np.ndarray, "resample replicate replicate"]
    cross: Float[np.ndarray, "resample replicate"]
    target: Float[np.ndarray, " resample"]


def products(
    own: Float[np.ndarray, "replicate replicate unit unit"],
    cross: Float[np.ndarray, "replicate unit unit"],
    target: Float[np.ndarray, "unit unit"],
    weights: Float[np.ndarray, "resample unit"],
) -> Products:
    """The products of each resample, from those of the units."""
    return Products(*(resampled_inner(gram, weights) for gram in (own, cross, target)))


def direction(inner: Products) -> Float[np.ndarray, " resample"]:
    """Cosine of one batch's estimate with the target, averaged over the replicate batches.

    mean_k ⟨ĝ_k, e⟩ / (‖ĝ_k‖ ‖e‖)
    """
    squares = np.diagonal(inner.own, axis1=1, axis2=2)  # [resample, replicate]
    return _cosine(inner.cross, squares, np.broadcast_to(inner.target[:, None], inner.cross.shape)).mean(1)


def average_direction(inner: Products) -> Float[np.ndarray, " resample"]:
    """Cosine of the average over the replicate batches with the target."""
    return _cosine(inner.cross.mean(1), inner.own.mean((1, 2)), inner.target)


def expected_direction(inner: Products) -> Float[np.ndarray, " resample"]:
    """Cosine of the expected estimate with the target: what is left of the error without sampling noise.

        ⟨ḡ, e⟩ / (‖e‖ √S),     S = mean_{k ≠ k'} ⟨ĝ_k, ĝ_k'⟩, an unbiased estimate of ‖E ĝ‖²

    An unbiased method has 1 up to the error of S, so it may exceed 1. NaN with one replicate or S ≤ 0.
    """
    return _cosine(inner.cross.mean(1), _signal(inner), inner.target)


def signal_to_noise(inner: Products) -> Float[np.ndarray, " resample"]:
    """‖E ĝ‖² / tr Var ĝ of one batch, prompts fixed; both estimated without bias. NaN with one replicate."""
    signal = _signal(inner)
    square = np.trace(inner.own, axis1=1, axis2=2) / inner.own.shape[1]
    return divided(np.maximum(signal, 0.0), square - signal)


def _signal(inner: Products) -> Float[np.ndarray, " resample"]:
    replicates = inner.own.shape[1]
    if replicates == 1:
        return np.full(len(inner.own), np.nan)
    between = inner.own.sum((1, 2)) - np.trace(inner.own, axis1=1, axis2=2)
    return between / (replicates * (replicates - 1))


def _cosine(
    inner: Float[np.ndarray, "*shape"], first: Float[np.ndarray, "*shape"], second: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """⟨a, b⟩ / √(‖a‖² ‖b‖²), NaN where a square is not positive."""
    return divided(inner, np.sqrt(np.maximum(first, 0.0) * np.maximum(second, 0.0)))
