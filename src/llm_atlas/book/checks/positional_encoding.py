"""The exercises of chapter 2, positional encoding variants.

Every reference is written here in plain torch, feature by feature where that is clearest; nothing is imported
from the layers that the chapter teaches.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llm_atlas.book.checks import Trial, _report, _Wrong, checker

Angle = Callable[[int, int], float]


def _turn(x: Tensor, angle: Angle, partner: Callable[[int], tuple[int, int]]) -> Tensor:
    """Every token's pair i, the features `partner(i)`, turned by `angle(token, i)`."""
    out = x.double().clone()
    for t in range(x.shape[0]):
        for i in range(x.shape[1] // 2):
            a, b = partner(i)
            c, s = math.cos(angle(t, i)), math.sin(angle(t, i))
            out[t, a], out[t, b] = x[t, a] * c - x[t, b] * s, x[t, b] * c + x[t, a] * s
    return out.float()


def _each(x: Tensor, angle: Angle, of: Callable[[float], float]) -> Tensor:
    """`of` the angle of every token's pair, for both features of a half-split pair."""
    one = torch.tensor([[of(angle(t, i)) for i in range(x.shape[1] // 2)] for t in range(x.shape[0])])
    return torch.cat([one, one], dim=1)


@checker(
    "rope",
    asks="Write rotate(x, positions, base): x (tokens, dim), positions (tokens,). In token t the pair of "
    "features i and i + dim/2 is turned by the angle positions[t] * base**(-2i/dim).",
    praise="Half-split pairs, each turned by its own angle, at the positions that were given.",
)
def grade_rope(trial: Trial) -> None:
    for tokens, dim, base in [(2, 2, 100.0), (2, 4, 10000.0), (3, 6, 100.0), (4, 8, 500.0)]:
        x = trial.normal(tokens, dim)
        # not 0, 1, 2, ...: a cached model asks for positions anywhere
        positions = torch.tensor([trial.integer(1, 3) + 4 * place for place in range(tokens)]).flip(0)
        inputs = {"x": x, "positions": positions, "base": base}
        at = positions.tolist()

        def half(i: int, dim=dim) -> tuple[int, int]:
            return i, i + dim // 2

        def side(i: int) -> tuple[int, int]:
            return 2 * i, 2 * i + 1

        def angle(t: int, i: int, at=at, base=base, dim=dim) -> float:
            return at[t] * base ** (-2 * i / dim)

        trial.compare(
            trial.ask(**inputs),
            _turn(x, angle, half),
            inputs,
            hints=[
                ("nothing is turned", lambda x=x: x),
                (
                    "this is the interleaved layout, pairs (0, 1), (2, 3), ...; here feature i goes with i + dim/2",
                    lambda x=x, angle=angle: _turn(x, angle, side),
                ),
                (
                    "it turns the wrong way: (a, b) becomes (a cos - b sin, b cos + a sin)",
                    lambda x=x, angle=angle, half=half: _turn(x, lambda t, i: -angle(t, i), half),
                ),
                (
                    "one sign is missing: (a, b) becomes (a cos - b sin, b cos + a sin)",
                    lambda x=x, angle=angle: (
                        x * _each(x, angle, math.cos) + x.roll(x.shape[1] // 2, 1) * _each(x, angle, math.sin)
                    ),
                ),
                (
                    "the angles are radians already; do not convert them",
                    lambda x=x, angle=angle, half=half: _turn(
                        x, lambda t, i: math.radians(angle(t, i)), half
                    ),
                ),
                (
                    "the positions are not used: token t is turned as if it stood at t",
                    lambda x=x, base=base, dim=dim, half=half: _turn(
                        x, lambda t, i: t * base ** (-2 * i / dim), half
                    ),
                ),
                (
                    "the exponent is half of what it should be: pair i has base**(-2i/dim)",
                    lambda x=x, at=at, base=base, dim=dim, half=half: _turn(
                        x, lambda t, i: at[t] * base ** (-i / dim), half
                    ),
                ),
                (
                    "the angle grows from pair to pair: the exponent is negative",
                    lambda x=x, at=at, base=base, dim=dim, half=half: _turn(
                        x, lambda t, i: at[t] * base ** (2 * i / dim), half
                    ),
                ),
                (
                    "base is not used: 10000 stands in the code",
                    lambda x=x, at=at, dim=dim, half=half: _turn(
                        x, lambda t, i: at[t] * 10000 ** (-2 * i / dim), half
                    ),
                ),
                (
                    "every pair is turned by the same angle; pair i has a speed of its own",
                    lambda x=x, at=at, half=half: _turn(x, lambda t, i: float(at[t]), half),
                ),
                (
                    "all tokens are turned alike, by the first position",
                    lambda x=x, angle=angle, half=half: _turn(x, lambda t, i: angle(0, i), half),
                ),
            ],
            rtol=1e-3,
            atol=1e-3,
        )


@checker(
    "learned-positions",
    asks="Write embed(ids, tokens, table, start): ids (batch, seq) and two tables, tokens (vocab, dim) and "
    "table (max_len, dim). The first id of every row stands at position start. Return (batch, seq, dim).",
    praise="A row for the token plus a row for the place, and the places go on from start.",
)
def grade_learned(trial: Trial) -> None:
    # more texts than tokens first: who counts the texts is caught by shape alone
    for batch, seq, dim, start in [(2, 1, 2, 1), (1, 2, 2, 0), (2, 2, 2, 1), (2, 3, 4, 2), (3, 4, 3, 5)]:
        tokens, table = trial.normal(4, dim), trial.normal(10, dim)
        ids = torch.tensor([[trial.integer(0, 3) for _ in range(seq)] for _ in range(batch)])
        ids.view(-1)[:2] = torch.tensor([3, 0])[: ids.numel()]  # no id at the place of its own number
        inputs = {"ids": ids, "tokens": tokens, "table": table, "start": start}
        places = torch.arange(start, start + seq)
        trial.compare(
            trial.ask(**inputs),
            torch.stack(
                [torch.stack([tokens[i] + table[p] for i, p in zip(row, places, strict=True)]) for row in ids]
            ),
            inputs,
            hints=[
                ("the positions are missing: these are the tokens alone", lambda t=tokens, i=ids: t[i]),
                (
                    "you counted the texts, not the tokens: ids.shape is (batch, seq)",
                    lambda t=tokens, i=ids, p=table, s=start: (
                        t[i] + p[s : s + len(i)] if i.shape[1] == 1 else t[i]
                    ),
                ),
                (
                    "start is not used: the places begin at 0 again",
                    lambda t=tokens, i=ids, p=table, seq=seq: t[i] + p[:seq],
                ),
                (
                    "the table was read by id; it is read by place",
                    lambda t=tokens, i=ids, p=table: t[i] + p[i],
                ),
                (
                    "every token got the place of the first one",
                    lambda t=tokens, i=ids, p=table, start=start: t[i] + p[start],
                ),
                (
                    "positions start at 1 here; the first position is 0",
                    lambda t=tokens, i=ids, p=table, places=places: t[i] + p[places + 1],
                ),
                (
                    "the places run through the batch; every row starts at start",
                    lambda t=tokens, i=ids, p=table, s=start: (
                        t[i] + p[(s + torch.arange(i.numel())).view_as(i).clamp(max=len(p) - 1)]
                    ),
                ),
            ],
        )


def _shift(dim: int, angle: Callable[[int], float], *, halves: bool = False) -> Tensor:
    """Block matrix on pairs (sin, cos): sin(a + n) = sin a cos n + cos a sin n, cos(a + n) likewise."""
    m = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        a, b = (i, i + dim // 2) if halves else (2 * i, 2 * i + 1)
        c, s = math.cos(angle(i)), math.sin(angle(i))
        m[a, a], m[a, b], m[b, a], m[b, b] = c, s, -s, c
    return m.float()


@checker(
    "sinusoidal",
    asks="Write shift(n, dim): the (dim, dim) matrix M with M @ PE(p) = PE(p + n) for every position p, where "
    "PE(p)[2i] = sin(p / 10000**(2i/dim)) and PE(p)[2i+1] is the cos of the same angle.",
    praise="One small rotation for each pair, the same from wherever one starts.",
)
def grade_sinusoidal(trial: Trial) -> None:
    for n, dim in [
        (1, 2),
        (0, 2),
        (2, 2),
        (1, 4),
        (trial.integer(2, 60), 4),
        (-trial.integer(1, 60), 6),
        (30, 8),
    ]:
        inputs = {"n": n, "dim": dim}

        def angle(i: int, n=n, dim=dim) -> float:
            return n / 10000 ** (2 * i / dim)

        trial.compare(
            trial.ask(**inputs),
            _shift(dim, angle),
            inputs,
            hints=[
                (
                    "n may be negative: then it shifts back",
                    lambda dim=dim, n=n: _shift(dim, lambda i: abs(n) / 10000 ** (2 * i / dim)),
                ),
                (
                    "this shifts back by n: it is the transpose of what was asked",
                    lambda dim=dim, angle=angle: _shift(dim, lambda i: -angle(i)),
                ),
                (
                    "the pairs are in two halves; here a sine and its cosine are neighbours, 2i and 2i+1",
                    lambda dim=dim, angle=angle: _shift(dim, angle, halves=True),
                ),
                (
                    "the exponent is half of what it should be: pair i has 10000**(2i/dim)",
                    lambda dim=dim, n=n: _shift(dim, lambda i: n / 10000 ** (i / dim)),
                ),
                (
                    "the exponent is doubled: pair i, not feature i, has 10000**(2i/dim)",
                    lambda dim=dim, n=n: _shift(dim, lambda i: n / 10000 ** (4 * i / dim)),
                ),
                (
                    "every pair is turned by the same angle; pair i has its own frequency",
                    lambda dim=dim, n=n: _shift(dim, lambda i: float(n)),
                ),
                (
                    "n is not used: this is the shift by one position",
                    lambda dim=dim: _shift(dim, lambda i: 1 / 10000 ** (2 * i / dim)),
                ),
                (
                    "the speed grows from pair to pair; it should fall",
                    lambda dim=dim, n=n: _shift(dim, lambda i: n * 10000 ** (2 * i / dim)),
                ),
            ],
            rtol=1e-3,
            atol=1e-4,
        )


def _alibi(
    heads: int, tokens: int, slope: Callable[[int], float], entry: Callable[[int, int], float]
) -> Tensor:
    return torch.tensor(
        [
            [
                [slope(h) * entry(i, j) if math.isfinite(entry(i, j)) else entry(i, j) for j in range(tokens)]
                for i in range(tokens)
            ]
            for h in range(heads)
        ]
    )


@checker(
    "alibi",
    asks="Write alibi(heads, tokens) for a power of two of heads: a (heads, tokens, tokens) tensor. Head "
    "h = 0, 1, ... has slope 2**(-8 * (h + 1) / heads); entry [h, i, j] is -slope * (i - j) for a key j up to "
    "the query i, and -inf for a key in the future.",
    praise="Steep heads look near, flat ones far, and nobody looks ahead.",
)
def grade_alibi(trial: Trial) -> None:
    for heads, tokens in [
        (4, 2),  # of two heads the slopes of several slips are equal
        (2, 3),
        (4, 3),
        (8, trial.integer(4, 40)),  # so many sizes that none can be learnt by heart
        (16, trial.integer(4, 40)),
    ]:
        inputs = {"heads": heads, "tokens": tokens}

        def slope(h: int, heads=heads) -> float:
            return 2.0 ** (-8 * (h + 1) / heads)

        def causal(i: int, j: int) -> float:
            return -float(i - j) if j <= i else -math.inf

        def made(slope, entry, heads=heads, tokens=tokens) -> Tensor:
            return _alibi(heads, tokens, slope, entry)

        got, wanted = trial.ask(**inputs), made(slope, causal)
        trial.compare(
            got,
            wanted,
            inputs,
            hints=[
                (
                    "the future needs -inf: a large negative number is not nothing",
                    lambda got=got, wanted=wanted: (
                        torch.where(wanted.isinf() & (got < -100), got, wanted)
                        if isinstance(got, Tensor) and got.shape == wanted.shape
                        else wanted
                    ),
                ),
                (
                    "this has the same softmax, but it is not -m (i - j)",
                    lambda made=made, slope=slope: made(
                        slope, lambda i, j: float(j) if j <= i else -math.inf
                    ),
                ),
                (
                    "a token may look at itself: the diagonal is 0",
                    lambda made=made, slope=slope: made(
                        slope, lambda i, j: causal(i, j) if j < i else -math.inf
                    ),
                ),
                (
                    "the exponent is -8 (h + 1) / heads, not -8 / (h + 1)",
                    lambda made=made: made(lambda h: 2.0 ** (-8 / (h + 1)), causal),
                ),
                (
                    "the future is open: a key after the query must get -inf",
                    lambda made=made, slope=slope: made(slope, lambda i, j: -float(i - j)),
                ),
                (
                    "the future is open: a key after the query must get -inf",
                    lambda made=made, slope=slope: made(slope, lambda i, j: -float(max(i - j, 0))),
                ),
                (
                    "the future is open: a key after the query must get -inf",
                    lambda made=made, slope=slope: made(slope, lambda i, j: -float(abs(i - j))),
                ),
                (
                    "the sign is wrong: far keys are rewarded, they should lose",
                    lambda made=made, slope=slope: made(
                        slope, lambda i, j: -causal(i, j) if j <= i else -math.inf
                    ),
                ),
                (
                    "queries and keys are swapped: the past is hidden and the future open",
                    lambda made=made, slope=slope: made(slope, lambda i, j: causal(j, i)),
                ),
                (
                    "the slopes begin at 1; the first is 2**(-8/heads)",
                    lambda made=made, heads=heads: made(lambda h: 2.0 ** (-8 * h / heads), causal),
                ),
                (
                    "the slopes are in reverse; the first head is the steepest",
                    lambda made=made, heads=heads: made(lambda h: 2.0 ** (-8 * (heads - h) / heads), causal),
                ),
                (
                    "the slopes are those of 8 heads, 1/2, 1/4, ...; the exponent is -8 (h + 1) / heads",
                    lambda made=made: made(lambda h: 2.0 ** -(h + 1), causal),
                ),
                (
                    "all heads have slope 1; each has its own",
                    lambda made=made: made(lambda h: 1.0, causal),
                ),
                (
                    "a key at the query itself has distance 0, not 1",
                    lambda made=made, slope=slope: made(slope, lambda i, j: causal(i, j) - 1),
                ),
            ],
        )


def _bucket(
    n: int, buckets: int, longest: int, *, exact: int | float | None = None, rounded=math.floor, clip=True
) -> int | float:
    exact = buckets // 2 if exact is None else exact
    if n < exact:
        return n
    found = exact + rounded(math.log(n / exact) / math.log(longest / exact) * (buckets - exact))
    return min(found, buckets - 1) if clip else found


@checker(
    "relative-position",
    asks="Write bucket(distance, buckets, max_distance): distance (n,) of whole numbers from 0 up, how far back "
    "a key lies. With e = buckets // 2: a distance below e is its own bucket; from e on the bucket is "
    "e + floor(log(distance / e) / log(max_distance / e) * (buckets - e)), and never above buckets - 1.",
    praise="Near distances one by one, far ones in ever wider bins, and one bin for all the rest.",
)
def grade_relative(trial: Trial) -> None:
    # sizes at which no distance falls on the edge of a bin, where rounding would decide
    for buckets, longest in [(8, 20), (9, 30), (16, 100), (32, 128)]:
        far = sorted({trial.integer(buckets, 3 * longest) for _ in range(4)})
        places = [0, 1, buckets // 2 - 1, buckets // 2, buckets // 2 + 1, *far, 5 * longest]
        if buckets > 4:
            places = sorted({*places, *range(buckets)})
        distance = torch.tensor(places)
        inputs = {"distance": distance, "buckets": buckets, "max_distance": longest}

        def made(places=places, buckets=buckets, longest=longest, **slip) -> Tensor:
            return torch.tensor([_bucket(n, buckets, longest, **slip) for n in places])

        got, wanted = trial.ask(**inputs), made()
        trial.compare(
            got,
            wanted,
            inputs,
            hints=[
                ("far distances pass the last bucket: it is buckets - 1", lambda made=made: made(clip=False)),
                (
                    "the bins begin too early: use floor, not ceil",
                    lambda made=made: made(rounded=math.ceil),
                ),
                (
                    "a bucket is a whole number: use floor",
                    lambda got=got, wanted=wanted: (
                        got
                        if isinstance(got, Tensor) and torch.equal(got.floor().double(), wanted.double())
                        else torch.full_like(wanted, -1)
                    ),
                ),
                (
                    "e is buckets // 2, a whole number",
                    lambda made=made, b=buckets: made(exact=b / 2).long(),
                ),
                ("rounded to the nearest bin; use floor", lambda made=made: made(rounded=round)),
                (
                    "these are clipped distances, as Shaw's; far ones share bins that grow with the logarithm",
                    lambda d=distance, b=buckets: d.clamp(max=b - 1),
                ),
                (
                    "all buckets are logarithmic; the nearest buckets // 2 distances have one each",
                    lambda made=made: made(exact=1),
                ),
                (
                    "the logarithmic bins are counted from 0: they begin at buckets // 2",
                    lambda p=places, b=buckets, m=longest: torch.tensor(
                        [n if n < b // 2 else _bucket(n, b, m) - b // 2 for n in p]
                    ),
                ),
            ],
            rtol=0.0,
            atol=0.0,
        )
        if got.is_floating_point():
            fault = "a bucket is the number of a row: return whole numbers"
            raise _Wrong(_report(fault, inputs, got=got, wanted=wanted))


def _fit(hidden: Tensor, positions: Tensor, fresh: Tensor) -> Tensor:
    return fresh @ torch.linalg.lstsq(hidden, positions[:, None]).solution[:, 0]


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


@checker(
    "nope",
    asks="Write probe(hidden, positions, fresh): fit positions (n,) by least squares as hidden @ w + b from "
    "hidden (n, dim), and return the fit's guesses (m,) for other vectors, fresh (m, dim).",
    praise="Fitted on some vectors, asked about others: what a straight line can read, and no more.",
)
def grade_nope(trial: Trial) -> None:
    for n, m, dim in [(4, 2, 1), (6, 2, 2), (9, 3, 3), (20, 4, 5)]:
        hidden, fresh = trial.normal(n, dim), trial.normal(m, dim)
        hidden[:dim] += 3 * torch.eye(dim)  # well-conditioned, whatever is drawn
        positions = torch.arange(n).float() + trial.integer(2, 9)
        inputs = {"hidden": hidden, "positions": positions, "fresh": fresh}
        h, p, f = hidden.double(), positions.double(), fresh.double()

        trial.compare(
            trial.ask(**inputs),
            _fit(_with_one(h), p, _with_one(f)).float(),
            inputs,
            hints=[
                (
                    "b is missing: without it the fit must pass through the origin",
                    lambda h=h, p=p, f=f: _fit(h, p, f).float(),
                ),
                (
                    "these are guesses for hidden, which it was fitted on; the guesses for fresh were asked",
                    lambda h=h, p=p, m=m: _fit(_with_one(h), p, _with_one(h)).float(),
                ),
                (
                    "b is fitted and then left out of the guesses",
                    lambda h=h, p=p, f=f: (
                        f @ torch.linalg.lstsq(_with_one(h), p[:, None]).solution[:-1, 0]
                    ).float(),
                ),
                (
                    "the mean was taken off and not put back",
                    lambda h=h, p=p, f=f: _fit(h - h.mean(0), p - p.mean(), f - h.mean(0)).float(),
                ),
                (
                    "fresh was centred by its own mean; the fit knows only that of hidden",
                    lambda h=h, p=p, f=f: (
                        _fit(h - h.mean(0), p - p.mean(), f - f.mean(0)) + p.mean()
                    ).float(),
                ),
                (
                    "this is the mean position for all: w is not used",
                    lambda p=p, m=m: torch.full((m,), float(p.mean())),
                ),
            ],
            rtol=1e-3,
            atol=1e-3,
        )
