"""The loss is a sum over tokens and known: its gradient is written in the forward pass, no product is done twice.

For training loops of your own: TRL's and verl's trainers have no seam for another head. `benchmarks/head.py` measures
it.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.collect.head.gemm import CUDA_WORKSPACE, accumulate_tn, exact, product_nn, without_autocast
from tokencredit.collect.head.tiles import (
    PLAIN,
    HeadInputs,
    Readout,
    TokenStatistics,
    slope,
    softmax_tile,
    spans,
    statistics,
    take_targets,
    tile_logits,
)

BLOCK = 256  # tokens whose tiles are kept at once on the CPU: 256 · vocab · 4 bytes of workspace

TokenLoss = Callable[[Float[Tensor, " token"], Float[Tensor, " token"], slice], Float[Tensor, " token"]]


def head_objective(
    hidden: Float[Tensor, "token hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " token"],
    loss: TokenLoss,
    *,
    readout: Readout = PLAIN,
    onednn: bool | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " token"], Float[Tensor, " token"]]:
    """(Σ_t loss_t, log-probs, entropies); the sum has gradients, the other two are values.

        L = Σ_t ℓ(log p_t, H_t)

    `loss(logprobs, entropies, rows)` gives the loss of the tokens `rows`, each from its own two numbers alone; it may
    close over advantages and old log-probs. Three products of size token × hidden × vocab in all, two if the head takes
    no gradient. On the CPU, tokens whose loss has no gradient are left out of the last two; on a GPU that would take
    one wait per block.
    """
    return _Objective.apply(*HeadInputs(hidden, weight, targets, readout, onednn), loss)


class _Objective(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, *parts: Any) -> Any:
        inputs, loss = HeadInputs(*parts[:-1]), parts[-1]
        hidden, weight, wide = inputs.hidden, inputs.weight, inputs.wide
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        total = exact(hidden.new_zeros(()))
        logprobs, entropies = (torch.empty(hidden.shape[0], dtype=wide, device=hidden.device) for _ in range(2))
        for block in spans(hidden.shape[0], _block_size(inputs)):
            tiles = _Tiles(inputs.at(block))
            logprobs[block], entropies[block] = tiles.found.logprobs.to(wide), tiles.found.entropies.to(wide)
            value, a, b = _differentiate(loss, logprobs[block], entropies[block], block)
            total += value
            d_hidden[block] = tiles.backward(a, b, d_weight)
        ctx.save_for_backward(d_hidden.to(hidden.dtype), None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(logprobs, entropies)
        return total.to(wide), logprobs, entropies

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], None if d_weight is None else d_weight * grads[0], None, None, None, None


def _block_size(inputs: HeadInputs) -> int:
    """Tokens whose tiles are kept at once: few in a cache, as many as the workspace holds on a GPU."""
    if not inputs.hidden.is_cuda:
        return BLOCK
    return max(BLOCK, CUDA_WORKSPACE // (4 * inputs.weight.shape[0]))


def _differentiate(
    loss: TokenLoss, logprobs: Tensor, entropies: Tensor, rows: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of a block and its gradients with respect to log-prob and entropy."""
    with torch.enable_grad():
        leaves = (logprobs.detach().requires_grad_(), entropies.detach().requires_grad_())
        value = loss(*leaves, rows).sum()
    a, b = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), torch.zeros_like(logprobs) if a is None else a, b


class _Tiles:
    """The softmax tiles of one block of tokens, targets left out, kept until the gradient is known."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        self.spans = inputs.columns()
        rows = inputs.folded()
        self.probs: list[Tensor] = []
        lse, means = [], []
        target_logits = torch.zeros(inputs.hidden.shape[0], dtype=inputs.wide, device=inputs.hidden.device)
        for columns in self.spans:
            logits = tile_logits(rows, inputs.weight[columns], inputs.readout, inputs.onednn)
            place = take_targets(logits, inputs.targets, columns.start)
            target_logits = torch.where(place.inside, place.logits, target_logits)
            tile = softmax_tile(logits)
            self.probs.append(tile.probs)
            lse.append(tile.lse)
            means.append(torch.linalg.vecdot(tile.probs, logits))
        self.lse = torch.stack(lse)
        self.target_logits = exact(target_logits)
        self.found: TokenStatistics = statistics(target_logits, self.lse, torch.stack(means))

    def backward(self, a: Tensor, b: Tensor | None, d_weight: Tensor | None) -> Tensor:
        """Gradient of the block's hidden states; that of the weight is added to `d_weight`."""
        inputs, wide = self.inputs, self.inputs.wide
        kept = self._kept(a, b)
        found = TokenStatistics(*(item[kept] for item in self.found))
        a, b, targets = exact(a[kept]), None if b is None else exact(b[kept]), inputs.targets[kept]
        at_target = a * found.others
        if b is not None:
            at_target = at_target - b * found.logprobs.exp() * (found.logprobs + found.entropies)
        bend = slope(self.target_logits[kept], inputs.readout)
        at_target = (at_target if bend is None else at_target * bend).to(wide)[:, None]
        rows = inputs.folded()[kept]
        d_rows = inputs.weight[targets].to(wide) * at_target
        for probs, tile_lse, columns in zip(self.probs, self.lse, self.spans, strict=True):
            grad, factor = self._gradient(probs[kept], tile_lse[kept], a, b, found)
            part = product_nn(grad, inputs.weight[columns], onednn=inputs.onednn)
            d_rows.addcmul_(part, factor)
            if d_weight is not None:
                accumulate_tn(d_weight[columns], grad * factor, rows, fresh=False, onednn=inputs.onednn)
        if d_weight is not None:
            d_weight.index_add_(0, targets, rows.to(wide) * at_target)
        d_hidden = torch.zeros(inputs.hidden.shape, dtype=wide, device=inputs.hidden.device)
        d_hidden[kept] = d_rows.mul_(inputs.readout.fold)
        return d_hidden

    def _kept(self, a: Tensor, b: Tensor | None) -> Tensor | slice:
        """The tokens that have a gradient, or all where telling them apart would make the host wait."""
        if a.is_cuda:
            return slice(None)
        live = (a != 0) if b is None else (a != 0) | (b != 0)
        rows = live.nonzero()[:, 0]
        return slice(None) if rows.numel() == len(live) else rows

    def _gradient(
        self, probs: Tensor, tile_lse: Tensor, a: Tensor, b: Tensor | None, found: TokenStatistics
    ) -> tuple[Tensor, Tensor]:
        """Gradient of a tile of logits up to a factor per row; the logits are log p + lse of the tile."""
        wide = probs.dtype
        share = torch.exp(tile_lse - found.lse.to(wide))[:, None]
        bent = b is not None or self.inputs.readout.softcap is not None
        if not bent:
            return probs, -a.to(wide)[:, None] * share
        logits = probs.clamp_min(torch.finfo(wide).tiny).log().add_(tile_lse[:, None])
        bend = slope(logits, self.inputs.readout)
        if b is None:
            grad = probs * -a.to(wide)[:, None]
        else:
            constant = (-a + b * (found.lse - found.entropies)).to(wide)[:, None]
            grad = logits.mul_(-b.to(wide)[:, None]).add_(constant).mul_(probs)
        return grad if bend is None else grad.mul_(bend), share
