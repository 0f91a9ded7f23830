"""The exercises of chapter 3, model architecture variants.

Every reference is written here in plain torch or plain Python, the slow and obvious way; nothing is imported from
the models that the chapter teaches.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llm_atlas.book.checks import Trial, checker

Slip = tuple[str, Callable[..., Any]]
# Draws of inputs until all slips can be told apart; some dozens are enough.
_TRIES = 2000
_ALIKE = f"in {_TRIES} draws two slips, or a slip and the right way, always gave the same"


def _hints(slips: Iterable[Slip], *args: Any) -> list[tuple[str, Callable[[], Any]]]:
    """The slips as hints for the inputs `args`."""
    return [(text, partial(compute, *args)) for text, compute in slips]


def _are_told_apart(right: Tensor, slips: Iterable[Slip], *args: Any) -> bool:
    """Whether each slip gives something else than the right way, and than every other slip."""
    seen = [("", right)]
    for text, compute in slips:
        x = compute(*args)
        for other, y in seen:
            if text != other and x.shape == y.shape and torch.dist(x, y, math.inf) < 1e-3:
                return False
        seen.append((text, x))
    return True


class _Sizes(NamedTuple):
    """What decides how many parameters a decoder has."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def table(self) -> int:
        return self.vocab * self.dim

    @property
    def layer(self) -> int:
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_dim
        return attention + 3 * self.dim * self.hidden + 2 * self.dim


def _parameters(c: _Sizes) -> int:
    return (1 if c.tied else 2) * c.table + c.layers * c.layer + c.dim


_NO_BIAS = "biases were counted; the linear layers of this decoder have none"
_MISCOUNTS: tuple[tuple[str, Callable[[_Sizes], int]], ...] = (
    ("keys and values were counted as wide as queries; they have kv_heads heads", lambda c: _wide_keys(c)),
    ("keys or values are missing: each has a matrix of its own", lambda c: -c.layers * c.dim * c.kv_dim),
    (
        "keys and values were counted with one head; they have kv_heads of them",
        lambda c: -2 * c.layers * c.dim * (c.kv_dim - c.head_dim),
    ),
    (
        "kv_heads was taken for the width of keys and values; a head is dim / heads wide",
        lambda c: -2 * c.layers * c.dim * (c.kv_dim - c.kv_heads),
    ),
    (
        "every head was counted dim wide; a head is dim / heads wide",
        lambda c: c.layers * c.dim * ((c.heads - 1) * c.dim + 2 * (c.kv_heads * c.dim - c.kv_dim)),
    ),
    (
        "the output projection of attention is missing, dim x dim in every layer",
        lambda c: -c.layers * c.dim * c.dim,
    ),
    (
        "the gated feed-forward has three matrices: gate, up and down",
        lambda c: -c.layers * c.dim * c.hidden,
    ),
    ("only one layer was counted", lambda c: -(c.layers - 1) * c.layer),
    (
        "the head was counted: tied, it is the embedding itself",
        lambda c: c.table if c.tied else 0,
    ),
    ("the embedding is missing, vocab x dim", lambda c: -c.table if c.tied else 0),
    (
        "embedding and head are two matrices where they are not tied; one is missing",
        lambda c: 0 if c.tied else -c.table,
    ),
    ("the embedding and the head are missing", lambda c: 0 if c.tied else -2 * c.table),
    ("the norm after the last layer is missing", lambda c: -c.dim),
    ("the norms of the layers are missing, two in each", lambda c: -2 * c.layers * c.dim),
    ("a layer has two norms, before attention and before the feed-forward", lambda c: -c.layers * c.dim),
    ("all norms are missing: two in each layer, and one at the end", lambda c: -(2 * c.layers + 1) * c.dim),
    ("the last norm was counted in every layer", lambda c: (c.layers - 1) * c.dim),
    ("the norms were counted with a bias; RMSNorm has gains alone", lambda c: (2 * c.layers + 1) * c.dim),
    (
        "norms of queries and keys were counted; this decoder has none",
        lambda c: 2 * c.layers * c.head_dim,
    ),
    (_NO_BIAS, lambda c: c.layers * (c.dim + 2 * c.kv_dim)),
    (_NO_BIAS, lambda c: c.layers * (2 * c.dim + 2 * c.kv_dim)),
    (_NO_BIAS, lambda c: c.layers * (2 * c.hidden + c.dim)),
    (_NO_BIAS, lambda c: _all_biases(c)),
    (_NO_BIAS, lambda c: _all_biases(c) + (0 if c.tied else c.vocab)),
)


def _wide_keys(c: _Sizes) -> int:
    return 2 * c.layers * c.dim * (c.dim - c.kv_dim)


def _all_biases(c: _Sizes) -> int:
    return c.layers * (3 * c.dim + 2 * c.kv_dim + 2 * c.hidden)


def _telling_sizes(trial: Trial, tied: bool) -> _Sizes:
    """Grouped heads, and sizes by which each miscount can be told from all others."""
    for _ in range(_TRIES):
        kv_heads = trial.integer(3, 5)
        heads = kv_heads * trial.integer(2, 3)
        dim = heads * trial.integer(2, 5)
        sizes = _Sizes(
            vocab=trial.integer(50, 99),
            dim=dim,
            layers=trial.integer(2, 5),
            heads=heads,
            kv_heads=kv_heads,
            hidden=trial.integer(dim + 1, 3 * dim),
            tied=tied,
        )
        seen = [moved for _, miscount in _MISCOUNTS if (moved := miscount(sizes))]
        # the two sums of all biases are one number where there is no head
        if len(set(seen)) == len(seen) - tied:
            return sizes
    raise AssertionError(_ALIKE)


