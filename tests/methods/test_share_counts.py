"""Counts that come from a share of a length: what the decimals mean, at every length and in every method."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tokencredit.batch.masked import row_quantile
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.attention.anchors import keep_attention
from tokencredit.methods.controls import random_mask
from tokencredit.methods.distillation.log_ratio import _wanted
from tokencredit.methods.position import middle_mask, prefix_boost, prefix_mask, suffix_mask
from tokencredit.methods.probability import clip_cov
from tokencredit.methods.selection import share_of
from tokencredit.seeds import generator

LENGTHS = torch.arange(1, 4097)
SHARES = ["0.05", "0.1", "0.15", "0.2", "0.29", "0.3", "0.35", "0.6", "0.7", "0.9", "0.95"]


def batch_of(length: int, **fields: torch.Tensor) -> TokenBatch:
    return TokenBatch(
        response_ids=torch.arange(length)[None],
        response_mask=torch.ones(1, length, dtype=torch.bool),
        rewards=torch.ones(1),
        group_ids=torch.zeros(1, dtype=torch.long),
        **fields,
    )


@pytest.mark.parametrize("share", SHARES)
def test_floor_ceiling_and_nearest_are_those_of_the_decimals(share: str) -> None:
    exact = [Fraction(share) * n for n in LENGTHS.tolist()]
    found = share_of(float(share), LENGTHS)
    assert found.floor().long().tolist() == [math.floor(x) for x in exact]
    assert found.ceil().long().tolist() == [math.ceil(x) for x in exact]
    assert found.round().long().tolist() == [round(x) for x in exact]  # halves to even, both


@pytest.mark.parametrize(("length", "kept"), [(50, 15), (90, 27), (100, 30), (10, 3), (11, 4), (1, 1)])
def test_three_tenths_of_a_rollout(length: int, kept: int) -> None:
    batch, ones = batch_of(length), torch.ones(1, length)
    for method in (prefix_mask, suffix_mask, middle_mask):
        assert int((method(ones, batch) != 0).sum()) == kept, method.__name__
    assert int((prefix_boost(ones, batch) == 1.5).sum()) == kept


@pytest.mark.parametrize("q", ["0", "0.1", "0.5", "0.75", "0.8", "0.9", "0.99"])
def test_the_worst_of_a_window_are_counted_exactly(q: str) -> None:
    expected = [max(1, math.floor((1 - Fraction(q)) * n)) for n in LENGTHS.tolist()]
    assert _wanted(LENGTHS, float(q)).tolist() == expected


@pytest.mark.parametrize(("keep", "length", "kept"), [(0.35, 10, 4), (0.145, 100, 14), (0.29, 50, 14), (0.2, 7, 1)])
def test_selected_tokens_are_counted_exactly(keep: float, length: int, kept: int) -> None:
    # 3.5 → 4, 14.5 → 14 and 14.5 → 14 (halves to even), 1.4 → 1
    batch = batch_of(length, attention_entropies=torch.rand(1, length))
    ones = torch.ones(1, length)
    assert int(keep_attention(ones, batch, keep=keep).sum()) == kept
    assert int(random_mask(ones, batch, keep=keep, generator=generator("keep")).sum()) == kept


def test_clip_cov_wants_the_whole_share() -> None:
    # .29 · 100 is 28.999… in floating point. All 100 tokens alternate between c = 1 and −1: 50 are eligible, 29 wanted
    alternating = torch.tensor([[1.0, 0.0] * 50], dtype=torch.float64)
    batch = batch_of(100, old_logprobs=-alternating)
    advantages = -2.0 * alternating
    draws, dropped = generator("wanted"), []
    for _ in range(400):
        credit = clip_cov(advantages, batch, generator=draws, share=0.29, low=-math.inf, high=math.inf)
        dropped.append(int(((credit == 0) & (advantages != 0)).sum()))
    # every token goes with 29/100: 14.5 of the 50 on average, sd √(50 · .29 · .71 / 400) = .16; 28 would give 14
    assert abs(float(np.mean(dropped)) - 14.5) < 4 * 0.16


@pytest.mark.parametrize("length", [2, 31, 4096, 16384])
@pytest.mark.parametrize("q", [0.1, 0.29, 0.4, 0.8])
def test_quantiles_of_long_rows_are_those_of_float64(length: int, q: float) -> None:
    values = torch.rand(1, length, generator=generator("rows", length), dtype=torch.float64)
    found = row_quantile(values, torch.ones(1, length, dtype=torch.bool), q)
    assert float(found) == pytest.approx(float(np.quantile(values.numpy(), q)), abs=1e-12)


def test_a_quantile_that_falls_on_a_value_is_that_value() -> None:
    values = torch.arange(101.0, dtype=torch.float64)[None] / 7
    found = row_quantile(values, torch.ones(1, 101, dtype=torch.bool), 0.29)
    assert float(found) == float(values[0, 29])
