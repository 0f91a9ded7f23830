"""The roofline and the counts, against loops that do what the algorithms say."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llm_atlas.nn import roofline
from llm_atlas.nn.attention import scaled_dot_product_attention
from llm_atlas.nn.flash import flash_attention, flash_attention_2

some = st.integers(1, 9)
windows = st.none() | some


def test_attainable_is_a_slope_and_a_roof():
    peak, bandwidth = 312e12, 2.0e12  # about an A100's: bfloat16, memory of the 80 GB one
    assert roofline.ridge(peak, bandwidth) == 156
    assert roofline.attainable(1.0, peak, bandwidth) == 2e12
    assert roofline.attainable(156.0, peak, bandwidth) == peak
    assert roofline.attainable(1e6, peak, bandwidth) == peak


@given(queries=st.integers(0, 9), is_causal=st.booleans(), window=windows)
def test_pairs_are_those_of_a_mask(queries, is_causal, window):
    pairs = sum(
        (not is_causal or j <= i) and (window is None or abs(i - j) < window)
        for i, j in itertools.product(range(queries), repeat=2)
    )
    assert roofline.visible_pairs(queries, queries, is_causal=is_causal, window=window) == pairs


def test_flops_are_those_torch_counts():
    q, k, v = (torch.ones(2, 3, n, d, requires_grad=True) for n, d in ((16, 8), (24, 8), (24, 4)))
    sizes = {"value_dim": 4, "heads": 6}
    with FlopCounterMode(display=False) as counter:
        out = scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == roofline.attention_flops(16, 24, 8, **sizes)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # What stores its weights does not compute the scores again.
    again = 2 * 6 * 16 * 24 * 8
    assert counter.get_total_flops() == roofline.attention_flops(16, 24, 8, **sizes, backward=True) - again


@pytest.mark.parametrize("attend", [flash_attention, flash_attention_2])
def test_flops_of_the_tiled_form(attend):
    q = torch.ones(3, 32, 8, requires_grad=True)
    for is_causal in (False, True):
        # Whole tiles on the diagonal: T (T + block) / 2 pairs, for the forms that skip.
        skipped = is_causal and attend is flash_attention_2
        with FlopCounterMode(display=False) as counter:
            out = attend(q, q, q, is_causal=is_causal, block_q=4, block_k=4)
        assert counter.get_total_flops() == 4 * 3 * 8 * (32 * 36 // 2 if skipped else 32 * 32)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 10 * 3 * 8 * (32 * 36 // 2 if is_causal else 32 * 32)
    assert roofline.attention_flops(32, 32, 8, heads=3) == 4 * 3 * 8 * 32 * 32
    assert roofline.attention_flops(32, 32, 8, heads=3, backward=True) == 10 * 3 * 8 * 32 * 32
    assert roofline.attention_flops(32, 32, 8, is_causal=True) == 4 * 8 * 32 * 33 // 2


def test_standard_traffic_kernel_by_kernel():
    n, m, d, e = 5, 7, 4, 3
    scores = n * d + m * d + n * m
    softmax = n * m + n * m
    output = n * m + m * e + n * e
    assert roofline.standard_bytes(n, m, d, value_dim=e, heads=6, size=4) == 24 * (scores + softmax + output)
    assert roofline.minimal_bytes(n, m, d, value_dim=e, heads=6, kv_heads=2, size=4) == 4 * (
        6 * n * (d + e) + 2 * m * (d + e)
    )


@given(n=some, m=some, d=some, e=some, block_q=some, block_k=some)
def test_first_version_traffic_line_by_line(n, m, d, e, block_q, block_k):
    moved = 2 * (n * e) + 4 * (2 * n)  # line 2: zeros
    for j in range(0, m, block_k):
        moved += 2 * min(block_k, m - j) * (d + e)  # line 6
        for i in range(0, n, block_q):
            rows = min(block_q, n - i)
            moved += 2 * rows * (d + e) + 4 * 2 * rows  # line 8
            moved += 2 * rows * e + 4 * 2 * rows  # lines 12 and 13
    counted = roofline.flash_bytes(n, m, d, value_dim=e, block_q=block_q, block_k=block_k, heads=2, version=1)
    assert counted == 2 * moved


@given(n=some, m=some, d=some, e=some, block_q=some, block_k=some, is_causal=st.booleans(), window=windows)
def test_second_version_traffic_tile_by_tile(n, m, d, e, block_q, block_k, is_causal, window):
    m = n if is_causal or window else m
    moved = 0
    for i in range(0, n, block_q):
        rows = range(i, min(i + block_q, n))
        moved += 2 * len(rows) * (d + e) + 4 * len(rows)
        for j in range(0, m, block_k):
            columns = range(j, min(j + block_k, m))
            if any(
                (not is_causal or c <= r) and (window is None or abs(r - c) < window)
                for r, c in itertools.product(rows, columns)
            ):
                moved += 2 * len(columns) * (d + e)
    counted = roofline.flash_bytes(
        n, m, d, value_dim=e, block_q=block_q, block_k=block_k, heads=2, is_causal=is_causal, window=window
    )
    assert counted == 2 * moved


def test_traffic_falls_as_the_chip_grows():
    """Theorem 2: standard T^2, tiled T^2 d^2 / M."""
    n, d = 4096, 64
    traffic = []
    for kilobytes in (32, 64, 128):
        block_q, block_k = roofline.tile_sizes(1024 * kilobytes, d)
        traffic.append(roofline.flash_bytes(n, n, d, block_q=block_q, block_k=block_k, version=1))
    assert traffic[0] / traffic[1] == pytest.approx(2, rel=0.02)
    assert traffic[1] / traffic[2] == pytest.approx(2, rel=0.05)
    standard, of_twice = (roofline.standard_bytes(m, m, d) for m in (n, 2 * n))
    assert of_twice / standard == pytest.approx(4, rel=0.02)
    assert standard > 4 * traffic[2]


def test_tile_sizes_fit():
    assert roofline.tile_sizes(4 * 2 * 64 * 16, 64) == (16, 16)
    assert roofline.tile_sizes(4 * 2 * 64 * 100, 64) == (64, 100)
    with pytest.raises(ValueError, match="100 bytes on chip hold no four rows of 64 numbers of 2 bytes"):
        roofline.tile_sizes(100, 64)


@given(n=some, m=some, e=some, block_q=some, block_k=some, version=st.sampled_from([1, 2]))
def test_operations_of_the_softmax(n, m, e, block_q, block_k, version):
    count = 0
    for i in range(0, n, block_q):
        rows = min(block_q, n - i)
        for j in range(0, m, block_k):
            count += 5 * rows * min(block_k, m - j)  # scale, maximum, minus, exp, sum
            count += 5 * rows  # maximum of two, minus, exp, the sum's times and plus
            count += rows * e * 2 + (rows * e + rows if version == 1 else 0)
        count += 0 if version == 1 else rows * e + 2 * rows
    sizes = {"block_q": block_q, "block_k": block_k, "version": version}
    assert roofline.softmax_flops(n, m, e, heads=3, **sizes) == 3 * count


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: roofline.attainable(0.0, 1.0, 1.0), "intensity 0.0 must be positive"),
        (lambda: roofline.attainable(1.0, -1.0, 1.0), "peak_flops -1.0 must be positive"),
        (lambda: roofline.ridge(1.0, 0.0), "bandwidth 0.0 must be positive"),
        (lambda: roofline.visible_pairs(-1, 2), "queries -1 and keys 2 must be at least 0"),
        (lambda: roofline.visible_pairs(2, 2, window=0), "window 0 must be at least 1"),
        (lambda: roofline.visible_pairs(2, 3, is_causal=True), "as many keys as queries, got 2 and 3"),
        (lambda: roofline.attention_flops(2, 2, 0), "dim 0 must be positive"),
        (lambda: roofline.flash_bytes(2, 2, 4, block_q=1, block_k=1, version=3), "version 3 must be 1 or 2"),
        (lambda: roofline.softmax_flops(2, 2, 4, block_q=1, block_k=1, version=3), "version 3 must be 1 or 2"),
    ],
)  # fmt: skip
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
