"""Kullback-Leibler divergence over the whole vocabulary between two heads, from hidden states, in tiles."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.head.gemm import TILE, TOKENS, accumulate_tn, product_nn, without_autocast
from tokencredit.collect.head.logprobs import empty_gradient, wide_tile
from tokencredit.collect.head.tiles import PLAIN, Readout, folded, slope, softmax_tile, spans, tile_logits


def head_divergence(
    student: tuple[Float[Tensor, "token hidden"], Float[Tensor, "vocab hidden"]],
    teacher: tuple[Float[Tensor, "token teacher_hidden"], Float[Tensor, "vocab teacher_hidden"]],
    *,
    direction: Literal["reverse", "forward"] = "reverse",
    student_readout: Readout = PLAIN,
    teacher_readout: Readout = PLAIN,
    onednn: bool | None = None,
) -> Float[Tensor, " token"]:
    """KL(student ‖ teacher) ("reverse") or KL(teacher ‖ student) ("forward") of each token, in nats.

        reverse: E_s[z_s − z_t] − lse_s + lse_t          ∂/∂z_s = p_s (ln p_s − ln p_t − KL)
        forward: E_t[z_t − z_s] − lse_t + lse_s          ∂/∂z_s = p_s − p_t

    A head is (hidden states, matrix); widths may differ, the vocabulary may not. Gradients go to the student, for
    tokens whose incoming gradient is not zero. Two products forward, four backward.
    """
    readouts = (student_readout, teacher_readout)
    return _Divergence.apply(*student, *(part.detach() for part in teacher), direction == "reverse", readouts, onednn)


class _Divergence(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, weight, _, _, reverse, readouts, onednn = args
        tiles = -(-weight.shape[0] // TILE)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        stats = [torch.empty(tiles, hidden.shape[0], dtype=wide, device=hidden.device) for _ in range(3)]
        for index, columns in enumerate(spans(weight.shape[0], TILE)):
            for block in spans(hidden.shape[0], TOKENS):
                ours, theirs = _logits(args, columns, block)
                p, q = softmax_tile(ours), softmax_tile(theirs)
                stats[0][index, block], stats[1][index, block] = p.lse, q.lse
                gap = ours - theirs
                stats[2][index, block] = torch.linalg.vecdot(p.probs if reverse else q.probs, gap)
        lse, teacher_lse = (torch.logsumexp(stat.double(), 0) for stat in stats[:2])
        share = torch.exp(stats[0] - lse) if reverse else torch.exp(stats[1] - teacher_lse)
        gap = (share * stats[2]).sum(0) - lse + teacher_lse
        divergence = gap if reverse else -gap
        ctx.save_for_backward(*args[:4], *stats[:2], lse, teacher_lse, divergence)
        ctx.options = (reverse, readouts, onednn)
        return divergence.to(wide)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, *stats = ctx.saved_tensors
        rows = (grads[0] != 0).nonzero()[:, 0]
        args = (hidden[rows], weight, teacher_hidden[rows], teacher_weight, *ctx.options)
        stats = [stat[..., rows] for stat in stats]
        d_rows, d_weight = _backward(args, stats, grads[0][rows], ctx.needs_input_grad[:2])
        d_hidden = None if d_rows is None else torch.zeros_like(hidden).index_copy_(0, rows, d_rows.to(hidden.dtype))
        return d_hidden, d_weight, None, None, None, None, None


def _logits(args: tuple[Any, ...], columns: slice, block: slice) -> tuple[Tensor, Tensor]:
    hidden, weight, teacher_hidden, teacher_weight, _, (ours, theirs), onednn = args
    return (
        tile_logits(folded(hidden[block], ours), weight[columns], ours, onednn),
        tile_logits(folded(teacher_hidden[block], theirs), teacher_weight[columns], theirs, onednn),
    )


def _backward(
    args: tuple[Any, ...], stats: list[Tensor], incoming: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, _, _, _, (readout, _), onednn = args
    wide = stats[0].dtype
    rows = folded(hidden, readout).to(wide)
    d_rows = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wanted[0] else None
    d_weight = empty_gradient(weight, hidden.shape[0]) if wanted[1] else None
    for index, columns in enumerate(spans(weight.shape[0], TILE)):
        d_tile = None if d_weight is None else wide_tile(d_weight, columns, wide)
        for block in spans(hidden.shape[0], TOKENS):
            grad = _tile_gradient(args, [stat[..., block] for stat in stats], incoming[block], index, columns, block)
            if d_rows is not None:
                d_rows[block].add_(product_nn(grad, weight[columns], onednn=onednn))
            if d_tile is not None:
                accumulate_tn(d_tile, grad, rows[block], fresh=block.start == 0, onednn=onednn)
        if d_weight is not None and d_tile is not None and d_tile.dtype != d_weight.dtype:
            d_weight[columns] = d_tile.to(d_weight.dtype)
    return None if d_rows is None else d_rows.mul_(readout.fold), d_weight


def _tile_gradient(
    args: tuple[Any, ...], stats: list[Tensor], incoming: Tensor, index: int, columns: slice, block: slice
) -> Tensor:
    reverse, (readout, _) = args[4], args[5]
    tile_lse, teacher_tile_lse, lse, teacher_lse, divergence = stats
    wide = tile_lse.dtype
    ours, theirs = _logits(args, columns, block)
    bend = slope(ours, readout)
    scale = (incoming.double() * torch.exp(tile_lse[index] - lse)).to(wide)[:, None]
    p = softmax_tile(ours).probs
    if reverse:
        offset = (teacher_lse - lse - divergence).to(wide)[:, None]
        grad = ours.sub_(theirs).add_(offset).mul_(scale).mul_(p)
    else:
        teacher_scale = (incoming.double() * torch.exp(teacher_tile_lse[index] - teacher_lse)).to(wide)[:, None]
        grad = p.mul_(scale).addcmul_(softmax_tile(theirs).probs, -teacher_scale)
    return grad if bend is None else grad.mul_(bend)
