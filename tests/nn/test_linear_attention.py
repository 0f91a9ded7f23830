# ruff: noqa: E501 (the table of bad input: each line is one mistake and its message)
"""Linear attention: three forms against a double loop, the delta rule against its matrices, the layer in pieces."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from llm_atlas.nn import linear_attention as linear
from llm_atlas.nn.attention import AttendFunction, MultiHeadAttention, fused_attention, split_heads
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.linear_attention import (
    FEATURE_MAPS,
    LinearAttention,
    RandomFeatures,
    bidirectional_linear_attention,
    delta_rule_chunked,
    delta_rule_flops,
    delta_rule_recurrent,
    elu_features,
    feature_size,
    find_feature_map,
    linear_attention,
    linear_attention_chunked,
    linear_attention_flops,
    linear_attention_recurrent,
    linear_state_size,
    retention_log_decay,
    short_convolution,
    taylor_features,
    unit_length,
)
from llm_atlas.nn.masks import PAD, causal_mask, padding_mask

HEADS = {"one": ((), ()), "heads": ((3,), (3,)), "batch": ((2, 4), (2, 4)), "groups": ((2, 4), (2, 2)),
         "one key head": ((2, 4), (2, 1)), "groups, no batch": ((6,), (2,)), "two axes": ((2, 2, 2), (2, 2, 2))}  # fmt: skip
DECAYS = ["none", "head", "channel", "fixed"]
LOOSE = {"feature_map": "identity", "normalize": False}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(heads: str = "batch", seq: int = 11, dim: int = 4, value_dim: int = 3, **how):
    queries, keys = HEADS[heads]
    q, k = randn(*queries, seq, dim, seed=1, **how), randn(*keys, seq, dim, seed=2, **how)
    return q, k, randn(*keys, seq, value_dim, seed=3, **how)


def decays(kind: str, k: torch.Tensor) -> torch.Tensor | None:
    """Log decays for keys: from nearly none to a hundredth a token."""
    if kind == "none":
        return None
    if kind == "fixed":
        return retention_log_decay(k.shape[-3]).to(k.dtype) if k.dim() > 2 else torch.full((1, 1), -0.1).to(k)
    return functional.logsigmoid(3 * randn(*k.shape[:-1], 1 if kind == "head" else k.shape[-1], seed=4)).to(k)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def spread(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Every query head's own copy of its key head."""
    return k if q.dim() < 3 else k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)


def by_pairs(q, k, v, *, phi, normalize, log_decay=None, keep=None, causal=True):
    """The equation in two loops: each query meets each key, through the decays of all tokens between them."""
    dtype = q.dtype
    q, k, v = phi(q.double()), spread(q, phi(k.double())), spread(q, v.double())
    a = torch.ones_like(k)
    if log_decay is not None:
        a = spread(q, log_decay.double().exp().expand(*log_decay.shape[:-2], v.shape[-2], -1)).expand_as(k)
    seq, out = q.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for t in range(seq):
        total = torch.zeros(q.shape[:-2], dtype=torch.float64)
        for s in range(t + 1 if causal else seq):
            if keep is not None and not keep[s]:
                continue
            passed = torch.ones_like(k[..., 0, :])
            for i in range(s + 1, t + 1):
                if keep is None or keep[i]:
                    passed = passed * a[..., i, :]
            weight = (q[..., t, :] * k[..., s, :] * passed).sum(-1)
            out[..., t, :] += weight[..., None] * v[..., s, :]
            total += weight
        if normalize:
            out[..., t, :] = torch.where(total[..., None] == 0, 0.0, out[..., t, :] / total[..., None])
    return out.to(dtype)


def by_matrices(q, k, v, beta, *, log_decay=None, state=None):
    """The delta rule as the paper has it, with the matrix I - beta k k^T written out."""
    k, v, beta = spread(q, k), spread(q, v), spread(q, beta)
    k = k / k.norm(dim=-1, keepdim=True)
    a = torch.ones_like(beta) if log_decay is None else spread(q, log_decay.exp())
    S = torch.zeros(*q.shape[:-2], k.shape[-1], v.shape[-1], dtype=q.dtype) if state is None else state
    outs = []
    for t in range(q.shape[-2]):
        key, b = k[..., t, :, None], beta[..., t, :, None]
        forget = torch.eye(k.shape[-1], dtype=q.dtype) - b * key @ key.mT
        S = a[..., t, :, None] * (forget @ S) + b * key @ v[..., t, None, :]
        outs.append((S.mT @ q[..., t, :, None]).squeeze(-1))
    return torch.stack(outs, dim=-2), S


# Three forms of the additive rule


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", HEADS)
def test_three_forms_are_the_double_loop(heads, decay, normalize):
    q, k, v = inputs(heads)
    how = {
        "feature_map": "elu" if normalize else "identity",
        "normalize": normalize,
        "log_decay": decays(decay, k),
    }
    expected = by_pairs(
        q,
        k,
        v,
        phi=elu_features if normalize else (lambda x: x),
        normalize=normalize,
        log_decay=how["log_decay"],
    )
    assert_close(linear_attention(q, k, v, is_causal=True, **how), expected)
    out, state = linear_attention_recurrent(q, k, v, **how)
    assert_close(out, expected)
    assert state.shape == (*k.shape[:-1][:-1], k.shape[-1], v.shape[-1] + normalize)
    for chunk in (1, 2, 3, 4, 11, 64):
        out, last = linear_attention_chunked(q, k, v, chunk=chunk, **how)
        assert_close(out, expected)
        assert_close(last, state)


