"""Samples without features: no step chooses them, none of them disturbs the others."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import make_pool
from tokencredit.recipes.program import selectors
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.operators.spec import exact_ceil
from tokencredit.recipes.program.recipe import canonical, make_recipe, make_step
from tokencredit.recipes.program.state import StateReader
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.relevance import max_cosine

N, GONE = 40, (0, 7, 39)
ROWS = np.random.default_rng(5).standard_normal((N, 6)).astype(np.float32)


def materials_with(hole: float) -> Materials:
    rows = ROWS.copy()
    rows[list(GONE)] = hole
    rng = np.random.default_rng(6)
    signals = {name: rng.standard_normal(N).astype(np.float32) for name in ("q", "trajectory.1", "trajectory.2")}
    signals["trajectory.2"][list(GONE)] = np.nan
    return Materials(pool=make_pool(range(N), ["s"] * N, [1] * N), signals=signals, features=rows)


STEPS = [
    {"op": "k_center", "k": 9},
    {"op": "k_center", "k": 999},
    {"op": "facility_location", "k": 9},
    {"op": "facility_location", "k": 999},
    {"op": "diverse_top", "signal": "q", "k": 9, "cosine": 0.95},
    {"op": "trajectory_k", "k": 9, "seed": 1, "clusters": 3},
]


@pytest.mark.parametrize("hole", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step['op']}-{step['k']}")
def test_a_selector_chooses_as_if_they_were_not_in_the_pool(step: dict, hole: float) -> None:
    materials = materials_with(hole)
    found = Executor(materials=materials).run(make_recipe([step])).positions.tolist()
    there = np.setdiff1d(np.arange(N), GONE)
    signals = {name: values[there] for name, values in materials.signals.items()}
    without = Materials(
        pool=make_pool(there.tolist(), ["s"] * len(there), [1] * len(there)), signals=signals, features=ROWS[there]
    )
    assert found == there[Executor(materials=without).run(make_recipe([step])).positions].tolist()
    assert len(set(found)) == len(found) == min(step["k"], N - len(GONE))


def test_the_plain_functions_keep_the_rule() -> None:
    rows = materials_with(np.nan).features
    assert not {*selectors.k_center(rows, N).tolist()} & {*GONE}
    assert not {*selectors.facility_location(rows, N).tolist()} & {*GONE}
    assert not {*selectors.diverse_walk(np.ones(N), rows, N, 1.0).tolist()} & {*GONE}
    assert selectors.k_center(np.full((3, 2), np.nan), 2).tolist() == []


def test_no_features_at_all_is_an_error() -> None:
    materials = Materials(pool=make_pool([1, 2], ["s"] * 2, [1, 1]), signals={}, features=np.full((2, 3), np.nan))
    with pytest.raises(TokenCreditError, match="no sample of the current set has features"):
        Executor(materials=materials).run(make_recipe([{"op": "k_center", "k": 1}]))


@pytest.mark.parametrize("sparse", [False, True])
def test_drift_compares_those_that_have_features(sparse: bool) -> None:
    # rows (1,0), (0,1), none, (1,1): centre (2/3, 2/3); {0} is (1/3, −2/3) away, √(5/9)/√2 = .527046
    rows = np.array([[1, 0], [0, 1], [0 if sparse else np.nan] * 2, [1, 1]], np.float32)
    features = csr_matrix(rows) if sparse else rows
    reader = StateReader(
        materials=Materials(pool=make_pool(range(4), ["s"] * 4, [1] * 4), signals={}, features=features)
    )

    def drift(*members: int) -> float:
        return reader.read(np.array(members, np.int32))["drift"]

    assert drift(0) == drift(0, 2) == pytest.approx(0.527046, abs=1e-6)
    assert drift(0, 1, 3) == drift(0, 1, 2, 3) == pytest.approx(0.0, abs=1e-7)
    assert drift(2) == 0.0  # nothing is known of it


def test_a_query_without_features_does_not_hide_the_others() -> None:
    queries = np.array([[np.nan, np.nan], [0.0, 2.0], [0.0, 0.0]])
    np.testing.assert_allclose(max_cosine(np.array([[3.0, 0.0], [0.0, -1.0]]), queries), [0.0, -1.0])
    with pytest.raises(TokenCreditError, match="no query has features"):
        max_cosine(np.ones((2, 2)), queries[:1])


@pytest.mark.parametrize("fraction", [0.3, np.float64(0.3), np.float32(0.3), 0.1 + 0.2, np.linspace(0, 0.6, 3)[1]])
def test_a_number_of_any_kind_counts_as_its_decimal(fraction: float) -> None:
    assert exact_ceil(fraction, 100) == 30
    assert make_step("top", signal="q", fraction=fraction).params["fraction"] == pytest.approx(0.3)
    run = Executor(materials=materials_with(np.nan)).run(make_recipe([{"top": {"signal": "q", "fraction": fraction}}]))
    assert len(run) == 12


def test_numbers_of_numpy_hash_as_pythons() -> None:
    plain = canonical([make_step("top", signal="q", fraction=0.3), make_step("random_k", k=3, seed=1)])
    steps = [make_step("top", signal=np.str_("q"), fraction=np.float32(0.3))]
    assert canonical([*steps, make_step("random_k", k=np.int64(3), seed=np.int32(1))]) == plain
    assert make_step("top_union", signals=np.array(["a", "b"]), fraction=0.5).params["signals"] == ["a", "b"]
