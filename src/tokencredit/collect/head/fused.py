"""The kernels of `head.kernels` where they can run: one pass over a tile of logits in place of six to nine."""

import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The interpreter, by which kernels are tested, computes with numpy on the CPU; numpy has no bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024  # vocabulary entries that a program reads at a time

Folded = tuple[Float[Tensor, " token"], Float[Tensor, " token"], Float[Tensor, " token"]]


def available() -> bool:
    """Whether Triton can be imported and torch was built for a GPU that it compiles for."""
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return False
    try:
        import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


def fits(hidden: Tensor) -> bool:
    """Whether the kernels can read the logits of these states: on CUDA, in float32."""
    return (hidden.is_cuda or INTERPRETED) and hidden.dtype != torch.float64 and hidden.shape[0] > 0 and available()


def fold(
    logits: Float[Tensor, "token tile"], targets: Int[Tensor, " token"], start: int, readout: Any, out: Folded
) -> None:
    """Statistics of a tile of raw products, written into `out`: lse and mean of the others, logit of the target.

    The third is written only where the tile, whose first vocabulary entry is `start`, holds the target.
    """
    from tokencredit.collect.head import kernels

    lse, mean, target_logits = out
    kernels.fold_tile[(logits.shape[0],)](
        *(logits, logits.stride(0), targets.contiguous(), lse, mean, target_logits, start, logits.shape[1]),
        *_cap(readout),
        CAPPED=readout.softcap is not None,
        BLOCK=BLOCK,
    )


def gradient(
    logits: Float[Tensor, "token tile"],
    targets: Int[Tensor, " token"],
    start: int,
    readout: Any,
    numbers: tuple[Tensor, Tensor, Tensor | None, Tensor],
    dtype: torch.dtype,
) -> Float[Tensor, "token tile"]:
    """Gradient of a tile of raw products, in `dtype`; `numbers` per token: lse, c, b or None, value at the target."""
    from tokencredit.collect.head import kernels

    lse, constant, on_entropy, at_target = (None if item is None else item.contiguous() for item in numbers)
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    columns = logits.shape[1]
    kernels.tile_gradient[(logits.shape[0], -(-columns // BLOCK))](
        *(logits, logits.stride(0), targets.contiguous(), lse, constant),
        *(constant if on_entropy is None else on_entropy, at_target, out, out.stride(0), start, columns),
        *(*_cap(readout), 1.0 / readout.temperature),
        CAPPED=readout.softcap is not None,
        ENTROPY=on_entropy is not None,
        BLOCK=BLOCK,
    )
    return out


def _cap(readout: Any) -> tuple[float, float]:
    cap = readout.softcap or 1.0
    return cap, cap / readout.temperature
