"""Budget forcing against a reader of its own, on random histories and on a tiny random model."""

import random

import pytest
import torch

from llm_atlas.infer.budget import force_budget, thinking_tokens
from llm_atlas.infer.generate import generate
from llm_atlas.models.decoder import Decoder, DecoderConfig

VOCAB = 12
CONFIG = DecoderConfig(vocab=VOCAB, dim=16, layers=2, heads=2, hidden=24, context=96, tied=False)
OPEN, CLOSE, WAIT = (8,), (9,), (10, 1)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 3 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spans(row, opening, close):
    """Lengths of the thoughts of a row, read token by token; the last may be open: (length, closed)."""
    found, i = [], 0
    while i < len(row):
        if tuple(row[i : i + len(opening)]) != opening:
            i += 1
            continue
        i += len(opening)
        start = i
        while i < len(row) and tuple(row[i : i + len(close)]) != close:
            i += 1
        found.append((i - start, i < len(row)))
        i += len(close)
    return found


def simulate(transform, row, close, rng, steps, vocab=VOCAB):
    """Write on from `row` with random logits that often favour the next token of the close, through the transform."""
    row = list(row)
    for _ in range(steps):
        logits = torch.tensor([[rng.gauss(0, 2) for _ in range(vocab)]])
        begun = max(k for k in range(len(close)) if k == 0 or tuple(row[-k:]) == close[:k])
        if rng.random() < (0.25 if begun == 0 else 0.9):
            logits[0, close[begun]] += 12
        out = transform(logits, [row])
        row.append(int(torch.multinomial(out.softmax(-1), 1, generator=seeded(rng.randrange(10**6)))))
    return row


TAGS = [((8,), (9,)), ((8, 0), (9, 0)), ((8,), (9, 9)), ((7, 7), (9, 8, 9)), ((8, 9), (9, 1, 9, 2))]


@pytest.mark.parametrize(("opening", "close"), TAGS)
@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 4), (3, None), (2, 5), (4, 4), (0, None)])
def test_thoughts_of_random_writers_keep_to_the_limits(opening, close, least, most):
    rng = random.Random(0)
    lengths = []
    for _ in range(12):
        row = simulate(force_budget(opening, close, least=least, most=most), [1, 2, *opening], close, rng, 40)
        for n, closed in spans(row, opening, close)[:1]:
            assert closed or most is None
            assert not closed or n >= least
            assert most is None or n <= most
            lengths.append(n)
    assert len(lengths) == 12
    if least != most:
        assert len(set(lengths)) > 1


def expected(row, logits, opening, close, least, most):
    """The rule once more, for tags of one token and no "Wait": what a row's logits become."""
    thinking, n = False, 0
    for token in row:
        if thinking and token == close:
            thinking, n = False, 0
        elif thinking:
            n += 1
        elif token == opening:
            thinking = True
    out = logits.clone()
    if thinking and most is not None and n >= most:
        out[:] = -torch.inf
        out[close] = 0
    elif thinking and n < least:
        out[close] = -torch.inf
    return out


def test_brute_force_on_random_histories():
    rng = random.Random(1)
    seen = set()
    for _ in range(300):
        rows = [[rng.choice([0, 1, 2, 8, 9]) for _ in range(rng.randrange(1, 14))] for _ in range(3)]
        least, most = rng.randrange(4), rng.choice([None, 3, 4, 6])
        most = None if most is None else max(most, least)
        logits = torch.randn(3, VOCAB, generator=seeded(rng.randrange(10**6)))
        before = logits.clone()
        out = force_budget([8], [9], least=least, most=most)(logits, rows)
        for i, row in enumerate(rows):
            want = expected(row, logits[i], 8, 9, least, most)
            assert torch.equal(out[i], want)
            seen.add("same" if torch.equal(want, logits[i]) else "forced" if want[9] == 0 else "held")
        assert torch.equal(logits, before)
    assert seen == {"same", "forced", "held"}


