"""Operators that keep samples by their scores: shares, budgets of tokens, thresholds and quantile bands."""

from typing import Literal

import numpy as np

from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program.operators.spec import (
    Finite,
    Missing,
    Name,
    Names,
    OperatorSpec,
    Quantile,
    Share,
    Size,
    exact_ceil,
    read_scores,
)
from tokencredit.recipes.signals.materials import Materials


def top(
    materials: Materials,
    current: Positions,
    *,
    signal: Name,
    fraction: Share | None = None,
    k: Size | None = None,
    descending: bool = True,
    missing: Missing | None = None,
    order: Literal["input", "score"] = "input",
) -> Positions:
    """Keep the ⌈fraction·n⌉ best or the k best of the n scored samples; `order: score` emits the best first."""
    scored = read_scores(materials, current, signal, missing)
    goodness = scored.scores if descending else -scored.scores
    chosen = _best(goodness, fraction, k)
    if order == "input":
        return scored.keep(chosen)
    chosen = chosen[np.lexsort((chosen, -goodness[chosen]))]
    return np.concatenate([current[scored.places[chosen]], current[scored.unscored]])


def top_tokens(
    materials: Materials,
    current: Positions,
    *,
    signal: Name,
    tokens: Size,
    descending: bool = True,
    missing: Missing | None = None,
) -> Positions:
    """Keep the best samples, best first, and stop before a budget of whitespace tokens is exceeded."""
    scored = read_scores(materials, current, signal, missing)
    walk = np.argsort(-scored.scores if descending else scored.scores, kind="stable")
    spent = np.cumsum(materials.pool.words[current[scored.places[walk]]])
    return scored.keep(walk[: int(np.searchsorted(spent, tokens, side="right"))])


def threshold(
    materials: Materials,
    current: Positions,
    *,
    signal: Name,
    value: Finite,
    below: bool = False,
    missing: Missing | None = None,
) -> Positions:
    """Keep scores ≥ value, or ≤ value with `below`."""
    scored = read_scores(materials, current, signal, missing)
    limit = np.float32(value)
    return scored.keep(scored.scores <= limit if below else scored.scores >= limit)


def band(
    materials: Materials,
    current: Positions,
    *,
    signal: Name,
    low: Quantile,
    high: Quantile,
    missing: Missing | None = None,
) -> Positions:
    """Keep the ascending ranks ⌈low·n⌉ … ⌈high·n⌉ − 1, such as the middle of the perplexity."""
    scored = read_scores(materials, current, signal, missing)
    walk = np.argsort(scored.scores, kind="stable")
    return scored.keep(walk[exact_ceil(low, len(walk)) : exact_ceil(high, len(walk))])


def top_union(
    materials: Materials,
    current: Positions,
    *,
    signals: Names,
    fraction: Share | None = None,
    k: Size | None = None,
    descending: bool = True,
    missing: Missing | None = None,
) -> Positions:
    """For each signal the best; the output is their union in input order, hence at least `fraction` of the set."""
    keep = np.zeros(len(current), bool)
    for signal in signals:
        scored = read_scores(materials, current, signal, missing)
        chosen = _best(scored.scores if descending else -scored.scores, fraction, k)
        keep[scored.places[chosen]] = True
        keep |= scored.unscored
    return current[keep]


def _best(goodness: np.ndarray, fraction: Share | None, k: Size | None) -> np.ndarray:
    """Indices of a share or number of the largest, ties to the earlier index; in linear time, in no order."""
    n = len(goodness)
    count = k if fraction is None else exact_ceil(fraction, n)
    if count is None or count >= n:
        return np.arange(n)
    if count == 0:
        return np.empty(0, np.int64)
    least = np.partition(goodness, n - count)[n - count]
    above = np.flatnonzero(goodness > least)
    ties = np.flatnonzero(goodness == least)[: count - len(above)]
    return np.concatenate([above, ties])


ROWS = {
    "top": OperatorSpec(fn=top, search=(0.05, 1.0)),
    "top_tokens": OperatorSpec(fn=top_tokens),
    "threshold": OperatorSpec(fn=threshold),
    "band": OperatorSpec(fn=band),
    "top_union": OperatorSpec(fn=top_union, search=(0.01, 1.0)),
}
