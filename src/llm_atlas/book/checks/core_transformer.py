"""The exercises of chapter 1, core transformer architecture.

Every reference is written here in plain torch, row by row where that is clearest; nothing is imported from
the layers that the chapter teaches.
"""

import math

import torch
from torch import Tensor

from llm_atlas.book.checks import Trial, checker


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None = None) -> Tensor:
    scores = q @ k.T * scale
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return scores.softmax(-1) @ v


@checker(
    "self-attention",
    asks="Write attend(q, k, v): q (queries, d), k (keys, d) and v (keys, d_v) give (queries, d_v), "
    "softmax of q @ k.T / sqrt(d) over the keys, times v.",
    praise="Scaled by sqrt(d), normalised over the keys, and steady on large scores.",
)
def grade_self_attention(trial: Trial) -> None:
    for queries, keys, d, d_v in [(1, 2, 2, 3), (2, 2, 4, 3), (2, 3, 4, 2), (4, 5, 8, 3), (3, 3, 16, 4)]:
        q, k, v = trial.normal(queries, d), trial.normal(keys, d), trial.normal(keys, d_v)
        inputs = {"q": q, "k": k, "v": v}
        scores = q @ k.T
        trial.compare(
            trial.ask(**inputs),
            _attend(q, k, v, d**-0.5),
            inputs,
            hints=[
                ("the scores were not divided by sqrt(d)", lambda q=q, k=k, v=v: _attend(q, k, v, 1.0)),
                (
                    "the scores were divided by d, not by sqrt(d)",
                    lambda q=q, k=k, v=v, d=d: _attend(q, k, v, 1 / d),
                ),
                (
                    "the scores were multiplied by sqrt(d), not divided",
                    lambda q=q, k=k, v=v, d=d: _attend(q, k, v, d**0.5),
                ),
                (
                    "the scale uses the width of v; the dot product adds up over the width of q and k",
                    lambda q=q, k=k, v=v, d_v=d_v: _attend(q, k, v, d_v**-0.5),
                ),
                (
                    "the softmax runs over the queries; each query's weights over the keys must add up to 1",
                    lambda s=scores, v=v, d=d: (s * d**-0.5).softmax(0) @ v,
                ),
                ("the scores were not put through a softmax", lambda s=scores, v=v, d=d: s * d**-0.5 @ v),
                (
                    "the scale was applied after the softmax; it belongs inside",
                    lambda s=scores, v=v, d=d: s.softmax(-1) * d**-0.5 @ v,
                ),
            ],
        )
    # exp of these scores overflows float32 unless the largest is subtracted first
    q, k, v = 300 + trial.normal(1, 2), torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), trial.normal(2, 1)
    inputs = {"q": q, "k": k, "v": v}
    trial.compare(trial.ask(**inputs), _attend(q, k, v, 2**-0.5), inputs)


def _multi_head(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, heads: int, d_scale: int
) -> Tensor:
    d = x.shape[-1] // heads
    outs = []
    for h in range(heads):
        columns = slice(h * d, (h + 1) * d)
        outs.append(_attend((x @ wq)[:, columns], (x @ wk)[:, columns], (x @ wv)[:, columns], d_scale**-0.5))
    return torch.cat(outs, dim=-1) @ wo


