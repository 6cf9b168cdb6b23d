"""The published reweighting by attention entropy: anchors (concentrated) first, explorers (diffuse) later.

The signal is Ê, the entropy of the head-averaged attention row over the logarithm of the keys it sees, in [0, 1].
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import extrema
from tokencredit.methods.attention.weights import ENTROPY_FIELDS, RENAMED, Entropy, Sign, entropy_fields, weigh
from tokencredit.methods.spec import Endpoints, Limit, MethodSpec, Rows

Blend = Literal["low_to_high", "high_to_low", "static_anchor", "static_explorer"]

# Weights of the lowest and of the highest Ê of the batch, each at the start and at the end of the schedule.
BLENDS: Mapping[str, tuple[Endpoints, Endpoints]] = {
    "low_to_high": ((1.0, 0.0), (0.0, 1.0)),
    "high_to_low": ((0.0, 1.0), (1.0, 0.0)),
    "static_anchor": ((1.0, 1.0), (0.0, 0.0)),
    "static_explorer": ((0.0, 0.0), (1.0, 1.0)),
}


def blend_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `attention_blend` reads: the step only where its weights move, and move by steps."""
    lowest, highest = blend_endpoints(*(hyperparameters[name] for name in ("direction", "low", "high")))
    moves = lowest[0] != lowest[1] or highest[0] != highest[1]
    by_step = moves and hyperparameters["warmup_share"] is None
    return entropy_fields(hyperparameters) | ({"step"} if by_step else set())


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
    entropy: Entropy = "attention",
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
      entropy: "predictive" takes the policy's own entropy in nats, a control; τ = 0.8 ln(vocabulary) then corresponds
        to entropies that are divided by ln(vocabulary).

    Returns:
      Advantages [batch, response], zero outside the response mask.

    Paper: attention entropy (arXiv:2605.07660), App. K, Eq. 26–30, Tables 10 and 13.
    Deviation: the paper computes α as a softmax and adds an ε to both denominators; the sum cancels, and ours is the
    closed form without ε. Where all Ê are equal the paper's ᾱ is 0, ours ½.
    """
    mask = batch.response_mask
    entropies = chosen(batch.require(ENTROPY_FIELDS[entropy]), mask)
    place = softmax_place(entropies, batch, tau)
    lowest, highest = blend_endpoints(direction, low, high)
    moves = lowest[0] != lowest[1] or highest[0] != highest[1]
    done = _share_done(batch, warmup_steps, warmup_share) if moves else 0.0
    at_lowest = lowest[0] + done * (lowest[1] - lowest[0])
    at_highest = highest[0] + done * (highest[1] - highest[0])
    return weigh(advantages, (1.0 - place) * at_lowest + place * at_highest, mask, only)


def blend_endpoints(direction: Blend, low: Endpoints | None, high: Endpoints | None) -> tuple[Endpoints, Endpoints]:
    """The endpoints of the lowest and of the highest Ê: those of the direction, unless others are given."""
    lowest, highest = BLENDS[direction]
    lowest = lowest if low is None else low
    return lowest, highest if high is None else high


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


def _share_done(batch: TokenBatch, warmup_steps: int, warmup_share: float | None) -> float:
    """How much of the schedule is done, in [0, 1]."""
    if warmup_share is None:
        return min(batch.require("step") / warmup_steps, 1.0)
    return min((batch.progress or 0.0) / warmup_share, 1.0)


ROWS = Rows(
    transforms={
        "attention_blend": MethodSpec(
            fn=attention_blend,
            paper="arXiv:2605.07660",
            requires=blend_fields,
            renamed=RENAMED,
            scope="batch",
            domains={"tau": "(0, inf)", "warmup_steps": "[1, inf)", "warmup_share": "(0, 1]"},
            limits=(Limit({"low": (1.0, 1.0), "high": (1.0, 1.0)}),),
            keeps_sign=True,
        ),
    },
    presets={
        "attention": ["group_normalized", {"attention_blend": {"direction": "low_to_high"}}],
        "attention_high_to_low": ["group_normalized", {"attention_blend": {"direction": "high_to_low"}}],
        "static_anchor": ["group_normalized", {"attention_blend": {"direction": "static_anchor"}}],
        "static_explorer": ["group_normalized", {"attention_blend": {"direction": "static_explorer"}}],
        "attention_mass_per_response": ["group_normalized", "attention_blend", {"match_mass": {"per": "response"}}],
        "attention_mass_per_batch": ["group_normalized", "attention_blend", {"match_mass": {"per": "batch"}}],
        "attention_mean_weight": ["group_normalized", "attention_blend", "mean_weight"],
    },
)
