"""Compile the kernels of the head for a GPU that is not here; prints their shared memory."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokencredit.collect.head import fused, kernels

INTEGERS = {"targets": "*i64", "stride": "i32", "out_stride": "i32", "start": "i32", "columns": "i32"}
NUMBERS = ("cap", "scale", "inverse")
FLAGS = {"fold_tile": ("CAPPED",), "tile_gradient": ("CAPPED", "ENTROPY")}


def main() -> None:
    capability, dtype, flag = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
    for name, flags in FLAGS.items():
        function = getattr(kernels, name)
        constants = {"BLOCK": fused.BLOCK} | dict.fromkeys(flags, flag)
        signature = {}
        for parameter in function.params:
            kind = INTEGERS.get(parameter.name, "fp32" if parameter.name in NUMBERS else "*fp32")
            kind = f"*{dtype}" if parameter.name == "out" else kind
            signature[parameter.name] = "constexpr" if parameter.name in constants else kind
        source = ASTSource(function, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(name, compiled.metadata.shared)


if __name__ == "__main__":
    main()
