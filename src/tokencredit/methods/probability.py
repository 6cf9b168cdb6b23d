"""Other published rules that reweight the outcome by probabilities, covariances or importances of tokens."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.draws import draw_uniforms
from tokencredit.batch.masked import chosen, response_lengths, row_quantile, unit_moments
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.recurrence import reverse_recurrence
from tokencredit.methods.selection import count_share, keep_selected
from tokencredit.methods.spec import MethodSpec, Rows, at

ENTROPIES, OLD = frozenset({"entropies"}), frozenset({"old_logprobs"})


def probability_scaled(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, alpha: float = 0.2
) -> Float[Tensor, "batch response"]:
    """AR: less credit on surprising tokens.

        Â′ = Â (α π(o_t) + 1 − α)

    α = 0 is the identity.

    Paper: Do Not Let Low-Probability Tokens Over-Dominate (arXiv:2505.12929), α = 0.2.
    """
    mask = batch.response_mask
    probability = chosen(batch.require("old_logprobs"), mask).exp()
    return chosen(chosen(advantages, mask) * (alpha * probability + 1.0 - alpha), mask)


def steer(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, least: float = 0.8, floor: float = 0.02
) -> Float[Tensor, "batch response"]:
    """STEER: damp the tokens whose update moves the entropy most.

        Â′ = λ Â,   λ = exp(−k |Ω|),   Ω = (Â/π) π(1 − π)(ln π + H),   k = −ln(least) / max(max |Ω|, floor)

    λ ∈ [least, 1]; the maximum runs over the batch. least = 1 is the identity.

    Paper: STEER (arXiv:2510.10150), λ_min = 0.8 and 0.02 from its release, whose default is another, linear map.
    Deviation: the maximum over the whole batch, not a micro-batch.
    """
    mask = batch.response_mask
    a = chosen(advantages, mask)
    logprobs = chosen(batch.require("old_logprobs"), mask)
    change = a * (1.0 - logprobs.exp()) * (logprobs + chosen(batch.require("entropies"), mask))
    local = change.abs().amax() if change.numel() else change.new_zeros(())
    largest = batch.reducer.maximum(local).clamp_min(floor)
    return a * torch.exp(math.log(least) / largest * change.abs())


def clip_cov(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    generator: torch.Generator,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> Float[Tensor, "batch response"]:
    """Clip-Cov: no credit for a random few of the tokens where log-prob and advantage vary together.

        c = (Â − mean Â)(ln π − mean ln π);   Â′ = 0 on max(1, ⌊share · N⌋) random tokens with low < c < high

    Means over the N chosen tokens of the batch. Drawn by threshold on one number a token, so the count is exact in
    expectation over the eligible tokens. share = 0 is the identity.

    Paper: The Entropy Mechanism (arXiv:2505.22617), share 2e-4, range (1, 5). Deviations from verl's release: the scope
    is the batch; ln π is that of the policy that sampled, where verl takes the policy being updated; and verl leaves
    tokens that PPO's clip has caught out of the draw. At a ratio of one the last two make no difference.
    """
    mask = batch.response_mask
    a = chosen(advantages, mask)
    covariance = _covariance(a, batch)
    eligible = mask & (covariance > low) & (covariance < high)
    able, count = batch.reducer.total(torch.stack((eligible.sum(), mask.sum())))
    quota = int(count_share(share, count, "floor")) if share > 0 else 0
    dropped = eligible & (draw_uniforms(batch, generator) < quota / max(int(able), 1))
    return keep_selected(a, mask & ~dropped, batch)


def _covariance(a: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    logprobs = chosen(batch.require("old_logprobs"), batch.response_mask)
    return chosen(
        (a - unit_moments(a, batch, "batch").mean) * (logprobs - unit_moments(logprobs, batch, "batch").mean),
        batch.response_mask,
    )


def a3po(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    share: float = 0.2,
    gain: float = 2.0,
    until: float = 1.0,
) -> Float[Tensor, "batch response"]:
    """A3PO: more credit on unlikely tokens of correct and on likely tokens of incorrect responses, fading out.

        Â′ = Â (1 + (gain − 1) · max(0, 1 − u / until))   on the `share` least likely tokens where Â > 0
                                                           and the `share` most likely where Â < 0

    Shares are per response; u is `batch.progress` (0 if absent). gain = 1 is the identity.

    Paper: A3PO (arXiv:2512.21625), from a secondary summary: factor 2, 20 %. Schedule and scope are ours.
    """
    mask = batch.response_mask
    a = chosen(advantages, mask)
    logprobs = chosen(batch.require("old_logprobs"), mask)
    unlikely = logprobs <= row_quantile(logprobs, mask, share)
    likely = logprobs >= row_quantile(logprobs, mask, 1.0 - share)
    boost = 1.0 + (gain - 1.0) * max(0.0, 1.0 - (batch.progress or 0.0) / until)
    return torch.where(((a > 0) & unlikely) | ((a < 0) & likely), a * boost, a)


def outcome_importance(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, tau: float = 0.4, beta: float = 2.0
) -> Float[Tensor, "batch response"]:
    """OAR: credit by how much a token matters for the final answer.

        x = minmax(ln(1 + s)),  θ = quantile_τ(x)
        w = max(x/θ, 0.1) where x < θ,   1 + β (x − θ)/(1 − θ) elsewhere;   Â′ = Â w n / Σ w

    s is `batch.importances`, 0 where that is not positive (tokens of the answer itself); everything runs within the
    response, so the weights have mean one.

    Paper: Outcome-Grounded Advantage Reshaping (ACL 2026), τ = 0.4, β = 2. Deviation: its release overwrites τ by θ
    inside the loop, so that later responses use another level; ours does not. OAR's own s has no collector here.
    """
    mask = batch.response_mask
    s = torch.log1p(chosen(batch.require("importances"), mask).clamp_min(0.0))
    least = torch.where(mask, s, torch.inf).amin(1, keepdim=True)
    span = torch.where(mask, s, -torch.inf).amax(1, keepdim=True) - least
    x = torch.where(mask & (span > 0), (s - least) / torch.where(span > 0, span, 1.0), 1.0)
    theta = row_quantile(x, mask, tau)
    below = (x / theta.clamp_min(1e-12)).clamp_min(0.1)
    above = 1.0 + beta * (x - theta) / (1.0 - theta).clamp_min(1e-12)
    weights = chosen(torch.where(x < theta, below, above), mask)
    total = weights.sum(1, keepdim=True)
    return chosen(advantages, mask) * weights * response_lengths(mask) / torch.where(total > 0, total, 1.0)


def future_ratio(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    half_life: float = 32.0,
    low: float = 1.0,
    high: float = 1.2,
    clip_ratio_c: float | None = 3.0,
) -> Float[Tensor, "batch response"]:
    """FIPO: tokens whose continuation has become more likely get more credit.

        Â′_t = Â_t · clip(exp F_t, low, high),   F_t = Σ_{k ≥ t} γ^{k−t} x_k,   γ = 2^{−1/half_life}
        x_k = ln(π_θ/π_old)_k,   0 where π_θ/π_old > clip_ratio_c

    π_θ is the policy that is being updated (`current_logprobs`); exactly the identity on the first update of a batch.
    A token whose ratio has exploded says nothing about the tokens before it, so it is left out of their sums and of its
    own; `clip_ratio_c=None` keeps it.

    Paper: FIPO (arXiv:2603.19835): `clip_ratio_c` = 3 from its authors' code, half-life 32 and [1, 1.2] from another
    release's defaults. Deviations: without that release's special case for Â < 0 at ratios above 4; and the sum does
    not age over tokens that the policy did not choose, as it does in both releases.
    """
    mask = batch.response_mask
    ratio = chosen(batch.require("current_logprobs"), mask) - chosen(batch.require("old_logprobs"), mask)
    if clip_ratio_c is not None:
        ratio = torch.where(ratio > math.log(clip_ratio_c), 0.0, ratio)
    # An unchosen token neither adds to the sum nor ages it.
    ageing = torch.ones_like(ratio).masked_fill(mask, 2.0 ** (-1.0 / half_life))
    future = reverse_recurrence(ageing, ratio)
    return chosen(advantages, mask) * chosen(future.exp().clamp(low, high), mask)


ROWS = Rows(
    MethodSpec(
        probability_scaled,
        "arXiv:2505.12929",
        requires=OLD,
        domains={"alpha": "[0, 1]"},
        limits=(at(alpha=0.0),),
        keeps_sign=True,
    ),
    MethodSpec(
        steer,
        "arXiv:2510.10150",
        requires=ENTROPIES | OLD,
        scope="batch",
        domains={"least": "(0, 1]", "floor": "(0, inf)"},
        limits=(at(least=1.0),),
        keeps_sign=True,
    ),
    MethodSpec(
        clip_cov,
        "arXiv:2505.22617",
        requires=OLD,
        scope="batch",
        domains={"share": "[0, 1]"},
        limits=(at(share=0.0),),
        keeps_sign=True,
    ),
    MethodSpec(
        a3po,
        "arXiv:2512.21625",
        requires=OLD,
        scope="response",
        domains={"share": "[0, 1]", "until": "(0, inf)", "gain": "(0, inf)"},
        limits=(at(gain=1.0),),
        keeps_sign=True,
    ),
    MethodSpec(
        outcome_importance,
        "OAR (ACL 2026)",
        requires=frozenset({"importances"}),
        scope="response",
        domains={"tau": "[0, 1]", "beta": "[0, inf)"},
        keeps_sign=True,
    ),
    MethodSpec(
        future_ratio,
        "arXiv:2603.19835",
        requires=OLD | {"current_logprobs"},
        scope="response",
        domains={"half_life": "(0, inf)", "low": "(0, inf)", "high": "(0, inf)", "clip_ratio_c": "[1, inf)"},
        limits=(at(low=1.0, high=1.0),),
        keeps_sign=True,
    ),
    presets={
        "advantage_reweighting": ["group_normalized", "probability_scaled"],
        "steer": ["group_normalized", "steer"],
        "clip_cov": ["group_normalized", "clip_cov"],
        "a3po": ["group_normalized", "a3po"],
        "fipo": ["group_normalized", "future_ratio"],
    },
)
