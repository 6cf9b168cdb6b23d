"""Gradients of the pipelines, a few at a time: inner products and the success after a step, then they are dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.world import Sampled, World
from tokencredit.collect.exact import ExactCredit
from tokencredit.collect.exact_gradient import advantage_weights, exact_weights, score_gradients, trainable
from tokencredit.collect.exact_score import trie_scorer
from tokencredit.collect.exact_trie import build_trie

TARGETS = ("success", "standardized")  # ∇ Σ V(x), and Σ ∇V(x) / √(V(x)(1 − V(x))), which GRPO aims at


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """Exact gradients by target and unit, their inner products, and what a step is measured with."""

    gradients: Float[Tensor, "target unit parameter"]
    grams: Float[np.ndarray, "target unit unit"]
    units: Int[np.ndarray, " prompt"]
    step: float
    success_after: Callable[[Float[Tensor, " parameter"]], Float[np.ndarray, " probe"]]
    probes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """What is kept of a few pipelines: inner products, and V of the probe prompts after a step along replicate 0."""

    own: Float[np.ndarray, "pipeline replicate replicate unit unit"]
    cross: Float[np.ndarray, "pipeline target replicate unit unit"]
    after: Float[np.ndarray, "pipeline probe"]


def unit_of_prompts(prompts: int, blocks: int) -> Int[np.ndarray, " prompt"]:
    """The bootstrap unit of each prompt: itself, or one of `blocks` stretches of like length."""
    return np.arange(prompts) * min(blocks, prompts) // prompts


def pipelines_at_once(world: World, config: BenchConfig, units: int) -> int:
    """How many pipelines' gradients fit in the memory that the config allows."""
    parameters = trainable(world.model)
    size = sum(item.numel() for item in parameters) * parameters[0].element_size()
    return max(1, config.memory_mib * 2**20 // (size * units * (config.replicates + 1)))


def exact_target(world: World, config: BenchConfig, advance: Callable[[], None]) -> Target:
    """Exact gradients of every prompt, one backward each."""
    credit = listed(world)
    units = unit_of_prompts(len(world.prompts), config.blocks)
    size = sum(item.numel() for item in trainable(world.model))
    gradients = torch.zeros(len(TARGETS), int(units.max()) + 1, size, dtype=trainable(world.model)[0].dtype)
    weights = exact_weights(credit.trie, credit.nodes)
    for prompt, ids in enumerate(world.prompts):
        span = credit.trie.spans[prompt]
        if len(span):
            value = float(credit.prompt_values[prompt])
            found = score_gradients(world.model, ids, credit.trie, prompt, weights[None, span.start : span.stop])[0]
            gradients[0, units[prompt]] += found
            gradients[1, units[prompt]] += found / max(value * (1.0 - value), 1e-12) ** 0.5
        advance()
    total = gradients[0].sum(0)
    success_after, probes = _probe(world, config)
    return Target(
        gradients=gradients,
        grams=np.stack([_gram(item, item) for item in gradients]),
        units=units,
        # First order: moving by `step` along ∇ΣV / ‖·‖ raises ΣV by step · ‖∇ΣV‖.
        step=config.gain * len(world.prompts) / max(float(total.norm()), 1e-12),
        success_after=success_after,
        probes=probes,
    )


def listed(world: World) -> ExactCredit:
    """The exact credit of a world that has it."""
    assert world.credit is not None
    return world.credit


def _probe(
    world: World, config: BenchConfig
) -> tuple[Callable[[Float[Tensor, " parameter"]], Float[np.ndarray, " probe"]], int]:
    """A function from a shift of the weights to V of the first prompts, as many as `progress_nodes` allows."""
    trie = listed(world).trie
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

    return success_after, probes


def measure(
    world: World,
    samples: Sequence[Sampled],
    advantages: Sequence[Sequence[Float[Tensor, "batch response"]]],
    target: Target,
    advance: Callable[[], None],
) -> Measured:
    """Inner products and steps of a few pipelines; `advantages[k][m]` is pipeline m on replicate k."""
    pipelines, units = len(advantages[0]), target.gradients.shape[1]
    shape = (pipelines, len(samples), units, target.gradients.shape[2])
    gradients = torch.zeros(shape, dtype=target.gradients.dtype)
    for k, sampled in enumerate(samples):
        for prompt, ids in enumerate(world.prompts):
            weights = advantage_weights(sampled.trie, advantages[k], prompt)
            gradients[:, k, target.units[prompt]] += score_gradients(world.model, ids, sampled.trie, prompt, weights)
            advance()
    after = []
    for m in range(pipelines):
        direction = gradients[m, 0].sum(0)
        norm = float(direction.norm())
        after.append(target.success_after(direction * (target.step / norm if norm > 0 else 0.0)))
    return Measured(
        own=np.stack([[[_gram(a, b) for b in item] for a in item] for item in gradients]),
        cross=np.stack([[[_gram(a, e) for a in item] for e in target.gradients] for item in gradients]),
        after=np.stack(after),
    )


def _gram(a: Float[Tensor, "unit parameter"], b: Float[Tensor, "unit parameter"]) -> Float[np.ndarray, "unit unit"]:
    return (a @ b.T).double().numpy()
