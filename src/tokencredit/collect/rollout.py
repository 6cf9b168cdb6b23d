"""The records that collectors take: `Sequences` for one pass of a model, `Rollout` for a whole batch of responses."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.errors import TokenCreditError

# Inputs beside token ids that a host hands over; TRL's names. Those with one entry per row are cut with the rows.
ExtraInputs = Mapping[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Token ids for one pass, in the host's layout: columns of prompt, then columns of response, padding anywhere.

    * `attention_mask`: where there is a token; None: everywhere.
    * `prompt_length`, `response_length`: columns, padding included. Columns behind the response are padding.
    * `position_ids`: None: the model's own.
    * `extra_inputs`: what the model's forward reads besides tokens, such as `pixel_values` and `image_grid_thw`.
      Entries with one row per sequence are cut with the rows; images of several patches per row need TRL's
      `num_images`.
    """

    input_ids: Int[Tensor, "batch sequence"]
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None
    prompt_length: int
    response_length: int
    position_ids: Int[Tensor, "batch sequence"] | None = None
    extra_inputs: ExtraInputs | None = None

    def __post_init__(self) -> None:
        """Responses are inside the sequence, and something predicts their first token."""
        sequence = self.input_ids.shape[1]
        if self.prompt_length < 1 or self.prompt_length + self.response_length > sequence:
            raise TokenCreditError(
                f"a prompt of {self.prompt_length} and a response of {self.response_length} columns do not fit a "
                f"sequence of {sequence} tokens",
                hint="lengths are columns of `input_ids`, padding included; a prompt has at least one token",
            )

    def __iter__(self) -> Iterator[Any]:
        """The fields that always count, so that `function(model, *sequences)` works too."""
        return iter((self.input_ids, self.attention_mask, self.prompt_length, self.response_length))

    @property
    def response_columns(self) -> slice:
        return slice(self.prompt_length, self.prompt_length + self.response_length)

    @property
    def response_ids(self) -> Int[Tensor, "batch response"]:
        return self.input_ids[:, self.response_columns]

    def rows(self, index: slice) -> "Sequences":
        """Some rows, without inputs beside tokens."""
        return self._cut((index,), extra_inputs=None)

    def without_tail(self) -> "Sequences":
        """The same without the columns behind the response."""
        return self._cut((slice(None), slice(self.prompt_length + self.response_length)))

    def _cut(self, index: tuple[slice, ...], **changed: Any) -> "Sequences":
        for name in ("input_ids", "attention_mask", "position_ids"):
            value = getattr(self, name)
            changed[name] = None if value is None else value[index]
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a collector sees: the policy and the rows of this process, before any shuffle.

    Prompts are padded on the left, responses on the right; `columns` are the dataset's rows, one for each response.

    * `scored`: False where no reward function gave a score; that response's reward means nothing. None: all have one.
    * `inputs`: what the model takes beside token ids, such as images. A pass that leaves them out measures another
      model.
    * `score(prompts=None)`: log-probs and entropies of the responses from TRL's own scoring pass.
    * `parts()`: the same rows in micro-batches, for passes of your own; run them under `autocast()`, as TRL does.
    * `shared`: for collectors that fill several fields from one pass. `metrics`: numbers for the log, by name.
    """

    model: Any
    tokenizer: Any
    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    rewards: Float[Tensor, " batch"]
    group_ids: Int[Tensor, " batch"]
    columns: Sequence[Mapping[str, Any]]
    temperature: float
    scored: Bool[Tensor, " batch"] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[..., tuple[Tensor, Tensor]] | None = None
    autocast: Callable[[], Any] = nullcontext
    rows_per_pass: int | None = None
    teacher: Any = None
    shared: dict[Any, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def parts(self) -> Iterator["Rollout"]:
        """The rollout in pieces of as many rows as a micro-batch of the host has."""
        size = self.rows_per_pass or max(len(self.response_ids), 1)
        names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "rewards", "group_ids", "columns")
        for start in range(0, len(self.response_ids), size):
            rows = slice(start, start + size)
            piece = {name: getattr(self, name)[rows] for name in names}
            scored = None if self.scored is None else self.scored[rows]
            yield replace(self, **piece, scored=scored, inputs={}, score=None, shared={})

    def in_parts(self, measure: Callable[["Rollout"], Any]) -> Any:
        """`measure` of a micro-batch at a time, in the host's precision, put together again."""
        with self.autocast():
            pieces = [measure(part) for part in self.parts()]
        if isinstance(pieces[0], tuple):
            return tuple(torch.cat(values) for values in zip(*pieces, strict=True))
        return torch.cat(pieces)

    def sequences(self) -> Sequences:
        """Prompts and responses as one sequence."""
        ids = torch.cat((self.prompt_ids, self.response_ids), dim=1)
        mask = torch.cat((self.prompt_mask, self.response_mask), dim=1)
        return Sequences(ids, mask, self.prompt_ids.shape[1], self.response_ids.shape[1])

    def prompts(self) -> list[list[int]]:
        """The token ids of the prompts, without padding."""
        return _chosen(self.prompt_ids, self.prompt_mask)

    def responses(self) -> list[list[int]]:
        """The token ids that the policy chose."""
        return _chosen(self.response_ids, self.response_mask)


def _chosen(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[inside.bool()].tolist() for row, inside in zip(ids, mask, strict=True)]


def takes(
    record: type, *, after: int = 0, positional: int | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function that takes `record` also be called with the fields of the record, one by one.

    Args:
      after: arguments before the record.
      positional: fields that may be given by position; None: those without a default.
    """
    names = [item.name for item in fields(record)]
    required = [item for item in fields(record) if item.default is MISSING and item.default_factory is MISSING]
    stop = after + (len(required) if positional is None else positional)

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Result:
            if any(isinstance(value, record) for value in (*args, *named.values())):
                return function(*args, **named)
            values = dict(zip(names, args[after:stop], strict=False))
            values |= {name: named.pop(name) for name in names if name in named}
            return function(*args[:after], record(**values), *args[stop:], **named)

        return call

    return decorate