@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, "random", "function"])
def test_every_feature_map_in_every_form(feature_map):
    q, k, v = inputs("groups")
    made = {"random": RandomFeatures(4, 6, generator=torch.Generator().manual_seed(0)), "function": torch.exp}
    phi = made.get(feature_map, feature_map)
    normalize = feature_map not in ("identity", "silu")
    how = {"feature_map": phi, "normalize": normalize}
    expected = by_pairs(q, k, v, phi=find_feature_map(phi), normalize=normalize)
    assert_close(linear_attention(q, k, v, is_causal=True, **how), expected)
    assert_close(linear_attention_recurrent(q, k, v, **how)[0], expected)
    out, state = linear_attention_chunked(q, k, v, chunk=4, **how)
    assert_close(out, expected)
    assert state.shape[-2] == feature_size(phi, 4)


@pytest.mark.parametrize("seq", [1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_forms_and_gradients_agree_at_any_length(decay, seq):
    q, k, v = inputs("groups", seq=seq, dim=8, value_dim=6)
    leaves = [t for t in (q, k, v, decays(decay, k)) if t is not None]

    def run(function, dtype, **how):
        mine = [t.detach().to(dtype, copy=True).requires_grad_() for t in leaves]
        out = function(*mine[:3], log_decay=mine[3] if len(mine) > 3 else None, **how)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(randn(*out.shape, seed=5, dtype=dtype))
        return [out.detach(), *(t.grad for t in mine)]

    exact = run(linear_attention, torch.float64, is_causal=True)
    for function, how in [
        (linear_attention, {"is_causal": True}),
        (linear_attention_recurrent, {}),
        (linear_attention_chunked, {"chunk": 16}),
        (linear_attention_chunked, {}),
    ]:
        for ours, wanted in zip(run(function, torch.float32, **how), exact, strict=True):
            assert ours.dtype == torch.float32
            assert (
                ours - wanted
            ).norm() <= 1e-5 * wanted.norm() + 1e-6  # one token has no gradient in its decay


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("cut", [1, 4, 10])
def test_the_state_hands_over(decay, cut):
    q, k, v = inputs("groups")
    log_decay = decays(decay, k)
    log_decay = None if log_decay is None else log_decay.expand(*k.shape[:-1], -1)
    for function, how in [(linear_attention_recurrent, {}), (linear_attention_chunked, {"chunk": 3})]:
        whole, last = function(q, k, v, log_decay=log_decay, **how)
        parts, state = [], None
        for piece in (slice(0, cut), slice(cut, 11)):
            given = None if log_decay is None else log_decay[..., piece, :]
            q_, k_, v_ = (t[..., piece, :] for t in (q, k, v))
            out, state = function(q_, k_, v_, log_decay=given, state=state, **how)
            parts.append(out)
        assert_close(torch.cat(parts, -2), whole)
        assert_close(state, last)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_gradcheck(decay):
    q, k, v = inputs("groups, no batch", seq=5, dim=2, value_dim=2)
    tensors = [
        t.requires_grad_() for t in (q, k, v, randn(2, 2, 3, seed=5), decays(decay, k)) if t is not None
    ]

    def run(q, k, v, state, log_decay=None):
        return linear_attention_chunked(q, k, v, chunk=2, state=state.abs(), log_decay=log_decay)

    if decay != "none":  # gradcheck steps to both sides of a point: keep its steps below 0
        tensors[4] = (tensors[4].detach() - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(run, tensors)


def test_keys_that_a_mask_drops_are_as_if_not_there():
    q, k, v = inputs("groups")
    keep = torch.tensor([False, True, True, False, False, True, True, True, False, True, True])
    v[..., ~keep, :] = math.nan
    clean = torch.where(keep[:, None], v, 0.0)
    for decay in DECAYS:
        log_decay = decays(decay, k)
        expected = by_pairs(q, k, clean, phi=elu_features, normalize=True, log_decay=log_decay, keep=keep)
        for mask in (keep[None], padding_mask(torch.where(keep, 0, PAD)[None]).expand(2, 2, 1, 11)):
            out, state = linear_attention_recurrent(q, k, v, mask=mask, log_decay=log_decay)
            assert_close(out, expected)
            for chunk in (2, 64):
                out, last = linear_attention_chunked(q, k, v, mask=mask, log_decay=log_decay, chunk=chunk)
                assert_close(out, expected)
                assert_close(last, state)
        drop = linear_attention(q, k, clean, mask=keep[None], is_causal=True, log_decay=log_decay)
        assert_close(drop, expected)


def test_bidirectional_is_the_full_double_loop_in_other_brackets():
    for heads in HEADS:
        q, k, v = inputs(heads)
        keep = torch.arange(11) % 3 > 0
        for how, extra in [({}, {}), ({"keep": keep}, {"mask": keep[None]})]:
            expected = by_pairs(q, k, v, phi=elu_features, normalize=True, causal=False, **how)
            assert_close(bidirectional_linear_attention(q, k, v, **extra), expected)
            assert_close(linear_attention(q, k, v, **extra), expected)
    q, k, v = inputs("groups")
    out = bidirectional_linear_attention(q[..., :3, :], k, v, scale=0.5, **LOOSE)  # fewer queries than keys
    assert_close(out, 0.5 * q[..., :3, :] @ spread(q, k).mT @ spread(q, v))


def test_scale_is_seen_without_a_normaliser_alone():
    q, k, v = inputs("groups")
    for function in (linear_attention_recurrent, linear_attention_chunked):
        assert_close(function(q, k, v, scale=0.3)[0], function(q, k, v)[0])
        assert_close(function(q, k, v, scale=0.3, **LOOSE)[0], 0.3 * function(q, k, v, **LOOSE)[0])
    assert_close(linear_attention(q, k, v, scale=0.3), linear_attention(q, k, v))


# It fits the attend seam


def test_it_stands_in_for_attention():
    assert isinstance(linear_attention, AttendFunction)
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 4, kv_heads=2, attend=linear_attention).double()
    x = randn(2, 9, 12)
    whole = layer(x)
    cache = KVCache(1)[0]
    pieces = [layer(piece, cache=cache) for piece in x.split([4, 1, 3, 1], dim=1)]
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(layer(x, mask=causal_mask(9)[None, None]), whole)
    assert relative(MultiHeadAttention.forward(layer, x.flip(0)), whole) > 0.1


def test_any_mask_in_the_parallel_form():
    q, k, v = inputs("groups")
    mask = randn(2, 4, 11, 11, seed=6) > 0
    mask[:, :, 3] = False
    out = linear_attention(q, k, v, mask=mask)
    weights = (elu_features(q) @ spread(q, elu_features(k)).mT).masked_fill(~mask, 0)
    expected = torch.nan_to_num(weights / weights.sum(-1, keepdim=True)) @ spread(q, v)
    assert_close(out, expected)
    assert not out[:, :, 3].any()


# Feature maps


def test_taylor_features_are_one_plus_z_plus_half_z_squared():
    q, k = randn(5, 6, seed=1), randn(5, 6, seed=2)
    z = (q * k).sum(-1) / math.sqrt(6)
    assert taylor_features(q).shape == (5, 1 + 6 + 6 * 7 // 2)
    assert_close((taylor_features(q) * taylor_features(k)).sum(-1), 1 + z + z * z / 2)


def test_taylor_attention_nears_softmax_as_the_cube_of_the_logits():
    q, k, v = inputs("batch", seq=30, dim=8, value_dim=8)
    errors = []
    for size in (0.4, 0.2, 0.1):
        q_, k_ = q * size**0.5, k * size**0.5
        ours = linear_attention_chunked(q_, k_, v, feature_map="taylor", chunk=8)[0]
        errors.append(relative(ours, fused_attention(q_, k_, v, is_causal=True)))
    assert 1e-3 < errors[0] < 0.05
    assert errors[1] < errors[0] / 6  # a half of the logits: an eighth of the error
    assert errors[2] < errors[1] / 6
    # At the same small logits elu + 1 is another kernel altogether.
    assert relative(linear_attention_chunked(q_, k_, v)[0], fused_attention(q_, k_, v, is_causal=True)) > 0.05


def test_random_features_near_the_kernel_as_the_root_of_their_number():
    q, k = 0.5 * randn(20, 8, seed=1), 0.5 * randn(20, 8, seed=2)
    exact = (q @ k.T / math.sqrt(8)).exp()
    errors = []
    for count in (16, 256, 4096):
        tries = []
        for seed in range(20):
            phi = RandomFeatures(8, count, generator=torch.Generator().manual_seed(seed))
            assert phi(q).shape == (20, count)
            assert (phi(q) > 0).all()
            tries.append(relative(phi(q) @ phi(k).T, exact))
        errors.append(sum(tries) / len(tries))
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    assert errors[2] < 0.1
    block = phi.directions[:8]
    crossed = block @ block.T
    assert_close(crossed, crossed.diag().diag(), atol=1e-4, rtol=0)  # orthogonal, of different lengths


def test_no_weight_at_all_gives_zeros():
    q, k, v = inputs("groups")
    k = -k.abs()
    for run in (
        lambda k: linear_attention(q, k, v, is_causal=True, feature_map="relu"),
        lambda k: linear_attention_recurrent(q, k, v, feature_map="relu")[0],
        lambda k: linear_attention_chunked(q, k, v, feature_map="relu", chunk=4)[0],
        lambda k: bidirectional_linear_attention(q, k, v, feature_map="relu"),
    ):
        leaf = k.clone().requires_grad_()
        out = run(leaf)
        assert torch.equal(out, torch.zeros_like(out))
        out.sum().backward()
        assert torch.isfinite(leaf.grad).all()


# Numbers that are hard


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("strength", [1e-6, 1.0, 20.0, 1e4])
def test_strong_decay_over_many_tokens(strength, channels):
    q, k, v = inputs("heads", seq=500, dtype=torch.float32)
    log_decay = -strength * randn(3, 500, channels, seed=4, dtype=torch.float32).abs()
    tensors = [t.requires_grad_() for t in (q, k, v, log_decay)]
    for how in ({}, LOOSE):
        out, state = linear_attention_chunked(*tensors[:3], log_decay=log_decay, **how)
        grads = torch.autograd.grad(out.square().sum() + state.sum(), tensors)
        assert all(torch.isfinite(t).all() for t in (out, state, *grads))
        exact, last = linear_attention_recurrent(
            *(t.double() for t in tensors[:3]), log_decay=log_decay.double(), **how
        )
        assert relative(out, exact) < 1e-4
        assert relative(state, last) < 1e-4


def test_one_forgotten_past_does_not_blur_what_comes_after():
    """The logs of the decays reach -1e4, and the last tokens still see each other exactly."""
    q, k, v = inputs("heads", seq=40, dtype=torch.float32)
    log_decay = torch.full((3, 40, 1), -0.01)
    log_decay[:, 5] = -1e4
    out = linear_attention(q, k, v, is_causal=True, log_decay=log_decay, **LOOSE)
    alone = linear_attention(
        *(t[:, 5:] for t in (q, k, v)), is_causal=True, log_decay=log_decay[:, 5:], **LOOSE
    )
    assert relative(out[:, 5:], alone) < 1e-6


def test_large_keys():
    q, k, v = inputs("heads", seq=100, dtype=torch.float32)
    beta = torch.ones(3, 100, 1)
    for out in (
        linear_attention_chunked(q, 1e6 * k, v)[0],
        delta_rule_chunked(q, 1e6 * k, v, beta)[0],
        delta_rule_chunked(q, k.mean(-2, keepdim=True).expand_as(k), v, beta)[0],  # one key again and again
    ):
        assert torch.isfinite(out).all()
        assert out.abs().max() < 1e3


@pytest.mark.parametrize("kind", ["linear", "decay", "delta"])
def test_bfloat16_in_bfloat16_out(kind):
    q, k, v = (t.bfloat16() for t in inputs("groups", seq=70))
    log_decay = decays("head", k)
    runs = {
        "linear": [linear_attention_recurrent, linear_attention_chunked],
        "decay": [linear_attention_recurrent, linear_attention_chunked],
        "delta": [delta_rule_recurrent, delta_rule_chunked],
    }[kind]
    given = (q, k, v, randn(2, 2, 70, 1).sigmoid()) if kind == "delta" else (q, k, v)
    how = {} if kind == "linear" else {"log_decay": log_decay}
    for run in runs:
        out, state = run(*given, **how)
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        wide = run(*(t.float() for t in given), **how)[0]
        assert torch.equal(out, wide.bfloat16())  # float32 inside: only the result is rounded
    assert linear_attention(q, k, v).dtype == torch.bfloat16
    assert bidirectional_linear_attention(q, k, v).dtype == torch.bfloat16


# The delta rule


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_both_forms_of_the_delta_rule_are_its_matrices(heads, gated):
    q, k, v = inputs(heads)
    beta = 2 * randn(*k.shape[:-1], 1, seed=7).sigmoid()
    how = {"log_decay": decays("head", k) if gated else None}
    expected, last = by_matrices(q, k, v, beta, **how)
    out, state = delta_rule_recurrent(q, k, v, beta, **how)
    assert_close(out, expected)
    assert_close(spread(q, state), last)
    for chunk in (1, 2, 3, 4, 11, 64):
        out, again = delta_rule_chunked(q, k, v, beta, chunk=chunk, **how)
        assert_close(out, expected)
        assert_close(again, state)


def test_delta_rule_is_that_of_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    q, k, v = inputs("batch", seq=70, dim=8, value_dim=6, dtype=torch.float32)
    beta, log_decay = randn(2, 4, 70, 1, seed=7, dtype=torch.float32).sigmoid(), decays("head", k)
    start = randn(2, 4, 8, 6, seed=8, dtype=torch.float32)
    swapped = [t.transpose(1, 2) for t in (unit_length(q), unit_length(k), v)]
    gates = {"g": log_decay.squeeze(-1).transpose(1, 2), "beta": beta.squeeze(-1).transpose(1, 2)}
    for theirs in (torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule):
        wanted, last = theirs(*swapped, **gates, initial_state=start, output_final_state=True)
        for ours in (delta_rule_recurrent, delta_rule_chunked):
            out, state = ours(
                unit_length(q), k, v, beta, log_decay=log_decay, state=start, scale=1 / math.sqrt(8)
            )
            assert relative(out, wanted.transpose(1, 2)) < 1e-5
            assert relative(state, last) < 1e-5


def test_decay_of_a_head_is_the_lightning_attention_of_minimax():
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=12, num_attention_heads=3, head_dim=4, num_hidden_layers=3, block_size=5, num_key_value_heads=3,
        layer_types=["linear_attention"] * 3, vocab_size=7, intermediate_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = MiniMaxLightningAttention(config, 1)
    x = randn(2, 13, 12, dtype=torch.float32)
    wanted, states, *_ = theirs(x, None, None)
    q, k, v = functional.silu(theirs.qkv_proj(x)).unflatten(-1, (3, 12)).transpose(1, 2).split(4, dim=-1)
    # Its blocks write a key with the decay up to the end of its block, and its first block is all of the state.
    out, state = linear_attention_chunked(q, k, v, log_decay=-theirs.slope_rate, chunk=4, **LOOSE)
    mixed = theirs.norm(out.transpose(1, 2).flatten(-2))
    assert relative(theirs.out_proj(theirs.output_gate(x).sigmoid() * mixed), wanted) < 1e-5
    assert relative(state, states) < 1e-5


@pytest.mark.parametrize("rule", [delta_rule_recurrent, delta_rule_chunked])
def test_the_delta_rule_replaces_and_the_additive_rule_adds(rule):
    keys = torch.linalg.qr(randn(6, 6, seed=1)).Q  # orthonormal rows
    old, new = randn(6, 3, seed=2), randn(1, 3, seed=3)
    k, v = torch.cat([keys, keys[2:3]]), torch.cat([old, new])
    ones = torch.ones(7, 1, dtype=torch.float64)
    _, state = rule(k, k, v, ones)
    read = keys @ state
    assert_close(read, torch.cat([old[:2], new, old[3:]]))
    _, summed = linear_attention_recurrent(k, k, v, **LOOSE)
    assert_close(keys @ summed, torch.cat([old[:2], old[2:3] + new, old[3:]]))
    _, half = rule(k, k, v, torch.where(torch.arange(7)[:, None] == 6, 0.5, ones))
    assert_close((keys @ half)[2:3], (old[2:3] + new) / 2)
    # Where keys are not orthogonal, writing one changes what another returns, but not what it returns itself.
    k, v = randn(5, 6, seed=4), randn(5, 3, seed=5)
    out, state = rule(unit_length(k), k, v, ones[:5])
    assert_close(out, v)
    assert relative(unit_length(k) @ state, v) > 0.1


@pytest.mark.parametrize("gated", [False, True])
def test_delta_rule_state_hands_over_and_padding_is_not_seen(gated):
    q, k, v = inputs("groups")
    beta, log_decay = randn(2, 2, 11, 1, seed=7).sigmoid(), decays("head", k) if gated else None
    keep = torch.tensor([False, False, True, True, False, True, True, True, True, False, True])

    def run(function, at, state=None, mask=None, values=v, **how):
        given = (q[..., at, :], k[..., at, :], values[..., at, :], beta[..., at, :])
        ld = None if log_decay is None else log_decay[..., at, :]
        return function(*given, log_decay=ld, state=state, mask=mask, **how)

    for function, how in [(delta_rule_recurrent, {}), (delta_rule_chunked, {"chunk": 3})]:
        whole, last = run(function, slice(None), **how)
        first, state = run(function, slice(0, 5), **how)
        second, state = run(function, slice(5, 11), state=state, **how)
        assert_close(torch.cat([first, second], -2), whole)
        assert_close(state, last)
        alone, short = run(function, keep, **how)
        broken = v.masked_fill(~keep[:, None], math.nan)
        out, state = run(function, slice(None), mask=keep[None], values=broken, **how)
        assert_close(out[..., keep, :], alone)
        assert_close(state, short)


@pytest.mark.parametrize("gated", [False, True])
def test_delta_rule_gradients(gated):
    q, k, v = inputs("groups, no batch", seq=5, dim=2, value_dim=2)
    beta = randn(2, 5, 1, seed=7).sigmoid()
    tensors = [q, k, v, beta, randn(2, 2, 2, seed=5), *([decays("head", k) - 0.1] if gated else [])]
    tensors = [t.requires_grad_() for t in tensors]

    def run(q, k, v, beta, state, log_decay=None):
        return delta_rule_chunked(q, k, v, beta, chunk=2, state=state, log_decay=log_decay)

    assert torch.autograd.gradcheck(run, tensors)

    def grads(function, dtype, **how):
        q, k, v = inputs("groups", seq=70, dtype=dtype)
        beta = randn(2, 2, 70, 1, seed=7, dtype=dtype).sigmoid()
        leaves = [t.requires_grad_() for t in (q, k, v, beta, decays("head", k))][: 5 if gated else 4]
        out = function(*leaves[:4], log_decay=leaves[4] if gated else None, **how)[0]
        return torch.autograd.grad(out, leaves, randn(*out.shape, seed=5, dtype=dtype))

    exact = grads(delta_rule_recurrent, torch.float64)
    for function in (delta_rule_recurrent, delta_rule_chunked):
        for ours, wanted in zip(grads(function, torch.float32), exact, strict=True):
            assert relative(ours, wanted) < 2e-5


def test_without_unit_keys_the_key_is_taken_as_it_is():
    q, k, v = inputs("heads", seq=6)
    k, beta = 0.1 * k, torch.ones(3, 6, 1, dtype=torch.float64)
    S = torch.zeros(3, 4, 3, dtype=torch.float64)
    for t in range(6):
        key = k[:, t, :, None]
        S = S + key @ (v[:, t, None] - key.mT @ S)
    for rule in (delta_rule_recurrent, delta_rule_chunked):
        assert_close(rule(q, k, v, beta, unit_keys=False)[1], S)
        assert relative(rule(q, k, v, beta)[1], S) > 0.5


# The convolution


def test_short_convolution_by_hand_and_in_pieces():
    x, taps = randn(2, 9, 3), randn(3, 4, seed=1)
    out, last = short_convolution(x, taps)
    for t in range(9):
        by_hand = sum(taps[:, 3 - back] * x[:, t - back] for back in range(4) if back <= t)
        assert_close(out[:, t], by_hand)
    assert torch.equal(last, x[:, -3:])
    past, parts = None, []
    for piece in x.split([1, 2, 5, 1], dim=1):
        part, past = short_convolution(piece, taps, past=past)
        parts.append(part)
    assert_close(torch.cat(parts, 1), out)
    assert torch.equal(past, last)
    identity = short_convolution(x, torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(identity[0], x)
    assert identity[1].shape == (2, 0, 3)


def test_short_convolution_skips_what_is_not_real():
    x, taps = randn(3, 8, 3), randn(3, 3, seed=1)
    past = randn(3, 2, 3, seed=2)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    x[~real] = math.nan
    out, last = short_convolution(x, taps, real=real, past=past)
    for row in range(3):
        alone, kept = short_convolution(x[row : row + 1, real[row]], taps, past=past[row : row + 1])
        assert_close(out[row, real[row]], alone[0])
        assert_close(last[row], kept[0])


# The layer

LAYERS = {
    "linear": {"kind": "linear"},
    "linear, taylor": {"kind": "linear", "feature_map": "taylor"},
    "linear, sum": {"kind": "linear", "feature_map": "identity"},
    "linear, conv": {"kind": "linear", "conv": 4},
    "gated": {"kind": "gated"},
    "gated, taylor": {"kind": "gated", "feature_map": "taylor"},
    "gated, head": {"kind": "gated", "decay": "head", "conv": 2},
    "gated, fixed": {"kind": "gated", "decay": "fixed"},
    "delta": {"kind": "delta"},
    "delta, conv": {"kind": "delta", "conv": 4},
    "gated-delta": {"kind": "gated-delta", "conv": 3},
    "gated-delta, fixed": {"kind": "gated-delta", "decay": "fixed"},
}
EVERY = pytest.mark.parametrize("kind", LAYERS)


def layer(kind: str, dim: int = 12, heads: int = 4, **how) -> LinearAttention:
    torch.manual_seed(0)
    made = LinearAttention(dim, heads, **({"kv_heads": 2, "chunk": 4} | LAYERS[kind] | how)).double()
    with torch.no_grad():  # gates that differ from token to token
        for gate in (made.decay, made.beta):
            if gate is not None:
                gate.weight.mul_(3)
    return made


@EVERY
def test_layer_in_pieces_is_the_layer_whole(kind):
    mixer, x = layer(kind), randn(2, 13, 12)
    whole = mixer(x)
    assert whole.shape == x.shape
    for pieces in ([1] * 13, [6, 7], [5, 1, 1, 4, 2], [13]):
        cache = KVCache(1)[0]
        parts, sizes = [], []
        for piece in x.split(pieces, dim=1):
            parts.append(mixer(piece, cache=cache))
            sizes.append(cache.nbytes)
        assert_close(torch.cat(parts, 1), whole)
        assert cache.length == 13
        assert cache.rows == 2
        assert len(set(sizes)) == 1  # however long the past
    numbers = 2 * linear_state_size(
        2, feature_size(mixer.feature_map, 3), 3, normalize=mixer.normalize
    ) + 2 * (mixer.conv - 1) * 24 * (mixer.conv > 0)
    assert sizes[0] == 8 * numbers


@EVERY
def test_layer_is_causal_and_every_weight_has_a_gradient(kind):
    mixer, x = layer(kind), randn(2, 9, 12)
    changed = x.clone()
    changed[:, 5:] += 1
    assert (
        torch.equal(mixer(x)[:, :4], mixer(changed)[:, :4])
        or relative(mixer(x)[:, :5], mixer(changed)[:, :5]) < 1e-12
    )
    assert relative(mixer(x)[:, 5:], mixer(changed)[:, 5:]) > 1e-2
    mixer(x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


@EVERY
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_nothing(kind, side):
    mixer, x = layer(kind), randn(2, 9, 12)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1] = {
        "left": torch.arange(9) > 3, "right": torch.arange(9) < 5, "inside": torch.arange(9) % 3 > 0
    }[side]  # fmt: skip
    positions = torch.where(real, real.cumsum(1) - 1, PAD)
    cache, alone_cache = KVCache(1)[0], KVCache(1)[0]
    out = mixer(x, positions=positions, cache=cache)
    alone = mixer(x[1:, real[1]], cache=alone_cache)
    assert_close(out[0], mixer(x[:1])[0])
    assert_close(out[1, real[1]], alone[0])
    assert torch.isfinite(out).all()
    for ours, wanted in zip(cache.state, alone_cache.state, strict=True):
        assert_close(ours[1:], wanted)
    token = randn(2, 1, 12, seed=1)
    after = mixer(token, positions=positions.amax(1, keepdim=True) + 1, cache=cache)
    assert_close(after[1:], mixer(token[1:], cache=alone_cache))
    # A token of padding alone leaves a row's state as it was.
    before = [t.clone() for t in cache.state]
    mixer(-token, positions=torch.tensor([[7], [PAD]]), cache=cache)
    for ours, wanted in zip(cache.state, before, strict=True):
        assert torch.equal(ours[1], wanted[1])
        assert not torch.equal(ours[0], wanted[0])


@EVERY
def test_rows_of_the_cache_can_be_chosen_and_forked(kind):
    mixer, x = layer(kind), randn(2, 6, 12)
    cache = KVCache(1)
    cache.place(5)
    mixer(x[:, :5], cache=cache[0])
    twin = cache.fork()
    twin.select([1, 1, 0])
    out = mixer(x[[1, 1, 0], 5:], cache=twin[0])
    assert_close(out, mixer(x)[[1, 1, 0], 5:])
    assert_close(mixer(x[:, 5:], cache=cache[0]), mixer(x)[:, 5:])


@EVERY
def test_layer_in_bfloat16_keeps_its_state_in_float32(kind):
    mixer, x = layer(kind).bfloat16(), randn(2, 9, 12, dtype=torch.bfloat16)
    cache = KVCache(1)[0]
    out = torch.cat([mixer(x[:, :8], cache=cache), mixer(x[:, 8:], cache=cache)], 1)
    assert out.dtype == torch.bfloat16
    assert cache.state[0].dtype == torch.float32
    assert relative(out.double(), layer(kind)(x.double())) < 0.06


def test_layer_by_hand():
    """The pieces that the forms do not see: scale, norm, gates, and the order of it all."""
    x = randn(2, 7, 12)
    for kind in ("gated, head", "gated-delta"):
        mixer = layer(kind, conv=0)
        q, k, v = split_heads(mixer.q(x), 4), split_heads(mixer.k(x), 2), split_heads(mixer.v(x), 2)
        a = functional.logsigmoid(mixer.decay(x)).transpose(1, 2)[..., None]
        if kind == "gated, head":
            out = by_pairs(q, k, v, phi=lambda x: x, normalize=False, log_decay=a) / math.sqrt(3)
        else:
            beta = mixer.beta(x).sigmoid().transpose(1, 2)[..., None]
            q, k = functional.silu(q), functional.silu(k)
            out, _ = by_matrices(q / q.norm(dim=-1, keepdim=True), k, v, beta, log_decay=a)
        out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert_close(mixer(x), mixer.out(out.transpose(1, 2).flatten(-2)))
    plain = layer("linear", out_norm=False)
    assert isinstance(plain.norm, nn.Identity)
    q, k, v = split_heads(plain.q(x), 4), split_heads(plain.k(x), 2), split_heads(plain.v(x), 2)
    out = by_pairs(q, k, v, phi=elu_features, normalize=True)
    assert_close(plain(x), plain.out(out.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("kind", ["gated", "gated, head", "gated-delta"])
def test_gates_begin_near_one(kind):
    how = {"kv_heads": 4, "conv": 0}
    mixer = LinearAttention(12, 4, **(LAYERS[kind] | how))
    decay = mixer.log_decay(torch.zeros(1, 1, 12)).exp().squeeze().reshape(4, -1)
    assert_close(decay[:, 0], 1 - 2 ** -torch.linspace(5, 9, 4), atol=1e-5, rtol=0)
    assert_close(decay, decay[:, :1].expand_as(decay))


def test_retention_decays_are_one_minus_powers_of_two():
    log_decay = retention_log_decay(4)
    assert log_decay.shape == (4, 1, 1)
    assert_close(log_decay.exp().flatten(), 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128, 1 / 256]))
    assert (retention_log_decay(40) < 0).all()  # exact where 1 - 2^-44 itself would be rounded to 1
    mixer = LinearAttention(8, 2, kind="gated", decay="fixed")
    assert "fixed_log_decay" not in mixer.state_dict()
    assert_close(mixer.log_decay(torch.zeros(1, 3, 8))[0], retention_log_decay(2).expand(2, 3, 1))


def test_random_features_are_part_of_the_layer():
    phi = RandomFeatures(3, 8, generator=torch.Generator().manual_seed(0))
    mixer = layer("linear", feature_map=phi)
    assert "feature_map.directions" in mixer.state_dict()
    x = randn(1, 6, 12)
    cache = KVCache(1)[0]
    assert_close(torch.cat([mixer(x[:, :5], cache=cache), mixer(x[:, 5:], cache=cache)], 1), mixer(x))
    assert cache.state[0].shape == (1, 2, 8, 4)


# Counters


def test_state_and_flops_by_counting():
    assert linear_state_size(4, 16, 16) == 4 * (16 * 16 + 16)
    assert linear_state_size(4, 16, 8, normalize=False) == 4 * 16 * 8
    q, k, v = (t[None] for t in inputs("one", seq=64, dim=8, value_dim=6))
    for normalize in (True, False):
        how = {"feature_map": "relu", "normalize": normalize}
        with FlopCounterMode(display=False) as counted:
            linear_attention(q, k, v, is_causal=True, **how)
        each = linear_attention_flops(8, 6, form="parallel", seq=64, normalize=normalize)
        assert counted.get_total_flops() == 64 * each
        with FlopCounterMode(display=False) as counted:
            linear_attention_chunked(q, k, v, chunk=16, **how)
        each = linear_attention_flops(8, 6, form="chunked", seq=64, chunk=16, normalize=normalize)
        assert counted.get_total_flops() == 64 * each
    with FlopCounterMode(display=False) as counted:
        delta_rule_chunked(q, k, v, torch.ones(1, 64, 1, dtype=torch.float64), chunk=16)
    solve = 16 * (8 + 6)  # the counter does not know the triangular solver
    assert counted.get_total_flops() == 64 * (
        delta_rule_flops(8, 6, form="chunked", seq=64, chunk=16) - solve
    )
    assert linear_attention_flops(8, 6, form="recurrent", seq=1, normalize=False) == 4 * 8 * 6
    assert delta_rule_flops(8, 6, form="recurrent", seq=1) == 6 * 8 * 6


# Bad input

T1 = torch.zeros(2, 4, 5, 6)
GATE = torch.zeros(2, 4, 5, 1)
BAD = {
    "map": (lambda: linear_attention(T1, T1, T1, feature_map="cosine"), "feature map 'cosine' is not one of elu, relu"),
    "signed": (lambda: linear_attention_chunked(T1, T1, T1, feature_map="identity"), "identity features may be negative"),
    "chunk": (lambda: linear_attention_chunked(T1, T1, T1, chunk=0), "chunk 0 must be at least 1"),
    "delta chunk": (lambda: delta_rule_chunked(T1, T1, T1, GATE, chunk=-1), "chunk -1 must be at least 1"),
    "bias": (lambda: linear_attention(T1, T1, T1, bias=torch.zeros(5, 5)), "takes no bias"),
    "decay, not causal": (lambda: linear_attention(T1, T1, T1, log_decay=GATE), "log_decay needs is_causal=True"),
    "decay above 1": (lambda: linear_attention_chunked(T1, T1, T1, log_decay=GATE + 0.5), "log_decay 0.5 must be finite and at most 0"),
    "decay 0": (lambda: linear_attention_recurrent(T1, T1, T1, log_decay=GATE - math.inf), r"log_decay -inf must be finite.*\(0, 1\]"),
    "decay NaN": (lambda: linear_attention_recurrent(T1, T1, T1, log_decay=GATE * math.nan), "log_decay nan must be finite"),
    "decay channels": (lambda: linear_attention_chunked(T1, T1, T1, log_decay=torch.zeros(2, 4, 5, 3)), r"\(2, 4, 5, 3\): it must be \(..., 5, 1 or 6\)"),
    "decay heads": (lambda: linear_attention_chunked(T1, T1, T1, log_decay=torch.zeros(2, 3, 5, 1)), "does not spread over keys of"),
    "decay of delta": (lambda: delta_rule_chunked(T1, T1, T1, GATE, log_decay=torch.zeros(2, 4, 5, 6)), r"log_decay has shape .*\(..., 5, 1\)"),
    "decay ints": (lambda: linear_attention_chunked(T1, T1, T1, log_decay=GATE.long()), "log_decay must hold floating-point numbers"),
    "beta without its axis": (lambda: delta_rule_chunked(T1, T1, T1, torch.ones(2, 4, 5)), r"beta has shape \(2, 4, 5\): it must be \(..., 5, 1\)"),
    "beta tokens": (lambda: delta_rule_recurrent(T1, T1, T1, torch.ones(2, 4, 4, 1)), "beta has shape .* does not spread"),
    "beta above 2": (lambda: delta_rule_recurrent(T1, T1, T1, GATE + 2.5), "beta 2.5 must lie between 0 and 2"),
    "beta below 0": (lambda: delta_rule_chunked(T1, T1, T1, GATE - 1), "beta -1 must lie between 0 and 2"),
    "groups": (lambda: linear_attention_chunked(T1, T1[:, :3], T1[:, :3]), "4 query heads do not divide into groups over 3"),
    "tokens": (lambda: linear_attention_recurrent(T1[..., :4, :], T1, T1), "4 queries and 5 keys: a recurrence"),
    "no tokens": (lambda: linear_attention_chunked(*(T1[..., :0, :],) * 3), "at least one token"),
    "mask of pairs": (lambda: linear_attention_chunked(T1, T1, T1, mask=causal_mask(5)), "takes no mask but one of whole keys"),
    "mask and decay": (lambda: linear_attention(T1, T1, T1, mask=causal_mask(5), is_causal=True, log_decay=GATE), "takes no mask but one of whole keys"),
    "mask of query heads": (lambda: linear_attention_chunked(T1, T1[:, :2], T1[:, :2], mask=torch.ones(2, 4, 1, 5).bool()), "key heads or 1"),
    "state": (lambda: linear_attention_chunked(T1, T1, T1, state=torch.zeros(2, 4, 6, 6)), r"state has shape \(2, 4, 6, 6\).* need \(2, 4, 6, 7\)"),
    "features": (lambda: feature_size("elu", 0), "dim 0 must be at least 1"),
    "random features": (lambda: RandomFeatures(4, 0), "features 0 must be at least 1"),
    "random dim": (lambda: RandomFeatures(4, 3)(T1), "x has 6 features, the random directions have 4"),
    "retention": (lambda: retention_log_decay(0), "heads 0 must be at least 1"),
    "taps": (lambda: short_convolution(T1[0], torch.zeros(3, 2)), "taps have shape"),
    "past": (lambda: short_convolution(T1[0], torch.zeros(6, 2), past=T1[0]), "past has shape"),
    "form": (lambda: linear_attention_flops(1, 1, form="fast", seq=1), "form 'fast' is not one of"),
    "count": (lambda: linear_attention_flops(1, 0, form="chunked", seq=1), "value_dim 0 must be"),
    "no such form": (lambda: delta_rule_flops(1, 1, form="parallel", seq=1), "no parallel form"),
    "size": (lambda: linear_state_size(0, 1, 1), "heads 0 must be"),
    "kind": (lambda: LinearAttention(8, 2, kind="mamba"), "kind 'mamba' is not one of linear, gated"),
    "decay kind": (lambda: LinearAttention(8, 2, kind="gated", decay="slow"), "decay 'slow' is not one of"),
    "heads": (lambda: LinearAttention(8, 3), "dim 8 must divide into 3 heads"),
    "kv heads": (lambda: LinearAttention(8, 4, kv_heads=3), "4 heads must divide into groups over 3"),
    "head dim": (lambda: LinearAttention(8, 2, head_dim=0), "head_dim 0"),
    "conv": (lambda: LinearAttention(8, 2, conv=-1), "conv -1"),
    "layer chunk": (lambda: LinearAttention(8, 2, chunk=0), "chunk 0"),
    "layer map": (lambda: LinearAttention(8, 2, feature_map="x"), "feature map 'x'"),
    "layer signed": (lambda: LinearAttention(8, 2, feature_map="silu", normalize=True), "silu features may be negative"),
    "layer normalize": (lambda: LinearAttention(8, 2, kind="delta", normalize=True), "no normaliser"),
    "layer x": (lambda: LinearAttention(8, 2)(T1[0]), "x has 6 features, this layer takes 8"),
    "layer mask": (lambda: LinearAttention(6, 2)(T1[0], mask=torch.ones(1, 1, 5, 5).bool()), "linear attention cannot take a mask"),
}  # fmt: skip


@pytest.mark.untyped
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.untyped
def test_a_cache_of_other_rows_is_refused():
    mixer, cache = LinearAttention(6, 2), KVCache(1)[0]
    mixer(T1[0], cache=cache)
    with pytest.raises(ValueError, match="the cache holds 4 rows, the new tokens have 2"):
        mixer(T1[0, :2], cache=cache)


@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_a_long_text_is_worked_on_in_pieces(rule, monkeypatch):
    rng = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 90, 6, generator=rng) for heads in (4, 2, 2))
    decay = -torch.rand(2, 2, 90, 1, generator=rng)
    beta, start = torch.rand(2, 2, 90, 1, generator=rng), torch.randn(2, 2, 6, 6, generator=rng)
    real = torch.arange(90)[None, None, None] % 7 > 0

    def call(mask, log_decay):
        how = {"mask": mask, "log_decay": log_decay, "state": start, "chunk": 8}
        if rule == "delta":
            return linear.delta_rule_chunked(q, k, v, beta, **how)
        return linear.linear_attention_chunked(q, k, v, normalize=False, **how)

    for how in ((real, decay), (None, decay), (real, None), (None, decay[:, :, :1])):
        whole = call(*how)
        monkeypatch.setattr(linear, "_SEGMENT", 32)
        pieces = call(*how)
        monkeypatch.setattr(linear, "_SEGMENT", 4096)
        for a, b in zip(pieces, whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
