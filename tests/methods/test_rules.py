"""Golden values of the rules that read probabilities, covariances and importances."""

import math
from typing import Any

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.methods.probability import (
    a3po,
    clip_cov,
    future_ratio,
    outcome_importance,
    probability_scaled,
    steer,
)
from tokencredit.pipeline.assign import assign_credit
from tokencredit.seeds import generator

NAN = math.nan
PRINTED = {"rtol": 0.0, "atol": 1e-6}  # the expected numbers are printed to six digits


def batch_of(like: torch.Tensor, **fields: Any) -> TokenBatch:
    """NaN in `like` is outside the mask."""
    given = {"rewards": torch.zeros(len(like)), "group_ids": torch.zeros(len(like), dtype=torch.long)} | fields
    ids = torch.arange(like.numel()).reshape(like.shape)
    return TokenBatch(response_ids=ids, response_mask=~like.isnan(), **given)


def double(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_probability_scaled() -> None:
    # 0.2 pi + 0.8 at pi = 1e-30 (nearly 0), 0.5, 1
    logprobs = double([[math.log(1e-30), math.log(0.5), 0.0]])
    credit = probability_scaled(torch.ones_like(logprobs), batch_of(logprobs, old_logprobs=logprobs))
    torch.testing.assert_close(credit, double([[0.8, 0.9, 1.0]]))


def test_steer() -> None:
    # Omega = A (1 - pi) (ln pi + H): 0.5 (-ln 2 + ln 2) = 0; 0.75 (-1.386294 + 1) = -0.289721;
    # -0.5 * 0.1 (-0.105361 + 0.6) = -0.024732. k = -ln 0.8 / 0.289721 = 0.770202; exp(-k |Omega|) = 1, 0.8, 0.981132
    advantages = double([[1.0, 1.0, -0.5]])
    logprobs = torch.log(double([[0.5, 0.25, 0.9]]))
    batch = batch_of(advantages, old_logprobs=logprobs, entropies=double([[math.log(2), 1.0, 0.6]]))
    torch.testing.assert_close(steer(advantages, batch), double([[1.0, 0.8, -0.490566]]), **PRINTED)


def test_steer_below_its_floor() -> None:
    # max |Omega| = 0.5 * |-0.693147 + 0.7| = 0.003426 < 0.02: k = 0.223144 / 0.02 = 11.157178,
    # exp(-0.038230) = 0.962492
    logprobs = torch.log(double([[0.5]]))
    batch = batch_of(logprobs, old_logprobs=logprobs, entropies=double([[0.7]]))
    torch.testing.assert_close(steer(double([[1.0]]), batch), double([[0.962492]]), **PRINTED)


def test_future_ratio() -> None:
    # gamma = 2^(-1/32) = 0.978572: sums 0.1 gamma^2 = 0.095760, 0.1 gamma = 0.097857, 0.1
    # exp: 1.100495, 1.102805, 1.105171
    ratios = double([[0.0, 0.0, 0.1]])
    batch = batch_of(ratios, old_logprobs=torch.full_like(ratios, -1.0), current_logprobs=ratios - 1.0)
    credit = future_ratio(double([[1.0, 1.0, -1.0]]), batch)
    torch.testing.assert_close(credit, double([[1.100495, 1.102805, -1.105171]]), **PRINTED)


def test_future_ratio_is_clipped_and_steps_over_holes() -> None:
    # half-life 1: gamma = 0.5. Chosen ratios 0, 1: sums 0.5, 1 -> e^0.5 = 1.648721, e clipped to 2. Second row:
    # -0.5, -1 -> e^-0.5 clipped to 0.7, e^-1 to 0.7
    ratios = double([[0.0, NAN, 1.0], [0.0, NAN, -1.0]])
    batch = batch_of(ratios, old_logprobs=torch.zeros_like(ratios) - 1.0, current_logprobs=ratios - 1.0)
    credit = future_ratio(torch.ones_like(ratios), batch, half_life=1.0, low=0.7, high=2.0)
    torch.testing.assert_close(credit, double([[1.648721, 0.0, 2.0], [0.7, 0.0, 0.7]]), **PRINTED)


def test_outcome_importance() -> None:
    # log1p(0, 1, 3, 7, 15) = (0, 1, 2, 3, 4) ln 2 -> x = 0, 0.25, 0.5, 0.75, 1; theta = quantile(0.4) = 0.4
    # w = 0.1, 0.625, 1 + 2 (0.1/0.6), 1 + 2 (0.35/0.6), 3; sum 7.225, times 5/7.225
    importances = double([[0.0, 1.0, 3.0, 7.0, 15.0]])
    batch = batch_of(importances, importances=importances)
    expected = double([[0.069204, 0.432526, 0.922722, 1.499423, 2.076125]])
    torch.testing.assert_close(outcome_importance(torch.ones_like(importances), batch), expected, **PRINTED)


def test_outcome_importance_has_mean_one_in_every_response(make_batch: Any) -> None:
    batch = make_batch(seed=4)
    ones = torch.ones(batch.response_mask.shape, dtype=torch.float64)
    for tau in (0.0, 0.3, 0.4, 1.0):
        weights = outcome_importance(ones, batch, tau=tau)
        torch.testing.assert_close(weights.sum(1), batch.response_mask.sum(1).double())


COVARIANCE_ADVANTAGES = double([[1.5, 1.5], [-0.5, -0.5], [-0.5, -0.5], [-0.5, -0.5]])
COVARIANCE_LOGPROBS = double([[0.0, -2.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]])


def test_clip_cov_drops_only_inside_its_range() -> None:
    # mean A = 0, mean ln pi = -0.375: c = (0.5625, -2.4375), (-0.1875, 0.3125), then -0.1875 everywhere
    batch = batch_of(COVARIANCE_ADVANTAGES, old_logprobs=COVARIANCE_LOGPROBS)
    for low, high, gone in ((0.5, 0.6, (0, 0)), (0.3, 0.5, (1, 1)), (-3.0, -2.0, (0, 1))):
        expected = COVARIANCE_ADVANTAGES.clone()
        expected[gone] = 0.0
        # one token is eligible and at least one is dropped: certain for any seed
        credit = clip_cov(COVARIANCE_ADVANTAGES, batch, generator=generator("cov"), low=low, high=high)
        torch.testing.assert_close(credit, expected)
    untouched = clip_cov(COVARIANCE_ADVANTAGES, batch, generator=generator("cov"), low=1.0, high=5.0)
    torch.testing.assert_close(untouched, COVARIANCE_ADVANTAGES)


def test_clip_cov_drops_the_share_on_average() -> None:
    # 5 tokens have c = -0.1875; share 0.25 of 8 tokens is 2 of them: 2/5 each. 150 draws: 300 drops,
    # sd sqrt(150 * 5 * 0.4 * 0.6) = 13.4
    batch = batch_of(COVARIANCE_ADVANTAGES, old_logprobs=COVARIANCE_LOGPROBS)
    draws = generator("share")
    dropped = 0
    for _ in range(150):
        credit = clip_cov(COVARIANCE_ADVANTAGES, batch, generator=draws, share=0.25, low=-0.2, high=-0.1)
        dropped += int((credit == 0).sum())
    assert abs(dropped - 300) < 4 * 13.4


@pytest.mark.parametrize(
    ("progress", "boost"),
    # 1 + (2 - 1) (1 - u)
    [(None, 2.0), (0.0, 2.0), (0.25, 1.75), (1.0, 1.0)],
)
def test_a3po(progress: float | None, boost: float) -> None:
    # 6 tokens: the 0.2-quantile lies at place 1.0, so the two least likely where A > 0, the two most likely where A < 0
    logprobs = double([[-1.0, -6.0, -3.0, -2.0, -5.0, -4.0], [-1.0, -6.0, -3.0, -2.0, -5.0, -4.0]])
    advantages = double([[1.0] * 6, [-1.0] * 6])
    batch = batch_of(logprobs, old_logprobs=logprobs, progress=progress)
    expected = double([[1, boost, 1, 1, boost, 1], [-boost, -1, -1, -boost, -1, -1]])
    torch.testing.assert_close(a3po(advantages, batch), expected)


def test_a3po_ends_at_until() -> None:
    logprobs = double([[-1.0, -2.0]])
    half = batch_of(logprobs, old_logprobs=logprobs, progress=0.25)
    # 1 + (3 - 1) (1 - 0.25 / 0.5) = 2, then nothing
    torch.testing.assert_close(a3po(torch.ones_like(logprobs), half, gain=3.0, until=0.5), double([[1.0, 2.0]]))
    torch.testing.assert_close(a3po(torch.ones_like(logprobs), half, until=0.25), torch.ones_like(logprobs))


def test_fipo_is_the_identity_on_the_first_update(make_batch: Any) -> None:
    batch = make_batch(host_advantages=True)
    same = make_batch(host_advantages=True, current_logprobs=batch.old_logprobs)
    assert torch.equal(assign_credit("fipo", same), assign_credit("grpo", same))


@pytest.mark.parametrize(
    ("clip_ratio_c", "expected"),
    # a ratio of e^1.5 = 4.48 counts for nothing, neither for the tokens before it nor for its own; without the
    # limit all three are clipped to 1.2. At 5 it counts
    [(3.0, [1.0, 1.0, 1.0]), (None, [1.2, 1.2, 1.2]), (5.0, [1.2, 1.2, 1.2])],
)
def test_fipo_leaves_exploded_ratios_out(clip_ratio_c: float | None, expected: list[float]) -> None:
    ratios = double([[0.0, 0.0, 1.5]])
    batch = batch_of(ratios, old_logprobs=torch.full_like(ratios, -2.0), current_logprobs=ratios - 2.0)
    credit = future_ratio(torch.ones_like(ratios), batch, clip_ratio_c=clip_ratio_c)
    torch.testing.assert_close(credit, double([expected]))


def test_fipo_ages_over_a_token_that_is_left_out() -> None:
    # half-life 1: the last ratio counts ¼ of .4 two places before, whatever stands between
    ratios = double([[0.0, 2.0, 0.4], [0.0, 0.0, 0.4]])
    batch = batch_of(ratios, old_logprobs=torch.full_like(ratios, -3.0), current_logprobs=ratios - 3.0)
    credit = future_ratio(torch.ones_like(ratios), batch, half_life=1.0, high=2.0)
    expected = [math.exp(0.1), math.exp(0.2), math.exp(0.4)]
    torch.testing.assert_close(credit, double([expected, expected]))
