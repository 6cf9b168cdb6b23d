"""Lab tasks as data sets and reward functions."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from tokencredit.collect.load import load_model as load_model
from tokencredit.collect.load import load_tokenizer as load_tokenizer
from tokencredit.errors import TokenCreditError
from tokencredit.lab.tasks import Problem, Task, get_task
from tokencredit.progress import track

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


def _task(task: Task | str) -> Task:
    return get_task(task) if isinstance(task, str) else task
