"""What each kind of attention costs: reading a long text, and one new token behind a cache (chapter 19).

python benchmarks/attention_variants.py --rounds 5

"read": attention alone, without projections, over whole sequences; the slope of log time against log length is
fitted. "decode": one whole layer of 1024 features, one new token behind so many.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write
from torch import Tensor, nn

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn.attention import MultiHeadAttention, fused_attention
from llm_atlas.nn.cache import KVCache, RollingLayerCache
from llm_atlas.nn.flash import flash_attention_2
from llm_atlas.nn.latent_attention import LatentAttention
from llm_atlas.nn.linear_attention import (
    LinearAttention,
    delta_rule_chunked,
    linear_attention_chunked,
    unit_length,
)
from llm_atlas.nn.local_attention import local_attention
from llm_atlas.nn.positions import RotaryPositions
from llm_atlas.recipes import initialize

HEADS, HEAD_DIM, WINDOW = 4, 64, 256
DIM, LAYER_HEADS = 1024, 16


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    lengths: Annotated[list[int], typer.Option(help="tokens read; may be given more than once")] = [  # noqa: B006
        4096,
        8192,
        16384,
        32768,
    ],
    contexts: Annotated[list[int], typer.Option(help="tokens in the cache; may be given more than once")] = [  # noqa: B006
        1024,
        4096,
        16384,
    ],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    only: Annotated[str, typer.Option(help="only variants with this in their name")] = "",
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS
    / "bench-attention_variants.json",
) -> None:
    """How does the time grow with the text, and what does a new token cost?"""
    where = pick_device(device or None)
    with torch.inference_mode():
        rows = [*read(lengths, where, rounds, only), *decode(contexts, where, rounds, only)]
    settings = {
        "read": f"{HEADS} heads of {HEAD_DIM}, float32, window {WINDOW}, chunks of 64; ratio to fused",
        "decode": f"a layer of {DIM} features, {LAYER_HEADS} heads, float32, projections included; ratio to mha",
        "slopes": slopes(rows),
    }
    write(out, "How does attention's time grow with the text?", environment(where), rows, settings=settings)


def readers(length: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each way to attend over `length` tokens, on the same causal inputs."""
    rng = generator(0)
    q, k, v = torch.randn(3, 1, HEADS, length, HEAD_DIM, generator=rng).to(device)
    beta = torch.rand(1, HEADS, length, 1, generator=rng).to(device)
    decay = -0.05 * torch.rand(1, HEADS, length, 1, generator=rng).to(device)
    unit_q, unit_k = unit_length(q), unit_length(k)
    return {
        "fused": partial(fused_attention, q, k, v, is_causal=True),
        "tiled": partial(flash_attention_2, q, k, v, is_causal=True, block_q=256, block_k=256),
        "local": partial(local_attention, q, k, v, window=WINDOW),
        "linear": partial(linear_attention_chunked, q, k, v),
        "gated": partial(
            linear_attention_chunked, q, k, v, feature_map="identity", normalize=False, log_decay=decay
        ),
        "delta": partial(delta_rule_chunked, unit_q, unit_k, v, beta),
    }


def read(lengths: list[int], device: torch.device, rounds: int, only: str = "") -> list[dict[str, Any]]:
    """Milliseconds of each way at each length, in turns."""
    rows = []
    for length in lengths:
        runs = {name: run for name, run in readers(length, device).items() if only in name or name == "fused"}
        times = take_turns(runs, rounds=rounds, device=device)
        rows += [row("read", name, length, times, "fused") for name in runs]
    return rows


def layers(device: torch.device) -> dict[str, tuple[nn.Module, Callable[[KVCache], Any] | None]]:
    """Each layer with the kind of cache it wants (None: the plain one)."""
    head_dim = DIM // LAYER_HEADS

    def heads(**how: Any) -> MultiHeadAttention:
        return MultiHeadAttention(DIM, LAYER_HEADS, positions=RotaryPositions(head_dim, length=2**17), **how)

    latent = partial(
        LatentAttention, DIM, LAYER_HEADS, kv_rank=256, rope_dim=32, head_dim=head_dim,
        positions=RotaryPositions(32, length=2**17),
    )  # fmt: skip
    made: dict[str, tuple[nn.Module, Callable[[KVCache], Any] | None]] = {
        "mha": (heads(), None),
        "gqa-8": (heads(kv_heads=8), None),
        "gqa-4": (heads(kv_heads=4), None),
        "gqa-2": (heads(kv_heads=2), None),
        "mqa": (heads(kv_heads=1), None),
        "mla": (latent(absorb=True), None),
        "mla, rebuilt": (latent(absorb=False), None),
        "local": (heads(window=WINDOW), partial(RollingLayerCache, window=WINDOW)),
        "linear": (LinearAttention(DIM, LAYER_HEADS, conv=4), None),
        "delta": (LinearAttention(DIM, LAYER_HEADS, kind="gated-delta", conv=4), None),
    }
    for layer, _ in made.values():
        initialize(layer, generator(0))
        layer.eval().to(device)
    return made


def decode(contexts: list[int], device: torch.device, rounds: int, only: str = "") -> list[dict[str, Any]]:
    """Milliseconds of one new token behind a cache of `context` tokens, in turns, and the cache's bytes."""
    rows = []
    for context in contexts:
        x = torch.randn(1, context, DIM, generator=generator(1)).to(device)
        runs, kept = {}, {}
        for name, (layer, kind) in layers(device).items():
            if only not in name and name != "mha":
                continue
            cache = KVCache(1) if kind is None else KVCache(1, layer=kind)
            for part in x.split(
                1024, dim=1
            ):  # a prompt in pieces, so that no kind needs more memory than it keeps
                positions = cache.place(part.shape[1], device=device)
                layer(part, positions=positions, cache=cache[0])
            kept[name] = cache.nbytes
            runs[name] = partial(step, layer, x[:, :1], cache, context)
        times = take_turns(runs, rounds=4 * rounds, device=device)
        rows += [row("decode", name, context, times, "mha") | {"cache bytes": kept[name]} for name in runs]
    return rows


def step(layer: nn.Module, token: Tensor, cache: KVCache, context: int) -> Tensor:
    """One new token; where the cache can go back, it forgets the token again."""
    positions = cache.place(1, device=token.device)
    out = layer(token, positions=positions, cache=cache[0])
    if cache[0].state is None and not isinstance(cache[0], RollingLayerCache):
        cache.truncate(context)
    return out


def row(what: str, name: str, tokens: int, times: dict[str, list[float]], peer: str) -> dict[str, Any]:
    """The median and the ratio to the peer."""
    middle = sorted(times[name])[len(times[name]) // 2]
    found = {"what": what, "variant": name, "tokens": tokens, "ms": 1e3 * middle, **ratio(times, peer, name)}
    return found | ({"cache bytes": 0} if what == "read" else {})


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Slope of log time against log length of every variant that was read at two lengths or more: least squares."""
    found = {}
    for name in dict.fromkeys(r["variant"] for r in rows if r["what"] == "read"):
        mine = [r for r in rows if r["what"] == "read" and r["variant"] == name]
        if len(mine) > 1:
            x = torch.tensor([math.log(r["tokens"]) for r in mine], dtype=torch.float64)
            y = torch.tensor([math.log(r["ms"]) for r in mine], dtype=torch.float64)
            x = x - x.mean()
            found[name] = round(float((x * y).sum() / x.square().sum()), 3)
    return found


if __name__ == "__main__":
    typer.run(main)
