"""What distillation did with its credit: where the gap is, what the weights were, what the router moved.

Each number is a ratio of sums, so that ranks add up: `teacher_sums` of each, `teacher_numbers` of all.
"""

from collections.abc import Sequence
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen, positions, response_lengths, row_quantile
from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.position import profile_sums
from tokencredit.methods.distillation.dasd import bonus_direction
from tokencredit.methods.distillation.discrepancy import discrepancy_weights, mass_multiplier
from tokencredit.methods.distillation.log_ratio import teacher_gap
from tokencredit.methods.outcome import correct_rows

BINS = 10
ARMS, SIGNS, VERDICTS = ("attract", "repel"), ("up", "down"), ("correct", "wrong")
BONUSES = tuple(f"bonus_{arm}_{sign}_{verdict}" for arm in ARMS for sign in SIGNS for verdict in VERDICTS)


def _discrepancy_sums(batch: TokenBatch, gamma: float) -> Float[Tensor, " 7"]:
    """Σ w and tokens; responses with a gap, and the sums over them of the four numbers that each of them has."""
    mask, gap = batch.response_mask, teacher_gap(batch)
    weights = discrepancy_weights(batch, gamma=gamma)
    mass = gap.abs().sum(1, keepdim=True)
    live, whole = (mass > 0)[:, 0], torch.where(mass > 0, mass, 1.0)
    way = positions(mask) / response_lengths(mask).clamp_min(1)
    spent = (gap.abs().cumsum(1) - gap.abs()) / whole
    inside = torch.cat((mask, mask.new_zeros(len(mask), 1)), 1)  # one column more: a maximum needs an element
    way, spent, gap = (torch.nn.functional.pad(item, (0, 1)) for item in (way, spent, gap))
    rows = (
        mass_multiplier(torch.nn.functional.pad(weights, (0, 1)), gap)[:, 0],
        torch.where(inside & (way < 0.3), gap.abs(), 0.0).sum(1) / whole[:, 0],
        torch.where(inside & (spent < 0.5), way, 0.0).amax(1),
        torch.where(inside, (spent - way).abs(), 0.0).amax(1),
    )
    per_response = [torch.where(live, row, 0.0).sum().double() for row in rows]
    return torch.stack((weights.sum(), mask.sum().double(), live.sum().double(), *per_response))


def _discrepancy(sums: Sequence[float]) -> dict[str, float]:
    weight, tokens, live, *rest = sums
    if not live:
        return {}
    names = ("mass_multiplier", "first_share", "half_mass", "distance")
    return {"weight_mean": weight / tokens} | {name: total / live for name, total in zip(names, rest, strict=True)}


def _router_sums(
    batch: TokenBatch,
    base: Float[Tensor, "batch response"],
    bonus: Float[Tensor, "batch response"],
    router: Float[Tensor, "batch response"],
    threshold: float,
) -> Float[Tensor, " 17"]:
    """Tokens, responses, p80 of the entropies summed over responses, six sums over tokens, and the eight of the bonus.

    Arms are those of the router, whatever made the bonus.
    """
    mask, gap = batch.response_mask, teacher_gap(batch)
    base, bonus = chosen(base, mask), chosen(bonus, mask)
    p80 = row_quantile(chosen(batch.require("entropies"), mask), mask, 0.8)
    filled = mask.any(1)
    sums = [mask.sum(), filled.sum(), torch.where(filled, p80[:, 0], 0.0).sum()]
    sums += [router.clamp_min(0).sum(), router.clamp_max(0).sum(), (mask & (router > 0)).sum()]
    sums += [bonus.square().sum(), base.square().sum(), (mask & ((base + bonus) * base < 0)).sum()]
    right = correct_rows(batch, threshold)[:, None]
    for in_arm in (router > 0, router < 0):
        for of_sign in (gap > 0, gap < 0):
            for rows in (right, ~right):
                sums.append(torch.where(mask & in_arm & of_sign & rows, bonus, 0.0).sum())
    return torch.stack([item.double() for item in sums])


def _router(sums: Sequence[float]) -> dict[str, float]:
    tokens, responses, p80, positive, negative, attracted, bonus, base, overruled, *parts = sums
    count = max(tokens, 1.0)
    return {
        "router_positive": positive / count,
        "router_negative": negative / count,
        "attracted": attracted / count,
        "bonus_rms": (bonus / count) ** 0.5,
        "advantage_rms": (base / count) ** 0.5,
        "overruled": overruled / count,
        "entropy_p80": p80 / max(responses, 1.0),
        **{name: part / count for name, part in zip(BONUSES, parts, strict=True)},
    }


def teacher_sums(
    batch: TokenBatch,
    advantages: Float[Tensor, "batch response"],
    base: Float[Tensor, "batch response"] | None,
    *,
    threshold: float = 0.0,
) -> dict[str, Tensor]:
    """Local sums behind the `teacher/…` and `router/…` numbers of a batch that carries a teacher's log-probs."""
    if batch.teacher_logprobs is None or batch.old_logprobs is None:
        return {}
    named = {
        "teacher_profile": profile_sums(teacher_gap(batch), batch.response_mask, BINS).flatten(),
        "teacher_discrepancy": _discrepancy_sums(batch, 0.5),
    }
    if batch.entropies is not None and base is not None:
        moved = chosen(advantages, batch.response_mask) - chosen(base, batch.response_mask)
        named["teacher_router"] = _router_sums(batch, base, moved, bonus_direction(batch, "router"), threshold)
    return named


def teacher_numbers(sums: dict[str, list[float]]) -> dict[str, float]:
    """The numbers of `teacher_sums` once they are summed over processes; the keys that docs/diagnostics.md explains."""
    if "teacher_profile" not in sums:
        return {}
    flat = sums["teacher_profile"]
    total, mass, count = flat[:BINS], flat[BINS : 2 * BINS], flat[2 * BINS :]
    if not isfinite(sum(mass)):
        return {}
    tokens = max(sum(count), 1.0)
    found = {"teacher/gap": sum(total) / tokens, "teacher/gap_abs": sum(mass) / tokens}
    found |= {f"teacher/gap_abs/{k}": mass[k] / count[k] for k in range(BINS) if count[k]}
    found |= {f"teacher/{name}": value for name, value in _discrepancy(sums["teacher_discrepancy"]).items()}
    if "teacher_router" in sums and isfinite(sum(sums["teacher_router"])):
        named = _router(sums["teacher_router"])
        found |= {f"router/{name.removeprefix('router_')}": value for name, value in named.items()}
    return found
