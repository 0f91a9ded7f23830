"""Attention against torch, transformers and a slow oracle: what goes in, what comes out, and its gradients."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from llm_atlas.nn import attention
from llm_atlas.nn.attention import (
    Attend,
    MultiHeadAttention,
    attention_weights,
    fused_attention,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
)
from llm_atlas.nn.cache import KVCache, LayerCache, RollingLayerCache
from llm_atlas.nn.masks import causal_mask, padding_mask, sliding_window_mask, visible
from llm_atlas.nn.norm import rms_norm
from llm_atlas.nn.positions import AlibiPositions, PositionScheme, RotaryPositions

BOTH = pytest.mark.parametrize("attend", [scaled_dot_product_attention, fused_attention])

SHAPES = {
    "no heads": ((5, 8), (7, 8), (7, 6)),
    "heads": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "heads, one key head": ((4, 5, 8), (1, 7, 8), (1, 7, 8)),
    "heads, one query head": ((1, 5, 8), (4, 7, 8), (4, 7, 8)),
    "batch and heads": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "groups": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    "groups, no batch": ((6, 5, 8), (2, 7, 8), (2, 7, 8)),
    "one group": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one token": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "one token, groups": ((2, 6, 1, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    "one token, groups, no batch": ((6, 1, 8), (2, 7, 8), (2, 7, 8)),
    "one token, one group": ((2, 4, 1, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
}
OPTIONS = ["plain", "scale", "mask", "mask of every head", "empty rows", "bias", "mask and bias"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape: str, option: str) -> tuple[tuple[torch.Tensor, ...], dict]:
    q_shape, k_shape, v_shape = SHAPES[shape]
    q, k, v = randn(*q_shape, seed=1), randn(*k_shape, seed=2), randn(*v_shape, seed=3)
    queries, keys = q.shape[-2], k.shape[-2]
    heads = max(q_shape[-3], k_shape[-3]) if q.dim() > 2 else 1
    every_head = (heads, queries, keys) if q.dim() > 2 else (queries, keys)
    every_head = (1, *every_head) if q.dim() == 4 else every_head
    mask = randn(*every_head[:-3], *([1] if q.dim() > 2 else []), queries, keys, seed=4) > -0.3
    mask[..., 0] = True
    full = randn(*every_head, seed=5) > -0.3
    full[..., 1] = True
    empty = mask.clone()
    empty[..., queries // 2, :] = False
    bias = 2 * randn(*every_head, seed=6)
    how = {
        "plain": {},
        "scale": {"scale": 0.7},
        "mask": {"mask": mask},
        "mask of every head": {"mask": full},
        "empty rows": {"mask": empty},
        "bias": {"bias": bias},
        "mask and bias": {"mask": empty, "bias": bias},
    }[option]
    return (q, k, v), how


def oracle(q, k, v, *, mask=None, bias=None, is_causal=False, scale=None):
    """torch's own attention in float64, every head written out; an empty row looks everywhere, times 0."""
    if q.dim() > 2 and q.shape[-3] > k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    shape = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
    allowed = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    if is_causal:
        allowed = allowed & torch.ones(shape[-2:], dtype=torch.bool).tril()
    sees = allowed.any(-1, keepdim=True)
    added = torch.zeros(shape, dtype=torch.float64) if bias is None else bias.double().expand(shape)
    added = added.masked_fill(~(allowed | ~sees), float("-inf"))
    q, k, v = (t.double().expand(shape[:-2] + t.shape[-2:]) for t in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale) * sees


