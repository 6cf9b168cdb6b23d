"""State of a subset: what the realised selection looks like, in numbers that a surrogate can learn from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.signals.materials import Materials
from tokencredit.recipes.signals.neardup import PairGraph, has_features

DUPLICATE = 0.9  # cosine from which a later sample counts as a duplicate

State = dict[str, float]


@dataclass(slots=True, kw_only=True, eq=False)
class StateReader:
    """Computes z(S). Pool-wide means and norms are computed once.

    `graph` gives `dup_rate`; without it (no features) the field is absent. `drift` uses active features when they are
    sparse (the share of samples with feature j active), the mean feature when they are dense. Samples without features
    count in neither; a subset of such samples only has drift 0.
    """

    materials: Materials
    graph: PairGraph | None = None
    signals: tuple[str, ...] = ()
    _pool: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.signals:
            self.signals = tuple(sorted(self.materials.signals))
        everything = np.arange(len(self.materials.pool), dtype=np.int32)
        self._pool["words"] = float(max(self.materials.pool.words.sum(), 1))
        self._pool["centre"] = self._centre(everything)
        for name in self.signals:
            self._pool[name] = _mean(self.materials.column(name))

    def read(self, positions: Positions) -> State:
        """z of a subset, as named numbers in a fixed order."""
        pool = self.materials.pool
        state: State = {
            "retain_ratio": len(positions) / len(pool),
            "token_ratio": float(pool.words[positions].sum()) / float(self._pool["words"]),
        }
        if "len.response" in self.materials.signals:
            trained = self.materials.column("len.response")
            state["trained_ratio"] = float(np.nansum(trained[positions], dtype=np.float64)) / float(
                max(np.nansum(trained, dtype=np.float64), 1)
            )
        state |= self._relevance(positions)
        for name in self.signals:
            values = self.materials.column(name)[positions]
            mean = state[f"mean.{name}"] = _mean(values)
            if name in {"ifd", "varentropy"} and self._pool[name]:
                state[f"mean_{name}"] = mean / float(self._pool[name])
        if self.graph is not None:
            state["dup_rate"] = self._duplicates(positions)
        if len(pool.source_names) > 1:
            counts = np.bincount(pool.source_codes[positions], minlength=len(pool.source_names))
            state["source_entropy"] = _entropy(counts) / float(np.log(len(pool.source_names)))
        if self.materials.features is not None:
            centre = np.asarray(self._pool["centre"])
            state["drift"] = float(np.linalg.norm(self._centre(positions) - centre) / np.sqrt(len(centre)))
        return state

    def _relevance(self, positions: Positions) -> State:
        names = [name for name in self.signals if name.startswith("rel.")]
        if not names:
            return {}
        scores = np.stack([self.materials.column(name)[positions] for name in names])
        valid = scores[np.isfinite(scores)].astype(np.float64)
        if len(valid) == 0:
            return {"score_mean": 0.0, "score_std": 0.0}
        return {"score_mean": float(valid.mean()), "score_std": float(valid.std())}

    def _centre(self, positions: Positions) -> np.ndarray:
        features = self.materials.features
        if features is None:
            return np.zeros(1)
        if "present" not in self._pool:
            self._read_features(features)
        known = positions[np.asarray(self._pool["present"])[positions]]
        if len(known) == 0:
            return np.asarray(self._pool.get("centre", np.zeros(features.shape[1])))
        share = np.zeros(features.shape[0], np.float32)
        share[known] = 1.0 / len(known)
        return self._pool["active"] @ share if "active" in self._pool else share @ self._pool["dense"]

    def _read_features(self, features: np.ndarray | csr_matrix) -> None:
        """Which samples have features, and those in a form that a share vector multiplies (missing rows as zeros)."""
        if isinstance(features, csr_matrix):
            active = features.copy()
            active.data = (active.data > 0).astype(np.float32)
            self._pool["present"] = np.asarray(active.sum(axis=1)).ravel() > 0
            self._pool["active"] = active.T.tocsr()
            return
        present = has_features(features)
        self._pool["present"] = present
        self._pool["dense"] = features if present.all() else np.where(present[:, None], features, np.float32(0))

    def _duplicates(self, positions: Positions) -> float:
        assert self.graph is not None
        inside = np.zeros(len(self.materials.pool), bool)
        inside[positions] = True
        # "Earlier" is earlier in the pool here, so that the state depends on the set alone.
        use = (self.graph.cosine >= np.float32(DUPLICATE)) & inside[self.graph.first] & inside[self.graph.second]
        later = np.zeros(len(inside), bool)
        later[self.graph.second[use]] = True
        return float(later.sum()) / max(len(positions), 1)


def _mean(values: np.ndarray) -> float:
    valid = values[np.isfinite(values)]
    return float(valid.mean(dtype=np.float64)) if len(valid) else 0.0


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


def feature_vector(state: Mapping[str, float]) -> tuple[np.ndarray, list[str]]:
    """What the surrogate sees of a state, with the group of each entry: scale, relevance, signal or redundancy."""
    groups = {name: group for name in state if (group := _group_of(name))}
    values = [float(np.log(max(state[name], 1e-6))) if groups[name] == "scale" else state[name] for name in groups]
    return np.array(values), list(groups.values())


def _group_of(name: str) -> str:
    """The group of inputs that a number of the state belongs to; empty where the surrogate does not see it."""
    named = {"token_ratio": "scale", "retain_ratio": "scale", "drift": "signal", "dup_rate": "redundancy"}
    if name.startswith("mean."):
        return "relevance" if name.startswith("mean.rel.") else "signal"
    return named.get(name, "")
