"""The exercises of chapter 3: solutions pass, plausible slips get their own hint, memorised answers fail."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_atlas.book import check
from llm_atlas.models import ledger
from llm_atlas.models.decoder import DecoderConfig
from llm_atlas.nn import moe

SEEDS = range(8)


def count(vocab, dim, layers, heads, kv_heads, hidden, tied):
    kv_dim = dim // heads * kv_heads
    attention = 2 * dim * dim + 2 * dim * kv_dim
    layer = attention + 3 * dim * hidden + 2 * dim
    return vocab * dim * (1 if tied else 2) + layers * layer + dim


def similarity(hidden, keep):
    kept = hidden * keep[..., None]
    mean = kept.sum(1) / keep.sum(1, keepdim=True)
    unit = F.normalize(mean, dim=-1)
    return unit @ unit.T


def masks(source_positions, target_positions):
    source, target = source_positions >= 0, target_positions >= 0
    n, m = source.shape[1], target.shape[1]
    encoder = source[:, None].expand(-1, n, n)
    past = target_positions[:, None] <= target_positions[..., None]
    cross = source[:, None].expand(-1, m, n)
    return encoder, past & target[:, None], cross


def route(logits, active, capacity):
    top, chosen = logits.softmax(-1).topk(active)
    top = top / top.sum(-1, keepdim=True)
    weights, taken = torch.zeros_like(logits), [0] * logits.shape[1]
    for choice in range(active):
        for token in range(len(logits)):
            expert = int(chosen[token, choice])
            if taken[expert] < capacity:
                taken[expert] += 1
                weights[token, expert] = top[token, choice]
    return weights


def force(logits, history, open, close, wait, least, most):
    if open not in history:
        return logits
    thought = history[len(history) - history[::-1].index(open) :]
    if close in thought:
        return logits
    if len(thought) >= most:
        token = close
    elif len(thought) < least and logits.argmax() == close:
        token = wait
    else:
        return logits
    forced = torch.full_like(logits, -torch.inf)
    forced[token] = logits[token]
    return forced


def splice(ids, embeddings, images, image_token):
    places, patches = ids == image_token, images.flatten(0, 1)
    if places.sum() != len(patches):
        raise ValueError(f"{places.sum()} places for {len(patches)} patches")
    out = embeddings.clone()
    out[places] = patches
    return out


SOLUTIONS: dict[str, Callable[..., Any]] = {
    "decoder-only": count,
    "encoder-only": similarity,
    "encoder-decoder": masks,
    "mixture-of-experts": route,
    "reasoning-model": force,
    "multimodal": splice,
}


def counted(
    *,
    kv=None,
    out=True,
    matrices=3,
    norms=2,
    last=1,
    gain=1,
    head=None,
    embed=True,
    bias=None,
    q=1,
    more=None,
):
    """The count with its slips, each a keyword."""

    def count(vocab, dim, layers, heads, kv_heads, hidden, tied):
        size = dim // heads
        kv_dim = size * kv_heads if kv is None else kv(dim, heads, kv_heads)
        layer = q * dim * dim + dim * dim * out + 2 * dim * kv_dim + matrices * dim * hidden
        if bias is not None:
            layer += bias(dim, size * kv_heads, hidden)
        tables = embed + ((not tied) if head is None else head)
        total = vocab * dim * tables + layers * (layer + norms * gain * dim) + last * gain * dim
        return total + (more(vocab, dim, layers, size) if more else 0)

    return count


def one_layer(vocab, dim, layers, heads, kv_heads, hidden, tied):
    return count(vocab, dim, 1, heads, kv_heads, hidden, tied)


def wide_heads(vocab, dim, layers, heads, kv_heads, hidden, tied):
    layer = 2 * dim * (heads + kv_heads) * dim
    narrow = layers * (layer - (heads - 1) * dim * dim + 3 * dim * hidden + 2 * dim)
    return vocab * dim * (2 - tied) + narrow + dim


def means(h, k):
    return (h * k[..., None]).sum(1) / k.sum(1, keepdim=True)


def compared(*, pool=None, norm=None, tokens=False, last=True):
    """The similarity with its slips: how tokens meet in one vector, how it is scaled, what becomes of the pairs."""

    def similarity(h, k):
        h = F.normalize(h, dim=-1) if tokens else h
        x = (pool or means)(h, k)
        if not last:
            return x @ x.T
        x = F.normalize(x, dim=-1) if norm is None else norm(x)
        return x @ x.T

    return similarity


def right_padded(*positions):
    """Masks from the number of tokens alone."""
    out = []
    for p in positions:
        n = torch.arange(p.shape[1])
        out.append(torch.where(n < (p >= 0).sum(1, keepdim=True), n, -1))
    return masks(*out)


def masked(*, encoder=None, decoder=None, cross=None):
    """The masks with one of them made otherwise, from the positions of its queries and keys as they broadcast."""

    def answer(source, target):
        made = list(masks(source, target))
        sides = [(source, source), (target, target), (target, source)]
        for at, rule in enumerate((encoder, decoder, cross)):
            if rule is not None:
                queries, keys = sides[at][0][:, :, None], sides[at][1][:, None]
                mask = rule(queries, keys)
                made[at] = mask.expand(len(source), queries.shape[1], keys.shape[2])
        return tuple(made)

    return answer


def places(x):
    """Where queries or keys stand, whatever their positions are."""
    return torch.arange(x.numel() // len(x)).view(1, *x.shape[1:])


def everything(q, k):
    return torch.ones_like(q == k)


def routed(
    *, scores=None, share=True, order="choices", largest=True, extra=0, again=False, ones=None, rounds=False
):
    """The routing with its slips, written with one-hot vectors and running counts."""

    def route(logits, active, capacity):
        s = logits.softmax(-1) if scores is None else scores(logits)
        top, chosen = s.topk(active, largest=largest)
        if share:
            top = top / top.sum(-1, keepdim=True)
        if ones is not None:
            top = ones(top)
        line = [(t, c) for c in range(active) for t in range(len(s))]
        key = {
            "choices": lambda p: 0,
            "tokens": lambda p: p[0],
            "last": lambda p: (p[1], -p[0]),
            "weight": lambda p: -top[p].item(),
        }[order]
        weights, taken, now = torch.zeros_like(s), torch.zeros(s.shape[1]), 0
        for t, c in sorted(line, key=key):
            if rounds and c != now:
                taken, now = torch.zeros(s.shape[1]), c
            e = chosen[t, c]
            weights[t, e] = top[t, c] * (taken[e] < capacity + extra)
            taken[e] += 1
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9) if again else weights

    return route


def ranks_of_running_counts(logits, active, capacity):
    """GShard's way: one-hot choices, running counts, no loop."""
    top = logits.topk(active)
    shares = top.values.softmax(-1)
    marks = F.one_hot(top.indices, logits.shape[1]).transpose(0, 1).flatten(0, 1)  # all first choices first
    kept = marks * (marks.cumsum(0) <= capacity)
    kept = kept.unflatten(0, (active, -1))
    return (kept * shares.T[..., None]).sum(0)


