"""The append-only log of evaluations: one fsynced line a run, and all that a search remembers."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.program.recipe import Recipe, make_recipe

HISTORY = "history.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One paid run. `score` is in points, None where it failed; `mean` and `sd` are what the surrogate expected.

    `leader` is the slot with the largest posterior mean after this run; `resets` marks that the count of runs without
    a new leader starts again.
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


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One line, on disk before this returns; a line is written in one call, so a kill leaves at most a torn tail.

    A torn tail that an earlier kill left is cut off first.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        with path.open("a+b") as file:
            file.seek(0)
            kept = file.read()
            file.truncate(kept.rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TokenCreditError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def append_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write a run down; it is on disk before this returns."""
    append(folder / HISTORY, asdict(evaluation))


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a log; a torn last line, which a kill left, is left out, any other bad line is an error.

    Reading changes nothing: a report may read while a search writes.
    """
    if not path.is_file():
        return
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TokenCreditError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenCreditError(f"{path}:{number}: not a JSON line", hint="the log was changed by hand") from error
        if not isinstance(record, dict):
            raise TokenCreditError(f"{path}:{number}: not a JSON object", hint="the log was changed by hand")
        yield record


def load_history(folder: Path) -> list[Evaluation]:
    """The runs of a folder, in order."""
    try:
        return [Evaluation(**record) for record in lines(folder / HISTORY)]
    except TypeError as error:
        raise TokenCreditError(f"{folder / HISTORY} was written by another version: {error}") from error


def usable(history: Sequence[Evaluation]) -> list[Evaluation]:
    """What the surrogate learns from: finished runs, below a floor or not."""
    return [evaluation for evaluation in history if evaluation.ok]
