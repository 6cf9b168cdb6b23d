"""Operators: pure functions from an ordered subset to an ordered subset, none of which invents a sample.

Fractions refer to the current set, so steps do not commute. Filters keep the input order, ties go to the earlier
position, and an empty result is an error. `OPERATORS` is the closed table of everything a recipe may say.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.materials import DROP_MISSING, Column, Materials
from tokencredit.recipes.pool.samples import Positions, hash_priority
from tokencredit.recipes.program import selectors
from tokencredit.recipes.signals.minhash import keep_distinct
from tokencredit.recipes.signals.neardup import FLOOR, build_graph, edges_within, greedy_keep, has_features


def exact_ceil(fraction: float | int | np.number, n: int) -> int:
    """⌈fraction·n⌉ in rationals from the decimal string of 15 digits: ⌈100 · 0.07⌉ is 7, where floats give 8.

    Fifteen digits are what a float carries of a decimal number: 0.1 + 0.2 is 0.3 here.
    """
    digits = str(fraction) if isinstance(fraction, np.float32) else f"{float(fraction):.15g}"
    return math.ceil(Fraction(digits) * n)


def missing_default(signals: Sequence[str]) -> str:
    """What a missing score means unless a step says so: an error, except for signals that are undefined by design."""
    return "drop" if any(name in DROP_MISSING or name[6:-1] in DROP_MISSING for name in signals) else "error"


def top(
    materials: Materials,
    current: Positions,
    *,
    signal: str,
    fraction: float | int | None = None,
    k: int | None = None,
    descending: bool = True,
    missing: str | None = None,
    order: str = "input",
) -> Positions:
    """Keep the ⌈fraction·n⌉ best or the k best of the n scored samples; `order: score` emits the best first."""
    scores, scored = _scores(materials, current, signal, missing)
    goodness = scores[scored] if descending else -scores[scored]
    positions = current[scored]
    count = exact_ceil(fraction, len(positions)) if k is None else k  # type: ignore[arg-type]
    chosen = _best(goodness, min(count, len(positions)))
    if order == "score":
        chosen = chosen[np.lexsort((chosen, -goodness[chosen]))]
        rest = current[~scored] if missing == "keep" else current[:0]
        return np.concatenate([positions[chosen], rest])
    keep = np.zeros(len(current), bool)
    keep[np.flatnonzero(scored)[chosen]] = True
    return current[keep | (~scored if missing == "keep" else False)]


def top_tokens(
    materials: Materials,
    current: Positions,
    *,
    signal: str,
    tokens: int,
    descending: bool = True,
    missing: str | None = None,
) -> Positions:
    """Keep the best samples, best first, and stop before a budget of whitespace tokens is exceeded."""
    scores, scored = _scores(materials, current, signal, missing)
    inside = np.flatnonzero(scored)
    walk = np.argsort(-scores[inside] if descending else scores[inside], kind="stable")
    spent = np.cumsum(materials.pool.words[current[inside[walk]]])
    keep = np.zeros(len(current), bool)
    keep[inside[walk[: int(np.searchsorted(spent, tokens, side="right"))]]] = True
    return current[keep | (~scored if missing == "keep" else False)]


def threshold(
    materials: Materials,
    current: Positions,
    *,
    signal: str,
    value: float | int,
    below: bool = False,
    missing: str | None = None,
) -> Positions:
    """Keep scores ≥ value, or ≤ value with `below`."""
    scores, scored = _scores(materials, current, signal, missing)
    with np.errstate(invalid="ignore"):
        keep = scores <= np.float32(value) if below else scores >= np.float32(value)
    return current[keep | (~scored if missing == "keep" else False)]


def band(
    materials: Materials,
    current: Positions,
    *,
    signal: str,
    low: float | int,
    high: float | int,
    missing: str | None = None,
) -> Positions:
    """Keep the ascending ranks ⌈low·n⌉ … ⌈high·n⌉ − 1, such as the middle of the perplexity."""
    scores, scored = _scores(materials, current, signal, missing)
    inside = np.flatnonzero(scored)
    walk = np.argsort(scores[inside], kind="stable")
    keep = np.zeros(len(current), bool)
    keep[inside[walk[exact_ceil(low, len(walk)) : exact_ceil(high, len(walk))]]] = True
    return current[keep | (~scored if missing == "keep" else False)]


def top_union(
    materials: Materials,
    current: Positions,
    *,
    signals: list[str],
    fraction: float | int | None = None,
    k: int | None = None,
    descending: bool = True,
    missing: str | None = None,
) -> Positions:
    """For each signal the best; the output is their union in input order, hence at least `fraction` of the set."""
    keep = np.zeros(len(current), bool)
    for signal in signals:
        scores, scored = _scores(materials, current, signal, missing)
        inside = np.flatnonzero(scored)
        goodness = scores[inside] if descending else -scores[inside]
        count = exact_ceil(fraction, len(inside)) if k is None else k  # type: ignore[arg-type]
        keep[inside[_best(goodness, min(count, len(inside)))]] = True
        if missing == "keep":
            keep |= ~scored
    return current[keep]


def semdedup(
    materials: Materials,
    current: Positions,
    *,
    cosine: float | int,
    clusters: int = 1000,
    keep: str = "first",
    exact: bool = False,
    recluster: bool = False,
) -> Positions:
    """Walk in order; drop x iff its cosine to a kept sample of its cluster is at least `cosine`.

    The order is the input order, or by `keep`: longest first, or best first by a signal. A sample without features
    passes. `recluster` clusters the current set anew, as the paper does, instead of using the graph of the pool.
    """
    if keep == "first":
        walk = current
    else:
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


def minhash(materials: Materials, current: Positions, *, jaccard: float | int = 0.8) -> Positions:
    """Keep the first of samples whose 5-word shingles have a Jaccard similarity of at least `jaccard`."""
    return current[keep_distinct(materials.shingles(), current, float(jaccard))]


def exact_dedup(materials: Materials, current: Positions) -> Positions:
    """Keep the first of samples with the same normalised text (64 bits of its SHA-256)."""
    _, first = np.unique(materials.pool.text64[current], return_index=True)
    return current[np.sort(first)]


def random_k(materials: Materials, current: Positions, *, k: int, seed: int) -> Positions:
    """A uniform k of the current set by hash priority, in input order: nested in k, the same in every variant."""
    if k >= len(current):
        return current
    priority = hash_priority(materials.pool.id64[current], seed)
    return current[np.sort(np.argpartition(priority, k)[:k])]


def stratified_k(
    materials: Materials, current: Positions, *, k: int, seed: int, share: str = "proportional"
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


def mix(materials: Materials, current: Positions, *, source: str) -> Positions:
    """C ∪ S: the current set, then what an evaluated subset adds, in pool order."""
    inside = np.zeros(len(materials.pool), bool)
    inside[current] = True
    other = np.sort(materials.subset(source))
    return np.concatenate([current, other[~inside[other]]])


def k_center(materials: Materials, current: Positions, *, k: int) -> Positions:
    """The k of a farthest-first traversal of the features, in input order; samples without features are left out."""
    current, features = _dense(materials, current)
    return current[np.sort(selectors.k_center(features, k))]


def facility_location(materials: Materials, current: Positions, *, k: int, neighbours: int = 32) -> Positions:
    """The k that cover the features best, in input order; samples without features are left out."""
    current, features = _dense(materials, current)
    return current[np.sort(selectors.facility_location(features, k, neighbours))]


def diverse_top(
    materials: Materials, current: Positions, *, signal: str, k: int, cosine: float | int = 0.9
) -> Positions:
    """The best by a signal, skipping what is above `cosine` to one chosen before (DEITA), in input order.

    Samples without features are left out.
    """
    _, scored = _scores(materials, current, signal, None)
    current, features = _dense(materials, current[scored])
    scores = materials.column(signal)[current].astype(np.float64)
    return current[np.sort(selectors.diverse_walk(scores, features, k, float(cosine)))]


def round_robin(materials: Materials, current: Positions, *, signals: list[str], k: int) -> Positions:
    """Signals take turns picking their best (RDS+), in input order."""
    columns = [_scores(materials, current, signal, "error")[0] for signal in signals]
    return current[np.sort(selectors.round_robin(columns, k))]


def gumbel_k(materials: Materials, current: Positions, *, signal: str, k: int, seed: int) -> Positions:
    """k drawn with probability proportional to e^signal (DSIR), in input order."""
    scores = _scores(materials, current, signal, "error")[0]
    return current[selectors.gumbel_top_k(scores.astype(np.float64), k, seed)]


def trajectory_k(
    materials: Materials, current: Positions, *, k: int, seed: int, prefix: str = "trajectory.", clusters: int = 100
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


def _dense(materials: Materials, current: Positions) -> tuple[Positions, np.ndarray]:
    """The samples of the current set that have features, and those; the one rule for every step that places samples."""
    if not isinstance(materials.features, np.ndarray):
        raise TokenCreditError("this step needs dense features", hint="compute rds, hashed or embed features")
    current = current[has_features(materials.features)[current]]
    if len(current) == 0:
        raise TokenCreditError("no sample of the current set has features", hint="compute them for these samples")
    return current, np.asarray(materials.features[current])


def _scores(materials: Materials, current: Positions, signal: str, missing: str | None) -> tuple[Column, np.ndarray]:
    scores = materials.column(signal)[current]
    scored = ~np.isnan(scores)
    absent = len(scores) - int(scored.sum())
    if absent and (missing or missing_default([signal])) == "error":
        raise TokenCreditError(
            f"signal {signal!r} is missing for {absent} of {len(scores)} samples",
            hint="say `missing: drop` or `missing: keep` in the step",
        )
    return scores, scored


def _best(goodness: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, ties to the earlier index; in linear time, in no particular order."""
    if count >= len(goodness):
        return np.arange(len(goodness))
    if count == 0:
        return np.empty(0, np.int64)
    least = np.partition(goodness, len(goodness) - count)[len(goodness) - count]
    above = np.flatnonzero(goodness > least)
    ties = np.flatnonzero(goodness == least)[: count - len(above)]
    return np.concatenate([above, ties])


