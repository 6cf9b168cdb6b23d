"""Self-distillation as credit: the policy under a privileged prompt is the teacher of the policy without it.

The gap δ_t = ln π(y_t | x, c, y_<t) − ln π(y_t | x, y_<t) is `teacher_logprobs − old_logprobs`, in nats, detached. It
is positive where the privileged context c makes the sampled token more likely.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import (
    chosen,
    compact,
    positions,
    response_lengths,
    row_quantile,
    spread,
    unit_moments,
    unit_sums,
)
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import group_totals, quantile
from tokencredit.methods.controls import token_uniforms
from tokencredit.methods.distillation.log_ratio import teacher_gap
from tokencredit.methods.outcome import correct_rows

EPS = 1e-6
HEALTHY = 0.93  # share of the first entropy below which AntiSD pauses

Direction = Literal[
    "router",
    "flipped",
    "conformity",
    "novelty",
    "flip_low",
    "flip_high",
    "attract_only",
    "repel_only",
    "sign",
    "position",
    "surprisal",
    "entropy_bonus",
]
GapScale = Literal["mean_abs", "std", "zscore", "batch_mean_abs", "none"]

# Directions that need no entropy.
CONSTANT = {"conformity": 1.0, "novelty": -1.0}
RANKED = ("position", "surprisal")


def directed_self_distillation(  # noqa: PLR0913 - the open points of one published formula, each an option
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    rho: float = 0.2,
    tail: Literal["top", "bottom"] = "top",
    gap_scale: GapScale = "mean_abs",
    gate: bool = True,
    cap: float | None = None,
    deviation: Literal["mean", "median"] = "mean",
    direction: Direction = "router",
    only: Literal["all", "correct"] = "all",
    skip_first: int = 0,
    zero_spread: Literal["keep", "drop"] = "keep",
    threshold: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """DASD: towards the privileged self where the policy is sure, away from it where it is not.

        ω_t = tanh((τ − H_t) / (σ + ε)) · sigmoid(|δ̄_t| − 1),     Â′_t = Â_t + β ω_t δ̄_t

    H is the entropy of the policy, τ its quantile 1 − ρ over the response (`tail="bottom"`: ρ), σ its mean absolute
    deviation ("median": the median one, from the median); δ̄ = δ / mean|δ| over the response, not centred. The bonus
    ignores correctness, is odd in δ and at most β|δ̄|. β = 0 is the identity; δ ≡ 0 or constant H give no bonus.

    * `gap_scale`: "std" and "zscore" (population), "batch_mean_abs", "none". `gate=False`: without the sigmoid.
    * `cap`: |β ω δ̄| ≤ cap. `skip_first=n`: no bonus on the n first tokens.
    * `only="correct"`: no bonus on responses that are not correct; `threshold`: see `outcome.correct_rows`.
    * `zero_spread="drop"`: none in groups whose rewards are all equal.
    * `direction`, the controls: see `bonus_direction`; "entropy_bonus" pays β Σ|ωδ̄| / ΣH · H_t instead.

    Paper: arXiv:2605.22263, both equations from two secondary summaries that agree. Not stated there and ours: β, the
    scale of δ, the tail of the quantile, and every option's default. Our reading of DASD until compared with the text.
    """
    mask = batch.response_mask
    gap = scaled_gap(teacher_gap(batch), batch, gap_scale)
    push = bonus_direction(batch, direction, rho=rho, tail=tail, deviation=deviation)
    bonus = signed_gap(gap, push, beta=beta, gate=gate, cap=cap)
    if direction == "entropy_bonus":
        bonus = _entropy_bonus(bonus, batch)
    allowed = mask & (positions(mask) >= skip_first)
    if only == "correct":
        allowed = allowed & correct_rows(batch, threshold)[:, None]
    if zero_spread == "drop":
        allowed = allowed & _spread_groups(batch)
    return chosen(advantages, mask) + torch.where(allowed, bonus, 0.0)


def randomly_directed_self_distillation(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    generator: torch.Generator,
    beta: float = 0.1,
    rho: float = 0.2,
    shuffle: Literal["router", "gap"] = "router",
    gate: bool = True,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """The controls of `directed_self_distillation` that keep every histogram: its router, or its gap, on other tokens.

        Â′_t = Â_t + β router_{π(t)} sigmoid(|δ̄_t| − 1) δ̄_t        "gap":  δ̄ permuted, the router in place

    π is a random permutation of the chosen tokens of the response. β = 0 is the identity.

    Source: ours.
    """
    mask = batch.response_mask
    gap = scaled_gap(teacher_gap(batch), batch, "mean_abs")
    push = bonus_direction(batch, "router", rho=rho)
    behind = torch.arange(mask.shape[1], device=mask.device) >= response_lengths(mask)
    order = torch.where(behind, 2.0, compact(token_uniforms(batch, generator), mask)).argsort(dim=1)
    moved = spread(compact(push if shuffle == "router" else gap, mask).gather(1, order), mask)
    gap, push = (gap, moved) if shuffle == "router" else (moved, push)
    return chosen(advantages, mask) + signed_gap(gap, push, beta=beta, gate=gate, cap=cap)


def signed_gap(
    gap: Float[Tensor, "batch response"],
    push: Float[Tensor, "batch response"],
    *,
    beta: float = 0.1,
    gate: bool = True,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """β · push · sigmoid(|gap| − 1) · gap, within ±cap."""
    bonus = beta * push * (torch.sigmoid(gap.abs() - 1.0) if gate else 1.0) * gap
    return bonus if cap is None else bonus.clamp(-cap, cap)


def scaled_gap(
    gap: Float[Tensor, "batch response"], batch: TokenBatch, scale: GapScale
) -> Float[Tensor, "batch response"]:
    """δ̄ of `directed_self_distillation`; 0 outside the mask."""
    if scale == "none":
        return gap
    if scale in ("std", "zscore"):
        moments = unit_moments(gap, batch, "response")
        return chosen((gap - moments.mean if scale == "zscore" else gap) / (moments.std + EPS), batch.response_mask)
    return gap / (unit_moments(gap.abs(), batch, "response" if scale == "mean_abs" else "batch").mean + EPS)


def bonus_direction(
    batch: TokenBatch,
    direction: Direction = "router",
    *,
    rho: float = 0.2,
    tail: Literal["top", "bottom"] = "top",
    deviation: Literal["mean", "median"] = "mean",
) -> Float[Tensor, "batch response"]:
    """Where the bonus pulls: in [−1, 1], + towards the teacher, − away from it, 0 outside the mask.

    * "router": tanh((τ − H) / (σ + ε)); "flipped": its negative; "sign": its sign.
    * "conformity": 1 and "novelty": −1 everywhere.
    * "flip_low", "flip_high": the router with its positive, or its negative, values negated.
    * "attract_only", "repel_only": the router's positive, or its negative, values alone.
    * "position", "surprisal": the router of the token's rank by position, or by −ln π, instead of by entropy.
    """
    mask = batch.response_mask
    if direction in CONSTANT:
        return chosen(torch.full(mask.shape, CONSTANT[direction], dtype=torch.float64, device=mask.device), mask)
    router = _router(_routed_by(batch, direction), mask, rho=rho, tail=tail, deviation=deviation)
    if direction == "flipped":
        return -router
    if direction == "flip_low":
        return -router.abs()
    if direction == "flip_high":
        return router.abs()
    if direction == "attract_only":
        return router.clamp_min(0.0)
    if direction == "repel_only":
        return router.clamp_max(0.0)
    return router.sign() if direction == "sign" else router


def _router(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], *, rho: float, tail: str, deviation: str
) -> Float[Tensor, "batch response"]:
    tau = row_quantile(x, mask, 1.0 - rho if tail == "top" else rho)
    if deviation == "median":
        width = row_quantile((x - row_quantile(x, mask, 0.5)).abs(), mask, 0.5)
    else:
        count = response_lengths(mask).clamp_min(1)
        mean = x.sum(1, keepdim=True) / count
        width = chosen((x - mean).abs(), mask).sum(1, keepdim=True) / count
    return chosen(torch.tanh((tau - x) / (width + EPS)), mask)


def _routed_by(batch: TokenBatch, direction: str) -> Float[Tensor, "batch response"]:
    """The entropy, or the rank that a control puts in its place."""
    mask = batch.response_mask
    if direction == "position":
        return chosen(positions(mask).double(), mask)
    if direction == "surprisal":
        likely = torch.where(mask, chosen(batch.require("old_logprobs"), mask), torch.inf)
        ranks = (-likely).argsort(dim=1, stable=True).argsort(dim=1)  # what is not chosen sorts in front
        return chosen((ranks - (~mask).sum(1, keepdim=True)).double(), mask)
    return chosen(batch.require("entropies"), mask)


def _entropy_bonus(bonus: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Σ|bonus| of the response, handed out in proportion to entropy."""
    entropies = chosen(batch.require("entropies"), batch.response_mask)
    total = entropies.sum(1, keepdim=True)
    return bonus.abs().sum(1, keepdim=True) * entropies / torch.where(total > 0, total, 1.0)


