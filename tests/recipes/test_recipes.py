"""What all recipes share: sweeps that go on where they stopped, whole files, drawn weights, the committed results."""

import json
import math
import os

import pytest
import torch
from torch import nn

from llm_atlas import recipes
from llm_atlas.core.seeds import generator
from llm_atlas.recipes import (
    FIELDS,
    environment,
    initialize,
    load_results,
    one_thread,
    sweep,
    warmup_then_cosine,
    write_json,
)

POINTS = [{"kind": kind, "seed": seed} for seed in (0, 1) for kind in ("a", "b")]


def counting(calls):
    def run(kind, seed):
        calls.append((kind, seed))
        return {"loss": 1 / 3 + seed, "curve": [0.1, math.nan], "none": math.inf}

    return run


def go(path, calls, *, points=POINTS, settings=None, run=None):
    return sweep(
        path,
        recipe="try-out",
        settings={"sizes": (1, 2)} if settings is None else settings,
        points=points,
        run=run or counting(calls),
    )


def test_a_sweep_runs_every_point_once(tmp_path):
    calls = []
    path = tmp_path / "results" / "try-out.json"
    document = go(path, calls)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert tuple(document) == FIELDS
    assert document["seeds"] == [0, 1]
    assert document["command"] == "python -m llm_atlas.recipes.try_out"
    assert document["versions"]["torch"] == torch.__version__
    assert document["rows"][0] == {
        "kind": "a",
        "seed": 0,
        "loss": 0.333333,
        "curve": [0.1, None],
        "none": None,
    }
    assert json.loads(path.read_text())["rows"] == document["rows"]
    go(path, calls)
    assert len(calls) == 4


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    path, calls = tmp_path / "try-out.json", []
    stopped = counting(calls)

    def until_the_third(kind, seed):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stopped(kind, seed)

    with pytest.raises(KeyboardInterrupt):
        go(path, calls, run=until_the_third)
    assert len(json.loads(path.read_text())["rows"]) == 2
    document = go(path, calls)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [(row["kind"], row["seed"]) for row in document["rows"]] == calls


def test_a_removed_row_is_made_again_in_its_place(tmp_path):
    path, calls = tmp_path / "try-out.json", []
    document = go(path, calls)
    write_json(path, {**document, "rows": document["rows"][:1] + document["rows"][2:]})
    assert go(path, calls)["rows"] == document["rows"]
    assert calls[4:] == [("b", 0)]


def test_other_settings_are_refused(tmp_path):
    path, calls = tmp_path / "try-out.json", []
    go(path, calls)
    before = path.read_text()
    with pytest.raises(ValueError, match="made by another recipe or with other settings"):
        go(path, calls, settings={"sizes": (1, 3)})
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file of results; delete it"):
        go(path, calls)
    path.write_text(before[:100])
    with pytest.raises(ValueError, match="not a file of results; delete it"):
        go(path, calls)
    assert len(calls) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"rows": [{"a": 1}]})
    before = path.read_text()
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"rows": [{"a": math.nan}]})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"rows": [{"a": 2}]})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_json_with_one_row_a_line(tmp_path):
    path = tmp_path / "x.json"
    for document in ({"a": 1, "rows": [{"b": 2}, {"b": 3}]}, {"a": {"c": []}}, {"a": 1, "rows": []}):
        write_json(path, document)
        assert json.loads(path.read_text()) == document
    write_json(path, {"a": 1, "rows": [{"b": 2}, {"b": 3}]})
    assert '  {"b": 2},\n  {"b": 3}\n' in path.read_text()


def test_weights_are_drawn_by_the_generator_alone():
    def make(seed):
        model = nn.Sequential(nn.Embedding(200, 100), nn.Linear(100, 400), nn.LayerNorm(400))
        torch.rand(seed + 1)  # draws of the process change nothing
        initialize(model, generator(seed))
        return model

    first, again, other = make(0), make(0), make(1)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[1].weight, other[1].weight)
    assert first[0].weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert first[1].weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not first[1].bias.any()
    assert (first[2].weight == 1).all()


def test_the_environment_names_the_hardware(monkeypatch):
    monkeypatch.setattr(recipes.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(recipes.platform, "machine", lambda: "x86_64")
    assert environment("number-words")["hardware"] == "2-core x86-64 CPU, one thread"


@pytest.mark.parametrize("name", ["learning-rates", "depth", "placement", "dropout"])
def test_committed_results_hold_what_they_should(name):
    document = load_results(name)
    assert tuple(document) == FIELDS
    assert document["recipe"] == name
    assert document["command"] == f"python -m llm_atlas.recipes.{name.replace('-', '_')}"
    assert document["seeds"] == [0, 1, 2]
    assert all(row.keys() == document["rows"][0].keys() for row in document["rows"])
    flat = (bool, int, float, str, type(None))
    for row in document["rows"]:
        for value in row.values():
            assert isinstance(value, flat) or all(isinstance(item, flat) for item in value)


def test_a_result_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"results/none\.json"):
        load_results("none")
    with pytest.raises(ValueError, match="must lie inside"):
        load_results("../../pyproject")


def test_one_thread_within_and_as_many_as_before_afterwards():
    @one_thread()
    def fail_on(threads):
        raise KeyError(f"{torch.get_num_threads()} of {threads}")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyError, match="1 of 2"):
            fail_on(torch.get_num_threads())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_rate_climbs_then_falls_as_half_a_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_then_cosine(optimizer, steps=6, warmup=2)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize(("steps", "warmup"), [(6, 0), (6, -1), (6, 7)])
def test_a_warmup_that_does_not_fit(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(ValueError, match=f"warmup {warmup} must be at least 1 and at most the {steps} steps"):
        warmup_then_cosine(optimizer, steps=steps, warmup=warmup)
