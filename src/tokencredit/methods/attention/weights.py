"""Transforms that move credit by the entropy of the attention: anchors (concentrated) and explorers (diffuse).

`attention_blend` is the published reweighting. `attention_schedule`, `attention_tilt` and `attention_gate` are methods
of our own on the same signal. The signal is Ê, the entropy of the head-averaged attention row over the logarithm of the
keys it sees, in [0, 1].
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, positions, response_lengths, unit_moments
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import extrema
from tokencredit.methods.controls import keep_only, kept_count, token_uniforms
from tokencredit.methods.spec import Endpoints

Blend = Literal["low_to_high", "high_to_low", "static_anchor", "static_explorer"]
Direction = Literal["low_to_high", "high_to_low", "anchors", "explorers", "low_to_uniform", "uniform"]
Signal = Literal["attention", "predictive"]
Sign = Literal["both", "positive"]
SIGNAL_FIELDS: Mapping[str, str] = {"attention": "attention_entropies", "predictive": "entropies"}

# Weights of the lowest and of the highest Ê of the batch, each at the start and at the end of the schedule.
BLENDS: Mapping[str, tuple[Endpoints, Endpoints]] = {
    "low_to_high": ((1.0, 0.0), (0.0, 1.0)),
    "high_to_low": ((0.0, 1.0), (1.0, 0.0)),
    "static_anchor": ((1.0, 1.0), (0.0, 0.0)),
    "static_explorer": ((0.0, 0.0), (1.0, 1.0)),
}


def signal_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What a transform with a `signal` option reads."""
    return frozenset({SIGNAL_FIELDS[hyperparameters["signal"]]})


