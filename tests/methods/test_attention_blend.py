"""The published reweighting by attention entropy: its vectors, its schedule, its controls, its hard subsets."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.errors import TokenCreditError
from tokencredit.methods.attention.blend import attention_blend
from tokencredit.methods.position import keep_positions
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline, get_pipeline
from tokencredit.seeds import generator

NAN = math.nan
FOUR = [0.2, 0.5, 0.8, 1.0]
PLACES = [0.0, 0.264794, 0.650068, 1.0]  # from e^{Ê/.8} = 1.284025, 1.868246, 2.718282, 3.490343
PRINTED = {"rtol": 0.0, "atol": 1e-6}


def batch_of(values: list[list[float]], **fields: Any) -> TokenBatch:
    """One group, every response accepted or not by turns; NaN is outside the mask."""
    entropies = torch.tensor(values, dtype=torch.float64)
    given = {
        "response_ids": torch.arange(entropies.numel()).view(entropies.shape),
        "response_mask": ~entropies.isnan(),
        "rewards": torch.arange(len(values)) % 2.0,
        "group_ids": torch.zeros(len(values), dtype=torch.long),
        "attention_entropies": entropies,
        "step": 0,
    }
    return TokenBatch(**(given | fields))


def ones(batch: TokenBatch) -> torch.Tensor:
    return torch.ones(batch.response_mask.shape, dtype=torch.float64)


def weights(step: int | None, **given: Any) -> list[float]:
    batch = batch_of([FOUR], step=step)
    return attention_blend(ones(batch), batch, **given)[0].tolist()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [1.0, 0.735206, 0.349932, 0.0]),
        (20, [0.75, 0.617603, 0.424966, 0.25]),  # w_low .75, w_high .25
        (40, [0.5, 0.5, 0.5, 0.5]),
        (80, PLACES),
        (10_000, PLACES),
    ],
)
def test_low_to_high(step: int, expected: list[float]) -> None:
    assert weights(step) == pytest.approx(expected, abs=1e-6)
    # the other direction is the same schedule with its ends exchanged
    assert weights(step, direction="high_to_low") == pytest.approx([1 - w for w in expected], abs=1e-6)


@pytest.mark.parametrize("step", [None, 0, 40, 500])
def test_static_arms_need_no_step(step: int | None) -> None:
    assert weights(step, direction="static_explorer") == pytest.approx(PLACES, abs=1e-6)
    assert weights(step, direction="static_anchor") == pytest.approx([1 - place for place in PLACES], abs=1e-6)


def test_extrema_are_those_of_the_batch() -> None:
    # the two responses share m = .2 and M = 1; alone the first would reach from 0 to 1
    batch = batch_of([[0.5, 0.8], [0.2, 1.0]], step=80)
    expected = torch.tensor([[PLACES[1], PLACES[2]], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(attention_blend(ones(batch), batch), expected, **PRINTED)
    # tokens that the policy did not choose are not in the batch
    wide = batch_of([[0.5, NAN, 0.8], [0.2, 1.0, NAN]], step=80)
    credit = attention_blend(ones(wide), wide)
    assert credit[wide.response_mask].tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-6)


@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.8, 50.0])
def test_the_closed_form_is_the_normalised_softmax(tau: float) -> None:
    values = torch.rand(3, 40, generator=generator("softmax"), dtype=torch.float64)
    batch = batch_of(values.tolist(), step=80)
    alpha = torch.softmax(values.flatten() / tau, 0)
    expected = ((alpha - alpha.min()) / (alpha.max() - alpha.min())).view_as(values)
    torch.testing.assert_close(attention_blend(ones(batch), batch, tau=tau), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("tau", "expected"), [(1e-320, [0.0, 0.0, 0.0, 1.0]), (1e308, [0.0, 0.375, 0.75, 1.0])])
def test_the_ends_of_the_temperature(tau: float, expected: list[float]) -> None:
    # everything on the highest Ê, or a straight line from the least to the greatest
    assert weights(80, tau=tau) == pytest.approx(expected, abs=1e-12)


def test_equal_entropies_get_half_of_both_ends() -> None:
    batch = batch_of([[0.4, 0.4], [0.4, NAN]], step=0)
    assert attention_blend(ones(batch), batch).tolist() == [[0.5, 0.5], [0.5, 0.0]]
    one = batch_of([[0.7]], step=80)
    assert attention_blend(ones(one), one, high=(0.0, 3.0)).item() == 1.5


def test_a_share_of_the_run_in_the_place_of_steps() -> None:
    def at(progress: float | None, share: float) -> list[float]:
        batch = batch_of([FOUR], step=None, progress=progress)
        return attention_blend(ones(batch), batch, warmup_share=share)[0].tolist()

    assert at(0.25, 0.5) == [0.5] * 4
    assert at(0.5, 0.5) == at(0.9, 0.5) == pytest.approx(PLACES, abs=1e-6)
    assert at(None, 1.0) == at(0.0, 1.0) == pytest.approx([1 - place for place in PLACES], abs=1e-6)


def test_own_endpoints_and_one_sign_only() -> None:
    assert weights(0, low=(0.5, 1.0), high=(2.0, 2.0)) == pytest.approx([0.5 + 1.5 * p for p in PLACES], abs=1e-6)
    assert weights(80, low=(0.5, 1.0), high=(2.0, 2.0)) == pytest.approx([1.0 + p for p in PLACES], abs=1e-6)
    batch = batch_of([FOUR], step=80)
    assert attention_blend(-ones(batch), batch, only="positive").tolist() == [[-1.0] * 4]
    # as YAML gives them: lists of whole numbers
    doubled = get_pipeline("attention", low=[2, 0], high=[0, 2])
    pair = batch_of([FOUR] * 2)
    torch.testing.assert_close(assign_credit(doubled, pair), 2 * assign_credit("attention", pair))
    assert get_pipeline("attention", low=[1, 1], high=[1, 1]).is_identity


def test_the_predictive_version_is_the_same_rule_on_another_field() -> None:
    # entropies over ln V at τ are entropies at τ ln V
    batch = batch_of([FOUR], step=80, attention_entropies=None, entropies=torch.tensor([FOUR]).double() * math.log(50))
    credit = attention_blend(ones(batch), batch, entropy="predictive", tau=0.8 * math.log(50))
    assert credit[0].tolist() == pytest.approx(PLACES, abs=1e-6)


def test_a_missing_step_is_named_with_its_source() -> None:
    assert get_pipeline("attention").requires == {"attention_entropies", "step"}
    assert get_pipeline("static_anchor").requires == {"attention_entropies"}
    assert get_pipeline("attention", warmup_share=0.5).requires == {"attention_entropies"}
    for credit in ("attention", "attention_high_to_low", "attention_mean_weight"):
        with pytest.raises(TokenCreditError, match="needs `step`") as caught:
            assign_credit(credit, batch_of([FOUR, FOUR], step=None))
        assert "TokenBatch(step=" in str(caught.value.hint)
    assert batch_of([FOUR]).carried == {"attention_entropies", "step"}  # 0 is a step


@pytest.mark.parametrize(
    "low",
    [
        1.0,
        "10",
        [1.0],
        [1.0, 2.0, 3.0],
        [1.0, -0.5],
        [NAN, 1.0],
        [math.inf, 0],
        [True, 1],
        [10**400, 0],
        {1.0: 0, 2.0: 0},
    ],
)
def test_endpoints_are_two_numbers(low: object) -> None:
    with pytest.raises(TokenCreditError, match="`low` of attention_blend must be two numbers of at least 0"):
        get_pipeline("attention", low=low)


@pytest.mark.parametrize("given", [{"tau": 0.0}, {"warmup_steps": 0}, {"warmup_steps": 2.5}, {"warmup_share": 0.0}])
def test_hyperparameters_outside_their_domain(given: dict[str, Any]) -> None:
    with pytest.raises(TokenCreditError, match=f"`{next(iter(given))}` of attention_blend"):
        get_pipeline("attention", **given)


def test_presets_spell_the_published_rule() -> None:
    blend = get_pipeline("attention").to_config()[1]["attention_blend"]
    assert (blend["direction"], blend["tau"], blend["warmup_steps"]) == ("low_to_high", 0.8, 80)
    names = {"attention_high_to_low": "high_to_low", "static_anchor": None, "static_explorer": None}
    for name, direction in names.items():
        assert get_pipeline(name).to_config()[1]["attention_blend"]["direction"] == (direction or name)
    own = {"attention_rank_linear": "attention_schedule", "attention_tilt": "attention_tilt"}
    for name, step in own.items():
        assert step in get_pipeline(name).to_config()[1]


RAGGED = [[0.2, 0.5, NAN, 0.9], [0.8, 1.0, 0.3, NAN], [0.4, NAN, NAN, NAN], [0.6, 0.7, 0.25, 0.95]]


def test_the_mean_weight_is_logged_and_followed() -> None:
    batch = batch_of(RAGGED, step=10)
    base = assign_credit("grpo", batch)
    mask = batch.response_mask
    measured = (assign_credit("attention", batch) / base)[mask].mean()
    followed = assign_credit("attention_mean_weight", batch)
    torch.testing.assert_close(followed, torch.where(mask, base * measured, 0.0))
    for credit in ("attention", "attention_mean_weight"):
        found = credit_metrics(batch, assign_credit(credit, batch), base)
        assert found["credit/weight/mean"] == pytest.approx(float(measured), rel=1e-6)
    # halfway every weight is one half, and so is the control's
    half = replace(batch, step=40)
    for credit in ("attention", "attention_mean_weight"):
        torch.testing.assert_close(assign_credit(credit, half), base / 2)


def test_the_mean_weight_of_nothing_is_nothing() -> None:
    equal = batch_of(RAGGED, rewards=torch.ones(4))
    assert torch.equal(assign_credit("attention_mean_weight", equal), torch.zeros(4, 4))
    assert torch.equal(
        assign_credit(["group_normalized", "mean_weight"], batch_of(RAGGED)), assign_credit("grpo", batch_of(RAGGED))
    )


@pytest.mark.parametrize("step", [0, 30, 80])
def test_matched_mass_per_response_and_over_the_batch(step: int) -> None:
    batch = batch_of(RAGGED, step=step)
    base, plain = assign_credit("grpo", batch).abs(), assign_credit("attention", batch)
    each = assign_credit("attention_mass_per_response", batch)
    torch.testing.assert_close(each.abs().sum(1), base.sum(1))
    whole = assign_credit("attention_mass_per_batch", batch)
    torch.testing.assert_close(whole.abs().sum(), base.sum())
    torch.testing.assert_close(whole, plain * (base.sum() / plain.abs().sum()))
    assert Pipeline.parse("attention_mass_per_batch").scope == "batch"


@pytest.mark.parametrize("preset", ["anchors", "explorers", "random_tokens", "predictive_low", "predictive_high"])
def test_hard_subsets_divide_by_the_selected(preset: str) -> None:
    # lengths 10 and 5, two and one selected, A = 1: the token mean is Σ m / Σ m = 1; "all" would give 3/15
    rows = [[(7 * t % 10) / 10 for t in range(10)], [0.5, 0.1, 0.9, 0.3, 0.7, *[NAN] * 5]]
    batch = batch_of(rows, entropies=torch.tensor(rows), host_advantages=torch.ones(2))
    credit = assign_credit(preset, batch, generator=generator("subsets"))
    assert (credit != 0).sum(1).tolist() == [2, 1]
    assert float(credit.sum()) / 15 == pytest.approx(1.0)
    plain = assign_credit(get_pipeline(preset, normalize="all"), batch, generator=generator("subsets"))
    assert float(plain.sum()) / 15 == pytest.approx(0.2)


def test_first_and_last_fifth() -> None:
    # t/T ≤ .2 of 10, 5, 12 and 4 tokens: {1, 2}, {1}, {1, 2}, none; t/T > .8: {9, 10}, {5}, {10, 11, 12}, {4}
    rows = [[0.5] * n + [NAN] * (12 - n) for n in (10, 5, 12, 4)]
    batch = batch_of(rows, host_advantages=torch.ones(4))
    first, last = assign_credit("first_fifth", batch), assign_credit("last_fifth", batch)
    assert [row.nonzero()[:, 0].tolist() for row in first] == [[0, 1], [0], [0, 1], []]
    assert [row.nonzero()[:, 0].tolist() for row in last] == [[8, 9], [4], [9, 10, 11], [3]]
    assert float(first.sum()) == pytest.approx(31) and float(last.max()) == pytest.approx(31 / 7)
    # "before": (t − 1)/n < .2 keeps one more of twelve and never nothing
    before = keep_positions(ones(batch), batch, stop=0.2)
    assert before.sum(1).tolist() == [2, 1, 3, 1]
