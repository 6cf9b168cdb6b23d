"""A Gaussian process on realised states that knows how noisy an evaluation is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import cho_solve
from scipy.optimize import minimize
from scipy.special import erfcx, ndtr

OFFSET_VARIANCE = 4.0  # of the unknown level around the median, in points²
_LOG_2PI = float(np.log(2 * np.pi))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surrogate:
    """A fitted process: `predict` gives mean and standard deviation of the noise-free score, in points."""

    inputs: Float[np.ndarray, "n features"]  # standardised
    groups: tuple[str, ...]
    hyper: Float[np.ndarray, " parameters"]  # log a, log σ, log ℓ of each group
    factor: Float[np.ndarray, "n n"]  # lower Cholesky of the covariance with noise
    weights: Float[np.ndarray, " n"]
    level: float  # prior mean

    def predict(
        self, points: Float[np.ndarray, "m features"]
    ) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        inner = points @ self.inputs.T / points.shape[1]
        cross = _covariance(_distances(points, self.inputs, self.groups), inner, self.hyper)
        mean = self.level + cross @ self.weights
        solved = np.linalg.solve(self.factor, cross.T)
        square = (points**2).mean(1)
        prior = np.exp(2 * self.hyper[0]) * (0.5 + 0.25 * square + 0.25 * square**2) + OFFSET_VARIANCE
        return mean, np.sqrt(np.maximum(prior - (solved**2).sum(0), 1e-12))

    @property
    def noise_sd(self) -> float:
        return float(np.exp(self.hyper[1]))


def standardise(history: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets scaled by mean and standard deviation over their union; a constant column becomes zero."""
    both = np.concatenate([history, candidates])
    scale = both.std(0)
    scale = np.where(scale > 1e-9, scale, np.inf)
    return (history - both.mean(0)) / scale, (candidates - both.mean(0)) / scale


def fit(
    inputs: Float[np.ndarray, "n features"],
    groups: Sequence[str],
    scores: Float[np.ndarray, " n"],
    *,
    noise_sd: float = 0.5,
) -> Surrogate:
    """MAP fit.

        k(x, x′) = a² [½ M₅₂(√Σ_g d_g²/ℓ_g²) + ¼ u + ¼ u²] + 4,   u = x·x′/D
        y ~ N(median(y), k + σ²)

    d_g² is the mean squared difference inside group g. Priors: a ~ LN(ln 1.5, 0.7), σ ~ LN(ln noise_sd, 0.3), ℓ_g ~
    LN(0, 0.7). The polynomial half is what lets fifteen points say more than "near what was good": u that more of
    something is better, u² that a moderate amount is. The median and the offset keep one bad run from moving the level.
    """
    groups = tuple(groups)
    names = list(dict.fromkeys(groups))
    centre = np.r_[np.log(1.5), np.log(noise_sd), np.zeros(len(names))]
    spread = np.r_[0.7, 0.3, np.full(len(names), 0.7)]
    level = float(np.median(scores))
    residual = scores - level
    distances, inner = _distances(inputs, inputs, groups), inputs @ inputs.T / inputs.shape[1]

    def losses(hypers: np.ndarray) -> np.ndarray:
        """Negative log posterior of a stack of hyperparameters, [stack]."""
        noise = np.exp(2 * hypers[:, 1])[:, None, None] * np.eye(len(scores))
        fit = negative_log_likelihood(_covariance(distances, inner, hypers) + noise, residual)
        return fit + 0.5 * (((hypers - centre) / spread) ** 2).sum(1)

    def with_gradient(hyper: np.ndarray) -> tuple[float, np.ndarray]:
        step = 1e-5
        values = losses(np.concatenate([hyper[None], hyper + step * np.eye(len(hyper))]))
        return float(values[0]), (values[1:] - values[0]) / step

    bounds = list(zip(centre - 4 * spread, centre + 4 * spread, strict=True))
    hyper = minimize(with_gradient, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30}).x
    noise = np.exp(2 * hyper[1]) * np.eye(len(scores))
    factor = np.linalg.cholesky(_covariance(distances, inner, hyper) + noise)
    weights = cho_solve((factor, True), residual)
    return Surrogate(inputs=inputs, groups=groups, hyper=hyper, factor=factor, weights=weights, level=level)


def _distances(a: np.ndarray, b: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Mean squared difference inside each group, [groups, a, b]."""
    labels = np.array(groups)
    parts = []
    for name in dict.fromkeys(groups):
        x, y = a[:, labels == name], b[:, labels == name]
        parts.append(((x[:, None] - y[None]) ** 2).mean(2))
    return np.stack(parts)


def _covariance(distances: np.ndarray, inner: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    """k for one set of hyperparameters, or for a stack of them."""
    amplitude = np.exp(2 * hyper[..., 0])[..., None, None]
    scaled = np.exp(-2 * hyper[..., 2:]) @ distances.reshape(len(distances), -1)
    radius = np.sqrt(5 * scaled).reshape(*hyper.shape[:-1], *inner.shape)
    return amplitude * (0.5 * matern(radius) + 0.25 * inner + 0.25 * inner**2) + OFFSET_VARIANCE


def matern(radius: np.ndarray, amplitude: np.ndarray | float = 1.0) -> np.ndarray:
    """C (1 + r + r²/3) e^{−r}: the Matérn-5/2 kernel of r = √5 d/ℓ."""
    return np.asarray(amplitude * (1 + radius + radius**2 / 3) * np.exp(-radius))


def negative_log_likelihood(covariances: np.ndarray, values: np.ndarray) -> np.ndarray:
    """½ yᵀK⁻¹y + ½ log |K| for each covariance of a stack, [stack]."""
    factor = np.linalg.cholesky(covariances)
    solved = np.linalg.solve(factor, np.broadcast_to(values, covariances.shape[:2])[..., None])[..., 0]
    return np.asarray(0.5 * (solved**2).sum(1) + np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1))


def log_expected_improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """log E[max(f − best, 0)] for f ~ N(mean, sd²), finite far below `best` too."""
    z = (mean - best) / sd
    t = np.maximum(-z, 0.0)
    near = np.log(np.maximum(np.exp(-0.5 * z**2 - 0.5 * _LOG_2PI) + z * ndtr(z), 1e-300))
    # φ(t) − t Φ(−t) = φ(t) [1 − t √(π/2) erfcx(t/√2)], whose bracket tends to 1/t²
    bracket = np.where(t < 1e3, 1 - t * np.sqrt(np.pi / 2) * erfcx(t / np.sqrt(2)), 1 / np.maximum(t, 1.0) ** 2)
    far = -0.5 * t**2 - 0.5 * _LOG_2PI + np.log(np.maximum(bracket, 1e-300))
    return np.log(sd) + np.where(z > -1, near, far)
