"""The fused attention kernels without a GPU: equal to the blocks in Triton's interpreter, and compiled for two GPUs."""

from pathlib import Path

import pytest
import torch
from kernel_runs import SHARED_MEMORY, run

from tokencredit.collect.attention import fused as attention_fused
from tokencredit.collect.attention.parts import AttentionRows, Visibility

HERE = Path(__file__).parent

pytest.importorskip("triton")


@pytest.mark.parametrize("kind", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_kernels_equal_the_blocks_in_the_interpreter(kind: int) -> None:
    # float32 of width 32, two masks; with the slow tests bfloat16 of width 80, which is padded to 128, and soft-capped
    # scores of width 24, six masks
    lines = run(HERE / "kernel_parity.py", kind, TRITON_INTERPRET="1")
    errors = {line.partition(": ")[0]: float(line.partition(": ")[2]) for line in lines}
    assert len(errors) == (2 if kind == 0 else 6)
    assert max(errors.values()) < 5e-5, errors  # mean distances reach 50 tokens, where float32 resolves 4e-6


def check_compiled(lines: list[str], dtype: str) -> None:
    assert len(lines) == 3
    for line in lines:
        kernel, shared, tf32, tensor_cores = line.split()
        assert int(shared) <= SHARED_MEMORY, line
        assert tf32 == "0", f"{kernel} rounds float32 products to TF32"
        assert tensor_cores == ("0" if dtype == "fp32" else "1"), line


@pytest.mark.parametrize(("capability", "dtype", "width"), [(90, "bf16", 128), (80, "fp32", 16)])
def test_kernels_compile_without_a_gpu(capability: int, dtype: str, width: int) -> None:
    check_compiled(run(HERE / "kernel_compile.py", capability, dtype, width), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("width", [16, 64, 80, 96, 112, 128, 192, 256])
def test_every_width_compiles_for_both_generations(capability: int, dtype: str, width: int) -> None:
    check_compiled(run(HERE / "kernel_compile.py", capability, dtype, width), dtype)


def test_a_mask_that_is_no_interval_is_left_to_the_blocks() -> None:
    query, rows = torch.zeros(1, 2, 6, 16), slice(2, 6)
    plane = torch.ones(6, 6, dtype=torch.bool).tril()
    seen = Visibility(lambda _, rows: plane[rows])
    whole = attention_fused.intervals(AttentionRows(query, query, seen, 1.0, rows=rows))
    assert whole is not None
    assert whole.low.tolist() == [[0, 0, 0, 0]] and whole.high.tolist() == [[3, 4, 5, 6]]
    plane[4, 1] = False
    holed = Visibility(lambda _, rows: plane[rows])
    assert attention_fused.intervals(AttentionRows(query, query, holed, 1.0, rows=rows)) is None
    plane[4] = False  # a row that sees nothing is an empty interval
    empty = attention_fused.intervals(AttentionRows(query, query, holed, 1.0, rows=rows))
    assert empty is not None and int(empty.high[0, 2] - empty.low[0, 2]) <= 0


def test_the_cpu_and_finite_biases_take_the_blocks() -> None:
    query = torch.zeros(1, 2, 6, 16)
    assert not attention_fused.fits(AttentionRows(query, query, Visibility(), 1.0))
    biased = Visibility(None, lambda _, rows: torch.zeros(6, 6)[rows])
    assert not attention_fused.fits(AttentionRows(query, query, biased, 1.0))