def blend_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `attention_blend` reads: the step only where its weights move, and move by steps."""
    given = (hyperparameters[name] for name in ("direction", "low", "high"))
    moves = any(start != end for start, end in blend_endpoints(*given))
    by_step = moves and hyperparameters["warmup_share"] is None
    return signal_fields(hyperparameters) | ({"step"} if by_step else set())


def attention_blend(  # noqa: PLR0913 - the parameters of one published formula, and a share of the run for its steps
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    direction: Blend = "low_to_high",
    tau: float = 0.8,
    warmup_steps: int = 80,
    warmup_share: float | None = None,
    low: Endpoints | None = None,
    high: Endpoints | None = None,
    only: Sign = "both",
    signal: Signal = "attention",
) -> Float[Tensor, "batch response"]:
    """Weight tokens by their attention entropy: anchors first, explorers later (the published reweighting).

        ᾱ_t = (e^{Ê_t/τ} − e^{m/τ}) / (e^{M/τ} − e^{m/τ}),   m, M the least and greatest Ê of the batch;   ½ if m = M
        w_t = (1 − ᾱ_t) w_low + ᾱ_t w_high,   Â′_t = w_t Â_t
        w_low = low₀ + r (low₁ − low₀),   w_high = high₀ + r (high₁ − high₀),   r = min(step / warmup_steps, 1)

    Tokens with concentrated attention have stable gradients and carry the beginning of training; those with diffuse
    attention are volatile, and get their credit once there is something to build on. Weights lie between the endpoints
    and do **not** have mean one, so the step size moves with the schedule: with `low_to_high` every weight is ½ at half
    the schedule. Compare with `match_mass` and `mean_weight` behind it.

    Args:
      advantages: per-token advantages, usually constant within a response.
      batch: must carry `attention_entropies`, whole: m and M run over its chosen tokens on all ranks. Where the weights
        move it must carry `step`.
      direction: the endpoints (low₀ → low₁, high₀ → high₁): low_to_high (1 → 0, 0 → 1), high_to_low its reverse,
        static_anchor (1, 0) and static_explorer (0, 1), which stay.
      tau: temperature of the softmax that ᾱ comes from; a small one gives weight to the highest Ê only.
      warmup_steps: optimiser steps until the weights have reached their end, where they stay.
      warmup_share: the same as a share of the run, (0, 1]; it replaces `warmup_steps` and reads `batch.progress`.
      low, high: other endpoints [start, end] for the lowest and the highest Ê, at least 0.
      only: "positive" leaves Â < 0 alone.
      signal: "predictive" takes the policy's own entropy in nats, a control; τ = 0.8 ln(vocabulary) then corresponds to
        entropies that are divided by ln(vocabulary).

    Returns:
      Advantages [batch, response], zero outside the response mask.

    Paper: attention entropy (arXiv:2605.07660), App. K, Eq. 26–30, Tables 10 and 13.
    Deviation: the paper computes α as a softmax and adds an ε to both denominators; the sum cancels, and ours is the
    closed form without ε. Where all Ê are equal the paper's ᾱ is 0, ours ½.
    """
    mask = batch.response_mask
    entropies = chosen(batch.require(SIGNAL_FIELDS[signal]), mask)
    place = softmax_place(entropies, batch, tau)
    lowest, highest = blend_endpoints(direction, low, high)
    moves = lowest[0] != lowest[1] or highest[0] != highest[1]
    done = _schedule_done(batch, warmup_steps, warmup_share) if moves else 0.0
    at_lowest = lowest[0] + done * (lowest[1] - lowest[0])
    at_highest = highest[0] + done * (highest[1] - highest[0])
    return _weighted(advantages, (1.0 - place) * at_lowest + place * at_highest, mask, only)


def blend_endpoints(direction: Blend, low: Endpoints | None, high: Endpoints | None) -> tuple[Endpoints, Endpoints]:
    """The endpoints of the lowest and of the highest Ê: those of the direction, unless others are given."""
    lowest, highest = BLENDS[direction]
    return lowest if low is None else low, highest if high is None else high


def softmax_place(
    entropies: Float[Tensor, "batch response"], batch: TokenBatch, tau: float
) -> Float[Tensor, "batch response"]:
    """ᾱ of `attention_blend`: 0 at the least and 1 at the greatest chosen value of the batch, ½ where all are equal."""
    least, greatest = extrema(entropies, batch.response_mask, batch.reducer)
    span = greatest - least
    if not bool(span > 0):  # all equal, or no token at all: −∞
        return torch.full_like(entropies, 0.5)
    inside = torch.where(batch.response_mask, entropies, least)
    if float(span / tau) < 1e-12:  # as steep as a straight line, to the last digit
        return (inside - least) / span
    # e^{(x−M)/τ} (1 − e^{(m−x)/τ}) / (1 − e^{(m−M)/τ}): no exponent is above 0, so that nothing overflows.
    rise = torch.expm1((least - inside) / tau) / torch.expm1(-span / tau)
    return torch.exp((inside - greatest) / tau) * rise


def _schedule_done(batch: TokenBatch, warmup_steps: int, warmup_share: float | None) -> float:
    """How much of the schedule is done, in [0, 1]."""
    if warmup_share is None:
        return min(batch.require("step") / warmup_steps, 1.0)
    return min((batch.progress or 0.0) / warmup_share, 1.0)


def attention_schedule(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    beta: float = 0.5,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    signal: Signal = "attention",
) -> Float[Tensor, "batch response"]:
    """Anchors early, explorers late: weights linear in the rank of the attention entropy within the response.

        Â′_t = Â_t (1 + β λ(u) (2 q_t − 1)),   q_t = (r_t − 1) / (n − 1),   low_to_high: λ(u) = 2u − 1

    u is the progress of training, r_t the rank of Ê_t among the n chosen tokens of the response, ties averaged; q = ½
    where n = 1. Weights have mean one per response, lie in [1 − β, 1 + β] and depend on Ê through its order alone.
    β = 0 and λ = 0 are the identity.

    * `direction`: high_to_low λ = 1 − 2u · anchors −1 · explorers +1 · low_to_uniform min(0, 2u − 1) · uniform 0.
    * `only="positive"` leaves Â < 0 alone. `signal="predictive"` ranks the policy's own entropy instead, a control.

    Source: ours, made before the text of arXiv:2605.07660 was known to us. Unlike its rule (`attention_blend`) it ranks
    within the response, keeps mean one and has a schedule over the whole run.
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
    """Anchors early, explorers late: weights exponential in the z-score of the attention entropy.

        Â′_t = Â_t v_t / mean v,   v_t = exp(κ λ(u) z_t),   z = clip((Ê − mean) / std, −2, 2) within the response

    Moments are population moments over the chosen tokens; equal entropies give z = 0. κ = 0 is the identity. Directions
    and options: see `attention_schedule`.

    Source: ours, a variant of `attention_schedule`; not the rule of arXiv:2605.07660.
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
    """Anchors always, explorers admitted late: a gate that moves up the ranks of the attention entropy.

        Â′_t = Â_t v_t / mean v,   v_t = f + (1 − f) σ((c − q_t) / τ),   c = 0.3 + 0.8 (λ(u) + 1) / 2

    f = `floor`; with low_to_high, (λ + 1)/2 is the progress u. f = 1 is the identity. q, directions and options: see
    `attention_schedule`; "uniform" holds the gate at u = ½.

    Source: ours, a variant of `attention_schedule`; not the rule of arXiv:2605.07660.
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

    Paper: attention entropy (arXiv:2605.07660), 20 % of the response. Its subsets divide by the selected tokens (Eq.
    17, Table 10), which is what the presets `anchors` and `explorers` do. Rounding and ties are ours.
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
    place: Literal["before", "through"] = "before",
    normalize: Literal["all", "selected"] = "all",
) -> Float[Tensor, "batch response"]:
    """Credit only a stretch of each response, the control of every method that might be position in disguise.

        place="before":   Â′_t = Â_t · 1[start ≤ (t − 1)/n < stop]
        place="through":  Â′_t = Â_t · 1[start < t/n ≤ stop]

    t counts chosen tokens from 1 to n. "before" never leaves the first stretch of a short response empty; "through" is
    the paper's, whose first fifth t/n ≤ 0.2 holds no token of a response of four. `normalize`: see `keep_attention`.
    start = 0, stop = 1 is the identity.

    Paper: the first and the last fifth (t/T ≤ 0.2, t/T > 0.8) are controls of arXiv:2605.07660: "through", "selected"
    (presets `first_fifth`, `last_fifth`). The halves and "before" are ours.
    """
    mask = batch.response_mask
    length = response_lengths(mask).clamp_min(1)
    if place == "before":
        share = positions(mask).double() / length
        inside = (share >= start) & (share < stop)
    else:
        share = (positions(mask) + 1).double() / length
        inside = (share > start) & (share <= stop)
    return keep_only(advantages, mask & inside, batch, normalize)


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
    length, count = response_lengths(mask), kept_count(keep, mask)
    order = torch.where(mask, x.detach().double(), torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return mask & (rank < count if side == "low" else rank >= length - count)


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
