"""Between TRL's dictionaries and our records: the names at the border, and the pieces of a record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.records import OPTIONAL_FIELDS, CreditRecord, TokenBatch
from tokencredit.batch.reduce import Reducer
from tokencredit.collect.record_texts import column_texts


class RowKeys:
    """Keys that we add to TRL's dictionary; each holds one value a row, so TRL's shuffle moves them along."""

    ROW = "tokencredit_row"
    GROUP = "tokencredit_group"
    REWARD = "tokencredit_reward"
    SCORED = "tokencredit_scored"  # only where some response has no score
    HOST = "tokencredit_host_advantages"
    FIELD = "tokencredit_field_"
    REFERENCE = "tokencredit_reference_states"  # of the KL pass, kept for the forward of the loss


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
    shared: dict[str, Any] = field(default_factory=dict)
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

    def sequences(self) -> tuple[Int[Tensor, "batch sequence"], Bool[Tensor, "batch sequence"], int, int]:
        """Prompts and responses as one sequence, its mask, and the lengths of the two parts."""
        ids = torch.cat((self.prompt_ids, self.response_ids), dim=1)
        mask = torch.cat((self.prompt_mask, self.response_mask), dim=1)
        return ids, mask, self.prompt_ids.shape[1], self.response_ids.shape[1]


def to_token_batch(
    inputs: Mapping[str, Any],
    measured: Mapping[str, Tensor],
    *,
    progress: float,
    reducer: Reducer,
    step: int | None = None,
) -> TokenBatch:
    """A `TokenBatch` from TRL's inputs of a loss or of a rollout; `measured` wins over what was carried along.

    Fields are examined where a method reads them: vLLM reports no log-prob for some tokens (NaN), and TRL trains on.
    """
    mask = inputs["completion_mask"].bool()
    if inputs.get("tool_mask") is not None:
        mask = mask & inputs["tool_mask"].bool()  # 1 = chosen by the policy; its padding is 1, so both masks count
    carried = {name: inputs.get(f"{RowKeys.FIELD}{name}") for name in OPTIONAL_FIELDS if name != "host_advantages"}
    host = {
        "old_logprobs": inputs.get("old_per_token_logps"),
        "ref_logprobs": inputs.get("ref_per_token_logps"),
        "rollout_logprobs": inputs.get("sampling_per_token_logps"),
    }
    fields = {name: value for name, value in (host | carried | dict(measured)).items() if value is not None}
    for name, value in host.items():  # a carried None must not hide what the host has
        if value is not None:
            fields.setdefault(name, value)
    return TokenBatch(
        response_ids=inputs["completion_ids"],
        response_mask=mask,
        rewards=inputs[RowKeys.REWARD],
        group_ids=inputs[RowKeys.GROUP],
        host_advantages=inputs[RowKeys.HOST],
        scored=inputs.get(RowKeys.SCORED),
        progress=progress,
        step=step,
        reducer=reducer,
        **fields,
    )


def make_piece(
    step: int, pipeline: Any, batch: TokenBatch, advantages: Tensor, inputs: Mapping[str, Any], prompts: list[str]
) -> dict[str, Any]:
    """One micro-batch of a record, on the CPU, as plain data that ranks can exchange."""
    return {
        "step": step,
        "pipeline": pipeline,
        "rows": inputs[RowKeys.ROW].cpu(),
        "progress": batch.progress,
        "prompts": prompts,
        "advantages": advantages.float().cpu(),
        "tensors": {name: value.detach().cpu() for name, value in batch.tensors().items()},
    }


def merge_pieces(pieces: Sequence[Mapping[str, Any]], tokenizer: Any) -> CreditRecord:
    """The whole rollout batch of all ranks, rows in the order of the global batch."""
    order = torch.cat([piece["rows"] for piece in pieces]).argsort()
    width = max(piece["advantages"].shape[1] for piece in pieces)
    names = set.intersection(*(set(piece["tensors"]) for piece in pieces))

    def joined(values: list[Tensor]) -> Tensor:
        padded = [_pad(value, width) for value in values]
        return torch.cat(padded)[order]

    tensors: dict[str, Any] = {name: joined([piece["tensors"][name] for piece in pieces]) for name in names}
    prompts = [prompt for piece in pieces for prompt in piece["prompts"]]
    batch = TokenBatch(**tensors, progress=pieces[0]["progress"], step=pieces[0]["step"])
    return CreditRecord(
        step=pieces[0]["step"],
        pipeline=pieces[0]["pipeline"],
        batch=batch,
        advantages=joined([piece["advantages"] for piece in pieces]),
        tokens=column_texts(tokenizer, batch.response_ids, batch.response_mask),
        prompts=[prompts[index] for index in order.tolist()],
    )


def _pad(value: Tensor, width: int) -> Tensor:
    if value.ndim == 1:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]))
