"""TRL: `CreditGRPOTrainer` is `GRPOTrainer` with one tensor changed, the advantages.

Two seams. *Rollout*: after `_generate_and_score_completions`, before TRL shuffles the rows, so groups are whole and
credit stays fixed over inner updates. *Update*: inside `_compute_loss`, from the log-probs and entropies of the forward
that the loss runs anyway, so it costs no forward. With an identity pipeline the host's tensor is handed on untouched.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tokencredit import seeds
from tokencredit.adapters.trl import checks as trl_checks
from tokencredit.adapters.trl.batch import Rollout, RowKeys, make_piece, merge_pieces, to_token_batch
from tokencredit.adapters.trl.card import save_card
from tokencredit.adapters.trl.collectors import (
    TeacherCallback,
    as_teacher,
    built_in,
    check_teacher,
    check_vision,
    restore_teacher,
)
from tokencredit.adapters.trl.passes import (
    HostPass,
    as_scored,
    is_sharded,
    model_inputs,
    prompt_rows,
    score_rows,
    sequences,
)
from tokencredit.adapters.trl.rewards import check_models, guard_rewards
from tokencredit.adapters.trl.sampling import plain_sampling, warn_of_shipped
from tokencredit.adapters.trl.shuffle import needs_whole_groups, regroup
from tokencredit.adapters.trl.taps import PassTaps, draws_dropout
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import LOCAL, ProcessGroupReducer, Reducer
from tokencredit.batch.store import RecordStore
from tokencredit.collect.adapter_residual import reference_pass
from tokencredit.collect.options import SHARED, resolve_options
from tokencredit.collect.record_texts import prompt_texts
from tokencredit.collect.teacher.prompts import first_rows
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.pipeline.pipeline import Pipeline, assign_credit


class CreditGRPOTrainer(GRPOTrainer):
    """TRL's GRPO trainer under a credit pipeline.

    Takes everything that `GRPOTrainer` takes, and:

    * `credit`: a preset (`"hapo"`), an expression, a list of steps, or a `Pipeline`.
    * `timing`: "update" measures entropies and log-probs in the forward of the loss (no extra cost; micro-batches must
      hold whole groups if the method looks at them), "rollout" once for each rollout batch, for all inner updates (one
      no-grad forward, unless TRL computes old log-probs anyway), "auto" takes "update" where it is exact.
    * `records`: a folder; every `record_every` steps a `CreditRecord` is stored there; training is identical.
    * `collectors`: by the `TokenBatch` field they fill, functions `Rollout -> [batch, response]` of your own, or
      options of the collectors that are here already (docs/configs.md lists them). Adapter residuals and attention
      entropies are taken from TRL's own passes where dropout is off.
    * `teacher`: a `Teacher`, or the mapping that describes one; asked only where the pipeline needs it.

    Raises `TokenCreditError` before training where a setting would erase or distort token credit.
    """

    _buffered_inputs: Any  # TRL's micro-batches

    def __init__(
        self,
        *args: Any,
        credit: Any = "grpo",
        timing: Any = "auto",
        records: Any = None,
        record_every: Any = 1,
        collectors: Any = None,
        teacher: Any = None,
        **kwargs: Any,
    ) -> None:
        self.pipeline = Pipeline.parse(credit)
        self.teacher = as_teacher(teacher) if "teacher_logprobs" in self.pipeline.requires else None
        options, own = resolve_options({} if collectors is None else collectors)
        trl_checks.check_records(records, record_every)
        check_teacher(teacher)
        adapter = trl_checks.has_adapter(args, kwargs)
        self.collectors = built_in(options, self.teacher, adapter=adapter) | own
        config = kwargs.get("args") or next((value for value in args if isinstance(value, GRPOConfig)), None)
        native = trl_checks.has_native_adapter(args, kwargs)
        self.timing = trl_checks.check_all(self.pipeline, timing, self.collectors, config, native_adapter=native)
        self._rewards: Tensor | None = None
        self._scored: dict[str, Tensor] | None = None  # filled while TRL scores a rollout batch
        self._loss_inputs: dict[str, Any] | None = None  # set while TRL computes a loss
        self._taps = PassTaps((), options)
        self._pieces: list[dict[str, Any]] = []
        self._record_every = record_every
        super().__init__(*args, **kwargs)
        self.reward_funcs: list[Any] = guard_rewards(self.reward_funcs)  # also those of environments
        if not self.use_vllm and getattr(self, "rollout_func", None) is None:
            warn_of_shipped(self.model, self.generation_config)
        self.store = RecordStore(records) if records is not None and self.accelerator.is_main_process else None
        self._recording = records is not None
        # Compiled code may have been built without our hooks, and then does not call them.
        if not draws_dropout(self.model) and not self.args.torch_compile:
            self._taps = PassTaps((SHARED & self.pipeline.requires) - own.keys(), options)
        if self.teacher is not None:
            check_vision(self.teacher, self.processing_class)
            self.teacher.check(
                self._text_tokenizer,
                policy=self.model,
                rows=first_rows(() if self.train_dataset is None else self.train_dataset),
                temperature=self.temperature,
            )
            self.add_callback(TeacherCallback(self.teacher))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.teacher is not None:
            restore_teacher(self.teacher, resume_from_checkpoint)

    @property
    def _text_tokenizer(self) -> Any:
        """The tokenizer, also of a vision-language model, whose processor holds it."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def create_model_card(self, model_name: str | None = None, *_: Any, **__: Any) -> None:
        """Write the model card in place of TRL's, which knows GRPO alone and links to a base model that may not be."""
        if self.is_world_process_zero():
            save_card(self, self.pipeline, model_name)

    # -- rollout -------------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not needs_whole_groups(self.timing, self.pipeline, self.args):
            return inputs
        self._buffered_inputs, inputs = regroup(self._buffered_inputs, inputs)
        return inputs

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with plain_sampling(self.model, getattr(self, "generation_config", None)):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_models(rewards, self.reward_funcs, self.reward_func_names)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._scored = {}
        self._taps.clear()
        try:
            output = super()._generate_and_score_completions(inputs)
            scored = self._scored
        finally:
            self._scored = None
        if self.pipeline.is_identity and not self._recording:
            return output
        output.update(self._row_keys(output))
        at_rollout = self.timing == "rollout" and not self.pipeline.is_identity
        if at_rollout:
            measured = self._measure_old_policy(output, scored or self._sampled(output, inputs))
            output |= {f"{RowKeys.FIELD}{name}": value for name, value in measured.items()}
        self._collect(output, inputs)
        if at_rollout:
            output["advantages"] = self._assign(self._token_batch(output, {}))
        return output

    def _row_keys(self, output: dict[str, Any]) -> dict[str, Tensor]:
        """What the shuffle must carry along: one value a row, so groups can be told apart afterwards."""
        assert self._rewards is not None
        rows = len(output["advantages"])
        first = self.accelerator.process_index * rows
        number = torch.arange(first, first + rows, device=output["advantages"].device)
        unscored = torch.isnan(self._rewards).all(1)
        rewards = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)  # 0 where nothing scored
        keys = {
            RowKeys.ROW: number,
            RowKeys.GROUP: number // self.num_generations,
            RowKeys.REWARD: rewards[first : first + rows].float(),
            RowKeys.HOST: output["advantages"],
        }
        if bool(unscored.any()):  # of all processes, so that every one of them carries the key or none does
            keys[RowKeys.SCORED] = ~unscored[first : first + rows]
        return keys

    def _collect(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Fields that the log-probs do not give: from tapped passes, from the loss later on, or from collectors."""
        found = self._from_taps(output)
        kept = self._taps.kept_reference() if self._tap_loss else None
        if kept is not None:
            output[RowKeys.REFERENCE] = kept
        self._taps.clear()
        wanted = (self.pipeline.requires & self.collectors.keys()) - found.keys()
        if self.beta != 0.0:
            wanted -= {"ref_logprobs"}  # TRL has them
        wanted -= self._taps.fields if self._tap_loss else frozenset()
        rollout = self._rollout(output, inputs)
        for name in sorted(wanted):
            with torch.no_grad():
                found[name] = self.collectors[name](rollout)
        for name, value in sorted(rollout.metrics.items()):
            shares = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device))
            self._metrics["train"][f"credit/{name}"].append(float(shares.mean()))
        output |= {f"{RowKeys.FIELD}{name}": value for name, value in found.items()}

    def _rollout(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> Rollout:
        return Rollout(
            model=self.model,
            tokenizer=self._text_tokenizer,
            prompt_ids=output["prompt_ids"],
            prompt_mask=output["prompt_mask"].bool(),
            response_ids=output["completion_ids"],
            response_mask=output["completion_mask"].bool(),
            rewards=output[RowKeys.REWARD],
            group_ids=output[RowKeys.GROUP],
            columns=inputs,
            temperature=self.temperature,
            scored=output.get(RowKeys.SCORED),
            inputs=model_inputs(output),
            score=HostPass(self, output),
            autocast=self.accelerator.autocast,
            rows_per_pass=self.args.per_device_train_batch_size,
        )

    def _from_taps(self, output: dict[str, Any]) -> dict[str, Tensor]:
        if self._lacks_reference(output):
            self._tap_reference(output)
        ids, mask = sequences(output)
        with torch.no_grad(), self.accelerator.autocast():
            width, at_once = output["completion_ids"].size(1), self.args.per_device_train_batch_size
            return self._taps.of_rollout(self.model, ids, mask, width, at_once)

    def _lacks_reference(self, inputs: dict[str, Any]) -> bool:
        """Whether residuals still need a pass of the reference which only TRL's own scoring method can run."""
        tapped = self._taps.states
        cannot_run_alone = bool(model_inputs(inputs)) or is_sharded(self.model)
        return bool(tapped.policy) and not tapped.reference and cannot_run_alone

    def _tap_reference(self, inputs: dict[str, Any]) -> None:
        width = inputs["completion_ids"].size(1)
        with reference_pass(self.model), self._taps.around(self.model, width, reference=True):
            score_rows(self, inputs)

    def _sampled(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What a `rollout_func` knows already: its log-probs, and `entropies` if it returned them for every token.

        Under mixed precision they are those of another policy: a sampler does not run under autocast.
        """
        logprobs = output.get("sampling_per_token_logps")
        rows = [row["entropies"] for row in inputs if row.get("entropies") is not None]
        if logprobs is None or len(rows) < len(inputs) or self.accelerator.mixed_precision != "no":
            return {}
        if not bool(torch.isfinite(logprobs).all()):
            return {}
        entropies = torch.zeros_like(logprobs)
        for index, row in enumerate(rows):
            entropies[index, : len(row)] = torch.tensor(row)
        return {"old_logprobs": logprobs, "entropies": entropies}

    def _measure_old_policy(self, output: dict[str, Any], scored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-probs and entropies of the policy that sampled: TRL's own pass, or one more without gradient."""
        wanted = self.pipeline.requires & {"entropies", "old_logprobs"}
        if not wanted:
            return {}
        if not scored:
            with self._taps.around(self.model, output["completion_ids"].size(1)):
                scored = score_rows(self, output)
        return {name: scored[name] for name in wanted}

    # -- update --------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        # While TRL scores a rollout batch, only its first call is the sampling policy; a later one is the reference.
        scoring = self._scored is not None and not self._scored and self._scores_old_policy()
        if scoring:
            kwargs["compute_entropy"] = True
        with self._tapped(scoring, *args, **kwargs):
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if scoring:
            self._scored = as_scored(result)
        elif self._loss_inputs is not None:
            self._at_update(self._loss_inputs, result)
        return result

    def _tapped(self, scoring: bool, model: Any, ids: Any, mask: Any, width: int, *_: Any, **__: Any) -> Any:
        """Around a pass of TRL's that serves our fields; a separate reference model serves none."""
        reference = self._scored is not None and not scoring
        in_loss = self._loss_inputs is not None and self._tap_loss
        if not (scoring or in_loss or (reference and self.ref_model is None)):
            return nullcontext()
        return self._taps.around(self.model, width, reference=reference)

    @property
    def _tap_loss(self) -> bool:
        """Whether the forward of the loss is the first of TRL's passes that sees the policy."""
        return self.timing == "update" and not self._scores_old_policy()

    def _scores_old_policy(self) -> bool:
        """TRL's own condition for computing old log-probs of a rollout batch."""
        every = self.args.steps_per_generation * self.num_iterations
        correction = self.use_vllm and self.vllm_importance_sampling_correction
        return bool(self.args.gradient_accumulation_steps % every != 0 or correction)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if RowKeys.ROW not in inputs:
            return super()._compute_loss(model, inputs)
        self._loss_inputs = dict(inputs)  # a copy: the buffered dict is used again by later inner updates
        try:
            return super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None

    def _at_update(self, inputs: dict[str, Any], result: tuple[Any, ...]) -> None:
        """Assign credit from the forward of the loss, and keep a record of what is trained."""
        measured = as_scored(result)
        measured["current_logprobs"] = measured["old_logprobs"]
        measured |= self._of_loss(inputs)
        old = inputs.get("old_per_token_logps")
        if old is not None:
            measured["old_logprobs"] = old
        if self.timing == "rollout":  # what credit was assigned from stays what the record shows
            measured = {name: value for name, value in measured.items() if f"{RowKeys.FIELD}{name}" not in inputs}
        batch = self._token_batch(inputs, measured)
        if self.timing == "update" and not self.pipeline.is_identity:
            inputs["advantages"] = self._assign(batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) < self.args.steps_per_generation:
            self._tap(batch, inputs)

    def _of_loss(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        ids, mask = sequences(inputs)
        reference = inputs.get(RowKeys.REFERENCE)
        if reference is None and self._lacks_reference(inputs):
            self._tap_reference(inputs)
            reference = self._taps.kept_reference()
        with self.accelerator.autocast():
            return self._taps.of_loss(self.model, ids, mask, inputs["completion_ids"].size(1), reference)

    def _token_batch(self, inputs: dict[str, Any], measured: dict[str, Tensor]) -> TokenBatch:
        step = self.state.global_step
        batch = to_token_batch(
            inputs,
            measured,
            progress=min(1.0, step / max(1, self.state.max_steps)),
            reducer=self._reducer(),
            step=step,
        )
        if batch.response_mask.device.type != "mps":
            return batch
        # Apple GPUs have no float64, in which sums are taken.
        on_cpu: dict[str, Any] = {name: value.cpu() for name, value in batch.tensors().items()}
        return replace(batch, **on_cpu)

    def _reducer(self) -> Reducer:
        return LOCAL if self.accelerator.num_processes == 1 else ProcessGroupReducer()

    def _assign(self, batch: TokenBatch) -> Tensor:
        # The same stream on every rank and in every inner update of a rollout batch.
        every = self.args.steps_per_generation * self.num_iterations
        generator = seeds.generator("credit", int(self.args.seed), self._step // every) if self.pipeline.draws else None
        return assign_credit(self.pipeline, batch, generator=generator).to(self.accelerator.device)

    # -- side tap ------------------------------------------------------------------------------------------------------

    def _tap(self, batch: TokenBatch, inputs: dict[str, Any]) -> None:
        """Log and store what the first update of a rollout batch is trained on."""
        advantages = inputs["advantages"].detach().to(batch.response_mask.device)
        if advantages.ndim == 1:
            advantages = torch.where(batch.response_mask, advantages[:, None].expand(batch.response_mask.shape), 0.0)
        self._log_credit(batch, advantages)
        if self._recording and self.state.global_step % self._record_every == 0:
            self._record(batch, advantages, inputs)

    def _log_credit(self, batch: TokenBatch, advantages: Tensor) -> None:
        for name, value in credit_metrics(batch, advantages, batch.host_advantages).items():
            self._metrics["train"][name].append(value)

    def _record(self, batch: TokenBatch, advantages: Tensor, inputs: dict[str, Any]) -> None:
        """Keep this micro-batch; store the whole rollout batch of all ranks once it is complete."""
        prompts = prompt_texts(self._text_tokenizer, prompt_rows(inputs))
        config = self.pipeline.to_config()
        self._pieces.append(make_piece(self.state.global_step, config, batch, advantages, inputs, prompts))
        if len(self._pieces) < self.args.steps_per_generation:
            return
        pieces, self._pieces = self._pieces, []
        gathered = self._gather_pieces(pieces)
        if self.store is not None:
            self.store.append(merge_pieces(gathered, self._text_tokenizer))

    def _gather_pieces(self, pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.accelerator.num_processes == 1:
            return pieces
        return list(gather_object(pieces))
