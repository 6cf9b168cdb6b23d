"""Summaries of distillation by hand."""

import math
from dataclasses import replace

import pytest
import torch
from batches import make_batch, permuted

from tokencredit import TokenBatch, assign_credit, get_pipeline
from tokencredit.diagnostics.distillation import (
    BONUSES,
    teacher_sums,
)
from tokencredit.diagnostics.position import position_profile
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.methods.distillation.dasd import directed_self_distillation
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


def test_discrepancy_by_hand() -> None:
    # w = 1.5, 1.375, 1.375, 1.125; spent before each token 0, ¼, ¼, ¾; way 0, ¼, ½, ¾
    batch = batch_of([[1.0, 0.0, -2.0, -1.0, NAN]], [[True, True, True, True, False]])
    found = credit_metrics(batch, torch.zeros(1, 5))
    expected = {
        "weight_mean": 5.375 / 4,
        "mass_multiplier": 1.34375,
        "first_share": 0.25,  # the tokens at 0 and ¼
        "half_mass": 0.5,
        "distance": 0.25,  # at ½
        "gap": -0.5,
        "gap_abs": 1.0,
    }
    assert {name: found[f"credit/teacher/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert "credit/teacher/distance" not in credit_metrics(batch_of([[0.0, 0.0]]), torch.zeros(1, 2))


def test_the_router_splits_the_bonus() -> None:
    entropies = torch.tensor([[0.0, 0.1, 0.2, 1.0, 2.0]] * 2)
    gaps = [[1.0, -1.0, 2.0, -5.0, 1.0]] * 2
    batch = batch_of(gaps, entropies=entropies, rewards=torch.tensor([1.0, 0.0]))
    base = torch.full((2, 5), 0.1)
    metrics = credit_metrics(batch, directed_self_distillation(base, batch, beta=1.0), base)
    found = {name.removeprefix("credit/router/"): value for name, value in metrics.items()}
    # Of each row: bonus .1784 −.1750 .4515 −.5910 −.1568, router .9453 .9270 .9030 .2891 −.8307
    assert found["positive"] == pytest.approx(3.0644 / 5, abs=1e-4)
    assert found["negative"] == pytest.approx(-0.8307 / 5, abs=1e-4)
    assert found["attracted"] == pytest.approx(0.8)
    for verdict in ("correct", "wrong"):
        assert found[f"bonus_attract_up_{verdict}"] == pytest.approx(0.6299 / 10, abs=1e-4)
        assert found[f"bonus_attract_down_{verdict}"] == pytest.approx(-0.7660 / 10, abs=1e-4)
        assert found[f"bonus_repel_up_{verdict}"] == pytest.approx(-0.1568 / 10, abs=1e-4)
        assert found[f"bonus_repel_down_{verdict}"] == 0.0
    assert found["overruled"] == pytest.approx(0.6)  # three of five are below −0.1
    assert found["entropy_p80"] == pytest.approx(1.2)
    assert found["advantage_rms"] == pytest.approx(0.1)
    assert found["bonus_rms"] == pytest.approx(math.sqrt(0.6404 / 5), abs=1e-4)


def test_the_profile_of_the_gap() -> None:
    batch = make_batch()
    found = credit_metrics(batch, assign_credit(get_pipeline("dasd"), batch), assign_credit("grpo", batch))
    gap = (batch.teacher_logprobs - batch.old_logprobs).abs()
    for tenth, value in enumerate(position_profile(gap, batch.response_mask).mean.nan_to_num().tolist()):
        assert found.get(f"credit/teacher/gap_abs/{tenth}", None) == (pytest.approx(value, abs=1e-4) if value else None)
    assert sum(abs(found[f"credit/router/{name}"]) for name in BONUSES) > 0.0


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


def test_correct_is_above_the_threshold_in_the_metrics() -> None:
    # rewards of .1 for the format and 1.1 for the answer: without a threshold nothing is wrong
    batch = replace(make_batch(), rewards=0.1 + make_batch().rewards)
    base = group_normalized(batch)
    advantages = assign_credit(get_pipeline("dasd"), batch)
    wrong = [f"credit/router/{name}" for name in BONUSES if name.endswith("_wrong")]
    plain, shaped = credit_metrics(batch, advantages, base), credit_metrics(batch, advantages, base, threshold=0.5)
    assert all(plain[name] == 0.0 for name in wrong)
    original = credit_metrics(make_batch(), advantages, base)
    assert [shaped[name] for name in wrong] == [original[name] for name in wrong] != [0.0] * len(wrong)
