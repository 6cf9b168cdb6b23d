"""Where in a response a quantity sits: its mean by relative position."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, positions, response_lengths


class PositionProfile(NamedTuple):
    """Mean of a quantity in each of `bins` equal stretches of a response (NaN where empty), and the tokens there."""

    mean: Float[Tensor, " bin"]
    tokens: Float[Tensor, " bin"]


def position_profile(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], bins: int = 10
) -> PositionProfile:
    """Mean of `values` over the chosen tokens of each relative position, all responses pooled.

        bin of token t = ⌊bins · t / n⌋,   t = 0 … n−1 counted over the n chosen tokens of its response

    A response shorter than `bins` leaves some bins empty; each token has one vote, so long responses weigh more. Give
    `advantages.abs()` to see where credit goes.
    """
    totals, _, tokens = profile_sums(values, mask, bins)
    return PositionProfile(torch.where(tokens > 0, totals / tokens.clamp_min(1.0), torch.nan), tokens)


def profile_sums(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], bins: int = 10
) -> Float[Tensor, "3 bin"]:
    """Σ x, Σ |x| and the number of tokens of each relative position: what processes can add up."""
    place = torch.where(mask, positions(mask) * bins // response_lengths(mask).clamp_min(1), bins)
    x = chosen(values, mask)
    tables = x.new_zeros(3, len(x), bins + 1)  # the last bin catches what is not chosen
    for table, column in zip(tables, (x, x.abs(), torch.ones_like(x)), strict=True):
        table.scatter_add_(1, place, column)
    return tables.sum(1)[:, :bins]
