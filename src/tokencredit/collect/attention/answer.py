"""How much the answer of a response attends to the tokens before it."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokencredit.batch.masked import positions, response_lengths
from tokencredit.collect.attention.entropies import attention_layers, probed_pass
from tokencredit.collect.attention.parts import AttentionRows
from tokencredit.collect.attention.rows import row_blocks, score_blocks
from tokencredit.collect.rollout import Sequences, takes


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


@takes(Sequences, after=1)
@torch.no_grad()
def answer_importances(
    model: nn.Module, sequences: Sequences, *, answer: Bool[Tensor, "batch response"], layer: int | None = None
) -> Float[Tensor, "batch response"]:
    """Mean attention that the answer pays to each response token before it; 0 on the answer, for `answer_attention`.

        m_t = (1/|answer|) Σ_{s ∈ answer} ā_{s,t},    ā the head-averaged row of token s at `layer` (None: the last one)

    Positive on every other token. Rows are the tokens' own; one pass in eval mode.
    """
    chosen = max(attention_layers(model)) if layer is None else layer
    rows = sequences.response_columns
    received = probed_pass(model, sequences, [chosen], lambda seen: _received(replace(seen, rows=rows), answer))[0]
    return torch.where(answer, 0.0, received.clamp_min(torch.finfo(received.dtype).tiny))


def _received(attention: AttentionRows, answer: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """Mean over the answer's rows of the head-averaged attention on the response's keys."""
    device, (first, _) = attention.query.device, attention.span
    received = torch.zeros(answer.shape, device=device)
    for sequence, rows in row_blocks(attention):
        weights = answer[sequence, rows.start - first : rows.stop - first].float()
        if not bool(weights.any()):
            continue
        for block in score_blocks(attention, sequence, rows):
            probs = torch.softmax(block.scores, dim=-1).sum(0)
            keys = torch.arange(probs.shape[1], device=device) + block.first_key - first - attention.offset
            inside = (keys >= 0) & (keys < answer.shape[1])
            received[sequence].index_add_(0, keys[inside], (weights @ probs)[inside])
    count = answer.sum(1, keepdim=True).clamp_min(1) * attention.query.shape[1]
    return received / count
