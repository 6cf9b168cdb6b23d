"""Operators that draw samples, each repeatable by its seed, and the mix with an evaluated subset."""

from typing import Literal

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import Positions, hash_priority
from tokencredit.recipes.program import selectors
from tokencredit.recipes.program.operators.spec import Name, OperatorSpec, Size, WholeNumber, read_scores
from tokencredit.recipes.signals.materials import Materials


def random_k(materials: Materials, current: Positions, *, k: Size, seed: WholeNumber) -> Positions:
    """A uniform k of the current set by hash priority, in input order: nested in k, the same in every variant."""
    if k >= len(current):
        return current
    priority = hash_priority(materials.pool.id64[current], seed)
    return current[np.sort(np.argpartition(priority, k)[:k])]


def stratified_k(
    materials: Materials,
    current: Positions,
    *,
    k: Size,
    seed: WholeNumber,
    share: Literal["proportional", "equal"] = "proportional",
) -> Positions:
    """Quotas for each source, by its size or equal, with largest remainders; what a source lacks goes to the others."""
    if k >= len(current):
        return current
    codes = materials.pool.source_codes[current]
    available = np.bincount(codes, minlength=len(materials.pool.source_names))
    weights = available if share == "proportional" else (available > 0)
    quotas = _quotas(k, weights.astype(np.int64), available)
    priority = hash_priority(materials.pool.id64[current], seed)
    walk = np.lexsort((priority, codes))
    starts = np.r_[0, np.cumsum(available)[:-1]]
    rank = np.arange(len(walk)) - starts[codes[walk]]
    return current[np.sort(walk[rank < quotas[codes[walk]]])]


def _quotas(k: int, weights: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Largest-remainder shares of k, none above what is available, in integers."""
    quotas = np.zeros(len(weights), np.int64)
    while (left := k - int(quotas.sum())) > 0:
        open_weights = np.where(quotas < available, weights, 0)
        whole, remainder = np.divmod(left * open_weights, int(open_weights.sum()))
        # Ties of the remainder go to the source that comes first by name.
        extra = np.argsort(-remainder, kind="stable")[: left - int(whole.sum())]
        whole[extra] += 1
        quotas = np.minimum(quotas + whole, available)
    return quotas


def gumbel_k(materials: Materials, current: Positions, *, signal: Name, k: Size, seed: WholeNumber) -> Positions:
    """k drawn with probability proportional to e^signal (DSIR), in input order."""
    scored = read_scores(materials, current, signal, "error")
    return current[selectors.gumbel_top_k(scored.scores.astype(np.float64), k, seed)]


def trajectory_k(
    materials: Materials,
    current: Positions,
    *,
    k: Size,
    seed: WholeNumber,
    prefix: Name = "trajectory.",
    clusters: Size = 100,
) -> Positions:
    """Equal shares of clusters of the columns `trajectory.*`, losses at checkpoints (S2L), in input order.

    Samples that lack a loss are left out.
    """
    names = sorted(name for name in materials.signals if name.startswith(prefix))
    if not names:
        raise TokenCreditError(f"no signal starts with {prefix!r}", hint="add losses of checkpoints with --column")
    rows = np.stack([materials.column(name)[current] for name in names], axis=1)
    known = selectors.finite_rows(rows)
    if len(known) == 0:
        raise TokenCreditError(f"no sample of {len(current)} has all of {', '.join(names)}")
    return current[known][np.sort(selectors.trajectory_k(rows[known], k, clusters, seed))]


def mix(materials: Materials, current: Positions, *, source: Name) -> Positions:
    """C ∪ S: the current set, then what an evaluated subset adds, in pool order."""
    inside = np.zeros(len(materials.pool), bool)
    inside[current] = True
    other = np.sort(materials.subset(source))
    return np.concatenate([current, other[~inside[other]]])


ROWS = {
    "random_k": OperatorSpec(fn=random_k, search=(0.0, 1.0)),  # share of the pool
    "stratified_k": OperatorSpec(fn=stratified_k, search=(0.0, 1.0)),
    "mix": OperatorSpec(fn=mix),
    "gumbel_k": OperatorSpec(fn=gumbel_k),
    "trajectory_k": OperatorSpec(fn=trajectory_k),
}
