"""The house encoder-decoder and its comparison with decoders alone."""

import functools
import json

import pytest
import torch

from llm_atlas.core.assets import bundled
from llm_atlas.core.weights import save_safetensors
from llm_atlas.recipes import FIELDS, load_results
from llm_atlas.recipes import pronunciation as recipe
from llm_atlas.text.pronunciations import Split, error_rates, pronunciations, split_words

SAID = {
    "cab": [("K", "AE", "B")],
    "read": [("R", "EH", "D"), ("R", "IY", "D")],
    "bananas": [("B", "AH", "N", "AE", "N", "AH", "Z")],
}
SPLIT = Split(["cab", "read", "bananas"], ["cab"], ["read"])
PAIRS = [(word, ways[0]) for word, ways in SAID.items()]


def test_ids_come_back():
    ids = recipe.letter_ids("cab") + recipe.sound_ids(("K", "AE", "B"))
    assert len(set(ids)) == 7
    assert max(ids) < recipe.VOCAB == 67
    assert recipe.decode([recipe.BEGIN, *recipe.sound_ids(("K", "AE", "B")), 30]) == ["K", "AE", "B"]
    assert recipe.decode([]) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "must have 1 to 28 letters"),
        ("a" * 29, "must have 1 to 28 letters"),
        ("Cab", "has 'C' in it"),
        ("x-ray", "has '-' in it"),
    ],
)
def test_words_that_cannot_be_read(word: str, message: str):
    with pytest.raises(ValueError, match=message):
        recipe.letter_ids(word)


def test_a_batch_says_what_is_learnt():
    batch = recipe.make_batch(PAIRS)
    assert batch.positions[0].tolist() == [-1, -1, -1, -1, 0, 1, 2]
    assert batch.letters[0, 4:].tolist() == recipe.letter_ids("cab")
    assert batch.written[:, 0].tolist() == [recipe.BEGIN] * 3
    for row, (_, sounds) in enumerate(PAIRS):
        learnt = batch.targets[row][batch.targets[row] >= 0].tolist()
        assert recipe.decode(learnt) == list(sounds)
        assert learnt[-1] == recipe.END
        assert batch.written[row, 1 : len(learnt)].tolist() == learnt[:-1]


@functools.cache
def trained(kind: str) -> tuple[recipe.Model, list[float]]:
    return recipe.train(kind, 1, steps=12, lr=3e-3, said=SAID, split=SPLIT)


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_padding_and_the_cache_change_nothing(kind: str):
    model, _ = trained(kind)
    together = recipe.pronounce(model, list(SAID), kind=kind)
    assert together == [recipe.pronounce(model, [word], kind=kind)[0] for word in SAID]
    assert any(together)
    # What the cache writes is what the whole sequence, computed at once, finds most likely.
    for word, sounds in zip(SAID, together, strict=True):
        batch = recipe.make_batch([(word, sounds)])
        best = recipe.logits_of(kind, model, batch)[0].argmax(-1).tolist()
        assert best[: len(sounds)] == recipe.sound_ids(sounds)[:-1]


