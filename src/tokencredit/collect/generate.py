"""Sampling from a Hugging Face model: the plain softmax, whatever generation settings ship with the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokencredit.collect.models import eval_mode


@torch.no_grad()
def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    samples: int = 1,
    temperature: float = 1.0,
    pad: int | None = None,
) -> list[list[int]]:
    """Sample responses to prompts of token ids in one batch, up to and with the first end token.

    Eval mode inside. Nothing filters or penalises tokens: of the model's shipped generation config nothing is read.
    Random numbers come from torch's global generators.

    Args:
      ends: ids that end a response.
      samples: responses per prompt; they are neighbours in the result.
      temperature: 0 takes the most probable token.
      pad: the id before short prompts; None: the first end.
    """
    from transformers import GenerationConfig

    pad = ends[0] if pad is None else pad
    ids, mask = pad_left(prompts, model.device, pad)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        eos_token_id=list(ends),
        pad_token_id=pad,
        bos_token_id=pad,
        **sampling,
    )
    with eval_mode(model), _instead_of_shipped(model, plain):
        whole = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=plain)
    return [until_end(row, ends) for row in whole[:, ids.shape[1] :].tolist()]


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids up to and with the first end."""
    first = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if first is None else ids[: first + 1]


def pad_left(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", pad: int = 0
) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Rows of token ids as one tensor, padded on the left, and where it holds tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


@contextmanager
def _instead_of_shipped(model: Any, config: Any) -> Iterator[None]:
    """Replace the model's generation config: `generate` fills in from it whatever a request leaves out."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    shipped = getattr(inner, "generation_config", None)
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = shipped
