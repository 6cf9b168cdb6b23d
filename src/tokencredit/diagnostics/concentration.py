"""How concentrated the credit of a response is: Gini coefficient, effective-token ratio.

Every function takes weights of any sign and positive scale (it reads their magnitude) and returns one number a
response, NaN where it is not defined, so that each response has one vote in `mean_over_responses`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, response_lengths


class Mean(NamedTuple):
    """Mean over the responses where a number is defined, how many those are, and how many are left out."""

    value: float
    responses: int
    excluded: int


def gini(weights: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, " batch"]:
    """Gini coefficient of the weights of each response: 0 is uniform, (n−1)/n is one token.

        G = Σᵢ (2i − n − 1) w₍ᵢ₎ / (n Σ w),    w₍₁₎ ≤ … ≤ w₍ₙ₎

    NaN for fewer than two chosen tokens or Σ w = 0.

    Paper: ARCA (arXiv:2606.00257).
    """
    w = chosen(weights, mask).abs()
    n = response_lengths(mask)
    ordered = torch.where(mask, w, -1.0).sort(dim=1).values.clamp_min(0.0)  # what is not chosen comes first
    rank = torch.arange(1, mask.shape[1] + 1, device=mask.device) - (mask.shape[1] - n)
    total = ((2 * rank - n - 1) * ordered).sum(1)
    mass = w.sum(1)
    defined = (n[:, 0] >= 2) & (mass > 0)
    return torch.where(defined, total / torch.where(defined, n[:, 0] * mass, 1.0), torch.nan)


def effective_token_ratio(
    weights: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, " batch"]:
    """Effective number of tokens over their number: 1 is uniform, 1/n is one token.

        EffN/T = (Σ w)² / (n Σ w²)

    NaN for an empty response or Σ w = 0.

    Paper: ARCA (arXiv:2606.00257).
    """
    w = chosen(weights, mask).abs()
    w = w / w.amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny) if w.numel() else w
    square = w.square().sum(1)
    defined = square > 0
    n = response_lengths(mask)[:, 0]
    return torch.where(defined, w.sum(1).square() / torch.where(defined, n * square, 1.0), torch.nan)


def mean_over_responses(values: Float[Tensor, " batch"]) -> Mean:
    """Each response with a defined value has one vote; NaN when there is none."""
    defined = torch.isfinite(values)
    count = int(defined.sum())
    total = float(torch.where(defined, values, 0.0).sum())
    return Mean(total / count if count else float("nan"), count, values.numel() - count)