PROMPTS = [[1, 2, 8], [3, 8], [4, 5, 6, 7, 8], [2, 2, 8, 5, 5]]  # the last has thought two tokens already


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 3), (5, 9), (6, 6), (20, 20)])
@pytest.mark.parametrize("close", [(9,), (9, 0, 9)])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_row_of_a_batch_thinks_within_the_limits(model, least, most, close, temperature):
    most = max(most, 2 if most else 0)
    rows = generate(
        model,
        PROMPTS,
        max_new_tokens=30,
        temperature=temperature,
        transforms=[force_budget(OPEN, close, least=least, most=most)],
        generator=seeded(0),
    )
    for prompt, row in zip(PROMPTS, rows, strict=True):
        n, closed = spans(prompt + row, OPEN, close)[0]
        assert closed
        assert least <= n <= max(most, 2 if prompt[-1] == 5 else 0)
        if least == most and most > 2:
            assert n == most
        assert thinking_tokens(prompt + row, OPEN, close) == n


@pytest.mark.parametrize("most", [1, 4])
def test_rows_of_a_batch_are_the_rows_alone(model, most):
    transform = force_budget(OPEN, (9, 0), most=most, least=1, wait_ids=WAIT)
    alone = [generate(model, [p], max_new_tokens=12, transforms=[transform])[0] for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, transforms=[transform]) == alone
    assert len({*map(tuple, alone)}) > 1


def test_behind_a_cache_it_counts_what_it_sees(model):
    """A prefix in the cache is not in the history, so the opening must be in the prompt."""
    cache = model.make_cache()
    with torch.inference_mode():
        model.hidden(torch.tensor([[1, 2]]), cache=cache)
    transform = force_budget(OPEN, (9, 0), most=3)
    whole = generate(model, [[1, 2, 8]], max_new_tokens=10, transforms=[transform])
    assert generate(model, [[8]], max_new_tokens=10, transforms=[transform], cache=cache) == whole


def test_nothing_changes_where_no_limit_binds(model):
    free = generate(model, PROMPTS, max_new_tokens=40, stop_ids=[9])
    lengths = [thinking_tokens(p + row, OPEN, CLOSE) for p, row in zip(PROMPTS, free, strict=True)]
    loose = force_budget(OPEN, CLOSE, least=min(lengths), most=max(lengths) + 1, wait_ids=WAIT)
    assert generate(model, PROMPTS, max_new_tokens=40, stop_ids=[9], transforms=[loose]) == free
    logits = torch.randn(1, VOCAB)
    assert force_budget(OPEN, CLOSE, most=3)(logits, [[8, 1]]) is logits
    assert force_budget(OPEN, CLOSE, least=3, most=3)(logits, [[1, 2]]) is logits  # it does not think yet
    assert force_budget(OPEN, CLOSE, least=3, most=3)(logits, [[8, 1, 9, 2]]) is logits  # nor any more


def test_a_multi_token_close_is_written_to_its_end_and_one_that_was_begun_is_finished():
    step = force_budget([8], [9, 0, 9, 1], most=2)
    row = [8, 5, 5]
    for _ in range(4):
        row.append(int(step(torch.randn(1, VOCAB), [row]).argmax()))
    assert row == [8, 5, 5, 9, 0, 9, 1]
    assert step(torch.zeros(1, VOCAB), [row]).eq(0).all()
    assert int(step(torch.zeros(1, VOCAB), [[8, 9, 0]]).argmax()) == 9  # at two tokens, one and a half begun
    assert int(step(torch.zeros(1, VOCAB), [[8, 9, 0, 9]]).argmax()) == 1


def only(token):
    """Logits with one clear favourite."""
    return torch.zeros(1, VOCAB).index_fill(1, torch.tensor([token]), 5.0)


def test_wait_is_written_where_the_close_would_have_been():
    step = force_budget([8], [9], least=4, wait_ids=[10, 1])
    assert int(step(only(9), [[8, 5]]).argmax()) == 10
    assert int(step(only(3), [[8, 5]]).argmax()) == 3  # the row had no wish to close
    assert int(step(only(9), [[8, 5, 10]]).argmax()) == 1
    assert int(step(only(3), [[8, 5, 10]]).argmax()) == 1
    assert int(step(only(9), [[8, 5, 5, 5, 10]]).argmax()) == 1  # begun before `least`, finished behind it
    assert int(step(only(9), [[8, 5, 5, 5, 5]]).argmax()) == 9
    assert int(step(only(3), [[8, 5, 5, 5, 5, 10]]).argmax()) == 3  # the row's own word, past `least`


