"""Latent attention against DeepSeek-V3 of transformers, the paper's equations one by one, and itself the other way."""

import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from llm_atlas.nn.attention import AttendFunction, MultiHeadAttention, scaled_dot_product_attention
from llm_atlas.nn.block import Block
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.feedforward import GatedFeedForward
from llm_atlas.nn.latent_attention import (
    LatentAttention,
    absorbed_attention,
    absorbed_is_cheaper,
    latent_attention_flops,
    latent_cache_numbers,
    rebuilt_attention,
)
from llm_atlas.nn.masks import PAD, causal_mask, visible
from llm_atlas.nn.norm import RMSNorm
from llm_atlas.nn.positions import AlibiPositions, RotaryPositions, ShawPositions

# All different, so that no two can stand for each other.
DIM, HEADS, KV_RANK, ROPE_DIM, HEAD_DIM, VALUE_DIM, Q_RANK = 22, 3, 10, 4, 6, 5, 7
SIZES = {"kv_rank": KV_RANK, "rope_dim": ROPE_DIM, "head_dim": HEAD_DIM, "value_dim": VALUE_DIM}

Q_RANKS = pytest.mark.parametrize("q_rank", [None, Q_RANK], ids=["one query matrix", "query latent"])
LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])
ABSORB = pytest.mark.parametrize("absorb", [False, True], ids=["rebuilt", "absorbed"])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: norms do not stay at 1, biases not at 0, and logits are far from equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]) if p.dim() > 1 else 0)
            if p.dim() == 1:
                p.add_(0.5 + torch.rand(p.shape, generator=generator))
    return module


def layer(seed: int = 0, layout: str | None = "half", **how) -> LatentAttention:
    if layout is not None:
        how.setdefault("positions", RotaryPositions(ROPE_DIM, length=64, layout=layout))
    return randomised(LatentAttention(DIM, HEADS, **(SIZES | how)), seed)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --------------------------------------------------------------------------------- transformers' DeepSeek-V3


def deepseek(
    q_rank: int | None, *, layout: str = "interleaved", bias: bool = False, rope: dict | None = None
):
    config = DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=KV_RANK,
        q_lora_rank=q_rank,
        qk_rope_head_dim=ROPE_DIM,
        qk_nope_head_dim=HEAD_DIM,
        v_head_dim=VALUE_DIM,
        num_hidden_layers=1,
        attention_bias=bias,
        rope_interleave=layout == "interleaved",
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return config, randomised(DeepseekV3Attention(config, 0).eval(), seed=1).requires_grad_(False)


NAMES = {
    "q_proj": "q",
    "q_a_proj": "q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up",
    "kv_a_layernorm": "kv_norm",
    "o_proj": "out",
}


