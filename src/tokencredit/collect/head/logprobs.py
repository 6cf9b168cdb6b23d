"""Log-prob and entropy of tokens from hidden states and the output matrix; a [token, vocab] tensor never exists.

Three engines, one answer: "recompute" (any gradient; 1 + 3f products of size token × hidden × vocab, f the share of
tokens whose gradient is not zero), "frozen" (the head takes no gradient and nor does the entropy; 2 products), and
`head_objective` (the loss is a sum over tokens and known; 3 products).
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.head.frozen import FrozenHead
from tokencredit.collect.head.gemm import TILE, TOKENS, accumulate_tn, product_nn, without_autocast
from tokencredit.collect.head.tiles import (
    PLAIN,
    Readout,
    TokenStatistics,
    folded,
    scan,
    slope,
    softmax_tile,
    spans,
    tile_logits,
    without_target,
)
from tokencredit.errors import TokenCreditError

Engine = Literal["auto", "recompute", "frozen"]


@without_autocast
def head_logprobs(
    hidden: Float[Tensor, "token hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " token"],
    *,
    readout: Readout = PLAIN,
    engine: Engine = "auto",
    live: Bool[Tensor, " token"] | None = None,
    onednn: bool | None = None,
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """(log p(target), entropy) of each token, in nats, float32 or wider, with gradients.

        z = cap(s h Wᵀ) / T,   p = softmax z,   log p_t = z_t − lse z,   H = −Σ p ln p

    * `engine`: "auto" is "frozen" where the weight takes no gradient, else "recompute". The frozen engine's entropy has
      no gradient; ask for "recompute" if an entropy bonus is in the loss.
    * `live`: only these tokens are computed; the others are 0 and cost nothing.
    * `onednn`: None uses it where it works, False never.

    Backward work is done for tokens whose incoming gradient is not zero, and for no others; that is exact.
    """
    if engine == "frozen" and weight.requires_grad and torch.is_grad_enabled():
        raise TokenCreditError(
            "the frozen engine computes no gradient of the head, but `weight` requires one",
            hint="use engine='recompute'",
        )
    if live is not None:
        rows = live.nonzero()[:, 0]
        parts = head_logprobs(hidden[rows], weight, targets[rows], readout=readout, engine=engine, onednn=onednn)
        empty = parts[0].new_zeros(hidden.shape[0])
        return empty.index_copy(0, rows, parts[0]), empty.index_copy(0, rows, parts[1])
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        found, _ = scan(hidden.detach(), weight.detach(), targets, readout, onednn=onednn)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return found.logprobs.to(wide), found.entropies.to(wide)
    if engine == "frozen" or (engine == "auto" and not weight.requires_grad):
        return FrozenHead.apply(hidden, weight, targets, readout, onednn)
    return RecomputedHead.apply(hidden, weight, targets, readout, onednn)


class RecomputedHead(torch.autograd.Function):
    """Forward keeps one number per token and tile; backward computes the logits again, for the tokens that need it."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, readout: Readout, onednn: bool | None
    ) -> tuple[Tensor, Tensor]:
        found, tile_lse = scan(hidden, weight, targets, readout, onednn=onednn)
        ctx.save_for_backward(hidden, weight, targets, tile_lse, *found)
        ctx.options = (readout, onednn)
        ctx.set_materialize_grads(False)
        return found.logprobs.to(tile_lse.dtype), found.entropies.to(tile_lse.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, tile_lse, *found = ctx.saved_tensors
        on_logprob, on_entropy = grads
        if on_logprob is None:
            on_logprob = torch.zeros_like(tile_lse[0])
        live = on_logprob != 0 if on_entropy is None else (on_logprob != 0) | (on_entropy != 0)
        rows = live.nonzero()[:, 0]
        job = _job(
            TokenStatistics(*(item[rows] for item in found)),
            on_logprob[rows],
            None if on_entropy is None else on_entropy[rows],
            tile_lse[:, rows],
        )
        d_rows, d_weight = _run(job, hidden[rows], weight, targets[rows], ctx.options, ctx.needs_input_grad[:2])
        d_hidden = None if d_rows is None else torch.zeros_like(hidden).index_copy_(0, rows, d_rows.to(hidden.dtype))
        return d_hidden, d_weight, None, None, None


def empty_gradient(weight: Tensor, tokens: int) -> Tensor:
    """Room for the gradient of the weight; zeros where no token will write to it."""
    return torch.empty_like(weight) if tokens else torch.zeros_like(weight)


def wide_tile(d_weight: Tensor, columns: slice, wide: torch.dtype) -> Tensor:
    """A tile of the gradient itself, or a float32 one of the same shape where the weight has 16 bits."""
    tile = d_weight[columns]
    return tile if tile.dtype == wide else torch.zeros(tile.shape, dtype=wide, device=tile.device)


class _Job(NamedTuple):
    """∂z_v = p_v (c − b z_v) for v ≠ t with c = −a + b (lse − H);   ∂z_t = a (1 − p_t) − b p_t (log p_t + H).

    a and b are the gradients of log-prob and entropy; each is one number per token.
    """

    constant: Float[Tensor, " token"]
    on_entropy: Float[Tensor, " token"] | None
    at_target: Float[Tensor, " token"]
    lse: Float[Tensor, " token"]
    tile_lse: Float[Tensor, "tile token"]


def _job(found: TokenStatistics, on_logprob: Tensor, on_entropy: Tensor | None, tile_lse: Tensor) -> _Job:
    wide = tile_lse.dtype
    a = on_logprob.double()
    constant, at_target = -a, a * found.others
    if on_entropy is not None:
        b = on_entropy.double()
        constant = constant + b * (found.lse - found.entropies)
        at_target = at_target - b * found.logprobs.exp() * (found.logprobs + found.entropies)
    slopes = None if on_entropy is None else on_entropy.to(wide)
    return _Job(constant.to(wide), slopes, at_target.to(wide), found.lse.to(wide), tile_lse)


def _run(
    job: _Job,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: tuple[Readout, bool | None],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the live hidden states and of the weight, the vocabulary in tiles, the tokens in blocks."""
    readout, onednn = options
    wide = job.tile_lse.dtype
    rows = folded(hidden, readout)
    d_rows = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wanted[0] else None
    d_weight = empty_gradient(weight, hidden.shape[0]) if wanted[1] else None
    for index, columns in enumerate(spans(weight.shape[0], TILE)):
        d_tile = None if d_weight is None else wide_tile(d_weight, columns, wide)
        for block in spans(hidden.shape[0], TOKENS):
            logits = tile_logits(rows[block], weight[columns], readout, onednn)
            local = targets[block] - columns.start
            grad, factor, found, at_target = _tile_gradient(job, index, block, logits, local, readout)
            if d_rows is not None:
                part = product_nn(grad, weight[columns], onednn=onednn)
                d_rows[block].add_(part) if factor is None else d_rows[block].addcmul_(part, factor)
                d_rows[block].index_add_(0, found, weight[columns][local[found]].to(wide) * at_target)
            if d_tile is not None:
                left = rows[block].to(wide)
                scaled = left if factor is None else left * factor
                accumulate_tn(d_tile, grad, scaled, fresh=block.start == 0, onednn=onednn)
                d_tile.index_add_(0, local[found], left[found] * at_target)
        if d_weight is not None and d_tile is not None and d_tile.dtype != d_weight.dtype:
            d_weight[columns] = d_tile.to(d_weight.dtype)
    return None if d_rows is None else d_rows.mul_(readout.fold), d_weight


def _tile_gradient(
    job: _Job, index: int, block: slice, logits: Tensor, local: Tensor, readout: Readout
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradient of one tile of logits with 0 at the targets, and a factor per row that is cheaper to apply later.

    Also the rows whose target lies in the tile, and the gradient there.
    """
    found, values = without_target(logits, local, 0)
    bend, bend_at_target = slope(logits, readout), slope(values, readout)
    tile = softmax_tile(logits)
    share = torch.exp(job.tile_lse[index, block] - job.lse[block])
    constant = (job.constant[block] * share)[:, None]
    grad, factor = tile.probs, constant if job.on_entropy is None else None
    if job.on_entropy is not None:
        logits[found, local[found]] = 0.0
        b = (job.on_entropy[block] * share)[:, None]
        grad = logits.mul_(-b).add_(constant).mul_(tile.probs)
    if bend is not None:
        grad = grad.mul_(bend)
    at_target = job.at_target[block][found]
    if bend_at_target is not None:
        at_target = at_target * bend_at_target
    return grad, factor, found, at_target[:, None]
