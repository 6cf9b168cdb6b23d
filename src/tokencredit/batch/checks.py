"""What a tensor of a batch must be: dense, of a known dtype, with numbers that float32 can hold."""

import torch
from torch import Tensor

from tokencredit.errors import TokenCreditError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
LARGEST = torch.finfo(torch.float32).max  # credit is float32


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """A dense tensor with values and one of `dtypes`, or an error that names the field and the remedy."""
    if not isinstance(value, Tensor):
        raise TokenCreditError(
            f"`{name}` is a {type(value).__name__}: pass a torch.Tensor",
            hint=f"torch.as_tensor(…) makes one of a list or an array; its dtype is {dtype_names(dtypes)}",
        )
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TokenCreditError(
            f"`{name}` must be a dense tensor, got a {layout} one",
            hint="pad a nested tensor with `.to_padded_tensor(0)`, fill a sparse one with `.to_dense()`",
        )
    if value.is_meta:
        raise TokenCreditError(f"`{name}` is on the device meta, which holds no values")
    if value.dtype not in dtypes:
        raise TokenCreditError(
            f"`{name}` must be {dtype_names(dtypes)}, got {value.dtype}", hint="convert it with `.to(dtype)`"
        )


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes as an error names them."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def representable(value: Tensor) -> Tensor:
    """Where a value is finite as a float32."""
    # One comparison, which NaN fails too: `torch.isfinite` takes three times as long on a CPU.
    return value.abs() <= LARGEST if value.dtype == torch.float64 else value.abs() < torch.inf


def slack(dtype: torch.dtype) -> float:
    """How far rounding may move a number past the end of its domain.

    A log-prob is a logit minus the logarithm of a sum. Logits reach 32, and a number there is known to 16 machine
    epsilons: 0.125 in bfloat16, 0.016 in float16. Sums over a vocabulary and engines that report rounded numbers are
    given 1e-3 in every dtype.
    """
    return max(1e-3, 16.0 * torch.finfo(dtype).eps)