@checker(
    "multi-head-attention",
    asks="Write multi_head(x, wq, wk, wv, wo, heads): x (tokens, dim) and four (dim, dim) matrices used as "
    "x @ w; head h owns columns h*dim/heads up to (h+1)*dim/heads.",
    praise="Heads split by columns, attended each for itself, concatenated and mixed by wo.",
)
def grade_multi_head(trial: Trial) -> None:
    for tokens, dim, heads in [(2, 2, 2), (2, 4, 2), (3, 6, 3), (5, 8, 4), (4, 4, 1)]:
        x, (wq, wk, wv, wo) = trial.normal(tokens, dim), (trial.normal(dim, dim) for _ in range(4))
        inputs = {"x": x, "wq": wq, "wk": wk, "wv": wv, "wo": wo, "heads": heads}
        d = dim // heads

        def sliced(x=x, wq=wq, wk=wk, wv=wv, wo=wo, heads=heads, d=d) -> Tensor:
            q, k, v = ((x @ w).reshape(heads, -1, d) for w in (wq, wk, wv))
            mixed = (q @ k.mT * d**-0.5).softmax(-1) @ v
            return mixed.reshape(x.shape) @ wo

        def sliced_then_moved(x=x, wq=wq, wk=wk, wv=wv, wo=wo, heads=heads, d=d) -> Tensor:
            q, k, v = ((x @ w).reshape(heads, -1, d) for w in (wq, wk, wv))
            mixed = (q @ k.mT * d**-0.5).softmax(-1) @ v
            return mixed.transpose(0, 1).reshape(x.shape) @ wo

        def unmerged(x=x, wq=wq, wk=wk, wv=wv, wo=wo, heads=heads, d=d) -> Tensor:
            q, k, v = ((x @ w).reshape(-1, heads, d).transpose(0, 1) for w in (wq, wk, wv))
            mixed = (q @ k.mT * d**-0.5).softmax(-1) @ v
            return mixed.reshape(x.shape) @ wo

        def interleaved(x=x, wq=wq, wk=wk, wv=wv, wo=wo, heads=heads, d=d) -> Tensor:
            q, k, v = ((x @ w).reshape(-1, d, heads).movedim(-1, 0) for w in (wq, wk, wv))
            mixed = (q @ k.mT * d**-0.5).softmax(-1) @ v
            return mixed.movedim(0, -1).reshape(x.shape) @ wo

        cut = "the split mixes tokens: reshape to (tokens, heads, dim/heads), then transpose tokens and heads"
        args = (x, wq, wk, wv, wo, heads)
        trial.compare(
            trial.ask(**inputs),
            _multi_head(*args, d),
            inputs,
            hints=[
                (cut, sliced),
                (cut, sliced_then_moved),
                ("the heads were merged without transposing tokens and heads back", unmerged),
                ("head h took every heads-th column; it owns a block of neighbouring columns", interleaved),
                (
                    "the scale uses dim; each head's dot product is only dim/heads wide",
                    lambda args=args, dim=dim: _multi_head(*args, dim),
                ),
                (
                    "this is one wide head: the split into heads is missing",
                    lambda a=args, dim=dim: _attend(a[0] @ a[1], a[0] @ a[2], a[0] @ a[3], dim**-0.5) @ a[4],
                ),
                (
                    "the last projection, wo, is missing",
                    lambda a=args, d=d, dim=dim: _multi_head(*a[:4], torch.eye(dim), a[5], d),
                ),
                (
                    "the matrices were used transposed; here it is x @ w",
                    lambda a=args, d=d: _multi_head(a[0], *(w.T for w in a[1:5]), a[5], d),
                ),
            ],
            rtol=1e-3,
            atol=1e-4,
        )


@checker(
    "causal-mask",
    asks="Write mask(queries, keys): a (queries, keys) tensor of True/False, True where a query may look. "
    "The last query stands at the last key: with a cache there are more keys than queries.",
    praise="Each query sees its own key and all earlier ones, with and without a cache.",
)
def grade_causal_mask(trial: Trial) -> None:
    # two by two comes first: with a single query a missing diagonal and a flipped mask look alike
    sizes = [(2, 2), *((q, k) for k in range(1, 5) for q in range(1, k + 1))]
    queries = trial.integer(5, 9)
    sizes += [(queries, queries), (queries, queries + trial.integer(1, 9))]
    for queries, keys in sizes:
        inputs = {"queries": queries, "keys": keys}
        wanted = torch.tensor(
            [[key <= keys - queries + query for key in range(keys)] for query in range(queries)]
        )

        def at(offset: int, queries=queries, keys=keys) -> Tensor:
            return torch.tensor([[key <= query + offset for key in range(keys)] for query in range(queries)])

        trial.compare(
            trial.ask(**inputs),
            wanted,
            inputs,
            hints=[
                (
                    "the first query was put at the first key; the last query stands at the last key",
                    lambda at=at: at(0),
                ),
                (
                    "a query must see its own key: the diagonal belongs to the mask",
                    lambda at=at, o=keys - queries: at(o - 1),
                ),
                (
                    "the future is open: a query sees the key after its own",
                    lambda at=at, o=keys - queries: at(o + 1),
                ),
                ("the mask is the wrong way round: True is where a query may look", lambda w=wanted: ~w),
                (
                    "the mask looks ahead, at later keys instead of earlier ones",
                    lambda queries=queries, keys=keys: torch.tensor(
                        [[k >= keys - queries + q for k in range(keys)] for q in range(queries)]
                    ),
                ),
            ],
        )


