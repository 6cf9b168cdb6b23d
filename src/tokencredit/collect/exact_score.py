"""Log-probs and entropies at every node of a trie of responses, under any Hugging Face causal language model.

Each distinct prefix is computed once where the model can do it: the trie of a prompt becomes one row, in which a token
attends to its own ancestors alone (a 4-D attention mask, positions by depth). A model that gives other numbers that way
than on plain rows is scored on plain rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.exact_trie import TokenIds, Trie, build_trie
from tokencredit.errors import TokenCreditError

TILE_TOKENS = 4096  # tokens in one forward, padding included
TILE_LOGITS = 1 << 26  # logits in one forward, one row at least: 256 MiB in float32

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class NodeScores(NamedTuple):
    """ln π(token | parent), 0 at roots; H of the policy at the node, 0 at leaves."""

    logprobs: Float[Tensor, " node"]
    entropies: Float[Tensor, " node"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """The trie of one prompt as one row: the prompt, then every node that has a child.

    `state_at` is where the model's output stands for a node's parent, `node_at` where it stands for the node itself
    (−1 at leaves, whose output nobody needs); both over the nodes of the prompt, in order.
    """

    input_ids: Int[Tensor, " length"]
    position_ids: Int[Tensor, " length"]
    visible: Bool[Tensor, "length length"]
    state_at: Int[Tensor, " node"]
    node_at: Int[Tensor, " node"]


def pack(trie: Trie, prompt: int, prompt_ids: TokenIds) -> Packed:
    """The trie of one prompt as one row."""
    if len(prompt_ids) == 0:
        raise TokenCreditError(f"prompt {prompt} has no tokens", hint="give it at least a BOS token")
    span, start = trie.spans[prompt], len(prompt_ids)
    inner = [node for node in span if trie.children[node]]
    place = {node: start + index for index, node in enumerate(inner)} | {prompt: start - 1}
    parents = trie.parent[span.start : span.stop].tolist()
    visible = torch.ones(start + len(inner), start + len(inner), dtype=torch.bool).tril()
    for node in inner:
        at = place[node]
        visible[at] = visible[place[parents[node - span.start]]]
        visible[at, at] = True
    at_nodes = torch.tensor(inner, dtype=torch.long)
    return Packed(
        input_ids=torch.cat((torch.tensor(list(prompt_ids), dtype=torch.long), trie.token[at_nodes])),
        position_ids=torch.cat((torch.arange(start), start - 1 + trie.depth[at_nodes])),
        visible=visible,
        state_at=torch.tensor([place[parent] for parent in parents], dtype=torch.long),
        node_at=torch.tensor([place.get(node, -1) for node in span], dtype=torch.long),
    )


class _Stacked(NamedTuple):
    """Inputs of one forward over several packed tries."""

    ids: Int[Tensor, "pack length"]
    positions: Int[Tensor, "pack length"]
    mask: Float[Tensor, "pack 1 length length"]


def _stacked(model: Any, packs: Sequence[Packed]) -> _Stacked:
    """Packs of unlike length as one batch; padding sees itself alone."""
    like = next(model.parameters())
    length = max(item.input_ids.numel() for item in packs)
    ids = torch.zeros(len(packs), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    visible = torch.eye(length, dtype=torch.bool).repeat(len(packs), 1, 1)
    for row, item in enumerate(packs):
        n = item.input_ids.numel()
        ids[row, :n], positions[row, :n], visible[row, :n, :n] = item.input_ids, item.position_ids, item.visible
    mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, torch.finfo(like.dtype).min)[:, None]
    return _Stacked(ids.to(like.device), positions.to(like.device), mask.to(like.device))


def _packed_logits(model: Any, stacked: _Stacked) -> Float[Tensor, "pack length vocab"]:
    return model(
        input_ids=stacked.ids, position_ids=stacked.positions, attention_mask=stacked.mask, use_cache=False
    ).logits


def row_logits(model: Any, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
    """Output in front of each response token and behind the last, [row, 1 + response, vocab]; plain rows.

    Right padding needs no attention mask: no token of a causal model looks at what comes after it.
    """
    device = _device(model)
    joined = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(map(len, joined))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in joined])
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    steps = torch.arange(max(map(len, responses)) + 1, device=device)
    at = (first[:, None] + steps).clamp_max(longest - 1)
    return logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[2]))


def node_logprobs(
    model: Any, prompt_ids: TokenIds, trie: Trie, prompt: int, *, temperature: float = 1.0
) -> Float[Tensor, " node"]:
    """ln π(token | parent) of the nodes of one prompt, roots left out, with gradient."""
    span = trie.spans[prompt]
    table = parent_logprobs(model, prompt_ids, trie, prompt, temperature=temperature)
    return table.gather(-1, trie.token[span.start : span.stop].to(table.device)[:, None]).squeeze(-1)


def parent_logprobs(
    model: Any, prompt_ids: TokenIds, trie: Trie, prompt: int, *, temperature: float = 1.0
) -> Float[Tensor, "node vocab"]:
    """ln π(· | parent) over the vocabulary for the nodes of one prompt, roots left out, with gradient.

    Siblings have the same row.
    """
    if can_pack(model):
        item = pack(trie, prompt, prompt_ids)
        logits = _packed_logits(model, _stacked(model, [item]))[0, item.state_at.to(_device(model))]
    else:
        rows, steps = _first_through(trie, prompt)
        logits = row_logits(model, [prompt_ids] * len(rows), rows)[steps[:, 0], steps[:, 1] - 1]
    return (logits / temperature).log_softmax(-1)


def score_trie(
    model: Any,
    prompts: Sequence[TokenIds],
    trie: Trie,
    *,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
) -> NodeScores:
    """ln π(token | parent) and H of the policy at every node, nats; float64 on the CPU."""
    return trie_scorer(model, prompts, trie, temperature=temperature, tile_tokens=tile_tokens)()


def trie_scorer(
    model: Any,
    prompts: Sequence[TokenIds],
    trie: Trie,
    *,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
) -> Callable[[], NodeScores]:
    """`score_trie` with everything prepared that does not depend on the weights of the model, for calling it again."""
    budget = min(tile_tokens, max(1, TILE_LOGITS // _vocabulary_size(model)))
    prepare = _prepare_packed if can_pack(model) else _prepare_rows
    tiles = [
        (group, *prepare(model, [prompts[prompt] for prompt in group], trie, group))
        for group in _tiles(prompts, trie, budget if can_pack(model) else 0)
    ]
    leaf = trie.is_leaf

    @torch.no_grad()
    def score() -> NodeScores:
        logprobs = torch.zeros(trie.parent.numel(), dtype=torch.float64)
        entropies = torch.zeros_like(logprobs)
        for group, forward, places in tiles:
            table = _tables(forward() / temperature)
            entropy = torch.special.entr(table.exp()).sum(-1).double()
            for prompt, (before, at, root) in zip(group, places, strict=True):
                span = slice(trie.spans[prompt].start, trie.spans[prompt].stop)
                logprobs[span] = table[before.unbind(1)].gather(-1, trie.token[span][:, None]).squeeze(-1).double()
                entropies[span], entropies[prompt] = entropy[at.unbind(1)], entropy[root]
        return NodeScores(logprobs, torch.where(leaf, 0.0, entropies))

    return score


class _Places(NamedTuple):
    """Where the output stands for the parents of a prompt's nodes, for the nodes, and for its root: (row, column)."""

    before: Int[Tensor, "node 2"]
    at: Int[Tensor, "node 2"]
    root: tuple[int, int]


