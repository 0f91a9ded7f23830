"""The exercises of chapter 19: solutions pass, plausible slips get their own hint, memorised answers fail."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_atlas.book import check


def pool(weight, heads, groups):
    return weight.unflatten(0, (groups, heads // groups, -1)).mean(1).flatten(0, 1)


def absorbed(q, c, u_k, u_v):
    moved = torch.einsum("hd,hdr->hr", q, u_k)
    weights = (moved @ c.T / math.sqrt(q.shape[1])).softmax(-1)
    return torch.einsum("hr,hdr->hd", weights @ c, u_v)


def step(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def online(
    scores,
    values,
    block,
    *,
    sum_factor=None,
    out_factor=None,
    start=-math.inf,
    own=False,
    falling=False,
    divide=True,
    tail=True,
):
    """The three running numbers; every keyword is one slip."""
    high, total, out = torch.tensor(start), torch.tensor(0.0), torch.zeros(values.shape[1])
    stop = len(scores) if tail else len(scores) // block * block
    for at in range(0, stop, block):
        part = scores[at : at + block]
        new = part.max() if falling else torch.maximum(high, part.max())
        weights = (part - (part.max() if own else new)).exp()
        factor = (high - new).exp()
        total = total * (factor if sum_factor is None else sum_factor(high, new)) + weights.sum()
        out = (
            out * (factor if out_factor is None else out_factor(high, new))
            + weights @ values[at : at + block]
        )
        high = new
    return out / total if divide else out


def window_mask(tokens, low, high):
    """True where `low` <= query - key < `high`."""
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (back >= low) & (back < high)


def seen(q, k, v, mask, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)


def local(q, k, v, window):
    return seen(q, k, v, window_mask(len(q), 0, window))


def recurrent(q, k, v):
    state, total, out = torch.zeros(k.shape[1], v.shape[1]), torch.zeros(k.shape[1]), []
    for query, key, value in zip(q, k, v, strict=True):
        state = state + torch.outer(key, value)
        total = total + key
        out.append(query @ state / (query @ total))
    return torch.stack(out)


SOLUTIONS: dict[str, Callable[..., Any]] = {
    "gqa": pool,
    "mla": absorbed,
    "mqa": step,
    "flash-2-3": online,
    "local-attention": local,
    "linear-attention": recurrent,
}


def heads_of(weight, heads):
    return weight.unflatten(0, (heads, -1))


def latent(q, c, u_k, u_v, *, scale=None, keys="hd,hdr->hr", values="hr,hdr->hd", axis=-1, soft=True):
    scores = torch.einsum(keys, q, u_k) @ c.T * (q.shape[1] ** -0.5 if scale is None else scale)
    weights = scores.softmax(axis) if soft else scores
    return torch.einsum(values, weights @ c, u_v)


def shared(q, k, v, *, scale=None, axis=-1, mask=None):
    scores = q @ k.T * (q.shape[1] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores.masked_fill(~mask(scores), -math.inf)).softmax(axis) @ v


def as_if_tokens(q, k, v):
    """A causal mask of heads against keys, the last head at the last key."""
    return shared(q, k, v, mask=lambda s: torch.ones_like(s, dtype=torch.bool).tril(max(len(k) - len(q), 0)))


def without_maximum(scores, values, block):
    out, total = 0, 0
    for part, rows in zip(scores.split(block), values.split(block), strict=True):
        out, total = out + part.exp() @ rows, total + part.exp().sum()
    return out / total


def start_clamped(scores, values, block):
    high, total, out = torch.tensor(0.0), 0, 0
    for part, rows in zip(scores.split(block), values.split(block), strict=True):
        new = torch.maximum(high, part.max())
        total = total * (high - new).exp() + (part - new).exp().sum()
        out = out * (high - new).exp() + (part - new).exp() @ rows
        high = new
    return out / total.clamp(min=1e-20)


def averaged(scores, values, block):
    parts = zip(scores.split(block), values.split(block), strict=True)
    return torch.stack([s.softmax(0) @ v for s, v in parts]).mean(0)


def filled(scores, values, block):
    missing = -len(scores) % block
    return online(F.pad(scores, (0, missing)), F.pad(values, (0, 0, 0, missing)), block)


def in_blocks(q, k, v, window, *, before=1, cut=True, causal=True, mask_padding=True):
    """Queries in blocks of `window`, which meet their own keys and those of `before` blocks."""
    missing = -len(q) % window
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    k, v = (F.pad(x, (0, 0, before * window, 0)) for x in (k, v))
    out = []
    for at in range(0, len(q), window):
        own, met = torch.arange(at, at + window)[:, None], torch.arange(at - before * window, at + window)
        back = own - met
        mask = back < (window if cut else len(k))
        if causal:
            mask = mask & (back >= 0)
        if mask_padding:
            mask = mask & (met >= 0) & (met < len(q) - missing)
        keys, values = (x[at : at + (before + 1) * window] for x in (k, v))
        out.append(seen(q[at : at + window], keys, values, mask))
    return torch.cat(out)[: len(q) - missing]


def unfolded(q, k, v, window):
    k, v = (F.pad(x, (0, 0, window - 1, 0)).unfold(0, window, 1) for x in (k, v))  # (tokens, dim, window)
    scores = torch.einsum("td,tdw->tw", q, k) / math.sqrt(q.shape[1])
    places = torch.arange(len(q))[:, None] + torch.arange(1 - window, 1)
    weights = scores.masked_fill(places < 0, -math.inf).softmax(-1)
    return torch.einsum("tw,tdw->td", weights, v)


def token_by_token(q, k, v, window):
    rows = []
    for t in range(len(q)):
        span = slice(max(0, t - window + 1), t + 1)
        rows.append((k[span] @ q[t] / math.sqrt(q.shape[1])).softmax(0) @ v[span])
    return torch.stack(rows)


def itself_left_out(q, k, v, window):
    scores = q @ k.T / math.sqrt(q.shape[1])
    return scores.masked_fill(~window_mask(len(q), 1, window + 1), -math.inf).softmax(-1) @ v


def zero_scores(q, k, v, window):
    return (q @ k.T / math.sqrt(q.shape[1]) * window_mask(len(q), 0, window)).softmax(-1) @ v


def mask_last(q, k, v, window):
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(-1) * window_mask(len(q), 0, window) @ v


def no_softmax(q, k, v, window):
    return q @ k.T / math.sqrt(q.shape[1]) * window_mask(len(q), 0, window) @ v


def looped(q, k, v, *, late_state=False, late_total=False, old_state=1.0, old_total=1.0, of=None, eps=0.0):
    """The recurrence with its slips: what is read late, what is kept of the old, what the sum is divided by."""
    state, total, out = torch.zeros(k.shape[1], v.shape[1]), torch.zeros(k.shape[1]), []
    for t, (query, key, value) in enumerate(zip(q, k, v, strict=True)):
        new_state, new_total = old_state * state + torch.outer(key, value), old_total * total + key
        top = query @ (state if late_state else new_state)
        bottom = query @ (total if late_total else new_total) + eps
        out.append(top / (bottom if of is None else of(t, new_total)))
        state, total = new_state, new_total
    return torch.stack(out)


def chunked(q, k, v, chunk=2):
    """The other form: products inside a chunk, a state between chunks."""
    v = torch.cat([v, torch.ones(len(v), 1)], dim=1)
    state, out = torch.zeros(k.shape[1], v.shape[1]), []
    for a, b, c in zip(q.split(chunk), k.split(chunk), v.split(chunk), strict=True):
        out.append(a @ state + (a @ b.T).tril() @ c)
        state = state + b.T @ c
    out = torch.cat(out)
    return out[:, :-1] / out[:, -1:]


def parallel(q, k, v):
    weights = (q @ k.T).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def all_at_once(q, k, v):
    return q @ (k.T @ v) / (q @ k.sum(0))[:, None]


def cumulated(q, k, v, *, top=True, bottom=True):
    states, totals = k[:, :, None] * v[:, None], k
    states = states.cumsum(0) if top else states.sum(0, keepdim=True).expand_as(states)
    totals = totals.cumsum(0) if bottom else totals.sum(0, keepdim=True).expand_as(totals)
    return torch.einsum("td,tde->te", q, states) / torch.einsum("td,td->t", q, totals)[:, None]


def outer_turned(q, k, v):
    state, total, out = 0, 0, []
    for query, key, value in zip(q, k, v, strict=True):
        state, total = state + torch.outer(value, key), total + key
        out.append(query @ state / (query @ total))
    return torch.stack(out)


RIGHT: list[tuple[str, Callable[..., Any]]] = [
    ("gqa", lambda w, h, g: torch.cat([sum(p.chunk(h // g)) / (h // g) for p in w.chunk(g)])),
    (
        "gqa",
        lambda w, h, g: torch.einsum("gmdf->gdf", w.view(g, h // g, -1, w.shape[1])).flatten(0, 1) / (h // g),
    ),
    ("mla", latent),
    ("mla", lambda q, c, u_k, u_v: seen(q[:, None], c @ u_k.mT, c @ u_v.mT, None)[:, 0]),
    ("mqa", shared),
    ("mqa", lambda q, k, v: torch.stack([(k @ row / math.sqrt(len(row))).softmax(0) @ v for row in q])),
    ("flash-2-3", lambda s, v, block: online(s, v, block, start=-1e30)),
    ("flash-2-3", lambda s, v, block: online(s, v, 1)),
    ("local-attention", in_blocks),
    ("local-attention", unfolded),
    ("local-attention", token_by_token),
    ("linear-attention", looped),
    ("linear-attention", lambda q, k, v: looped(q, k, v, eps=1e-6)),
    ("linear-attention", parallel),
    ("linear-attention", chunked),
    ("linear-attention", cumulated),
]

WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("gqa", lambda w, h, g: w, "nothing was pooled"),
    ("gqa", lambda w, h, g: w.unflatten(0, (h // g, g, -1)).mean(0).flatten(0, 1), "dealt out"),
    ("gqa", lambda w, h, g: w.unflatten(0, (g, h // g, -1)).mean(0).flatten(0, 1), "runs over the groups"),
    ("gqa", lambda w, h, g: w.unflatten(0, (-1, h // g)).mean(1), "neighbouring rows were averaged"),
    (
        "gqa",
        lambda w, h, g: w.unflatten(0, (-1, g, h // g)).mean(2).transpose(0, 1).flatten(0, 1),
        "split as (head_dim, heads)",
    ),
    ("gqa", lambda w, h, g: pool(w, h, g) * (h // g), "were added up"),
    ("gqa", lambda w, h, g: pool(w, h, g) * (h // g) / g, "divided by the number of groups"),
    ("gqa", lambda w, h, g: heads_of(w, h)[:: h // g].flatten(0, 1), "only the first head of each group"),
    ("gqa", lambda w, h, g: heads_of(w, h)[h // g - 1 :: h // g].flatten(0, 1), "only the last head of each"),
    ("gqa", lambda w, h, g: heads_of(w, h)[:g].flatten(0, 1), "only the first heads were kept"),
    ("gqa", lambda w, h, g: heads_of(w, h).mean(0), "one group"),
    ("gqa", lambda w, h, g: heads_of(w, h).mean(0).repeat(g, 1), "which every group got a copy of"),
    (
        "gqa",
        lambda w, h, g: heads_of(pool(w, h, g), g).repeat_interleave(h // g, 0).flatten(0, 1),
        "repeated for every head",
    ),
    ("mla", lambda q, c, u_k, u_v: latent(q, c, u_k, u_v, scale=c.shape[1] ** -0.5), "uses the rank"),
    ("mla", lambda *a: latent(*a, scale=1.0), "not divided by sqrt(head_dim)"),
    ("mla", lambda q, c, u_k, u_v: latent(q, c, u_k, u_v, scale=1 / q.shape[1]), "not by its root"),
    ("mla", lambda q, c, u_k, u_v: latent(q, c, u_k, u_v, scale=q.numel() ** -0.5), "all heads together"),
    ("mla", lambda *a: latent(*a, axis=0), "runs over the heads"),
    ("mla", lambda *a: latent(*a, soft=False), "not put through a softmax"),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_k, u_k), "values were made by u_k"),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_v, u_v), "keys were made by u_v"),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_v, u_k), "u_k and u_v are swapped"),
    (
        "mla",
        lambda q, c, u_k, u_v: (
            (torch.einsum("hd,hdr->hr", q, u_k) @ c.T / math.sqrt(q.shape[1])).softmax(-1) @ c
        ),
        "still a mean of small vectors",
    ),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_k, u_v.roll(1, 0)), "came from the u_v of another head"),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_k, u_v.roll(-1, 0)), "came from the u_v of another head"),
    ("mla", lambda *a: latent(*a[:3], a[3][0], values="hr,dr->hd"), "came from the u_v of another head"),
    ("mla", lambda *a: latent(*a, values="hr,gdr->hd"), "u_v of all heads, added up"),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_k.roll(1, 0), u_v), "moved by the u_k of another head"),
    ("mla", lambda q, c, u_k, u_v: absorbed(q, c, u_k.roll(-1, 0), u_v), "moved by the u_k of another head"),
    (
        "mla",
        lambda q, c, u_k, u_v: latent(q, c, u_k[0], u_v, keys="hd,dr->hr"),
        "moved by the u_k of another",
    ),
    ("mla", lambda *a: latent(*a, keys="hd,gdr->hr"), "u_k of all heads, added up"),
    ("mqa", lambda *a: shared(*a, scale=1.0), "not divided by sqrt(head_dim)"),
    ("mqa", lambda q, k, v: shared(q, k, v, scale=1 / q.shape[1]), "not by its root"),
    ("mqa", lambda q, k, v: shared(q, k, v, scale=q.numel() ** -0.5), "all heads together"),
    ("mqa", lambda *a: shared(*a, axis=0), "runs over the heads"),
    ("mqa", lambda q, k, v: q @ k.T / math.sqrt(q.shape[1]) @ v, "not put through a softmax"),
    ("mqa", lambda q, k, v: step(q, v, k), "k and v are swapped"),
    ("mqa", lambda q, k, v: step(q, k, k), "the weights mix the keys"),
    ("mqa", lambda q, k, v: step(q.mean(0, keepdim=True).expand_as(q), k, v), "queries were averaged"),
    ("mqa", lambda q, k, v: step(q[:1], k, v).expand_as(q), "first head's query was used"),
    ("mqa", lambda q, k, v: step(q, k, v).mean(0), "the heads were averaged"),
    ("mqa", lambda q, k, v: step(q, k, v).flatten(), "laid end to end"),
    ("mqa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal mask was laid"),
    ("mqa", as_if_tokens, "causal mask was laid"),
    ("flash-2-3", lambda *a: online(*a, sum_factor=lambda old, new: 1), "the old sum was not rescaled"),
    ("flash-2-3", lambda *a: online(*a, out_factor=lambda old, new: 1), "the old output was not rescaled"),
    (
        "flash-2-3",
        lambda *a: online(*a, sum_factor=lambda old, new: 1, out_factor=lambda old, new: 1),
        "neither the old sum nor the old output",
    ),
    (
        "flash-2-3",
        lambda *a: online(*a, **dict.fromkeys(("sum_factor", "out_factor"), lambda o, n: (n - o).exp())),
        "NaN from the first block on",
    ),
    (
        "flash-2-3",
        lambda *a: online(
            *a,
            start=-99.0,
            **dict.fromkeys(("sum_factor", "out_factor"), lambda o, n: (n - o).exp() if o > -99 else 0),
        ),
        "upside down",
    ),
    ("flash-2-3", averaged, "normalised by itself"),
    ("flash-2-3", lambda *a: online(*a, divide=False), "final division by the sum is missing"),
    ("flash-2-3", lambda s, v, block: s[-block:].softmax(0) @ v[-block:], "only the last block"),
    ("flash-2-3", lambda s, v, block: s[:block].softmax(0) @ v[:block], "only the first block"),
    ("flash-2-3", lambda *a: online(*a, own=True), "from its own maximum"),
    ("flash-2-3", lambda *a: online(*a, tail=False), "was forgotten"),
    ("flash-2-3", filled, "filled up with zeros"),
    ("flash-2-3", without_maximum, "exp overflowed"),
    ("flash-2-3", lambda s, v, block: s.exp() / s.exp().sum() @ v, "exp overflowed"),
    ("flash-2-3", lambda *a: online(*a, start=0.0), "has to start at -inf"),
    ("flash-2-3", start_clamped, "has to start at -inf"),
    ("flash-2-3", lambda *a: online(*a, falling=True), "the maximum of the block replaced"),
    ("local-attention", lambda q, k, v, n: local(q, k, v, n + 1), "one token too many"),
    ("local-attention", lambda q, k, v, n: local(q, k, v, n - 1), "one token too few"),
    ("local-attention", itself_left_out, "does not see itself"),
    ("local-attention", lambda *a: itself_left_out(*a).nan_to_num(nan=0.0), "does not see itself"),
    ("local-attention", lambda q, k, v, n: seen(q, k, v, window_mask(len(q), 1 - n, n)), "reaches ahead"),
    (
        "local-attention",
        lambda q, k, v, n: seen(q, k, v, window_mask(len(q), 1 - n, 1)),
        "window looks ahead",
    ),
    ("local-attention", lambda q, k, v, n: seen(q, k, v, None, is_causal=True), "window was not used"),
    ("local-attention", lambda q, k, v, n: step(q, k, v), "nothing is masked"),
    ("local-attention", lambda *a: in_blocks(*a, before=0), "does not look into the one before"),
    ("local-attention", lambda *a: in_blocks(*a, cut=False), "the whole previous block is seen"),
    ("local-attention", lambda *a: in_blocks(*a, causal=False), "the blocks are not causal"),
    ("local-attention", lambda *a: in_blocks(*a, mask_padding=False), "keys of padding take weight"),
    ("local-attention", zero_scores, "masked scores were set to 0"),
    ("local-attention", mask_last, "the mask came after the softmax"),
    ("local-attention", lambda q, k, v, n: local(q * q.shape[1] ** 0.5, k, v, n), "not divided by sqrt(dim)"),
    ("local-attention", lambda q, k, v, n: local(q * q.shape[1] ** -0.5, k, v, n), "not by its root"),
    ("local-attention", no_softmax, "not put through a softmax"),
    ("linear-attention", lambda *a: looped(*a, of=lambda t, z: 1), "the normaliser is missing"),
    (
        "linear-attention",
        lambda *a: looped(*a, late_state=True, late_total=True),
        "the state was read before",
    ),
    (
        "linear-attention",
        lambda *a: looped(*a, late_state=True, late_total=True, eps=1e-9),
        "the state was read before",
    ),
    ("linear-attention", lambda *a: looped(*a, late_state=True), "S was read before"),
    ("linear-attention", lambda *a: looped(*a, late_total=True), "z was read before"),
    ("linear-attention", all_at_once, "not causal: every token saw"),
    ("linear-attention", lambda *a: cumulated(*a, bottom=False), "takes in later keys"),
    ("linear-attention", lambda *a: cumulated(*a, top=False), "S is not: the values of later tokens"),
    ("linear-attention", lambda *a: looped(*a, old_state=0, old_total=0), "the state was replaced"),
    ("linear-attention", lambda *a: looped(*a, old_state=0), "S was replaced"),
    ("linear-attention", lambda *a: looped(*a, old_total=0), "z was replaced"),
    ("linear-attention", lambda *a: looped(*a, of=lambda t, z: t + 1), "number of tokens so far"),
    ("linear-attention", lambda *a: looped(*a, of=lambda t, z: z.sum()), "sum of the keys' features"),
    ("linear-attention", lambda q, k, v: recurrent(q.flip(0), k.flip(0), v.flip(0)).flip(0), "look ahead"),
    ("linear-attention", lambda q, k, v: recurrent(F.elu(q) + 1, F.elu(k) + 1, v), "mapped once more"),
    ("linear-attention", lambda *a: seen(*a, None, is_causal=True), "this is softmax"),
    ("linear-attention", lambda *a: seen(*a, None, is_causal=True, scale=1.0), "this is softmax"),
    ("linear-attention", step, "this is softmax"),
    ("linear-attention", outer_turned, "the outer product is transposed"),
]


@pytest.mark.parametrize(("concept", "answer"), RIGHT)
def test_another_way_to_the_same_result_passes(concept: str, answer: Callable[..., Any]) -> None:
    for seed in range(4):
        verdict = check(concept, answer, seed=seed)
        assert verdict, verdict


def test_the_counterexample_of_an_overflow_shows_the_large_scores() -> None:
    lines = dict(
        line.split(maxsplit=1) for line in check("flash-2-3", without_maximum).message.split("\n")[1:]
    )
    assert min(eval(lines["scores"])) > 400
    assert "nan" in lines["got"]
