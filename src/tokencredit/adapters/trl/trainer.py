"""TRL: `CreditGRPOTrainer` is `GRPOTrainer` with one tensor changed, the advantages.

    _generate_and_score_completions                    _compute_loss, for each micro-batch and inner update
      TRL samples and scores      `_inside` Scoring      TRL runs its forward           `_inside` Updating
        first pass: the policy ─▶ scores, taps             the same forward ─▶ log-probs, entropies, taps
        later pass: the reference ─▶ taps                  timing "update": assign ─▶ inputs["advantages"]
      the other fields: taps, then collectors            TRL computes its loss from inputs["advantages"]
      timing "rollout": assign ─▶ output["advantages"]   first update of a rollout batch: log it, record it
                 └──── TRL shuffles the rows and hands them on, our fields under `RowKeys` ────┘

At the rollout groups are whole and credit stays fixed over inner updates; in the update credit costs no forward. With
an identity pipeline the host's tensor is handed on untouched.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tokencredit import seeds
from tokencredit.adapters.trl import checks as trl_checks
from tokencredit.adapters.trl.batch import RolloutRecorder, RowKeys, row_keys, sampler_scores, to_token_batch
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
from tokencredit.collect.models import is_sharded
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.table import fields_of, resolve_options
from tokencredit.collect.teacher.prompts import first_rows
from tokencredit.diagnostics.summary import CreditSums, credit_sums
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline


@dataclass
class Scoring:
    """TRL samples and scores a rollout batch; `scores` are those of its first pass, which is the policy's."""

    scores: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Updating:
    """TRL computes the loss of a micro-batch from `inputs`, a copy: later inner updates use the buffered ones again."""

    inputs: dict[str, Any]


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
        self._inside: Scoring | Updating | None = None  # what TRL is doing, where its passes serve us
        self._taps = PassTaps((), options)
        self._unread: list[CreditSums] = []  # of micro-batches since the last log
        super().__init__(*args, **kwargs)
        self.reward_funcs: list[Any] = guard_rewards(self.reward_funcs)  # also those of environments
        if not self.use_vllm and getattr(self, "rollout_func", None) is None:
            warn_of_shipped(self.model, self.generation_config)
        self._recorder: RolloutRecorder | None = None
        if records is not None:
            self._recorder = RolloutRecorder(records, record_every, self.accelerator, self._text_tokenizer)
        # Compiled code may have been built without our hooks, and then does not call them.
        if not draws_dropout(self.model) and not self.args.torch_compile:
            self._taps = PassTaps((fields_of(trl="tapped") & self.pipeline.requires) - own.keys(), options)
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
    def store(self) -> RecordStore | None:
        """Where the main process keeps records."""
        return None if self._recorder is None else self._recorder.store

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
        self._inside = scoring = Scoring()
        self._taps.clear()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._inside = None
        if self.pipeline.is_identity and self._recorder is None:
            return output
        output.update(self._row_keys(output))
        at_rollout = self.timing == "rollout" and not self.pipeline.is_identity
        if at_rollout:
            measured = self._measure_old_policy(output, scoring.scores or self._sampled(output, inputs))
            output |= {f"{RowKeys.FIELD}{name}": value for name, value in measured.items()}
        self._collect(output, inputs)
        if at_rollout:
            output["advantages"] = self._assign(self._token_batch(output, {}))
        return output

    def _row_keys(self, output: dict[str, Any]) -> dict[str, Tensor]:
        assert self._rewards is not None
        rows = len(output["advantages"])
        first = self.accelerator.process_index * rows
        own = slice(first, first + rows)
        return row_keys(self._rewards, self.reward_weights, own, self.num_generations, output["advantages"])

    def _collect(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Fields that the log-probs do not give: from tapped passes, from the loss later on, or from collectors."""
        fields = self._read_taps(output)
        states = self._taps.kept_reference() if self._tap_loss else None
        if states is not None:
            output[RowKeys.REFERENCE] = states
        self._taps.clear()
        missing = (self.pipeline.requires & self.collectors.keys()) - fields.keys()
        if self.beta != 0.0:
            missing -= {"ref_logprobs"}  # TRL has them
        if self._tap_loss:
            missing -= self._taps.fields
        rollout = self._rollout(output, inputs)
        for name in sorted(missing):
            with torch.no_grad():
                fields[name] = self.collectors[name](rollout)
        for name, value in sorted(rollout.metrics.items()):
            shares = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device))
            self._metrics["train"][f"credit/{name}"].append(float(shares.mean()))
        output |= {f"{RowKeys.FIELD}{name}": value for name, value in fields.items()}

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
            teacher=self.teacher,
        )

    def _read_taps(self, output: dict[str, Any]) -> dict[str, Tensor]:
        if self._lacks_reference(output):
            self._tap_reference(output)
        with torch.no_grad(), self.accelerator.autocast():
            return self._taps.read_rollout(self.model, sequences(output), self.args.per_device_train_batch_size)

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
        """What the sampler measured; under mixed precision another policy's: it does not run under autocast."""
        return sampler_scores(output, inputs) if self.accelerator.mixed_precision == "no" else {}

    def _measure_old_policy(self, output: dict[str, Any], scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-probs and entropies of the policy that sampled: TRL's own pass, or one more without gradient."""
        names = self.pipeline.requires & {"entropies", "old_logprobs"}
        if not names:
            return {}
        if not scores:
            with self._taps.around(self.model, output["completion_ids"].size(1)):
                scores = score_rows(self, output)
        return {name: scores[name] for name in names}

    # -- update --------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's scoring pass, which also runs the forward of the loss; its result serves what `_inside` is for."""
        inside = self._inside
        of_policy = isinstance(inside, Scoring) and not inside.scores and self._scores_old_policy()
        if of_policy:
            kwargs["compute_entropy"] = True
        with self._tapped(of_policy, width=args[3]):
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if isinstance(inside, Updating):
            self._at_update(inside.inputs, result)
        elif isinstance(inside, Scoring) and of_policy:
            inside.scores = as_scored(result)
        return result

    def _tapped(self, of_policy: bool, width: int) -> Any:
        """Around a pass of TRL's that serves our fields; a separate reference model serves none."""
        reference = isinstance(self._inside, Scoring) and not of_policy
        in_loss = isinstance(self._inside, Updating) and self._tap_loss
        if not (of_policy or in_loss or (reference and self.ref_model is None)):
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
        self._inside = updating = Updating(dict(inputs))
        try:
            return super()._compute_loss(model, updating.inputs)
        finally:
            self._inside = None

    def _at_update(self, inputs: dict[str, Any], result: tuple[Any, ...]) -> None:
        """Assign credit from the forward of the loss, and keep a record of what is trained."""
        measured = as_scored(result)
        measured["current_logprobs"] = measured["old_logprobs"]
        measured |= self._read_loss_taps(inputs)
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

    def _read_loss_taps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        reference = inputs.get(RowKeys.REFERENCE)
        if reference is None and self._lacks_reference(inputs):
            self._tap_reference(inputs)
            reference = self._taps.kept_reference()
        with self.accelerator.autocast():
            return self._taps.read_loss(self.model, sequences(inputs), reference)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the numbers of the credit, which wait on the device until somebody reads them."""
        unread, self._unread = self._unread, []
        for sums in unread:
            for name, value in sums.numbers().items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)

    def _tap(self, batch: TokenBatch, inputs: dict[str, Any]) -> None:
        """Log and store what the first update of a rollout batch is trained on."""
        advantages = inputs["advantages"].detach().to(batch.response_mask.device)
        if advantages.ndim == 1:
            advantages = torch.where(batch.response_mask, advantages[:, None].expand(batch.response_mask.shape), 0.0)
        self._unread.append(credit_sums(batch, advantages, batch.host_advantages))
        if self._recorder is not None and self._recorder.records(self.state.global_step):
            config, pieces = self.pipeline.to_config(), self.args.steps_per_generation
            self._recorder.add(batch, advantages, inputs[RowKeys.ROW], prompt_rows(inputs), config, pieces)