@checker(
    "cross-attention",
    asks="Write cross(x, memory, wq, wk, wv, memory_mask): queries x @ wq, keys memory @ wk, "
    "values memory @ wv, scale 1/sqrt(d); memory_mask (keys,) is False on padding, which must get weight 0.",
    praise="Queries from one sequence, keys and values from the other, and no weight on padding.",
)
def grade_cross_attention(trial: Trial) -> None:
    for queries, keys, dim, memory_dim, d in [
        (1, 2, 2, 1, 1),
        (2, 3, 2, 3, 2),
        (3, 3, 4, 4, 4),
        (4, 6, 4, 5, 8),
    ]:
        x, memory = trial.normal(queries, dim), trial.normal(keys, memory_dim)
        wq, wk, wv = trial.normal(dim, d), trial.normal(memory_dim, d), trial.normal(memory_dim, d)
        keep = torch.arange(keys) < keys - trial.integer(1, keys - 1)
        inputs = {"x": x, "memory": memory, "wq": wq, "wk": wk, "wv": wv, "memory_mask": keep}
        q, k, v = x @ wq, memory @ wk, memory @ wv

        def zeroed(q=q, k=k, v=v, keep=keep) -> Tensor:
            return (q @ k.T * q.shape[-1] ** -0.5).softmax(-1) * keep @ v

        def scores_zeroed(q=q, k=k, v=v, keep=keep) -> Tensor:
            return (q @ k.T * q.shape[-1] ** -0.5 * keep).softmax(-1) @ v

        trial.compare(
            trial.ask(**inputs),
            _attend(q, k, v, d**-0.5, keep),
            inputs,
            hints=[
                (
                    "padding got weight: memory_mask is not used",
                    lambda q=q, k=k, v=v, d=d: _attend(q, k, v, d**-0.5),
                ),
                (
                    "the mask is used the wrong way round: True is a real token, False is padding",
                    lambda q=q, k=k, v=v, d=d, keep=keep: _attend(q, k, v, d**-0.5, ~keep),
                ),
                ("the weights of the real tokens do not add up to 1: mask before the softmax", zeroed),
                ("a score of 0 is not weight 0: hide padding with -inf before the softmax", scores_zeroed),
                (
                    "the scores were not divided by sqrt(d)",
                    lambda q=q, k=k, v=v, keep=keep: _attend(q, k, v, 1.0, keep),
                ),
                (
                    "the scale uses the width of x; it is the width of the queries and keys",
                    lambda q=q, k=k, v=v, keep=keep, dim=dim: _attend(q, k, v, dim**-0.5, keep),
                ),
            ],
            rtol=1e-3,
            atol=1e-4,
        )


