"""ARCA's weights worked by hand, and the gate against rounding."""

from dataclasses import replace

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.errors import TokenCreditError
from tokencredit.methods.adapter_residual import adapter_residual
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import get_pipeline

# h_adapted − h_base = (.3, .4), (0, .5), (0, 0), (.06, .08): norms .5, .5, 0, .1
BASE = torch.tensor([[1.0, 0], [0, 1], [2, 2], [1, 1]], dtype=torch.float64)
ADAPTED = torch.tensor([[1.3, 0.4], [0, 1.5], [2, 2], [1.06, 1.08]], dtype=torch.float64)
RESIDUALS = (ADAPTED - BASE).norm(dim=-1)[None]
ONES = torch.ones(1, 4, dtype=torch.float64)


def one_response(**fields: torch.Tensor) -> TokenBatch:
    return TokenBatch(
        response_ids=torch.arange(4)[None],
        response_mask=torch.ones(1, 4, dtype=torch.bool),
        rewards=torch.ones(1),
        group_ids=torch.zeros(1, dtype=torch.long),
        adapter_residuals=RESIDUALS,
        **fields,
    )


def test_weights_of_one_response() -> None:
    # p = 1: Σ = 1.1; p = 2: .25, .25, 0, .01, Σ = .51
    first = adapter_residual(ONES, one_response())
    second = adapter_residual(ONES, one_response(), sharpening=2.0)
    torch.testing.assert_close(first, 4 / 1.1 * torch.tensor([[0.5, 0.5, 0.0, 0.1]], dtype=torch.float64))
    torch.testing.assert_close(second, 4 / 0.51 * torch.tensor([[0.25, 0.25, 0.0, 0.01]], dtype=torch.float64))


def test_released_preset_squares() -> None:
    preset = get_pipeline("arca_released")
    assert preset.to_config()[1]["adapter_residual"]["sharpening"] == 2.0
    assert get_pipeline("arca").to_config()[1]["adapter_residual"]["sharpening"] == 1.0
    assert get_pipeline("arca").requires == frozenset({"adapter_residuals"})


def test_an_adapter_that_does_nothing_is_uniform() -> None:
    batch = replace(one_response(), adapter_residuals=torch.zeros(1, 4))
    assert adapter_residual(ONES, batch, sharpening=2.0).tolist() == [[1.0] * 4]


def test_the_gate_trusts_signal_and_not_rounding() -> None:
    signal = one_response(doubling_ratios=torch.tensor([1.95]))
    rounding = one_response(doubling_ratios=torch.tensor([1.35]))
    assert adapter_residual(ONES, rounding, gate=1.8).tolist() == [[1.0] * 4]
    assert torch.equal(adapter_residual(ONES, signal, gate=1.8), adapter_residual(ONES, signal))


def test_the_gate_names_what_it_needs() -> None:
    with pytest.raises(TokenCreditError, match="doubling_ratios"):
        assign_credit(get_pipeline("arca", gate=1.8), one_response())
