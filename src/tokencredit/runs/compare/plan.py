"""Methods side by side: equal budgets, paired seeds, intervals; a killed comparison goes on where it was."""

import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit import files
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.pipeline.labels import label_of
from tokencredit.progress import bar
from tokencredit.runs import folders
from tokencredit.runs.compare.table import headroom, summarise_runs
from tokencredit.runs.compare.workers import Job, default_jobs, run_jobs
from tokencredit.runs.config.load import Source, load_config
from tokencredit.runs.config.run_config import RunConfig

__all__ = ["Plan", "check_first", "compare_runs", "headroom", "plan_runs", "summarise_runs"]

LONGEST_NAME = 240  # bytes of a folder's name; file systems allow 255


class Plan(NamedTuple):
    """One run of a comparison."""

    label: str
    seed: int
    path: str  # inside the comparison's folder
    config: RunConfig


def plan_runs(config: Source, credits: Sequence[Any], seeds: Sequence[int]) -> list[Plan]:
    """Plan every method with every seed; one seed means the same prompts, start and held-out problems for all methods.

    A method is a credit, or `{credit: …, teacher: {…}}` where it has a teacher of its own.
    """
    config = load_config(config)
    entries = [_method_keys(item) for item in credits]
    labels = [label_of(keys["credit"]) for keys in entries]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise TokenCreditError(f"method {sorted(repeated)[0]!r} is named twice", hint="name each method once")
    by_folder: dict[str, str] = {}
    for label in labels:
        other = by_folder.setdefault(_file_name(label), label)
        if other != label:
            raise TokenCreditError(f"{other!r} and {label!r} would share a folder", hint="write one of them otherwise")
    if not labels or not seeds:
        raise TokenCreditError("a comparison needs at least one method and one seed")
    methods = {label: config.replace(**keys) for label, keys in zip(labels, entries, strict=True)}
    return [
        Plan(
            label,
            seed,
            f"{_file_name(label)}/seed-{seed}",
            method.replace(seed=seed, name=f"{label}, seed {seed}"),
        )
        for seed in seeds
        for label, method in methods.items()
    ]


def _method_keys(item: Any) -> dict[str, Any]:
    """The keys of the config that a method sets: its credit, and its teacher where it brings one."""
    if not isinstance(item, Mapping) or "credit" not in item:
        return {"credit": item}
    for key in item:
        if key not in ("credit", "teacher"):
            raise unknown("key of a method", key, ("credit", "teacher"))
    return dict(item)


def compare_runs(plans: Sequence[Plan], folder: Path, jobs: int | None = None) -> dict[str, Any]:
    """Run what is not finished, `jobs` at a time, in a folder that is locked meanwhile.

    Args:
      plans: what `plan_runs` returned.
      folder: of the results.
      jobs: runs at a time; None for one per GPU, see `workers.default_jobs`.

    Returns:
      The contents of compare.json, with `results` and, where both `grpo` and `exact` are compared, `headroom`.
    """
    check_first(plans, folder)
    with files.lock_folder(folder):
        labels = list(dict.fromkeys(plan.label for plan in plans))
        seeds = list(dict.fromkeys(plan.seed for plan in plans))
        described: dict[str, Any] = {"runs": [plan.path for plan in plans], "labels": labels, "seeds": seeds}
        files.write_json(folder / "compare.json", described)
        config = plans[0].config
        at_once = default_jobs(config.threads, lab=config.is_lab) if jobs is None else jobs
        started = time.monotonic()
        _run_all(plans, folder, min(at_once, len(plans)))
        rows = summarise_runs(plans, folder)
        described |= {"results": rows, "seconds": round(time.monotonic() - started, 1)}
        room = headroom(rows, plans, folder)
        if room is not None:
            described["headroom"] = room
        files.write_json(folder / "compare.json", described)
    return described


def check_first(plans: Sequence[Plan], folder: Path) -> None:
    """Refuse everything that can be refused before the first run starts: settings, folders, teachers, data, model.

    Methods differ in their credit and teacher, so model and data are loaded once.
    """
    from tokencredit.runs.checks import check_method, check_run

    for plan in plans:
        folders.finished_run(folder / plan.path, plan.config)
    ready = None
    for plan in {plan.label: plan for plan in plans}.values():
        try:
            if ready is None:
                ready = check_run(plan.config, folder / plan.path)
            else:
                check_method(ready._replace(config=plan.config))
        except TokenCreditError as error:
            raise TokenCreditError(f"{plan.label}: {error.message}", hint=error.hint) from error


def _run_all(plans: Sequence[Plan], folder: Path, jobs: int) -> None:
    total = sum(plan.config.steps for plan in plans)
    with bar(f"{len(plans)} runs", total) as advance:
        done = 0

        def look() -> None:
            nonlocal done
            now = sum(_steps_done(folder / plan.path) for plan in plans)
            advance(now - done, note=_note(plans, folder))
            done = now

        run_jobs([Job(plan.path, plan.config.to_mapping(), str(folder / plan.path)) for plan in plans], jobs, look)
        look()


def _steps_done(folder: Path) -> int:
    path = folder / folders.METRICS
    if not path.is_file():
        return 0
    return sum(b'"kind": "train"' in line for line in path.read_bytes().splitlines())


def _note(plans: Sequence[Plan], folder: Path) -> str:
    done = sum((folder / plan.path / "model").is_dir() for plan in plans)
    return f"{done} of {len(plans)} finished"


def _file_name(label: str) -> str:
    """A folder's name for a label: never one that leaves the folder, and short enough for a file system."""
    name = "".join(character if character.isalnum() or character in "._-" else "_" for character in label)
    name = name if name.strip(".") else f"_{name}"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 5]}-{blake2b(label.encode(), digest_size=8).hexdigest()}"
