"""Entropy of the attention rows of many short sequences: a block holds sequences, not rows of one sequence."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
from tokencredit.collect.head.tiles import OUT


def sequences_at_once(heads: int, rows: int, keys: int) -> int:
    """How many sequences fit into one block; below two, rows of one sequence are the better block."""
    return SCORES // max(heads * rows * keys, 1)


def short_statistics(
    attention: AttentionRows, heads: Heads, drop: int, context: Context
) -> Float[Tensor, "3 batch row"]:
    """Ê, mass on the sink and visible keys of the rows, as `row_statistics` gives them."""
    batch, query_heads = attention.query.shape[:2]
    first, stop = attention.span
    step = sequences_at_once(query_heads, stop - first, attention.keys)
    parts = []
    for start in range(0, batch, step):
        members = slice(start, min(start + step, batch))
        visible = _visible(attention, members)
        scores = _scores(attention, members)
        scores.masked_fill_(~visible, OUT)
        entropy, sink = _reduced(scores, visible, heads, drop)
        count = visible[:, 0].sum(-1).float().expand(entropy.shape)
        entropy = normalised(entropy, count, attention.keys, drop, context)
        parts.append(torch.stack((entropy, torch.where(count > 0, sink, 0.0), count)))
    return torch.cat(parts, dim=1)


def _visible(attention: AttentionRows, members: slice) -> Bool[Tensor, "sequences 1 row key"]:
    """Visible keys; one plane for all sequences where only the diagonal hides keys."""
    first, stop = attention.span
    if attention.visibility.mask is None:
        device = attention.query.device
        own = torch.arange(first, stop, device=device)[:, None] + attention.offset
        return (torch.arange(attention.keys, device=device)[None] <= own)[None, None]
    seen = attention.visibility.mask(members, slice(first, stop))
    return seen.view(-1, 1, *seen.shape[-2:])


def _scores(attention: AttentionRows, members: slice) -> Float[Tensor, "sequences heads row key"]:
    rows, key_heads = slice(*attention.span), attention.key.shape[1]
    left = attention.query[members, :, rows].float() * attention.scale
    left = left.unflatten(1, (key_heads, -1)).flatten(2, 3)
    scores = left @ attention.key[members].float().mT
    scores = scores.unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
    if attention.softcap is not None:
        scores.div_(attention.softcap).tanh_().mul_(attention.softcap)
    if attention.visibility.bias is not None:
        bias = attention.visibility.bias(members, rows).float()
        scores.add_(bias.view(-1, 1, *bias.shape[-2:]))
    return scores


def _reduced(scores: Tensor, visible: Tensor, heads: Heads, drop: int) -> tuple[Tensor, Tensor]:
    """Entropy in nats and the attention on the first visible key, heads averaged."""
    order = visible[:, 0].cumsum(-1)
    first, dropped = (visible[:, 0] & (order <= most) for most in (1, drop))
    if heads == "mean_rows":
        mean = softmax_in_place(scores).mean(1)
        sink = mean.masked_fill(~first, 0.0).sum(-1)
        return entropy_of_probs(without_sinks(mean, dropped) if drop else mean), sink
    probs = torch.softmax(scores, dim=-1)
    sink = probs.masked_fill(~first[:, None], 0.0).sum(-1).mean(1)
    if drop:
        return entropy_of_probs(without_sinks(probs, dropped[:, None])).mean(1), sink
    return entropy_of_scores(scores, probs).mean(1), sink
