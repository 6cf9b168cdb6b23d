"""What cannot work with verl is refused before workers start, with the option, its value and the remedy."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokencredit.adapters import versions
from tokencredit.adapters.verl.batch import SOURCES, stored_names
from tokencredit.adapters.verl.names import MODES, PREFIX
from tokencredit.adapters.verl.settings import CreditSettings, section_of
from tokencredit.batch.records import COLLECTORS
from tokencredit.collect.table import fields_of
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.pipeline import Pipeline

check_versions = functools.partial(versions.check_versions, "verl")

# Advantages that differ between the tokens of a response, from a critic or a token baseline.
TOKEN_ESTIMATORS = ("gae", "optimal_token_baseline", "tir_optimal_token_baseline")
ACTOR = "actor_rollout_ref.actor"
ENGINES = ("fsdp", "fsdp2")  # whose forward step answers for signals

GUARDED: set[type] = set()  # verl's trainers that refuse credit, in this process


def check_all(pipeline: Pipeline, settings: CreditSettings, config: DictConfig) -> str:
    """Every refusal that needs no worker; the timing that "auto" stands for."""
    check_versions()
    timing = resolve_timing(pipeline, settings.timing)
    check_algorithm(pipeline, config)
    check_fields(pipeline, settings, config)
    check_signals(pipeline, timing, config)
    if timing == "update":
        check_update(pipeline, settings, config)
    return timing


def resolve_timing(pipeline: Pipeline, timing: str) -> str:
    """ "rollout" or "update"; the loss sees micro-batches, so "update" is for methods that stay inside a response."""
    current = "current_logprobs" in pipeline.requires
    if timing == "rollout" and current:
        raise TokenCreditError(
            f"{pipeline.name} needs the policy that is being updated, got credit.timing='rollout'",
            hint="leave credit.timing=auto, or set it to update",
        )
    return "update" if timing == "update" or current else "rollout"


def check_update(pipeline: Pipeline, settings: CreditSettings, config: DictConfig) -> None:
    """What the actor's loss cannot do."""
    if pipeline.scope in ("group", "batch"):
        raise TokenCreditError(
            f"{pipeline.name} looks at whole groups, which verl's loss never sees; got credit.timing='update'",
            hint="use credit.timing=rollout; a method that needs the current policy cannot be combined with it in verl",
        )
    if pipeline.draws:
        raise TokenCreditError(
            f"{pipeline.name} draws random numbers, which ranks and inner updates would draw differently in the loss",
            hint="use credit.timing=rollout",
        )
    if settings.records is not None:
        raise TokenCreditError(
            f"credit.records={settings.records!r} is written on the driver, which does not see the credit of "
            f"{pipeline.name}: the loss assigns it",
            hint="leave credit.records out, or use a method that needs no current policy",
        )
    if OmegaConf.select(config, "distillation.enabled"):
        raise TokenCreditError(
            f"{pipeline.name} runs in the loss, and distillation.enabled=True puts another loss there",
            hint="set distillation.enabled=False",
        )


def check_algorithm(pipeline: Pipeline, config: DictConfig) -> None:
    """Estimators, losses and modes under which token credit is lost or means something else."""
    if pipeline.is_identity:
        return
    estimator = str(getattr(config.algorithm.adv_estimator, "value", config.algorithm.adv_estimator))
    if estimator in TOKEN_ESTIMATORS:
        raise TokenCreditError(
            f"algorithm.adv_estimator={estimator} gives every token its own advantage, {pipeline.name} starts from one "
            "a response",
            hint="set algorithm.adv_estimator=grpo (or rloo, opo, reinforce_plus_plus_baseline)",
        )
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        raise TokenCreditError(
            f"algorithm.rollout_correction.bypass_mode=True skips verl's scoring pass, so {pipeline.name} would see no "
            "entropies and the log-probs of the rollout engine instead of the policy's",
            hint="set algorithm.rollout_correction.bypass_mode=False",
        )
    if OmegaConf.select(config, f"{ACTOR}.policy_loss.loss_mode") == "geo_mean":
        raise TokenCreditError(
            f"{ACTOR}.policy_loss.loss_mode=geo_mean averages a response's advantages, which erases token credit",
            hint="set loss_mode=vanilla, gspo, sapo or cispo",
        )
    group = pipeline.scope in ("group", "batch") or pipeline.chains[0].estimator.spec.is_host_baseline
    if group and int(config.actor_rollout_ref.rollout.n) < 2:
        raise TokenCreditError(
            f"actor_rollout_ref.rollout.n must be at least 2 for {pipeline.name}, got "
            f"{config.actor_rollout_ref.rollout.n}: a group of one has no baseline",
            hint="set actor_rollout_ref.rollout.n=8",
        )


