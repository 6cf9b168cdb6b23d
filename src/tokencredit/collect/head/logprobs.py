"""Log-prob and entropy of tokens from hidden states and the output matrix; a [token, vocab] tensor never exists.

Three engines, one answer: "recompute" (any gradient; 1 + 3f products of size token × hidden × vocab, f the share of
tokens whose gradient is not zero), "frozen" (the head takes no gradient and nor does the entropy; 2 products), and
`head_objective` (the loss is a sum over tokens and known; 3 products).
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import tokencredit.collect.head.fused as fused  # the package gives its names on request, so not `from … import`
from tokencredit.collect.head.frozen import FrozenHead
from tokencredit.collect.head.gemm import accumulate_tn, exact, host_operands, product_nn, product_nt, without_autocast
from tokencredit.collect.head.tiles import (
    PLAIN,
    HeadInputs,
    Readout,
    TokenStatistics,
    put_targets,
    scan,
    slope,
    softmax_tile,
    take_targets,
    tile_logits,
)
from tokencredit.errors import TokenCreditError

Engine = Literal["auto", "recompute", "frozen"]


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

    Backward work is done for tokens whose incoming gradient is not zero, and for no others; that is exact. Logits are
    float32 also under a host's autocast, which on CUDA rounds the two matrices and nothing else.
    """
    if engine == "frozen" and weight.requires_grad and torch.is_grad_enabled():
        raise TokenCreditError(
            "the frozen engine computes no gradient of the head, but `weight` requires one",
            hint="use engine='recompute'",
        )
    inputs = HeadInputs(*host_operands(hidden, weight), targets, readout, onednn)
    if live is None:
        return _score(inputs, engine)
    rows = live.nonzero()[:, 0]
    parts = _score(inputs.at(rows), engine)
    empty = parts[0].new_zeros(hidden.shape[0])
    return empty.index_copy(0, rows, parts[0]), empty.index_copy(0, rows, parts[1])


@without_autocast
def _score_values(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    inputs = HeadInputs(hidden, *others)
    found = scan(inputs)
    return found.logprobs.to(inputs.wide), found.entropies.to(inputs.wide)


def _score(inputs: HeadInputs, engine: Engine) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by the engine that the gradients ask for."""
    trained = inputs.weight.requires_grad
    if not torch.is_grad_enabled() or not (inputs.hidden.requires_grad or trained):
        return _score_values(inputs.hidden.detach(), inputs.weight.detach(), *inputs[2:])
    if engine == "frozen" or (engine == "auto" and not trained):
        return FrozenHead.apply(*inputs)
    return RecomputedHead.apply(*inputs)


class RecomputedHead(torch.autograd.Function):
    """Forward keeps four numbers per token; backward computes the logits again, for the tokens that need it."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, *parts: Any) -> tuple[Tensor, Tensor]:
        inputs = HeadInputs(*parts)
        found = scan(inputs)
        ctx.save_for_backward(inputs.hidden, inputs.weight, inputs.targets, *found)
        ctx.options = (inputs.readout, inputs.onednn)
        ctx.set_materialize_grads(False)
        return found.logprobs.to(inputs.wide), found.entropies.to(inputs.wide)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *found = ctx.saved_tensors
        whole = HeadInputs(hidden, weight, targets, *ctx.options)
        on_logprob, on_entropy = grads
        if on_logprob is None:
            on_logprob = torch.zeros_like(found[0])
        live = on_logprob != 0 if on_entropy is None else (on_logprob != 0) | (on_entropy != 0)
        rows = live.nonzero()[:, 0]
        job = _job(
            TokenStatistics(*(item[rows] for item in found)),
            on_logprob[rows],
            None if on_entropy is None else on_entropy[rows],
            whole.wide,
        )
        d_rows, d_weight = _run(job, whole.at(rows), ctx.needs_input_grad[:2])
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

    lse: Float[Tensor, " token"]
    constant: Float[Tensor, " token"]
    on_entropy: Float[Tensor, " token"] | None
    at_target: Float[Tensor, " token"]

    def at(self, rows: slice) -> "_Job":
        """The numbers of some tokens."""
        on_entropy = None if self.on_entropy is None else self.on_entropy[rows]
        return _Job(self.lse[rows], self.constant[rows], on_entropy, self.at_target[rows])


def _job(found: TokenStatistics, on_logprob: Tensor, on_entropy: Tensor | None, wide: torch.dtype) -> _Job:
    a = exact(on_logprob)
    constant, at_target = -a, a * found.others
    if on_entropy is not None:
        b = exact(on_entropy)
        constant = constant + b * (found.lse - found.entropies)
        at_target = at_target - b * found.logprobs.exp() * (found.logprobs + found.entropies)
    slopes = None if on_entropy is None else on_entropy.to(wide)
    return _Job(found.lse.to(wide), constant.to(wide), slopes, at_target.to(wide))


def _run(job: _Job, inputs: HeadInputs, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the live hidden states and of the weight, the vocabulary in tiles, the tokens in blocks."""
    hidden, weight, onednn = inputs.hidden, inputs.weight, inputs.onednn
    rows = inputs.folded()
    d_rows = torch.zeros(hidden.shape, dtype=inputs.wide, device=hidden.device) if wanted[0] else None
    d_weight = empty_gradient(weight, hidden.shape[0]) if wanted[1] else None
    for columns in inputs.columns():
        d_tile = None if d_weight is None else wide_tile(d_weight, columns, inputs.wide)
        for block in inputs.blocks():
            grad = _tile_gradient(job.at(block), inputs, rows, columns, block)
            if d_rows is not None:
                d_rows[block].add_(product_nn(grad, weight[columns], onednn=onednn))
            if d_tile is not None:
                accumulate_tn(d_tile, grad, rows[block], fresh=block.start == 0, onednn=onednn)
        if d_weight is not None and d_tile is not None and d_tile.dtype != d_weight.dtype:
            d_weight[columns] = d_tile.to(d_weight.dtype)
    return None if d_rows is None else d_rows.mul_(inputs.readout.fold), d_weight


def _tile_gradient(job: _Job, inputs: HeadInputs, rows: Tensor, columns: slice, block: slice) -> Tensor:
    """Gradient of one tile of logits, before the soft-cap."""
    weight, targets, readout = inputs.weight[columns], inputs.targets[block], inputs.readout
    if fused.fits(inputs.hidden):
        raw = product_nt(rows[block], weight, onednn=inputs.onednn)
        narrow = weight.dtype == rows.dtype == torch.bfloat16  # the next product rounds to it anyway
        dtype = torch.bfloat16 if narrow else raw.dtype
        return fused.gradient(raw, targets, columns.start, readout, job, dtype)
    logits = tile_logits(rows[block], weight, readout, inputs.onednn)
    place = take_targets(logits, targets, columns.start)
    bend, bend_at_target = slope(logits, readout), slope(place.logits, readout)
    tile = softmax_tile(logits)
    share = torch.exp(tile.lse - job.lse)
    constant = (job.constant * share)[:, None]
    if job.on_entropy is None:
        grad = tile.probs.mul_(constant)
    else:
        put_targets(logits, place, torch.zeros_like(place.logits))
        grad = logits.mul_(-(job.on_entropy * share)[:, None]).add_(constant).mul_(tile.probs)
    if bend is not None:
        grad = grad.mul_(bend)
    at_target = job.at_target if bend_at_target is None else job.at_target * bend_at_target
    put_targets(grad, place, at_target)
    return grad
