"""The evaluator that runs a user's command, which fine-tunes, evaluates and writes `metrics.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import read_json
from tokencredit.recipes.evaluate.command import run_command
from tokencredit.recipes.evaluate.records import (
    EvaluationFailed,
    Evaluator,
    Metrics,
    Request,
    key_of,
    metrics_from_json,
    run_once,
)
from tokencredit.recipes.pool.lines import write_lines
from tokencredit.recipes.pool.samples import Pool
from tokencredit.settings import Settings, Words

FIELDS = ("train_file", "ids_file", "out_dir", "seed", "split", "samples", "tokens", "recipe")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: Any) -> float:
    """Read `90`, `90s`, `15m` or `2h` as seconds."""
    number, unit = (text[:-1], text[-1:]) if isinstance(text, str) and text[-1:] in UNITS else (text, "s")
    try:
        value = 0.0 if isinstance(number, bool) else float(number) * UNITS[unit]
    except (TypeError, ValueError, OverflowError):
        value = 0.0
    if not 0 < value < 1e8:
        raise TokenCreditError(f"`timeout` must be like 90s, 15m or 2h, got {text!r}")
    return value


class ShellSettings(Settings):
    """`evaluator:` of a search file with `kind: shell`."""

    section: ClassVar[str] = "evaluator"
    key_kind: ClassVar[str] = "key of evaluator 'shell'"

    command: Annotated[
        list[str], Field(min_length=1), Words('a list of arguments like ["python", "train.py", "{train_file}"]')
    ]
    timeout: Annotated[float, BeforeValidator(seconds)] = seconds("2h")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShellEvaluator:
    """Runs a command that fine-tunes and evaluates and writes `{out_dir}/metrics.json`.

    The command is a list of arguments, each a template; nothing passes through a shell. One retry with the same seed.
    """

    pool: Pool
    settings: ShellSettings
    key: str

    def __call__(self, request: Request) -> Metrics:
        return run_once(request, self._run)

    def _run(self, request: Request) -> Metrics:
        files = write_training_files(self.pool, request)
        values = {**files, "out_dir": request.folder, "seed": request.seed, "split": request.split}
        values |= {"samples": len(request.positions), "tokens": int(self.pool.words[request.positions].sum())}
        arguments = [part.format(**values, recipe=request.recipe) for part in self.settings.command]
        problem = ""
        for attempt in (1, 2):
            log = request.folder / f"log-{attempt}.txt"
            try:
                code = run_command(arguments, request.folder, log, self.settings.timeout)
                if code != 0:
                    raise EvaluationFailed(f"exit status {code}: {_last_line(log)}")
                return read_metrics(request.folder)
            except EvaluationFailed as failure:
                problem = str(failure)
        raise EvaluationFailed(problem)


def make_shell_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """Make the evaluator of an `evaluator` block with `command` and `timeout`."""
    settings = ShellSettings.read(config)
    try:
        [part.format(**dict.fromkeys(FIELDS, "")) for part in settings.command]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        field = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise unknown("field of `evaluator.command`", field, FIELDS) from error
    return ShellEvaluator(pool=pool, settings=settings, key=key_of("shell", settings.command))


def write_training_files(pool: Pool, request: Request) -> dict[str, Path]:
    """Write `train.jsonl` (chat messages and tools, in the recipe's order) and `train.ids`."""
    train, ids = request.folder / "train.jsonl", request.folder / "train.ids"
    kept = ("messages", "tools")
    write_lines(train, ({key: s[key] for key in kept if key in s} for s in pool.samples(request.positions)))
    pool.write_ids(request.positions, ids)
    return {"train_file": train, "ids_file": ids}


def read_metrics(folder: Path) -> Metrics:
    """Read `metrics.json` of a run, with the scores of its items where it names a file of them."""
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


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    return lines[-1][:300] if lines else "no output"
