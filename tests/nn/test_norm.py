"""Norms against torch: forward, the hand-written backward, narrow dtypes, tokens without variance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from llm_atlas.nn.norm import (
    LayerNorm,
    RMSNorm,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)

PAIRS = [
    pytest.param(LayerNorm, nn.LayerNorm, layer_norm, id="layer"),
    pytest.param(RMSNorm, nn.RMSNorm, rms_norm, id="rms"),
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(ours: type, theirs: type, dtype: torch.dtype, eps: float = 1e-3) -> tuple[nn.Module, nn.Module]:
    a, b = ours(16, eps=eps), theirs(16, eps=eps)
    for i, parameter in enumerate(a.parameters()):
        parameter.data = randn(16, seed=i)
    b.load_state_dict(a.state_dict())
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "function"), PAIRS)
def test_module_and_function_are_those_of_torch(ours, theirs, function, dtype):
    a, b = pair(ours, theirs, dtype)
    tolerance = {"atol": 3e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 2e-6, "rtol": 1e-5}
    results = []
    for run in (b, a, lambda x: function(x, *a.parameters(), eps=1e-3)):
        for parameter in [*a.parameters(), *b.parameters()]:
            parameter.grad = None
        x = (3 * randn(2, 5, 16, seed=7) + 1).to(dtype).requires_grad_()
        out = run(x)
        assert out.dtype == dtype
        out.backward(randn(2, 5, 16, seed=8).to(dtype))
        used = b if run is b else a
        results.append([out.detach(), x.grad, *(p.grad for p in used.parameters())])
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize(("ours", "theirs", "function"), PAIRS)
def test_function_without_scale_or_shift(ours, theirs, function):
    x = randn(3, 16)
    assert_close(function(x, eps=1e-3), theirs(16, eps=1e-3)(x))


def test_layer_norm_module_without_bias():
    theirs = nn.LayerNorm(16, bias=False)
    assert_close(LayerNorm(16, bias=False)(randn(3, 16)), theirs(randn(3, 16)))
    assert len(list(LayerNorm(16, bias=False).parameters())) == 1


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_float16_does_not_overflow_in_the_sum_of_squares(function):
    x = 1000 * randn(4, 16)  # squares past 65504, the largest float16
    assert_close(function(x.half()).float(), function(x), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_bfloat16_is_the_float32_result_rounded_once(function):
    """The gain too is applied before the rounding."""
    x, weight = 3 * randn(64, 16).bfloat16(), randn(16, seed=1).bfloat16()
    assert torch.equal(function(x, weight), function(x.float(), weight.float()).bfloat16())


def test_the_defaults_of_eps():
    x = 1e-3 * randn(4, 16)
    assert LayerNorm(16).eps == 1e-5
    assert RMSNorm(16).eps == 1e-6
    for function, backward, eps in (
        (layer_norm, layer_norm_backward, 1e-5),
        (rms_norm, rms_norm_backward, 1e-6),
    ):
        assert torch.equal(function(x), function(x, eps=eps))
        assert torch.equal(backward(x, x)[0], backward(x, x, eps=eps)[0])


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_eps_must_not_be_negative(eps):
    x = randn(3, 16)
    for call in (
        lambda: layer_norm(x, eps=eps),
        lambda: rms_norm(x, eps=eps),
        lambda: layer_norm_backward(x, x, eps=eps),
        lambda: rms_norm_backward(x, x, eps=eps),
        lambda: LayerNorm(16, eps=eps),
        lambda: RMSNorm(16, eps=eps),
    ):
        with pytest.raises(ValueError, match="must be at least 0"):
            call()


@pytest.mark.untyped
@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_whole_numbers_are_refused_in_words(module):
    function = layer_norm if module is LayerNorm else rms_norm
    for call in (
        lambda: module(4)(torch.ones(2, 4, dtype=torch.int64)),
        lambda: function(torch.ones(2, 4), torch.ones(4, dtype=torch.int64)),
    ):
        with pytest.raises(TypeError, match="must hold floating-point numbers"):
            call()


def test_tokens_without_features_have_no_gradient_to_sum():
    dx, dweight, dbias = layer_norm_backward(torch.zeros(2, 0), torch.zeros(2, 0))
    assert (dx.shape, dweight.shape, dbias.shape) == ((2, 0), (0,), (0,))


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_gradcheck(function):
    count = 3 if function is layer_norm else 2
    tensors = [
        randn(*shape, seed=i).double().requires_grad_() for i, shape in enumerate([(3, 5), (5,), (5,)])
    ]
    torch.autograd.gradcheck(function, tensors[:count])


def test_layer_norm_ignores_shift_and_scale_of_a_token_and_rms_norm_only_scale():
    x = randn(4, 16)
    assert_close(layer_norm(5 * x + 3, eps=0.0), layer_norm(x, eps=0.0), atol=1e-5, rtol=1e-5)
    assert_close(rms_norm(5 * x, eps=0.0), rms_norm(x, eps=0.0), atol=1e-5, rtol=1e-5)
    assert (rms_norm(x + 3) - rms_norm(x)).abs().max() > 0.1


def test_every_token_is_normalised_alone():
    x = randn(2, 5, 16)
    changed = x.clone()
    changed[0, 3] *= 100
    assert torch.equal(layer_norm(changed)[1], layer_norm(x)[1])
    assert torch.equal(rms_norm(changed)[0, :3], rms_norm(x)[0, :3])


# ---------------------------------------------------------------------------------------- backward by hand

BACKWARDS = [
    pytest.param(layer_norm, layer_norm_backward, nn.functional.layer_norm, id="layer"),
    pytest.param(rms_norm, rms_norm_backward, nn.functional.rms_norm, id="rms"),
]


def from_autograd(fused, grad, x, weight, eps):
    """Gradients of torch's own kernel; a bias takes part where it has one."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    if fused is nn.functional.layer_norm:
        leaves.append(torch.zeros_like(weight).requires_grad_())
    out = fused(leaves[0], weight.shape, *leaves[1:], eps=eps)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize(("function", "backward", "fused"), BACKWARDS)
