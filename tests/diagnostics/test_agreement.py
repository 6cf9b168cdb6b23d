"""Rank agreement: against scipy with ties and holes, and what counts as no ranking."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from tokencredit.diagnostics.agreement import agreement, agreement_table, spearman, top_overlap


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


def test_the_overlap_of_the_largest_fifth() -> None:
    # Ten tokens, two of them are the largest fifth: {0, 1} and {1, 9} share one of two; signs do not matter.
    first = torch.tensor([[9.0, -8, 1, 1, 1, 1, 1, 1, 1, 1]])
    second = torch.tensor([[1.0, 5, 1, 1, 1, 1, 1, 1, 1, -7]])
    mask = torch.ones(1, 10, dtype=torch.bool)
    assert top_overlap(first, second, mask).tolist() == [0.5]
    assert top_overlap(first, first, mask).tolist() == [1.0]
    assert top_overlap(first, torch.ones(1, 10), mask).isnan().all()  # uniform credit has no largest tokens
    mask[0, 9] = False  # nine tokens: still two of them; 9 is out of the running
    assert top_overlap(first, second, mask).tolist() == [1.0]  # {0, 1} and {1, 0}: of equal ones the first
