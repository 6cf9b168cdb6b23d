"""The kernels of the head without a GPU: float64's numbers in Triton's interpreter, and compiled for two GPUs."""

from pathlib import Path

import pytest
import torch
from kernel_runs import SHARED_MEMORY, run

from tokencredit.collect.head import fused

HERE = Path(__file__).parent

pytest.importorskip("triton")


def test_the_kernels_give_the_numbers_of_float64() -> None:
    lines = run(HERE / "head_kernel_parity.py", TRITON_INTERPRET="1")
    errors = {line.partition(": ")[0]: float(line.partition(": ")[2]) for line in lines}
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("capability", "dtype", "flag"), [(90, "bf16", 1), (80, "fp32", 0)])
def test_the_kernels_compile_without_a_gpu(capability: int, dtype: str, flag: int) -> None:
    lines = run(HERE / "head_kernel_compile.py", capability, dtype, flag)
    assert [line.split()[0] for line in lines] == ["fold_tile", "tile_gradient"]
    assert all(int(line.split()[1]) <= SHARED_MEMORY for line in lines)


def test_the_cpu_takes_torchs_operations() -> None:
    assert not fused.fits(torch.zeros(2, 4))
