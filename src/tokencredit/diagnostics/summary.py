"""The numbers that a trainer logs each step: what the pipeline did with the credit of this batch."""

from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import OPTIONAL_FIELDS, TokenBatch
from tokencredit.batch.reduce import group_totals
from tokencredit.diagnostics.concentration import effective_token_ratio, gini
from tokencredit.diagnostics.distillation import teacher_numbers, teacher_sums
from tokencredit.diagnostics.quadrants import (
    correlation_sums,
    pearson_from_sums,
    quadrant_sums,
    relative_positions,
    statistics_from_sums,
    weight_ratio,
)

Base = Float[Tensor, "batch response"] | Float[Tensor, " batch"]


def credit_metrics(
    batch: TokenBatch,
    advantages: Float[Tensor, "batch response"],
    base: Base | None = None,
    *,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Compute the `credit/…` numbers of one step; docs/diagnostics.md explains each key.

    Responses without a score or without a chosen token enter no number but `credit/unscored`, their share. A number
    that is not defined (a share of nothing), or that a field makes infinite or NaN, has no key. Sums go through
    `batch.reducer`: every rank must call, and all get the same numbers.

    Args:
      batch: the responses. Without entropies the quadrants are left out, without a teacher's log-probs all that
        concerns the teacher.
      advantages: what the pipeline gave.
      base: what the estimator gave, one number per response or per token. Without it weights are left out and polarity
        is the sign of the advantages.
      threshold: a response is correct if its reward is greater; splits the `router/bonus_…` numbers.
    """
    if base is not None and base.ndim == 1:
        base = base[:, None].expand_as(advantages)
    counted = batch.counted
    batch, advantages = batch.rows(counted), advantages[counted]
    base = None if base is None else base[counted]
    batch.trust(OPTIONAL_FIELDS)  # a number that is not finite must not stop the training that it describes
    mask = batch.response_mask
    named = {"responses": torch.stack((counted.sum(), (~counted).sum()))}
    named |= _credit_sums(batch, advantages) | _net_sums(batch, advantages)
    if base is not None:
        named |= _weight_sums(batch, advantages, base)
    if batch.entropies is not None:
        named["quadrants"] = quadrant_sums(advantages, batch, polarity=base)
        named["correlation"] = correlation_sums(batch.entropies, relative_positions(mask), mask)
    named |= teacher_sums(batch, advantages, base, threshold=threshold)
    # One collective for all sums.
    flat = batch.reducer.total(torch.cat([value.double().flatten() for value in named.values()])).tolist()
    sums: dict[str, list[float]] = {}
    for name, value in named.items():
        sums[name], flat = flat[: value.numel()], flat[value.numel() :]
    kept, left_out = sums["responses"]
    found = {"unscored": _ratio(left_out, kept + left_out)} | _concentration(sums)
    if base is not None:
        found |= _weights(sums, batch, advantages, base)
    if batch.entropies is not None:
        found |= _entropy(sums)
    found |= teacher_numbers(sums)
    return {f"credit/{name}": value for name, value in found.items() if isfinite(value)}


def _credit_sums(batch: TokenBatch, advantages: Float[Tensor, "batch response"]) -> dict[str, Tensor]:
    mask = batch.response_mask
    a = chosen(advantages, mask)
    tokens = torch.stack((mask.sum().double(), (a != 0).sum().double(), a.abs().sum(), a.sum()))
    return {"tokens": tokens, "gini": _votes(gini(a, mask)), "effective": _votes(effective_token_ratio(a, mask))}


def _votes(values: Float[Tensor, " batch"]) -> Float[Tensor, " 2"]:
    defined = torch.isfinite(values)
    return torch.stack((torch.where(defined, values, 0.0).sum(), defined.sum().double()))


def _net_sums(batch: TokenBatch, advantages: Float[Tensor, "batch response"]) -> dict[str, Tensor]:
    """|net advantage per token| of every group, counted once: a row has the weight 1 / rows of its group."""
    mask = batch.response_mask
    credit = chosen(advantages, mask).sum(1)
    columns = torch.stack((credit, mask.sum(1).double(), torch.ones_like(credit)), 1)
    net, tokens, rows = group_totals(columns, batch.group_ids, batch.reducer).unbind(1)
    filled = tokens > 0
    share = torch.where(filled, 1.0 / rows, 0.0)
    return {"groups": torch.stack(((share * net.abs() / tokens.clamp_min(1.0)).sum(), share.sum()))}


def _weight_sums(batch: TokenBatch, advantages: Float[Tensor, "batch response"], base: Base) -> dict[str, Tensor]:
    ratio, defined = weight_ratio(advantages, base, batch.response_mask)
    up, down = defined & (base > 0), defined & (base < 0)
    sides = [torch.where(side, ratio, 0.0).sum() for side in (up, down)] + [up.sum().double(), down.sum().double()]
    return {"weights": torch.stack((*sides, (defined & (ratio < 0)).sum().double()))}


def _concentration(sums: dict[str, list[float]]) -> dict[str, float]:
    count, credited, mass, net = sums["tokens"]
    return {
        "tokens": count,
        "credited_share": _ratio(credited, count),
        "abs_mean": _ratio(mass, count),
        "net": _ratio(net, count),
        "group_net_abs": _ratio(*sums["groups"]),
        "gini": _ratio(*sums["gini"]),
        "effective_token_ratio": _ratio(*sums["effective"]),
    }


def _weights(
    sums: dict[str, list[float]], batch: TokenBatch, advantages: Float[Tensor, "batch response"], base: Base
) -> dict[str, float]:
    up, down, ups, downs, flips = sums["weights"]
    ratio, defined = weight_ratio(advantages, base, batch.response_mask)
    lowest = ratio.new_full((), -torch.inf)
    ends = [torch.where(defined, value, lowest).amax() if value.numel() else lowest for value in (ratio, -ratio)]
    largest, least = batch.reducer.maximum(torch.stack(ends)).tolist()
    some = ups + downs > 0
    return {
        "weight/mean": _ratio(up + down, ups + downs),
        "weight/min": -least if some else float("nan"),
        "weight/max": largest if some else float("nan"),
        "weight/positive": _ratio(up, ups),
        "weight/negative": _ratio(down, downs),
        "sign_flips": _ratio(flips, ups + downs),
    }


def _entropy(sums: dict[str, list[float]]) -> dict[str, float]:
    flat = sums["quadrants"]
    rows = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    count, _, mass, _ = sums["tokens"]
    if not isfinite(sums["correlation"][1]):  # the sum of the entropies
        return {}
    found = {"entropy": _ratio(sums["correlation"][1], count)}
    found["entropy_position"] = pearson_from_sums(*sums["correlation"])
    for name, statistics in statistics_from_sums(rows, count, mass).items():
        found |= {f"{name}/{key}": value for key, value in statistics._asdict().items()}
    return found


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
