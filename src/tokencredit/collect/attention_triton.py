"""Entropy of every head's attention rows on a GPU: queries against keys only, half the products of an attention call.

Forward only, no values are read and nothing of size T × T is written. 16-bit inputs lose nothing: scores and statistics
are float32. Checked on the CPU in Triton's interpreter; it has not been run on a GPU.
"""

import os

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from jaxtyping import Float, Int
from torch import Tensor

# The interpreter computes with numpy, which has no bfloat16: it upcasts before the product.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _row_entropies(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes pointers and strides
    query, key, entropies, log_sums, starts, stops,
    query_batch, query_head, query_row, key_batch, key_head, key_row, out_batch, out_head,
    queries, keys, heads, scale,
    SHARE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head. Online softmax with three numbers a row: maximum, Σe, Σe·(s − maximum)."""
    block = tl.program_id(0)
    sequence = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first, last = tl.load(starts + sequence), tl.load(stops + sequence)
    row = block * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    place = query + sequence * query_batch + head * query_head + row[:, None] * query_row + dim[None, :]
    left = tl.load(place, mask=row[:, None] < queries, other=0.0)
    offset = keys - queries
    top = tl.full((ROWS,), -1.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    high = tl.minimum(last, (block + 1) * ROWS + offset)
    low = first
    if WINDOW > 0:
        low = tl.maximum(low, block * ROWS + offset - WINDOW + 1)
    low = (low // COLUMNS) * COLUMNS
    for start in range(low, high, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = key + sequence * key_batch + (head // SHARE) * key_head + column[None, :] * key_row + dim[:, None]
        right = tl.load(place, mask=column[None, :] < keys, other=0.0)
        if UPCAST:  # noqa: SIM108 - one is compiled, the other is not
            scores = tl.dot(left.to(tl.float32), right.to(tl.float32)) * scale
        else:
            scores = tl.dot(left, right) * scale
        seen = (column[None, :] >= first) & (column[None, :] < last) & (column[None, :] <= row[:, None] + offset)
        if WINDOW > 0:
            seen = seen & (column[None, :] > row[:, None] + offset - WINDOW)
        scores = tl.where(seen, scores, -1.0e38)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top < -1.0e37, 0.0, new_top)
        decay = tl.exp(top - shift)
        mass = tl.where(seen, tl.exp(scores - shift[:, None]), 0.0)
        # Σe·(s − maximum): shifted by the running maximum, so a large common offset does not cancel.
        slide = tl.where(top < -1.0e37, 0.0, top - shift)
        moment = decay * (moment + slide * total) + tl.sum(mass * tl.where(seen, scores - shift[:, None], 0.0), 1)
        total = decay * total + tl.sum(mass, 1)
        top = new_top
    positive = tl.where(total > 0, total, 1.0)
    target = sequence * out_batch + head * out_head + row
    tl.store(entropies + target, tl.where(total > 0, tl.log(positive) - moment / positive, 0.0), mask=row < queries)
    tl.store(log_sums + target, top + tl.log(positive), mask=row < queries)


def triton_head_entropies(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    *,
    scale: float,
    window: int = 0,
    starts: Int[Tensor, " batch"] | None = None,
    stops: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries"], Float[Tensor, "batch heads queries"]]:
    """(H, lse) of causal attention rows in nats; keys outside [start, stop) of a sequence are padding, window 0: none.

    The head dimension is a power of two, at least 16. Rows without a visible key have entropy 0.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    entropies = torch.empty(batch, heads, queries, device=query.device)
    log_sums = torch.empty_like(entropies)
    if starts is None:
        starts = torch.zeros(batch, dtype=torch.int32, device=query.device)
    if stops is None:
        stops = torch.full((batch,), keys, dtype=torch.int32, device=query.device)
    query, key = _rows_contiguous(query), _rows_contiguous(key)
    _row_entropies[(triton.cdiv(queries, 64), batch * heads)](
        query, key, entropies, log_sums, starts, stops,
        *query.stride()[:3], *key.stride()[:3], *entropies.stride()[:2], queries, keys, heads, scale,
        SHARE=heads // key.shape[1], DIM=dim, ROWS=64, COLUMNS=64, WINDOW=window, UPCAST=INTERPRETED,
    )  # fmt: skip
    return entropies, log_sums


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
