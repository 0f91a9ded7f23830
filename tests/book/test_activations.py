"""The exercises of chapter 16: solutions pass, plausible slips get their own hint, memorised answers fail."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from llm_atlas.book import check

SEEDS = range(8)


def swiglu(x, w_gate, w_up, w_down):
    return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down


def slope(x):
    x = x.double().requires_grad_()
    return torch.autograd.grad(F.gelu(x).sum(), x)[0].float()


def backward(grad, gate, up):
    gate, up = gate.requires_grad_(), up.requires_grad_()
    return torch.stack(torch.autograd.grad(F.gelu(gate) * up, (gate, up), grad))


def dead(x, w, b):
    w = w.requires_grad_()
    # every token by itself, so that no two gradients cancel
    steps = [torch.autograd.grad(torch.relu(row @ w + b).sum(), w)[0].abs().sum(0) for row in x]
    return torch.stack(steps).sum(0) == 0


SOLUTIONS: dict[str, Callable[..., Any]] = {
    "swiglu": swiglu,
    "gelu": slope,
    "geglu": backward,
    "relu": dead,
}


def phi(x):
    return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def below(x):
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_slope(x):
    x = x.requires_grad_()
    return torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0]


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def swiglu_backward(grad, gate, up):
    gate, up = gate.requires_grad_(), up.requires_grad_()
    return torch.stack(torch.autograd.grad(F.silu(gate) * up, (gate, up), grad))


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("swiglu", lambda x, g, u, d: swiglu(x, u, g, d), "over the up projection"),
    ("swiglu", lambda x, g, u, d: (torch.sigmoid(x @ g) * (x @ u)) @ d, "a sigmoid gate"),
    ("swiglu", lambda x, g, u, d: (F.gelu(x @ g) * (x @ u)) @ d, "this is GeGLU"),
    ("swiglu", lambda x, g, u, d: (F.relu(x @ g) * (x @ u)) @ d, "this is ReGLU"),
    ("swiglu", lambda x, g, u, d: F.silu((x @ g) * (x @ u)) @ d, "over the product"),
    ("swiglu", lambda x, g, u, d: ((x @ g) * (x @ u)) @ d, "silu is missing"),
    ("swiglu", lambda x, g, u, d: (F.silu(x @ g) * F.silu(x @ u)) @ d, "over both"),
    ("swiglu", lambda x, g, u, d: (F.silu(x @ g) + x @ u) @ d, "a gate multiplies"),
    ("swiglu", lambda x, g, u, d: F.silu(x @ g) @ d, "nothing to gate"),
    ("swiglu", lambda x, g, u, d: (quick_gelu(x @ g) * (x @ u)) @ d, "sigmoid(1.702 z)"),
    ("gelu", below, "second term is missing"),
    ("gelu", lambda x: below(x) + x * torch.exp(x**2 / 2) / math.sqrt(2 * math.pi), "its sign is wrong"),
    ("gelu", lambda x: below(x) + x * phi(x) / math.sqrt(2 * math.pi), "not by 2 pi"),
    ("gelu", lambda x: below(x) + x * phi(x) / math.sqrt(2), "once too often"),
    ("gelu", lambda x: (1 + torch.erf(x)) / 2 + x * phi(x), "not erf(x)"),
    ("gelu", lambda x: below(x) + x * torch.exp(-(x**2)) / math.sqrt(2 * math.pi), "not -x**2"),
    ("gelu", lambda x: torch.autograd.grad(quick_gelu(x.requires_grad_()).sum(), x)[0], "sigmoid(1.702 x)"),
    ("gelu", lambda x: x * phi(x), "first term is missing"),
    ("gelu", lambda x: below(x) + phi(x), "factor x before"),
    ("gelu", lambda x: below(x) + x * torch.exp(-(x**2) / 2), "1 / sqrt(2 pi)"),
    ("gelu", lambda x: below(x) - x * phi(x), "the sign"),
    ("gelu", F.gelu, "GELU itself"),
    ("gelu", tanh_slope, "the tanh form"),
    ("gelu", lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))), "derivative of silu"),
    ("geglu", lambda d, g, u: backward(d, g, u).flip(0), "swapped"),
    ("geglu", lambda d, g, u: torch.stack([d * u, d * F.gelu(g)]), "lacks the slope"),
    ("geglu", lambda d, g, u: torch.stack([d * u * F.gelu(g), d * F.gelu(g)]), "where its slope belongs"),
    ("geglu", lambda d, g, u: torch.stack([d * slope(g.detach()), d * F.gelu(g)]), "lacks the factor up"),
    ("geglu", lambda d, g, u: torch.stack([d * u * below(g), d * F.gelu(g)]), "second term"),
    ("geglu", lambda d, g, u: torch.stack([d * u * slope(g.detach()), d * g]), "not gate, times grad"),
    ("geglu", lambda d, g, u: torch.stack([d * u * g * phi(g), d * F.gelu(g)]), "first term"),
    ("geglu", lambda d, g, u: torch.stack([d * u * slope(g.detach()), d * below(g)]), "not grad * Phi"),
    ("geglu", lambda d, g, u: torch.stack([d * u * slope(g), d * slope(g)]), "take gelu(gate) itself"),
    ("geglu", lambda d, g, u: torch.stack([d * u * slope(g), F.gelu(g)]), "missing in up's"),
    ("geglu", lambda d, g, u: torch.stack([u * slope(g), d * F.gelu(g)]), "missing in the gate's"),
    ("geglu", lambda d, g, u: torch.stack([u * slope(g), F.gelu(g)]), "the chain rule begins with it"),
    ("geglu", lambda d, g, u: torch.stack([d * u * (g > 0), d * torch.relu(g)]), "backward of ReGLU"),
    ("geglu", swiglu_backward, "backward of SwiGLU"),
    ("relu", lambda x, w, b: (x @ w + b > 0).any(0), "wrong way round"),
    ("relu", lambda x, w, b: (x @ w + b <= 0).any(0), "is sparse"),
    ("relu", lambda x, w, b: (x @ w + b < 0).all(0), "exactly 0"),
    ("relu", lambda x, w, b: (x @ w + b).mean(0) <= 0, "the mean"),
    ("relu", lambda x, w, b: torch.relu(x @ w + b).amax(0) < 0.1, "a small activation"),
    ("relu", lambda x, w, b: torch.relu(x @ w + b).amax(0) < 0.02, "a small activation"),
    ("relu", lambda x, w, b: ~(x @ w - b > 0).any(0), "bias is subtracted"),
    ("relu", lambda x, w, b: ~(x @ w > 0).any(0), "bias is missing"),
    ("relu", lambda x, w, b: (x @ w + b)[-1] <= 0, "only the last token"),
]


def test_a_missing_down_projection_is_named() -> None:
    """Where hidden and dim differ the shape says it, where they are equal the hint."""
    verdict = check("swiglu", lambda x, g, u, d: F.silu(x @ g) * (x @ u))
    assert verdict.state == "wrong"
    assert "w_down is missing" in verdict.message


def test_the_slope_of_relu_at_zero_is_zero_in_torch_too() -> None:
    """relu's slope at exactly 0 is a choice; torch chose 0, and so does the exercise on dead units."""
    x = torch.zeros(3, requires_grad=True)
    torch.relu(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