@checker(
    "feed-forward",
    asks="Write count(dim, hidden, gated, bias): the number of parameters of a feed-forward layer: "
    "up and down projections, a third matrix beside the up projection if gated, a bias on every matrix "
    "if bias.",
    praise="Two matrices, three when gated, and a bias as wide as each matrix's output.",
)
def grade_feed_forward(trial: Trial) -> None:
    small = (trial.integer(2, 4), trial.integer(5, 9))
    large = (trial.integer(16, 64), trial.integer(65, 256))
    cases = [
        (*size, gated, bias) for size in (small, large) for gated in (False, True) for bias in (False, True)
    ]
    # the last one is SmolLM2-135M's own layer
    for dim, hidden, gated, bias in [*cases, (576, 1536, True, False)]:
        inputs = {"dim": dim, "hidden": hidden, "gated": gated, "bias": bias}
        matrices = dim * hidden * (3 if gated else 2)
        biases = hidden * (2 if gated else 1) + dim
        trial.compare(
            trial.ask(**inputs),
            matrices + (biases if bias else 0),
            inputs,
            hints=[
                ("the biases are missing", lambda m=matrices: m),
                ("there are no biases here", lambda m=matrices, b=biases: m + b),
                (
                    "a gated layer has three matrices: gate, up and down",
                    lambda dim=dim, hidden=hidden, bias=bias: 2 * dim * hidden + bias * (hidden + dim),
                ),
                (
                    "a layer without a gate has two matrices: up and down",
                    lambda dim=dim, hidden=hidden, bias=bias: 3 * dim * hidden + bias * (2 * hidden + dim),
                ),
                ("the gate has a bias too", lambda m=matrices, dim=dim, hidden=hidden: m + hidden + dim),
                (
                    "a bias is as wide as its matrix's output: hidden for up and gate, dim for down",
                    lambda m=matrices, hidden=hidden, gated=gated: m + hidden * (3 if gated else 2),
                ),
                (
                    "this counts multiply-adds twice, as FLOPs do; count the weights",
                    lambda m=matrices, b=biases, bias=bias: 2 * (m + (b if bias else 0)),
                ),
            ],
        )


def _jacobian(weights: Tensor, residual: bool) -> Tensor:
    total = torch.eye(weights.shape[-1])
    for w in weights:
        total = (torch.eye(w.shape[0]) + w if residual else w) @ total
    return total


@checker(
    "residual",
    asks="Write jacobian(weights, residual): layer i maps x to x + weights[i] @ x if residual, else to "
    "weights[i] @ x; weights is (layers, dim, dim). Return d output / d input, a (dim, dim) matrix.",
    praise="A product of I + W: the identity path survives any depth, while a product of W alone dies out or explodes.",
)
def grade_residual(trial: Trial) -> None:
    for layers, dim in [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (5, 3)]:
        for residual in (True, False):
            weights = trial.normal(layers, dim, dim)
            inputs = {"weights": weights, "residual": residual}
            eye = torch.eye(dim)
            trial.compare(
                trial.ask(**inputs),
                _jacobian(weights, residual),
                inputs,
                hints=[
                    (
                        "the order is reversed: the first layer touches the input, so it stands rightmost",
                        lambda w=weights, r=residual: _jacobian(w.flip(0), r),
                    ),
                    (
                        "the identity of the skip path is missing in every factor",
                        lambda w=weights: _jacobian(w, False),
                    ),
                    ("residual is False here: there is no skip path", lambda w=weights: _jacobian(w, True)),
                    (
                        "this is one skip around the whole stack; every layer has its own",
                        lambda w=weights, eye=eye: eye + _jacobian(w, False),
                    ),
                    (
                        "the layers were added up; they follow each other, so the factors multiply",
                        lambda w=weights, eye=eye, r=residual: (w + eye).sum(0) if r else w.sum(0),
                    ),
                    (
                        "the branches were added to one identity; paths through several branches are missing",
                        lambda w=weights, eye=eye: eye + w.sum(0),
                    ),
                    (
                        "the result is transposed: entry [i, j] is d output i / d input j",
                        lambda w=weights, r=residual: _jacobian(w, r).T,
                    ),
                ],
                rtol=1e-3,
                atol=1e-3,
            )


def _layer_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, *, axis: int = -1, correction: int = 0
) -> Tensor:
    centred = x - x.mean(axis, keepdim=True)
    variance = centred.square().sum(axis, keepdim=True) / max(x.shape[axis] - correction, 1)
    return centred / (variance + eps).sqrt() * gamma + beta


