import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.pool.samples import make_pool
from tokencredit.recipes.program import selectors
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.recipe import make_recipe
from tokencredit.recipes.program.state import StateReader
from tokencredit.recipes.signals import forward
from tokencredit.recipes.signals.computation import Sources, add_column, compute
from tokencredit.recipes.signals.forward import Scorer, pool_features, score_samples, token_statistics
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.relevance import max_cosine, overlap
from tokencredit.recipes.signals.store import load_materials
from tokencredit.recipes.signals.text import unigram_entropy

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +=-?"
TOKENIZER = build_tokenizer(ALPHABET)
MODEL = build_model(TOKENIZER, layers=1, width=16, heads=2, seed=0)


def chat(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def scorer(**options) -> Scorer:
    return Scorer(model=MODEL, tokenizer=TOKENIZER, name="m", revision="r", **options)


def test_unigram_entropy() -> None:
    # the 1/2, cat 1/4, dog 1/4: 1/2 · 1 + 1/4 · 2 + 1/4 · 2
    assert unigram_entropy("The cat, the dog!") == pytest.approx(1.5)
    assert unigram_entropy("...") == 0.0


def stats_of(probabilities: list[float], target: int) -> dict[str, float]:
    hidden = torch.tensor(probabilities).log().reshape(1, 1, -1)
    one = torch.ones(1, 1, dtype=torch.bool)
    return {
        k: v.item() for k, v in token_statistics(lambda states: states, hidden, torch.tensor([[target]]), one).items()
    }


def test_token_statistics_goldens() -> None:
    found = stats_of([0.9, 0.1], 0)
    assert found["entropy"] == pytest.approx(0.3251, abs=5e-5)
    # .9 (log .9 + .3251)² + .1 (log .1 + .3251)² = .9 · .0483 + .1 · 3.9105
    assert found["varentropy"] == pytest.approx(0.4345, abs=5e-5)
    assert stats_of([0.25] * 4, 1)["varentropy"] == pytest.approx(0.0, abs=1e-6)
    # √(.49 + .04 + .01 − 2 · .7 + 1) = √.14
    assert stats_of([0.7, 0.2, 0.1], 0)["el2n"] == pytest.approx(0.3742, abs=5e-5)
    assert stats_of([0.7, 0.2, 0.1], 1)["loss"] == pytest.approx(-np.log(0.2), abs=1e-5)


def test_columns_equal_a_plain_forward() -> None:
    samples = [chat("1+1?", "2"), chat("what is next", "one two three"), chat("a", "bb")]
    columns, features = score_samples(scorer(), samples)
    for row, messages in enumerate(samples):
        prompt = TOKENIZER(messages[0]["content"])["input_ids"]
        response = [*TOKENIZER(messages[1]["content"])["input_ids"], TOKENIZER.eos_token_id]
        with torch.no_grad():
            logits = MODEL(input_ids=torch.tensor([prompt + response])).logits[0].double()
            alone = MODEL(input_ids=torch.tensor([response])).logits[0].double()
        rows = torch.arange(len(response))
        losses = -logits.log_softmax(-1)[len(prompt) - 1 : -1][rows, response]
        assert columns["loss"][row] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert columns["ppl"][row] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
        assert columns["len.response"][row] == len(response)
        assert columns["len.total"][row] == len(prompt) + len(response)
        without = -alone.log_softmax(-1)[:-1][rows[:-1], response[1:]]
        ratio = (losses[1:].mean() / without.mean()).item()
        if ratio < 1:
            assert columns["ifd"][row] == pytest.approx(ratio, rel=1e-3)
        else:
            assert np.isnan(columns["ifd"][row])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    samples = [chat("1+1?", "2"), chat("what is next", "one two three and more"), chat("a", "bb")]
    together, features = score_samples(scorer(), samples)
    for row, messages in enumerate(samples):
        alone, feature = score_samples(scorer(), [messages])
        np.testing.assert_allclose(feature[0], features[row], atol=1e-5)
        for name in ("loss", "entropy", "varentropy", "el2n", "ifd"):
            np.testing.assert_allclose(alone[name][0], together[name][row], rtol=1e-4)


def test_pooling_weighs_later_tokens_and_no_padding() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [torch.nan, torch.nan]]])
    real = torch.tensor([[True, True, False]])
    # (1 · (1,0) + 2 · (0,1)) / 3, scaled to length 1
    torch.testing.assert_close(pool_features(hidden, real), torch.tensor([[1.0, 2.0]]) / 5**0.5)


def test_truncation_is_recorded() -> None:
    columns, _ = score_samples(scorer(max_length=6), [chat("1+1?", "2 and more"), chat("a", "b")])
    assert columns["truncated"].tolist() == [1.0, 0.0]
    assert columns["len.total"].tolist() == [6.0, 3.0]


