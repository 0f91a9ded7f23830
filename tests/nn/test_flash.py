"""FlashAttention's readable forms against attention that stores its scores, and against torch's own in float64."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_atlas.core.seeds import generator
from llm_atlas.nn.attention import MultiHeadAttention, scaled_dot_product_attention
from llm_atlas.nn.flash import flash_attention, flash_attention_2, online_softmax
from llm_atlas.nn.masks import visible

BOTH = pytest.mark.parametrize("attend", [flash_attention, flash_attention_2])

SHAPES = {
    "no heads": ((5, 8), (7, 8), (7, 6)),
    "heads": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "one key head": ((4, 5, 8), (1, 7, 8), (1, 7, 8)),
    "one query head": ((1, 5, 8), (4, 7, 8), (4, 7, 8)),
    "batch and heads": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "groups": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    "groups, no batch": ((6, 5, 8), (2, 7, 8), (2, 7, 8)),
    "one batch of keys": ((3, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)),
    "more axes": ((2, 1, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)),
    "one token, groups": ((2, 6, 1, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
}
OPTIONS = ["plain", "scale", "mask", "mask of every head", "empty rows", "bias", "one bias for all queries"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def inputs(shape, option):
    q, k, v = (randn(*s, seed=i) for i, s in enumerate(SHAPES[shape]))
    queries, keys = q.shape[-2], k.shape[-2]
    heads = (max(q.shape[-3], k.shape[-3]),) if q.dim() > 2 else ()
    full = randn(*heads, queries, keys, seed=5) > -0.3
    full[..., 1] = True
    empty = full[:1].clone() if heads else full.clone()
    empty[..., queries // 2, :] = False
    how = {
        "plain": {},
        "scale": {"scale": -0.7},
        "mask": {"mask": full[0] if heads else full},
        "mask of every head": {"mask": full},
        "empty rows": {"mask": empty},
        "bias": {"bias": 2 * randn(*heads, queries, keys, seed=6), "mask": empty},
        "one bias for all queries": {"bias": 2 * randn(1, keys, seed=6)},
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
    added = added.masked_fill(~(allowed | ~sees), -math.inf)
    q, k, v = (t.double().expand(shape[:-2] + t.shape[-2:]) for t in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale) * sees


def gradients(function, tensors, bias=None, **how):
    """Output, and gradients of q, k, v and the bias where there is one."""
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *(() if bias is None else (bias,)))]
    out = function(*leaves[:3], **how, **({} if bias is None else {"bias": leaves[3]}))
    return out.detach(), torch.autograd.grad(out, leaves, randn(*out.shape, seed=9, dtype=out.dtype))


def agree(ours, theirs, tolerance=1e-5):
    """Relative to the largest number of each tensor: a gradient that is exactly 0 has no digits of its own."""
    for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert torch.isfinite(a).all()
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp_min(1e-30)


@BOTH
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_torch(attend, shape, option):
    tensors, how = inputs(shape, option)
    theirs = gradients(oracle, tensors, **how)
    agree(gradients(partial(attend, block_q=2, block_k=3), tensors, **how), theirs)
    agree(gradients(attend, tensors, **how), theirs)  # one tile


@BOTH
@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("length", "block_q", "block_k"), [(1, 4, 4), (13, 4, 4), (13, 4, 5), (13, 5, 1), (16, 4, 8), (17, 64, 2)]
)
def test_causal_and_window(attend, length, block_q, block_k, is_causal, window):
    tensors = [randn(2, h, length, 8, seed=i) for i, h in enumerate((4, 2, 2))]
    at = torch.arange(length)
    mask = visible(at[None], at[None], window=window) if is_causal else torch.ones(1, 1, length, length) > 0
    if window is not None and not is_causal:
        mask = ((at - at[:, None]).abs() < window)[None, None]
    tiled = partial(attend, is_causal=is_causal, window=window, block_q=block_q, block_k=block_k)
    ours = gradients(tiled, tensors)
    agree(ours, gradients(scaled_dot_product_attention, tensors, mask=mask))
    agree(ours, gradients(oracle, tensors, mask=mask))


@BOTH
def test_is_causal_and_a_mask_of_padding(attend):
    tensors = [randn(2, 2, 9, 8, seed=i) for i in range(3)]
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :4] = False  # on the left: the first queries of that row see nothing
    tiled = partial(attend, is_causal=True, block_q=2, block_k=3)
    out, grads = gradients(tiled, tensors, mask=mask)
    agree((out, grads), gradients(scaled_dot_product_attention, tensors, is_causal=True, mask=mask))
    assert not out[0, :, :4].any()
    assert not grads[0][0, :, :4].any()


@BOTH
@given(
    queries=st.integers(1, 9), keys=st.integers(1, 9), block_q=st.integers(1, 10), block_k=st.integers(1, 10)
)
def test_tiles_of_any_size_change_nothing(attend, queries, keys, block_q, block_k):
    q, k, v = randn(queries, 4), randn(keys, 4, seed=1), randn(keys, 4, seed=2)
    ours = attend(q, k, v, block_q=block_q, block_k=block_k)
    assert_close(ours, scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"is_causal": True, "window": 2}])
def test_gradcheck(attend, how):
    tensors = [randn(h, 5, 3, seed=i, dtype=torch.float64).requires_grad_() for i, h in enumerate((4, 2, 2))]
    bias = randn(4, 5, 5, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: attend(q, k, v, bias=b, block_q=2, block_k=3, **how), (*tensors, bias)
    )


@BOTH
def test_large_scores_do_not_overflow(attend):
    q, k, v = (randn(7, 8, seed=i) * s for i, s in enumerate((300.0, 300.0, 1.0)))
    assert (q @ k.T).abs().max() > 1e5  # exp of it would be infinite
    ours = attend(q, k, v, block_q=2, block_k=2)
    assert_close(ours, scaled_dot_product_attention(q, k, v))
    shifted = attend(q, k, v, bias=torch.full((1, 1), -1e4), block_q=2, block_k=2)
    assert_close(shifted, ours, rtol=1e-3, atol=1e-3)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(attend, dtype):
    tensors = [randn(2, h, 40, 16, seed=i).to(dtype) for i, h in enumerate((4, 2, 2))]
    tiled = partial(attend, is_causal=True, block_q=16, block_k=16)
    out, grads = gradients(tiled, tensors)
    exact, exact_grads = gradients(partial(attend, is_causal=True), [t.float() for t in tensors])
    assert {t.dtype for t in (out, *grads)} == {dtype}
    # Half a unit of the last place: only the result is rounded.
    assert ((out.float() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    for ours, theirs in zip(grads, exact_grads, strict=True):
        assert (ours.float() - theirs).abs().max() < 8 * torch.finfo(dtype).eps * theirs.abs().max()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def largest(attend, length, how):
    leaves = [randn(2, length, 8, seed=i).requires_grad_() for i in range(3)]
    with Largest() as seen:
        out = attend(*leaves, **how)
        out.backward(torch.ones_like(out))
    return seen.numbers


@pytest.mark.parametrize("how", [{}, {"is_causal": True}])
@pytest.mark.parametrize("length", [128, 256, 512])
def test_no_tensor_has_a_number_for_every_pair(length, how):
    for attend in (flash_attention, flash_attention_2):
        assert largest(partial(attend, block_q=16, block_k=16), length, how) == 2 * length * 8
    assert largest(scaled_dot_product_attention, length, how) == 2 * length * length


@BOTH
def test_what_is_kept_for_the_backward_pass_grows_with_length_not_its_square(attend):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend(*(randn(2, 64, 8, seed=i).requires_grad_() for i in range(3)))
    assert sum(kept) == 4 * 2 * 64 * 8 + 2 * 64  # q, k, v, out, and one number a row


def test_the_second_version_does_not_compute_hidden_tiles(monkeypatch):
    import llm_atlas.nn.flash as module

    tiles = []
    scores = module._scores
    monkeypatch.setattr(module, "_scores", lambda *args: tiles.append(args[-2:]) or scores(*args))
    q = randn(40, 4).requires_grad_()
    counts = {}
    kinds = {"all": {}, "causal": {"is_causal": True}, "window": {"is_causal": True, "window": 6}}
    for name, how in kinds.items():
        for attend in (flash_attention, flash_attention_2):
            tiles.clear()
            out = attend(q, q, q, block_q=5, block_k=5, **how)
            forward = len(tiles)
            out.sum().backward()
            counts[name, attend.__name__[15:]] = forward, len(tiles) - forward
    # 8 x 8 tiles; 36 on and under the diagonal; of a window of 6 the diagonal and the tile before it.
    assert counts == {
        ("all", ""): (64, 64), ("all", "_2"): (64, 64), ("causal", ""): (64, 36), ("causal", "_2"): (36, 36),
        ("window", ""): (64, 15), ("window", "_2"): (15, 15),
    }  # fmt: skip


@BOTH
def test_nothing_to_look_at_gives_zeros(attend):
    q, k = randn(3, 4).requires_grad_(), randn(0, 4)
    out = attend(q, k, k)
    assert torch.equal(out, torch.zeros(3, 4))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros(3, 4))
    assert attend(k, randn(3, 4), randn(3, 4)).shape == (0, 4)


@BOTH
def test_it_stands_in_for_attention_in_a_layer(attend):
    x = randn(2, 11, 16)
    layers = []
    for function in (attend, scaled_dot_product_attention):
        layer = MultiHeadAttention(16, 4, kv_heads=2, attend=function)
        with torch.no_grad():
            for i, weight in enumerate(layer.parameters()):
                weight.copy_(randn(*weight.shape, seed=i) / 4)
        layers.append(layer)
    agree(*((layer(x), torch.autograd.grad(layer(x).sum(), layer.parameters())) for layer in layers))


@given(n=st.integers(1, 12), block=st.integers(1, 13), seed=st.integers(0, 99))
def test_online_softmax(n, block, seed):
    x = 50 * randn(2, n, seed=seed)
    assert_close(online_softmax(x, block=block), x.softmax(-1))


def test_online_softmax_of_rows_that_look_nowhere_or_far_out():
    x = torch.tensor([[-math.inf] * 3, [-math.inf, 1e30, -1e30], [0.0, math.log(3), -math.inf]])
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.25, 0.75, 0.0]])
    assert_close(online_softmax(x), wanted)
    assert online_softmax(x.bfloat16(), block=2).dtype == torch.bfloat16
    assert online_softmax(torch.empty(2, 0)).shape == (2, 0)


@BOTH
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"block_q": 0}, "block_q 0 must be at least 1"),
        ({"block_k": -3}, "block_k -3 must be at least 1"),
        ({"window": 0}, "window 0 must be at least 1"),
    ],
)
def test_bad_numbers(attend, how, says):
    with pytest.raises(ValueError, match=says):
        attend(*(randn(4, 8) for _ in range(3)), **how)


@BOTH
@pytest.mark.untyped
def test_bad_shapes(attend):
    q, k = randn(4, 8), randn(5, 8)
    with pytest.raises(ValueError, match="window with 4 queries and 5 keys is ambiguous: pass it as a mask"):
        attend(q, k, k, window=2)
    with pytest.raises(ValueError, match="is_causal with 4 queries and 5 keys is ambiguous"):
        attend(q, k, k, is_causal=True)
    with pytest.raises(ValueError, match="there are 5 keys and 4 values"):
        attend(q, k, q)
    x = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attend(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
