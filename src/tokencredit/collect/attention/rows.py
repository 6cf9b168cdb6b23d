"""Entropy of attention rows from queries and keys, block by block; nothing of size [heads, T, T] exists.

    ā_t = (1/H) Σ_h softmax(s q_t·k),    E_t = −Σ_s ā_{t,s} ln ā_{t,s},    Ê_t = E_t / ln N_t       (N_t = 1: 0)

Only the rows that are wanted are computed, only the keys that a block can see are touched, and query heads that share
a key head go through one product. 16-bit inputs are upcast: the scores are float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.collect.attention import fused as attention_fused
from tokencredit.collect.attention.parts import (
    SCORES,
    AttentionRows,
    Context,
    Heads,
    entropy_of_probs,
    entropy_of_scores,
    normalised,
    softmax_in_place,
    without_sinks,
)
from tokencredit.collect.attention.parts import Visibility as Visibility
from tokencredit.collect.attention.short import sequences_at_once, short_statistics
from tokencredit.collect.head.gemm import product_into
from tokencredit.collect.head.tiles import OUT
from tokencredit.collect.rollout import takes

BLOCK, LEAST = 128, 8  # rows of one block at most, and at least
DEVICE_BLOCK, DEVICE_SCORES = 4096, 1 << 27  # off the CPU: few launches count more than a cache


class RowStatistics(NamedTuple):
    """Of every row: Ê, the attention on the first visible key (the sink), and the number of visible keys."""

    entropies: Float[Tensor, "batch row"]
    sink_mass: Float[Tensor, "batch row"]
    counts: Float[Tensor, "batch row"]


class Block(NamedTuple):
    """Scores of one block of rows for the query heads of one key head, unseen keys at OUT."""

    scores: Float[Tensor, "share row key"]
    visible: Bool[Tensor, "row key"] | None  # None: all up to the diagonal
    first_row: int
    first_key: int


@takes(AttentionRows, positional=3)
@torch.no_grad()
def row_statistics(
    attention: AttentionRows, *, heads: Heads = "mean_rows", drop_sink: int = 0, context: Context = "visible"
) -> RowStatistics:
    """Ê of the rows of every sequence.

    * `heads`: "mean_rows" averages the rows over the heads first, "mean_entropy" the entropies afterwards.
    * `drop_sink`: so many of the first visible keys are zeroed, the row renormalised, N_t reduced.
    * `context`: N_t counts the visible keys, or is the length of the sequence.

    On CUDA the fused kernels compute what they can (`attention_fused.fits`), and blocks of scores the rest.
    """
    batch, query_heads = attention.query.shape[:2]
    first, stop = attention.span
    if heads == "mean_rows" or drop_sink == 0:
        intervals = attention_fused.fused_intervals(attention)
        if intervals is not None:
            return _fused_statistics(attention_fused.prepare(attention, intervals), heads, drop_sink, context)
    if batch > 1 and stop > first and sequences_at_once(query_heads, stop - first, attention.keys) > 1:
        return RowStatistics(*short_statistics(attention, heads, drop_sink, context))
    statistics = torch.zeros(3, batch, max(stop - first, 0), device=attention.query.device)
    for sequence, rows in row_blocks(attention):
        total = None
        for block in score_blocks(attention, sequence, rows):
            part = _head_sum(block, heads, drop_sink)
            total = part if total is None else tuple(a.add_(b) for a, b in zip(total, part, strict=True))
            seen = block
        count = _counts(seen)
        entropy, sink = _finish(total, seen, count, query_heads, heads, drop_sink)
        entropy = normalised(entropy, count, attention.keys, drop_sink, context)
        place = slice(rows.start - first, rows.stop - first)
        statistics[:, sequence, place] = torch.stack((entropy, torch.where(count > 0, sink, 0.0), count))
    return RowStatistics(*statistics)


def _fused_statistics(call: attention_fused.Call, heads: Heads, drop: int, context: Context) -> RowStatistics:
    """`row_statistics` from the fused kernels."""
    of_heads = attention_fused.fused_heads(call)
    of_rows = attention_fused.fused_mean_rows(call, of_heads.log_sums, drop)
    entropy = of_rows.entropies if heads == "mean_rows" else of_heads.entropies.mean(1)
    count = (call.seen.high - call.seen.low).clamp_min(0).float()
    entropy = normalised(entropy, count, call.key.shape[2], drop, context)
    return RowStatistics(entropy, torch.where(count > 0, of_rows.sink_mass, 0.0), count)


@takes(AttentionRows, positional=3)
@torch.no_grad()
def head_entropies(attention: AttentionRows) -> Float[Tensor, "batch heads row"]:
    """Entropy of every head's rows in nats, not divided: lse − E[score]; 0 where nothing is visible."""
    batch, query_heads = attention.query.shape[:2]
    (first, stop), share = attention.span, attention.share
    intervals = attention_fused.fused_intervals(attention)
    if intervals is not None:
        return attention_fused.fused_heads(attention_fused.prepare(attention, intervals)).entropies
    entropies = torch.zeros(batch, query_heads, max(stop - first, 0), device=attention.query.device)
    for sequence, rows in row_blocks(attention):
        place = slice(rows.start - first, rows.stop - first)
        for index, block in enumerate(score_blocks(attention, sequence, rows)):
            entropy = entropy_of_scores(block.scores, torch.softmax(block.scores, dim=-1))
            seen = _counts(block) > 0
            entropies[sequence, index * share : (index + 1) * share, place] = torch.where(seen, entropy, 0.0)
    return entropies


