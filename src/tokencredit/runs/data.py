"""From a config to what TRL's trainer takes: model, tokenizer, dataset, reward; every refusal before training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from tokencredit.collect.exact import ExactValues
from tokencredit.collect.teacher import resolve_teacher
from tokencredit.errors import TokenCreditError
from tokencredit.lab import data as lab_data
from tokencredit.lab.fused import fuse_norms
from tokencredit.lab.model import SIZES, warm_start
from tokencredit.lab.tasks import Problem, Task, get_task
from tokencredit.lab.teachers import with_lab_model
from tokencredit.loading import load_attribute


class Material(NamedTuple):
    """What a run trains on."""

    model: Any
    tokenizer: Any
    dataset: Dataset
    reward: Callable[..., Any]
    task: Task | None
    max_response: int
    teacher: dict[str, Any] | None = None
    collectors: Mapping[str, Callable[..., Any]] = MappingProxyType({})


def model_folder(config: Mapping[str, Any]) -> str:
    """The folder or name of the model; a lab model is built on first use and cached."""
    if config["task"] is not None and config["model"] in SIZES:
        return str(warm_start(config["task"], size=config["model"], stage=config["stage"]))
    return str(config["model"])


def load_material(config: Mapping[str, Any]) -> Material:
    """Load everything and refuse what cannot be trained."""
    path = model_folder(config)
    model, tokenizer = lab_data.load_model(path), lab_data.load_tokenizer(path)
    if config["model"] in SIZES and not torch.cuda.is_available():  # what makes a tiny model fast on a CPU
        model.set_attn_implementation("eager")
        fuse_norms(model)
    if config["task"] is not None:
        task = get_task(config["task"])
        # A prompt for every place in the run: a host that resumes in a later epoch repeats the order of the first.
        count = config["dataset"]["count"] or config["steps"] * config["prompts_per_step"]
        dataset = lab_data.prompt_dataset(task, "train", count, config["seed"])
        response = int(config["trainer"].get("max_completion_length") or task.max_response)
        reward = lab_data.reward_function(task)
        found = Material(model, tokenizer, dataset, reward, task, response, collectors={"values": exact_values(task)})
    else:
        dataset = load_dataset_section(config["dataset"])
        response = int(config["trainer"].get("max_completion_length") or 256)
        reward = no_reward if config["reward"] is None else _load_function(config["reward"])
        found = Material(model, tokenizer, dataset, reward, None, response)
    _check_prompts(found)
    return found._replace(teacher=_teacher(config))


def exact_values(task: Task) -> ExactValues:
    """The collector of `values` on a lab task, checked against its verifier as it goes."""

    def problem(columns: Mapping[str, Any]) -> Problem:
        return Problem.from_json(columns["problem"])

    return ExactValues(
        lambda columns: task.accepted(problem(columns)),
        lambda columns, text: task.verify(problem(columns), text),
        max_tokens=task.max_response,
    )


def _teacher(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `teacher:` section; `model: tiny` or `small` with a `stage` means a model of the lab."""
    if config["teacher"] is None:
        return None
    section = with_lab_model(config["teacher"], config["task"])
    resolve_teacher(section)  # its keys and values, before anything is loaded
    return section


def load_dataset_section(section: Mapping[str, Any]) -> Dataset:
    """A JSONL, JSON, CSV or Parquet file, a folder saved by `datasets`, or a dataset name."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(section["path"])
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        if path.is_dir():
            loaded: Any = load_from_disk(str(path))
        elif path.suffix in readers:
            if not path.is_file():
                raise TokenCreditError(f"no dataset file {str(path)!r}")
            if path.stat().st_size == 0:
                raise TokenCreditError(f"the dataset {str(path)!r} is empty", hint="it needs at least one prompt")
            loaded = load_dataset(readers[path.suffix], data_files=str(path), split="train")
        else:
            loaded = load_dataset(str(path), split=section["split"])
    except TokenCreditError:
        raise
    except Exception as error:  # the reader's many error types, told in one line
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise TokenCreditError(f"cannot read the dataset {section['path']!r}: {reason}") from error
    if isinstance(loaded, DatasetDict):
        if section["split"] not in loaded:
            raise TokenCreditError(f"{path} has no split {section['split']!r}; it has {', '.join(loaded)}")
        loaded = loaded[section["split"]]
    return _checked_dataset(loaded, section)


def _checked_dataset(dataset: Dataset, section: Mapping[str, Any]) -> Dataset:
    if len(dataset) == 0:
        raise TokenCreditError(f"the dataset {section['path']!r} is empty", hint="it needs at least one prompt")
    column = section["prompt"]
    if column not in dataset.column_names:
        raise TokenCreditError(
            f"the dataset {section['path']!r} has no column {column!r}; it has {', '.join(dataset.column_names)}",
            hint="name the column of the prompts: `dataset: {prompt: …}`",
        )
    return dataset if column == "prompt" else dataset.rename_column(column, "prompt")


def no_reward(completions: list[Any], **columns: Any) -> list[float]:
    """For pipelines that learn from a teacher alone: TRL wants a reward, credit does not read it."""
    return [0.0] * len(completions)


def _load_function(name: str) -> Callable[..., Any]:
    function = load_attribute(str(name), "the reward")
    if not callable(function):
        raise TokenCreditError(f"the reward {name!r} is no function")
    return function


def _check_prompts(material: Material) -> None:
    """No prompt may be longer than the model takes together with a response."""
    limit = getattr(material.model.config, "max_position_embeddings", None)
    if limit is None:
        return
    for row, prompt in enumerate(material.dataset["prompt"]):
        if not isinstance(prompt, str) and not isinstance(prompt, list):
            raise TokenCreditError(f"row {row} of the dataset has the prompt {prompt!r}; it must be text or messages")
        if isinstance(prompt, list):
            continue  # chat messages: the template decides their length, and TRL checks it
        length = len(material.tokenizer(prompt)["input_ids"])
        if length == 0:
            raise TokenCreditError(f"row {row} of the dataset has an empty prompt")
        if length + material.max_response > limit:
            raise TokenCreditError(
                f"row {row} of the dataset: a prompt of {length} tokens and a response of {material.max_response} "
                f"exceed the {limit} positions of the model",
                hint="drop long prompts, or lower trainer.max_completion_length",
            )
