"""The placement runs: the three models, their gradients, the committed rows, and one of them run again."""

import json
import math

import pytest
import torch

from llm_atlas.core.seeds import generator
from llm_atlas.recipes import load_results, placement, write_json
from llm_atlas.recipes.byte_models import batches, next_byte_loss
from llm_atlas.recipes.placement import (
    DEPTHS,
    LEARNING_RATES,
    MARGIN,
    PLACEMENTS,
    SEEDS,
    SETTINGS,
    STEPS,
    WARMUPS,
    gradients,
    make_model,
    rate,
    run,
    stream,
)
from llm_atlas.text.corpora import byte_ids, king_james, split_held_out


@pytest.fixture(scope="module")
def rows():
    return load_results("placement")["rows"]


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (4, 17), generator=generator(0))


def pick(rows, **where):
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def test_matrices_are_the_same_in_all_placements():
    pre, post, sandwich = (dict(make_model(p, 2, 0).named_parameters()) for p in PLACEMENTS)
    for other in (post, sandwich):
        for name in pre.keys() & other.keys():
            assert torch.equal(pre[name], other[name])
    # A post-norm stack ends in a norm already; a sandwich has two more norms a block, weight and bias each.
    assert pre.keys() - post.keys() == {"norm.weight", "norm.bias"}
    assert len(sandwich) == len(pre) + 2 * 2 * 2
    assert make_model("pre", 2, 0).embed.weight.std().item() == pytest.approx(1, rel=0.05)
    assert not torch.equal(make_model("pre", 2, 1).head.weight, pre["head.weight"])


def test_gradients_are_those_of_autograd(windows):
    model = make_model("post", 3, 0)
    next_byte_loss(model, windows)[0].backward()  # what lies there already must not be added to
    got = gradients(model, windows)
    assert all(parameter.grad is None for parameter in model.parameters())
    block = model.blocks[1]
    asked = [block.feedforward.sublayer.down.weight, model.head.weight, *block.parameters()]
    down, head, *rest = torch.autograd.grad(next_byte_loss(model, windows)[0], asked)
    assert got["ffn_gradient_norms"][1] == pytest.approx(float(down.norm()), rel=1e-4)
    assert got["head_gradient"] == pytest.approx(float(head.norm()), rel=1e-4)
    whole = math.sqrt(sum(float(g.square().sum()) for g in rest))
    assert got["gradient_norms"][1] == pytest.approx(whole, rel=1e-4)
    assert len(got["gradient_norms"]) == len(got["ffn_gradient_norms"]) == 3


def test_the_stream_is_measured_between_the_blocks(windows):
    model = make_model("post", 3, 0)
    sizes = stream(model, windows)
    assert len(sizes) == 4
    with torch.inference_mode():
        x = model.embed(windows[:, :-1])
        assert sizes[0] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
    assert sizes[1:] == pytest.approx([1.0] * 3, abs=1e-3)  # what leaves a norm has this size
    grown = stream(make_model("pre", 3, 0), windows)
    assert grown == sorted(grown)


