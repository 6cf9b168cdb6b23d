"""t intervals over seeds: by hand, in limits, and their coverage with few seeds."""

import math

import numpy as np
import pytest

from tokencredit.diagnostics.stats import interval, paired_seed_interval, seed_interval
from tokencredit.errors import TokenCreditError


def test_one_value_per_seed_is_students_interval() -> None:
    # mean 2, standard deviation 1, three seeds; t(0.975, 2) = 4.3027
    found = seed_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(4.0 - found.high)


def test_seeds_that_differ_by_a_constant() -> None:
    # no residual, no spread over problems: seed means 0 and 2, variance of the mean 2 / 2 = 1, t(0.975, 1) = 12.706
    found = seed_interval([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert found.mean == 1.0
    assert found.high - 1.0 == pytest.approx(12.7062, rel=1e-4)


def test_seeds_that_are_equal_leave_the_problems() -> None:
    values = [0.1, 0.5, 0.9, 0.2]
    assert seed_interval([values, values, values]) == interval(values)


def test_one_seed_has_no_interval() -> None:
    found = seed_interval([[0.2, 0.4]])
    assert found.mean == pytest.approx(0.3)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(seed_interval([]).mean)


def test_pairs_cancel_what_both_share() -> None:
    hard = np.random.default_rng(0).normal(size=(3, 40)) * 5
    found = paired_seed_interval(hard, hard + 0.5 + 0.01 * np.random.default_rng(1).normal(size=(3, 40)))
    assert found.mean == pytest.approx(0.5, abs=0.01)
    assert 0.45 < found.low < found.high < 0.55


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize(
    "spread",
    [(0.05, 0.0, 0.05), (0.03, 0.1, 0.2), (0.0, 0.0, 0.2), (0.01, 0.3, 0.1)],
    ids=["seeds dominate", "mixed", "noise only", "problems dominate"],
)
def test_the_interval_covers_the_mean_as_often_as_it_says(seeds: int, spread: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(seeds)
    by_seed, by_problem, rest = spread
    hits = 0
    for _ in range(300):
        table = by_seed * rng.normal(size=(seeds, 1)) + by_problem * rng.normal(size=(1, 50))
        found = seed_interval(table + rest * rng.normal(size=(seeds, 50)))
        hits += found.low <= 0.0 <= found.high
    assert hits / 300 > 0.91  # 95 % and three standard errors of 300 draws


def test_bad_input_is_named() -> None:
    with pytest.raises(TokenCreditError, match="one shape"):
        paired_seed_interval([1.0, 2.0], [1.0])
    with pytest.raises(TokenCreditError, match="must be finite"):
        seed_interval([1.0, math.nan])
    with pytest.raises(TokenCreditError, match="`level`"):
        seed_interval([1.0, 2.0], level=0.0)
