"""From chat messages to token ids with a mask of the answers, the same for signals and for training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.progress import printable
from tokencredit.recipes.pool.answers import Template, answer_spans, generation_spans, tokens_of
from tokencredit.recipes.pool.formats import is_trained

Messages = Sequence[Mapping[str, Any]]
Conversations = Iterable[Mapping[str, Any] | Messages]  # samples of a pool with their tools, or bare messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A sample that could not be encoded: its id, or what stands for it, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """`spans` are the answers as [start, stop) in `ids`; `truncated` says that `ids` were cut at the maximum."""

    ids: list[int]
    spans: list[tuple[int, int]]
    truncated: bool

    @property
    def mask(self) -> np.ndarray:
        mask = np.zeros(len(self.ids), bool)
        for start, stop in self.spans:
            mask[start:stop] = True
        return mask


def encode_all(
    tokenizer: Any, samples: Conversations, max_length: int, unread: list[Unread] | None = None
) -> list[Encoded]:
    """Encode samples of a pool with their tools, or bare messages.

    With `unread`, a sample that cannot be encoded is added to it and has no ids; without, it is an error.
    """
    encoded = []
    for sample in samples:
        parts: Any = sample if isinstance(sample, Mapping) else {"messages": sample}
        name = str(parts.get("id", ""))
        try:
            encoded.append(_encode(tokenizer, parts["messages"], max_length, parts.get("tools")))
        except _Problem as problem:
            if unread is None:
                raise _error(name, problem) from problem
            unread.append(Unread(name=name, reason=str(problem)))
            encoded.append(Encoded(ids=[], spans=[], truncated=False))
    return encoded


def encode(
    tokenizer: Any,
    messages: Messages,
    max_length: int,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    name: str = "",
) -> Encoded:
    """Turn a conversation into ids and find its answers there.

    With a chat template, the ids are those of the whole conversation, and an answer is what the assistant writes after
    the prompt up to the start of the next message, its end token included. The places come from the template's own
    `{% generation %}` marks, else from renderings of parts of the conversation. Without a template (base models, the
    lab's tokenizers) turns are joined as they are and each answer ends with EOS. An answer with `train: false` or
    `weight: 0` is read and not trained.

    Args:
      tokenizer: a Hugging Face tokenizer.
      messages: `{role, content}` with the further keys of the pool.
      max_length: ids beyond it are cut.
      tools: tool descriptions for the template.
      name: the sample's id, for the error message.

    Raises:
      TokenCreditError: the template refuses the conversation, the tokenizer cannot read it, or an answer is not found.
    """
    return encode_all(tokenizer, [{"messages": messages, "tools": tools, "id": name}], max_length)[0]


def _error(name: str, problem: Exception) -> TokenCreditError:
    return TokenCreditError(
        f"{f'sample {name}' if name else 'a conversation'} cannot be encoded: {printable(str(problem))}",
        hint="mend the sample, or pass --skip-bad to leave such samples without signals and count them",
    )


def _encode(tokenizer: Any, messages: Messages, max_length: int, tools: Sequence[Mapping[str, Any]] | None) -> Encoded:
    if tokenizer.chat_template:
        ids, spans = _with_template(tokenizer, messages, tools)
    else:
        ids, spans = _plain(tokenizer, messages, tools)
    cut = [(start, min(stop, max_length)) for start, stop in spans if start < max_length]
    return Encoded(ids=ids[:max_length], spans=cut, truncated=len(ids) > max_length)


class _Problem(Exception):
    """Why a conversation cannot be encoded."""


def _with_template(
    tokenizer: Any, messages: Messages, tools: Sequence[Mapping[str, Any]] | None
) -> tuple[list[int], list[tuple[int, int]]]:
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if turns[:1] == [0]:
        raise _Problem("its first message is the assistant's, so no prompt comes before the answer")
    template = Template(tokenizer=tokenizer, tools=tools)
    final = _call_foreign(template.render, messages)
    ids = _call_foreign(tokens_of, tokenizer, final)
    spans = generation_spans(template, messages, ids, len(turns))
    if spans is None:
        answers = answer_spans(template, messages, turns, final, ids)
        if None in answers:
            raise _Problem(f"answer {answers.index(None) + 1} is not found in what the chat template renders")
        spans = [span for span in answers if span is not None]
    trained = [span for span, turn in zip(spans, turns, strict=True) if is_trained(messages[turn])]
    return ids, [(start, stop) for start, stop in trained if start < stop]


def _call_foreign(call: Any, *arguments: Any) -> Any:
    """Templates run code of their own, tokenizers raise bare exceptions: whatever they raise refuses the sample."""
    try:
        return call(*arguments)
    except Exception as error:
        raise _Problem(" ".join(str(error).split()) or type(error).__name__) from error


def _plain(
    tokenizer: Any, messages: Messages, tools: Sequence[Mapping[str, Any]] | None
) -> tuple[list[int], list[tuple[int, int]]]:
    extra = {key for message in messages for key in ("tool_calls", "reasoning_content", "thinking") if message.get(key)}
    if tools or extra:
        what = ", ".join(sorted(extra | ({"tools"} if tools else set())))
        raise _Problem(f"it has {what}, and the tokenizer has no chat template that could write them")
    ids: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    spans = []
    for message in messages:
        tokens = _call_foreign(tokens_of, tokenizer, message["content"])
        if message["role"] == "assistant":
            tokens = tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]
            if is_trained(message):
                spans.append((len(ids), len(ids) + len(tokens)))
        ids = ids + tokens
    return ids, spans


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids up to where the answer starts."""
    turn = [{"role": "user", "content": prompt}]
    try:
        if not tokenizer.chat_template:
            return _plain(tokenizer, turn, None)[0]
        template = Template(tokenizer=tokenizer, tools=None)
        return list(_call_foreign(tokens_of, tokenizer, _call_foreign(lambda: template.render(turn, prompt=True))))
    except _Problem as problem:
        raise TokenCreditError(
            f"the prompt {prompt[:60]!r} cannot be encoded: {printable(str(problem))}", hint="mend the prompt"
        ) from problem


def bos_of(tokenizer: Any) -> list[int]:
    """The id that begins every text for this tokenizer, as a list of one; empty where no id does.

    With a chat template, the tokenizer must write it by itself: some tokenizers name a BOS token that no text starts
    with.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    if not tokenizer.chat_template:
        return [bos]
    return [bos] if list(tokenizer("a")["input_ids"])[:1] == [bos] else []
