"""The config of a run: YAML in, one resolved mapping out. Unknown keys are errors that name the nearest key."""

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokencredit.adapters.trl_checks import checkpointing_field
from tokencredit.credit import Pipeline
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.lab.tasks import TASKS

# Every key with its default. A mapping under a key is a section; None stands for "not set".
DEFAULTS: dict[str, Any] = {
    "name": "run",
    "task": None,  # a lab task; or `dataset` and `reward`
    "model": "tiny",  # tiny, small, a folder or a model name
    "stage": "start",  # of a lab model: start, middle, late
    "credit": "grpo",
    "timing": "auto",
    "seed": 0,
    "steps": 60,
    "prompts_per_step": 32,
    "sampler": "auto",  # auto, fast (the lab's, for small models on the CPU), host (TRL's)
    "threads": 1,  # torch threads of a run; small models gain nothing from more
    "dataset": {
        "path": None,
        "config": None,  # of a data set on the hub, such as "main" of openai/gsm8k; `name` is accepted too
        "split": "train",
        "prompt": "prompt",
        "count": None,
        "evaluation": None,  # a path; None with `evaluation_split` means another split of `path`
        "evaluation_split": None,
        "system_prompt": None,  # text of a system turn before each prompt
        "chat": "auto",  # whether a plain-text prompt becomes a user turn; auto: if the tokenizer has a chat template
    },
    "reward": None,  # one or several, with weights; `reward_list` reads every form
    "lora": None,  # any field of peft's LoraConfig
    "teacher": None,  # see docs/teachers.md
    "collectors": {},  # by batch field: options, or module:function; see docs/configs.md
    "evaluation": {"every": 20, "problems": 100, "samples": 8, "threshold": 0.0},
    "records": {"every": 5},
    "trainer": {},  # any field of TRL's GRPOConfig
}

# Sections whose keys are not ours to list.
OPEN_SECTIONS = ("credit", "lora", "teacher", "collectors", "trainer")

# What suits a model of a million parameters on a CPU; `trainer:` overrides it.
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


def load_config(source: str | Path | Mapping[str, Any], overrides: list[str] | None = None) -> dict[str, Any]:
    """The resolved config of a YAML file or a mapping; `overrides` are `section.key=value`, values read as YAML."""
    given = dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for item in overrides or []:
        _override(given, item)
    return resolve_config(given)


