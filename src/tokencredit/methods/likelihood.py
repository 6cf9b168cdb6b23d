"""Transforms that move credit by how likely the policy found a token: surprisal, entropy reduction, policy divergence.

Each is a score per token turned into weights of mean one within the response; `adapter_residual` uses the same weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import by_blocks, following, kept, level, picked, response_lengths, row_sums
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.spec import MethodSpec, Rows, at

ENTROPIES, OLD = frozenset({"entropies"}), frozenset({"old_logprobs"})
WEIGHT_DOMAINS = {"sharpening": "[0, inf)", "mix": "[0, 1]", "floor": "[0, 1]", "cap": "[1, inf)"}
EPS = 1e-8  # below this greatest score a response has no signal


def surprisal(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    sharpening: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """Credit in proportion to how surprising a token was.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = −log π(y_t | s_t)

    n counts the chosen tokens, p = `sharpening`; π is the policy that sampled. `mix`, `floor` and `cap`: see
    `score_weights`. p = 0 or mix = 0 is the identity.

    Paper: ARCA (arXiv:2606.00257), a baseline of its table 1, which was run at p = 2.
    """

    def weights(logprobs: Tensor, mask: Tensor) -> Tensor:
        return score_weights(picked(logprobs, mask).neg_(), mask, sharpening=sharpening, mix=mix, floor=floor, cap=cap)

    return weigh(advantages, batch, weights, batch.require("old_logprobs"))


def entropy_reduction(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    sharpening: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """Credit in proportion to how much uncertainty a token took away.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = max(0, H_t − H_{t+1})

    H_t is the entropy of the policy before y_t; t + 1 is the next *chosen* token, and the last one has α = 0.
    sharpening = 0 or mix = 0 is the identity.

    Paper: ARCA (arXiv:2606.00257). Deviation: its release zeroes the last column of the padded batch, so shorter
    responses end with the entropy of padding; ours ends each response where it ends, EOS counted.
    """

    def weights(entropies: Tensor, mask: Tensor) -> Tensor:
        drops = entropy_drops(entropies, mask)
        return score_weights(drops, mask, sharpening=sharpening, mix=mix, floor=floor, cap=cap)

    return weigh(advantages, batch, weights, batch.require("entropies"))


def policy_divergence(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    sharpening: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """Credit in proportion to how far the policy has moved from the reference at a token.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = |log π(y_t | s_t) − log π_ref(y_t | s_t)|

    The log-ratio of the sampled token, not a KL over the vocabulary. Before the first update all α are 0 and the
    weights one. sharpening = 0 or mix = 0 is the identity.

    Paper: ARCA (arXiv:2606.00257); its reference is the model with the adapter off.
    """

    def weights(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        scores = (picked(logprobs, mask) - picked(reference, mask)).abs()
        return score_weights(scores, mask, sharpening=sharpening, mix=mix, floor=floor, cap=cap)

    return weigh(advantages, batch, weights, batch.require("old_logprobs"), batch.require("ref_logprobs"))


def weigh(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, weights: Callable[..., Tensor], *fields: Tensor
) -> Float[Tensor, "batch response"]:
    """Credit times `weights(*fields, mask)`, which looks at each response alone; some responses at a time."""
    mask = batch.response_mask
    return by_blocks(lambda a, *rows: a * weights(*rows), mask, level(advantages, mask), *fields, mask)


def entropy_drops(
    entropies: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """max(0, H_t − H_{t+1}) between neighbouring chosen tokens; 0 on the last one and outside the mask."""
    after, has_next = following(picked(entropies, mask), mask)
    return kept((picked(entropies, mask) - after).clamp_min_(0.0), has_next)


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
    scores = picked(scores, mask).clamp_min_(0.0)
    length = response_lengths(mask)
    largest = scores.amax(1, keepdim=True) if mask.shape[1] else scores.new_zeros(len(scores), 1)
    signal = largest > EPS
    powers, least = scores, EPS
    if sharpening != 1.0:
        powers, least = scores.div_(torch.where(signal, largest, 1.0)), 1.0  # keeps powers of tiny scores apart
        powers = kept(powers.pow_(sharpening), mask)  # 0 to the power 0 is 1
    # n / Σ where there is a signal, then mixed with 1: w = powers · factor + rest, both one number a response.
    factor = torch.where(signal, mix * length / row_sums(powers).clamp_min(least), 0.0).to(powers.dtype)
    rest = (1.0 - mix * signal.double()).to(powers.dtype)
    weights = powers.mul_(factor)
    is_whole = mix == 1.0 and mask.device.type == "cpu" and bool(signal.all())  # a GPU is not asked
    if not is_whole:
        weights = kept(weights.add_(rest), mask)
    if floor > 0.0 or cap is not None:
        weights = kept(weights.clamp_(floor, cap), mask)
        weights *= (length / row_sums(weights).clamp_min(torch.finfo(weights.dtype).tiny)).to(weights.dtype)
    return weights


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
        in_blocks=True,
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
        in_blocks=True,
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
        in_blocks=True,
    ),
    presets={
        "surprisal": ["group_normalized", "surprisal"],
        "entropy_reduction": ["group_normalized", "entropy_reduction"],
        "policy_divergence": ["group_normalized", "policy_divergence"],
    },
)
