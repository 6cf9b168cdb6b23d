"""Methods side by side: equal budgets, paired seeds, intervals; a killed comparison goes on where it was."""

import copy
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.credit import Pipeline
from tokencredit.diagnostics.bootstrap import Interval, interval, paired_bootstrap
from tokencredit.errors import TokenCreditError
from tokencredit.progress import bar
from tokencredit.runs import folders

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL = 1.0  # seconds between looks at the runs' metrics


class Plan(NamedTuple):
    """One run of a comparison."""

    label: str
    seed: int
    path: str  # inside the comparison's folder
    config: dict[str, Any]


def plan_runs(config: Mapping[str, Any], credits: Sequence[Any], seeds: Sequence[int]) -> list[Plan]:
    """Every method with every seed; one seed means the same prompts, the same start and the same held-out problems."""
    labels = [folders.label_of(credit) for credit in credits]
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
    plans = []
    for seed in seeds:
        for label, credit in zip(labels, credits, strict=True):
            Pipeline.parse(credit)
            own = copy.deepcopy(dict(config)) | {"credit": credit, "seed": seed, "name": f"{label}, seed {seed}"}
            plans.append(Plan(label, seed, f"{_file_name(label)}/seed-{seed}", own))
    return plans


def compare_runs(plans: Sequence[Plan], folder: Path, jobs: int | None = None) -> dict[str, Any]:
    """Run what is not finished, `jobs` at a time; the contents of compare.json, results included."""
    check_first(plans, folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(dict.fromkeys(plan.label for plan in plans))
    seeds = list(dict.fromkeys(plan.seed for plan in plans))
    described = {"runs": [plan.path for plan in plans], "labels": labels, "seeds": seeds}
    folders.write_json(folder / "compare.json", described)
    jobs = jobs or max(1, (os.cpu_count() or 1) // int(plans[0].config["threads"]))
    started = time.monotonic()
    _run_all(plans, folder, min(jobs, len(plans)))
    described |= {"results": results(plans, folder), "seconds": round(time.monotonic() - started, 1)}
    folders.write_json(folder / "compare.json", described)
    return described


def check_first(plans: Sequence[Plan], folder: Path) -> None:
    """Everything that can be refused is refused before the first run starts: settings, folders, data, model."""
    from tokencredit.runs.train import check_run

    for plan in plans:
        folders.finished_run(folder / plan.path, plan.config)
    for plan in {plan.label: plan for plan in plans}.values():
        check_run(plan.config, folder / plan.path)


def _run_all(plans: Sequence[Plan], folder: Path, jobs: int) -> None:
    total = sum(int(plan.config["steps"]) for plan in plans)
    executor = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        with bar(f"{len(plans)} runs", total) as advance:
            futures = [executor.submit(_run, plan.config, str(folder / plan.path)) for plan in plans]
            done = 0
            while True:
                finished = all(future.done() for future in futures)
                _raise_first(futures, plans)
                now = sum(_steps_done(folder / plan.path) for plan in plans)
                advance(now - done, note=_note(plans, folder))
                done = now
                if finished:
                    return
                time.sleep(POLL)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in list(
            (executor._processes or {}).values()
        ):  # a failed or interrupted comparison leaves none behind
            process.terminate()


def _run(config: dict[str, Any], folder: str) -> None:
    """In a process of its own, which ends with the command that started it."""
    _end_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", str(config["threads"]))
    from tokencredit.runs.train import train_run

    train_run(config, Path(folder))


def _end_with_parent() -> None:
    """On Linux the kernel ends this process when its parent is killed; elsewhere the run's callback notices."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_first(futures: Sequence[Future[None]], plans: Sequence[Plan]) -> None:
    for future, plan in zip(futures, plans, strict=True):
        error = future.exception() if future.done() and not future.cancelled() else None
        if isinstance(error, TokenCreditError):
            raise TokenCreditError(f"{plan.path}: {error.message}", hint=error.hint) from error
        if error is not None:
            raise error


def _steps_done(folder: Path) -> int:
    path = folder / folders.METRICS
    if not path.is_file():
        return 0
    return sum('"kind": "train"' in line for line in path.read_text().splitlines())


def _note(plans: Sequence[Plan], folder: Path) -> str:
    done = sum((folder / plan.path / "model").is_dir() for plan in plans)
    return f"{done} of {len(plans)} finished"


def results(plans: Sequence[Plan], folder: Path) -> list[dict[str, Any]]:
    """A row a method: success at the start and the end, and the paired difference to the first method, with intervals.

    Intervals are 95 % bootstrap over seeds and problems; with one seed they speak of problems alone.
    """
    seeds = list(dict.fromkeys(plan.seed for plan in plans))
    by_label: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for plan in plans:
        by_label.setdefault(plan.label, {})[plan.seed] = folders.read_metrics(folder / plan.path)
    table, first = [], None
    for label, runs in by_label.items():
        evaluations = [[line for line in runs[seed] if line["kind"] == "eval"] for seed in seeds]
        row: dict[str, Any] = {"label": label, "seeds": len(seeds)}
        if all(evaluations):
            start = [lines[0]["metrics"]["per_problem"] for lines in evaluations]
            end = [lines[-1]["metrics"]["per_problem"] for lines in evaluations]
            first = end if first is None else first
            row |= {"start": _interval(interval(start)), "end": _interval(interval(end))}
            row["difference"] = _interval(paired_bootstrap(first, end)) if end is not first else None
        row["reward"] = sum(_last_reward(runs[seed]) for seed in seeds) / len(seeds)
        table.append(row)
    return table


def _last_reward(lines: Sequence[Mapping[str, Any]]) -> float:
    """Mean training reward of the last ten steps."""
    rewards = [line["metrics"]["reward"] for line in lines if line["kind"] == "train" and "reward" in line["metrics"]]
    return sum(rewards[-10:]) / max(1, len(rewards[-10:]))


def _interval(found: Interval) -> dict[str, float | None]:
    """NaN bounds (a single unit) become null: JSON has no NaN."""
    values = {"mean": found.mean, "low": found.low, "high": found.high}
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


def _file_name(label: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in label)
