"""What the credit did in each quadrant (polarity × entropy), and where entropy and outcome go together."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import chosen, positions, response_lengths
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.entropy.quadrants import QUADRANTS, Threshold, quadrant_masks

# Fixed, so that histograms of different steps and runs add up; nats. The last bin is open.
ENTROPY_EDGES = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, float("inf"))


class QuadrantStatistics(NamedTuple):
    """One quadrant: shares of all chosen tokens and of all |Â|, mean entropy in nats, Σ Â over all chosen tokens."""

    tokens: float
    mass: float
    entropy: float
    net: float


def quadrant_sums(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    polarity: Float[Tensor, "batch response"] | None = None,
    threshold: Threshold = "pooled",
) -> Float[Tensor, "quadrant 4"]:
    """Per quadrant: number of tokens, Σ |Â|, Σ H, Σ Â over this process; they add up over ranks.

    The sign of `polarity` (default: the advantages themselves) places a token. Hand in the estimator's advantages to
    see tokens that a method left without credit; a token whose polarity is 0 lies in no quadrant.
    """
    mask = batch.response_mask
    a, h = chosen(advantages, mask), chosen(batch.require("entropies"), mask)
    members = quadrant_masks(advantages if polarity is None else polarity, batch, threshold=threshold)
    columns = torch.stack((torch.ones_like(a), a.abs(), h, a)).flatten(1)
    return torch.stack([members[name] for name in QUADRANTS]).flatten(1).double() @ columns.T


def quadrant_statistics(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    polarity: Float[Tensor, "batch response"] | None = None,
    threshold: Threshold = "pooled",
) -> dict[str, QuadrantStatistics]:
    """Shares of tokens and of |Â|, mean entropy, and net advantage of PHR, PLR, NHR and NLR.

        tokens = N_q / N     mass = Σ_q |Â| / Σ |Â|     entropy = Σ_q H / N_q     net = Σ_q Â / N

    N counts all chosen tokens, those with no polarity included, so `tokens` need not sum to one. An empty quadrant has
    NaN entropy.
    """
    sums = quadrant_sums(advantages, batch, polarity=polarity, threshold=threshold)
    whole = torch.stack((batch.response_mask.sum().double(), chosen(advantages, batch.response_mask).abs().sum()))
    sums, whole = batch.reducer.total(sums), batch.reducer.total(whole)
    return statistics_from_sums(sums.tolist(), *whole.tolist())


def statistics_from_sums(sums: list[list[float]], count: float, mass: float) -> dict[str, QuadrantStatistics]:
    """`quadrant_sums` of one or more processes, the number of chosen tokens and the whole |Â| as statistics."""
    count = count or float("nan")  # a share of nothing is not defined
    return {
        name: QuadrantStatistics(
            tokens / count, absolute / mass if mass else 0.0, entropy / (tokens or float("nan")), net / count
        )
        for name, (tokens, absolute, entropy, net) in zip(QUADRANTS, sums, strict=True)
    }


def weight_ratio(
    advantages: Float[Tensor, "batch response"],
    base: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> tuple[Float[Tensor, "batch response"], Bool[Tensor, "batch response"]]:
    """w = Â / base, and where it is defined: chosen tokens whose base is not 0; w is 0 elsewhere."""
    b = chosen(base, mask)
    defined = b != 0
    return torch.where(defined, chosen(advantages, mask) / torch.where(defined, b, 1.0), 0.0), defined


def relative_positions(mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """(t + ½) / n of the t-th of n chosen tokens, in (0, 1); 0 outside the mask."""
    place = (positions(mask).double() + 0.5) / response_lengths(mask).clamp_min(1)
    return chosen(place, mask)


def correlation_sums(
    x: Float[Tensor, "batch response"], y: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, " 6"]:
    """n, Σx, Σy, Σx², Σy², Σxy over the chosen tokens; they add up over ranks."""
    x, y = chosen(x, mask), chosen(y, mask)
    return torch.stack((mask.sum().double(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()))


def pearson_from_sums(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson correlation from `correlation_sums`; NaN where a variance is 0 up to rounding."""
    variance_x, variance_y = n * xx - x * x, n * yy - y * y
    if n < 2 or variance_x <= 1e-12 * n * xx or variance_y <= 1e-12 * n * yy:
        return float("nan")
    return float((n * xy - x * y) / np.sqrt(variance_x * variance_y))


def entropy_histograms(
    batch: TokenBatch, polarity: Float[Tensor, "batch response"]
) -> dict[str, Int[np.ndarray, " bin"]]:
    """Counts of chosen tokens by entropy (`ENTROPY_EDGES`, nats), apart for positive, negative and no polarity."""
    mask = batch.response_mask
    h, sign = batch.require("entropies").detach().double()[mask], polarity.detach()[mask].sign()
    edges = np.array(ENTROPY_EDGES)
    return {
        name: np.histogram(h[sign == value].cpu().numpy().clip(0.0), edges)[0]
        for name, value in (("positive", 1), ("negative", -1), ("none", 0))
    }