def resolve_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults filled in, keys checked, credit parsed once so that its errors come first."""
    resolved = copy.deepcopy(DEFAULTS)
    for key, value in given.items():
        if key not in DEFAULTS:
            raise unknown("config key", key, DEFAULTS)
        resolved[key] = _section(key, value) if isinstance(DEFAULTS[key], dict) else value
    Pipeline.parse(resolved["credit"])
    _check_source(resolved)
    _check_numbers(resolved)
    resolved["trainer"] = trainer_defaults() | dict(resolved["trainer"])
    check_trainer_fields(resolved["trainer"])
    _check_collectors(resolved["collectors"])
    return resolved


def _section(key: str, value: Any) -> Any:
    if value is None:
        return copy.deepcopy(DEFAULTS[key])
    if not isinstance(value, Mapping):
        raise TokenCreditError(f"config section `{key}` must be a mapping, got {value!r}")
    if key in OPEN_SECTIONS:
        return dict(value)
    for name in value:
        if name not in DEFAULTS[key]:
            raise unknown(f"key in config section `{key}`", name, DEFAULTS[key])
    return DEFAULTS[key] | dict(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TokenCreditError(f"no config file {str(path)!r}", hint="`tokencredit train examples/countdown.yaml`")
    try:
        loaded = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise TokenCreditError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise TokenCreditError(f"{path} must hold a mapping of config keys, got {type(loaded).__name__}")
    return loaded


def _override(given: dict[str, Any], item: str) -> None:
    """Set one `a.b=value`; `credit.alpha=0.3` sets a hyperparameter of a preset."""
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise TokenCreditError(
            f"--set takes key=value, got {item!r}", hint="for example --set trainer.learning_rate=1e-4"
        )
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    keys = path.split(".")
    if keys[0] == "credit" and len(keys) > 1:
        given["credit"] = _override_credit(given.get("credit", DEFAULTS["credit"]), ".".join(keys[1:]), value)
        return
    target = given
    for key in keys[:-1]:
        inner = target.get(key)
        target[key] = dict(inner) if isinstance(inner, Mapping) else {}
        target = target[key]
    target[keys[-1]] = value


def _override_credit(credit: Any, key: str, value: Any) -> Any:
    if isinstance(credit, str):
        return {credit: {key: value}}
    if isinstance(credit, Mapping) and len(credit) == 1 and "weighted_sum" not in credit:
        (name, hyperparameters), *_ = credit.items()
        return {name: {**(hyperparameters or {}), key: value}}
    raise TokenCreditError(f"--set credit.{key} needs a preset name under `credit:`, got {credit!r}")


def _check_source(config: Mapping[str, Any]) -> None:
    task, dataset, reward = config["task"], config["dataset"]["path"], config["reward"]
    if task is None and dataset is None:
        raise TokenCreditError(
            "a config needs `task` or `dataset.path`",
            hint=f"`task: {sorted(TASKS)[0]}`, or `dataset: {{path: …}}` with `reward: module:function`",
        )
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    if task is None and reward is None and not _ignores_reward(config["credit"]):
        raise TokenCreditError("`dataset` needs `reward`", hint="`reward: module:function`, a TRL reward function")
    if task is None and config["model"] in ("tiny", "small"):
        raise TokenCreditError(f"`dataset` needs `model`: a folder or a model name, got {config['model']!r}")


def _ignores_reward(credit: Any) -> bool:
    """Whether a pipeline learns from a teacher alone, so that a reward would only be logged."""
    return all(chain.estimator.name == "teacher_log_ratio" for chain in Pipeline.parse(credit).chains)


def _check_numbers(config: Mapping[str, Any]) -> None:
    for name in ("steps", "prompts_per_step", "threads"):
        _positive(name, config[name])
    for name in ("every", "problems", "samples"):
        _positive(f"evaluation.{name}", config["evaluation"][name])
    if config["dataset"]["count"] is not None:
        _positive("dataset.count", config["dataset"]["count"])
    if not isinstance(config["records"]["every"], int) or config["records"]["every"] < 0:
        raise TokenCreditError(
            f"`records.every` must be a whole number of steps, 0 for no records, got {config['records']['every']!r}"
        )
    if config["sampler"] not in ("auto", "fast", "host"):
        raise unknown("sampler", config["sampler"], ("auto", "fast", "host"))
    if not isinstance(config["seed"], int) or isinstance(config["seed"], bool):
        raise TokenCreditError(f"`seed` must be a whole number, got {config['seed']!r}")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TokenCreditError(f"`{name}` must be a whole number of at least 1, got {value!r}")


def _check_collectors(collectors: Mapping[str, Any]) -> None:
    from tokencredit.adapters.collector_options import resolve_options

    resolve_options(collectors)


def trainer_defaults() -> dict[str, Any]:
    """Our defaults of GRPOConfig's fields; TRL checkpoints activations by default, which costs a tiny model a third."""
    from trl import GRPOConfig

    return TRAINER_DEFAULTS | {checkpointing_field(GRPOConfig): False}


def check_trainer_fields(trainer: Mapping[str, Any]) -> None:
    """Every key under `trainer:` must be a field of TRL's GRPOConfig."""
    from trl import GRPOConfig

    fields = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    for name in trainer:
        if name not in fields and name in TRAINER_DEFAULTS:
            raise TokenCreditError(f"this TRL has no trainer field {name!r}", hint="pip install -U trl transformers")
        if name not in fields:
            raise unknown("trainer field (TRL's GRPOConfig)", name, fields)
