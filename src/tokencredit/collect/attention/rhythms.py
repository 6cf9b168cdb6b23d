"""How far attention heads look back, and how much later tokens look back at a token: WAAD and FAI."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.attention import fused as attention_fused
from tokencredit.collect.attention.entropies import EnoughError, attention_layers, probe_attention
from tokencredit.collect.attention.rows import Visibility, row_blocks, score_blocks
from tokencredit.collect.logprobs import ExtraInputs, layout_inputs
from tokencredit.collect.models import backbone_of, check_span, eval_mode

NEAR, FAR = 10, 50  # tokens: the cap of a distance, and the window of later tokens that may look back


class HeadMaps(NamedTuple):
    """Per head and response token; `reach` is the mean distance that the head looks back."""

    distances: Float[Tensor, "batch heads response"]
    influences: Float[Tensor, "batch heads response"]
    reach: Float[Tensor, "batch heads response"]


@torch.no_grad()
def attention_rhythms(  # noqa: PLR0913 - a pass and its inputs
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    layers: Sequence[int] | None = None,
    share: float = 0.3,
    stop_early: bool = True,
    *,
    extra_inputs: ExtraInputs | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """(WAAD, FAI) of each response token, for `attention_rhythm`.

        WAAD_t = Σ_s A^loc_{t,s} min(t − s, 10)        FAI_s = mean of A^glob_{t,s} over t ∈ [s + 10, s + 50]

    The heads of `layers` (None: five around the middle) are sorted by the mean distance they look back; A^loc and
    A^glob are the mean maps of the lowest and highest `share` of them. Rows are the tokens' own. FAI of a token that no
    later response token can look at is 0.

    Paper: Attention Illuminates LLM Reasoning (arXiv:2510.13554). Deviation: heads are sorted on the batch at hand.
    """
    check_span(prompt_length, response_length, input_ids.shape[1])
    wanted = tuple(layers) if layers is not None else middle_layers(model)
    rows = slice(prompt_length, prompt_length + response_length)

    def measure(q: Tensor, k: Tensor, seen: Visibility, scale: float, softcap: float | None) -> HeadMaps:
        return head_maps(q, k, seen, scale=scale, softcap=softcap, rows=rows)

    inputs = layout_inputs(model, input_ids, attention_mask, None, extra_inputs)
    with (
        eval_mode(model),
        probe_attention(model, wanted, measure, stop_early=stop_early) as probe,
        suppress(EnoughError),
    ):
        backbone_of(model, whole=bool(extra_inputs))(**inputs)
    parts = [answers[0] for answers in probe.found.values()]
    maps = HeadMaps(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    real = torch.ones_like(maps.reach[:, 0]) if attention_mask is None else attention_mask[:, rows].float()
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


@torch.no_grad()
def head_maps(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    visibility: Visibility,
    *,
    scale: float,
    rows: slice,
    softcap: float | None = None,
) -> HeadMaps:
    """The three numbers of every head: by the fused kernels where they fit, else block by block."""
    batch, heads, queries, _ = query.shape
    first, stop, _ = rows.indices(queries)
    length, share = stop - first, heads // key.shape[1]
    distances, influences, reach = (torch.zeros(batch, heads, length, device=query.device) for _ in range(3))
    lookers = _lookers(length, query.device)
    seen = attention_fused.fused_intervals(query, key, visibility, rows)
    if seen is not None:
        return _fused_maps(attention_fused.prepare(query, key, seen, rows, scale, softcap), lookers)
    offset = key.shape[2] - queries
    for sequence in range(batch):
        for block_rows in row_blocks(first, stop, key.shape[2], share, query.device):
            place = slice(block_rows.start - first, block_rows.stop - first)
            blocks = score_blocks(query[sequence], key[sequence], visibility, sequence, block_rows, scale, softcap)
            for index, block in enumerate(blocks):
                members = slice(index * share, (index + 1) * share)
                probs = torch.softmax(block.scores, dim=-1)
                own = torch.arange(block_rows.start, block_rows.stop, device=query.device) + offset
                keys = torch.arange(probs.shape[-1], device=query.device) + block.first_key
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
