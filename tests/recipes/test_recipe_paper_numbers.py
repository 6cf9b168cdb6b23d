"""Statistics of the paper's tables (arXiv:2605.12944), worked from its printed numbers."""

from itertools import permutations

import numpy as np
import pytest

from tokencredit.recipes.audit import gap_area, hit_at, mean_reciprocal_rank, permutation_p, spearman

SMALL = [41.96, 42.23, 36.29, 34.79, 39.06, 25.74, 25.90]  # T17, 1.5B
LARGE = [51.92, 51.90, 51.76, 50.33, 49.22, 44.54, 39.47]  # T17, 7B
# T15: scores in the order of the ranker, five decisions
AUDIT = [
    [39.95, 41.96, 36.84, 37.80, 32.19],
    [40.62, 39.47, 39.90, 38.65, 39.17],
    [41.07, 41.43, 37.04, 40.33, 38.57],
    [38.72, 40.79, 35.42, 30.67, 38.78],
    [42.20, 41.69, 39.33, 33.16, 37.22],
]


def test_small_models_predict_larger_ones() -> None:
    # ranks 6 7 4 3 5 1 2 and 7 6 5 4 3 2 1: Σd² = 1 + 1 + 1 + 1 + 4 + 1 + 1 = 10, 1 − 6 · 10 / (7 · 48) = .8214
    assert spearman(SMALL, LARGE) == pytest.approx(0.8214, abs=5e-5)
    assert permutation_p(SMALL, LARGE) == pytest.approx(0.034, abs=5e-4)
    assert spearman(SMALL[:5], LARGE[:5]) == pytest.approx(0.60)


def test_permutation_p_counts_both_sides() -> None:
    # of six orders of three, two have |ρ| = 1
    assert permutation_p([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(2 / len(list(permutations(range(3)))))


def test_gap_area() -> None:
    later = [38.36, 40.8, 39.15, 38.72, 40.7, 37.70, 40.6, 41.3, 39.4, 39.88, 39.4, 42.28]
    assert gap_area(later) == pytest.approx(1.029, abs=5e-4)
    assert np.mean(later) == pytest.approx(39.857, abs=1e-3)


def test_ranker_audit() -> None:
    assert hit_at(AUDIT, 1) == pytest.approx(0.4)
    assert hit_at(AUDIT, 2) == pytest.approx(1.0)
    assert mean_reciprocal_rank(AUDIT) == pytest.approx(0.70)
    assert mean_reciprocal_rank([[float(x) for x in p] for p in permutations(range(5))]) == pytest.approx(
        0.457, abs=5e-4
    )
    gains = [row[0] - np.mean(row) for row in AUDIT]
    assert np.mean(gains) == pytest.approx(1.99, abs=0.01)
    assert np.std(gains, ddof=1) / 5**0.5 == pytest.approx(0.42, abs=0.01)
