"""The folder of a run: what it holds, which changes of the config it allows, where a resumed run goes on."""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokencredit import files
from tokencredit.batch.store import RecordStore
from tokencredit.errors import TokenCreditError, shown
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.settings import is_whole

RUN, CONFIG, METRICS, RECORDS = "run.json", "config.yaml", "metrics.jsonl", "records"
LAST = "last-checkpoint"  # of a finished run, so that a larger `steps` can extend it

PACKAGES = ("tokencredit", "torch", "transformers", "trl", "peft", "accelerate")

# Keys that move no number of the training or of an evaluation: a folder stays usable when they change.
NEUTRAL = re.compile(
    r"name|records\.every|evaluation\.every|trainer\.(report_to|run_name|project|trackio_\w+|disable_tqdm|logging_\w+"
    r"|log_(level|level_replica|on_each_node|completions|unique_prompts|multimodal|completions_hub_repo)"
    r"|num_completions_to_print|save_(strategy|steps|total_limit|on_each_node)|push_to_hub|hub_\w+"
    r"|dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers))"
)


def finished_run(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """Read run.json of a finished run with the same config; None where there is work to do.

    A folder that holds training with other settings is refused, so that results never mix. Allowed are changes of keys
    that move no number (`NEUTRAL`), more `steps`, and any change where there is no checkpoint to go on from.
    """
    if folder.exists() and not folder.is_dir():
        raise TokenCreditError(f"{str(folder)!r} is a file", hint="choose a folder with --out")
    if not (folder / CONFIG).is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise TokenCreditError(f"{folder} is not empty and holds no run", hint="choose another folder with --out")
        return None
    run = read_json(folder / RUN)
    finished = run.get("status") == "finished"
    if not finished and last_checkpoint(folder) is None:
        return None
    before, now = _read_config(folder / CONFIG), config.to_mapping()
    difference = _first_difference(before, now)
    if difference is None and before["steps"] > now["steps"]:
        difference = f"`steps` was {before['steps']}, now {now['steps']}"
    if difference is not None:
        raise TokenCreditError(
            f"{folder} holds a run with other settings: {difference}",
            hint="choose another folder with --out, or delete this one",
        )
    if not finished:
        return None
    if now["steps"] > int(run.get("steps", before["steps"])):
        if not (folder / LAST).is_dir() and last_checkpoint(folder) is None:
            raise TokenCreditError(
                f"{folder} holds a finished run of {before['steps']} steps without its last checkpoint",
                hint=f"start a new run from its model: `model: {folder / 'model'}` with another --out",
            )
        return None
    return run


def _read_config(path: Path) -> dict[str, Any]:
    """The stored config; keys that were added since the run started have their defaults."""
    stored = files.read_yaml(path, "config of the run")
    if not isinstance(stored, dict) or not is_whole(stored.get("steps"), 1):
        raise TokenCreditError(f"{path} holds no config of a run", hint="delete the run's folder and start again")
    for key, default in RunConfig.defaults().items():
        stored.setdefault(key, default)
        if isinstance(default, dict) and isinstance(stored[key], dict):
            stored[key] = default | stored[key]
    return stored


def prepare(folder: Path, config: RunConfig) -> Path | None:
    """Make the folder ready to train in; the checkpoint to go on from, or None for a fresh start."""
    files.make_folder(folder)
    if (folder / LAST).is_dir() and last_checkpoint(folder) is None and _is_whole(folder / LAST):
        state = read_json(folder / LAST / "trainer_state.json")
        (folder / LAST).rename(folder / f"checkpoint-{int(state['global_step'])}")
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        for name in (LAST, RECORDS):
            shutil.rmtree(folder / name, ignore_errors=True)
        files.write_text(folder / METRICS, "")
    else:
        step = _step_of(checkpoint)
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        files.write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        if (folder / RECORDS).is_dir():
            RecordStore(folder / RECORDS).truncate(step)
    files.write_json(folder / RUN, _describe(config) | {"status": "running"})
    files.write_yaml(folder / CONFIG, config.to_mapping())
    return checkpoint


def finish(folder: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Mark the run finished and keep its last checkpoint as `last-checkpoint`; the contents of run.json."""
    run = read_json(folder / RUN) | dict(more) | {"status": "finished"}
    files.write_json(folder / RUN, run)
    last = last_checkpoint(folder)
    if last is not None and _step_of(last) == more.get("steps"):
        shutil.rmtree(folder / LAST, ignore_errors=True)
        last.rename(folder / LAST)
    for checkpoint in folder.glob("checkpoint-*"):  # the model itself is kept in model/
        shutil.rmtree(checkpoint, ignore_errors=True)
    return run


def _describe(config: RunConfig) -> dict[str, Any]:
    """What the report shows of a run's settings."""
    return {
        "name": config.name,
        "label": config.label,
        "task": config.source,
        "model": config.model,
        "pipeline": config.pipeline.to_config(),
        "seed": config.seed,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": config.to_mapping(),
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint that the host wrote."""
    complete = [path for path in folder.glob("checkpoint-*") if _step_of(path) >= 0 and _is_whole(path)]
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.partition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else -1


def _is_whole(checkpoint: Path) -> bool:
    """The host writes trainer_state.json last, and not by a rename: a kill can leave it torn."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and is_whole(state.get("global_step"), 0)


def append_metrics(folder: Path, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl; `kind` is "train" or "eval"."""
    line = json.dumps({"step": step, "kind": kind, "metrics": dict(metrics)})
    with (folder / METRICS).open("a") as file:
        file.write(line + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl; a last line that a kill tore is left out."""
    path = folder / METRICS
    lines = files.read_text(path, "metrics").splitlines() if path.is_file() else []
    metrics = []
    for number, line in enumerate(lines):
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            parsed = None
        if _is_metrics_line(parsed):
            metrics.append(parsed)
        elif number < len(lines) - 1:
            raise TokenCreditError(
                f"{path}, line {number + 1} is not a line of metrics: {shown(line)}", hint="delete the run's folder"
            )
    return metrics


def _is_metrics_line(parsed: Any) -> bool:
    return (
        isinstance(parsed, dict)
        and is_whole(parsed.get("step"), 0)
        and parsed.get("kind") in ("train", "eval")
        and isinstance(parsed.get("metrics"), dict)
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise an error that names the file."""
    try:
        loaded = files.read_json(path)
    except TokenCreditError as error:
        raise TokenCreditError(
            f"cannot read {path}: {error.message}", hint="delete the run's folder and start again"
        ) from error
    if not isinstance(loaded, dict):
        raise TokenCreditError(
            f"{path} holds no JSON object: {shown(loaded)}", hint="delete the run's folder and start again"
        )
    return loaded


def _first_difference(before: Any, now: Any, path: str = "") -> str | None:
    """Name the first key that differs and moves a number; `steps` is compared by its size elsewhere."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            difference = _first_difference(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
            if difference is not None:
                return difference
        return None
    if before == now or path == "steps" or NEUTRAL.fullmatch(path):
        return None
    return f"`{path}` was {shown(before)}, now {shown(now)}"
