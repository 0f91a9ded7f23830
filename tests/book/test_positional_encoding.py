"""The exercises of chapter 2: solutions pass, plausible slips get their own hint, memorised answers fail."""

import math
from collections.abc import Callable
from typing import Any

import torch

SEEDS = range(8)


def pairs(x, positions, base):
    """Feature i and i + dim/2 as one complex number, turned."""
    theta = base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    return torch.complex(first, second) * torch.polar(torch.ones(()), positions[:, None] * theta)


def rotate(x, positions, base):
    turned = pairs(x, positions, base)
    return torch.cat([turned.real, turned.imag], dim=-1)


def interleaved(x, positions, base):
    theta = base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    z = torch.complex(x[:, 0::2], x[:, 1::2]) * torch.polar(torch.ones(()), positions[:, None] * theta)
    return torch.stack([z.real, z.imag], dim=-1).flatten(1)


def embed(ids, tokens, table, start):
    return torch.nn.functional.embedding(ids, tokens) + table[start : start + ids.shape[1]]


def table_of(length, dim):
    angle = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def shift(n, dim):
    blocks = []
    for i in range(dim // 2):
        a = torch.tensor(n / 10000 ** (2 * i / dim))
        blocks.append(torch.stack([a.cos(), a.sin(), -a.sin(), a.cos()]).view(2, 2))
    return torch.block_diag(*blocks)


def alibi(heads, tokens):
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
    at = torch.arange(tokens)
    bias = -slopes[:, None, None] * (at[:, None] - at)
    return bias.masked_fill(at > at[:, None], -math.inf)


def bucket(distance, buckets, max_distance):
    e = buckets // 2
    far = e + (torch.log(distance.clamp(min=1) / e) / math.log(max_distance / e) * (buckets - e)).floor()
    return torch.where(distance < e, distance, far.long().clamp(max=buckets - 1))


def probe(hidden, positions, fresh):
    one = torch.nn.functional.pad(hidden, (0, 1), value=1.0)
    return torch.nn.functional.pad(fresh, (0, 1), value=1.0) @ torch.linalg.pinv(one) @ positions


SOLUTIONS: dict[str, Callable[..., Any]] = {
    "rope": rotate,
    "learned-positions": embed,
    "sinusoidal": shift,
    "alibi": alibi,
    "relative-position": bucket,
    "nope": probe,
}


def rounded_bucket(distance, buckets, max_distance):
    e = buckets // 2
    far = e + (torch.log(distance.clamp(min=1) / e) / math.log(max_distance / e) * (buckets - e)).round()
    return torch.where(distance < e, distance, far.long().clamp(max=buckets - 1))


def without_intercept(hidden, positions, fresh):
    return fresh @ torch.linalg.lstsq(hidden, positions[:, None]).solution[:, 0]


def centred_fresh(hidden, positions, fresh):
    w = torch.linalg.pinv(hidden - hidden.mean(0)) @ (positions - positions.mean())
    return (fresh - fresh.mean(0)) @ w + positions.mean()


def every_head(bias):
    return lambda heads, tokens: bias(tokens)[None].expand(heads, -1, -1)


def unsigned(x, positions, base):
    """The common rotate-half form, with the sign of one half forgotten."""
    angle = positions[:, None] * base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def steep(heads, tokens):
    slopes = 2.0 ** (-8 / torch.arange(1, heads + 1))
    at = torch.arange(tokens)
    return (-slopes[:, None, None] * (at[:, None] - at)).masked_fill(at > at[:, None], -math.inf)


def unfloored(distance, buckets, max_distance):
    e = buckets // 2
    far = e + torch.log(distance.clamp(min=e) / e) / math.log(max_distance / e) * (buckets - e)
    return torch.where(distance < e, distance, far.clamp(max=buckets - 1))


def halved(distance, buckets, max_distance):
    e = buckets / 2
    far = e + (torch.log(distance.clamp(min=e) / e) / math.log(max_distance / e) * (buckets - e)).floor()
    return torch.where(distance < e, distance, far.clamp(max=buckets - 1)).long()


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("rope", interleaved, "interleaved layout"),
    ("rope", lambda x, p, base: rotate(x, -p, base), "wrong way"),
    ("rope", lambda x, p, base: rotate(x, torch.arange(len(x)), base), "positions are not used"),
    ("rope", lambda x, p, base: rotate(x, p, base**0.5), "exponent is half"),
    ("rope", lambda x, p, base: rotate(x, p, 1 / base), "exponent is negative"),
    ("rope", lambda x, p, base: rotate(x, p, 10000.0), "base is not used"),
    ("rope", lambda x, p, base: rotate(x, p, 1.0), "same angle"),
    ("rope", lambda x, p, base: rotate(x, p[:1].expand(len(p)), base), "all tokens are turned alike"),
    ("rope", lambda x, p, base: x, "nothing is turned"),
    ("learned-positions", lambda i, t, p, s: t[i], "positions are missing"),
    ("learned-positions", lambda i, t, p, s: t[i] + p[: i.shape[1]], "start is not used"),
    ("learned-positions", lambda i, t, p, s: t[i] + p[i], "read by id"),
    ("learned-positions", lambda i, t, p, s: t[i] + p[s], "place of the first one"),
    ("learned-positions", lambda i, t, p, s: embed(i, t, p, s + 1), "start at 1"),
    (
        "learned-positions",
        lambda i, t, p, s: t[i] + p[s : s + i.numel()].clone().resize_(*i.shape, p.shape[1]),
        "run through the batch",
    ),
    ("sinusoidal", lambda n, d: shift(n, d).T, "shifts back"),
    ("sinusoidal", lambda n, d: shift(-n, d), "shifts back"),
    (
        "sinusoidal",
        lambda n, d: shift(n, d)[(o := [*range(0, d, 2), *range(1, d, 2)])][:, o],
        "two halves",
    ),
    ("sinusoidal", lambda n, d: shift(1, d), "n is not used"),
    ("sinusoidal", lambda n, d: torch.block_diag(*[shift(n, 2)] * (d // 2)), "same angle"),
    ("sinusoidal", lambda n, d: shift(n, 2 * d)[:d, :d], "exponent is half"),
    ("alibi", lambda h, t: alibi(h, t).nan_to_num(neginf=0.0), "future is open"),
    ("alibi", lambda h, t: -alibi(h, t).masked_fill(alibi(h, t) == -math.inf, math.inf), "sign is wrong"),
    ("alibi", lambda h, t: alibi(h, t).mT, "swapped"),
    ("alibi", lambda h, t: alibi(h, t) * 2 ** (8 / h), "begin at 1"),
    ("alibi", lambda h, t: alibi(h, t).flip(0), "in reverse"),
    ("alibi", lambda h, t: alibi(8, t)[:h] if h < 8 else alibi(h, t), "those of 8 heads"),
    ("alibi", every_head(lambda t: alibi(1, t)[0] * 256), "slope 1"),
    ("relative-position", lambda d, b, m: d.clamp(max=b - 1), "clipped distances"),
    ("relative-position", rounded_bucket, "nearest bin"),
    (
        "relative-position",
        lambda d, b, m: torch.where(d < b // 2, d, bucket(d, b, m) - b // 2),
        "counted from 0",
    ),
    (
        "relative-position",
        lambda d, b, m: torch.where(
            d < b // 2,
            d,
            b // 2 + ((2 * d / b).clamp(min=1).log() / math.log(2 * m / b) * (b - b // 2)).long(),
        ),
        "pass the last bucket",
    ),
    ("rope", unsigned, "one sign is missing"),
    ("rope", lambda x, p, base: rotate(x, torch.deg2rad(p.float()), base), "radians already"),
    ("learned-positions", lambda i, t, p, s: t[i] + p[s : s + i.shape[0]], "counted the texts"),
    ("sinusoidal", lambda n, d: shift(abs(n), d), "n may be negative"),
    ("alibi", lambda h, t: alibi(h, t).nan_to_num(neginf=-1e9), "needs -inf"),
    ("alibi", lambda h, t: alibi(h, t).clamp(min=torch.finfo(torch.float32).min), "needs -inf"),
    ("alibi", lambda h, t: alibi(h, t) - alibi(h, t)[:, :, :1].nan_to_num(), "same softmax"),
    ("alibi", lambda h, t: alibi(h, t).masked_fill(torch.eye(t).bool(), -math.inf), "look at itself"),
    ("alibi", steep, "not -8 / (h + 1)"),
    ("relative-position", lambda d, b, m: bucket(d, b, m).float(), "return whole numbers"),
    ("relative-position", unfloored, "use floor"),
    ("relative-position", halved, "e is buckets // 2"),
    ("nope", without_intercept, "b is missing"),
    ("nope", lambda h, p, f: probe(h, p, h), "for fresh were asked"),
    ("nope", lambda h, p, f: p.mean().expand(len(f)), "w is not used"),
    ("nope", centred_fresh, "centred by its own mean"),
]


def test_the_references_hold_what_the_chapter_says_of_them() -> None:
    """Scores after `rotate` see the distance alone, and `shift` moves every row of the sinusoidal table."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, generator=generator).double()
    at = torch.tensor
    near, far = (rotate(q, at([m]), 100.0) @ rotate(k, at([n]), 100.0).T for m, n in ((5, 2), (905, 902)))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)
    table = table_of(60, 12)
    torch.testing.assert_close(table[:-7] @ shift(7, 12).double().T, table[7:], rtol=1e-5, atol=1e-5)
