"""Transforms that move credit by the entropy of the attention: anchors (concentrated) and explorers (diffuse).

The formula of the published reweighting is not known to us: the three schedules are our reconstructions of it, and the
signal is Ê, the entropy of the head-averaged attention row over the logarithm of the keys it sees, in [0, 1].
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.masked import chosen, positions, response_lengths, unit_moments
from tokencredit.methods.controls import token_uniforms
from tokencredit.methods.spec import Scope
from tokencredit.records import TokenBatch

Direction = Literal["low_to_high", "high_to_low", "anchors", "explorers", "low_to_uniform", "uniform"]
Signal = Literal["attention", "predictive"]
Sign = Literal["both", "positive"]
SIGNAL_FIELDS: Mapping[str, str] = {"attention": "attention_entropies", "predictive": "entropies"}


def signal_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What a transform with a `signal` option reads."""
    return frozenset({SIGNAL_FIELDS[hyperparameters["signal"]]})


def selection_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """Counting the selected tokens takes the whole batch, choosing them only the response."""
    return "batch" if hyperparameters["normalize"] == "selected" else "response"


def attention_schedule(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    beta: float = 0.5,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    signal: Signal = "attention",
) -> Float[Tensor, "batch response"]:
    """Anchors early, explorers late: weights linear in the rank of the attention entropy.

        Â′_t = Â_t (1 + β λ(u) (2 q_t − 1)),   q_t = (r_t − 1) / (n − 1),   low_to_high: λ(u) = 2u − 1

    u is the progress of training, r_t the rank of Ê_t among the n chosen tokens of the response, ties averaged; q = ½
    where n = 1. Weights have mean one per response, lie in [1 − β, 1 + β] and depend on Ê through its order alone.
    β = 0 and λ = 0 are the identity.

    * `direction`: high_to_low λ = 1 − 2u · anchors −1 · explorers +1 · low_to_uniform min(0, 2u − 1) · uniform 0.
    * `only="positive"` leaves Â < 0 alone. `signal="predictive"` ranks the policy's own entropy instead, a control.

    Paper: attention entropy (arXiv:2605.07660). Our reconstruction of the schedule; β is ours.
    """
    strength = schedule_strength(direction, batch)
    mask = batch.response_mask
    quantiles = rank_quantiles(batch.require(SIGNAL_FIELDS[signal]), mask)
    return _weighted(advantages, 1.0 + beta * strength * (2.0 * quantiles - 1.0), mask, only)


def attention_tilt(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    kappa: float = 0.25,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    signal: Signal = "attention",
) -> Float[Tensor, "batch response"]:
    """The schedule as an exponential tilt.

        Â′_t = Â_t v_t / mean v,   v_t = exp(κ λ(u) z_t),   z = clip((Ê − mean) / std, −2, 2) within the response

    Moments are population moments over the chosen tokens; equal entropies give z = 0. κ = 0 is the identity. Directions
    and options: see `attention_schedule`.

    Source: ours, a second reconstruction.
    """
    mask = batch.response_mask
    entropies = chosen(batch.require(SIGNAL_FIELDS[signal]), mask)
    moments = unit_moments(entropies, batch, "response")
    spread_out = moments.std > 1e-12
    z = torch.where(spread_out, (entropies - moments.mean) / torch.where(spread_out, moments.std, 1.0), 0.0)
    tilt = torch.exp(kappa * schedule_strength(direction, batch) * z.clamp(-2.0, 2.0))
    return _weighted(advantages, _mean_one(tilt, mask), mask, only)


def attention_gate(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    floor: float = 0.3,
    tau: float = 0.1,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    signal: Signal = "attention",
) -> Float[Tensor, "batch response"]:
    """The schedule as a moving gate: anchors always on, explorers admitted late.

        Â′_t = Â_t v_t / mean v,   v_t = f + (1 − f) σ((c − q_t) / τ),   c = 0.3 + 0.8 (λ(u) + 1) / 2

    f = `floor`; with low_to_high, (λ + 1)/2 is the progress u. f = 1 is the identity. q, directions and options: see
    `attention_schedule`; "uniform" holds the gate at u = ½.

    Source: ours, a third reconstruction.
    """
    mask = batch.response_mask
    quantiles = rank_quantiles(batch.require(SIGNAL_FIELDS[signal]), mask)
    centre = 0.3 + 0.4 * (schedule_strength(direction, batch) + 1.0)
    gate = floor + (1.0 - floor) * torch.sigmoid((centre - quantiles) / tau)
    return _weighted(advantages, _mean_one(gate, mask), mask, only)


