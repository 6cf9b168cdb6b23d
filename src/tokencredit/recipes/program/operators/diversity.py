"""Operators that keep a subset which covers the features: core-set, submodular and score-ordered selection.

All emit the input order, and those that place samples leave out the ones without features.
"""

import numpy as np

from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program import selectors
from tokencredit.recipes.program.operators.spec import (
    Cosine,
    Name,
    Names,
    OperatorSpec,
    Size,
    read_features,
    read_scores,
)
from tokencredit.recipes.signals.materials import Materials


def k_center(materials: Materials, current: Positions, *, k: Size) -> Positions:
    """The k of a farthest-first traversal of the features."""
    current, features = read_features(materials, current)
    return current[np.sort(selectors.k_center(features, k))]


def facility_location(materials: Materials, current: Positions, *, k: Size, neighbours: Size = 32) -> Positions:
    """The k that cover the features best."""
    current, features = read_features(materials, current)
    return current[np.sort(selectors.facility_location(features, k, neighbours))]


def diverse_top(materials: Materials, current: Positions, *, signal: Name, k: Size, cosine: Cosine = 0.9) -> Positions:
    """The best by a signal, skipping what is above `cosine` to one chosen before (DEITA)."""
    scored = read_scores(materials, current, signal)
    current, features = read_features(materials, current[scored.places])
    scores = materials.column(signal)[current].astype(np.float64)
    return current[np.sort(selectors.diverse_walk(scores, features, k, float(cosine)))]


def round_robin(materials: Materials, current: Positions, *, signals: Names, k: Size) -> Positions:
    """Signals take turns picking their best (RDS+)."""
    columns = [read_scores(materials, current, signal, "error").scores for signal in signals]
    return current[np.sort(selectors.round_robin(columns, k))]


ROWS = {
    "k_center": OperatorSpec(fn=k_center),
    "facility_location": OperatorSpec(fn=facility_location),
    "diverse_top": OperatorSpec(fn=diverse_top),
    "round_robin": OperatorSpec(fn=round_robin),
}
