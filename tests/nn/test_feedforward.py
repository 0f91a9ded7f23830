"""Feed-forward networks against torch.nn.Sequential, and what position-wise means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from llm_atlas.nn.feedforward import (
    FeedForward,
    GatedFeedForward,
    feed_forward_flops,
    feed_forward_parameters,
    gated_hidden,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "theirs"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("silu", nn.SiLU), (torch.tanh, nn.Tanh)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_is_a_sequential(activation, theirs, bias, dtype):
    ours = FeedForward(6, 20, activation=activation, bias=bias).to(dtype)
    twin = nn.Sequential(nn.Linear(6, 20, bias=bias), theirs(), nn.Linear(20, 6, bias=bias)).to(dtype)
    twin.load_state_dict({n.replace("up", "0").replace("down", "2"): t for n, t in ours.state_dict().items()})
    x, y = (randn(2, 5, 6).to(dtype).requires_grad_() for _ in range(2))
    ours(x).square().sum().backward()
    twin(y).square().sum().backward()
    tolerance = {"atol": 1e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    assert_close(ours(x), twin(y), **tolerance)
    assert_close(x.grad, y.grad, **tolerance)
    assert_close(ours.up.weight.grad, twin[0].weight.grad, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_gated_feed_forward_is_its_equation(bias):
    ours = GatedFeedForward(6, 20, bias=bias).double()
    x = randn(4, 6).double().requires_grad_()
    gate = functional.linear(x, ours.gate.weight, ours.gate.bias)
    up = functional.linear(x, ours.up.weight, ours.up.bias)
    expected = functional.linear(gate / (1 + torch.exp(-gate)) * up, ours.down.weight, ours.down.bias)
    assert_close(ours(x), expected)
    torch.autograd.gradcheck(ours, (x,))


def test_sizes_unless_given():
    assert FeedForward(6).up.out_features == 24
    assert GatedFeedForward(6).up.out_features == 16


def test_gated_width_of_equal_parameters():
    assert gated_hidden(4096, multiple_of=256) == 11008  # Llama 7B
    assert gated_hidden(8192, multiple_of=256) == 22016  # Llama 65B
    assert gated_hidden(576, multiple_of=256) == 1536  # SmolLM2-135M
    assert feed_forward_parameters(72, gated_hidden(72), gated=True) == feed_forward_parameters(72, 4 * 72)
    with pytest.raises(ValueError, match="dim 8 and multiple_of 0 must be whole numbers, at least 1"):
        gated_hidden(8, multiple_of=0)


@given(st.integers(1, 500), st.integers(1, 64))
def test_gated_width_is_the_next_multiple(dim, multiple_of):
    width = gated_hidden(dim, multiple_of=multiple_of)
    assert width % multiple_of == 0
    assert 0 <= width - 8 * dim // 3 < multiple_of


@given(st.permutations(range(6)), st.booleans())
def test_permuted_positions_give_permuted_outputs(order, gated):
    layer = (GatedFeedForward if gated else FeedForward)(4)
    x = randn(2, 6, 4)
    assert_close(layer(x[:, order]), layer(x)[:, order])
    # A token alone gives what it gives in company.
    assert_close(layer(x[1, 3]), layer(x)[1, 3])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_counts_are_those_of_the_module(gated, bias):
    layer = (GatedFeedForward if gated else FeedForward)(6, 20, bias=bias)
    assert feed_forward_parameters(6, 20, gated=gated, bias=bias) == sum(
        p.numel() for p in layer.parameters()
    )
    with FlopCounterMode(display=False) as counter:
        layer(randn(7, 6))
    assert 7 * feed_forward_flops(6, 20, gated=gated) == counter.get_total_flops()