def test_the_rate_rises_in_equal_steps():
    assert [rate(step, 0.3, 3) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert rate(0, 0.3, 0) == 0.3
    for step, warmup in ((0, -5), (-1, 5)):
        with pytest.raises(ValueError, match="must be at least 0"):
            rate(step, 0.3, warmup)


def test_warm_up_reaches_the_optimizer(windows):
    """With a rate that is all but zero in the first steps, the first steps change all but nothing."""
    text = torch.randint(97, 101, (3000,), generator=generator(0))
    warm = run("pre", 2, 1e-2, 10**9, 0, steps=20, ids=text)
    assert warm["loss_curve"][1] == pytest.approx(warm["loss_curve"][0], abs=0.1)
    cold = run("pre", 2, 1e-2, 0, 0, steps=20, ids=text)
    assert cold["loss_curve"][1] < cold["loss_curve"][0] - 1
    rising = run("pre", 2, 1e-2, 10, 0, steps=20, ids=text)
    assert warm["loss_curve"][0] > rising["loss_curve"][0] > cold["loss_curve"][0]


def test_a_run_is_recorded_and_repeats_itself():
    text = torch.randint(97, 101, (3000,), generator=generator(0))
    first = run("sandwich", 2, 3e-3, 0, 0, steps=20, ids=text)
    assert first == run("sandwich", 2, 3e-3, 0, 0, steps=20, ids=text)
    assert first["loss_curve"] != run("post", 2, 3e-3, 0, 0, steps=20, ids=text)["loss_curve"]
    assert first["loss_curve"] != run("sandwich", 2, 3e-3, 0, 1, steps=20, ids=text)["loss_curve"]
    assert first["first_gradient"] == first["gradient_norms"][0]
    assert first["last_gradient"] == first["gradient_norms"][-1]
    assert first["last_ffn_gradient"] == first["ffn_gradient_norms"][-1]


def test_a_model_that_broke_has_not_learned(monkeypatch):
    def broken(*_):
        return math.nan

    monkeypatch.setattr(placement, "measure", broken)
    text = torch.randint(97, 101, (3000,), generator=generator(0))
    row = run("pre", 2, 3e-3, 0, 0, steps=2, ids=text)
    assert row["diverged"]
    assert not row["learned"]


def test_every_point_is_there(rows):
    points = {tuple(row[name] for name in ("placement", "depth", "lr", "warmup", "seed")) for row in rows}
    assert points == {
        (p, d, lr, w, seed)
        for p in PLACEMENTS
        for d in DEPTHS
        for lr in LEARNING_RATES[d]
        for w in WARMUPS
        for seed in SEEDS
    }
    assert len(rows) == len(points)
    settings = load_results("placement")["settings"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    for row in rows:
        loss = math.inf if row["held_out_loss"] is None else row["held_out_loss"]
        assert row["learned"] == (loss < settings["unigram_loss"] - MARGIN)
        assert row["diverged"] == (not loss <= math.log(256))
        assert len(row["loss_curve"]) == STEPS // 10
        assert len(row["gradient_norms"]) == row["depth"]
        assert len(row["stream"]) == len(row["stream_after_training"]) == row["depth"] + 1


def test_the_start_does_not_depend_on_the_rate(rows):
    for p in PLACEMENTS:
        for d in DEPTHS:
            for seed in SEEDS:
                starts = [row["gradient_norms"] for row in pick(rows, placement=p, depth=d, seed=seed)]
                assert all(start == pytest.approx(starts[0], rel=1e-4) for start in starts)


def test_what_the_committed_rows_say(rows):
    """The findings that the chapter tells, so that it cannot tell others."""
    for where in ("pre", "sandwich"):
        assert all(row["learned"] for row in pick(rows, placement=where))
    # Without warm-up these post-norm stacks stay at the frequencies of the bytes; with it they learn, all seeds.
    for d, lr in ((6, 1e-2), (12, 1e-3)):
        stuck, warm = (pick(rows, placement="post", depth=d, lr=lr, warmup=w) for w in WARMUPS)
        assert not any(row["learned"] for row in stuck)
        assert all(row["learned"] for row in warm)
    # It stalls; it does not blow up.
    assert not any(row["diverged"] for row in rows)
    # Shallow stacks, or a low rate: post-norm learns without warm-up too.
    for d, lr in ((2, 1e-2), (6, 1e-3), (6, 3e-3)):
        assert all(row["learned"] for row in pick(rows, placement="post", depth=d, lr=lr))
    # The lowest rate trains even twelve blocks, and there 150 steps of warm-up are 150 steps lost.
    cold, warm = (pick(rows, placement="post", depth=12, lr=3e-4, warmup=w) for w in WARMUPS)
    assert all(row["learned"] for row in cold)
    assert all(a["held_out_loss"] < b["held_out_loss"] for a, b in zip(cold, warm, strict=True))
    # At the highest one warm-up does not save twelve blocks within these steps.
    assert not any(row["learned"] for row in pick(rows, placement="post", depth=12, lr=3e-3))


def test_gradients_at_the_start_are_as_xiong_et_al_derive(rows):
    """Near the output a post-norm gradient stays large in deep stacks and a pre-norm one shrinks, as the root of the
    depth at best; towards the input the first fades and the second does not. 24 blocks are made here, not trained.
    """
    train, _ = split_held_out(byte_ids(king_james()))
    first = next(batches(train, 0, batch=placement.BATCH, length=placement.LENGTH))
    shallow, deep = ({p: gradients(make_model(p, d, 0), first) for p in ("pre", "post")} for d in (2, 24))

    def last(measured, where):
        return measured[where]["ffn_gradient_norms"][-1]

    assert last(deep, "post") > last(shallow, "post")
    assert last(deep, "pre") < last(shallow, "pre") / 2
    assert last(deep, "post") > 3 * last(deep, "pre")
    post, pre = (deep[p]["gradient_norms"] for p in ("post", "pre"))
    assert post[0] < post[-1] / 3
    assert pre[0] > pre[-1]
    for row in rows:
        if row["placement"] == "post":
            assert row["stream"][1:] == pytest.approx([1.0] * row["depth"], abs=0.01)
        else:
            assert row["stream"][-1] > row["stream"][0] * 1.2
        if row["depth"] == 12:
            assert (row["first_gradient"] < row["last_gradient"]) == (row["placement"] == "post")


def test_one_point_comes_out_again(rows):
    """The whole of one run. Other CPUs sum in another order; 0.03 nats is ample for two blocks."""
    committed = pick(rows, placement="post", depth=2, lr=3e-3, warmup=150, seed=0)[0]
    again = run("post", 2, 3e-3, 150, 0, ids=byte_ids(king_james()))
    assert again["held_out_loss"] == pytest.approx(committed["held_out_loss"], abs=0.03)
    assert again["gradient_norms"] == pytest.approx(committed["gradient_norms"], rel=1e-3)
    assert again["loss_curve"][:3] == pytest.approx(committed["loss_curve"][:3], abs=0.01)
    assert again["stream_after_training"] == pytest.approx(committed["stream_after_training"], rel=0.05)


@pytest.mark.parametrize("where", PLACEMENTS)
def test_the_gradients_of_the_deepest_stack_come_out_again(rows, where):
    train, _ = split_held_out(byte_ids(king_james()))
    first = next(batches(train, 0, batch=placement.BATCH, length=placement.LENGTH))
    committed = pick(rows, placement=where, depth=DEPTHS[-1], seed=0)[0]
    again = gradients(make_model(where, DEPTHS[-1], 0), first)
    assert again["gradient_norms"] == pytest.approx(committed["gradient_norms"], rel=0.02)
    assert again["ffn_gradient_norms"] == pytest.approx(committed["ffn_gradient_norms"], rel=0.02)


def test_the_script_runs_only_what_is_missing(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "placement.json"
    document = load_results("placement")
    write_json(out, {**document, "rows": rows[1:]})
    calls = []

    def instead(placement, depth, lr, warmup, seed, *, ids):
        calls.append((placement, depth, lr, warmup, seed))
        return {name: rows[0][name] for name in list(rows[0])[5:]}

    monkeypatch.setattr(placement, "run", instead)
    placement.main(out=out)
    assert calls == [("pre", 2, 1e-3, 0, 0)]
    assert json.loads(out.read_text())["rows"] == rows
    assert "post      depth  6, lr 0.001, warmup  0: held-out loss" in capsys.readouterr().out
