"""RMSNorm in one pass over memory, forward and backward."""

from __future__ import annotations  # without Triton, `tl.constexpr` is a word and nothing more

import torch
from torch import Tensor

from llm_atlas.nn.kernels._triton import check, jit, tl, triton

_MAX_BYTES = 65536  # of one row: a program keeps it whole in registers and shared memory
_PROGRAMS = 256  # of the backward pass, each with a partial sum of the weight's gradient


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    r"""The Triton twin of `llm_atlas.nn.norm.rms_norm`: $\gamma\,x/\sqrt{\operatorname{mean}(x^2)+\epsilon}$.

    x: (..., dim), float32, float16 or bfloat16, on a GPU; weight: (dim,). Reduces in float32, returns the dtype of
    `x`. Forward: `x` is read once and the result written once, where separate operations pass over memory
    six times; one number a row is kept for the backward pass, which is fused too.
    Errors: ValueError for shapes that do not fit, rows of more than 64 KiB and tensors on a CPU (outside of Triton's
    interpreter), TypeError for other dtypes, ImportError without Triton.
    Zhang and Sennrich 2019, equation 4 (arXiv 1910.07467); Triton: Tillet et al. 2019 (doi 10.1145/3315508.3329973).
    """
    dim = x.shape[-1]
    if weight is not None and weight.shape != (dim,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but the last axis of x has {dim} features")
    check("rms_norm", _forward, x, *(() if weight is None else (weight,)))
    if dim * x.element_size() > _MAX_BYTES:
        raise ValueError(f"rows of {dim} {x.dtype} are over {_MAX_BYTES} bytes: use nn.norm.rms_norm")
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        flat = x.contiguous().view(-1, x.shape[-1])
        rows, dim = flat.shape
        out, inverse = torch.empty_like(flat), flat.new_empty(rows, dtype=torch.float32)
        scale = flat if weight is None else weight.contiguous()
        if rows:
            with _on(flat):
                _forward[(rows,)](
                    flat, scale, out, inverse, dim, eps, WEIGHTED=weight is not None, **_launch(dim)
                )
        ctx.save_for_backward(flat, scale, inverse)
        ctx.weighted = weight is not None
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        flat, scale, inverse = ctx.saved_tensors
        rows, dim = flat.shape
        grad_x = torch.empty_like(flat)
        programs = max(1, min(rows, _PROGRAMS))
        # Zeros: with no rows at all, no program writes its part.
        parts = flat.new_zeros(programs if ctx.weighted else 1, dim, dtype=torch.float32)
        if rows:
            with _on(flat):
                _backward[(programs,)](
                    grad.contiguous().view(rows, dim),
                    flat,
                    scale,
                    inverse,
                    grad_x,
                    parts,
                    rows,
                    dim,
                    WEIGHTED=ctx.weighted,
                    **_launch(dim),
                )
        grad_weight = parts.sum(0).to(scale.dtype) if ctx.weighted else None
        return grad_x.view(grad.shape), grad_weight, None


def _launch(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _on(x: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(x)  # Triton launches on the current device, which need not be that of x


@jit
def _forward(x, weight, out, inverse, dim, eps, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    values = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(values * values, axis=0) / dim + eps)
    tl.store(inverse + row, r)
    normal = values * r
    if WEIGHTED:
        normal = normal * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + columns, normal.to(out.dtype.element_ty), mask=inside)


@jit
def _backward(
    grad, x, weight, inverse, grad_x, parts, rows, dim, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    # With n = x r and g = grad * weight: grad_x = r (g - n mean(g n)), grad_weight = the sum over rows of grad * n.
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(first, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        r = tl.load(inverse + row)
        normal = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32) * r
        g = tl.load(grad + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            total += g * normal
            g = g * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        inner = tl.sum(g * normal, axis=0) / dim
        tl.store(
            grad_x + row * dim + columns, ((g - normal * inner) * r).to(grad_x.dtype.element_ty), mask=inside
        )
    if WEIGHTED:
        tl.store(parts + first * dim + columns, total, mask=inside)
