"""Blocked local attention against masked full attention: the same numbers, and never a tensor of all pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llm_atlas.nn.attention import fused_attention, scaled_dot_product_attention
from llm_atlas.nn.local_attention import local_attention, local_attention_cost
from llm_atlas.nn.masks import PAD, sliding_window_mask, visible
from llm_atlas.nn.positions import AlibiPositions, ShawPositions

BOTH = pytest.mark.parametrize("attend", [scaled_dot_product_attention, fused_attention])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(queries: int, keys: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2):
    return (
        randn(batch, heads, queries, 6, seed=1),
        randn(batch, kv_heads, keys, 6, seed=2),
        randn(batch, kv_heads, keys, 5, seed=3),
    )


def with_gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(randn(*out.shape, seed=9).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


def assert_alike(function, oracle, inputs):
    out, grads = with_gradients(function, inputs)
    wanted, wanted_grads = with_gradients(oracle, inputs)
    assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    assert_close(grads, wanted_grads, atol=1e-5, rtol=1e-5)


@BOTH
@settings(max_examples=60, deadline=None)
@given(
    seq=st.integers(1, 40),
    past=st.integers(0, 12),
    window=st.integers(1, 45),
    block=st.none() | st.integers(1, 20),
    causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (3, 3)]),
    batch=st.integers(1, 3),
)
def test_it_is_full_attention_under_a_band_mask(attend, seq, past, window, block, causal, heads, batch):
    keys = seq + (past if causal else 0)
    mask = sliding_window_mask(seq, keys, window=window, causal=causal)
    assert_alike(
        lambda q, k, v: local_attention(q, k, v, window=window, block=block, is_causal=causal, attend=attend),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask=mask),
        tensors(seq, keys, batch=batch, heads=heads[0], kv_heads=heads[1]),
    )


@BOTH
@pytest.mark.parametrize("block", [None, 3, 8])
@pytest.mark.parametrize("window", [1, 4, 5, 80])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("new", [70, 5, 1])
def test_padding_is_seen_by_nobody_and_sees_nothing(attend, causal, window, block, new):
    at = torch.full((4, 70), PAD)
    at[0, :], at[1, 13:], at[2, :57], at[3, 5:40] = (torch.arange(n) for n in (70, 57, 57, 35))
    at[0, 20:] += 3  # what is far apart in positions is not near because its slots are
    if not causal:
        new = 70
    mask = visible(at[:, -new:], at, window=window)
    if not causal:
        mask = mask | visible(at, at, window=window).mT
    inputs = tensors(new, 70, batch=4)
    assert_alike(
        lambda q, k, v: local_attention(
            q, k, v, window=window, positions=at, block=block, is_causal=causal, attend=attend
        ),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask=mask),
        inputs,
    )
    out = local_attention(*inputs, window=window, positions=at, block=block, is_causal=causal, attend=attend)
    assert torch.equal(
        out.transpose(1, 2)[at[:, -new:] < 0], torch.zeros(int((at[:, -new:] < 0).sum()), 4, 5)
    )


@pytest.mark.parametrize("seq", [50, 90])
@pytest.mark.parametrize("block", [None, 8])
def test_positions_that_are_nearly_plain(seq, block):
    """One slot of padding before a row that counts on, a gap in the middle, and a row that begins at 7."""
    q, k, v = tensors(seq, seq)
    slots = torch.arange(seq)
    for at in (slots - 1, slots + 3 * (slots >= 33), slots + 7):
        mask = visible(at[None], at[None], window=6)
        out = local_attention(q, k, v, window=6, positions=at[None], block=block)
        assert_close(out, scaled_dot_product_attention(q, k, v, mask=mask), atol=2e-6, rtol=1e-5)


def test_window_one_gives_the_values_back_and_a_long_window_full_attention():
    q, k, v = tensors(100, 100, kv_heads=4)
    assert_close(local_attention(q, k, v, window=1), v)
    full = fused_attention(q, k, v, is_causal=True)
    for window in (100, 101, 10**9):
        assert torch.equal(local_attention(q, k, v, window=window), full)
        assert_close(local_attention(q, k, v, window=window, block=16), full, atol=2e-6, rtol=1e-5)
    assert_close(local_attention(q, k, v, window=100, is_causal=False), fused_attention(q, k, v))


@pytest.mark.parametrize(
    "shapes",
    [
        ((30, 8), (30, 8), (30, 6)),
        ((4, 30, 8), (2, 30, 8), (2, 30, 6)),
        ((1, 30, 8), (4, 30, 8), (4, 30, 6)),
        ((2, 1, 4, 30, 8), (1, 3, 2, 30, 8), (1, 3, 2, 30, 6)),
    ],
)
@pytest.mark.parametrize("window", [4, 40])
def test_any_leading_axes(shapes, window):
    inputs = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    mask = sliding_window_mask(30, window=window)
    wanted = scaled_dot_product_attention(*inputs, mask=mask, scale=0.3)
    for positions in (None, torch.arange(30), torch.arange(7, 37)[None]):
        out = local_attention(*inputs, window=window, block=7, scale=0.3, positions=positions)
        assert out.shape == wanted.shape
        assert_close(out, wanted, atol=2e-6, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("new", [50, 3])
def test_a_scheme_biases_each_block_as_it_biases_the_whole(attend, new, padding):
    q, k, v = tensors(new, 50, kv_heads=4)
    at = (torch.arange(50) - padding).clamp(min=PAD)[None]
    shaw = ShawPositions(6, max_distance=3)
    torch.nn.init.normal_(shaw.table.weight, generator=torch.Generator().manual_seed(0))
    for scheme in (AlibiPositions(4), shaw):
        mask = visible(at[:, -new:], at, window=6)
        assert_alike(
            lambda q, k, v, bias=scheme.bias: local_attention(
                q, k, v, window=6, positions=at, bias=bias, block=4, attend=attend
            ),
            lambda q, k, v, bias=scheme.bias, mask=mask: scaled_dot_product_attention(
                q, k, v, mask=mask, bias=bias(q, at[:, -new:], at)
            ),
            (q, k, v),
        )


def test_gradcheck_in_float64():
    leaves = [t[:1].double().requires_grad_() for t in tensors(11, 13)]
    torch.autograd.gradcheck(
        lambda q, k, v: local_attention(q, k, v, window=3, block=4, attend=scaled_dot_product_attention),
        leaves,
        fast_mode=True,
    )


@BOTH
def test_it_keeps_the_dtype_and_is_as_good_as_its_eight_bits(attend):
    inputs = [t.bfloat16() for t in tensors(90, 90)]
    out = local_attention(*inputs, window=9, block=16, attend=attend)
    assert out.dtype == torch.bfloat16
    mask = sliding_window_mask(90, window=9)
    wanted = scaled_dot_product_attention(*(t.float() for t in inputs), mask=mask)
    assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


# ------------------------------------------------------------------------------------------ the cost


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything inside makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


def largest(function, seq: int, **how) -> int:
    with Largest() as seen:
        with_gradients(lambda q, k, v: function(q, k, v, **how), tensors(seq, seq, batch=1))
    return seen.elements


@BOTH
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_has_all_pairs(attend, padded, causal):
    sizes = [512, 1024, 2048]
    seen = []
    for seq in sizes:
        at = (torch.arange(seq) - 5).clamp(min=PAD)[None] if padded else None
        how = {"positions": at, "window": 8, "block": 8, "is_causal": causal, "attend": attend}
        seen.append(largest(local_attention, seq, **how))
    # The readable form writes down the scores: 16 or 24 keys for each query and head. Doubling the length doubles it.
    assert seen[-1] <= 2048 * 4 * 24
    assert math.log2(seen[2] / seen[1]) == pytest.approx(1, abs=0.03)
    assert math.log2(seen[1] / seen[0]) == pytest.approx(1, abs=0.03)
    masked = {"mask": sliding_window_mask(1024, window=8)}
    assert largest(attend, 1024, **masked) >= 1024**2  # what a mask costs is seen by this test


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("seq", "window", "block"), [(96, 8, 8), (100, 8, None), (97, 5, 16), (200, 7, 3), (9, 20, 2)]
)
def test_the_cost_is_what_torch_counts(seq, window, block, causal):
    q, k, v = (randn(1, 3, seq, 6, seed=i) for i in range(3))
    how = {"block": block, "is_causal": causal}
    cost = local_attention_cost(seq, window, 6, 3, **how)
    with FlopCounterMode(display=False) as counter:
        local_attention(q, k, v, window=window, attend=scaled_dot_product_attention, **how)
    assert counter.get_total_flops() == cost.flops == 4 * 6 * cost.scored
    mask = sliding_window_mask(seq, window=window, causal=causal)
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(q, k, v, mask=mask)
    assert counter.get_total_flops() == cost.masked_flops == 4 * 6 * cost.masked
    assert cost.seen == 3 * int(mask.sum())


def test_the_cost_of_a_block_grows_with_the_length_and_that_of_a_mask_with_its_square():
    short, long = (local_attention_cost(n, 256, 64, 4) for n in (4096, 16384))
    assert long.flops == 4 * short.flops == 4 * 64 * 4 * 16384 * 512
    assert long.masked_flops == 16 * short.masked_flops
    assert long.masked == 32 * long.scored


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_below_one_is_refused(window):
    q = randn(4, 2)
    for call in (local_attention, lambda *_, window: local_attention_cost(4, window, 2)):
        with pytest.raises(ValueError, match=f"window {window} must be at least 1"):
            call(q, q, q, window=window)


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="1 <= queries <= keys, got queries 5 and keys 4"):
        local_attention(randn(5, 2), randn(4, 2), randn(4, 2), window=2)
    with pytest.raises(
        ValueError, match="both sides needs as many queries as keys, got queries 3 and keys 4"
    ):
        local_attention(randn(3, 2), randn(4, 2), randn(4, 2), window=2, is_causal=False)
    with pytest.raises(ValueError, match="block 0 must be at least 1"):
        local_attention(randn(4, 2), randn(4, 2), randn(4, 2), window=2, block=0)
    with pytest.raises(ValueError, match="seq 4, dim 0 and heads 1 must be at least 1"):
        local_attention_cost(4, 2, 0)


@pytest.mark.parametrize("row", [[0, 1, 1, 2], [0, 1, PAD, 2], [0, 2, 3, 3], [PAD, 3, 2, PAD]])
def test_positions_out_of_order_are_refused(row):
    q = randn(2, 1, 4, 2)
    at = torch.tensor([[0, 1, 2, 3], row])
    with pytest.raises(ValueError, match=r"position \d in slot \d of row 1 does not lie as far"):
        local_attention(q, q, q, window=2, positions=at)


def test_positions_of_another_shape_are_refused():
    q = randn(2, 1, 4, 2)
    with pytest.raises(
        ValueError, match=r"positions have shape \(3, 4\), the inputs have leading axes \(2,\)"
    ):
        local_attention(q, q, q, window=2, positions=torch.arange(4).expand(3, 4))


@pytest.mark.untyped
def test_positions_of_another_length_and_windows_that_are_no_number_are_refused():
    q = randn(2, 1, 4, 2)
    with pytest.raises(ValueError, match=r"positions have shape \(1, 5\), but there are 4 keys"):
        local_attention(q, q, q, window=2, positions=torch.arange(5)[None])
    with pytest.raises(TypeError, match=r"window 2.0 must be an int"):
        local_attention(q, q, q, window=2.0)
