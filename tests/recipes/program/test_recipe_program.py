import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from recipes_surfaces import synthetic_pool

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.recipe import (
    canonical,
    diff,
    dump_recipe,
    load_recipe,
    make_recipe,
    make_step,
)
from tokencredit.recipes.program.state import StateReader
from tokencredit.recipes.search.config import SearchSettings
from tokencredit.recipes.search.propose import (
    Space,
    credits,
    edit,
    make_space,
    operator_vector,
    random_program,
    retune,
)


def test_program_hash_golden() -> None:
    recipe = make_recipe([{"op": "top", "signal": "unigram_entropy", "fraction": 0.90}])
    assert canonical(recipe.steps) == (
        '[{"fraction":"0.9","missing":"error","op":"top@1","order":"input","signal":"unigram_entropy"}]'
    )
    assert sha256(canonical(recipe.steps).encode()).hexdigest().startswith("bb79ded477a0")
    spelled = make_recipe(
        [{"op": "top", "signal": "unigram_entropy", "fraction": 0.9, "order": "input", "missing": "error"}]
    )
    assert canonical(spelled.steps) == canonical(recipe.steps)


def test_canonical_fills_the_default_of_the_signal() -> None:
    assert '"missing":"drop"' in canonical([make_step("top", signal="ifd", fraction=0.5)])
    assert '"missing":"drop"' in canonical([make_step("top", signal="resid(ifd)", fraction=0.5)])
    assert '"descending":false' in canonical([make_step("top", signal="s", k=3, descending=False)])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"op": "topp", "signal": "s"}, "unknown operator 'topp', did you mean 'top'"),
        ({"op": "top", "signal": "s", "fractoin": 0.5}, "unknown parameter of top 'fractoin', did you mean 'fraction'"),
        ({"op": "top", "signal": "s"}, "exactly one of fraction and k"),
        ({"op": "top", "signal": "s", "fraction": 0.5, "k": 3}, "exactly one of fraction and k"),
        ({"op": "top", "signal": "s", "fraction": 0}, r"must be in \(0, 1\], got 0"),
        ({"op": "top", "signal": "s", "fraction": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"op": "top", "fraction": 0.5}, "top needs `signal`"),
        ({"op": "random_k", "k": 10}, "random_k needs `seed`"),
        ({"op": "random_k", "k": 0, "seed": 1}, "whole number of at least 1"),
        ({"op": "semdedup", "cosine": 0.69}, r"must be in \[0.7, 1\], got 0.69"),
        ({"op": "top_union", "signals": "rel.a", "fraction": 0.5}, "must be a list"),
        ({"op": "band", "signal": "s", "low": 0.5, "high": 0.5}, "low < high"),
        ({"op": "top", "signal": "s", "k": 2, "missing": "ignore"}, "unknown `top.missing` 'ignore'"),
        ({"signal": "s"}, "step 1 must be a mapping with `op`"),
    ],
)
def test_a_wrong_step_is_refused(step: dict, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        make_recipe([step])


def test_recipe_files_survive_a_round_trip(tmp_path: Path) -> None:
    recipe = make_recipe(
        [{"op": "top_union", "signals": ["rel.a", "rel.b"], "fraction": 0.85}, {"op": "random_k", "k": 9, "seed": 4}],
        id="r0012",
        parent="r0007",
    )
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe, "f" * 64))
    assert load_recipe(path) == (recipe, "f" * 64)
    path.write_text("steps: []\nstep: 1\n")
    with pytest.raises(TokenCreditError, match="unknown key of a recipe file 'step'"):
        load_recipe(path)
    path.write_text("steps: [")
    with pytest.raises(TokenCreditError, match="is not valid YAML"):
        load_recipe(path)


def test_diff_names_edits() -> None:
    a, b = make_step("top", signal="s", fraction=0.5), make_step("random_k", k=10, seed=1)
    c = make_step("semdedup", cosine=0.9)
    assert diff(make_recipe([a, b]), make_recipe([a, c, b])) == [("insert", "semdedup", 1)]
    assert diff(make_recipe([a, c, b]), make_recipe([a, b])) == [("delete", "semdedup", 1)]
    assert diff(make_recipe([a]), make_recipe([make_step("top", signal="s", fraction=0.6)])) == [("retune", "top", 0)]
    assert diff(make_recipe([a]), make_recipe([a])) == []


