"""Where the assistant's answers are in a conversation that a chat template has rendered."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "answerhere7f3a91"  # stands for the content of a message; no template changes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A tokenizer's chat template with the tools that it is given."""

    tokenizer: Any
    tools: Sequence[Mapping[str, Any]] | None

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """Render messages as text; with `prompt`, up to where the next answer starts."""
        turns = [dict(message) for message in messages]
        text = self.tokenizer.apply_chat_template(
            turns, tools=self.tools or None, tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    def render_or_none(self, messages: Messages, *, prompt: bool = False) -> str | None:
        """Render, or None where the template refuses these messages: many refuse a part of a conversation."""
        try:
            return self.render(messages, prompt=prompt)
        except Exception:  # a template raises what its own code raises
            return None


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as it is, without BOS and EOS."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generation_spans(template: Template, messages: Messages, ids: list[int], answers: int) -> list[Span] | None:
    """Read the places from `{% generation %}` marks; None where the template has none or marks another number."""
    tokenizer = template.tokenizer
    try:
        if not _GENERATION.search(str(tokenizer.get_chat_template(tools=template.tools or None))):
            return None
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=template.tools or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception:  # a slow tokenizer, or marks that cannot be placed: the renderings tell
        return None
    mask = [0, *rendered["assistant_masks"], 0]
    starts = [place for place in range(len(mask) - 1) if mask[place + 1] and not mask[place]]
    stops = [place for place in range(len(mask) - 1) if mask[place] and not mask[place + 1]]
    if list(rendered["input_ids"]) != ids or len(starts) != answers:
        return None
    return list(zip(starts, stops, strict=True))


def answer_spans(
    template: Template, messages: Messages, turns: Sequence[int], final: str, ids: list[int]
) -> list[Span | None]:
    """Find each answer by renderings of parts of the conversation; None for one that is not found.

    Rendering a part may give another text than the same part of the whole: Qwen3's template drops earlier thinking,
    others refuse a part or close the last message differently. So each place is looked up in the whole rendering, and
    counts only if what surrounds it is there as well.
    """
    spans: list[Span | None] = []
    after = 0
    for turn in turns:
        start, stop = _start(template, messages, turn, final), _stop(template, messages, turn, final)
        if start is None or stop is None or start < after:
            spans.append(None)
            continue
        after = max(start, stop)
        first, last = _token_at(template.tokenizer, final, ids, start, False), None
        if first is not None:
            last = _token_at(template.tokenizer, final, ids, max(start, stop), True)
        spans.append(None if first is None or last is None else (first, last))
    return spans


def _start(template: Template, messages: Messages, turn: int, final: str) -> int | None:
    """The character where an answer starts: after the prompt that the template renders for it."""
    prompt = template.render_or_none(messages[:turn], prompt=True)
    if prompt is not None and final.startswith(prompt):
        return len(prompt)
    # The prompt may end with more than the header (an opened thinking block), or earlier turns were rendered otherwise.
    marked = _around(template, messages, turn, {"role": "assistant", "content": _MARK})
    before = template.render_or_none(messages[:turn])
    if prompt is not None and before is not None and final.startswith(before) and prompt.startswith(before):
        shared = _common(final, prompt)
        shared = shared if marked is None else min(shared, _common(final, marked[0]))
        if shared > len(before):
            return shared
    return len(marked[0]) if marked is not None and final.startswith(marked[0]) else None


def _stop(template: Template, messages: Messages, turn: int, final: str) -> int | None:
    """The character where an answer and its end token stop, which is where the next message starts."""
    if turn == len(messages) - 1:
        return len(final)
    part = template.render_or_none(messages[: turn + 1])
    if part is not None and final.startswith(part):
        return len(part)
    marked = {**messages[turn], "content": _MARK}
    whole = _around(template, messages, turn, marked)
    alone = _around(template, messages[: turn + 1], turn, marked)
    if whole is None or alone is None or not final.endswith(whole[1]):
        return None
    closing = _common(alone[1], whole[1])  # the end token, which both renderings write; GLM's template writes none
    return len(final) - len(whole[1]) + closing if closing or not alone[1] else None


def _around(template: Template, messages: Messages, turn: int, message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The rendering before and after the content of a message that stands in for `messages[turn]`."""
    text = template.render_or_none([*messages[:turn], message, *messages[turn + 1 :]])
    if text is None or text.count(_MARK) != 1:
        return None
    before, _, after = text.partition(_MARK)
    return before, after


def _common(a: str, b: str) -> int:
    """How many characters two texts share from the start."""
    length = min(len(a), len(b))
    return next((place for place in range(length) if a[place] != b[place]), length)


def _token_at(tokenizer: Any, text: str, ids: list[int], place: int, end: bool) -> int | None:
    """The token that starts at a character; a token across it belongs to neither side of an answer."""
    if place >= len(text):
        return len(ids)
    head = tokens_of(tokenizer, text[:place])
    if ids[: len(head)] == head:
        return len(head)
    if not getattr(tokenizer, "is_fast", False):
        return None
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = (number for number, (first, last) in enumerate(offsets) if last > place and (end or first >= place))
    return next(inside, len(ids))
