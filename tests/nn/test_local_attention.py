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
        lambda q, k, v: local_attention(
            q, k, v, window=window, block=block, is_causal=causal, attend=attend
        ),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask=mask),
        tensors(seq, keys, batch=batch, heads=heads[0], kv_heads=heads[1]),
    )