def test_credit_is_shared_and_shrunk() -> None:
    a, b = make_step("top", signal="s", fraction=0.5), make_step("random_k", k=10, seed=1)
    c = make_step("semdedup", cosine=0.9)
    moves = [
        (make_recipe([a]), make_recipe([a, c]), 1.0),  # c gains 1 · 1/2
        (make_recipe([b, a]), make_recipe([a]), 0.6),  # b at 0 loses .6 · 1/2
    ]
    assert credits(moves) == {("random_k", 0): pytest.approx(-0.3), ("semdedup", 1): pytest.approx(0.5)}


def test_psi_of_the_papers_example() -> None:
    recipe = make_recipe(
        [{"op": "top_union", "signals": ["rel.a"], "fraction": 0.7}, {"op": "random_k", "k": 300, "seed": 1}]
    )
    vector = operator_vector(recipe, ("top_union", "semdedup", "random_k"), {"k": 1000})
    np.testing.assert_allclose(vector, [1, 0.70, 0, 0.00, 1, 0.30])


SPACE = Space(
    samples=9000,
    operators=("top", "top_union", "semdedup", "random_k"),
    scalars=("s", "ppl"),
    relevance=("rel.a",),
    seed=3,
)


def test_edits_stay_inside_the_space() -> None:
    rng = np.random.default_rng(0)
    recipe = random_program(SPACE, rng)
    for _ in range(300):
        recipe = edit(recipe, SPACE, rng)
        assert 1 <= len(recipe.steps) <= SPACE.max_steps
        assert all(step.params.get("seed", 3) == 3 for step in recipe.steps)


def test_retune_direction() -> None:
    rng = np.random.default_rng(0)
    step = make_step("top", signal="s", fraction=0.5)
    assert retune(step, rng, -1).params["fraction"] < 0.5 < retune(step, rng, +1).params["fraction"]
    dedup = make_step("semdedup", cosine=0.85)
    assert retune(dedup, rng, -1).params["cosine"] < 0.85 < retune(dedup, rng, +1).params["cosine"]
    assert retune(make_step("random_k", k=100, seed=1), rng, -1).params["k"] < 100


SCRIPT = """
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.search.propose import make_space, random_program
from recipes_surfaces import synthetic_pool
from tokencredit.recipes.search.config import SearchSettings
import numpy as np
materials = synthetic_pool(800).materials
space = make_space(materials, SearchSettings(seed=1), 3)
rng = np.random.default_rng(1)
executor = Executor(materials=materials)
hashes = [executor.run(random_program(space, rng)).hash[:16] for _ in range(6)]
print(hashes, executor.recipe_hash(random_program(space, rng)))
"""


def test_the_same_ids_in_every_process() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "2")
    }
    printed: list[str] = []
    exec(SCRIPT, {"print": lambda *parts: printed.append(" ".join(map(str, parts)))})
    assert outputs == {printed[0] + "\n"}


def test_identity_recipe_has_the_state_of_the_pool() -> None:
    pool = synthetic_pool(500)
    subset = Executor(materials=pool.materials).run(make_recipe([]))
    state = StateReader(materials=pool.materials, graph=pool.materials.graph(1)).read(subset.positions)
    assert subset.hash == pool.materials.pool.hash
    assert state["retain_ratio"] == state["token_ratio"] == 1.0
    assert state["mean_ifd"] == state["mean_varentropy"] == 1.0


def test_prefix_cache_gives_the_same_subset() -> None:
    pool = synthetic_pool(500)
    rng = np.random.default_rng(0)
    warm = Executor(materials=pool.materials)
    for _ in range(20):
        recipe = random_program(space_of(pool), rng)
        grown = make_recipe([*recipe.steps, make_step("random_k", k=100, seed=1)])
        warm.run(recipe)
        trace = warm.run(grown).trace
        assert all(step.note in {"cached", "identity"} for step in trace[:-1])
        np.testing.assert_array_equal(
            warm.run(grown).positions, Executor(materials=pool.materials).run(grown).positions
        )


def space_of(pool) -> Space:
    return make_space(pool.materials, SearchSettings(seed=1), 3)
