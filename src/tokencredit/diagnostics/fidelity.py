"""How a method's credit compares, token by token, with exact credit.

Everything is a sum over units (prompts), so that a bootstrap over units only reweighs sums; ranks and thresholds are
taken once over all tokens.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tokencredit.diagnostics.stats import Statistic, average_ranks, divided, ratio_of_sums

TOP_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FidelitySums:
    """Sums over the tokens of each unit.

    `ranks`: n, Σx, Σy, Σx², Σy², Σxy of the ranks of credit (x) and exact credit (y). `mass`: Σ|A*|. `credited`: Σ|A*|
    over tokens with Â ≠ 0, `agreeing`: of these, where the sign of Â is that of A*. `captured`: Σ|A*| over the tokens
    with the largest |Â|.
    """

    ranks: Float[np.ndarray, "six unit"]
    mass: Float[np.ndarray, " unit"]
    credited: Float[np.ndarray, " unit"]
    agreeing: Float[np.ndarray, " unit"]
    captured: Float[np.ndarray, " unit"]


def fidelity_sums(
    advantages: Float[np.ndarray, " token"],
    exact: Float[np.ndarray, " token"],
    unit: Int[np.ndarray, " token"],
    *,
    top: float = TOP_SHARE,
) -> FidelitySums:
    """The sums of one method; tokens in any order, `unit` numbers the units from 0."""
    units = int(unit.max()) + 1
    x, y, weight = average_ranks(advantages), average_ranks(exact), np.abs(exact)

    def summed(values: Float[np.ndarray, " token"]) -> Float[np.ndarray, " unit"]:
        return np.bincount(unit, weights=values, minlength=units)

    return FidelitySums(
        ranks=np.stack([summed(item) for item in (np.ones_like(x), x, y, x * x, y * y, x * y)]),
        mass=summed(weight),
        credited=summed(np.where(advantages != 0, weight, 0.0)),
        agreeing=summed(np.where(advantages * exact > 0, weight, 0.0)),
        captured=summed(weight * top_inclusion(np.abs(advantages), top)),
    )


def rank_correlation(sums: FidelitySums) -> Statistic:
    """Spearman's correlation of credit and exact credit over all tokens; equal values share their mean rank."""

    def statistic(weights: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, " resample"]:
        n, x, y, xx, yy, xy = (weights @ sums.ranks.T).T
        spread = np.maximum(n * xx - x * x, 0.0) * np.maximum(n * yy - y * y, 0.0)
        return divided(n * xy - x * y, np.sqrt(spread))

    return statistic


def sign_agreement(sums: FidelitySums) -> Statistic:
    """Share of Σ|A*| on credited tokens whose credit has the sign of the exact credit; ½ is a coin."""
    return ratio_of_sums(sums.agreeing, sums.credited)


def captured_share(sums: FidelitySums) -> Statistic:
    """Share of Σ|A*| on the tokens with the largest |Â|; the share of those tokens (0.2) is what random credit gets."""
    return ratio_of_sums(sums.captured, sums.mass)


def top_inclusion(size: Float[np.ndarray, " token"], share: float) -> Float[np.ndarray, " token"]:
    """The probability that each token is among the `share` largest when ties are broken at random."""
    count = max(1, round(share * size.size))
    threshold = np.partition(size, size.size - count)[size.size - count]
    above, tied = size > threshold, size == threshold
    return above + tied * (count - above.sum()) / tied.sum()
