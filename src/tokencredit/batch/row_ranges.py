"""Which rows of a batch a method may see alone, so that its temporaries stay in the cache."""

from itertools import pairwise

from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import LocalReducer


def stretches(batch: TokenBatch, scope: str, tokens: int) -> list[slice]:
    """Rows, about `tokens` tokens at a time, that a method of this scope may see alone; none where it needs all.

    Whole groups where a group acts on itself, and only if the rows of each lie together. Over several ranks every
    process must make the same calls, so nothing is cut.
    """
    count, response = batch.response_mask.shape
    rows = max(1, tokens // max(1, response))
    if rows >= count or scope not in ("token", "response", "group") or not isinstance(batch.reducer, LocalReducer):
        return []
    cuts = list(range(1, count))
    if scope == "group":
        cuts = (batch.group_ids.diff().nonzero()[:, 0] + 1).tolist()
        if len(cuts) + 1 != batch.group_ids.unique().numel():
            return []
    edges = [0]
    for cut, following in pairwise([*cuts, count]):
        if following - edges[-1] > rows:
            edges.append(cut)
    return [slice(first, last) for first, last in pairwise([*edges, count])]
