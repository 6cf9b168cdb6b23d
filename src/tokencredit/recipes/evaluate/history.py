"""The append-only log of evaluations: one fsynced line a run, and all that a search remembers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.lines import append, read_log
from tokencredit.recipes.program.recipe import Recipe, make_recipe

HISTORY = "history.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One paid run. `score` is in points, None where it failed; `mean` and `sd` are what the surrogate expected.

    `leader` is the slot with the largest posterior mean after this run; `reseed` says that the next choice starts from
    a reseeded motif.
    """

    slot: int
    kind: str  # warm-up, control, search, or the arm of a confirmation
    steps: list[dict[str, Any]]
    recipe_hash: str
    subset_hash: str
    samples: int
    tokens: int
    seed: int
    split: str
    status: str  # ok or failed
    reason: str = ""
    score: float | None = None
    points: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    below_floor: list[str] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)
    mean: float | None = None
    sd: float | None = None
    parent: int | None = None
    leader: int | None = None
    reseed: bool = False
    seconds: float = 0.0

    @property
    def recipe(self) -> Recipe:
        return make_recipe(self.steps, id=f"r{self.slot:04d}")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def value(self) -> float:
        """The score, 0 where the run failed."""
        return self.score or 0.0


def append_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write a run down; it is on disk before this returns."""
    append(folder / HISTORY, json.dumps(asdict(evaluation), allow_nan=False).encode() + b"\n")


def load_history(folder: Path) -> list[Evaluation]:
    """Read the runs of a folder, in order."""
    try:
        return [Evaluation(**record) for record in read_log(folder / HISTORY)]
    except TypeError as error:
        raise TokenCreditError(f"{folder / HISTORY} was written by another version: {error}") from error


def usable(history: Sequence[Evaluation]) -> list[Evaluation]:
    """What the surrogate learns from: finished runs, below a floor or not."""
    return [evaluation for evaluation in history if evaluation.ok]
