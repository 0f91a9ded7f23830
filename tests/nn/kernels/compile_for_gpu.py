"""Compile every kernel for GPUs of two generations, which needs none of them; print how many there were."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llm_atlas.nn.kernels import rms_norm, swiglu

N = "dtype"  # stands for the dtype in turn
KERNELS = [
    (rms_norm._forward, [N, N, N, "*fp32", "i32", "fp32"], {"WEIGHTED": True, "BLOCK": 1024}),
    (rms_norm._backward, [N, N, N, "*fp32", N, "*fp32", "i32", "i32"], {"WEIGHTED": True, "BLOCK": 1024}),
    (swiglu._forward, [N, N, N, "i32"], {"BLOCK": 1024}),
    (swiglu._backward, [N, N, N, N, N, "i32"], {"BLOCK": 1024}),
]

count = 0
for architecture in (80, 90):  # A100, H100
    for dtype in ("*fp32", "*fp16", "*bf16"):
        for kernel, types, constants in KERNELS:
            names = kernel.arg_names
            signature = dict(zip(names, [dtype if kind == N else kind for kind in types], strict=False))
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
            )
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            assert made.asm["cubin"], f"{kernel.__name__} for {architecture}, {dtype}"
            count += 1
print(f"{count} kernels")