def gradients(function, tensors, how):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **how)
    out.backward(randn(*out.shape, seed=9).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


@BOTH
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_torch(attend, shape, option):
    tensors, how = inputs(shape, option)
    out, grads = gradients(attend, tensors, how)
    expected, expected_grads = gradients(oracle, tensors, how)
    assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert torch.isfinite(grad).all()
        assert_close(grad, wanted, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", ["groups", "one token, groups", "heads"])
def test_bfloat16_is_as_good_as_its_eight_bits(attend, shape, option):
    tensors, how = inputs(shape, option)
    tensors = [t.bfloat16() for t in tensors]
    out, grads = gradients(attend, tensors, how)
    expected, expected_grads = gradients(oracle, tensors, how)
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_close(grad.double(), wanted.double(), atol=6e-2, rtol=6e-2)


@BOTH
@pytest.mark.parametrize("option", OPTIONS)
def test_is_causal_on_a_square_is_the_lower_triangle(attend, option):
    tensors, how = inputs("groups", option)
    tensors = [t[..., :5, :] for t in tensors]
    how = {name: t[..., :5] if torch.is_tensor(t) else t for name, t in how.items()} | {"is_causal": True}
    out, grads = gradients(attend, tensors, how)
    expected, expected_grads = gradients(oracle, tensors, how)
    assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    assert_close(grads, [g.float() for g in expected_grads], atol=1e-5, rtol=1e-5)


def test_a_bias_under_the_causal_mask_takes_the_fused_kernel(monkeypatch):
    (q, k, v), how = inputs("groups", "bias")
    k, v, bias = k[..., :5, :], v[..., :5, :], how["bias"][..., :5]
    wanted = scaled_dot_product_attention(q, k, v, bias=bias, is_causal=True)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", None)  # the slow path must not be needed
    assert_close(fused_attention(q, k, v, bias=bias, is_causal=True), wanted, atol=2e-6, rtol=1e-5)
    row = bias[..., :1, :]  # a bias that all queries share
    out = fused_attention(q, k, v, bias=row, is_causal=True)
    assert_close(out, fused_attention(q, k, v, bias=row.expand_as(bias), is_causal=True))


@BOTH
@pytest.mark.parametrize("keys", [4, 6])
def test_is_causal_off_the_square_is_refused(attend, keys):
    with pytest.raises(ValueError, match=f"5 queries and {keys} keys is ambiguous"):
        attend(randn(5, 8), randn(keys, 8), randn(keys, 8), is_causal=True)


@BOTH
def test_a_row_that_may_look_nowhere_gives_exact_zeros(attend):
    q = randn(2, 3, 4)
    out = attend(q, q, q, mask=torch.zeros(3, 3, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))


def test_the_readable_form_passes_gradcheck():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    bias = randn(2, 3, seed=4).double().requires_grad_()
    q, k, v = (randn(*s, seed=i).double().requires_grad_() for i, s in enumerate([(2, 4), (3, 4), (3, 2)]))
    torch.autograd.gradcheck(
        lambda q, k, v, bias: scaled_dot_product_attention(q, k, v, mask=mask, bias=bias), (q, k, v, bias)
    )


def test_weights_add_up_to_one_and_are_exactly_zero_behind_the_mask():
    (q, k, v), how = inputs("groups", "empty rows")
    weights = attention_weights(q, k, **how)
    mask = how["mask"].expand_as(weights)
    assert torch.equal(weights == 0, ~mask)
    assert_close(weights.sum(-1), mask.any(-1).float())
    assert_close(weights @ v.repeat_interleave(3, dim=1), scaled_dot_product_attention(q, k, v, **how))


def test_weights_of_bfloat16_inputs_are_computed_in_float32():
    q, k = randn(4, 64).bfloat16(), randn(6, 64, seed=1).bfloat16()
    weights = attention_weights(q, k)
    assert weights.dtype == torch.float32
    assert_close(weights, attention_weights(q.float(), k.float()))


def test_two_queries_by_hand():
    # Scores 1/sqrt(1) * [ln 3, 0]: weights 3/4 and 1/4.
    q, k, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[math.log(3)], [0.0]]), torch.tensor([[4.0], [8.0]])
    assert_close(scaled_dot_product_attention(q, k, v), torch.tensor([[5.0], [6.0]]))


