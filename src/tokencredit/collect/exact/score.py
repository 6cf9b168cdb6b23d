"""Log-probs and entropies at every node of a trie of responses, under any Hugging Face causal language model.

Each distinct prefix is computed once where the model can do it: the trie of a prompt becomes one row, in which a token
attends only to its own ancestors (a 4-D attention mask, positions by depth). If packed and plain layouts give different
scores for a model, or a layer sees fewer tokens than the responses have, the plain layout is used: see `exact_packing`.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokencredit.collect.exact.packing import pack, packed_logits, stacked, within_windows
from tokencredit.collect.exact.trie import TokenIds, Trie, build_trie
from tokencredit.collect.models import eval_mode
from tokencredit.errors import TokenCreditError

TILE_TOKENS = 4096  # tokens in one forward, padding included
PROBE_PROMPT, PROBE_DEPTH = 32, 5  # tokens on which packed and plain rows are compared, at most
TILE_LOGITS = 1 << 26  # logits in one forward, one row at least: 256 MiB in float32

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what the probe of `can_pack` found


class NodeScores(NamedTuple):
    """ln π(token | parent), 0 at roots; H of the policy at the node, 0 at leaves."""

    logprobs: Float[Tensor, " node"]
    entropies: Float[Tensor, " node"]


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
    packed = fits_packed(model, prompt_ids, trie, prompt)
    with eval_mode(model):
        if packed:
            item = pack(trie, prompt, prompt_ids)
            logits = packed_logits(model, stacked(model, [item]))[0, item.state_at.to(_device(model))]
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
    packable = {p for p, ids in enumerate(prompts) if trie.spans[p] and fits_packed(model, ids, trie, p)}
    groups = [(_prepare_packed, group) for group in _tiles(prompts, trie, budget, packable)]
    groups += [(_prepare_rows, [p]) for p, span in enumerate(trie.spans) if span and p not in packable]
    tiles = [(group, *prepare(model, [prompts[prompt] for prompt in group], trie, group)) for prepare, group in groups]
    leaf = trie.is_leaf

    @torch.no_grad()
    def score() -> NodeScores:
        logprobs = torch.zeros(trie.parent.numel(), dtype=torch.float64)
        entropies = torch.zeros_like(logprobs)
        for group, forward, places in tiles:
            with eval_mode(model):
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
    inputs = stacked(model, packs)
    places = []
    for row, (item, ids) in enumerate(zip(packs, prompts, strict=True)):
        line = torch.full_like(item.state_at, row)
        at = torch.stack((line, item.node_at.clamp_min(0)), 1)
        places.append(_Places(torch.stack((line, item.state_at), 1), at, (row, len(ids) - 1)))
    return lambda: packed_logits(model, inputs), places


def _prepare_rows(
    model: Any, prompts: Sequence[TokenIds], trie: Trie, group: Sequence[int]
) -> tuple[Callable[[], Tensor], list[_Places]]:
    rows, steps = _first_through(trie, group[0])
    before = steps - torch.tensor([0, 1])
    return lambda: row_logits(model, list(prompts) * len(rows), rows), [_Places(before, steps, (0, 0))]


def fits_packed(model: Any, prompt_ids: TokenIds, trie: Trie, prompt: int) -> bool:
    """Whether the trie of a prompt may be scored as one packed row."""
    span = trie.spans[prompt]
    if len(span) == 0:
        return False
    longest = len(prompt_ids) + int(trie.depth[span.start : span.stop].max())
    config = getattr(model, "config", None)
    if not within_windows(config, longest, len(prompt_ids) + len(span)):
        return False
    # not longer than the sequences at hand, which fit into every window
    return can_pack(model, list(prompt_ids)[: longest - PROBE_DEPTH], trie.token[span.start : span.stop].tolist())


def can_pack(model: Any, prompt_ids: TokenIds = (), response_ids: TokenIds = ()) -> bool:
    """Whether the model gives on a packed trie what it gives on plain rows; tried once per model.

    The ids are some that the model meets in the task. The lowest ids of a vocabulary are often special tokens, on which
    activations are so large that rounding alone fails the comparison.
    """
    if model not in _packs:
        vocab = _vocabulary_size(model)
        spread = range(vocab // 8, vocab, max(1, vocab // 8))
        kinds = list(dict.fromkeys([*response_ids, *reversed(prompt_ids), *spread, *range(vocab)]))[:6]
        a, b, c, d, e, f = (kinds[index % len(kinds)] for index in range(6))
        trie = build_trie([[[a, b, c, d], [a, b, e, f, a], [c, a], [f, e, d, c, b]]])
        with eval_mode(model):
            _packs[model] = _agree(model, list(prompt_ids)[:PROBE_PROMPT] or [f], trie)
    return _packs[model]


@torch.no_grad()
def _agree(model: Any, prompt_ids: TokenIds, trie: Trie) -> bool:
    """Compare packed and plain log-probs; rounding is judged by plain rows in another batch."""
    rows, steps = _first_through(trie, 0)
    item = pack(trie, 0, prompt_ids)
    plain = row_logits(model, [prompt_ids] * len(rows), rows)[steps[:, 0], steps[:, 1] - 1]
    single = [row_logits(model, [prompt_ids], [row])[0] for row in rows]
    again = torch.stack([single[row][step - 1] for row, step in steps.tolist()])
    try:
        packed = packed_logits(model, stacked(model, [item]))[0, item.state_at.to(plain.device)]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # no position ids, or no 4-D masks
        return False
    # Many models compute norms in float32 whatever their dtype, so float64 logits agree to float32 only.
    scale = 1.0 + float(plain.abs().max())
    eps = torch.finfo(plain.dtype).eps
    rounding = 2.0 * eps * scale if eps > 1e-6 else 100.0 * torch.finfo(torch.float32).eps * scale
    packed, plain, again = (_tables(logits) for logits in (packed, plain, again))
    return bool((packed - plain).abs().max() <= max(rounding, 4.0 * float((again - plain).abs().max())))


def in_float64(model: Any) -> Any:
    """A copy of a model that computes in float64, RMS norms included.

    Hugging Face's RMS norms go through float32 whatever the dtype, which leaves errors of 1e-7 in everything behind
    them; those of the Llama form (scale times normalised input) are replaced by torch's.
    """
    if _device(model).type == "mps":
        raise TokenCreditError("Apple's GPUs have no float64", hint="move the model to the CPU")
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


def _tiles(prompts: Sequence[TokenIds], trie: Trie, budget: int, packable: set[int]) -> Iterator[list[int]]:
    """The packable prompts, those of like size together, within so many tokens."""
    sizes = [len(ids) + len(span) for ids, span in zip(prompts, trie.spans, strict=True)]
    tile: list[int] = []
    for prompt in sorted(packable, key=sizes.__getitem__):
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
