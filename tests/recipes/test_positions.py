"""Train short, test long: how it is measured, the committed rows, the committed model, and one run begun again."""

import json

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.core.weights import load_safetensors
from llm_atlas.models.families import load_weights
from llm_atlas.models.inspect import attention_maps
from llm_atlas.recipes import load_results, positions, write_json
from llm_atlas.recipes.byte_models import held_out_windows, next_byte_loss
from llm_atlas.recipes.positions import (
    BUCKETS,
    LAST,
    LENGTH,
    LENGTHS,
    METHODS,
    SEEDS,
    SETTINGS,
    WINDOWS,
    bias_curves,
    byte_losses,
    load_nope,
    losses_by_length,
    losses_by_position,
    make_model,
    measure,
    probe,
    run,
    train,
)
from llm_atlas.text.corpora import byte_ids, king_james, split_held_out


@pytest.fixture(scope="module")
def rows():
    return load_results("positions")["rows"]


@pytest.fixture(scope="module")
def windows():
    return torch.randint(97, 123, (4, LENGTHS[-1] + 1), generator=generator(0))


def pick(rows, method):
    return [row for row in rows if row["method"] == method]


def at(row, length):
    return row["loss_by_length"][LENGTHS.index(length)]


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_begin_with_the_same_weights(method):
    plain, model = dict(make_model("nope", 1).named_parameters()), make_model(method, 1)
    mine = dict(model.named_parameters())
    assert all(torch.equal(mine[name], plain[name]) for name in plain)
    extra = {name for name in mine if name not in plain}
    assert len(extra) == (method in ("learned", "t5", "shaw"))
    for name in extra:  # vectors as large as those of tokens, or no preference for any distance
        std = float(mine[name].detach().std())
        assert std == pytest.approx(1, abs=0.05) if method == "learned" else std == 0
    again, other = (
        dict(make_model(method, 1).named_parameters()),
        dict(make_model(method, 2).named_parameters()),
    )
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    assert not torch.equal(mine["embed.weight"], other["embed.weight"])


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"^method 'xpos' is not one of nope, sinusoidal, learned, rope, "):
        make_model("xpos", 0)


def test_the_loss_of_every_byte_adds_up_to_the_loss_of_training(windows):
    model = make_model("rope", 0).eval()
    losses = byte_losses(model, windows[:, :65], rows=3)
    assert losses.shape == (4, 64)
    with torch.inference_mode():
        assert float(losses.mean()) == pytest.approx(
            float(next_byte_loss(model, windows[:, :65])[0]), rel=1e-5
        )


def test_every_length_is_scored_on_the_same_last_bytes(windows):
    model = make_model("alibi", 0).eval()
    found = losses_by_length(model, windows)
    assert len(found) == len(LENGTHS)
    end = windows[:, -LAST:]
    for length, loss in zip(LENGTHS, found, strict=True):
        with torch.inference_mode():
            logits = model(windows[:, -length - 1 : -1])[:, -LAST:]
        wanted = -logits.log_softmax(-1).gather(-1, end[..., None]).mean()
        assert loss == pytest.approx(float(wanted), rel=1e-5)
    changed = windows.clone()
    changed[:, -LENGTH - 40 : -LENGTH - 1] = 65  # seen by the longer readings alone
    again = losses_by_length(model, changed)
    assert again[0] == found[0]
    assert all(a != b for a, b in zip(again[2:], found[2:], strict=True))


