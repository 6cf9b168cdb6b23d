"""How much the answer of a response attends to the tokens before it."""

import warnings
from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.batch.masked import positions, response_lengths
from tokencredit.collect.attention.entropies import EnoughError, attention_layers, probe_attention
from tokencredit.collect.attention.parts import Visibility
from tokencredit.collect.attention.rows import row_blocks, score_blocks
from tokencredit.collect.logprobs import ExtraInputs, layout_inputs
from tokencredit.collect.models import backbone_of, check_span, eval_mode


def answer_mask(
    mask: Bool[Tensor, "batch response"], texts: Sequence[Sequence[str]] | None, after: str | None, tail: int
) -> Bool[Tensor, "batch response"]:
    """True on the answer of each response: its last `tail` tokens, at most half of them and at least one.

    With `after`, the answer is what follows the last occurrence of this text, and the last `tail` tokens only where it
    does not occur or nothing follows; `texts` are the pieces of text of the chosen tokens of each row, as
    `collect.token_texts.batch_token_texts` gives them. Tokens decoded one by one lose spaces and characters, and the
    text is then not found. A warning is given where it occurs in no response.
    """
    n = response_lengths(mask)
    start = n - torch.minimum(torch.full_like(n, tail), (n // 2).clamp_min(1))
    seen = 0
    for row, tokens in enumerate(texts or []):
        found = "".join(tokens).rfind(after or "")
        if found < 0:
            continue
        seen += 1
        stop, covered, place = found + len(after or ""), 0, 0
        # A token that reaches beyond the text is of the answer; so are the first bytes of a character behind it.
        while place < len(tokens) and covered < stop and covered + len(tokens[place]) <= stop:
            covered += len(tokens[place])
            place += 1
        if place < len(tokens):
            start[row] = place
    if texts and not seen:
        warnings.warn(
            f"none of {len(texts)} responses contains {after!r}: the answer is taken to be the last tokens",
            stacklevel=2,
        )
    return mask & (positions(mask) >= start)


@torch.no_grad()
def answer_importances(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    *,
    answer: Bool[Tensor, "batch response"],
    layer: int | None = None,
    extra_inputs: ExtraInputs | None = None,
) -> Float[Tensor, "batch response"]:
    """Mean attention that the answer pays to each response token before it; 0 on the answer, for `answer_attention`.

        m_t = (1/|answer|) Σ_{s ∈ answer} ā_{s,t},    ā the head-averaged row of token s at `layer` (None: the last one)

    Positive on every other token. Rows are the tokens' own; one pass in eval mode.
    """
    check_span(prompt_length, response_length, input_ids.shape[1])
    chosen = max(attention_layers(model)) if layer is None else layer
    rows = slice(prompt_length, prompt_length + response_length)

    def measure(q: Tensor, k: Tensor, seen: Visibility, scale: float, softcap: float | None) -> Tensor:
        return _received(q, k, seen, scale, softcap, rows, answer)

    inputs = layout_inputs(model, input_ids, attention_mask, None, extra_inputs)
    with (
        eval_mode(model),
        probe_attention(model, [chosen], measure, stop_early=True) as probe,
        suppress(EnoughError),
    ):
        backbone_of(model, whole=bool(extra_inputs))(**inputs)
    received = probe.found[chosen][0]
    return torch.where(answer, 0.0, received.clamp_min(torch.finfo(received.dtype).tiny))


def _received(
    query: Tensor,
    key: Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float | None,
    rows: slice,
    answer: Bool[Tensor, "batch response"],
) -> Float[Tensor, "batch response"]:
    """Mean over the answer's rows of the head-averaged attention on the response's keys."""
    first, stop, _ = rows.indices(query.shape[2])
    offset = key.shape[2] - query.shape[2]
    found = torch.zeros(answer.shape, device=query.device)
    for sequence in range(query.shape[0]):
        for block_rows in row_blocks(first, stop, key.shape[2], query.shape[1] // key.shape[1]):
            wanted = answer[sequence, block_rows.start - first : block_rows.stop - first].float()
            if not bool(wanted.any()):
                continue
            for block in score_blocks(query[sequence], key[sequence], visibility, sequence, block_rows, scale, softcap):
                attention = torch.softmax(block.scores, dim=-1).sum(0)
                keys = torch.arange(attention.shape[1], device=query.device) + block.first_key - first - offset
                inside = (keys >= 0) & (keys < answer.shape[1])
                found[sequence].index_add_(0, keys[inside], (wanted @ attention)[inside])
    count = answer.sum(1, keepdim=True).clamp_min(1) * query.shape[1]
    return found / count
