"""Synthetic pools and response surfaces with a known optimum: what a search is tested and measured on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokencredit.errors import unknown
from tokencredit.recipes.evaluate.records import Metrics, Request, TaskScore
from tokencredit.recipes.pool.samples import Positions, make_pool, splitmix64
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.neardup import PairGraph, make_graph
from tokencredit.seeds import derive

TASKS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyntheticPool:
    """Materials plus what stays hidden from every recipe: utilities [4, N] and the root of each near-duplicate."""

    materials: Materials
    utilities: np.ndarray
    root: np.ndarray  # [N], its own position for an original


def synthetic_pool(samples: int = 9000, seed: int = 0) -> SyntheticPool:
    """Correlated signals, lognormal lengths and 12 % near-duplicates; all z are standard normal.

    tokens e^{5+.8λ} · rel_b = .93g + .37z · entropy .7λ+.3q+.65z · ao .6λ+.2g+.75z · ifd −.5q+.85z ·
    varentropy −.3q+.2λ+.9z · hidden utility u_b = .5 rel_b + .5q + .7z
    """
    rng = np.random.default_rng(derive("synthetic", "pool", samples, seed))

    def z() -> np.ndarray:
        return rng.standard_normal(samples)

    length, general, quality = z(), z(), z()
    relevance = [0.93 * general + 0.37 * z() for _ in range(TASKS)]
    columns = {f"rel.t{task}": column for task, column in enumerate(relevance)}
    columns |= {
        "unigram_entropy": 0.7 * length + 0.3 * quality + 0.65 * z(),
        "ao": 0.6 * length + 0.2 * general + 0.75 * z(),
        "ifd": -0.5 * quality + 0.85 * z(),
        "varentropy": -0.3 * quality + 0.2 * length + 0.9 * z(),
    }
    utilities = np.stack([0.5 * column + 0.5 * quality + 0.7 * z() for column in relevance])
    root = np.arange(samples)
    copies = np.sort(rng.choice(samples, round(0.12 * samples), replace=False))
    originals = np.setdiff1d(root, copies)
    root[copies] = rng.choice(originals, len(copies))
    graph = make_graph(root[copies], copies, rng.uniform(0.7, 1.0, len(copies)), np.ones(samples, bool))
    numbers = splitmix64(np.arange(samples, dtype=np.uint64) ^ np.uint64(derive("synthetic", seed)))
    pool = make_pool(numbers, ["synthetic"] * samples, np.round(np.exp(5 + 0.8 * length)).astype(np.int64))

    def make(clusters: int, exact: bool) -> PairGraph:
        return graph

    signals = {name: column.astype(np.float32) for name, column in columns.items()}
    materials = Materials(pool=pool, signals=signals, make_graph=make)
    return SyntheticPool(materials=materials, utilities=utilities, root=root)


Surface = Callable[[SyntheticPool, Positions], float]


def _size_terms(pool: SyntheticPool, positions: Positions) -> float:
    words = pool.materials.pool.words
    ratio = float(words[positions].sum() / words.sum())
    return 30.6 + 8.6 * (1 - float(np.exp(-ratio / 0.12)))


def _duplicates(pool: SyntheticPool, positions: Positions) -> float:
    inside = np.zeros(len(pool.root), bool)
    inside[positions] = True
    roots = pool.root[positions]
    return float((inside[roots] & (roots != positions)).mean())


def mono(pool: SyntheticPool, positions: Positions) -> float:
    """More utility is better, with diminishing returns: full pool 38.0, random half 38.5."""
    gain = np.tanh(1.6 * pool.utilities[:, positions].mean(1)).mean()
    return _size_terms(pool, positions) + 3 * float(gain) - 10 * _duplicates(pool, positions)


def hump(pool: SyntheticPool, positions: Positions) -> float:
    """A moderate amount of everything is best; no single filter leads there."""
    signals = pool.materials.signals
    relevance = np.array([signals[f"rel.t{task}"][positions].mean() for task in range(TASKS)])
    entropy, ifd = signals["unigram_entropy"][positions].mean(), signals["ifd"][positions].mean()
    bowl = 8 * (relevance.mean() - 0.35) ** 2 + 8 * (entropy - 0.25) ** 2 + 10 * (ifd + 0.1) ** 2
    spread = np.abs(relevance).std()
    return _size_terms(pool, positions) + 1.5 - float(bowl + spread) - 8 * _duplicates(pool, positions)


def size(pool: SyntheticPool, positions: Positions) -> float:
    """Only the number of tokens counts."""
    return _size_terms(pool, positions)


def flat(pool: SyntheticPool, positions: Positions) -> float:
    """Nothing counts: every gain that a search reports here is luck."""
    return 40.0


SURFACES: dict[str, Surface] = {"mono": mono, "hump": hump, "size": size, "flat": flat}


def surface(name: str) -> Surface:
    """The surface called `name`."""
    if name not in SURFACES:
        raise unknown("surface", name, SURFACES)
    return SURFACES[name]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyntheticEvaluator:
    """A surface of known truth plus normal noise that depends only on subset, seed and split."""

    pool: SyntheticPool
    surface: Surface
    noise_sd: float = 0.5
    key: str = "synthetic"

    def truth(self, request: Request) -> float:
        return self.surface(self.pool, request.positions)

    def __call__(self, request: Request) -> Metrics:
        rng = np.random.default_rng(derive("synthetic noise", request.subset_hash, request.seed, request.split))
        score = self.truth(request) + self.noise_sd * float(rng.standard_normal())
        return Metrics(tasks={"synthetic": TaskScore(score=score)})
