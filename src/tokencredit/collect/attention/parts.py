"""What the row statistics of attention are made of: rows, visible keys, entropies, the sink, the normaliser."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Heads = Literal["mean_rows", "mean_entropy"]
Context = Literal["visible", "total"]
SCORES = 1 << 19  # scores of one block, 2 MiB


class Visibility(NamedTuple):
    """Which keys a query sees: `mask(sequence, rows)` is [rows, keys], or None for every key up to the diagonal.

    `bias(sequence, rows)` is what the mask adds to the scores where it is finite. For a slice of sequences both have
    one more axis in front, or none where all sequences have the same plane.
    """

    mask: Callable[[int | slice, slice], Bool[Tensor, "*sequences row key"]] | None = None
    bias: Callable[[int | slice, slice], Float[Tensor, "*sequences row key"]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRows:
    """The attention of one layer, and the rows of it that are wanted; query head h reads key head h // `share`."""

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch key_heads keys dim"]
    visibility: Visibility
    scale: float
    softcap: float | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def span(self) -> tuple[int, int]:
        """The first wanted row, and the one after the last."""
        first, stop, _ = self.rows.indices(self.query.shape[2])
        return first, stop

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def share(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def offset(self) -> int:
        """The key at a row's own position is so many places after the row's index."""
        return self.key.shape[2] - self.query.shape[2]


def entropy_of_scores(scores: Tensor, probs: Tensor) -> Tensor:
    """lse − E[score]: no second transcendental pass."""
    return scores.amax(-1) - probs.amax(-1).log() - torch.linalg.vecdot(probs, scores)


def entropy_of_probs(probs: Tensor) -> Tensor:
    """−Σ p ln p; with p at least the least normal number, 0 · ln 0 is 0 (and three times as fast as `xlogy`)."""
    return -torch.linalg.vecdot(probs, probs.clamp_min(torch.finfo(probs.dtype).tiny).log_())


def softmax_in_place(scores: Tensor) -> Tensor:
    """Softmax over the keys, written over the scores."""
    return torch.ops.aten._softmax.out(scores, -1, False, out=scores)


def without_sinks(probs: Tensor, sinks: Tensor) -> Tensor:
    """The row without its sinks, renormalised."""
    kept = probs.masked_fill(sinks, 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)


def normalised(entropy: Tensor, count: Tensor, keys: int, drop: int, context: Context) -> Tensor:
    """Entropy over the logarithm of N_t; 0 where fewer than two keys are left."""
    left = (count if context == "visible" else torch.full_like(count, keys)) - drop
    return torch.where((count > drop) & (left > 1), entropy / left.clamp_min(2).log(), 0.0)