def test_overlap_sparse_equals_dense() -> None:
    # Σ min = .2 + .3 = .5 over Σ max = .1 + .5 + .4 = 1.0
    a, t = np.array([[0, 0.5, 0, 0.2]]), np.array([0.1, 0.3, 0, 0.4])
    assert overlap(csr_matrix(a), t)[0] == pytest.approx(0.5)
    assert overlap(csr_matrix(t[None]), t)[0] == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    dense = rng.random((50, 20)) * (rng.random((50, 20)) < 0.2)
    dense[3] = 0
    target = rng.random(20)
    expected = np.minimum(dense, target).sum(1) / np.maximum(dense, target).sum(1)
    np.testing.assert_allclose(overlap(csr_matrix(dense), target), expected, rtol=1e-5)


def test_max_cosine_leaves_rows_without_features_missing() -> None:
    rows = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    found = max_cosine(rows, np.array([[0.0, 3.0], [1.0, 1.0]]))
    np.testing.assert_allclose(found, [2**-0.5, 1.0, np.nan], rtol=1e-6)


def test_drift_of_sparse_features() -> None:
    # active {0,1}, {1}, {2}, {1,3}; shares ¼ ¾ ¼ ¼ in the pool and ½ 1 0 0 in the first two: each ¼ off, √(4/16)/√4
    active = csr_matrix(np.array([[1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [0, 1, 0, 1.0]]))
    materials = Materials(pool=make_pool(range(4), ["s"] * 4, [1] * 4), signals={}, features=active)
    reader = StateReader(materials=materials)
    assert reader.read(np.array([0, 1], np.int32))["drift"] == pytest.approx(0.25)
    assert reader.read(np.arange(4, dtype=np.int32))["drift"] == pytest.approx(0.0)


FEATURES = np.random.default_rng(3).standard_normal((60, 8)).astype(np.float32)


def selector_materials() -> Materials:
    rng = np.random.default_rng(4)
    names = ("rel.a", "rel.b", "quality", "trajectory.1", "trajectory.2")
    signals = {name: rng.standard_normal(60).astype(np.float32) for name in names}
    return Materials(pool=make_pool(range(60), ["s"] * 60, [1] * 60), signals=signals, features=FEATURES)


@pytest.mark.parametrize(
    "op", ["k_center", "facility_location", "diverse_top", "round_robin", "gumbel_k", "trajectory_k"]
)
def test_a_selector_is_a_recipe_of_length_one(op: str) -> None:
    m = selector_materials()
    quality = m.signals["quality"].astype(np.float64)
    trajectories = np.stack([m.signals["trajectory.1"], m.signals["trajectory.2"]], axis=1)
    direct = {
        "k_center": lambda: selectors.k_center(FEATURES, 9),
        "facility_location": lambda: selectors.facility_location(FEATURES, 9),
        "diverse_top": lambda: selectors.diverse_walk(quality, FEATURES, 9, 0.75),
        "round_robin": lambda: selectors.round_robin([m.signals["rel.a"], m.signals["rel.b"]], 9),
        "gumbel_k": lambda: selectors.gumbel_top_k(quality, 9, 5),
        "trajectory_k": lambda: selectors.trajectory_k(trajectories, 9, 4, 5),
    }
    params = {
        "diverse_top": {"signal": "quality", "cosine": 0.75},
        "round_robin": {"signals": ["rel.a", "rel.b"]},
        "gumbel_k": {"signal": "quality", "seed": 5},
        "trajectory_k": {"seed": 5, "clusters": 4},
    }
    subset = Executor(materials=m).run(make_recipe([{"op": op, "k": 9, **params.get(op, {})}]))
    assert subset.positions.tolist() == sorted(direct[op]().tolist())
    assert len(set(subset.positions.tolist())) == 9


def test_facility_location_is_the_plain_greedy() -> None:
    rows = FEATURES.astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    sims = np.maximum(unit.astype(np.float32) @ unit.astype(np.float32).T, 0)
    covered, chosen = np.zeros(60), []
    for _ in range(6):
        gains = np.maximum(sims - covered, 0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = np.maximum(covered, sims[chosen[-1]])
    assert selectors.facility_location(FEATURES, 6, neighbours=60).tolist() == chosen


def test_k_center_is_within_twice_the_optimum_and_greedy() -> None:
    points = np.array([[0.0], [0.1], [10.0], [10.1], [5.0]])
    assert sorted(selectors.k_center(points, 3).tolist()) in ([0, 3, 4], [0, 2, 4], [1, 3, 4])


def test_diverse_walk_is_strict() -> None:
    rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    scores = np.array([3.0, 2.0, 1.0])
    cosine = float(np.float32(0.8))
    assert selectors.diverse_walk(scores, rows, 3, cosine).tolist() == [0, 1, 2]
    assert selectors.diverse_walk(scores, rows, 3, 0.79).tolist() == [0, 2]


def test_trajectories_with_nan_are_refused() -> None:
    with pytest.raises(TokenCreditError, match="1 trajectories hold NaN"):
        selectors.trajectory_k(np.array([[1.0, np.nan], [1.0, 2.0]]), 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [{"prompt": f"{i}+1?", "response": f"{i + 1}", "source": "a" if i % 2 else "b"} for i in range(30)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    MODEL.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path


def test_signals_are_cached_and_a_killed_pass_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "SHARD", 10)
    pool = load_materials(folder / "pool").pool
    sources = Sources(model=str(folder / "model"), max_length=64)
    real, calls = forward.score_samples, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(forward, "score_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        compute(folder / "pool", pool, ["ppl", "rds"], sources)
    assert "ppl" in compute(folder / "pool", pool, ["ppl", "rds"], sources)
    assert len(calls) == 4  # two shards, the kill, and the third shard alone
    assert compute(folder / "pool", pool, ["ppl", "rds", "ifd"], sources) == []
    materials = load_materials(folder / "pool")
    direct, _ = score_samples(scorer(), [sample["messages"] for sample in pool.samples()])
    np.testing.assert_allclose(materials.column("ppl"), direct["ppl"], rtol=1e-4)
    assert materials.keys["ppl"] == materials.keys["el2n"] != ""
    assert not list((folder / "pool" / "signals").glob("pass-*"))
    assert compute(folder / "pool", pool, ["ppl"], Sources(model=str(folder / "model"), max_length=32))


def test_relevance_and_leaks(folder: Path) -> None:
    pool = load_materials(folder / "pool").pool
    queries = folder / "queries.jsonl"
    queries.write_text(json.dumps({"prompt": "7+1?", "response": "8"}) + "\n")
    sources = Sources(model=str(folder / "model"), queries={"sum": queries})
    compute(folder / "pool", pool, ["rds", "rel"], sources)
    column = load_materials(folder / "pool").column("rel.sum")
    assert column.argmax() == 7 and column[7] == pytest.approx(1.0, abs=1e-5)
    split = folder / "search.jsonl"
    split.write_text(json.dumps({"prompt": "7+1?  ", "answer": "8"}) + "\n")
    with pytest.raises(TokenCreditError, match=r"queries\.jsonl shares a problem with .*search\.jsonl:1: '7\+1\?'"):
        compute(folder / "pool", pool, ["rel"], Sources(queries={"sum": queries}, splits=[split]))
    compute(folder / "pool", pool, ["hashed", "rel"], Sources(queries={"sum": queries}))
    assert load_materials(folder / "pool").column("rel.sum").argmax() == 7
    with pytest.raises(TokenCreditError, match="need a model"):
        compute(folder / "pool", pool, ["ppl"], Sources())
    with pytest.raises(TokenCreditError, match="unknown signal 'pppl', did you mean 'ppl'"):
        compute(folder / "pool", pool, ["pppl"], Sources())


def test_sparse_autoencoder_features(folder: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(16, 40, generator=generator), torch.full((40,), -1.0)
    save_file({"W_enc": weight, "b_enc": bias}, folder / "sae.safetensors")
    pool = load_materials(folder / "pool").pool
    queries = folder / "queries.jsonl"
    queries.write_text(json.dumps({"prompt": "7+1?", "response": "8"}) + "\n")
    sources = Sources(model=str(folder / "model"), sae=folder / "sae.safetensors", queries={"sum": queries})
    compute(folder / "pool", pool, ["sae", "rel"], sources)
    materials = load_materials(folder / "pool")
    messages = next(pool.samples(np.array([7], np.int32)))["messages"]
    ids = TOKENIZER("7+1?8")["input_ids"] + [TOKENIZER.eos_token_id]
    with torch.no_grad():
        hidden = MODEL.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    expected = torch.relu(hidden @ weight + bias).mean(0)
    assert messages[0]["content"] == "7+1?"
    np.testing.assert_allclose(materials.features[7].toarray()[0], expected, atol=1e-5)
    assert materials.column("rel.sum").argmax() == 7
    assert 0 < StateReader(materials=materials).read(np.arange(5, dtype=np.int32))["drift"] < 1
    with pytest.raises(TokenCreditError, match="semdedup needs features"):
        materials.graph(10)
    with pytest.raises(TokenCreditError, match="'sae' needs the weights"):
        compute(folder / "pool", pool, ["sae"], Sources(model=str(folder / "model")))


def test_own_columns_and_embeddings(folder: Path) -> None:
    pool = load_materials(folder / "pool").pool
    ids = [pool.ids[i].decode() for i in (3, 1)]
    np.savez(folder / "credit.npz", ids=np.array(ids), values=np.array([0.5, 0.25]))
    add_column(folder / "pool", pool, "credit", folder / "credit.npz")
    column = load_materials(folder / "pool").column("credit")
    assert column[3] == 0.5 and column[1] == 0.25 and np.isnan(column[[0, 2]]).all()
    np.save(folder / "wrong.npy", np.zeros(7))
    with pytest.raises(TokenCreditError, match="has 7 rows for 30 samples"):
        add_column(folder / "pool", pool, "wrong", folder / "wrong.npy")
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    np.save(folder / "rows.npy", rows)
    compute(folder / "pool", pool, ["embed"], Sources(embeddings=folder / "rows.npy"))
    materials = load_materials(folder / "pool")
    graph = materials.graph(1)
    assert load_materials(folder / "pool").graph(1).hash == graph.hash  # from disk the second time
    assert len(list((folder / "pool" / "signals").glob("neardup-1.npz"))) == 1
    np.testing.assert_allclose(materials.features, rows)