def check_fields(pipeline: Pipeline, settings: CreditSettings, config: DictConfig) -> None:
    """Every required field must have a source among verl's workers."""
    for name in sorted(pipeline.requires - SOURCES.keys() - {"current_logprobs", "host_advantages", "step"}):
        raise TokenCreditError(
            f"{pipeline.name} needs `{name}`, which nothing in verl supplies",
            hint=f"train with TRL (`CreditGRPOTrainer`); there it comes from: {COLLECTORS[name]}",
        )
    reference = any(OmegaConf.select(config, key) for key in (f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward"))
    if "ref_log_prob" in stored_names(pipeline.requires, settings.teacher).values() and not reference:
        raise TokenCreditError(
            f"{pipeline.name} needs verl's reference worker, which {ACTOR}.use_kl_loss=False leaves out",
            hint=SOURCES["ref_logprobs"][1],
        )
    if "teacher_logprobs" in pipeline.requires and settings.teacher == "distillation":
        _check_teacher(pipeline, config)
    chunked = OmegaConf.select(config, f"{ACTOR}.entropy_from_logits_with_chunking")
    if "entropies" in pipeline.requires and not chunked:
        warnings.warn(
            f"entropies of bf16 logits are off by up to 0.2 nat; set {ACTOR}.entropy_from_logits_with_chunking=True",
            stacklevel=3,
        )


def check_signals(pipeline: Pipeline, timing: str, config: DictConfig) -> None:
    """Signals of hidden states come from the FSDP engine, whole sequences at a time, in verl's scoring pass."""
    wanted = sorted(pipeline.requires & fields_of(verl="tapped"))
    if not wanted:
        return
    who = f"{pipeline.name} needs {' and '.join(f'`{name}`' for name in wanted)}"
    strategy = OmegaConf.select(config, f"{ACTOR}.strategy")
    if strategy not in ENGINES:
        raise TokenCreditError(
            f"{who} from the workers, got {ACTOR}.strategy={strategy}", hint=f"set {ACTOR}.strategy=fsdp or fsdp2"
        )
    for key in (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"):
        if (OmegaConf.select(config, key) or 1) > 1:
            raise TokenCreditError(f"{who} of whole sequences, got {key}={OmegaConf.select(config, key)}", hint="set 1")
    if "adapter_residuals" in wanted and not trains_lora(config):
        raise TokenCreditError(
            f"{who}, and the policy has no adapter: actor_rollout_ref.model.lora_rank=0",
            hint="set actor_rollout_ref.model.lora_rank=16 (and lora_alpha), or train with TRL",
        )
    if timing == "update":
        raise TokenCreditError(
            f"{who}, which the driver reads from the scoring pass; got credit.timing='update'",
            hint="use credit.timing=rollout",
        )


def trains_lora(config: DictConfig) -> bool:
    """Whether verl's FSDP engine trains an adapter: `lora_rank` alone decides, not `lora.rank` or an adapter's path."""
    return (OmegaConf.select(config, "actor_rollout_ref.model.lora_rank") or 0) > 0


def _check_teacher(pipeline: Pipeline, config: DictConfig) -> None:
    if not OmegaConf.select(config, "distillation.enabled"):
        raise TokenCreditError(
            f"{pipeline.name} needs a teacher, got distillation.enabled=False", hint=SOURCES["teacher_logprobs"][1]
        )
    loss = config.distillation.distillation_loss
    if not loss.use_task_rewards:
        raise TokenCreditError(
            "distillation.distillation_loss.use_task_rewards=False drops the policy loss, and the credit with it",
            hint="set use_task_rewards=True and distillation_loss_coef=0",
        )
    if "topk" in loss.loss_mode:
        raise TokenCreditError(
            f"distillation.distillation_loss.loss_mode={loss.loss_mode} stores no log-prob of the sampled token",
            hint="set distillation.distillation_loss.loss_mode=k1",
        )
    if loss.distillation_loss_coef != 0:
        warnings.warn(
            f"verl adds its own distillation loss (distillation_loss_coef={loss.distillation_loss_coef}) to "
            f"{pipeline.name}; set it to 0 to train on credit alone",
            stacklevel=4,
        )


def with_builtin_mode(config: DictConfig, mode: str) -> DictConfig:
    """The config as verl's own trainer wants it: any other mode name would make it an asynchronous trainer."""
    merged = OmegaConf.merge(config, {"trainer": {"v1": {"trainer_mode": mode}}})
    assert isinstance(merged, DictConfig)
    return merged


def guard(trainer: type, credited: Callable[[Any], bool]) -> None:
    """Make `trainer` refuse a config that asks for credit which this trainer would not assign."""
    original = trainer.__init__
    if trainer in GUARDED:
        return
    GUARDED.add(trainer)

    @functools.wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs["config"] if "config" in kwargs else args[0]
        if not credited(self):
            refuse_uncredited(config)
        original(self, *args, **kwargs)

    trainer.__init__ = guarded


def refuse_uncredited(config: DictConfig) -> None:
    """Raise where the config asks for credit and one of verl's own trainers was chosen."""
    mode = str(OmegaConf.select(config, "trainer.v1.trainer_mode"))
    if section_of(config) is None and not mode.startswith(PREFIX):
        return
    if not OmegaConf.select(config, "trainer.use_v1", default=True):
        raise TokenCreditError(
            "trainer.use_v1=False is verl's old trainer, which drops entropies before advantages and assigns no credit",
            hint=f"set trainer.use_v1=True and trainer.v1.trainer_mode={PREFIX}sync",
        )
    raise TokenCreditError(
        f"the config has a `credit` group, but trainer.v1.trainer_mode={mode} assigns no credit",
        hint=f"set trainer.v1.trainer_mode to one of {', '.join(PREFIX + name for name in MODES)}",
    )
