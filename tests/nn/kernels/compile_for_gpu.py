"""Compile every kernel for GPUs of two generations, which needs none of them; print how many there were.

With --all, also every tile that the attention kernels try: slow, and what to run after a change of `TILES`.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llm_atlas.nn.kernels import flash, rms_norm, swiglu

N = "dtype"  # stands for the dtype in turn
KERNELS = [
    (rms_norm._forward, [N, N, N, "*fp32", "i32", "fp32"], {"WEIGHTED": True, "BLOCK": 1024}),
    (rms_norm._backward, [N, N, N, "*fp32", N, "*fp32", "i32", "i32"], {"WEIGHTED": True, "BLOCK": 1024}),
    (swiglu._forward, [N, N, N, "i32"], {"BLOCK": 1024}),
    (swiglu._backward, [N, N, N, N, N, "i32"], {"BLOCK": 1024}),
    (flash._delta, [N, N, "*fp32", *["i32"] * 8], {"WIDTH": 80, "DIM": 128, "BLOCK": 32}),
]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have on an A100 and an H100
SIZES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}
ATTENTION = {"forward": flash._forward, "queries": flash._backward_queries, "keys": flash._backward_keys}
WHO = {  # who may look at whom, and whether heads fill their tiles
    "all, padded": {"CAUSAL": False, "WINDOWED": False, "WIDTH": 48},
    "causal": {"CAUSAL": True, "WINDOWED": False},
    "window": {"CAUSAL": True, "WINDOWED": True},
}


def build(kernel, types, constants, architecture, options=None):
    """The compiled kernel; addresses and distances between rows are multiples of 16, as they mostly are."""
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    even = [name for name, kind in signature.items() if kind.startswith("*") or name.endswith("_row")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options or {})
    what = f"{kernel.__name__} for {architecture}, {types[0]}, {constants}, {options}"
    assert made.asm["cubin"], what
    assert made.metadata.shared <= SHARED[architecture], f"{what}: {made.metadata.shared} bytes are too many"


def attention(name, dtype, dim, tile, options, architecture, who):
    kernel, result = ATTENTION[name], [dtype, "*fp32"] if name == "forward" else [dtype, "*fp32", "*fp32"]
    gradients = {"forward": [], "queries": [dtype], "keys": [dtype, dtype]}[name]
    types = [dtype, dtype, dtype, *result, *gradients, *["i32"] * 12, *["i32"] * 4, "fp32", "i32", "i32"]
    constants = {"WIDTH": dim, "VALUE_WIDTH": dim, "DIM": dim, "VALUE_DIM": dim, "PRECISION": "ieee"}
    build(kernel, types, constants | WHO[who] | tile, architecture, options)


def cases(architecture, everything):
    """Arguments of `attention`: all there are, or the largest tiles with each kind of mask somewhere."""
    for name in ATTENTION:
        for (size, dim), tiles in flash.TILES[name].items():
            for dtype in [dtype for dtype, its in SIZES.items() if its == size]:
                tried = flash.tilings(name, size, dim)
                if everything:
                    yield from ((name, dtype, dim, *one, architecture, who) for one in tried for who in WHO)
                elif dim == 64 or (dim, dtype) == (128, "*fp16"):
                    rows = [kept * passing * stages for kept, passing, _, stages in tiles]
                    who = {"*fp32": "window", "*fp16": "causal", "*bf16": "all, padded"}[dtype]
                    yield name, dtype, dim, *tried[rows.index(max(rows))], architecture, who


count = 0
for architecture in SHARED:
    for dtype in SIZES:
        for kernel, types, constants in KERNELS:
            build(kernel, [dtype if kind == N else kind for kind in types], constants, architecture)
            count += 1
    for case in cases(architecture, "--all" in sys.argv):
        attention(*case)
        count += 1
print(f"{count} kernels")
