"""The exercises of chapter 19, attention mechanism optimizations.

Every reference is written here in plain torch, the slow and obvious way; nothing is imported from the layers
that the chapter teaches.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from llm_atlas.book.checks import Trial, checker


def _pool(weight: Tensor, heads: int, members: list[list[int]]) -> Tensor:
    """The mean of the heads in each list of `members`, one below the other."""
    head_dim = weight.shape[0] // heads
    split = [weight[h * head_dim : (h + 1) * head_dim] for h in range(heads)]
    return torch.cat([torch.stack([split[h] for h in group]).mean(0) for group in members])


@checker(
    "gqa",
    asks="Write pool(weight, heads, groups): weight (heads * head_dim, features) holds the key heads one below "
    "the other; return (groups * head_dim, features), each group's head the mean of heads/groups neighbours.",
    praise="Neighbouring heads meet in one, feature by feature, and the groups stand in order.",
)
def grade_gqa(trial: Trial) -> None:
    # groups of three first: with two groups of two, an axis mistaken for the other still fits
    for heads, groups, head_dim, features in [
        (6, 2, 2, 2),
        (4, 4, 2, 1),
        (4, 1, 1, 2),
        (4, 2, 3, 4),
        (12, 3, 4, 5),
    ]:
        weight = trial.normal(heads * head_dim, features)
        inputs = {"weight": weight, "heads": heads, "groups": groups}
        size = heads // groups
        neighbours = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        wanted = _pool(weight, heads, neighbours)

        def of(members: list[list[int]], weight=weight, heads=heads) -> Tensor:
            return _pool(weight, heads, members)

        def features_first(w=weight, heads=heads, size=size) -> Tensor:
            return w.unflatten(0, (-1, heads // size, size)).mean(2).transpose(0, 1).flatten(0, 1)

        trial.compare(
            trial.ask(**inputs),
            wanted,
            inputs,
            hints=[
                *(
                    [("nothing was pooled: the heads are as many as before", lambda w=weight: w)]
                    if size > 1
                    else []
                ),
                (
                    "the heads were dealt out, head h to group h % groups; a group is made of neighbours",
                    lambda of=of, heads=heads, g=groups: of([list(range(i, heads, g)) for i in range(g)]),
                ),
                (
                    "the mean runs over the groups: it has to run over the members of each",
                    lambda of=of, heads=heads, n=size: of([list(range(i, heads, n)) for i in range(n)]),
                ),
                (
                    "neighbouring rows were averaged, features of one head; average the heads, row by row",
                    lambda w=weight, n=size: w.unflatten(0, (-1, n)).mean(1),
                ),
                (
                    "the rows were split as (head_dim, heads); the rows of one head are neighbours",
                    features_first,
                ),
                ("the heads were added up; a group's head is their mean", lambda w=wanted, n=size: w * n),
                (
                    "the sum was divided by the number of groups; divide it by the heads in a group",
                    lambda w=wanted, n=size, g=groups: w * n / g,
                ),
                (
                    "only the first head of each group was kept",
                    lambda of=of, rows=neighbours: of([row[:1] for row in rows]),
                ),
                (
                    "only the last head of each group was kept",
                    lambda of=of, rows=neighbours: of([row[-1:] for row in rows]),
                ),
                (
                    "only the first heads were kept, as many as there are groups",
                    lambda of=of, g=groups: of([[h] for h in range(g)]),
                ),
                (
                    "all heads met in one: this is multi-query attention, one group",
                    lambda of=of, heads=heads: of([list(range(heads))]),
                ),
                (
                    "all heads met in one, which every group got a copy of",
                    lambda of=of, heads=heads, g=groups: of([list(range(heads))] * g),
                ),
                (
                    "the means were repeated for every head; the weight of a group stands there once",
                    lambda of=of, rows=neighbours, n=size: of([row for row in rows for _ in range(n)]),
                ),
            ],
        )


def _latent(q: Tensor, c: Tensor, u_k: Tensor, u_v: Tensor, divisor: float, *, axis: int = 1) -> Tensor:
    """Keys and values of every head written out, then attention with the softmax over `axis`."""
    scores = torch.stack([c @ up.T @ row for row, up in zip(q, u_k, strict=True)]) / divisor
    weights = scores.softmax(axis)
    return torch.stack([w @ (c @ up.T) for w, up in zip(weights, u_v, strict=True)])


def _latent_unnormalised(q: Tensor, c: Tensor, u_k: Tensor, u_v: Tensor) -> Tensor:
    scores = torch.stack([c @ up.T @ row for row, up in zip(q, u_k, strict=True)]) * q.shape[1] ** -0.5
    return torch.stack([s @ (c @ up.T) for s, up in zip(scores, u_v, strict=True)])


@checker(
    "mla",
    asks="Write absorbed(q, c, u_k, u_v): q (heads, head_dim), the cache c (tokens, rank), u_k and u_v (heads, "
    "head_dim, rank). Head h's key of token t is u_k[h] @ c[t], its value u_v[h] @ c[t]. Return each head's "
    "attention, scale 1/sqrt(head_dim), as (heads, head_dim); move q instead of building the keys.",
    praise="The query meets the small vectors themselves, and their mean alone is led back to each head.",
)
def grade_mla(trial: Trial) -> None:
    for heads, tokens, head_dim, rank in [
        (3, 2, 2, 3),
        (1, 3, 2, 4),
        (2, 3, 3, 3),
        (2, 4, 4, 2),
        (4, 6, 8, 3),
    ]:
        q, c = trial.normal(heads, head_dim), trial.normal(tokens, rank)
        u_k, u_v = trial.normal(heads, head_dim, rank), trial.normal(heads, head_dim, rank)
        inputs = {"q": q, "c": c, "u_k": u_k, "u_v": u_v}
        args, root = (q, c, u_k, u_v), math.sqrt(head_dim)

        def but(q=q, c=c, u_k=u_k, u_v=u_v, divisor=root, axis=1) -> Tensor:
            return _latent(q, c, u_k, u_v, divisor, axis=axis)

        several = []
        if heads > 1:
            other_key = "a query was moved by the u_k of another head; each head has its own"
            other_value = "the values came from the u_v of another head; each head has its own"
            several = [
                (
                    "the softmax runs over the heads; each head's weights over the tokens add up to 1",
                    lambda f=but: f(axis=0),
                ),
                (
                    "the scale uses all heads together; a head's dot product is head_dim wide",
                    lambda f=but, r=root, h=heads: f(divisor=r * math.sqrt(h)),
                ),
                (other_key, lambda f=but, u=u_k: f(u_k=u.roll(1, 0))),
                (other_key, lambda f=but, u=u_k: f(u_k=u.roll(-1, 0))),
                (other_key, lambda f=but, u=u_k: f(u_k=u[:1].expand_as(u))),
                (
                    "every query was moved by the u_k of all heads, added up; head h takes u_k[h]",
                    lambda f=but, u=u_k: f(u_k=u.sum(0).expand_as(u)),
                ),
                (other_value, lambda f=but, u=u_v: f(u_v=u.roll(1, 0))),
                (other_value, lambda f=but, u=u_v: f(u_v=u.roll(-1, 0))),
                (other_value, lambda f=but, u=u_v: f(u_v=u[:1].expand_as(u))),
                (
                    "the values went through the u_v of all heads, added up; head h takes u_v[h]",
                    lambda f=but, u=u_v: f(u_v=u.sum(0).expand_as(u)),
                ),
            ]
        trial.compare(
            trial.ask(**inputs),
            but(),
            inputs,
            hints=[
                (
                    "the scale uses the rank; the dot product that it stands for is head_dim wide",
                    lambda f=but, r=rank: f(divisor=math.sqrt(r)),
                ),
                ("the scores were not divided by sqrt(head_dim)", lambda f=but: f(divisor=1.0)),
                (
                    "the scores were divided by head_dim, not by its root",
                    lambda f=but, d=head_dim: f(divisor=float(d)),
                ),
                ("the scores were not put through a softmax", lambda a=args: _latent_unnormalised(*a)),
                (
                    "the result is still a mean of small vectors: u_v has to lead it back to head_dim",
                    lambda f=but, h=heads, r=rank: f(u_v=torch.eye(r).expand(h, r, r)),
                ),
                ("the values were made by u_k; they are u_v[h] @ c[t]", lambda f=but, u=u_k: f(u_v=u)),
                ("the keys were made by u_v; they are u_k[h] @ c[t]", lambda f=but, u=u_v: f(u_k=u)),
                ("u_k and u_v are swapped", lambda f=but, k=u_k, v=u_v: f(u_k=v, u_v=k)),
                *several,
            ],
            rtol=1e-3,
            atol=1e-4,
        )


def _shared(
    q: Tensor, k: Tensor, v: Tensor, divisor: float, *, axis: int = 1, keep: Tensor | None = None
) -> Tensor:
    scores = q @ k.T / divisor
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return scores.softmax(axis) @ v


@checker(
    "mqa",
    asks="Write step(q, k, v): one new token has a query for every head, q (heads, head_dim); the cache has one "
    "key head k (tokens, head_dim) and one value head v (tokens, head_dim). Return (heads, head_dim), each head's "
    "attention over all tokens, scale 1/sqrt(head_dim).",
    praise="The heads are rows of one product with the shared keys, and every row sees every token.",
)
def grade_mqa(trial: Trial) -> None:
    for heads, tokens, head_dim in [(2, 3, 3), (3, 2, 2), (1, 3, 2), (4, 4, 4), (8, 6, 3)]:
        q, k, v = (
            trial.normal(heads, head_dim),
            trial.normal(tokens, head_dim),
            trial.normal(tokens, head_dim),
        )
        inputs = {"q": q, "k": k, "v": v}
        root, wanted = math.sqrt(head_dim), _shared(q, k, v, math.sqrt(head_dim))

        def but(q=q, k=k, v=v, divisor=root, axis=1, keep=None) -> Tensor:
            return _shared(q, k, v, divisor, axis=axis, keep=keep)

        several = []
        if heads > 1:
            masked = (
                "a causal mask was laid over the heads; they are rows of one token, and each sees everything"
            )
            triangle = torch.ones(heads, tokens, dtype=torch.bool)
            several = [
                (
                    "the softmax runs over the heads; each head's weights over the tokens add up to 1",
                    lambda f=but: f(axis=0),
                ),
                (
                    "the queries were averaged: only keys and values are shared, every head asks for itself",
                    lambda f=but, q=q: f(q=q.mean(0).expand_as(q)),
                ),
                (
                    "the first head's query was used for all; every head asks for itself",
                    lambda f=but, q=q: f(q=q[:1].expand_as(q)),
                ),
                ("the heads were averaged; return one row for each", lambda w=wanted: w.mean(0)),
                (
                    "the scale uses all heads together; a head's dot product is head_dim wide",
                    lambda f=but, r=root, h=heads: f(divisor=r * math.sqrt(h)),
                ),
                (masked, lambda f=but, m=triangle: f(keep=m.tril())),
            ]
            if tokens > heads:
                several.append((masked, lambda f=but, m=triangle, o=tokens - heads: f(keep=m.tril(o))))
            several.append(
                ("the rows are laid end to end; return (heads, head_dim)", lambda w=wanted: w.flatten())
            )
        trial.compare(
            trial.ask(**inputs),
            wanted,
            inputs,
            hints=[
                ("the scores were not divided by sqrt(head_dim)", lambda f=but: f(divisor=1.0)),
                (
                    "the scores were divided by head_dim, not by its root",
                    lambda f=but, d=head_dim: f(divisor=float(d)),
                ),
                ("the scores were not put through a softmax", lambda q=q, k=k, v=v, r=root: q @ k.T / r @ v),
                ("k and v are swapped: the query meets the keys", lambda f=but, k=k, v=v: f(k=v, v=k)),
                ("the weights mix the keys; they have to mix the values", lambda f=but, k=k: f(v=k)),
                *several,
            ],
            rtol=1e-3,
            atol=1e-4,
        )


def _online(
    scores: Tensor,
    values: Tensor,
    block: int,
    *,
    old_sum: int = 1,
    old_out: int = 1,
    maximum: Literal["running", "block", "mixed", "from zero", "none"] = "running",
    whole: bool = False,
    divide: bool = True,
) -> Tensor:
    """One pass with the slips of one: `old_sum` and `old_out` are the power of the factor on what is kept (1 right,
    0 forgotten, -1 the wrong way), `maximum` what is taken off the scores, `whole` leaves out an incomplete block."""
    high = torch.tensor(0.0 if maximum in ("from zero", "none") else -math.inf)
    total, out = torch.zeros(()), torch.zeros(values.shape[1])
    stop = len(scores) // block * block if whole else len(scores)
    for start in range(0, stop, block):
        part, rows = scores[start : start + block], values[start : start + block]
        new = {"block": part.max(), "none": high}.get(maximum, torch.maximum(high, part.max()))
        factor = torch.exp(high - new)
        weights = torch.exp(part - (part.max() if maximum == "mixed" else new))
        # nothing is kept before the first block, whatever the factor
        keep_sum, keep_out = (factor**power if start else 0.0 for power in (old_sum, old_out))
        total, out, high = total * keep_sum + weights.sum(), out * keep_out + weights @ rows, new
    return out / total if divide else out


def _blockwise(scores: Tensor, values: Tensor, block: int) -> Tensor:
    """Each block's own softmax, and the mean of the results."""
    parts = zip(scores.split(block), values.split(block), strict=True)
    return torch.stack([s.softmax(0) @ v for s, v in parts]).mean(0)


