"""One cell of the benchmark, a task at a stage: sampled, measured in parts that survive a kill, summarised."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
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
from tokencredit.bench.entries import CONTROLS, FIELD_COLLECTORS, Entry, FieldCollector, entries, fill
from tokencredit.bench.measure import Measured, Target, exact_target, measure, target_names
from tokencredit.bench.memory import Plan, plan_memory
from tokencredit.bench.problem import World, load_world
from tokencredit.bench.sampling import Sampled, draw
from tokencredit.bench.teacher import BenchTeacher, describe_teacher, load_teacher, teacher_collectors
from tokencredit.collect.exact.gradient import trainable
from tokencredit.files import make_folder, write_bytes, write_text
from tokencredit.methods.exact import exact_advantage
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.progress import Advance, bar
from tokencredit.seeds import generator

FIELDS = tuple(item.name for item in fields(Measured))

Advantages = list[list[Float[Tensor, "batch response"]]]  # [replicate][pipeline]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cell:
    """What is measured: pipelines, and the credit that they give on the samples of a world."""

    config: BenchConfig
    world: World
    teacher: BenchTeacher | None
    samples: Sequence[Sampled]
    entries: Sequence[Entry]
    advantages: Advantages
    plan: Plan

    @property
    def parts(self) -> list[slice]:
        """The pipelines that are measured together."""
        starts = range(0, len(self.entries), self.plan.pipelines)
        return [slice(first, first + self.plan.pipelines) for first in starts]

    @property
    def work(self) -> int:
        """Prompts whose gradients are computed: once for the exact target, and once per batch and part."""
        return len(self.world.prompts) * (1 + len(self.parts) * len(self.samples))


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
    chosen, left_out = entries(config.pipelines, controls=config.controls, collectors=plain | taught)
    samples = [draw(world, config, replicate) for replicate in range(config.replicates)]
    about = {
        "task": task,
        "stage": "given" if config.model else stage,
        "model": {"parameters": sum(item.numel() for item in trainable(world.model)), "dtype": config.dtype},
        **show.summary(world, samples, config),
        "left_out": left_out,
        "no_baseline": config.baseline not in {entry.name for entry in chosen},
        "controls": [entry.name for entry in chosen if entry.name in CONTROLS and not entry.matched],
    }
    nothing = show.why_nothing_compares(samples, config.rollouts) if teacher is None else None
    if nothing is not None:
        claim()
        return about | {"nothing": nothing, "methods": [], "examples": [], "seconds": time.monotonic() - start}
    cell = Cell(
        config=config,
        world=world,
        teacher=teacher,
        samples=samples,
        entries=chosen,
        advantages=[assign_all(chosen, sampled, config, plain, taught) for sampled in samples],
        plan=plan_memory(config, samples, len(chosen), len(target_names(teacher))),
    )
    claim()
    with bar(f"bench {task} {stage}", cell.work) as advance:
        target = exact_target(world, config, advance, teacher)
        measured = _measure_parts(cell, target, folder, advance)
    return about | _results(cell, target, measured) | {"seconds": time.monotonic() - start}


def _check_names(config: BenchConfig) -> None:
    """Refuse unknown methods before a model is loaded. The baseline may be missing among them, but it must exist."""
    chosen, left_out = entries(config.pipelines, controls=config.controls, collectors={})
    if config.baseline not in {entry.name for entry in chosen} | left_out.keys():
        Pipeline.parse(config.baseline)


def assign_all(
    chosen: Sequence[Entry],
    sampled: Sampled,
    config: BenchConfig,
    collectors: Mapping[str, FieldCollector],
    taught: Mapping[str, FieldCollector] = MappingProxyType({}),
) -> list[Float[Tensor, "batch response"]]:
    """Advantages of every pipeline; random ones draw from a stream that their name and the replicate decide.

    Pipelines that a teacher teaches have their fields from `taught` first: their reference is the student as it is,
    that of the others the model with the adapter off.
    """
    plain = _filled([entry for entry in chosen if not entry.is_taught], sampled, collectors)
    with_teacher = _filled([entry for entry in chosen if entry.is_taught], sampled, {**collectors, **taught})
    return [
        assign_credit(
            entry.pipeline,
            with_teacher if entry.is_taught else plain,
            generator=generator("bench draw", config.seed, sampled.replicate, entry.name),
        )
        for entry in chosen
    ]


def _filled(chosen: Sequence[Entry], sampled: Sampled, collectors: Mapping[str, FieldCollector]) -> TokenBatch:
    return fill(sampled, frozenset().union(*(entry.pipeline.requires for entry in chosen)), collectors)


def _measure_parts(cell: Cell, target: Target, folder: Path, advance: Advance) -> Measured:
    """What is kept of all pipelines, part by part."""
    parts = []
    for part in cell.parts:
        path = folder / f"part-{part.start:03d}.safetensors"
        names = json.dumps([[entry.name, entry.matched] for entry in cell.entries[part]])
        measured = _load_part(path, names)
        if measured is None:
            measured = measure(cell.samples, [item[part] for item in cell.advantages], target, cell.plan, advance)
            _save_part(path, names, measured)
        else:
            advance(len(cell.samples) * len(cell.world.prompts))
        parts.append(measured)
    return Measured(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


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


def _results(cell: Cell, target: Target, measured: Measured) -> dict[str, Any]:
    """The figures of every pipeline, and what the page shows beside them."""
    resampling = figures.Resampling.of(cell.config, target.units)
    exact = [exact_advantage(sampled.batch) for sampled in cell.samples]
    about_teacher = {}
    if cell.teacher is not None:
        about_teacher = {"teacher": describe_teacher(cell.teacher, cell.world, cell.config, target.objectives)}
    return {
        "methods": _methods(cell, target, measured, exact, resampling),
        **about_teacher,
        "concentration_of_exact": figures.as_json(figures.concentration_figures(cell.samples, exact, resampling)),
        "examples": show.examples(cell.world, cell.samples[0], cell.entries, cell.advantages[0]),
    }


def _methods(
    cell: Cell,
    target: Target,
    measured: Measured,
    exact: Sequence[Float[Tensor, "batch response"]],
    resampling: figures.Resampling,
) -> list[dict[str, Any]]:
    names = [entry.name for entry in cell.entries]
    baseline = None
    if cell.config.baseline in names:
        baseline = figures.products_of(measured, names.index(cell.config.baseline), target, resampling)
    best = target.total[0]
    before = target.success_after(torch.zeros_like(best))
    possible = target.success_after(best * (target.step / max(float(best.norm()), 1e-12)))
    rows = []
    for row, entry in enumerate(cell.entries):
        products = figures.products_of(measured, row, target, resampling)
        estimates = figures.gradient_figures(products, baseline, resampling.level)
        estimates |= figures.token_figures(cell.samples, [item[row] for item in cell.advantages], exact, resampling)
        estimates["progress"] = figures.progress_figure(measured.after[row], before, possible, resampling)
        rows.append(
            {
                "name": entry.name,
                "matched": entry.matched,
                "pipeline": entry.pipeline.to_config(),
                "figures": figures.as_json(estimates),
            }
        )
    return rows
