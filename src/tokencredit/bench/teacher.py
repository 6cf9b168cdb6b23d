"""The teacher of a benchmark: the fields that it fills, and the exact gradient of its objective."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.entries import FieldCollector
from tokencredit.bench.problem import World
from tokencredit.bench.sampling import Sampled, sample_responses
from tokencredit.collect.exact.score import score_trie
from tokencredit.collect.exact.trie import Trie, build_trie
from tokencredit.collect.teacher.build import LocalTeacher, Teacher, build_teacher
from tokencredit.collect.teacher.objective import TeacherObjective, teacher_objective
from tokencredit.collect.teacher.prompts import better_attempts, response_texts
from tokencredit.seeds import generator

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BenchTeacher:
    """A teacher that has been checked, a row of data for each prompt, and the states that its objective is taken at.

    `states` is None where the teacher gives sampled tokens only (a server), or needs another response in its prompt:
    then there is no gradient to compare with. `length` is the mean length of the responses that the states come from.
    """

    teacher: Teacher
    rows: list[dict[str, Any]]
    states: Trie | None
    length: float


def load_teacher(world: World, config: BenchConfig, task_name: str) -> BenchTeacher | None:
    """The teacher of the config's `teacher:` section on the problems of this cell; None without one."""
    if config.teacher is None:
        return None
    from tokencredit.lab.teachers import with_lab_model

    teacher = build_teacher(with_lab_model(config.teacher, task_name))
    rows = [_row(world, problem, number, config) for number, problem in enumerate(world.problems)]
    teacher.check(world.tokenizer, policy=world.model, rows=rows)
    if not isinstance(teacher, LocalTeacher) or teacher.needs_attempts:
        return BenchTeacher(teacher=teacher, rows=rows, states=None, length=0.0)
    ids, mask = sample_responses(world, config.teacher_samples, "bench states", config.seed)
    texts = [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]
    each = config.teacher_samples
    states = build_trie([texts[first : first + each] for first in range(0, len(texts), each)])
    return BenchTeacher(teacher=teacher, rows=rows, states=states, length=float(mask.sum(1).double().mean()))


def _row(world: World, problem: Any, number: int, config: BenchConfig) -> dict[str, Any]:
    """What a privileged prompt may show: what the problem holds, and `trace`, one of its accepted responses.

    `answer` is the problem's own where it has one, else the trace.
    """
    listed = world.task.accepted(problem)
    draw = torch.randint(max(len(listed), 1), (), generator=generator("bench trace", config.seed, number))
    trace = listed[int(draw)] if listed else ""
    if not isinstance(trace, str):
        trace = world.tokenizer.decode([item for item in trace if item != world.tokenizer.eos_token_id])
    known: dict[str, Any] = {"trace": trace} if listed else {}
    held = getattr(problem, "data", None)
    held = {name: str(value) for name, value in held.items()} if isinstance(held, Mapping) else {}
    answer = {"answer": known["trace"]} if listed else {}
    return {**answer, **held, **known, "prompt": problem.prompt}


def teacher_collectors(bench_teacher: BenchTeacher | None) -> dict[str, FieldCollector]:
    """The batch fields that a teacher fills. The reference of ExOPD is the student as it is, before its first step."""
    if bench_teacher is None:
        return {}

    def scores(sampled: Sampled, score: Callable[..., Any]) -> Any:
        owners = sampled.batch.group_ids.tolist()
        rows: list[Row] = [bench_teacher.rows[owner] for owner in owners]
        if bench_teacher.teacher.needs_attempts:
            rows = [{**row, "attempt": text} for row, text in zip(rows, _attempts(sampled), strict=True)]
        world, batch = sampled.world, sampled.batch
        prompts = [world.prompts[owner] for owner in owners]
        ids, mask = (item.to(world.device) for item in (batch.response_ids, batch.response_mask))
        return score(prompts, ids, mask, rows, 1.0, policy=world.model)

    teacher = bench_teacher.teacher
    fields: dict[str, FieldCollector] = {"ref_logprobs": lambda sampled: sampled.batch.require("old_logprobs")}
    if not isinstance(teacher, LocalTeacher):
        return fields | {"teacher_logprobs": lambda sampled: scores(sampled, teacher.score).double().cpu()}

    @lru_cache(maxsize=1)
    def both(sampled: Sampled) -> tuple[Tensor, Tensor]:
        return scores(sampled, teacher.score_with_entropies)

    fields["teacher_logprobs"] = lambda sampled: both(sampled)[0].double().cpu()
    fields["teacher_entropies"] = lambda sampled: both(sampled)[1].double().cpu()
    return fields


def _attempts(sampled: Sampled) -> list[str | None]:
    batch = sampled.batch
    texts = response_texts(sampled.world.tokenizer, batch.response_ids, batch.response_mask)
    return better_attempts(texts, batch.group_ids.tolist(), batch.rewards.tolist())


def objective_of(teacher: BenchTeacher, world: World, prompt: int) -> TeacherObjective:
    """The teacher's objective on one prompt, at the states that many samples of the student passed."""
    assert teacher.states is not None and isinstance(teacher.teacher, LocalTeacher)
    longest = (teacher.states.paths[teacher.states.owners == prompt][:, 1:] >= 0).any(0, keepdim=True)
    longest = longest.to(world.device)
    with teacher.teacher.opened([world.prompts[prompt]], longest, [teacher.rows[prompt]], world.model) as (
        model,
        prompts,
    ):
        return teacher_objective(world.model, world.prompts[prompt], model, prompts[0], teacher.states, prompt)


def describe_teacher(
    teacher: BenchTeacher, world: World, config: BenchConfig, objectives: list[TeacherObjective]
) -> dict:
    """What the results say of the teacher: exact success, distance, and the share of state visits that is listed."""
    assert config.teacher is not None
    about: dict[str, Any] = {"section": dict(config.teacher), "success": teacher_success(teacher, world)}
    if objectives:
        visits = sum(item.visits for item in objectives) / len(objectives)
        about |= {
            "divergence": sum(item.divergence for item in objectives) / len(objectives),
            "covered": visits / max(teacher.length, 1e-12),
            "states": sum(len(span) for span in teacher.states.spans) if teacher.states is not None else 0,
        }
    return about


def teacher_success(teacher: BenchTeacher, world: World) -> float | None:
    """Mean exact success of the teacher under its own prompt; None where it gives sampled tokens only."""
    if teacher.states is None or not isinstance(teacher.teacher, LocalTeacher):
        return None
    trie = world.credit.trie
    seen = torch.ones(len(world.prompts), 1, dtype=torch.bool, device=world.device)
    with teacher.teacher.opened(world.prompts, seen, list(teacher.rows), world.model) as (model, prompts):
        logprobs = score_trie(model, prompts, trie).logprobs
    reached = trie.paths[:, 1:]
    whole = torch.where(reached >= 0, logprobs[reached.clamp_min(0)], 0.0).sum(1).exp()
    return float(logprobs.new_zeros(len(world.prompts)).index_add(0, trie.owners, whole).mean())
