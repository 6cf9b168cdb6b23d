"""IW-OPD: the gap to the teacher, weighted by how much the rollout has disagreed with the teacher so far."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.draws import fingerprint_responses, shuffle_tokens
from tokencredit.batch.masked import chosen, compact, positions, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.distillation.log_ratio import GAP, IW_OPD, teacher_gap
from tokencredit.methods.spec import Limit, MethodSpec, Rows, Scope

EPS = 1e-8
GRID = 256  # samples of a weight profile that one rollout lends to another


def prefix_discrepancy(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    gamma: float = 0.5,
    discrepancy: Literal["unsigned", "signed"] = "unsigned",
    denominator: Literal["all", "drop_last"] = "all",
    at_least_one: bool = True,
    renorm: Literal["none", "unit_mass"] = "none",
) -> Float[Tensor, "batch response"]:
    """IW-OPD: more credit where the rollout has disagreed little with the teacher so far.

        d_t = |gap_t|,   F_t = Σ_{k<t} d_k / (Σ_k d_k + ε),   w_t = 1 + γ clip(1 − F_t, 0, 1),   Â′_t = w_t Â_t

    w lies in [1, 1 + γ], starts at 1 + γ and never rises (unsigned). Σ w d / Σ d ≥ 1 + γ/2 on every rollout, so compare
    with `constant_scale` or `renorm="unit_mass"` (Σ w d = Σ d). Constant d gives `position_decay`; γ = 0 is the
    identity. The gap is ln π_T − ln π_θ, also where Â is that of ExOPD.

    * `discrepancy="signed"`: d_t = gap_t. `at_least_one=False`: w = 1 − F, the surrogate alone, whatever γ.
    * `denominator="drop_last"`: Σ without the last token, whose weight is then exactly 1.

    Paper: arXiv:2606.22600. The defaults follow its release (`denominator`, ε = 1e-8); "drop_last" is its Eq. 17.
    `unit_mass` is ours. Deviations: none in the numbers; rows may have holes.
    """
    weights = discrepancy_weights(
        batch, gamma=gamma, discrepancy=discrepancy, denominator=denominator, at_least_one=at_least_one, renorm=renorm
    )
    return chosen(advantages, batch.response_mask) * weights


def lambda_discrepancy(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, gamma: float = 0.5
) -> Float[Tensor, "batch response"]:
    """IW-ExOPD with the weight on λ: only the pull towards the teacher is weighted.

        Â′_t = w_t λ (ln π_T − ln π_ref) − (ln π_θ − ln π_ref)        w as in `prefix_discrepancy`

    Right behind `teacher_log_ratio` only, whose λ it takes over. Can change signs. γ = 0 is the identity.

    Source: the authors' page of arXiv:2606.22600 ("modulating λ with the weight"); their release does otherwise.
    """
    drift = chosen(batch.require("old_logprobs"), batch.response_mask)
    drift = drift - chosen(batch.require("ref_logprobs"), batch.response_mask)
    a = chosen(advantages, batch.response_mask)
    return discrepancy_weights(batch, gamma=gamma) * (a + drift) - drift


def discrepancy_weights(
    batch: TokenBatch,
    *,
    gamma: float = 0.5,
    discrepancy: Literal["unsigned", "signed"] = "unsigned",
    denominator: Literal["all", "drop_last"] = "all",
    at_least_one: bool = True,
    renorm: Literal["none", "unit_mass"] = "none",
) -> Float[Tensor, "batch response"]:
    """w of `prefix_discrepancy`; 0 outside the mask."""
    mask = batch.response_mask
    gap = teacher_gap(batch)
    d = gap if discrepancy == "signed" else gap.abs()
    before = d.cumsum(1) - d
    last = mask & (positions(mask) == response_lengths(mask) - 1)
    counted = d if denominator == "all" else torch.where(last, 0.0, d)
    left = (1.0 - before / (counted.sum(1, keepdim=True) + EPS)).clamp(0.0, 1.0)
    weights = 1.0 + gamma * left if at_least_one else left
    if renorm == "unit_mass":
        weights = weights / mass_multiplier(weights, gap)
    return chosen(weights, mask)


def mass_multiplier(
    weights: Float[Tensor, "batch response"], gap: Float[Tensor, "batch response"]
) -> Float[Tensor, "batch 1"]:
    """Σ w |gap| / Σ |gap| of each rollout: the constant that gives the same advantage mass; 1 where the gap is 0."""
    mass = gap.abs().sum(1, keepdim=True)
    weighted = (weights * gap.abs()).sum(1, keepdim=True)
    return torch.where((mass > 0) & (weighted > 0), weighted / torch.where(mass > 0, mass, 1.0), 1.0)


def reordered_discrepancy(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    generator: torch.Generator,
    gamma: float = 0.5,
    order: Literal["shuffled", "reversed", "borrowed", "constant"] = "shuffled",
) -> Float[Tensor, "batch response"]:
    """The controls of `prefix_discrepancy`: its weights, in the wrong places.

        Â′_t = w̃_t Â_t

    * "shuffled": w permuted within the rollout, same histogram. "reversed": w̃_t = 1 + γ F_t.
    * "borrowed": w of another rollout of the batch at the same relative position (the next in the order of their
      fingerprints, read on a grid of 256 places): what is left of the gain is positional.
    * "constant": Σ w d / Σ d of the rollout on every token, the scale without the shape.

    γ = 0 is the identity.

    Source: ours.
    """
    mask = batch.response_mask
    weights = discrepancy_weights(batch, gamma=gamma)
    if order == "shuffled":
        weights = shuffle_tokens(weights, batch, generator)
    elif order == "reversed":
        weights = 2.0 + gamma - weights
    elif order == "borrowed":
        weights = _borrow_weights(weights, batch)
    else:
        weights = mass_multiplier(weights, teacher_gap(batch)).expand_as(weights)
    return chosen(advantages, mask) * chosen(weights, mask)


def order_scope(given: Mapping[str, Any]) -> Scope:
    """The scope of `reordered_discrepancy`: weights of another rollout come from the batch."""
    return "batch" if given["order"] == "borrowed" else "response"


def _borrow_weights(x: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """`x` of the next response of the batch, on all ranks, at the same share of the way."""
    mask, length = batch.response_mask, response_lengths(batch.response_mask)
    if mask.shape[1] == 0:
        return x
    names = fingerprint_responses(batch.response_ids, positions(mask), mask)
    labels = batch.reducer.labels(names)
    row = torch.searchsorted(labels, names)
    middles = 2 * torch.arange(GRID, device=mask.device) + 1  # of the grid's places, in halves of a place
    grid = compact(x, mask).gather(1, middles * length // (2 * GRID))
    # Responses of the same tokens, and empty ones, share a label: the last column counts what was added.
    filled = torch.where(length > 0, torch.nn.functional.pad(grid, (0, 1), value=1.0), 0.0)
    table = batch.reducer.total(filled.new_zeros(labels.numel(), GRID + 1).index_add_(0, row, filled))
    known = table[:, -1] > 0
    if not bool(known.any()):
        return x
    table = table[known]
    lender = table[known.long().cumsum(0)[row] % len(table)]  # the cumulative sum is the own place plus one
    place = ((2 * positions(mask) + 1) * GRID // (2 * length.clamp_min(1))).clamp(0, GRID - 1)
    return chosen((lender[:, :-1] / lender[:, -1:]).gather(1, place), mask)


def prefix_ratio(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    alpha: float = 0.001,
    blend: bool = False,
    gamma: float = 0.5,
) -> Float[Tensor, "batch response"]:
    """The ideal prefix ratio of IW-OPD's derivation, which is brittle.

        r_t = exp(α Σ_{k<t} gap_k),   r̃_t = r_t / mean r_t,   Â′_t = r̃_t Â_t        blend:  (1 + γ r̃_t) Â_t

    The mean runs over the rollouts of the batch that still have a token at position t; exponents are clamped to ±20.
    α = 0 without `blend` is the identity.

    Paper: arXiv:2606.22600, the idea; the estimator of the mean is ours. α = 1 and 0.1 vanish within some 60 tokens.
    """
    mask = batch.response_mask
    gap = teacher_gap(batch)
    ratio = (alpha * (gap.cumsum(1) - gap)).clamp(-20.0, 20.0).exp()
    alive = compact(chosen(torch.ones_like(ratio), mask), mask)
    total, count = _sum_by_position(compact(chosen(ratio, mask), mask), batch), _sum_by_position(alive, batch)
    mean = spread((total / count.clamp_min(1.0)).expand_as(ratio), mask)
    relative = ratio / torch.where(mean > 0, mean, 1.0)
    return chosen(advantages, mask) * (1.0 + gamma * relative if blend else relative)


def _sum_by_position(compacted: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "1 response"]:
    """Sum over the batch, position by position; ranks may be padded to different lengths."""
    own = compacted.shape[1]
    longest = int(batch.reducer.maximum(torch.tensor(own, device=compacted.device)))
    return batch.reducer.total(torch.nn.functional.pad(compacted.sum(0, keepdim=True), (0, longest - own)))[:, :own]


ROWS = Rows(
    transforms={
        "prefix_discrepancy": MethodSpec(
            fn=prefix_discrepancy,
            paper=IW_OPD,
            requires=GAP,
            scope="response",
            domains={"gamma": "[0, inf)"},
            renamed={"floor": "at_least_one", "scale": "renorm"},
            limits=(Limit({"gamma": 0.0, "at_least_one": True}),),
            keeps_sign=True,
        ),
        "lambda_discrepancy": MethodSpec(
            fn=lambda_discrepancy,
            paper=IW_OPD,
            requires=GAP | {"ref_logprobs"},
            scope="response",
            domains={"gamma": "[0, inf)"},
            limits=(Limit({"gamma": 0.0}),),
        ),
        "reordered_discrepancy": MethodSpec(
            fn=reordered_discrepancy,
            paper="-",
            requires=GAP,
            scope=order_scope,
            domains={"gamma": "[0, inf)"},
            limits=(Limit({"gamma": 0.0}),),
            keeps_sign=True,
        ),
        "prefix_ratio": MethodSpec(
            fn=prefix_ratio,
            paper=IW_OPD,
            requires=GAP,
            scope="batch",
            domains={"alpha": "[0, inf)", "gamma": "[0, inf)"},
            limits=(Limit({"alpha": 0.0, "blend": False}),),
            keeps_sign=True,
        ),
    },
    presets={
        "iw_opd": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5}}],
        "iw_exopd": [{"teacher_log_ratio": {"lam": 1.25}}, {"prefix_discrepancy": {"gamma": 0.5}}],
        "iw_exopd_lambda": [{"teacher_log_ratio": {"lam": 1.25}}, {"lambda_discrepancy": {"gamma": 0.5}}],
        "iw_opd_paper": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5, "denominator": "drop_last"}}],
        "iw_opd_signed": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5, "discrepancy": "signed"}}],
        "iw_opd_surrogate": ["teacher_log_ratio", {"prefix_discrepancy": {"at_least_one": False}}],
        "iw_opd_unit_mass": ["teacher_log_ratio", {"prefix_discrepancy": {"gamma": 0.5, "renorm": "unit_mass"}}],
        "iw_opd_shuffled": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "shuffled"}}],
        "iw_opd_reversed": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "reversed"}}],
        "iw_opd_borrowed": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "borrowed"}}],
        "iw_opd_constant": ["teacher_log_ratio", {"reordered_discrepancy": {"order": "constant"}}],
        "opd_ratio": ["teacher_log_ratio", {"prefix_ratio": {"alpha": 0.001}}],
        "opd_ratio_blend": ["teacher_log_ratio", {"prefix_ratio": {"alpha": 0.001, "blend": True}}],
    },
)
