"""Evaluators: a shell command, a log of past runs, synthetic surfaces; `sft` and `ngram` have their own files."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import make_folder, read_json, write_bytes, write_json
from tokencredit.recipes.evaluate.commands import run_command
from tokencredit.recipes.evaluate.synthetic import Surface, SyntheticPool
from tokencredit.recipes.pool.samples import Pool, write_lines
from tokencredit.recipes.search.history import load_history
from tokencredit.recipes.search.objective import (
    EvaluationFailed,
    Evaluator,
    Metrics,
    Request,
    TaskScore,
    metrics_from_json,
    metrics_to_json,
)
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
        make_folder(request.folder)
        files = write_training_files(self.pool, request)
        values = {**files, "out_dir": request.folder, "seed": request.seed, "split": request.split}
        values |= {"samples": len(request.positions), "tokens": int(self.pool.words[request.positions].sum())}
        arguments = [part.format(**values, recipe=request.recipe) for part in self.command]
        problem = ""
        for attempt in (1, 2):
            try:
                log = request.folder / f"log-{attempt}.txt"
                code = run_command(arguments, request.folder, log, self.timeout)
                if code != 0:
                    raise EvaluationFailed(f"exit status {code}: {_tail(log)}")
                metrics = read_metrics(request.folder)
            except EvaluationFailed as failure:
                problem = str(failure)
                continue
            write_json(result, {"metrics": metrics_to_json(metrics), "items": _items_json(metrics)})
            return metrics
        raise EvaluationFailed(problem)


def write_training_files(pool: Pool, request: Request) -> dict[str, Path]:
    """`train.jsonl` (chat messages and tools, in the recipe's order) and `train.ids`."""
    train, ids = request.folder / "train.jsonl", request.folder / "train.ids"
    kept = ("messages", "tools")
    write_lines(train, ({key: s[key] for key in kept if key in s} for s in pool.samples(request.positions)))
    write_bytes(ids, b"\n".join(pool.ids[request.positions].tolist()) + b"\n")
    return {"train_file": train, "ids_file": ids}


def read_metrics(folder: Path) -> Metrics:
    """`metrics.json` of a run, with the scores of its items where it names a file of them."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise EvaluationFailed(f"the command wrote no {path.name}")
    try:
        content = read_json(path)
    except TokenCreditError as error:
        raise EvaluationFailed(error.message) from None
    metrics = metrics_from_json(content)
    if not content.get("items"):
        return metrics
    items = {}
    try:
        for line in (folder / content["items"]).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            score = float(item["score"])
            if not math.isfinite(score):
                raise ValueError(f"score {score}")
            items[str(item["task"]), str(item["item"])] = score
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise EvaluationFailed(f"{content['items']}: {error!r}") from None
    return Metrics(tasks=metrics.tasks, items=items, train=metrics.train)


def _items_json(metrics: Metrics) -> list[list[Any]]:
    return [[task, item, score] for (task, item), score in metrics.items.items()]


def _finished(result: Path) -> Metrics:
    content = read_json(result)
    try:
        metrics = metrics_from_json(content["metrics"])
        items = {(task, item): float(score) for task, item, score in content.get("items", [])}
    except (EvaluationFailed, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenCreditError(
            f"{result} was changed or is damaged", hint="remove it to pay for the run again"
        ) from error
    return Metrics(tasks=metrics.tasks, items=items, train=metrics.train)


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
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
    if not isinstance(kind, str) or kind not in kinds:
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
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
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
        value = 0.0 if isinstance(number, bool) else float(number) * units[unit]
    except (TypeError, ValueError, OverflowError):
        value = 0.0
    if not 0 < value < 1e8:
        raise TokenCreditError(f"`timeout` must be like 90s, 15m or 2h, got {text!r}")
    return value


def _sft(config: dict[str, Any], pool: Pool) -> Evaluator:
    from tokencredit.recipes.evaluate.sft import make_sft_evaluator

    return make_sft_evaluator(config, pool)


def _ngram(config: dict[str, Any], pool: Pool) -> Evaluator:
    from tokencredit.recipes.evaluate.ngram import make_ngram_evaluator

    _only(config, "queries", "buckets")
    return make_ngram_evaluator(config, pool)


def _replay(config: dict[str, Any], pool: Pool) -> Evaluator:
    _only(config, "runs")
    runs = config.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) for run in runs):
        raise TokenCreditError(f"evaluator 'replay' needs `runs`, a list of run folders, got {runs!r}")
    return replay_of([Path(run) for run in runs])
