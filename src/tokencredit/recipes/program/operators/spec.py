"""What all operators share: a row of the table, the types of parameters, scores with their holes, exact shares."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.signals.materials import DROP_MISSING, Column, Materials
from tokencredit.recipes.signals.neardup import FLOOR, has_features
from tokencredit.settings import Count, Words

# Types of parameters: a recipe's values are checked against them, and Python callers read what is accepted.
Share = Annotated[float | int, Field(gt=0, le=1), Words("in (0, 1]")]
Quantile = Annotated[float | int, Field(ge=0, le=1), Words("in [0, 1]")]
Cosine = Annotated[float | int, Field(ge=FLOOR, le=1), Words(f"in [{FLOOR:g}, 1]")]
Jaccard = Annotated[float | int, Field(ge=0.5, le=0.99), Words("in [0.5, 0.99]")]
Finite = Annotated[float | int, Field(gt=-1e38, lt=1e38), Words("a finite number")]
WholeNumber = Annotated[int, Words("a whole number")]
Name = Annotated[str, Words("a name")]
Names = Annotated[list[str], Field(min_length=1), Words("a list of signal names")]
Missing = Literal["error", "drop", "keep"]
Size = Count


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSpec:
    """One row of the table: the function, its version (it enters every hash) and the range a search draws from."""

    fn: Callable[..., Positions]
    version: int = 1
    search: tuple[float, float] | None = None


def exact_ceil(fraction: float | int | np.number, n: int) -> int:
    """⌈fraction·n⌉ in rationals from the decimal string of 15 digits: ⌈100 · 0.07⌉ is 7, where floats give 8.

    Fifteen digits are what a float carries of a decimal number: 0.1 + 0.2 is 0.3 here.
    """
    digits = str(fraction) if isinstance(fraction, np.float32) else f"{float(fraction):.15g}"
    return math.ceil(Fraction(digits) * n)


def missing_default(signals: Sequence[str]) -> str:
    """What a missing score means unless a step says so: an error, except for signals that are undefined by design."""
    return "drop" if any(name in DROP_MISSING or name[6:-1] in DROP_MISSING for name in signals) else "error"


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The current set with one signal. `places` are the indices of its scored samples, `scores` their scores."""

    current: Positions
    places: np.ndarray
    scores: Column
    unscored: np.ndarray  # mask of the samples without a score that stay

    def keep(self, chosen: np.ndarray) -> Positions:
        """The scored samples at the indices `chosen`, and the unscored ones that stay, in input order."""
        kept = self.unscored.copy()
        kept[self.places[chosen]] = True
        return self.current[kept]


def read_scores(materials: Materials, current: Positions, signal: str, missing: str | None = None) -> Scored:
    """Read a signal of the current set; a missing score is an error unless the step or the signal says otherwise."""
    scores = materials.column(signal)[current]
    scored = ~np.isnan(scores)
    absent = len(scores) - int(scored.sum())
    if absent and (missing or missing_default([signal])) == "error":
        raise TokenCreditError(
            f"signal {signal!r} is missing for {absent} of {len(scores)} samples",
            hint="say `missing: drop` or `missing: keep` in the step",
        )
    unscored = ~scored if missing == "keep" else np.zeros(len(scored), bool)
    return Scored(current, np.flatnonzero(scored), scores[scored], unscored)


def read_features(materials: Materials, current: Positions) -> tuple[Positions, np.ndarray]:
    """The samples of the current set that have features, and those; the one rule for every step that places samples."""
    if not isinstance(materials.features, np.ndarray):
        raise TokenCreditError("this step needs dense features", hint="compute rds, hashed or embed features")
    current = current[has_features(materials.features)[current]]
    if len(current) == 0:
        raise TokenCreditError("no sample of the current set has features", hint="compute them for these samples")
    return current, np.asarray(materials.features[current])
