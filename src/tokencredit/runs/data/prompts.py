"""Prompts of a data set: check them row by row, and wrap plain texts as chat messages for an instruct model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from tokencredit.collect.prompts import prompt_ids
from tokencredit.errors import TokenCreditError
from tokencredit.runs.config.run_config import DatasetSettings

PLAIN = "_plain_prompt_"  # name of the old column while the new one is added


class Wrapping(NamedTuple):
    """What happens to the prompts of a data set before training and evaluation, with sentences that say so."""

    wraps: bool
    system_prompt: str | None
    notes: tuple[str, ...] = ()


def check_kinds(dataset: Dataset, what: str = "training") -> None:
    """Refuse a prompt that is neither a text nor a list of messages, by its row."""
    for row, prompt in enumerate(dataset["prompt"]):
        if isinstance(prompt, str):
            if not prompt.strip():
                raise TokenCreditError(f"row {row} of the {what} data has an empty prompt")
            continue
        if not isinstance(prompt, list) or not prompt:
            raise TokenCreditError(
                f"row {row} of the {what} data has the prompt {ascii(prompt)[:80]}; it must be text or messages"
            )
        for message in prompt:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise TokenCreditError(
                    f"row {row} of the {what} data has the message {ascii(message)[:80]}; it needs `role` and "
                    "`content`",
                    hint='a prompt in messages is [{"role": "user", "content": "…"}]',
                )


def choose_wrapping(dataset: Dataset, tokenizer: Any, settings: DatasetSettings) -> Wrapping:
    """Decide whether plain texts become user turns, from `dataset.chat`, `dataset.system_prompt` and the tokenizer."""
    chat, system = settings.chat, settings.system_prompt
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if not isinstance(dataset[0]["prompt"], str):
        if chat is False:
            raise TokenCreditError("`dataset.chat: false` needs plain texts, and the prompts are messages")
        return Wrapping(False, system)
    if chat is True and not has_template:
        raise TokenCreditError(
            "`dataset.chat: true` needs a chat template, and the tokenizer has none", hint="use an instruct model"
        )
    if chat is False or not has_template:
        if system is not None:
            raise TokenCreditError(
                "`dataset.system_prompt` needs chat messages, and the prompts are plain texts",
                hint="use an instruct model without `dataset.chat: false`, or write the text into the prompts",
            )
        return Wrapping(False, None)
    note = (
        "each plain prompt becomes a user turn of the model's chat template (set `dataset.chat: false` for raw text); "
        "reward functions still get plain texts"
    )
    return Wrapping(True, system, (note,))


def wrap(dataset: Dataset, wrapping: Wrapping) -> Dataset:
    """Apply a wrapping to all prompts; a system prompt is added to rows that have no system turn."""
    if not wrapping.wraps and wrapping.system_prompt is None:
        return dataset
    system = [] if wrapping.system_prompt is None else [{"role": "system", "content": wrapping.system_prompt}]
    prompts = []
    for prompt in dataset["prompt"]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompts.append(turns if turns[0]["role"] == "system" else [*system, *turns])
    return dataset.rename_column("prompt", PLAIN).add_column("prompt", prompts).remove_columns(PLAIN)


def check_lengths(
    dataset: Dataset,
    tokenizer: Any,
    model: Any,
    max_response: int,
    chat_template_kwargs: Mapping[str, Any],
    what: str = "training",
) -> None:
    """Refuse prompts that cannot be encoded, are empty, or exceed the model's positions together with a response.

    Messages whose text is far below the limit are not rendered, except for those of the first row.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    room = None if limit is None else limit - max_response
    for row, prompt in enumerate(dataset["prompt"]):
        if row > 0 and isinstance(prompt, list) and (room is None or len(str(prompt).encode()) < room // 2):
            continue
        try:
            length = len(prompt_ids(tokenizer, prompt, chat_template_kwargs=chat_template_kwargs))
        except TokenCreditError as error:
            raise TokenCreditError(f"row {row} of the {what} data: {error.message}", hint=error.hint) from error
        if length == 0:
            raise TokenCreditError(f"row {row} of the {what} data has an empty prompt")
        if room is not None and length > room:
            raise TokenCreditError(
                f"row {row} of the {what} data: a prompt of {length} tokens and a response of {max_response} "
                f"exceed the {limit} positions of the model",
                hint="drop long prompts, or lower trainer.max_completion_length",
            )
