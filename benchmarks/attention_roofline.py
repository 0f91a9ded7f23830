"""How near do ways of computing attention come to what this machine allows? A roofline of the forward pass, float32.

python benchmarks/attention_roofline.py --length 512 --length 1024 --length 2048

Measured: the machine's arithmetic (a large matrix product), its memory (a copy of 256 MB), and the time of each form.
Counted: FLOPs of the two products, and the bytes that no form can avoid (queries, keys, values in, the output out).
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, seconds, take_turns, write
from torch import Tensor
from torch.nn import functional

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn.attention import scaled_dot_product_attention
from llm_atlas.nn.flash import flash_attention, flash_attention_2
from llm_atlas.nn.roofline import (
    attainable,
    attention_flops,
    flash_bytes,
    minimal_bytes,
    ridge,
    standard_bytes,
)

SIZE = 4  # bytes of a float32
# name: (how, the bytes it moves as counted by nn.roofline, None where its tiles are not known)
METHODS: dict[str, tuple[Callable[..., Tensor], Callable[..., int] | None]] = {
    "readable, stored scores": (scaled_dot_product_attention, standard_bytes),
    "flash_attention, readable": (
        partial(flash_attention, block_q=128, block_k=128),
        partial(flash_bytes, block_q=128, block_k=128, version=1),
    ),
    "flash_attention_2, readable": (
        partial(flash_attention_2, block_q=128, block_k=128),
        partial(flash_bytes, block_q=128, block_k=128, version=2),
    ),
    "torch, fused": (functional.scaled_dot_product_attention, None),
}


def matmul_peak(where: torch.device, size: int = 2048, tries: int = 5) -> float:
    """FLOP/s of a product of two square matrices, the best of some tries."""
    a, b = (torch.randn(size, size, generator=generator(seed)).to(where) for seed in (0, 1))
    a @ b  # not counted
    return max(2 * size**3 / seconds(lambda: a @ b, where) for _ in range(tries))


def copy_bandwidth(where: torch.device, numbers: int = 1 << 26, tries: int = 8) -> float:
    """Bytes read and written a second by a copy, the best of some tries."""
    source = torch.ones(numbers, device=where)
    to = torch.empty_like(source)
    to.copy_(source)  # not counted: it makes the pages
    return max(2 * source.nbytes / seconds(lambda: to.copy_(source), where) for _ in range(tries))


def measure(
    length: int, heads: int, dim: int, where: torch.device, *, rounds: int, peak: float, bandwidth: float
) -> list[dict[str, object]]:
    """A row for each method."""
    q, k, v = (torch.randn(1, heads, length, dim, generator=generator(i)).to(where) for i in range(3))
    runs = {name: partial(function, q, k, v) for name, (function, _) in METHODS.items()}
    with torch.no_grad():
        times = take_turns(runs, rounds=rounds, device=where)
    flops = attention_flops(length, length, dim, heads=heads)
    intensity = flops / minimal_bytes(length, length, dim, heads=heads, size=SIZE)
    limit = attainable(intensity, peak, bandwidth)
    rows = []
    for name, (_, count) in METHODS.items():
        taken = statistics.median(times[name])
        moved = None if count is None else count(length, length, dim, heads=heads, size=SIZE)
        rows.append(
            {
                "method": name,
                "length": length,
                "ms": 1e3 * taken,
                "FLOP/s": flops / taken,
                "intensity": intensity,
                "own intensity": None if moved is None else flops / moved,
                "of limit": flops / taken / limit,
            }
        )
    return rows


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    length: Annotated[list[int], typer.Option(min=1, help="may be given more than once")] = [512, 1024, 2048],  # noqa: B006
    heads: Annotated[int, typer.Option(min=1)] = 8,
    dim: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS
    / "bench-attention_roofline.json",
) -> None:
    """Achieved FLOP/s against the limit of the machine."""
    where = pick_device(device or None)
    peak, bandwidth = matmul_peak(where), copy_bandwidth(where)
    rows = []
    for tokens in length:
        rows += measure(tokens, heads, dim, where, rounds=rounds, peak=peak, bandwidth=bandwidth)
    write(
        out,
        "How near do ways of computing attention come to what this machine allows?",
        environment(where),
        rows,
        rounds=rounds,
        heads=heads,
        dim=dim,
        dtype="float32",
        peak_flops=float(f"{peak:.4g}"),
        bandwidth=float(f"{bandwidth:.4g}"),
        ridge=float(f"{ridge(peak, bandwidth):.4g}"),
        note=(
            "forward pass, not causal; peak_flops of a 2048 x 2048 matrix product, bandwidth of a copy (read and"
            " written); FLOP/s: counted operations over the median time; intensity: FLOPs a byte of queries, keys,"
            " values and output; own intensity: FLOPs a byte of what the method moves as counted, tiles of 128 x 128;"
            " of limit: FLOP/s over min(peak_flops, intensity times bandwidth)"
        ),
    )


if __name__ == "__main__":
    typer.run(main)