def from_deepseek(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One attention layer's tensors under our names: two of theirs hold two of ours each."""
    ours = {}
    for name, tensor in state.items():
        module, _, part = name.partition(".")
        if module == "kv_a_proj_with_mqa":  # latent, then rotary key
            ours[f"kv_down.{part}"], ours[f"k_rotary.{part}"] = tensor.split([KV_RANK, ROPE_DIM])
        elif module == "kv_b_proj":  # for each head its keys, then its values
            by_head = tensor.unflatten(0, (HEADS, -1)).split([HEAD_DIM, VALUE_DIM], dim=1)
            ours[f"k_up.{part}"], ours[f"v_up.{part}"] = (t.flatten(0, 1) for t in by_head)
        else:
            ours[f"{NAMES[module]}.{part}"] = tensor
    return ours


def oracle(theirs, config, x, positions, mask, *, cos_sin=None, past=None):
    cos, sin = DeepseekV3RotaryEmbedding(config)(x, positions) if cos_sin is None else cos_sin
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return theirs(x, (cos, sin), added, past_key_values=past)[0]


def loaded(theirs: nn.Module, q_rank: int | None, **how) -> LatentAttention:
    ours = layer(layout=how.pop("layout", "interleaved"), q_rank=q_rank, **how).eval().requires_grad_(False)
    ours.load_state_dict(from_deepseek(theirs.state_dict()))
    return ours


@ABSORB
@LAYOUTS
@Q_RANKS
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_attention_of_deepseek_v3(q_rank, layout, absorb, bias):
    config, theirs = deepseek(q_rank, layout=layout, bias=bias)
    ours = loaded(theirs, q_rank, layout=layout, bias=bias, absorb=absorb)
    x, positions = randn(2, 9, DIM, seed=2), torch.arange(9)[None]
    expected = oracle(theirs, config, x, positions, causal_mask(9)[None, None])
    assert error(ours(x), expected) < 1e-5
    for name, p in ours.named_parameters():  # nothing is compared in vain: without any one tensor it differs
        kept = p.clone()
        p.zero_()
        assert error(ours(x), expected) > 1e-3, name
        p.copy_(kept)


def test_small_inputs_meet_the_same_eps():
    config, theirs = deepseek(Q_RANK)
    x, positions = 1e-3 * randn(2, 9, DIM, seed=2), torch.arange(9)[None]
    expected = oracle(theirs, config, x, positions, causal_mask(9)[None, None])
    ours = loaded(theirs, Q_RANK)
    assert error(ours(x), expected) < 1e-5
    for norm in (ours.q_norm, ours.kv_norm):
        norm.eps = 1e-5
        assert error(ours(x), expected) > 1e-3
        norm.eps = 1e-6
    other = loaded(theirs, Q_RANK, norm_eps=1e-5)
    assert (other.q_norm.eps, other.kv_norm.eps) == (1e-5, 1e-5)


@ABSORB
@Q_RANKS
def test_is_the_attention_of_deepseek_v3_with_padding_and_a_cache(q_rank, absorb):
    config, theirs = deepseek(q_rank)
    ours = loaded(theirs, q_rank, absorb=absorb)
    x = randn(2, 9, DIM, seed=2)
    positions = torch.stack([torch.arange(9), torch.tensor([PAD] * 3 + list(range(6)))])
    mine, his = KVCache(1), DynamicCache()
    for start, end in ((0, 5), (5, 6), (6, 9)):
        at = positions[:, start:end]
        mine.place(end - start, at)
        mask = visible(at, mine.positions)
        piece = x[:, start:end]
        expected = oracle(theirs, config, piece, at.clamp(min=0), mask, past=his)
        got = ours(piece, positions=at, mask=mask, cache=mine[0])
        real = at != PAD
        assert error(got[real], expected[real]) < 1e-5
    # It keeps the same two tensors.
    his_latent, his_key = his.layers[0].keys, his.layers[0].values
    latent, key = mine[0].read()
    assert error(latent, his_latent) < 1e-5
    # transformers leaves the pairs of a rotated key apart.
    real = positions != PAD
    assert error(torch.cat([key[..., 0::2], key[..., 1::2]], -1)[:, 0][real], his_key[:, 0][real]) < 1e-5


@ABSORB
def test_yarn_scale_and_frequencies_of_deepseek_v3(absorb):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 16,
    }
    config, theirs = deepseek(Q_RANK, rope=rope)
    x, positions = randn(2, 9, DIM, seed=2), torch.arange(9)[None]
    cos, sin = DeepseekV3RotaryEmbedding(config)(x, positions)
    scheme = RotaryPositions(ROPE_DIM, length=9, layout="interleaved")
    plain = scheme.table.clone()
    scheme.table = torch.stack([t[0, :, : ROPE_DIM // 2] for t in (cos, sin)], dim=1)
    assert not torch.allclose(scheme.table, plain)
    scale = (0.1 * math.log(40) + 1) ** 2 / math.sqrt(HEAD_DIM + ROPE_DIM)
    expected = oracle(theirs, config, x, positions, causal_mask(9)[None, None])
    ours = loaded(theirs, Q_RANK, absorb=absorb, positions=scheme, scale=scale)
    assert error(ours(x), expected) < 1e-5
    assert error(loaded(theirs, Q_RANK, absorb=absorb, positions=scheme)(x), expected) > 1e-3


# ------------------------------------------------------------------------------- the paper, equation by equation


def by_the_paper(m: LatentAttention, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """One row, in float64: token by token and head by head, with complex numbers for the rotation."""
    w = {name: p.detach().double() for name, p in m.named_parameters()}
    x = x.double()

    def norm(t, weight):
        return t / (t.pow(2).sum() / len(t) + 1e-6).sqrt() * weight

    def rope(t, position):
        out = t.clone()
        for i in range(ROPE_DIM // 2):
            pair = (i, i + ROPE_DIM // 2) if m.positions.layout == "half" else (2 * i, 2 * i + 1)
            angle = position * 10000.0 ** (-2 * i / ROPE_DIM)
            number = complex(t[pair[0]], t[pair[1]]) * complex(math.cos(angle), math.sin(angle))
            out[pair[0]], out[pair[1]] = number.real, number.imag
        return out

    c_kv = [norm(w["kv_down.weight"] @ h, w["kv_norm.weight"]) for h in x]
    k_rotary = [rope(w["k_rotary.weight"] @ h, p) for h, p in zip(x, positions, strict=True)]
    c_q = x if m.q_rank is None else [norm(w["q_down.weight"] @ h, w["q_norm.weight"]) for h in x]
    w_q = w["q.weight"] if m.q_rank is None else w["q_up.weight"]
    out = []
    for t in range(len(x)):
        heads = []
        for i in range(HEADS):
            rows = w_q[i * (HEAD_DIM + ROPE_DIM) : (i + 1) * (HEAD_DIM + ROPE_DIM)] @ c_q[t]
            q_content, q_rotary = rows[:HEAD_DIM], rope(rows[HEAD_DIM:], positions[t])
            up_k = w["k_up.weight"][i * HEAD_DIM : (i + 1) * HEAD_DIM]
            up_v = w["v_up.weight"][i * VALUE_DIM : (i + 1) * VALUE_DIM]
            scores = torch.stack(
                [q_content @ (up_k @ c_kv[j]) + q_rotary @ k_rotary[j] for j in range(t + 1)]
            )
            shares = (scores / math.sqrt(HEAD_DIM + ROPE_DIM)).exp()
            shares = shares / shares.sum()
            heads.append(sum(shares[j] * (up_v @ c_kv[j]) for j in range(t + 1)))
        out.append(w["out.weight"] @ torch.cat(heads))
    return torch.stack(out)


@ABSORB
@LAYOUTS
@Q_RANKS
def test_is_the_equations_of_the_paper(q_rank, layout, absorb):
    m = layer(layout=layout, q_rank=q_rank, absorb=absorb)
    x, at = randn(2, 6, DIM), torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 7, 8, 20, 21]])
    expected = torch.stack([by_the_paper(m, row, p.tolist()) for row, p in zip(x, at, strict=True)])
    assert error(m(x, positions=at), expected) < 1e-5


# ------------------------------------------------------------------------------------------ one way and the other


def both(m: LatentAttention, x: torch.Tensor, **how) -> tuple[torch.Tensor, torch.Tensor]:
    outs = []
    for absorb in (False, True):
        m.absorb = absorb
        outs.append(m(x, **how))
    return outs[0], outs[1]


@pytest.mark.parametrize("option", ["plain", "mask", "mask of every head", "empty row", "alibi", "shaw"])
def test_absorbed_equals_rebuilt(option):
    x = randn(2, 7, DIM)
    scheme = {
        "alibi": lambda: AlibiPositions(HEADS),
        "shaw": lambda: ShawPositions(HEAD_DIM + ROPE_DIM, max_distance=3),
    }
    m = layer(positions=scheme[option]()) if option in scheme else layer()
    mask = randn(2, 1, 7, 7, seed=4) > -0.3
    mask[..., 0] = True
    every = randn(2, HEADS, 7, 7, seed=5) > -0.3
    every[..., 1] = True
    empty = mask.clone()
    empty[1, :, 3] = False
    masks = {"mask": mask, "mask of every head": every, "empty row": empty}
    how = {"mask": masks[option]} if option in masks else {}
    rebuilt, absorbed = both(m, x, **how)
    assert error(absorbed, rebuilt) < 1e-5
    if option == "empty row":
        assert not rebuilt[1, 3].any()
        assert not absorbed[1, 3].any()
    elif option != "plain":
        assert error(rebuilt, layer()(x)) > 1e-2  # what was asked for makes a difference
    if option in scheme:  # a bias counts slots of the cache too
        cache = KVCache(1)
        pieces = []
        for start, end in ((0, 4), (4, 5), (5, 7)):
            cache.place(end - start)
            pieces.append(m(x[:, start:end], cache=cache[0]))
        assert error(torch.cat(pieces, 1), rebuilt) < 1e-5


@Q_RANKS
def test_gradients_are_the_same_both_ways(q_rank):
    m = layer(q_rank=q_rank).double()
    x, grad = randn(2, 7, DIM).double().requires_grad_(), randn(2, 7, DIM, seed=9).double()
    found = []
    for absorb in (False, True):
        m.absorb = absorb
        found.append(torch.autograd.grad((m(x) * grad).sum(), [x, *m.parameters()]))
    for name, a, b in zip(["x", *dict(m.named_parameters())], *found, strict=True):
        assert b.abs().max() > 1e-3, name
        assert error(b, a) < 1e-10, name
    # And they are gradients: along one direction the loss changes as they say.
    step = randn(*x.shape, seed=10).double()
    with torch.no_grad():
        change = ((m(x + 1e-6 * step) - m(x - 1e-6 * step)) * grad).sum() / 2e-6
    assert_close((found[1][0] * step).sum(), change, rtol=1e-6, atol=1e-6)


@ABSORB
def test_both_attention_functions_agree(absorb):
    calls = []

    def counting(q, k, v, **how):
        calls.append((k.shape[1], v.shape[-1]))
        return scaled_dot_product_attention(q, k, v, **how)

    x, cache = randn(2, 7, DIM), [KVCache(1), KVCache(1)]
    m, readable = layer(absorb=absorb), layer(absorb=absorb, attend=counting)
    for start, end in ((0, 4), (4, 5), (5, 7)):  # the fused one has a way of its own for one new token
        a, b = (f(x[:, start:end], cache=c[0]) for f, c in zip((m, readable), cache, strict=True))
        assert error(a, b) < 1e-5
    assert (
        calls == [(1, KV_RANK) if absorb else (HEADS, VALUE_DIM)] * 3
    )  # key heads, and what stands for values


def test_the_two_functions_share_the_signature_and_attend_fits():
    first, second = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (rebuilt_attention, absorbed_attention)
    )
    assert first == second
    assert isinstance(layer().attend, AttendFunction)


# ------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("absorb", [False, True, None], ids=["rebuilt", "absorbed", "by count"])
@LAYOUTS
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 3, 1], [9]])
def test_in_pieces_with_a_cache_is_the_whole(absorb, layout, cuts):
    m = layer(layout=layout, absorb=absorb, q_rank=Q_RANK)
    x, cache, pieces = randn(2, 9, DIM), KVCache(1), []
    for piece in x.split(cuts, dim=1):
        cache.place(piece.shape[1])
        pieces.append(m(piece, cache=cache[0]))
    m.absorb = False
    assert error(torch.cat(pieces, 1), m(x)) < 1e-5


