"""FlashAttention's Triton form against the readable one and torch's own: interpreted on a CPU, compiled on a GPU."""

import math

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn import flash
from llm_atlas.nn.attention import MultiHeadAttention, scaled_dot_product_attention

triton = pytest.importorskip("triton")

from llm_atlas.nn.kernels import flash as kernels  # noqa: E402
from llm_atlas.nn.kernels.flash import flash_attention  # noqa: E402

DEVICE = pick_device() if torch.cuda.is_available() else torch.device("cpu")
CAUSAL = {"is_causal": True}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)


def three(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype=torch.float32):
    return (
        draw(batch, heads, queries, dim, dtype=dtype),
        draw(batch, kv_heads, keys, dim, seed=1, dtype=dtype),
        draw(batch, kv_heads, keys, value_dim, seed=2, dtype=dtype),
    )


def gradients(function, tensors, **how):
    """The output, and the gradients of a random linear function of it."""
    leaves = [t.detach().requires_grad_() for t in tensors]  # strides stay as they are
    out = function(*leaves, **how)
    ahead = draw(*out.shape, seed=9).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, ahead)


def agree(tensors, theirs=flash.flash_attention_2, tolerance=1e-5, **how):
    ours = gradients(flash_attention, tensors, **how)
    for name, a, b in zip("oqkv", ours, gradients(theirs, tensors, **how), strict=True):
        assert a.shape == b.shape
        assert a.dtype == tensors[0].dtype
        far = (a.double() - b.double()).abs().max() if a.numel() else 0.0
        assert far <= tolerance * max(1.0, b.double().abs().max().item() if b.numel() else 0.0), name


# batch, heads, key heads, queries, keys, features of queries and keys, features of values
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ((1, 1, 1, 1, 1, 16, 16), CAUSAL),
        ((1, 1, 1, 17, 17, 16, 16), {}),
        ((2, 2, 2, 33, 33, 16, 16), CAUSAL),
        ((1, 1, 1, 65, 65, 64, 64), CAUSAL),
        ((1, 4, 2, 33, 33, 32, 32), CAUSAL),
        ((1, 4, 1, 33, 33, 16, 16), {}),
        ((1, 4, 1, 65, 65, 16, 16), CAUSAL | {"window": 20}),
        ((1, 2, 1, 33, 33, 40, 24), CAUSAL),
        ((1, 1, 1, 17, 17, 3, 5), {}),
        ((2, 2, 1, 17, 50, 16, 32), {}),
        ((1, 2, 2, 1, 40, 16, 16), {}),
        ((1, 1, 1, 70, 1, 16, 16), {}),
        ((1, 1, 1, 65, 65, 16, 16), CAUSAL | {"window": 1}),
        ((1, 1, 1, 65, 65, 16, 16), CAUSAL | {"window": 7}),
        ((1, 1, 1, 97, 97, 16, 16), CAUSAL | {"window": 64}),
        ((1, 1, 1, 33, 33, 16, 16), CAUSAL | {"window": 1000}),
        ((1, 1, 1, 65, 65, 16, 16), {"window": 1}),
        ((1, 2, 1, 65, 65, 16, 16), {"window": 18}),
        ((1, 1, 1, 130, 130, 16, 16), {"window": 60}),
        ((1, 1, 1, 33, 33, 16, 16), CAUSAL | {"scale": 0.7}),
        ((1, 1, 1, 33, 33, 16, 16), CAUSAL | {"scale": -0.7}),
        ((1, 1, 1, 33, 33, 16, 16), {"scale": 0.0}),
        ((1, 1, 1, 3, 0, 16, 16), {}),
        ((1, 1, 1, 0, 3, 16, 16), {}),
        ((0, 2, 1, 3, 3, 16, 16), CAUSAL),
    ],
)  # fmt: skip
def test_it_is_the_readable_form(sizes, how):
    agree(three(*sizes), **how)


