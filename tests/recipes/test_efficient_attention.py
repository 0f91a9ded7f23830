"""One budget for all kinds of attention: what is compared, the recall task, conversions, the committed rows."""

import dataclasses
import json

import pytest
import torch

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder
from llm_atlas.recipes import efficient_attention as recipe
from llm_atlas.recipes import load_results, write_json
from llm_atlas.recipes.byte_models import held_out_windows, measure
from llm_atlas.recipes.efficient_attention import (
    KEYS,
    PAIRS,
    RATES,
    SEEDS,
    SETTINGS,
    SHAPE,
    TASKS,
    VARIANTS,
    Recall,
    convert,
    make_config,
    make_model,
    parameters,
    points,
    recall_batches,
    recall_by_pairs,
    recall_lists,
    recall_loss,
    run,
    train,
)
from llm_atlas.text.corpora import byte_ids, king_james, split_held_out

TEXT = torch.randint(97, 101, (9000,), generator=generator(0))


@pytest.fixture(scope="module")
def rows():
    return load_results("efficient-attention")["rows"]


def pick(rows, task, variant, what):
    return [row[what] for row in rows if (row["task"], row["variant"]) == (task, variant)]


# -------------------------------------------------------------------------------- the same budget


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_parameters_of_the_first(variant, task):
    mine, full = parameters(make_config(variant, task)), parameters(make_config("mha", task))
    assert abs(mine - full) <= TASKS[task]["layers"] * 3 * SHAPE["dim"] / 2
    model = make_model(variant, task, 0)
    inside = model if task == "language" else model.decoder
    assert isinstance(model, Decoder if task == "language" else Recall)
    assert sum(p.numel() for p in inside.parameters()) == mine


def test_variants_differ_in_their_mixer_and_the_width_that_pays_for_it():
    full = make_config("mha", "language")
    for variant, changes in VARIANTS.items():
        mine = make_config(variant, "language")
        assert dataclasses.replace(mine, hidden=full.hidden) == dataclasses.replace(full, **changes)


def test_the_convolution_is_left_out_where_every_token_knows_the_one_before():
    assert make_config("delta", "language").linear.conv == 4
    assert make_config("delta", "recall").linear.conv == 0


