"""Turn a prompt into the token ids that TRL trains on."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.errors import TokenCreditError

Prompt = str | Sequence[Mapping[str, Any]]


def prompt_ids(
    tokenizer: Any,
    prompt: Prompt,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Any = None,
    chat_template: str | None = None,
    generate: bool = True,
) -> list[int]:
    """Encode a prompt as TRL's GRPO trainer does, token for token.

    A text is tokenized as it is. Messages go through the chat template in one step: text that was rendered first and
    tokenized afterwards would start with a second BOS wherever the template writes one of its own.

    Args:
      tokenizer: of the model that is trained.
      prompt: a text, or a list of messages with `role` and `content`.
      chat_template_kwargs: arguments of the chat template, such as `enable_thinking`.
      tools: the tools that the template shows.
      chat_template: another template than the tokenizer's.
      generate: whether the template adds the start of the answer.

    Raises:
      TokenCreditError: the tokenizer has no token for a character, or the template refuses the messages.
    """
    if isinstance(prompt, str):
        try:
            return list(tokenizer(prompt)["input_ids"])
        except Exception as error:  # tokenizers raise plain exceptions, also for a character without a token
            raise TokenCreditError(_encoding_reason(tokenizer, prompt, error)) from error
    if tokenizer.chat_template is None and chat_template is None:
        raise TokenCreditError(
            "the prompts are messages, and the tokenizer has no chat template",
            hint="use an instruct model, or a data set of plain texts",
        )
    options: dict[str, Any] = {"tools": tools or None, "chat_template": chat_template}
    options |= dict(chat_template_kwargs or {})
    options = {name: value for name, value in options.items() if value is not None}
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in prompt],
            add_generation_prompt=generate,
            tokenize=True,
            return_dict=True,
            **options,
        )["input_ids"]
    except Exception as error:  # jinja's errors, and those of the tokenizer
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TokenCreditError(f"the chat template refuses a prompt: {reason}") from error
    return list(ids)


def _encoding_reason(tokenizer: Any, prompt: str, error: Exception) -> str:
    for character in dict.fromkeys(prompt):
        try:
            tokenizer(character)
        except Exception:
            return f"the tokenizer has no token for the character {character!r} (U+{ord(character):04X})"
    return f"the tokenizer cannot encode the prompt {prompt[:60]!r}: {' '.join(str(error).split())[:200]}"
