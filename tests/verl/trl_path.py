"""The credit step of `CreditGRPOTrainer` on a batch, from TRL's names to its `_assign`, without a model."""

from types import SimpleNamespace

from torch import Tensor

from tokencredit.adapters.trl.batch import RowKeys
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.records import TokenBatch
from tokencredit.pipeline.pipeline import Pipeline


def trl_advantages(method: str, batch: TokenBatch) -> Tensor:
    """What TRL's loss would be given for this batch."""
    assert batch.progress is not None
    trainer = object.__new__(CreditGRPOTrainer)
    trainer.pipeline = Pipeline.parse(method)
    trainer.accelerator = SimpleNamespace(num_processes=1)
    trainer.args, trainer.num_iterations, trainer._step = SimpleNamespace(steps_per_generation=1, seed=0), 1, 0
    trainer.state = SimpleNamespace(max_steps=1000, global_step=round(1000 * batch.progress))
    inputs = {
        "completion_ids": batch.response_ids,
        "completion_mask": batch.response_mask.long(),
        "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.ref_logprobs,
        "advantages": batch.host_advantages,
        RowKeys.GROUP: batch.group_ids,
        RowKeys.REWARD: batch.rewards,
        RowKeys.HOST: batch.host_advantages,
        f"{RowKeys.FIELD}entropies": batch.entropies,
    }
    return trainer._assign(trainer._token_batch(inputs, {}))
