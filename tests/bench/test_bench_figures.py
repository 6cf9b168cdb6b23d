"""The statistics of the benchmark, with numbers worked by hand."""

import numpy as np
import pytest
import torch

from tokencredit import TokenBatch
from tokencredit.bench.measure import sketched, unit_of_prompts
from tokencredit.diagnostics import fidelity, gradients
from tokencredit.diagnostics.capacity import information_bounds, quadrant_shares
from tokencredit.diagnostics.stats import bootstrap, ratio_of_sums, resample_weights, resampled_inner


def grams_of(own: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner products of gradients [replicate, unit, parameter] and [unit, parameter]."""
    return (
        np.einsum("kpd,lqd->klpq", own, own),
        np.einsum("kpd,qd->kpq", own, target),
        np.einsum("pd,qd->pq", target, target),
    )


def test_gradient_figures_by_hand() -> None:
    # two replicates whose sums over two units are (3, 1) and (3, −1); the target sums to (2, 0)
    own = np.array([[[1.0, 0.0], [2.0, 1.0]], [[3.0, 0.0], [0.0, -1.0]]])
    target = np.array([[1.0, 1.0], [1.0, -1.0]])
    found = gradients.products(*grams_of(own, target), np.ones((1, 2)))
    # each cosine is 3/√10; the average (3, 0) points along the target
    assert gradients.direction(found) == pytest.approx(3 / np.sqrt(10))
    assert gradients.average_direction(found) == pytest.approx(1.0)
    # S = ⟨(3,1), (3,−1)⟩ = 8, so the expected direction is 6/(2·√8); ‖ĝ‖² = 10, so the noise is 10 − 8
    assert gradients.expected_direction(found) == pytest.approx(6 / (2 * np.sqrt(8)))
    assert gradients.signal_to_noise(found) == pytest.approx(8 / 2)


def test_one_replicate_has_no_noise_estimate() -> None:
    own = np.array([[[1.0, 0.0]]])
    found = gradients.products(*grams_of(own, own[0]), np.ones((1, 1)))
    assert gradients.direction(found) == pytest.approx(1.0)
    assert np.isnan(gradients.expected_direction(found)).all()
    assert np.isnan(gradients.signal_to_noise(found)).all()


def test_a_resample_does_not_double_the_noise() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 500))
    weights = resample_weights(40, 4000, "test")
    gram = noise @ noise.T
    drawn = resampled_inner(gram, weights).mean()
    naive = np.einsum("rp,pq,rq->r", weights, gram, weights).mean()
    assert drawn == pytest.approx(gram.sum(), rel=0.05)
    assert naive > 1.8 * gram.sum()  # what the plain quadratic form would say


def test_resampled_inner_by_hand() -> None:
    gram = np.array([[1.0, 2.0], [3.0, 4.0]])
    # weights (2, 0): off-diagonal 0, diagonal 2·1; weights (1, 1): the plain sum
    assert resampled_inner(gram, np.array([[2.0, 0.0], [1.0, 1.0]])).tolist() == [2.0, 10.0]


def test_bootstrap_is_paired_and_covers() -> None:
    weights = resample_weights(50, 2000, "a")
    assert (weights == resample_weights(50, 2000, "a")).all()
    assert (weights.sum(1) == 50).all()
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        x = rng.normal(loc=1.0, size=50)
        found = bootstrap(ratio_of_sums(x, np.ones(50)), weights)
        hits += found.low <= 1.0 <= found.high
    assert 86 <= hits <= 100  # 95 of 100 expected; a bad interval gives far fewer
    assert np.isnan(bootstrap(ratio_of_sums(np.ones(50), np.zeros(50)), weights).value)


def test_fidelity_by_hand() -> None:
    # unit 0: tokens 0–2, unit 1: tokens 3–4
    credit = np.array([1.0, 1.0, -2.0, 0.0, 3.0])
    exact = np.array([0.5, -0.1, -0.4, 0.2, 0.3])
    sums = fidelity.fidelity_sums(credit, exact, np.array([0, 0, 0, 1, 1]), top=0.4)
    once = np.ones((1, 2))
    # ranks of credit: −2, 0, (1, 1), 3 → 1, 2, 3.5, 3.5, 5; of A*: −.4, −.1, .2, .3, .5 → 1, 2, 3, 4, 5
    x, y = np.array([3.5, 3.5, 1, 2, 5]), np.array([5.0, 2, 1, 3, 4])
    assert fidelity.rank_correlation(sums)(once) == pytest.approx(np.corrcoef(x, y)[0, 1])
    # credited: .5 + .1 + .4 + .3 = 1.3, of which the signs of .5, .4, .3 agree
    assert fidelity.sign_agreement(sums)(once) == pytest.approx(1.2 / 1.3)
    # the two largest |Â| are 3 and −2: .3 + .4 of 1.5
    assert fidelity.captured_share(sums)(once) == pytest.approx(0.7 / 1.5)
    # unit 1 alone
    assert fidelity.captured_share(sums)(np.array([[0.0, 2.0]])) == pytest.approx(0.3 / 0.5)


def test_ties_capture_what_chance_captures() -> None:
    exact = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    sums = fidelity.fidelity_sums(np.ones(5), exact, np.zeros(5, dtype=np.int64), top=0.2)
    assert fidelity.captured_share(sums)(np.ones((1, 1))) == pytest.approx(0.2)


def test_bounds_count_what_breaks_them() -> None:
    information, entropies = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.4, 0.9, 0.1])
    values = torch.tensor([0.5, 0.01, 0.5])
    # state 0 breaks I ≤ H; state 1 keeps it, but h_b(.01) = .056; state 2 touches H
    found = information_bounds(information, entropies, values, tolerance=1e-6)
    assert found[:3] == (3, 2, 1)
    assert found.entropy_tightness == pytest.approx(0.8 / 1.4)


def test_shares_of_quadrants_by_hand() -> None:
    batch = TokenBatch(
        response_ids=torch.zeros(2, 2, dtype=torch.long),
        response_mask=torch.ones(2, 2, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.tensor([0, 0]),
        entropies=torch.tensor([[2.0, 0.0], [1.0, 0.2]]),  # mean .8
    )
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    shares = quadrant_shares(torch.tensor([[3.0, -1.0], [-4.0, 2.0]]), advantages, batch)
    assert shares == pytest.approx({"PHR": 0.3, "PLR": 0.1, "NHR": 0.4, "NLR": 0.2, "none": 0.0, "high": 0.7})


def test_sketches_keep_inner_products() -> None:
    rng = torch.Generator().manual_seed(3)
    a = torch.randn(2, 20_000, generator=rng, dtype=torch.float64)
    a[1] += 0.5 * a[0]
    signs = torch.randint(0, 2, (20_000,), generator=rng).double() * 2 - 1
    small = sketched([a], signs, 2048)
    folded = torch.nn.functional.pad(a * signs, (0, -20_000 % 2048)).view(2, -1, 2048).sum(1)
    torch.testing.assert_close(small, folded)
    for widths in ([7, 2041, 2048, 4096, 11_808], [5000, 1, 14_999]):  # cut anywhere, the same
        torch.testing.assert_close(sketched(a.split(widths, dim=1), signs, 2048), folded)
    assert small.shape == (2, 2048)
    scale = float(a[0].norm() * a[1].norm())
    assert abs(float(small[0] @ small[1] - a[0] @ a[1])) < 4 * scale / 2048**0.5
    assert torch.equal(sketched(a.split(9_000, dim=1), signs, 20_000), a)


def test_units_are_prompts_or_stretches_of_them() -> None:
    assert unit_of_prompts(4, 64).tolist() == [0, 1, 2, 3]
    assert unit_of_prompts(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
