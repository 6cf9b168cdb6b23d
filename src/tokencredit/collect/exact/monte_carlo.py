"""Values by continuation: where accepted responses cannot be listed, sample from each prefix and count.

    V̂(s) = (1/n) Σ_j r(s · y_j),    y_j ~ π(· | s)

Prefixes that several responses share are continued once. The plug-in estimate of information from V̂ is biased upwards
by up to 1/(2n) nats a token, so no information is offered here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.exact.trie import TokenIds, build_trie
from tokencredit.collect.generate import generate_ids
from tokencredit.errors import TokenCreditError

# sample(contexts, limits, each): for every context, `each` continuations of at most so many tokens, EOS included.
Sampler = Callable[[Sequence[TokenIds], Sequence[int], int], list[list[list[int]]]]
# reward(prompt, response): the outcome of a whole response (token ids, EOS included where it ended) to a prompt.
Outcome = Callable[[int, TokenIds], float]


class MonteCarloValues(NamedTuple):
    """V̂ of the prefix before each token and its standard error, 0 outside the mask; what it took to find them.

    The standard error is that of a mean of 0/1 outcomes at the posterior mean (k + 1)/(n + 2), so that it is not 0
    where all outcomes agree.
    """

    values: Float[Tensor, "batch response"]
    errors: Float[Tensor, "batch response"]
    prefixes: int
    tokens: int


def monte_carlo_values(
    sample: Sampler,
    outcome: Outcome,
    prompts: Sequence[TokenIds],
    owners: Int[Tensor, " batch"],
    response_ids: Int[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    samples: int = 64,
    max_response: int,
) -> MonteCarloValues:
    """Values of every prefix of the given responses, from `samples` continuations each.

    Row i answers `prompts[owners[i]]`. `max_response` limits a response, its continuation and EOS included.
    """
    if samples < 1:
        raise TokenCreditError(f"`samples` must be at least 1, got {samples}")
    texts: list[list[list[int]]] = [[] for _ in prompts]
    for owner, ids, mask in zip(owners.tolist(), response_ids, response_mask, strict=True):
        texts[owner].append(ids[mask].tolist())
    trie = build_trie(texts)
    order = torch.argsort(owners, stable=True)  # the trie lists responses prompt by prompt
    states = trie.paths[:, :-1][trie.paths[:, 1:] >= 0].unique().tolist()
    asked = [prompt for prompt, _ in (_prefix(trie, state) for state in states)]
    given = [ids for _, ids in (_prefix(trie, state) for state in states)]
    contexts = [[*prompts[prompt], *ids] for prompt, ids in zip(asked, given, strict=True)]
    drawn = sample(contexts, [max_response - len(ids) for ids in given], samples)
    successes = torch.zeros(trie.parent.numel(), dtype=torch.float64)
    for state, prompt, ids, continuations in zip(states, asked, given, drawn, strict=True):
        successes[state] = sum(outcome(prompt, [*ids, *item]) for item in continuations)
    smoothed = (successes + 1.0) / (samples + 2.0)
    errors = (smoothed * (1.0 - smoothed) / samples).sqrt()
    at = torch.full((len(order), response_ids.shape[1]), -1)
    for row, path in zip(order.tolist(), trie.paths, strict=True):
        at[row][response_mask[row]] = path[:-1][path[1:] >= 0]
    known = at >= 0
    return MonteCarloValues(
        values=torch.where(known, successes[at.clamp_min(0)] / samples, 0.0),
        errors=torch.where(known, errors[at.clamp_min(0)], 0.0),
        prefixes=len(states),
        tokens=sum(len(item) for continuations in drawn for item in continuations),
    )


def _prefix(trie: Any, node: int) -> tuple[int, list[int]]:
    """The prompt of a node and the tokens that lead to it."""
    ids: list[int] = []
    while node >= trie.prompts:
        ids.append(int(trie.token[node]))
        node = int(trie.parent[node])
    return node, ids[::-1]


def generating(model: Any, *, eos_token_id: int, seed: int, batch: int = 256, temperature: float = 1.0) -> Sampler:
    """A `Sampler` through Hugging Face `generate`; torch's global generators are left as they were, on GPUs too."""

    def sample(contexts: Sequence[TokenIds], limits: Sequence[int], each: int) -> list[list[list[int]]]:
        continuations: list[list[list[int]]] = []
        devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # `manual_seed` seeds them all
        step = max(1, batch // each)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(contexts), step):
                some, longest = contexts[start : start + step], limits[start : start + step]
                rows = generate_ids(
                    model,
                    some,
                    max_new_tokens=max(longest),
                    ends=[eos_token_id],
                    samples=each,
                    temperature=temperature,
                )
                # What is cut off has no EOS: it failed.
                continuations += [
                    [row[:limit] for row in rows[index * each : (index + 1) * each]]
                    for index, limit in enumerate(longest)
                ]
        return continuations

    return sample