@checker(
    "layer-norm",
    asks="Write layer_norm(x, gamma, beta, eps): x (tokens, dim); each token minus its mean, over "
    "sqrt(variance + eps) with the variance divided by dim, times gamma, plus beta.",
    praise="Each token on its own, the plain variance, and eps inside the root.",
)
def grade_layer_norm(trial: Trial) -> None:
    for tokens, dim in [(1, 2), (2, 2), (1, 3), (2, 4), (3, 3), (5, 8)]:
        # a large eps makes its place visible
        for eps in (0.5, 1e-5):
            x, gamma, beta = trial.normal(tokens, dim), trial.normal(dim), trial.normal(dim)
            x[0, :2] = torch.tensor([1.0, -0.5]) * trial.integer(1, 5)  # never constant by chance
            inputs = {"x": x, "gamma": gamma, "beta": beta, "eps": eps}
            args = (x, gamma, beta, eps)
            centred = x - x.mean(-1, keepdim=True)
            std = centred.square().mean(-1, keepdim=True).sqrt()
            trial.compare(
                trial.ask(**inputs),
                _layer_norm(*args),
                inputs,
                hints=[
                    (
                        "the variance is divided by dim - 1; layer norm divides by dim (unbiased=False)",
                        lambda a=args: _layer_norm(*a, correction=1),
                    ),
                    (
                        "eps is added outside the root; it belongs under it, beside the variance",
                        lambda c=centred, s=std, a=args: c / (s + a[3]) * a[1] + a[2],
                    ),
                    (
                        "the variance is divided by dim - 1 (torch.std's default), eps is outside the root",
                        lambda c=centred, a=args: c / (a[0].std(-1, keepdim=True) + a[3]) * a[1] + a[2],
                    ),
                    ("eps is not used", lambda a=args: _layer_norm(*a[:3], 0.0)),
                    (
                        "the statistics run over the tokens; each token is normalised over its own features",
                        lambda a=args: _layer_norm(*a, axis=0),
                    ),
                    (
                        "the mean was not subtracted: this is RMSNorm",
                        lambda a=args: (
                            a[0] / (a[0].square().mean(-1, keepdim=True) + a[3]).sqrt() * a[1] + a[2]
                        ),
                    ),
                    (
                        "it divides by the variance, not by its root",
                        lambda c=centred, s=std, a=args: c / (s.square() + a[3]) * a[1] + a[2],
                    ),
                    ("beta is missing", lambda a=args: _layer_norm(a[0], a[1], torch.zeros_like(a[2]), a[3])),
                    ("gamma is missing", lambda a=args: _layer_norm(a[0], torch.ones_like(a[1]), a[2], a[3])),
                    (
                        "gamma and beta are missing",
                        lambda a=args: _layer_norm(a[0], torch.ones_like(a[1]), torch.zeros_like(a[2]), a[3]),
                    ),
                ],
            )
    # all features equal: the variance is 0 and only eps keeps the division finite
    x, gamma, beta = torch.full((1, 2), float(trial.integer(1, 9))), trial.normal(2), trial.normal(2)
    inputs = {"x": x, "gamma": gamma, "beta": beta, "eps": 1e-5}
    trial.compare(trial.ask(**inputs), beta[None], inputs)


