"""Bootstrap intervals: against enumeration, against the normal limit, and paired."""

import itertools
import math

import numpy as np
import pytest

from tokencredit.diagnostics.stats import interval, paired_seed_interval
from tokencredit.errors import TokenCreditError


def test_matches_the_enumerated_distribution() -> None:
    values = [0.0, 1.0, 5.0]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=3))  # all 27 resamples
    found = interval(values, level=0.8, resamples=40_000)
    assert found.mean == 2.0
    # 27 atoms: the 10 % and 90 % points lie at the 3rd and the 25th
    assert found.low == pytest.approx(means[2]) and found.high == pytest.approx(means[24])


def test_normal_limit() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = interval(values)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_seeds_and_problems_are_both_resampled() -> None:
    seeds, problems = np.linspace(-1, 1, 12)[:, None], np.linspace(-1, 1, 50)[None]
    variance_s, variance_p = seeds.var() / 12, problems.var() / 50
    for table, variance in (
        (seeds + 0 * problems, variance_s),
        (0 * seeds + problems, variance_p),
        (seeds + problems, variance_s + variance_p),
    ):
        found = interval(table)
        assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.1)


def test_same_seed_same_interval_other_seed_another() -> None:
    values = np.random.default_rng(1).random((3, 20))
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


def test_one_unit_has_no_interval() -> None:
    found = interval([0.25])
    assert found.mean == 0.25 and math.isnan(found.low) and math.isnan(found.high) and not found.excludes_zero
    assert math.isnan(interval([]).mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_seed_interval([1.0, 2.0], [1.0]), r"one shape, got \[2\] and \[1\]"),
        (lambda: interval([1.0, math.nan]), "must be finite, got nan"),
        (lambda: interval([[1.0], [1.0, 2.0]]), "as many problems for every seed"),
        (lambda: interval(np.zeros((1, 1, 1))), "got shape"),
        (lambda: interval([1.0], level=1.5), r"`level` must be in \(0, 1\), got 1.5"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        call()
