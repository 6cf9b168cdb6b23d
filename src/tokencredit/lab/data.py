"""Lab tasks as data sets and reward functions, and models from local folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokencredit.errors import TokenCreditError
from tokencredit.lab.tasks import Problem, Task, get_task
from tokencredit.progress import track

# The hub's models whose names have no owner.
NAMES_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")

RewardFunction = Callable[..., list[float]]


def prompt_dataset(task: Task | str, split: str, count: int, seed: int = 0) -> Dataset:
    """Problems as rows: `prompt` is plain text, `problem` the JSON that the reward function reads."""
    if count < 1:
        raise TokenCreditError(f"`count` must be at least 1, got {count}")
    resolved = _task(task)
    problems = [resolved._problem(split, seed, index) for index in track(range(count), "drawing problems")]
    return Dataset.from_dict(
        {"prompt": [problem.prompt for problem in problems], "problem": [problem.to_json() for problem in problems]}
    )


def reward_function(task: Task | str) -> RewardFunction:
    """TRL's reward for `task`: 1.0 for an accepted response that ended in EOS, else 0.0.

    TRL drops special tokens from the text it hands over. Where it hands over the ids as well, they must be the
    characters and one EOS: a response cut off at the limit, or with a padding token inside, does not count, as in the
    exact values.
    """
    resolved = _task(task)

    def reward(
        prompts: list[str],
        completions: list[str],
        problem: list[str],
        completion_ids: list[list[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        ended = [True] * len(completions)
        if completion_ids is not None:
            ended = [len(ids) == len(text) + 1 for ids, text in zip(completion_ids, completions, strict=True)]
        parsed = [Problem.from_json(text) for text in problem]
        rows = zip(parsed, completions, ended, strict=True)
        return [float(whole and resolved.verify(asked, text)) for asked, text, whole in rows]

    reward.__name__ = f"{resolved.name}_reward"
    return reward


def load_model(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in float32 from a local folder; a name such as `org/model` goes to the hub."""
    return _load(AutoModelForCausalLM, path, "config.json", dtype=torch.float32, trust_remote_code=trust_remote_code)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder, padding on the left; a name such as `org/model` goes to the hub."""
    return _load(AutoTokenizer, path, "tokenizer_config.json", padding_side="left", trust_remote_code=trust_remote_code)


def _load(kind: Any, path: str | Path, required: str, **options: Any) -> Any:
    local = _looks_local(path)
    if local:
        _check_folder(Path(path).expanduser(), required)
    where = Path(path).expanduser() if local else path
    try:
        return kind.from_pretrained(where, local_files_only=local, **options)
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenCreditError(
            f"cannot load {str(path)!r}: {reason[0]}",
            hint="build it again, or pass the folder that `save_pretrained` wrote",
        ) from error


def _looks_local(path: str | Path) -> bool:
    """Whether `path` means a folder here. Only `org/name`, and a few old names, may mean the hub."""
    text = str(path)
    return (
        isinstance(path, Path)
        or Path(text).expanduser().exists()
        or text.startswith((".", "/", "~"))
        or (text.count("/") != 1 and text not in NAMES_WITHOUT_OWNER)
    )


def _check_folder(folder: Path, required: str) -> None:
    if not folder.is_dir():
        raise TokenCreditError(
            f"no model folder at {str(folder)!r}: {'it is a file' if folder.exists() else 'nothing is there'}",
            hint="give the folder that `save_pretrained` wrote, or a name on the hub with its owner: `owner/name`",
        )
    if not (folder / required).is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "(empty)"
        raise TokenCreditError(
            f"{str(folder)!r} is not a model folder: it has no {required}; found: {found}",
            hint="give the folder that `save_pretrained` wrote, or build the lab's model with `warm_start`",
        )


def _task(task: Task | str) -> Task:
    return get_task(task) if isinstance(task, str) else task