@checker(
    "decoder-only",
    asks="Write count(vocab, dim, layers, heads, kv_heads, hidden, tied): the parameters of a decoder like Llama. "
    "Each layer has attention with heads of dim/heads features, a gated feed-forward, and an RMSNorm before each; "
    "one more RMSNorm stands at the end. Positions are rotary, nothing has a bias; tied: the head is the embedding.",
    praise="Every matrix once and every gain; for the sizes of SmolLM2-135M this is 134,515,008.",
)
def grade_decoder_only(trial: Trial) -> None:
    tied, untied = _telling_sizes(trial, True), _telling_sizes(trial, False)
    cases = [
        tied,
        untied,
        _telling_sizes(trial, True)._replace(kv_heads=1),
        _Sizes(vocab=17, dim=8, layers=1, heads=4, kv_heads=4, hidden=trial.integer(9, 30), tied=False),
        _Sizes(vocab=49152, dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, tied=True),
    ]
    for sizes in cases:
        inputs, wanted = sizes._asdict(), _parameters(sizes)
        trial.compare(
            trial.ask(**inputs),
            wanted,
            inputs,
            hints=[(text, lambda w=wanted, f=miscount, c=sizes: w + f(c)) for text, miscount in _MISCOUNTS],
        )


def _mean(hidden: Tensor, keep: Tensor) -> Tensor:
    """One sentence after the other, the mean of its tokens' vectors."""
    return torch.stack([row[kept].mean(0) for row, kept in zip(hidden, keep, strict=True)])


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _cosines(vectors: Tensor) -> Tensor:
    return _unit(vectors) @ _unit(vectors).T


