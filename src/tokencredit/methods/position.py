"""Transforms that look at nothing but the position in the rollout: the baselines of every adaptive weight.

Positions count the chosen tokens of a response, t = 0 … n − 1; inserted text has none.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, positions, response_lengths
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.selection import Normalize, count_share, keep_selected, selection_scope
from tokencredit.methods.spec import Limit, MethodSpec, Rows

IW_OPD = "arXiv:2606.22600"
THROUGH: dict[str, Any] = {"place": "through", "normalize": "selected"}  # the stretches of arXiv:2605.07660
Part = Literal["first", "middle", "last"]
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
    return keep_selected(advantages, _find_part(batch, _schedule_share(batch, keep, keep_end, schedule)), batch)


def suffix_mask(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, keep: float = 0.3
) -> Float[Tensor, "batch response"]:
    """Credit on the last tokens of the rollout only.

        Â′_t = Â_t · 1[t ≥ n − ⌈keep · n⌉]

    keep = 1 is the identity. Follow it by `match_mass` to ask whether position or mass is what matters.

    Paper: arXiv:2606.22600, section 3.1 (keep = 0.3).
    """
    return keep_selected(advantages, _find_part(batch, keep, "last"), batch)


def middle_mask(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, keep: float = 0.3
) -> Float[Tensor, "batch response"]:
    """Credit on the middle of the rollout only.

        Â′_t = Â_t · 1[f ≤ t < f + ⌈keep · n⌉],   f = ⌊(n − ⌈keep · n⌉) / 2⌋

    keep = 1 is the identity.

    Source: ours, the control between `prefix_mask` and `suffix_mask`.
    """
    return keep_selected(advantages, _find_part(batch, keep, "middle"), batch)


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
    boosted = _find_part(batch, _schedule_share(batch, keep, keep_end, schedule))
    return torch.where(boosted, multiplier * a, a)


def keep_positions(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    start: float = 0.0,
    stop: float = 1.0,
    place: Literal["before", "through"] = "before",
    normalize: Normalize = "all",
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
    return keep_selected(advantages, mask & inside, batch, normalize)


def _schedule_share(batch: TokenBatch, keep: float, keep_end: float, schedule: Schedule) -> float:
    """The share of the rollout that counts as its prefix at this point of training."""
    if schedule == "none":
        return keep
    return keep + (keep_end - keep) * 0.5 * (1.0 - math.cos(math.pi * (batch.progress or 0.0)))


def _find_part(batch: TokenBatch, share: float, part: Part = "first") -> Bool[Tensor, "batch response"]:
    """The ⌈share · n⌉ first, middle or last tokens of each response, at least one."""
    length = response_lengths(batch.response_mask)
    count = count_share(share, length, "ceil")
    start = {"first": torch.zeros_like(count), "middle": (length - count) // 2, "last": length - count}[part]
    place = positions(batch.response_mask)
    return batch.response_mask & (place >= start) & (place < start + count)


ROWS = Rows(
    transforms={
        "position_decay": MethodSpec(
            fn=position_decay,
            paper="-",
            scope="response",
            domains={"gamma": "[0, inf)"},
            limits=(Limit({"gamma": 0.0}),),
            keeps_sign=True,
        ),
        "prefix_mask": MethodSpec(
            fn=prefix_mask,
            paper=IW_OPD,
            scope="response",
            domains={"keep": "(0, 1]", "keep_end": "(0, 1]"},
            limits=(Limit({"keep": 1.0, "schedule": "none"}),),
            keeps_sign=True,
        ),
        "suffix_mask": MethodSpec(
            fn=suffix_mask,
            paper=IW_OPD,
            scope="response",
            domains={"keep": "(0, 1]"},
            limits=(Limit({"keep": 1.0}),),
            keeps_sign=True,
        ),
        "middle_mask": MethodSpec(
            fn=middle_mask,
            paper="-",
            scope="response",
            domains={"keep": "(0, 1]"},
            limits=(Limit({"keep": 1.0}),),
            keeps_sign=True,
        ),
        "prefix_boost": MethodSpec(
            fn=prefix_boost,
            paper=IW_OPD,
            scope="response",
            domains={"keep": "(0, 1]", "keep_end": "(0, 1]", "multiplier": "[0, inf)"},
            limits=(Limit({"multiplier": 1.0}),),
            keeps_sign=True,
        ),
        "keep_positions": MethodSpec(
            fn=keep_positions,
            paper="-",
            scope=selection_scope,
            domains={"start": "[0, 1]", "stop": "[0, 1]"},
            limits=(Limit({"start": 0.0, "stop": 1.0}),),
            keeps_sign=True,
        ),
    },
    presets={
        "first_fifth": ["group_normalized", {"keep_positions": {"stop": 0.2} | THROUGH}],
        "last_fifth": ["group_normalized", {"keep_positions": {"start": 0.8} | THROUGH}],
        "front_half": ["group_normalized", {"keep_positions": {"stop": 0.5, "normalize": "selected"}}],
        "back_half": ["group_normalized", {"keep_positions": {"start": 0.5, "normalize": "selected"}}],
        "opd_decay": ["teacher_log_ratio", {"position_decay": {"gamma": 0.5}}],
        "opd_prefix": ["teacher_log_ratio", {"prefix_mask": {"keep": 0.3}}],
        "opd_suffix": ["teacher_log_ratio", {"suffix_mask": {"keep": 0.3}}],
        "opd_middle": ["teacher_log_ratio", {"middle_mask": {"keep": 0.3}}],
        "opd_boost": ["teacher_log_ratio", {"prefix_boost": {"keep": 0.3, "multiplier": 1.5}}],
        "opd_curriculum": [
            "teacher_log_ratio",
            {"prefix_boost": {"keep": 0.3, "multiplier": 1.5, "schedule": "cosine"}},
        ],
    },
)
