"""The folder of a run: what is in it, and what a resumed run may keep."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tokencredit.errors import TokenCreditError
from tokencredit.labels import label_of
from tokencredit.store import RecordStore

RUN, CONFIG, METRICS, RECORDS = "run.json", "config.yaml", "metrics.jsonl", "records"

PACKAGES = ("tokencredit", "torch", "transformers", "trl", "peft", "accelerate")


def finished_run(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """run.json of a finished run with the same config; None where there is work to do.

    A folder that holds a run with other settings is refused, so that results never mix.
    """
    if not (folder / CONFIG).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise TokenCreditError(f"{folder} is not empty and holds no run", hint="choose another folder with --out")
        return None
    before = yaml.safe_load((folder / CONFIG).read_text())
    if before != plain(config):
        raise TokenCreditError(
            f"{folder} holds a run with other settings: {_first_difference(before, plain(config))}",
            hint="choose another folder with --out, or delete this one",
        )
    run = read_json(folder / RUN)
    return run if run["status"] == "finished" else None


def prepare(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Make the folder ready to train in; the checkpoint to go on from, or None for a fresh start."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(folder)
    step = 0 if checkpoint is None else int(checkpoint.name.partition("-")[2])
    _truncate_metrics(folder / METRICS, step, fresh=checkpoint is None)
    if (folder / RECORDS).is_dir():
        RecordStore(folder / RECORDS).truncate(step)
    write_json(folder / RUN, describe(config) | {"status": "running"})
    write_yaml(folder / CONFIG, plain(config))
    return checkpoint


def finish(folder: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Mark the run finished; the contents of run.json."""
    run = read_json(folder / RUN) | dict(more) | {"status": "finished"}
    write_json(folder / RUN, run)
    return run


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of a run's settings."""
    from tokencredit.credit import Pipeline

    return {
        "name": config["name"],
        "label": label_of(config["credit"]),
        "task": config["task"] or config["dataset"]["path"],
        "model": config["model"],
        "pipeline": Pipeline.parse(config["credit"]).to_config(),
        "seed": config["seed"],
        "versions": {name: version(name) for name in PACKAGES},
        "settings": plain(config),
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint that the host wrote."""
    found = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """The host writes trainer_state.json last, and not by a rename: a kill can leave it torn."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def append_metrics(folder: Path, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl; `kind` is "train" or "eval"."""
    line = json.dumps({"step": step, "kind": kind, "metrics": dict(metrics)})
    with (folder / METRICS).open("a") as file:
        file.write(line + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill tore is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines) - 1:
                raise TokenCreditError(
                    f"{path}, line {number + 1} is no JSON", hint="delete the run's folder"
                ) from error
    return found


def _truncate_metrics(path: Path, step: int, *, fresh: bool) -> None:
    kept = [] if fresh else [line for line in read_metrics(path.parent) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as YAML reads it back: no tuples, no special types."""
    loaded: dict[str, Any] = json.loads(json.dumps(config))
    return loaded


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an error that names the file."""
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise TokenCreditError(
            f"cannot read {path}: {error}", hint="delete the run's folder and start again"
        ) from error
    return loaded


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    _replace(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    _replace(path, yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"`{path}` was {before!r}, now {now!r}"
