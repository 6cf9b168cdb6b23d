"""Controls: what a method's gain must survive. Uniform, shuffled, reversed, random, and of equal mass."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.draws import draw_uniforms, shuffle_tokens
from tokencredit.batch.masked import chosen, compact, positions, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.selection import Mass, Normalize, keep_selected, kept_count, rescale_mass, selection_scope
from tokencredit.methods.spec import Limit, MethodSpec, Rows, Scope


def shuffle_within_response(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, generator: torch.Generator, bins: int = 1
) -> Float[Tensor, "batch response"]:
    """The same credits on other tokens of the same response.

        Â′_t = Â_{π(t)},   π a random permutation of the chosen tokens (within each of `bins` equal stretches)

    Keeps the multiset of credits of each response. `bins=10` also keeps the position profile, so it asks whether a
    method is more than position. Responses with the same tokens get the same permutation.

    Source: ours (controls K3 and K4 of the quadrant analysis).
    """
    return shuffle_tokens(chosen(advantages, batch.response_mask), batch, generator, bins=bins)


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
    normalize: Normalize = "all",
) -> Float[Tensor, "batch response"]:
    """Credit on a random share of each response's tokens.

        Â′_t = Â_t · 1[t among k random tokens],   k = round(keep · n), at least 1
        normalize="selected":  times Σn / Σk over the batch, as if the loss divided by the selected tokens

    The count-matched control of every method that selects tokens; keep = 1 is the identity.

    Paper: the random subsets of arXiv:2605.07660, which divides by the selected tokens (Eq. 17). Deviation: the paper
    keeps each token with probability `keep`; ours keeps exactly k tokens of each response.
    """
    mask = batch.response_mask
    draws = torch.where(mask, draw_uniforms(batch, generator), 2.0)
    ranks = draws.argsort(dim=1).argsort(dim=1)
    return keep_selected(advantages, mask & (ranks < kept_count(keep, mask)), batch, normalize)


def constant_scale(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, multiplier: float = 1.0
) -> Float[Tensor, "batch response"]:
    """All credit times a constant.

        Â′ = multiplier · Â

    Asks whether a gain is only a larger step. multiplier = 1 is the identity.

    Source: ours.
    """
    return chosen(advantages, batch.response_mask) * multiplier


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
    the control of a method whose weights do not have mean one. w̄ is what is logged as `credit/weight/mean`. Right after
    the estimator it is the identity. Where every base is 0 so is the credit.

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
    per: Mass = "response",
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
    per: Mass = hyperparameters["per"]
    return "group" if per == "polarity" else per


def position_matched_shuffle(
    batch: TokenBatch, *, generator: torch.Generator, bins: int = 10, field: str = "attention_entropies"
) -> Float[Tensor, "batch response"]:
    """The field permuted over the batch within tenths of the response: a signal that keeps the position profile alone.

    Put it in the place of the field (`dataclasses.replace`) to ask whether a gain is more than position. Rows of this
    process only.
    """
    mask = batch.response_mask
    values = batch.require(field)
    stretch = (positions(mask) * bins // response_lengths(mask).clamp_min(1))[mask]
    draws = draw_uniforms(batch, generator)[mask]
    place = stretch.double().argsort(stable=True)
    order = (stretch.double() + draws).argsort(stable=True)
    shuffled = torch.empty_like(values[mask])
    shuffled[place] = values[mask][order]
    return torch.zeros_like(values).masked_scatter(mask, shuffled)


ROWS = Rows(
    transforms={
        "shuffle_within_response": MethodSpec(
            fn=shuffle_within_response, paper="-", scope="response", domains={"bins": "[1, inf)"}, conserves="multiset"
        ),
        "reverse": MethodSpec(fn=reverse, paper="-", scope="response", conserves="multiset"),
        "random_mask": MethodSpec(
            fn=random_mask,
            paper="-",
            scope=selection_scope,
            domains={"keep": "(0, 1]"},
            limits=(Limit({"keep": 1.0}),),
            keeps_sign=True,
        ),
        "constant_scale": MethodSpec(
            fn=constant_scale, paper="-", limits=(Limit({"multiplier": 1.0}),), renamed={"scale": "multiplier"}
        ),
        "mean_within_response": MethodSpec(fn=mean_within_response, paper="-", scope="response"),
        "mean_weight": MethodSpec(fn=mean_weight, paper="-", scope="batch"),
        "match_mass": MethodSpec(fn=match_mass, paper="-", scope=mass_scope, keeps_sign=True, conserves="mass"),
    },
    presets={
        "random_tokens": ["group_normalized", {"random_mask": {"keep": 0.2, "normalize": "selected"}}],
        "opd_random": ["teacher_log_ratio", {"random_mask": {"keep": 0.3}}],
        "opd_scaled": ["teacher_log_ratio", {"constant_scale": {"multiplier": 1.25}}],
    },
)
