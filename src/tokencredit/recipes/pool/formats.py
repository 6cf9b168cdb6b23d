"""One raw record as a sample of the pool: messages, ShareGPT, Alpaca or a pair. What cannot be kept is refused."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
# Names of the fields of a prompt–response pair, in the order in which they are looked for.
PAIRS = (
    *(("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output")),
    *(("prompt", "answer"), ("question", "response"), ("instruction", "response")),
)
# Keys of a message that templates read or that say what is trained. They are kept, and written back by the export.
MEANT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
WEIGHTS = ("weight", "train", "training")
# What a pool of text cannot hold; a record that has one of them would lose it.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
DEPTH = 100  # levels of a record; what is nested deeper could be written and not read again


class Refusal(Exception):
    """One record cannot become a sample; the text is the reason."""


def to_sample(record: Any, default_source: str) -> dict[str, Any]:
    """Turn a record into `{source, messages, meta}`, and `tools` where it has them.

    A message is `{role, content}` with the keys of `MEANT` and `WEIGHTS` that it has. Other fields of the record, and
    of its messages, go into `meta`.

    Raises:
      Refusal: the record has no answer, holds images, or has a field that changes the text and cannot be kept.
    """
    if isinstance(record, Refusal):
        raise record
    if not isinstance(record, dict):
        raise Refusal(f"expected an object, got {type(record).__name__}")
    if not all(isinstance(key, str) for key in record):
        raise Refusal("the names of fields must be texts")
    if _too_deep(record):
        raise Refusal(f"nested deeper than {DEPTH} levels")
    _refuse_media(record, "")
    messages, used = _messages_of(record)
    _check_answers(messages)
    tools, names = _tools_of(record)
    source = record.get("source") or record.get("dataset") or default_source
    meta = record.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    skipped = used | names | {"source", "dataset"} | ({"meta"} if isinstance(record.get("meta"), dict) else set())
    rest = {key: value for key, value in record.items() if key not in skipped and value is not None}
    left = [message.pop("", {}) for message in messages]
    if any(left):
        rest["turns"] = left
    sample = {"source": _source(source), "messages": messages, "meta": {**rest, **meta}}
    return sample | ({"tools": tools} if tools else {})


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether an answer is trained: not where it says `train: false` or `weight: 0`."""
    return not any(message.get(key) is not None and not message[key] for key in WEIGHTS)


def text_of(message: Mapping[str, Any]) -> str:
    """All text of a message: its thinking, its content and its tool calls."""
    thinking = [message[key] for key in ("reasoning_content", "thinking") if isinstance(message.get(key), str)]
    calls = [json.dumps(message["tool_calls"], ensure_ascii=False)] if message.get("tool_calls") else []
    return "\n".join(part for part in [*thinking, message["content"], *calls] if part)


def meaning_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a message another one than its role and content say; empty for a plain message."""
    kept = {key: message[key] for key in MEANT if message.get(key) is not None}
    return kept if is_trained(message) else kept | {"train": False}


def _too_deep(record: Any) -> bool:
    level, depth = [record], 0
    while level:
        if depth > DEPTH:
            return True
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        level, depth = [value for value in inner if isinstance(value, dict | list)], depth + 1
    return False


def _refuse_media(fields: Mapping[str, Any], where: str) -> None:
    for key in MEDIA:
        if fields.get(key):
            raise Refusal(f"{where}`{key}` cannot be kept: a pool holds text only")


def _source(source: Any) -> str:
    text = str(source)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refusal(f"the source {text!r} is not valid Unicode")
    return text


def _check_answers(messages: Sequence[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Refusal("no assistant turn")
    if not all(message["content"].strip() or message.get("tool_calls") for message in answers):
        raise Refusal("empty response")
    if not any(is_trained(message) for message in answers):
        raise Refusal("no answer to train on: each has weight 0 or train false")


def _messages_of(record: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The conversation of a record and the fields that it came from."""
    talks = [key for key in ("messages", "conversations") if isinstance(record.get(key), list)]
    if len(talks) == 2 and record[talks[0]] and record[talks[1]]:
        raise Refusal("both `messages` and `conversations`: which one is meant?")
    if talks:
        key = next((key for key in talks if record[key]), talks[0])
        if record.get("history"):
            raise Refusal(f"`history` beside `{key}`: where it belongs in the conversation is not known")
        return _with_system(record, [_message(turn) for turn in record[key]], {*talks, "history"})
    for prompt, response in PAIRS:
        if record.get(prompt) is not None and record.get(response) is not None:
            return _with_system(record, *_pair(record, prompt, response))
    raise Refusal(f"no messages and no prompt–response pair among the fields {', '.join(sorted(record)) or '(none)'}")