@pytest.mark.parametrize("length", [1, 17, 33, 65])
def test_it_is_torchs_own_attention(length):
    agree(three(1, 2, 2, length, length, 16, 16), functional.scaled_dot_product_attention, is_causal=True)
    agree(three(1, 2, 2, length, length, 16, 16), scaled_dot_product_attention)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((20, 16), (23, 16)),
        ((2, 20, 16), (1, 23, 16)),
        ((1, 20, 16), (2, 23, 16)),
        ((2, 1, 2, 20, 16), (2, 3, 1, 23, 16)),
    ],
)
def test_any_leading_axes(q, k):
    agree((draw(*q), draw(*k, seed=1), draw(*k, seed=2)))


def test_what_lies_in_another_order_is_read_where_it_lies():
    qkv = draw(2, 17, 2, 48)  # batch, tokens, heads, and features of the three one after the other
    q, k, v = (t.transpose(1, 2) for t in qkv.split(16, -1))
    assert not q.is_contiguous()
    agree((q, k[:, ::2], v[:, ::2]), is_causal=True)
    for axis in (1, 2):
        agree((q.movedim(-1, axis).contiguous().movedim(axis, -1), k, v), is_causal=True)
    assert kernels._features_together(q) is q
    agree((q, k[:, :1].expand(-1, 2, -1, -1), v), is_causal=True)


# Rows of a tile beyond the last key may overflow: they are not stored. NumPy says so, in the interpreter.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_large_scores_do_not_overflow():
    q, k, v = three(1, 1, 1, 20, 20, 16, 16)
    assert (
        q @ k.mT
    ).max() * 100 * 100 / 4 > 1e4  # whose exp is infinite, and of whose digits few are left for it
    agree((100 * q, 100 * k, v), is_causal=True, tolerance=1e-2)
    far = torch.full_like(q, -30.0)
    agree(
        (far, -far, v), tolerance=1e-3
    )  # no key is near: a padding key, whose score is 0, would outweigh all


def test_the_gradient_of_what_is_not_random():
    """A sum's gradient has strides of 0."""
    leaves = [t.requires_grad_() for t in three(1, 2, 1, 17, 17, 16, 16)]
    ours = torch.autograd.grad(flash_attention(*leaves, is_causal=True).sum(), leaves)
    theirs = torch.autograd.grad(scaled_dot_product_attention(*leaves, is_causal=True).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_it_stands_in_for_attention_in_a_layer():
    layer = MultiHeadAttention(32, 2, kv_heads=1, attend=flash_attention).to(DEVICE)
    x = draw(1, 19, 32)
    out = layer(x)
    layer.attend.function = scaled_dot_product_attention
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-6)
    q = draw(2, 3, 17, 16)
    assert flash_attention(q, q, q).transpose(1, 2).is_contiguous()  # so merge_heads copies nothing


def test_each_list_of_tiles_is_one_a_gpu_takes():
    for name, table in kernels.TILES.items():
        assert {dim for _, dim in table} == {64, 128, 256}
        for size, dim in table:
            for tile, options in kernels.tilings(name, size, dim):
                assert all(side >= 16 and side & (side - 1) == 0 for side in tile.values())
                assert options["num_warps"] in (4, 8)
    assert kernels.tilings("keys", 2, 64)[0][0] == {"BLOCK_K": 128, "BLOCK_Q": 64}
    assert kernels.tilings("queries", 2, 64)[0][0] == {"BLOCK_Q": 128, "BLOCK_K": 64}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda q: flash_attention(q, q, q, mask=torch.ones(4, 4) > 0), ValueError, "takes no mask: use nn.flash"),
        (lambda q: flash_attention(q, q, q, bias=torch.ones(4, 4)), ValueError, "takes no bias"),
        (lambda q: flash_attention(q, q, q, window=0), ValueError, "window 0 must be at least 1"),
        (lambda q: flash_attention(q, q[:3], q[:3], window=2), ValueError, "4 queries and 3 keys is ambiguous"),
        (lambda q: flash_attention(q, q[:3], q[:3], is_causal=True), ValueError, "4 queries and 3 keys"),
        (lambda q: flash_attention(q, q[:3], q), ValueError, "3 keys and 4 values"),
        (lambda q: flash_attention(*[q.double()] * 3), TypeError, "got torch.float64"),
        (lambda q: flash_attention(*[draw(4, 257)] * 3), ValueError, "heads of 257 features are over 256"),
    ],
)  # fmt: skip
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(draw(4, 16))