@pytest.mark.parametrize("shape", [(6, 5, 16), (3, 16), (16,)], ids=str)
def test_backward_by_hand_is_autograd(function, backward, fused, shape):
    grad, x, weight = (t.double() for t in (randn(*shape, seed=1), 3 * randn(*shape) + 1, randn(16, seed=2)))
    for eps in (1e-3, 2.0):  # a large one too: the formula holds with it, not only in its absence
        ours = backward(grad, x, weight, eps)
        for got, wanted in zip(ours, from_autograd(fused, grad, x, weight, eps), strict=True):
            assert_close(got, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("function", "backward", "fused"), BACKWARDS)
def test_backward_without_weight_is_that_of_ones(function, backward, fused):
    grad, x = randn(4, 16, seed=1), randn(4, 16)
    for got, wanted in zip(backward(grad, x), backward(grad, x, torch.ones(16)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("function", "backward", "fused"), BACKWARDS)
def test_backward_in_bfloat16_is_the_float32_one_rounded_once(function, backward, fused):
    grad, x, weight = (
        t.bfloat16() for t in (randn(6, 5, 16, seed=1), 3 * randn(6, 5, 16), randn(16, seed=2))
    )
    wide = backward(grad.float(), x.float(), weight.float(), 1e-3)
    for got, wanted in zip(backward(grad, x, weight, 1e-3), wide, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, wanted.bfloat16())
    for got, wanted in zip(
        backward(grad, x, weight, 1e-3), from_autograd(fused, grad, x, weight, 1e-3), strict=True
    ):
        assert_close(got, wanted, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize(("function", "backward", "fused"), BACKWARDS)
def test_gradients_have_the_dtypes_of_what_they_are_of(function, backward, fused):
    grad, x = randn(3, 16).bfloat16(), randn(3, 16).bfloat16()
    dx, *rest = backward(grad, x, torch.ones(16))
    assert [t.dtype for t in (dx, *rest)] == [torch.bfloat16, *[torch.float32] * len(rest)]
    for got, wanted in zip(rest, backward(grad.float(), x.float(), torch.ones(16))[1:], strict=True):
        assert torch.equal(got, wanted)  # not by way of bfloat16


@pytest.mark.parametrize(("function", "backward", "fused"), BACKWARDS)
def test_gradcheck_of_the_backward_by_hand(function, backward, fused):
    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, *bias):
            ctx.save_for_backward(x, weight)
            return function(x, weight, *bias, eps=0.1)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, *ctx.saved_tensors, 0.1)

    shapes = [(3, 5), (5,), (5,)][: 3 if function is layer_norm else 2]
    leaves = [randn(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(ByHand.apply, leaves)

    class Wrong(ByHand):
        """Without the part along the scale: gradcheck must see it."""

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            right = backward(grad, x, weight, 0.1)
            return (right[0] + 0.01 * x, *right[1:])

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Wrong.apply, leaves)


@given(
    seed=st.integers(0, 10_000), dim=st.integers(2, 40), scale=st.floats(0.01, 100), shift=st.floats(-10, 10)
)
def test_the_gradient_has_no_part_along_mean_and_scale(seed, dim, scale, shift):
    x, grad = (randn(3, dim, seed=seed + i).double() for i in range(2))
    weight = randn(dim, seed=seed + 2).double()
    x = scale * x + shift
    size = grad.norm(dim=-1) * weight.norm()
    centred = x - x.mean(-1, keepdim=True)
    dx, _, _ = layer_norm_backward(grad, x, weight, 0.0)
    assert (dx.sum(-1).abs() * centred.norm(dim=-1) <= 1e-7 * size * dim).all()
    assert ((dx * centred).sum(-1).abs() <= 1e-7 * size * dim).all()
    dx, _ = rms_norm_backward(grad, x, weight, 0.0)
    assert ((dx * x).sum(-1).abs() <= 1e-7 * size * dim).all()


def test_eps_leaves_the_share_along_the_scale_that_the_docstring_says():
    grad, x, eps = randn(4, 16, seed=1).double(), randn(4, 16).double(), 0.3
    dx, _, _ = layer_norm_backward(grad, x, None, eps)
    variance = x.var(-1, correction=0)
    normed = layer_norm(x, eps=eps)
    along = (grad * normed).sum(-1) / (variance + eps).sqrt()
    assert_close((dx * normed).sum(-1), along * eps / (variance + eps))
    assert_close(dx.sum(-1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    dx, _ = rms_norm_backward(grad, x, None, eps)
    square, normed = x.square().mean(-1), rms_norm(x, eps=eps)
    along = (grad * normed).sum(-1) / (square + eps).sqrt()
    assert_close((dx * normed).sum(-1), along * eps / (square + eps))


def test_a_small_token_gets_a_large_gradient():
    grad, x = randn(1, 16, seed=1).double(), randn(1, 16).double()
    for backward in (layer_norm_backward, rms_norm_backward):
        assert_close(backward(grad, x / 100, None, 0.0)[0], 100 * backward(grad, x, None, 0.0)[0])


# ------------------------------------------------------------------------------- tokens without variance


@pytest.mark.parametrize("dim", [1, 3, 16, 577, 4096])
@pytest.mark.parametrize("level", [0.0, 0.1, -1000.1, 123456.7, 1e6 + 0.3, 1e10 / 3, 1e-30])
def test_a_token_of_equal_features_gives_the_bias(dim, level):
    x, bias = torch.full((2, dim), level), randn(dim)
    # In float32 the mean of equal numbers may miss them by a rounding, which 1/sqrt(eps) would make visible.
    assert_close(layer_norm(x, torch.ones(dim), bias), bias.expand(2, -1), atol=1e-6, rtol=0)
    assert_close(LayerNorm(dim)(x), torch.zeros(2, dim), atol=1e-6, rtol=0)
    grad = randn(2, dim, seed=1)
    dx, dweight, dbias = layer_norm_backward(grad, x)
    assert_close(dx, (grad - grad.mean(-1, keepdim=True)) / 1e-5**0.5, atol=1e-3, rtol=1e-4)
    assert_close(dweight, torch.zeros(dim), atol=1e-5, rtol=0)
    assert torch.equal(dbias, grad.sum(0))


def test_a_token_of_zeros_stays_zero_under_rms_norm():
    x, grad = torch.zeros(2, 16), randn(2, 16, seed=1)
    assert torch.equal(rms_norm(x), x)
    assert torch.equal(RMSNorm(16)(x), x)
    dx, dweight = rms_norm_backward(grad, x)
    assert_close(dx, 1000 * grad)
    assert torch.equal(dweight, torch.zeros(16))


def test_rms_norm_of_equal_features_is_their_sign():
    x = torch.tensor([[5.0] * 16, [-0.3] * 16])
    assert_close(rms_norm(x, eps=1e-12), x.sign())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("function", "backward", "fused"), BACKWARDS)
def test_narrow_tokens_without_variance_are_finite(function, backward, fused, dtype):
    for level in (0.0, 0.1, 1000.1):
        x, grad = torch.full((2, 577), level, dtype=dtype), randn(2, 577, seed=1).to(dtype)
        assert function(x).isfinite().all()
        assert all(t.isfinite().all() for t in backward(grad, x))


@pytest.mark.parametrize("fused", [nn.functional.layer_norm, nn.functional.rms_norm])
def test_torch_agrees_about_tokens_without_variance(fused):
    ours = {nn.functional.layer_norm: layer_norm_backward, nn.functional.rms_norm: rms_norm_backward}[fused]
    x, grad, weight = torch.zeros(2, 16).double(), randn(2, 16, seed=1).double(), randn(16).double()
    for got, wanted in zip(
        ours(grad, x, weight, 1e-6), from_autograd(fused, grad, x, weight, 1e-6), strict=True
    ):
        assert_close(got, wanted)