# -------------------------------------------------------------------------------------- the module


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter of the module drawn anew, norm scales and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 1.0 if parameter.dim() < 2 else parameter.shape[1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module.eval()


def torch_twin(ours: MultiHeadAttention, dim: int, context_dim: int | None = None) -> nn.MultiheadAttention:
    bias = ours.q.bias is not None
    twin = nn.MultiheadAttention(
        dim, ours.heads, bias=bias, kdim=context_dim, vdim=context_dim, batch_first=True
    )
    parts = [ours.q, ours.k, ours.v]
    state = {"out_proj.weight": ours.out.weight}
    if context_dim is None:
        state["in_proj_weight"] = torch.cat([part.weight for part in parts])
    else:
        state |= {f"{name}_proj_weight": part.weight for name, part in zip("qkv", parts, strict=True)}
    if bias:
        state |= {"in_proj_bias": torch.cat([part.bias for part in parts]), "out_proj.bias": ours.out.bias}
    twin.load_state_dict(state)
    return twin.train()  # not eval: there torch takes a fast path that knows no gradients


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_torch_multihead_attention(bias, causal):
    ours = randomised(MultiHeadAttention(12, 3, bias=bias, causal=causal))
    x, y = (randn(2, 5, 12).requires_grad_() for _ in range(2))
    mask = ~causal_mask(5) if causal else None
    out, expected = ours(x), torch_twin(ours, 12)(y, y, y, attn_mask=mask, need_weights=False)[0]
    assert_close(out, expected, atol=1e-6, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_cross_attention_is_torch_multihead_attention_with_kdim_and_vdim(bias):
    ours = randomised(MultiHeadAttention(12, 3, context_dim=7, bias=bias))
    x, context = randn(2, 4, 12), randn(2, 6, 7, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]])
    mask = padding_mask(positions)
    twin = torch_twin(ours, 12, 7)
    expected = twin(x, context, context, key_padding_mask=positions < 0, need_weights=False)[0]
    assert_close(ours(x, context=context, mask=mask), expected, atol=1e-6, rtol=1e-5)
    unmasked = twin(x, context, context, need_weights=False)[0]
    assert_close(ours(x, context=context), unmasked, atol=1e-6, rtol=1e-5)
    assert (expected - unmasked)[1].abs().max() > 1e-2  # the padding mattered


def test_cross_attention_is_that_of_t5():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=12, d_kv=5, num_heads=3, dropout_rate=0.0, is_decoder=True)
    theirs = randomised(T5Attention(config, has_relative_attention_bias=False, layer_idx=0), seed=3)
    ours = MultiHeadAttention(12, 3, head_dim=5, scale=1.0)  # T5 does not scale its scores
    ours.load_state_dict({f"{n}.weight": getattr(theirs, n[0]).weight for n in ("q", "k", "v", "out")})
    x, context = randn(2, 4, 12), randn(2, 6, 12, seed=1)
    mask = padding_mask(torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]]))
    added = torch.zeros(2, 1, 4, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = theirs(x, mask=added, key_value_states=context)[0]
    assert_close(ours(x, context=context, mask=mask), expected, atol=1e-6, rtol=1e-5)


def test_cached_encoder_keys_and_values_are_not_computed_again():
    cross = randomised(MultiHeadAttention(12, 4, kv_heads=2, context_dim=7))
    x, context = randn(2, 5, 12), randn(2, 6, 7, seed=1)
    mask = padding_mask(torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]]))
    whole = cross(x, context=context, mask=mask)
    cache = KVCache(1)[0]
    calls = []
    with cross.k.register_forward_hook(lambda *_: calls.append(1)):
        steps = [cross(x[:, i : i + 1], context=context, mask=mask, cache=cache) for i in range(5)]
    assert len(calls) == 1
    assert cache.length == 6
    assert_close(torch.cat(steps, dim=1), whole, atol=1e-6, rtol=1e-5)


