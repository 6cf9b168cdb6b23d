"""Between verl's data store and our records: names at the border, padding, groups by `uid`, sessions by key."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from tokencredit.adapters.verl.rows import scored_rows
from tokencredit.batch.records import TokenBatch
from tokencredit.collect.token_texts import column_texts, prompt_texts, without_padding
from tokencredit.errors import TokenCreditError

# Our field: verl's name, and the setting that makes verl store it.
SOURCES: Mapping[str, tuple[str, str]] = {
    "entropies": ("entropy", "set algorithm.rollout_correction.bypass_mode=False: then verl scores the batch itself"),
    "old_logprobs": ("old_log_probs", "set algorithm.rollout_correction.bypass_mode=False"),
    "rollout_logprobs": ("rollout_log_probs", "set actor_rollout_ref.rollout.calculate_log_probs=True"),
    "ref_logprobs": (
        "ref_log_prob",
        "set actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef=0 keeps the loss as it is)",
    ),
    "teacher_logprobs": (
        "teacher_logprobs",
        "set distillation.enabled=True, or +credit.teacher=reference for the reference worker",
    ),
    "attention_entropies": ("attention_entropies", "set actor_rollout_ref.actor.strategy=fsdp or fsdp2"),
    "adapter_residuals": ("adapter_residuals", "set actor_rollout_ref.actor.strategy=fsdp or fsdp2, and train a LoRA"),
}
NEEDED = ("uid", "responses", "response_mask", "rm_scores", "advantages")


def stored_names(requires: frozenset[str], teacher: str) -> dict[str, str]:
    """verl's name of every field that a pipeline reads."""
    names = {name: SOURCES[name][0] for name in sorted(requires & SOURCES.keys())}
    if "teacher_logprobs" in names and teacher == "reference":
        names["teacher_logprobs"] = SOURCES["ref_logprobs"][0]
    return names


def real_rows(batch: KVBatchMeta) -> list[int]:
    """Positions of rows that were sampled; `_balance_batch` appends synthetic ones and marks them in their tag."""
    return [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]


def fetch(keys: Sequence[str], partition_id: str, names: Mapping[str, str], more: Sequence[str] = ()) -> TensorDict:
    """What the store holds of these rows. It omits a field that is missing, or that only some rows have: look."""
    wanted = [*NEEDED, *names.values(), *more]
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=wanted)
    present = set(data.keys())
    for field, stored in names.items():
        if stored not in present:
            hint = SOURCES["ref_logprobs" if stored == "ref_log_prob" else field][1]
            raise TokenCreditError(f"this pipeline needs `{field}`, but verl stored no `{stored}`", hint=hint)
    for name in (*NEEDED, *more):
        if name not in present:
            raise TokenCreditError(
                f"verl stored no `{name}` for at least one of {len(keys)} responses",
                hint="an agent loop must put it into TransferQueue for every response",
            )
    return data


def to_token_batch(
    data: TensorDict, keys: Sequence[str], names: Mapping[str, str], progress: float, step: int | None = None
) -> TokenBatch:
    """A `TokenBatch` of these rows; a response is a session, whose outcome is that of its last trajectory.

    Rows without a chosen token are not scored: they get no credit and move no baseline.
    """
    mask = padded(data["response_mask"]).bool()
    fields = {field: _response_part(field, data, stored, mask) for field, stored in names.items()}
    return TokenBatch(
        response_ids=padded(data["responses"]),
        response_mask=mask,
        rewards=_outcomes(padded(data["rm_scores"]).float().sum(1), keys),
        group_ids=group_ids([str(uid) for uid in data["uid"]]),
        host_advantages=one_per_response(padded(data["advantages"]), mask),
        scored=scored_rows(mask),
        progress=progress,
        step=step,
        **fields,  # type: ignore[arg-type]
    )


