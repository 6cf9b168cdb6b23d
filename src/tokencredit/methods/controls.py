"""Controls: what a method's gain must survive. Uniform, shuffled, reversed, random, and of equal mass."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import chosen, compact, positions, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.entropy.rules import rescale_mass
from tokencredit.methods.spec import Scope


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

        Â′_t = Â_t · 1[t among k random tokens],   k = round(keep · n), at least 1
        normalize="selected":  times Σn / Σk over the batch, as if the loss divided by the selected tokens

    The count-matched control of every method that selects tokens; keep = 1 is the identity.

    Paper: the random subsets of arXiv:2605.07660, which divides by the selected tokens (Eq. 17). Deviation: the paper
    keeps each token with probability `keep`; ours keeps exactly k tokens of each response.
    """
    mask = batch.response_mask
    draws = torch.where(mask, token_uniforms(batch, generator), 2.0)
    ranks = draws.argsort(dim=1).argsort(dim=1)
    return keep_only(advantages, mask & (ranks < kept_count(keep, mask)), batch, normalize)


def selection_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """Counting the selected tokens takes the whole batch, choosing them only the response."""
    return "batch" if hyperparameters["normalize"] == "selected" else "response"


def keep_only(
    advantages: Float[Tensor, "batch response"],
    selected: Bool[Tensor, "batch response"],
    batch: TokenBatch,
    normalize: Literal["all", "selected"],
) -> Float[Tensor, "batch response"]:
    """The credit of the selected tokens; "selected" rescales to their number over the whole batch."""
    factor = 1.0
    if normalize == "selected":
        kept, count = batch.reducer.total(torch.stack((selected.sum(), batch.response_mask.sum()))).tolist()
        factor = count / max(kept, 1)
    return torch.where(selected, chosen(advantages, batch.response_mask) * factor, 0.0)


def share_of(share: float, count: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """share · count in float64, rounded to nine decimals: round, floor and ceil then give what the decimals mean.

    A share times an integer tensor would be float32, where 0.3 · 50 is above 15 and 0.1 · 90 below 9.
    """
    return (share * count.double()).mul(1e9).round() / 1e9


def kept_count(keep: float, mask: Bool[Tensor, "batch response"]) -> Int[Tensor, "batch 1"]:
    """round(keep · n), at least one token of a response that has any."""
    length = response_lengths(mask)
    return share_of(keep, length).round().long().clamp_min(1).minimum(length)


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


def mean_weight(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, base: Float[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Give every token the estimator's credit times the mean weight of the steps before, measured on this batch.

        Â′_t = w̄ · base_t,   w̄ = mean of Â_t / base_t over the batch's tokens with base ≠ 0

    What is left of a method when only the size of its step remains, and changes over training as the method changes it:
    the control of a method whose weights do not have mean one. w̄ is what is logged as `credit/weight/mean`. Behind the
    estimator alone it is the identity. Where every base is 0 so is the credit.

    Source: ours.
    """
    mask = batch.response_mask
    a, base = chosen(advantages, mask), chosen(base, mask)
    some = base != 0
    weights = torch.where(some, a / torch.where(some, base, 1.0), 0.0)
    total, count = batch.reducer.total(torch.stack((weights.sum(), some.sum().double()))).unbind()
    return base * (total / count.clamp_min(1.0))


def match_mass(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    base: Float[Tensor, "batch response"],
    per: Literal["response", "group", "polarity", "batch"] = "response",
) -> Float[Tensor, "batch response"]:
    """Rescale the credit to the mass that the estimator gave.

        Â′ = Â · Σ|base| / Σ|Â|   over each response, group, sign within a group, or the batch

    `base` is the result of the pipeline's estimator. A method that scales its advantages takes a different step; this
    takes that away. A unit whose credit is all 0 stays 0.

    Source: ours (control K7).
    """
    return rescale_mass(chosen(advantages, batch.response_mask), chosen(base, batch.response_mask), batch, per)


def mass_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """The scope of `match_mass`: the unit whose mass is kept."""
    per: Scope | Literal["polarity"] = hyperparameters["per"]
    return "group" if per == "polarity" else per


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
