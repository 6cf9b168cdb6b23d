"""The numbers that a trainer logs each step: what the pipeline did with the credit of this batch.

One pass over the credit and two over the entropies, some rows at a time. Each row is reduced to a few sums in float64;
everything else is arithmetic on those.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import (
    chosen,
    group_sums,
    has_holes,
    picked,
    positions,
    response_lengths,
    row_blocks,
    row_sums,
    sorted_rows,
)
from tokencredit.batch.records import OPTIONAL_FIELDS, TokenBatch
from tokencredit.diagnostics.distillation import teacher_numbers, teacher_sums
from tokencredit.diagnostics.quadrants import pearson_from_sums, quadrant_sums, statistics_from_sums, weight_ratio
from tokencredit.methods.entropy.quadrants import group_threshold

Base = Float[Tensor, "batch response"] | Float[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class CreditSums:
    """What `credit_metrics` is made of, still on the device: `numbers` copies it to the host, in one piece.

    Sums are those of all processes already, so reading needs no other rank.
    """

    flat: Float[Tensor, " number"]
    sizes: dict[str, int]

    def numbers(self) -> dict[str, float]:
        """The `credit/…` numbers."""
        flat = self.flat.tolist()
        sums: dict[str, list[float]] = {}
        for name, size in self.sizes.items():
            sums[name], flat = flat[:size], flat[size:]
        counted, left_out = sums["responses"]
        named = {"unscored": _ratio(left_out, counted + left_out)} | _concentration(sums)
        if "weights" in sums:
            named |= _weights(sums)
        if "entropy" in sums:
            named |= _entropy(sums)
        named |= teacher_numbers(sums)
        return {f"credit/{name}": value for name, value in named.items() if isfinite(value)}


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
    return credit_sums(batch, advantages, base, threshold=threshold).numbers()


def credit_sums(
    batch: TokenBatch,
    advantages: Float[Tensor, "batch response"],
    base: Base | None = None,
    *,
    threshold: float = 0.0,
) -> CreditSums:
    """`credit_metrics` that are not read yet, so that a GPU need not be waited for at each micro-batch."""
    counted = batch.counted
    batch = batch.where_counted()
    batch.trust(OPTIONAL_FIELDS)  # a number that is not finite must not stop the training that it describes
    mask = batch.response_mask
    by_row = _per_response(base, counted)
    rows = _credit_rows(advantages, mask, by_row)
    net, tokens, size = group_sums(torch.stack((rows["net"], rows["tokens"], counted.double()), 1), batch).unbind(1)
    share = torch.where(tokens > 0, counted / size.clamp_min(1.0), 0.0)  # each group counts once
    named = {
        "responses": torch.stack((counted.sum(), (~counted).sum())),
        "tokens": torch.stack([rows[name].sum() for name in ("tokens", "credited", "mass", "net")]),
        "groups": torch.stack(((share * net.abs() / tokens.clamp_min(1.0)).sum(), share.sum())),
        "gini": _votes(rows["gini"]),
        "effective": _votes(rows["effective"]),
    }
    ends = advantages.new_zeros(0, dtype=torch.float64)
    if base is not None:
        named["weights"], ends = (
            _row_weights(rows, by_row) if by_row is not None else _token_weights(advantages, base, mask)
        )
    if batch.entropies is not None:
        named["entropy"], entropy, least = _entropy_sums(batch)
        if by_row is None:
            named["quadrants"] = quadrant_sums(advantages, batch, polarity=base).flatten()
        else:
            totals = torch.stack((rows["tokens"], rows["mass"], entropy, rows["net"]), 1)
            named["quadrants"] = _quadrants_of_rows(advantages, batch, least, totals, by_row).flatten()
    whole = None if base is None else (base[:, None] if base.ndim == 1 else base).expand_as(advantages)
    named |= teacher_sums(batch, advantages, whole, threshold=threshold)
    # One collective for all sums, and one for the ends.
    flat = batch.reducer.total(torch.cat([value.double().flatten() for value in named.values()]))
    sizes = {name: value.numel() for name, value in named.items()}
    if len(ends):
        flat, sizes = torch.cat((flat, batch.reducer.maximum(ends))), sizes | {"ends": len(ends)}
    return CreditSums(flat, sizes)


def _per_response(base: Base | None, counted: Bool[Tensor, " batch"]) -> Float[Tensor, " batch"] | None:
    """The base as one number a response, 0 where that does not count; None where it differs between tokens."""
    if base is None:
        return None
    if base.ndim == 2 and not (base.shape[1] > 1 and base.stride(1) == 0):
        return None
    column = base if base.ndim == 1 else base[:, 0]
    return torch.where(counted, column.detach().double(), 0.0)


def _credit_rows(
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    base: Float[Tensor, " batch"] | None,
) -> dict[str, Float[Tensor, " batch"]]:
    """Of each response: tokens, those with credit, Σ|Â|, Σ Â, least and greatest Â, flips against the base, shape."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.float64)
    found = [
        _credit_block(advantages[rows], mask[rows], places, None if base is None else base[rows])
        for rows in row_blocks(mask)
    ]
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def _credit_block(
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    places: Float[Tensor, " response"],
    base: Float[Tensor, " batch"] | None,
) -> dict[str, Float[Tensor, " batch"]]:
    a, n = picked(advantages, mask), response_lengths(mask)[:, 0].double()
    ordered = sorted_rows(a.abs())  # what is not chosen is 0 and comes first
    wide, width = ordered.double(), mask.shape[1]
    mass, placed = torch.mv(wide, torch.ones_like(places)), torch.mv(wide, places)
    # Σ (2i − n − 1) w₍ᵢ₎ with places that start behind the width − n zeros.
    skew = 2.0 * placed - (2.0 * width - n + 1.0) * mass
    squares = _squares(ordered)
    least = greatest = smallest = mass
    if width:
        least, greatest = a.amin(1).double(), a.amax(1).double()
        smallest = wide.gather(1, (width - n.long()).clamp(max=width - 1)[:, None])[:, 0]  # |Â| of a chosen token
        least, greatest = torch.where(least >= 0, smallest, least), torch.where(greatest <= 0, -smallest, greatest)
    mixed = (least < 0) & (greatest > 0)
    net = torch.where(least < 0, -mass, mass)
    if _may_hold(mixed):
        net = torch.where(mixed, row_sums(a)[:, 0], net)
    credited = torch.where(mass > 0, n, 0.0)
    if _may_hold((smallest == 0) & (mass > 0)):
        credited = _count_rows(ordered > 0)
    defined = mass > 0
    found = {
        "tokens": n,
        "credited": credited,
        "mass": mass,
        "net": net,
        "least": least,
        "greatest": greatest,
        "gini": torch.where(defined & (n >= 2), skew / torch.where(defined, n * mass, 1.0), torch.nan),
        "effective": torch.where(defined, mass.square() / torch.where(defined, n * squares, 1.0), torch.nan),
    }
    if base is not None:
        found["flips"] = _flips(a, base, least, greatest)
    return found


