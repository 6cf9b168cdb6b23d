"""Gradients of the pipelines: sums over the batch exactly, units by random projection, and the success after a step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.memory import AHEAD, Plan
from tokencredit.bench.problem import World
from tokencredit.bench.sampling import Sampled
from tokencredit.bench.teacher import BenchTeacher, objective_of
from tokencredit.collect.exact.gradient import (
    advantage_weights,
    basis_gradients,
    exact_weights,
    score_gradients,
    span_of,
    trainable,
)
from tokencredit.collect.exact.score import trie_scorer
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.teacher.objective import TeacherObjective
from tokencredit.seeds import generator

# ∇ Σ V(x), and Σ ∇V(x) / √(V(x)(1 − V(x))), which GRPO aims at.
TARGETS = ("success", "standardized")
# Minus the gradients of Σ KL(π(·|x) ‖ ρ(·|x)), the teacher's objective: state by state, and of whole responses.
TEACHER_TARGETS = ("teacher", "teacher_sequence")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """Exact gradients: their sum by target, the sketches of their units, and what a step is measured with.

    `names` are those of the targets: `TARGETS`, and `TEACHER_TARGETS` where there is a teacher whose `objectives` are
    known. `grams` are inner products of the units, from sketches; `squares` are ‖e‖² of the sums, exactly.
    """

    total: Float[Tensor, "target parameter"]
    sketches: Float[Tensor, "target unit sketch"]
    units: Int[np.ndarray, " prompt"]
    signs: Float[Tensor, " parameter"]
    step: float
    success_after: Callable[[Float[Tensor, " parameter"]], Float[np.ndarray, " probe"]]

    grams: Float[np.ndarray, "target unit unit"]
    squares: Float[np.ndarray, " target"]
    names: tuple[str, ...] = TARGETS
    objectives: list[TeacherObjective] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """What is kept of a few pipelines: inner products, and V of the probe prompts after a step along replicate 0.

    `own` and `cross` are those of units, from sketches; `own_total` and `cross_total` those of the sums, exactly.
    """

    own: Float[np.ndarray, "pipeline replicate replicate unit unit"]
    cross: Float[np.ndarray, "pipeline target replicate unit unit"]
    own_total: Float[np.ndarray, "pipeline replicate replicate"]
    cross_total: Float[np.ndarray, "pipeline target replicate"]
    after: Float[np.ndarray, "pipeline probe"]


def unit_of_prompts(prompts: int, blocks: int) -> Int[np.ndarray, " prompt"]:
    """The bootstrap unit of each prompt: itself, or one of `blocks` stretches of like length."""
    return np.arange(prompts) * min(blocks, prompts) // prompts


def sketched(
    parts: Sequence[Float[Tensor, "row _"]], signs: Float[Tensor, " parameter"], size: int
) -> Float[Tensor, "row sketch"]:
    """A random projection that keeps inner products up to ‖a‖‖b‖/√size, without bias.

        s_j = Σ_{i ≡ j mod size} σ_i g_i,    σ_i = ±1 at random

    `parts` are the gradients cut into columns. They are returned as they are where they have no more entries than that.
    """
    if len(signs) <= size:
        return torch.cat(list(parts), dim=1)
    sketch = parts[0].new_zeros(len(parts[0]), size)
    at = 0
    for part in parts:
        signed = part * signs[at : at + part.shape[1]]
        for first, behind in _folds(at, part.shape[1], size):
            place, piece = (at + first) % size, signed[:, first:behind]
            if piece.shape[1] > size:  # whole rounds
                sketch += piece.unflatten(1, (-1, size)).sum(1)
            else:
                sketch[:, place : place + piece.shape[1]] += piece
        at += part.shape[1]
    return sketch


def _folds(start: int, length: int, size: int) -> list[tuple[int, int]]:
    """Up to the first multiple of `size`, all whole rounds, and the rest: the pieces that stay in order mod `size`."""
    head = min(-start % size, length)
    rounds = head + (length - head) // size * size
    cuts = [0, head, rounds, length]
    return [(first, behind) for first, behind in pairwise(cuts) if behind > first]


def target_names(teacher: BenchTeacher | None) -> tuple[str, ...]:
    """The exact gradients that methods are compared with."""
    return TARGETS if teacher is None or teacher.states is None else TARGETS + TEACHER_TARGETS


def exact_target(
    world: World, config: BenchConfig, advance: Callable[[], None], teacher: BenchTeacher | None = None
) -> Target:
    """Exact gradients of every prompt: one backward each, and two for a teacher's objective."""
    units = unit_of_prompts(len(world.prompts), config.blocks)
    like = trainable(world.model)[0]
    size = sum(item.numel() for item in trainable(world.model))
    signs = torch.randint(0, 2, (size,), generator=generator("sketch", config.seed)).to(like) * 2 - 1
    names = target_names(teacher)
    total = like.new_zeros(len(names), size)
    sketches = like.new_zeros(len(names), int(units.max()) + 1, min(config.sketch, size))
    weights = exact_weights(world.credit.trie, world.credit.nodes)
    objectives: list[TeacherObjective] = []
    for prompt in range(len(world.prompts)):
        rows = _success_rows(world, weights, prompt)
        if teacher is not None and teacher.states is not None:
            objective = objective_of(teacher, world, prompt)
            rows = torch.cat((rows, -objective.gradients.to(rows)))
            objectives.append(objective._replace(gradients=rows[:0]))
        total += rows
        sketches[:, units[prompt]] += sketched([rows], signs, config.sketch)
        advance()
    return Target(
        total=total.detach(),
        sketches=sketches,
        units=units,
        signs=signs,
        # First order: moving by `step` along ∇ΣV / ‖·‖ raises ΣV by step · ‖∇ΣV‖.
        step=config.gain * len(world.prompts) / max(float(total[0].norm()), 1e-12),
        success_after=_probe(world, config),
        grams=np.stack([_inner(item, item) for item in sketches]),
        squares=total.double().square().sum(1).cpu().numpy(),
        names=names,
        objectives=objectives,
    )