def _pair(record: dict[str, Any], prompt: str, response: str) -> tuple[list[Message], set[str]]:
    used = {prompt, response, "history"}
    asked = _turns(record[prompt], "user")
    if prompt == "instruction":
        used.add("input")
        if extra := _text(record.get("input") or ""):
            asked[-1]["content"] += f"\n\n{extra}"
    for message in asked:
        if message["role"] == "assistant":  # part of the prompt, so read and not trained
            message["train"] = False
    answer = _turns(record[response], "assistant")
    if isinstance(record[response], str):
        for key in ("reasoning_content", "thinking", "tool_calls"):
            if record.get(key):
                answer[0][key] = record[key]
                used.add(key)
    return [*_rounds(record.get("history")), *asked, *answer], used


def _turns(value: Any, role: str) -> list[Message]:
    """A text as one message, or messages as they are (TRL's conversational prompt and completion)."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return [_message(turn) for turn in value]
    return [{"role": role, "content": _text(value)}]


def _rounds(history: Any) -> list[Message]:
    """Alpaca's `history`: earlier rounds as pairs of prompt and answer."""
    if not history:
        return []
    if not isinstance(history, list):
        raise Refusal(f"`history` must be a list of [prompt, answer], got {type(history).__name__}")
    messages: list[Message] = []
    for item in history:
        if isinstance(item, dict):
            messages.append(_message(item))
        elif isinstance(item, list) and len(item) == 2:
            messages += [{"role": "user", "content": _text(item[0])}, {"role": "assistant", "content": _text(item[1])}]
        else:
            raise Refusal(f"`history` must be a list of [prompt, answer], got {str(item)[:60]!r} in it")
    return messages


def _with_system(record: dict[str, Any], messages: list[Message], used: set[str]) -> tuple[list[Message], set[str]]:
    """Put a system prompt that is a field of the record before its messages."""
    fields = [key for key in ("system", "system_prompt") if record.get(key)]
    texts = {_text(record[key]) for key in fields}
    first = next((message["content"] for message in messages if message["role"] == "system"), None)
    if len(texts) > 1 or (first is not None and texts - {first}):
        raise Refusal(f"`{fields[0]}` and another system prompt: which one is meant?")
    if texts and first is None:
        messages = [{"role": "system", "content": texts.pop()}, *messages]
    return messages, used | {"system", "system_prompt"}


def _tools_of(record: Mapping[str, Any]) -> tuple[list[Any], set[str]]:
    """The tool descriptions of a record, a list or the JSON text of one."""
    names = {"tools", "functions"}
    fields = [key for key in ("tools", "functions") if record.get(key)]
    if not fields:
        return [], names
    tools = record[fields[0]]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise Refusal(f"`{fields[0]}` is a text that is not JSON") from None
    if len(fields) > 1 or not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refusal(f"`{fields[0]}` must be one list of tool descriptions")
    return tools, names


def _message(turn: Any) -> Message:
    """A message in our keys; what the pool gives no meaning to is under the key "" until the sample is complete."""
    if not isinstance(turn, dict):
        raise Refusal(f"a message must be an object, got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"unknown role {role!r}; known: {', '.join(sorted(ROLES))}")
    _refuse_media(turn, "a message's ")
    if turn.get("function_call"):
        raise Refusal("a message's `function_call` cannot be kept; write it as `tool_calls`")
    content = turn.get("content", turn.get("value"))
    kept = {key: turn[key] for key in (*MEANT, *WEIGHTS) if turn.get(key) is not None}
    _check_kept(kept)
    message = {"role": ROLES[role], "content": "" if content is None and kept.get("tool_calls") else _text(content)}
    known = {"role", "from", "content", "value", *MEANT, *WEIGHTS, "function_call", *MEDIA}
    rest = {key: value for key, value in turn.items() if key not in known and value is not None}
    return message | kept | ({"": rest} if rest else {})


def _check_kept(kept: Mapping[str, Any]) -> None:
    for key in ("reasoning_content", "thinking", "name", "tool_call_id"):
        if not isinstance(kept.get(key, ""), str):
            raise Refusal(f"a message's `{key}` must be a text, got {type(kept[key]).__name__}")
    if not isinstance(kept.get("tool_calls", []), list):
        raise Refusal(f"a message's `tool_calls` must be a list, got {type(kept['tool_calls']).__name__}")
    for key in WEIGHTS:
        if kept.get(key, 1) not in (0, 1):
            raise Refusal(
                f"a message's `{key}` must be 0 or 1, got {str(kept[key])[:40]!r}: no other weight can be kept"
            )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Refusal(f"expected text, got a part of type {kind!r}: a pool holds text only")
        return "".join(part["text"] for part in content)
    raise Refusal(f"expected text, got {type(content).__name__}")
