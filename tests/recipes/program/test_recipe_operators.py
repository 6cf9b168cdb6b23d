import numpy as np
import pytest

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import make_pool
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.operators.spec import exact_ceil
from tokencredit.recipes.program.operators.table import OPERATORS
from tokencredit.recipes.program.recipe import make_recipe
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.minhash import shingle
from tokencredit.recipes.signals.neardup import build_graph, greedy_keep


def materials(n: int = 4, *, texts: list[str] | None = None, vectors: np.ndarray | None = None, **signals) -> Materials:
    columns = {name: np.array(values, np.float32) for name, values in signals.items()}
    size = len(next(iter(columns.values()))) if columns else len(texts or ()) or n
    dense = None if vectors is None else np.asarray(vectors, np.float32)
    return Materials(
        pool=make_pool(np.arange(100, 100 + size), ["s"] * size, [2] * size),
        signals=columns,
        features=dense,
        make_graph=None if dense is None else lambda clusters, exact: build_graph(dense, clusters, exact=exact),
        make_shingles=None if texts is None else lambda: shingle(texts, len(texts)),
    )


def run(m: Materials, *steps: dict) -> list[int]:
    return Executor(materials=m).run(make_recipe(steps)).positions.tolist()


def test_exact_ceiling() -> None:
    # in floats, 100 * 0.07 is 7.000000000000001 and 90000 * 0.55 is 49500.00000000001
    assert [exact_ceil(f, n) for f, n in ((0.25, 10), (0.07, 100), (0.55, 90000), (1, 7))] == [3, 7, 49500, 7]


def test_steps_do_not_commute() -> None:
    m = materials(a=[4, 3, 2, 1], b=[1, 2, 4, 3])
    first, second = ({"op": "top", "signal": s, "fraction": 0.5} for s in "ab")
    # a keeps items 1, 2 of which b prefers item 2; b keeps items 3, 4 of which a prefers item 3
    assert run(m, first, second) == [1]
    assert run(m, second, first) == [2]


def test_ties_go_to_the_earlier_position_and_order_is_kept() -> None:
    m = materials(s=[1, 5, 5, 5, 9])
    assert run(m, {"op": "top", "signal": "s", "k": 3}) == [1, 2, 4]
    assert run(m, {"op": "top", "signal": "s", "k": 3, "order": "score"}) == [4, 1, 2]
    assert run(m, {"op": "top", "signal": "s", "k": 2, "descending": False}) == [0, 1]
    # two tokens a sample: three samples fit into 7
    assert run(m, {"op": "top", "signal": "s", "tokens": 7}) == [1, 2, 4]


def test_missing_scores() -> None:
    nan = float("nan")
    m = materials(s=[nan, 3, 2, 1], ifd=[nan, 3, 2, 1])
    half = {"op": "top", "fraction": 0.5}
    with pytest.raises(TokenCreditError, match="signal 's' is missing for 1 of 4 samples"):
        run(m, {**half, "signal": "s"})
    # ⌈.5 · 3 scored⌉ = 2
    assert run(m, {**half, "signal": "s", "missing": "drop"}) == [1, 2]
    assert run(m, {**half, "signal": "s", "missing": "keep"}) == [0, 1, 2]
    assert run(m, {**half, "signal": "ifd"}) == [1, 2]
    assert run(m, {"op": "threshold", "signal": "ifd", "value": 2}) == [1, 2]
    assert run(m, {"op": "threshold", "signal": "s", "value": 2, "below": True, "missing": "keep"}) == [0, 2, 3]
    assert run(m, {**half, "signal": "s", "missing": "keep", "order": "score"}) == [1, 2, 0]


def test_band_keeps_the_middle() -> None:
    # ascending ranks ⌈.25 · 4⌉ = 1 … ⌈.75 · 4⌉ − 1 = 2, that is the scores 20 and 30
    assert run(materials(s=[40, 10, 30, 20]), {"op": "band", "signal": "s", "low": 0.25, "high": 0.75}) == [2, 3]


