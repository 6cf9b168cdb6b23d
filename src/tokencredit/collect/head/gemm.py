"""Matrix products of the head: in float32 whatever the inputs are, by the fastest product that gives that.

On CPUs with AVX-512 that are not Intel's, torch's own float32 product runs an AVX2 path and oneDNN is twice as fast, in
true float32 both; on AVX2 they draw, and torch's is taken. The operator is private, so it is tried once and left alone
if it does not do what it should. The choice depends on the machine alone, never on a timing: runs repeat bit for bit.
On CUDA bfloat16 matrices are multiplied on tensor cores into float32 results, with no rounding in between.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.errors import TokenCreditError

TILE = 2048  # vocabulary entries on the CPU; with `TOKENS` rows a tile is 8 MiB and stays in the cache
TOKENS = 1024
CUDA_TOKENS = 4096
CUDA_WORKSPACE = 1 << 29  # bytes of all tiles that are held at a time on a GPU


class Tiling(NamedTuple):
    """Sizes of a tile of logits: vocabulary entries and tokens."""

    vocab: int
    tokens: int


def tiling(hidden: Tensor, held: int = 3) -> Tiling:
    """The tile for a device: as large as its cache on the CPU, few and large on a GPU, where launches cost.

    Args:
      held: float32 tiles that exist at the same time.
    """
    if not hidden.is_cuda:
        return Tiling(TILE, TOKENS)
    widest = CUDA_WORKSPACE // (4 * CUDA_TOKENS * held)
    return Tiling(1 << (widest.bit_length() - 1), CUDA_TOKENS)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function of tensors with autocast switched off, on the device of the first tensor among its arguments.

    A host's autocast would round the products of the head to 16 bits. For an autograd function decorate `forward` and
    `backward`: the device of a backward is that of the first saved tensor.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        tensors = tensors or [item for item in args[0].saved_tensors if item is not None]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def exact(values: Tensor) -> Tensor:
    """In float64, where sums of tiles are merged; in float32 on Apple's GPUs, which have none."""
    return values.float() if values.device.type == "mps" else values.double()


def whole_matrix(weight: Tensor) -> Tensor:
    """The output matrix gathered from all processes (FSDP 2); a part that cannot be gathered from here is refused."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if weight.ndim != 2 or weight.numel() == 0:
        raise TokenCreditError(
            f"the output matrix has shape {tuple(weight.shape)}: its parameters are spread over processes",
            hint="take log-probs from the host's own pass, or train with DDP",
        )
    return weight


def host_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices in the host's autocast type on CUDA, where products of float32 are many times slower; else as is.

    Only operands are rounded, as in the host's own head; the logits stay float32.
    """
    weight = whole_matrix(weight)
    if not hidden.is_cuda or not torch.is_autocast_enabled("cuda"):
        return hidden, weight
    dtype = torch.get_autocast_dtype("cuda")
    return hidden.to(dtype), weight.to(dtype)


@cache
def onednn_available() -> bool:
    """Whether oneDNN's float32 product gains something here, works and agrees with torch's."""
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    left, right = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 2, 20).view(5, 4)
    try:
        product = _onednn(left, right)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(product, left @ right.T, rtol=1e-5, atol=1e-6)


def product_nt(
    left: Float[Tensor, "m k"], right: Float[Tensor, "n k"], *, onednn: bool | None = None
) -> Float[Tensor, "m n"]:
    """left · rightᵀ, in float32 or wider whatever the inputs are: 16-bit logits would cost up to |z|/256 nats."""
    if left.dtype in (torch.float32, torch.float64):
        return _product(left, right.to(left.dtype), onednn)
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return _product(left.float(), right.float(), onednn)


def product_nn(
    left: Float[Tensor, "m n"], right: Float[Tensor, "n k"], *, onednn: bool | None = None
) -> Float[Tensor, "m k"]:
    """left · right, accumulated in the wider of float32 and the left's type."""
    if _narrow(left, right):
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    return _product(left, right.to(left.dtype).T, onednn)


def accumulate_tn(
    out: Float[Tensor, "n k"],
    left: Float[Tensor, "m n"],
    right: Float[Tensor, "m k"],
    *,
    fresh: bool,
    onednn: bool | None = None,
) -> None:
    """out = leftᵀ · right if `fresh` (what `out` held is ignored), else out += leftᵀ · right; in the type of `out`."""
    beta = 0.0 if fresh else 1.0
    if _narrow(left, right):
        torch.addmm(out, left.to(right.dtype).T, right, out_dtype=torch.float32, beta=beta, out=out)
        return
    right = right.to(left.dtype)
    if _wants_onednn(left, onednn):
        part = _product(left.T, right.T, onednn)
        out.copy_(part) if fresh else out.add_(part)
    else:
        torch.addmm(out, left.T, right, beta=beta, out=out)


def product_into(
    left: Float[Tensor, "m k"], right: Float[Tensor, "n k"], out: Float[Tensor, "m n"]
) -> Float[Tensor, "m n"]:
    """left · rightᵀ in float32, written into `out` where the product can: fresh pages are not free."""
    left, right = left.float(), right.float()
    if left.device.type == "cpu" and onednn_available() and min(out.shape) > 0:
        return _onednn(left, right)
    return torch.mm(left, right.T, out=out)


def _narrow(gradient: Tensor, right: Tensor) -> bool:
    """Whether a gradient is to be rounded to the 16 bits of its partner, for tensor cores; fp16 would underflow."""
    return right.is_cuda and right.dtype == torch.bfloat16 and gradient.dtype != torch.float64


def _product(left: Tensor, right: Tensor, onednn: bool | None) -> Tensor:
    if _wants_onednn(left, onednn) and min(left.shape[0], right.shape[0]) > 0:
        return _onednn(left, right)
    return left @ right.T


def _wants_onednn(left: Tensor, onednn: bool | None) -> bool:
    able = left.dtype == torch.float32 and left.device.type == "cpu"
    return able and (onednn_available() if onednn is None else onednn)


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
