"""The house model of cross-attention: its task, its data, its committed weights, and where it looks."""

import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.masks import padding_mask
from llm_atlas.recipes import initialize
from llm_atlas.recipes import number_words as recipe
from llm_atlas.recipes.number_words import (
    LARGEST,
    WORDS,
    NumberWords,
    NumberWordsConfig,
    accuracy,
    alignment,
    alignment_share,
    alignments,
    decode,
    draw_number,
    encode,
    held_out,
    held_out_numbers,
    load_number_words,
    make_batch,
    number_words,
    pad_words,
    sequence_loss,
    train,
    training_batches,
    translate,
    word_of_digit,
)

numbers = st.integers(0, LARGEST)


@pytest.fixture(scope="module")
def model():
    return load_number_words()


def value_of(words):
    """A reader of number words of its own: what has been said so far, multiplied or added to."""
    total = current = 0
    small = {word: n for n, word in enumerate(WORDS[:20])}
    tens = {word: 10 * n for n, word in enumerate(WORDS[20:28], start=2)}
    for word in words:
        if word == "thousand":
            total, current = current * 1000, 0
        elif word == "hundred":
            current *= 100
        else:
            current += (small | tens)[word]
    return total + current


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "zero"),
        (10, "ten"),
        (40, "forty"),
        (417, "four hundred seventeen"),
        (1000, "one thousand"),
        (20_005, "twenty thousand five"),
        (100_000, "one hundred thousand"),
        (999_999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_numbers_in_words(n, text):
    assert " ".join(number_words(n)) == text


@given(numbers)
def test_the_words_say_the_number(n):
    assert value_of(number_words(n)) == n


@given(numbers)
def test_every_digit_but_a_zero_is_said_by_a_word(n):
    words, said = number_words(n), word_of_digit(n)
    assert len(said) == len(str(n))
    for digit, index in zip(str(n), said, strict=True):
        assert index is not None or digit == "0"
        assert index is None or words[index] not in ("hundred", "thousand")
    seen = [index for index in said if index is not None]
    assert seen == sorted(seen)


def test_which_word_says_a_digit():
    assert word_of_digit(20_417) == [0, None, 2, 4, 4]
    assert word_of_digit(0) == [0]
    assert word_of_digit(110_000) == [0, 2, 2, None, None, None]


@pytest.mark.parametrize("n", [-1, LARGEST + 1])
def test_a_number_out_of_range(n):
    with pytest.raises(ValueError, match=f"number {n} must lie between 0 and 999999"):
        number_words(n)


def test_a_number_that_is_none():
    with pytest.raises(TypeError, match="number True must be an int"):
        number_words(True)


def test_a_word_that_is_none():
    with pytest.raises(ValueError, match="word 'and' is not a number word"):
        encode("one hundred and one")
    with pytest.raises(ValueError, match="text is empty"):
        encode("  ")


@given(numbers)
def test_target_ids_and_back(n):
    batch = make_batch([n])
    assert decode(batch.target[0].tolist()) == str(n)
    assert [WORDS[i] for i in batch.ids[0].tolist()] == number_words(n)


def test_training_never_sees_a_held_out_number():
    batches = training_batches(seed=0, batch=200)
    seen = {int(decode(row)) for _ in range(20) for row in next(batches).target.tolist()}
    assert len(seen) > 2000
    assert not any(held_out(n) for n in seen)
    assert all(held_out(n) for n in held_out_numbers(100))
    assert not held_out(0)  # the only number with the word zero
    assert sum(held_out(n) for n in range(100_000)) == pytest.approx(10_000, rel=0.02)


def test_numbers_of_every_length_are_drawn():
    rng = random.Random(0)
    lengths = [len(str(draw_number(rng))) for _ in range(3000)]
    assert all(lengths.count(k) == pytest.approx(500, abs=100) for k in range(1, 7))


def small_model(seed=0, config=None):
    model = NumberWords(config or NumberWordsConfig(dim=16, heads=2, cross_heads=2, hidden=32))
    initialize(model, generator(seed))
    return model.eval()


def test_padding_changes_nothing():
    """A short text beside a long one gives what it gives alone."""
    model = small_model()
    rows = [encode("four hundred seventeen"), encode("nine hundred ninety nine thousand one")]
    target = torch.tensor([[10, 4, 1], [10, 4, 1]])
    both = model(*pad_words(rows), target)
    alone = model(*pad_words(rows[:1]), target[:1])
    torch.testing.assert_close(both[:1], alone)
    # and the padding is really masked: with its positions taken for real ones the result is another
    ids, _ = pad_words(rows)
    assert not torch.allclose(model(ids, torch.arange(ids.shape[1]).expand_as(ids), target)[:1], alone)


@pytest.mark.parametrize("which", ["trained", "random"])
def test_cached_writing_is_the_same(which, model):
    model = model if which == "trained" else small_model()
    texts = [" ".join(number_words(n)) for n in (0, 7, 417, 20_005, 123_456)]
    assert translate(model, texts, cached=True) == translate(model, texts, cached=False)


def test_the_words_keys_and_values_are_computed_once(model):
    calls = []
    layer = model.decoder.cross.sublayer.k
    handle = layer.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    try:
        assert translate(model, ["four hundred seventeen"]) == ["417"]
        assert calls == [3]
        translate(model, ["four hundred seventeen"], cached=False)
        assert calls == [3] * 5  # once more for each of 4, 1, 7 and the end
    finally:
        handle.remove()


def test_cached_logits_are_those_of_the_whole(model):
    batch = make_batch([20_417, 512])
    target = batch.target[:, :-1].clamp(min=0)
    with torch.inference_mode():
        context, mask = model.read(batch.ids, batch.positions), padding_mask(batch.positions)
        whole = model.write(target, context, mask)
        caches = KVCache(1), KVCache(1)
        steps = [model.write(target[:, i : i + 1], context, mask, *caches) for i in range(target.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_the_committed_model_reads_numbers_it_never_saw(model):
    facts = json.loads(bundled("models/number-words.json").read_text(encoding="utf-8"))["results"]
    assert facts["held_out_accuracy"] >= 0.98
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    # 500 of the 3000 numbers of the committed figure; one number is 0.2%.
    assert accuracy(model, held_out_numbers(500)) == pytest.approx(facts["held_out_accuracy"], abs=0.01)
    assert accuracy(small_model(), held_out_numbers(50)) == 0


def test_the_committed_model_is_small():
    assert bundled("models/number-words.safetensors").stat().st_size <= 400_000


def test_digits_look_at_their_words(model):
    facts = json.loads(bundled("models/number-words.json").read_text(encoding="utf-8"))["results"]
    share, counted = alignment_share(model, held_out_numbers(300))
    assert share == pytest.approx(facts["alignment_share"], abs=0.02)
    assert counted > 1000
    assert alignment_share(small_model(), held_out_numbers(50))[0] < 0.6


def test_alignment_is_what_the_model_used(model):
    found = alignment(model, "four hundred seventeen")
    assert found.digits == ["4", "1", "7"]
    assert found.words == ["four", "hundred", "seventeen"]
    assert found.matrix.shape == (3, 3)
    torch.testing.assert_close(found.matrix.sum(-1), torch.ones(3))
    assert found.matrix.argmax(-1).tolist() == word_of_digit(417)
    # By hand, from the weights: the one head's softmax of q . k.
    cross = model.decoder.cross
    with torch.inference_mode():
        batch = make_batch([417])
        seen = []
        handle = cross.sublayer.q.register_forward_hook(lambda module, args, out: seen.append(out))
        model(batch.ids, batch.positions, batch.target[:, :-1])
        handle.remove()
        keys = cross.sublayer.k(model.read(batch.ids, batch.positions))
        expected = (seen[0] @ keys.transpose(1, 2) / math.sqrt(64)).softmax(-1)[0, :3]
    torch.testing.assert_close(found.matrix, expected)


def test_alignments_of_many_texts_are_those_of_each(model):
    texts = ["five", "nine hundred ninety nine thousand one", "zero"]
    for many, text in zip(alignments(model, texts), texts, strict=True):
        alone = alignment(model, text)
        assert (many.digits, many.words) == (alone.digits, alone.words)
        torch.testing.assert_close(many.matrix, alone.matrix)


def test_alignment_leaves_no_hook_behind(model):
    alignment(model, "five")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_loss_leaves_padding_out():
    model = small_model()
    short, both = make_batch([417]), make_batch([417, 123_456])
    losses = [sequence_loss(model, make_batch([n]))[0] for n in (417, 123_456)]
    # Means over 4 and 7 digits (end signs included) make the mean over 11.
    expected = (4 * losses[0] + 7 * losses[1]) / 11
    torch.testing.assert_close(sequence_loss(model, both)[0], expected)
    torch.testing.assert_close(sequence_loss(model, short)[0], losses[0])


def test_training_learns_and_repeats_itself():
    config = NumberWordsConfig(dim=16, heads=2, hidden=32)
    first, rows = train(steps=60, batch=16, lr=1e-2, seed=3, config=config)
    again, same = train(steps=60, batch=16, lr=1e-2, seed=3, config=config)
    _, other = train(steps=60, batch=16, lr=1e-2, seed=4, config=config)
    assert rows[0]["loss"] > 2
    assert sum(row["loss"] for row in rows[-10:]) / 10 < 0.8 * rows[0]["loss"]
    assert rows == same
    assert rows != other
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.training


def test_the_script_writes_a_model_that_loads(tmp_path):
    recipe.main(out=tmp_path, steps=2, seed=0, held_out_count=20, every=False)
    loaded = load_number_words(tmp_path / "number-words.safetensors")
    assert not loaded.training
    facts = json.loads((tmp_path / "number-words.json").read_text())
    assert facts["settings"]["steps"] == 2
    assert accuracy(loaded, held_out_numbers(20)) == facts["results"]["held_out_accuracy"]
