"""Random numbers for the tokens of a batch, from one draw of a generator and each response's own tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import compact, positions, response_lengths, spread
from tokencredit.batch.records import TokenBatch


def draw_uniforms(batch: TokenBatch, generator: torch.Generator) -> Float[Tensor, "batch response"]:
    """A number in [0, 1) for every token.

        u_t = mix(seed, hash(y₁…y_n), t) / 2⁵³

    It does not depend on padding, row order, group labels, unchosen tokens or on which process holds the row, so
    random controls obey the same laws as everything else. Ranks need generators in the same state.
    """
    seed = torch.randint(0, 2**62, (), generator=generator, device=generator.device).to(batch.response_ids.device)
    place = positions(batch.response_mask)
    row = fingerprint_responses(batch.response_ids, place, batch.response_mask)
    bits = mix64(mix64(row[:, None] ^ seed) + place)
    return _shift(bits, 11).double() / 2**53


def shuffle_tokens(
    x: Float[Tensor, "batch response"], batch: TokenBatch, generator: torch.Generator, *, bins: int = 1
) -> Float[Tensor, "batch response"]:
    """`x` permuted among the chosen tokens of each response, within each of `bins` equal stretches of it."""
    mask, length = batch.response_mask, response_lengths(batch.response_mask)
    stretch = compact(positions(mask), mask) * bins // length.clamp_min(1)
    beyond = torch.arange(mask.shape[1], device=mask.device) >= length
    draws = compact(draw_uniforms(batch, generator), mask)
    # Sort by (stretch, draw); the columns after the response stay after it.
    order = torch.where(beyond, bins + 1.0, stretch.double() + draws).argsort(dim=1, stable=True)
    return spread(compact(x, mask).gather(1, order), mask)


def fingerprint_responses(
    ids: Int[Tensor, "batch response"], place: Int[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Int[Tensor, " batch"]:
    """A 64-bit hash of the chosen tokens and their order; sums wrap around, which is meant."""
    return torch.where(mask, mix64(ids.long() ^ mix64(place)), 0).sum(1)


def mix64(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The finaliser of splitmix64, on int64 with wrap-around."""
    x = x + _as_signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _as_signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "*shape"], by: int) -> Int[Tensor, "*shape"]:
    """Logical shift to the right: torch shifts int64 arithmetically."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _as_signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
