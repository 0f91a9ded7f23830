"""The training loop: it learns, repeats itself exactly, records what happened, refuses nonsense."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from llm_atlas.core.seeds import generator
from llm_atlas.train.loop import fit


def a_line(seed=0):
    """Batches of y = 3x - 1 with a little noise."""
    rng = generator(seed)
    while True:
        x = torch.randn(16, 1, generator=rng)
        yield x, 3 * x - 1 + 0.01 * torch.randn(16, 1, generator=rng)


def squared_error(model, batch):
    x, y = batch
    error = functional.mse_loss(model(x), y)
    return error, {"root": error.detach().sqrt()}


def linear(seed=0):
    model = nn.Linear(1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator(seed))
    return model


def test_the_loss_falls_to_the_noise():
    model = linear()
    rows = fit(model, a_line(), squared_error, steps=300, lr=0.1)
    assert rows[0]["loss"] > 0.5
    assert rows[-1]["loss"] < 1e-3
    assert model.weight.item() == pytest.approx(3, abs=0.02)
    assert model.bias.item() == pytest.approx(-1, abs=0.02)


def test_rows_are_plain_numbers_one_a_step():
    rows = fit(linear(), a_line(), squared_error, steps=4, lr=0.1, clip=1.0)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(type(value) in (int, float) for row in rows for value in row.values())
    assert set(rows[0]) == {"step", "loss", "grad_norm", "root"}
    assert rows[0]["root"] == pytest.approx(rows[0]["loss"] ** 0.5)


def test_the_first_loss_is_that_of_the_untrained_model():
    model = linear()
    before = squared_error(model, next(a_line()))[0].item()
    assert fit(model, a_line(), squared_error, steps=1, lr=0.1)[0]["loss"] == before


def test_the_same_seed_gives_the_same_run():
    first, second = linear(), linear()
    rows = fit(first, a_line(), squared_error, steps=20, lr=0.1)
    assert fit(second, a_line(), squared_error, steps=20, lr=0.1) == rows
    assert torch.equal(first.weight, second.weight)
    assert fit(linear(), a_line(seed=1), squared_error, steps=20, lr=0.1) != rows


def test_one_step_of_the_given_optimizer_is_gradient_descent():
    model, twin = linear(), linear()
    squared_error(twin, next(a_line()))[0].backward()
    expected = twin.weight - 0.5 * twin.weight.grad
    fit(model, a_line(), squared_error, steps=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    torch.testing.assert_close(model.weight, expected)


def test_clipping_shortens_the_gradient_and_records_its_length():
    model, twin = linear(), linear()
    squared_error(twin, next(a_line()))[0].backward()
    norm = math.hypot(twin.weight.grad.item(), twin.bias.grad.item())
    assert norm > 0.1
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    row = fit(model, a_line(), squared_error, steps=1, optimizer=sgd, clip=0.1)[0]
    assert row["grad_norm"] == pytest.approx(norm)
    moved = math.hypot((model.weight - twin.weight).item(), (model.bias - twin.bias).item())
    assert moved == pytest.approx(0.1, rel=1e-4)


def exploding(model, batch):
    return model(batch[0]).sum() * math.inf, {}


def test_a_divergence_is_recorded_unless_it_is_refused():
    rows = fit(linear(), a_line(), exploding, steps=3, lr=0.1)
    assert len(rows) == 3
    assert not math.isfinite(rows[-1]["loss"])
    model = linear()
    with pytest.raises(FloatingPointError, match=r"loss is (inf|-inf|nan) at step 0"):
        fit(model, a_line(), exploding, steps=3, lr=0.1, require_finite=True)
    assert torch.equal(model.weight, linear().weight)  # nothing of it reached the weights


def test_on_step_sees_every_update_and_may_add_to_the_row():
    model, seen = linear(), []

    def look(step, row):
        row["weight"] = model.weight.item()
        seen.append(step)

    rows = fit(model, a_line(), squared_error, steps=5, lr=0.1, on_step=look)
    assert seen == [0, 1, 2, 3, 4]
    assert rows[-1]["weight"] == model.weight.item()
    assert rows[0]["weight"] != rows[-1]["weight"]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_training_within_and_as_before_afterwards(training):
    model, modes = linear().train(training), []

    def loss(model, batch):
        modes.append(model.training)
        return squared_error(model, batch)

    fit(model, a_line(), loss, steps=1, lr=0.1)
    assert modes == [True]
    assert model.training is training


def test_a_frozen_parameter_stays():
    model = linear()
    model.bias.requires_grad_(False)
    before = model.bias.item()
    fit(model, a_line(), squared_error, steps=3, lr=0.1, clip=1.0)
    assert model.bias.item() == before


def test_no_bar_is_drawn_where_there_is_no_terminal(capsys):
    fit(linear(), a_line(), squared_error, steps=2, lr=0.1)
    assert capsys.readouterr() == ("", "")
    fit(linear(), a_line(), squared_error, steps=2, lr=0.1, progress=True)
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0, "lr": 0.1}, "steps 0 must be at least 1"),
        ({"steps": 1}, "give either lr or optimizer"),
        ({"steps": 1, "lr": 0.1, "clip": 0.0}, r"clip 0.0 must be positive"),
        ({"steps": 1, "lr": 0.1, "clip": math.nan}, r"clip nan must be positive"),
    ],
)
def test_arguments_that_do_not_fit(how, message):
    with pytest.raises(ValueError, match=message):
        fit(linear(), a_line(), squared_error, **how)


def test_lr_and_optimizer_together_are_refused():
    model = linear()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="give either lr or optimizer"):
        fit(model, a_line(), squared_error, steps=1, lr=1.0, optimizer=sgd)


def test_batches_that_end_early():
    with pytest.raises(ValueError, match="batches ended after 2 of 5 steps"):
        fit(linear(), itertools.islice(a_line(), 2), squared_error, steps=5, lr=0.1)


def test_a_loss_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"loss must return a scalar, got shape \(16, 1\)"):
        fit(linear(), a_line(), lambda model, batch: (model(batch[0]), {}), steps=1, lr=0.1)