def _sinusoid(length: int, dim: int, angle) -> Tensor:
    """(length, dim) with sin in even and cos in odd columns; `angle(position, pair)` gives the angle."""
    rows = [[f(angle(p, i)) for i in range(dim // 2) for f in (math.sin, math.cos)] for p in range(length)]
    return torch.tensor(rows)


@checker(
    "positional-encoding",
    asks="Write positions(length, dim): a (length, dim) tensor, dim even; column 2i holds "
    "sin(p / 10000**(2i/dim)) of position p = 0, 1, ..., column 2i+1 the cos of the same angle.",
    praise="Sine and cosine in pairs, one frequency a pair, from 1 down towards 1/10000.",
)
def grade_positions(trial: Trial) -> None:
    sizes = [(1, 2), (2, 2), (2, 4), (3, 4), (3, 6)]
    sizes.append((trial.integer(5, 40), 2 * trial.integer(4, 16)))
    for length, dim in sizes:
        inputs = {"length": length, "dim": dim}

        def made(angle, length=length, dim=dim) -> Tensor:
            return _sinusoid(length, dim, angle)

        wanted = made(lambda p, i, dim=dim: p / 10000 ** (2 * i / dim))

        def own_exponents(length=length, dim=dim) -> Tensor:
            rows = [
                [(math.cos if c % 2 else math.sin)(p / 10000 ** (c / dim)) for c in range(dim)]
                for p in range(length)
            ]
            return torch.tensor(rows)

        trial.compare(
            trial.ask(**inputs),
            wanted,
            inputs,
            hints=[
                (
                    "the exponent is half of what it should be: it is 2i/dim for the pair i",
                    lambda made=made, dim=dim: made(lambda p, i: p / 10000 ** (i / dim)),
                ),
                (
                    "the exponent is doubled: column 2i has exponent 2i/dim, so the pair's number is i",
                    lambda made=made, dim=dim: made(lambda p, i: p / 10000 ** (4 * i / dim)),
                ),
                (
                    "the cosine has a frequency of its own; both columns of a pair share the exponent 2i/dim",
                    own_exponents,
                ),
                (
                    "sines and cosines stand in two halves; here they alternate, sin in 2i and cos in 2i+1",
                    lambda w=wanted: torch.cat([w[:, 0::2], w[:, 1::2]], dim=1),
                ),
                (
                    "sine and cosine are swapped: sin comes first",
                    lambda w=wanted: w.reshape(len(w), -1, 2).flip(-1).reshape(w.shape),
                ),
                (
                    "positions start at 1 here; the first position is 0",
                    lambda made=made, dim=dim: made(lambda p, i: (p + 1) / 10000 ** (2 * i / dim)),
                ),
                (
                    "the angle grows with the pair: divide the position by 10000**(2i/dim)",
                    lambda made=made, dim=dim: made(lambda p, i: p * 10000 ** (2 * i / dim)),
                ),
                (
                    "10000 is multiplied by 2i/dim where it should be raised to that power",
                    lambda made=made, dim=dim: made(
                        lambda p, i: p / (10000 * (2 * i / dim)) if i else float(p)
                    ),
                ),
            ],
            atol=1e-4,
        )


@checker(
    "qk-norm",
    asks="Write bound(gamma_q, gamma_k): the largest |q . k| / sqrt(d) that any query and key can reach "
    "after RMS QK-norm, where q = gamma_q * a / rms(a) and k = gamma_k * b / rms(b), elementwise, "
    "d = len(gamma_q).",
    praise="sqrt(d) times the largest |gamma_q * gamma_k|: no query or key, however long, can exceed it.",
)
def grade_qk_norm(trial: Trial) -> None:
    for d in (1, 2, 4, 8, 64):
        gamma_q, gamma_k = trial.normal(d), trial.normal(d)
        if d > 1:
            # the largest of each in different channels, the larger product negative
            gamma_q[:2], gamma_k[:2] = torch.tensor([3.0, -1.5]), torch.tensor([0.3, 2.5])
            gamma_q = gamma_q * trial.integer(1, 4)
        inputs = {"gamma_q": gamma_q, "gamma_k": gamma_k}
        product = gamma_q * gamma_k
        wanted = float(math.sqrt(d) * product.abs().max())
        got = trial.ask(**inputs)
        peak, root = product.abs().max(), math.sqrt(d)
        trial.compare(
            got,
            wanted,
            inputs,
            hints=[
                ("the gains are missing: sqrt(d) holds only when every gamma is 1", lambda root=root: root),
                (
                    "the sign is lost: a negative product of gains bounds just as a positive one",
                    lambda p=product, root=root: float(root * p.max()),
                ),
                (
                    "q and k meet channel by channel: multiply first, then take the largest",
                    lambda q=gamma_q, k=gamma_k, root=root: float(root * q.abs().max() * k.abs().max()),
                ),
                (
                    "the scale 1/sqrt(d) is missing: two vectors of length sqrt(d) give d before it",
                    lambda peak=peak, d=d: float(d * peak),
                ),
                (
                    "the lengths are missing: a vector with rms 1 has length sqrt(d), not 1",
                    lambda peak=peak: float(peak),
                ),
                (
                    "divided once too often: d / sqrt(d) = sqrt(d)",
                    lambda peak=peak, root=root: float(peak / root),
                ),
                (
                    "too generous: the channels of a share one length, sqrt(d), and those of b as well",
                    lambda p=product, root=root: float(root * p.abs().sum()),
                ),
                (
                    "equal channels reach this; a query and key that sit in one channel alone reach more",
                    lambda p=product, root=root: float(p.abs().sum() / root),
                ),
            ],
        )
