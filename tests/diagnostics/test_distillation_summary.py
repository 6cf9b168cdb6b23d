"""Summaries of distillation by hand."""

import math

import pytest
import torch

from tokencredit import TokenBatch
from tokencredit.diagnostics.distillation import discrepancy_summary, position_profile, router_summary

NAN = math.nan


def batch_of(gaps, mask=None, **fields) -> TokenBatch:
    gap = torch.tensor(gaps)
    values = {
        "response_ids": torch.arange(gap.numel()).reshape(gap.shape),
        "response_mask": torch.ones_like(gap, dtype=torch.bool) if mask is None else torch.tensor(mask),
        "rewards": torch.zeros(len(gap)),
        "group_ids": torch.arange(len(gap)),
        "old_logprobs": torch.zeros_like(gap),
        "teacher_logprobs": gap,
    }
    return TokenBatch(**(values | fields))


def test_profile_counts_chosen_tokens_by_share_of_the_way() -> None:
    # Row 0: halves (1, −3) and (5, 7); row 1 has one chosen token, in the first half.
    x = torch.tensor([[1.0, NAN, -3.0, 5.0, 7.0], [NAN, 2.0, NAN, NAN, NAN]])
    mask = torch.tensor([[True, False, True, True, True], [False, True, False, False, False]])
    assert position_profile(x, mask, bins=2) == {"mean": [0.0, 6.0], "mean_abs": [2.0, 6.0]}
    assert position_profile(x, mask & False, bins=2) == {"mean": [None, None], "mean_abs": [None, None]}


def test_discrepancy_summary() -> None:
    # w = 1.5, 1.375, 1.375, 1.125; spent before each token 0, ¼, ¼, ¾; way 0, ¼, ½, ¾
    batch = batch_of([[1.0, 0.0, -2.0, -1.0, NAN]], [[True, True, True, True, False]])
    found = discrepancy_summary(batch)
    assert found == pytest.approx(
        {
            "weight_mean": 5.375 / 4,
            "weight_min": 1.125,
            "weight_max": 1.5,
            "mass_multiplier": 1.34375,
            "first_share": 0.25,  # the tokens at 0 and ¼
            "half_mass": 0.5,
            "distance": 0.25,  # at ½
        },
        abs=1e-6,
    )
    assert discrepancy_summary(batch_of([[0.0, 0.0]])) == {}


def test_router_summary_splits_the_bonus() -> None:
    entropies = torch.tensor([[0.0, 0.1, 0.2, 1.0, 2.0]] * 2)
    gaps = [[1.0, -1.0, 2.0, -5.0, 1.0]] * 2
    batch = batch_of(gaps, entropies=entropies, rewards=torch.tensor([1.0, 0.0]))
    found = router_summary(batch, torch.full((2, 5), 0.1), beta=1.0)
    # Of each row: bonus .1784 −.1750 .4515 −.5910 −.1568, router .9453 .9270 .9030 .2891 −.8307
    assert found["router_positive"] == pytest.approx(3.0644 / 5, abs=1e-4)
    assert found["router_negative"] == pytest.approx(-0.8307 / 5, abs=1e-4)
    assert found["attracted"] == 0.8
    for verdict in ("correct", "wrong"):
        assert found[f"bonus_attract_up_{verdict}"] == pytest.approx(0.6299 / 10, abs=1e-4)
        assert found[f"bonus_attract_down_{verdict}"] == pytest.approx(-0.7660 / 10, abs=1e-4)
        assert found[f"bonus_repel_up_{verdict}"] == pytest.approx(-0.1568 / 10, abs=1e-4)
        assert found[f"bonus_repel_down_{verdict}"] == 0.0
    assert found["overruled"] == 0.6  # three of five are below −0.1
    assert found["gap_mean"] == pytest.approx(-0.4)
    assert found["gap_abs"] == pytest.approx(2.0)
    assert found["entropy_p80"] == pytest.approx(1.2)
    assert found["advantage_rms"] == pytest.approx(0.1)
    assert found["bonus_rms"] == pytest.approx(math.sqrt(0.6404 / 5), abs=1e-4)
