"""Rewards on their way into TRL: numbers that would distort credit silently are refused."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.errors import TokenCreditError

LARGEST = torch.finfo(torch.float32).max  # TRL keeps rewards in float32


def guard_rewards(functions: Any) -> Any:
    """Reward functions that refuse NaN and infinity; None still means "not scored", as in TRL.

    Takes one or a list of them: functions, async functions, partials, objects with `__call__`. What a function returns
    is read once, so a generator works as it does in TRL. Reward models and their names are left as they are.
    """
    if isinstance(functions, list | tuple):
        return [guard_rewards(function) for function in functions]
    if isinstance(functions, str | nn.Module) or not callable(functions):
        return functions
    return _guarded_async(functions) if _is_async(functions) else _guarded(functions)


def _unwrapped(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name_of(function: Any) -> str:
    """The name under which TRL logs the reward: an object without a name goes by its class."""
    inner = _unwrapped(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _is_async(function: Any) -> bool:
    inner = _unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    name = _name_of(function)

    @_named(function, name)
    def guarded(*args: Any, **kwargs: Any) -> list[Any]:
        return _checked(name, function(*args, **kwargs))

    return guarded


def _guarded_async(function: Callable[..., Any]) -> Callable[..., Any]:
    name = _name_of(function)

    @_named(function, name)
    async def guarded(*args: Any, **kwargs: Any) -> list[Any]:
        return _checked(name, await function(*args, **kwargs))

    return guarded


def _named(function: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    """`functools.wraps`, under the name that TRL gives the reward in its logs; an object's attributes stay its own."""

    def wrap(guarded: Any) -> Any:
        guarded = functools.wraps(function, updated=())(guarded)
        guarded.__name__ = name
        return guarded

    return wrap


def _checked(name: str, rewards: Any) -> list[Any]:
    try:
        rewards = list(rewards)
    except TypeError as error:
        raise TokenCreditError(
            f"reward function {name!r} must return one number per response, got {type(rewards).__name__}",
            hint="return a list, with None for a response that cannot be scored",
        ) from error
    for row, reward in enumerate(rewards):
        if reward is None:
            continue
        try:
            value = float(reward)
        except (TypeError, ValueError, OverflowError) as error:
            raise TokenCreditError(
                f"reward function {name!r} gave {reward!r} for row {row} of its batch, which is not a number",
                hint="return a finite number, or None for a response that cannot be scored",
            ) from error
        if not math.isfinite(value) or abs(value) > LARGEST:
            raise TokenCreditError(
                f"reward function {name!r} gave {value} for row {row} of its batch",
                hint="return a finite number, or None for a response that cannot be scored",
            )
    return rewards


def check_models(rewards: Float[Tensor, "batch reward"], functions: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse NaN and infinity from reward models, which TRL runs itself."""
    for column, (function, name) in enumerate(zip(functions, names, strict=True)):
        broken = ~torch.isfinite(rewards[:, column])
        if isinstance(function, nn.Module) and bool(broken.any()):
            row = int(broken.nonzero()[0])
            raise TokenCreditError(
                f"reward model {name!r} gave {float(rewards[row, column])} for row {row} of the batch",
                hint="look for NaN in its weights, and for a dtype that overflows (float16)",
            )
