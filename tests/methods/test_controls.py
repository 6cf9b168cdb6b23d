"""Golden values and laws of the controls."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from tokencredit.batch.draws import draw_uniforms
from tokencredit.batch.masked import response_lengths
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.controls import (
    constant_scale,
    match_mass,
    mean_within_response,
    random_mask,
    reverse,
    shuffle_within_response,
)
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.seeds import generator

NAN = math.nan
# holes in the first row, an empty third
CREDIT = torch.tensor([[1.0, NAN, 2.0, 3.0], [4.0, 5.0, NAN, NAN], [NAN] * 4], dtype=torch.float64)


def batch_of(credit: torch.Tensor) -> TokenBatch:
    return TokenBatch(
        response_ids=torch.arange(credit.numel()).reshape(credit.shape),
        response_mask=~credit.isnan(),
        rewards=torch.zeros(len(credit)),
        group_ids=torch.zeros(len(credit), dtype=torch.long),
    )


BATCH = batch_of(CREDIT)
LONG = batch_of(torch.arange(1.0, 101.0, dtype=torch.float64).expand(3, -1))
ROW = torch.arange(1.0, 101.0, dtype=torch.float64).expand(3, -1)


def test_reverse_skips_holes() -> None:
    expected = torch.tensor([[3.0, 0.0, 2.0, 1.0], [5.0, 4.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(reverse(CREDIT, BATCH), expected)
    torch.testing.assert_close(reverse(expected, BATCH), CREDIT.nan_to_num(0.0))


def test_mean_within_response() -> None:
    # (1 + 2 + 3) / 3, (4 + 5) / 2
    expected = torch.tensor([[2.0, 0.0, 2.0, 2.0], [4.5, 4.5, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(mean_within_response(CREDIT, BATCH), expected)


def test_mass_only_hapo_is_control_k6() -> None:
    # HAPO gives (1.4, 1.65), (-0.45, -0.55), -0.45: the means are 1.525, -0.5, -0.45
    batch = TokenBatch(
        response_ids=torch.arange(8).reshape(4, 2),
        response_mask=torch.ones(4, 2, dtype=torch.bool),
        rewards=torch.tensor([1.0, -1.0, -1.0, -1.0]),
        group_ids=torch.zeros(4, dtype=torch.long),
        entropies=torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
    )
    credit = assign_credit(["group_normalized", "entropy_capacity", "mean_within_response"], batch)
    expected = torch.tensor([[1.525] * 2, [-0.5] * 2, [-0.45] * 2, [-0.45] * 2])
    torch.testing.assert_close(credit, expected, rtol=0.0, atol=4e-6)  # the two eps of 1e-6


def test_constant_scale() -> None:
    expected = torch.tensor([[-2.0, 0.0, -4.0, -6.0], [-8.0, -10.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(constant_scale(CREDIT, BATCH, multiplier=-2.0), expected)


@pytest.mark.parametrize(
    ("per", "expected"),
    [
        # base mass 6 and 2 of its two responses; credit mass 6 and 9
        ("response", [[1.0, 0.0, 2.0, 3.0], [8 / 9, 10 / 9, 0.0, 0.0], [0.0] * 4]),
        # 8 of 15 over the group
        ("group", [[8 / 15, 0.0, 16 / 15, 24 / 15], [32 / 15, 40 / 15, 0.0, 0.0], [0.0] * 4]),
        # base is positive on the first row (6 of 6) and negative on the second (2 of 9)
        ("polarity", [[1.0, 0.0, 2.0, 3.0], [8 / 9, 10 / 9, 0.0, 0.0], [0.0] * 4]),
    ],
)
def test_match_mass(per: Any, expected: list[list[float]]) -> None:
    base = torch.tensor([[2.0, NAN, 2.0, 2.0], [-1.0, -1.0, NAN, NAN], [NAN] * 4], dtype=torch.float64)
    torch.testing.assert_close(match_mass(CREDIT, BATCH, base=base, per=per), torch.tensor(expected).double())


def test_match_mass_compares_with_the_estimator() -> None:
    # scaled by 7 and matched again: the estimator's own credit comes back
    batch = TokenBatch(
        response_ids=torch.arange(4).reshape(2, 2),
        response_mask=torch.ones(2, 2, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.zeros(2, dtype=torch.long),
    )
    pipeline = Pipeline.of("group_centered", {"constant_scale": {"multiplier": 7.0}}, "match_mass")
    torch.testing.assert_close(assign_credit(pipeline, batch), torch.tensor([[0.5, 0.5], [-0.5, -0.5]]))
    # a response without credit stays without: nothing to scale
    gone = Pipeline.of("group_centered", {"constant_scale": {"multiplier": 0.0}}, "match_mass")
    assert torch.equal(assign_credit(gone, batch), torch.zeros(2, 2))


def test_shuffle_moves_credit_but_keeps_it() -> None:
    credit = shuffle_within_response(ROW, LONG, generator=generator("shuffle"))
    for row in credit:
        assert Counter(row.tolist()) == Counter(ROW[0].tolist())
    assert not torch.equal(credit[0], ROW[0])
    assert not torch.equal(credit[0], credit[1])  # other tokens, another permutation


def test_shuffle_within_stretches_keeps_the_position_profile() -> None:
    # ten stretches of ten tokens: each keeps its own credits
    credit = shuffle_within_response(ROW, LONG, generator=generator("shuffle"), bins=10)
    assert torch.equal(credit.reshape(3, 10, 10).sort(dim=2).values, ROW.reshape(3, 10, 10))
    assert not torch.equal(credit, ROW)
    alone = shuffle_within_response(ROW, LONG, generator=generator("shuffle"), bins=100)
    torch.testing.assert_close(alone, ROW)


def test_every_place_is_equally_likely() -> None:
    # the first credit lands on each of 4 places in 200 draws about 50 times: sd sqrt(200 * 1/4 * 3/4) = 6.1
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    draws = generator("places")
    landed = sum(shuffle_within_response(rows, batch_of(rows), generator=draws) for _ in range(200))[0]
    assert float(landed.sum()) == 200 and bool(((landed - 50).abs() < 4 * 6.1).all())


@pytest.mark.parametrize(("keep", "kept"), [(0.2, 20), (0.5, 50), (1.0, 100), (1e-9, 1)])
def test_random_mask_keeps_the_share_of_every_response(keep: float, kept: int) -> None:
    credit = random_mask(ROW, LONG, generator=generator("mask"), keep=keep)
    assert (credit != 0).sum(1).tolist() == [kept] * 3
    assert bool(((credit == ROW) | (credit == 0)).all())


def test_random_mask_selected_divides_by_the_selected() -> None:
    # round(0.4 * 3) = 1 of 3 and round(0.4 * 2) = 1 of 2: two of the batch's five, each times 5 / 2
    credit = random_mask(CREDIT, BATCH, generator=generator("mask"), keep=0.4, normalize="selected")
    assert sorted(credit[0].tolist())[:3] == [0.0] * 3 and credit[0].max().item() in (2.5, 5.0, 7.5)
    assert sorted(credit[1].tolist())[:3] == [0.0] * 3 and credit[1].max().item() in (10.0, 12.5)


def test_token_uniforms_are_uniform_and_independent_of_place(make_batch: Any) -> None:
    batch = make_batch(seed=2, groups=(40, 40), response=200, holes=False)
    draws = draw_uniforms(batch, generator("uniforms"))[batch.response_mask]
    count = len(draws)
    assert float(draws.min()) >= 0.0 and float(draws.max()) < 1.0
    # mean 1/2 with sd 1 / sqrt(12 n), deciles n/10 with sd sqrt(0.09 n): five sigma
    assert abs(float(draws.mean()) - 0.5) < 5 / math.sqrt(12 * count)
    deciles = torch.histc(draws, 10, 0.0, 1.0)
    assert bool(((deciles - count / 10).abs() < 5 * math.sqrt(0.09 * count)).all())
    assert int(response_lengths(batch.response_mask).sum()) == count > 400
