"""Our Triton kernels on a GPU against torch: FlashAttention in TFLOP/s, RMSNorm and SwiGLU in GB/s, bfloat16.

python benchmarks/attention_kernels.py
python benchmarks/attention_kernels.py --quick --rounds 5

Peers of attention: torch's own with its flash kernel forced, the readable form, and that form compiled; of the other
two: the readable form, torch.nn.functional, and the readable form compiled. Needs a CUDA device and Triton.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, take_turns, write
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn import activations, norm
from llm_atlas.nn.attention import scaled_dot_product_attention
from llm_atlas.nn.kernels.flash import flash_attention
from llm_atlas.nn.kernels.rms_norm import rms_norm
from llm_atlas.nn.kernels.swiglu import swiglu
from llm_atlas.nn.roofline import attention_flops

STORED = 4 << 30  # bytes of scores beyond which forms that store them are left out
DTYPE = torch.bfloat16
TOKENS, FEATURES = 16384, 2048  # of every shape: batch times length, heads times head dimension


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One line of the table."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    is_causal: bool = True
    window: int | None = None


def shapes(quick: bool) -> list[Shape]:
    """Causal or not at two head dimensions, then shared key heads, then a window."""
    lengths = (1024, 4096) if quick else (1024, 2048, 4096, 8192, 16384)

    def line(tokens: int, dim: int, groups: int = 1, **how: object) -> Shape:
        heads = FEATURES // dim
        return Shape(
            batch=TOKENS // tokens, heads=heads, kv_heads=heads // groups, tokens=tokens, dim=dim, **how
        )

    return [
        *(line(n, dim, is_causal=causal) for dim in (64, 128) for causal in (False, True) for n in lengths),
        *(line(n, 128, groups=4) for n in lengths),
        *(line(n, 128, window=1024) for n in lengths if n > 1024),
    ]


def torch_flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )


def attention_forms(shape: Shape, where: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Name: function of q, k and v."""
    forms: dict[str, Callable[..., Tensor]] = {
        "ours": partial(flash_attention, is_causal=shape.is_causal, window=shape.window)
    }
    how: dict[str, object] = {"is_causal": shape.is_causal}
    if shape.window is None:
        forms["torch, flash"] = partial(torch_flash, is_causal=shape.is_causal)
    else:  # torch's kernel has no window: with a mask, one that reads masks
        at = torch.arange(shape.tokens, device=where)
        mask = (at <= at[:, None]) & (at > at[:, None] - shape.window)
        forms["torch, mask"] = partial(functional.scaled_dot_product_attention, attn_mask=mask)
        how = {"mask": mask}
    if 4 * shape.batch * shape.heads * shape.tokens**2 <= STORED:
        forms["readable"] = partial(scaled_dot_product_attention, **how)
        forms["readable, compiled"] = partial(torch.compile(scaled_dot_product_attention), **how)
    return forms


def agree(forms: dict[str, Callable[..., Tensor]], inputs: list[Tensor]) -> None:
    """Nothing is timed that computes something else."""
    with torch.no_grad():
        ours = forms["ours"](*inputs).float()
        for name, form in forms.items():
            far = (form(*inputs).float() - ours).abs().max().item()
            if not far < 0.05 * max(1.0, ours.abs().max().item()):
                raise SystemExit(f"ours and {name} differ by {far:.3g}")


def timed(
    forms: dict[str, Callable[..., Tensor]], inputs: list[Tensor], where: torch.device, rounds: int
) -> dict[tuple[str, bool], float]:
    """(form, with backward): median seconds of a call."""
    agree(forms, inputs)
    learnt = [x.clone().requires_grad_() for x in inputs]
    ahead = torch.randn_like(next(iter(forms.values()))(*inputs))

    def back(form: Callable[..., Tensor]) -> None:
        torch.autograd.grad(form(*learnt), learnt, ahead)

    middle = {}
    for backward in (False, True):
        runs = {
            name: partial(back, form) if backward else partial(form, *inputs) for name, form in forms.items()
        }
        with torch.set_grad_enabled(backward):
            times = take_turns(runs, rounds=rounds, device=where)
        middle |= {(name, backward): statistics.median(taken) for name, taken in times.items()}
    return middle


