"""The trie of a prompt as one row for a model: tokens, positions by depth, and a mask of ancestors.

A mask of ancestors overrides the mask that a model would build, its sliding windows and chunks among it. So a trie is
packed only where every layer sees all of the prompt and the response anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.exact.trie import TokenIds, Trie
from tokencredit.errors import TokenCreditError

WINDOWS = ("sliding_window", "attention_chunk_size")  # by position: packing keeps positions
WINDOWED = frozenset({"full_attention", "sliding_attention", "chunked_attention"})  # kinds of layers that can be packed
NO_WINDOW = ("max_window_layers", "chunk_size_feed_forward")  # names of configs that only look like windows
SPARSE = ("index_topk",)  # layers that choose so many tokens


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


class Stacked(NamedTuple):
    """Inputs of one forward over several packed tries."""

    ids: Int[Tensor, "pack length"]
    positions: Int[Tensor, "pack length"]
    mask: Float[Tensor, "pack 1 length length"]


def stacked(model: Any, packs: Sequence[Packed]) -> Stacked:
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
    return Stacked(ids.to(like.device), positions.to(like.device), mask.to(like.device))


def packed_logits(model: Any, stacked: Stacked) -> Float[Tensor, "pack length vocab"]:
    """One forward over packed tries."""
    return model(
        input_ids=stacked.ids, position_ids=stacked.positions, attention_mask=stacked.mask, use_cache=False
    ).logits


def within_windows(config: Any, longest: int, row: int) -> bool:
    """Whether every layer sees all of a sequence of `longest` tokens, packed into a row of `row` tokens.

    Read from the config: kinds of layers, and every whole number that is named after a window or a chunk. A window
    under a name that we do not know may count columns, so the whole packed row must fit into it.
    """
    if config is None:
        return True
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if set(getattr(text, "layer_types", None) or ()) - WINDOWED:
        return False  # a state, not attention
    for name, value in vars(text).items():
        named = ("window" in name or "chunk_size" in name or name in SPARSE) and name not in NO_WINDOW
        if not named or name.endswith(("_layers", "_pattern")) or isinstance(value, bool) or value is None:
            continue
        if name == "sliding_window" and getattr(text, "use_sliding_window", True) is False:
            continue
        needed = longest if name in WINDOWS else row
        if not isinstance(value, int | float) or 0 < value < needed:
            return False
    return True
