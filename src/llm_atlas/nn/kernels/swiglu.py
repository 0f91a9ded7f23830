"""SwiGLU's element-wise half in one pass over memory, forward and backward."""

from __future__ import annotations  # without Triton, `tl.constexpr` is a word and nothing more

import torch
from torch import Tensor

from llm_atlas.nn.kernels._triton import check, jit, tl

_BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    r"""The Triton twin of `llm_atlas.nn.activations.swiglu`: $\operatorname{SiLU}(\text{gate}) \odot \text{up}$.

    gate, up: one shape, one dtype of float32, float16 and bfloat16, on a GPU; computed in float32, returned in their
    dtype. Two reads and one write an element, where the separate operations need three reads and two writes; only
    `gate` and `up` are kept for the backward pass, and the gate is computed there again.
    Errors: ValueError for shapes or dtypes that differ and for tensors on a CPU (outside of Triton's interpreter),
    TypeError for other dtypes, ImportError without Triton.
    Shazeer 2020, section 2 (arXiv 2002.05202); Triton: Tillet et al. 2019 (doi 10.1145/3315508.3329973).
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}: they must be alike"
        )
    check("swiglu", _forward, gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        if count := gate.numel():
            with torch.cuda.device_of(gate):
                _forward[(-(-count // _BLOCK),)](gate, up, out, count, BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if count := gate.numel():
            with torch.cuda.device_of(gate):
                _backward[(-(-count // _BLOCK),)](
                    grad.contiguous(), gate, up, grad_gate, grad_up, count, BLOCK=_BLOCK
                )
        return grad_gate, grad_up


@jit
def _forward(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@jit
def _backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    # SiLU(g) = g s, and its derivative is s + g s (1 - s).
    tl.store(grad_gate + at, (d * u * s * (1 + g * (1 - s))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (d * g * s).to(grad_up.dtype.element_ty), mask=inside)
