"""What cannot work with TRL is refused before training, with the option, its value and the remedy."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokencredit.adapters import versions
from tokencredit.batch.records import COLLECTORS
from tokencredit.collect.table import fields_of
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.pipeline.pipeline import Pipeline

SUPPORTED = versions.SUPPORTED["trl"]
check_versions = partial(versions.check_versions, "trl")

HOST_FIELDS = fields_of(trl="host")  # fields that TRL's own passes supply, with no collector
ADAPTER_FIELDS = fields_of(needs="adapter") - HOST_FIELDS  # only a LoRA model has them

# With a ratio per sequence these losses see only the sum of a row's advantages.
ERASED_BY_SEQUENCE_RATIO = ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo")


def check_all(
    pipeline: Pipeline, timing: Any, collected: Iterable[str], config: Any, *, native_adapter: bool = False
) -> str:
    """Every refusal that needs no trainer; the timing that "auto" stands for."""
    check_versions()
    timing = resolve_timing(timing, pipeline, config)
    check_adapter_fields(pipeline, collected, native=native_adapter)
    host = HOST_FIELDS if getattr(config, "beta", 0.0) else HOST_FIELDS - {"ref_logprobs"}
    check_fields(pipeline, host | set(collected), config)
    check_config(pipeline, config)
    return timing


def resolve_timing(timing: Any, pipeline: Pipeline, config: Any) -> str:
    """ "update" or "rollout"; refuses "update" where whole groups would be cut apart."""
    if timing not in ("auto", "update", "rollout"):
        raise unknown("timing", timing, ("auto", "update", "rollout"))
    split = _steps_per_generation(config) > 1
    cuts_groups = split and pipeline.scope in ("group", "batch")
    current = "current_logprobs" in pipeline.requires
    if timing == "update" and cuts_groups:
        raise TokenCreditError(
            f"timing='update' needs steps_per_generation=1 for {pipeline.name}, which looks at whole groups; "
            f"got steps_per_generation={_steps_per_generation(config)}",
            hint="use timing='rollout', or steps_per_generation=1",
        )
    if timing == "rollout" and current:
        raise TokenCreditError(f"{pipeline.name} needs the policy that is being updated", hint="use timing='update'")
    if timing == "auto":
        return "rollout" if cuts_groups or (_several_updates(config) and not current) else "update"
    return timing


def _steps_per_generation(config: Any) -> int:
    """TRL's default is `gradient_accumulation_steps`, resolved when the config is built."""
    return int(getattr(config, "steps_per_generation", None) or 1)


def _several_updates(config: Any) -> bool:
    """Whether a rollout batch serves several optimizer steps; then credit is that of the policy that sampled."""
    if config is None:
        return False
    every = _steps_per_generation(config) * int(config.num_iterations)
    return int(config.gradient_accumulation_steps) % every != 0


def has_adapter(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of a trainer bring a PEFT adapter: a `peft_config`, or a `PeftModel`.

    Adapters of transformers' own `add_adapter` do not count: they have no `disable_adapter`.
    """
    model = _model_of(args, kwargs)
    return kwargs.get("peft_config") is not None or hasattr(model, "get_base_model")


def has_native_adapter(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model has an adapter of transformers' own `add_adapter`."""
    model = _model_of(args, kwargs)
    native = getattr(model, "_hf_peft_config_loaded", False)
    return bool(native) and not hasattr(model, "get_base_model")


def _model_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return kwargs["model"] if "model" in kwargs else next(iter(args), None)


def check_adapter_fields(pipeline: Pipeline, collected: Iterable[str], *, native: bool = False) -> None:
    """Fields that only an adapter gives, where there is none and no collector of your own."""
    for name in sorted((pipeline.requires & ADAPTER_FIELDS) - set(collected)):
        if native:
            raise TokenCreditError(
                f"{pipeline.name} needs `{name}`, and this model's adapter is one of `add_adapter`, which cannot be "
                "switched off for a single pass",
                hint="wrap the plain model with `peft.get_peft_model`, or give `peft_config=` to the trainer",
            )
        raise TokenCreditError(
            f"{pipeline.name} needs `{name}`, and this model has no LoRA adapter",
            hint="train with LoRA (`lora:` in a config, `peft_config=` here), or bring a collector of your own",
        )


def check_fields(pipeline: Pipeline, available: Iterable[str], config: Any) -> None:
    """Every required field must have a source."""
    available = set(available)
    if not getattr(config, "use_vllm", False):
        available -= {"rollout_logprobs"}
    for name in sorted(pipeline.requires - available):
        raise TokenCreditError(
            f"{pipeline.name} needs `{name}`, which nothing here supplies", hint=f"it comes from: {COLLECTORS[name]}"
        )


def check_config(pipeline: Pipeline, config: Any) -> None:
    """Refuse settings under which token credit is erased; warn where it is only changed."""
    if config is None or pipeline.is_identity:
        return
    level = getattr(config, "importance_sampling_level", "token")
    if level == "sequence" and config.loss_type in ERASED_BY_SEQUENCE_RATIO:
        raise TokenCreditError(
            f"importance_sampling_level='sequence' with loss_type={config.loss_type!r} erases token credit: "
            "only the sum of a response's advantages reaches the gradient",
            hint="set importance_sampling_level='token', or loss_type='cispo' or 'vespo'",
        )
    # TRL 1.16 applies Liger's layer kernels and keeps its own loss; before, Liger's loss took one number per response.
    if getattr(config, "use_liger_kernel", False) and _has_liger_loss():
        raise TokenCreditError(
            "use_liger_kernel=True replaces the loss by one that takes one advantage per response in this TRL",
            hint="set use_liger_kernel=False, or pip install 'trl>=1.16'",
        )
    if getattr(config, "top_entropy_quantile", 1.0) < 1.0:
        warnings.warn(
            f"top_entropy_quantile={config.top_entropy_quantile} masks tokens a second time, after {pipeline.name}",
            stacklevel=3,
        )
    if getattr(config, "multi_objective_aggregation", "") == "normalize_then_sum":
        warnings.warn("normalize_then_sum: the advantages of a group no longer sum to zero", stacklevel=3)


def _has_liger_loss() -> bool:
    from trl import GRPOTrainer  # `tokencredit doctor` reads this module where TRL may be missing

    return hasattr(GRPOTrainer, "compute_liger_loss")


def check_records(folder: Any, every: Any) -> None:
    """Records are written into a folder, every so many steps."""
    if folder is not None and not isinstance(folder, str | Path):
        raise TokenCreditError(f"`records` must be a folder, got {folder!r}", hint="for example records='run/records'")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise TokenCreditError(f"`record_every` must be a whole number of at least 1, got {every!r}")


def checkpointing_field(config: type) -> str:
    """The name under which a config of TRL holds gradient checkpointing: transformers 6 changes it."""
    names = {field.name for field in dataclasses.fields(config)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
