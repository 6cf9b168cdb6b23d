"""Reductions over the chosen tokens. Masking is `where`, so NaN outside the mask never spreads.

Statistics are returned as (total, count) or divided last, in float64, so that micro-batches and ranks add up.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import group_totals


class Moments(NamedTuple):
    """Mean, population standard deviation and number of tokens of the unit a row belongs to; each [batch, 1]."""

    mean: Float[Tensor, "batch 1"]
    std: Float[Tensor, "batch 1"]
    tokens: Float[Tensor, "batch 1"]


def chosen(x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """`x` in float64, detached, 0 outside the mask."""
    return torch.where(mask, x.detach().double(), 0.0)


def unit_keys(batch: TokenBatch, unit: str) -> Int[Tensor, " batch"] | None:
    """The key that rows of one unit share; None stands for "response", where each row is its own unit."""
    if unit == "response":
        return None
    return batch.group_ids if unit == "group" else torch.zeros_like(batch.group_ids)


def unit_sums(
    x: Float[Tensor, "batch response"], batch: TokenBatch, unit: str | Int[Tensor, " batch"]
) -> Float[Tensor, "batch 1"]:
    """Sum of `x` over the chosen tokens of the row's response, group, batch or own key."""
    rows = chosen(x, batch.response_mask).sum(1, keepdim=True)
    key = unit_keys(batch, unit) if isinstance(unit, str) else unit
    return rows if key is None else group_totals(rows, key, batch.reducer)


def unit_moments(x: Float[Tensor, "batch response"], batch: TokenBatch, unit: str) -> Moments:
    """Moments of `x` over the chosen tokens of the row's response, group or batch, pooled over tokens."""
    x = chosen(x, batch.response_mask)
    count = unit_sums(torch.ones_like(x), batch, unit)
    mean = unit_sums(x, batch, unit) / count.clamp_min(1.0)
    variance = unit_sums((x - mean).square(), batch, unit) / count.clamp_min(1.0)
    return Moments(mean, variance.sqrt(), count)


def response_lengths(mask: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch 1"]:
    """Number of chosen tokens, [batch, 1]."""
    return mask.sum(1, keepdim=True)


def positions(mask: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch response"]:
    """0-based index among the chosen tokens of the row; meaningless outside the mask."""
    return mask.long().cumsum(1) - 1


def compact(x: Tensor, mask: Bool[Tensor, "batch response"]) -> Tensor:
    """The chosen tokens of each row moved to the left, order kept, 0 behind them; same shape."""
    target = torch.where(mask, positions(mask), mask.shape[1])
    wide = x.new_zeros(x.shape[0], x.shape[1] + 1)  # the last column catches what is not chosen
    return wide.scatter(1, target, torch.where(mask, x, torch.zeros_like(x)))[:, :-1]


def spread(compacted: Tensor, mask: Bool[Tensor, "batch response"]) -> Tensor:
    """Inverse of `compact`: back to the places of the chosen tokens, 0 elsewhere."""
    back = compacted.gather(1, positions(mask).clamp_min(0))
    return torch.where(mask, back, torch.zeros_like(back))


def row_quantile(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], q: float
) -> Float[Tensor, "batch 1"]:
    """Linear-interpolated quantile of each row over its chosen tokens; 0 for an empty row."""
    count = response_lengths(mask).clamp_min(1)
    ordered = torch.where(mask, x, torch.inf).sort(dim=1).values
    at = q * (count - 1).double()
    at = torch.where((at - at.round()).abs() < 1e-9, at.round(), at)  # 0.29 · 100 is 28.999… in floating point
    low, high = at.floor().long(), at.ceil().long()
    left, right = ordered.gather(1, low), ordered.gather(1, high)
    return torch.where(mask.any(1, keepdim=True), torch.lerp(left, right, (at - low).to(left.dtype)), 0.0)
