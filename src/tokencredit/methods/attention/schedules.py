"""Schedules of our own on the attention entropy: linear, exponential and gated weights of mean one per response."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, response_lengths, unit_moments
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.attention.weights import (
    ENTROPY_FIELDS,
    RENAMED,
    Entropy,
    Sign,
    entropy_fields,
    scale_to_mean_one,
    weigh,
)
from tokencredit.methods.spec import Limit, MethodSpec, Rows

Direction = Literal["low_to_high", "high_to_low", "anchors", "explorers", "low_to_uniform", "uniform"]


def attention_schedule(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    beta: float = 0.5,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    entropy: Entropy = "attention",
) -> Float[Tensor, "batch response"]:
    """Anchors early, explorers late: weights linear in the rank of the attention entropy within the response.

        Â′_t = Â_t (1 + β λ(u) (2 q_t − 1)),   q_t = (r_t − 1) / (n − 1),   low_to_high: λ(u) = 2u − 1

    u is the progress of training, r_t the rank of Ê_t among the n chosen tokens of the response, ties averaged; q = ½
    where n = 1. Weights have mean one per response, lie in [1 − β, 1 + β] and depend on Ê through its order alone.
    β = 0 and λ = 0 are the identity.

    * `direction`: high_to_low λ = 1 − 2u · anchors −1 · explorers +1 · low_to_uniform min(0, 2u − 1) · uniform 0.
    * `only="positive"` leaves Â < 0 alone. `entropy="predictive"` ranks the policy's own entropy instead, a control.

    Source: ours, made before the text of arXiv:2605.07660 was known to us. Unlike its rule (`attention_blend`) it ranks
    within the response, keeps mean one and has a schedule over the whole run.
    """
    strength = schedule_strength(direction, batch)
    mask = batch.response_mask
    quantiles = rank_quantiles(batch.require(ENTROPY_FIELDS[entropy]), mask)
    return weigh(advantages, 1.0 + beta * strength * (2.0 * quantiles - 1.0), mask, only)


def attention_tilt(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    kappa: float = 0.25,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    entropy: Entropy = "attention",
) -> Float[Tensor, "batch response"]:
    """Anchors early, explorers late: weights exponential in the z-score of the attention entropy.

        Â′_t = Â_t v_t / mean v,   v_t = exp(κ λ(u) z_t),   z = clip((Ê − mean) / std, −2, 2) within the response

    Moments are population moments over the chosen tokens; equal entropies give z = 0. κ = 0 is the identity. Directions
    and options: see `attention_schedule`.

    Source: ours, a variant of `attention_schedule`; not the rule of arXiv:2605.07660.
    """
    mask = batch.response_mask
    entropies = chosen(batch.require(ENTROPY_FIELDS[entropy]), mask)
    moments = unit_moments(entropies, batch, "response")
    spread_out = moments.std > 1e-12
    z = torch.where(spread_out, (entropies - moments.mean) / torch.where(spread_out, moments.std, 1.0), 0.0)
    tilt = torch.exp(kappa * schedule_strength(direction, batch) * z.clamp(-2.0, 2.0))
    return weigh(advantages, scale_to_mean_one(tilt, mask), mask, only)


def attention_gate(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    floor: float = 0.3,
    tau: float = 0.1,
    direction: Direction = "low_to_high",
    only: Sign = "both",
    entropy: Entropy = "attention",
) -> Float[Tensor, "batch response"]:
    """Anchors always, explorers admitted late: a gate that moves up the ranks of the attention entropy.

        Â′_t = Â_t v_t / mean v,   v_t = f + (1 − f) σ((c − q_t) / τ),   c = 0.3 + 0.8 (λ(u) + 1) / 2

    f = `floor`; with low_to_high, (λ + 1)/2 is the progress u. f = 1 is the identity. q, directions and options: see
    `attention_schedule`; "uniform" holds the gate at u = ½.

    Source: ours, a variant of `attention_schedule`; not the rule of arXiv:2605.07660.
    """
    mask = batch.response_mask
    quantiles = rank_quantiles(batch.require(ENTROPY_FIELDS[entropy]), mask)
    centre = 0.3 + 0.4 * (schedule_strength(direction, batch) + 1.0)
    gate = floor + (1.0 - floor) * torch.sigmoid((centre - quantiles) / tau)
    return weigh(advantages, scale_to_mean_one(gate, mask), mask, only)


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
    sought = torch.where(mask, values, 0.0).contiguous()
    below = torch.searchsorted(ordered, sought)
    upto = torch.searchsorted(ordered, sought, right=True)
    steps = response_lengths(mask) - 1
    quantiles = (below + upto - 1).double() / (2.0 * steps.clamp_min(1))
    return torch.where(mask & (steps > 0), quantiles, 0.5)


ROWS = Rows(
    transforms={
        "attention_schedule": MethodSpec(
            fn=attention_schedule,
            paper="-",
            requires=entropy_fields,
            renamed=RENAMED,
            scope="response",
            domains={"beta": "[0, 1)"},
            limits=(Limit({"beta": 0.0}), Limit({"direction": "uniform"})),
            keeps_sign=True,
        ),
        "attention_tilt": MethodSpec(
            fn=attention_tilt,
            paper="-",
            requires=entropy_fields,
            renamed=RENAMED,
            scope="response",
            domains={"kappa": "[0, inf)"},
            limits=(Limit({"kappa": 0.0}), Limit({"direction": "uniform"})),
            keeps_sign=True,
        ),
        "attention_gate": MethodSpec(
            fn=attention_gate,
            paper="-",
            requires=entropy_fields,
            renamed=RENAMED,
            scope="response",
            domains={"floor": "(0, 1]", "tau": "(0, inf)"},
            limits=(Limit({"floor": 1.0}),),
            keeps_sign=True,
        ),
    },
    presets={
        "attention_rank_linear": [
            "group_normalized",
            {"attention_schedule": {"beta": 0.5, "direction": "low_to_high"}},
        ],
        "attention_tilt": ["group_normalized", "attention_tilt"],
        "attention_gate": ["group_normalized", "attention_gate"],
    },
)
