"""Activations, their derivatives and gated forms: against torch, autograd, and the layers of real families."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close

from llm_atlas.nn.activations import (
    ACTIVATIONS,
    find_activation,
    geglu,
    geglu_backward,
    gelu,
    gelu_derivative,
    relu,
    relu_derivative,
    silu,
    silu_derivative,
    swiglu,
    swiglu_backward,
)
from llm_atlas.nn.feedforward import GatedFeedForward, gated_hidden

X = torch.linspace(-6, 6, 101)
PAIRS = [
    pytest.param("relu", relu, functional.relu, id="relu"),
    pytest.param("gelu", gelu, functional.gelu, id="gelu"),
    pytest.param(
        "gelu_tanh",
        functools.partial(gelu, approximate="tanh"),
        functools.partial(functional.gelu, approximate="tanh"),
        id="gelu_tanh",
    ),
    pytest.param("silu", silu, functional.silu, id="silu"),
]
DERIVATIVES = {
    "relu": relu_derivative,
    "gelu": gelu_derivative,
    "gelu_tanh": functools.partial(gelu_derivative, approximate="tanh"),
    "silu": silu_derivative,
}
GATED = [
    pytest.param(swiglu, swiglu_backward, functional.silu, id="swiglu"),
    pytest.param(geglu, geglu_backward, functional.gelu, id="geglu"),
    pytest.param(
        functools.partial(geglu, approximate="tanh"),
        functools.partial(geglu_backward, approximate="tanh"),
        functools.partial(functional.gelu, approximate="tanh"),
        id="geglu_tanh",
    ),
]
EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 1e20, -1e20, math.inf, -math.inf, math.nan]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_readable_and_fused_form_are_that_of_torch(name, ours, theirs):
    for function in (ours, find_activation(name)):
        x, y = (X.clone().requires_grad_() for _ in range(2))  # 0 is among them
        function(x).sum().backward()
        theirs(y).sum().backward()
        assert_close(function(x), theirs(y), atol=2e-6, rtol=1e-5)
        assert_close(x.grad, y.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(name, ours, theirs, dtype):
    x, y = ((X * 3).to(dtype).requires_grad_() for _ in range(2))
    found, expected = ours(x), theirs(y)
    assert found.dtype == dtype
    # An ulp apart at most: torch too computes in float32 and rounds once.
    step = {"atol": 1e-6, "rtol": torch.finfo(dtype).eps}
    assert_close(found, expected, **step)
    assert_close(found, theirs(y.float()).to(dtype), **step)
    expected.sum().backward()
    assert_close(DERIVATIVES[name](x.detach()), y.grad, **step)
    found.sum().backward()
    assert_close(x.grad, y.grad, **step)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", EXTREMES)
def test_extremes_are_those_of_torch_wherever_torch_has_a_number(name, ours, theirs, dtype, value):
    x, y = (torch.tensor([value], dtype=dtype).requires_grad_() for _ in range(2))
    found, expected = ours(x), theirs(y)
    found.backward()
    expected.backward()
    for mine, its in [
        (found, expected),
        (x.grad, y.grad),
        (DERIVATIVES[name](x.detach()), y.grad),
        (find_activation(name)(x), expected),
    ]:
        assert mine.dtype == dtype
        if not its.isnan() and not (value != value and name == "relu"):
            assert_close(mine, its)
    if value != value:
        assert found.isnan()


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_derivatives_are_those_of_autograd(name, ours, theirs):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        y = torch.cat([X, torch.tensor([0.0, -0.0])]).to(dtype).requires_grad_()
        theirs(y).sum().backward()
        assert_close(DERIVATIVES[name](y.detach()), y.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_gradcheck(name, ours, theirs):
    x = torch.tensor([-3.0, -0.7, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ours, (x,))
    torch.autograd.gradgradcheck(ours, (x,))
    if name != "relu":  # its derivative is a step
        torch.autograd.gradcheck(DERIVATIVES[name], (x,))
    # and the derivative by hand against the difference quotient of the function itself
    h = 1e-5
    quotient = (ours(x + h) - ours(x - h)) / (2 * h)
    assert_close(DERIVATIVES[name](x), quotient, atol=1e-8, rtol=1e-8)


def test_every_name_is_tested_here():
    assert set(ACTIVATIONS) == {case.values[0] for case in PAIRS} == set(DERIVATIVES)


def test_gelu_is_the_mean_of_a_random_mask():
    """x times the share of a normal sample below x: the paper's own reading."""
    sample = randn(1_000_000, dtype=torch.float64)
    for value in (-1.5, -0.3, 0.4, 2.0):
        kept = value * (sample < value).double().mean()
        assert gelu(torch.tensor(value)).item() == pytest.approx(kept.item(), abs=5e-3)


