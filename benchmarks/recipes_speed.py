"""Speed and memory of recipes on a pool of 90,000 samples, growth to a million, and peers side by side.

    OMP_NUM_THREADS=1 python benchmarks/recipes_speed.py [--samples 90000] [--grow] [--peers]

One thread; CPU seconds of the process (`time.process_time`), which other people's load moves less than wall time does.
Peers (datasketch, faiss-cpu, apricot-select) are used where they are installed and named where they are not.
"""

import argparse
import importlib.util
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokencredit.recipes.pool.samples import make_pool, splitmix64
from tokencredit.recipes.program import selectors
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.recipe import make_recipe
from tokencredit.recipes.program.state import StateReader
from tokencredit.recipes.search.config import SearchSettings
from tokencredit.recipes.search.propose import make_space, random_program
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.minhash import shingle
from tokencredit.recipes.signals.neardup import build_graph
from tokencredit.seeds import derive

TASKS = ("rel.a", "rel.b", "rel.c", "rel.d")
RECIPE = (
    {"op": "top", "signal": "unigram_entropy", "fraction": 0.90},
    {"op": "top_union", "signals": list(TASKS), "fraction": 0.85},
    {"op": "semdedup", "cosine": 0.88, "clusters": 1000},
)


def rng_of(*parts: str | int) -> np.random.Generator:
    return np.random.default_rng(derive("recipes speed", *parts))