def _prepare_packed(
    model: Any, prompts: Sequence[TokenIds], trie: Trie, group: Sequence[int]
) -> tuple[Callable[[], Tensor], list[_Places]]:
    packs = [pack(trie, prompt, ids) for prompt, ids in zip(group, prompts, strict=True)]
    stacked = _stacked(model, packs)
    places = []
    for row, (item, ids) in enumerate(zip(packs, prompts, strict=True)):
        line = torch.full_like(item.state_at, row)
        at = torch.stack((line, item.node_at.clamp_min(0)), 1)
        places.append(_Places(torch.stack((line, item.state_at), 1), at, (row, len(ids) - 1)))
    return lambda: _packed_logits(model, stacked), places


def _prepare_rows(
    model: Any, prompts: Sequence[TokenIds], trie: Trie, group: Sequence[int]
) -> tuple[Callable[[], Tensor], list[_Places]]:
    rows, steps = _first_through(trie, group[0])
    before = steps - torch.tensor([0, 1])
    return lambda: row_logits(model, list(prompts) * len(rows), rows), [_Places(before, steps, (0, 0))]


def can_pack(model: Any) -> bool:
    """Whether the model gives on a packed trie what it gives on plain rows; tried once a model."""
    if model not in _packs:
        tokens = [index % min(_vocabulary_size(model), 7) for index in range(3, 12)]
        trie = build_trie([[tokens[:3], [*tokens[:2], tokens[5], tokens[6]], tokens[3:5]]])
        rows, steps = _first_through(trie, 0)
        item = pack(trie, 0, tokens[5:])
        with torch.no_grad():
            plain = row_logits(model, [tokens[5:]] * len(rows), rows)[steps[:, 0], steps[:, 1] - 1]
            try:
                packed = _packed_logits(model, _stacked(model, [item]))[0, item.state_at.to(plain.device)]
            except (TypeError, ValueError, RuntimeError):  # no position ids, or no 4-D masks
                packed = torch.full_like(plain, torch.inf)
        # Many models compute norms in float32 whatever their dtype, so float64 logits agree to float32 only.
        precision = max(torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps)
        tolerance = 100.0 * precision * (1.0 + float(plain.abs().max()))
        _packs[model] = bool((packed - plain).abs().max() <= tolerance)
    return _packs[model]


