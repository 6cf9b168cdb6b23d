"""Entropy of the attention rows of many short sequences: a block holds sequences, not rows of one sequence."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.collect.attention.parts import (
    SCORES,
    Context,
    Heads,
    Visibility,
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
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    visibility: Visibility,
    rows: slice,
    scale: float,
    softcap: float | None,
    how: tuple[Heads, int, Context],
) -> Float[Tensor, "3 batch row"]:
    """Ê, mass on the sink and visible keys of the rows, as `row_statistics` gives them."""
    heads, drop, context = how
    step = sequences_at_once(query.shape[1], rows.stop - rows.start, key.shape[2])
    parts = []
    for start in range(0, query.shape[0], step):
        members = slice(start, min(start + step, query.shape[0]))
        visible = _visible(visibility, members, rows, key.shape[2], key.shape[2] - query.shape[2], query.device)
        scores = _scores(query, key, visibility, members, rows, scale, softcap)
        scores.masked_fill_(~visible, OUT)
        entropy, sink = _reduced(scores, visible, heads, drop)
        count = visible[:, 0].sum(-1).float().expand(entropy.shape)
        entropy = normalised(entropy, count, key.shape[2], drop, context)
        parts.append(torch.stack((entropy, torch.where(count > 0, sink, 0.0), count)))
    return torch.cat(parts, dim=1)


def _visible(
    visibility: Visibility, members: slice, rows: slice, keys: int, offset: int, device: torch.device
) -> Bool[Tensor, "sequences 1 row key"]:
    """Visible keys; one plane for all sequences where only the diagonal hides keys."""
    if visibility.mask is None:
        own = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
        return (torch.arange(keys, device=device)[None] <= own)[None, None]
    seen = visibility.mask(members, rows)
    return seen.view(-1, 1, *seen.shape[-2:])


def _scores(
    query: Tensor, key: Tensor, visibility: Visibility, members: slice, rows: slice, scale: float, softcap: float | None
) -> Float[Tensor, "sequences heads row key"]:
    key_heads, count = key.shape[1], rows.stop - rows.start
    left = (query[members, :, rows].float() * scale).unflatten(1, (key_heads, -1)).flatten(2, 3)
    scores = (left @ key[members].float().mT).unflatten(2, (-1, count)).flatten(1, 2)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if visibility.bias is not None:
        bias = visibility.bias(members, rows).float()
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
