"""Controls: what a method's gain must survive. Uniform, shuffled, reversed, random, and of equal mass."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.masked import chosen, compact, positions, response_lengths, spread
from tokencredit.methods.entropy import rescale_mass
from tokencredit.records import TokenBatch


def shuffle_within_response(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, generator: torch.Generator, bins: int = 1
) -> Float[Tensor, "batch response"]:
    """The same credits on other tokens of the same response.

        Â′_t = Â_{π(t)},   π a random permutation of the chosen tokens (within each of `bins` equal stretches)

    Keeps the multiset of credits of each response. `bins=10` also keeps the position profile, so it asks whether a
    method is more than position. Responses with the same tokens get the same permutation.

    Source: ours (controls K3 and K4 of the quadrant analysis).
    """
    mask = batch.response_mask
    place = compact(positions(mask), mask)
    length = response_lengths(mask)
    stretch = place * bins // length.clamp_min(1)
    behind = torch.arange(mask.shape[1], device=mask.device) >= length
    draws = compact(token_uniforms(batch, generator), mask)
    # Sort by (stretch, draw); what lies behind the response stays behind it.
    order = torch.where(behind, bins + 1.0, stretch.double() + draws).argsort(dim=1, stable=True)
    credits = compact(chosen(advantages, mask), mask)
    return spread(credits.gather(1, order), mask)


def reverse(advantages: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """The credits of a response in reverse order of its tokens.

        Â′_t = Â_{n+1−t}

    Source: ours. Keeps the multiset of credits; applied twice it is the identity.
    """
    mask = batch.response_mask
    back = (response_lengths(mask) - 1 - torch.arange(mask.shape[1], device=mask.device)).clamp_min(0)
    return spread(compact(chosen(advantages, mask), mask).gather(1, back), mask)


def random_mask(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    generator: torch.Generator,
    keep: float = 0.2,
    normalize: Literal["all", "selected"] = "all",
) -> Float[Tensor, "batch response"]:
    """Credit on a random share of each response's tokens.

        Â′_t = Â_t · 1[t among k random tokens],   k = round(keep · n), at least 1      "selected": times n / k

    The count-matched control of every method that selects tokens; keep = 1 is the identity.

    Source: ours.
    """
    mask = batch.response_mask
    length = response_lengths(mask)
    kept = (keep * length).round().clamp_min(1).minimum(length)
    draws = torch.where(mask, token_uniforms(batch, generator), 2.0)
    ranks = draws.argsort(dim=1).argsort(dim=1)
    factor = (
        torch.where(kept > 0, length / kept.clamp_min(1), 1.0) if normalize == "selected" else torch.ones_like(kept)
    )
    return torch.where(mask & (ranks < kept), chosen(advantages, mask) * factor, 0.0)


def constant_scale(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, scale: float = 1.0
) -> Float[Tensor, "batch response"]:
    """All credit times a constant.

        Â′ = scale · Â

    Asks whether a gain is only a larger step. scale = 1 is the identity.

    Source: ours.
    """
    return chosen(advantages, batch.response_mask) * scale


def mean_within_response(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch
) -> Float[Tensor, "batch response"]:
    """Every token gets the mean credit of its response.

        Â′_t = (1/n) Σ_k Â_k

    Keeps the net credit of each response and removes all token information (control K6).

    Source: ours.
    """
    mask = batch.response_mask
    mean = chosen(advantages, mask).sum(1, keepdim=True) / response_lengths(mask).clamp_min(1)
    return chosen(mean.expand_as(advantages), mask)


def match_mass(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    base: Float[Tensor, "batch response"],
    per: Literal["response", "group", "polarity"] = "response",
) -> Float[Tensor, "batch response"]:
    """Rescale the credit to the mass that the estimator gave.

        Â′ = Â · Σ|base| / Σ|Â|   over each response, group, or sign within a group

    `base` is the result of the pipeline's estimator. A method that scales its advantages takes a different step; this
    takes that away. A unit whose credit is all 0 stays 0.

    Source: ours (control K7).
    """
    return rescale_mass(chosen(advantages, batch.response_mask), chosen(base, batch.response_mask), batch, per)


def token_uniforms(batch: TokenBatch, generator: torch.Generator) -> Float[Tensor, "batch response"]:
    """A number in [0, 1) for every token, from one draw of the generator and the response's own tokens.

        u_t = mix(seed, hash(y₁…y_n), t) / 2⁵³

    It does not depend on padding, row order, group labels, unchosen tokens or on which process holds the row, so
    random controls obey the same laws as everything else. Ranks need generators in the same state.
    """
    seed = torch.randint(0, 2**62, (), generator=generator, device=generator.device).to(batch.response_ids.device)
    place = positions(batch.response_mask)
    row = response_fingerprints(batch.response_ids, place, batch.response_mask)
    bits = mix64(mix64(row[:, None] ^ seed) + place)
    return _shifted(bits, 11).double() / 2**53


def response_fingerprints(
    ids: Int[Tensor, "batch response"], place: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Int[Tensor, " batch"]:
    """A 64-bit hash of the chosen tokens and their order; sums wrap around, which is meant."""
    return torch.where(mask, mix64(ids.long() ^ mix64(place)), 0).sum(1)


def mix64(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The finaliser of splitmix64, on int64 with wrap-around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*shape"], by: int) -> Int[Tensor, "*shape"]:
    """Logical shift to the right: torch shifts int64 arithmetically."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
