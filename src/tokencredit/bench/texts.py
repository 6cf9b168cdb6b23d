"""Prompts and accepted responses of a task as the token ids that the model sees."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.collect.exact.spellings import Accepted, encode_accepted
from tokencredit.errors import TokenCreditError


def encode_prompt(tokenizer: Any, prompt: Any, chat: bool | str) -> list[int]:
    """Encode one prompt as training does.

    Args:
      tokenizer: a Hugging Face tokenizer.
      prompt: a text, or a list of chat messages. Messages go through the tokenizer's chat template with the start of
        the answer appended.
      chat: whether a text becomes a user turn of the chat template. "auto": where the tokenizer has a template and the
        text holds none of its special tokens, so that a text with the template applied stays as it is.

    Returns:
      Token ids with at most one BOS at the start, whoever wrote it: the tokenizer, the template or the text.

    Raises:
      TokenCreditError: the prompt is neither, is empty, cannot be encoded, or needs a chat template that is missing.
    """
    is_text = isinstance(prompt, str)
    if not is_text and not _are_messages(prompt):
        raise TokenCreditError(
            f"a problem's `prompt` is a text or a list of messages with role and content, got {prompt!r}"
        )
    wraps = chat is True or (chat == "auto" and _has_template(tokenizer) and not _is_rendered(tokenizer, prompt))
    if not is_text or wraps:
        ids = _apply_template(tokenizer, [{"role": "user", "content": prompt}] if is_text else list(prompt))
    else:
        ids = encode_text(tokenizer, prompt)
    if not ids:
        raise TokenCreditError(f"the prompt {prompt!r} has no tokens", hint="a prompt needs at least one token")
    return ids


def encode_listed(tokenizer: Any, responses: Sequence[Any], limit: int | None = None) -> Accepted:
    """Encode accepted responses as `encode_accepted` does: texts in all their spellings, token ids as they are.

    Args:
      tokenizer: a Hugging Face tokenizer.
      responses: texts without EOS, or lists of token ids with or without it.
      limit: the most tokens of a response, EOS included.

    Raises:
      TokenCreditError: a response is neither, is listed twice, or cannot be encoded.
    """
    for response in responses:
        is_ids = isinstance(response, Sequence) and all(_is_id(item, len(tokenizer)) for item in response)
        if not (isinstance(response, str) or is_ids):
            raise TokenCreditError(
                f"an accepted response is a text or a list of token ids below {len(tokenizer)}, got {response!r}"
            )
    try:
        return encode_accepted(tokenizer, responses, max_tokens=limit)
    except TokenCreditError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`
        raise TokenCreditError(f"an accepted response cannot be encoded: {_one_line(error)}") from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode a text with the special tokens that the tokenizer adds, with at most one BOS."""
    try:
        ids = list(tokenizer(text)["input_ids"])
    except Exception as error:  # the tokenizers library raises plain `Exception`
        raise TokenCreditError(f"the prompt {text!r} cannot be encoded: {_one_line(error)}") from error
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _apply_template(tokenizer: Any, messages: list[Mapping[str, Any]]) -> list[int]:
    if not _has_template(tokenizer):
        raise TokenCreditError(
            "the tokenizer has no chat template", hint="set `chat: false` and give prompts as texts, or set a template"
        )
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # templates are programs of the model's author
        raise TokenCreditError(f"the chat template refuses the prompt {messages!r}: {_one_line(error)}") from error
    return list(encoded["input_ids"])


def _has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _is_rendered(tokenizer: Any, prompt: str) -> bool:
    """Whether a text holds special tokens already, as one does that the template was applied to."""
    return any(token and token in prompt for token in tokenizer.all_special_tokens)


def _are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt)
    )


def _is_id(item: Any, vocabulary: int) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocabulary


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
