"""Reductions over the chosen tokens. What lies outside the mask may be NaN and never spreads.

Values keep their dtype where a method reads them with `picked`; sums are always taken in float64 and divided last, so
that micro-batches and ranks add up. On the CPU one row sums the same whatever rows lie beside it, so a result does not
depend on how a batch is cut. On CUDA, sums over a group are atomic: bit for bit the same only under
`torch.use_deterministic_algorithms(True)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import group_totals

BLOCK = 1 << 16  # tokens; a float32 temporary of them takes 256 KiB
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Moments(NamedTuple):
    """Mean, population standard deviation and number of tokens of the unit a row belongs to; each [batch, 1]."""

    mean: Float[Tensor, "batch 1"]
    std: Float[Tensor, "batch 1"]
    tokens: Float[Tensor, "batch 1"]


def kept(
    x: Float[Tensor, "batch #response"],
    mask: Bool[Tensor, "batch response"],
    out: Float[Tensor, "batch response"] | None = None,
) -> Float[Tensor, "batch response"]:
    """`x` where the mask is True, 0 elsewhere; detached, in its own dtype. One column stands for all."""
    x = x.detach()
    bits = BITS.get(x.dtype)
    if bits is None or x.device.type != "cpu" or (out is None and x.shape[1] < mask.shape[1]):
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    # Three passes in vector instructions take half as long as one `where`, which has none.
    ones = mask.to(bits) if out is None else out.view(bits).copy_(mask)
    return ones.neg_().bitwise_and_(x.view(bits)).view(x.dtype)


def row_blocks(mask: Bool[Tensor, "batch response"]) -> list[slice]:
    """Some rows at a time, so that what is computed on the way stays in the cache of a CPU core; on a GPU all."""
    count, response = mask.shape
    if not count:
        return [slice(0, 0)]
    rows = max(1, BLOCK // max(1, response)) if mask.device.type == "cpu" else count
    return [slice(first, first + rows) for first in range(0, count, rows)]


def by_blocks(
    formula: Callable[..., Tensor], mask: Bool[Tensor, "batch response"], *inputs: Tensor, out: Tensor | None = None
) -> Float[Tensor, "batch response"]:
    """`formula(*inputs)`, which looks at each row alone, where the mask is True, 0 elsewhere; some rows at a time.

    `out` may be one of the inputs: the same rows are read before they are written.
    """
    blocks = row_blocks(mask)
    if len(blocks) < 2:
        return kept(formula(*inputs), mask)
    result = out
    for rows in blocks:
        part = formula(*(value[rows] for value in inputs))
        result = part.new_empty(mask.shape) if result is None else result
        kept(part, mask[rows], out=result[rows])
    assert result is not None
    return result


def picked(
    x: Float[Tensor, "batch #response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """`kept`, at least in float32."""
    return kept(x if x.dtype in BITS else x.float(), mask)


def chosen(
    x: Float[Tensor, "batch #response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """`kept` in float64."""
    return kept(x.detach().double(), mask)


def level(x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch #response"]:
    """`picked`, but one column where `x` is one spread over all tokens, as estimators of the outcome return it.

    What is computed from the column then costs nothing. It holds the value of the response outside the mask as well.
    """
    is_column = x.shape[1] > 1 and x.stride(1) == 0
    return x[:, :1].detach().float() if is_column else picked(x, mask)


def unit_sums(
    x: Float[Tensor, "batch response"], batch: TokenBatch, unit: str | Int[Tensor, " batch"]
) -> Float[Tensor, "batch 1"]:
    """Sum of `x` over the chosen tokens of the row's response, group, batch or own key."""
    rows = row_sums(picked(x, batch.response_mask))
    return unit_totals(rows, batch, unit) if isinstance(unit, str) else group_totals(rows, unit, batch.reducer)


def unit_totals(rows: Float[Tensor, "batch stat"], batch: TokenBatch, unit: str) -> Float[Tensor, "batch stat"]:
    """Sums of what each row holds over the rows of the response, the group or the batch."""
    if unit == "response":
        return rows
    return (
        group_sums(rows, batch) if unit == "group" else batch.reducer.total(rows.sum(0, keepdim=True)).expand_as(rows)
    )


def group_sums(rows: Float[Tensor, "batch stat"], batch: TokenBatch) -> Float[Tensor, "batch stat"]:
    """Sums over the rows of the group, on all processes."""
    index, count = batch.numbered_groups
    table = rows.new_zeros(count, rows.shape[1]).index_add_(0, index, rows)
    return batch.reducer.total(table)[index]


