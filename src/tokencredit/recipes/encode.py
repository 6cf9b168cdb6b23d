"""From chat messages to token ids with a mask of the response, the same for signals and for training."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """`spans` are the responses as [start, stop) in `ids`; `truncated` says that `ids` were cut at the maximum."""

    ids: list[int]
    spans: list[tuple[int, int]]
    truncated: bool

    @property
    def mask(self) -> np.ndarray:
        mask = np.zeros(len(self.ids), bool)
        for start, stop in self.spans:
            mask[start:stop] = True
        return mask


def encode(tokenizer: Any, messages: list[dict[str, str]], max_length: int) -> Encoded:
    """Ids of a conversation and its responses.

    With a chat template, a response is what the template adds when the assistant's turn is appended to the prompt.
    Without one (base models, the lab's tokenizers) turns are joined as they are and each response ends with EOS.
    """
    ids, spans = _with_template(tokenizer, messages) if tokenizer.chat_template else _plain(tokenizer, messages)
    cut = [(start, min(stop, max_length)) for start, stop in spans if start < max_length]
    return Encoded(ids=ids[:max_length], spans=cut, truncated=len(ids) > max_length)


def _with_template(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        ids = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=True, return_dict=False)
        spans.append((min(len(prompt), len(ids)), len(ids)))
    return list(ids), spans


def _plain(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
    bos = tokenizer.bos_token_id
    ids: list[int] = [] if bos is None else [bos]
    spans = []
    for message in messages:
        tokens = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        if message["role"] == "assistant":
            tokens = [*tokens, tokenizer.eos_token_id]
            spans.append((len(ids), len(ids) + len(tokens)))
        ids = ids + tokens
    return ids, spans


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids up to where the response starts."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=False))
    return _plain(tokenizer, [{"role": "user", "content": prompt}])[0]