def forced(
    *,
    start="last",
    over="after",
    n=lambda h, thought, pause: len(thought),
    low=0,
    high=0,
    stop=None,
    wait=None,
    best=True,
):
    """The forcing with its slips: what is counted, and what is done below and above the limits."""

    def only(logits, token):
        return torch.where(torch.arange(len(logits)) == token, logits, -math.inf)

    def force(logits, history, open, close, pause, least, most):
        at = [i for i, token in enumerate(history) if token == open]
        if not at and start != "nothing":
            return logits
        begin = 0 if not at else at[0 if start == "first" else -1] + 1
        thought = history[begin:]
        behind = history if over == "anywhere" else history[at[-1] + 1 :] if at else history
        if over != "never" and close in behind:
            return logits
        written = n(history, thought, pause)
        if written >= most + high:
            return only(logits, close) if stop is None else stop(logits, close, pause)
        if written < least + low and (not best or logits.argmax() == close):
            return only(logits, pause) if wait is None else wait(logits, close, pause)
        return logits

    return force


def without(logits, token):
    return torch.where(torch.arange(len(logits)) == token, -math.inf, logits)


def filled(rest):
    def force_(logits, history, *how):
        return force(logits, history, *how).clamp(min=rest)

    return force_


def in_place(logits, history, *how):
    logits.copy_(force(logits, history, *how))
    return logits


def spliced(change, *, strict=True):
    """The splice with other patches: `change` of the images and the places gives them."""

    def splice_(ids, embeddings, images, image_token):
        where = ids == image_token
        if strict and where.sum() != len(images) * images.shape[1]:
            raise ValueError("differ")
        out = embeddings.clone()
        out[where] = change(images, where)
        return out

    return splice_


