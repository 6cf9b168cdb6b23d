"""The head takes no gradient: the direction of a log-prob's gradient does not depend on the loss, so it streams along.

    ∂ log p_t / ∂h = (1 − p_t) (W_t − Σ_{v≠t} p_{v|≠t} W_v) · s/T

The sum is an attention with query h and keys = values = W: two products in all, for any loss; backward is a scaling of
rows. Known from Unsloth, which writes frozen-head gradients in the forward pass; written here from the formula.
"""

from typing import Any

import torch
from torch import Tensor

from tokencredit.collect.head.gemm import TILE, TOKENS, product_nn, without_autocast
from tokencredit.collect.head.tiles import (
    OUT,
    Readout,
    folded,
    slope,
    softmax_tile,
    spans,
    statistics,
    tile_logits,
    without_target,
)


class FrozenHead(torch.autograd.Function):
    """Log-prob with gradient to the hidden states, entropy as a value."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, readout: Readout, onednn: bool | None
    ) -> tuple[Tensor, Tensor]:
        blocks = [_stream(hidden[block], weight, targets[block], readout, onednn) for block in _blocks(hidden)]
        logprobs, entropies, directions = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        ctx.save_for_backward(directions)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (directions * grads[0][:, None]).to(ctx.dtype), None, None, None, None


def _blocks(hidden: Tensor) -> list[slice]:
    return list(spans(hidden.shape[0], TOKENS)) or [slice(0, 0)]


def _stream(
    hidden: Tensor, weight: Tensor, targets: Tensor, readout: Readout, onednn: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and directions of one block of tokens, one pass over the vocabulary."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = folded(hidden, readout)
    lse = torch.full((hidden.shape[0],), OUT, dtype=wide, device=hidden.device)
    mean, target_logits, target_slope = torch.zeros_like(lse), torch.zeros_like(lse), torch.ones_like(lse)
    pulled = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    for columns in spans(weight.shape[0], TILE):
        logits = tile_logits(rows, weight[columns], readout, onednn)
        found, values = without_target(logits, targets, columns.start)
        target_logits[found] = values
        bend, bend_at_target = slope(logits, readout), slope(values, readout)
        tile = softmax_tile(logits)
        merged = torch.logaddexp(lse, tile.lse)
        old, new = torch.exp(lse - merged), torch.exp(tile.lse - merged)
        mean.mul_(old).addcmul_(torch.linalg.vecdot(tile.probs, logits), new)
        if bend is not None and bend_at_target is not None:
            tile.probs.mul_(bend)
            target_slope[found] = bend_at_target
        part = product_nn(tile.probs, weight[columns], onednn=onednn)
        pulled.mul_(old[:, None]).addcmul_(part, new[:, None])
        lse = merged
    found_all = statistics(target_logits, lse[None], mean[None])
    own = weight[targets].to(wide) * target_slope[:, None]
    directions = own.sub_(pulled).mul_(found_all.others.to(wide)[:, None] * readout.fold)
    return found_all.logprobs.to(wide), found_all.entropies.to(wide), directions