@given(st.floats(-50, 50))
def test_identities(value):
    x = torch.tensor(value, dtype=torch.float64)
    for f, tolerance in ((relu, 0), (gelu, 1e-12), (silu, 1e-12)):
        assert_close(f(x) - f(-x), x, atol=tolerance, rtol=1e-12)
    assert gelu(x) <= relu(x)
    assert silu(x) <= relu(x)
    assert silu(x) >= -0.2785


def test_the_two_gelus_differ():
    assert 1e-4 < (gelu(X) - gelu(X, approximate="tanh")).abs().max() < 1e-2
    assert 1e-4 < (gelu_derivative(X) - gelu_derivative(X, approximate="tanh")).abs().max() < 1e-2


def test_a_function_is_taken_as_it_is():
    assert find_activation(torch.tanh) is torch.tanh


# ---------------------------------------------------------------------------------------- gated


@pytest.mark.parametrize(("ours", "backward", "f"), GATED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gated_forms_and_their_backward_are_those_of_autograd(ours, backward, f, dtype):
    gate, up, grad = (3 * randn(4, 7, seed=seed, dtype=torch.float64).to(dtype) for seed in range(3))
    theirs = [tensor.clone().requires_grad_() for tensor in (gate, up)]
    expected = f(theirs[0]) * theirs[1]
    expected.backward(grad)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    assert_close(ours(gate, up), expected.detach(), **tolerance)
    by_hand = backward(grad, gate, up)
    assert [tensor.dtype for tensor in by_hand] == [dtype] * 2
    for found, tensor in zip(by_hand, theirs, strict=True):
        assert_close(found, tensor.grad, **tolerance)
    own = [tensor.clone().requires_grad_() for tensor in (gate, up)]
    ours(*own).backward(grad)
    for found, tensor in zip(own, theirs, strict=True):
        assert_close(found.grad, tensor.grad, **tolerance)


@pytest.mark.parametrize(("ours", "backward", "f"), GATED)
def test_gradcheck_of_the_backward_by_hand(ours, backward, f):
    """As the backward of a function that keeps gate and up alone, against difference quotients."""
    saved = []

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            saved.append((gate, up))
            return ours(gate, up)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, *ctx.saved_tensors)

    gate, up = (randn(3, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))
    assert torch.autograd.gradgradcheck(Gated.apply, (gate, up))
    assert saved


@pytest.mark.parametrize(("ours", "backward", "f"), GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_extremes_have_no_nan_where_torch_has_none(ours, backward, f, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e4, -1e4, math.inf, -math.inf], dtype=dtype)
    gate, up = (part.flatten() for part in torch.meshgrid(values, values, indexing="ij"))
    theirs = [tensor.clone().requires_grad_() for tensor in (gate, up)]
    expected = f(theirs[0]) * theirs[1]
    expected.sum().backward()
    found = [ours(gate, up), *backward(torch.ones_like(up), gate, up)]
    for mine, its in zip(found, [expected.detach(), *(tensor.grad for tensor in theirs)], strict=True):
        known = ~its.isnan()
        assert known.sum() > 30
        assert_close(mine[known], its[known])


def test_a_shut_gate_lets_nothing_through_and_zero_up_stops_the_gates_gradient():
    up, grad = randn(5), randn(5, seed=1)
    for f, backward in ((swiglu, swiglu_backward), (geglu, geglu_backward)):
        assert torch.equal(f(torch.zeros(5), up), torch.zeros(5))
        assert f(torch.full((5,), -30.0), up).abs().max() < 1e-10
        assert_close(f(torch.full((5,), 30.0), up), 30 * up)
        to_gate, _ = backward(grad, up, torch.zeros(5))
        assert torch.equal(to_gate.abs(), torch.zeros(5))
        to_gate, to_up = backward(grad, torch.zeros(5), up)
        assert_close(to_gate, grad * up / 2)
        assert torch.equal(to_up.abs(), torch.zeros(5))


def test_the_gated_layer_computes_them():
    layer = GatedFeedForward(6, 20)
    x = randn(4, 6)
    assert_close(layer(x), layer.down(swiglu(layer.gate(x), layer.up(x))))
    layer.activation = find_activation("gelu_tanh")
    assert_close(layer(x), layer.down(geglu(layer.gate(x), layer.up(x), approximate="tanh")))


