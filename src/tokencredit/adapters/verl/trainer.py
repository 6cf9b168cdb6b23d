"""verl's three trainers under a credit pipeline: one tensor changes, the advantages in the data store.

The credit step runs on the driver, between verl's own advantages and the actor update. It sees the global batch, so
groups are whole and no collective is needed. With an identity pipeline nothing is fetched and nothing is written.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.config import omega_conf_to_dataclass

from tokencredit import seeds
from tokencredit.adapters.verl import batch as verl_batch
from tokencredit.adapters.verl import checks as verl_checks
from tokencredit.adapters.verl import signals as verl_signals
from tokencredit.adapters.verl.loss import credit_loss
from tokencredit.adapters.verl.names import PREFIX
from tokencredit.adapters.verl.rows import SCHEDULE, pack_schedule, steps_done
from tokencredit.adapters.verl.settings import read_settings
from tokencredit.batch.records import CreditRecord, TokenBatch
from tokencredit.batch.store import RecordStore
from tokencredit.collect.table import fields_of
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.assign import assign_credit


class CreditStep:
    """What our trainers add to verl's; `builtin_mode` is the name under which verl knows the base class."""

    builtin_mode: str
    # Of verl's trainers.
    config: DictConfig
    global_steps: int
    local_trigger_step: int
    total_training_steps: int
    actor_rollout_wg: Any
    tokenizer: Any

    def __init__(self, config: DictConfig) -> None:
        self.settings = read_settings(config)
        self.pipeline = self.settings.pipeline()
        self.timing = verl_checks.check_all(self.pipeline, self.settings, config)
        self.store = RecordStore(self.settings.records) if self.settings.records is not None else None
        self._first_record = True
        super().__init__(verl_checks.with_builtin_mode(config, self.builtin_mode))  # type: ignore[call-arg]

    def _setup(self) -> None:
        super()._setup()
        if self.timing == "update" and not self.pipeline.is_identity:
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            loss = partial(credit_loss, config=actor, credit=self.pipeline.to_config(), names=self._stored_names())
            self.actor_rollout_wg.set_loss_fn(loss)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's scoring pass, which also leaves the signals that the pipeline needs."""
        if not self._signals:
            return super()._compute_old_log_prob(batch, metrics)
        verl_signals.ask(batch, self._signals)
        try:
            output = super()._compute_old_log_prob(batch, metrics)
        finally:
            verl_signals.ask_no_more(batch)
        verl_signals.keep_response(batch.keys, batch.partition_id, {name: name for name in self._signals})
        return output

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Where the residuals' pass was the reference's, verl need not run it again."""
        if "adapter_residuals" not in self._signals:
            return super()._compute_ref_log_prob(batch, metrics)
        verl_signals.keep_response(batch.keys, batch.partition_id, {verl_signals.REFERENCE: "ref_log_prob"})
        return batch

    @property
    def _signals(self) -> dict[str, dict[str, Any]]:
        """Options of the signals that the workers have to take."""
        wanted = sorted(self.pipeline.requires & fields_of(verl="tapped"))
        return {name: self.settings.options()[name] for name in wanted}

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        output = super()._compute_advantage(batch, metrics)
        if self.timing == "update" and not self.pipeline.is_identity:
            output.extra_info[SCHEDULE] = pack_schedule(self._progress(), steps_done(self.global_steps))
        at_rollout = self.timing == "rollout" and not self.pipeline.is_identity
        if at_rollout or self._records_this_step():
            try:
                self._assign(output, metrics, at_rollout)
            except TokenCreditError as error:
                raise TokenCreditError(f"step {self.global_steps}: {error.message}", hint=error.hint) from error
        return output

    def _records_this_step(self) -> bool:
        return self.store is not None and self.global_steps % self.settings.record_every == 0

    def _assign(self, meta: KVBatchMeta, metrics: dict[str, Any], at_rollout: bool) -> None:
        """Fetch, assign, put back, tap. The mask is read after verl's own step, which may have rejected tokens."""
        keys = [meta.keys[row] for row in verl_batch.real_rows(meta)]
        if not keys:
            raise TokenCreditError("verl handed over a batch without a sampled response")
        self._check_sessions(keys)
        recording = self._records_this_step()
        names = self._stored_names()
        data = verl_batch.fetch(keys, meta.partition_id, names, ("prompts",) if recording else ())
        batch = verl_batch.to_token_batch(data, keys, names, self._progress(), steps_done(self.global_steps))
        advantages = self._host_advantages(batch)
        if at_rollout:
            advantages = assign_credit(self.pipeline, batch, generator=self._generator())
            verl_batch.put_advantages(keys, meta.partition_id, advantages, data["response_mask"])
            metrics.update(credit_metrics(batch, advantages, batch.host_advantages))
        if recording:
            self._record(batch, advantages, data)

    def _stored_names(self) -> Mapping[str, str]:
        # `current_logprobs` exist in the loss only; what a record shows is what the driver has.
        return verl_batch.stored_names(self.pipeline.requires, self.settings.teacher)

    @staticmethod
    def _host_advantages(batch: TokenBatch) -> Tensor:
        host = batch.require("host_advantages")
        return torch.where(batch.response_mask, host[:, None].expand(batch.response_mask.shape), 0.0)

    def _check_sessions(self, keys: list[str]) -> None:
        """Sessions of several rows: exact where each row is credited by itself, refused where rows are pooled."""
        if not verl_batch.has_several_trajectories(keys):
            return
        estimator = str(self.config.algorithm.adv_estimator)
        if not estimator.endswith("grpo") or self.pipeline.scope in ("group", "batch"):
            raise TokenCreditError(
                f"{len(keys)} rows belong to fewer sessions; {self.pipeline.name} (scope {self.pipeline.scope}) under "
                f"algorithm.adv_estimator={estimator} would count a session of several trajectories several times",
                hint="use a method of scope token or response with algorithm.adv_estimator=grpo, or an agent loop that "
                "returns one trajectory a session",
            )

    def _progress(self) -> float:
        steps = max(1, int(self.total_training_steps))
        return min(1.0, self.global_steps / steps)

    def _generator(self) -> torch.Generator | None:
        if not self.pipeline.draws:
            return None
        step, part = int(self.global_steps), int(self.local_trigger_step)
        return seeds.generator("credit", self.settings.seed, step, part)

    def _record(self, batch: TokenBatch, advantages: Tensor, data: Any) -> None:
        assert self.store is not None
        step = int(self.global_steps)
        if self._first_record:
            self.store.truncate(step)  # a resumed run writes these steps again
            self._first_record = False
        tokens, prompts = verl_batch.decoded(data, self.tokenizer)
        config = self.pipeline.to_config()
        self.store.append(
            CreditRecord(step=step, pipeline=config, batch=batch, advantages=advantages, tokens=tokens, prompts=prompts)
        )


@register_trainer(f"{PREFIX}sync")
class CreditTrainerSync(CreditStep, PPOTrainerSync):
    """`trainer.v1.trainer_mode=tokencredit_sync`."""

    builtin_mode = "sync"


@register_trainer(f"{PREFIX}colocate_async")
class CreditTrainerColocateAsync(CreditStep, PPOTrainerColocateAsync):
    """`trainer.v1.trainer_mode=tokencredit_colocate_async`."""

    builtin_mode = "colocate_async"


@register_trainer(f"{PREFIX}separate_async")
class CreditTrainerSeparateAsync(CreditStep, PPOTrainerSeparateAsync):
    """`trainer.v1.trainer_mode=tokencredit_separate_async`."""

    builtin_mode = "separate_async"


verl_signals.install()

# A run that asks for credit and forgets to choose one of these trainers must not train silently without it.
for _trainer in (PPOTrainer, RayPPOTrainer):
    verl_checks.guard(_trainer, lambda trainer: isinstance(trainer, CreditStep))
