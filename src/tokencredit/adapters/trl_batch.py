"""Between TRL's dictionaries and our records: the names at the border, and the pieces of a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.records import OPTIONAL_FIELDS, CreditRecord, TokenBatch
from tokencredit.reduce import Reducer


class RowKeys:
    """Keys that we add to TRL's dictionary; each holds one value a row, so TRL's shuffle moves them along."""

    ROW = "tokencredit_row"
    GROUP = "tokencredit_group"
    REWARD = "tokencredit_reward"
    HOST = "tokencredit_host_advantages"
    FIELD = "tokencredit_field_"
    REFERENCE = "tokencredit_reference_states"  # of the KL pass, kept for the forward of the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a collector sees: the policy and the rows of this process, before any shuffle.

    Prompts are padded on the left, responses on the right; `columns` are the dataset's rows, one for each response.
    `shared` is for collectors that fill several fields from one pass.
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
    shared: dict[str, Any] = field(default_factory=dict)

    def sequences(self) -> tuple[Int[Tensor, "batch sequence"], Bool[Tensor, "batch sequence"], int, int]:
        """Prompts and responses as one sequence, its mask, and the lengths of the two parts."""
        ids = torch.cat((self.prompt_ids, self.response_ids), dim=1)
        mask = torch.cat((self.prompt_mask, self.response_mask), dim=1)
        return ids, mask, self.prompt_ids.shape[1], self.response_ids.shape[1]


def to_token_batch(
    inputs: Mapping[str, Any], measured: Mapping[str, Tensor], *, progress: float, reducer: Reducer
) -> TokenBatch:
    """A `TokenBatch` from TRL's inputs of a loss or of a rollout; `measured` wins over what was carried along."""
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
        progress=progress,
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
    batch = TokenBatch(**tensors, progress=pieces[0]["progress"])
    return CreditRecord(
        step=pieces[0]["step"],
        pipeline=pieces[0]["pipeline"],
        batch=batch,
        advantages=joined([piece["advantages"] for piece in pieces]),
        tokens=_decode(batch.response_ids, tokenizer),
        prompts=[prompts[index] for index in order.tolist()],
    )


def _pad(value: Tensor, width: int) -> Tensor:
    if value.ndim == 1:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]))


def _decode(ids: Int[Tensor, "batch response"], tokenizer: Any) -> list[list[str]]:
    """The text of each token on its own; looked up once for each distinct id."""
    distinct = ids.unique().tolist()
    text = dict(zip(distinct, tokenizer.batch_decode([[token] for token in distinct]), strict=True))
    return [[text[token] for token in row] for row in ids.tolist()]
