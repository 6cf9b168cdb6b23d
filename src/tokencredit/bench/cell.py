"""One cell of the benchmark, a task at a stage: sampled, measured in parts that survive a kill, summarised."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from tokencredit.batch.records import TokenBatch
from tokencredit.bench import figures, show
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.entries import (
    CONTROLS,
    FIELD_COLLECTORS,
    Entry,
    FieldCollector,
    entries,
    fill,
)
from tokencredit.bench.measure import Measured, Target, exact_target, measure, pipelines_at_once
from tokencredit.bench.problem import Sampled, World, draw, load_world
from tokencredit.bench.teacher import BenchTeacher, described, load_teacher, teacher_collectors
from tokencredit.collect.exact.gradient import trainable
from tokencredit.diagnostics.stats import resample_weights
from tokencredit.files import make_folder, write_bytes, write_text
from tokencredit.methods.exact import exact_advantage
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.progress import bar
from tokencredit.seeds import generator

FIELDS = tuple(item.name for item in fields(Measured))

Advantages = list[list[Float[Tensor, "batch response"]]]  # [replicate][pipeline]


def run_cell(
    config: BenchConfig,
    task: str,
    stage: str,
    folder: Path,
    collectors: Mapping[str, FieldCollector],
    claim: Callable[[], None],
) -> dict[str, Any]:
    """All figures of one cell as JSON-like data; parts that are already in `folder` are not measured again.

    `collectors` fill fields before the benchmark's own do; a teacher fills its fields for the methods that it teaches.
    `claim` is called once everything that can be refused was accepted, before anything is written.
    """
    start = time.monotonic()
    _check_names(config)
    world = load_world(config, task, stage)
    teacher = load_teacher(world, config, task)
    plain = FIELD_COLLECTORS | dict(collectors)
    taught = teacher_collectors(teacher) | dict(collectors)
    found, left_out = entries(config.pipelines, controls=config.controls, collectors=plain | taught)
    samples = [draw(world, config, replicate) for replicate in range(config.replicates)]
    nothing = show.why_nothing_compares(samples, config.rollouts) if teacher is None else None
    about = {
        "task": task,
        "stage": "given" if config.model else stage,
        "model": {"parameters": sum(item.numel() for item in trainable(world.model)), "dtype": config.dtype},
        **show.summary(world, samples, config),
        "left_out": left_out,
        "no_baseline": config.baseline not in {entry.name for entry in found},
        "controls": [entry.name for entry in found if entry.name in CONTROLS and not entry.matched],
    }
    if nothing is not None:
        claim()
        return about | {"nothing": nothing, "methods": [], "examples": [], "seconds": time.monotonic() - start}
    advantages = [assign_all(found, sampled, config, plain, taught) for sampled in samples]
    claim()
    with bar(f"bench {task} {stage}", _units_of_work(world, found, config)) as advance:
        target, measured, steps = _measured(world, samples, found, advantages, config, folder, advance, teacher)
    return about | {
        "methods": _methods(samples, found, advantages, target, measured, steps, config),
        **({} if teacher is None else {"teacher": described(teacher, world, config, target.objectives)}),
        "concentration_of_exact": _exact_concentration(samples, target, config),
        "examples": show.examples(world, samples[0], found, advantages[0]),
        "seconds": time.monotonic() - start,
    }


def _check_names(config: BenchConfig) -> None:
    """Refuse unknown methods before a model is loaded. The baseline may be missing among them, but it must exist."""
    found, left_out = entries(config.pipelines, controls=config.controls, collectors={})
    if config.baseline not in {entry.name for entry in found} | left_out.keys():
        Pipeline.parse(config.baseline)


def _units_of_work(world: World, found: Sequence[Entry], config: BenchConfig) -> int:
    """Prompts whose gradients are computed: once for the exact target, and once per batch and part."""
    parts = math.ceil(len(found) / pipelines_at_once(world, config))
    return len(world.prompts) * (1 + parts * config.replicates)


def assign_all(
    found: Sequence[Entry],
    sampled: Sampled,
    config: BenchConfig,
    collectors: Mapping[str, FieldCollector],
    taught: Mapping[str, FieldCollector] = MappingProxyType({}),
) -> list[Float[Tensor, "batch response"]]:
    """Advantages of every pipeline; random ones draw from a stream that their name and the replicate decide.

    Pipelines that a teacher teaches have their fields from `taught` first: their reference is the student as it is,
    that of the others the model with the adapter off.
    """
    plain = _filled([entry for entry in found if not _is_taught(entry)], sampled, collectors)
    with_teacher = _filled([entry for entry in found if _is_taught(entry)], sampled, {**collectors, **taught})
    return [
        assign_credit(
            entry.pipeline,
            with_teacher if _is_taught(entry) else plain,
            generator=generator("bench draw", config.seed, sampled.replicate, entry.name),
        )
        for entry in found
    ]


def _is_taught(entry: Entry) -> bool:
    return "teacher_logprobs" in entry.pipeline.requires


def _filled(found: Sequence[Entry], sampled: Sampled, collectors: Mapping[str, FieldCollector]) -> TokenBatch:
    return fill(sampled, frozenset().union(*(entry.pipeline.requires for entry in found)), collectors)


def _measured(
    world: World,
    samples: Sequence[Sampled],
    found: Sequence[Entry],
    advantages: Advantages,
    config: BenchConfig,
    folder: Path,
    advance: Any,
    teacher: BenchTeacher | None,
) -> tuple[Target, Measured, dict[str, Float[np.ndarray, " probe"]]]:
    """The exact target and the parts of all pipelines, put together; the steps are V before, and after the best."""
    target = exact_target(world, config, advance, teacher)
    at_once = pipelines_at_once(world, config)
    parts = []
    for first in range(0, len(found), at_once):
        chunk = found[first : first + at_once]
        path = folder / f"part-{first:03d}.safetensors"
        names = json.dumps([[entry.name, entry.matched] for entry in chunk])
        part = _load_part(path, names)
        if part is not None:
            advance(len(samples) * len(world.prompts))
        else:
            given = [item[first : first + at_once] for item in advantages]
            part = measure(world, samples, given, target, advance)
            _save_part(path, names, part)
        parts.append(part)
    best = target.total[0]
    steps = {
        "before": target.success_after(torch.zeros_like(best)),
        "best": target.success_after(best * (target.step / max(float(best.norm()), 1e-12))),
    }
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}
    return target, Measured(**joined), steps


def _load_part(path: Path, names: str) -> Measured | None:
    """A part that is kept; None where there is none, it is of other methods, or its file is damaged."""
    beside = path.with_suffix(".json")
    try:
        if not path.is_file() or beside.read_text(encoding="utf-8") != names:
            return None
        return Measured(**load_file(path))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def _save_part(path: Path, names: str, part: Measured) -> None:
    """Names first, then the tensors by one rename: a part is there whole or not at all."""
    make_folder(path.parent)
    write_text(path.with_suffix(".json"), names)
    write_bytes(path, save({name: np.ascontiguousarray(getattr(part, name)) for name in FIELDS}))


def _methods(
    samples: Sequence[Sampled],
    found: Sequence[Entry],
    advantages: Advantages,
    target: Target,
    measured: Measured,
    steps: Mapping[str, Float[np.ndarray, " probe"]],
    config: BenchConfig,
) -> list[dict[str, Any]]:
    weights = resample_weights(target.sketches.shape[1], config.resamples, "bench", config.seed)
    exact = [exact_advantage(sampled.batch) for sampled in samples]
    base = next((row for row, entry in enumerate(found) if entry.name == config.baseline), None)
    baseline = None if base is None else figures.products_of(measured, base, target, weights)
    rows = []
    for row, entry in enumerate(found):
        products = figures.products_of(measured, row, target, weights)
        estimates = figures.gradient_figures(products, baseline, config.level)
        estimates |= figures.token_figures(
            samples, [item[row] for item in advantages], exact, target.units, weights, config.level
        )
        estimates["progress"] = figures.progress_figure(
            measured.after[row], steps["before"], steps["best"], target.units, weights, config.level
        )
        rows.append(
            {
                "name": entry.name,
                "matched": entry.matched,
                "pipeline": entry.pipeline.to_config(),
                "figures": figures.as_json(estimates),
            }
        )
    return rows


def _exact_concentration(samples: Sequence[Sampled], target: Target, config: BenchConfig) -> dict[str, Any]:
    weights = resample_weights(target.sketches.shape[1], config.resamples, "bench", config.seed)
    exact = [exact_advantage(sampled.batch) for sampled in samples]
    return figures.as_json(figures.concentration_figures(samples, exact, target.units, weights, config.level))
