"""Quadrant statistics, weights and the numbers that a trainer logs, on one group worked by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import make_batch

from tokencredit import TokenBatch, assign_credit
from tokencredit.batch.records import TOKEN_FIELDS
from tokencredit.diagnostics.quadrants import (
    ENTROPY_EDGES,
    correlation_sums,
    entropy_histograms,
    pearson_from_sums,
    quadrant_statistics,
    relative_positions,
)
from tokencredit.diagnostics.summary import credit_metrics

# One group of four, two tokens each, r = (1, −1, −1, −1): Â = (1.5, −.5, −.5, −.5); mean entropy 4/8 = .5.
ENTROPIES = torch.tensor([[0.0, 3.0, torch.nan], [0.0, 1.0, torch.nan], [0.0, 0.0, torch.nan], [0.0, 0.0, torch.nan]])
BASE = torch.tensor([1.5, -0.5, -0.5, -0.5])


def group(entropies: bool = True) -> TokenBatch:
    return TokenBatch(
        response_ids=torch.arange(12).reshape(4, 3),
        response_mask=torch.tensor([[True, True, False]] * 4),
        rewards=torch.tensor([1.0, -1.0, -1.0, -1.0]),
        group_ids=torch.full((4,), 7),
        entropies=ENTROPIES if entropies else None,
    )


def broadcast(values: torch.Tensor) -> torch.Tensor:
    return torch.where(group().response_mask, values[:, None], torch.nan)


def test_quadrants_of_uniform_credit() -> None:
    found = quadrant_statistics(broadcast(BASE), group())
    # Σ|Â| = 2·1.5 + 6·.5 = 6; net over 8 tokens
    assert found["PHR"] == pytest.approx((1 / 8, 1.5 / 6, 3.0, 1.5 / 8))
    assert found["PLR"] == pytest.approx((1 / 8, 1.5 / 6, 0.0, 1.5 / 8))
    assert found["NHR"] == pytest.approx((1 / 8, 0.5 / 6, 1.0, -0.5 / 8))
    assert found["NLR"] == pytest.approx((5 / 8, 2.5 / 6, 0.0, -2.5 / 8))
    assert sum(value.tokens for value in found.values()) == pytest.approx(1.0)
    assert sum(value.mass for value in found.values()) == pytest.approx(1.0)


def test_polarity_shows_tokens_that_lost_their_credit() -> None:
    kept = torch.where(ENTROPIES > 2, broadcast(BASE), 0.0)  # only the token with H = 3
    without = quadrant_statistics(kept, group())
    assert without["NLR"].tokens == 0.0 and math.isnan(without["NLR"].entropy)
    found = quadrant_statistics(kept, group(), polarity=broadcast(BASE))
    assert found["NLR"] == pytest.approx((5 / 8, 0.0, 0.0, 0.0))
    assert found["PHR"] == pytest.approx((1 / 8, 1.0, 3.0, 1.5 / 8))


def test_credit_metrics_of_hapo_by_hand() -> None:
    batch = group()
    found = credit_metrics(batch, assign_credit("hapo", batch), BASE)
    expected = {
        "credit/unscored": 0.0,
        "credit/tokens": 8,
        "credit/credited_share": 1.0,
        "credit/abs_mean": 5.85 / 8,
        "credit/net": 0.25 / 8,  # HAPO is not mass-preserving: +.25 where uniform credit sums to 0
        "credit/group_net_abs": 0.25 / 8,
        # G of two tokens a < b is (b − a)/(2(a + b)): .25/6.1, .1/2, 0, 0
        "credit/gini": (0.25 / 6.1 + 0.1 / 2) / 4,
        # (a + b)²/(2(a² + b²)): 3.05²/(2·4.6825), 1/(2·.505), 1, 1
        "credit/effective_token_ratio": (9.3025 / 9.365 + 1 / 1.01 + 2) / 4,
        "credit/weight/mean": (0.933333 + 1.1 + 0.9 + 1.1 + 3.6) / 8,
        "credit/weight/min": 0.9,
        "credit/weight/max": 1.1,
        "credit/weight/positive": (0.933333 + 1.1) / 2,
        "credit/weight/negative": (0.9 + 1.1 + 3.6) / 6,
        "credit/sign_flips": 0.0,
        "credit/entropy": 0.5,
        # positions .25 and .75, σ = .25; σ_H² = 10/8 − .25 = 1; cov = (3·.75 + 1·.75)/8 − .5·.5 = .125
        "credit/entropy_position": 0.125 / (0.25 * 1.0),
        "credit/PHR/tokens": 1 / 8,
        "credit/PHR/mass": 1.65 / 5.85,
        "credit/PHR/entropy": 3.0,
        "credit/PHR/net": 1.65 / 8,
        "credit/PLR/tokens": 1 / 8,
        "credit/PLR/mass": 1.4 / 5.85,
        "credit/PLR/entropy": 0.0,
        "credit/PLR/net": 1.4 / 8,
        "credit/NHR/tokens": 1 / 8,
        "credit/NHR/mass": 0.55 / 5.85,
        "credit/NHR/entropy": 1.0,
        "credit/NHR/net": -0.55 / 8,
        "credit/NLR/tokens": 5 / 8,
        "credit/NLR/mass": 2.25 / 5.85,
        "credit/NLR/entropy": 0.0,
        "credit/NLR/net": -2.25 / 8,
    }
    assert found == pytest.approx(expected, abs=1e-5)


def logged_keys(heading: str) -> list[str]:
    """The keys in the table below a heading of the page."""
    text = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    table = text.partition(f"# {heading}")[2].partition("\n##")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return sorted(re.findall("`([^`]+)`", " ".join(rows)))


def test_every_logged_key_is_explained_once() -> None:
    batch = group()
    plain = credit_metrics(batch, assign_credit("hapo", batch), BASE)
    assert logged_keys("Logged keys") == sorted({re.sub("PHR|PLR|NHR|NLR", "QUADRANT", key) for key in plain})
    taught = replace(batch, teacher_logprobs=torch.full((4, 3), -1.0), old_logprobs=torch.full((4, 3), -2.0))
    more = credit_metrics(taught, assign_credit("hapo", taught), BASE).keys() - plain.keys()
    named = {re.sub(r"(gap_abs)/\d", r"\1/TENTH", key) for key in more}
    named = {re.sub(r"bonus_[a-z]+_(up|down)_[a-z]+", "bonus_ARM_SIGN_OUTCOME", key) for key in named}
    assert logged_keys("With a teacher") == sorted(named)


def test_credit_metrics_with_fields_missing() -> None:
    found = credit_metrics(group(entropies=False), broadcast(BASE))
    assert set(found) == {
        f"credit/{key}"
        for key in (
            *("unscored", "tokens", "credited_share", "abs_mean", "net", "group_net_abs", "gini"),
            "effective_token_ratio",
        )
    }
    assert all(math.isfinite(value) for value in found.values())


def test_credit_metrics_of_nothing() -> None:
    batch = replace(group(), response_mask=torch.zeros(4, 3, dtype=torch.bool))
    assert credit_metrics(batch, torch.zeros(4, 3), torch.zeros(4)) == {
        "credit/unscored": 1.0,
        "credit/tokens": 0.0,
    } | {f"credit/{name}/mass": 0.0 for name in ("PHR", "PLR", "NHR", "NLR")}


def test_credit_metrics_add_up_over_groups_and_padding() -> None:
    one = group()
    two = replace(
        one,
        response_ids=torch.cat((one.response_ids, one.response_ids)),
        response_mask=torch.cat((one.response_mask, one.response_mask)),
        rewards=torch.cat((one.rewards, one.rewards)),
        group_ids=torch.cat((one.group_ids, one.group_ids - 9)),
        entropies=torch.cat((ENTROPIES, ENTROPIES)),
    )
    base = torch.cat((BASE, BASE))
    expected = credit_metrics(one, assign_credit("hapo", one), BASE)
    found = credit_metrics(two, assign_credit("hapo", two), base)
    assert found == pytest.approx(expected | {"credit/tokens": 16}, rel=1e-9)


def test_net_of_groups_counts_each_group_once() -> None:
    # Group 0: rows (+3, −1) and (+1, 0): |3/4|. Group 1: one row (−2): 2. Group 2: an empty row, left out.
    advantages = torch.tensor([[3.0, -1.0], [1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    batch = TokenBatch(
        response_ids=torch.zeros(4, 2, dtype=torch.long),
        response_mask=torch.tensor([[True, True], [True, True], [True, False], [False, False]]),
        rewards=torch.zeros(4),
        group_ids=torch.tensor([0, 0, 1, 2]),
    )
    found = credit_metrics(batch, advantages)
    assert found["credit/group_net_abs"] == pytest.approx((0.75 + 2.0) / 2)
    assert found["credit/credited_share"] == 4 / 5
    assert found["credit/net"] == pytest.approx(1 / 5)


class Halves:
    """A reducer that adds what another rank would have sent: the same rows again, under the same group ids."""

    def total(self, local: torch.Tensor) -> torch.Tensor:
        return local * 2

    def maximum(self, local: torch.Tensor) -> torch.Tensor:
        return local

    def labels(self, group_ids: torch.Tensor) -> torch.Tensor:
        return group_ids.unique()


def test_two_ranks_log_what_one_rank_logs() -> None:
    one = group()
    doubled = {name: torch.cat((value, value)) for name, value in one.tensors().items()}
    whole = TokenBatch(**doubled)  # type: ignore[arg-type]
    split = replace(one, reducer=Halves())
    advantages = assign_credit("hapo", group())
    expected = credit_metrics(whole, torch.cat((advantages, advantages)), torch.cat((BASE, BASE)))
    assert credit_metrics(split, advantages, BASE) == pytest.approx(expected, rel=1e-9)


def test_entropy_position_correlation() -> None:
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    rising = torch.tensor([[1 / 6, torch.nan, 3 / 6, 5 / 6], [1 / 4, 3 / 4, torch.nan, torch.nan]])
    for values, expected in ((rising, 1.0), (-2 * rising, -1.0), (torch.full((2, 4), 0.1), math.nan)):
        found = pearson_from_sums(*correlation_sums(values, relative_positions(mask), mask).tolist())
        assert found == pytest.approx(expected, nan_ok=True)


def test_histograms_count_every_chosen_token_once() -> None:
    found = entropy_histograms(group(), broadcast(torch.tensor([1.5, -0.5, -0.5, 0.0])))
    low, one, three = (np.searchsorted(ENTROPY_EDGES, value, side="right") - 1 for value in (0.0, 1.0, 3.0))
    assert found["positive"][[low, three]].tolist() == [1, 1] and found["positive"].sum() == 2
    assert found["negative"][[low, one]].tolist() == [3, 1] and found["negative"].sum() == 4
    assert found["none"].sum() == 2
    assert len(found["none"]) == len(ENTROPY_EDGES) - 1


def test_unscored_responses_enter_no_metric_but_their_share() -> None:
    plain = make_batch(seed=4, groups=(3, 3, 2))
    rows = len(plain.rewards)
    order = torch.tensor([0, 1, 1, *range(2, rows)])  # the third row is a copy of the second, of which nobody knows
    scored = torch.ones(rows + 1, dtype=torch.bool)
    scored[2] = False
    more = replace(plain.rows(order), scored=scored)
    noise = {name: torch.where(scored, more.rewards, torch.nan) for name in ("rewards",)}
    noise |= {name: torch.where(scored[:, None], getattr(more, name), torch.nan) for name in TOKEN_FIELDS}
    more = replace(more, **noise)
    base, dirty = assign_credit("grpo", plain), assign_credit("grpo", more)
    found = credit_metrics(more, assign_credit("hapo", more) + 7.0 * ~scored[:, None], dirty)
    expected = credit_metrics(plain, assign_credit("hapo", plain), base)
    empty = int((~plain.counted).sum())
    assert found.pop("credit/unscored") == pytest.approx((empty + 1) / (rows + 1))
    assert expected.pop("credit/unscored") == pytest.approx(empty / rows)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["entropies", "teacher_logprobs"])
def test_a_field_of_nan_leaves_its_metrics_out_and_stops_nothing(name: str) -> None:
    batch = make_batch(seed=4)
    base = assign_credit("grpo", batch)
    whole = credit_metrics(batch, base, base)
    broken = torch.where(torch.arange(12) == batch.response_mask[0].byte().argmax(), torch.nan, getattr(batch, name))
    found = credit_metrics(replace(batch, **{name: broken}), base, base)
    left_out = whole.keys() - found.keys()
    assert found == {key: pytest.approx(whole[key]) for key in found}
    marks = ("entropy", "HR", "LR", "router") if name == "entropies" else ("teacher", "router")
    assert left_out == {key for key in whole if any(mark in key for mark in marks)}


def test_the_threshold_says_which_responses_are_correct() -> None:
    batch = make_batch(seed=4)
    shaped = replace(batch, rewards=0.1 + 0.9 * batch.rewards)  # 0.1 for the format
    base, credit = assign_credit("grpo", shaped), assign_credit("dasd", shaped)
    plain = credit_metrics(batch, credit, base)
    assert credit_metrics(shaped, credit, base, threshold=0.5) == plain
    lenient = credit_metrics(shaped, credit, base)
    assert all(lenient[key] == 0.0 for key in lenient if key.endswith("_wrong"))
    assert any(plain[key] != 0.0 for key in plain if key.endswith("_wrong"))
