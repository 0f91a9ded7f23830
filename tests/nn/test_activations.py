"""Activations against torch."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from llm_atlas.nn.activations import ACTIVATIONS, find_activation, gelu, relu, silu

X = torch.linspace(-6, 6, 101)
PAIRS = [
    pytest.param("relu", relu, functional.relu, id="relu"),
    pytest.param("gelu", gelu, functional.gelu, id="gelu"),
    pytest.param(
        "gelu_tanh",
        lambda x: gelu(x, approximate="tanh"),
        lambda x: functional.gelu(x, approximate="tanh"),
        id="gelu_tanh",
    ),
    pytest.param("silu", silu, functional.silu, id="silu"),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_readable_and_fused_form_are_that_of_torch(name, ours, theirs):
    for function in (ours, find_activation(name)):
        x, y = (X.clone().requires_grad_() for _ in range(2))
        function(x).sum().backward()
        theirs(y).sum().backward()
        assert_close(function(x), theirs(y), atol=2e-6, rtol=1e-5)
        assert_close(x.grad[X != 0], y.grad[X != 0], atol=2e-6, rtol=1e-5)
        assert function(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_gradcheck(name, ours, theirs):
    x = torch.tensor([-3.0, -0.7, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ours, (x,))


def test_every_name_is_tested_here():
    assert set(ACTIVATIONS) == {case.values[0] for case in PAIRS}


def test_the_two_gelus_differ():
    assert 1e-4 < (gelu(X) - gelu(X, approximate="tanh")).abs().max() < 1e-2


def test_a_function_is_taken_as_it_is():
    assert find_activation(torch.tanh) is torch.tanh
