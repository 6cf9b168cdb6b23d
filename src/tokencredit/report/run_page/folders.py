"""Run folders as data: `run.json`, `metrics.jsonl` and the records of one run, or the runs of a comparison."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokencredit.batch.store import RecordStore
from tokencredit.errors import TokenCreditError, shown
from tokencredit.files import read_json
from tokencredit.report.run_page.lines import Line, read_lines
from tokencredit.report.run_page.script_folder import STATE, find_records, find_state, name_of, pipeline_of, read_state

NOT_STARTED = "not started"


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

    record_folder: Path | None = None

    @cached_property
    def records(self) -> RecordStore:
        """The credit records of the run; empty where none were kept."""
        return RecordStore(self.record_folder or self.folder / "records")

    def series(self, kind: str, *names: str) -> dict[int, float]:
        """Step → number, for the first of `names` that the run logged under `kind`."""
        for name in names:
            series = {
                line.step: line.metrics[name] for line in self.lines if line.kind == kind and name in line.metrics
            }
            if series:
                return series
        return {}

    @property
    def evaluations(self) -> dict[int, list[float]]:
        """Step → mean reward of every problem, or the mean alone where single problems were not kept."""
        found = {}
        for line in self.lines:
            if line.kind == "eval":
                alone = [line.metrics[name] for name in ("reward", "success") if name in line.metrics][:1]
                values = list(line.per_problem) if line.per_problem else alone
                if values:
                    found[line.step] = values
        return found

    def problems_at(self, step: int) -> list[int] | None:
        """The problems that an evaluation counts, where it left some out."""
        found = (line.problems for line in self.lines if line.kind == "eval" and line.step == step)
        problems = next(found, None)
        return None if problems is None else list(problems)

    @property
    def measures_success(self) -> bool:
        """Whether the evaluations are shares of right answers, and not means of other rewards.

        Where the run does not say, they are if they are called success and every value is between 0 and 1.
        """
        evaluations = [line for line in self.lines if line.kind == "eval"]
        said = [line.is_success for line in evaluations if line.is_success is not None]
        if said:
            return all(said)
        named = all("reward" not in line.metrics for line in evaluations)
        return named and all(0.0 <= value <= 1.0 for values in self.evaluations.values() for value in values)

    @property
    def has_threshold(self) -> bool:
        """Whether the evaluations count responses whose reward is above a threshold."""
        return any("threshold" in line.metrics for line in self.lines if line.kind == "eval")

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((line.step for line in self.lines), default=0)


def load_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Load the runs in `paths`.

    A path is the folder of one run (`run.json`), of a comparison (`compare.json`), or of a training script with
    `CreditGRPOTrainer` (`trainer_state.json`, there or in a checkpoint, or records). Runs that a comparison has not
    started come with no lines. Two runs of one label and seed are distinguished by their name.
    """
    runs: list[Run] = []
    for path in map(Path, paths):
        try:
            runs += _load_path(path)
        except OSError as error:
            raise TokenCreditError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if not runs:
        raise TokenCreditError("no run to report", hint="give at least one run folder")
    return _distinguish(runs)


def _load_path(path: Path) -> list[Run]:
    if (path / "compare.json").is_file():
        return [_load_or_await(path, name) for name in _names(path / "compare.json")]
    if (path / "run.json").is_file():
        return [_load(path)]
    if path.is_dir():
        run = _load_trainer(path)
        if run is not None:
            return [run]
        what = f"holds none of run.json, compare.json, {STATE} and records"
    else:
        what = "is not a folder"
    raise TokenCreditError(
        f"{path} {what}",
        hint="give a folder that `tokencredit train`, `tokencredit compare` or a script with CreditGRPOTrainer wrote",
    )


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of the same label, in the order of their first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _names(path: Path) -> list[str]:
    """Sub-folders of a comparison; a file is data and never points outside its folder."""
    names = _object(path).get("runs")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise TokenCreditError(f"{path}: `runs` must be a list of sub-folders, got {shown(names)}")
    for name in names:
        if not _is_inside(name):
            raise TokenCreditError(f"{path}: `runs` must name folders inside {path.parent}, got {shown(name)}")
    return names


def _is_inside(name: str) -> bool:
    """Whether a name leads from a folder to one inside it, and can be the name of a folder at all."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    parts = Path(name).parts
    return bool(parts) and ".." not in parts and not Path(name).is_absolute() and "\0" not in name


def _load_or_await(comparison: Path, name: str) -> Run:
    folder = comparison / name
    if (folder / "run.json").is_file():
        return _load(folder)
    return Run(folder=folder, name=folder.name, label=folder.parent.name, status=NOT_STARTED)


def _load(folder: Path) -> Run:
    content = _object(folder / "run.json")
    name = str(content.get("name") or folder.name)

    def typed(key: str, kind: type, default: Any) -> Any:
        return content[key] if isinstance(content.get(key), kind) else default

    return Run(
        folder=folder,
        name=name,
        label=str(content.get("label") or name),
        seed=typed("seed", int, None),
        task=str(content.get("task") or ""),
        model=str(content.get("model") or ""),
        status=str(content.get("status") or "unknown"),
        pipeline=content.get("pipeline"),
        settings=typed("settings", dict, {}),
        versions=typed("versions", dict, {}),
        lines=read_lines(folder / "metrics.jsonl"),
    )


def _load_trainer(folder: Path) -> Run | None:
    """A folder that a script wrote, without run.json: the trainer's log history and the records, if any."""
    state, records = find_state(folder), find_records(folder)
    if state is None and records is None:
        return None
    pipeline = None if records is None else pipeline_of(RecordStore(records))
    name = folder.resolve().name
    has_ended = state is not None and state.parent == folder
    return Run(
        folder=folder,
        name=name,
        label=name_of(pipeline) or name,
        status="finished" if has_ended else "unknown",
        pipeline=pipeline,
        lines=read_state(state),
        record_folder=records,
    )


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise TokenCreditError(
            f"{path} must hold a JSON object, got {type(content).__name__}",
            hint="the file was damaged; start the run again",
        )
    return content


def _distinguish(runs: list[Run]) -> list[Run]:
    """Name runs of one label and seed apart."""
    seen: set[tuple[str, int | None]] = set()
    distinct = []
    for run in runs:
        is_new = (run.label, run.seed) not in seen or run.status == NOT_STARTED
        distinct.append(run if is_new else replace(run, label=f"{run.label} ({run.name})"))
        seen.add((distinct[-1].label, run.seed))
    return distinct
