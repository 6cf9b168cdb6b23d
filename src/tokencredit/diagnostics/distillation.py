"""What distillation did with its credit: where the gap lies, what the weights were, what the router moved."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.masked import chosen, positions, response_lengths, row_quantile
from tokencredit.methods.distillation import discrepancy_weights, mass_multiplier, teacher_gap
from tokencredit.methods.self_distillation import bonus_direction, scaled_gap, signed_gap
from tokencredit.records import TokenBatch

BINS = 10


def position_profile(
    x: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], bins: int = BINS
) -> dict[str, list[float | None]]:
    """Mean of `x` and of |x| over the chosen tokens of each of `bins` equal stretches of the responses.

    stretch of token t of n:  ⌊bins · t / n⌋
    """
    place = (positions(mask) * bins // response_lengths(mask).clamp_min(1)).clamp(0, bins - 1)
    values = chosen(x, mask)
    count = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, place[mask].cpu(), torch.ones(int(mask.sum())).double()
    )
    found: dict[str, list[float | None]] = {}
    for name, part in (("mean", values), ("mean_abs", values.abs())):
        total = torch.zeros(bins, dtype=torch.float64).index_add_(0, place[mask].cpu(), part[mask].cpu())
        found[name] = [round(float(t / c), 4) if c else None for t, c in zip(total, count, strict=True)]
    return found


def discrepancy_summary(batch: TokenBatch, *, gamma: float = 0.5) -> dict[str, float]:
    """IW-OPD in numbers: weights, advantage mass, and how positional they are.

    * `weight_mean`, `weight_min`, `weight_max`. * `mass_multiplier`: mean over responses of Σ w|A| / Σ |A|.
    * `first_share`: share of Σ|A| in the first 30 % of the tokens.
    * `half_mass`: share of the way at which half of Σ|A| is spent.
    * `distance`: mean over responses of max_t |F_t − t/n|; 0 means that the weight is a function of position.
    """
    mask, gap = batch.response_mask, teacher_gap(batch)
    weights = discrepancy_weights(batch, gamma=gamma)
    length = response_lengths(mask).clamp_min(1)
    mass = gap.abs().sum(1, keepdim=True)
    spent = (gap.abs().cumsum(1) - gap.abs()) / torch.where(mass > 0, mass, 1.0)
    way = positions(mask) / length
    live = (mass > 0)[:, 0]
    if not bool(live.any()):
        return {}
    half = torch.where(mask & (spent < 0.5), way, 0.0).amax(1)
    first = torch.where(mask & (way < 0.3), gap.abs(), 0.0).sum(1) / torch.where(mass > 0, mass, 1.0)[:, 0]
    distance = torch.where(mask, (spent - way).abs(), 0.0).amax(1)
    return {
        "weight_mean": float(weights[mask].mean()),
        "weight_min": float(weights[mask].min()),
        "weight_max": float(weights[mask].max()),
        "mass_multiplier": float(mass_multiplier(weights, gap)[live].mean()),
        "first_share": float(first[live].mean()),
        "half_mass": float(half[live].mean()),
        "distance": float(distance[live].mean()),
    }


def router_summary(
    batch: TokenBatch, advantages: Float[Tensor, "batch response"], *, beta: float = 0.1, rho: float = 0.2
) -> dict[str, float]:
    """DASD in numbers, at the default options of `directed_self_distillation` but for β and ρ.

    * `router_positive`, `router_negative`: Σ of the router's values of one sign, a token. `attracted`: share of tokens.
    * `bonus_<arm>_<sign of δ>_<correct|wrong>`: Σ bonus a token, arms "attract" and "repel".
    * `bonus_rms`, `advantage_rms`, and `overruled`: share of tokens whose sign the bonus changes. `advantages` are the
      verifier's. * `gap_mean` (≤ 0 up to noise under the policy's own samples), `gap_abs`, `entropy_p80`.
    """
    mask, gap = batch.response_mask, teacher_gap(batch)
    router = bonus_direction(batch, "router", rho=rho)
    bonus = signed_gap(scaled_gap(gap, batch, "mean_abs"), router, beta=beta)
    base, count = chosen(advantages, mask), max(1, int(mask.sum()))
    found = {
        "router_positive": float(router.clamp_min(0).sum()) / count,
        "router_negative": float(router.clamp_max(0).sum()) / count,
        "attracted": float((mask & (router > 0)).sum()) / count,
        "bonus_rms": float((bonus.square().sum() / count).sqrt()),
        "advantage_rms": float((base.square().sum() / count).sqrt()),
        "overruled": float((mask & ((base + bonus) * base < 0)).sum()) / count,
        "gap_mean": float(gap.sum()) / count,
        "gap_abs": float(gap.abs().sum()) / count,
        "entropy_p80": float(row_quantile(chosen(batch.require("entropies"), mask), mask, 0.8).mean()),
    }
    right = (batch.rewards > 0)[:, None]
    for arm, in_arm in (("attract", router > 0), ("repel", router < 0)):
        for sign, of_sign in (("up", gap > 0), ("down", gap < 0)):
            for verdict, rows in (("correct", right), ("wrong", ~right)):
                picked = mask & in_arm & of_sign & rows
                found[f"bonus_{arm}_{sign}_{verdict}"] = float(torch.where(picked, bonus, 0.0).sum()) / count
    return found
