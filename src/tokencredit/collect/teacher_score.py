"""Scoring sampled tokens under a local model: rows in small passes, the vocabulary in tiles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.masked import positions, response_lengths


def score_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    response_ids: Int[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> Float[Tensor, "batch response"]:
    """ln π of the chosen tokens, float32, 0 elsewhere; ⌈rows / batch_size⌉ forwards of rows of like length.

    Unchosen tokens before the last chosen one are read as context; what follows it is padding. Every call runs the same
    number of forwards whatever the data says, so that sharded models do not hang.
    """
    target = torch.device(device) if device is not None else response_ids.device
    widths = used_widths(response_mask)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + widths[row])
    result = torch.zeros(response_ids.shape, dtype=torch.float32, device=response_ids.device)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(1, *(widths[row] for row in rows)) if rows else 1
        ids, attention, longest = _packed([prompts[row] for row in rows], response_ids[rows], widths, rows, width)
        with torch.no_grad():
            found, _ = token_logprobs(model, ids.to(target), attention.to(target), longest, width, temperature)
        result[rows, : found.shape[1]] = found.to(result.device, torch.float32)[:, : result.shape[1]]
    return torch.where(response_mask, result, 0.0)


def used_widths(response_mask: Bool[Tensor, "batch response"]) -> list[int]:
    """For each row the number of columns up to its last chosen token."""
    last = response_mask & (positions(response_mask) == response_lengths(response_mask) - 1)
    columns = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return torch.where(last, columns, 0).sum(1).tolist()


def _packed(
    prompts: Sequence[Sequence[int]], responses: Tensor, widths: list[int], rows: list[int], width: int
) -> tuple[Tensor, Tensor, int]:
    """Prompts padded on the left, responses on the right, as the student's own pass has them."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(rows), longest + width, dtype=torch.long)
    attention = torch.zeros_like(ids)
    responses = responses.cpu()
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        used = widths[row]
        ids[place, longest - len(prompt) : longest] = torch.tensor(list(prompt), dtype=torch.long)
        ids[place, longest : longest + used] = responses[place, :used]
        attention[place, longest - len(prompt) : longest + used] = 1
    return ids, attention, longest


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout inside; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def token_logprobs(
    model: Any,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    prompt_length: int,
    response_length: int,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "batch response"], None]:
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    hidden = inner.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    hidden = hidden[:, prompt_length - 1 : prompt_length - 1 + response_length].reshape(-1, hidden.shape[-1])
    targets = input_ids[:, prompt_length : prompt_length + response_length].reshape(-1)
    found = []
    for start in range(0, len(targets), 64):
        logits = inner.get_output_embeddings()(hidden[start : start + 64]).float() / temperature
        found.append(logits.gather(1, targets[start : start + 64, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(found).view(input_ids.shape[0], -1), None
