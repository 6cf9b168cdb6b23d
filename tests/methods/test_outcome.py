"""Golden values of the estimators that give a response one credit."""

from dataclasses import replace

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.methods.outcome import correct_rows, group_centered, group_normalized, leave_one_out, signed_outcome
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import get_pipeline


def outcomes(rewards: list[float], group_ids: list[int] | None = None) -> TokenBatch:
    """Responses of two tokens and one place of padding."""
    rows = len(rewards)
    return TokenBatch(
        response_ids=torch.arange(rows * 3).reshape(rows, 3),
        response_mask=torch.tensor([True, True, False]).expand(rows, 3),
        rewards=torch.tensor(rewards),
        group_ids=torch.tensor(group_ids or [0] * rows),
    )


def per_token(credit: list[float]) -> torch.Tensor:
    column = torch.tensor(credit)[:, None]
    return torch.cat((column, column, torch.zeros_like(column)), dim=1)


def test_grpo_of_one_success_in_four() -> None:
    # mean -0.5, deviations 1.5, -0.5, -0.5, -0.5, unbiased std = sqrt((2.25 + 3 * 0.25) / 3) = 1
    expected = per_token([1.5, -0.5, -0.5, -0.5])
    batch = outcomes([1.0, -1.0, -1.0, -1.0])
    # eps = 1e-6 in the denominator moves the third digit behind the sixth: 1.5 / 1.000001
    torch.testing.assert_close(assign_credit("grpo", batch), expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(assign_credit(get_pipeline("grpo", eps=0.0), batch), expected)


@pytest.mark.parametrize(
    ("correct", "positive"),
    # A+ = sqrt(7/8 (8 - c) / c): deviations (8-c)/8 and -c/8, unbiased variance c (8-c) / (8 * 7)
    [(1, 2.474874), (2, 1.620185), (3, 1.207615), (4, 0.935414), (5, 0.724569), (6, 0.540062), (7, 0.353553)],
)
def test_grpo_of_eight_by_the_number_correct(correct: int, positive: float) -> None:
    negative = -((7 / 8 * correct / (8 - correct)) ** 0.5)  # A-(c) = -A+(8 - c)
    batch = outcomes([1.0] * correct + [0.0] * (8 - correct))
    expected = per_token([positive] * correct + [negative] * (8 - correct))
    # the positive values are printed to six digits
    torch.testing.assert_close(assign_credit(get_pipeline("grpo", eps=0.0), batch), expected, rtol=0.0, atol=1e-6)


def test_groups_are_apart() -> None:
    # group 3: rewards 1, 0 -> deviations 0.5, std sqrt(0.5) = 0.70710678 -> +-0.70710678
    # group -1: 2, 4 -> deviations -1, 1, std sqrt(2) -> the same; group 8: one response -> 0
    batch = outcomes([1.0, 2.0, 7.0, 0.0, 4.0], [3, -1, 8, 3, -1])
    expected = per_token([0.70710678, -0.70710678, 0.0, -0.70710678, 0.70710678])
    torch.testing.assert_close(assign_credit(get_pipeline("grpo", eps=0.0), batch), expected)


def test_equal_rewards_give_exactly_nothing() -> None:
    # 0.1 * 3 / 3 is not 0.1 in floating point; divided by eps a rounding error would become 1e-11
    for reward in (0.1, 0.7, 1e6 + 0.1, -3.3):
        for estimator in (group_normalized, group_centered, leave_one_out):
            assert torch.equal(estimator(outcomes([reward] * 3)), torch.zeros(3, 3, dtype=torch.float64))


def test_eps_zero_stands_a_constant_group() -> None:
    credit = group_normalized(outcomes([1.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 0, 1, 2]), eps=0.0)
    assert torch.equal(credit, torch.zeros(5, 3, dtype=torch.float64))


def test_the_hosts_own_advantages_are_handed_on() -> None:
    given = torch.tensor([0.3, -1.7, 1e-8])
    batch = replace(outcomes([1.0, 0.0, 0.0]), host_advantages=given)
    expected = torch.where(batch.response_mask, given[:, None], 0.0)
    assert torch.equal(assign_credit("grpo", batch), expected)


def test_dr_grpo() -> None:
    # mean 0.25 -> 0.75 and -0.25 three times
    credit = assign_credit("dr_grpo", outcomes([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(credit, per_token([0.75, -0.25, -0.25, -0.25]))


def test_rloo() -> None:
    # 1 - (-1) = 2; -1 - (1 - 1 - 1)/3 = -2/3
    credit = assign_credit("rloo", outcomes([1.0, -1.0, -1.0, -1.0]))
    torch.testing.assert_close(credit, per_token([2.0, -2 / 3, -2 / 3, -2 / 3]))
    assert torch.equal(leave_one_out(outcomes([5.0])), torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("w_reinforce", [0.1, -1.0, -1.0]), ("psr", [1.0, 0.0, 0.0]), ("nsr", [0.0, -1.0, -1.0])],
)
@pytest.mark.parametrize("failure", [0.0, -1.0])
def test_signed_outcomes(preset: str, expected: list[float], failure: float) -> None:
    # no baseline: the sign of the outcome decides, for 0/1 and for -1/+1 rewards alike
    torch.testing.assert_close(assign_credit(preset, outcomes([1.0, failure, failure])), per_token(expected))


def test_the_threshold_of_signed_outcomes() -> None:
    batch = outcomes([0.2, 0.5, 0.6])
    credit = signed_outcome(batch, positive=2.0, negative=3.0, threshold=0.5)
    torch.testing.assert_close(torch.where(batch.response_mask, credit, 0.0), per_token([-3.0, -3.0, 2.0]).double())


def test_correct_is_strictly_above_the_threshold() -> None:
    batch = outcomes([-1.0, 0.0, 0.1, 1.0])
    assert correct_rows(batch).tolist() == [False, False, True, True]
    assert correct_rows(batch, 0.1).tolist() == [False, False, False, True]
    assert correct_rows(batch, -1.0).tolist() == [False, True, True, True]
    for preset, expected in (("psr", [0.0, 0.0, 0.0, 1.0]), ("nsr", [-1.0, -1.0, -1.0, 0.0])):
        credit = assign_credit(get_pipeline(preset, threshold=0.5), batch)
        torch.testing.assert_close(credit, per_token(expected))
