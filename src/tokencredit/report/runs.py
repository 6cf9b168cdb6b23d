"""Run folders as data: `run.json`, `metrics.jsonl` and the records of one run, or the runs of a comparison."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.errors import TokenCreditError
from tokencredit.store import RecordStore

NOT_STARTED = "not started"


class Line(NamedTuple):
    """One line of `metrics.jsonl`: the numbers of one step; an evaluation also has the score of every problem."""

    step: int
    kind: str
    metrics: Mapping[str, float]
    per_problem: Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. A run that is still going, or has not begun, has fewer lines."""

    folder: Path
    name: str
    label: str
    seed: int | None = None
    task: str = ""
    model: str = ""
    status: str = "unknown"
    pipeline: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[Line] = ()

    @cached_property
    def records(self) -> RecordStore:
        """The credit records of the run; empty where none were kept."""
        return RecordStore(self.folder / "records")

    def series(self, kind: str, *names: str) -> dict[int, float]:
        """Step → number, for the first of `names` that the run logged under `kind`."""
        for name in names:
            found = {line.step: line.metrics[name] for line in self.lines if line.kind == kind and name in line.metrics}
            if found:
                return found
        return {}

    @property
    def evaluations(self) -> dict[int, list[float]]:
        """Step → score of every problem, or the success rate alone where single problems were not kept."""
        return {
            line.step: list(line.per_problem) if line.per_problem else [line.metrics["success"]]
            for line in self.lines
            if line.kind == "eval" and (line.per_problem or "success" in line.metrics)
        }

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((line.step for line in self.lines), default=0)


def load_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The runs in `paths`, each the folder of one run (`run.json`) or of a comparison (`compare.json`).

    Runs that a comparison has not started come with no lines. Two runs of one label and seed are told apart by name.
    """
    found: list[Run] = []
    for path in map(Path, paths):
        if (path / "compare.json").is_file():
            found += [_load_or_await(path / str(name)) for name in _names(path / "compare.json")]
        elif (path / "run.json").is_file():
            found.append(_load(path))
        else:
            what = "has neither run.json nor compare.json" if path.is_dir() else "is no folder"
            raise TokenCreditError(
                f"{path} {what}", hint="give the folder that `tokencredit train` or `tokencredit compare` wrote"
            )
    if not found:
        raise TokenCreditError("no run to report", hint="give at least one run folder")
    return _told_apart(found)


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of the same label, in the order of their first appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return found


def _names(path: Path) -> list[Any]:
    names = _object(path).get("runs")
    if not isinstance(names, list):
        raise TokenCreditError(f"{path}: `runs` must be a list of sub-folders, got {names!r}")
    return names


def _load_or_await(folder: Path) -> Run:
    if (folder / "run.json").is_file():
        return _load(folder)
    return Run(folder=folder, name=folder.name, label=folder.parent.name, status=NOT_STARTED)


def _load(folder: Path) -> Run:
    content = _object(folder / "run.json")
    name = str(content.get("name") or folder.name)
    settings, versions = content.get("settings"), content.get("versions")
    seed = content.get("seed")
    return Run(
        folder=folder,
        name=name,
        label=str(content.get("label") or name),
        seed=seed if isinstance(seed, int) else None,
        task=str(content.get("task") or ""),
        model=str(content.get("model") or ""),
        status=str(content.get("status") or "unknown"),
        pipeline=content.get("pipeline"),
        settings=settings if isinstance(settings, dict) else {},
        versions=versions if isinstance(versions, dict) else {},
        lines=_read_lines(folder / "metrics.jsonl"),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenCreditError(f"{path}: {error}", hint="the file was damaged; start the run again") from error
    if not isinstance(content, dict):
        raise TokenCreditError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_lines(path: Path) -> list[Line]:
    """Lines by step; a later line of the same step and kind adds to an earlier one. A torn last line is left out."""
    if not path.exists():
        return []
    merged: dict[tuple[int, str], Line] = {}
    raw = path.read_bytes().split(b"\n")
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            line = _line(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(raw):  # no newline behind it: the run was killed while writing, or writes right now
                break
            raise TokenCreditError(f"{path}, line {number}: {error}", hint="delete the line") from error
        before = merged.get((line.step, line.kind))
        if before is not None:
            line = line._replace(
                metrics={**before.metrics, **line.metrics}, per_problem=line.per_problem or before.per_problem
            )
        merged[line.step, line.kind] = line
    return sorted(merged.values(), key=lambda line: line.step)


def _line(content: dict[str, Any]) -> Line:
    given = content["metrics"]
    per_problem = content.get("per_problem") or given.get("per_problem")
    return Line(
        step=int(content["step"]),
        kind=str(content["kind"]),
        metrics={name: float(value) for name, value in given.items() if _is_number(value)},
        per_problem=[float(value) for value in per_problem] if per_problem else None,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _told_apart(runs: list[Run]) -> list[Run]:
    seen: set[tuple[str, int | None]] = set()
    found = []
    for run in runs:
        if (run.label, run.seed) in seen and run.status != NOT_STARTED:
            run = replace(run, label=f"{run.label} ({run.name})")
        seen.add((run.label, run.seed))
        found.append(run)
    return found
