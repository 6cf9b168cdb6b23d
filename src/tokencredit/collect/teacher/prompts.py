"""Privileged prompts: what a teacher may see and the student may not, rendered to token ids."""

import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from torch import Tensor

from tokencredit.collect.prompts import prompt_ids
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.seeds import derive

KNOWN = (
    "The final answer is known to be {answer}. "
    "Do not lean on it: derive the result step by step and end with \\boxed{{}}."
)
TEMPLATES: dict[str, str] = {
    "answer": KNOWN,
    "trace": (
        "A worked solution, for your orientation only:\n{trace}\n"
        "Now solve the problem yourself, step by step, ending with \\boxed{{}}."
    ),
    "sibling": (
        "Another attempt at this problem was checked and is right:\n{attempt}\n"
        "Solve it again in your own way, ending with \\boxed{{}}."
    ),
    "hint": "A hint: {hint}",
    "feedback": "A previous attempt failed the check with:\n{feedback}",
    # Controls: the wording without the knowledge, and the knowledge of another problem.
    "neutral": "The final answer is not available. Derive the result step by step and end with \\boxed{{}}.",
    "decoy": KNOWN,
}
DECOYS = 1000  # answers that are remembered
RENDERED_AT_START = 8  # rows that `check` renders to ids; fields are checked in more
CHECKED, STREAMED = 10_000, 256  # rows of the training data that are looked at before it starts
Row = Mapping[str, Any]


def first_rows(rows: Iterable[Row]) -> Sequence[Row]:
    """The rows that checks before training look at: a stream may have no end, and a long set would take minutes."""
    return list(islice(rows, CHECKED if hasattr(rows, "__len__") else STREAMED))


class PromptRenderer:
    """Turns a row of the data into the token ids of the teacher's prompt.

    A chat prompt gets the privileged text at the end of its last user turn; a plain text gets it in front, followed by
    an empty line, so that both prompts end alike. A `template` with `{prompt}` in it is the whole plain prompt.
    Fields in braces are columns of the row, or what `columns` maps them to.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        name = given["template"]
        self.decoy = name == "decoy"
        self.text: str | None = None if name is None else _template(name)
        self.columns: Mapping[str, str] = given["columns"]
        self.chat_template_kwargs: Mapping[str, Any] = given["chat_template_kwargs"]
        self.max_length: int | None = given["max_length"]
        self.fields = () if self.text is None else _fields(self.text)
        extra = sorted(set(self.columns) - set(self.fields))
        if extra:
            raise unknown("field in `columns` of the teacher", extra[0], self.fields)
        self._answers: set[str] = set()  # of the training data, for decoys

    @property
    def needs_attempts(self) -> bool:
        return "attempt" in self.fields and "attempt" not in self.columns

    def check(self, rows: Iterable[Row], tokenizer: Any) -> None:
        """Refuse a row without what the template shows, and a prompt that ends otherwise than the student's.

        Looks at the first `CHECKED` rows, of a stream at the first `STREAMED`; later rows are looked at when they come.
        """
        if self.text is None:
            return
        sample: list[Row] = []
        for number, row in enumerate(first_rows(rows)):
            if not self.needs_attempts:
                values = {field: self._value(row, field, number) for field in self._own_fields}
                if self.decoy and len(self._answers) < DECOYS:
                    self._answers.add(values["answer"])
            if number < RENDERED_AT_START:
                sample.append({**row, "attempt": _stand_in(row)} if self.needs_attempts else row)
        for number, row in enumerate(sample):
            student = render(row["prompt"], tokenizer, self.chat_template_kwargs)
            self._check_ending(student, self._ids(row, tokenizer, number, sample), row, tokenizer)

    def prompts(self, rows: Sequence[Row], prompt_ids: list[list[int]], tokenizer: Any) -> list[list[int]]:
        """The teacher's prompts; without a template, or for a row without an attempt, the student's own ids."""
        if self.text is None:
            return prompt_ids
        found = []
        for number, (row, own) in enumerate(zip(rows, prompt_ids, strict=True)):
            if self.needs_attempts and row.get("attempt") is None:
                found.append(own)
                continue
            _same_prompt(own, render(row["prompt"], tokenizer, self.chat_template_kwargs), tokenizer)
            found.append(self._ids(row, tokenizer, number, rows))
        return found

    @property
    def _own_fields(self) -> tuple[str, ...]:
        return tuple(field for field in self.fields if field != "prompt")

    def _ids(self, row: Row, tokenizer: Any, number: int, rows: Sequence[Row]) -> list[int]:
        assert self.text is not None
        values = {field: self._value(row, field, number) for field in self._own_fields}
        if self.decoy:
            values["answer"] = self._other_answer(row, values["answer"], rows)
        prompt, whole = row["prompt"], "prompt" in self.fields
        if isinstance(prompt, str):
            text = self.text.format(**values, prompt=prompt) if whole else f"{self.text.format(**values)}\n\n{prompt}"
            return render(text, tokenizer, self.chat_template_kwargs)
        if whole:
            raise TokenCreditError(
                "a teacher's template with {prompt} is for plain prompts, and this one is a conversation",
                hint="leave {prompt} out: the text goes to the end of the last user turn",
            )
        return render(_with_privilege(prompt, self.text.format(**values)), tokenizer, self.chat_template_kwargs)

    def _value(self, row: Row, field: str, number: int) -> str:
        column = self.columns.get(field, field)
        value = row.get(column)
        if value is None or not str(value).strip():
            have = ", ".join(sorted(row)) or "(none)"
            raise TokenCreditError(
                f"row {number} has no `{column}` for the teacher's prompt, got {value!r}; its columns: {have}",
                hint=f"map the field to a column: `columns: {{{field}: …}}`",
            )
        return str(value)

    def _other_answer(self, row: Row, own: str, rows: Sequence[Row]) -> str:
        """The answer of another problem, the same at every visit."""
        column = self.columns.get("answer", "answer")
        pool = sorted((self._answers or {str(other.get(column)) for other in rows}) - {own})
        if not pool:
            raise TokenCreditError(
                f"the decoy needs another answer than {own!r}, and there is none among the training rows",
                hint="use `template: neutral`, or data with more than one answer",
            )
        return pool[derive("decoy", str(row["prompt"])) % len(pool)]

    def _check_ending(self, student: list[int], teacher: list[int], row: Row, tokenizer: Any) -> None:
        suffix = 1 if isinstance(row["prompt"], str) else _generation_suffix(row["prompt"], tokenizer, self)
        if student[-suffix:] != teacher[-suffix:]:
            raise TokenCreditError(
                f"the teacher's prompt must end like the student's: student {tokenizer.decode(student[-suffix:])!r}, "
                f"teacher {tokenizer.decode(teacher[-suffix:])!r}",
                hint="end a plain template with `{prompt}`, and use the same `chat_template_kwargs` for both",
            )


def check_fits(prompts: list[list[int]], lengths: list[int], limit: int | None) -> None:
    """A prompt that does not fit is an error with its row, not a truncation."""
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if limit is not None and len(prompt) + length > limit:
            raise TokenCreditError(
                f"row {number} needs {len(prompt)} prompt and {length} response tokens, the teacher takes {limit}",
                hint="shorten the privileged text or the responses; a truncated prompt would be another teacher",
            )


def response_texts(tokenizer: Any, ids: Tensor, mask: Tensor) -> list[str]:
    """The chosen tokens of each row as text, special tokens left out."""
    return [tokenizer.decode(row[chosen], skip_special_tokens=True) for row, chosen in zip(ids, mask, strict=True)]


def better_attempts(texts: Sequence[str], groups: Sequence[int], rewards: Sequence[float]) -> list[str | None]:
    """For each response the text of another one to the same prompt that earned more than the group's mean, or None."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    found: list[str | None] = []
    for row, group in enumerate(groups):
        mean = sum(rewards[other] for other in members[group]) / len(members[group])
        better = [other for other in members[group] if other != row and rewards[other] > mean]
        found.append(texts[better[0]] if better else None)
    return found