def _quotas(k: int, weights: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Largest-remainder shares of k, none above what is available, in integers."""
    quotas = np.zeros(len(weights), np.int64)
    while (left := k - int(quotas.sum())) > 0:
        open_weights = np.where(quotas < available, weights, 0)
        total = int(open_weights.sum())
        whole, remainder = np.divmod(left * open_weights, total)
        # Ties of the remainder go to the source that comes first by name.
        extra = np.argsort(-remainder, kind="stable")[: left - int(whole.sum())]
        whole[extra] += 1
        quotas = np.minimum(quotas + whole, available)
    return quotas


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSpec:
    """One row of the table: the function, its version (it enters every hash) and the range a search draws from."""

    fn: Callable[..., Positions]
    version: int = 1
    search: tuple[float, float] | None = None


OPERATORS: dict[str, OperatorSpec] = {
    "top": OperatorSpec(fn=top, search=(0.05, 1.0)),
    "top_tokens": OperatorSpec(fn=top_tokens),
    "threshold": OperatorSpec(fn=threshold),
    "band": OperatorSpec(fn=band),
    "top_union": OperatorSpec(fn=top_union, search=(0.01, 1.0)),
    "semdedup": OperatorSpec(fn=semdedup, search=(FLOOR, 0.99)),
    "minhash": OperatorSpec(fn=minhash, search=(0.5, 0.99)),
    "exact_dedup": OperatorSpec(fn=exact_dedup),
    "random_k": OperatorSpec(fn=random_k, search=(0.0, 1.0)),  # share of the pool
    "stratified_k": OperatorSpec(fn=stratified_k, search=(0.0, 1.0)),
    "mix": OperatorSpec(fn=mix),
    "k_center": OperatorSpec(fn=k_center),
    "facility_location": OperatorSpec(fn=facility_location),
    "diverse_top": OperatorSpec(fn=diverse_top),
    "round_robin": OperatorSpec(fn=round_robin),
    "gumbel_k": OperatorSpec(fn=gumbel_k),
    "trajectory_k": OperatorSpec(fn=trajectory_k),
}