def test_weights_follow_the_seed():
    one, same, other = (dict(make_model("gated", "recall", seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["before.weight"], other["before.weight"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_config("mamba", "language"), "variant 'mamba' is not one of mha, gqa-4"),
        (lambda: make_config("mha", "vision"), "task 'vision' is not one of language, recall"),
        (lambda: recall_lists(0, 3, generator=generator(0)), "pairs 0 must be 1 to 64"),
        (lambda: recall_lists(KEYS + 1, 3, generator=generator(0)), "pairs 65 must be 1 to 64"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --------------------------------------------------------------------------------- the recall task


@pytest.mark.parametrize("pairs", [1, 5, KEYS])
def test_a_list_tells_every_pair_and_asks_for_it_once(pairs):
    lists = recall_lists(pairs, 7, generator=generator(3))
    assert lists.shape == (7, 4 * pairs)
    for row in lists.tolist():
        told, asked = row[: 2 * pairs], row[2 * pairs :]
        pair = dict(zip(told[::2], told[1::2], strict=True))
        assert len(pair) == pairs
        assert all(key < KEYS <= value < 2 * KEYS for key, value in pair.items())
        assert dict(zip(asked[::2], asked[1::2], strict=True)) == pair
    if pairs > 1:
        assert any(row[: 2 * pairs] != row[2 * pairs :] for row in lists.tolist())


def test_batches_have_one_length_each_and_the_same_number_of_tokens():
    source = recall_batches(0, tokens=256)
    shapes = {tuple(next(source).shape) for _ in range(60)}
    assert shapes == {(256 // (4 * pairs), 4 * pairs) for pairs in PAIRS}


class Oracle(Recall):
    """Says the value that stands behind the key in the first half; `wrong` of every list's answers are others."""

    def __init__(self, wrong: int = 0):
        torch.nn.Module.__init__(self)
        self.wrong = wrong

    def hidden(self, ids):
        half = (ids.shape[1] + 1) // 2
        told = {}
        out = torch.zeros(*ids.shape, 2 * KEYS)
        for row, tokens in enumerate(ids.tolist()):
            told = dict(zip(tokens[:half:2], tokens[1:half:2], strict=True))
            for count, place in enumerate(range(half, len(tokens), 2)):
                value = told[tokens[place]]
                out[row, place, KEYS + (value + 1) % KEYS if count < self.wrong else value] = 20.0
        return out

    def unembed(self, x):
        return x


def test_only_answers_count():
    lists = recall_lists(8, 5, generator=generator(4))
    loss, metrics = recall_loss(Oracle(), lists)
    assert float(loss) < 1e-3
    assert metrics["right"] == 1
    loss, metrics = recall_loss(Oracle(wrong=2), lists)
    assert float(metrics["right"]) == pytest.approx(6 / 8)
    assert float(loss) == pytest.approx(20 * 2 / 8, rel=0.01)
    assert recall_by_pairs(Oracle(wrong=1)) == pytest.approx([1 - 1 / pairs for pairs in PAIRS])


def test_a_token_knows_the_one_before_it_and_no_other():
    model = make_model("local", "recall", 0)
    with torch.no_grad():
        for block in model.decoder.blocks:  # no mixing at all
            block.mixer.sublayer.out.weight.zero_()
    ids = torch.randint(2 * KEYS, (1, 9), generator=generator(5))
    for changed in range(9):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % (2 * KEYS)
        moved = (model.hidden(other) != model.hidden(ids)).any(-1)[0].nonzero().flatten().tolist()
        assert moved == [i for i in (changed, changed + 1) if i < 9]


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_recorded_and_repeats_itself(task):
    first = run(task, "gqa-2", RATES[task][0], 0, steps=10, ids=TEXT)
    assert first == run(task, "gqa-2", RATES[task][0], 0, steps=10, ids=TEXT)
    other = run(task, "gqa-2", RATES[task][0], 1, steps=10, ids=TEXT)
    what = "held_out_loss" if task == "language" else "recall"
    assert other[what] != first[what]
    assert len(first["loss_curve"]) == 10
    assert first["loss_curve"][-1] < first["loss_curve"][0]
    assert first["cached_numbers"] == TASKS[task]["layers"] * 2 * 2 * 16 * TASKS[task]["length"]


def test_what_is_measured_is_other_text_than_what_is_read():
    row = run("language", "mqa", 3e-3, 0, steps=30, ids=TEXT)
    model = make_model("mqa", "language", 0)
    seen, held_out = split_held_out(TEXT)
    train(model, "language", 0, ids=seen, rate=3e-3, steps=30)
    again, on_seen = (
        measure(model.eval(), held_out_windows(part, batch=64, length=256)) for part in (held_out, seen)
    )
    assert row["held_out_loss"] == pytest.approx(again, rel=1e-4)
    assert row["held_out_loss"] != pytest.approx(on_seen, rel=1e-4)


def test_a_conversion_measures_before_and_after():
    seen, held_out = split_held_out(TEXT)
    windows = held_out_windows(held_out, batch=8, length=256)
    model = make_model("mha", "language", 0).eval()
    whole = measure(model, windows)
    how = {"ids": seen, "windows": windows, "steps": 5}
    same, kept = convert(model, 8, "none", 0, **how)
    assert kept["loss_converted"] == pytest.approx(whole, rel=1e-5)
    assert kept["loss_trained_on"] < whole
    assert same.config.kv_heads == 8
    grouped, found = convert(model, 2, "random", 0, **how)
    assert grouped.config.kv_heads == 2
    assert found == convert(model, 2, "random", 0, **how)[1]
    assert found["loss_converted"] != convert(model, 2, "random", 1, **how)[1]["loss_converted"]
    assert measure(model, windows) == whole


# ------------------------------------------------------------------------------- what was committed


def test_every_point_is_there(rows):
    wanted = [tuple(point.values()) for point in points()]
    assert [tuple(row[name] for name in ("task", "variant", "rate", "seed")) for row in rows] == wanted
    settings = load_results("efficient-attention")["settings"]
    assert {name: settings[name] for name in SETTINGS} == json.loads(json.dumps(SETTINGS))
    for row in rows:
        if row["task"] != "conversion":
            config = make_config(row["variant"], row["task"])
            assert row["hidden"] == config.hidden
            assert len(row["loss_curve"]) == 10


@pytest.mark.parametrize("task", TASKS)
def test_one_run_begins_as_it_did(rows, task):
    """The first tenth of one run, with the rates of the whole. Other CPUs sum in another order."""
    committed = next(row for row in rows if (row["task"], row["variant"]) == (task, "mqa"))
    model = make_model("mqa", task, 0)
    steps = TASKS[task]["steps"] // 10
    ids = split_held_out(byte_ids(king_james()))[0]
    curve = train(model, task, 0, ids=ids, rate=committed["rate"], stop=steps)
    assert curve == pytest.approx(committed["loss_curve"][:1], abs=0.02)


def test_the_script_runs_only_what_is_missing(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "efficient-attention.json"
    write_json(out, {**load_results("efficient-attention"), "rows": rows[1:]})
    calls = []

    def instead(task, variant, rate, seed, *, ids):
        calls.append((task, variant, rate, seed))
        return {name: rows[0][name] for name in list(rows[0])[4:]}

    monkeypatch.setattr(recipe, "run", instead)
    recipe.main(out=out)
    assert calls == [("language", "mha", 3e-3, 0)]
    assert json.loads(out.read_text())["rows"] == rows
    assert f"recall     mha       {rows[len(VARIANTS)]['recall'][-1]:.3f}" in capsys.readouterr().out
    assert len(SEEDS) == 3


def test_conversions_pool_as_they_are_named_and_read_windows_of_their_own(monkeypatch):
    seen, held_out = split_held_out(TEXT)
    windows = held_out_windows(held_out, batch=8, length=256)
    model = make_model("mha", "language", 0).eval()
    calls = []

    def watched(model, task, seed, **how):
        calls.append((task, seed, how["steps"], how["rate"]))
        return []

    monkeypatch.setattr(recipe, "train", watched)
    for how in ("mean", "first"):
        grouped, found = convert(model, 2, how, 4, ids=seen, windows=windows, steps=7)
        wanted = recipe.group_kv_heads(model, 2, how=how)
        assert all(torch.equal(a, b) for a, b in zip(grouped.parameters(), wanted.parameters(), strict=True))
        assert found["loss_converted"] == found["loss_trained_on"]
    # Neither the windows of training (the run's own seed) nor those of another seed.
    assert calls == [("language", 3004, 7, recipe.UPTRAINING_RATE)] * 2


def test_conversions_begin_with_the_trained_model_and_last_as_long_as_they_say(monkeypatch):
    calls = []
    monkeypatch.setattr(recipe, "train", lambda model, *args, **how: calls.append((args, how)))
    recipe._trained.cache_clear()
    run("conversion", "mean-2-25", 1e-3, 0, ids=TEXT)
    recipe._trained.cache_clear()
    (first, begun), (_, then) = calls
    assert first == ("language", 0)
    assert (begun["rate"], begun.get("steps")) == (3e-3, None)
    assert then["steps"] == TASKS["language"]["steps"] // 4


def test_every_row_is_asked_in_an_order_of_its_own():
    lists = recall_lists(16, 6, generator=generator(8))
    told, asked = lists[:, :32:2], lists[:, 32::2]
    places = {tuple(t.tolist().index(key) for key in a.tolist()) for t, a in zip(told, asked, strict=True)}
    assert len(places) == 6


def test_the_optimizer_is_the_one_that_is_written_down(monkeypatch):
    made = {}

    def spy(model, data, loss, **how):
        made.update(how, groups=how["optimizer"].param_groups[0])
        return [{"loss": 1.0}]

    monkeypatch.setattr(recipe, "fit", spy)
    train(make_model("mqa", "recall", 0), "recall", 0, ids=TEXT, rate=1e-2)
    assert (made["clip"], made["steps"], made["groups"]["weight_decay"]) == (1.0, 500, 0.01)
    assert made["groups"]["initial_lr"] == 1e-2