def features_of(samples: int, width: int = 1024) -> np.ndarray:
    """Clustered unit rows, 6 % of them near-copies of another row."""
    rng = rng_of("features", samples)
    centres = rng.standard_normal((1500, width), dtype=np.float32)
    rows = centres[rng.integers(0, 1500, samples)] + 1.2 * rng.standard_normal((samples, width), dtype=np.float32)
    copies = rng.choice(samples, samples * 6 // 100, replace=False)
    noise = rng.uniform(0.1, 0.8, (len(copies), 1)).astype(np.float32)
    rows[copies] = rows[rng.integers(0, samples, len(copies))] + noise * rng.standard_normal(
        (len(copies), width), dtype=np.float32
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def texts_of(samples: int) -> list[str]:
    """Zipf-distributed words, 60 to 340 a text; 10 % near-copies with a few words changed."""
    rng = rng_of("texts", samples)
    words = np.array([f"w{i}" for i in range(20_000)])
    texts: list[list[str]] = []
    for _ in range(samples):
        if texts and rng.random() < 0.1:
            text = list(texts[int(rng.integers(len(texts)))])
            for place in rng.integers(0, len(text), 1 + len(text) // 80):
                text[place] = "changed"
        else:
            text = words[np.minimum(rng.zipf(1.2, int(rng.integers(60, 340))), 20_000) - 1].tolist()
        texts.append(text)
    return [" ".join(text) for text in texts]


def materials_of(samples: int, **more: Any) -> Materials:
    rng = rng_of("signals", samples)
    names = ("unigram_entropy", "ifd", "varentropy", "ppl", *TASKS)
    signals = {name: rng.standard_normal(samples).astype(np.float32) for name in names}
    pool = make_pool(splitmix64(np.arange(samples, dtype=np.uint64)), ["a"] * samples, rng.integers(50, 500, samples))
    return Materials(pool=pool, signals=signals, **more)


def measure(name: str, call: Callable[[], Any], repeats: int = 5, target: str = "") -> Any:
    """Median CPU time with its range, and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        started = time.process_time()
        result = call()
        seconds.append(time.process_time() - started)
    spread = f"[{min(seconds):.3f}, {max(seconds):.3f}]" if repeats > 1 else ""
    print(f"{name:58s} {np.median(seconds):9.3f} s {spread:18s} {target}", flush=True)
    return result


def step(materials: Materials, *steps: dict) -> Callable[[], Any]:
    recipe = make_recipe(list(steps))
    return lambda: Executor(materials=materials).run(recipe)  # a fresh executor: no prefix cache


def steps_table(samples: int) -> None:
    """Every kind of step, a whole recipe with state, and 63 materialisations."""
    features = features_of(samples)
    held: dict[str, Any] = {}
    materials = materials_of(samples, features=features, make_graph=lambda clusters, exact: held["graph"])
    print(f"# {samples:,} samples")
    measure("top, fraction .9", step(materials, RECIPE[0]), target="≤ .050")
    measure("top_union of 4 signals", step(materials, RECIPE[1]), target="≤ .150")
    measure("random_k", step(materials, {"op": "random_k", "k": samples // 2, "seed": 1}), target="≤ .020 without hash")
    everything = np.arange(samples, dtype=np.int32)
    measure("subset hash", lambda: materials.pool.subset_hash(everything[::2].copy()))
    held["graph"] = measure(
        "semdedup, first use: 1,000 clusters, 1,024 dimensions", lambda: build_graph(features, 1000), 1, "≤ 15"
    )
    print(f"  pairs with cosine ≥ .70: {len(held['graph'].first):,}")
    measure("semdedup, graph cached", step(materials, RECIPE[2]), target="≤ .5")
    reader = StateReader(materials=materials, graph=held["graph"])
    subset = step(materials, *RECIPE)()
    measure("state of a subset, drift over 1,024 dimensions", lambda: reader.read(subset.positions), target="≤ .200")

    def recipe_with_state() -> None:
        reader.read(step(materials, *RECIPE, {"op": "random_k", "k": samples // 2, "seed": 42})().positions)

    measure("four-step recipe with state, graph cached", recipe_with_state, target="≤ 20 (.5)")

    def sixty_three() -> None:
        executor, rng = Executor(materials=materials), rng_of("programs")
        space = make_space(materials, SearchSettings(seed=1), 1)
        for _ in range(63):
            reader.read(executor.run(random_program(space, rng)).positions)

    measure("63 random recipes with state", sixty_three, 1, "≤ 300")


def minhash_table(samples: int) -> list[str]:
    texts = texts_of(samples)
    print(f"# minhash, {samples:,} texts of {sum(len(t.split()) for t in texts) // samples} words on average")
    made = measure("signatures: 5-word shingles, 128 permutations", lambda: shingle(texts, len(texts)), 1)
    materials = materials_of(samples, make_shingles=lambda: made)
    kept = measure(
        "minhash .8 with exact verification", step(materials, {"op": "minhash", "jaccard": 0.8}), 1, "≤ 60 both"
    )
    print(f"  kept {len(kept):,}")
    return texts


def growth_table(sizes: Sequence[int]) -> None:
    """Everything but the dedups, in microseconds a sample: flat means linear."""
    print("# growth, microseconds a sample")
    for samples in sizes:
        materials = materials_of(samples)
        reader = StateReader(materials=materials)
        row = []
        for steps in ((RECIPE[0],), (RECIPE[1],), ({"op": "random_k", "k": samples // 2, "seed": 1},)):
            call = step(materials, *steps)
            started = time.process_time()
            subset = call()
            row.append((time.process_time() - started) / samples * 1e6)
        started = time.process_time()
        reader.read(subset.positions)
        row.append((time.process_time() - started) / samples * 1e6)
        names = ("top", "top_union", "random_k", "state")
        print(
            f"{samples:10,} " + "  ".join(f"{name} {value:.3f}" for name, value in zip(names, row, strict=True)),
            flush=True,
        )


def peers_table(samples: int) -> None:
    """The same work by the best installable peers, in the same run."""
    print(f"# peers, {samples:,} samples")
    texts = texts_of(samples)
    made = measure("ours: minhash .8, signatures and walk", lambda: _our_minhash(texts), 1)
    if importlib.util.find_spec("datasketch"):
        theirs = measure("datasketch MinHashLSH .8, estimates only", lambda: _datasketch(texts), 1)
        print(f"  kept: ours {made:,}, datasketch {theirs:,}")
    else:
        print("datasketch is not installed")
    features = features_of(samples, 256)
    graph = measure("ours: pair graph, 1,000 clusters, 256 dimensions", lambda: build_graph(features, 1000), 1)
    if importlib.util.find_spec("faiss"):
        pairs = measure("faiss: k-means 1,000, 8 iterations, in-cluster products", lambda: _faiss(features), 1)
        print(f"  pairs: ours {len(graph.first):,}, faiss {pairs:,}")
    else:
        print("faiss is not installed")
    small = features[: min(samples, 4000)].astype(np.float64)
    ours = measure(
        f"ours: facility location, k 200 of {len(small):,}, 32 neighbours",
        lambda: selectors.facility_location(small, 200),
        1,
    )
    full = np.maximum(small @ small.T, 0)
    if importlib.util.find_spec("apricot"):
        _apricot(small[:300])  # compiles
        theirs = measure("apricot FacilityLocation, dense, lazy", lambda: _apricot(small), 1)
        values = [full[:, chosen].max(1).sum() for chosen in (ours, theirs)]
        print(f"  objective on dense similarities: ours {values[0]:.1f}, apricot {values[1]:.1f}")
    else:
        print("apricot is not installed")
    measure(f"ours: k-center, k 200 of {len(small):,}", lambda: selectors.k_center(small, 200), 1)


def _our_minhash(texts: list[str]) -> int:
    made = shingle(texts, len(texts))
    materials = materials_of(len(texts), make_shingles=lambda: made)
    return len(step(materials, {"op": "minhash", "jaccard": 0.8})())


def _datasketch(texts: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH

    lsh, kept = MinHashLSH(threshold=0.8, num_perm=128), 0
    for number, text in enumerate(texts):
        words = text.split()
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(len(words) - 4, 1))])
        if not lsh.query(sketch):
            lsh.insert(number, sketch)
            kept += 1
    return kept


def _faiss(features: np.ndarray) -> int:
    import faiss

    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(features.shape[1], 1000, niter=8, spherical=True, seed=42, max_points_per_centroid=32)
    kmeans.train(features)
    labels = kmeans.index.search(features, 1)[1].ravel()
    pairs = 0
    for label in range(1000):
        rows = features[labels == label]
        pairs += (int((rows @ rows.T >= 0.7).sum()) - len(rows)) // 2
    return pairs


def _apricot(features: np.ndarray) -> np.ndarray:
    from apricot import FacilityLocationSelection

    model = FacilityLocationSelection(200, metric="cosine", optimizer="lazy", random_state=0)
    return np.asarray(model.fit(features).ranking)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=90_000)
    parser.add_argument("--peer-samples", type=int, default=10_000)
    parser.add_argument("--only", choices=("steps", "minhash", "growth", "peers"))
    options = parser.parse_args()
    tables: dict[str, Callable[[], Any]] = {
        "steps": lambda: steps_table(options.samples),
        "minhash": lambda: minhash_table(options.samples),
        "growth": lambda: growth_table((100_000, 300_000, 1_000_000)),
        "peers": lambda: peers_table(options.peer_samples),
    }
    for name, table in tables.items():
        if options.only in {None, name}:
            table()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
