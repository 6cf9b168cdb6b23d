"""verl's own config, its data store filled as its workers fill it, and its real trainers without workers."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import batches
import torch
import transfer_queue as tq
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig
from tensordict import NonTensorData, NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import get_trainer_cls

from tokencredit.batch.records import TokenBatch

PARTITION = "train"
GROUPS = (4, 3, 3)
GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.use_kl_loss=True")
ENTROPY = "actor_rollout_ref.actor.entropy_from_logits_with_chunking=True"


def compose(*overrides: str) -> DictConfig:
    """The config of `python -m verl.trainer.main_ppo <overrides>`."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return hydra_compose(
            "ppo_trainer", overrides=["transfer_queue.backend.SimpleStorage.num_data_storage_units=1", *overrides]
        )


def credit_config(*overrides: str, mode: str = "tokencredit_sync") -> DictConfig:
    """A GRPO run with one of our trainers."""
    return compose(*GRPO, ENTROPY, f"trainer.v1.trainer_mode={mode}", *overrides)


def build_trainer(config: DictConfig, step: int = 3) -> Any:
    """The trainer that verl's task runner would build; its workers (`init`) are left out, they need a GPU."""
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    trainer.global_steps, trainer.total_training_steps = step, 12
    return trainer


def sampled(seed: int = 0, groups: Sequence[int] = GROUPS, **changes: Any) -> TokenBatch:
    """What was sampled, with every log-prob and the entropies; progress is that of `build_trainer`.

    Without `step_ids`: neither host knows the steps of a response.
    """
    return batches.make_batch(
        seed=seed, groups=groups, response=9, without=["step_ids"], **{"progress": 3 / 12} | changes
    )


def widths(batch: TokenBatch) -> list[int]:
    """How long verl stores each row: up to its last chosen token, and at least one token."""
    columns = torch.arange(1, batch.response_mask.shape[1] + 1)
    return [max(1, int(value)) for value in torch.where(batch.response_mask, columns, 0).amax(1)]


def nested(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    rows = [row[:length].clone() for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def rows_of(batch: TokenBatch) -> dict[str, Any]:
    """A batch under verl's names, nested."""
    lengths = widths(batch)
    scores = torch.zeros(batch.response_mask.shape)
    scores[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = batch.rewards
    columns = {
        "responses": batch.response_ids,
        "response_mask": batch.response_mask.long(),
        "rm_scores": scores,
        "old_log_probs": batch.old_logprobs,
        "rollout_log_probs": batch.rollout_logprobs,
        "ref_log_prob": batch.ref_logprobs,
        "entropy": batch.entropies,
    }
    fields: dict[str, Any] = {name: nested(value, lengths) for name, value in columns.items() if value is not None}
    fields["prompts"] = nested(torch.full((len(lengths), 4), 7), [2 + row % 3 for row in range(len(lengths))])
    return fields


def put(
    fields: dict[str, Any], uids: Sequence[str], sessions: Sequence[int], trajectories: Sequence[int] | None = None
) -> KVBatchMeta:
    """Rows in the store under the keys that verl gives them."""
    trajectories = trajectories or [0] * len(uids)
    keys = [f"{uid}_{s}_{t}" for uid, s, t in zip(uids, sessions, trajectories, strict=True)]
    stack = NonTensorStack(*(NonTensorData(uid) for uid in uids))
    lengths = fields["response_mask"].offsets().diff().tolist()
    tags = [{"is_padding": False, "prompt_len": 2, "response_len": n, "seq_len": n + 2} for n in lengths]
    data = TensorDict(fields | {"uid": stack}, batch_size=len(keys))
    tq.kv_batch_put(keys=keys, partition_id=PARTITION, fields=data, tags=tags)
    return KVBatchMeta(partition_id=PARTITION, keys=keys, tags=tags, extra_info={})


def store_batch(batch: TokenBatch, drop: Sequence[str] = (), **more: Any) -> KVBatchMeta:
    """A sampled batch in the store; groups become fresh `uid`s."""
    names = {group: uuid4().hex for group in batch.group_ids.unique().tolist()}
    uids = [names[group] for group in batch.group_ids.tolist()]
    fields = rows_of(batch) | more
    kept = {name: value for name, value in fields.items() if name not in drop}
    return put(kept, uids, list(range(len(uids))))


def stored(meta: KVBatchMeta, name: str) -> list[torch.Tensor]:
    """One field of the store, row by row."""
    data = tq.kv_batch_get(keys=meta.keys, partition_id=PARTITION, select_fields=[name])
    return list(data[name].unbind())


def as_rows(advantages: torch.Tensor, batch: TokenBatch) -> list[torch.Tensor]:
    return [row[:length] for row, length in zip(advantages, widths(batch), strict=True)]
