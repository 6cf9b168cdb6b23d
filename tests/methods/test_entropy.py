"""Golden values of the transforms that read entropies.

One group of four responses with two tokens each (and a NaN behind them): rewards 1, -1, -1, -1, entropies
(0, 3), (0, 1), (0, 0), (0, 0). Advantages 1.5, -0.5, -0.5, -0.5. The mean entropy is 4/8 = 0.5, the population std
sqrt(10/8 - 0.25) = 1, so z = -0.5 where H = 0, 0.5 where H = 1, 2.5 where H = 3. HAPO's limits are 0.75 and 0.25.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.methods.entropy.hapo import entropy_capacity, reward_capacity
from tokencredit.methods.entropy.rules import empg, entropy_bonus, gtpo, top_entropy
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import get_pipeline

NAN = math.nan
ADVANTAGES = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
ENTROPIES = [[0.0, 3.0, NAN], [0.0, 1.0, NAN], [0.0, 0.0, NAN], [0.0, 0.0, NAN]]
# sigma + 1e-6 in the denominator of z moves unclipped scores by 1e-6, and six printed digits round by 5e-7
PRINTED = {"rtol": 0.0, "atol": 2e-6}


def batch_of(entropies: list[list[float]], **fields: Any) -> TokenBatch:
    """NaN entropies are outside the mask; one group unless told otherwise."""
    values = torch.tensor(entropies)
    rows = len(entropies)
    given = {"rewards": torch.zeros(rows), "group_ids": torch.zeros(rows, dtype=torch.long)} | fields
    ids = torch.arange(values.numel()).reshape(values.shape)
    return TokenBatch(response_ids=ids, response_mask=~values.isnan(), entropies=values, **given)


GROUP = batch_of(ENTROPIES, rewards=torch.tensor([1.0, -1.0, -1.0, -1.0]))


def wide(advantages: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    return torch.where(batch.response_mask, advantages[:, None].double(), NAN)


def rows(*pairs: tuple[float, float]) -> torch.Tensor:
    return torch.tensor([[*pair, 0.0] for pair in pairs], dtype=torch.float64)


def both(value: float) -> tuple[float, float]:
    return value, value


CAPACITY = [
    # 1.5 + 0.2 (-0.5, 0.75) and -0.5 - 0.2 (-0.25, 0.25) and -0.5 + 0.05
    ({}, rows((1.4, 1.65), (-0.45, -0.55), both(-0.45), both(-0.45))),
    # row 1 / 1.016667 (its mean weight), rows 3 and 4 / 0.9; row 2 keeps its mass already
    ({"renorm": "response"}, rows((1.377049, 1.622951), (-0.45, -0.55), both(-0.5), both(-0.5))),
    # times 6 / 5.85
    ({"renorm": "group"}, rows((1.435897, 1.692308), (-0.461538, -0.564103), both(-0.461538), both(-0.461538))),
    # times 3 / 3.05 and 3 / 2.8
    ({"renorm": "polarity"}, rows((1.377049, 1.622951), (-0.482143, -0.589286), both(-0.482143), both(-0.482143))),
    # the sign of alpha reversed: control K5
    ({"alpha": -0.2}, rows((1.6, 1.35), (-0.55, -0.45), both(-0.55), both(-0.55))),
    ({"alpha": 1.0}, rows((1.0, 2.25), (-0.25, -0.75), both(-0.25), both(-0.25))),
    # 1.5 (1 + 0.2 clip(z, -0.5, 0.5)) and the same for -0.5
    ({"scale": "free"}, rows((1.35, 1.65), (-0.45, -0.55), both(-0.45), both(-0.45))),
    # control K8, no sign: -0.5 + 0.2 (-0.25, 0.25)
    ({"signed": False}, rows((1.4, 1.65), (-0.55, -0.45), both(-0.55), both(-0.55))),
    # only failures move twice as far
    ({"alpha_negative": 0.4}, rows((1.4, 1.65), (-0.4, -0.6), both(-0.4), both(-0.4))),
    # limits 1.5 / 4 and 0.5 / 4: 1.5 + 0.2 (-0.375, 0.375), -0.5 - 0.2 (-0.125, 0.125)
    ({"phi": 4.0}, rows((1.425, 1.575), (-0.475, -0.525), both(-0.475), both(-0.475))),
    # moments of each response. row 1: mean 1.5, std 1.5, z = (-1, 1), limit 0.75; row 2: z = (-1, 1), limit 0.25;
    # rows 3 and 4 are constant: z = 0
    ({"stats": "response"}, rows((1.35, 1.65), (-0.45, -0.55), both(-0.5), both(-0.5))),
]


@pytest.mark.parametrize(
    ("given", "expected"), CAPACITY, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_hapo(given: dict[str, Any], expected: torch.Tensor) -> None:
    torch.testing.assert_close(entropy_capacity(wide(ADVANTAGES, GROUP), GROUP, **given), expected, **PRINTED)


def test_hapo_from_the_rewards() -> None:
    # the estimator's own eps moves the advantage by 1.5e-6
    expected = rows((1.4, 1.65), (-0.45, -0.55), both(-0.45), both(-0.45)).float()
    credit = assign_credit("hapo", GROUP)
    torch.testing.assert_close(credit, expected, rtol=0.0, atol=4e-6)
    # uniform credit sums to 0 with mass 6; HAPO's to +0.25 with mass 5.85
    assert float(credit.sum()) == pytest.approx(0.25, abs=1e-5)
    assert float(credit.abs().sum()) == pytest.approx(5.85, abs=1e-5)
    assert float(assign_credit("hapo_balanced", GROUP).sum()) == pytest.approx(0.0, abs=1e-5)


def test_the_sample_std_of_the_entropies_would_be_another_answer() -> None:
    # ddof 1: sigma = sqrt(8/7) = 1.069045, 1.5 - 0.1 / 1.069045 = 1.406459
    assert float(entropy_capacity(wide(ADVANTAGES, GROUP), GROUP)[0, 0]) != pytest.approx(1.406459, abs=1e-3)


def test_moments_of_the_batch_pool_the_groups() -> None:
    # the second response of the example as a group of its own: alone its mean is 0.5, std 0.5, z = (-1, 1);
    # over the batch mean 0.5 and std 1 as in the example
    batch = replace(GROUP, group_ids=torch.tensor([0, 1, 0, 0]))
    expected = rows((1.4, 1.65), (-0.45, -0.55), both(-0.45), both(-0.45))
    torch.testing.assert_close(entropy_capacity(wide(ADVANTAGES, batch), batch, stats="batch"), expected, **PRINTED)


def test_unscaled_entropies_give_the_same_credit() -> None:
    # H -> 3 H + 0.7 leaves z alone, up to the 1e-6 beside sigma
    moved = replace(GROUP, entropies=3.0 * GROUP.entropies + 0.7)
    credit = entropy_capacity(wide(ADVANTAGES, moved), moved)
    torch.testing.assert_close(credit, entropy_capacity(wide(ADVANTAGES, GROUP), GROUP), **PRINTED)
    mirrored = entropy_capacity(wide(-ADVANTAGES, GROUP), GROUP)
    torch.testing.assert_close(mirrored, -entropy_capacity(wide(ADVANTAGES, GROUP), GROUP))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 1.9])
def test_weights_stay_within_alpha_over_phi(make_batch: Any, alpha: float) -> None:
    batch = make_batch(seed=5, groups=(6, 6), response=40)
    advantages = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(1)).double()
    weights = (entropy_capacity(advantages, batch, alpha=alpha) / advantages)[batch.response_mask]
    assert 1 - alpha / 2 - 1e-9 <= float(weights.min()) < 1 < float(weights.max()) <= 1 + alpha / 2 + 1e-9


def test_constant_entropies_weigh_one() -> None:
    constant = replace(GROUP, entropies=torch.full_like(GROUP.entropies, 0.1))
    expected = torch.where(GROUP.response_mask, ADVANTAGES[:, None], 0.0)
    torch.testing.assert_close(entropy_capacity(wide(ADVANTAGES, GROUP), constant), expected)


def test_reward_capacity() -> None:
    # c = min(H, ln 2) / ln 2 = (0, 1), (0, 1), (0, 0), (0, 0), mean 0.25: weights 0.95 and 1.15
    expected = rows((1.425, 1.725), (-0.475, -0.575), both(-0.475), both(-0.475))
    torch.testing.assert_close(reward_capacity(wide(ADVANTAGES, GROUP), GROUP), expected)


def test_entropy_bonus() -> None:
    # 1.5 + min(1.2, 0.75); -0.5 + min(0.4, 0.25)
    expected = rows((1.5, 2.25), (-0.5, -0.25), both(-0.5), both(-0.5))
    torch.testing.assert_close(entropy_bonus(wide(ADVANTAGES, GROUP), GROUP), expected)


def test_forking_tokens_keep_the_two_highest_of_eight() -> None:
    # ceil(0.2 * 8) = 2: H = 3 and H = 1. "selected" multiplies by 8 / 2
    credit = top_entropy(wide(ADVANTAGES, GROUP), GROUP)
    torch.testing.assert_close(credit, rows((0.0, 1.5), (0.0, -0.5), both(0.0), both(0.0)))
    # loss over all tokens -(1.5 - 0.5)/8 = -0.125, over the selected -(1.5 - 0.5)/2 = -0.5
    assert float(-credit.sum() / 8) == pytest.approx(-0.125)
    selected = top_entropy(wide(ADVANTAGES, GROUP), GROUP, normalize="selected")
    assert float(-selected.sum() / 8) == pytest.approx(-0.5)
    # quantile(0.8) of (0 six times, 1, 3) lies at 5.6 of 7: 0 + 0.6 * 1 = 0.6 -> the same two
    torch.testing.assert_close(top_entropy(wide(ADVANTAGES, GROUP), GROUP, select="quantile"), credit)


def test_a_quantile_of_mostly_zeros_keeps_everything() -> None:
    # nine zeros and a one: quantile(0.8) = 0, and >= 0 keeps 10 of 10; by count the border tie is kept whole too
    batch = batch_of([[0.0] * 9 + [1.0]])
    ones = torch.ones(1, 10, dtype=torch.float64)
    torch.testing.assert_close(top_entropy(ones, batch, select="quantile"), ones)
    torch.testing.assert_close(top_entropy(ones, batch, select="count"), ones)
    only = torch.tensor([[0.0] * 9 + [1.0]], dtype=torch.float64)
    torch.testing.assert_close(top_entropy(ones, batch, keep=0.1), only)


@pytest.mark.parametrize("keep", [1e-12, 1e-3, 0.3 - 1e-17])
def test_a_share_of_next_to_nothing_keeps_one_token(keep: float) -> None:
    batch = batch_of([[0.5, 2.0, 1.0]])
    expected = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(top_entropy(torch.ones(1, 3, dtype=torch.float64), batch, keep=keep), expected)


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.9])
def test_the_quantile_is_that_of_trl(make_batch: Any, keep: float) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    same = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    host = SimpleNamespace(accelerator=same)
    for seed in range(4):
        batch = make_batch(seed=seed, groups=(8, 8), response=50)
        # TRL multiplies by the mask, so padding must be finite for it
        entropies = torch.where(batch.response_mask, batch.entropies, 0.0)
        theirs = GRPOTrainer.get_high_entropy_mask(host, entropies, batch.response_mask, 1.0 - keep)
        ours = top_entropy(torch.ones_like(entropies), batch, keep=keep, select="quantile") != 0
        assert torch.equal(ours, theirs)


def test_gtpo_before_its_normalisation() -> None:
    # two correct and two incorrect responses of one token, H = (1, 3) in each pair, shares 0.9 and 0.1:
    # correct 0.9 + 0.1 * 2 * H / 4 = 0.95, 1.05; incorrect, 1/H = 1, 1/3, sum 4/3: -0.9 - 0.1 * 2 * (3/4, 1/4)
    batch = batch_of([[1.0, NAN], [3.0, NAN], [1.0, NAN], [3.0, NAN]])
    advantages = wide(torch.tensor([1.0, 1.0, -1.0, -1.0]), batch)
    expected = torch.tensor([[0.95, 0.0], [1.05, 0.0], [-1.05, 0.0], [-0.95, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gtpo(advantages, batch, standardize=False), expected)
    # per polarity: mean 1, std 0.05 -> -+1; 0.05 / 0.050001
    normalized = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gtpo(advantages, batch), normalized, rtol=0.0, atol=3e-5)


def test_gtpo_aligns_by_chosen_position_and_counts_the_living() -> None:
    # first tokens H = 1, 3 as above; the second token of row 0 (behind a hole) is alone: 0.9 + 0.1 * 1 * 2/2 = 1
    batch = batch_of([[1.0, NAN, 2.0], [3.0, NAN, NAN]])
    advantages = wide(torch.tensor([1.0, 1.0]), batch)
    expected = torch.tensor([[0.95, 0.0, 1.0], [1.05, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gtpo(advantages, batch, standardize=False), expected)


def test_empg_weights() -> None:
    # H = (0, 0.5, 1): e^-H = 1, 0.606531, 0.367879, mean 0.658137 -> 1.519441, 0.921588, 0.558971
    batch = batch_of([[0.0, 0.5, 1.0]])
    credit = empg(torch.ones(1, 3, dtype=torch.float64), batch, zeta=0.0, center=False)
    expected = torch.tensor([[1.519441, 0.921588, 0.558971]], dtype=torch.float64)
    torch.testing.assert_close(credit, expected, rtol=0.0, atol=1e-6)  # printed to six digits


def test_empg_bonus_and_centring() -> None:
    # the bonus of a token is 0.1 e^-(H of the next): 0.1 (0.606531, 0.367879) = 0.060653, 0.036788, the last has none
    batch = batch_of([[0.0, 0.5, 1.0]])
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    expected = torch.tensor([[0.060653, 0.036788, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(empg(nothing, batch, center=False), expected, rtol=0.0, atol=1e-6)
    # minus the mean 0.032480
    centred = torch.tensor([[0.028173, 0.004308, -0.032480]], dtype=torch.float64)
    torch.testing.assert_close(empg(nothing, batch), centred, rtol=0.0, atol=2e-6)


def test_empg_by_steps() -> None:
    # steps (7, 7) and (2): means 1 and 3, mapped to 0 and 1: e^-h = 1 and 0.367879, mean of the two steps 0.683940
    # -> 1.462117, 0.537883; bonus of the first step 0.1 e^-1 = 0.036788
    batch = batch_of([[0.5, NAN, 1.5, 3.0]], step_ids=torch.tensor([[7, -4, 7, 2]]))
    credit = empg(torch.ones(1, 4, dtype=torch.float64), batch, center=False)
    expected = torch.tensor([[1.498905, 0.0, 1.498905, 0.537883]], dtype=torch.float64)
    torch.testing.assert_close(credit, expected, rtol=0.0, atol=2e-6)


def test_presets_spell_the_published_choices() -> None:
    assert get_pipeline("forking_tokens").to_config()[1] == {
        "top_entropy": {"keep": 0.2, "normalize": "selected", "select": "count"}
    }
    hapo = get_pipeline("hapo").to_config()[1]["entropy_capacity"]
    assert (hapo["alpha"], hapo["phi"], hapo["stats"], hapo["renorm"]) == (0.2, 2.0, "group", "none")


def test_every_step_of_empg_has_one_vote_however_long() -> None:
    # one response, steps of 1 and 9 tokens with entropies 0 and 1: e^-h = 1 and 0.367879, mean 0.683940
    batch = batch_of([[0.0] + [1.0] * 9], step_ids=torch.tensor([[4] + [9] * 9]))
    ones = torch.ones(1, 10, dtype=torch.float64)
    credit = empg(ones, batch, zeta=0.0, center=False)
    expected = torch.tensor([[1.462117] + [0.537883] * 9], dtype=torch.float64)
    torch.testing.assert_close(credit, expected, rtol=0.0, atol=1e-6)
    # centred over the two steps, whose mean is 1, not over the ten tokens
    torch.testing.assert_close(empg(ones, batch, zeta=0.0), expected - 1.0, rtol=0.0, atol=1e-6)


def test_steps_of_empg_are_those_of_the_batch() -> None:
    # three steps in two responses: entropies 0, 2, 1 -> h 0, 1, ½: e^-h 1, 0.367879, 0.606531, mean 0.658137
    batch = batch_of([[0.0, 2.0, 2.0], [1.0, 1.0, NAN]], step_ids=torch.tensor([[0, 1, 1], [0, 0, 0]]))
    credit = empg(torch.ones(2, 3, dtype=torch.float64), batch, zeta=0.0, center=False)
    expected = torch.tensor([[1.519441, 0.558971, 0.558971], [0.921588, 0.921588, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(credit, expected, rtol=0.0, atol=1e-6)


def test_the_only_correct_response_gets_nothing_from_gtpo() -> None:
    batch = batch_of([[1.0, 3.0, 0.2], [2.0, NAN, NAN], [1.0, 0.5, NAN]])
    credit = gtpo(wide(torch.tensor([1.0, -0.5, -0.5]), batch), batch)
    assert credit[0].tolist() == [0.0, 0.0, 0.0]
    assert bool((credit[1:] != 0).any())


def test_entropies_a_rounding_below_zero_count_as_zero() -> None:
    low = batch_of([[-2e-3, -1e-7, 0.5]])
    zero = batch_of([[0.0, 0.0, 0.5]])
    for advantages in (torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 0.0]])):
        for method in (entropy_bonus, reward_capacity):
            torch.testing.assert_close(method(advantages, low), method(advantages, zero), rtol=0.0, atol=0.0)
