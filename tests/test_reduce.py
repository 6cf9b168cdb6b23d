"""Order statistics by counting, and sums over groups, against sorting and numpy."""

import math
import time

import numpy as np
import pytest
import torch

from tokencredit.batch import reduce
from tokencredit.batch.reduce import LOCAL, LocalReducer, extrema, group_totals, kth_smallest, quantile
from tokencredit.seeds import generator

EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, -1.1754944e-38, 3.4e38, -3.4e38, 1.0, 1.0000001, -1.0, -1.0000001]


def samples(kind: str, count: int = 501) -> torch.Tensor:
    rng = generator("reduce", kind)
    normal = torch.randn(3, count // 3, generator=rng)
    if kind == "ties":
        return (normal * 2).round()
    if kind == "skewed":
        return normal.exp() * (torch.rand(normal.shape, generator=rng) > 0.7)
    if kind == "denormal":
        return normal * 1e-40
    if kind == "extremes":
        return torch.tensor(EXTREMES).repeat(3, 1)
    return normal * 10.0 ** torch.randint(-20, 20, normal.shape, generator=rng)


KINDS = ["ties", "skewed", "denormal", "extremes", "wide"]


@pytest.mark.parametrize("kind", KINDS)
def test_kth_smallest_is_that_of_a_sort(kind: str) -> None:
    values = samples(kind)
    mask = torch.rand(values.shape, generator=generator("mask", kind)) < 0.8
    ordered = np.sort(values[mask].numpy())
    poisoned = torch.where(mask, values, torch.nan)
    for rank in {0, 1, len(ordered) // 3, len(ordered) // 2, len(ordered) - 2, len(ordered) - 1}:
        assert kth_smallest(poisoned, mask, rank) == float(ordered[rank])


def test_every_rank_of_the_extremes() -> None:
    values = torch.tensor([EXTREMES])
    found = [kth_smallest(values, torch.ones_like(values, dtype=torch.bool), rank) for rank in range(len(EXTREMES))]
    assert found == sorted(float(np.float32(value)) for value in EXTREMES)
    assert sum(value == 1e-45 for value in np.float32(found)) == sum(
        np.float32(v) == np.float32(1e-45) for v in EXTREMES
    )


@pytest.mark.parametrize("kind", ["ties", "skewed", "denormal"])
@pytest.mark.parametrize("q", [0.0, 0.001, 0.2, 0.5, 0.8, 0.999, 1.0])
def test_quantile_is_that_of_numpy(kind: str, q: float) -> None:
    values = samples(kind)
    mask = torch.rand(values.shape, generator=generator("mask", kind)) < 0.8
    expected = float(np.quantile(values[mask].double().numpy(), q))
    assert quantile(torch.where(mask, values, torch.nan), mask, q) == pytest.approx(expected, rel=1e-12, abs=1e-50)


def test_quantiles_of_next_to_nothing() -> None:
    values = torch.tensor([[7.0, 1.0]])
    assert np.isnan(quantile(values, torch.tensor([[False, False]]), 0.5))
    assert quantile(values, torch.tensor([[True, False]]), 0.3) == 7.0
    assert quantile(values, torch.tensor([[True, True]]), 0.25) == 2.5  # 1 + 0.25 * 6


def test_a_rank_beyond_the_values_is_an_error() -> None:
    values, mask = torch.tensor([[7.0, 1.0]]), torch.tensor([[True, True]])
    for rank in (-1, 2):
        with pytest.raises(IndexError, match=f"rank {rank} of 2 values"):
            kth_smallest(values, mask, rank)


class TwoHalves(LocalReducer):
    """Another process with the same counts: sums double, whatever is local stays."""

    def total(self, local: torch.Tensor) -> torch.Tensor:
        return 2 * local


def test_the_reducer_is_asked_for_every_count() -> None:
    # 1, 1, 2, 2, 3, 3 on two processes together
    values, mask = torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert [kth_smallest(values, mask, rank, TwoHalves()) for rank in range(6)] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert quantile(values, mask, 0.5, TwoHalves()) == 2.0
    totals = group_totals(torch.tensor([[1.0], [2.0]]), torch.tensor([4, 4]), TwoHalves())
    assert totals[:, 0].tolist() == [6.0, 6.0]


def test_group_totals_by_hand() -> None:
    # group 30: rows 0 and 3; group -7: row 1; group 2: row 2
    stats = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], dtype=torch.float64)
    ids = torch.tensor([30, -7, 2, 30])
    assert LOCAL.labels(ids).tolist() == [-7, 2, 30]
    expected = torch.tensor([[5.0, 50.0], [2.0, 20.0], [3.0, 30.0], [5.0, 50.0]], dtype=torch.float64)
    torch.testing.assert_close(group_totals(stats, ids), expected)
    assert group_totals(stats[:0], ids[:0]).shape == (0, 2)


@pytest.mark.parametrize("most", [1023, 2])
def test_labels_of_all_ranks_in_one_exchange(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the other rank holds 5, 7 and 9; where two labels fill an exchange, both ranks go for a second
    exchanges = []

    def all_gather(rows: list[torch.Tensor], padded: torch.Tensor, group: object) -> None:
        exchanges.append(len(padded) - 1)
        rows[0].copy_(padded)
        rows[1].zero_()[:4] = torch.tensor([3, 5, 7, 9])[: len(padded)]

    monkeypatch.setattr(reduce, "FEW_LABELS", most)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    labels = reduce.ProcessGroupReducer().labels(torch.tensor([9, 2, 9, 30]))
    assert labels.tolist() == [2, 5, 7, 9, 30]
    assert exchanges == ([1023] if most == 1023 else [2, 3])


@pytest.mark.slow
def test_twenty_million_values_in_reasonable_time() -> None:
    # beyond 2**24, where torch.quantile refuses
    values = torch.rand(20, 1_000_000, generator=generator("many"))
    mask = torch.ones_like(values, dtype=torch.bool)
    started = time.thread_time()
    found = quantile(values, mask, 0.8)
    assert time.thread_time() - started < 60
    assert found == pytest.approx(float(np.quantile(values.numpy().ravel(), 0.8)), abs=1e-7)


def test_extrema_of_masked_values() -> None:
    values = torch.tensor([[3.0, float("nan"), -2.0], [9.0, 1.0, -7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert [end.item() for end in extrema(values, mask)] == [-2.0, 3.0]
    assert [end.item() for end in extrema(values, torch.zeros_like(mask))] == [math.inf, -math.inf]
    assert [end.item() for end in extrema(values[:0], mask[:0])] == [math.inf, -math.inf]
