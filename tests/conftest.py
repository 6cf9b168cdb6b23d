"""Fixtures for every folder of tests, and the path of `support`, whose builders worker processes import as well."""

import sys
from collections.abc import Callable
from pathlib import Path

import batches
import pytest

from tokencredit.batch.records import TokenBatch

sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture
def make_batch() -> Callable[..., TokenBatch]:
    """`make_batch(seed=…, groups=…, response=…, holes=…, host_advantages=…, without=…, **fields)`."""
    return batches.make_batch


@pytest.fixture
def fill_outside() -> Callable[[TokenBatch, float], TokenBatch]:
    """`fill_outside(batch, value)`: every token field holds `value` outside the mask."""
    return batches.fill_outside
