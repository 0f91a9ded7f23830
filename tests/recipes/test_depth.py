"""The depth runs: stacks with and without residual connections, the committed rows, and one of them run again."""

import json
import math

import pytest
import torch
from torch import nn

from llm_atlas.core.seeds import generator
from llm_atlas.recipes import depth, load_results, write_json
from llm_atlas.recipes.byte_models import batches, next_byte_loss
from llm_atlas.recipes.depth import DEPTHS, LR, SEEDS, SETTINGS, gradient_norms, make_model, run, similarity
from llm_atlas.text.corpora import byte_ids, king_james


@pytest.fixture(scope="module")
def rows():
    return load_results("depth")["rows"]


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (4, 17), generator=generator(0))


def pick(rows, depth, residual, lr=LR):
    return [row for row in rows if (row["depth"], row["residual"], row["lr"]) == (depth, residual, lr)]


def test_the_weights_are_the_same_with_and_without():
    with_sums = dict(make_model(3, 0).named_parameters())
    without = dict(make_model(3, 0, residual=False).named_parameters())
    assert with_sums.keys() == without.keys()
    assert all(torch.equal(with_sums[name], without[name]) for name in with_sums)


def test_without_residuals_a_block_is_its_sublayers_alone(windows):
    block = make_model(1, 0, residual=False).blocks[0]
    x = torch.randn(2, 5, 32, generator=generator(1))
    with torch.inference_mode():
        mixed = block.mixer.sublayer(block.mixer.norm(x))
        expected = block.feedforward.sublayer(block.feedforward.norm(mixed))
        torch.testing.assert_close(block(x), expected)
        # and with them, branches that give zeros leave the stream alone
        twin = make_model(1, 0).blocks[0]
        nn.init.zeros_(twin.mixer.sublayer.out.weight)
        nn.init.zeros_(twin.feedforward.sublayer.down.weight)
        assert torch.equal(twin(x), x)


def test_gradient_norms_are_those_of_autograd(windows):
    model = make_model(3, 0)
    next_byte_loss(model, windows)[0].backward()  # what lies there already must not be added to
    norms = gradient_norms(model, windows)
    assert all(parameter.grad is None for parameter in model.parameters())
    parameters = list(model.blocks[1].parameters())
    gradients = torch.autograd.grad(next_byte_loss(model, windows)[0], parameters)
    assert norms[1] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=1e-4)
    assert len(norms) == 3


def test_similarity_is_the_mean_cosine_of_pairs(windows):
    model = make_model(2, 0)
    with torch.inference_mode():
        x = model.hidden(windows[:, :-1])
    cosines = [
        float(nn.functional.cosine_similarity(row[i], row[j], dim=0))
        for row in x
        for i in range(16)
        for j in range(16)
        if i != j
    ]
    assert similarity(model, windows) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    same = torch.zeros(1, 9, dtype=torch.long)
    assert similarity(model, same) == pytest.approx(1, abs=1e-5)


def test_a_run_is_recorded_and_repeats_itself():
    text = torch.randint(97, 101, (3000,), generator=generator(0))
    first = run(2, True, 0, steps=20, ids=text)
    assert first == run(2, True, 0, steps=20, ids=text)
    assert first["loss_curve"] != run(2, False, 0, steps=20, ids=text)["loss_curve"]
    assert first["loss_curve"] != run(2, True, 0, lr=1e-4, steps=20, ids=text)["loss_curve"]
    assert first["loss_curve"][1] < first["loss_curve"][0]
    assert len(first["gradient_norms"]) == 2
    assert first["gradient_ratio"] == first["first_gradient"] / first["last_gradient"]


def test_every_point_is_there(rows):
    points = {(row["depth"], row["residual"], row["lr"], row["seed"]) for row in rows}
    rates = {d: (LR, *depth.OTHER_RATES.get(d, ())) for d in DEPTHS}
    assert points == {
        (d, r, lr, seed) for d in DEPTHS for r in (True, False) for lr in rates[d] for seed in SEEDS
    }
    assert len(rows) == len(points)
    settings = load_results("depth")["settings"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS


def test_what_the_committed_rows_say(rows):
    """The findings that the chapter tells, so that it cannot tell others."""
    nothing_learnt = load_results("depth")["settings"]["unigram_loss"]
    for d in DEPTHS:
        # With residuals every stack learns more than the bytes' frequencies; without, none does.
        assert max(row["held_out_loss"] for row in pick(rows, d, True)) < nothing_learnt - 0.25
        assert min(row["held_out_loss"] for row in pick(rows, d, False)) > nothing_learnt - 0.02
    for row in pick(rows, 120, True):
        assert 0.01 < row["gradient_ratio"] < 100
    for row in pick(rows, 120, False):
        assert row["gradient_ratio"] > 1e12
        assert row["similarity_at_start"] > 0.99
    for row in rows:
        assert row["parameters"] == pick(rows, row["depth"], True)[0]["parameters"]


def test_one_point_comes_out_again(rows):
    """The whole of one run. Other CPUs sum in another order; over 100 steps of this small a stack 0.03 nats is ample.

    Without the residuals the same point ends 0.6 higher.
    """
    committed = next(row for row in pick(rows, 4, True) if row["seed"] == 0)
    again = run(4, True, 0, ids=byte_ids(king_james()))
    assert again["held_out_loss"] == pytest.approx(committed["held_out_loss"], abs=0.03)
    assert again["gradient_norms"] == pytest.approx(committed["gradient_norms"], rel=1e-3)
    assert again["loss_curve"][0] == pytest.approx(committed["loss_curve"][0], abs=1e-3)


@pytest.mark.parametrize("residual", [True, False])
def test_the_gradients_of_the_deepest_stack_come_out_again(rows, residual):
    """One backward pass of 120 blocks. Without the sums tiny differences grow too: a factor of 3 is allowed."""
    text = byte_ids(king_james())
    train, _ = depth.split_held_out(text)
    committed = next(row for row in pick(rows, 120, residual) if row["seed"] == 0)
    norms = gradient_norms(
        make_model(120, 0, residual=residual), next(batches(train, 0, batch=depth.BATCH, length=depth.LENGTH))
    )
    assert len(norms) == len(committed["gradient_norms"]) == 120
    if residual:
        assert norms == pytest.approx(committed["gradient_norms"], rel=0.02)
    else:
        assert math.log(norms[0]) == pytest.approx(math.log(committed["gradient_norms"][0]), abs=math.log(3))


def test_the_script_runs_only_what_is_missing(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "depth.json"
    document = load_results("depth")
    write_json(out, {**document, "rows": rows[1:]})
    calls = []

    def instead(depth, residual, lr, seed, *, ids):
        calls.append((depth, residual, lr, seed))
        return {name: rows[0][name] for name in list(rows[0])[4:]}

    monkeypatch.setattr(depth, "run", instead)
    depth.main(out=out)
    assert calls == [(4, True, LR, 0)]
    assert json.loads(out.read_text())["rows"] == rows
    assert "depth 120, lr 0.003, residual False: held-out loss" in capsys.readouterr().out
