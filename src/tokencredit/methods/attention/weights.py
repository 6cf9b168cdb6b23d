"""What the attention methods share: which entropy they read, and weights on credit of either sign."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, response_lengths

Entropy = Literal["attention", "predictive"]
Sign = Literal["both", "positive"]
ENTROPY_FIELDS: Mapping[str, str] = {"attention": "attention_entropies", "predictive": "entropies"}
RENAMED = {"signal": "entropy"}


def entropy_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What a transform with a `entropy` option reads."""
    return frozenset({ENTROPY_FIELDS[hyperparameters["entropy"]]})


def weigh(
    advantages: Float[Tensor, "batch response"], weights: Tensor, mask: Bool[Tensor, "batch response"], only: Sign
) -> Float[Tensor, "batch response"]:
    """Advantages times weights; "positive" leaves negative advantages as they are."""
    a = chosen(advantages, mask)
    if only == "positive":
        weights = torch.where(a < 0, 1.0, weights)
    return chosen(a * weights, mask)


def scale_to_mean_one(v: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Tensor:
    """Weights of mean one within each response, in proportion to `v`."""
    total = torch.where(mask, v, 0.0).sum(1, keepdim=True)
    return v * response_lengths(mask) / torch.where(total > 0, total, 1.0)