def test_who_sees_whom():
    positions = torch.tensor([[-1, 0, 1, 2, 3]])
    wanted = [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert recipe.prefix_mask(positions, 3)[0, 0].int().tolist() == wanted


def test_a_letter_behind_is_seen_by_two_kinds():
    """The last letter changes what is known at the first one, but for the plain decoder."""
    for kind in recipe.KINDS:
        model, hidden = recipe.make_model(kind, 0).eval(), []
        for word in ("cab", "cat"):
            batch = recipe.make_batch([(word, ("K",))])
            if kind == "encoder-decoder":
                hidden.append(model.encode(batch.letters)[0, 0])
            else:
                ids = torch.cat([batch.letters, batch.written], dim=1)
                positions = torch.arange(ids.shape[1])[None]
                mask = recipe.prefix_mask(positions, 3) if kind == "prefix" else None
                hidden.append(model.hidden(ids, positions=positions, mask=mask)[0, 0])
        assert torch.equal(*hidden) == (kind == "decoder")


def test_kinds_are_of_equal_size():
    sizes = {kind: sum(p.numel() for p in recipe.make_model(kind, 0).parameters()) for kind in recipe.KINDS}
    assert max(sizes.values()) / min(sizes.values()) < 1.03
    rows = load_results(recipe.NAME)["rows"]
    assert all(row["parameters"] == sizes[row["kind"]] for row in rows)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind 'rnn' is not one of encoder-decoder, decoder, prefix"):
        recipe.make_model("rnn", 0)


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_a_short_training_comes_out_again(kind: str):
    model, losses = trained(kind)
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    _, stopped = recipe.train(kind, 1, steps=12, lr=3e-3, said=SAID, split=SPLIT, stop=3)
    assert stopped == losses[:3]


def test_measuring():
    model = recipe.make_model("encoder-decoder", 0).eval()
    rates, loss = recipe.measure("encoder-decoder", model, list(SAID), SAID)
    guesses = [recipe.pronounce(model, [word])[0] for word in SAID]
    assert rates == error_rates(guesses, list(SAID.values()))
    by_hand, count = 0.0, 0
    for word, ways in SAID.items():
        batch = recipe.make_batch([(word, ways[0])])
        logprobs = recipe.logits_of("encoder-decoder", model, batch)[0].log_softmax(-1)
        by_hand -= logprobs.gather(-1, batch.targets[0][:, None]).sum().item()
        count += len(ways[0]) + 1
    assert loss == pytest.approx(by_hand / count, rel=1e-5)


def test_committed_results():
    document = load_results(recipe.NAME)
    assert tuple(document) == FIELDS
    assert document["settings"] == json.loads(json.dumps(recipe.SETTINGS))
    points = [(row["kind"], row["seed"]) for row in document["rows"]]
    assert points == [(kind, seed) for seed in recipe.SEEDS for kind in recipe.KINDS]


def test_the_house_model_is_as_good_as_its_file_says():
    """All 2,000 test words again, in about two seconds."""
    facts = json.loads(bundled("models/pronunciation.json").read_text(encoding="utf-8"))
    results, said = facts["results"], pronunciations()
    model = recipe.load_pronunciation()
    rates, loss = recipe.measure("encoder-decoder", model, split_words(said).test, said)
    # A tie in the fifth digit may fall the other way on another CPU.
    assert rates.word == pytest.approx(results["word_error"], abs=0.002)
    assert rates.phoneme == pytest.approx(results["phoneme_error"], abs=0.0005)
    assert loss == pytest.approx(results["loss"], rel=1e-4)
    assert results["test_words"] == 2000
    assert results["parameters"] == sum(p.numel() for p in model.parameters())


def test_alignment_rows_add_up():
    model = recipe.load_pronunciation()
    found = recipe.alignment(model, "phonetics")
    assert found.letters == list("phonetics")
    assert found.sounds == recipe.pronounce(model, ["phonetics"])[0]
    torch.testing.assert_close(found.matrix.sum(-1), torch.ones(len(found.sounds)))
    # Every word is read anew: what is looked at follows the letters.
    other = recipe.alignment(model, "zebra")
    assert other.matrix.shape == (len(other.sounds), 5)


def test_saved_weights_come_back(tmp_path):
    model = recipe.make_model("encoder-decoder", 5)
    kept = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    save_safetensors(kept, tmp_path / "m.safetensors", {})
    again = recipe.load_pronunciation(path=tmp_path / "m.safetensors")
    for name, p in again.named_parameters():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, kept[name].float(), rtol=0, atol=0)


def test_only_training_words_are_learnt(monkeypatch):
    seen = set()
    make_batch = recipe.make_batch

    def spy(pairs):
        seen.update(pairs)
        return make_batch(pairs)

    monkeypatch.setattr(recipe, "make_batch", spy)
    # Of one length, so that they come in one batch.
    ways = [("B", "AE", "S"), ("B", "EY", "S")]
    said = {"bas": ways, "cab": [("K", "AE", "B")], "fox": [("F", "AA", "K", "S")], "zoo": [("Z", "UW")]}
    recipe.train(
        "encoder-decoder", 0, steps=1, lr=1e-3, said=said, split=Split(["bas", "cab"], ["fox"], ["zoo"])
    )
    assert seen == {("cab", ("K", "AE", "B")), *(("bas", way) for way in ways)}


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("lr", [None, 7e-4])
def test_a_run_learns_from_the_training_words_and_is_measured_on_the_part_that_is_named(
    monkeypatch, part: str, lr: float | None
):
    asked, taught, rates = [], set(), []
    measure, train, make_batch = recipe.measure, recipe.train, recipe.make_batch

    def spy_measure(kind, model, words, said):
        asked.append(words)
        return measure(kind, model, words, said)

    def spy_train(kind, seed, **how):
        rates.append(how["lr"])
        monkeypatch.setattr(recipe, "make_batch", lambda pairs: taught.update(pairs) or make_batch(pairs))
        result = train(kind, seed, **how)
        monkeypatch.setattr(recipe, "make_batch", make_batch)
        return result

    monkeypatch.setattr(recipe, "pronunciations", lambda: SAID)
    monkeypatch.setattr(recipe, "split_words", lambda said: Split(["bananas"], ["cab"], ["read"]))
    monkeypatch.setattr(recipe, "measure", spy_measure)
    monkeypatch.setattr(recipe, "train", spy_train)
    recipe.run("decoder", 0, steps=1, words=part, lr=lr)
    assert asked == [["cab"] if part == "validation" else ["read"]]
    assert {word for word, _ in taught} == {"bananas"}
    assert rates == [recipe.RATES["decoder"] if lr is None else lr]


