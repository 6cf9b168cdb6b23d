"""Rank agreement: against scipy with ties and holes, and what counts as no ranking."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from tokencredit.diagnostics.agreement import agreement, agreement_table, spearman


def make(seed: int, levels: int) -> torch.Tensor:
    return torch.randint(0, levels, (5, 14), generator=torch.Generator().manual_seed(seed)).double()


MASK = torch.rand((5, 14), generator=torch.Generator().manual_seed(9)) < 0.7


@pytest.mark.parametrize("levels", [3, 1000])
def test_matches_scipy(levels: int) -> None:
    first, second = (torch.where(MASK, make(seed, levels), torch.nan) for seed in (1, 2))
    found = spearman(first, second, MASK)
    for row in range(5):
        x, y = first[row][MASK[row]].numpy(), second[row][MASK[row]].numpy()
        assert found[row].item() == pytest.approx(spearmanr(x, y).statistic)
    pooled = spearmanr(first[MASK].numpy(), second[MASK].numpy()).statistic
    assert agreement(first, second, MASK, scope="batch").value == pytest.approx(pooled)


def test_only_order_matters() -> None:
    x = make(3, 1000)
    assert agreement(x, x.sqrt(), MASK).value == pytest.approx(1.0)
    assert agreement(x, -x, MASK).value == pytest.approx(-1.0)


def test_uniform_credit_ranks_nothing() -> None:
    x = make(3, 1000)
    assert math.isnan(agreement(x, torch.ones_like(x), MASK).value)
    half = torch.cat((x[:2], torch.ones(3, 14).double()))
    found = agreement(x, half, MASK)
    assert found.value == pytest.approx(1.0) and found.responses == 2 and found.excluded == 3


def test_table_holds_every_pair_once() -> None:
    x = make(3, 1000)
    found = agreement_table({"a": x, "b": -x, "c": x * 2}, MASK)
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "c"].value == pytest.approx(1.0) and found["b", "c"].value == pytest.approx(-1.0)