def _flips(
    a: Float[Tensor, "batch response"],
    base: Float[Tensor, " batch"],
    least: Float[Tensor, " batch"],
    greatest: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """How many tokens of a response have credit of the other sign than its base."""
    if not _may_hold(((base > 0) & (least < 0)) | ((base < 0) & (greatest > 0))):
        return torch.zeros_like(base)
    return _count_rows(a * base.sign().to(a.dtype)[:, None] < 0)


def _may_hold(flags: Bool[Tensor, " batch"]) -> bool:
    """Whether one of the flags is set; on a GPU, which is not asked, always True."""
    return flags.device.type != "cpu" or bool(flags.any())


def _squares(x: Float[Tensor, "batch response"]) -> Float[Tensor, " batch"]:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()


def _count_rows(flags: Bool[Tensor, "batch response"]) -> Float[Tensor, " batch"]:
    return response_lengths(flags)[:, 0].double()


def _votes(values: Float[Tensor, " batch"]) -> Float[Tensor, " 2"]:
    defined = torch.isfinite(values)
    return torch.stack((torch.where(defined, values, 0.0).sum(), defined.sum().double()))


def _row_weights(
    rows: dict[str, Float[Tensor, " batch"]], base: Float[Tensor, " batch"]
) -> tuple[Float[Tensor, " 5"], Float[Tensor, " 2"]]:
    """Σ w and tokens on either side, flips; and the greatest w and −w."""
    some = (base != 0) & (rows["tokens"] > 0)
    divisor = torch.where(some, base, 1.0)
    total = torch.where(some, rows["net"] / divisor, 0.0)
    up, down = some & (base > 0), some & (base < 0)
    parts = [torch.where(side, value, 0.0).sum() for value in (total, rows["tokens"]) for side in (up, down)]
    ends = torch.stack((rows["least"], rows["greatest"])) / divisor
    nothing = ends.new_full((), -torch.inf)
    largest = [torch.cat((torch.where(some, side, nothing).flatten(), nothing[None])).amax() for side in (ends, -ends)]
    return torch.stack((*parts, torch.where(some, rows["flips"], 0.0).sum())), torch.stack(largest)


def _token_weights(
    advantages: Float[Tensor, "batch response"], base: Base, mask: Bool[Tensor, "batch response"]
) -> tuple[Float[Tensor, " 5"], Float[Tensor, " 2"]]:
    """`_row_weights` where the base differs between the tokens of a response."""
    ratio, defined = weight_ratio(advantages, base, mask)
    up, down = defined & (base > 0), defined & (base < 0)
    sides = [torch.where(side, ratio, 0.0).sum() for side in (up, down)] + [up.sum().double(), down.sum().double()]
    nothing = ratio.new_full((), -torch.inf)
    ends = [
        torch.cat((torch.where(defined, side, nothing).flatten(), nothing[None])).amax() for side in (ratio, -ratio)
    ]
    return torch.stack((*sides, (defined & (ratio < 0)).sum().double())), torch.stack(ends)


def _entropy_sums(
    batch: TokenBatch,
) -> tuple[Float[Tensor, " 6"], Float[Tensor, " batch"], Float[Tensor, "batch 1"]]:
    """n, Σx, Σy, Σx², Σy², Σxy of entropies x and relative positions y; Σx of each row, and from where on one is high.

    y = (t + ½) / n of the t-th of n chosen tokens, so Σy = n / 2 and Σy² = (4n² − 1) / 12n.
    """
    mask, entropies = batch.response_mask, batch.require("entropies").detach()
    n = response_lengths(mask)[:, 0].double()
    found = [_entropy_block(entropies[rows], mask[rows]) for rows in row_blocks(mask)]
    total, squares, placed, largest = (torch.cat(column) for column in zip(*found, strict=True))
    some = n.clamp_min(1.0)
    sums = (n, total, n / 2.0, squares, torch.where(n > 0, (4.0 * n * n - 1.0) / (12.0 * some), 0.0), placed / some)
    least = group_threshold(total[:, None], n[:, None], largest, batch)
    return torch.stack([column.sum() for column in sums]), total, least


def _entropy_block(
    entropies: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> tuple[Float[Tensor, " batch"], ...]:
    """Of each row: Σ H, Σ H², Σ (t + ½) H, and the greatest H."""
    h = picked(entropies, mask)
    wide = h.double()
    if has_holes(mask):
        placed = torch.linalg.vecdot(wide, chosen(positions(mask) + 0.5, mask))
    else:
        placed = torch.mv(wide, torch.arange(mask.shape[1], device=mask.device, dtype=torch.float64) + 0.5)
    total = torch.mv(wide, torch.ones_like(wide[0]) if len(wide) else wide.new_zeros(mask.shape[1]))
    return total, _squares(h), placed, _largest(h, mask)


def _largest(h: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, " batch"]:
    """The greatest chosen value of each row; any number where there is none."""
    if not mask.shape[1]:
        return h.new_zeros(len(h))
    largest = h.amax(1)
    if not _may_hold((largest <= 0) & (h.amin(1) < 0)):  # else the 0 of an unchosen token may be the greatest
        return largest
    return torch.where(mask, h, h.new_full((), -torch.inf)).amax(1)


def _quadrants_of_rows(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    least: Float[Tensor, "batch 1"],
    totals: Float[Tensor, "batch 4"],
    polarity: Float[Tensor, " batch"],
) -> Float[Tensor, "quadrant 4"]:
    """`quadrant_sums` where all tokens of a response have the same polarity; `totals` are those of whole responses."""
    mask, h = batch.response_mask, batch.require("entropies").detach()
    blocks = row_blocks(mask)
    high = torch.cat([_sums_where_high(advantages[rows], h[rows], mask[rows], least[rows]) for rows in blocks])
    halves = torch.stack((high, totals - high), 1)
    sides = torch.stack((polarity > 0, polarity < 0))
    return torch.stack([torch.where(side[:, None, None], halves, 0.0).sum(0) for side in sides]).reshape(4, 4)


def _sums_where_high(
    advantages: Float[Tensor, "batch response"],
    entropies: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    least: Float[Tensor, "batch 1"],
) -> Float[Tensor, "batch 4"]:
    """Of each row, over its tokens of high entropy: how many, Σ |Â|, Σ H, Σ Â."""
    high = mask & (entropies >= least)
    a = picked(advantages, high)
    net = row_sums(a)
    mass = net.abs() if a.numel() and _has_one_sign(a) else row_sums(a.abs())
    return torch.cat((_count_rows(high)[:, None], mass, row_sums(picked(entropies, high)), net), 1)


def _has_one_sign(a: Float[Tensor, "batch response"]) -> bool:
    """Whether no row has both signs."""
    return a.device.type == "cpu" and not _may_hold((a.amin(1) < 0) & (a.amax(1) > 0))


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


def _weights(sums: dict[str, list[float]]) -> dict[str, float]:
    up, down, ups, downs, flips = sums["weights"]
    largest, least = sums["ends"]
    return {
        "weight/mean": _ratio(up + down, ups + downs),
        "weight/min": -least,
        "weight/max": largest,
        "weight/positive": _ratio(up, ups),
        "weight/negative": _ratio(down, downs),
        "sign_flips": _ratio(flips, ups + downs),
    }


def _entropy(sums: dict[str, list[float]]) -> dict[str, float]:
    flat = sums["quadrants"]
    rows = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    count, _, mass, _ = sums["tokens"]
    if not isfinite(sums["entropy"][1]):  # the sum of the entropies
        return {}
    found = {"entropy": _ratio(sums["entropy"][1], count)}
    found["entropy_position"] = pearson_from_sums(*sums["entropy"])
    for name, statistics in statistics_from_sums(rows, count, mass).items():
        found |= {f"{name}/{key}": value for key, value in statistics._asdict().items()}
    return found


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
