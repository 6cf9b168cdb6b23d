"""Transforms that look at nothing but the position in the rollout: the baselines of every adaptive weight.

Positions count the chosen tokens of a response, t = 0 … n − 1; inserted text has none.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import chosen, positions, response_lengths
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.controls import share_of

Schedule = Literal["none", "cosine"]


def position_decay(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, gamma: float = 0.5
) -> Float[Tensor, "batch response"]:
    """Credit that falls linearly along the rollout.

        Â′_t = (1 + γ (1 − t / n)) Â_t

    What `prefix_discrepancy` becomes when every token disagrees equally. γ = 0 is the identity.

    Source: ours, after the linear decay of arXiv:2606.22600's ablation.
    """
    mask = batch.response_mask
    share = positions(mask).double() / response_lengths(mask).clamp_min(1)
    return chosen(advantages, mask) * chosen(1.0 + gamma * (1.0 - share), mask)


def prefix_mask(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    keep: float = 0.3,
    keep_end: float = 1.0,
    schedule: Schedule = "none",
) -> Float[Tensor, "batch response"]:
    """Credit on the first tokens of the rollout only.

        Â′_t = Â_t · 1[t < ⌈s n⌉],   s = keep        cosine:  s = keep + (keep_end − keep) · ½ (1 − cos πu)

    u is `batch.progress`; at least one token is kept. keep = 1 without schedule is the identity.

    Paper: arXiv:2606.22600, section 3.1 (keep = 0.3); the schedule is its release's `opd_prefix_mask`. Deviation: the
    release multiplies in float32 and keeps one token more at some lengths (n = 50: 16); ours keeps ⌈s n⌉ (15).
    """
    return torch.where(
        _in_prefix(batch, _share(batch, keep, keep_end, schedule)), chosen(advantages, batch.response_mask), 0.0
    )


def suffix_mask(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, keep: float = 0.3
) -> Float[Tensor, "batch response"]:
    """Credit on the last tokens of the rollout only.

        Â′_t = Â_t · 1[t ≥ n − ⌈keep · n⌉]

    keep = 1 is the identity. Follow it by `match_mass` to ask whether position or mass is what matters.

    Paper: arXiv:2606.22600, section 3.1 (keep = 0.3).
    """
    mask = batch.response_mask
    kept = positions(mask) >= response_lengths(mask) - _count(batch, keep)
    return torch.where(mask & kept, chosen(advantages, mask), 0.0)


def middle_mask(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, keep: float = 0.3
) -> Float[Tensor, "batch response"]:
    """Credit on the middle of the rollout only.

        Â′_t = Â_t · 1[f ≤ t < f + ⌈keep · n⌉],   f = ⌊(n − ⌈keep · n⌉) / 2⌋

    keep = 1 is the identity.

    Source: ours, the control between `prefix_mask` and `suffix_mask`.
    """
    mask = batch.response_mask
    count = _count(batch, keep)
    first = (response_lengths(mask) - count) // 2
    kept = (positions(mask) >= first) & (positions(mask) < first + count)
    return torch.where(mask & kept, chosen(advantages, mask), 0.0)


def prefix_boost(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    keep: float = 0.3,
    multiplier: float = 1.5,
    keep_end: float = 1.0,
    schedule: Schedule = "none",
) -> Float[Tensor, "batch response"]:
    """A fixed factor on the first tokens of the rollout.

        Â′_t = multiplier · Â_t   where t < ⌈s n⌉,   Â_t elsewhere        s as in `prefix_mask`

    multiplier = 1 is the identity.

    Source: the page of arXiv:2606.22600 (fixed prefix), and with the schedule its release's `opd_prefix_weight`, which
    we take to be the "manual curriculum" of its ablation.
    """
    a = chosen(advantages, batch.response_mask)
    return torch.where(_in_prefix(batch, _share(batch, keep, keep_end, schedule)), multiplier * a, a)


def _share(batch: TokenBatch, keep: float, keep_end: float, schedule: Schedule) -> float:
    """The share of the rollout that counts as its prefix at this point of training."""
    if schedule == "none":
        return keep
    return keep + (keep_end - keep) * 0.5 * (1.0 - math.cos(math.pi * (batch.progress or 0.0)))


def _count(batch: TokenBatch, share: float) -> Int[Tensor, "batch 1"]:
    """⌈share · n⌉, at least one."""
    return share_of(share, response_lengths(batch.response_mask)).ceil().long().clamp_min(1)


def _in_prefix(batch: TokenBatch, share: float) -> Bool[Tensor, "batch response"]:
    return batch.response_mask & (positions(batch.response_mask) < _count(batch, share))
