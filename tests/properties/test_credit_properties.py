"""Whatever is handed to a pipeline: a finite result, or an error of ours in one line."""

import json
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import strategies as st
from support.properties import explore, few_or_many
from support.strategies import NAMES, batch_fields, credit_configs, hyperparameters

from tokencredit import Pipeline, TokenBatch, TokenCreditError, assign_credit, get_pipeline
from tokencredit.methods.table import presets


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """As in production, where no type checker stands before the gate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def is_read_or_refused(config: Any) -> None:
    try:
        pipeline = Pipeline.parse(config)
    except TokenCreditError as error:
        assert "\n" not in error.message and len(error.message) < 10_000
        return
    assert pipeline.scope in ("token", "response", "group", "batch")
    assert pipeline.requires is not None and pipeline.name
    try:
        written = json.loads(json.dumps(pipeline.to_config()))
    except TypeError:
        return  # a function, or a hyperparameter that is no JSON, given from Python
    if all(":" not in step.name or step.name.count(":") == 1 for chain in pipeline.chains for step in chain.active):
        assert json.loads(json.dumps(Pipeline.parse(written).to_config())) == written


@pytest.mark.parametrize("examples", few_or_many(200, 30_000))
def test_a_config_is_read_or_refused(examples: int) -> None:
    explore(is_read_or_refused, credit_configs(), examples=examples)


def overrides_are_taken_or_refused(name: str, given: Any) -> None:
    try:
        get_pipeline(name, **given) if isinstance(given, dict) else Pipeline.parse({name: given})
    except TokenCreditError as error:
        assert "\n" not in error.message


@pytest.mark.parametrize("examples", few_or_many(150, 20_000))
def test_overrides_are_taken_or_refused(examples: int) -> None:
    explore(overrides_are_taken_or_refused, st.sampled_from(NAMES), hyperparameters(), examples=examples)


def gives_finite_credit_or_refuses(fields: dict[str, Any], name: str) -> None:
    try:
        batch = TokenBatch(**fields)
        assert len(repr(batch)) < 2_000
        credit = assign_credit(name, batch, generator=torch.Generator().manual_seed(1))
    except TokenCreditError as error:
        assert "\n" not in error.message
        return
    assert credit.dtype == torch.float32 and credit.shape == batch.response_mask.shape
    assert not credit.requires_grad
    assert bool(torch.isfinite(credit).all()), (name, credit)
    uncounted = ~batch.counted[:, None] | ~batch.response_mask
    assert not credit[uncounted].any()


@pytest.mark.parametrize("examples", few_or_many(200, 30_000))
def test_a_batch_gives_finite_credit_or_is_refused(examples: int) -> None:
    names = st.sampled_from(sorted(presets()))
    explore(gives_finite_credit_or_refuses, batch_fields(), names, examples=examples)