def test_there_is_no_second_derivative():
    x = draw(3, 16).requires_grad_()
    (grad,) = torch.autograd.grad(flash_attention(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def one_tile(monkeypatch):
    """Only the first of each list: what is tried must be compiled, and that takes seconds."""
    tried = kernels.tilings
    monkeypatch.setattr(kernels, "tilings", lambda *which: tried(*which)[:1])
    kernels._tuned.cache_clear()
    yield
    kernels._tuned.cache_clear()


def exact(q, k, v, *, is_causal=False, window=None, scale=None):
    """torch's own attention in float64, of what is now rounded to the dtype."""
    dtype, length = q.dtype, q.shape[-2]
    mask = None
    if window is not None:
        ahead = torch.arange(length, device=q.device) - torch.arange(length, device=q.device)[:, None]
        mask = (ahead <= 0) & (ahead > -window) if is_causal else ahead.abs() < window
    with sdpa_kernel(SDPBackend.MATH):
        out = functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=mask, is_causal=is_causal and mask is None,
            scale=scale, enable_gqa=q.shape[-3] != k.shape[-3],
        )  # fmt: skip
    return out.to(dtype)


TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.gpu
@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_causal", [True, False])
def test_lengths_on_a_gpu(is_causal, dtype, dim):
    for length in (1, 2, 63, 64, 65, 127, 128, 129, 1000, 2048, 4097):
        heads = 1 if length > 2000 else 4
        tensors = three(1, heads, max(1, heads // 2), length, length, dim, dim, dtype)
        agree(tensors, exact, TOLERANCE[dtype], is_causal=is_causal)


@pytest.mark.gpu
@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [16, 40, 80, 256])
def test_head_dimensions_on_a_gpu(dim, dtype):
    agree(three(2, 4, 1, 333, 333, dim, dim, dtype), exact, TOLERANCE[dtype], is_causal=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_causal", [True, False])
def test_windows_on_a_gpu(is_causal, dtype):
    for length, window in ((65, 1), (300, 17), (1000, 128), (1000, 129), (2049, 500), (300, 1000)):
        agree(
            three(1, 4, 2, length, length, 64, 64, dtype),
            exact,
            TOLERANCE[dtype],
            is_causal=is_causal,
            window=window,
        )


@pytest.mark.gpu
@pytest.mark.usefixtures("one_tile")
def test_strides_and_lengths_that_differ_on_a_gpu():
    qkv = draw(2, 500, 4, 192, dtype=torch.bfloat16)
    q, k, v = (t.transpose(1, 2) for t in qkv.split(64, -1))
    agree((q, k[:, ::2], v[:, ::2]), exact, TOLERANCE[torch.bfloat16], is_causal=True)
    agree((q[:, :, :77], k, v), exact, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_tuning_tries_all_tiles_and_keeps_one():
    kernels._tuned.cache_clear()
    agree(three(1, 4, 2, 500, 500, 64, 64, torch.bfloat16), exact, TOLERANCE[torch.bfloat16], is_causal=True)
    for name in kernels.TILES:
        tuner, _ = kernels._tuned(name, 2, 64)
        assert len(tuner.configs_timings) == len(kernels.TILES[name][2, 64])
        assert all(math.isfinite(times[0]) for times in tuner.configs_timings.values())


@pytest.mark.gpu
@pytest.mark.usefixtures("one_tile")
def test_memory_grows_with_length_not_its_square():
    def peak(length):
        tensors = [t.requires_grad_() for t in three(1, 4, 4, length, length, 64, 64, torch.bfloat16)]
        flash_attention(*tensors, is_causal=True).sum().backward()  # compiled, tuned
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_attention(*tensors, is_causal=True).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 3 * peak(4096)
    assert peak(8192) < 8192 * 8192 * 2  # one head's weights
