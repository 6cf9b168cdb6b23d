"""avg@k and pass@k from several samples a problem, with bootstrap intervals over problems."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from tokencredit.diagnostics.stats import Interval, interval
from tokencredit.errors import TokenCreditError

Outcomes = Shaped[np.ndarray, "problem sample"]  # bool, or 0 and 1


class Evaluation(NamedTuple):
    """Numbers of one model on one set of problems; `pass_at` by k."""

    problems: int
    samples: int
    avg: Interval
    pass_at: dict[int, Interval]


def evaluate(outcomes: Outcomes, ks: Iterable[int] = (1,), *, level: float = 0.95, seed: int = 0) -> Evaluation:
    """avg@n over all n samples and pass@k for every k, with intervals over problems.

    `outcomes[p, s]` says whether sample s solved problem p.
    """
    solved = _checked(outcomes)
    return Evaluation(
        problems=solved.shape[0],
        samples=solved.shape[1],
        avg=interval(avg_at_k(solved), level, seed=seed),
        pass_at={k: interval(pass_at_k(solved, k), level, seed=seed) for k in sorted(set(ks))},
    )


def avg_at_k(outcomes: Outcomes) -> Float[np.ndarray, " problem"]:
    """avg@k: the share of each problem's k samples that solve it."""
    return _checked(outcomes).mean(1)


def pass_at_k(outcomes: Outcomes, k: int) -> Float[np.ndarray, " problem"]:
    """pass@k of each problem: the probability that k of its n samples, drawn without replacement, hold a solution."""
    solved = _checked(outcomes)
    return pass_at_k_from_counts(solved.shape[1], solved.sum(1), k)


def pass_at_k_from_counts(n: int, correct: Int[np.ndarray, " problem"], k: int) -> Float[np.ndarray, " problem"]:
    """The unbiased estimator of pass@k from c correct of n samples.

        pass@k = 1 − C(n−c, k) / C(n, k) = 1 − Π_{i=n−c+1}^{n} (1 − k/i)

    1 ≤ k ≤ n. Exactly 1 where fewer than k samples are wrong; elsewhere all factors lie in (0, 1], so the product stays
    exact where the binomials overflow. k = 1 is the mean.

    Paper: Evaluating Large Language Models Trained on Code (arXiv:2107.03374), eq. 1.
    """
    if not 1 <= k <= n:
        raise TokenCreditError(
            f"`k` of pass@k must be in [1, {n}], the number of samples a problem, got {k}",
            hint="take a smaller k, or sample more",
        )
    counts = np.asarray(correct)
    if counts.size and not (counts.min() >= 0 and counts.max() <= n):
        raise TokenCreditError(f"correct samples must be in [0, {n}], got {counts.min()} to {counts.max()}")
    wrong = n - counts
    index = np.arange(k, n + 1)  # below k the factors are negative: they would only meet the exact 0 at i = k
    factors = np.where(index[None, :] > wrong[:, None], 1.0 - k / index[None, :], 1.0)
    return np.where(wrong < k, 1.0, 1.0 - factors.prod(1))


def _checked(outcomes: Outcomes) -> Bool[np.ndarray, "problem sample"]:
    if outcomes.ndim != 2 or outcomes.size == 0:
        raise TokenCreditError(f"outcomes must be [problem, sample] and not empty, got shape {list(outcomes.shape)}")
    other = (outcomes != 0) & (outcomes != 1)
    if bool(other.any()):
        raise TokenCreditError(
            f"outcomes must be true or false, got {outcomes[other][0]}",
            hint="compare rewards with a threshold first: `rewards > 0.5`",
        )
    return outcomes.astype(bool)
