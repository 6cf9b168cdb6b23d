"""All cells of a benchmark, each kept as soon as it is done."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.entries import FieldCollector
from tokencredit.bench.problem import load_device, load_task
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import lock_folder, make_folder, read_json, write_text

SCHEMA = 1
FREE = "memory_mib"  # the key of a config that moves no figure


def run_bench(
    config: BenchConfig, folder: Path, collectors: Mapping[str, FieldCollector] | None = None
) -> dict[str, Any]:
    """Run or resume a benchmark in `folder`; the results, which are also written to `results.json` there.

    `collectors` adds functions that fill batch fields (`field name -> Sampled -> [batch, response]`), so that pipelines
    that need them take part. A folder that holds another config is refused. Nothing is written before the first cell's
    model, teacher, responses and methods were accepted.
    """
    import torch

    from tokencredit.bench.cell import run_cell  # needs torch models and transformers: only when something runs

    _check_folder(folder, config)
    _check_names(config)
    torch.set_num_threads(config.threads)  # before a lab model is built: its weights depend on it
    cells = []
    with ExitStack() as locked:
        claim = cache(partial(_claim, folder, config, locked))
        for task in config.tasks:
            for stage in config.stages if config.model is None else ("given",):
                path = folder / f"{task.replace(':', '.')}-{stage}"
                done = path / "cell.json"
                if not done.is_file():
                    _write(done, run_cell(config, task, stage, path, collectors or {}, claim))
                cells.append(_read_mapping(done))
        results = {"schema": SCHEMA, "config": config.to_mapping(), "cells": cells}
        _write(folder / "results.json", results)
    return results


def _claim(folder: Path, config: BenchConfig, locked: ExitStack) -> None:
    """Hold the folder for this process as long as `locked` is open, and note whose it is."""
    locked.enter_context(lock_folder(folder))
    _write(folder / "config.json", config.to_mapping())


def _check_names(config: BenchConfig) -> None:
    """Device, tasks and stages of all cells, before the first one runs for minutes."""
    from tokencredit.lab.model import STAGES

    load_device(config.device)
    for task in config.tasks:
        load_task(task)
    for stage in config.stages:
        if config.model is None and stage not in STAGES:
            raise unknown("stage", stage, STAGES)


def _check_folder(folder: Path, config: BenchConfig) -> None:
    """A folder with results belongs to one config; keys that an older config lacks count as their defaults."""
    path = folder / "config.json"
    if not path.is_file():
        return
    asked, kept = json.loads(json.dumps(config.to_mapping())), _read_mapping(path)
    if "chat" not in kept:  # written when prompts never went through a chat template; the lab's models have none
        kept["chat"] = asked["chat"] if kept.get("model") is None else False
    kept = BenchConfig().to_mapping() | kept
    for key in sorted(kept | asked):
        if key != FREE and kept.get(key) != asked.get(key):
            raise TokenCreditError(
                f"{str(folder)!r} holds a benchmark with {key} = {kept.get(key)!r}, asked for is {asked.get(key)!r}",
                hint="choose another `--out`, or delete the folder",
            )


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise TokenCreditError(
            f"{path} must hold a mapping, got {type(content).__name__}", hint="delete the file to measure it again"
        )
    return content


def _write(path: Path, data: Any) -> None:
    """JSON that is whole or absent, so that a kill leaves the old file or the new one."""
    make_folder(path.parent)
    write_text(path, json.dumps(data, indent=1) + "\n")