def attention_rows(shape: Shape, where: torch.device, rounds: int) -> list[dict[str, object]]:
    inputs = [
        torch.randn(shape.batch, h, shape.tokens, shape.dim, generator=generator(i)).to(where, DTYPE)
        for i, h in enumerate((shape.heads, shape.kv_heads, shape.kv_heads))
    ]
    count = partial(
        attention_flops, shape.tokens, shape.tokens, shape.dim,
        heads=shape.batch * shape.heads, is_causal=shape.is_causal, window=shape.window,
    )  # fmt: skip
    times = timed(attention_forms(shape, where), inputs, where, rounds)
    rows = []
    for (name, backward), taken in times.items():
        flops = count() + (count(backward=True) if backward else 0)
        what = f"attention{', causal' if shape.is_causal else ''}{f', window {shape.window}' if shape.window else ''}"
        rows.append(
            row(what, name, backward, taken, times["ours", backward], tokens=shape.tokens, batch=shape.batch,
                heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, tflops=flops / taken / 1e12)
        )  # fmt: skip
    return rows


def elementwise_rows(tokens: int, dim: int, where: torch.device, rounds: int) -> list[dict[str, object]]:
    """RMSNorm and SwiGLU; bytes are those that must be read and written."""
    x, up = (torch.randn(tokens, dim, generator=generator(i)).to(where, DTYPE) for i in range(2))
    weight = torch.ones(dim, device=where, dtype=DTYPE)
    kinds = {
        # name: (forms, inputs, passes over (tokens, dim) forward, and backward)
        "rms_norm": (
            {
                "ours": rms_norm,
                "torch": lambda t, w: functional.rms_norm(t, w.shape, w, 1e-6),
                "readable": norm.rms_norm,
                "readable, compiled": torch.compile(norm.rms_norm),
            },
            [x, weight], 2, 3,
        ),
        "swiglu": (
            {
                "ours": swiglu,
                "torch": lambda g, u: functional.silu(g) * u,
                "readable": activations.swiglu,
                "readable, compiled": torch.compile(activations.swiglu),
            },
            [x, up], 3, 5,
        ),
    }  # fmt: skip
    rows = []
    for what, (forms, inputs, forward, behind) in kinds.items():
        times = timed(forms, inputs, where, rounds)
        for (name, backward), taken in times.items():
            moved = x.nbytes * (forward + (behind if backward else 0))
            rows.append(
                row(what, name, backward, taken, times["ours", backward], tokens=tokens, dim=dim,
                    gigabytes=moved / taken / 1e9)
            )  # fmt: skip
    return rows


def row(
    what: str, form: str, backward: bool, taken: float, ours: float, *, tokens: int, dim: int, batch: int = 1,
    heads: int | None = None, kv_heads: int | None = None, tflops: float | None = None,
    gigabytes: float | None = None,
) -> dict[str, object]:  # fmt: skip
    """All rows have the same columns."""
    return {
        "what": what, "form": form, "backward": backward, "batch": batch, "tokens": tokens, "heads": heads,
        "kv_heads": kv_heads, "dim": dim, "ms": 1e3 * taken, "TFLOP/s": tflops, "GB/s": gigabytes,
        "ours is faster by": taken / ours,
    }  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cuda or cuda:0; unset: cuda")] = "cuda",
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    quick: Annotated[bool, typer.Option(help="two lengths, not five")] = False,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-attention_kernels.json",
) -> None:
    """Speed of the Triton kernels; says what is missing where there is no GPU."""
    if not torch.cuda.is_available():
        print(
            "attention_kernels needs a CUDA device, and this machine has none: nothing was measured or written"
        )
        return
    where = pick_device(device)
    rows = []
    for dim in (2048, 8192):
        rows += elementwise_rows(TOKENS, dim, where, rounds)
    for shape in shapes(quick):
        torch.compiler.reset()  # else one function compiled for many shapes turns into one for any
        rows += attention_rows(shape, where, rounds)
    write(
        out,
        "How fast are our Triton kernels beside torch's?",
        environment(where, ["torch", "triton"]),
        rows,
        rounds=rounds,
        dtype=str(DTYPE).removeprefix("torch."),
        note=(
            "median time of a call, forms in turns; TFLOP/s of the two products that attention cannot avoid (backward:"
            " 2.5 times as many), of visible pairs alone; GB/s of the bytes that must be read and written; backward"
            " rows are forward and backward; ours is faster by: the form's time over ours"
        ),
    )


if __name__ == "__main__":
    typer.run(main)