def test_the_stretches_of_the_longest_window_add_up_to_the_whole(windows):
    model = make_model("nope", 0).eval()
    stretches = losses_by_position(model, windows)
    assert len(stretches) == BUCKETS
    losses = byte_losses(model, windows)
    assert stretches[0] == pytest.approx(float(losses[:, : LENGTHS[-1] // BUCKETS].mean()), rel=1e-5)
    assert sum(stretches) / BUCKETS == pytest.approx(float(losses.mean()), rel=1e-5)


def test_learned_positions_have_nothing_past_their_table(windows):
    model = make_model("learned", 0).eval()
    found = losses_by_length(model, windows)
    assert found[0] > 0
    assert found[1:] == [None] * (len(LENGTHS) - 1)
    assert losses_by_position(model, windows) is None
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        model(windows[:, :65])


def test_bias_curves_are_what_attention_adds(windows):
    short = windows[:, :65]
    assert bias_curves(make_model("rope", 0), short) is None
    t5 = make_model("t5", 0)
    torch.nn.init.normal_(t5.attention_positions.table.weight, generator=generator(0))
    (heads,) = bias_curves(t5, short)
    table = t5.attention_positions.table.weight.detach().T
    assert_close(torch.tensor(heads)[:, :8], table[:, :8])  # near distances have a bucket each
    assert_close(torch.tensor(heads)[:, -1], table[:, -1])
    shaw = make_model("shaw", 0).eval()
    torch.nn.init.normal_(shaw.attention_positions.table.weight, generator=generator(0))
    curves = torch.tensor(bias_curves(shaw, short))
    assert curves.shape == (3, 4, 17)
    maps = attention_maps(shaw, short[:, :-1])
    shaw.attention_positions.table.weight.data[16] += (
        1  # distance 0: only its own numbers move in the first layer
    )
    moved = torch.tensor(bias_curves(shaw, short))[0] - curves[0]
    assert_close(moved[:, 1:], torch.zeros(4, 16))
    assert (moved[:, 0].abs() > 1e-3).all()
    assert (attention_maps(shaw, short[:, :-1])[0] - maps[0]).abs().max() > 1e-3


def test_a_probe_reads_sinusoids_at_the_bottom_and_nothing_where_nothing_is(windows):
    r2, error = probe(make_model("sinusoidal", 0).eval(), windows[:, :65].repeat(8, 1))
    assert len(r2) == len(error) == 4
    assert r2[0] > 0.95
    assert error[0] < 2
    assert probe(make_model("nope", 0).eval(), windows[:, :65])[0][0] < 0.1


def test_a_run_is_recorded_and_repeats_itself(tmp_path):
    text = torch.randint(97, 101, (9000,), generator=generator(0))
    first = run("learned", 0, steps=20, ids=text, save=tmp_path / "new" / "model.safetensors")
    assert first == run("learned", 0, steps=20, ids=text)
    # What is saved is what was measured, and on text that it was not trained on.
    model = make_model("learned", 0).eval()
    load_weights(model, load_safetensors(tmp_path / "new" / "model.safetensors"))
    held_out, seen = split_held_out(text)[1], split_held_out(text)[0]
    for part, same in ((held_out, True), (seen, False)):
        again = measure(model, held_out_windows(part, batch=WINDOWS, length=LENGTHS[-1]))
        assert (again["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-5)) == same
    other_context, _ = train("learned", 0, stop=1, ids=text, context=70)
    assert other_context.config.context == 70
    untrained = run("nope", 1, steps=2, ids=text)["probe_r2_untrained"]
    windows = held_out_windows(held_out, batch=WINDOWS, length=LENGTHS[-1])[:, -LENGTH - 1 :]
    for seed in (0, 1):
        mine = probe(make_model("nope", seed).eval(), windows)[0]
        assert (untrained == pytest.approx(mine, abs=1e-3)) == (seed == 1)
    assert len(first["loss_curve"]) == 10
    assert first["loss_curve"][-1] < first["loss_curve"][0]
    assert first["bias_curves"] is None
    other = run("learned", 1, steps=20, ids=text)
    assert other["held_out_loss"] != first["held_out_loss"]


# ------------------------------------------------------------------------------- what was committed


def test_every_point_is_there(rows):
    assert [(row["method"], row["seed"]) for row in rows] == [(m, seed) for seed in SEEDS for m in METHODS]
    settings = load_results("positions")["settings"]
    assert {name: settings[name] for name in SETTINGS} == json.loads(json.dumps(SETTINGS))
    for row in rows:
        assert len(row["loss_by_length"]) == len(LENGTHS)
        assert len(row["probe_r2"]) == 4
        assert (row["bias_curves"] is None) == (row["method"] not in ("t5", "shaw"))


def test_what_the_committed_rows_say(rows):
    """The findings that the chapter tells, so that it cannot tell others."""
    longest = LENGTHS[-1]
    for seed in SEEDS:
        row = {method: pick(rows, method)[seed] for method in METHODS}
        # At the trained length every kind of position is better than none.
        for method in METHODS:
            if method != "nope":
                assert row[method]["held_out_loss"] < row["nope"]["held_out_loss"] - 0.15
        # Past it: no vector, a jump, a slow fall, and two that hold.
        assert row["learned"]["loss_by_length"][1:] == [None] * (len(LENGTHS) - 1)
        assert at(row["sinusoidal"], 80) > at(row["sinusoidal"], LENGTH) + 0.3
        for method in ("rope", "rope+nope"):
            assert at(row[method], 80) < at(row[method], LENGTH) + 0.05
            assert at(row[method], 128) > at(row[method], LENGTH) + 0.3
            assert at(row[method], longest) > at(row[method], LENGTH) + 1.2
        assert 0.1 < at(row["nope"], longest) - at(row["nope"], LENGTH) < 0.5
        for method, most in (("alibi", 0.02), ("shaw", 0.06)):
            losses = row[method]["loss_by_length"]
            assert max(losses) - min(losses) < most
        # T5's last bucket stands for every distance beyond: better than a jump, and no more than that.
        assert at(row["t5"], 96) < at(row["t5"], LENGTH) + 0.05
        assert 0.4 < at(row["t5"], longest) - at(row["t5"], LENGTH) < 1
        # Position without any: read from the stream of a causal model, and not where every token sees all.
        assert max(row["nope"]["probe_r2"]) > 0.6
        assert max(row["nope"]["probe_r2_unmasked"]) < 0.05
        assert row["nope"]["probe_r2"][0] < 0.05
        assert max(row["nope"]["probe_r2_untrained"]) < max(row["nope"]["probe_r2"]) - 0.2


def test_the_committed_model_is_the_one_of_its_row(rows):
    row = pick(rows, "nope")[0]
    assert bundled("models/nope-bytes.safetensors").stat().st_size < 1_000_000
    model = load_nope()
    held_out = split_held_out(byte_ids(king_james()))[1]
    windows = held_out_windows(held_out, batch=WINDOWS, length=LENGTHS[-1])
    assert not model.training
    measured = measure(model, windows)
    assert set(row) - set(measured) == {"method", "seed", "probe_r2_untrained", "loss_curve"}
    rough = {"probe_r2": 0.01, "probe_r2_unmasked": 0.01, "probe_error": 0.1}
    for name, value in measured.items():
        wanted = row[name] if value is None else pytest.approx(row[name], abs=rough.get(name, 1e-3))
        assert value == wanted, name
    first = probe(make_model("nope", 0).eval(), windows[:, -LENGTH - 1 :])[0]
    assert first == pytest.approx(row["probe_r2_untrained"], abs=0.01)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_untrained_probes_are_those_of_their_own_seeds(rows, seed):
    windows = held_out_windows(split_held_out(byte_ids(king_james()))[1], batch=WINDOWS, length=LENGTHS[-1])
    first = probe(make_model("nope", seed).eval(), windows[:, -LENGTH - 1 :])[0]
    assert first == pytest.approx(pick(rows, "nope")[seed]["probe_r2_untrained"], abs=0.01)


def test_one_run_begins_as_it_did(rows):
    """The first tenth of one run, with the rates of the whole. Other CPUs sum in another order: 0.02 nats is ample.

    Without the warm-up, or with the weights of another seed, it is off by more.
    """
    committed = pick(rows, "rope")[0]
    _, curve = train("rope", 0, stop=SETTINGS["steps"] // 10)
    assert curve == pytest.approx(committed["loss_curve"][:1], abs=0.02)


def test_the_script_runs_only_what_is_missing(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "positions.json"
    write_json(out, {**load_results("positions"), "rows": rows[1:]})
    calls = []

    def instead(method, seed, *, ids, save):
        calls.append((method, seed, save))
        return {name: rows[0][name] for name in list(rows[0])[2:]}

    monkeypatch.setattr(positions, "run", instead)
    positions.main(out=out, models=tmp_path)
    assert calls == [("nope", 0, tmp_path / "nope-bytes.safetensors")]
    assert json.loads(out.read_text())["rows"] == rows
    assert "learned, 512 bytes: loss of the last 32: none, none, none" in capsys.readouterr().out
