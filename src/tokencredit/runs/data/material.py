"""From a config to what TRL's trainer takes: model, tokenizer, data, rewards. Everything is refused before training."""

from collections.abc import Callable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from tokencredit.collect.exact.values import ExactValues
from tokencredit.collect.teacher.build import resolve_teacher
from tokencredit.collect.teacher.prompts import PromptRenderer
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.lab import data as lab_data
from tokencredit.lab.fused import fuse_norms
from tokencredit.lab.model import SIZES, STAGES, warm_start
from tokencredit.lab.tasks import Problem, Task, get_task
from tokencredit.lab.teachers import with_lab_model
from tokencredit.runs.data import datasets, prompts
from tokencredit.runs.data.rewards import check_columns, load_rewards, on_plain_text

load_dataset_section = datasets.load_dataset_section

MOST_RESPONSES = 256  # default length of a response where neither the task nor `trainer:` says one
TEACHER_ROWS = 64  # rows whose columns are checked against the teacher's template before a model is loaded


class Material(NamedTuple):
    """What a run trains and evaluates on.

    `reward` is one function, or a list with `reward_weights`. `evaluation` are the held-out rows, if any. `notes` are
    sentences about the data for the plan that is printed before the first step.
    """

    model: Any
    tokenizer: Any
    dataset: Dataset
    reward: Any
    task: Task | None
    max_response: int
    teacher: dict[str, Any] | None = None
    collectors: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    reward_weights: list[float] | None = None
    evaluation: Dataset | None = None
    notes: tuple[str, ...] = ()


def model_folder(config: Mapping[str, Any]) -> str:
    """The folder or name of the model; a lab model is built on first use and cached."""
    if config["task"] is not None and config["model"] in SIZES:
        if not isinstance(config["stage"], str) or config["stage"] not in STAGES:
            raise unknown("stage", config["stage"], STAGES)
        return str(warm_start(config["task"], size=config["model"], stage=config["stage"]))
    return str(config["model"])


def load_material(config: Mapping[str, Any]) -> Material:
    """Load everything that a run needs, cheap things first, and refuse what cannot be trained."""
    check_teacher(config["teacher"])
    material = _of_dataset(config) if config["task"] is None else _of_task(config)
    return material._replace(teacher=_teacher(config))


def _of_task(config: Mapping[str, Any]) -> Material:
    task = get_task(config["task"])
    path = model_folder(config)
    model, tokenizer = lab_data.load_model(path), lab_data.load_tokenizer(path)
    if config["model"] in SIZES and not torch.cuda.is_available():  # what makes a tiny model fast on a CPU
        model.set_attn_implementation("eager")
        fuse_norms(model)
    # A prompt for every place in the run: a host that resumes in a later epoch repeats the order of the first.
    count = config["dataset"]["count"] or config["steps"] * config["prompts_per_step"]
    dataset = lab_data.prompt_dataset(task, "train", count, config["seed"])
    _check_columns_of_teacher(config["teacher"], dataset, tokenizer)
    response = _response_length(config, task.max_response)
    reward = lab_data.reward_function(task)
    prompts.check_lengths(dataset, tokenizer, model, response, {})
    return Material(model, tokenizer, dataset, reward, task, response, collectors={"values": exact_values(task)})


def _of_dataset(config: Mapping[str, Any]) -> Material:
    section = config["dataset"]
    functions, weights = load_rewards(config["reward"])
    dataset = datasets.load_dataset_section(section)
    evaluation, left_out = _evaluation(config, dataset)
    for name, rows in (("training", dataset), ("evaluation", evaluation)):
        if rows is not None:
            prompts.check_kinds(rows, name)
            check_columns(functions, rows.column_names, name)
    path = model_folder(config)
    tokenizer = lab_data.load_tokenizer(path)
    wrapping = prompts.choose_wrapping(dataset, tokenizer, section)
    dataset = prompts.wrap(dataset, wrapping)
    evaluation = None if evaluation is None else prompts.wrap(evaluation, wrapping)
    _check_columns_of_teacher(config["teacher"], dataset, tokenizer)
    model = lab_data.load_model(path)
    response = _response_length(config, MOST_RESPONSES)
    options = config["trainer"].get("chat_template_kwargs") or {}
    prompts.check_lengths(dataset, tokenizer, model, response, options)
    if evaluation is not None:
        prompts.check_lengths(evaluation, tokenizer, model, response, options, "evaluation")
    if wrapping.wraps:
        functions = [on_plain_text(function) for function in functions]
    reward = no_reward if not functions else functions[0] if len(functions) == 1 else functions
    notes = list(wrapping.notes)
    if left_out:
        notes.append(f"{left_out} evaluation problems are left out because they are also training prompts")
    return Material(
        model,
        tokenizer,
        dataset,
        reward,
        None,
        response,
        reward_weights=None if all(weight == 1 for weight in weights) else weights,
        evaluation=evaluation,
        notes=tuple(notes),
    )


def _evaluation(config: Mapping[str, Any], training: Dataset) -> tuple[Dataset | None, int]:
    """The held-out rows without those that are also trained on, and how many were left out."""
    rows = datasets.load_evaluation(config["dataset"])
    if rows is None:
        return None, 0
    chosen = rows.select(range(min(int(config["evaluation"]["problems"]), len(rows))))
    return datasets.without_overlap(chosen, training["prompt"])


def _response_length(config: Mapping[str, Any], default: int) -> int:
    given = config["trainer"].get("max_completion_length") or default
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise TokenCreditError(f"`trainer.max_completion_length` must be a whole number of at least 1, got {given!r}")
    return given


def exact_values(task: Task) -> ExactValues:
    """The collector of `values` on a lab task, checked against its verifier as it goes."""

    def problem(columns: Mapping[str, Any]) -> Problem:
        return Problem.from_json(columns["problem"])

    return ExactValues(
        lambda columns: task.accepted(problem(columns)),
        lambda columns, text: task.verify(problem(columns), text),
        max_tokens=task.max_response,
    )


def check_teacher(section: Any) -> None:
    """Refuse wrong keys, values and template names of a `teacher:` section before anything is loaded or built."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise TokenCreditError(f"`teacher` must be a mapping, got {section!r}", hint="see docs/teachers.md")
    if not isinstance(section.get("kind"), str):
        raise TokenCreditError(f"`teacher` needs a `kind`, got {dict(section)!r}", hint="see docs/teachers.md")
    given = dict(section)
    if isinstance(given.get("model"), str) and given["model"] in SIZES:
        given.pop("stage", None)  # `with_lab_model` checks it
    PromptRenderer(resolve_teacher(given))


def _check_columns_of_teacher(section: Any, rows: Dataset, tokenizer: Any) -> None:
    """Refuse a template that shows columns which the data lack, before the models are loaded."""
    if section is None:
        return
    given = {name: value for name, value in section.items() if name != "stage"}
    PromptRenderer(resolve_teacher(given)).check(islice(rows, TEACHER_ROWS), tokenizer)


def _teacher(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `teacher:` section; `model: tiny` or `small` with a `stage` means a model of the lab."""
    if config["teacher"] is None:
        return None
    section = with_lab_model(config["teacher"], config["task"])
    resolve_teacher(section)
    return section


def no_reward(completions: list[Any], **columns: Any) -> list[float]:
    """For pipelines that learn from a teacher alone: TRL wants a reward, credit does not read it."""
    return [0.0] * len(completions)
