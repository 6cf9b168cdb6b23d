"""How far attention heads look back, and how much later tokens look back at a token: WAAD and FAI."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.collect.attention import fused as attention_fused
from tokencredit.collect.attention.entropies import attention_layers, probed_pass
from tokencredit.collect.attention.parts import AttentionRows
from tokencredit.collect.attention.rows import row_blocks, score_blocks
from tokencredit.collect.rollout import Sequences, takes

NEAR, FAR = 10, 50  # tokens: the cap of a distance, and the window of later tokens that may look back


class HeadMaps(NamedTuple):
    """Per head and response token; `reach` is the mean distance that the head looks back."""

    distances: Float[Tensor, "batch heads response"]
    influences: Float[Tensor, "batch heads response"]
    reach: Float[Tensor, "batch heads response"]


@takes(Sequences, after=1)
@torch.no_grad()
def attention_rhythms(
    model: nn.Module,
    sequences: Sequences,
    layers: Sequence[int] | None = None,
    share: float = 0.3,
    stop_early: bool = True,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """(WAAD, FAI) of each response token, for `attention_rhythm`.

        WAAD_t = Σ_s A^loc_{t,s} min(t − s, 10)        FAI_s = mean of A^glob_{t,s} over t ∈ [s + 10, s + 50]

    The heads of `layers` (None: five around the middle) are sorted by the mean distance they look back; A^loc and
    A^glob are the mean maps of the lowest and highest `share` of them. Rows are the tokens' own. FAI of a token that no
    later response token can look at is 0.

    Paper: Attention Illuminates LLM Reasoning (arXiv:2510.13554). Deviation: heads are sorted on the batch at hand.
    """
    chosen = tuple(layers) if layers is not None else middle_layers(model)
    rows = sequences.response_columns
    parts = probed_pass(model, sequences, chosen, lambda seen: head_maps(replace(seen, rows=rows)), stop_early)
    maps = HeadMaps(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    real, mask = torch.ones_like(maps.reach[:, 0]), sequences.attention_mask
    if mask is not None:
        real = mask[:, rows].float()
    reach = (maps.reach * real[:, None]).sum((0, 2)) / real.sum().clamp_min(1)
    order = reach.argsort(stable=True)
    count = max(1, round(share * order.numel()))
    local, far = order[:count], order[order.numel() - count :]
    return maps.distances[:, local].mean(1), maps.influences[:, far].mean(1)


def middle_layers(model: nn.Module, count: int = 5) -> tuple[int, ...]:
    """Up to five layers of the middle third, centred."""
    usable = list(attention_layers(model))
    start = max(0, (len(usable) - count) // 2)
    return tuple(usable[start : start + count])


@takes(AttentionRows, positional=3)
@torch.no_grad()
def head_maps(attention: AttentionRows) -> HeadMaps:
    """The three numbers of every head: by the fused kernels where they fit, else block by block."""
    batch, heads = attention.query.shape[:2]
    device, offset, share = attention.query.device, attention.offset, attention.share
    first, stop = attention.span
    distances, influences, reach = (torch.zeros(batch, heads, stop - first, device=device) for _ in range(3))
    lookers = _lookers(stop - first, device)
    intervals = attention_fused.fused_intervals(attention)
    if intervals is not None:
        return _fused_maps(attention_fused.prepare(attention, intervals), lookers)
    for sequence, rows in row_blocks(attention):
        place = slice(rows.start - first, rows.stop - first)
        for index, block in enumerate(score_blocks(attention, sequence, rows)):
            members = slice(index * share, (index + 1) * share)
            probs = torch.softmax(block.scores, dim=-1)
            own = torch.arange(rows.start, rows.stop, device=device) + offset
            keys = torch.arange(probs.shape[-1], device=device) + block.first_key
            back = (own[:, None] - keys[None]).clamp_min(0).float()
            reach[sequence, members, place] = (probs * back).sum(-1)
            distances[sequence, members, place] = (probs * back.clamp_max(NEAR)).sum(-1)
            band = ((back >= NEAR) & (back <= FAR) & (keys >= first + offset)[None]).float()
            looked = (probs * band).sum(1)  # over the rows of the block
            inside = (keys >= first + offset) & (keys < stop + offset)
            influences[sequence, members].index_add_(1, keys[inside] - first - offset, looked[:, inside])
    return HeadMaps(distances, influences / lookers.clamp_min(1.0), reach)


def _fused_maps(call: attention_fused.Call, lookers: Float[Tensor, " response"]) -> HeadMaps:
    """`head_maps` from the fused kernels."""
    of_heads = attention_fused.fused_heads(call, near=NEAR)
    influences = attention_fused.fused_influences(call, of_heads.log_sums, NEAR, FAR)
    assert of_heads.distances is not None and of_heads.reach is not None
    return HeadMaps(of_heads.distances, influences / lookers.clamp_min(1.0), of_heads.reach)


def _lookers(length: int, device: torch.device) -> Float[Tensor, " response"]:
    """How many response tokens are between NEAR and FAR places after each."""
    after = length - 1 - torch.arange(length, device=device)
    return (after.clamp_max(FAR) - NEAR + 1).clamp_min(0).float()
