"""The Four Quadrant Decomposition: polarity of the outcome × entropy of the token."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, group_sums, picked, response_lengths, row_sums
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.selection import Normalize, keep_selected
from tokencredit.methods.spec import MethodSpec, Rows, Scope

Quadrant = Literal["PHR", "PLR", "NHR", "NLR"]
QUADRANTS: tuple[Quadrant, ...] = get_args(Quadrant)
Threshold = Literal["pooled", "response_means"]
ENTROPIES = frozenset({"entropies"})


def keep_quadrants(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    quadrants: Sequence[Quadrant] = ("PHR", "NHR"),
    mean: Threshold = "pooled",
    normalize: Normalize = "all",
) -> Float[Tensor, "batch response"]:
    """Credit only tokens in the named quadrants.

        Â′ = Â · 1[quadrant ∈ quadrants]          normalize="selected": times N / Σ 1[·] over the batch

    P and N are the sign of Â; H is entropy ≥ the mean of the group, L below it. The four sum to the whole. A token with
    Â = 0 lies in no quadrant and keeps 0.

    Paper: arXiv:2604.11056 v1. It takes polarity from r ≥ 0 with ±1 rewards; with 0/1 rewards that is always true, so
    ours is the sign of the advantage, which is the same in mixed groups. `normalize="selected"` is our option.
    """
    inside = torch.zeros_like(batch.response_mask)
    for name, members in quadrant_masks(advantages, batch, threshold=mean).items():
        if name in quadrants:
            inside = inside | members
    return keep_selected(advantages, inside, batch, normalize)


def quadrant_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """The scope of `keep_quadrants`: the share that is selected is counted over the batch."""
    return "batch" if hyperparameters["normalize"] == "selected" else "group"


def quadrant_masks(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, threshold: Threshold = "pooled"
) -> dict[str, Bool[Tensor, "batch response"]]:
    """Membership of every chosen token with Â ≠ 0 in PHR, PLR, NHR and NLR."""
    mask = batch.response_mask
    high = high_entropy(batch, threshold=threshold)
    a = chosen(advantages, mask)
    return {
        "PHR": mask & high & (a > 0),
        "PLR": mask & ~high & (a > 0),
        "NHR": mask & high & (a < 0),
        "NLR": mask & ~high & (a < 0),
    }


def high_entropy(batch: TokenBatch, *, threshold: Threshold = "pooled") -> Bool[Tensor, "batch response"]:
    """True where H ≥ μ, the mean entropy of the group; False outside the mask.

    "pooled" averages over tokens, "response_means" over the means of the responses. A mean of equal numbers can exceed
    them in floating point, so μ is clamped into [min H, max H] of the group: constant entropies are all high.
    """
    mask = batch.response_mask
    entropies = picked(batch.require("entropies"), mask)
    n, total = response_lengths(mask).double(), row_sums(entropies)
    largest = torch.where(mask, entropies, entropies.new_full((), -torch.inf)).amax(1)
    mean = _mean_of_means(total, n, batch) if threshold == "response_means" else None
    return mask & (entropies >= group_threshold(total, n, largest, batch, mean))


def group_threshold(
    total: Float[Tensor, "batch 1"],
    tokens: Float[Tensor, "batch 1"],
    largest: Float[Tensor, " batch"],
    batch: TokenBatch,
    mean: Float[Tensor, "batch 1"] | None = None,
) -> Float[Tensor, "batch 1"]:
    """From where on an entropy is high, of each row: from Σ H, tokens and greatest H of the rows."""
    if mean is None:
        whole, count = group_sums(torch.cat((total, tokens), 1), batch).split(1, dim=1)
        mean = whole / count.clamp_min(1.0)
    least = torch.minimum(mean, _group_maximum(largest.double(), batch)[:, None])
    if largest.dtype == torch.float64:
        return least
    # The first float32 that is not below it: comparing in float32 then decides as in float64.
    rounded = least.float()
    return torch.where(rounded < least, rounded.nextafter(rounded.new_full((), torch.inf)), rounded)


def _mean_of_means(
    total: Float[Tensor, "batch 1"], tokens: Float[Tensor, "batch 1"], batch: TokenBatch
) -> Float[Tensor, "batch 1"]:
    stats = torch.cat((total / tokens.clamp_min(1.0), (tokens > 0).double()), dim=1)
    means, count = group_sums(stats, batch).split(1, dim=1)
    return means / count.clamp_min(1.0)


def _group_maximum(per_row: Float[Tensor, " batch"], batch: TokenBatch) -> Float[Tensor, " batch"]:
    index, count = batch.numbered_groups
    table = per_row.new_full((count,), -torch.inf).scatter_reduce(0, index, per_row, "amax")
    return batch.reducer.maximum(table)[index]


ROWS = Rows(
    MethodSpec(
        keep_quadrants,
        "arXiv:2604.11056",
        requires=ENTROPIES,
        scope=quadrant_scope,
        keeps_sign=True,
        renamed={"threshold": "mean"},
    ),
    presets={
        "high_entropy_quadrants": ["group_normalized", {"keep_quadrants": {"quadrants": ["PHR", "NHR"]}}],
        "phr": ["group_normalized", {"keep_quadrants": {"quadrants": ["PHR"]}}],
        "plr": ["group_normalized", {"keep_quadrants": {"quadrants": ["PLR"]}}],
        "nhr": ["group_normalized", {"keep_quadrants": {"quadrants": ["NHR"]}}],
        "nlr": ["group_normalized", {"keep_quadrants": {"quadrants": ["NLR"]}}],
    },
)
