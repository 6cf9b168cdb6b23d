"""DASD: towards the policy under a privileged prompt, or away from it, by how sure the policy is.

The gap δ_t = ln π(y_t | x, c, y_<t) − ln π(y_t | x, y_<t) is `teacher_logprobs − old_logprobs`, in nats, detached. It
is positive where the privileged context c makes the sampled token more likely.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.draws import shuffle_tokens
from tokencredit.batch.masked import chosen, positions, response_lengths, row_quantile, unit_moments
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import group_totals
from tokencredit.methods.distillation.log_ratio import GAP, teacher_gap
from tokencredit.methods.outcome import correct_rows
from tokencredit.methods.spec import Limit, MethodSpec, Rows, Scope

DASD = "arXiv:2605.22263"
EPS = 1e-6

Pull = Literal[
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

CONSTANT = {"conformity": 1.0, "novelty": -1.0}  # pulls that need no entropy


def directed_self_distillation(  # noqa: PLR0913 - the open points of one published formula, each an option
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    rho: float = 0.2,
    tail: Literal["top", "bottom"] = "top",
    gap_scale: GapScale = "mean_abs",
    sigmoid: bool = True,
    cap: float | None = None,
    deviation: Literal["mean", "median"] = "mean",
    pull: Pull = "router",
    responses: Literal["all", "correct"] = "all",
    skip_first: int = 0,
    zero_spread: Literal["keep", "drop"] = "keep",
    threshold: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """DASD: towards the privileged self where the policy is sure, away from it where it is not.

        ω_t = tanh((τ − H_t) / (σ + ε)) · sigmoid(|δ̄_t| − 1),     Â′_t = Â_t + β ω_t δ̄_t

    H is the entropy of the policy, τ its quantile 1 − ρ over the response (`tail="bottom"`: ρ), σ its mean absolute
    deviation ("median": the median one, from the median); δ̄ = δ / mean|δ| over the response, not centred. The bonus
    ignores correctness, is odd in δ and at most β|δ̄|. β = 0 is the identity; δ ≡ 0 or constant H give no bonus.

    * `gap_scale`: "std" and "zscore" (population), "batch_mean_abs", "none". `sigmoid=False`: without the sigmoid.
    * `cap`: |β ω δ̄| ≤ cap. `skip_first=n`: no bonus on the n first tokens.
    * `responses="correct"`: no bonus on responses that are not correct; `threshold`: see `outcome.correct_rows`.
    * `zero_spread="drop"`: none in groups whose rewards are all equal.
    * `pull`, the controls: see `bonus_direction`; "entropy_bonus" pays β Σ|ωδ̄| / ΣH · H_t instead.

    Paper: arXiv:2605.22263, both equations from two secondary summaries that agree. Not stated there and ours: β, the
    scale of δ, the tail of the quantile, and every option's default. Our reading of DASD until compared with the text.
    """
    mask = batch.response_mask
    gap = scaled_gap(teacher_gap(batch), batch, gap_scale)
    push = bonus_direction(batch, pull, rho=rho, tail=tail, deviation=deviation)
    bonus = signed_gap(gap, push, beta=beta, sigmoid=sigmoid, cap=cap)
    if pull == "entropy_bonus":
        bonus = _spread_by_entropy(bonus, batch)
    allowed = mask & (positions(mask) >= skip_first)
    if responses == "correct":
        allowed = allowed & correct_rows(batch, threshold)[:, None]
    if zero_spread == "drop":
        allowed = allowed & _find_mixed_groups(batch)
    return chosen(advantages, mask) + torch.where(allowed, bonus, 0.0)


def direction_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `directed_self_distillation` reads: entropies only where they route."""
    return GAP if hyperparameters["pull"] in (*CONSTANT, "position", "surprisal") else GAP | {"entropies"}


def direction_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """The scope of `directed_self_distillation`: that of its scale of δ, and of `zero_spread`."""
    if hyperparameters["gap_scale"] == "batch_mean_abs":
        return "batch"
    return "group" if hyperparameters["zero_spread"] == "drop" else "response"


