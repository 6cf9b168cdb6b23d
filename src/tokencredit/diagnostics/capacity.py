"""Where exact credit and information about the outcome lie, and whether entropy bounds them as it must."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import TokenBatch
from tokencredit.methods.entropy.quadrants import QUADRANTS, high_entropy, quadrant_masks
from tokencredit.methods.exact import binary_entropy


class Bounds(NamedTuple):
    """States examined, violations of I ≤ min(H, h_b(V)), of I ≤ H, and how tight the two bounds are: Σ I / Σ bound."""

    states: int
    violations: int
    entropy_violations: int
    tightness: float
    entropy_tightness: float


def information_bounds(
    information: Float[Tensor, "*state"],
    entropies: Float[Tensor, "*state"],
    values: Float[Tensor, "*state"],
    *,
    tolerance: float,
) -> Bounds:
    """Check I ≤ min(H, h_b(V)) at every state. `tolerance` absorbs rounding: 1e-12 in float64, 1e-6 in float32."""
    i, h = information.double(), entropies.double()
    sharp = torch.minimum(h, binary_entropy(values.double().clamp(0.0, 1.0)))
    return Bounds(
        states=i.numel(),
        violations=int((i > sharp + tolerance).sum()),
        entropy_violations=int((i > h + tolerance).sum()),
        tightness=_share(i.sum(), sharp.sum()),
        entropy_tightness=_share(i.sum(), h.sum()),
    )


def quadrant_shares(
    quantity: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
) -> dict[str, float]:
    """Share of Σ|quantity| in each quadrant, on tokens of high entropy ("high"), and in groups without credit ("none").

    Quadrants are those of `advantages` (one sign a response); a group whose outcomes are all equal lies in none.
    """
    mass = chosen(quantity, batch.response_mask).abs()
    members: dict[str, Bool[Tensor, "batch response"]] = quadrant_masks(advantages, batch)
    inside = torch.stack([members[name] for name in QUADRANTS]).any(0)
    members |= {"none": batch.response_mask & ~inside, "high": high_entropy(batch)}
    return {name: _share(torch.where(where, mass, 0.0).sum(), mass.sum()) for name, where in members.items()}


def token_shares(advantages: Float[Tensor, "batch response"], batch: TokenBatch) -> dict[str, float]:
    """Share of the tokens in each quadrant, and of high entropy."""
    return quadrant_shares(torch.ones_like(advantages), advantages, batch)


def _share(part: Float[Tensor, ""], whole: Float[Tensor, ""]) -> float:
    return float(part / whole) if float(whole) > 0 else float("nan")
