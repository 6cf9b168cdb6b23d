"""From a config to what TRL's trainer takes: model, tokenizer, data, rewards. Everything is refused before training."""

from collections.abc import Callable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from tokencredit.collect.exact.values import ExactValues
from tokencredit.errors import unknown
from tokencredit.lab import data as lab_data
from tokencredit.lab.fused import fuse_norms
from tokencredit.lab.model import STAGES, warm_start
from tokencredit.lab.tasks import Problem, Task, get_task
from tokencredit.lab.teachers import with_lab_model
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.runs.data.datasets import load_evaluation, load_training, without_overlap
from tokencredit.runs.data.prompts import check_kinds, check_lengths, choose_wrapping, wrap
from tokencredit.runs.data.rewards import check_columns, load_reward, on_plain_text

MOST_RESPONSES = 256  # default length of a response where neither the task nor `trainer:` says one
TEACHER_ROWS = 64  # rows whose columns are checked against the teacher's template before a model is loaded


class Material(NamedTuple):
    """What a run trains and evaluates on.

    `rewards` are functions and reward models, `reward_weights` their weights. `evaluation` are the held-out rows, if
    any. `notes` are sentences about the data for the plan that is printed before the first step.
    """

    model: Any
    tokenizer: Any
    dataset: Any
    rewards: list[Any]
    max_response: int
    task: Task | None = None
    teacher: dict[str, Any] | None = None
    collectors: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    reward_weights: list[float] | None = None
    evaluation: Dataset | None = None
    notes: tuple[str, ...] = ()


def load_material(config: RunConfig) -> Material:
    """Load everything that a run needs but its teacher, cheap things first, and refuse what cannot be trained."""
    return _load_dataset(config) if config.task is None else _load_task(config)


def load_teacher(config: RunConfig) -> dict[str, Any] | None:
    """The `teacher:` section; `model: tiny` or `small` with a `stage` means a model of the lab, built on first use."""
    return None if config.teacher is None else with_lab_model(config.teacher, config.task)


def check_teacher_columns(config: RunConfig, rows: Dataset, tokenizer: Any) -> None:
    """Refuse a template that shows columns which the data lack."""
    if config.teacher_prompts is not None:
        config.teacher_prompts.check(islice(rows, TEACHER_ROWS), tokenizer)


def _model_folder(config: RunConfig) -> str:
    """The folder or name of the model; a lab model is built on first use and cached."""
    if config.task is None or not config.is_lab:
        return config.model
    if config.stage not in STAGES:
        raise unknown("stage", config.stage, STAGES)
    return str(warm_start(config.task, size=config.model, stage=config.stage))


def _load_task(config: RunConfig) -> Material:
    task = get_task(str(config.task))
    path = _model_folder(config)
    model, tokenizer = lab_data.load_model(path), lab_data.load_tokenizer(path)
    if config.is_lab and not torch.cuda.is_available():  # what makes a tiny model fast on a CPU
        model.set_attn_implementation("eager")
        fuse_norms(model)
    # A prompt for every place in the run: a host that resumes in a later epoch repeats the order of the first.
    count = config.dataset.count or config.steps * int(config.prompts_per_step or 1)
    dataset = lab_data.prompt_dataset(task, "train", count, config.seed)
    check_teacher_columns(config, dataset, tokenizer)
    response = _response_length(config, task.max_response)
    check_lengths(dataset, tokenizer, model, response, {})
    rewards = [lab_data.reward_function(task)]
    return Material(model, tokenizer, dataset, rewards, response, task, collectors={"values": exact_values(task)})


def _load_dataset(config: RunConfig) -> Material:
    functions = [load_reward(reward.name) for reward in config.rewards]
    dataset = load_training(config.dataset)
    evaluation, left_out = _load_evaluation(config, dataset)
    for name, rows in (("training", dataset), ("evaluation", evaluation)):
        if rows is not None:
            check_kinds(rows, name)
            check_columns(functions, rows.column_names, name)
    path = _model_folder(config)
    tokenizer = lab_data.load_tokenizer(path)
    wrapping = choose_wrapping(dataset, tokenizer, config.dataset)
    dataset = wrap(dataset, wrapping)
    evaluation = None if evaluation is None else wrap(evaluation, wrapping)
    check_teacher_columns(config, dataset, tokenizer)
    model = lab_data.load_model(path)
    response = _response_length(config, MOST_RESPONSES)
    options = config.trainer.get("chat_template_kwargs") or {}
    check_lengths(dataset, tokenizer, model, response, options)
    if evaluation is not None:
        check_lengths(evaluation, tokenizer, model, response, options, "evaluation")
    if wrapping.wraps:
        functions = [on_plain_text(function) for function in functions]
    notes = list(wrapping.notes)
    if left_out:
        notes.append(f"{left_out} evaluation problems are left out because they are also training prompts")
    return Material(
        model,
        tokenizer,
        dataset,
        functions or [no_reward],
        response,
        reward_weights=[reward.weight for reward in config.rewards] or None,
        evaluation=evaluation,
        notes=tuple(notes),
    )


def _load_evaluation(config: RunConfig, training: Dataset) -> tuple[Dataset | None, int]:
    """The held-out rows without those that are also trained on, and how many were left out."""
    rows = load_evaluation(config.dataset)
    if rows is None:
        return None, 0
    chosen = rows.select(range(min(config.evaluation.problems, len(rows))))
    return without_overlap(chosen, training["prompt"])


def _response_length(config: RunConfig, default: int) -> int:
    return int(config.trainer.get("max_completion_length") or default)


def exact_values(task: Task) -> ExactValues:
    """The collector of `values` on a lab task, checked against its verifier as it goes."""

    def problem(columns: Mapping[str, Any]) -> Problem:
        return Problem.from_json(columns["problem"])

    return ExactValues(
        lambda columns: task.accepted(problem(columns)),
        lambda columns, text: task.verify(problem(columns), text),
        max_tokens=task.max_response,
    )


def no_reward(completions: list[Any], **columns: Any) -> list[float]:
    """For pipelines that learn only from a teacher: TRL wants a reward, and credit does not read it."""
    return [0.0] * len(completions)
