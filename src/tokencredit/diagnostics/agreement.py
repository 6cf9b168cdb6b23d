"""How alike two methods rank the tokens of the same batch."""

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import response_lengths
from tokencredit.diagnostics.concentration import Mean, mean_over_responses


def spearman(
    first: Float[Tensor, "batch response"],
    second: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, " batch"]:
    """Spearman rank correlation of two quantities over the chosen tokens of each response.

        ρ = Pearson(rank first, rank second),   equal values share their mean rank

    NaN where a response has fewer than two tokens or either quantity is constant on it: uniform credit ranks nothing.
    """
    from scipy.stats import rankdata

    tables = [item.detach().double().cpu().numpy() for item in (first, second)]
    correlations = []
    for one, two, chosen in zip(*tables, mask.cpu().numpy(), strict=True):
        x, y = (rankdata(values[chosen]) - (chosen.sum() + 1) / 2 for values in (one, two))  # mean rank (n + 1)/2
        scale = np.sqrt((x @ x) * (y @ y))
        correlations.append(x @ y / scale if scale > 0 else np.nan)
    return torch.tensor(correlations, dtype=torch.float64)


def agreement(
    first: Float[Tensor, "batch response"],
    second: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    scope: Literal["response", "batch"] = "response",
) -> Mean:
    """How alike two methods rank tokens, from −1 to 1: by Spearman within each response, or over the whole batch.

    Within responses the sign of the outcome plays no part; over the batch it plays most of it, since both methods give
    accepted responses positive credit. Responses where either method is constant are left out and counted.
    """
    if scope == "response":
        return mean_over_responses(spearman(first, second, mask))
    rows = torch.ones((1, int(mask.sum())), dtype=torch.bool, device=mask.device)
    return mean_over_responses(spearman(first[mask][None], second[mask][None], rows))


def agreement_table(
    credits: Mapping[str, Float[Tensor, "batch response"]],
    mask: Bool[Tensor, "batch response"],
    *,
    scope: Literal["response", "batch"] = "response",
) -> dict[tuple[str, str], Mean]:
    """`agreement` of every pair of methods on one batch, each pair once."""
    return {(a, b): agreement(credits[a], credits[b], mask, scope=scope) for a, b in combinations(credits, 2)}


def top_overlap(
    first: Float[Tensor, "batch response"],
    second: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    share: float = 0.2,
) -> Float[Tensor, " batch"]:
    """Share of the tokens with the largest |credit| of one method that are among those of the other, per response.

    Both take the `share` of the chosen tokens with the largest magnitude, at least one; of equal ones the first.
    Methods without relation overlap by `share`. NaN where a response has fewer than two tokens or either method is
    constant on it: uniform credit has no largest tokens.
    """
    n = response_lengths(mask)
    count = (share * n.double()).round().long().clamp_min(1)
    tops, defined = [], n[:, 0] >= 2
    for values in (first, second):
        size = torch.where(mask, values.detach().double().abs(), -1.0)
        order = size.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(size.shape[1], device=size.device).expand_as(order)
        )
        tops.append((rank < count) & mask)
        least = torch.where(mask, size, torch.inf).amin(1)
        defined = defined & (size.amax(1) > least)
    both = (tops[0] & tops[1]).sum(1).double()
    return torch.where(defined, both / count[:, 0], torch.nan)