@checker(
    "flash-2-3",
    asks="Write online(scores, values, block): scores (tokens,), values (tokens, dim). Return softmax(scores) @ "
    "values, (dim,), in one pass over blocks of `block` tokens that keeps a running maximum, sum and output. The "
    "last block may be shorter, and scores may be 500 or -500.",
    praise="What was kept is rescaled whenever the maximum grows, and one division stands at the end.",
)
def grade_flash(trial: Trial) -> None:
    # Two blocks of two whose maximum grows, then shrinks; then blocks that do not fit; then large scores.
    # The gaps inside the blocks differ, so that their sums do too.
    up = torch.tensor([0.0, 0.9, 1.1, 2.6])
    cases = [
        ("grows", (trial.normal(1) + up), 2),
        ("shrinks", (trial.normal(1) + up).flip(0), 2),
        ("short", torch.cat([trial.normal(2), 0.3 + trial.normal(1).abs()]), 2),
        ("one block", trial.normal(2), 5),
        ("ones", trial.normal(3), 1),
        ("long", 3 * trial.normal(11), 4),
        ("high", 500 + trial.normal(4), 2),
        ("low", -500 + trial.normal(4), 2),
        ("falls", torch.cat([500 + trial.normal(2), -500 + trial.normal(2)]), 2),
        ("rises", torch.cat([-500 + trial.normal(2), 500 + trial.normal(2)]), 2),
    ]
    for case, raw, block in cases:
        scores = (raw * 10).round() / 10
        values = trial.normal(len(scores), 1 if case == "long" else 2)
        inputs = {"scores": scores, "values": values, "block": block}
        args = (scores, values, block)

        def padded(s=scores, v=values, block=block) -> Tensor:
            missing = -len(s) % block
            return pad(s, (0, missing)).softmax(0) @ pad(v, (0, 0, 0, missing))

        hints = {
            "grows": [
                ("the old sum was not rescaled when the maximum grew", lambda a=args: _online(*a, old_sum=0)),
                (
                    "the old output was not rescaled when the maximum grew",
                    lambda a=args: _online(*a, old_out=0),
                ),
                (
                    "neither the old sum nor the old output was rescaled when the maximum grew",
                    lambda a=args: _online(*a, old_sum=0, old_out=0),
                ),
                (
                    "the factor is upside down: it is exp(old maximum - new maximum), at most 1",
                    lambda a=args: _online(*a, old_sum=-1, old_out=-1),
                ),
                (
                    "NaN from the first block on: with the old maximum at -inf the factor has to be 0, "
                    "exp(old maximum - new maximum)",
                    lambda v=values: torch.full(v.shape[1:], math.nan),
                ),
                (
                    "each block was normalised by itself and the results averaged: blocks differ in weight",
                    lambda a=args: _blockwise(*a),
                ),
                ("the final division by the sum is missing", lambda a=args: _online(*a, divide=False)),
                ("only the last block was used", lambda a=args: a[0][-a[2] :].softmax(0) @ a[1][-a[2] :]),
                ("only the first block was used", lambda a=args: a[0][: a[2]].softmax(0) @ a[1][: a[2]]),
            ],
            "shrinks": [
                (
                    "a block's weights were taken from its own maximum; the running one may be higher",
                    lambda a=args: _online(*a, maximum="mixed"),
                ),
            ],
            "short": [
                ("the last block is not full, and was forgotten", lambda a=args: _online(*a, whole=True)),
                ("the last block was filled up with zeros: a score of 0 takes weight, -inf does not", padded),
            ],
            "high": [
                (
                    "exp overflowed: take the running maximum off the scores first",
                    lambda a=args: _online(*a, maximum="none"),
                ),
            ],
            "low": [
                (
                    "all weights became 0: the running maximum has to start at -inf, not at 0",
                    lambda a=args: _online(*a, maximum="from zero"),
                ),
                (
                    "all weights became 0: the running maximum has to start at -inf, not at 0",
                    lambda v=values: torch.zeros(v.shape[1]),
                ),
            ],
            "falls": [
                (
                    "the maximum of the block replaced the running one: when it falls, the factor overflows",
                    lambda a=args: _online(*a, maximum="block"),
                ),
            ],
        }
        trial.compare(trial.ask(**inputs), scores.softmax(0) @ values, inputs, hints=hints.get(case, []))