def row_blocks(attention: AttentionRows) -> Iterator[tuple[int, slice]]:
    """(sequence, rows) of blocks whose scores (rows × keys × heads of one key head) stay small.

    Small is what fits the cache of a CPU; on another device a block fills it instead.
    """
    large = attention.query.device.type != "cpu"
    most, scores = (DEVICE_BLOCK, DEVICE_SCORES) if large else (BLOCK, SCORES)
    step = max(LEAST, min(most, scores // max(attention.keys * attention.share, 1)))
    first, stop = attention.span
    for sequence in range(len(attention.query)):
        for start in range(first, stop, step):
            yield sequence, slice(start, min(start + step, stop))


def score_blocks(attention: AttentionRows, sequence: int, rows: slice) -> Iterator[Block]:
    """One block per key head; all see the same keys, cut to the range that any row of the block sees.

    The scores of a block live until the next one: they share their memory.
    """
    query, key, visibility = attention.query[sequence], attention.key[sequence], attention.visibility
    key_heads, _, dim = key.shape
    share, count, offset = attention.share, rows.stop - rows.start, attention.offset
    visible, bias = None, None
    low, high = 0, rows.stop + offset
    if visibility.mask is not None:
        visible = visibility.mask(sequence, rows)
        live = visible.any(0).nonzero()
        low, high = (int(live[0]), int(live[-1]) + 1) if live.numel() else (0, 1)
        visible = visible[:, low:high]
        bias = None if visibility.bias is None else visibility.bias(sequence, rows)[:, low:high].float()
    hidden = _unseen(visible, count, high - low, query.device)
    room = torch.empty((share * count, high - low), device=query.device)
    for head in range(key_heads):
        left = query[head * share : (head + 1) * share, rows].reshape(share * count, dim).float() * attention.scale
        scores = product_into(left, key[head, low:high], room).view(share, count, high - low)
        if attention.softcap is not None:
            scores.div_(attention.softcap).tanh_().mul_(attention.softcap)
        if bias is not None:
            scores.add_(bias)
        tail = hidden.shape[1]  # of a causal block only the last columns can be unseen
        scores[..., -tail:].masked_fill_(hidden, OUT)
        yield Block(scores, visible, rows.start + offset, low)


def _unseen(visible: Tensor | None, rows: int, keys: int, device: torch.device) -> Bool[Tensor, "row tail"]:
    if visible is not None:
        return ~visible
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)[:, -min(rows, keys) :]


def _counts(block: Block) -> Float[Tensor, " row"]:
    """Number of visible keys of each row."""
    if block.visible is not None:
        return block.visible.sum(-1).float()
    count = block.scores.shape[1]
    return torch.arange(block.first_row + 1, block.first_row + count + 1, device=block.scores.device).float()


def _sinks(block: Block, drop: int) -> Bool[Tensor, "row key"]:
    """The first `drop` visible keys of each row."""
    keys = block.scores.shape[-1]
    if block.visible is None:
        return torch.arange(keys, device=block.scores.device).expand(block.scores.shape[1], keys) < drop
    return block.visible & (block.visible.cumsum(-1) <= drop)


def _head_sum(block: Block, heads: Heads, drop: int) -> tuple[Tensor, ...]:
    """What is summed over the heads: rows, or entropies and the mass on the sink."""
    if heads == "mean_rows":
        return (softmax_in_place(block.scores).sum(0),)
    probs = torch.softmax(block.scores, dim=-1)
    mass = probs.masked_fill(~_sinks(block, 1), 0.0).sum((0, -1))
    if drop == 0:
        return entropy_of_scores(block.scores, probs).sum(0), mass
    return entropy_of_probs(without_sinks(probs, _sinks(block, drop))).sum(0), mass


def _finish(
    total: tuple[Tensor, ...] | None, block: Block, count: Tensor, query_heads: int, heads: Heads, drop: int
) -> tuple[Tensor, Tensor]:
    """Entropy in nats and sink mass of the rows of a block."""
    assert total is not None  # there is at least one key head
    if heads == "mean_entropy":
        return total[0] / query_heads, total[1] / query_heads
    mean = total[0].div_(query_heads)
    sink = mean.masked_fill(~_sinks(block, 1), 0.0).sum(-1)
    return entropy_of_probs(without_sinks(mean, _sinks(block, drop)) if drop else mean), sink
