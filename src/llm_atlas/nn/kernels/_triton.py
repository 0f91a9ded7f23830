"""Triton where it is installed. Where it is not, kernels can be imported and read, but not called."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["check", "jit", "tl", "triton"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(kernel: Callable | None = None, **options: object) -> Callable:
    """`triton.jit`, or the function as it is. Used as @jit or as @jit(...) with options of `triton.jit`."""
    if kernel is None:
        return partial(jit, **options)
    # Unwrapped: a checker of types around it would hide its source and its globals from Triton.
    return kernel if triton is None else triton.jit(inspect.unwrap(kernel), **options)


def check(name: str, kernel: Callable, *tensors: Tensor) -> None:
    """Can `kernel` run on these? If not, say in one line what is missing."""
    if triton is None:
        raise ImportError(f'the Triton form of {name} needs Triton: pip install "llm-atlas[triton]"')
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"the Triton form of {name} takes float32, float16 or bfloat16, got {tensor.dtype}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors are on {tensors[0].device} and {tensor.device}: they must be together")
    interpreted = not isinstance(kernel, triton.JITFunction)
    if tensors[0].device.type == "cpu" and not interpreted:
        raise ValueError(
            f"the Triton form of {name} runs on a GPU, got tensors on the CPU: use the readable form,"
            " or set TRITON_INTERPRET=1 before the import to try it slowly"
        )
