"""The teacher's objective on the states that a policy reaches, and its exact gradient by autograd.

    J = KL(π(·|x) ‖ ρ(·|x)) = E_{y∼π} Σ_t [ln π(y_t|s_t) − ln ρ(y_t|s_t)] = Σ_s P(s) KL(π(·|s) ‖ ρ(·|s))

π is the policy, ρ the teacher, y a whole response, P(s) = Π_k π(y_k|s_k) the probability that the policy passes the
prefix s. The sum runs over the states of a trie: it is J itself where the trie holds all of them.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.exact.gradient import trainable
from tokencredit.collect.exact.score import TokenIds, parent_logprobs
from tokencredit.collect.exact.trie import Trie


class TeacherObjective(NamedTuple):
    """J of one prompt and its gradients, nats.

    * `gradients[0]`, local: Σ_s P(s) ∇KL(s), what is left when a state is not held to account for what follows it.
      E[A ∇ln π] of OPD is its negative.
    * `gradients[1]`, sequence: ∇J = local + Σ_s KL(s) ∇P(s) = local + E Σ_t ∇ln π(y_t|s_t) Σ_{k>t} KL(s_k).
    * `divergence`: J. `visits`: Σ_s P(s), which is the expected length where the trie holds all states.
    """

    gradients: Float[Tensor, "2 parameter"]
    divergence: float
    visits: float


def teacher_objective(
    model: Any,
    prompt_ids: TokenIds,
    teacher: Any,
    teacher_prompt_ids: TokenIds,
    trie: Trie,
    prompt: int,
    *,
    temperature: float = 1.0,
) -> TeacherObjective:
    """J and its gradients over the inner nodes of one prompt's trie: a forward of each model, two backwards of one.

    Both models are read over the whole vocabulary, [node, vocab]. The teacher's weights are constants, also where it
    is the policy under another prompt. A trie without a node has J = 0.
    """
    parameters = trainable(model)
    span = trie.spans[prompt]
    if len(span) == 0:
        return TeacherObjective(parameters[0].new_zeros(2, sum(item.numel() for item in parameters)), 0.0, 0.0)
    own = parent_logprobs(model, prompt_ids, trie, prompt, temperature=temperature)
    with torch.no_grad():
        other = parent_logprobs(teacher, teacher_prompt_ids, trie, prompt, temperature=temperature).to(own)
    device = own.device
    token = trie.token[span.start : span.stop].to(device)
    passed = _log_reach(trie, prompt, own.gather(-1, token[:, None]).squeeze(-1).double())
    parents, place = trie.parent[span.start : span.stop].to(device).unique(return_inverse=True)
    order = torch.arange(len(span), device=device)
    first = torch.full_like(parents, len(span)).scatter_reduce(0, place, order, "amin")
    divergence = (own[first].exp() * (own[first] - other[first])).sum(-1).double()  # one row a state
    at_root = parents == prompt
    probability = torch.where(at_root, 1.0, passed[(parents - span.start).clamp_min(0)].exp())
    local, whole = (probability.detach() * divergence).sum(), (probability * divergence).sum()
    rows = [_gradient(item, parameters, keep) for item, keep in ((local, True), (whole, False))]
    return TeacherObjective(torch.stack(rows), whole.item(), probability.sum().item())


def _log_reach(trie: Trie, prompt: int, logprobs: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """ln P of the nodes of one prompt, roots left out, with gradient."""
    span = trie.spans[prompt]
    parent, depth = (item[span.start : span.stop].to(logprobs.device) for item in (trie.parent, trie.depth))
    total = logprobs
    for level in range(2, int(depth.max()) + 1):
        at = (depth == level).nonzero()[:, 0]
        total = total.index_add(0, at, total[parent[at] - span.start])
    return total


def _gradient(value: Tensor, parameters: list[Tensor], keep: bool) -> Float[Tensor, " parameter"]:
    parts = torch.autograd.grad(value, parameters, retain_graph=keep, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])
