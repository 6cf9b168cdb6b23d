"""The head takes no gradient: the direction of a log-prob's gradient does not depend on the loss, so it streams along.

    ∂ log p_t / ∂h = (1 − p_t) (W_t − Σ_{v≠t} p_{v|≠t} W_v) · s/T

The sum is an attention with query h and keys = values = W: two products in all, for any loss; backward is a scaling of
rows. Known from Unsloth, which writes frozen-head gradients in the forward pass; written here from the formula.
"""

from typing import Any

import torch
from torch import Tensor

from tokencredit.collect.head.gemm import product_nn, without_autocast
from tokencredit.collect.head.tiles import (
    OUT,
    HeadInputs,
    slope,
    softmax_tile,
    statistics,
    take_targets,
    tile_logits,
)


class FrozenHead(torch.autograd.Function):
    """Log-prob with gradient to the hidden states, entropy as a value."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, *parts: Any) -> tuple[Tensor, Tensor]:
        inputs = HeadInputs(*parts)
        blocks = [_stream(inputs.at(block)) for block in inputs.blocks() or [slice(0, 0)]]
        logprobs, entropies, directions = (torch.cat(found) for found in zip(*blocks, strict=True))
        ctx.save_for_backward(directions)
        ctx.dtype = inputs.hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (directions * grads[0][:, None]).to(ctx.dtype), None, None, None, None


def _stream(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and directions of one block of tokens, one pass over the vocabulary."""
    hidden, weight, readout, wide = inputs.hidden, inputs.weight, inputs.readout, inputs.wide
    rows = inputs.folded()
    lse = torch.full((hidden.shape[0],), OUT, dtype=wide, device=hidden.device)
    mean, target_logits = torch.zeros_like(lse), torch.zeros_like(lse)
    pulled = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    for columns in inputs.columns():
        logits = tile_logits(rows, weight[columns], readout, inputs.onednn)
        place = take_targets(logits, inputs.targets, columns.start)
        target_logits = torch.where(place.inside, place.logits, target_logits)
        bend = slope(logits, readout)
        tile = softmax_tile(logits)
        merged = torch.logaddexp(lse, tile.lse)
        old, new = torch.exp(lse - merged), torch.exp(tile.lse - merged)
        mean.mul_(old).addcmul_(torch.linalg.vecdot(tile.probs, logits), new)
        if bend is not None:
            tile.probs.mul_(bend)
        part = product_nn(tile.probs, weight[columns], onednn=inputs.onednn)
        pulled.mul_(old[:, None]).addcmul_(part, new[:, None])
        lse = merged
    found = statistics(target_logits, lse[None], mean[None])
    target_slope = slope(target_logits, readout)
    own = weight[inputs.targets].to(wide)
    own = own if target_slope is None else own.mul_(target_slope[:, None])
    directions = own.sub_(pulled).mul_(found.others.to(wide)[:, None] * readout.fold)
    return found.logprobs.to(wide), found.entropies.to(wide), directions