def row_by_row(ids, embeddings, images, image_token):
    out = embeddings.clone()
    for row, line in enumerate(ids == image_token):
        out[row, line] = images.flatten(0, 1)[: line.sum()]
    return out


def image_of_the_row(ids, embeddings, images, image_token):
    out, flat = embeddings.clone(), images.flatten(0, 1)
    for row, line in enumerate(ids == image_token):
        out[row, line] = flat.roll(-row * images.shape[1], 0)[: line.sum()]
    return out


def inserted(ids, embeddings, images, image_token):
    first = int((ids[0] == image_token).nonzero()[0])
    images = images.flatten(0, 1).expand(len(ids), -1, -1)
    return torch.cat([embeddings[:, :first], images, embeddings[:, first:]], dim=1)


def turned_round(ids, embeddings, images, image_token):
    where = ids == image_token
    order = (where.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
    return torch.where(where[..., None], embeddings, images.flatten(0, 1)[order])


def down_the_columns(ids, embeddings, images, image_token):
    return splice(ids.T, embeddings.transpose(0, 1), images, image_token).transpose(0, 1)


def overwritten(ids, embeddings, images, image_token):
    embeddings[ids == image_token] = images.flatten(0, 1)
    return embeddings


def scattered(ids, embeddings, images, image_token):
    return embeddings.masked_scatter((ids == image_token)[..., None], images)


def asserted(ids, embeddings, images, image_token):
    assert (ids == image_token).sum() == len(images) * images.shape[1]
    return splice(ids, embeddings, images, image_token)


def next_one_by_one(ids, embeddings, images, image_token):
    patches = iter(images.flatten(0, 1))
    rows = []
    for line, row in zip(ids, embeddings, strict=True):
        new = [next(patches, None) if i == image_token else e for i, e in zip(line, row, strict=True)]
        if any(e is None for e in new):
            raise ValueError("too few patches")
        rows.append(torch.stack(new))
    if next(patches, None) is not None:
        raise ValueError("too many patches")
    return torch.stack(rows)


def running_index(ids, embeddings, images, image_token):
    where = ids == image_token
    if where.sum() != len(images) * images.shape[1]:
        raise ValueError("differ")
    if not len(images):
        return embeddings
    order = (where.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
    return torch.where(where[..., None], images.flatten(0, 1)[order], embeddings)


def zero_when_forced(logits, *how):
    """A forced token may keep any number."""
    out = force(logits, *how)
    return torch.where(out == -math.inf, out, 0.0) if (out == -math.inf).any() else out


def pair_by_pair(hidden, keep):
    means = [h[k].mean(0) for h, k in zip(hidden, keep, strict=True)]
    return torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in means]) for a in means])


RIGHT: list[tuple[str, Callable[..., Any]]] = [
    *SOLUTIONS.items(),
    ("decoder-only", counted()),
    ("decoder-only", lambda *a: float(count(*a))),
    # the length of a vector does not matter to its cosines
    ("encoder-only", compared(pool=lambda h, k: (h * k[..., None]).sum(1))),
    ("encoder-only", compared(pool=lambda h, k: (h * k[..., None]).mean(1))),
    ("encoder-only", pair_by_pair),
    ("encoder-decoder", lambda *a: list(masks(*a))),
    (
        "encoder-decoder",
        masked(encoder=lambda q, k: (q >= 0) & (k >= 0), cross=lambda q, k: (q >= 0) & (k >= 0)),
    ),
    ("encoder-decoder", masked(decoder=lambda q, k: (q < 0) | (q >= k) & (k != -1))),
    ("mixture-of-experts", ranks_of_running_counts),
    ("mixture-of-experts", routed()),
    ("reasoning-model", forced()),
    ("reasoning-model", zero_when_forced),
    ("multimodal", next_one_by_one),
    ("multimodal", running_index),
]

