"""The `trainer:` section: defaults of TRL's GRPOConfig by kind of model, and checks of its fields.

The lab's models have a million parameters and train on a CPU. Their learning rate ruins a pretrained model within five
steps, so the lab's defaults hold for `model: tiny` and `small` only, and every other model gets TRL's own.
"""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import Field

from tokencredit.adapters.trl.checks import checkpointing_field
from tokencredit.errors import TokenCreditError, shown
from tokencredit.lab.model import SIZES
from tokencredit.settings import Count, Number, fits, wrong_value

# For the lab's models; `trainer:` overrides it.
TRAINER_DEFAULTS: dict[str, Any] = {
    "num_generations": 16,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "loss_type": "dapo",
    "beta": 0.0,
    "temperature": 1.0,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 1,
    "report_to": [],
    "disable_tqdm": True,
}

# TRL's own values that are written into the resolved config, so that a run reads the same under a later TRL.
WRITTEN_OUT = (
    "num_generations",
    "learning_rate",
    "lr_scheduler_type",
    "loss_type",
    "beta",
    "temperature",
    "max_completion_length",
)

# Twenty times TRL's rate of full fine-tuning. LoRA needs at least ten times that rate, and peft's default `lora_alpha`
# of 8 scales an update to a quarter of what the usual 32 does.
LORA_LEARNING_RATE = 2e-5

# Every step is logged, and progress is shown by `tokencredit` instead of tqdm. Neither moves a number of the training.
SHOWN = {"logging_steps": 1, "disable_tqdm": True}

# Closer than TRL's annotations say.
RATE = Annotated[Number, Field(ge=0)]
CLOSER: dict[str, Any] = {
    "num_generations": Count,
    "max_completion_length": Count,
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "learning_rate": RATE,
    "temperature": Annotated[Number, Field(gt=0)],
    "beta": RATE,
}

# Fields that a key of the config sets.
CONFIG_KEYS = {"max_steps": "steps", "seed": "seed"}
REFUSED = {
    "num_train_epochs": "set `steps`: a run is as long as it says",
    "output_dir": "pass --out",
    "resume_from_checkpoint": "leave it out: the same command goes on from the last checkpoint",
    "eval_strategy": "use the `evaluation` section, which evaluates on dataset.evaluation every so many steps",
    "save_only_model": "set `save_strategy: 'no'` to keep only the model: without the optimizer nothing can resume",
    "do_eval": "use the `evaluation` section",
}
ALIASES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "group_size": "num_generations",
    "num_samples": "num_generations",
    "max_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "kl_coef": "beta",
    "scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "warmup": "warmup_steps",
}


def is_lab_model(model: object) -> bool:
    """Tell whether `model:` names a model that the lab builds."""
    return isinstance(model, str) and model in SIZES


def default_fields(*, lab: bool, lora: bool, task: bool) -> dict[str, Any]:
    """The `trainer:` section of a model of the lab, or of any other.

    Args:
      lab: the model is `tiny` or `small`. TRL checkpoints activations by default, which costs such a model a third.
      lora: adapters are trained instead of the whole model.
      task: prompts come from a task of the lab, which says itself how long a response can be.
    """
    from trl import GRPOConfig

    if lab:
        return TRAINER_DEFAULTS | {checkpointing_field(GRPOConfig): False}
    values = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    defaults = {name: getattr(values[name], "value", values[name]) for name in WRITTEN_OUT} | SHOWN
    if lora:
        defaults["learning_rate"] = LORA_LEARNING_RATE
    if task:
        del defaults["max_completion_length"]
    return defaults


def move_to_config(given: dict[str, Any]) -> dict[str, Any]:
    """Let `trainer.max_steps` stand for `steps`, and `trainer.seed` for `seed`; refuse two different values."""
    trainer = given.get("trainer")
    if not isinstance(trainer, Mapping):
        return given
    for field, key in CONFIG_KEYS.items():
        if field in trainer and given.setdefault(key, trainer[field]) != trainer[field]:
            raise TokenCreditError(
                f"`{key}` is {shown(given[key])} and `trainer.{field}` is {shown(trainer[field])}",
                hint=f"set only `{key}`",
            )
    return given | {"trainer": {name: value for name, value in trainer.items() if name not in CONFIG_KEYS}}


@cache
def _field_types() -> dict[str, Any]:
    from trl import GRPOConfig

    names = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    try:
        hints = get_type_hints(GRPOConfig)
    except NameError:  # an annotation that only a type checker can resolve
        hints = {}
    hints["scale_rewards"] = hints.get("scale_rewards", Any) | bool
    return {name: CLOSER.get(name, hints.get(name, Any)) for name in names}


def check_fields(trainer: Mapping[str, Any]) -> None:
    """Require that every key under `trainer:` is a field of TRL's GRPOConfig, and its value of the field's type."""
    fields = _field_types()
    for name, value in trainer.items():
        if name not in fields and name in TRAINER_DEFAULTS:
            raise TokenCreditError(f"this TRL has no trainer field {name!r}", hint="pip install -U trl transformers")
        if name not in fields:
            raise _unknown_field(name)
        if name in REFUSED and value not in (None, "no", False):
            raise TokenCreditError(f"`trainer.{name}` cannot be set here, got {shown(value)}", hint=REFUSED[name])
        if not fits(value, fields[name]):
            raise wrong_value(f"trainer.{name}", value, fields[name])


def _unknown_field(name: str) -> TokenCreditError:
    nearest = guess_field(name)
    guess = f", did you mean {nearest.removeprefix('`trainer.').rstrip('`')!r}?" if nearest else ""
    return TokenCreditError(
        f"unknown trainer field {name!r}{guess}", hint="`trainer` takes the fields of TRL's GRPOConfig"
    )


def guess_field(key: str) -> str | None:
    """The field of GRPOConfig that a key probably means, as `trainer.field`."""
    fields = _field_types()
    if key in fields:
        return f"`trainer.{key}`"
    if key.lower() in ALIASES:
        return f"`trainer.{ALIASES[key.lower()]}`"
    nearest = get_close_matches(key, sorted(fields), n=1, cutoff=0.7)
    return f"`trainer.{nearest[0]}`" if nearest else None