def test_a_small_house_model(monkeypatch, tmp_path):
    """Learnt from the training words, measured on the test words and on a sample of the training words."""
    asked, measure = [], recipe.measure

    def spy(kind, model, words, said):
        asked.append(words)
        assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())  # as it is kept
        return measure(kind, model, words, said)

    words = ["bananas"] * 2000  # the sample is every so-manieth of 2,000 words or more
    monkeypatch.setattr(recipe, "pronunciations", lambda: SAID)
    monkeypatch.setattr(recipe, "split_words", lambda said: Split(words, ["cab"], ["read"]))
    monkeypatch.setattr(recipe, "measure", spy)
    results = recipe.make_house_model(tmp_path / "m.safetensors", steps=2)
    assert asked == [["read"], words]
    again = recipe.load_pronunciation(path=tmp_path / "m.safetensors")
    expected, _ = recipe.train("encoder-decoder", 0, steps=2, lr=3e-3, said=SAID, split=Split(words, [], []))
    for p, q in zip(again.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q.detach().bfloat16().float())
    assert results["test_words"] == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_alignment_by_hand(layer: int):
    model = recipe.make_model("encoder-decoder", 0).eval()
    found = recipe.alignment(model, "bananas", layer=layer)
    letters = torch.tensor([recipe.letter_ids("bananas")])
    written = torch.tensor([[recipe.BEGIN, *recipe.sound_ids(found.sounds)[:-1]]])
    with torch.no_grad():
        context, x = (
            model.encode(letters),
            model.decoder.positions.embed(model.embed(written), torch.arange(written.shape[1])[None]),
        )
        for index, block in enumerate(model.decoder.blocks):
            x = block.mixer(x, positions=torch.arange(written.shape[1])[None])
            cross = block.cross
            if index == layer:
                q = cross.sublayer.q(cross.norm(x)).unflatten(-1, (4, -1)).transpose(1, 2)
                k = cross.sublayer.k(context).unflatten(-1, (4, -1)).transpose(1, 2)
                weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]
            x = cross(x, context=context)
            x = block.feedforward(x)
    assert found.sounds
    torch.testing.assert_close(found.matrix, weights[: len(found.sounds)])


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_a_run_begins_as_it_did(kind: str):
    """The first steps of the committed run of seed 0, by their mean loss."""
    said = pronunciations()
    row = next(r for r in load_results(recipe.NAME)["rows"] if (r["kind"], r["seed"]) == (kind, 0))
    how = {"steps": recipe.STEPS, "lr": recipe.RATES[kind], "said": said, "split": split_words(said)}
    _, losses = recipe.train(kind, 0, **how, stop=recipe.EARLY)
    assert sum(losses) / len(losses) == pytest.approx(row["early_loss"], rel=1e-3)


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_a_cache_is_filled_under_the_mask_of_its_kind(monkeypatch, kind: str):
    """Untrained weights have no favourite sound, so that a letter seen or not seen changes what is written."""
    monkeypatch.setattr(recipe, "LONGEST", 10)
    words = ["read", "bananas", "thought"]
    model = recipe.make_model(kind, 0).eval()
    for word in words:
        sounds = recipe.pronounce(model, [word], kind=kind)[0]
        written = [recipe.BEGIN]
        letters = torch.tensor([recipe.letter_ids(word)])
        while len(written) <= recipe.LONGEST and written[-1] != recipe.END:
            batch = recipe.Batch(
                letters, torch.arange(len(word))[None], torch.tensor([written]), torch.tensor([written])
            )
            written.append(int(recipe.logits_of(kind, model, batch)[0, -1].argmax()))
        assert sounds == recipe.decode(written[1:])