@ABSORB
def test_left_padding_changes_nothing(absorb):
    m = layer(absorb=absorb)
    rows = [randn(n, DIM, seed=n) for n in (7, 4)]
    x = torch.zeros(2, 7, DIM).fill_(3.0)
    positions = torch.full((2, 7), PAD)
    for i, row in enumerate(rows):
        x[i, -len(row) :], positions[i, -len(row) :] = row, torch.arange(len(row))
    cache, pieces = KVCache(1), []
    for start, end in ((0, 5), (5, 7)):
        at = positions[:, start:end]
        cache.place(end - start, at)
        mask = visible(at, cache.positions)
        pieces.append(m(x[:, start:end], positions=at, mask=mask, cache=cache[0]))
    out = torch.cat(pieces, 1)
    assert torch.isfinite(out).all()
    for i, row in enumerate(rows):
        assert error(out[i, -len(row) :], m(row[None])[0]) < 1e-5


def test_values_are_as_wide_as_content_keys_unless_told():
    m = LatentAttention(DIM, HEADS, kv_rank=KV_RANK, rope_dim=ROPE_DIM, head_dim=HEAD_DIM)
    assert m.out.in_features == HEADS * HEAD_DIM
    assert m(randn(2, 3, DIM)).shape == (2, 3, DIM)
    assert m.scale == pytest.approx((HEAD_DIM + ROPE_DIM) ** -0.5)


