"""Baseline selectors: greedy and clustered subset algorithms over any features.

Each function takes arrays and returns indices; `operators/` wraps them as steps, so that
every published selector is a recipe of length one. Representation and algorithm stay apart.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.signals.neardup import project, spherical_kmeans
from tokencredit.seeds import derive

Indices = Int64[np.ndarray, " _"]
Rows = Float[np.ndarray, "n width"]


def finite_rows(features: Rows) -> Indices:
    """The rows without NaN or infinity; a sample whose features are missing cannot be placed."""
    return np.flatnonzero(np.isfinite(np.asarray(features).sum(1, dtype=np.float64)))


def k_center(features: Rows, k: int) -> Indices:
    """Farthest-first traversal: add argmaxₓ min_{s∈S} ‖x − s‖ until k, from the row nearest to the mean; O(kND).

    Seeks outliers by design. Rows with NaN are left out. Paper: core-set selection (arXiv:1708.00489).
    """
    rows = finite_rows(features)
    return rows[_farthest_first(np.asarray(features)[rows], k)] if len(rows) else rows


def _farthest_first(features: Rows, k: int) -> Indices:
    squares = (features**2).sum(1)
    distance = squares - 2 * features @ features.mean(0)
    chosen = [int(distance.argmin())]
    nearest = np.full(len(features), np.inf)
    while len(chosen) < min(k, len(features)):
        latest = features[chosen[-1]]
        nearest = np.minimum(nearest, squares - 2 * features @ latest + latest @ latest)
        nearest[chosen[-1]] = -np.inf
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def facility_location(features: Rows, k: int, neighbours: int = 32) -> Indices:
    """max Σᵢ max_{j∈S} sim(i, j) by lazy greedy, within (1 − 1/e) of the optimum on the sparsified similarities.

    sim = cosine, clipped at 0, on the `neighbours` nearest rows of each row: the dense matrix of 90,000 rows would
    take 32 GB. Ties go to the earlier row. Rows with NaN are left out.
    """
    rows = finite_rows(features)
    return rows[_lazy_greedy(np.asarray(features)[rows], k, neighbours)] if len(rows) else rows


def _lazy_greedy(features: Rows, k: int, neighbours: int) -> Indices:
    columns, values, starts = _neighbour_graph(features, neighbours)
    covered = np.zeros(len(features))
    heap = [(-float(values[starts[j] : starts[j + 1]].sum()), j) for j in range(len(features))]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < k:
        _, j = heapq.heappop(heap)
        rows, sims = columns[starts[j] : starts[j + 1]], values[starts[j] : starts[j + 1]]
        gain = float(np.maximum(sims - covered[rows], 0.0).sum())
        if heap and (-gain, j) > heap[0]:  # stale: gains only shrink, so put it back with today's
            heapq.heappush(heap, (-gain, j))
            continue
        chosen.append(j)
        covered[rows] = np.maximum(covered[rows], sims)
    return np.array(chosen)


def _neighbour_graph(features: Rows, neighbours: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that column j covers, with similarities, in CSC form; a row covers itself with 1."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    unit = unit.astype(np.float32)
    count = min(neighbours, len(unit))
    rows, columns, values = [], [], []
    for start in range(0, len(unit), 2048):
        sims = unit[start : start + 2048] @ unit.T
        best = np.argpartition(-sims, count - 1, axis=1)[:, :count]
        rows.append(np.repeat(np.arange(start, start + len(sims)), count))
        columns.append(best.ravel())
        values.append(np.maximum(np.take_along_axis(sims, best, 1).ravel(), 0.0))
    row, column, value = (np.concatenate(parts) for parts in (rows, columns, values))
    order = np.lexsort((row, column))
    starts = np.r_[0, np.cumsum(np.bincount(column, minlength=len(unit)))]
    return row[order], value[order].astype(np.float64), starts


def diverse_walk(scores: Float[np.ndarray, " n"], features: Rows, k: int, cosine: float = 0.9) -> Indices:
    """Walk down the scores and skip a row whose cosine to a chosen one is above `cosine` (strictly), until k.

    Rows with NaN, in their features or as their score, are left out. Paper: DEITA (arXiv:2312.15685).
    Deviation: a skipped row blocks nothing.
    """
    with np.errstate(invalid="ignore"):
        unit = (features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    kept = np.empty((min(k, len(unit)), unit.shape[1]), np.float32)
    chosen: list[int] = []
    placed = np.zeros(len(unit), bool)
    placed[finite_rows(features)] = True
    placed &= ~np.isnan(scores)
    for row in np.argsort(-scores, kind="stable").tolist():
        if not placed[row]:
            continue
        if len(chosen) == k:
            break
        if not chosen or float((kept[: len(chosen)] @ unit[row]).max()) <= cosine:
            kept[len(chosen)] = unit[row]
            chosen.append(row)
    return np.array(chosen, np.int64)


def round_robin(scores: Sequence[np.ndarray], k: int) -> Indices:
    """Tasks take turns, each its best row that is not taken yet (RDS+, arXiv:2503.01807).

    Deviation: a task whose next row is taken goes on to its next one, instead of losing its turn.
    """
    walks = [iter(np.argsort(-column, kind="stable").tolist()) for column in scores]
    taken: dict[int, None] = {}
    while len(taken) < min(k, len(scores[0])):
        for walk in walks:
            row = next((row for row in walk if row not in taken), None)
            if row is not None and len(taken) < k:
                taken[row] = None
    return np.array(list(taken), np.int64)


def gumbel_top_k(log_weights: Float[np.ndarray, " n"], k: int, seed: int) -> Indices:
    """k rows without replacement with probability ∝ weight: the largest log w + Gumbel noise (DSIR, 2302.03169)."""
    rng = np.random.default_rng(derive("gumbel", seed))
    noisy = log_weights + rng.gumbel(size=len(log_weights))
    return np.sort(np.argsort(-noisy, kind="stable")[:k])


def trajectory_k(trajectories: Rows, k: int, clusters: int = 100, seed: int = 0) -> Indices:
    """Equal shares of clusters of loss trajectories, the smallest cluster first (S2L, arXiv:2403.07384)."""
    if not np.isfinite(trajectories).all():
        raise TokenCreditError(f"{int((~np.isfinite(trajectories)).any(1).sum())} trajectories hold NaN or infinity")
    labels = spherical_kmeans(project(trajectories), min(clusters, len(trajectories)), seed=seed)
    rng = np.random.default_rng(derive("trajectory", seed))
    members = sorted((np.flatnonzero(labels == label) for label in np.unique(labels)), key=len)
    chosen: list[np.ndarray] = []
    left = min(k, len(trajectories))
    for number, rows in enumerate(members):
        share = min(len(rows), left // (len(members) - number))
        chosen.append(np.sort(rng.choice(rows, share, replace=False)))
        left -= share
    return np.concatenate(chosen)