def randomly_directed_self_distillation(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    generator: torch.Generator,
    beta: float = 0.1,
    rho: float = 0.2,
    shuffle: Literal["router", "gap"] = "router",
    sigmoid: bool = True,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """The controls of `directed_self_distillation` that keep every histogram: its router, or its gap, on other tokens.

        Â′_t = Â_t + β router_{π(t)} sigmoid(|δ̄_t| − 1) δ̄_t        "gap":  δ̄ permuted, the router in place

    π is a random permutation of the chosen tokens of the response. β = 0 is the identity.

    Source: ours.
    """
    gap = scaled_gap(teacher_gap(batch), batch, "mean_abs")
    push = bonus_direction(batch, "router", rho=rho)
    if shuffle == "router":
        push = shuffle_tokens(push, batch, generator)
    else:
        gap = shuffle_tokens(gap, batch, generator)
    return chosen(advantages, batch.response_mask) + signed_gap(gap, push, beta=beta, sigmoid=sigmoid, cap=cap)


def signed_gap(
    gap: Float[Tensor, "batch response"],
    push: Float[Tensor, "batch response"],
    *,
    beta: float = 0.1,
    sigmoid: bool = True,
    cap: float | None = None,
) -> Float[Tensor, "batch response"]:
    """β · push · sigmoid(|gap| − 1) · gap, within ±cap."""
    opening = torch.sigmoid(gap.abs() - 1.0) if sigmoid else 1.0
    bonus = beta * push * opening * gap
    return bonus if cap is None else bonus.clamp(-cap, cap)


def scaled_gap(
    gap: Float[Tensor, "batch response"], batch: TokenBatch, scale: GapScale
) -> Float[Tensor, "batch response"]:
    """δ̄ of `directed_self_distillation`; 0 outside the mask."""
    if scale == "none":
        return gap
    if scale in ("std", "zscore"):
        moments = unit_moments(gap, batch, "response")
        centre = moments.mean if scale == "zscore" else 0.0
        return chosen((gap - centre) / (moments.std + EPS), batch.response_mask)
    unit = "response" if scale == "mean_abs" else "batch"
    return gap / (unit_moments(gap.abs(), batch, unit).mean + EPS)


def bonus_direction(
    batch: TokenBatch,
    pull: Pull = "router",
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
    if pull in CONSTANT:
        return chosen(torch.full(mask.shape, CONSTANT[pull], dtype=torch.float64, device=mask.device), mask)
    router = _route(_read_routed(batch, pull), mask, rho=rho, tail=tail, deviation=deviation)
    if pull == "flipped":
        return -router
    if pull == "flip_low":
        return -router.abs()
    if pull == "flip_high":
        return router.abs()
    if pull == "attract_only":
        return router.clamp_min(0.0)
    if pull == "repel_only":
        return router.clamp_max(0.0)
    return router.sign() if pull == "sign" else router


def _route(
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


def _read_routed(batch: TokenBatch, pull: Pull) -> Float[Tensor, "batch response"]:
    """The entropy, or the rank that a control puts in its place."""
    mask = batch.response_mask
    if pull == "position":
        return chosen(positions(mask).double(), mask)
    if pull == "surprisal":
        likely = torch.where(mask, chosen(batch.require("old_logprobs"), mask), torch.inf)
        ranks = (-likely).argsort(dim=1, stable=True).argsort(dim=1)  # what is not chosen sorts in front
        return chosen((ranks - (~mask).sum(1, keepdim=True)).double(), mask)
    return chosen(batch.require("entropies"), mask)


def _spread_by_entropy(bonus: Float[Tensor, "batch response"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Σ|bonus| of the response, handed out in proportion to entropy."""
    entropies = chosen(batch.require("entropies"), batch.response_mask)
    total = entropies.sum(1, keepdim=True)
    return bonus.abs().sum(1, keepdim=True) * entropies / torch.where(total > 0, total, 1.0)


def _find_mixed_groups(batch: TokenBatch) -> Bool[Tensor, "batch 1"]:
    """Whether the rewards of the row's group differ."""
    rewards = batch.rewards.double()[:, None]
    count = group_totals(torch.ones_like(rewards), batch.group_ids, batch.reducer)
    deviation = rewards - group_totals(rewards, batch.group_ids, batch.reducer) / count
    differs = (deviation.abs() > 1e-12 * rewards.abs()).double()
    return group_totals(differs, batch.group_ids, batch.reducer) > 0


ROWS = Rows(
    transforms={
        "directed_self_distillation": MethodSpec(
            fn=directed_self_distillation,
            report_section="bonus",
            paper=DASD,
            requires=direction_fields,
            scope=direction_scope,
            domains={"beta": "[0, inf)", "rho": "[0, 1]", "cap": "(0, inf)", "skip_first": "[0, inf)"},
            renamed={"direction": "pull", "gate": "sigmoid", "only": "responses"},
            limits=(Limit({"beta": 0.0}),),
        ),
        "randomly_directed_self_distillation": MethodSpec(
            fn=randomly_directed_self_distillation,
            report_section="bonus",
            paper="-",
            requires=GAP | {"entropies"},
            scope="response",
            renamed={"gate": "sigmoid"},
            domains={"beta": "[0, inf)", "rho": "[0, 1]", "cap": "(0, inf)"},
            limits=(Limit({"beta": 0.0}),),
        ),
    },
    presets={
        "dasd": ["group_normalized", {"directed_self_distillation": {"beta": 0.1, "rho": 0.2}}],
        "dasd_bottom": ["group_normalized", {"directed_self_distillation": {"tail": "bottom"}}],
        "dasd_conformity": ["group_normalized", {"directed_self_distillation": {"pull": "conformity"}}],
        "dasd_novelty": ["group_normalized", {"directed_self_distillation": {"pull": "novelty"}}],
        "dasd_flipped": ["group_normalized", {"directed_self_distillation": {"pull": "flipped"}}],
        "dasd_flip_low": ["group_normalized", {"directed_self_distillation": {"pull": "flip_low"}}],
        "dasd_flip_high": ["group_normalized", {"directed_self_distillation": {"pull": "flip_high"}}],
        "dasd_attract": ["group_normalized", {"directed_self_distillation": {"pull": "attract_only"}}],
        "dasd_repel": ["group_normalized", {"directed_self_distillation": {"pull": "repel_only"}}],
        "dasd_permuted": ["group_normalized", {"randomly_directed_self_distillation": {"shuffle": "router"}}],
        "dasd_permuted_gap": ["group_normalized", {"randomly_directed_self_distillation": {"shuffle": "gap"}}],
    },
)
