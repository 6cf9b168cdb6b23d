"""Near-duplicates by cosine: spherical k-means fitted once, all similar pairs inside a cluster stored once."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from tokencredit.errors import TokenCreditError
from tokencredit.progress import bar
from tokencredit.recipes.pool.samples import Positions
from tokencredit.seeds import derive

FLOOR = 0.70  # pairs below this cosine are not stored
MAX_EDGES = 60_000_000  # 12 bytes each
TRAIN_PER_CLUSTER = 32  # k-means fits on at most this many rows a cluster, then assigns every row
BLOCK = 2048


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairGraph:
    """Pairs (first, second) of positions with their cosine, and the hash that makes a recipe reproducible.

    The hash covers the pairs themselves: two machines that round differently get two hashes, never two silent results.
    """

    first: Int32[np.ndarray, " pairs"]
    second: Int32[np.ndarray, " pairs"]
    cosine: Float32[np.ndarray, " pairs"]
    hash: str
    covered: np.ndarray  # [N] bool: samples with features


def make_graph(first: np.ndarray, second: np.ndarray, cosine: np.ndarray, covered: np.ndarray) -> PairGraph:
    """A graph in canonical order, (first, second) ascending with first < second."""
    first, second = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((second, first))
    first, second = first[order].astype(np.int32), second[order].astype(np.int32)
    cosine = cosine[order].astype(np.float32)
    digest = hashlib.sha256()
    for part in (first, second, cosine, covered):
        digest.update(np.ascontiguousarray(part).tobytes())
    return PairGraph(first=first, second=second, cosine=cosine, hash=digest.hexdigest(), covered=covered)


def has_features(features: np.ndarray) -> np.ndarray:
    """[N] bool: rows that are finite and not zero. A row of zeros or NaN stands for missing features everywhere."""
    present = np.empty(len(features), bool)
    for start in range(0, len(features), BLOCK):
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(np.asarray(features[start : start + BLOCK], dtype=np.float64), axis=1)
        present[start : start + BLOCK] = np.isfinite(norms) & (norms > 0)
    return present


def build_graph(features: np.ndarray, clusters: int, *, exact: bool = False, floor: float = FLOOR) -> PairGraph:
    """All pairs of one cluster with cosine ≥ `floor`; with `exact`, all pairs of the pool.

    Rows that are zero or not finite have no features and no pairs. Clusters are fitted on a projection to at most 256
    dimensions; the cosines use every dimension. A pair that k-means separates is not found: `exact` finds it, at
    quadratic cost.
    """
    norms = np.linalg.norm(features, axis=1)
    covered = has_features(features)
    rows = np.flatnonzero(covered)
    if len(rows) == 0:
        empty = np.empty(0)
        return make_graph(empty, empty, empty, covered)
    if exact:
        groups = [rows]
    else:
        labels = spherical_kmeans(project(features[rows] / norms[rows, None]), min(clusters, len(rows)))
        order = np.argsort(labels, kind="stable")
        groups = np.split(rows[order], np.flatnonzero(np.diff(labels[order])) + 1)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    edges = 0
    with bar("near-duplicate pairs", len(rows)) as advance:
        for group in groups:
            unit = np.asarray(features[group], dtype=np.float32) / norms[group, None].astype(np.float32)
            for pairs in _pairs_of(group, unit, floor):
                edges += len(pairs[0])
                parts.append(pairs)
            if edges > MAX_EDGES:
                raise TokenCreditError(
                    f"more than {MAX_EDGES:,} pairs have a cosine of at least {floor}",
                    hint="these features hardly tell samples apart: centre them, or use more clusters",
                )
            advance(len(group))
    first, second, cosine = (np.concatenate(column) for column in zip(*parts, strict=True))
    return make_graph(first, second, cosine, covered)


def _pairs_of(group: np.ndarray, unit: np.ndarray, floor: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    pairs = []
    for start in range(0, len(group), BLOCK):
        left = unit[start : start + BLOCK]
        for other in range(start, len(group), BLOCK):
            cosine = left @ unit[other : other + BLOCK].T
            row, column = np.nonzero(cosine >= floor)
            later = row + start < column + other
            row, column = row[later], column[later]
            pairs.append((group[row + start], group[column + other], cosine[row, column]))
    return pairs


def project(unit: np.ndarray, dimensions: int = 256) -> np.ndarray:
    """A Gaussian projection to at most 256 dimensions, rows scaled to length 1 again."""
    if unit.shape[1] > dimensions:
        rng = np.random.default_rng(derive("neardup", "projection", unit.shape[1], dimensions))
        unit = unit @ rng.standard_normal((unit.shape[1], dimensions), dtype=np.float32)
    return unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)


def spherical_kmeans(unit: np.ndarray, clusters: int, passes: int = 8, seed: int = 42) -> np.ndarray:
    """Labels of Lloyd's algorithm with cosine; deterministic under the seed.

    Fitted on a random part of at most 32 rows a cluster: the fit needs centres, not every row. An empty cluster is
    moved to a random row.
    """
    rng = np.random.default_rng(derive("neardup", "kmeans", seed, clusters))
    unit = np.ascontiguousarray(unit, dtype=np.float32)
    train = unit
    if len(unit) > TRAIN_PER_CLUSTER * clusters:
        train = unit[np.sort(rng.choice(len(unit), TRAIN_PER_CLUSTER * clusters, replace=False))]
    centres = train[rng.choice(len(train), clusters, replace=False)]
    for _ in range(passes):
        labels = _nearest(train, centres)
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels, minlength=clusters)
        starts = np.r_[0, np.cumsum(counts)[:-1]]
        used = counts > 0
        sums = np.add.reduceat(train[order], starts[used], axis=0)
        centres = centres.copy()
        centres[used] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        centres[~used] = train[rng.choice(len(train), int((~used).sum()))]
    return _nearest(unit, centres)


def _nearest(unit: np.ndarray, centres: np.ndarray) -> np.ndarray:
    labels = np.empty(len(unit), np.int32)
    for start in range(0, len(unit), 4096):
        labels[start : start + 4096] = (unit[start : start + 4096] @ centres.T).argmax(1)
    return labels


def edges_within(graph: PairGraph, walk: Positions, size: int, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the walked samples as ranks (earlier, later) in the walk."""
    rank = np.full(size, -1, np.int32)
    rank[walk] = np.arange(len(walk), dtype=np.int32)
    first, second = rank[graph.first], rank[graph.second]
    use = (graph.cosine >= np.float32(cosine)) & (first >= 0) & (second >= 0)
    first, second = first[use], second[use]
    return np.minimum(first, second), np.maximum(first, second)


def greedy_keep(size: int, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Walk 0…size−1 and drop x iff an earlier kept y shares an edge with it; returns the mask of the kept.

    In rounds over all edges: what no undecided sample precedes is kept, what a kept one precedes is dropped. The same
    result as the sequential walk, which finishes what long chains leave over.
    """
    keep = np.ones(size, bool)
    for _ in range(16):
        if len(later) == 0:
            return keep
        waiting = np.zeros(size, bool)
        waiting[later] = True
        settled = ~waiting[earlier]  # its earlier end waits for nobody, hence is kept
        keep[later[settled]] = False
        live = keep[earlier] & keep[later]
        earlier, later = earlier[live], later[live]
    order = np.lexsort((earlier, later))
    for y, x in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
        if keep[y]:
            keep[x] = False
    return keep
