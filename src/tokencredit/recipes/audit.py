"""Statistics of searches and rankers, as the paper's tables use them (arXiv:2605.12944, T2, T15, T17)."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def permutation_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided exact p of the rank correlation: the share of all n! orders at least as extreme; n ≤ 9."""
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    centred = (a - a.mean()) / np.linalg.norm(a - a.mean())
    orders = np.array(list(permutations(b - b.mean())))
    rho = orders @ centred / np.linalg.norm(b - b.mean())
    return float((np.abs(rho) >= abs(spearman(x, y)) - 1e-12).mean())


def gap_area(scores: Sequence[float]) -> float:
    """Mean over the steps after the warm-up of (best of these so far − score).

    The paper does not define the quantity; this reading reproduces its printed value.
    """
    values = np.asarray(scores, dtype=np.float64)
    return float((np.maximum.accumulate(values) - values).mean())


def hit_at(decisions: Sequence[Sequence[float]], n: int) -> float:
    """Share of decisions whose best candidate is among the ranker's first n."""
    return float(np.mean([int(np.argmax(scores)) < n for scores in decisions]))


def mean_reciprocal_rank(decisions: Sequence[Sequence[float]]) -> float:
    """Mean of 1 / (the ranker's rank of the best candidate)."""
    return float(np.mean([1 / (int(np.argmax(scores)) + 1) for scores in decisions]))
