"""Operators that drop repeats: by embedding (`semdedup`), by shared word shingles (`minhash`), by equal text."""

from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program.operators.spec import Cosine, Jaccard, OperatorSpec, Size
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.minhash import keep_distinct
from tokencredit.recipes.signals.neardup import FLOOR, build_graph, edges_within, greedy_keep
from tokencredit.settings import Words


def _check_order(value: str) -> str:
    if value not in {"first", "longest"} and not value.startswith("best:"):
        raise ValueError
    return value


Keep = Annotated[str, AfterValidator(_check_order), Words("first, longest or best:SIGNAL")]


def semdedup(
    materials: Materials,
    current: Positions,
    *,
    cosine: Cosine,
    clusters: Size = 1000,
    keep: Keep = "first",
    exact: bool = False,
    recluster: bool = False,
) -> Positions:
    """Walk in order; drop x iff its cosine to a kept sample of its cluster is at least `cosine`.

    The order is the input order, or by `keep`: longest first, or best first by a signal. A sample without features
    passes. `recluster` clusters the current set anew, as the paper does, instead of using the graph of the pool.
    """
    walk = current
    if keep != "first":
        values = materials.pool.words if keep == "longest" else materials.column(keep.removeprefix("best:"))
        walk = current[np.argsort(-np.nan_to_num(values[current].astype(np.float64), nan=-np.inf), kind="stable")]
    size = len(materials.pool)
    if recluster:
        dense = materials.features
        if not isinstance(dense, np.ndarray):
            raise TokenCreditError("recluster needs dense features", hint="leave `recluster` out to use the pair graph")
        graph = build_graph(dense[walk], clusters, floor=float(cosine))
        earlier, later = graph.first, graph.second
    else:
        earlier, later = edges_within(materials.graph(clusters, exact), walk, size, float(cosine))
    kept = np.zeros(size, bool)
    kept[walk[greedy_keep(len(walk), earlier, later)]] = True
    return current[kept[current]]


def minhash(materials: Materials, current: Positions, *, jaccard: Jaccard = 0.8) -> Positions:
    """Keep the first of samples whose 5-word shingles have a Jaccard similarity of at least `jaccard`."""
    return current[keep_distinct(materials.shingles(), current, float(jaccard))]


def exact_dedup(materials: Materials, current: Positions) -> Positions:
    """Keep the first of samples with the same normalised text (64 bits of its SHA-256)."""
    _, first = np.unique(materials.pool.text64[current], return_index=True)
    return current[np.sort(first)]


ROWS = {
    "semdedup": OperatorSpec(fn=semdedup, search=(FLOOR, 0.99)),
    "minhash": OperatorSpec(fn=minhash, search=(0.5, 0.99)),
    "exact_dedup": OperatorSpec(fn=exact_dedup),
}
