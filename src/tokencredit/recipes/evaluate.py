"""Evaluators: a shell command, a log of past runs, synthetic surfaces; `sft` and `ngram` have their own files."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.recipes.history import load_history
from tokencredit.recipes.objective import (
    EvaluationFailed,
    Evaluator,
    Metrics,
    Request,
    TaskScore,
    metrics_from_json,
    metrics_to_json,
)
from tokencredit.recipes.pool import Pool
from tokencredit.recipes.synthetic import Surface, SyntheticPool
from tokencredit.seeds import derive

FIELDS = ("train_file", "ids_file", "out_dir", "seed", "split", "samples", "tokens", "recipe")
RESULT = "result.json"  # written by us when a run is complete, unlike the command's metrics.json


def key_of(*parts: object) -> str:
    """A fingerprint of whatever moves an evaluator's numbers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShellEvaluator:
    """Runs a command that fine-tunes and evaluates and writes `{out_dir}/metrics.json`.

    The command is a list of arguments, each a template; nothing passes through a shell. One retry with the same seed.
    A finished run is read from its folder instead of being paid for again.
    """

    pool: Pool
    command: tuple[str, ...]
    timeout: float
    key: str

    def __call__(self, request: Request) -> Metrics:
        result = request.folder / RESULT
        if result.is_file():
            return _finished(result)
        request.folder.mkdir(parents=True, exist_ok=True)
        files = write_training_files(self.pool, request)
        values = {**files, "out_dir": request.folder, "seed": request.seed, "split": request.split}
        values |= {"samples": len(request.positions), "tokens": int(self.pool.words[request.positions].sum())}
        arguments = [part.format(**values, recipe=request.recipe) for part in self.command]
        problem = ""
        for attempt in (1, 2):
            try:
                self._run(arguments, request.folder, attempt)
                metrics = read_metrics(request.folder)
            except EvaluationFailed as failure:
                problem = str(failure)
                continue
            _write_json(result, {"metrics": metrics_to_json(metrics), "items": _items_json(metrics)})
            return metrics
        raise EvaluationFailed(problem)

    def _run(self, arguments: list[str], folder: Path, attempt: int) -> None:
        with (folder / f"log-{attempt}.txt").open("wb") as output:
            try:
                process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise TokenCreditError(
                    f"the evaluator's command cannot be started: {error}", hint="check `evaluator.command`"
                ) from error
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise EvaluationFailed(f"no result after {self.timeout:g} s") from None
            finally:
                # A command that starts workers must not leave them behind, whatever ended it.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code != 0:
            raise EvaluationFailed(f"exit status {code}: {_tail(folder / f'log-{attempt}.txt')}")


def write_training_files(pool: Pool, request: Request) -> dict[str, Path]:
    """`train.jsonl` (chat messages, in the recipe's order) and `train.ids`."""
    train, ids = request.folder / "train.jsonl", request.folder / "train.ids"
    with train.open("w", encoding="utf-8") as file:
        for sample in pool.samples(request.positions):
            file.write(json.dumps({"messages": sample["messages"]}, ensure_ascii=False) + "\n")
    ids.write_bytes(b"\n".join(pool.ids[request.positions].tolist()) + b"\n")
    return {"train_file": train, "ids_file": ids}


