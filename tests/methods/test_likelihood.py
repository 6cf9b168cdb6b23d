"""Surprisal, entropy reduction and policy divergence against weights worked by hand."""

from dataclasses import replace

import pytest
import torch

from tokencredit.batch.records import TokenBatch
from tokencredit.errors import TokenCreditError
from tokencredit.methods.likelihood import entropy_drops, score_weights, surprisal
from tokencredit.methods.table import TRANSFORMS
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import get_pipeline

LOGPROBS = torch.tensor([[-0.1, -2.3, -0.5, -1.1]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.2, -2.0, -0.5, -1.9]], dtype=torch.float64)
ENTROPIES = torch.tensor([[1.6, 0.4, 1.2, 0.2]], dtype=torch.float64)
ONES = torch.ones(1, 4, dtype=torch.float64)


def one_response(**fields: torch.Tensor) -> TokenBatch:
    given = {"old_logprobs": LOGPROBS, "ref_logprobs": REFERENCE, "entropies": ENTROPIES} | fields
    return TokenBatch(
        response_ids=torch.arange(4)[None],
        response_mask=torch.ones(1, 4, dtype=torch.bool),
        rewards=torch.ones(1),
        group_ids=torch.zeros(1, dtype=torch.long),
        **given,
    )


# surprisal: α = .1, 2.3, .5, 1.1, Σ = 4; squares .01, 5.29, .25, 1.21, Σ = 6.76
# entropy reduction: 1.6 − .4, max(0, .4 − 1.2), 1.2 − .2, last 0 = 1.2, 0, 1, 0; squares 1.44, 0, 1, 0, Σ = 2.44
# divergence: |.1|, |−.3|, 0, |.8|, Σ = 1.2; squares .01, .09, 0, .64, Σ = .74
GOLDEN = [
    ("surprisal", 1.0, [0.1 / 4, 2.3 / 4, 0.5 / 4, 1.1 / 4]),
    ("surprisal", 2.0, [0.01 / 6.76, 5.29 / 6.76, 0.25 / 6.76, 1.21 / 6.76]),
    ("entropy_reduction", 1.0, [1.2 / 2.2, 0.0, 1 / 2.2, 0.0]),
    ("entropy_reduction", 2.0, [1.44 / 2.44, 0.0, 1 / 2.44, 0.0]),
    ("policy_divergence", 1.0, [0.1 / 1.2, 0.3 / 1.2, 0.0, 0.8 / 1.2]),
    ("policy_divergence", 2.0, [0.01 / 0.74, 0.09 / 0.74, 0.0, 0.64 / 0.74]),
]


@pytest.mark.parametrize(("name", "sharpening", "weights"), GOLDEN)
def test_weights_of_one_response(name: str, sharpening: float, weights: list[float]) -> None:
    credit = TRANSFORMS[name].fn(ONES, one_response(), sharpening=sharpening)
    torch.testing.assert_close(credit, 4 * torch.tensor([weights], dtype=torch.float64), rtol=0, atol=1e-12)


