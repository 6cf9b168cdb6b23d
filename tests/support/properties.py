"""Run one property with few examples in the everyday suite and with many in the slow one.

@pytest.mark.parametrize("examples", few_or_many(200, 20_000))
def test_anything_is_read_or_refused(examples: int) -> None:
    explore(check_that_it_is_read_or_refused, anything(), examples=examples)
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

EVERYDAY = 2_000  # properties with more examples than this draw new ones in every run


def few_or_many(few: int, many: int) -> list[Any]:
    """The values of a parameter `examples`: `few` every day, `many` with `-m slow`."""
    return [pytest.param(few, id="everyday"), pytest.param(many, id="slow", marks=pytest.mark.slow)]


def explore(check: Callable[..., None], *strategies: SearchStrategy, examples: int) -> None:
    """Call `check` on drawn examples; the everyday suite draws the same ones every time."""
    same = examples <= EVERYDAY
    limits = settings(
        max_examples=examples,
        derandomize=same,
        database=None,
        deadline=None,
        print_blob=not same,
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # of how long a strategy is when it is spelled out
        limits(given(*strategies)(check))()
