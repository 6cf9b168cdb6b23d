"""Kullback-Leibler divergence over the whole vocabulary between two heads, from hidden states, in tiles."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.head.gemm import accumulate_tn, exact, host_operands, product_nn, tiling, without_autocast
from tokencredit.collect.head.logprobs import empty_gradient, wide_tile
from tokencredit.collect.head.tiles import (
    PLAIN,
    Readout,
    folded,
    slope,
    softmax_tile,
    spans,
    tile_logits,
    wide_dtype,
)

HELD = 6  # tiles of one size that exist at the same time


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
    heads = (*host_operands(*student), *host_operands(*(part.detach() for part in teacher)))
    return _Divergence.apply(*_Pair(*heads, direction == "reverse", student_readout, teacher_readout, onednn))


class _Pair(NamedTuple):
    """Hidden states and matrix of the student and of the teacher, and how both are read."""

    hidden: Float[Tensor, "token hidden"]
    weight: Float[Tensor, "vocab hidden"]
    teacher_hidden: Float[Tensor, "token teacher_hidden"]
    teacher_weight: Float[Tensor, "vocab teacher_hidden"]
    reverse: bool
    readout: Readout
    teacher_readout: Readout
    onednn: bool | None

    def tiles(self) -> tuple[list[slice], list[slice]]:
        """The vocabulary and the tokens in tiles."""
        vocab, tokens = tiling(self.hidden, HELD)
        return list(spans(self.weight.shape[0], vocab)), list(spans(self.hidden.shape[0], tokens))

    def logits(self, columns: slice, block: slice) -> tuple[Tensor, Tensor]:
        """A tile of the student's logits and of the teacher's."""
        ours, theirs = (
            folded(self.hidden[block], self.readout),
            folded(self.teacher_hidden[block], self.teacher_readout),
        )
        return (
            tile_logits(ours, self.weight[columns], self.readout, self.onednn),
            tile_logits(theirs, self.teacher_weight[columns], self.teacher_readout, self.onednn),
        )


class _Statistics(NamedTuple):
    """Of each token: the lse of every tile of student and teacher, the lse of all, the divergence."""

    tile_lse: Float[Tensor, "tile token"]
    teacher_tile_lse: Float[Tensor, "tile token"]
    lse: Float[Tensor, " token"]
    teacher_lse: Float[Tensor, " token"]
    divergence: Float[Tensor, " token"]

    def at(self, rows: slice | Tensor) -> "_Statistics":
        """The statistics of some tokens."""
        return _Statistics(*(item[..., rows] for item in self))


class _Divergence(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, *parts: Any) -> Tensor:
        pair = _Pair(*parts)
        wide = wide_dtype(pair.hidden)
        vocabulary, tokens = pair.tiles()
        shape = (len(vocabulary), pair.hidden.shape[0])
        tile_lse, teacher_tile_lse, gaps = (torch.empty(shape, dtype=wide, device=pair.hidden.device) for _ in range(3))
        for index, columns in enumerate(vocabulary):
            for block in tokens:
                ours, theirs = pair.logits(columns, block)
                p, q = softmax_tile(ours), softmax_tile(theirs)
                tile_lse[index, block], teacher_tile_lse[index, block] = p.lse, q.lse
                gaps[index, block] = torch.linalg.vecdot(p.probs if pair.reverse else q.probs, ours - theirs)
        lse, teacher_lse = (torch.logsumexp(exact(stat), 0) for stat in (tile_lse, teacher_tile_lse))
        share = torch.exp(tile_lse - lse) if pair.reverse else torch.exp(teacher_tile_lse - teacher_lse)
        gap = (share * gaps).sum(0) - lse + teacher_lse
        divergence = gap if pair.reverse else -gap
        ctx.save_for_backward(*parts[:4], tile_lse, teacher_tile_lse, lse, teacher_lse, divergence)
        ctx.options = parts[4:]
        return divergence.to(wide)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole = _Pair(*ctx.saved_tensors[:4], *ctx.options)
        rows = (grads[0] != 0).nonzero()[:, 0]
        pair = whole._replace(hidden=whole.hidden[rows], teacher_hidden=whole.teacher_hidden[rows])
        stats = _Statistics(*ctx.saved_tensors[4:]).at(rows)
        d_rows, d_weight = _backward(pair, stats, grads[0][rows], ctx.needs_input_grad[:2])
        if d_rows is not None:
            d_rows = torch.zeros_like(whole.hidden).index_copy_(0, rows, d_rows.to(whole.hidden.dtype))
        return d_rows, d_weight, None, None, None, None, None, None


def _backward(
    pair: _Pair, stats: _Statistics, incoming: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    wide = stats.tile_lse.dtype
    rows = folded(pair.hidden, pair.readout)
    d_rows = torch.zeros(pair.hidden.shape, dtype=wide, device=pair.hidden.device) if wanted[0] else None
    d_weight = empty_gradient(pair.weight, pair.hidden.shape[0]) if wanted[1] else None
    vocabulary, tokens = pair.tiles()
    for index, columns in enumerate(vocabulary):
        d_tile = None if d_weight is None else wide_tile(d_weight, columns, wide)
        for block in tokens:
            grad = _tile_gradient(pair, stats.at(block), incoming[block], index, pair.logits(columns, block))
            if d_rows is not None:
                d_rows[block].add_(product_nn(grad, pair.weight[columns], onednn=pair.onednn))
            if d_tile is not None:
                accumulate_tn(d_tile, grad, rows[block], fresh=block.start == 0, onednn=pair.onednn)
        if d_weight is not None and d_tile is not None and d_tile.dtype != d_weight.dtype:
            d_weight[columns] = d_tile.to(d_weight.dtype)
    return None if d_rows is None else d_rows.mul_(pair.readout.fold), d_weight


def _tile_gradient(
    pair: _Pair, stats: _Statistics, incoming: Tensor, index: int, logits: tuple[Tensor, Tensor]
) -> Tensor:
    wide = stats.tile_lse.dtype
    ours, theirs = logits
    bend = slope(ours, pair.readout)
    scale = (exact(incoming) * torch.exp(stats.tile_lse[index] - stats.lse)).to(wide)[:, None]
    p = softmax_tile(ours).probs
    if pair.reverse:
        offset = (stats.teacher_lse - stats.lse - stats.divergence).to(wide)[:, None]
        grad = ours.sub_(theirs).add_(offset).mul_(scale).mul_(p)
    else:
        share = torch.exp(stats.teacher_tile_lse[index] - stats.teacher_lse)
        teacher_scale = (exact(incoming) * share).to(wide)[:, None]
        grad = p.mul_(scale).addcmul_(softmax_tile(theirs).probs, -teacher_scale)
    return grad if bend is None else grad.mul_(bend)