def test_top_union_keeps_at_least_the_fraction() -> None:
    m = materials(a=[4, 3, 2, 1], b=[1, 2, 3, 4])
    assert run(m, {"op": "top_union", "signals": ["a", "b"], "fraction": 0.25}) == [0, 3]
    assert run(m, {"op": "top_union", "signals": ["a", "a"], "k": 3}) == [0, 1, 2]


def test_random_k_is_nested_and_independent_of_order() -> None:
    m = materials(200)
    draws = [set(run(m, {"op": "random_k", "k": k, "seed": 1})) for k in (20, 50, 120)]
    assert draws[0] < draws[1] < draws[2]
    current = np.arange(200, dtype=np.int32)
    shuffled = current[::-1].copy()
    kept = OPERATORS["random_k"].fn(m, shuffled, k=50, seed=1)
    assert set(kept.tolist()) == draws[1]
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)
    # without the first seven samples, the draw of 50 loses only those seven, and gains as many
    assert len(set(OPERATORS["random_k"].fn(m, current[7:], k=50, seed=1).tolist()) & draws[1]) >= 43
    assert set(run(m, {"op": "random_k", "k": 50, "seed": 2})) != draws[1]


def test_stratified_quotas() -> None:
    m = materials(10)
    sources = ["a"] * 6 + ["b"] * 3 + ["c"]
    m = Materials(pool=make_pool(np.arange(10), sources, [1] * 10), signals={})
    kept = np.array(run(m, {"op": "stratified_k", "k": 5, "seed": 1}))
    # shares 3, 1.5, .5: whole 3, 1, 0, remainders tie at .5 and the earlier name wins
    assert np.bincount(m.pool.source_codes[kept], minlength=3).tolist() == [3, 2, 0]
    kept = np.array(run(m, {"op": "stratified_k", "k": 8, "seed": 1, "share": "equal"}))
    # 8/3 each: 3, 3, 2, but c has one sample, so its other share goes to a
    assert np.bincount(m.pool.source_codes[kept], minlength=3).tolist() == [4, 3, 1]


def test_mix() -> None:
    m = materials(s=[4, 3, 2, 1, 0])
    executor = Executor(materials=m)
    source = executor.run(make_recipe([{"op": "threshold", "signal": "s", "value": 2, "below": True}]))
    m.evaluated[source.hash] = source.positions
    top2 = {"op": "top", "signal": "s", "k": 3, "order": "score"}
    mixed = run(m, top2, {"op": "mix", "source": source.hash[:12]})
    assert mixed == [0, 1, 2, 3, 4]  # |C ∪ S| = 3 + 3 − 1
    assert run(m, top2, {"op": "mix", "source": source.hash}, {"op": "mix", "source": source.hash}) == mixed
    with pytest.raises(TokenCreditError, match="unknown mix source"):
        run(m, {"op": "mix", "source": "0" * 16})


def unit(*angles: tuple[float, float]) -> np.ndarray:
    polar, azimuth = np.radians(np.array(angles)).T
    return np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], axis=1)


FOUR = unit((28, 0), (0, 0), (22, 120), (22, 240))


@pytest.mark.parametrize("options", [{"exact": True}, {"recluster": True, "clusters": 1}, {"clusters": 1}])
def test_semdedup_is_not_monotone(options: dict) -> None:
    m = materials(vectors=FOUR)
    # cosines .883 (1–2), .927 (2–3, 2–4), .731 (1–3, 1–4), .790 (3–4)
    assert run(m, {"op": "semdedup", "cosine": 0.85, **options}) == [0, 2, 3]
    assert run(m, {"op": "semdedup", "cosine": 0.90, **options}) == [0, 1]


def test_semdedup_threshold_and_keep() -> None:
    pair = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 0.0]])  # cosine .8; the third has no features and passes
    m = materials(vectors=pair, quality=[0.1, 0.9, 0.5])
    assert run(m, {"op": "semdedup", "cosine": 0.8, "exact": True}) == [0, 2]
    assert run(m, {"op": "semdedup", "cosine": 0.81, "exact": True}) == [0, 1, 2]
    assert run(m, {"op": "semdedup", "cosine": 0.8, "exact": True, "keep": "best:quality"}) == [1, 2]