def in_float64(model: Any) -> Any:
    """A copy of a model that computes in float64, RMS norms included.

    Hugging Face's RMS norms go through float32 whatever the dtype, which leaves errors of 1e-7 in everything behind
    them; those of the Llama form (scale times normalised input) are replaced by torch's.
    """
    copy = deepcopy(model).double()
    for owner in list(copy.modules()):
        for name, child in list(owner.named_children()):
            epsilon = getattr(child, "variance_epsilon", None)
            if epsilon is None or [item for item, _ in child.named_parameters()] != ["weight"]:
                continue
            norm = nn.RMSNorm(child.weight.numel(), eps=epsilon, dtype=torch.float64, device=child.weight.device)
            norm.weight = child.weight
            probe = torch.linspace(-1.0, 1.0, child.weight.numel(), dtype=torch.float64, device=child.weight.device)
            if torch.allclose(norm(probe), child(probe), rtol=1e-5, atol=1e-6):
                setattr(owner, name, norm)
    return copy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _first_through(trie: Trie, prompt: int) -> tuple[list[list[int]], Int[Tensor, "node 2"]]:
    """Distinct responses of a prompt as rows of ids, and for each node the first row through it and its depth."""
    span = trie.spans[prompt]
    found: dict[int, tuple[int, int]] = {}
    rows: list[list[int]] = []
    for path in trie.paths[trie.owners == prompt].tolist():
        nodes = [node for node in path[1:] if node >= 0]
        if any(node not in found for node in nodes):
            found |= {node: (len(rows), step + 1) for step, node in enumerate(nodes) if node not in found}
            rows.append(trie.token[nodes].tolist())
    return rows, torch.tensor([found[node] for node in span], dtype=torch.long).view(-1, 2)


def _tables(logits: Tensor) -> Tensor:
    """Log-probs in float32 at least, on the CPU."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1).cpu()


def _tiles(prompts: Sequence[TokenIds], trie: Trie, budget: int) -> Iterator[list[int]]:
    """Prompts that have nodes, those of like size together, within so many tokens; 0 gives them one by one."""
    sizes = [len(ids) + len(span) for ids, span in zip(prompts, trie.spans, strict=True)]
    tile: list[int] = []
    for prompt in sorted((p for p, span in enumerate(trie.spans) if len(span)), key=sizes.__getitem__):
        # Sorted, so the newest is the longest of its tile.
        if tile and (len(tile) + 1) * sizes[prompt] > budget:
            yield tile
            tile = []
        tile.append(prompt)
    if tile:
        yield tile


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _vocabulary_size(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
