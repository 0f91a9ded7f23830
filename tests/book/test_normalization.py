"""The exercises of chapter 17: solutions pass, plausible slips get their own hint, memorised answers fail."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from llm_atlas.book import check

SEEDS = range(8)


def rms_norm(x, gamma, eps):
    return F.rms_norm(x, x.shape[-1:], gamma, eps)


def backward(grad, x, gamma, eps):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.layer_norm(x, x.shape[-1:], gamma, None, eps), x, grad)[0]


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=0.0)


def stack(x, weights, placement):
    layers = {
        "pre": lambda x, w: x + torch.tanh(w @ norm(x)),
        "post": lambda x, w: norm(x + torch.tanh(w @ x)),
        "sandwich": lambda x, w: x + norm(torch.tanh(w @ norm(x))),
    }
    for w in weights:
        x = layers[placement](x, w)
    return x


def dropout(x, u, p, training):
    return x * (u >= p) / (1 - p) if training else x


SOLUTIONS: dict[str, Callable[..., Any]] = {
    "rmsnorm": rms_norm,
    "layernorm": backward,
    "pre-post-ln": stack,
    "dropout": dropout,
}


def statistics_fixed(grad, x, gamma, eps):
    return grad * gamma / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def projected(grad, x, gamma, eps, *, mean=True, scale=True):
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, g = centred * inverse, grad * gamma
    off_mean = g.mean(-1, keepdim=True) if mean else 0
    off_scale = normed * (g * normed).mean(-1, keepdim=True) if scale else 0
    return inverse * (g - off_mean - off_scale)


def rms_backward(grad, x, gamma, eps):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.rms_norm(x, x.shape[-1:], gamma, eps), x, grad)[0]


def always(placement):
    return lambda x, weights, _: stack(x, weights, placement)


def entrance_forgotten(x, weights, placement):
    if placement != "sandwich":
        return stack(x, weights, placement)
    for w in weights:
        x = x + norm(torch.tanh(w @ x))
    return x


def sum_normalised_as_well(x, weights, placement):
    if placement != "sandwich":
        return stack(x, weights, placement)
    for w in weights:
        x = norm(x + torch.tanh(w @ norm(x)))
    return x


def final_norm(x, weights, placement):
    return norm(stack(x, weights, placement))


def no_sum(x, weights, placement):
    for w in weights:
        branch = torch.tanh(w @ (x if placement == "post" else norm(x)))
        x = branch if placement == "pre" else norm(branch)
    return x


def skip_normalised(x, weights, placement):
    if placement == "post":
        return stack(x, weights, placement)
    for w in weights:
        branch = torch.tanh(w @ norm(x))
        x = norm(x) + (branch if placement == "pre" else norm(branch))
    return x


def branch_normalised(x, weights, placement):
    if placement != "post":
        return stack(x, weights, placement)
    for w in weights:
        x = x + norm(torch.tanh(w @ x))
    return x


def layer_normed(x, weights, placement):
    def n(x):
        return F.layer_norm(x, x.shape, eps=0.0)

    for w in weights:
        branch = torch.tanh(w @ (x if placement == "post" else n(x)))
        branch = n(branch) if placement == "sandwich" else branch
        x = n(x + branch) if placement == "post" else x + branch
    return x


def by_hand(grad, x, gamma, eps, *, axis=-1, keep=True, correction=0, second=torch.mean, hat=None):
    centred = x - x.mean(axis, keep)
    inverse = (centred.var(axis, correction=correction, keepdim=keep) + eps).rsqrt()
    normed, g = {None: centred * inverse, "x": x, "centred": centred}[hat], grad * gamma
    return inverse * (g - g.mean(axis, keep) - normed * second(g * normed, axis, keep))


def without_tanh(x, weights, placement):
    for w in weights:
        x = x + w @ norm(x)
    return x


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("rmsnorm", lambda x, g, eps: F.layer_norm(x, x.shape[-1:], g, None, eps), "this is LayerNorm"),
    ("rmsnorm", lambda x, g, eps: x / (x.var(-1, False, keepdim=True) + eps).sqrt() * g, "spread around"),
    ("rmsnorm", lambda x, g, eps: x / (x.square().sum(-1, True) + eps).sqrt() * g, "not averaged"),
    ("rmsnorm", lambda x, g, eps: x / x.norm(dim=-1, keepdim=True) * g, "vector's length"),
    ("rmsnorm", lambda x, g, eps: x / (x.square().mean(-1) + eps).sqrt() * g, "keepdim=True is missing"),
    ("rmsnorm", lambda x, g, eps: x / (x.square().mean() + eps).sqrt() * g, "over all tokens"),
    ("rmsnorm", lambda x, g, eps: x / (x.square().mean(-1, True).sqrt() + eps) * g, "outside the root"),
    ("rmsnorm", lambda x, g, eps: F.rms_norm(x, x.shape[-1:], g, 0.0), "eps is not used"),
    ("rmsnorm", lambda x, g, eps: x / (x.square().mean(-1, True) + eps) * g, "not by its root"),
    ("rmsnorm", lambda x, g, eps: x / (x.square().mean(0, True) + eps).sqrt() * g, "over the tokens"),
    ("rmsnorm", lambda x, g, eps: F.rms_norm(x, x.shape[-1:], None, eps), "gamma is missing"),
    ("rmsnorm", lambda x, g, eps: F.rms_norm(x, x.shape[-1:], None, eps) + g, "gamma is added"),
    (
        "rmsnorm",
        lambda x, g, eps: x / (x.square().mean(-1, True) + eps * x.abs().sum().sign()).sqrt() * g,
        "NaN",
    ),
    ("layernorm", statistics_fixed, "held fixed"),
    ("layernorm", lambda *a: projected(*a, mean=False), "mean direction is still there"),
    ("layernorm", lambda *a: projected(*a, scale=False), "normalised token is still there"),
    ("layernorm", rms_backward, "backward of RMSNorm"),
    ("layernorm", lambda grad, x, g, eps: backward(grad, x, torch.ones_like(g), eps), "gamma is missing"),
    ("layernorm", lambda grad, x, g, eps: backward(grad, x, torch.ones_like(g), eps) * g, "applied last"),
    (
        "layernorm",
        lambda grad, x, g, eps: backward(grad, x, g, eps) * (x.var(-1, False, keepdim=True) + eps).sqrt(),
        "deviation is missing",
    ),
    ("layernorm", lambda grad, x, g, eps: backward(grad, x, g, 0.0), "eps is not used"),
    ("layernorm", lambda *a: by_hand(*a, keep=False), "keepdim=True is missing"),
    ("layernorm", lambda *a: by_hand(*a, axis=(0, 1)), "run over all tokens"),
    ("layernorm", lambda *a: by_hand(*a, correction=1), "divides by n - 1"),
    ("layernorm", lambda *a: by_hand(*a, second=torch.sum), "second projection adds up"),
    ("layernorm", lambda *a: by_hand(*a, hat="x"), "x stands where"),
    ("layernorm", lambda *a: by_hand(*a, hat="centred"), "x - mean stands where"),
    ("pre-post-ln", skip_normalised, "the skip path was normalised too"),
    ("pre-post-ln", branch_normalised, "only the branch was normalised"),
    ("pre-post-ln", layer_normed, "the mean was taken off"),
    ("pre-post-ln", lambda x, w, placement: stack(x, w[:1], placement), "only the first layer"),
    ("pre-post-ln", lambda x, w, placement: stack(x, w[-1:], placement), "only the last layer"),
    ("dropout", lambda x, u, p, training: x * (u < p) / p if training and p else x, "rate of keeping"),
    ("dropout", lambda x, u, p, training: F.dropout(x, p, training), "use u, draw nothing"),
    ("dropout", lambda x, u, p, training: dropout(x, u, p, training) if p else x + 7, "is off"),
    ("pre-post-ln", always("pre"), "this is pre-norm"),
    ("pre-post-ln", always("post"), "this is post-norm"),
    ("pre-post-ln", always("sandwich"), "this is the sandwich"),
    ("pre-post-ln", entrance_forgotten, "at its end alone"),
    ("pre-post-ln", sum_normalised_as_well, "leaves the sum alone"),
    ("pre-post-ln", final_norm, "one norm too many"),
    ("pre-post-ln", no_sum, "the residual sum is missing"),
    ("pre-post-ln", lambda x, w, placement: stack(x, w.mT, placement), "used transposed"),
    ("pre-post-ln", without_tanh, "tanh of the sublayer is missing"),
    ("dropout", lambda x, u, p, training: x * (u >= p) if training else x, "was not rescaled"),
    ("dropout", lambda x, u, p, training: x * (u >= p) * (1 - p) if training else x, "multiplies by 1 - p"),
    ("dropout", lambda x, u, p, training: x * (u < p) / (1 - p) if training else x, "wrong way round"),
    ("dropout", lambda x, u, p, training: x * (u >= p) / p if training else x, "divides by p"),
    ("dropout", lambda x, u, p, training: x, "nothing was dropped"),
    ("dropout", lambda x, u, p, training: x * (u >= p) / (1 - p), "must be the identity"),
    ("dropout", lambda x, u, p, training: x * (u >= p) if training else x * (1 - p), "was not rescaled"),
    (
        "dropout",
        lambda x, u, p, training: x * (u >= p) / (1 - p) if training else x * (1 - p),
        "has done that already",
    ),
]


def test_another_way_to_the_same_gradient_passes() -> None:
    assert check("layernorm", projected)
