"""The config of a run: YAML in, one resolved mapping out. Unknown keys are errors that name the nearest key."""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError, shown, unknown
from tokencredit.files import parse_yaml, read_yaml
from tokencredit.lab.tasks import TASKS
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.pipeline.plugins import add_search_folder
from tokencredit.runs.config.defaults import (
    check_trainer_fields,
    is_lab_model,
    move_to_config,
    prompts_per_step,
    trainer_defaults,
    trainer_field_hint,
)
from tokencredit.runs.config.types import Reward, check_types, plain_value, reward_list

__all__ = ["DEFAULTS", "Reward", "load_config", "resolve_config", "reward_list"]

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
    "prompts_per_step": None,  # 32 for a lab model, 8 for any other
    "sampler": "auto",  # auto, fast (the lab's), host (TRL's); auto takes the lab's for lab models only
    "threads": None,  # torch threads; 1 for a lab model, which gains nothing from more, else null: torch decides
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

MOST_PROMPTS = 1_000_000  # drawn from a lab task before a run starts: about 3 ms each


def load_config(source: str | Path | Mapping[Any, Any], overrides: list[str] | None = None) -> dict[str, Any]:
    """Resolve a config from a YAML file or a mapping.

    Args:
      source: a path or a mapping. The folder of a file, and the current folder, are added to the end of `sys.path`, so
        that `module:function` finds modules beside the config.
      overrides: texts `section.key=value`; values are read as YAML.
    """
    if isinstance(source, Mapping):
        given = plain_value(source)
    else:
        given = _read_file(Path(source))
        _add_import_folders(Path(source))
    done: list[str] = []
    for item in overrides or []:
        _override(given, item, done)
    return resolve_config(given)


