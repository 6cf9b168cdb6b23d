"""ARCA: credit where the adapter acts."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.records import TokenBatch
from tokencredit.methods.likelihood import WEIGHT_DOMAINS, score_weights, weigh
from tokencredit.methods.spec import MethodSpec, Rows, at


def residual_fields(hyperparameters: Mapping[str, Any]) -> frozenset[str]:
    """What `adapter_residual` reads: the doubling ratios only if it gates by them."""
    gated = {"doubling_ratios"} if hyperparameters["gate"] > 0.0 else set()
    return frozenset({"adapter_residuals"} | gated)


def adapter_residual(
    advantages: Float[Tensor, "batch response"],
    batch: TokenBatch,
    *,
    sharpening: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    cap: float | None = None,
    gate: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """ARCA: credit in proportion to how far the adapter moves the hidden state that predicts a token.

        Â′_t = Â_t · n w_t,   w_t = α_t^p / Σ_k α_k^p,   α_t = ‖h_t^adapted − h_t^base‖₂

    h is the input of the language-model head at the position that predicts y_t; which layer is measured is the
    collector's option. p = `sharpening`; `mix`, `floor`, `cap`: see `score_weights`. An adapter that does nothing
    (B = 0), p = 0 or mix = 0 give weights of exactly one.

    * `gate`: weights of one in responses whose `doubling_ratios` lie below it. The ratio of the residual at twice the
      LoRA scaling to the residual is 2 where it is signal and 1 where it is rounding; 1.8 is a good gate in bf16.

    Paper: ARCA (arXiv:2606.00257). p = 1 is its equation, p = 2 (preset `arca_released`) what the base config of its
    reported sweep says. `mix`, `floor`, `cap` and `gate` are ours.
    """

    def weights(scores: Tensor, *rest: Tensor) -> Tensor:
        *ratios, mask = rest
        for ratio in ratios:
            scores = torch.where(ratio[:, None].double() >= gate, scores, torch.zeros_like(scores))
        return score_weights(scores, mask, sharpening=sharpening, mix=mix, floor=floor, cap=cap)

    ratios = [batch.require("doubling_ratios")] if gate > 0.0 else []
    return weigh(advantages, batch, weights, batch.require("adapter_residuals"), *ratios)


ROWS = Rows(
    MethodSpec(
        adapter_residual,
        "arXiv:2606.00257",
        requires=residual_fields,
        scope="response",
        domains=WEIGHT_DOMAINS | {"gate": "[0, 2]"},
        limits=(at(sharpening=0.0), at(mix=0.0)),
        keeps_sign=True,
        report_section="signals",
        in_blocks=True,
    ),
    presets={
        "arca": ["group_normalized", {"adapter_residual": {"sharpening": 1.0}}],
        "arca_released": ["group_normalized", {"adapter_residual": {"sharpening": 2.0}}],
    },
)
