"""What cannot work with TRL is refused before training, with the option, its value and the remedy."""

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from tokencredit.credit import Pipeline
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.records import COLLECTORS

SUPPORTED = (1, 5), (2, 0)  # TRL versions: from, and before

# Fields that TRL's own passes supply, with no collector.
HOST_FIELDS = frozenset(
    {"entropies", "old_logprobs", "current_logprobs", "rollout_logprobs", "ref_logprobs", "host_advantages", "step"}
)

ADAPTER_FIELDS = frozenset({"adapter_residuals", "doubling_ratios"})  # only a LoRA model has them

# With a ratio per sequence these losses see only the sum of a row's advantages.
ERASED_BY_SEQUENCE_RATIO = ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo")


def check_versions(installed: str | None = None) -> None:
    """Refuse a TRL whose private seams this adapter was not written for."""
    installed = installed or version("trl")
    numbers = tuple(int(part) for part in installed.split(".")[:2])
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise TokenCreditError(
            f"TRL {installed} is outside the supported range >=1.5,<2", hint="pip install 'trl>=1.5,<2'"
        )


def check_all(pipeline: Pipeline, timing: str, collected: Iterable[str], config: Any) -> str:
    """Every refusal that needs no trainer; the timing that "auto" stands for."""
    check_versions()
    timing = resolve_timing(timing, pipeline, config)
    check_adapter_fields(pipeline, collected)
    host = HOST_FIELDS if getattr(config, "beta", 0.0) else HOST_FIELDS - {"ref_logprobs"}
    check_fields(pipeline, host | set(collected), config)
    check_config(pipeline, config)
    return timing


def resolve_timing(timing: str, pipeline: Pipeline, config: Any) -> str:
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
    """Whether the arguments of a trainer bring an adapter: a `peft_config`, or a model that has one."""
    models = (kwargs.get("model"), *args[:1])
    return kwargs.get("peft_config") is not None or any(hasattr(model, "peft_config") for model in models)


def check_adapter_fields(pipeline: Pipeline, collected: Iterable[str]) -> None:
    """Fields that only an adapter gives, where there is none and no collector of your own."""
    for name in sorted((pipeline.requires & ADAPTER_FIELDS) - set(collected)):
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
    if getattr(config, "use_liger_kernel", False):
        raise TokenCreditError(
            "use_liger_kernel=True expects one advantage a response", hint="set use_liger_kernel=False"
        )
    if getattr(config, "top_entropy_quantile", 1.0) < 1.0:
        warnings.warn(
            f"top_entropy_quantile={config.top_entropy_quantile} masks tokens a second time, after {pipeline.name}",
            stacklevel=3,
        )
    if getattr(config, "multi_objective_aggregation", "") == "normalize_then_sum":
        warnings.warn("normalize_then_sum: the advantages of a group no longer sum to zero", stacklevel=3)


def guard_rewards(functions: Any) -> Any:
    """Reward functions that refuse NaN and infinity; None still means "not scored", as in TRL."""
    if isinstance(functions, list):
        return [guard_rewards(function) for function in functions]
    plain = inspect.isfunction(functions) or inspect.ismethod(functions) or isinstance(functions, functools.partial)
    if not plain or inspect.iscoroutinefunction(functions):
        return functions
    return _guarded(functions)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    name = getattr(function, "__name__", "reward")

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        rewards = function(*args, **kwargs)
        for row, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise TokenCreditError(
                    f"reward function {name!r} gave {float(reward)} for row {row} of its batch",
                    hint="return a finite number, or None for a response that cannot be scored",
                )
        return rewards

    guarded.__name__ = name
    return guarded


def checkpointing_field(config: type) -> str:
    """The name under which a config of TRL holds gradient checkpointing: transformers 6 changes it."""
    names = {field.name for field in dataclasses.fields(config)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
