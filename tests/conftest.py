"""Fixtures for every folder of tests. What is behind them lives in `batches.py`, importable by worker processes."""

from collections.abc import Callable

import batches
import pytest

from tokencredit.batch.records import TokenBatch


@pytest.fixture
def make_batch() -> Callable[..., TokenBatch]:
    """`make_batch(seed=…, groups=…, response=…, holes=…, host_advantages=…, without=…, **fields)`."""
    return batches.make_batch


@pytest.fixture
def fill_outside() -> Callable[[TokenBatch, float], TokenBatch]:
    """`fill_outside(batch, value)`: every token field holds `value` outside the mask."""
    return batches.fill_outside
