"""Keep some tokens and rescale: how many, which ones, and by how much the rest is scaled."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import count_chosen, kept, level, response_lengths, unit_sums
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.spec import Scope

Normalize = Literal["all", "selected"]
Rounding = Literal["floor", "round", "ceil"]
Side = Literal["low", "high"]
Mass = Literal["response", "group", "polarity", "batch"]


def keep_selected(
    advantages: Float[Tensor, "batch response"],
    selected: Bool[Tensor, "batch response"],
    batch: TokenBatch,
    normalize: Normalize = "all",
) -> Float[Tensor, "batch response"]:
    """The credit of the selected tokens, 0 elsewhere.

    "all" leaves the division by all tokens to the host's loss; "selected" multiplies by the number of tokens over the
    number of selected tokens of the batch, as if the loss divided by the selected ones.
    """
    factor = 1.0
    if normalize == "selected":
        counts = torch.stack((count_chosen(selected), count_chosen(batch.response_mask)))
        some, count = batch.reducer.total(counts).tolist()
        factor = count / max(some, 1)
    return kept(level(advantages, batch.response_mask) * factor, selected)


def selection_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """Choosing tokens within a response takes only the response, counting the selected ones the whole batch."""
    return "batch" if hyperparameters["normalize"] == "selected" else "response"


def share_of(share: float, count: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """share · count in float64, rounded to nine decimals: round, floor and ceil then give what the decimals mean.

    A share times an integer tensor would be float32, where 0.3 · 50 is above 15 and 0.1 · 90 below 9.
    """
    return (share * count.double()).mul(1e9).round() / 1e9


def count_share(share: float, count: Int[Tensor, "*shape"], rounding: Rounding) -> Int[Tensor, "*shape"]:
    """share · count as a whole number, at least one."""
    exact = share_of(share, count)
    rounded = {"floor": exact.floor, "round": exact.round, "ceil": exact.ceil}[rounding]()
    return rounded.long().clamp_min(1)


def kept_count(keep: float, mask: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch 1"]:
    """round(keep · n), at least one token of a response that has any."""
    length = response_lengths(mask)
    return count_share(keep, length, "round").minimum(length)


def lowest_or_highest(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], keep: float, side: Side
) -> Bool[Tensor, "batch response"]:
    """The max(1, round(keep · n)) chosen tokens of each response with the lowest or highest `x`, ties by position."""
    length, count = response_lengths(mask), kept_count(keep, mask)
    order = torch.where(mask, x.detach().double(), torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return mask & (rank < count if side == "low" else rank >= length - count)


def rescale_mass(
    credit: Float[Tensor, "batch response"], reference: Float[Tensor, "batch response"], batch: TokenBatch, per: Mass
) -> Float[Tensor, "batch response"]:
    """Scale `credit` so that Σ|credit| equals Σ|reference| in each unit.

    "polarity" treats the positive and the negative tokens of a group apart, by the sign of `reference`. Where
    the credit of a unit is all 0 it stays 0.
    """
    sides, unit = [torch.ones_like(reference, dtype=torch.bool)], str(per)
    if per == "polarity":
        sides, unit = [reference > 0, reference <= 0], "group"
    result = torch.zeros_like(credit)
    for side in sides:
        mass = unit_sums(torch.where(side, credit.abs(), 0.0), batch, unit)
        target = unit_sums(torch.where(side, reference.abs(), 0.0), batch, unit)
        factor = torch.where(mass > 0, target / torch.where(mass > 0, mass, 1.0), 1.0)
        result = torch.where(side, credit * factor, result)
    return result
