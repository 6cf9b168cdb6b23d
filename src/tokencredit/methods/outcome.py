"""Estimators that give every token of a response the same credit, from the outcome alone."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import group_sums
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.spec import MethodSpec, Rows


def group_normalized(batch: TokenBatch, *, eps: float = 1e-6) -> Float[Tensor, "batch response"]:
    """GRPO: the outcome against its group, in standard deviations.

        A = (r − mean) / (std + eps)

    mean and unbiased std run over the responses of the group; a group of one, or of equal rewards, gives 0. Inside a
    host the batch carries the host's own advantages (`host_advantages`), and those are passed on untouched, so that the
    host's reward weights, scaling and epsilon stay in force.

    Paper: GRPO (arXiv:2402.03300). Not stated: eps; ours follows verl (TRL adds 1e-4 and is used as it is inside TRL).
    Deviation: verl gives a group of one A = r / (1 + 1e-6) here, and r in its loop for RLOO; ours gives 0 in both. TRL
    has no groups of one.
    """
    if batch.host_advantages is not None:
        return _spread_to_tokens(batch.host_advantages.double(), batch)
    centred, count = _center(batch)
    squares = group_sums(centred.square()[:, None], batch)[:, 0]
    std = (squares / (count - 1).clamp_min(1.0)).sqrt()
    return _spread_to_tokens(torch.where(std > 0, centred / torch.where(std > 0, std + eps, 1.0), 0.0), batch)


def group_centered(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """Dr. GRPO: the outcome against the mean of its group.

        A = r − mean

    A group of one gives 0. Equals `group_normalized` up to the factor std of the group.

    Paper: Dr. GRPO (arXiv:2503.20783). Its fixed-length denominator is the host's (`loss_type: dr_grpo` in TRL).
    """
    return _spread_to_tokens(_center(batch)[0], batch)


def leave_one_out(batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """RLOO: the outcome against the mean of the other responses.

        A_i = r_i − mean_{j ≠ i} r_j = G / (G − 1) · (r_i − mean)

    G is the size of the group; a group of one gives 0.

    Paper: RLOO (arXiv:2402.14740).
    """
    centred, count = _center(batch)
    return _spread_to_tokens(centred * count / (count - 1).clamp_min(1.0), batch)


def signed_outcome(
    batch: TokenBatch, *, positive: float = 0.1, negative: float = 1.0, threshold: float = 0.0
) -> Float[Tensor, "batch response"]:
    """W-REINFORCE, PSR and NSR: a constant by the sign of the outcome, without a group baseline.

        A = positive   if r > threshold,   −negative   otherwise

    `threshold`: see `correct_rows`. PSR is (1, 0), NSR (0, 1), plain REINFORCE on ±1 (1, 1).

    Paper: The Surprising Effectiveness of Negative Reinforcement (arXiv:2506.01347), λ = positive = 0.1. Deviation: the
    released code drops the other rows before the token mean for PSR and NSR; here they stay, with credit 0.
    """
    credit = torch.full_like(batch.rewards, -negative, dtype=torch.float64)
    return _spread_to_tokens(credit.masked_fill(correct_rows(batch, threshold), positive), batch)


def correct_rows(batch: TokenBatch, threshold: float = 0.0) -> Bool[Tensor, " batch"]:
    """Which responses count as correct: those with a reward strictly above `threshold`.

    Every method and metric that asks "was it correct?" asks here. The default 0 splits 0/1 rewards and ±1 rewards
    alike. With shaped rewards it is wrong: where a format alone pays 0.1, every well-formed response is above 0, so set
    the threshold between the best reward of a wrong answer and the least of a right one.
    """
    return batch.rewards > threshold


def _center(batch: TokenBatch) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Outcome minus the mean of its group, and the size of the group; 0 exactly where all outcomes are equal."""
    rewards = batch.rewards.detach().double()
    stats = torch.stack((rewards, torch.ones_like(rewards)), dim=1)
    total, count = group_sums(stats, batch).unbind(1)
    deviation = rewards - total / count
    return torch.where(deviation.abs() > 1e-12 * rewards.abs(), deviation, 0.0), count


def _spread_to_tokens(per_response: Float[Tensor, " batch"], batch: TokenBatch) -> Float[Tensor, "batch response"]:
    """One column, spread without a copy; what lies outside the mask is left to whoever reads it."""
    return per_response.detach()[:, None].expand(batch.response_mask.shape)


ROWS = Rows(
    MethodSpec(
        group_normalized,
        "arXiv:2402.03300",
        scope="group",
        domains={"eps": "[0, inf)"},
        is_host_baseline=True,
        in_blocks=True,
    ),
    MethodSpec(group_centered, "arXiv:2503.20783", scope="group", in_blocks=True),
    MethodSpec(leave_one_out, "arXiv:2402.14740", scope="group", in_blocks=True),
    MethodSpec(
        signed_outcome,
        "arXiv:2506.01347",
        scope="response",
        domains={"positive": "[0, inf)", "negative": "[0, inf)"},
    ),
    presets={
        "grpo": ["group_normalized"],
        "dr_grpo": ["group_centered"],
        "rloo": ["leave_one_out"],
        "w_reinforce": ["signed_outcome"],
        "psr": [{"signed_outcome": {"positive": 1.0, "negative": 0.0}}],
        "nsr": [{"signed_outcome": {"positive": 0.0, "negative": 1.0}}],
    },
)