def keep_attention(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    side: Literal["low", "high"] = "low",
    keep: float = 0.2,
    normalize: Literal["all", "selected"] = "all",
    signal: Signal = "attention",
) -> Float[Tensor, "batch response"]:
    """Credit only anchors ("low") or explorers ("high").

        Â′ = Â · 1[t among the k lowest or highest Ê of its response],   k = max(1, round(keep · n))

    Ties go by position: the earlier token ranks lower. "all" divides by all tokens in the host's loss, "selected"
    multiplies by Σn / Σ1[·] over the batch, as if it divided by the selected ones. keep = 1 is the identity.

    Paper: attention entropy (arXiv:2605.07660): 20 %. Rounding and ties are ours.
    """
    mask = batch.response_mask
    entropies = chosen(batch.require(SIGNAL_FIELDS[signal]), mask)
    return keep_only(advantages, lowest_or_highest(entropies, mask, keep, side), batch, normalize)


def keep_positions(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    start: float = 0.0,
    stop: float = 1.0,
    normalize: Literal["all", "selected"] = "all",
) -> Float[Tensor, "batch response"]:
    """Credit only a stretch of each response, the control of every method that might be position in disguise.

        Â′_t = Â_t · 1[start ≤ (t − 1)/n < stop]

    t counts chosen tokens from 1 to n. `normalize`: see `keep_attention`. start = 0, stop = 1 is the identity.

    Source: position halves are a control of arXiv:2605.07660; the construction is ours.
    """
    mask = batch.response_mask
    share = positions(mask).double() / response_lengths(mask).clamp_min(1)
    return keep_only(advantages, mask & (share >= start) & (share < stop), batch, normalize)


def schedule_strength(direction: Direction, batch: TokenBatch) -> float:
    """λ in [−1, 1]: −1 favours anchors, +1 explorers. Without `progress` training has just begun."""
    constant = {"anchors": -1.0, "explorers": 1.0, "uniform": 0.0}
    if direction in constant:
        return constant[direction]
    progress = 0.0 if batch.progress is None else batch.progress
    rising = 2.0 * progress - 1.0
    return {"low_to_high": rising, "high_to_low": -rising, "low_to_uniform": min(0.0, rising)}[direction]


def rank_quantiles(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """(rank − 1) / (n − 1) within the response, ties averaged; ½ where n = 1 and outside the mask."""
    values = torch.where(mask, x.detach().double(), torch.inf)
    ordered = values.sort(dim=1).values.contiguous()
    wanted = torch.where(mask, values, 0.0).contiguous()
    below = torch.searchsorted(ordered, wanted)
    upto = torch.searchsorted(ordered, wanted, right=True)
    steps = response_lengths(mask) - 1
    quantiles = (below + upto - 1).double() / (2.0 * steps.clamp_min(1))
    return torch.where(mask & (steps > 0), quantiles, 0.5)


def lowest_or_highest(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], keep: float, side: Literal["low", "high"]
) -> Bool[Tensor, "batch response"]:
    """The max(1, round(keep · n)) chosen tokens of each response with the lowest or highest `x`, ties by position."""
    length = response_lengths(mask)
    count = (keep * length).round().clamp_min(1).minimum(length)
    order = torch.where(mask, x.detach().double(), torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return mask & (rank < count if side == "low" else rank >= length - count)


def keep_only(
    advantages: Float[Tensor, "batch response"],
    selected: Bool[Tensor, "batch response"],
    batch: TokenBatch,
    normalize: Literal["all", "selected"],
) -> Float[Tensor, "batch response"]:
    """The credit of the selected tokens; "selected" rescales to their number over the whole batch."""
    factor = 1.0
    if normalize == "selected":
        kept, count = batch.reducer.total(torch.stack((selected.sum(), batch.response_mask.sum()))).tolist()
        factor = count / max(kept, 1)
    return torch.where(selected, chosen(advantages, batch.response_mask) * factor, 0.0)


def position_matched_shuffle(
    batch: TokenBatch, *, generator: torch.Generator, bins: int = 10, field: str = "attention_entropies"
) -> Float[Tensor, "batch response"]:
    """The field permuted over the batch within tenths of the response: a signal that keeps the position profile alone.

    Put it in the place of the field (`dataclasses.replace`) to ask whether a gain is more than position. Rows of this
    process only.
    """
    mask = batch.response_mask
    values = batch.require(field)
    stretch = (positions(mask) * bins // response_lengths(mask).clamp_min(1))[mask]
    draws = token_uniforms(batch, generator)[mask]
    place = stretch.double().argsort(stable=True)
    order = (stretch.double() + draws).argsort(stable=True)
    shuffled = torch.empty_like(values[mask])
    shuffled[place] = values[mask][order]
    return torch.zeros_like(values).masked_scatter(mask, shuffled)


def _mean_one(v: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Tensor:
    total = torch.where(mask, v, 0.0).sum(1, keepdim=True)
    return v * response_lengths(mask) / torch.where(total > 0, total, 1.0)


def _weighted(
    advantages: Float[Tensor, "batch response"], weights: Tensor, mask: Bool[Tensor, "batch response"], only: Sign
) -> Float[Tensor, "batch response"]:
    a = chosen(advantages, mask)
    weights = torch.where(a < 0, 1.0, weights) if only == "positive" else weights
    return chosen(a * weights, mask)