def _highest(hidden: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([row[kept].amax(0) for row, kept in zip(hidden, keep, strict=True)])


def _at(hidden: Tensor, keep: Tensor, token: int) -> Tensor:
    """The first or last real token of each sentence."""
    return torch.stack([row[kept][token] for row, kept in zip(hidden, keep, strict=True)])


def _products(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


_PADDING_IN = "padding was averaged in: keep is False there"
_ONE_TOKEN = "one token stands for the sentence; take the mean over all that are kept"
_NOT_UNIT = "the vectors were not made unit length: these are dot products, not cosines"
_EACH_TOKEN = "every token was made unit length; that belongs after the mean, to the sentence's vector"
_HALF_UNIT = "only one side was made unit length"
_MAXIMUM = "the largest value of each feature was taken; it is the mean that was asked for"
_SIMILARITY_SLIPS: tuple[Slip, ...] = (
    (_PADDING_IN, lambda h, k: _cosines(h.mean(1))),
    (
        "the mean runs over the padding alone; keep is True on the tokens",
        lambda h, k: _cosines(_mean(h, ~k)),
    ),
    (_ONE_TOKEN, lambda h, k: _cosines(h[:, 0])),
    (_ONE_TOKEN, lambda h, k: _cosines(h[:, -1])),
    (_ONE_TOKEN, lambda h, k: _cosines(_at(h, k, 0))),
    (_ONE_TOKEN, lambda h, k: _cosines(_at(h, k, -1))),
    (_NOT_UNIT, lambda h, k: _products(_mean(h, k))),
    (_NOT_UNIT, lambda h, k: _products(_mean(h, k) * k.sum(1, keepdim=True))),
    (_NOT_UNIT, lambda h, k: _products(_mean(h, k) * k.sum(1, keepdim=True) / k.shape[1])),
    (_NOT_UNIT + "; and padding was averaged in", lambda h, k: _products(h.mean(1))),
    (_EACH_TOKEN, lambda h, k: _cosines(_mean(_unit(h), k))),
    (_EACH_TOKEN, lambda h, k: _products(_mean(_unit(h), k))),
    (_HALF_UNIT, lambda h, k: _mean(h, k) @ _unit(_mean(h, k)).T),
    (_HALF_UNIT, lambda h, k: _unit(_mean(h, k)) @ _mean(h, k).T),
    (
        "unit length runs over the sentences; it is the features of one sentence that belong together",
        lambda h, k: _products(_mean(h, k) / _mean(h, k).norm(dim=0)),
    ),
    (
        "all vectors were divided by one length; each has its own",
        lambda h, k: _products(_mean(h, k) / _mean(h, k).norm()),
    ),
    (
        "the vectors were divided by their squared length; take the root",
        lambda h, k: _products(_mean(h, k) / _mean(h, k).square().sum(-1, keepdim=True)),
    ),
    (
        "the vectors were divided by the sum of their features' sizes; length is the root of the sum of squares",
        lambda h, k: _products(_mean(h, k) / _mean(h, k).abs().sum(-1, keepdim=True)),
    ),
    ("the mean runs over the features; it has to run over the tokens", lambda h, k: _cosines(h.mean(-1))),
    (
        "the mean runs over the features; it has to run over the tokens",
        lambda h, k: _cosines(h.mean(-1) * k),
    ),
    ("the mean runs over the sentences; it has to run over the tokens", lambda h, k: _cosines(h.mean(0))),
    (_MAXIMUM, lambda h, k: _cosines(_highest(h, k))),
    (_MAXIMUM + "; and padding was among them", lambda h, k: _cosines(h.amax(1))),
    ("this is a distance, 1 - cosine; return the cosine", lambda h, k: 1 - _cosines(_mean(h, k))),
    ("these are distances of the vectors; return their cosines", lambda h, k: _apart(_mean(h, k))),
    ("these are distances of the vectors; return their cosines", lambda h, k: _apart(_unit(_mean(h, k)))),
)


def _apart(vectors: Tensor) -> Tensor:
    return (vectors[:, None] - vectors).norm(dim=-1)


def _sentences(
    trial: Trial, lengths: tuple[int, ...], width: int, dim: int, *slips: Slip
) -> tuple[Tensor, Tensor]:
    """Sentences with padding of large numbers on the left, on the right or on both sides, by which the slips can be
    told apart."""
    keep = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in zip(keep, lengths, strict=True):
        start = trial.integer(0, width - length)
        row[start : start + length] = True
    for _ in range(_TRIES):
        hidden = trial.normal(len(lengths), width, dim)
        mean = _mean(hidden, keep)
        hidden = torch.where(keep[..., None], hidden, (100 * hidden).round() + 50)
        # a mean of no length has no direction
        steady = mean.norm(dim=-1).min() > 0.3 and all(f(hidden, keep).isfinite().all() for _, f in slips)
        if steady and _are_told_apart(_cosines(mean), slips, hidden, keep):
            return hidden, keep
    raise AssertionError(_ALIKE)


@checker(
    "encoder-only",
    asks="Write similarity(hidden, keep): hidden (batch, seq, dim), keep (batch, seq) True on tokens and False on "
    "padding, which may hold any numbers. A sentence's vector is the mean over its tokens; return the cosines of "
    "all pairs of sentences, (batch, batch).",
    praise="A mean over the tokens alone, unit length, and one product for all pairs.",
)
def grade_encoder_only(trial: Trial) -> None:
    cases: list[tuple[tuple[int, ...], int, int, tuple[Slip, ...]]] = [
        ((2, 2), 4, 3, _SIMILARITY_SLIPS),
        ((3, 2, 1), 4, 2, ()),
        ((1, 4, 2, 3), 5, 4, ()),
        (tuple(trial.integer(1, 9) for _ in range(6)), 9, 16, ()),
    ]
    for lengths, width, dim, slips in cases:
        hidden, keep = _sentences(trial, lengths, width, dim, *slips)
        inputs = {"hidden": hidden, "keep": keep}
        trial.compare(
            trial.ask(**inputs),
            _cosines(_mean(hidden, keep)),
            inputs,
            hints=_hints(_SIMILARITY_SLIPS, hidden, keep),
        )


def _pairs(queries: Tensor, keys: Tensor, may: Callable[[int, int, int, int], bool]) -> Tensor:
    """`may(position of query, of key, place of query, of key)` for every pair of every row, as a mask."""
    return torch.tensor(
        [
            [[may(p, q, i, j) for j, q in enumerate(row_k)] for i, p in enumerate(row_q)]
            for row_q, row_k in zip(queries.tolist(), keys.tolist(), strict=True)
        ]
    )


def _right_padded(positions: Tensor) -> Tensor:
    """Positions as they were if all padding stood on the right, in order."""
    places = torch.arange(positions.shape[1]).expand_as(positions)
    return torch.where(places < (positions >= 0).sum(1, keepdim=True), places, -1)


_May = Callable[[int, int, int, int], bool]
_EVERYTHING: _May = lambda p, q, i, j: True  # noqa: E731
_NOT_PADDING: _May = lambda p, q, i, j: q >= 0  # noqa: E731
_CAUSAL: _May = lambda p, q, i, j: 0 <= q <= p  # noqa: E731
_MASK_RULES: dict[str, _May] = {"encoder": _NOT_PADDING, "decoder": _CAUSAL, "cross": _NOT_PADDING}
# Whose queries and whose keys.
_SIDES = {"encoder": ("source", "source"), "decoder": ("target", "target"), "cross": ("target", "source")}


def _mask_slips(which: str, queries: Tensor, keys: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
    rule, pairs = _MASK_RULES[which], partial(_pairs, queries, keys)
    moved = _right_padded(queries), _right_padded(keys)
    right = "it goes by how many tokens there are, as if padding stood on the right; here it is on the left"
    slips: list[tuple[str, Callable[[], Tensor]]] = [
        ("it is the wrong way round: True is where one may look", lambda: ~pairs(rule)),
        ("position 0 is a token; only -1 is padding", lambda: pairs(lambda *a: rule(*a) and a[1] > 0)),
    ]
    if which == "decoder":
        slips += [
            ("the padding of the target is seen", lambda: pairs(lambda p, q, i, j: q <= p)),
            ("it is not causal: the future is open", lambda: pairs(_NOT_PADDING)),
            ("it is not causal, and padding is seen", lambda: pairs(_EVERYTHING)),
            ("a token does not see itself", lambda: pairs(lambda p, q, i, j: 0 <= q < p)),
            (
                "it looks ahead, at later tokens instead of earlier ones",
                lambda: pairs(lambda p, q, i, j: q >= p),
            ),
            (
                "the future is open by one: a token sees the one after it",
                lambda: pairs(lambda p, q, i, j: 0 <= q <= p + 1),
            ),
            (
                "the order of the places was taken; compare the positions",
                lambda: pairs(lambda p, q, i, j: q >= 0 and j <= i),
            ),
            ("the padding of the target is seen", lambda: pairs(lambda p, q, i, j: j <= i)),
            (right, lambda: _pairs(*moved, _CAUSAL)),
            (right, lambda: _pairs(*moved, lambda p, q, i, j: q >= 0 and j <= i)),
        ]
    else:
        causal = (
            _CAUSAL,
            lambda p, q, i, j: q >= 0 and j <= i,
            lambda p, q, i, j: q <= p,
            lambda p, q, i, j: j <= i,
        )
        slips += [
            ("the padding of the source is seen", lambda: pairs(_EVERYTHING)),
            *(
                ("it is causal; the whole source may be looked at", lambda may=may: pairs(may))
                for may in causal
            ),
            ("only later tokens are seen; the whole source is", lambda: pairs(lambda p, q, i, j: q >= p)),
            ("a token does not see itself", lambda: pairs(lambda p, q, i, j: q >= 0 and p != q)),
            (right, lambda: _pairs(*moved, _NOT_PADDING)),
        ]
        if which == "cross" and queries.shape == keys.shape:
            slips.append(
                (
                    "the padding of the target is hidden; the keys are the source's",
                    lambda: _pairs(keys, queries, _NOT_PADDING),
                )
            )
    return slips


def _padded(trial: Trial, length: int, left: int, right: int, *, mixed: bool = False) -> list[int]:
    order = torch.randperm(length, generator=trial.generator).tolist() if mixed else list(range(length))
    return [-1] * left + order + [-1] * right


@checker(
    "encoder-decoder",
    asks="Write masks(source_positions, target_positions): positions (batch, n) and (batch, m), -1 on padding. "
    "Return three True/False tensors, True = may look: encoder (batch, n, n), every token; decoder (batch, m, m), "
    "tokens whose position is not later; cross (batch, m, n), every token of the source. Nobody looks at padding.",
    praise="Both ways in the source, backwards in the target, and all of the source from everywhere.",
)
def grade_encoder_decoder(trial: Trial) -> None:
    line = partial(_padded, trial)
    some = trial.integer(2, 4)
    cases = [
        ([line(2, 0, 1)], [line(3, 0, 1)]),
        ([line(2, 1, 0)], [line(3, 1, 0)]),
        ([line(2, 0, 1)], [line(3, 0, 0)]),
        ([line(1, 0, 0)], [line(1, 0, 0)]),
        ([line(3, 0, 0), line(1, 2, 0)], [line(1, 0, 1), line(2, 0, 0)]),
        ([line(some, 0, 3), line(some + 2, 1, 0)], [line(2, some, 0), line(1, 1, some)]),
        ([line(3, 0, 1, mixed=True)], [[2, 0, 1, -1]]),
        (
            [line(5, 1, 1, mixed=True), line(4, 0, 3), line(7, 0, 0, mixed=True)],
            [line(some, 8 - some, 0), line(8, 0, 0, mixed=True), line(6, 1, 1, mixed=True)],
        ),
    ]
    for source, target in cases:
        inputs = {"source_positions": torch.tensor(source), "target_positions": torch.tensor(target)}
        got = trial.ask(**inputs)
        if not isinstance(got, tuple | list) or len(got) != 3:
            what = f"{len(got)} results" if isinstance(got, tuple | list) else f"a {type(got).__name__}"
            trial.fail(f"it returned {what}, three masks were wanted: encoder, decoder, cross", inputs)
        for which, mask in zip(_MASK_RULES, got, strict=True):
            queries, keys = (inputs[f"{side}_positions"] for side in _SIDES[which])
            wanted = _pairs(queries, keys, _MASK_RULES[which])
            # what a row of padding holds is the reader's own affair
            real = (queries >= 0)[..., None]
            if isinstance(mask, Tensor) and mask.shape == wanted.mT.shape != wanted.shape:
                trial.fail(
                    f"{which}: queries and keys are swapped, wanted {tuple(wanted.shape)}", inputs, got=mask
                )
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == wanted.shape:
                mask = mask & real
            trial.compare(
                mask,
                wanted & real,
                inputs | {"mask": which},
                hints=[
                    (f"{which}: {text}", lambda f=slip, r=real: f() & r)
                    for text, slip in _mask_slips(which, queries, keys)
                ],
            )


Order = Literal["choices", "tokens", "last first", "weight"]


def _shares(scores: Tensor, chosen: Tensor) -> Tensor:
    """The chosen scores, divided by their sum."""
    kept = scores.gather(-1, chosen)
    return kept / kept.sum(-1, keepdim=True)


def _places(
    chosen: Tensor, weights: Tensor, capacity: int, *, order: Order = "choices", each_round: bool = False
) -> Tensor:
    """Which choices find a place, one after the other; `each_round` empties the experts after every choice."""
    tokens, active = chosen.shape
    line = [(t, c) for c in range(active) for t in range(tokens)]
    if order == "tokens":
        line.sort()
    elif order == "last first":
        line.sort(key=lambda place: (place[1], -place[0]))
    elif order == "weight":
        line.sort(key=lambda place: -float(weights[place]))
    taken: dict[tuple[int, int], int] = {}
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    for token, choice in line:
        place = (int(chosen[token, choice]), choice if each_round else 0)
        taken[place] = taken.get(place, 0) + 1
        kept[token, choice] = taken[place] <= capacity
    return kept


def _route(
    logits: Tensor,
    active: int,
    capacity: int,
    *,
    scores: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(-1),
    weigh: Callable[[Tensor, Tensor], Tensor] = _shares,
    least: bool = False,
    again: bool = False,
    **places: Any,
) -> Tensor:
    """Score, choose, weigh, turn away; every keyword is a slip. `again` divides by the sum of what is left."""
    values = scores(logits)
    chosen = values.argsort(-1, descending=not least)[:, :active]
    weights = weigh(values, chosen)
    weights = weights * _places(chosen, weights, capacity, **places)
    if again:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, chosen, weights)


def _unshared(scores: Tensor, chosen: Tensor) -> Tensor:
    return scores.gather(-1, chosen)


_RAW = "the logits themselves were used as weights; a softmax comes first"
_ALL = "all experts were kept; a token goes to its `active` best alone"
_OVER_TOKENS = "the softmax runs over the tokens; it has to run over the experts"
_AGAIN = "what was left was divided by its sum once more; a dropped choice leaves a gap"
_WEIGHT_SLIPS: tuple[Slip, ...] = (
    ("the weights of the chosen were not divided by their sum", partial(_route, weigh=_unshared)),
    (_RAW, partial(_route, scores=lambda x: x)),
    (_RAW, partial(_route, scores=lambda x: x, weigh=_unshared)),
    (_OVER_TOKENS, partial(_route, scores=lambda x: x.softmax(0))),
    (_OVER_TOKENS, partial(_route, scores=lambda x: x.softmax(0), weigh=_unshared)),
    (
        "the scores are sigmoids; a softmax over the experts was asked for",
        partial(_route, scores=torch.sigmoid),
    ),
    ("the lowest experts were chosen, not the best", partial(_route, least=True)),
    (_ALL, lambda x, active, capacity: x.softmax(-1)),
    (_ALL, lambda x, active, capacity: _route(x, x.shape[1], capacity)),
    ("one expert was chosen where `active` are", lambda x, active, capacity: _route(x, 1, capacity)),
    (
        "the chosen share equally; their weights come from the softmax",
        partial(_route, weigh=lambda s, chosen: torch.full(chosen.shape, 1 / chosen.shape[1])),
    ),
    (
        "the chosen are only marked, with 1; each has a weight",
        partial(_route, weigh=lambda s, chosen: torch.ones(chosen.shape)),
    ),
    ("the result is (experts, tokens); turn it", lambda *a: _route(*a).T),
    (
        "there is one column for each choice; put the weights in the columns of the experts",
        lambda x, active, capacity: _shares(x.softmax(-1), x.argsort(-1, descending=True)[:, :active]),
    ),
)
_PLACE_SLIPS: tuple[Slip, ...] = (
    ("capacity was not used", lambda x, active, capacity: _route(x, active, len(x))),
    ("an expert took one token too many", lambda x, active, capacity: _route(x, active, capacity + 1)),
    ("an expert took one token too few", lambda x, active, capacity: _route(x, active, capacity - 1)),
    (
        "places went token by token; all first choices come first, then all second ones",
        partial(_route, order="tokens"),
    ),
    ("the last token came first; places go in order of the tokens", partial(_route, order="last first")),
    ("places went to the highest weights; they go by choice, then in order", partial(_route, order="weight")),
    (
        "an expert was emptied after each round of choices; it takes `capacity` tokens in all",
        partial(_route, each_round=True),
    ),
    (_AGAIN, partial(_route, again=True)),
    (_AGAIN, lambda *a: _route(*a) / _route(*a).sum(-1, keepdim=True)),
    (_AGAIN, lambda *a: _route(*a, again=True).nan_to_num(nan=0.0)),
)


def _logits(trial: Trial, tokens: int, experts: int, active: int, capacity: int, *slips: Slip) -> Tensor:
    """Scores without ties, by which the slips can be told apart."""
    for _ in range(_TRIES):
        logits = trial.normal(tokens, experts)
        ranked = logits.sort(-1).values
        args = logits, active, capacity
        if (ranked.diff(dim=-1) > 0.05).all() and _are_told_apart(_route(*args), slips, *args):
            return logits
    raise AssertionError(_ALIKE)


@checker(
    "mixture-of-experts",
    asks="Write route(logits, active, capacity): logits (tokens, experts). Softmax over the experts, keep each token's "
    "`active` best, divide these by their sum. An expert takes `capacity` tokens at most: first choices of all tokens "
    "in order, then second choices, and so on; a choice that finds no place gets weight 0. Return (tokens, experts).",
    praise="Weights of the chosen add up to 1, and whoever comes too late goes without.",
)
def grade_mixture_of_experts(trial: Trial) -> None:
    several, more = trial.integer(6, 9), trial.integer(4, 6)
    cases: list[tuple[int, int, int, int, tuple[Slip, ...]]] = [
        (2, 3, 2, 2, _WEIGHT_SLIPS),
        (4, 3, 2, 2, _PLACE_SLIPS),
        (4, 4, 2, 1, ()),
        (3, 2, 1, 1, ()),
        (3, 3, 3, 2, ()),
        (several, more, 3, 2, ()),
    ]
    for tokens, experts, active, capacity, slips in cases:
        logits = _logits(trial, tokens, experts, active, capacity, *slips)
        inputs = {"logits": logits, "active": active, "capacity": capacity}
        trial.compare(
            trial.ask(**inputs),
            _route(*inputs.values()),
            inputs,
            hints=_hints(_WEIGHT_SLIPS + _PLACE_SLIPS, *inputs.values()),
        )


class _Step(NamedTuple):
    """One step of a model that thinks."""

    logits: Tensor
    history: list[int]
    open: int
    close: int
    wait: int
    least: int
    most: int


def _force(
    s: _Step,
    *,
    begins: Literal["last", "first", "nothing"] = "last",
    ends: Literal["after", "anywhere", "never"] = "after",
    counted: Callable[[_Step, list[int]], int] = lambda s, thought: len(thought),
    low: int = 0,
    high: int = 0,
    on_close: bool = True,
    wait: Callable[[_Step], Tensor] = lambda s: _only(s, s.wait),
    stop: Callable[[_Step], Tensor] = lambda s: _only(s, s.close),
) -> Tensor:
    """The right way with the slips of one: where the thought begins and ends, how it is counted, where the limits
    are, and what is done below and above them."""
    places = [at for at, token in enumerate(s.history) if token == s.open]
    if not places and begins != "nothing":
        return s.logits
    start = places[0 if begins == "first" else -1] + 1 if places else 0
    thought = s.history[start:]
    since = {"after": s.history[places[-1] + 1 :] if places else thought, "anywhere": s.history, "never": []}
    if s.close in since[ends]:
        return s.logits
    n = counted(s, thought)
    if n >= s.most + high:
        return stop(s)
    if n < s.least + low and (not on_close or int(s.logits.argmax()) == s.close):
        return wait(s)
    return s.logits


def _only(s: _Step, token: int, rest: float = -math.inf) -> Tensor:
    out = torch.full_like(s.logits, rest)
    out[token] = s.logits[token]
    return out


def _without(s: _Step, token: int) -> Tensor:
    out = s.logits.clone()
    out[token] = -math.inf
    return out


def _filled(rest: float) -> Callable[[_Step], Tensor]:
    return partial(_force, wait=lambda s: _only(s, s.wait, rest), stop=lambda s: _only(s, s.close, rest))


_WHOLE = "the whole history was counted; the thought begins after the last open"
_FIRST = "the thought was counted from the first open; it begins after the last one"
_LOWERED = "close was only forbidden; wait is written in its place, so that all others are -inf"
_REST = "the others keep a finite number; they have to be -inf"
_FORCE_SLIPS: tuple[Slip, ...] = (
    (_WHOLE, partial(_force, counted=lambda s, thought: len(s.history))),
    (
        "before any open there is no thought, and nothing to force",
        partial(_force, begins="nothing"),
    ),
    (
        "before any open there is no thought, and nothing to force",
        partial(_force, begins="nothing", counted=lambda s, thought: len(s.history)),
    ),
    ("open was counted; the thought begins after it", partial(_force, counted=lambda s, t: len(t) + 1)),
    (
        "off by one on both sides: a token of the thought was not counted",
        partial(_force, counted=lambda s, thought: len(thought) - 1),
    ),
    (
        "with `most` tokens written the thought has to close; one more was let through",
        partial(_force, high=1),
    ),
    ("the thought was closed one token early", partial(_force, high=-1)),
    ("with `least` tokens written the thought may close", partial(_force, low=1)),
    ("wait was needed for one token more: `least` are not written yet", partial(_force, low=-1)),
    ("after close the thought is over, and nothing is forced", partial(_force, ends="never")),
    (
        "the close of an earlier thought was taken for this one's; look after the last open",
        partial(_force, ends="anywhere"),
    ),
    (_FIRST, partial(_force, begins="first")),
    (_FIRST, partial(_force, begins="first", ends="anywhere")),
    (_LOWERED, partial(_force, wait=lambda s: _without(s, s.close))),
    (_LOWERED, partial(_force, wait=lambda s: _without(s, s.close), on_close=False)),
    ("wait was forced although close was not the best token", partial(_force, on_close=False)),
    (
        "least was not used: nothing stops a close that comes too early",
        partial(_force, wait=lambda s: s.logits),
    ),
    ("most was not used: nothing closes a long thought", partial(_force, stop=lambda s: s.logits)),
    (
        "wait and close are swapped",
        partial(_force, wait=lambda s: _only(s, s.close), stop=lambda s: _only(s, s.wait)),
    ),
    (
        "it is the wrong way round: the forced token is the only one that keeps its logit",
        partial(_force, wait=lambda s: _without(s, s.wait), stop=lambda s: _without(s, s.close)),
    ),
    (
        "tokens that are wait were not counted; they belong to the thought",
        partial(_force, counted=lambda s, thought: len(thought) - thought.count(s.wait)),
    ),
    (_REST, _filled(0.0)),
    (_REST, _filled(-1e9)),
    (
        "it returned a token; return the logits, all but that one -inf",
        lambda s: int(_force(s).argmax()),
    ),
    ("it returned probabilities; return logits", lambda s: _force(s).softmax(-1)),
)


def _steps(trial: Trial) -> list[tuple[str, _Step]]:
    """Steps of thinking, from short to long, and what each asks for."""
    vocab, least = trial.integer(6, 9), trial.integer(2, 3)
    most = least + trial.integer(2, 3)
    open_, close, wait, *words = torch.randperm(vocab, generator=trial.generator).tolist()

    def text(length: int) -> list[int]:
        return [words[trial.integer(0, len(words) - 1)] for _ in range(length)]

    def step(history: list[int], best: int | None = None, least: int = least, most: int = most) -> _Step:
        logits = trial.normal(vocab)
        logits[words[0] if best is None else best] = logits.max() + 0.5
        return _Step(logits, history, open_, close, wait, least, most)

    on, end = [open_], [close]
    early = "the thought is shorter than `least`, and its best token is close: all but wait have to be -inf"
    free = "nothing is to be forced here: the logits stay as they are"
    long = "the thought has reached `most`: all but close have to be -inf"
    return [
        (free, step(text(1), close)),
        (free, step(text(most))),
        (free, step(text(1) + on)),
        (early, step(text(1) + on, close)),
        (early, step(text(2) + on + text(least - 1), close)),
        (free, step(text(1) + on + text(least), close)),
        (free, step(text(1) + on + text(most - 1))),
        (long, step(text(1) + on + text(most))),
        (long, step(text(1) + on + text(most + 2), wait)),
        (long, step(text(1) + on, least=0, most=0)),
        (free, step(text(1) + on, close, least=0)),
        (free, step(text(1) + on + end, close)),
        (free, step(text(1) + on + text(1) + end + text(most))),
        (free, step(text(most + 2) + on + text(least))),
        (early, step(on + text(most) + end + text(1) + on + text(1), close)),
        (long, step(on + text(1) + end + text(2) + on + text(most))),
        (free, step(on + text(least) + on + text(most - 1))),
        (long, step(text(1) + on + [wait, *text(most - 2), wait])),
    ]


@checker(
    "reasoning-model",
    asks="Write force(logits, history, open, close, wait, least, most): logits (vocab,) of the next token, history "
    "a list of all tokens so far. The thought begins after the last open, and is over if a close comes after it. "
    "Inside a thought of n tokens: if n >= most, all but close are -inf; if n < least and the best token is close, "
    "all but wait are -inf. Otherwise the logits stay as they are.",
    praise="Too short a thought goes on with wait, too long a one closes, and all else is left alone.",
)
def grade_reasoning_model(trial: Trial) -> None:
    steps = _steps(trial)

    def answer(s: _Step) -> Any:
        got = trial.ask(**s._asdict())
        if isinstance(got, Tensor) and got.shape == s.logits.shape and got.is_floating_point():
            # where all others are -inf, any number at the token that is left means the same
            left = got > -math.inf
            return torch.where(left & (left.sum() == 1), s.logits.to(got.dtype), got)
        return got

    @cache
    def answers() -> list[Any]:
        return [answer(step) for _, step in steps]

    def explained(slip: Callable[[_Step], Any], step: _Step) -> Any:
        """What the slip gives, or nothing that an answer can be: in one step alone, several slips look alike."""
        whole = all(_is_same(got, slip(other)) for got, (_, other) in zip(answers(), steps, strict=True))
        return slip(step) if whole else torch.empty(0)

    for told, step in steps:
        got, wanted = answer(step), _force(step)
        hints = [(text, partial(explained, slip, step)) for text, slip in _FORCE_SLIPS]
        if isinstance(got, Tensor) and got.shape == wanted.shape and not got.isnan().any():
            hints.append((told, lambda g=got: g))
        trial.compare(got, wanted, step._asdict(), hints=hints)


def _is_same(got: Any, wanted: Tensor | int) -> bool:
    if isinstance(wanted, Tensor):
        return isinstance(got, Tensor) and got.shape == wanted.shape and torch.allclose(got.float(), wanted)
    one = isinstance(got, int) or (isinstance(got, Tensor) and got.numel() == 1)
    return one and int(got) == wanted


def _splice(ids: Tensor, embeddings: Tensor, vectors: Tensor, image_token: int) -> Tensor:
    """The places of `image_token` in reading order, each with the next of `vectors` (vectors, dim), from the start
    again where there are too few."""
    out, used = embeddings.clone(), 0
    for row, line in enumerate(ids.tolist()):
        for place, token in enumerate(line):
            if token == image_token:
                out[row, place] = vectors[used % len(vectors)]
                used += 1
    return out


def _by_row(ids: Tensor, embeddings: Tensor, images: Tensor, token: int, *, own: bool) -> Tensor:
    """Every row for itself: from image `row` on if `own`, else from the first one."""
    flat = images.flatten(0, 1)
    return torch.cat(
        [
            _splice(ids[r : r + 1], embeddings[r : r + 1], flat.roll(-r * own * images.shape[1], 0), token)
            for r in range(len(ids))
        ]
    )


def _turned_round(ids: Tensor, embeddings: Tensor, images: Tensor, token: int) -> Tensor:
    where = ids == token
    order = (where.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
    return torch.where(where[..., None], embeddings, images.flatten(0, 1)[order])


_SAME = "every row begins with the first image again; the images go on from row to row"
_SPLICE_SLIPS: tuple[Slip, ...] = (
    ("nothing was put in: these are the embeddings", lambda ids, e, i, t: e),
    (_SAME, partial(_by_row, own=False)),
    (
        "row r took images from number r on; rows may have none or several, so go on where the last row stopped",
        partial(_by_row, own=True),
    ),
    ("the first image was used for all", lambda ids, e, i, t: _splice(ids, e, i[0], t)),
    ("the first patch was used everywhere", lambda ids, e, i, t: _splice(ids, e, i[0, :1], t)),
    (
        "every place of an image got its first patch",
        lambda ids, e, i, t: _splice(ids, e, i[:, :1].expand_as(i).flatten(0, 1), t),
    ),
    (
        "every place of an image got the mean of its patches",
        lambda ids, e, i, t: _splice(ids, e, i.mean(1, keepdim=True).expand_as(i).flatten(0, 1), t),
    ),
    (
        "the patches of an image are in reversed order",
        lambda ids, e, i, t: _splice(ids, e, i.flip(1).flatten(0, 1), t),
    ),
    ("the images are in reversed order", lambda ids, e, i, t: _splice(ids, e, i.flip(0).flatten(0, 1), t)),
    (
        "images and patches are both in reversed order",
        lambda ids, e, i, t: _splice(ids, e, i.flip(0, 1).flatten(0, 1), t),
    ),
    (
        "the first patches of all images came first; an image's patches belong together",
        lambda ids, e, i, t: _splice(ids, e, i.transpose(0, 1).flatten(0, 1), t),
    ),
    (
        "places were filled column by column; reading order is row by row",
        lambda ids, e, i, t: _splice(ids.T, e.transpose(0, 1), i.flatten(0, 1), t).transpose(0, 1),
    ),
    (
        "the patch was added to the embedding; it replaces it",
        lambda ids, e, i, t: _splice(ids, e, i.flatten(0, 1), t) + e * (ids == t)[..., None],
    ),
    (
        "the embeddings of the text are gone; only places of image_token change",
        lambda ids, e, i, t: _splice(ids, torch.zeros_like(e), i.flatten(0, 1), t),
    ),
    ("the text was overwritten, and the places of image_token were not", _turned_round),
)


def _mixed_ids(trial: Trial, rows: list[list[int]], image_token: int) -> Tensor:
    """Rows of as many words (0) and placeholders (1) as given; a word is any token but `image_token`."""
    return torch.tensor(
        [[image_token if kind else (image_token + trial.integer(1, 19)) % 20 for kind in row] for row in rows]
    )


@checker(
    "multimodal",
    asks="Write splice(ids, embeddings, images, image_token): ids (batch, seq), embeddings (batch, seq, dim), images "
    "(n, patches, dim). Return the embeddings with each place where ids is image_token replaced by the next patch, in "
    "reading order over the whole batch; a row may have no image or several. ValueError if places and patches differ "
    "in number.",
    praise="Each patch in its place, image after image, and a count that does not fit is told.",
)
def grade_multimodal(trial: Trial) -> None:
    # by row: 1 is a place for a patch, 0 is text
    cases: list[tuple[int, list[list[int]]]] = [
        (2, [[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        (2, [[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
        (3, [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]),
        (1, [[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]),
        (2, [[0, 0]]),
        (2, [[1, 1, 1, 1, 1, 1]]),
        (4, [[1] * 4 * n + [0] * (13 - 4 * n) for n in (trial.integer(0, 3), 2, 0, trial.integer(1, 3))]),
    ]
    for patches, rows in cases:
        token, dim = trial.integer(0, 19), 2 if len(rows) == 2 else 3
        ids = _mixed_ids(trial, rows, token)
        embeddings = trial.normal(*ids.shape, dim)
        images = trial.normal(int((ids == token).sum()) // patches, patches, dim)
        inputs = {"ids": ids, "embeddings": embeddings, "images": images, "image_token": token}
        got = trial.ask(**inputs)
        if isinstance(got, Tensor) and got.ndim == 3 and got.shape[1] > ids.shape[1]:
            trial.fail(
                "the sequence grew: a patch takes the place of a token, nothing is inserted", inputs, got=got
            )
        trial.compare(
            got,
            _splice(ids, embeddings, images.flatten(0, 1), token),
            inputs,
            hints=_hints(_SPLICE_SLIPS, *inputs.values()) if len(images) else (),
        )
    for told, patches, rows in [
        ("there are more places than patches", 2, [[1, 1, 0, 1]]),
        ("there are more patches than places", 3, [[1, 1, 0, 0]]),
        ("there is an image, but no place for it", 2, [[0, 0, 0, 0]]),
        ("there are places, but no image", 2, [[0, 1, 1, 0]]),
        ("there are as many images as rows, but one has too few places", 2, [[1, 1, 0], [1, 0, 0]]),
    ]:
        token = trial.integer(0, 19)
        ids, count = _mixed_ids(trial, rows, token), 0 if "no image" in told else len(rows)
        trial.refuses(
            ValueError,
            told,
            ids=ids,
            embeddings=trial.normal(*ids.shape, 2),
            images=trial.normal(count, patches, 2),
            image_token=token,
        )