def _success_rows(world: World, weights: Float[Tensor, " node"], prompt: int) -> Float[Tensor, "2 parameter"]:
    """∇V of one prompt as it is, and divided by √(V(1 − V)); zeros where nothing is accepted."""
    credit, span = world.credit, world.credit.trie.spans[prompt]
    like = trainable(world.model)
    if not len(span):
        return like[0].new_zeros(len(TARGETS), sum(item.numel() for item in like))
    value = float(credit.prompt_values[prompt])
    gradient = score_gradients(
        world.model, world.prompts[prompt], credit.trie, prompt, weights[None, span.start : span.stop]
    )
    return gradient.detach() * torch.tensor([[1.0], [max(value * (1.0 - value), 1e-12) ** -0.5]]).to(gradient)


def _probe(world: World, config: BenchConfig) -> Callable[[Float[Tensor, " parameter"]], Float[np.ndarray, " probe"]]:
    """A function from a shift of the weights to V of the first prompts, as many as `progress_nodes` allows."""
    trie = world.credit.trie
    sizes = np.cumsum([len(ids) + len(span) for ids, span in zip(world.prompts, trie.spans, strict=True)])
    probes = max(1, int((sizes <= config.progress_nodes).sum()))
    accepted: list[list[list[int]]] = [[] for _ in range(probes)]
    for owner, path in zip(trie.owners.tolist(), trie.paths.tolist(), strict=True):
        if owner < probes:
            accepted[owner].append(trie.token[[node for node in path[1:] if node >= 0]].tolist())
    small = build_trie(accepted)
    score = trie_scorer(world.model, world.prompts[:probes], small)
    reached = small.paths[:, 1:]

    @torch.no_grad()
    def success_after(shift: Float[Tensor, " parameter"]) -> Float[np.ndarray, " probe"]:
        parameters = trainable(world.model)
        before = [parameter.clone() for parameter in parameters]
        pieces = shift.split([parameter.numel() for parameter in parameters])
        try:
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.add_(piece.view_as(parameter))
            logprobs = score().logprobs
        finally:
            for parameter, saved in zip(parameters, before, strict=True):
                parameter.copy_(saved)
        whole = torch.where(reached >= 0, logprobs[reached.clamp_min(0)], 0.0).sum(1).exp()
        return logprobs.new_zeros(probes).index_add(0, small.owners, whole).numpy()

    return success_after