def group_ids(uids: Sequence[str]) -> Tensor:
    """Integers for verl's strings, by first appearance: rows are reordered, so position says nothing."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], dtype=torch.long)


def sessions(keys: Sequence[str]) -> list[tuple[str, int]]:
    """Session and trajectory of every key `{uid}_{session}_{trajectory}`."""
    found = []
    for key in keys:
        session, _, trajectory = key.rpartition("_")
        if not session or not trajectory.isdigit():
            raise TokenCreditError(f"keys are {{uid}}_{{session}}_{{trajectory}}, got {key!r}")
        found.append((session, int(trajectory)))
    return found


def has_several_trajectories(keys: Sequence[str]) -> bool:
    """Whether any session of the batch consists of more than one row."""
    return len({session for session, _ in sessions(keys)}) < len(keys)


def one_per_response(advantages: Float[Tensor, "batch response"], mask: Tensor) -> Float[Tensor, " batch"]:
    """The host's advantage of each response; refuses advantages that differ inside a response."""
    low = torch.where(mask, advantages, torch.inf).amin(1)
    high = torch.where(mask, advantages, -torch.inf).amax(1)
    empty = ~mask.any(1)
    low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
    differ = (high - low) > 1e-6 * torch.maximum(high.abs(), low.abs())
    if bool(differ.any()):
        row = int(differ.nonzero()[0])
        raise TokenCreditError(
            f"verl's advantages must be one number a response, got {float(low[row])} to {float(high[row])} in row "
            f"{row}",
            hint="set algorithm.adv_estimator=grpo (or rloo, opo), and algorithm.gamma=1.0",
        )
    return high


def put_advantages(
    keys: Sequence[str], partition_id: str, advantages: Float[Tensor, "batch response"], response_mask: Tensor
) -> None:
    """Overwrite the advantages of these rows; `returns` stay: they are the critic's target."""
    fields = TensorDict({"advantages": nested_like(advantages, response_mask)}, batch_size=len(keys))
    tq.kv_batch_put(keys=list(keys), partition_id=partition_id, fields=fields)


def nested_like(values: Float[Tensor, "batch response"], response_mask: Tensor) -> Tensor:
    """Rows cut to the lengths of the nested `response_mask`."""
    lengths = _ends(response_mask).diff().tolist()
    rows = [row[:length] for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _ends(nested: Any) -> Tensor:
    """Where each row of a jagged tensor ends in its flat values, with a 0 in front."""
    return nested.offsets()


def padded(values: Tensor, width: int | None = None) -> Tensor:
    """A jagged tensor as [batch, response], 0 behind each row; a padded one as it is."""
    size = None if width is None else (values.shape[0], width)
    return values.to_padded_tensor(0, size) if values.is_nested else values


def _response_part(field: str, data: TensorDict, stored: str, mask: Tensor) -> Tensor:
    values = data[stored]
    if field == "teacher_logprobs" and stored == "teacher_logprobs":
        values = _teacher_responses(values, data["response_mask"])
    return padded(values, mask.shape[1]).float()


def _teacher_responses(values: Tensor, response_mask: Tensor) -> Tensor:
    """verl's teacher scores prompt and response; the log-prob of a token lies one place before it."""
    flat, ends = values.values(), _ends(values)[1:].tolist()
    if flat.ndim > 1 and flat.shape[1] != 1:
        raise TokenCreditError(
            f"the teacher stored {flat.shape[1]} log-probs a token, credit needs that of the sampled token alone",
            hint="set distillation.distillation_loss.loss_mode=k1 instead of a top-k mode",
        )
    flat = flat.reshape(-1)
    lengths = _ends(response_mask).diff().tolist()
    rows = [flat[end - length - 1 : end - 1] for end, length in zip(ends, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _outcomes(scores: Float[Tensor, " batch"], keys: Sequence[str]) -> Float[Tensor, " batch"]:
    last: dict[str, tuple[int, int]] = {}
    named = sessions(keys)
    for row, (session, trajectory) in enumerate(named):
        if session not in last or last[session][0] < trajectory:
            last[session] = (trajectory, row)
    return scores[torch.tensor([last[session][1] for session, _ in named], dtype=torch.long)]


def decoded(data: TensorDict, tokenizer: Any) -> tuple[list[list[str]], list[str]]:
    """The text of every response token, and of every prompt, for display."""
    tokens = column_texts(tokenizer, padded(data["responses"]), padded(data["response_mask"]).bool())
    rows = [without_padding(row.tolist(), tokenizer.pad_token_id) for row in data["prompts"].unbind()]
    return tokens, prompt_texts(tokenizer, rows)
