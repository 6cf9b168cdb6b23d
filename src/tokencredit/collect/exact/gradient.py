"""Gradients of many methods from one forward, and the exact gradient of the success probability.

Everything is a weighted sum of score functions over the nodes of a trie, g = Σ_n w_n ∇ ln π(token_n | parent_n):

* a method's estimate: w_n = Σ of its advantages at the tokens of the responses that pass node n here
* the exact gradient ∇V(x): w_n = P(reach n) · V(n) on the trie of accepted responses, as
  ∇ Σ_c π(c) = Σ_c π(c) Σ_k ∇ ln π(c_k)
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.exact.score import TokenIds, node_logprobs
from tokencredit.collect.exact.trie import NodeValues, Trie, reach

RANK_TOLERANCE = 1e-6  # relative to the largest of the normalised methods; far below what a cosine shows


def score_gradients(
    model: Any,
    prompt_ids: TokenIds,
    trie: Trie,
    prompt: int,
    weights: Float[Tensor, "method node"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "method parameter"]:
    """g_m = Σ_n w_mn ∇ ln π(token_n | parent_n) over the nodes of one prompt, for all methods at once.

    Parameters without gradient are left out; a tied parameter counts once.
    """
    coordinates, basis = span_of(weights)
    parts = basis_gradients(model, prompt_ids, trie, prompt, basis, temperature=temperature)
    return torch.cat([coordinates.to(part) @ part for part in parts], dim=1)


def basis_gradients(
    model: Any,
    prompt_ids: TokenIds,
    trie: Trie,
    prompt: int,
    basis: Float[Tensor, "rank node"],
    *,
    temperature: float = 1.0,
) -> list[Float[Tensor, "rank _"]]:
    """The score gradients of a few vectors of node weights: one forward, and one backward batched over the vectors.

    One tensor for each parameter, flattened: side by side they are large, and nobody needs them so.
    """
    parameters = trainable(model)
    if len(basis) == 0:
        return [parameter.new_zeros(0, parameter.numel()) for parameter in parameters]
    logprobs = node_logprobs(model, prompt_ids, trie, prompt, temperature=temperature)
    parts = torch.autograd.grad(
        logprobs,
        parameters,
        grad_outputs=basis.to(logprobs),
        is_grads_batched=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return [part.reshape(len(basis), -1) for part in parts]


def span_of(
    weights: Float[Tensor, "method node"],
) -> tuple[Float[Tensor, "method rank"], Float[Tensor, "rank node"]]:
    """`coordinates @ basis` = `weights`, with as few rows in the basis as the methods span, in float64.

    Methods that are linear combinations of others (the quadrants and their sum, GRPO and RLOO) then cost no backward.
    """
    norms = weights.double().norm(dim=1, keepdim=True)
    u, s, vh = torch.linalg.svd(weights.double() / torch.where(norms > 0, norms, 1.0), full_matrices=False)
    rank = int((s > RANK_TOLERANCE * s.amax().clamp_min(torch.finfo(s.dtype).tiny)).sum()) if s.numel() else 0
    return norms * u[:, :rank] * s[:rank], vh[:rank]


def exact_weights(trie: Trie, nodes: NodeValues) -> Float[Tensor, " node"]:
    """The node weights whose score gradient is Σ ∇V over the prompts: P(reach n) · V(n)."""
    return (reach(trie, nodes.token_logprobs) + nodes.log_values).exp()


def advantage_weights(
    trie: Trie, advantages: Sequence[Float[Tensor, "row response"]], prompt: int
) -> Float[Tensor, "method node"]:
    """The node weights of several methods' advantages on the responses that the trie was built from.

    Row c of each tensor belongs to `trie.paths[c]`, its tokens on the left without holes.
    """
    span = trie.spans[prompt]
    first, behind = torch.searchsorted(trie.owners, torch.tensor([prompt, prompt + 1])).tolist()
    rows = torch.arange(first, behind)
    reached = trie.paths[rows, 1:]
    inside = reached >= 0
    index = reached[inside] - span.start
    given = torch.stack([item[rows, : reached.shape[1]][inside].double() for item in advantages])
    return given.new_zeros(len(advantages), len(span)).index_add(1, index, given)


def trainable(model: Any) -> list[Tensor]:
    """Parameters that take part, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