def measure(
    samples: Sequence[Sampled],
    advantages: Sequence[Sequence[Float[Tensor, "batch response"]]],
    target: Target,
    plan: Plan,
    advance: Callable[[], None],
) -> Measured:
    """Inner products and steps of a few pipelines; `advantages[k][m]` is pipeline m on replicate k."""
    distinct, place = _distinct(advantages)
    advantages = [[item[m] for m in distinct] for item in advantages]
    world = samples[0].world
    total = target.total.new_zeros(len(samples), len(distinct), target.total.shape[1])
    sketches = target.sketches.new_zeros(len(distinct), len(samples), *target.sketches.shape[1:])

    def differentiate(slice_: _Slice) -> tuple[_Slice, list[Tensor], Tensor]:
        trie, prompt = samples[slice_.replicate].trie, slice_.prompt
        parts = basis_gradients(world.model, world.prompts[prompt], trie, prompt, slice_.basis)
        return slice_, parts, sketched(parts, target.signs, target.sketches.shape[2])

    for slice_, parts, sketch in _ahead(differentiate, _slices(samples, advantages, plan.vectors)):
        coordinates = slice_.coordinates.to(total)
        columns = total[slice_.replicate].split([part.shape[1] for part in parts], dim=1)
        for column, part in zip(columns, parts, strict=True):
            column.addmm_(coordinates, part)
        sketches[:, slice_.replicate, target.units[slice_.prompt]] += coordinates @ sketch
        if slice_.is_last:
            advance()
    measured = Measured(
        own=np.stack([[[_inner(a, b) for b in item] for a in item] for item in sketches]),
        cross=np.stack([[[_inner(a, e) for a in item] for e in target.sketches] for item in sketches]),
        own_total=np.stack([_inner(item, item) for item in total.unbind(1)]),
        cross_total=np.stack([_inner(target.total, item) for item in total.unbind(1)]),
        after=_after_steps(total[0], target),
    )
    return Measured(**{item.name: getattr(measured, item.name)[place] for item in fields(Measured)})


class _Slice(NamedTuple):
    """Vectors of node weights on one prompt; Σ `coordinates @ basis` over the slices are the pipelines' weights."""

    replicate: int
    prompt: int
    coordinates: Float[Tensor, "pipeline rank"]
    basis: Float[Tensor, "rank node"]
    is_last: bool


def _slices(
    samples: Sequence[Sampled], advantages: Sequence[Sequence[Float[Tensor, "batch response"]]], vectors: int
) -> Iterator[_Slice]:
    """The work of `measure` in its order, at most so many vectors at a time."""
    for replicate, (sampled, given) in enumerate(zip(samples, advantages, strict=True)):
        for prompt in range(sampled.trie.prompts):
            coordinates, basis = span_of(advantage_weights(sampled.trie, given, prompt))
            last = max(len(basis) - 1, 0) // vectors
            for number in range(last + 1):
                rows = slice(number * vectors, (number + 1) * vectors)
                yield _Slice(replicate, prompt, coordinates[:, rows], basis[rows], number == last)


def _ahead(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield `work(item)` for all items in order; the next ones are computed while the caller adds up the last.

    Torch frees the interpreter while it computes. Sums are taken in order, so they do not depend on the timing.
    """
    left = iter(items)
    with ThreadPoolExecutor(AHEAD, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        waiting = deque(pool.submit(work, item) for item in islice(left, AHEAD))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(left, 1))
            yield result


def _distinct(advantages: Sequence[Sequence[Float[Tensor, "batch response"]]]) -> tuple[list[int], list[int]]:
    """The pipelines that differ from all before them, and for each pipeline the place of its equal among those.

    On the policy that sampled, several methods coincide: ratios are 1, and some transforms keep the mass.
    """
    distinct: list[int] = []
    place: list[int] = []
    for m in range(len(advantages[0])):
        twin = (at for at, n in enumerate(distinct) if all(torch.equal(item[m], item[n]) for item in advantages))
        place.append(next(twin, len(distinct)))
        if place[-1] == len(distinct):
            distinct.append(m)
    return distinct, place


def _after_steps(total: Float[Tensor, "pipeline parameter"], target: Target) -> Float[np.ndarray, "pipeline probe"]:
    """V of the probe prompts after a step of the common length along each gradient; where it is 0, without a step."""
    norms = total.norm(dim=1)
    steps = torch.where(norms > 0, target.step / torch.where(norms > 0, norms, 1.0), 0.0)
    return np.stack([target.success_after(direction * step) for direction, step in zip(total, steps, strict=True)])


def _inner(a: Float[Tensor, "unit number"], b: Float[Tensor, "other number"]) -> Float[np.ndarray, "unit other"]:
    return (a @ b.T).double().cpu().numpy()