# ----------------------------------------------------------------- the layers of real families


def llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2))


def gemma():
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaMLP

    return GemmaMLP(GemmaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2))


def t5():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    return T5DenseGatedActDense(
        T5Config(d_model=12, d_ff=20, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    )


PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
T5_NAMES = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
FAMILIES = {
    "llama": (llama, PROJECTIONS, "silu"),
    "gemma": (gemma, PROJECTIONS, "gelu_tanh"),
    "t5 v1.1": (t5, T5_NAMES, "gelu_tanh"),
}


@functools.cache
def converted(family):
    """Their layer with every parameter drawn anew, our state dict of it, an input and its output."""
    make, names, _ = FAMILIES[family]
    layer = make().eval().requires_grad_(False)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed) * parameter.shape[1] ** -0.5
    weights = {}
    for name, tensor in layer.state_dict().items():
        theirs, kind = name.rsplit(".", 1)
        weights[f"{names[theirs]}.{kind}"] = tensor
    x = 3 * randn(2, 5, 12, seed=9)
    out = layer(x)
    assert 0.1 < out.std() < 10
    return weights, x, out


def error(family, weights, activation=None):
    """Largest difference of outputs, relative to the largest output."""
    _, x, expected = converted(family)
    ours = GatedFeedForward(12, 20, activation=activation or FAMILIES[family][2])
    ours.load_state_dict(weights)
    return ((ours(x) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gated_layer_is_that_of_transformers(family):
    weights = converted(family)[0]
    assert sorted(weights) == ["down.weight", "gate.weight", "up.weight"]
    assert error(family, weights) < 1e-5
    for name in weights:
        assert error(family, weights | {name: torch.zeros_like(weights[name])}) > 0.1
    swapped = weights | {"gate.weight": weights["up.weight"], "up.weight": weights["gate.weight"]}
    assert error(family, swapped) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_another_activation_is_noticed(family):
    weights = converted(family)[0]
    for activation in set(ACTIVATIONS) - {FAMILIES[family][2]}:
        assert error(family, weights, activation) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readable_gate_is_that_of_transformers(family):
    weights, x, expected = converted(family)
    gate, up = (functional.linear(x, weights[f"{name}.weight"]) for name in ("gate", "up"))
    hidden = swiglu(gate, up) if family == "llama" else geglu(gate, up, approximate="tanh")
    found = functional.linear(hidden, weights["down.weight"])
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


# -------------------------------------------------------------------------------------- errors


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gelu(X, approximate="sigmoid"),
            ValueError,
            "approximate 'sigmoid' must be 'none' or 'tanh'",
        ),
        (lambda: gelu_derivative(X, approximate=""), ValueError, "approximate '' must be 'none' or 'tanh'"),
        (lambda: geglu(X, X, approximate="new"), ValueError, "approximate 'new' must be 'none' or 'tanh'"),
        (lambda: swiglu(X, X[:4]), ValueError, "gate has shape (101,) and up (4,): they must be equal"),
        (lambda: geglu(X[None], X), ValueError, "gate has shape (1, 101) and up (101,): they must be equal"),
        (
            lambda: swiglu_backward(X[:1], X, X),
            ValueError,
            "grad has shape (1,) and up (101,): they must be equal",
        ),
        (
            lambda: geglu_backward(X, X, X[:1]),
            ValueError,
            "gate has shape (101,) and up (1,): they must be equal",
        ),
        (lambda: silu(torch.arange(3)), TypeError, "x must hold floating-point numbers, got torch.int64"),
        (
            lambda: gelu_derivative(torch.arange(3)),
            TypeError,
            "x must hold floating-point numbers, got torch.int64",
        ),
        (
            lambda: relu(torch.arange(3)),
            TypeError,
            "x must hold floating-point numbers, got torch.int64",
        ),
        (
            lambda: relu_derivative(X > 0),
            TypeError,
            "x must hold floating-point numbers, got torch.bool",
        ),
        (
            lambda: gated_hidden(576.5),
            ValueError,
            "dim 576.5 and multiple_of 1 must be whole numbers, at least 1",
        ),
        (
            lambda: find_activation(["relu"]),
            ValueError,
            "activation ['relu'] is not one of relu, gelu, gelu_tanh, silu",
        ),
        (
            lambda: find_activation("swish"),
            ValueError,
            "activation 'swish' is not one of relu, gelu, gelu_tanh, silu",
        ),
    ],
)
def test_a_mistake_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