def _masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, divisor: float) -> Tensor:
    return (q @ k.T / divisor).masked_fill(~keep, -math.inf).softmax(-1) @ v


def _with_zero_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, window: int) -> Tensor:
    """The window's places before the first token, filled with keys and values of zeros that are not masked."""
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~keep, -math.inf)
    out = []
    for t, row in enumerate(scores):
        zeros = max(window - 1 - t, 0)
        out.append(torch.cat([row.new_zeros(zeros), row]).softmax(0) @ pad(v, (0, 0, zeros, 0)))
    return torch.stack(out)


@checker(
    "local-attention",
    asks="Write local(q, k, v, window): all (tokens, dim); token t sees the `window` tokens t - window + 1 up to t, "
    "fewer at the start. Softmax of q @ k.T / sqrt(dim) over those, times v: (tokens, dim).",
    praise="Each token sees itself and window - 1 before it, across the edges of blocks, and nothing of the padding.",
)
def grade_local(trial: Trial) -> None:
    # five tokens: with four, a window of two that takes in its whole previous block looks like no window at all
    for tokens, window, dim in [(5, 2, 2), (3, 1, 2), (3, 5, 2), (1, 2, 3), (6, 3, 2), (11, 4, 3)]:
        q, k, v = (trial.normal(tokens, dim) for _ in range(3))
        v = torch.where(v == 0, 0.7, v)
        inputs = {"q": q, "k": k, "v": v, "window": window}
        args, root = (q, k, v), math.sqrt(dim)
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)  # how far behind the query the key stands
        blocks = torch.arange(tokens) // window
        apart = blocks[:, None] - blocks
        keep = (back >= 0) & (back < window)

        def see(keep=keep, divisor=root, a=args) -> Tensor:
            return _masked(*a, keep, divisor)

        beyond = (back >= 1) & (back <= window)
        trial.compare(
            trial.ask(**inputs),
            see(),
            inputs,
            hints=[
                (
                    "one token too many is seen: the window counts the token itself",
                    lambda f=see, b=back, w=window: f((b >= 0) & (b <= w)),
                ),
                (
                    "one token too few is seen: the window is the token itself and window - 1 before it",
                    lambda f=see, b=back, w=window: f((b >= 0) & (b < w - 1)),
                ),
                ("a token does not see itself; it belongs to its own window", lambda f=see, m=beyond: f(m)),
                (
                    "a token does not see itself; it belongs to its own window",
                    lambda f=see, m=beyond: f(m).nan_to_num(nan=0.0),
                ),
                (
                    "the window reaches ahead as well: later tokens must not be seen",
                    lambda f=see, b=back, w=window: f(b.abs() < w),
                ),
                (
                    "the window looks ahead, at later tokens instead of earlier ones",
                    lambda f=see, b=back, w=window: f((b <= 0) & (b > -w)),
                ),
                (
                    "window was not used: every earlier token is seen",
                    lambda f=see, b=back: f(b >= 0),
                ),
                ("nothing is masked: every token sees every other", lambda f=see, b=back: f(b == b)),
                (
                    "a block does not look into the one before: its first tokens see too little",
                    lambda f=see, b=back, x=apart: f((b >= 0) & (x == 0)),
                ),
                (
                    "the whole previous block is seen: inside it, what is older than the window must be masked",
                    lambda f=see, b=back, x=apart: f((b >= 0) & (x <= 1)),
                ),
                (
                    "the blocks are not causal: inside its block a token sees later ones",
                    lambda f=see, b=back, x=apart, w=window: f((x >= 0) & (b < w)),
                ),
                (
                    "keys of padding take weight: before the first token there is nothing, mask those places",
                    lambda a=args, m=keep, w=window: _with_zero_keys(*a, m, w),
                ),
                (
                    "masked scores were set to 0, which still has weight exp(0); they have to be -inf",
                    lambda a=args, m=keep, r=root: (a[0] @ a[1].T / r * m).softmax(-1) @ a[2],
                ),
                (
                    "the mask came after the softmax, so the weights no longer add up to 1",
                    lambda a=args, m=keep, r=root: (a[0] @ a[1].T / r).softmax(-1) * m @ a[2],
                ),
                ("the scores were not divided by sqrt(dim)", lambda f=see: f(divisor=1.0)),
                ("the scores were divided by dim, not by its root", lambda f=see, d=dim: f(divisor=float(d))),
                (
                    "the scores were not put through a softmax",
                    lambda a=args, m=keep, r=root: a[0] @ a[1].T / r * m @ a[2],
                ),
            ],
            rtol=1e-3,
            atol=1e-4,
        )


