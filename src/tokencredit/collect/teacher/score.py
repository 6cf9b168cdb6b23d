"""Scoring sampled tokens under a local model: rows in small passes, the vocabulary in tiles."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import positions, response_lengths
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.collect.rollout import Sequences

Scores = tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]


def score_rows(*asked: Any, **options: Any) -> Float[Tensor, "batch response"]:
    """ln π of the chosen tokens, float32, 0 elsewhere: the first half of `score_entropies`, which it is called like."""
    return score_entropies(*asked, **options)[0]


def score_entropies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    response_ids: Int[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> Scores:
    """ln π of the chosen tokens and H(π) in front of them, nats; ⌈rows / batch_size⌉ forwards of rows of like length.

    float32, 0 outside the mask. The pass that gives one gives the other.

    Unchosen tokens before the last chosen one are read as context; what follows it is padding. Every call runs the same
    number of forwards whatever the data says, so that sharded models do not hang.
    """
    target = torch.device(device) if device is not None else response_ids.device
    widths = used_widths(response_mask)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + widths[row])
    result = torch.zeros(2, *response_ids.shape, dtype=torch.float32, device=response_ids.device)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        few = packed_rows([prompts[row] for row in rows], response_ids[rows], [widths[row] for row in rows], target)
        found = torch.stack(token_logprobs(model, few, temperature)).to(result.device, torch.float32)
        result[:, rows, : found.shape[2]] = found[:, :, : result.shape[2]]
    logprobs, entropies = torch.where(response_mask, result, 0.0)
    return logprobs, entropies


def used_widths(response_mask: Bool[Tensor, "batch response"]) -> list[int]:
    """For each row the number of columns up to its last chosen token."""
    last = response_mask & (positions(response_mask) == response_lengths(response_mask) - 1)
    columns = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return torch.where(last, columns, 0).sum(1).tolist()


def packed_rows(
    prompts: Sequence[Sequence[int]], responses: Tensor, widths: Sequence[int], device: torch.device
) -> Sequences:
    """Prompts padded on the left, responses cut to the longest of `widths`, as hosts have them."""
    longest, width = max(len(prompt) for prompt in prompts), max(1, *widths)
    ids = torch.zeros(len(prompts), longest + width, dtype=torch.long)
    attention = torch.zeros_like(ids)
    responses = responses.cpu()
    for place, (prompt, used) in enumerate(zip(prompts, widths, strict=True)):
        ids[place, longest - len(prompt) : longest] = torch.tensor(list(prompt), dtype=torch.long)
        ids[place, longest : longest + used] = responses[place, :used]
        attention[place, longest - len(prompt) : longest + used] = 1
    return Sequences(ids.to(device), attention.to(device), longest, width)