def _spread_groups(batch: TokenBatch) -> Bool[Tensor, "batch 1"]:
    """Whether the rewards of the row's group differ."""
    rewards = batch.rewards.double()[:, None]
    count = group_totals(torch.ones_like(rewards), batch.group_ids, batch.reducer)
    deviation = rewards - group_totals(rewards, batch.group_ids, batch.reducer) / count
    differs = (deviation.abs() > 1e-12 * rewards.abs()).double()
    return group_totals(differs, batch.group_ids, batch.reducer) > 0


def add_teacher_gap(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, lam: float = 1.0
) -> Float[Tensor, "batch response"]:
    """ "+SD": the gap on top of the verifier's advantage.

        Â′_t = Â_t + λ δ_t

    λ = 0 is the identity. Equals `0.5 * grpo + 0.5 * opd` up to the weights.

    Paper: a baseline of AntiSD (arXiv:2605.11609), below GRPO on all five of its models.
    """
    return chosen(advantages, batch.response_mask) + lam * teacher_gap(batch)


def rlsd(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    lam: float = 0.5,
    eps: float = 0.2,
    form: Literal["product", "minimum"] = "product",
    lam_end: float | None = 0.0,
    decay_steps: int | None = 50,
    warmup: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """RLSD: the verifier gives the sign, the privileged self the size, less and less as training goes on.

        w_t = exp(sign(Â) δ_t),   Â′_t = (1 − λ) Â_t + λ c_t,   λ from `lam` to `lam_end` over the first `decay_steps`
        form="product":  c_t = Â_t clip(w_t, 1 − ε, 1 + ε)        form="minimum":  c_t = min(w_t Â_t, Â_t clip(w_t, …))

    Keeps the sign. λ falls linearly with the optimiser step and then stays at `lam_end`; `decay_steps=None` spreads the
    same schedule over the whole run (`batch.progress`). `lam_end=None` keeps λ constant. `warmup`: the share of the
    schedule over which λ rises from 0 first. λ = 0 throughout is the identity. "minimum" does not clip small w for
    Â > 0, nor large w for Â < 0.

    Paper: RLSD (arXiv:2604.03128 v2): λ = ½ to 0 over the first 50 steps, ε = 0.2; "product" is its Eq. 15, "minimum"
    its Eq. 16. `warmup` is another release's.
    """
    a = chosen(advantages, batch.response_mask)
    weights = torch.exp((a.sign() * teacher_gap(batch)).clamp(-20.0, 20.0))
    credit = a * weights.clamp(1.0 - eps, 1.0 + eps)
    if form == "minimum":
        credit = torch.minimum(a * weights, credit)
    moves = lam_end is not None or warmup > 0.0
    share = _scheduled(lam, lam_end, warmup, _schedule_done(batch, decay_steps)) if moves else lam
    return (1.0 - share) * a + share * credit


def rlsd_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `rlsd` reads: the step only where λ moves, and moves by steps."""
    moves = hyperparameters["lam_end"] is not None or hyperparameters["warmup"] > 0.0
    by_step = moves and hyperparameters["decay_steps"] is not None
    return frozenset({"teacher_logprobs", "old_logprobs"} | ({"step"} if by_step else set()))


def _schedule_done(batch: TokenBatch, steps: int | None) -> float:
    """The share of the schedule that is done: of so many steps, or of the whole run."""
    return (batch.progress or 0.0) if steps is None else min(batch.require("step") / steps, 1.0)


def _scheduled(lam: float, lam_end: float | None, warmup: float, done: float) -> float:
    if done < warmup:
        return lam * done / warmup
    if lam_end is None or warmup >= 1.0:
        return lam
    return lam + (lam_end - lam) * (done - warmup) / (1.0 - warmup)


def rlrt(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    lam: float = 0.5,
    eps: float = 1.0,
    threshold: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """RLRT: on correct responses, more credit where the privileged self likes the token less.

        w_t = exp(−sign(Â) δ_t),   Â′_t = Â_t [(1 − λ) + λ clip(w_t, 1 − ε, 1 + ε)]   if r > threshold,   Â_t otherwise

    The privileged context is another correct response to the prompt. Keeps the sign for ε ≤ 1. λ = 0 is the identity.
    `threshold`: see `outcome.correct_rows`.

    Paper: RLRT (arXiv:2605.10781), from a secondary summary; ε = 1 for base models, 0.5 instruct, 0.2 thinking.
    """
    a = chosen(advantages, batch.response_mask)
    weights = torch.exp(-a.sign() * teacher_gap(batch)).clamp(1.0 - eps, 1.0 + eps)
    correct = correct_rows(batch, threshold)[:, None]
    return torch.where(correct, (1.0 - lam) * a + lam * a * weights, a)


def srpo(
    advantages: Float[Tensor, "batch response"], batch: TokenBatch, *, beta: float = 1.0, threshold: float = 0.0
) -> Float[Tensor, "batch response"]:
    """SRPO: wrong responses learn from the privileged self where it is sure, all others from the verifier.

        Â′_t = e^{−β H_t} / mean e^{−β H} · δ_t   where r ≤ threshold and the response has a teacher,   Â_t elsewhere

    H is the entropy of the teacher; the mean runs over all tokens of the batch that learn from it, so that a response
    on which the teacher is unsure weighs less as a whole. A response without a teacher, such as one whose group holds
    no correct one, was scored under its own prompt: δ ≡ 0. β = 0 weighs all tokens alike. `threshold`: see
    `outcome.correct_rows`.

    Paper: SRPO (arXiv:2604.02288), β = 1. Deviation: δ is the sampled form of its divergence.
    """
    mask = batch.response_mask
    gap = teacher_gap(batch)
    taught = mask & (~correct_rows(batch, threshold) & (gap != 0).any(1))[:, None]
    entropies = chosen(batch.require("teacher_entropies"), mask)
    weights = torch.where(taught, torch.exp(-beta * entropies), 0.0)
    mean = unit_sums(weights, batch, "batch") / unit_sums(taught.double(), batch, "batch").clamp_min(1.0)
    return torch.where(taught, weights / torch.where(mean > 0, mean, 1.0) * gap, chosen(advantages, mask))


def antisd(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    lam: float = 0.5,
    g: float = 1.0,
    h_warm: float | None = None,
) -> Float[Tensor, "batch response"]:
    """AntiSD: away from the privileged self, with a bounded reward for leaving it.

        Â′_t = Â_t − g λ φ(δ_t),   φ(u) = ½ (softplus(u) − ln 2) ≥ −½ ln 2

    `h_warm` is the teacher's median entropy before the method sets in: with it the step is taken only while the batch's
    median is at least 0.93 of it. λ = 0 or g = 0 is the identity.

    Paper: AntiSD (arXiv:2605.11609), λ = 0.5. Deviation: its switch stays off until the median is back at `h_warm`;
    ours keeps no state between steps.
    """
    gap = teacher_gap(batch)
    if h_warm is not None:
        median = quantile(batch.require("teacher_entropies"), batch.response_mask, 0.5, batch.reducer)
        g = g if median >= HEALTHY * h_warm else 0.0
    phi = 0.5 * (torch.nn.functional.softplus(gap) - torch.log(torch.tensor(2.0, dtype=gap.dtype, device=gap.device)))
    return chosen(advantages, batch.response_mask) - g * lam * chosen(phi, batch.response_mask)
