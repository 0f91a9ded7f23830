"""The exercises of chapter 1: solutions pass, plausible slips get their own hint, memorised answers fail."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

SEEDS = range(8)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def multi_head(x, wq, wk, wv, wo, heads):
    def split(w):
        return (x @ w).view(len(x), heads, -1).transpose(0, 1)

    mixed = F.scaled_dot_product_attention(split(wq), split(wk), split(wv))
    return mixed.transpose(0, 1).reshape(x.shape) @ wo


def mask(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def cross(x, memory, wq, wk, wv, memory_mask):
    return F.scaled_dot_product_attention(x @ wq, memory @ wk, memory @ wv, attn_mask=memory_mask[None])


def count(dim, hidden, gated, bias):
    matrices = [(hidden, dim)] * (2 if gated else 1) + [(dim, hidden)]
    return sum(rows * columns + bias * rows for rows, columns in matrices)


def jacobian(weights, residual):
    def stack(x):
        for w in weights:
            x = w @ x + (x if residual else 0)
        return x

    return torch.autograd.functional.jacobian(stack, torch.zeros(weights.shape[-1]))


def layer_norm(x, gamma, beta, eps):
    return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)


def positions(length, dim):
    angles = torch.arange(length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def bound(gamma_q, gamma_k):
    # the largest over all unit-rms directions, by the spectrum of the bilinear form
    return math.sqrt(len(gamma_q)) * torch.linalg.matrix_norm(torch.diag(gamma_q * gamma_k), 2)


SOLUTIONS: dict[str, Callable[..., Any]] = {
    "self-attention": attend,
    "multi-head-attention": multi_head,
    "causal-mask": mask,
    "cross-attention": cross,
    "feed-forward": count,
    "residual": jacobian,
    "layer-norm": layer_norm,
    "positional-encoding": positions,
    "qk-norm": bound,
}


def softmax_by_hand(q, k, v):
    e = torch.exp(q @ k.T / math.sqrt(q.shape[-1]))
    return e / e.sum(-1, keepdim=True) @ v


def without_transpose(x, wq, wk, wv, wo, heads):
    q, k, v = ((x @ w).view(heads, len(x), -1) for w in (wq, wk, wv))
    return F.scaled_dot_product_attention(q, k, v).reshape(x.shape) @ wo


def without_merge(x, wq, wk, wv, wo, heads):
    q, k, v = ((x @ w).view(len(x), heads, -1).transpose(0, 1) for w in (wq, wk, wv))
    return F.scaled_dot_product_attention(q, k, v).reshape(x.shape) @ wo


def full_width_scale(x, wq, wk, wv, wo, heads):
    q, k, v = ((x @ w).view(len(x), heads, -1).transpose(0, 1) for w in (wq, wk, wv))
    mixed = F.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)
    return mixed.transpose(0, 1).reshape(x.shape) @ wo


def masked_after(x, memory, wq, wk, wv, memory_mask):
    weights = (x @ wq @ (memory @ wk).T * wq.shape[1] ** -0.5).softmax(-1)
    return weights * memory_mask @ (memory @ wv)


def matrix_product(weights, residual):
    total = torch.eye(weights.shape[-1])
    for w in weights:
        total = total @ (w + torch.eye(len(w)) if residual else w)
    return total


def std_norm(x, gamma, beta, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) * gamma + beta


def own_frequencies(length, dim):
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(dim) / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos())


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("self-attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1), "not divided by"),
    ("self-attention", lambda q, k, v: (q @ k.T / q.shape[-1] ** 0.5).softmax(0) @ v, "over the queries"),
    ("self-attention", lambda q, k, v: (q @ k.T / v.shape[-1] ** 0.5).softmax(-1) @ v, "width of v"),
    ("self-attention", lambda q, k, v: (q @ k.T / q.shape[-1]).softmax(-1) @ v, "by d, not by sqrt(d)"),
    ("self-attention", softmax_by_hand, "NaN"),
    ("multi-head-attention", without_transpose, "the split mixes tokens"),
    ("multi-head-attention", without_merge, "merged without transposing"),
    ("multi-head-attention", full_width_scale, "the scale uses dim"),
    (
        "multi-head-attention",
        lambda x, wq, wk, wv, wo, heads: attend(x @ wq, x @ wk, x @ wv) @ wo,
        "one wide",
    ),
    ("causal-mask", lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q - 1), "the diagonal belongs"),
    (
        "causal-mask",
        lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(),
        "first query was put at the first",
    ),
    ("causal-mask", lambda q, k: torch.ones(q, k, dtype=torch.bool).triu(k - q + 1), "wrong way round"),
    ("causal-mask", lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q + 1), "the future is open"),
    ("causal-mask", lambda q, k: torch.zeros(q, k).masked_fill(~mask(q, k), -math.inf), "True/False"),
    ("causal-mask", lambda q, k: torch.ones(q, k, dtype=torch.bool), "the future is open"),
    ("cross-attention", lambda x, m, q, k, v, keep: attend(x @ q, m @ k, m @ v), "memory_mask is not used"),
    ("cross-attention", lambda x, m, q, k, v, keep: cross(x, m, q, k, v, ~keep), "wrong way round"),
    ("cross-attention", masked_after, "mask before the softmax"),
    (
        "feed-forward",
        lambda dim, hidden, gated, bias: 2 * dim * hidden + bias * (dim + hidden),
        "three matrices",
    ),
    (
        "feed-forward",
        lambda dim, hidden, gated, bias: (3 if gated else 2) * dim * hidden,
        "biases are missing",
    ),
    ("feed-forward", lambda dim, hidden, gated, bias: count(dim, hidden, gated, True), "no biases here"),
    ("residual", matrix_product, "order is reversed"),
    ("residual", lambda w, residual: jacobian(w, False), "skip path is missing"),
    ("residual", lambda w, r: jacobian(w, False) + (torch.eye(w.shape[-1]) if r else 0), "one skip around"),
    ("layer-norm", std_norm, "torch.std's default"),
    ("layer-norm", lambda x, g, b, eps: F.rms_norm(x, x.shape[-1:], g, eps) + b, "this is RMSNorm"),
    ("layer-norm", lambda x, g, b, eps: layer_norm(x, g, b, 0.0), "eps is not used"),
    (
        "layer-norm",
        lambda x, g, b, eps: (x - x.mean(-1, True)) / (x.std(-1, False, keepdim=True) + eps) * g + b,
        "eps is added outside",
    ),
    (
        "layer-norm",
        lambda x, g, b, eps: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + eps).sqrt() * g + b,
        "divided by dim - 1",
    ),
    ("positional-encoding", own_frequencies, "cosine has a frequency of its own"),
    ("positional-encoding", lambda n, d: positions(n, 2 * d)[:, :d], "exponent is half"),
    (
        "positional-encoding",
        lambda n, d: torch.cat([positions(n, d)[:, 0::2], positions(n, d)[:, 1::2]], 1),
        "two halves",
    ),
    ("positional-encoding", lambda n, d: positions(n + 1, d)[1:], "positions start at 1"),
    ("qk-norm", lambda q, k: math.sqrt(len(q)), "the gains are missing"),
    ("qk-norm", lambda q, k: math.sqrt(len(q)) * float(q.abs().max() * k.abs().max()), "channel by channel"),
    ("qk-norm", lambda q, k: len(q) * float((q * k).abs().max()), "the scale 1/sqrt(d) is missing"),
    ("qk-norm", lambda q, k: math.sqrt(len(q)) * float((q * k).max()), "sign is lost"),
]


def test_the_bound_is_reached_and_never_passed() -> None:
    """The exercise's own reference, against a search over queries and keys."""
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(2, 8, generator=generator)
    q, k = torch.randn(2, 20000, 8, generator=generator)
    limit = bound(*gains)

    def logit(a, b):
        a, b = (g * F.rms_norm(x, (8,)) for g, x in zip(gains, (a, b), strict=True))
        return (a * b).sum(-1).abs() / math.sqrt(8)

    assert logit(q, k).max() <= limit * (1 + 1e-5)
    best = torch.eye(8)[(gains[0] * gains[1]).abs().argmax()]
    torch.testing.assert_close(logit(best, best), limit, rtol=1e-4, atol=1e-4)
