"""Self-distillation as credit: the policy under a privileged prompt is the teacher of the policy without it.

The gap δ_t = ln π(y_t | x, c, y_<t) − ln π(y_t | x, y_<t) is `teacher_logprobs − old_logprobs`, in nats, detached. It
is positive where the privileged context c makes the sampled token more likely.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen, unit_sums
from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import quantile
from tokencredit.methods.distillation.log_ratio import GAP, teacher_gap
from tokencredit.methods.outcome import correct_rows
from tokencredit.methods.spec import Limit, MethodSpec, Rows, Scope

HEALTHY = 0.93  # share of the first entropy below which AntiSD pauses


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
    share = _schedule_share(lam, lam_end, warmup, _share_done(batch, decay_steps)) if moves else lam
    return (1.0 - share) * a + share * credit


def rlsd_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `rlsd` reads: the step only where λ moves, and moves by steps."""
    moves = hyperparameters["lam_end"] is not None or hyperparameters["warmup"] > 0.0
    by_step = moves and hyperparameters["decay_steps"] is not None
    return GAP | {"step"} if by_step else GAP


def _share_done(batch: TokenBatch, steps: int | None) -> float:
    """The share of the schedule that is done: of so many steps, or of the whole run."""
    return (batch.progress or 0.0) if steps is None else min(batch.require("step") / steps, 1.0)


def _schedule_share(lam: float, lam_end: float | None, warmup: float, done: float) -> float:
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


def switch_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `antisd` reads: the teacher's entropies only where they switch it."""
    return GAP if hyperparameters["h_warm"] is None else GAP | {"teacher_entropies"}


def switch_scope(hyperparameters: Mapping[str, Any]) -> Scope:
    """The scope of `antisd`: its switch is the median of the batch."""
    return "token" if hyperparameters["h_warm"] is None else "batch"


ROWS = Rows(
    transforms={
        "add_teacher_gap": MethodSpec(
            fn=add_teacher_gap,
            report_section="bonus",
            paper="arXiv:2605.11609 (+SD)",
            requires=GAP,
            limits=(Limit({"lam": 0.0}),),
        ),
        "rlsd": MethodSpec(
            fn=rlsd,
            report_section="bonus",
            paper="arXiv:2604.03128",
            requires=rlsd_fields,
            domains={
                "lam": "[0, 1]",
                "lam_end": "[0, 1]",
                "eps": "[0, 1]",
                "warmup": "[0, 1]",
                "decay_steps": "[1, inf)",
            },
            limits=(Limit({"lam": 0.0, "lam_end": 0.0}), Limit({"lam": 0.0, "lam_end": None})),
            keeps_sign=True,
            renamed={"form": {"released": "product", "paper": "minimum"}},
        ),
        "rlrt": MethodSpec(
            fn=rlrt,
            report_section="bonus",
            paper="arXiv:2605.10781",
            requires=GAP,
            domains={"lam": "[0, 1]", "eps": "[0, 1]"},
            limits=(Limit({"lam": 0.0}),),
            keeps_sign=True,
        ),
        "srpo": MethodSpec(
            fn=srpo,
            paper="arXiv:2604.02288",
            requires=GAP | {"teacher_entropies"},
            scope="batch",
            domains={"beta": "[0, inf)"},
        ),
        "antisd": MethodSpec(
            fn=antisd,
            report_section="bonus",
            paper="arXiv:2605.11609",
            requires=switch_fields,
            scope=switch_scope,
            domains={"lam": "[0, inf)", "g": "[0, 1]", "h_warm": "(0, inf)"},
            limits=(Limit({"lam": 0.0}), Limit({"g": 0.0})),
        ),
    },
    presets={
        "grpo_sd": ["group_normalized", {"add_teacher_gap": {"lam": 1.0}}],
        "rlsd": ["group_normalized", "rlsd"],
        "rlrt": ["group_normalized", "rlrt"],
        "srpo": ["group_normalized", "srpo"],
        "antisd": ["group_normalized", "antisd"],
    },
)