def test_only_distances_count():
    m, x, at = layer(), randn(1, 7, DIM), torch.arange(7)[None]
    assert error(m(x, positions=at + 30), m(x, positions=at)) < 1e-5
    assert error(m(x, positions=2 * at), m(x, positions=at)) > 1e-2


@ABSORB
def test_without_positions_the_order_of_the_past_is_not_seen(absorb):
    m, x = layer(layout=None, absorb=absorb), randn(1, 7, DIM)
    shuffled = torch.cat([x[:, :6].flip(1), x[:, 6:]], 1)
    assert error(m(shuffled)[:, -1], m(x)[:, -1]) < 1e-5
    m = layer(absorb=absorb)
    assert error(m(shuffled)[:, -1], m(x)[:, -1]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ABSORB
def test_the_cache_keeps_one_latent_and_one_rotary_key_a_token(dtype, absorb):
    m, cache = layer(absorb=absorb).to(dtype), KVCache(1, capacity=32)
    x = randn(2, 9, DIM).to(dtype)
    for piece in x.split([6, 3], dim=1):
        cache.place(piece.shape[1])
        out = m(piece, cache=cache[0])
    assert out.dtype == dtype
    numbers = latent_cache_numbers(kv_rank=KV_RANK, rope_dim=ROPE_DIM)
    assert numbers == KV_RANK + ROPE_DIM
    assert cache.nbytes == 2 * 9 * numbers * dtype.itemsize
    latent, key = cache[0].read()
    assert [t.shape for t in (latent, key)] == [(2, 1, 9, KV_RANK), (2, 1, 9, ROPE_DIM)]
    wanted = m.compress(x, torch.arange(9)[None])
    assert_close((latent, key), wanted)
    # Scaling a token scales its rotary key, but not its latent: that is kept behind its norm.
    assert_close(m.compress(4 * x, torch.arange(9)[None])[0], latent, rtol=1e-2, atol=1e-2)


def test_the_cache_of_deepseek_v2():
    # Table 1 and the abstract of the paper: 60 layers, against 95 layers of 8 groups in DeepSeek 67B.
    v2 = 60 * latent_cache_numbers(kv_rank=512, rope_dim=64)
    dense = 95 * 2 * 8 * 128
    assert round(100 * (1 - v2 / dense)) == 82
    assert round(100 * (1 - v2 * 6 / (dense * 16)), 1) == 93.3  # the printed number: 6 bits against 16
    assert round(100 * (1 - v2 / (60 * 2 * 128 * 128))) == 98
    assert v2 / 60 == 4.5 * 128


@ABSORB
def test_truncate_select_and_fork_go_on_as_a_new_cache_would(absorb):
    m, cache = layer(absorb=absorb), KVCache(1)
    x = randn(3, 8, DIM)
    cache.place(6)
    m(x[:, :6], cache=cache[0])
    cache.truncate(4)
    twin = cache.fork()
    twin.select([2, 0])
    cache.place(1)
    m(randn(3, 1, DIM, seed=5), cache=cache[0])  # must not be seen by the twin
    rows = torch.cat([x[:, :4], x[:, 6:]], 1)[[2, 0]]
    twin.place(2)
    assert error(m(rows[:, 4:], cache=twin[0]), m(rows)[:, 4:]) < 1e-5


@ABSORB
def test_is_a_mixer_of_a_block(absorb):
    block = randomised(Block(layer(absorb=absorb), GatedFeedForward(DIM), partial(RMSNorm, DIM)))
    x, cache = randn(2, 7, DIM), KVCache(1)
    pieces = []
    for piece in x.split([5, 2], dim=1):
        at = cache.place(piece.shape[1])
        mask = visible(at, cache.positions)
        pieces.append(block(piece, positions=at, mask=mask, cache=cache[0]))
    assert error(torch.cat(pieces, 1), block(x)) < 1e-5


# ------------------------------------------------------------------------------------------------- rank and counts


def test_keys_and_values_of_all_heads_have_the_rank_of_the_latent():
    tokens = 40
    x, at = randn(1, tokens, DIM).double(), torch.arange(tokens)[None]
    m = layer().double()
    latent = m.compress(x, at)[0][0, 0]
    made = torch.cat([m.k_up(latent), m.v_up(latent)], dim=-1)
    assert made.shape == (tokens, HEADS * (HEAD_DIM + VALUE_DIM))
    assert torch.linalg.matrix_rank(made) == KV_RANK
    full = randomised(MultiHeadAttention(DIM, HEADS, head_dim=HEAD_DIM)).double()
    assert torch.linalg.matrix_rank(torch.cat([full.k(x[0]), full.v(x[0])], dim=-1)) == DIM


def counted(m: LatentAttention, new: int, total: int) -> int:
    cache = KVCache(1)
    if total > new:
        cache.place(total - new)
        m(randn(1, total - new, DIM), cache=cache[0])
    cache.place(new)
    with FlopCounterMode(display=False) as counter:
        m(randn(1, new, DIM), cache=cache[0])
    return counter.get_total_flops()


@Q_RANKS
@ABSORB
@pytest.mark.parametrize(("new", "total"), [(1, 9), (3, 9), (9, 9)])
def test_flops_are_those_that_torch_counts(q_rank, absorb, new, total):
    m = layer(q_rank=q_rank, absorb=absorb, attend=scaled_dot_product_attention)
    shared = sum(
        p.numel() for name, p in m.named_parameters() if p.dim() > 1 and name[:5] not in ("k_up.", "v_up.")
    )
    between = latent_attention_flops(new, total, heads=HEADS, absorb=absorb, **SIZES)
    assert counted(m, new, total) == 2 * new * shared + between


@given(st.integers(1, 40), st.integers(0, 400), st.integers(1, 64), st.integers(1, 32), st.integers(1, 32))
@settings(max_examples=200)
def test_the_cheaper_way_is_the_one_with_fewer_flops(new, past, kv_rank, head_dim, value_dim):
    total, sizes = new + past, {"kv_rank": kv_rank, "head_dim": head_dim, "value_dim": value_dim}
    flops = [
        latent_attention_flops(new, total, heads=4, rope_dim=8, absorb=absorb, **sizes)
        for absorb in (False, True)
    ]
    assert absorbed_is_cheaper(new, total, **sizes) == (flops[1] < flops[0])


def test_where_the_ways_of_deepseek_v2_cross():
    cheaper = partial(absorbed_is_cheaper, kv_rank=512, head_dim=128, value_dim=128)
    assert [cheaper(1, total) for total in (1, 2, 4096)] == [False, True, True]
    assert not cheaper(4096, 4096)
    assert [cheaper(new, 10**7) for new in (170, 171)] == [True, False]
    # What a token costs then, behind 4096 others.
    flops = partial(
        latent_attention_flops, 1, 4096, heads=128, rope_dim=64, kv_rank=512, head_dim=128, value_dim=128
    )
    assert flops(absorb=False) / flops(absorb=True) > 100


def test_none_takes_the_cheaper_way(monkeypatch):
    m, taken = layer(), []
    for f in (rebuilt_attention, absorbed_attention):

        def spy(*args, f=f, **how):
            taken.append(f.__name__)
            return f(*args, **how)

        monkeypatch.setattr(f"llm_atlas.nn.latent_attention.{f.__name__}", spy)
    cache = KVCache(1)
    for new in (9, 1, 1, 12):
        cache.place(new)
        m(randn(1, new, DIM), cache=cache[0])
    m(randn(1, 9, DIM))
    rebuilt, absorbed = "rebuilt_attention", "absorbed_attention"
    assert taken == [rebuilt, absorbed, absorbed, rebuilt, rebuilt]


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["kv_rank", "head_dim", "value_dim", "q_rank"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} 0 must be at least 1"):
        layer(**{name: 0})


def test_dim_and_heads_below_one_are_refused():
    with pytest.raises(ValueError, match="heads 0 must be at least 1"):
        LatentAttention(DIM, 0, **SIZES)
    with pytest.raises(ValueError, match="dim 0 must be at least 1"):
        LatentAttention(0, HEADS, **SIZES)


@pytest.mark.parametrize("rope_dim", [0, 3, -2])
def test_an_odd_rope_dim_is_refused(rope_dim):
    with pytest.raises(ValueError, match=f"rope_dim {rope_dim} must be even and positive"):
        LatentAttention(DIM, HEADS, **(SIZES | {"rope_dim": rope_dim}))


def test_positions_of_another_size_are_refused():
    with pytest.raises(ValueError, match="rope_dim is 4, but the positions are made for 10 features"):
        layer(positions=RotaryPositions(HEAD_DIM + ROPE_DIM))


@pytest.mark.untyped
def test_x_of_another_width_is_refused():
    with pytest.raises(ValueError, match=f"x has 5 features, this layer takes {DIM}"):
        layer()(randn(1, 3, 5))


def test_a_cache_of_another_shape_is_refused():
    cache = KVCache(1)
    layer()(randn(2, 3, DIM), cache=cache[0])
    other = layer(kv_rank=8)
    with pytest.raises(ValueError, match=r"the cache holds 1 heads of 10, the new keys have 1 of 8"):
        other(randn(2, 1, DIM), cache=cache[0])
    with pytest.raises(ValueError, match="the cache holds 2 rows, the new keys have 1"):
        layer()(randn(1, 1, DIM), cache=cache[0])
    cache = KVCache(1)
    MultiHeadAttention(DIM, 2)(randn(2, 3, DIM), cache=cache[0])
    with pytest.raises(ValueError, match="the cache holds 2 heads of 11"):
        layer()(randn(2, 1, DIM), cache=cache[0])


def test_a_context_is_not_taken():
    with pytest.raises(TypeError, match="context"):
        layer()(randn(1, 3, DIM), context=randn(1, 3, DIM))


@pytest.mark.parametrize(("new", "total"), [(0, 3), (4, 3), (-1, 0)])
def test_counts_of_impossible_tokens_are_refused(new, total):
    message = f"1 <= new <= total, got new {new} and total {total}"
    with pytest.raises(ValueError, match=message):
        absorbed_is_cheaper(new, total, kv_rank=4, head_dim=2, value_dim=2)
    with pytest.raises(ValueError, match=message):
        latent_attention_flops(new, total, heads=2, absorb=True, **SIZES)
    with pytest.raises(ValueError, match="rope_dim 0 must be at least 1"):
        latent_cache_numbers(kv_rank=4, rope_dim=0)