def test_the_logit_of_the_close_goes_to_wait():
    logits = torch.arange(VOCAB).float()[None]
    out = force_budget([8], [9], least=4, wait_ids=[3])(logits, [[8]])
    assert out[0, 3] == 9
    assert out[0, 9] == -torch.inf
    kept = [i for i in range(VOCAB) if i not in (3, 9)]
    assert torch.equal(out[0, kept], logits[0, kept])
    # A row that would rather wait than close keeps its own logit.
    assert force_budget([8], [9], least=4, wait_ids=[10])(logits, [[8]])[0, 10] == 10


def test_waits_are_counted():
    step = force_budget([8], [9], waits=2, wait_ids=[10, 1])
    row = [8]
    while len(row) < 12 and row[-1] != 9:
        row.append(int(step(only(9), [row]).argmax()))
    assert row == [8, 10, 1, 10, 1, 9]
    row = [8]
    step = force_budget([8], [9], waits=5, wait_ids=[10, 1], most=5)
    while len(row) < 12 and row[-1] != 9:
        row.append(int(step(only(9), [row]).argmax()))
    assert row == [8, 10, 1, 10, 1, 10, 9]  # `most` goes before


def test_another_transform_cannot_hide_the_close(model):
    def ban(logits, history):
        return logits.index_fill(1, torch.tensor([9]), -torch.inf)

    rows = generate(
        model,
        PROMPTS[:3],
        max_new_tokens=8,
        temperature=3.0,
        transforms=[ban, force_budget(OPEN, CLOSE, most=2)],
        generator=seeded(1),
    )
    assert [row.index(9) for row in rows] == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_shape_are_the_inputs(dtype):
    logits = torch.randn(2, VOCAB, dtype=dtype)
    out = force_budget(OPEN, CLOSE, least=1, most=2, wait_ids=WAIT)(logits, [[8], [8, 1, 1]])
    assert (out.dtype, out.shape) == (dtype, logits.shape)
    assert not out.isnan().any()


def test_thinking_tokens_of_a_row():
    assert thinking_tokens([1, 8, 5, 5, 9, 3], [8], [9]) == 2
    assert thinking_tokens([1, 8, 5, 5], [8], [9]) == 2
    assert thinking_tokens([1, 8], [8], [9]) == 0
    assert thinking_tokens([1, 9], [8], [9]) is None
    assert thinking_tokens([8, 9, 0, 5, 9, 1], [8], [9, 1]) == 3
    assert thinking_tokens([9, 8, 5, 9], [8], [9]) == 1  # what stood before the thought closes nothing


def test_a_close_is_behind_the_end_of_its_last_token():
    step = force_budget([2], [9, 2], most=1)
    logits = torch.zeros(1, VOCAB)
    assert torch.equal(step(logits, [[2, 5, 9, 2, 6]]), logits)  # the close's own 2 opens nothing


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"open_ids": []}, "open_ids must hold at least one token id"),
        ({"close_ids": []}, "close_ids must hold at least one token id"),
        ({"close_ids": [-1]}, r"close_ids \[-1\] must be token ids"),
        ({"least": -1}, "least -1 and waits 0 must not be negative"),
        ({"least": 3, "most": 2}, "most 2 must be at least least, 3"),
        ({"most": -1}, "most -1 must be at least least, 0"),
        ({"waits": 1}, "waits 1 need wait_ids"),
        ({"wait_ids": [3, 9]}, r"wait_ids \[3, 9\] must hold no token of close_ids \[9\]"),
    ],
)
def test_mistakes(how, told):
    with pytest.raises(ValueError, match=told):
        force_budget(**({"open_ids": [8], "close_ids": [9]} | how))


@pytest.mark.parametrize(
    "ids", [{"open_ids": [VOCAB]}, {"close_ids": [VOCAB]}, {"wait_ids": [VOCAB], "least": 1}]
)
def test_the_first_id_outside_the_vocabulary(ids):
    step = force_budget(**({"open_ids": [8], "close_ids": [9]} | ids))
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
        step(torch.zeros(1, VOCAB), [[1]])


def test_mistakes_seen_when_called():
    step = force_budget([8], [99], most=1)
    with pytest.raises(ValueError, match="token id 99 is outside the vocabulary of 12"):
        step(torch.zeros(1, VOCAB), [[1]])
    with pytest.raises(ValueError, match="history has 1 rows, logits have 2"):
        force_budget([8], [9])(torch.zeros(2, VOCAB), [[1]])
