"""Tries of responses, and the dynamic programme that values every prefix of the accepted ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.errors import TokenCreditError
from tokencredit.methods.exact import bernoulli_divergence

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trie:
    """All prefixes of the given responses to several prompts, as nodes, parents first.

    Node p is the root (the empty prefix) of prompt p; the other nodes of prompt p are the range `spans[p]`.

    * `paths`: the nodes that response c passes, root first; −1 behind its end.
    * `owners`: the prompt of response c, ascending.
    * `parent`, `token`: the node before, and the token that leads here; −1 at roots.
    * `depth`: length of the prefix. `children`: from token to node, for every node.
    """

    paths: Int[Tensor, "row length"]
    owners: Int[Tensor, " row"]
    parent: Int[Tensor, " node"]
    token: Int[Tensor, " node"]
    depth: Int[Tensor, " node"]
    children: list[dict[int, int]]
    spans: list[range]

    @property
    def prompts(self) -> int:
        """Number of prompts, and of roots."""
        return len(self.spans)

    @property
    def is_leaf(self) -> Tensor:
        """True where no response goes on, bool [node]."""
        return torch.tensor([not below for below in self.children])

    def walk(self, prompt: int, response_ids: TokenIds) -> list[int]:
        """The node of every prefix of a response, the empty one first; −1 from where it leaves the trie."""
        node, nodes = prompt, [prompt]
        for token in response_ids:
            node = self.children[node].get(token, -1) if node >= 0 else -1
            nodes.append(node)
        return nodes

    def ends_at_leaf(self, prompt: int, response_ids: TokenIds) -> bool:
        """Whether a response is, whole, one that the trie was built from and none goes on."""
        last = self.walk(prompt, response_ids)[-1]
        return last >= self.prompts and not self.children[last]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NodeValues:
    """What one forward over the accepted responses says about every node of their trie.

    * `log_values`: ln V, the log-probability that a response from here on is accepted; −inf at a prompt without any.
    * `token_logprobs`: ln π(token | parent), 0 at roots.
    * `entropies`: H of the policy at the node, nats; 0 at leaves, where nothing follows.
    * `information`: I(o; r | s), nats; 0 at leaves.
    """

    log_values: Float[Tensor, " node"]
    token_logprobs: Float[Tensor, " node"]
    entropies: Float[Tensor, " node"]
    information: Float[Tensor, " node"]

    @property
    def values(self) -> Float[Tensor, " node"]:
        """V of every node."""
        return self.log_values.exp()


def build_trie(responses: Sequence[Sequence[TokenIds]]) -> Trie:
    """The trie of `responses[p]`, the token ids of the responses to prompt p."""
    parent, token, depth = [-1] * len(responses), [-1] * len(responses), [0] * len(responses)
    children: list[dict[int, int]] = [{} for _ in responses]
    paths: list[list[int]] = []
    spans: list[range] = []
    for prompt, rows in enumerate(responses):
        first = len(children)
        for ids in rows:
            path = [prompt]
            for step, item in enumerate(ids):
                found = children[path[-1]].setdefault(item, len(children))
                if found == len(children):
                    children.append({})
                    parent.append(path[-1])
                    token.append(item)
                    depth.append(step + 1)
                path.append(found)
            paths.append(path)
        spans.append(range(first, len(children)))
    width = max(map(len, paths), default=1)
    owners = [prompt for prompt, rows in enumerate(responses) for _ in rows]
    return Trie(
        paths=torch.tensor([path + [-1] * (width - len(path)) for path in paths], dtype=torch.long).view(-1, width),
        owners=torch.tensor(owners, dtype=torch.long),
        parent=torch.tensor(parent, dtype=torch.long),
        token=torch.tensor(token, dtype=torch.long),
        depth=torch.tensor(depth, dtype=torch.long),
        children=children,
        spans=spans,
    )


def check_accepted(
    accepted: Sequence[Sequence[TokenIds]], eos_token_id: int, show: Callable[[TokenIds], str] = str
) -> None:
    """Refuse a list in which a response occurs twice, does not end in EOS, or has EOS inside.

    The probability of such a list is not the sum over its members. `show` turns ids into text for the error.
    """
    for prompt, responses in enumerate(accepted):
        seen = set()
        for ids in responses:
            if len(ids) == 0 or ids[-1] != eos_token_id or eos_token_id in ids[:-1]:
                raise TokenCreditError(
                    f"an accepted response ends in EOS (id {eos_token_id}) and nowhere else, got {show(ids)!r} "
                    f"for prompt {prompt}",
                    hint="append the tokenizer's `eos_token_id` to each response",
                )
            if tuple(ids) in seen:
                raise TokenCreditError(f"accepted response {show(ids)!r} of prompt {prompt} is listed twice")
            seen.add(tuple(ids))


def value_nodes(
    trie: Trie,
    token_logprobs: Float[Tensor, " node"],
    entropies: Float[Tensor, " node"],
    accepted: Bool[Tensor, " row"] | None = None,
) -> NodeValues:
    """Values of all nodes of the accepted responses' trie.

    V(s) = Σ_{c through s} exp Σ_{k ≥ |s|} ln π(c_k | x, c_<k)          by log-sum-exp over the responses through s

    `accepted` says which rows of the trie are accepted responses; None: all.
    """
    paths = trie.paths if accepted is None else trie.paths[accepted]
    reached = paths[:, 1:]  # [row, length − 1]
    own = torch.where(reached >= 0, token_logprobs[reached.clamp_min(0)], 0.0)
    # Σ_{k ≥ d} ln π for d = 0 … length; 0 behind the last token.
    tails = torch.cat((own.flip(1).cumsum(1).flip(1), own.new_zeros(len(own), 1)), dim=1)
    through = paths >= 0
    log_values = _log_sum_exp(tails[through], paths[through], trie.parent.numel())
    leaf = trie.is_leaf
    return NodeValues(
        log_values=log_values,
        token_logprobs=token_logprobs,
        entropies=torch.where(leaf, 0.0, entropies),
        information=torch.where(leaf, 0.0, _information(trie, log_values.exp().clamp_max(1.0), token_logprobs.exp())),
    )


def reach(trie: Trie, token_logprobs: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """ln of the probability that the policy passes each node, from its root."""
    total = torch.zeros_like(token_logprobs)
    for depth in range(1, int(trie.depth.max()) + 1 if trie.depth.numel() else 0):
        at = (trie.depth == depth).nonzero().squeeze(1)
        total[at] = total[trie.parent[at]] + token_logprobs[at]
    return total


def _log_sum_exp(x: Float[Tensor, " item"], index: Int[Tensor, " item"], size: int) -> Float[Tensor, " node"]:
    largest = x.new_full((size,), -torch.inf).scatter_reduce(0, index, x, "amax")
    shift = torch.where(largest.isfinite(), largest, 0.0)
    return x.new_zeros(size).index_add(0, index, (x - shift[index]).exp()).log() + shift


def _information(trie: Trie, values: Float[Tensor, " node"], probs: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """`outcome_information` of every node over its children in the trie; what lies outside the trie has Q = 0."""
    below = torch.arange(trie.prompts, trie.parent.numel())  # every node but the roots
    above = trie.parent[below]
    zeros = torch.zeros_like(values)
    kept = zeros.index_add(0, above, probs[below] * bernoulli_divergence(values[below], values[above]))
    missing = (1.0 - zeros.index_add(0, above, probs[below])).clamp_min(0.0)
    return kept + missing * bernoulli_divergence(zeros, values)
