"""Between TRL's dictionaries and our records: the names at the border, and the pieces of a record."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.records import OPTIONAL_FIELDS, CreditRecord, TokenBatch
from tokencredit.batch.reduce import Reducer
from tokencredit.batch.store import RecordStore
from tokencredit.collect.token_texts import column_texts, prompt_texts


class RowKeys:
    """Keys that we add to TRL's dictionary; each holds one value a row, so TRL's shuffle moves them along."""

    ROW = "tokencredit_row"
    GROUP = "tokencredit_group"
    REWARD = "tokencredit_reward"
    SCORED = "tokencredit_scored"  # only where some response has no score
    HOST = "tokencredit_host_advantages"
    FIELD = "tokencredit_field_"
    REFERENCE = "tokencredit_reference_states"  # of the KL pass, kept for the forward of the loss


def row_keys(
    rewards: Float[Tensor, "batch reward"], weights: Tensor, own: slice, generations: int, advantages: Tensor
) -> dict[str, Tensor]:
    """What TRL's shuffle must carry along: one value a row, so that groups can be recognised afterwards.

    `rewards` are those of all processes, one column a reward function; `own` are the rows of this process.
    """
    number = torch.arange(own.start, own.stop, device=advantages.device)
    unscored = torch.isnan(rewards).all(1)
    outcomes = (rewards * weights.to(rewards.device)).nansum(1)  # 0 where nothing scored
    keys = {
        RowKeys.ROW: number,
        RowKeys.GROUP: number // generations,
        RowKeys.REWARD: outcomes[own].float(),
        RowKeys.HOST: advantages,
    }
    if bool(unscored.any()):  # of all processes, so that every one of them carries the key or none does
        keys[RowKeys.SCORED] = ~unscored[own]
    return keys


def sampler_scores(output: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What a `rollout_func` measured while it sampled: log-probs and `entropies`, if it gave them for every token."""
    logprobs = output.get("sampling_per_token_logps")
    given = [row["entropies"] for row in rows if row.get("entropies") is not None]
    if logprobs is None or len(given) < len(rows) or not bool(torch.isfinite(logprobs).all()):
        return {}
    entropies = torch.zeros_like(logprobs)
    for index, values in enumerate(given):
        entropies[index, : len(values)] = torch.tensor(values)
    return {"old_logprobs": logprobs, "entropies": entropies}


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


class RolloutRecorder:
    """Keeps the micro-batches of a rollout batch, and stores them as one record of all processes."""

    def __init__(self, folder: str | Path, every: int, accelerator: Any, tokenizer: Any) -> None:
        self.store = RecordStore(folder) if accelerator.is_main_process else None
        self._every, self._tokenizer = every, tokenizer
        self._alone = accelerator.num_processes == 1
        self._pieces: list[dict[str, Any]] = []

    def records(self, step: int) -> bool:
        """Whether this step is one that is recorded."""
        return step % self._every == 0

    def add(
        self,
        batch: TokenBatch,
        advantages: Float[Tensor, "batch response"],
        rows: Tensor,
        prompts: list[list[int]],
        pipeline: Any,
        pieces: int,
    ) -> None:
        """Keep a micro-batch, on the CPU, as plain data that ranks can exchange; store the batch once it has `pieces`.

        `rows` are the places of its responses in the global batch; `prompts` are token ids.
        """
        self._pieces.append(
            {
                "step": batch.step,
                "pipeline": pipeline,
                "rows": rows.cpu(),
                "progress": batch.progress,
                "prompts": prompt_texts(self._tokenizer, prompts),
                "advantages": advantages.float().cpu(),
                "tensors": {name: value.detach().cpu() for name, value in batch.tensors().items()},
            }
        )
        if len(self._pieces) < pieces:
            return
        whole = self._pieces if self._alone else list(gather_object(self._pieces))
        self._pieces = []
        if self.store is not None:
            self.store.append(merge_pieces(whole, self._tokenizer))


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