def row_sums(x: Float[Tensor, "batch response"]) -> Float[Tensor, "batch 1"]:
    """Sum of each row, in float64."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.sum(1, keepdim=True, dtype=torch.float64)
    return torch.from_numpy(x.detach().numpy().sum(1, keepdims=True, dtype=np.float64))  # torch makes a copy first


def unit_moments(x: Float[Tensor, "batch response"], batch: TokenBatch, unit: str) -> Moments:
    """Moments of `x` over the chosen tokens of the row's response, group or batch, pooled over tokens.

    One pass: n, Σ (x − s) and Σ (x − s)², s the mean of the first chosen token of each row of the unit. The deviation
    of s from the mean is at most √n standard deviations, so no digit of a variance is lost to it.
    """
    mask = batch.response_mask
    x = x.detach() if x.dtype in BITS else x.detach().float()
    shift = _mean_of_first(x, batch, unit).to(x.dtype)
    parts = []
    for rows in row_blocks(mask):
        moved = kept(x[rows] - shift[rows], mask[rows])
        norms = torch.linalg.vector_norm(moved, dim=1, keepdim=True, dtype=torch.float64)
        parts.append(torch.cat((row_sums(moved), norms.square()), 1))
    stats = torch.cat((torch.cat(parts), response_lengths(mask).double()), 1)
    total, squares, tokens = unit_totals(stats, batch, unit).split(1, dim=1)
    count = tokens.clamp_min(1.0)
    offset = total / count
    variance = squares / count - offset.square()
    # What is left of a variance of 0 is rounding.
    variance = torch.where(variance > 1e-14 * offset.square(), variance, 0.0)
    return Moments(shift.double() + offset, variance.sqrt(), tokens)


def _mean_of_first(x: Float[Tensor, "batch response"], batch: TokenBatch, unit: str) -> Float[Tensor, "batch 1"]:
    """Mean over the rows of the unit of the first chosen value; 0 where there is none."""
    mask = batch.response_mask
    if not mask.shape[1]:
        return x.new_zeros(len(x), 1, dtype=torch.float64)
    place = mask.to(torch.uint8).argmax(1, keepdim=True) if has_holes(mask) or not bool(mask[:, 0].all()) else None
    first = x[:, :1] if place is None else x.gather(1, place)
    some = mask[:, :1] if place is None else mask.gather(1, place)
    stats = torch.cat((kept(first, some).double(), some.double()), 1)
    total, rows = unit_totals(stats, batch, unit).split(1, dim=1)
    return total / rows.clamp_min(1.0)


def minus(x: Float[Tensor, "batch response"], shift: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch response"]:
    """`x` less a number of each row, which is float64: not rounded to the dtype of `x`. Not masked."""
    x = x.detach() if x.dtype in BITS else x.detach().float()
    high = shift.to(x.dtype)
    return (x - high).sub_((shift - high).to(x.dtype))


def response_lengths(mask: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch 1"]:
    """Number of chosen tokens, [batch, 1]."""
    if mask.device.type != "cpu":
        return mask.sum(1, keepdim=True)
    # Bytes into 32 bits: five times as fast as flags into 64.
    return torch.from_numpy(mask.numpy().view(np.uint8).sum(1, keepdims=True, dtype=np.int32)).long()


def count_chosen(mask: Bool[Tensor, "batch response"]) -> Int[Tensor, ""]:
    """Number of chosen tokens of all rows."""
    return mask.count_nonzero() if mask.device.type != "cpu" else torch.tensor(np.count_nonzero(mask.numpy()))


def has_holes(mask: Bool[Tensor, "batch response"]) -> bool:
    """Whether some row has an unchosen token before a chosen one; on a GPU, which is not asked, always True."""
    if mask.device.type != "cpu":
        return True
    steps = mask.view(torch.int8)
    return mask.shape[1] > 1 and len(mask) > 0 and bool((steps[:, 1:] - steps[:, :-1]).amax() > 0)


def positions(mask: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch response"]:
    """0-based index among the chosen tokens of the row; meaningless outside the mask."""
    if not has_holes(mask):
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return mask.cumsum(1) - 1


def compact(x: Tensor, mask: Bool[Tensor, "batch response"]) -> Tensor:
    """The chosen tokens of each row moved to the left, order kept, 0 behind them; same shape."""
    if not has_holes(mask):
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    target = torch.where(mask, positions(mask), mask.shape[1])
    wide = x.new_zeros(x.shape[0], x.shape[1] + 1)  # the last column catches what is not chosen
    return wide.scatter(1, target, torch.where(mask, x, torch.zeros_like(x)))[:, :-1]


def spread(compacted: Tensor, mask: Bool[Tensor, "batch response"]) -> Tensor:
    """Inverse of `compact`: back to the places of the chosen tokens, 0 elsewhere."""
    back = compacted
    if has_holes(mask):
        back = compacted.gather(1, positions(mask).clamp_min(0))
    return torch.where(mask, back, torch.zeros((), dtype=back.dtype, device=back.device))


def following(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> tuple[Float[Tensor, "batch response"], Bool[Tensor, "batch response"]]:
    """`x` at the next chosen token of the row, and where there is one."""
    if not has_holes(mask):
        return torch.cat((x[:, 1:], x[:, :1]), dim=1), pad(mask[:, 1:], (0, 1))
    packed = compact(x, mask)
    after = spread(torch.cat((packed[:, 1:], packed[:, :1]), dim=1), mask)
    return after, mask & (positions(mask) < response_lengths(mask) - 1)


def row_quantile(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], q: float
) -> Float[Tensor, "batch 1"]:
    """Linear-interpolated quantile of each row over its chosen tokens; 0 for an empty row."""
    count = response_lengths(mask).clamp_min(1)
    ordered = sorted_rows(torch.where(mask, x, torch.inf))
    at = q * (count - 1).double()
    at = torch.where((at - at.round()).abs() < 1e-9, at.round(), at)  # 0.29 · 100 is 28.999… in floating point
    low, high = at.floor().long(), at.ceil().long()
    left, right = ordered.gather(1, low), ordered.gather(1, high)
    return torch.where(mask.any(1, keepdim=True), torch.lerp(left, right, (at - low).to(left.dtype)), 0.0)


def sorted_rows(x: Float[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """Each row in rising order, NaN last."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    return torch.from_numpy(np.sort(x.detach().numpy(), axis=1))  # torch sorts indices along, twenty times slower
