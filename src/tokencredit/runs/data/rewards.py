"""Rewards of a run: load what a config names, and score responses with every kind of reward that TRL takes."""

import asyncio
import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerState

from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.plugins import load_attribute


def load_reward(name: str) -> Any:
    """Load the reward that a config names.

    A name with a colon is `module:function` or `file.py:function`; the current folder is searched last. A folder or
    `owner/name` without a colon is a reward model.
    """
    if ":" not in name:
        if Path(name).expanduser().is_dir() or name.count("/") == 1:
            return _load_reward_model(name)
        raise TokenCreditError(
            f"the reward is module:function or a reward model, got {name!r}", hint="for example my_rewards:exact_match"
        )
    function = load_attribute(name, "the reward")
    if inspect.isclass(function) or not callable(function):
        raise TokenCreditError(
            f"the reward {name!r} is not a function", hint="name a function or an object that can be called"
        )
    return function


def _load_reward_model(name: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    path = Path(name).expanduser()
    try:
        return AutoModelForSequenceClassification.from_pretrained(path if path.is_dir() else name, num_labels=1)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenCreditError(
            f"cannot load the reward model {name!r}: {reason[0]}", hint="for a function, write module:function"
        ) from error


GIVEN_BY_TRL = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def check_columns(functions: Sequence[Any], columns: Sequence[str], what: str) -> None:
    """Refuse a reward function that needs a column which the data lack."""
    for function in functions:
        if isinstance(function, nn.Module):
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some callables of C have no signature
            continue
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = {item.name for item in parameters if item.kind in named and item.default is inspect.Parameter.empty}
        missing = sorted(needed - GIVEN_BY_TRL - (set(columns) - {"prompt"}))
        if missing:
            raise TokenCreditError(
                f"the reward function {name_of(function)!r} needs the column {missing[0]!r}, and the {what} data have "
                f"{', '.join(columns)}",
                hint=f"add the column, or give the parameter {missing[0]!r} a default",
            )


def on_plain_text(function: Any) -> Any:
    """Give a reward function the plain texts of a data set whose prompts were wrapped as chat messages.

    The data set holds texts, so its reward function expects texts: `prompts` are the texts of the data set, and
    `completions` are texts. Reward models get the messages, as TRL gives them.
    """
    if isinstance(function, nn.Module):
        return function

    def plain(columns: dict[str, Any]) -> dict[str, Any]:
        prompts = [prompt[-1]["content"] for prompt in columns["prompts"]]
        completions = [turns[-1].get("content") or "" for turns in columns["completions"]]
        return columns | {"prompts": prompts, "completions": completions}

    if is_async(function):

        async def wrapped(**columns: Any) -> Any:
            return await function(**plain(columns))

    else:

        def wrapped(**columns: Any) -> Any:
            return function(**plain(columns))

    wrapped.__name__ = name_of(function)
    return wrapped


def name_of(function: Any) -> str:
    """The name of a reward for messages, also of an object that can be called."""
    return str(getattr(function, "__name__", type(function).__name__))


def is_async(function: Any) -> bool:
    """Tell whether calling `function` gives a coroutine, also for a partial or an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class Scores(NamedTuple):
    """The weighted rewards of responses, None where no reward function scored one, and logged metrics."""

    rewards: list[float | None]
    metrics: dict[str, float]


def score(
    rewards: Sequence[Any],
    weights: Sequence[float],
    columns: Mapping[str, list[Any]],
    *,
    processors: Sequence[Any] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    state: Any = None,
) -> Scores:
    """Score responses as TRL's GRPO trainer does.

        reward = Σ_i wᵢ rᵢ   over the functions that scored the response

    Args:
      rewards: functions, async functions, and reward models.
      weights: one per reward.
      columns: `prompts`, `completions`, `completion_ids`, and the other columns of the data set.
      processors: the tokenizer of each reward model, None for a function.
      chat_template_kwargs: for reward models on messages.
      state: the trainer's state, which functions receive as `trainer_state`.
    """
    logged: dict[str, list[float]] = defaultdict(list)
    extras = {
        "trainer_state": TrainerState() if state is None else state,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: logged[name].append(float(value)),
    }
    count = len(columns["prompts"])
    table: list[list[float | None]] = []
    for index, reward in enumerate(rewards):
        if isinstance(reward, nn.Module):
            values = _score_by_model(reward, processors[index], columns, chat_template_kwargs or {})
        elif is_async(reward):
            values = _run_coroutine(reward, dict(columns) | extras)
        else:
            values = reward(**columns, **extras)
        table.append(_checked(values, count, reward))
    totals = [_weighted(row, weights) for row in zip(*table, strict=True)]
    return Scores(totals, {name: sum(values) / len(values) for name, values in logged.items()})


def _run_coroutine(function: Callable[..., Any], columns: dict[str, Any]) -> Any:
    """Await an async reward in a thread of its own: this thread may already run an event loop."""

    async def call() -> Any:
        return await function(**columns)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, call()).result()


@torch.no_grad()
def _score_by_model(model: nn.Module, processor: Any, columns: Mapping[str, list[Any]], options: Any) -> list[float]:
    pairs = zip(columns["prompts"], columns["completions"], strict=True)
    if isinstance(columns["prompts"][0], str):
        texts = [prompt + completion for prompt, completion in pairs]
    else:
        from trl import apply_chat_template

        texts = [
            apply_chat_template({"messages": [*prompt, *turns]}, processor, **options)["text"]
            for prompt, turns in pairs
        ]
    inputs = processor(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    device = next(model.parameters()).device
    logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
    return [float(value) for value in logits[:, 0]]


def _checked(values: Any, count: int, reward: Any) -> list[float | None]:
    name = name_of(reward)
    try:
        found = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TokenCreditError(
            f"reward function {name!r} must return numbers or None, one per response: {error}"
        ) from error
    if len(found) != count:
        raise TokenCreditError(f"reward function {name!r} gave {len(found)} rewards for {count} responses")
    for row, value in enumerate(found):
        if value is not None and not math.isfinite(value):
            raise TokenCreditError(
                f"reward function {name!r} gave {value} for row {row} of its batch",
                hint="return a finite number, or None for a response that cannot be scored",
            )
    return found


def _weighted(row: Sequence[float | None], weights: Sequence[float]) -> float | None:
    scored = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
    return sum(scored) if scored else None
