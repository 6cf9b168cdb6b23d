"""What recipes run on: the pool, its cached signals, features and graphs, and subsets that were evaluated."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32
from scipy.sparse import csr_matrix

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.recipes.pool.samples import Pool, Positions
from tokencredit.recipes.signals.minhash import Shingles
from tokencredit.recipes.signals.neardup import PairGraph

Column = Float32[np.ndarray, " samples"]  # one number a sample; NaN is missing
Features = Float[np.ndarray, "samples features"]

DROP_MISSING = frozenset({"ifd"})  # signals whose NaN means "leave out", not "forgotten"
_RESID = re.compile(r"resid\((.+)\)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Materials:
    """Everything an operator may read. `keys` are the fingerprints of what was computed, for the recipe hash.

    Graphs and shingles are built on first use (they are the slow part of a dedup) by `make_graph(clusters, exact)`
    and `make_shingles()`, and held from then on.
    """

    pool: Pool
    signals: Mapping[str, Column]
    keys: Mapping[str, str] = field(default_factory=dict)
    features: Features | csr_matrix | None = None
    make_graph: Callable[[int, bool], PairGraph] | None = None
    make_shingles: Callable[[], Shingles] | None = None
    evaluated: dict[str, Positions] = field(default_factory=dict)  # subset hash → positions, sources of `mix`
    _held: dict[object, object] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        """A signal by name; `resid(name)` is the length control of that signal."""
        inner = _RESID.fullmatch(name)
        if inner is None:
            if name not in self.signals:
                raise unknown("signal", name, self.signals)
            return self.signals[name]
        if name not in self._held:
            length = "len.total" if "len.total" in self.signals else "len.ws"
            self._held[name] = residual(self.column(inner[1]), self.column(length))
        return self._held[name]  # type: ignore[return-value]

    def graph(self, clusters: int, exact: bool = False) -> PairGraph:
        key = ("graph", 0 if exact else clusters)
        if key not in self._held:
            if self.make_graph is None:
                raise TokenCreditError(
                    "semdedup needs features of the samples, which this pool lacks",
                    hint="compute them: `tokencredit recipes signals … --signals rds` or `--embeddings FILE`",
                )
            self._held[key] = self.make_graph(clusters, exact)
        return self._held[key]  # type: ignore[return-value]

    def shingles(self) -> Shingles:
        if "shingles" not in self._held:
            if self.make_shingles is None:
                raise TokenCreditError("minhash needs the text of the samples, which this pool lacks")
            self._held["shingles"] = self.make_shingles()
        return self._held["shingles"]  # type: ignore[return-value]

    def subset(self, subset_hash: str) -> Positions:
        """An evaluated subset by its hash, or by a prefix of at least eight digits that is unique."""
        matches = [key for key in self.evaluated if key.startswith(subset_hash) and len(subset_hash) >= 8]
        if len(matches) != 1:
            raise unknown("mix source", subset_hash, [key[:12] for key in self.evaluated])
        return self.evaluated[matches[0]]


def residual(values: Column, lengths: Column) -> Column:
    """Rank-normalised signal minus its least-squares fit on the rank-normalised log length.

    Ranks are scaled to mean 0 and variance 1, so the result is uncorrelated with the rank of the length.
    """
    seen = np.isfinite(values) & np.isfinite(lengths)
    signal, length = _rank_normal(values[seen]), _rank_normal(lengths[seen])
    slope = float(length @ signal) / max(float(length @ length), 1e-12)
    result = np.full(len(values), np.nan, np.float32)
    result[seen] = signal - slope * length
    return result


def _rank_normal(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(values)  # log is monotone, so the rank of the log is the rank
    return (ranks - ranks.mean()) / max(ranks.std(), 1e-12)