def resolve_config(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Fill in defaults, check keys and types, and parse the credit once so that its errors come first."""
    given = plain_value(given)
    resolved = copy.deepcopy(DEFAULTS)
    for key, value in given.items():
        if key not in DEFAULTS:
            raise _unknown_key(key)
        resolved[key] = _section(key, value) if isinstance(DEFAULTS[key], dict) else value
    check_types(resolved)
    Pipeline.parse(resolved["credit"])
    check_trainer_fields(resolved["trainer"])
    move_to_config(resolved, given)
    _check_source(resolved)
    _fill_in_by_model(resolved)
    check_types(resolved)
    _check_rewards(resolved)
    _check_collectors(resolved["collectors"])
    return resolved


def _fill_in_by_model(config: dict[str, Any]) -> None:
    lab = is_lab_model(config["model"])
    if config["prompts_per_step"] is None:
        config["prompts_per_step"] = prompts_per_step(config["model"])
    if config["threads"] is None and lab:
        config["threads"] = 1
    defaults = trainer_defaults(lab=lab, lora=config["lora"] is not None, task=config["task"] is not None)
    config["trainer"] = defaults | config["trainer"]
    prompts = config["steps"] * config["prompts_per_step"]
    if config["task"] is not None and config["dataset"]["count"] is None and prompts > MOST_PROMPTS:
        raise TokenCreditError(
            f"{config['steps']} steps × {config['prompts_per_step']} prompts are {prompts:,} problems to draw before "
            f"the first step; at most {MOST_PROMPTS:,}",
            hint="set dataset.count, for example --set dataset.count=10000: the problems then repeat",
        )


def _section(key: str, value: Any) -> Any:
    if value is None:
        return copy.deepcopy(DEFAULTS[key])
    if not isinstance(value, Mapping):
        raise TokenCreditError(f"config section `{key}` must be a mapping, got {shown(value)}")
    value = dict(value)
    if key in OPEN_SECTIONS:
        return value
    if key == "dataset" and "name" in value:
        name = value.pop("name")
        if value.setdefault("config", name) != name:
            raise TokenCreditError(f"`dataset.name` is {shown(name)} and `dataset.config` {shown(value['config'])}")
    for name in value:
        if name not in DEFAULTS[key]:
            raise unknown(f"key in config section `{key}`", name, DEFAULTS[key])
    return DEFAULTS[key] | value


def _unknown_key(key: str) -> TokenCreditError:
    error = unknown("config key", key, DEFAULTS)
    sections = [name for name, default in DEFAULTS.items() if isinstance(default, dict) and key in default]
    hint = f"`{sections[0]}.{key}`" if sections else trainer_field_hint(key)
    return TokenCreditError(error.message, hint=f"write {hint}") if hint else error


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise TokenCreditError(
            f"no config file {str(path)!r}", hint="for example `tokencredit train examples/quickstart.yaml`"
        )
    loaded = read_yaml(path, "config file")
    if not isinstance(loaded, dict):
        raise TokenCreditError(f"{path} must hold a mapping of config keys, got {type(loaded).__name__}")
    plain: dict[str, Any] = plain_value(loaded)
    return plain


def _add_import_folders(config: Path) -> None:
    """Last on the path, so that no file hides an installed module; worker processes inherit the path."""
    add_search_folder(config.absolute().parent)
    for folder in (str(Path.cwd()), str(config.absolute().parent)):
        if folder not in sys.path:
            sys.path.append(folder)


def _override(given: dict[str, Any], item: str, done: list[str]) -> None:
    """Set one `a.b=value`; `credit.alpha=0.3` sets a hyperparameter of a preset."""
    path, equals, text = item.partition("=")
    path = path.strip()
    if not equals or not path:
        raise TokenCreditError(
            f"--set takes key=value, got {shown(item)}", hint="for example --set trainer.learning_rate=1e-4"
        )
    value = plain_value(parse_yaml(text, f"--set {shown(item)}"), f"--set {path}")
    lost = next((earlier for earlier in done if earlier.startswith(f"{path}.")), None)
    if lost is not None:
        raise TokenCreditError(
            f"`--set {path}=…` replaces all of `{path}`, and with it the earlier `--set {lost}=…`",
            hint=f"give --set {path}=… first",
        )
    done.append(path)
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
        if hyperparameters is None or isinstance(hyperparameters, Mapping):
            return {name: {**(hyperparameters or {}), key: value}}
    raise TokenCreditError(f"--set credit.{key} needs a preset name under `credit:`, got {shown(credit)}")


def _check_source(config: Mapping[str, Any]) -> None:
    task, dataset, reward = config["task"], config["dataset"]["path"], config["reward"]
    if task is None and dataset is None:
        raise TokenCreditError(
            "a config needs `task` or `dataset.path`",
            hint=f"`task: {sorted(TASKS)[0]}`, or `dataset: {{path: …}}` with `reward: module:function`",
        )
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    for name, given in (("dataset.path", dataset), ("reward", reward)):
        if task is not None and given is not None:
            raise TokenCreditError(
                f"`task: {task}` brings its own prompts and reward, and `{name}` is {shown(given)}",
                hint="leave out one of them",
            )
    if task is None and reward is None and not ignores_reward(config["credit"]):
        raise TokenCreditError("`dataset` needs `reward`", hint="`reward: module:function`, a TRL reward function")
    if task is None and is_lab_model(config["model"]):
        raise TokenCreditError(f"`dataset` needs `model`: a folder or a model name, got {config['model']!r}")


def ignores_reward(credit: Any) -> bool:
    """Tell whether a pipeline learns only from a teacher, so that a reward is logged and nothing else."""
    return all(chain.estimator.spec.ignores_reward for chain in Pipeline.parse(credit).chains)


def _check_rewards(config: Mapping[str, Any]) -> None:
    rewards, weights = reward_list(config["reward"]), config["trainer"].get("reward_weights")
    if weights is None or not rewards:
        return
    if not isinstance(weights, list) or len(weights) != len(rewards):
        raise TokenCreditError(
            f"`trainer.reward_weights` must be a list of {len(rewards)} numbers, one per reward, got {shown(weights)}"
        )
    if any(reward.weight != 1 for reward in rewards) and weights != [reward.weight for reward in rewards]:
        raise TokenCreditError(
            f"`reward` and `trainer.reward_weights` give different weights: {[reward.weight for reward in rewards]} "
            f"and {shown(weights)}",
            hint="leave out trainer.reward_weights",
        )


def _check_collectors(collectors: Mapping[str, Any]) -> None:
    from tokencredit.collect.table import resolve_options

    resolve_options(collectors)
