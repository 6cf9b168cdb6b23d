"""Published rules that move credit by the entropy of the policy at each token.

Entropies are nats and detached: never an objective.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.batch.masked import (
    by_blocks,
    chosen,
    compact,
    count_chosen,
    following,
    group_sums,
    kept,
    level,
    minus,
    positions,
    response_lengths,
    row_sums,
    spread,
    unit_sums,
    unit_totals,
)
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import extrema, kth_smallest, quantile
from tokencredit.methods.selection import Normalize, count_share, keep_selected
from tokencredit.methods.spec import Alias, MethodSpec, Rows, at

ENTROPIES = frozenset({"entropies"})
EPS = 1e-6


def top_entropy(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    keep: float = 0.2,
    normalize: Normalize = "all",
    select: Literal["count", "quantile"] = "count",
) -> Float[Tensor, "batch response"]:
    """The 80/20 rule: credit only the most uncertain tokens of the batch.

        Â′ = Â · 1[H among the highest]          normalize="selected": times N / Σ 1[·]

    "count" keeps the ⌈keep · N⌉ highest of the N chosen tokens (a tie at the border is kept whole), "quantile" keeps
    H ≥ quantile_{1−keep}. They agree but for ties; with many equal entropies a quantile can keep everything. "all"
    divides by all tokens in the host's loss, "selected" corrects for that. keep = 1 is the identity.

    Paper: Beyond the 80/20 Rule (arXiv:2506.01939); its release is "count" with "selected", TRL's
    `top_entropy_quantile` is "quantile" with "all". Deviation: the threshold is the whole batch's.
    """
    mask = batch.response_mask
    entropies = batch.require("entropies").detach()
    count = batch.reducer.total(count_chosen(mask))
    if int(count) == 0:
        return chosen(advantages, mask)
    if select == "count":
        below = int(count - count_share(keep, count, "ceil"))
        threshold = kth_smallest(entropies, mask, below, batch.reducer)
    else:
        threshold = quantile(entropies, mask, 1.0 - keep, batch.reducer)
    return keep_selected(advantages, mask & (entropies.float() >= threshold), batch, normalize)


def entropy_bonus(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, alpha: float = 0.4, kappa: float = 2.0
) -> Float[Tensor, "batch response"]:
    """A bonus for uncertainty, whatever the sign of the credit.

        Â′ = Â + min(α H, |Â| / κ)

    Raises rewards and weakens penalties at uncertain tokens; keeps the sign of Â for κ > 1. α = 0 is the identity.

    Paper: Reasoning with Exploration (arXiv:2506.14758), α = 0.4 for GRPO, κ = 2.
    """
    a = chosen(advantages, batch.response_mask)
    entropies = chosen(batch.require("entropies"), batch.response_mask).clamp_min(0.0)  # a rounding can be below 0
    return a + torch.minimum(alpha * entropies, a.abs() / kappa)


def gtpo(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    base_share: float = 0.9,
    floor: float = 1e-3,
    standardize: bool = True,
) -> Float[Tensor, "batch response"]:
    """GTPO: shaped rewards from entropies aligned by position, then normalised per polarity.

        correct:    r̃_t =  α₁ + α₂ d_t H_t / Σ H_t            incorrect:  r̃_t = −α₁ − α₂ h_t (1/H_t) / Σ (1/H_t)
        Â′ = (r̃ − mean r̃) / (std r̃ + ε)   over the tokens of one polarity of the group     (standardize)

    Sums run over the responses of the group with the same outcome that still have a token at position t; d_t, h_t count
    them; α₁ = `base_share`, α₂ = 1 − α₁; polarity is the sign of Â, and Â = 0 stays 0. H is at least `floor`.
    `standardize=False` returns r̃, whose sign is the polarity; with it, correct tokens can get negative credit.

    With `standardize` r̃ is standardised, so `base_share` acts through ε only; and the only correct response of a group
    gets a credit of exactly 0 on every token, since its r̃ is constant (the paper's Eq. 6 does the same).

    Paper: GTPO (arXiv:2508.04349), from a secondary summary: α₁ + α₂ = 1; the split 0.9/0.1 and the floor are ours.
    """
    mask = batch.response_mask
    a = chosen(advantages, mask)
    polarity = torch.where(response_lengths(mask) > 0, a.sum(1, keepdim=True), 0.0).sign()
    entropies = compact(chosen(batch.require("entropies"), mask).clamp_min(floor), mask)
    alive = compact(torch.ones_like(a), mask)
    shaped = torch.zeros_like(a)
    for side, weight in ((1.0, entropies), (-1.0, 1.0 / entropies.clamp_min(floor))):
        members = torch.where(polarity == side, alive, 0.0)
        total = _sum_by_position(members * weight, batch)
        count = _sum_by_position(members, batch)
        share = count * weight / torch.where(total > 0, total, 1.0)
        shaped = torch.where(polarity == side, side * (base_share + (1.0 - base_share) * share), shaped)
    shaped = spread(shaped, mask)
    return _standardize_per_polarity(shaped, polarity, batch) if standardize else chosen(shaped, mask)


def _sum_by_position(x: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Sum over the rows of a group, position by position; ranks may be padded to different lengths."""
    own = x.shape[1]
    longest = int(batch.reducer.maximum(torch.tensor(own, device=x.device)))
    return group_sums(torch.nn.functional.pad(x, (0, longest - own)), batch)[:, :own]


def _standardize_per_polarity(
    shaped: Float[Tensor, "batch response"], polarity: Float[Tensor, "batch 1"], batch: TokenBatch
) -> Float[Tensor, "batch response"]:
    result = torch.zeros_like(shaped)
    for side in (1.0, -1.0):
        members = chosen((polarity == side).double().expand_as(shaped), batch.response_mask)
        count = unit_sums(members, batch, "group").clamp_min(1.0)
        centred = shaped - unit_sums(members * shaped, batch, "group") / count
        std = (unit_sums(members * centred.square(), batch, "group") / count).sqrt()
        result = torch.where(members > 0, centred / (std + EPS), result)
    return result


def empg(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    k: float = 1.0,
    k_bonus: float = 1.0,
    zeta: float = 0.1,
    center: bool = True,
) -> Float[Tensor, "batch response"]:
    """EMPG: confident steps get a larger share, and a bonus for clarity that follows.

        Â′ = Â · g(H_s) + ζ exp(−k′ H_{s+1}),    g(H) = e^{−kH} / mean e^{−kH}        then minus its mean (center)

    H_s is the mean entropy of step s (`batch.step_ids`; without them each token is a step), mapped to [0, 1] by the
    least and greatest over the batch; the last step has no bonus. Both means run over the *steps* of the batch: a step
    has one vote, however long. Bonus and centring can change signs; k = 0, ζ = 0, center = false is the identity.

    Paper: EMPG (arXiv:2509.09265), Eq. 10 and 12; k = k′ = 1 and ζ = 0.1 are the authors'. Deviation: the scope is the
    batch. The final centring is that of another group's release (over steps too); the authors' is not known to us.
    """
    mask = batch.response_mask
    entropies = batch.require("entropies").detach() if batch.step_ids is None else _step_means(batch)
    least, greatest = extrema(entropies, mask, batch.reducer)
    span = (greatest - least).clamp_min(torch.finfo(entropies.dtype).tiny)  # all equal: every h is 0

    def fall(rate: float, h: Tensor) -> Tensor:
        return torch.exp(h.sub(least).div_(span).mul_(-rate))

    decay = by_blocks(lambda h: fall(k, h), mask, entropies)
    mean = _mean_over_steps(decay, batch).clamp_min(EPS)

    def formula(a: Tensor, decay: Tensor, mean: Tensor, *steps: Tensor) -> Tensor:
        after, has_next = _next_step(*steps)
        return a * decay.div(mean.to(decay.dtype)) + kept(fall(k_bonus, after).mul_(zeta), has_next)

    steps = (entropies, mask) if batch.step_ids is None else (entropies, mask, _step_index(batch))
    credit = by_blocks(formula, mask, level(advantages, mask), decay, mean, *steps)
    return by_blocks(minus, mask, credit, _mean_over_steps(credit, batch), out=credit) if center else credit


def _step_index(batch: TokenBatch) -> Int[Tensor, "batch response"]:
    """0-based number of the step among the chosen tokens, by order of appearance; meaningless outside the mask."""
    if batch.step_ids is None:
        return positions(batch.response_mask)
    ids = compact(batch.step_ids, batch.response_mask)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return spread(starts.long().cumsum(1) - 1, batch.response_mask)


def _step_means(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """The mean entropy over the step of each chosen token."""
    step = torch.where(batch.response_mask, _step_index(batch), 0)
    values = chosen(batch.require("entropies"), batch.response_mask)
    total = torch.zeros_like(values).scatter_add_(1, step, values)
    return chosen(total.gather(1, step) / _step_sizes(batch).clamp_min(1.0), batch.response_mask)


def _mean_over_steps(x: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch 1"]:
    """The mean over the steps of the batch of the mean of `x`, which is 0 outside the mask, over each step's tokens."""
    if batch.step_ids is None:
        stats = torch.cat((row_sums(x), response_lengths(batch.response_mask)), dim=1)
        total, count = unit_totals(stats, batch, "batch").split(1, dim=1)
        return total / count.clamp_min(1.0)
    share = 1.0 / _step_sizes(batch).clamp_min(1.0)  # what a token counts for in its step
    return unit_sums(x * share, batch, "batch") / unit_sums(share, batch, "batch").clamp_min(1.0)


def _step_sizes(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """The number of chosen tokens in the step of each chosen token."""
    step = torch.where(batch.response_mask, _step_index(batch), 0)
    count = torch.zeros(step.shape, dtype=torch.float64, device=step.device)
    count.scatter_add_(1, step, batch.response_mask.double())
    return chosen(count.gather(1, step), batch.response_mask)


def _next_step(
    step_values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    step: Int[Tensor, "batch response"] | None = None,
) -> tuple[Float[Tensor, "batch response"], Bool[Tensor, "batch response"]]:
    """The value of the next step, and where there is one; without the numbers of the steps, each token is one."""
    if step is None:
        return following(step_values, mask)
    step = torch.where(mask, step, 0)
    wide = step_values.new_full((mask.shape[0], mask.shape[1] + 2), torch.nan)
    wide.scatter_(1, torch.where(mask, step, mask.shape[1] + 1), torch.where(mask, step_values, torch.nan))
    after = wide.gather(1, step + 1)
    return after, mask & ~after.isnan()


ROWS = Rows(
    MethodSpec(
        top_entropy,
        "arXiv:2506.01939",
        requires=ENTROPIES,
        scope="batch",
        domains={"keep": "(0, 1]"},
        limits=(at(keep=1.0),),
        keeps_sign=True,
    ),
    MethodSpec(
        entropy_bonus,
        "arXiv:2506.14758",
        requires=ENTROPIES,
        domains={"alpha": "[0, inf)", "kappa": "(0, inf)"},
        limits=(at(alpha=0.0),),
        keeps_sign=True,
        in_blocks=True,
    ),
    MethodSpec(
        gtpo,
        "arXiv:2508.04349",
        requires=ENTROPIES,
        scope="group",
        domains={"base_share": "[0, 1]", "floor": "(0, inf)"},
        renamed={"normalize": "standardize"},
    ),
    MethodSpec(
        empg,
        "arXiv:2509.09265",
        requires=ENTROPIES,
        scope="batch",
        limits=(at(k=0.0, zeta=0.0, center=False),),
        in_blocks=True,
    ),
    presets={
        "forking_tokens": ["group_normalized", {"top_entropy": {"keep": 0.2, "normalize": "selected"}}],
        "entropy_advantage": ["group_normalized", {"entropy_bonus": {"alpha": 0.4, "kappa": 2.0}}],
        "gtpo": ["group_normalized", "gtpo"],
        "empg": ["group_normalized", "empg"],
    },
    aliases={
        "hepo": Alias(
            of="forking_tokens",
            differs="the name under which DASD (arXiv:2605.22263) runs the rule of arXiv:2506.01939 as a baseline.",
        ),
    },
    controls={
        "forking_tokens (shuffled)": ["group_normalized", "top_entropy", "shuffle_within_response"],
    },
)