def test_loss_of_the_paper_is_reproduced_under_the_mean_of_means() -> None:
    # A = +1 with the surprisal weights, Σ w log π = −(.0025 + 1.3225 + .0625 + .3025) = −1.69
    # A = −1, w = (½, ½), log π = (−.7, −.3), Σ w log π = −.5;      L = −½(−1.69 + .5) = .595
    logprobs = torch.tensor([[-0.1, -2.3, -0.5, -1.1], [-0.7, -0.3, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    scores = torch.stack((-logprobs[0], torch.ones(4, dtype=torch.float64)))
    credit = score_weights(scores, mask) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    lengths = mask.sum(1)
    mean_of_means = -((credit * logprobs).sum(1) / lengths).mean()
    token_mean = -(credit * logprobs).sum() / lengths.sum()  # (4 · 1.69 − 2 · .5) / 6 = .96
    rescaled = -(credit * logprobs / lengths[:, None] * (6 / 2)).sum() / 6  # m = (N/B) w = 3 w
    torch.testing.assert_close(mean_of_means.item(), 0.595)
    torch.testing.assert_close(token_mean.item(), 0.96)
    torch.testing.assert_close(rescaled.item(), 0.595)


def test_no_signal_means_weights_of_exactly_one() -> None:
    mask = torch.tensor([[True, True, True, False]])
    for sharpening in (0.5, 1.0, 2.0):
        assert score_weights(torch.zeros(1, 4), mask, sharpening=sharpening).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    for options in ({"sharpening": 0.0}, {"mix": 0.0}):
        assert score_weights(torch.rand(1, 4), mask, **options).tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_scaling_the_scores_changes_nothing_even_where_squares_underflow() -> None:
    scores = torch.tensor([[3.0, 1.0, 4.0, 1.5]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    wanted = score_weights(scores, mask, sharpening=2.0)
    # Σ α² = 3e-13 < 1e-8: the release would fall back to uniform weights here.
    torch.testing.assert_close(score_weights(scores * 1e-7, mask, sharpening=2.0), wanted, rtol=1e-12, atol=0)


def test_mix_floor_and_cap_keep_mean_one() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0, 0.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    # w = 0, 1, 3, 0; mix ½: (1 + w)/2
    assert score_weights(scores, mask, mix=0.5).tolist() == [[0.5, 1.0, 2.0, 0.5]]
    # clip to [.2, 1.6] = .2, 1, 1.6, .2, mean .75
    bounded = score_weights(scores, mask, floor=0.2, cap=1.6)
    torch.testing.assert_close(bounded, torch.tensor([[0.2, 1.0, 1.6, 0.2]], dtype=torch.float64) / 0.75)


def test_the_drop_skips_tokens_that_were_not_chosen() -> None:
    entropies = torch.tensor([[2.0, torch.nan, 1.5, torch.nan, 0.5]])
    mask = torch.tensor([[True, False, True, False, True]])
    assert entropy_drops(entropies, mask).tolist() == [[0.5, 0.0, 1.0, 0.0, 0.0]]


def test_presets_multiply_the_advantage() -> None:
    batch = TokenBatch(
        response_ids=torch.zeros(2, 2, dtype=torch.long),
        response_mask=torch.ones(2, 2, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.zeros(2, dtype=torch.long),
        old_logprobs=torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]),
    )
    # advantages ±.5/(.7071 + 1e-6); weights 2 · (¼, ¾) and (1, 1)
    a = 0.5 / (0.5**0.5 + 1e-6)
    expected = torch.tensor([[0.5 * a, 1.5 * a], [-a, -a]])
    base = assign_credit(get_pipeline("grpo"), batch)[:, :1]
    torch.testing.assert_close(
        assign_credit(get_pipeline("surprisal"), batch), expected * (base.abs() / a), rtol=1e-6, atol=0
    )
    assert base[0] > 0 > base[1]


def test_missing_reference_is_named() -> None:
    batch = replace(one_response(), ref_logprobs=None)
    with pytest.raises(TokenCreditError, match="ref_logprobs"):
        assign_credit(get_pipeline("policy_divergence"), batch)


@pytest.mark.parametrize("sharpening", [0.5, 1.0, 1.5, 2.0])
def test_a_log_prob_a_rounding_above_zero_counts_as_zero(sharpening: float) -> None:
    above = one_response(old_logprobs=torch.tensor([[1e-7, -2.3, 3e-6, -1.1]]))
    zero = one_response(old_logprobs=torch.tensor([[0.0, -2.3, 0.0, -1.1]]))
    credit = surprisal(ONES, above, sharpening=sharpening)
    torch.testing.assert_close(credit, surprisal(ONES, zero, sharpening=sharpening), rtol=0.0, atol=0.0)
    assert credit[0, 0] == credit[0, 2] == 0.0
    sure = one_response(old_logprobs=torch.full((1, 4), 1e-7))
    assert torch.equal(surprisal(ONES, sure, sharpening=sharpening), ONES)


def test_the_distance_from_the_release_is_within_its_bound() -> None:
    scores = torch.tensor([[0.1] + [0.0] * 299], dtype=torch.float64)
    mask = torch.ones_like(scores, dtype=torch.bool)
    released = (scores + 1e-8) / (scores + 1e-8).sum() * 300
    distance = float((score_weights(scores, mask) - released).abs().max())
    assert 8.9e-3 < distance <= 300 * 299 * 1e-8 / 0.1
