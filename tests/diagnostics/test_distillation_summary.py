"""Summaries of distillation by hand."""

import math

import pytest
import torch
from batches import make_batch, permuted

from tokencredit import TokenBatch, assign_credit, get_pipeline
from tokencredit.diagnostics.distillation import (
    BONUSES,
    discrepancy_summary,
    router_summary,
    teacher_sums,
)
from tokencredit.diagnostics.position import position_profile
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.methods.outcome import group_normalized

NAN = math.nan


def batch_of(gaps, mask=None, **fields) -> TokenBatch:
    gap = torch.tensor(gaps)
    values = {
        "response_ids": torch.arange(gap.numel()).reshape(gap.shape),
        "response_mask": torch.ones_like(gap, dtype=torch.bool) if mask is None else torch.tensor(mask),
        "rewards": torch.zeros(len(gap)),
        "group_ids": torch.arange(len(gap)),
        "old_logprobs": -gap.clamp_min(0.0),
        "teacher_logprobs": gap.clamp_max(0.0),
    }
    return TokenBatch(**(values | fields))


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


def test_logged_numbers_are_the_summaries() -> None:
    # The bonus of a DASD run is what the pipeline added to the verifier's advantages.
    batch = make_batch()
    base = assign_credit("grpo", batch)
    advantages = assign_credit(get_pipeline("dasd"), batch)
    found = credit_metrics(batch, advantages, base)
    router, weights = router_summary(batch, base), discrepancy_summary(batch)
    for name in ("positive", "negative"):
        assert found[f"credit/router/{name}"] == pytest.approx(router[f"router_{name}"])
    for name in ("attracted", "overruled", "bonus_rms", "advantage_rms", "entropy_p80", *BONUSES):
        assert found[f"credit/router/{name}"] == pytest.approx(router[name], abs=1e-7)
    for name in ("weight_mean", "mass_multiplier", "first_share", "half_mass", "distance"):
        assert found[f"credit/teacher/{name}"] == pytest.approx(weights[name])
    assert found["credit/teacher/gap"] == pytest.approx(router["gap_mean"])
    gap = (batch.teacher_logprobs - batch.old_logprobs).abs()
    for tenth, value in enumerate(position_profile(gap, batch.response_mask).mean.nan_to_num().tolist()):
        assert found.get(f"credit/teacher/gap_abs/{tenth}", None) == (pytest.approx(value, abs=1e-4) if value else None)
    assert sum(abs(router[name]) for name in BONUSES) > 0.0


def test_nothing_is_said_of_a_teacher_that_is_not_there() -> None:
    batch = make_batch(without=("teacher_logprobs",))
    assert not [
        name for name in credit_metrics(batch, group_normalized(batch)) if "teacher" in name or "router" in name
    ]


def test_sums_of_two_parts_are_those_of_the_whole() -> None:
    batch = make_batch()
    base = assign_credit("grpo", batch)
    advantages = assign_credit(get_pipeline("dasd"), batch)
    whole = teacher_sums(batch, advantages, base)
    assert set(whole) == {"teacher_profile", "teacher_discrepancy", "teacher_router"}
    parts = [
        teacher_sums(permuted(batch, rows), advantages[rows], base[rows]) for rows in torch.arange(len(base)).split(5)
    ]
    for name, total in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), total)
    empty = teacher_sums(permuted(batch, torch.arange(0)), advantages[:0], base[:0])
    assert all(float(value.abs().sum()) == 0.0 for value in empty.values())
