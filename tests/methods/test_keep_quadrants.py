"""Golden values of the Four Quadrant Decomposition."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.errors import TokenCreditError
from tokencredit.methods.entropy.quadrants import QUADRANTS, high_entropy, keep_quadrants, quadrant_masks
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline, get_pipeline


def batch_of(entropies: list[list[float]], rewards: list[float], group_ids: list[int] | None = None) -> TokenBatch:
    values = torch.tensor(entropies)
    return TokenBatch(
        response_ids=torch.arange(values.numel()).reshape(values.shape),
        response_mask=~values.isnan(),
        rewards=torch.tensor(rewards),
        group_ids=torch.tensor(group_ids or [0] * len(rewards)),
        entropies=values,
    )


# mean entropy 4/8 = 0.5; advantages 1.5, -0.5, -0.5, -0.5
GROUP = batch_of([[0.0, 3.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [1.0, -1.0, -1.0, -1.0])
ADVANTAGES = torch.tensor([[1.5] * 2, [-0.5] * 2, [-0.5] * 2, [-0.5] * 2], dtype=torch.float64)
MEMBERS = {
    "PHR": [[0, 1], [0, 0], [0, 0], [0, 0]],
    "PLR": [[1, 0], [0, 0], [0, 0], [0, 0]],
    "NHR": [[0, 0], [0, 1], [0, 0], [0, 0]],
    "NLR": [[0, 0], [1, 0], [1, 1], [1, 1]],
}


@pytest.mark.parametrize(
    ("quadrant", "loss"),
    # token-mean losses at ratio 1: -1.5/8, -1.5/8, 0.5/8, 5 * 0.5/8
    [("PHR", -0.1875), ("PLR", -0.1875), ("NHR", 0.0625), ("NLR", 0.3125)],
)
def test_quadrants_of_the_example(quadrant: str, loss: float) -> None:
    credit = keep_quadrants(ADVANTAGES, GROUP, quadrants=[quadrant])
    torch.testing.assert_close(credit, ADVANTAGES * torch.tensor(MEMBERS[quadrant]))
    assert float(-credit.sum() / 8) == pytest.approx(loss)
    # through the preset, whose estimator divides by std + 1e-6
    preset = assign_credit(quadrant.lower(), GROUP)
    torch.testing.assert_close(preset, credit.float(), rtol=0.0, atol=2e-6)


def test_the_four_sum_to_the_whole(make_batch: Any) -> None:
    for seed in range(3):
        batch = make_batch(seed=seed, groups=(6, 5, 4), response=20)
        parts = [
            assign_credit(Pipeline.of("group_normalized", {"keep_quadrants": {"quadrants": [q]}}), batch)
            for q in QUADRANTS
        ]
        assert torch.equal(sum(parts), assign_credit("grpo", batch))
        inside = torch.stack(list(quadrant_masks(torch.randn(batch.response_mask.shape).double(), batch).values()))
        assert torch.equal(inside.sum(0), batch.response_mask.long())  # each token in exactly one


def test_selected_divides_by_the_selected_tokens() -> None:
    # 2 of 8 tokens are high: times 4, so that the token mean is over the two
    credit = keep_quadrants(ADVANTAGES, GROUP, normalize="selected")
    expected = torch.tensor([[0.0, 6.0], [0.0, -2.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(credit, expected)


def test_no_credit_lies_in_no_quadrant() -> None:
    members = quadrant_masks(torch.zeros(4, 2, dtype=torch.float64), GROUP)
    assert not any(bool(inside.any()) for inside in members.values())


def test_the_threshold_pools_tokens_unless_told_otherwise() -> None:
    # pooled 4.2 / 5 = 0.84: 0.85 is high; mean of means (0.8 + 1.0) / 2 = 0.9: it is low
    batch = batch_of([[0.0, 0.0, 0.85, 2.35], [1.0, math.nan, math.nan, math.nan]], [1.0, 0.0])
    pooled = torch.tensor([[False, False, True, True], [True, False, False, False]])
    means = torch.tensor([[False, False, False, True], [True, False, False, False]])
    assert torch.equal(high_entropy(batch), pooled)
    assert torch.equal(high_entropy(batch, threshold="response_means"), means)


def test_each_group_has_its_own_threshold() -> None:
    # means 0.5 and 2.5
    batch = batch_of([[0.0, 1.0], [2.0, 3.0]], [1.0, 1.0], [4, 2])
    assert torch.equal(high_entropy(batch), torch.tensor([[False, True], [False, True]]))


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e-5])
@pytest.mark.parametrize("threshold", ["pooled", "response_means"])
def test_constant_entropies_are_all_high(value: float, threshold: Any) -> None:
    # the mean of three 0.1 is 0.10000000000000002 and would exceed them all
    for rows in (1, 3, 7):
        batch = batch_of([[value] * 3] * rows, [1.0] * rows)
        batch = replace(batch, entropies=torch.full((rows, 3), value, dtype=torch.float64))
        assert bool(high_entropy(batch, threshold=threshold).all())


def test_quadrants_are_named_when_the_pipeline_is_built() -> None:
    with pytest.raises(TokenCreditError, match=r"`quadrants` of keep_quadrants must be a list out of \['PHR', 'PLR'"):
        Pipeline.parse(["group_normalized", {"keep_quadrants": {"quadrants": ["PHR", "HHR"]}}])
    with pytest.raises(TokenCreditError, match="got 'PHR'"):
        get_pipeline("phr", quadrants="PHR")