def test_semdedup_needs_features() -> None:
    with pytest.raises(TokenCreditError, match="semdedup needs features"):
        run(materials(4), {"op": "semdedup", "cosine": 0.8})


def test_greedy_keep_equals_the_sequential_walk() -> None:
    rng = np.random.default_rng(0)
    for size, edges in ((50, 30), (50, 300), (400, 399)):
        a, b = rng.integers(0, size, (2, edges))
        if size == 400:  # a chain, longer than the rounds
            a, b = np.arange(399), np.arange(1, 400)
        a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
        keep = np.ones(size, bool)
        for x in range(size):
            keep[x] = not any(keep[y] for y in a[b == x])
        np.testing.assert_array_equal(greedy_keep(size, a, b), keep)


def test_clusters_find_the_planted_pairs() -> None:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((40, 64))
    vectors = np.repeat(centres, 5, axis=0) + 0.1 * rng.standard_normal((200, 64))
    clustered, exact = (
        build_graph(vectors.astype(np.float32), 20),
        build_graph(vectors.astype(np.float32), 20, exact=True),
    )
    assert len(exact.first) == 40 * 10  # five choose two for each centre
    assert len(clustered.first) >= 0.9 * len(exact.first)
    assert set(zip(clustered.first, clustered.second, strict=True)) <= set(zip(exact.first, exact.second, strict=True))


def test_minhash_decides_by_exact_jaccard() -> None:
    words = [f"w{i}" for i in range(104)]
    base = " ".join(words)  # 100 shingles of five words
    near = " ".join([*words[:-10], *(f"x{i}" for i in range(10))])  # shares 90, union 110: .818
    far = " ".join([*words[:-12], *(f"y{i}" for i in range(12))])  # shares 88, union 112: .786
    m = materials(texts=[base, near, far, base.upper(), "short text", "short text", ""])
    assert run(m, {"op": "minhash", "jaccard": 0.8}) == [0, 2, 4, 6]
    assert run(m, {"op": "minhash", "jaccard": 0.78}) == [0, 4, 6]
    assert run(m, {"op": "minhash", "jaccard": 0.82}) == [0, 1, 2, 4, 6]


def test_exact_dedup_keeps_the_first() -> None:
    m = Materials(pool=make_pool([7, 8, 7, 9, 7], ["s"] * 5, [1] * 5), signals={})
    assert run(m, {"op": "exact_dedup"}) == [0, 1, 3]


def test_empty_result_names_the_step() -> None:
    with pytest.raises(TokenCreditError, match=r"step 2 \(threshold\) leaves no sample of 2"):
        run(
            materials(s=[1, 2, 3]), {"op": "top", "signal": "s", "k": 2}, {"op": "threshold", "signal": "s", "value": 9}
        )


def test_identity_is_noted_and_operators_may_repeat() -> None:
    m = materials(s=[1, 2, 3])
    trace = (
        Executor(materials=m)
        .run(make_recipe([{"op": "random_k", "k": 9, "seed": 1}, {"op": "top", "signal": "s", "fraction": 1}]))
        .trace
    )
    assert [step.note for step in trace] == ["identity", "identity"]
    step = {"op": "top", "signal": "s", "fraction": 0.6}
    assert run(m, step, step) == [1, 2]  # ⌈.6 · 3⌉ = 2, ⌈.6 · 2⌉ = 2


def test_unknown_signal_names_the_nearest() -> None:
    with pytest.raises(TokenCreditError, match="unknown signal 'varentropi', did you mean 'varentropy'"):
        run(materials(varentropy=[1, 2]), {"op": "top", "signal": "varentropi", "k": 1})


def test_length_residual_is_uncorrelated_with_length() -> None:
    rng = np.random.default_rng(2)
    length = rng.lognormal(size=500)
    m = materials(**{"len.ws": length, "s": length + rng.standard_normal(500)})
    rank = np.argsort(np.argsort(length))
    assert abs(np.corrcoef(m.column("resid(s)"), rank)[0, 1]) < 1e-5
    assert abs(np.corrcoef(m.column("s"), rank)[0, 1]) > 0.5