SLIPS: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "decoder-only": [
        (counted(kv=lambda dim, heads, kv: dim), "as wide as queries"),
        (counted(kv=lambda dim, heads, kv: dim // heads * kv / 2), "keys or values are missing"),
        (counted(kv=lambda dim, heads, kv: dim // heads), "with one head"),
        (counted(kv=lambda dim, heads, kv: kv), "taken for the width"),
        (wide_heads, "every head was counted dim wide"),
        (counted(out=False), "output projection of attention is missing"),
        (counted(matrices=2), "three matrices"),
        (one_layer, "only one layer"),
        (counted(head=True), "the head was counted: tied"),
        (lambda *a: count(*a[:6], not a[6]), "the head was counted: tied"),
        (counted(head=False), "one is missing"),
        (counted(embed=False), "the embedding is missing"),
        (
            lambda *a: count(*a) if a[6] else count(*a) - 2 * a[0] * a[1],
            "embedding and the head are missing",
        ),
        (counted(last=0), "the norm after the last layer"),
        (counted(norms=0), "the norms of the layers are missing"),
        (counted(norms=1), "a layer has two norms"),
        (counted(norms=0, last=0), "all norms are missing"),
        (counted(norms=3, last=0), "last norm was counted in every layer"),
        (counted(gain=2), "RMSNorm has gains alone"),
        (counted(more=lambda v, dim, layers, size: 2 * layers * size), "norms of queries and keys"),
        (counted(bias=lambda dim, kv, hidden: dim + 2 * kv), "biases were counted"),
        (counted(bias=lambda dim, kv, hidden: 2 * dim + 2 * kv), "biases were counted"),
        (counted(bias=lambda dim, kv, hidden: 2 * hidden + dim), "biases were counted"),
        (counted(bias=lambda dim, kv, hidden: 3 * dim + 2 * kv + 2 * hidden), "biases were counted"),
        (lambda *a: f"{count(*a):,}", "it returned a str, one number was wanted"),
        (lambda *a: torch.tensor([count(*a)] * 2), "one number was wanted"),
        (lambda *a: count(*a) + 1, "the number is off"),
        (lambda *a: count(*a) if a[4] > 1 else 0, "the number is off"),
    ],
    "encoder-only": [
        (compared(pool=lambda h, k: h.mean(1)), "padding was averaged in"),
        (lambda h, k: similarity(h, ~k), "the mean runs over the padding alone"),
        (compared(pool=lambda h, k: h[:, 0]), "one token stands for the sentence"),
        (compared(pool=lambda h, k: h[:, -1]), "one token stands for the sentence"),
        (
            compared(pool=lambda h, k: h[torch.arange(len(h)), k.int().argmax(1)]),
            "one token stands for the sentence",
        ),
        (compared(last=False), "not made unit length"),
        (compared(pool=lambda h, k: (h * k[..., None]).sum(1), last=False), "not made unit length"),
        (compared(pool=lambda h, k: (h * k[..., None]).mean(1), last=False), "not made unit length"),
        (compared(pool=lambda h, k: h.mean(1), last=False), "and padding was averaged in"),
        (compared(tokens=True), "every token was made unit length"),
        (compared(tokens=True, last=False), "every token was made unit length"),
        (
            lambda h, k: F.normalize(means(h, k), dim=1) @ means(h, k).T,
            "one side",
        ),
        (
            lambda h, k: means(h, k) @ F.normalize(means(h, k), dim=1).T,
            "one side",
        ),
        (compared(norm=lambda x: F.normalize(x, dim=0)), "unit length runs over the sentences"),
        (compared(norm=lambda x: x / x.norm()), "divided by one length"),
        (compared(norm=lambda x: x / (x * x).sum(1, keepdim=True)), "their squared length"),
        (compared(norm=lambda x: F.normalize(x, p=1, dim=1)), "the root of the sum of squares"),
        (compared(pool=lambda h, k: h.mean(-1)), "runs over the features"),
        (compared(pool=lambda h, k: h.mean(-1) * k), "runs over the features"),
        (compared(pool=lambda h, k: h.mean(0)), "runs over the sentences"),
        (
            compared(pool=lambda h, k: h.masked_fill(~k[..., None], -math.inf).amax(1)),
            "largest value of each feature",
        ),
        (compared(pool=lambda h, k: h.amax(1)), "and padding was among them"),
        (lambda h, k: 1 - similarity(h, k), "a distance"),
        (
            lambda h, k: torch.cdist(means(h, k), means(h, k)),
            "these are distances",
        ),
        (lambda h, k: similarity(h, k)[0], "the result has shape (2,), wanted (2, 2)"),
        (lambda h, k: similarity(h, k).tolist(), "it returned a list"),
        (lambda h, k: similarity(h.mul_(k[..., None]), k), "changed its input hidden in place"),
    ],
    "encoder-decoder": [
        (masked(encoder=lambda q, k: (k >= 0) & (k <= q)), "encoder: it is causal"),
        (masked(encoder=lambda q, k: (k >= 0) & (places(k) <= places(q))), "encoder: it is causal"),
        (masked(encoder=everything), "encoder: the padding of the source is seen"),
        (masked(encoder=lambda q, k: q >= 0), "encoder: the padding of the source is seen"),
        (masked(encoder=lambda q, k: k < 0), "encoder: it is the wrong way round"),
        (masked(encoder=lambda q, k: k > 0), "encoder: position 0 is a token"),
        (masked(encoder=lambda q, k: (k >= 0) & (k != q)), "encoder: a token does not see itself"),
        (masked(encoder=lambda q, k: k >= q), "encoder: only later tokens are seen"),
        (masked(decoder=lambda q, k: k >= 0), "decoder: it is not causal: the future is open"),
        (masked(decoder=everything), "decoder: it is not causal, and padding is seen"),
        (masked(decoder=lambda q, k: k <= q), "decoder: the padding of the target is seen"),
        (masked(decoder=lambda q, k: (k >= 0) & (k < q)), "decoder: a token does not see itself"),
        (masked(decoder=lambda q, k: (k >= 0) & (k <= q + 1)), "decoder: the future is open by one"),
        (masked(decoder=lambda q, k: k >= q), "decoder: it looks ahead"),
        (masked(decoder=lambda q, k: (k < 0) | (k > q)), "decoder: it is the wrong way round"),
        (masked(decoder=lambda q, k: (k > 0) & (k <= q)), "decoder: position 0 is a token"),
        (
            masked(decoder=lambda q, k: (k >= 0) & (places(k) <= places(q))),
            "decoder: the order of the places",
        ),
        (masked(cross=lambda q, k: (k >= 0) & (k <= q)), "cross: it is causal"),
        (masked(cross=lambda q, k: (k >= 0) & (places(k) <= places(q))), "cross: it is causal"),
        (masked(cross=everything), "cross: the padding of the source is seen"),
        (masked(cross=lambda q, k: k < 0), "cross: it is the wrong way round"),
        (masked(cross=lambda q, k: k > 0), "cross: position 0 is a token"),
        (lambda s, t: (*masks(s, t)[:2], masks(s, t)[2].mT), "cross: queries and keys are swapped"),
        (right_padded, "as if padding stood on the right"),
        (lambda s, t: (*masks(s, t)[:2], right_padded(s, t)[2]), "cross: it goes by how many tokens"),
        (
            lambda s, t: (masks(s, t)[0], right_padded(s, t)[1], masks(s, t)[2]),
            "decoder: it goes by how many tokens",
        ),
        (lambda s, t: tuple(~m for m in masks(s, t)), "encoder: it is the wrong way round"),
        (lambda s, t: masks(s, t)[0], "it returned a Tensor, three masks were wanted"),
        (lambda s, t: masks(s, t)[:2], "it returned 2 results, three masks were wanted"),
        (lambda s, t: tuple(m.float() for m in masks(s, t)), "holds float32, wanted True/False"),
        (lambda s, t: tuple(m[:, None] for m in masks(s, t)), "the result has shape (1, 1, 3, 3)"),
        (lambda s, t: (masks(s, t)[1], masks(s, t)[0], masks(s, t)[2]), "the result has shape"),
    ],
    "mixture-of-experts": [
        (routed(share=False), "not divided by their sum"),
        (routed(scores=lambda x: x), "the logits themselves"),
        (routed(scores=lambda x: x, share=False), "the logits themselves"),
        (routed(scores=lambda x: x.softmax(0)), "runs over the tokens"),
        (routed(scores=lambda x: x.softmax(0), share=False), "runs over the tokens"),
        (routed(scores=torch.sigmoid), "the scores are sigmoids"),
        (routed(largest=False), "the lowest experts"),
        (lambda x, active, capacity: x.softmax(-1), "all experts were kept"),
        (lambda x, active, capacity: route(x, x.shape[1], capacity), "all experts were kept"),
        (lambda x, active, capacity: route(x, 1, capacity), "one expert was chosen"),
        (routed(ones=lambda top: torch.full_like(top, 1 / top.shape[1])), "share equally"),
        (routed(ones=torch.ones_like), "only marked, with 1"),
        (lambda *a: route(*a).T, "turn it"),
        (
            lambda x, active, capacity: x.topk(active).values.softmax(-1),
            "one column for each choice",
        ),
        (lambda x, active, capacity: route(x, active, len(x)), "capacity was not used"),
        (routed(extra=1), "one token too many"),
        (routed(extra=-1), "one token too few"),
        (routed(order="tokens"), "token by token"),
        (routed(order="last"), "the last token came first"),
        (routed(order="weight"), "the highest weights"),
        (routed(rounds=True), "emptied after each round"),
        (routed(again=True), "divided by its sum once more"),
        (lambda *a: route(*a) / route(*a).sum(-1, keepdim=True), "divided by its sum once more"),
        (lambda *a: route(*a).tolist(), "it returned a list"),
        (lambda *a: route(*a) > 0, "holds True/False, wanted float32"),
    ],
    "reasoning-model": [
        (forced(n=lambda h, thought, pause: len(h)), "the whole history was counted"),
        (forced(start="nothing"), "before any open there is no thought"),
        (
            forced(start="nothing", n=lambda h, thought, pause: len(h)),
            "before any open there is no thought",
        ),
        (forced(n=lambda h, thought, pause: len(thought) + 1), "open was counted"),
        (forced(n=lambda h, thought, pause: len(thought) - 1), "off by one on both sides"),
        (forced(high=1, low=1), "off by one on both sides"),
        (forced(high=1), "one more was let through"),
        (forced(high=-1), "closed one token early"),
        (forced(low=1), "with `least` tokens written the thought may close"),
        (forced(low=-1), "wait was needed for one token more"),
        (forced(over="never"), "after close the thought is over"),
        (forced(over="anywhere"), "the close of an earlier thought"),
        (forced(start="first"), "counted from the first open"),
        (forced(start="first", over="anywhere"), "counted from the first open"),
        (forced(wait=lambda x, close, pause: without(x, close)), "close was only forbidden"),
        (forced(wait=lambda x, close, pause: without(x, close), best=False), "close was only forbidden"),
        (forced(best=False), "although close was not the best"),
        (forced(wait=lambda x, close, pause: x), "least was not used"),
        (forced(stop=lambda x, close, pause: x), "most was not used"),
        (
            forced(
                wait=lambda x, close, pause: without(torch.full_like(x, -math.inf), close).index_fill(
                    0, torch.tensor(close), 0.0
                ),
                stop=lambda x, close, pause: torch.full_like(x, -math.inf).index_fill(
                    0, torch.tensor(pause), 0.0
                ),
            ),
            "wait and close are swapped",
        ),
        (
            forced(
                wait=lambda x, close, pause: without(x, pause),
                stop=lambda x, close, pause: without(x, close),
            ),
            "the wrong way round",
        ),
        (
            forced(n=lambda h, thought, pause: len([t for t in thought if t != pause])),
            "tokens that are wait were not counted",
        ),
        (filled(-1e9), "have to be -inf"),
        (lambda x, *how: int(force(x, *how).argmax()), "it returned a token"),
        (lambda x, *how: force(x, *how).argmax(), "it returned a token"),
        (lambda x, *how: force(x, *how).softmax(0), "it returned probabilities"),
        (in_place, "it changed its input logits in place"),
        (
            lambda x, h, *how: h.append(0) or force(x, h[:-1], *how),
            "it changed its input history in place",
        ),
        (
            lambda x, h, open, *how: force(x, h[h.index(open) :], open, *how),
            "it stopped with ValueError",
        ),
        (lambda x, *how: force(x, *how).tolist(), "it returned a list"),
        (lambda x, *how: x + 1, "nothing is to be forced here"),
        (
            forced(wait=lambda x, close, pause: torch.full_like(x, -math.inf)),
            "all but wait have to be -inf",
        ),
        (
            forced(stop=lambda x, close, pause: torch.full_like(x, -math.inf)),
            "all but close have to be -inf",
        ),
    ],
    "multimodal": [
        (lambda ids, e, images, token: e, "nothing was put in"),
        (row_by_row, "every row begins with the first image again"),
        (image_of_the_row, "row r took images from number r on"),
        (spliced(lambda i, w: i[:1].expand_as(i).flatten(0, 1)), "the first image was used for all"),
        (
            spliced(lambda i, w: i[:1, 0].expand(int(w.sum()), -1) if len(i) else i[:, 0]),
            "first patch was used",
        ),
        (
            spliced(lambda i, w: i[:, :1].expand_as(i).flatten(0, 1)),
            "every place of an image got its first",
        ),
        (
            spliced(lambda i, w: i.mean(1, keepdim=True).expand_as(i).flatten(0, 1)),
            "the mean of its patches",
        ),
        (spliced(lambda i, w: i.flip(1).flatten(0, 1)), "the patches of an image are in reversed order"),
        (spliced(lambda i, w: i.flip(0).flatten(0, 1)), "the images are in reversed order"),
        (spliced(lambda i, w: i.flatten(0, 1).flip(0)), "images and patches are both in reversed order"),
        (
            spliced(lambda i, w: i.transpose(0, 1).flatten(0, 1)),
            "the first patches of all images came first",
        ),
        (down_the_columns, "column by column"),
        (
            lambda ids, e, i, t: splice(ids, e, i, t) + e * (ids == t)[..., None],
            "added to the embedding",
        ),
        (
            lambda ids, e, i, t: splice(ids, e, i, t) * (ids == t)[..., None],
            "the embeddings of the text are gone",
        ),
        (turned_round, "the text was overwritten"),
        (inserted, "the sequence grew"),
        (overwritten, "it changed its input embeddings in place"),
        (
            scattered,
            "there are more places than patches: ValueError was wanted, it stopped with RuntimeError",
        ),
        (
            asserted,
            "there are more places than patches: ValueError was wanted, it stopped with AssertionError",
        ),
        (
            lambda ids, e, i, t: splice(ids, e, i.flatten(0, 1)[: (ids == t).sum()][None], t),
            "there are more patches than places: ValueError was wanted",
        ),
        (
            lambda ids, e, i, t: e if not (ids == t).any() else splice(ids, e, i, t),
            "there is an image, but no place for it",
        ),
        (
            lambda ids, e, i, t: e if not len(i) else splice(ids, e, i, t),
            "there are places, but no image",
        ),
        (lambda *a: splice(*a)[0], "the result has shape"),
        (lambda *a: splice(*a).tolist(), "it returned a list"),
    ],
}

WRONG: list[tuple[str, Callable[..., Any], str]] = [
    (concept, answer, hint) for concept, slips in SLIPS.items() for answer, hint in slips
]


@pytest.mark.parametrize(("concept", "answer"), RIGHT)
def test_another_way_to_the_same_result_passes(concept: str, answer: Callable[..., Any]) -> None:
    for seed in SEEDS:
        verdict = check(concept, answer, seed=seed)
        assert verdict, verdict


def test_the_count_is_that_of_the_ledger() -> None:
    sizes = dict(vocab=97, context=16, dim=48, layers=3, hidden=80)
    for heads, kv_heads in [(4, 4), (6, 2), (8, 1)]:
        for tied in (True, False):
            config = DecoderConfig(**sizes, heads=heads, kv_heads=kv_heads, tied=tied)
            got = count(97, 48, 3, heads, kv_heads, 80, tied)
            assert got == ledger.parameters(config).total
    assert "134,515,008" in check("decoder-only", count).message
    assert count(49152, 576, 30, 9, 3, 1536, True) == 134_515_008


def test_the_routing_is_that_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, experts, active, capacity in [(9, 5, 3, 2), (7, 4, 1, 1), (12, 4, 4, 3)]:
        logits = torch.randn(tokens, experts, generator=generator)
        scores = moe.router_scores(logits)
        chosen = moe.choose_experts(scores, active)
        kept = moe.within_capacity(chosen, experts, capacity)
        wanted = torch.zeros_like(logits).scatter(-1, chosen, moe.mixing_weights(scores, chosen) * kept)
        torch.testing.assert_close(route(logits, active, capacity), wanted)


def test_what_a_row_of_padding_holds_is_not_graded() -> None:
    def either(value: bool) -> Callable[..., Any]:
        def answer(source, target):
            sides = (source, target, target)
            made = zip(masks(source, target), sides, strict=True)
            return [torch.where((q >= 0)[..., None], mask, torch.tensor(value)) for mask, q in made]

        return answer

    assert check("encoder-decoder", either(True))
    assert check("encoder-decoder", either(False))


def test_the_first_counterexample_can_be_replayed() -> None:
    told = check("reasoning-model", forced(wait=lambda x, close, pause: x), seed=1).message.split("\n")
    values = dict(line.split(maxsplit=1) for line in told[1:])
    assert eval(values["history"])[-1] == int(values["open"])
    assert int(torch.tensor(eval(values["logits"])).argmax()) == int(values["close"])
