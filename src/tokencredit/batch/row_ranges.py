"""Which rows of a batch a method may see alone, so that its temporaries stay in the cache."""

import torch
from jaxtyping import Int
from torch import Tensor

from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import LocalReducer

TILE = 1 << 18  # tokens at a time; a float32 temporary of them takes 256 KiB


def row_ranges(batch: TokenBatch, scope: str) -> list[slice | Int[Tensor, " row"]]:
    """Rows, about `TILE` tokens at a time, that a method of this scope may see alone; none where it needs all.

    Whole groups where a group acts on itself. Over several ranks every process must make the same calls, so nothing is
    cut; nor on a GPU, which has no use for tiles.
    """
    count, response = batch.response_mask.shape
    rows = max(1, TILE // max(1, response))
    alone = scope in ("token", "response", "group") and isinstance(batch.reducer, LocalReducer)
    if rows >= count or not alone or batch.response_mask.device.type != "cpu":
        return []
    if scope != "group":
        return [slice(first, min(first + rows, count)) for first in range(0, count, rows)]
    index, _ = batch.numbered_groups
    order = index.argsort(stable=True)
    edges = _edges(index[order].bincount().cumsum(0).tolist(), rows)
    if torch.equal(order, torch.arange(count)):
        return [slice(first, last) for first, last in edges]
    return [order[first:last] for first, last in edges]


def _edges(ends: list[int], rows: int) -> list[tuple[int, int]]:
    """Runs of whole groups, of at most `rows` rows where one group has no more; `ends` is where each group ends."""
    edges, first, last = [], 0, 0
    for end in ends:
        if end - first > rows and last > first:
            edges.append((first, last))
            first = last
        last = end
    return [*edges, (first, last)]