def test_positions_turn_no_query_of_cross_attention():
    # The encoder's keys are not turned, so a turned query would meet them at an angle that means nothing.
    plain = randomised(MultiHeadAttention(8, 2, context_dim=7))
    rotary = MultiHeadAttention(8, 2, context_dim=7, positions=RotaryPositions(4, length=16))
    rotary.load_state_dict(plain.state_dict())
    x, context = randn(1, 5, 8), randn(1, 6, 7, seed=1)
    assert torch.equal(rotary(x, context=context), plain(x, context=context))
    plain = randomised(MultiHeadAttention(8, 2))
    rotary = MultiHeadAttention(8, 2, positions=RotaryPositions(4, length=16))
    rotary.load_state_dict(plain.state_dict())
    assert not torch.allclose(rotary(x), plain(x))  # in self-attention the same scheme does turn


def test_qk_norm_holds_in_cross_attention_too():
    layer = randomised(MultiHeadAttention(8, 2, context_dim=7, qk_norm=True, causal=False))
    x, context = randn(1, 5, 8), randn(1, 6, 7, seed=1)
    q = rms_norm(layer.q(x).unflatten(-1, (2, 4)).transpose(1, 2), layer.q_norm.weight)
    k = rms_norm(layer.k(context).unflatten(-1, (2, 4)).transpose(1, 2), layer.k_norm.weight)
    v = layer.v(context).unflatten(-1, (2, 4)).transpose(1, 2)
    wanted = layer.out(((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).flatten(-2))
    assert_close(layer(x, context=context), wanted, atol=1e-5, rtol=1e-5)


def test_a_cache_of_another_context_is_refused():
    layer = MultiHeadAttention(8, 2, context_dim=7, causal=False)
    cache = KVCache(1)
    layer(randn(1, 2, 8), context=randn(1, 6, 7), cache=cache[0])
    with pytest.raises(ValueError, match="1 rows of 6 keys, the context has 1 rows of 5"):
        layer(randn(1, 2, 8), context=randn(1, 5, 7), cache=cache[0])
    with pytest.raises(ValueError, match="the context has 3 rows of 6"):
        layer(randn(3, 2, 8), context=randn(3, 6, 7), cache=cache[0])


def test_whole_numbers_are_refused():
    whole = torch.arange(4).reshape(2, 2)
    for attend in (scaled_dot_product_attention, fused_attention):
        with pytest.raises(TypeError):
            attend(whole, whole, whole)
    with pytest.raises(TypeError):
        rms_norm(whole)


@pytest.mark.parametrize("attend", [scaled_dot_product_attention, fused_attention])
def test_grouped_heads_are_repeated_heads(attend):
    grouped = randomised(MultiHeadAttention(12, 6, kv_heads=2, attend=attend))
    whole = MultiHeadAttention(12, 6)
    state = grouped.state_dict()
    for name in ("k.weight", "v.weight"):
        state[name] = state[name].unflatten(0, (2, 2)).repeat_interleave(3, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    x = randn(2, 5, 12)
    assert_close(grouped(x), whole(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_token_by_token_behind_a_cache_is_the_whole(kv_heads):
    mixer = randomised(
        MultiHeadAttention(12, 6, kv_heads=kv_heads, head_dim=4, positions=RotaryPositions(4, length=9))
    )
    x = randn(2, 9, 12)
    whole = mixer(x)
    for chunks in ([1] * 9, [4, 1, 3, 1], [2, 7]):
        cache, out = KVCache(1), []
        for part in x.split(chunks, dim=1):
            cache.place(part.shape[1])
            out.append(mixer(part, cache=cache[0], positions=cache.positions[:, -part.shape[1] :]))
        assert_close(torch.cat(out, dim=1), whole, atol=1e-6, rtol=1e-5)


def test_qk_norm_comes_before_the_rotation():
    rotary = RotaryPositions(4, length=8)
    mixer = randomised(MultiHeadAttention(8, 2, qk_norm=True, positions=rotary, norm_eps=1e-6))
    x, positions = randn(1, 6, 8), torch.arange(6)[None]
    q, k = split_heads(mixer.q(x), 2), split_heads(mixer.k(x), 2)
    v = split_heads(mixer.v(x), 2)
    scales = mixer.q_norm.weight, mixer.k_norm.weight

    def out(q, k):
        return mixer.out(merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))

    before = [rotary.rotate(rms_norm(t, w), positions) for t, w in zip((q, k), scales, strict=True)]
    after = [rms_norm(rotary.rotate(t, positions), w) for t, w in zip((q, k), scales, strict=True)]
    assert_close(mixer(x), out(*before), atol=1e-6, rtol=1e-5)
    assert (mixer(x) - out(*after)).abs().max() > 1e-2


def test_the_scale_multiplies_the_logits_and_not_what_a_scheme_adds():
    mixer = randomised(MultiHeadAttention(8, 2, positions=Slopes(), scale=0.3))
    x, at = randn(1, 5, 8), torch.arange(5)[None]
    q, k, v = (split_heads(part(x), 2) for part in (mixer.q, mixer.k, mixer.v))
    weights = (0.3 * q @ k.transpose(-2, -1) + Slopes().bias(q, at, at)).masked_fill(
        ~causal_mask(5), -math.inf
    )
    assert_close(mixer(x), mixer.out(merge_heads(weights.softmax(-1) @ v)), atol=1e-6, rtol=1e-5)


def test_split_and_merge_are_inverse_and_cut_features_before_moving_axes():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    heads = split_heads(x, 2)
    assert heads.shape == (2, 2, 3, 4)
    assert torch.equal(heads[1, 1, 2], x[1, 2, 4:])
    assert torch.equal(merge_heads(heads), x)


def test_attend_passes_everything_on():
    seen = {}

    def spy(q, k, v, **how):
        seen.update(how)
        return v

    Attend(spy)(randn(2, 4), randn(2, 4), randn(2, 4), mask=None, bias=randn(2, 2), is_causal=True, scale=3.0)
    assert (seen["is_causal"], seen["scale"], seen["bias"].shape) == (True, 3.0, (2, 2))


class Slopes(PositionScheme):
    """A bias that falls with the distance, as ALiBi's."""

    def bias(self, q, query_positions, key_positions):
        distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
        return -torch.tensor([0.5, 0.25])[:, None, None] * distance.float()


def test_a_scheme_that_biases_the_scores_works_with_and_without_a_cache():
    mixer = randomised(MultiHeadAttention(8, 2, positions=Slopes()))
    x, at = randn(1, 5, 8), torch.arange(5)[None]
    q, k, v = (split_heads(part(x), 2) for part in (mixer.q, mixer.k, mixer.v))
    bias = Slopes().bias(q, at, at)
    whole = mixer(x)
    assert_close(
        whole,
        mixer.out(merge_heads(oracle(q, k, v, bias=bias, is_causal=True).float())),
        atol=1e-6,
        rtol=1e-5,
    )
    cache, steps = KVCache(1), []
    for i in range(5):
        cache.place(1)
        steps.append(mixer(x[:, i : i + 1], positions=at[:, i : i + 1], cache=cache[0]))
    assert_close(torch.cat(steps, dim=1), whole, atol=1e-6, rtol=1e-5)


def test_a_scheme_that_biases_the_scores_works_behind_a_cache_that_no_model_places():
    mixer = randomised(MultiHeadAttention(8, 2, positions=Slopes()))
    x, cache = randn(1, 5, 8), KVCache(1)
    steps = [mixer(part, cache=cache[0]) for part in x.split([3, 1, 1], dim=1)]
    assert_close(torch.cat(steps, dim=1), mixer(x), atol=1e-6, rtol=1e-5)


# -------------------------------------------------------------------------------------- within a window


def near_and_full(window: int, seed: int = 0, **how) -> tuple[MultiHeadAttention, MultiHeadAttention]:
    """A layer with a window and the same one without."""
    how = {"kv_heads": 2, "positions": RotaryPositions(4, length=199)} | how
    full = randomised(MultiHeadAttention(16, 4, **how), seed)
    near = MultiHeadAttention(16, 4, window=window, **how).eval()
    near.load_state_dict(full.state_dict())
    return near, full


@pytest.mark.parametrize("positions", [RotaryPositions(4, length=199), AlibiPositions(4), PositionScheme()])
@pytest.mark.parametrize("window", [1, 3, 20, 70, 71])
@pytest.mark.parametrize("attend", [scaled_dot_product_attention, fused_attention])
def test_a_window_is_a_band_mask(attend, window, positions):
    kv_heads = 4 if isinstance(positions, AlibiPositions) else 2
    near, full = near_and_full(window, positions=positions, kv_heads=kv_heads, attend=attend)
    x = randn(2, 70, 16)
    wanted = full(x, mask=sliding_window_mask(70, window=window)[None, None])
    for at in (None, torch.arange(70)[None], torch.arange(70).expand(2, -1)):
        assert_close(near(x, positions=at), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rolls", [None, 5, 8])
@pytest.mark.parametrize("chunks", [[1] * 30, [12, *[1] * 18], [2, 9, 1, 18]])
@pytest.mark.parametrize("padding", [0, 4])
def test_behind_any_cache_a_window_is_that_of_the_whole(chunks, padding, rolls):
    near, full = near_and_full(5, positions=AlibiPositions(4), kv_heads=4)
    x = randn(2, 30, 16)
    at = torch.stack([torch.arange(30), (torch.arange(30) - padding).clamp(min=-1)])
    wanted = full(x, positions=at, mask=visible(at, at, window=5))
    kind = LayerCache if rolls is None else partial(RollingLayerCache, window=rolls)
    cache, out = KVCache(1, layer=kind), []
    for part, new in zip(x.split(chunks, dim=1), at.split(chunks, dim=1), strict=True):
        placed = cache.place(part.shape[1], new if padding else None)
        out.append(near(part, positions=placed, cache=cache[0]))
    assert_close(torch.cat(out, dim=1), wanted, atol=2e-6, rtol=1e-5)
    if rolls is not None:
        assert cache[0].read()[0].shape[2] == rolls


class Late(PositionScheme):
    """A bias that is not the same for all pairs of one distance: keys late in the text count more."""

    def bias(self, q, query_positions, key_positions):
        return 0.01 * (key_positions.float() ** 2)[:, None, None].expand(-1, q.shape[1], q.shape[2], -1)


@pytest.mark.parametrize("rolls", [False, True])
def test_a_bias_within_a_window_is_given_the_places_in_the_text(rolls):
    near, full = near_and_full(4, positions=Late())
    x, cache = (
        randn(2, 20, 16),
        KVCache(1, layer=partial(RollingLayerCache, window=4) if rolls else LayerCache),
    )
    wanted = full(x, mask=sliding_window_mask(20, window=4)[None, None])
    out = [
        near(part, positions=cache.place(part.shape[1]), cache=cache[0])
        for part in x.split([9, 1, 10], dim=1)
    ]
    assert_close(torch.cat(out, dim=1), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rolls", [False, True])
def test_behind_a_cache_that_no_model_places_a_window_is_that_of_the_whole(rolls):
    near, full = near_and_full(4)
    x = randn(2, 20, 16)
    cache = KVCache(1, layer=partial(RollingLayerCache, window=4) if rolls else LayerCache)
    out = [near(part, cache=cache[0]) for part in x.split([7, 1, 3, *[1] * 9], dim=1)]
    wanted = full(x, mask=sliding_window_mask(20, window=4)[None, None])
    assert_close(torch.cat(out, dim=1), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4, 6])
@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("chunks", [[1] * 30, [12, *[1] * 18], [2, 9, 1, 18]])
def test_a_rolling_cache_brings_its_window_and_its_sinks(chunks, sinks, window):
    """As in StreamingLLM, under a model that was not made for it (window None) or was."""
    near, full = near_and_full(window)
    x, at = randn(2, 30, 16), torch.arange(30)[None]
    mask = visible(at, at, window=window or 6) | visible(at, at) & (at < sinks)
    wanted = full(x, mask=mask)
    cache, out = KVCache(1, layer=partial(RollingLayerCache, window=6, sinks=sinks)), []
    for part in x.split(chunks, dim=1):
        out.append(near(part, positions=cache.place(part.shape[1]), cache=cache[0]))
    assert_close(torch.cat(out, dim=1), wanted, atol=2e-6, rtol=1e-5)


def test_forks_of_a_rolling_cache_go_on_alone():
    near, full = near_and_full(3)
    x, y = randn(1, 12, 16), randn(1, 12, 16, seed=1)
    cache = KVCache(1, layer=partial(RollingLayerCache, window=3))
    near(x[:, :8], positions=cache.place(8), cache=cache[0])
    twin = cache.fork()
    mask = sliding_window_mask(12, window=3)[None, None]
    for kept, end in ((twin, y), (cache, x)):
        whole = torch.cat([x[:, :8], end[:, 8:]], dim=1)
        out = [near(whole[:, i : i + 1], positions=kept.place(1), cache=kept[0]) for i in range(8, 12)]
        assert_close(torch.cat(out, dim=1), full(whole, mask=mask)[:, 8:], atol=2e-6, rtol=1e-5)


def test_one_token_behind_a_plain_cache_meets_no_more_keys_than_the_window():
    seen = []

    def spy(q, k, v, **how):
        seen.append((k.shape[-2], how["mask"]))
        return fused_attention(q, k, v, **how)

    near, _ = near_and_full(5, attend=spy)
    x, cache = randn(1, 40, 16), KVCache(1)
    for part in x.split([20, *[1] * 20], dim=1):
        near(part, positions=cache.place(part.shape[1]), cache=cache[0])
    assert seen[1:] == [(5, None)] * 20


def test_a_given_mask_says_who_may_look_and_the_window_takes_away():
    near, full = near_and_full(4)
    x = randn(2, 14, 16)
    # Two texts in one row, each counted from 0, and three first tokens that all may look at.
    at = torch.cat([torch.arange(6), torch.arange(8)])[None]
    text = torch.tensor([0] * 6 + [1] * 8)
    mask = ((text[:, None] == text) & causal_mask(14) | (torch.arange(14) < 3))[None, None]
    far = at[:, :, None] - at[:, None, :] >= 4
    wanted = full(x, positions=at, mask=mask & ~far[:, None])
    assert_close(near(x, positions=at, mask=mask), wanted, atol=2e-6, rtol=1e-5)
    assert (wanted - full(x, positions=at, mask=mask)).abs().max() > 1e-2


def test_gradients_within_a_window_are_those_under_a_mask():
    near, full = near_and_full(6)
    x, y = (randn(2, 150, 16).requires_grad_() for _ in range(2))
    near(x).square().sum().backward()
    full(y, mask=sliding_window_mask(150, window=6)[None, None]).square().sum().backward()
    assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    for mine, wanted in zip(near.parameters(), full.parameters(), strict=True):
        assert_close(mine.grad, wanted.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rolls", [None, False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_window_is_that_of_mistral(padding, rolls):
    """Every layer of a tiny Mistral against ours on the same inputs, whole or with its own sliding cache."""
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=20, sliding_window=6, max_position_embeddings=99, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomised(MistralModel(config), seed=5)
    ids = torch.randint(17, (2, 80), generator=torch.Generator().manual_seed(0))
    at = torch.stack([torch.arange(80), (torch.arange(80) - padding).clamp(min=-1)])
    seen = {}
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _, args, how, out, i=i: seen.setdefault(i, []).append((how["hidden_states"], out[0])),
            with_kwargs=True,
        )
        for i, layer in enumerate(theirs.layers)
    ]
    chunks = [80] if rolls is None else [60, *[1] * 20]
    past, end = None, 0
    with torch.no_grad():
        for new in chunks:
            end += new
            out = theirs(
                ids[:, end - new : end],
                attention_mask=(at[:, :end] >= 0).long(),
                position_ids=at[:, end - new : end].clamp(min=0),
                past_key_values=past,
                use_cache=rolls is not None,
            )
            past = out.past_key_values
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(theirs.layers):
        ours = MultiHeadAttention(
            16, 4, kv_heads=2, window=6, positions=RotaryPositions(4, length=99, base=10000.0)
        )
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
        state = layer.self_attn.state_dict()
        ours.load_state_dict({f"{mine}.weight": state[f"{name}.weight"] for mine, name in names.items()})
        cache = KVCache(1, layer=partial(RollingLayerCache, window=6) if rolls else LayerCache)
        end = 0
        for x, wanted in seen[i]:
            end += x.shape[1]
            placed = at[:, end - x.shape[1] : end]
            if rolls is not None:
                placed = cache.place(x.shape[1], placed if padding else None)
            out = ours(x, positions=placed, cache=None if rolls is None else cache[0])
            real = at[:, end - x.shape[1] : end] >= 0
            assert_close(out[real], wanted[real], atol=2e-6, rtol=1e-5)
    assert len(seen[0]) == len(chunks)


def test_windows_that_cannot_be_are_refused():
    for window in (0, -2):
        with pytest.raises(ValueError, match=f"window {window} must be at least 1"):
            MultiHeadAttention(8, 2, window=window)
    with pytest.raises(
        ValueError, match="window 4 is one of causal self-attention, this is attention that is not"
    ):
        MultiHeadAttention(8, 2, window=4, causal=False)
    with pytest.raises(ValueError, match="window 4 is one of causal self-attention, this is cross-attention"):
        MultiHeadAttention(8, 2, window=4, context_dim=7)
    with pytest.raises(ValueError, match="window 4 is one of causal self-attention, this is cross-attention"):
        MultiHeadAttention(8, 2, window=4)(randn(1, 2, 8), context=randn(1, 3, 8))


def test_rolling_caches_that_do_not_fit_are_refused():
    cache = KVCache(1, layer=partial(RollingLayerCache, window=3))[0]
    x = randn(1, 2, 8)
    with pytest.raises(ValueError, match="keeps a window of 3, this layer looks back 4"):
        MultiHeadAttention(8, 2, window=4)(x, cache=cache)
    with pytest.raises(ValueError, match="a rolling cache is for causal attention"):
        MultiHeadAttention(8, 2, causal=False)(x, cache=cache)
    with pytest.raises(ValueError, match="window 3 is one of causal self-attention, this is cross-attention"):
        MultiHeadAttention(8, 2)(x, context=x, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_groups_are_those_of_torch(kv_heads, queries):
    """Forward and gradients, of all queries and of a few new ones behind others."""
    rng = torch.Generator().manual_seed(kv_heads)
    q = torch.randn(2, 8, queries, 6, generator=rng, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 7, 6, generator=rng, requires_grad=True) for _ in range(2))
    mask = causal_mask(queries, 7)
    grad = torch.randn(2, 8, queries, 6, generator=rng)
    theirs = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    wanted = [theirs, *torch.autograd.grad(theirs, (q, k, v), grad)]
    for attend in (scaled_dot_product_attention, fused_attention):
        ours = attend(q, k, v, mask=mask[None, None])
        for a, b in zip([ours, *torch.autograd.grad(ours, (q, k, v), grad)], wanted, strict=True):
            assert_close(a, b, atol=1e-5, rtol=1e-5)
