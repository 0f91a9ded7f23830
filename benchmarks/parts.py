"""Each part of chapters 2, 16 and 17 against its twin in torch, forward and backward, on 4096 tokens of 576 features.

python benchmarks/parts.py --rounds 15

Readable forms and the fused ones that modules use are both in the table. Where torch has no twin (rotary positions,
ALiBi, the buckets of T5) the peer is the eager function of transformers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn import activations, dropout, norm, positions
from llm_atlas.nn.feedforward import GatedFeedForward

DIM, HIDDEN, HEADS = 576, 1536, 9  # SmolLM2-135M
Pair = tuple[Callable[[], object], Callable[[], object]]


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    tokens: Annotated[int, typer.Option(min=8)] = 4096,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    only: Annotated[str, typer.Option(help="only parts with this in their name")] = "",
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-parts.json",
) -> None:
    """How many times as fast as the peer is each part?"""
    where = pick_device(device or None)
    rows = []
    for name, peer, (ours, theirs) in parts(tokens, where):
        if only not in name:
            continue
        times = take_turns({"ours": ours, "theirs": theirs}, rounds=rounds, device=where)
        middle = {who: 1e3 * sorted(taken)[len(taken) // 2] for who, taken in times.items()}
        rows.append(
            {
                "part": name,
                "peer": peer,
                "ours ms": middle["ours"],
                "theirs ms": middle["theirs"],
                **ratio(times, "theirs", "ours"),
            }
        )
    write(
        out,
        f"each part on {tokens} tokens, {DIM} features ({HEADS} heads, feed-forward {HIDDEN}), float32",
        environment(where, ["torch", "transformers"]),
        rows,
        rounds=rounds,
        note="ratio: how many times as fast as the peer, the median of each round's own",
    )


def parts(tokens: int, where: torch.device) -> list[tuple[str, str, Pair]]:
    """(name, peer, (ours, theirs)): calls without arguments that do the same work."""
    return [
        *((name, f"functional.{peer}", pair) for name, peer, pair in elementwise(tokens, where)),
        *normalizations(tokens, where),
        *in_attention(tokens, where),
    ]


def draw(*shape: int, where: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(where)


def both(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Pair]:
    """Forward alone, and forward with backward, of two functions of the same inputs."""
    learnt = [x.clone().requires_grad_() for x in inputs]
    ahead = torch.randn_like(theirs(*inputs))

    def back(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*learnt), learnt, ahead)

    return {
        "forward": (partial(ours, *inputs), partial(theirs, *inputs)),
        "forward + backward": (partial(back, ours), partial(back, theirs)),
    }


def elementwise(tokens: int, where: torch.device) -> list[tuple[str, str, Pair]]:
    x, up = draw(tokens, DIM, where=where), draw(tokens, DIM, where=where, seed=1)
    tanh = partial(activations.gelu, approximate="tanh")
    kinds = {
        "relu": (activations.relu, "relu", functional.relu, (x,)),
        "gelu": (activations.gelu, "gelu", functional.gelu, (x,)),
        "gelu, tanh": (tanh, "gelu(tanh)", partial(functional.gelu, approximate="tanh"), (x,)),
        "silu": (activations.silu, "silu", functional.silu, (x,)),
        "swiglu": (activations.swiglu, "silu, times", lambda g, u: functional.silu(g) * u, (x, up)),
        "geglu": (activations.geglu, "gelu, times", lambda g, u: functional.gelu(g) * u, (x, up)),
        "dropout": (lambda t: dropout.dropout(t, 0.1), "dropout", lambda t: functional.dropout(t, 0.1), (x,)),
    }
    return [
        (f"{name}, {how}", peer, pair)
        for name, (ours, peer, theirs, inputs) in kinds.items()
        for how, pair in both(ours, theirs, *inputs).items()
    ]


def normalizations(tokens: int, where: torch.device) -> list[tuple[str, str, Pair]]:
    x, weight, bias = (draw(*s, where=where, seed=i) for i, s in enumerate(((tokens, DIM), (DIM,), (DIM,))))
    rms, layer = norm.RMSNorm(DIM).to(where), norm.LayerNorm(DIM).to(where)
    peers = nn.RMSNorm(DIM, eps=1e-6).to(where), nn.LayerNorm(DIM).to(where)
    kinds = {
        "rms_norm, readable": (norm.rms_norm, "functional.rms_norm", torch_rms_norm, (x, weight)),
        "layer_norm, readable": (norm.layer_norm, "functional.layer_norm", torch_layer_norm, (x, weight, bias)),
        "RMSNorm": (rms, "nn.RMSNorm", peers[0], (x,)),
        "LayerNorm": (layer, "nn.LayerNorm", peers[1], (x,)),
    }  # fmt: skip
    rows = [
        (f"{name}, {how}", peer, pair)
        for name, (ours, peer, theirs, inputs) in kinds.items()
        for how, pair in both(ours, theirs, *inputs).items()
    ]
    ahead = draw(tokens, DIM, where=where, seed=3)
    learnt = [t.clone().requires_grad_() for t in (x, weight, bias)]
    made = torch_layer_norm(*learnt), torch_rms_norm(*learnt[:2])

    def autograd(out: Tensor, inputs: list[Tensor]) -> object:
        return torch.autograd.grad(out, inputs, ahead, retain_graph=True)

    return [
        *rows,
        (
            "layer_norm_backward",
            "autograd of functional.layer_norm",
            (partial(norm.layer_norm_backward, ahead, x, weight), partial(autograd, made[0], learnt)),
        ),
        (
            "rms_norm_backward",
            "autograd of functional.rms_norm",
            (partial(norm.rms_norm_backward, ahead, x, weight), partial(autograd, made[1], learnt[:2])),
        ),
    ]


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, 1e-6)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, 1e-5)


def in_attention(tokens: int, where: torch.device) -> list[tuple[str, str, Pair]]:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_pairs
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, apply_rotary_pos_emb
    from transformers.models.t5.modeling_t5 import T5Attention, T5Config

    head = DIM // HEADS
    x = draw(1, HEADS, tokens, head, where=where)
    at = torch.arange(tokens, device=where)[None]
    half = positions.RotaryPositions(head, length=tokens).to(where)
    pairs = positions.RotaryPositions(head, length=tokens, layout="interleaved").to(where)
    angles = at[0, :, None] * 10000.0 ** (-torch.arange(0, head, 2, device=where) / head)
    cos, sin = (torch.cat([f(angles), f(angles)], -1)[None] for f in (torch.cos, torch.sin))
    short_sin, short_cos = angles.sin()[None], angles.cos()[None]

    embedding = positions.LearnedPositions(tokens, DIM).to(where)
    words = draw(1, tokens, DIM, where=where)
    t5 = positions.RelativePositionBias(HEADS, buckets=32, max_distance=128, bidirectional=False).to(where)
    their_t5 = T5Attention(
        T5Config(d_model=DIM, num_heads=HEADS, d_kv=head, is_decoder=True),
        has_relative_attention_bias=True,
        layer_idx=0,
    ).to(where)
    gated = GatedFeedForward(DIM, HIDDEN).to(where)
    mlp = LlamaMLP(LlamaConfig(hidden_size=DIM, intermediate_size=HIDDEN, mlp_bias=False)).to(where)
    alibi = positions.AlibiPositions(HEADS).to(where)
    q = draw(1, HEADS, tokens, head, where=where, seed=1)

    def quiet(function: Callable[..., object], *inputs: object) -> Callable[[], object]:
        return torch.no_grad()(partial(function, *inputs))

    def their_alibi() -> Tensor:
        # Bloom's bias is a row over keys, which differs from ours by a constant in each row: the softmax is the same.
        return build_alibi_tensor(torch.ones(1, tokens, device=where), HEADS, torch.float32)

    return [
        (
            "apply_rotary, half-split, readable",
            "transformers, Llama, its tables ready",
            (quiet(positions.apply_rotary, x, at), quiet(lambda: apply_rotary_pos_emb(x, x[:, :1], cos, sin)[0])),
        ),
        (
            "RotaryPositions, half-split",
            "transformers, Llama",
            (quiet(half.rotate, x, at), quiet(lambda: apply_rotary_pos_emb(x, x[:, :1], cos, sin)[0])),
        ),
        (
            "RotaryPositions, interleaved",
            "transformers, GPT-J",
            (
                quiet(pairs.rotate, x, at),
                quiet(lambda: turn_pairs(x.transpose(1, 2), short_sin, short_cos).transpose(1, 2)),
            ),
        ),
        (
            "LearnedPositions",
            "nn.Embedding and a sum",
            (quiet(embedding.embed, words, at), quiet(lambda: words + embedding.table(at))),
        ),
        (
            "RelativePositionBias, all pairs",
            "transformers, T5",
            (quiet(t5.bias, q, at, at), quiet(their_t5.compute_bias, tokens, tokens)),
        ),
        (
            "alibi_bias, one row of queries",
            "transformers, Bloom",
            (quiet(alibi.bias, q[:, :, -1:], at[:, -1:], at), quiet(their_alibi)),
        ),
        ("GatedFeedForward", "transformers, LlamaMLP", (quiet(gated, words), quiet(mlp, words))),
    ]  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
