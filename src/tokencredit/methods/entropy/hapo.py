"""HAPO: credit in proportion to the capacity of a token, read off the entropy of the policy.

Entropies are nats and detached: never an objective.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import by_blocks, chosen, level, minus, unit_moments
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.selection import rescale_mass
from tokencredit.methods.spec import SCOPES, MethodSpec, Rows, Scope, at

ENTROPIES = frozenset({"entropies"})
EPS = 1e-6
Unit = Literal["response", "group", "batch"]


def entropy_capacity(  # noqa: PLR0913 - the named options of one published formula
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    alpha: float = 0.2,
    phi: float = 2.0,
    alpha_negative: float | None = None,
    stats: Unit = "group",
    scale: Literal["advantage", "free"] = "advantage",
    renorm: Literal["none", "response", "group", "polarity"] = "none",
    signed: bool = True,
) -> Float[Tensor, "batch response"]:
    """HAPO (as EAPO): more credit, of either sign, where the policy was uncertain.

        z  = (H − μ) / (σ + ε)
        Â′ = Â + α · sign(Â) · clip(z, −|Â|/φ, +|Â|/φ)    =  Â · w,   w ∈ [1 − |α|/φ, 1 + |α|/φ]

    H is the entropy of the policy at the token, μ and σ (population) its moments over the chosen tokens of the `stats`
    unit. Keeps the sign of Â while |α| < φ; α = 0 is the identity; constant H or Â = 0 change nothing.

    * `alpha_negative`: another α where Â < 0. `signed=False` drops sign(Â), a control.
    * `scale="free"`: clip at ±1/φ and multiply by |Â|, for advantages that are not group-normalised.
    * `renorm`: rescale so that Σ|Â| of each response, group, or sign within a group stays what it was.

    Paper: arXiv:2604.11056 v1, Eq. 6-7, there EAPO. Version 2 names its method HAPO with equations unknown to us, so
    this is version 1's formula. Not stated there and ours: σ is the population std plus 1e-6, moments pool tokens.
    """
    mask = batch.response_mask
    a = level(advantages, mask)
    entropies = batch.require("entropies")
    moments = unit_moments(entropies, batch, stats)
    # Filled, not `where` of two numbers: that would be float32.
    strength = torch.full_like(a, alpha).masked_fill(a < 0, alpha if alpha_negative is None else alpha_negative)
    bound = a.abs() / phi if scale == "advantage" else torch.full_like(a, 1.0 / phi)
    push = strength * (a.sign() if signed else 1.0) * (1.0 if scale == "advantage" else a.abs())

    def formula(h: Tensor, mean: Tensor, width: Tensor, bound: Tensor, push: Tensor, a: Tensor) -> Tensor:
        z = minus(h, mean)
        z = z.div_(width.to(z.dtype))
        return z.maximum(-bound).minimum(bound) * push + a  # `clamp` between tensors takes four times as long

    credit = by_blocks(formula, mask, entropies, moments.mean, moments.std + EPS, bound, push, a)
    return credit if renorm == "none" else rescale_mass(credit, a.expand_as(credit), batch, renorm)


def capacity_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """The scope of `entropy_capacity`: the unit of its moments, or of `renorm` where that is larger."""
    renorm = {"none": "token", "polarity": "group"}.get(hyperparameters["renorm"], hyperparameters["renorm"])
    return max(hyperparameters["stats"], renorm, key=SCOPES.index)


def reward_capacity(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, alpha: float = 0.2
) -> Float[Tensor, "batch response"]:
    """Credit by how much one token can tell about a binary reward, which is at most ln 2.

        Â′ = Â · (1 + α (c − mean c)),   c = min(H, ln 2) / ln 2

    The mean runs over the chosen tokens of the group, so the weights have mean one; the sign is kept for α < 1.

    Source: ours, after the bound I ≤ min(H, h_b(V)) ≤ ln 2 for binary rewards.
    """
    a = chosen(advantages, batch.response_mask)
    capacity = chosen(batch.require("entropies"), batch.response_mask).clamp(0.0, math.log(2)) / math.log(2)
    mean = unit_moments(capacity, batch, "group").mean
    return chosen(a * (1.0 + alpha * (capacity - mean)), batch.response_mask)


ROWS = Rows(
    MethodSpec(
        entropy_capacity,
        "arXiv:2604.11056",
        requires=ENTROPIES,
        scope=capacity_scope,
        domains={"phi": "(0, inf)"},
        limits=(at(alpha=0.0, alpha_negative=None),),
        keeps_sign=True,
        in_blocks=True,
    ),
    MethodSpec(reward_capacity, "-", requires=ENTROPIES, scope="group", limits=(at(alpha=0.0),), keeps_sign=True),
    presets={
        "hapo": ["group_normalized", {"entropy_capacity": {"alpha": 0.2, "phi": 2.0}}],
        "hapo_balanced": ["group_normalized", {"entropy_capacity": {"alpha": 0.2, "phi": 2.0, "renorm": "polarity"}}],
    },
    controls={
        "hapo (shuffled)": ["group_normalized", "entropy_capacity", "shuffle_within_response"],
        "hapo (reversed)": ["group_normalized", "entropy_capacity", "reverse"],
    },
)