def read_metrics(folder: Path) -> Metrics:
    """`metrics.json` of a run, with the scores of its items where it names a file of them."""
    path = folder / "metrics.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationFailed(f"the command wrote no {path.name}") from None
    except ValueError as error:
        raise EvaluationFailed(f"{path.name} is not JSON: {error}") from None
    metrics = metrics_from_json(content)
    if not content.get("items"):
        return metrics
    items = {}
    try:
        for line in (folder / content["items"]).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            items[str(item["task"]), str(item["item"])] = float(item["score"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationFailed(f"{content['items']}: {error!r}") from None
    return Metrics(tasks=metrics.tasks, items=items, train=metrics.train)


def _items_json(metrics: Metrics) -> list[list[Any]]:
    return [[task, item, score] for (task, item), score in metrics.items.items()]


def _finished(result: Path) -> Metrics:
    content = json.loads(result.read_text(encoding="utf-8"))
    metrics = metrics_from_json(content["metrics"])
    items = {(task, item): float(score) for task, item, score in content.get("items", [])}
    return Metrics(tasks=metrics.tasks, items=items, train=metrics.train)


def _write_json(path: Path, content: Any) -> None:
    """Whole or not at all: the name appears only when the file is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayEvaluator:
    """Answers from logs of past runs, keyed by subset, seed and split; a miss is an error."""

    results: Mapping[tuple[str, int, str], Metrics]
    key: str = "replay"

    def __call__(self, request: Request) -> Metrics:
        found = self.results.get((request.subset_hash, request.seed, request.split))
        if found is None:
            raise TokenCreditError(
                f"no logged run of subset {request.subset_hash[:12]} with seed {request.seed} on split "
                f"{request.split!r} among {len(self.results)} logged runs",
                hint="replay needs the configuration and the pool of the original search",
            )
        return found


def replay_of(folders: list[Path]) -> ReplayEvaluator:
    """A replay of the histories in run folders, confirmations included."""
    results = {}
    for folder in folders:
        for evaluation in load_history(folder):
            if evaluation.ok:
                tasks = {name: TaskScore(**task) for name, task in evaluation.tasks.items()}  # type: ignore[arg-type]
                results[evaluation.subset_hash, evaluation.seed, evaluation.split] = Metrics(tasks=tasks)
    return ReplayEvaluator(results=results)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyntheticEvaluator:
    """A surface of known truth plus normal noise that depends on subset, seed and split alone."""

    pool: SyntheticPool
    surface: Surface
    noise_sd: float = 0.5
    key: str = "synthetic"

    def truth(self, request: Request) -> float:
        return self.surface(self.pool, request.positions)

    def __call__(self, request: Request) -> Metrics:
        rng = np.random.default_rng(derive("synthetic noise", request.subset_hash, request.seed, request.split))
        score = self.truth(request) + self.noise_sd * float(rng.standard_normal())
        return Metrics(tasks={"synthetic": TaskScore(score=score)})


def make_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """From the `evaluator` block of a search file."""
    kinds: dict[str, Any] = {"shell": _shell, "sft": _sft, "ngram": _ngram, "replay": _replay}
    kind = config.get("kind")
    if kind not in kinds:
        raise unknown("evaluator", kind, kinds)
    return kinds[kind](dict(config), pool)


def _only(config: Mapping[str, Any], *known: str) -> None:
    for key in config:
        if key not in {"kind", *known}:
            raise unknown(f"key of evaluator {config['kind']!r}", key, known)


def _shell(config: dict[str, Any], pool: Pool) -> Evaluator:
    _only(config, "command", "timeout")
    command = config.get("command")
    if not isinstance(command, list) or not command or not all(isinstance(part, str) for part in command):
        raise TokenCreditError(
            f"`evaluator.command` must be a list of arguments, got {command!r}",
            hint='write it as ["python", "train_eval.py", "--train", "{train_file}", "--out", "{out_dir}"]',
        )
    try:
        [part.format(**dict.fromkeys(FIELDS, "")) for part in command]
    except (KeyError, IndexError, ValueError) as error:
        field = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise unknown("field of `evaluator.command`", field, FIELDS) from error
    return ShellEvaluator(
        pool=pool,
        command=tuple(command),
        timeout=seconds(config.get("timeout", "2h")),
        key=key_of("shell", command),
    )


def seconds(text: Any) -> float:
    """`90`, `90s`, `15m` or `2h` in seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1:]) if isinstance(text, str) and text[-1:] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except (TypeError, ValueError):
        value = 0.0
    if not value > 0:
        raise TokenCreditError(f"`timeout` must be like 90s, 15m or 2h, got {text!r}")
    return value


def _sft(config: dict[str, Any], pool: Pool) -> Evaluator:
    from tokencredit.recipes.sft import make_sft_evaluator

    return make_sft_evaluator(config, pool)


def _ngram(config: dict[str, Any], pool: Pool) -> Evaluator:
    from tokencredit.recipes.ngram import make_ngram_evaluator

    _only(config, "queries", "buckets")
    return make_ngram_evaluator(config, pool)


def _replay(config: dict[str, Any], pool: Pool) -> Evaluator:
    _only(config, "runs")
    return replay_of([Path(run) for run in config.get("runs") or []])
