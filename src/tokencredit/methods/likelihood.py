"""Transforms that move credit by how likely the policy found a token: surprisal, entropy reduction, policy divergence.

Each function is a score per token, which `weigh_by_scores` turns into weights of mean one within the response;
`adapter_residual` uses the same weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen, compact, response_lengths, spread
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.spec import Method, MethodSpec, Rows, at

ENTROPIES, OLD = frozenset({"entropies"}), frozenset({"old_logprobs"})
WEIGHT_DOMAINS = {"sharpening": "[0, inf)", "mix": "[0, 1]", "floor": "[0, 1]", "cap": "[1, inf)"}
EPS = 1e-8  # below this greatest score a response has no signal


def weigh_by_scores(score: Callable[[TokenBatch], Tensor]) -> Method:
    """The transform that weights credit in proportion to a score of each token; its text is that of the score."""

    def weigh(
        advantages: Float[Tensor, "batch response"],
        batch: TokenBatch,
        *,
        sharpening: float = 1.0,
        mix: float = 1.0,
        floor: float = 0.0,
        cap: float | None = None,
    ) -> Float[Tensor, "batch response"]:
        weights = score_weights(score(batch), batch.response_mask, sharpening=sharpening, mix=mix, floor=floor, cap=cap)
        return chosen(advantages, batch.response_mask) * weights

    weigh.__doc__, weigh.__name__, weigh.__qualname__ = score.__doc__, score.__name__, score.__qualname__
    return weigh


@weigh_by_scores
def surprisal(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Credit in proportion to how surprising a token was.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = −log π(y_t | s_t)

    n counts the chosen tokens, p = `sharpening`; π is the policy that sampled. `mix`, `floor` and `cap`: see
    `score_weights`. p = 0 or mix = 0 is the identity.

    Paper: ARCA (arXiv:2606.00257), a baseline of its table 1, which was run at p = 2.
    """
    return -chosen(batch.require("old_logprobs"), batch.response_mask)


@weigh_by_scores
def entropy_reduction(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Credit in proportion to how much uncertainty a token took away.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = max(0, H_t − H_{t+1})

    H_t is the entropy of the policy before y_t; t + 1 is the next *chosen* token, and the last one has α = 0.
    sharpening = 0 or mix = 0 is the identity.

    Paper: ARCA (arXiv:2606.00257). Deviation: its release zeroes the last column of the padded batch, so shorter
    responses end with the entropy of padding; ours ends each response where it ends, EOS counted.
    """
    return entropy_drops(batch.require("entropies"), batch.response_mask)


@weigh_by_scores
def policy_divergence(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Credit in proportion to how far the policy has moved from the reference at a token.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = |log π(y_t | s_t) − log π_ref(y_t | s_t)|

    The log-ratio of the sampled token, not a KL over the vocabulary. Before the first update all α are 0 and the
    weights one. sharpening = 0 or mix = 0 is the identity.

    Paper: ARCA (arXiv:2606.00257); its reference is the model with the adapter off.
    """
    mask = batch.response_mask
    return (chosen(batch.require("old_logprobs"), mask) - chosen(batch.require("ref_logprobs"), mask)).abs()


def entropy_drops(
    entropies: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """max(0, H_t − H_{t+1}) between neighbouring chosen tokens; 0 on the last one and outside the mask."""
    packed = compact(chosen(entropies, mask), mask)
    following = torch.cat((packed[:, 1:], torch.zeros_like(packed[:, :1])), dim=1)
    last = torch.arange(mask.shape[1], device=mask.device) >= response_lengths(mask) - 1
    return spread(torch.where(last, 0.0, (packed - following).clamp_min(0.0)), mask)


def score_weights(
    scores: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    sharpening: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """Weights of mean one within each response, from scores α.

        w_t = n (α_t / max α)^p / Σ_k (α_k / max α)^p          all one where max α ≤ 1e-8
        w̃_t = clip(1 − m + m w_t, floor, cap), then divided by its mean

    m = `mix`. Bounds hold before the last division. Scaling all α changes nothing; p = 0 or m = 0 gives exactly one.

    Scores below 0 count as 0: a log-prob can be above 0 by a rounding.

    Deviation from ARCA's release, (α + 1e-8)^p / Σ: dividing by the greatest score first keeps p = 2 clear of the
    fallback (a sum of *squares* against 1e-8) and of underflow. At p = 1 the weights differ by at most
    n (n − 1) · 1e-8 / Σα; for p < 1 there is no such bound, since the release's constant lifts small scores.
    """
    scores = chosen(scores, mask).clamp_min(0.0)
    length = response_lengths(mask)
    largest = scores.amax(1, keepdim=True) if mask.shape[1] else scores.sum(1, keepdim=True)
    signal = largest > EPS
    powers = torch.where(mask, (scores / torch.where(signal, largest, 1.0)).pow(sharpening), 0.0)
    weights = torch.where(signal & mask, length * powers / powers.sum(1, keepdim=True).clamp_min(1.0), 1.0)
    weights = 1.0 + mix * (weights - 1.0)
    if floor > 0.0 or cap is not None:
        weights = torch.where(mask, weights.clamp(floor, cap), 0.0)
        weights = weights * length / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.where(mask, weights, 0.0)


ROWS = Rows(
    MethodSpec(
        surprisal,
        "arXiv:2606.00257",
        requires=OLD,
        scope="response",
        domains=WEIGHT_DOMAINS,
        limits=(at(sharpening=0.0), at(mix=0.0)),
        keeps_sign=True,
        report_section="signals",
    ),
    MethodSpec(
        entropy_reduction,
        "arXiv:2606.00257",
        requires=ENTROPIES,
        scope="response",
        domains=WEIGHT_DOMAINS,
        limits=(at(sharpening=0.0), at(mix=0.0)),
        keeps_sign=True,
        report_section="signals",
    ),
    MethodSpec(
        policy_divergence,
        "arXiv:2606.00257",
        requires=OLD | {"ref_logprobs"},
        scope="response",
        domains=WEIGHT_DOMAINS,
        limits=(at(sharpening=0.0), at(mix=0.0)),
        keeps_sign=True,
        report_section="signals",
    ),
    presets={
        "surprisal": ["group_normalized", "surprisal"],
        "entropy_reduction": ["group_normalized", "entropy_reduction"],
        "policy_divergence": ["group_normalized", "policy_divergence"],
    },
)
