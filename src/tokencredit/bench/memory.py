"""How many pipelines are measured at a time, and how many vectors one backward pass takes, within a bound on memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.sampling import Sampled
from tokencredit.collect.exact.gradient import trainable
from tokencredit.collect.exact.score import node_logprobs
from tokencredit.errors import TokenCreditError

AHEAD = 2  # prompts whose gradients are computed at a time


class Plan(NamedTuple):
    """Pipelines measured at a time, and vectors of node weights in one backward pass."""

    pipelines: int
    vectors: int


def plan_memory(config: BenchConfig, samples: Sequence[Sampled], pipelines: int, targets: int) -> Plan:
    """Choose the largest plan that `memory_mib` has room for.

    Counted are, in numbers of the size of all P trainable parameters, of S numbers of a sketch, of U units and R
    replicates, and of A numbers that a forward pass keeps for its backward:

    * always: the sums and sketches of the targets, the signs of the sketches, one row more for each target while the
      exact gradients are computed, and A for each prompt that is computed ahead
    * for each pipeline: its sums and sketches, R (P + U S)
    * for each vector: its gradient in each prompt that is waited for, computed or added up, and while it is computed
      P + A more

    Raises:
      TokenCreditError: there is no room for one pipeline and one vector; the error says how much that takes.
    """
    parameters = trainable(samples[0].world.model)
    size, item = sum(parameter.numel() for parameter in parameters), parameters[0].element_size()
    sketch = min(config.sketch, size) * min(config.blocks, config.prompts)
    activations = _saved_numbers(samples)
    always = targets * (2 * size + sketch) + size + AHEAD * activations
    each = len(samples) * (size + sketch)
    vector = (AHEAD + 1) * size + AHEAD * (size + activations)
    room = config.memory_mib * 2**20 // item - always
    if room < each + vector:
        needed = -(-(always + each + vector) * item // 2**20)
        raise TokenCreditError(
            f"`memory_mib` is {config.memory_mib}, and the gradients of one pipeline take {needed} MiB",
            hint=f"--set memory_mib={needed}, or a model with an adapter, whose parameters alone are then counted",
        )
    if room >= pipelines * each + vector:
        return Plan(pipelines, (room - pipelines * each) // vector)
    vectors = max(1, room // 2 // vector)
    return Plan(max(1, (room - vectors * vector) // each), vectors)


def _saved_numbers(samples: Sequence[Sampled]) -> int:
    """Numbers that the forward pass of the largest prompt keeps for its backward, parameters left out."""
    world = samples[0].world
    places = [(sampled, prompt) for sampled in samples for prompt in range(sampled.trie.prompts)]
    sampled, prompt = max(places, key=lambda place: len(world.prompts[place[1]]) + len(place[0].trie.spans[place[1]]))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in world.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        node_logprobs(world.model, world.prompts[prompt], sampled.trie, prompt)
    return sum(saved.values()) // next(world.model.parameters()).element_size()
