"""The two things we take from `reasoning-gym`: its items and its scorers."""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from tokencredit.errors import TokenCreditError


@cache
def _library() -> ModuleType:
    # Imported on first use: it takes two seconds, and naming a task must not.
    try:
        import reasoning_gym
    except ImportError as error:
        raise TokenCreditError(
            "the lab's tasks need the package `reasoning-gym`, which is not installed",
            hint="pip install 'tokencredit[trl]'",
        ) from error
    return reasoning_gym


def item(generator: str, seed: int, **config: Any) -> dict[str, Any]:
    """The item of `generator` that belongs to `seed` alone.

    reasoning-gym draws item i of a dataset from `seed + i`, so two datasets with neighbouring seeds share all items but
    one. Every item here is therefore the first of its own dataset.
    """
    return _library().create_dataset(generator, seed=seed, size=1, **config)[0]


@cache
def scorer(generator: str) -> Callable[[str, dict[str, Any]], float]:
    """reasoning-gym's own `score_answer(answer, entry)`; 1.0 means correct."""
    return _library().get_score_answer_fn(generator)