def render(prompt: Any, tokenizer: Any, chat_template_kwargs: Mapping[str, Any], generate: bool = True) -> list[int]:
    """Token ids of a prompt, a text or a list of messages, as TRL makes them for the student."""
    try:
        ids = prompt_ids(tokenizer, prompt, chat_template_kwargs=chat_template_kwargs, generate=generate)
    except TokenCreditError as error:
        plain = isinstance(prompt, str)
        fix = "write a `template` with characters that it knows" if plain else "give the tokenizer another template"
        raise TokenCreditError(f"{error.message}; the student's prompt is {prompt!r}", hint=fix) from error
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise TokenCreditError(f"the student's tokenizer does not know a part of the prompt {prompt!r}")
    return ids


def _stand_in(row: Row) -> str:
    """A text that the tokenizer knows, where an attempt will stand."""
    return row["prompt"] if isinstance(row["prompt"], str) else "1"


def _template(name: str) -> str:
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not isinstance(name, str) or "{" not in name:
        raise unknown("teacher template", name, TEMPLATES)
    return name


def _fields(text: str) -> tuple[str, ...]:
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise TokenCreditError(
            f"cannot read the teacher's template {text!r}: {error}", hint="double a brace: {{}}"
        ) from error
    plain = [field for field in found if not field.isidentifier()]
    if plain:
        raise TokenCreditError(f"a field of the teacher's template must be a column's name, got {{{plain[0]}}}")
    return tuple(dict.fromkeys(found))


def _with_privilege(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with `text` at the end of its last user turn."""
    copied = [dict(message) for message in messages]
    last = next((m for m in reversed(copied) if m["role"] == "user"), None)
    if last is None or not isinstance(last["content"], str):
        raise TokenCreditError(
            f"a privileged prompt needs a user turn of plain text, got the roles {[m['role'] for m in copied]}"
        )
    last["content"] = f"{last['content']}\n\n{text}"
    return copied


def _generation_suffix(prompt: Any, tokenizer: Any, renderer: PromptRenderer) -> int:
    """Length of what the chat template puts after the last user turn.

    This is what the generation prompt adds, if the rendering without it is a prefix. Templates may also change what
    comes before; then it is the common ending of two prompts that differ in the last user turn.
    """
    with_it, without = (render(prompt, tokenizer, renderer.chat_template_kwargs, g) for g in (True, False))
    if with_it[: len(without)] == without:
        return max(1, len(with_it) - len(without))
    other = render(_with_privilege(prompt, _stand_in({"prompt": prompt})), tokenizer, renderer.chat_template_kwargs)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(with_it), reversed(other), strict=False))
    return max(1, sum(1 for _ in same))


def _same_prompt(student: list[int], rendered: list[int], tokenizer: Any) -> None:
    """The host must have made the student's prompt as we would; else the two prompts differ in more than privilege."""
    if student == rendered:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(student, rendered, strict=False)) if a != b), min(len(student), len(rendered))
    )
    shown = [repr(tokenizer.decode(ids[at : at + 1])) for ids in (student, rendered)]
    raise TokenCreditError(
        f"prompt ids differ at position {at} of {len(student)}: student {shown[0]}, teacher {shown[1]}",
        hint="give the teacher the host's `chat_template_kwargs`; a prompt that the host cut cannot have a teacher",
    )
