"""Tokens and prompts as text, for display in records."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from tokencredit.collect.token_texts import batch_token_texts


def column_texts(
    tokenizer: Any, ids: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> list[list[str]]:
    """The text that each token adds to its response; padding is decoded apart, so that it adds nothing."""
    used = [int(seen.nonzero()[-1]) + 1 if bool(seen.any()) else 0 for seen in mask.cpu()]
    pieces = [row[:stop] for row, stop in zip(ids.tolist(), used, strict=True)]
    pieces += [row[stop:] for row, stop in zip(ids.tolist(), used, strict=True)]
    texts = batch_token_texts(tokenizer, pieces) if ids.numel() else pieces
    return [[*chosen, *rest] for chosen, rest in zip(texts[: len(ids)], texts[len(ids) :], strict=True)]


def prompt_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Prompts without padding as the model sees them, special tokens included."""
    return [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


def without_padding(row: Sequence[int], pad: int | None) -> list[int]:
    """A prompt from its first token that is not padding on the left."""
    start = next((place for place, token in enumerate(row) if token != pad), len(row))
    return list(row[start:])
