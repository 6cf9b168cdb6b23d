"""Compile the attention kernels for GPUs that are not here; prints shared memory and the kinds of instructions."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokencredit.collect.attention import kernels as attention_kernels
from tokencredit.collect.attention.fused import constants_of, tile_of

KERNELS = ("head_moments", "mean_rows", "head_influences")
FLOATS = ("log_sums", "entropies", "reaches", "distances", "sinks", "dropped", "influences")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kind_of(name: str, dtype: str) -> str:
    if name in ("query", "key"):
        return f"*{dtype}"
    if name in ("lows", "highs"):
        return "*i32"
    if name in FLOATS:
        return "*fp32"
    if name == "scale":
        return "fp32"
    return "i64" if name.startswith(("query_", "key_")) else "i32"


def compile_one(kernel: str, capability: int, dtype: str, width: int) -> str:
    function, tile = getattr(attention_kernels, kernel), tile_of(width, DTYPES[dtype])
    constants = constants_of(2, width, DTYPES[dtype], None, tile) | {"UPCAST": False}
    if kernel == "head_moments":
        constants["DISTANCES"] = True
    names = [parameter.name for parameter in function.params]
    signature = {name: "constexpr" if name in constants else kind_of(name, dtype) for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = compiled.asm["ptx"]
    return f"{kernel} {compiled.metadata.shared} {int('tf32' in text)} {int('mma' in text)}"


def main() -> None:
    capability, dtype, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for kernel in KERNELS:
        print(compile_one(kernel, capability, dtype, width))


if __name__ == "__main__":
    main()
