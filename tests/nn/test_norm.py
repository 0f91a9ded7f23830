"""Norms against torch: forward, backward, narrow dtypes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llm_atlas.nn.norm import LayerNorm, RMSNorm, layer_norm, rms_norm

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