def _sums(q: Tensor, k: Tensor, v: Tensor, top: Tensor, bottom: Tensor | None) -> Tensor:
    """Values weighed by q . k, over the keys that `top` shows, divided by the weights of those that `bottom` does."""
    weights = q @ k.T
    out = (weights * top) @ v
    return out if bottom is None else out / (weights * bottom).sum(1, keepdim=True)


@checker(
    "linear-attention",
    asks="Write recurrent(q, k, v): q and k (tokens, dim) are positive features already, v is (tokens, value_dim). "
    "With S the sum of the outer products k v^T and z the sum of k, both up to and with token t, "
    "o_t = (q_t @ S) / (q_t @ z). Return (tokens, value_dim).",
    praise="One state of fixed size, written before it is read, and a normaliser of the same past.",
)
def grade_linear(trial: Trial) -> None:
    for tokens, dim, value_dim in [(3, 2, 2), (1, 2, 3), (3, 3, 1), (4, 2, 3), (12, 4, 5)]:
        # never zero: all weights count, and nothing is divided by 0
        q, k = (((trial.normal(tokens, dim).abs() + 0.1) * 10).round() / 10 for _ in range(2))
        v = trial.normal(tokens, value_dim)
        v = torch.where(v == 0, 0.7, v)
        inputs = {"q": q, "k": k, "v": v}
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        strict, every, own = causal.tril(-1), torch.ones_like(causal), torch.eye(tokens, dtype=torch.bool)

        def sums(top=causal, bottom=causal, q=q, k=k, v=v) -> Tensor:
            return _sums(q, k, v, top, bottom)

        def soft(keep: Tensor, divisor: float, q=q, k=k, v=v) -> Tensor:
            return _masked(q, k, v, keep, divisor)

        before = "the state was read before it was written: a token sees itself too"
        exponential = "this is softmax: here a weight is q . k itself, divided by their sum"
        flipped = []
        if dim == value_dim:  # elsewhere it stops
            flipped = [
                (
                    "the outer product is transposed: with k v^T, q picks out values; with v k^T, it picks out keys",
                    lambda q=q, k=k, v=v, m=causal: (q @ v.T * m) @ k / (q @ k.T * m).sum(1, keepdim=True),
                )
            ]
        several = []
        if tokens > 1:
            several = [
                (before, lambda f=sums, m=strict: f(m, m)),
                (before, lambda f=sums, m=strict: f(m, m).nan_to_num(nan=0.0)),
                (
                    "S was read before it was written, though z was not: both take the token in first",
                    lambda f=sums, m=strict: f(m),
                ),
                (
                    "z was read before it was written, though S was not: both take the token in first",
                    lambda f=sums, m=strict: f(bottom=m),
                ),
                ("not causal: every token saw the sums of all", lambda f=sums, m=every: f(m, m)),
                (
                    "the normaliser takes in later keys: z is a running sum as well",
                    lambda f=sums, m=every: f(bottom=m),
                ),
                (
                    "z is causal, S is not: the values of later tokens are seen",
                    lambda f=sums, m=every: f(top=m),
                ),
                (
                    "the state was replaced, not added to: only the token itself is left",
                    lambda f=sums, m=own: f(m, m),
                ),
                ("S was replaced, not added to", lambda f=sums, m=own: f(top=m)),
                ("z was replaced, not added to", lambda f=sums, m=own: f(bottom=m)),
                (
                    "it divides by the number of tokens so far; the normaliser is q . z",
                    lambda f=sums, n=tokens: f(bottom=None) / torch.arange(1, n + 1)[:, None],
                ),
                (
                    "the weights look ahead: token t sees t and those behind it",
                    lambda f=sums, m=causal.T: f(m, m),
                ),
            ]
        trial.compare(
            trial.ask(**inputs),
            sums(),
            inputs,
            hints=[
                ("the normaliser is missing: divide by q . z", lambda f=sums: f(bottom=None)),
                *several,
                (
                    "it divides by the sum of the keys' features; the normaliser is q . z",
                    lambda f=sums, k=k: f(bottom=None) / k.cumsum(0).sum(1, keepdim=True),
                ),
                (
                    "the features were mapped once more: q and k are features already",
                    lambda f=sums, q=q, k=k: f(q=elu(q) + 1, k=elu(k) + 1),
                ),
                *(
                    (exponential, lambda f=soft, m=mask, r=divisor: f(m, r))
                    for mask in ((causal, every) if tokens > 1 else ())
                    for divisor in (1.0, math.sqrt(dim))
                ),
                *flipped,
            ],
            rtol=1e-3,
            atol=1e-4,
        )
