"""The dropout runs: the two texts, the drawn masks, the committed rows, and one of them run again in part."""

import json

import pytest
import torch

from llm_atlas.core.seeds import generator
from llm_atlas.nn.dropout import Dropout
from llm_atlas.recipes import dropout, load_results, write_json
from llm_atlas.recipes.dropout import (
    BATCH,
    LENGTH,
    PROBE_EVERY,
    RATES,
    REGIMES,
    SEEDS,
    SETTINGS,
    SLICE,
    STEPS,
    make_model,
    run,
    text_of,
)
from llm_atlas.text.corpora import byte_ids, king_james, split_held_out


@pytest.fixture(scope="module")
def rows():
    return load_results("dropout")["rows"]


@pytest.fixture(scope="module")
def some_text():
    return torch.randint(97, 101, (30_000,), generator=generator(0))  # letters a to d at random


def pick(rows, **where):
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_weights_are_the_same_at_every_rate():
    plain, dropping = make_model(0.0, 0), make_model(0.3, 0)
    for (name, a), (other, b) in zip(plain.named_parameters(), dropping.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    layers = [module for module in dropping.modules() if isinstance(module, Dropout)]
    assert [layer.p for layer in layers] == [0.3] * (1 + 2 * SETTINGS["layers"])
    assert len({id(layer.generator) for layer in layers}) == 1
    assert layers[0].generator is not None


def test_the_texts():
    ids = torch.arange(3 * SLICE)
    assert torch.equal(text_of("over", ids), ids[-SLICE:])
    assert text_of("under", ids) is ids
    with pytest.raises(ValueError, match="regime 'both' is not one of over, under"):
        text_of("both", ids)


def test_a_run_is_recorded_and_repeats_itself(some_text, monkeypatch):
    monkeypatch.setattr(dropout, "PROBE_EVERY", 4)
    first = run("over", 0.3, 0, steps=10, ids=some_text)
    torch.rand(3)
    assert first == run("over", 0.3, 0, steps=10, ids=some_text)
    assert first["probe_steps"] == [4, 8, 10]
    assert first["gap"] == first["held_out_loss"] - first["train_loss"]
    assert first["best_held_out_loss"] == min(first["held_out_loss_curve"])
    assert first["held_out_loss"] == first["held_out_loss_curve"][-1]
    assert first["epochs"] == pytest.approx(10 * BATCH * LENGTH / SLICE)
    for other in (("over", 0.0, 0), ("under", 0.3, 0), ("over", 0.3, 1)):
        assert run(*other, steps=4, ids=some_text)["held_out_loss"] != first["held_out_loss_curve"][0]


def test_dropout_is_off_where_losses_are_measured_and_on_where_it_trains(some_text, monkeypatch):
    modes = {"measured": [], "trained": []}
    measure, loss = dropout.measure, dropout.next_byte_loss

    def measuring(model, windows):
        modes["measured"].append(model.training)
        return measure(model, windows)

    def training(model, windows):
        modes["trained"].append(model.training)
        return loss(model, windows)

    monkeypatch.setattr(dropout, "PROBE_EVERY", 2)
    monkeypatch.setattr(dropout, "measure", measuring)
    monkeypatch.setattr(dropout, "next_byte_loss", training)
    run("over", 0.3, 0, steps=5, ids=some_text)
    assert modes == {"measured": [False] * 6, "trained": [True] * 5}


def test_every_point_is_there(rows):
    assert {(row["regime"], row["p"], row["seed"]) for row in rows} == {
        (regime, p, seed) for regime in REGIMES for p in RATES for seed in SEEDS
    }
    assert len(rows) == len(REGIMES) * len(RATES) * len(SEEDS)
    settings = load_results("dropout")["settings"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert len({row["parameters"] for row in rows}) == 1
    for row in rows:
        assert row["probe_steps"] == list(range(PROBE_EVERY, STEPS + 1, PROBE_EVERY))
        best = row["probe_steps"].index(row["best_step"])
        assert (
            row["held_out_loss_curve"][best] == row["best_held_out_loss"] == min(row["held_out_loss_curve"])
        )
        assert row["gap"] == pytest.approx(row["held_out_loss"] - row["train_loss"], abs=1e-4)
    assert min(row["epochs"] for row in pick(rows, regime="over")) > 10
    assert max(row["epochs"] for row in pick(rows, regime="under")) < 0.2


def test_what_the_committed_rows_say(rows):
    """The findings that the chapter tells, so that it cannot tell others."""

    def loss(regime, p, name="held_out_loss"):
        return mean(pick(rows, regime=regime, p=p), name)

    # Read many times: without dropout the held-out loss turns up, a little dropout is best, much of it costs.
    for row in pick(rows, regime="over", p=0.0):
        assert row["best_step"] < STEPS
        assert row["held_out_loss"] > row["best_held_out_loss"] + 0.05
    assert min(RATES, key=lambda p: loss("over", p)) in (0.05, 0.1, 0.2)
    assert loss("over", 0.1) < loss("over", 0.0) - 0.1
    assert loss("over", 0.5) > loss("over", 0.1) + 0.1
    gaps = [loss("over", p, "gap") for p in RATES]
    assert gaps == sorted(gaps, reverse=True)
    # Stopped at its best step the model without dropout is behind by less.
    assert loss("over", 0.0, "best_held_out_loss") > loss("over", 0.1, "best_held_out_loss")
    # Read once: every rate costs, more of it more, in every seed.
    for seed in SEEDS:
        once = [pick(rows, regime="under", p=p, seed=seed)[0]["held_out_loss"] for p in RATES]
        assert once == sorted(once)
        assert once[-1] > once[0] + 0.2


def test_the_start_of_one_point_comes_out_again(rows):
    """As far as the first measurement. Other CPUs sum in another order: 0.03 nats are ample so early."""
    for regime, p in (("over", 0.2), ("under", 0.0)):
        committed = pick(rows, regime=regime, p=p, seed=0)[0]
        again = run(regime, p, 0, steps=PROBE_EVERY, ids=byte_ids(king_james()))
        assert again["held_out_loss"] == pytest.approx(committed["held_out_loss_curve"][0], abs=0.03)
        assert again["train_loss"] == pytest.approx(committed["train_loss_curve"][0], abs=0.03)


def test_the_slice_lies_right_before_the_held_out_text():
    train, held_out = split_held_out(byte_ids(king_james()))
    whole = byte_ids(king_james())
    joined = torch.cat([text_of("over", train), held_out])
    assert torch.equal(joined, whole[-len(joined) :])


def test_the_script_runs_only_what_is_missing(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "dropout.json"
    document = load_results("dropout")
    write_json(out, {**document, "rows": rows[1:]})
    calls = []

    def instead(regime, p, seed, *, ids):
        calls.append((regime, p, seed))
        return {name: rows[0][name] for name in list(rows[0])[3:]}

    monkeypatch.setattr(dropout, "run", instead)
    dropout.main(out=out)
    assert calls == [("over", 0.0, 0)]
    assert json.loads(out.read_text())["rows"] == rows
    assert "under p 0.5 : held-out loss" in capsys.readouterr().out
