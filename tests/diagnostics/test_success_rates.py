"""pass@k against enumeration over all subsets, and intervals over problems."""

from itertools import combinations

import numpy as np
import pytest

from tokencredit.diagnostics.success_rates import avg_at_k, evaluate, pass_at_k, pass_at_k_from_counts
from tokencredit.errors import TokenCreditError


def test_golden() -> None:
    # n 8, c 2, k 4: 1 − C(6,4)/C(8,4) = 1 − 15/70
    assert pass_at_k_from_counts(8, np.array([2]), 4)[0] == pytest.approx(0.785714, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_equals_the_share_of_subsets_that_hold_a_solution(k: int) -> None:
    outcomes = np.random.default_rng(0).random((7, 6)) < np.linspace(0, 1, 7)[:, None]
    expected = [np.mean([row[list(subset)].any() for subset in combinations(range(6), k)]) for row in outcomes]
    np.testing.assert_allclose(pass_at_k(outcomes, k), expected)


def test_large_counts_do_not_overflow() -> None:
    found = pass_at_k_from_counts(100_000, np.array([0, 1, 99_999]), 256)
    np.testing.assert_allclose(found, [0.0, 256 / 100_000, 1.0], rtol=1e-9)  # c = 1: k/n


def test_evaluation() -> None:
    outcomes = np.array([[True, False], [False, False], [True, True], [True, False]])
    found = evaluate(outcomes, ks=(2, 1))
    assert found.problems == 4 and found.samples == 2
    assert found.avg.mean == 0.5 == found.pass_at[1].mean
    assert found.pass_at[2].mean == 0.75
    assert found.avg.low < 0.5 < found.avg.high
    assert list(found.pass_at) == [1, 2]
    np.testing.assert_array_equal(avg_at_k(outcomes), [0.5, 0.0, 1.0, 0.5])


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(TokenCreditError, match=r"must be in \[1, 2\], the number of samples a problem, got"):
        pass_at_k(np.array([[True, False]]), k)


def test_empty_outcomes_are_refused() -> None:
    with pytest.raises(TokenCreditError, match=r"not empty, got shape \[0, 4\]"):
        evaluate(np.zeros((0, 4), dtype=bool))


@pytest.mark.parametrize(("n", "k"), [(1031, 1031), (2048, 1200), (2048, 2048), (5000, 3000), (10_000, 1031)])
def test_large_k(n: int, k: int) -> None:
    counts = np.array([0, 1, n - k, n - k + 1, n])
    found = pass_at_k_from_counts(n, counts, k)
    # none; one: k/n; n − k: all but one subset, 1 − 1/C(n, k); more: every subset
    np.testing.assert_allclose(found[[0, 1, 3, 4]], [0.0, k / n, 1.0, 1.0], rtol=1e-9)
    assert found[2] == pytest.approx(1.0 if n > k else 0.0)


def test_evaluation_of_thousands_of_samples() -> None:
    found = evaluate(np.ones((3, 2048), dtype=bool), ks=(1, 1200))
    assert found.pass_at[1200].mean == 1.0 == found.avg.mean


def test_zeros_and_ones_are_outcomes_and_rewards_are_not() -> None:
    numbers = np.array([[1.0, 0.0], [0.0, 0.0]])
    assert evaluate(numbers, ks=(2,)) == evaluate(numbers.astype(bool), ks=(2,))
    with pytest.raises(TokenCreditError, match=r"must be true or false, got 0\.7"):
        evaluate(np.array([[0.7, 1.0]]))


@pytest.mark.parametrize("correct", [-1, 9])
def test_counts_outside_the_samples_are_refused(correct: int) -> None:
    with pytest.raises(TokenCreditError, match=r"correct samples must be in \[0, 8\]"):
        pass_at_k_from_counts(8, np.array([2, correct]), 4)
