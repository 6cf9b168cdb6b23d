import numpy as np
import pytest
import recipes_synthetic as bench
from recipes_surfaces import synthetic_pool

from tokencredit.recipes.confirm import shrunken
from tokencredit.recipes.evaluate.history import Evaluation

SMALL = {"candidates": 4, "min_samples": 20}


def noise_history(scores: np.ndarray) -> list[Evaluation]:
    base = {"kind": "search", "steps": [], "recipe_hash": "", "subset_hash": "", "samples": 1, "tokens": 1, "seed": 1}
    return [Evaluation(slot=i, split="search", status="ok", score=float(s), **base) for i, s in enumerate(scores)]


def test_shrinkage_takes_the_luck_out() -> None:
    draws = 40 + 0.5 * np.random.default_rng(0).standard_normal((600, 15))
    found = [shrunken(noise_history(row), 0.5) for row in draws]
    # 1.736 σ = .87 above the mean is what the raw maximum promises
    assert np.mean([s.best - s.mean for s in found]) == pytest.approx(0.868, abs=0.04)
    assert np.mean([s.gain for s in found]) <= 0.15
    assert np.median([s.gain for s in found]) <= 0.02


def test_pure_noise_reports_no_gain() -> None:
    row = bench.noise_row(synthetic_pool(300), 6, **SMALL)
    assert row["raw best − control"] > 0.4  # what a naive report would claim
    assert row["shrunken gain"] <= 0.2
    assert abs(row["confirmed − control"]) <= 3 * 0.41 / np.sqrt(6)
    assert row["share called confirmed"] <= 1 / 6


@pytest.mark.slow
def test_pure_noise_reports_no_gain_in_two_hundred_searches() -> None:
    row = bench.noise_row(synthetic_pool(1000), 200, candidates=16, min_samples=50)
    assert row["raw best − control"] == pytest.approx(0.86, abs=0.15)
    assert row["shrunken gain"] <= 0.15
    assert abs(row["confirmed − control"]) <= 0.09
    # two standard errors of a share of 5 % in 200
    assert row["share called confirmed"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.slow
def test_the_default_policy_beats_random_recipes() -> None:
    pool = synthetic_pool(9000)

    def truth(name: str, policy: str, searches: int) -> float:
        return float(bench.policy_row(pool, name, policy, searches).split()[2])

    assert truth("mono", "default", 60) - truth("mono", "random", 60) >= 0.15
    # Twice as many: the first sixty random searches are the luckiest of seven times sixty, 0.07 above the mean of all.
    assert truth("hump", "default", 120) - truth("hump", "random", 120) >= 0.0
