"""Credit, metrics and checks on a real GPU against the CPU."""

import sys
from dataclasses import replace

import pytest
import torch
from batches import make_batch

from tokencredit import TokenCreditError, assign_credit, get_pipeline
from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.methods.table import PRESETS
from tokencredit.seeds import generator


def on_gpu(batch: TokenBatch) -> TokenBatch:
    return replace(batch, **{name: value.cuda() for name, value in batch.tensors().items()})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_gives_the_numbers_of_the_cpu(name: str) -> None:
    batch, pipeline = make_batch(seed=1), get_pipeline(name)
    expected = assign_credit(pipeline, batch, generator=generator("test"))
    credit = assign_credit(pipeline, on_gpu(batch), generator=generator("test"))
    torch.testing.assert_close(credit.cpu(), expected, rtol=1e-6, atol=1e-6)
    metrics = credit_metrics(on_gpu(batch), credit, batch.rewards.cuda())
    assert metrics == pytest.approx(credit_metrics(batch, expected, batch.rewards), rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", ["hapo", "empg", "surprisal"])
def test_tiles_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(seed=2, groups=(3, 4, 2, 5))
    whole = assign_credit(name, on_gpu(batch))
    monkeypatch.setattr(sys.modules[assign_credit.__module__], "TILE", batch.response_ids.numel() // 3)
    torch.testing.assert_close(assign_credit(name, on_gpu(batch)), whole)


def test_a_nan_is_refused() -> None:
    batch = make_batch()
    broken = torch.where(batch.response_mask, float("nan"), 0.0)
    with pytest.raises(TokenCreditError, match="entropies"):
        assign_credit("hapo", on_gpu(replace(batch, entropies=broken)))
