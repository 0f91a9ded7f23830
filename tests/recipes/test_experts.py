"""Mixtures of experts against dense networks: what is compared, what is measured, and the committed rows."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from statistics import mean

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_atlas.core.seeds import generator
from llm_atlas.models.ledger import parameters
from llm_atlas.nn.moe import Router, expert_load, recorded_routing
from llm_atlas.recipes import experts as recipe
from llm_atlas.recipes import load_results, write_json
from llm_atlas.recipes.byte_models import held_out_windows, measure, next_byte_loss
from llm_atlas.recipes.experts import (
    BATCH,
    BIAS_RATE,
    CAPACITIES,
    CLASSES,
    LAYERS,
    LEARNING_RATES,
    LENGTH,
    LOSS_FACTOR,
    PARTS,
    RATE,
    SEEDS,
    SETTINGS,
    STARVED,
    STEPS,
    TUNED,
    VARIANTS,
    WIDTH,
    WIDTHS,
    Balanced,
    byte_classes,
    dropped_share,
    equal_quality,
    in_parts,
    joint_counts,
    loss_with_capacity,
    make_config,
    make_model,
    measure_routing,
    mutual_information,
    points,
    routed,
    run,
    split,
    train,
    train_a_little,
)
from llm_atlas.text.corpora import byte_ids, king_james

TEXT = torch.randint(97, 101, (9000,), generator=generator(0))
MIXTURES = [name for name, of in VARIANTS.items() if of.experts is not None]
DENSE = [name for name in VARIANTS if name not in MIXTURES]


@pytest.fixture(scope="module")
def rows():
    return load_results("experts")["rows"]


@pytest.fixture(scope="module")
def windows():
    return held_out_windows(split(byte_ids(king_james()))[2], batch=2 * BATCH, length=LENGTH)


def pick(rows, variant, what, lr=RATE):
    return [row[what] for row in rows if (row["variant"], row["lr"]) == (variant, lr)]


# ------------------------------------------------------------------------------- what is compared


def test_all_mixtures_have_the_active_width_of_the_dense_model_beside_them():
    total = {}
    for name in MIXTURES:
        of = VARIANTS[name].experts
        assert (of.active + of.shared) * of.hidden == WIDTH
        total[name] = (of.experts + of.shared) * of.hidden / WIDTH
        assert of.selection_bias == (VARIANTS[name].balance == "bias")
    eight = {name for name, times in total.items() if times == 8}
    assert eight == {"top 1, none", "top 1, loss", "top 1, bias", "16 experts"}
    assert {times for name, times in total.items() if name not in eight} == {4}
    assert [VARIANTS[name].hidden for name in DENSE] == list(WIDTHS)
    assert WIDTH in WIDTHS


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_flops_are_the_models_own(variant, rows):
    row = next(row for row in rows if row["variant"] == variant)
    model = make_model(variant, 0)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    of = model.config.experts
    asleep = 0 if of is None else LAYERS * (of.experts - of.active) * 3 * model.config.dim * of.hidden
    assert row["active_parameters"] == row["parameters"] - asleep
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.randint(256, (3, LENGTH), generator=generator(1)))
    # The counter does not know the CPU's fused attention: scores and sums of values by hand.
    scores = LAYERS * 2 * 2 * LENGTH * model.config.dim
    assert row["flops"] - scores == counter.get_total_flops() / (3 * LENGTH)


def test_a_router_costs_little_beside_its_experts(rows):
    same = pick(rows, f"dense {WIDTH}", "flops")[0]
    for variant in MIXTURES:
        assert 1 < pick(rows, variant, "flops")[0] / same < 1.03


def test_the_variants_share_their_weights():
    models = {name: dict(make_model(name, 0).named_parameters()) for name in VARIANTS}
    for name, weights in models.items():
        for key, value in weights.items():
            if "feedforward" not in key:
                assert torch.equal(value, models["dense 64"][key]), (name, key)
    for kind in ("top 1", "top 2"):
        none, loss, bias = (models[f"{kind}, {how}"] for how in ("none", "loss", "bias"))
        assert all(torch.equal(none[key], loss[key]) and torch.equal(none[key], bias[key]) for key in none)
        assert (
            set(bias) - set(none) == {f"blocks.{i}.feedforward.sublayer.router.bias" for i in range(LAYERS)}
            or len(set(bias) - set(none)) == LAYERS
        )
    other = dict(make_model("top 2, none", 1).named_parameters())
    assert not torch.equal(other["embed.weight"], models["top 2, none"]["embed.weight"])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_config("dense 65"), "variant 'dense 65' is not one of dense 32; dense 64"),
        (lambda: mutual_information(torch.zeros(2, 3)), "counts are all 0"),
        (lambda: dropped_share(some_routing("top 2, none", 3), 1.0, batch=2), "3 sequences do not divide"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("variant", ["top 2, none", "top 2, loss", "top 2, bias", "fine"])
def test_what_balances_is_in_the_loss_or_in_the_bias_or_nowhere(variant):
    model, how = make_model(variant, 0), Balanced(variant)
    windows = next(recipe.batches(TEXT, 0, batch=BATCH, length=LENGTH))
    value, metrics = how.loss(model, windows)
    plain = measure(model, windows)
    assert float(metrics["bytes"]) == pytest.approx(plain, rel=1e-5)
    loads = [expert_load(routing) for routing in how.routings.values()]
    extra = 0.0
    if VARIANTS[variant].balance == "loss":
        for load, routing in zip(loads, how.routings.values(), strict=True):
            share = load / load.sum()
            extra += LOSS_FACTOR * len(load) * float(share @ routing.scores.detach().mean((0, 1)))
        assert extra > LAYERS * LOSS_FACTOR
    assert value.item() - plain == pytest.approx(extra, abs=1e-5)

    how.after(model)
    assert how.violations == [[pytest.approx(float(load.max() / load.float().mean()) - 1) for load in loads]]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, load in zip(routers, loads, strict=True):
        if VARIANTS[variant].balance == "bias":
            over = load > load.float().mean()
            assert torch.allclose(router.bias[over], torch.tensor(-BIAS_RATE))
            assert torch.allclose(router.bias[load < load.float().mean()], torch.tensor(BIAS_RATE))
        else:
            assert router.bias is None


def test_a_dense_model_is_trained_on_the_next_byte_alone():
    how = Balanced("dense 64")
    model = make_model("dense 64", 0)
    windows = next(recipe.batches(TEXT, 0, batch=BATCH, length=LENGTH))
    value, metrics = how.loss(model, windows)
    how.after(model)
    assert value.item() == metrics["bytes"].item() == next_byte_loss(model, windows)[0].item()
    assert how.violations == []


def test_the_optimizer_is_the_one_that_is_written_down(monkeypatch):
    made = {}

    def spy(model, data, loss, **how):
        made.update(how, group=how["optimizer"].param_groups[0])
        return [{"bytes": 1.0}]

    monkeypatch.setattr(recipe, "fit", spy)
    train("dense 64", 3e-3, 0, ids=TEXT)
    assert (made["clip"], made["steps"], made["group"]["weight_decay"]) == (1.0, STEPS, 0.01)
    assert made["group"]["initial_lr"] == 3e-3
    assert made["group"]["lr"] == pytest.approx(3e-3 / (STEPS // 20))


@pytest.mark.parametrize(
    ("count", "parts", "lengths"), [(40, 20, [2] * 20), (7, 3, [2, 3, 2]), (3, 20, [1, 1, 1]), (0, 20, [])]
)
def test_in_parts(count, parts, lengths):
    values = [float(i) for i in range(count)]
    found = in_parts(values, parts)
    ends = list(itertools.accumulate(lengths))
    assert found == [mean(values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


# -------------------------------------------------------------------------------------- measuring


def some_routing(variant, sequences, seed=0):
    ids = torch.randint(32, 123, (sequences, LENGTH + 1), generator=generator(seed))
    return routed(make_model(variant, seed), ids)[1]


def test_byte_classes():
    text = "Ab, the\nLord é7"
    names = [CLASSES[i] for i in byte_classes(byte_ids(text)).tolist()]
    short = {"vowels": "v", "consonants": "c", "capitals": "C", "white space": "_", "others": "."}
    assert "".join(short[name] for name in names) == "Cc._ccv_Cvcc_..."


@pytest.mark.parametrize("active", [1, 3])
def test_joint_counts_count_every_choice(active):
    kinds = torch.randint(4, (5, 6), generator=generator(1))
    chosen = torch.rand(5, 6, 7, generator=generator(2)).argsort(-1)[..., :active]
    found = joint_counts(kinds, chosen, number=4, experts=7)
    slow = Counter(
        (int(kind), int(expert))
        for kind, several in zip(kinds.flatten(), chosen.flatten(0, 1), strict=True)
        for expert in several
    )
    assert found.tolist() == [[slow[kind, expert] for expert in range(7)] for kind in range(4)]


def test_mutual_information_is_its_definition():
    counts = torch.randint(0, 9, (4, 5), generator=generator(3))
    counts[2], counts[:, 1] = 0, 0
    total = int(counts.sum())
    slow = sum(
        counts[k, e] / total * math.log2(counts[k, e] * total / (counts[k].sum() * counts[:, e].sum()))
        for k in range(4)
        for e in range(5)
        if counts[k, e]
    )
    assert mutual_information(counts) == pytest.approx(float(slow), rel=1e-5)
    assert mutual_information(torch.tensor([[2, 4, 6], [1, 2, 3]])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.eye(8)) == pytest.approx(3)  # the kind decides among 8 experts


@pytest.mark.parametrize("variant", ["top 1, none", "top 2, none"])
@pytest.mark.parametrize("factor", CAPACITIES)
def test_dropped_shares_are_those_of_a_loop(variant, factor):
    routing = some_routing(variant, 6)
    dropped = choices = 0
    for start in range(0, 6, 2):
        tokens = routing.chosen[start : start + 2].flatten(0, 1)
        room = Counter()
        for rank in range(tokens.shape[1]):  # first choices of all tokens, then second ones
            for token in tokens:
                room[int(token[rank])] += 1
                dropped += room[int(token[rank])] > math.ceil(factor * 2 * LENGTH * tokens.shape[1] / 8)
                choices += 1
    assert dropped > 0 or factor == 2
    assert dropped_share(routing, factor, batch=2) == pytest.approx(dropped / choices)


def test_capacity_counts_in_batches_and_turns_away_in_the_model(windows):
    model = make_model("top 2, none", 0).eval()
    whole = measure(model, windows)
    assert loss_with_capacity(model, windows, 8.0) == pytest.approx(whole, rel=1e-5)
    tight = dataclasses.replace(model.config.experts, capacity_factor=0.5)
    limited = recipe.Decoder(dataclasses.replace(model.config, experts=tight)).eval()
    limited.load_state_dict(model.state_dict())
    by_batch = mean(measure(limited, windows[start : start + BATCH]) for start in (0, BATCH))
    assert loss_with_capacity(model, windows, 0.5) == pytest.approx(by_batch, rel=1e-5)
    assert by_batch != pytest.approx(whole, rel=1e-3)
    with recorded_routing(limited) as found, torch.inference_mode():
        limited(windows[:BATCH, :-1])
    first = next(iter(found.values()))
    # No layer before the first one turns anything away: both ways of counting agree there.
    assert float((~first.kept).float().mean()) == pytest.approx(dropped_share(first, 0.5))


def test_rows_of_a_mixture_add_up(windows):
    model, untrained = make_model("top 2, none", 1).eval(), make_model("top 2, none", 0).eval()
    row = measure_routing(model, untrained, windows)
    tokens = windows[:, 1:].numel()
    shares = Counter(byte_classes(windows[:, :-1]).flatten().tolist())
    for layer in range(LAYERS):
        counts = torch.tensor(row["class_counts"][layer])
        assert counts.sum() == 2 * tokens
        assert counts.sum(1).tolist() == [2 * shares[kind] for kind in range(len(CLASSES))]
        assert row["load"][layer] == pytest.approx((counts.sum(0) / (2 * tokens)).tolist())
        assert sum(row["load"][layer]) == pytest.approx(1)
        assert row["max_violation"][layer] == pytest.approx(8 * max(row["load"][layer]) - 1, rel=1e-5)
        assert row["starved"][layer] == sum(share < STARVED / 8 for share in row["load"][layer])
        assert row["class_information"][layer] == mutual_information(counts)
        # A class is decided by its byte.
        assert row["class_information"][layer] <= row["byte_information"][layer]
        dropped = [by_layer[layer] for by_layer in row["dropped"]]
        assert dropped == sorted(dropped, reverse=True)
        # At least what is over the place in all batches together.
        for factor, share in zip(CAPACITIES, dropped, strict=True):
            assert share >= sum(max(0, one - factor / 8) for one in row["load"][layer]) - 1e-3
    before = measure_routing(untrained, untrained, windows)
    for what in ("class", "next", "byte"):
        assert row[f"{what}_information_untrained"] == before[f"{what}_information"]
        assert row[f"{what}_information"] != before[f"{what}_information"]


def test_the_byte_that_comes_is_not_the_byte_that_is_read(windows):
    """With the text shifted by one the two informations change places; the routing stays as it was."""
    found = routed(make_model("top 2, none", 0), windows)
    _, information = recipe._information(found, windows)
    shifted = torch.cat([windows[:, 1:], windows[:, :1]], 1)
    assert recipe._information(found, shifted)[1]["class_information"] == information["next_information"]


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("variant", ["dense 64", "top 2, bias"])
def test_a_run_is_recorded_and_repeats_itself(variant, monkeypatch):
    monkeypatch.setattr(recipe, "WINDOWS", 2 * BATCH)
    first = run(variant, RATE, 0, steps=6, ids=TEXT)
    assert first == run(variant, RATE, 0, steps=6, ids=TEXT)
    assert first["held_out_loss"] != run(variant, RATE, 1, steps=6, ids=TEXT)["held_out_loss"]
    assert first["loss_curve"][-1] < first["loss_curve"][0]
    assert first["bits_per_byte"] == pytest.approx(first["held_out_loss"] / math.log(2))
    json.dumps(first)
    if variant == "top 2, bias":
        assert [len(layer) for layer in first["violation_curve"]] == [6] * LAYERS
    else:
        assert "load" not in first


def test_three_texts_that_do_not_overlap():
    train_text, validation, held_out = split(torch.arange(1000))
    assert [len(part) for part in (train_text, validation, held_out)] == [810, 90, 100]
    assert torch.equal(torch.cat([train_text, validation, held_out]), torch.arange(1000))


def test_what_is_measured_is_other_text_than_what_is_read(monkeypatch):
    monkeypatch.setattr(recipe, "WINDOWS", 64)
    row = run("dense 32", RATE, 0, steps=5, ids=TEXT)
    seen, validation, held_out = split(TEXT)
    model, losses, _ = train("dense 32", RATE, 0, steps=5, ids=seen)
    at = [
        measure(model, held_out_windows(part, batch=recipe.WINDOWS, length=LENGTH))
        for part in (held_out, validation)
    ]
    assert [row["held_out_loss"], row["validation_loss"]] == pytest.approx(at, rel=1e-4)
    assert at[0] != pytest.approx(at[1], rel=1e-5)
    assert row["loss_curve"] == pytest.approx(losses, rel=1e-4)


def test_routing_is_that_of_the_held_out_text_and_beside_it_that_of_the_same_seed_untrained(monkeypatch):
    monkeypatch.setattr(recipe, "WINDOWS", 2 * BATCH)
    row = run("top 2, loss", RATE, 1, steps=3, ids=TEXT)
    seen, _, held_out = split(TEXT)
    model, _, _ = train("top 2, loss", RATE, 1, steps=3, ids=seen)
    windows = held_out_windows(held_out, batch=recipe.WINDOWS, length=LENGTH)
    alike = recipe.measure_routing(model, make_model("top 2, loss", 1).eval(), windows)
    assert {name: row[name] for name in alike} == alike
    for other, text in ((0, windows), (1, held_out_windows(seen, batch=recipe.WINDOWS, length=LENGTH))):
        found = recipe.measure_routing(model, make_model("top 2, loss", other).eval(), text)
        assert found["byte_information_untrained"] != row["byte_information_untrained"]


def test_a_slice_for_a_page():
    found = train_a_little(steps=4, ids=TEXT)
    assert list(found) == ["top 1, none", "top 1, loss"]
    for row in found.values():
        assert [len(layer) for layer in row["violations"]] == [4] * LAYERS
        assert [sum(layer) for layer in row["load"]] == pytest.approx([1] * LAYERS)
    first, second = (row["violations"] for row in found.values())
    assert [layer[0] for layer in first] == [layer[0] for layer in second]  # the same weights and windows
    assert [layer[-1] for layer in first] != [layer[-1] for layer in second]


# ---------------------------------------------------------------------------------- equal quality


def made_up(mixture=None, lr=RATE):
    """Dense losses 2.0, 1.9, 1.7, 1.5 at the four widths, those of the second seed 0.1 higher."""
    rows = [
        {"variant": f"dense {width}", "lr": lr, "seed": seed, "parameters": 1000 + 30 * width,
         "flops": 500 + 60 * width, "held_out_loss": loss + 0.1 * seed}
        for seed in (0, 1)
        for width, loss in zip(WIDTHS, (2.0, 1.9, 1.7, 1.5), strict=True)
    ]  # fmt: skip
    for seed, loss in enumerate(mixture or ()):
        mine = {"parameters": 9000, "flops": 4400, "held_out_loss": loss}
        rows.append({"variant": "top 2, none", "lr": lr, "seed": seed, **mine})
    return rows


def test_equal_quality_of_made_up_rows():
    # Seed 0: half-way from 64 to 128 units; seed 1: a quarter of the way from 128 to 256.
    (found,) = equal_quality(made_up((1.8, 1.75)))
    assert found.widths == pytest.approx((2**6.5, 2**7.25))
    assert found.width == pytest.approx(2**6.875)
    assert found.loss == pytest.approx(1.775)
    assert found.dense_parameters == pytest.approx(1000 + 30 * 2**6.875)
    assert found.dense_flops == pytest.approx(500 + 60 * 2**6.875)
    assert found.parameter_ratio == pytest.approx(9000 / found.dense_parameters)
    assert found.flops_ratio == pytest.approx(4400 / found.dense_flops)


def test_a_dense_model_is_as_good_as_itself_and_other_rates_do_not_count():
    worse = [{**row, "held_out_loss": 9.0} for row in made_up((1.0, 1.0), lr=2 * RATE)]
    found = equal_quality(worse + made_up(), variants=["dense 64", "dense 256"])
    assert [one.width for one in found] == pytest.approx([64, 256])
    assert [(one.flops_ratio, one.parameter_ratio) for one in found] == [(pytest.approx(1),) * 2] * 2


@pytest.mark.parametrize("loss", [1.49, 2.01])
def test_nothing_is_extrapolated(loss):
    with pytest.raises(ValueError, match="'top 2, none', seed 0, is outside the dense ones"):
        equal_quality(made_up((loss, 1.7)))


def test_dense_losses_must_fall():
    rows = made_up((1.8, 1.7))
    rows[3]["held_out_loss"] = 1.7
    with pytest.raises(ValueError, match="dense losses of seed 0 do not fall"):
        equal_quality(rows)


# ------------------------------------------------------------------------------ what was committed


def test_every_point_is_there(rows):
    assert [{name: row[name] for name in ("variant", "lr", "seed")} for row in rows] == points()
    assert {(row["variant"], row["seed"]) for row in rows if row["lr"] == RATE} == {
        (variant, seed) for variant in VARIANTS for seed in SEEDS
    }
    settings = load_results("experts")["settings"]
    assert {name: settings[name] for name in SETTINGS} == json.loads(json.dumps(SETTINGS))


def test_the_rate_is_the_best_of_three_on_the_validation_text(rows):
    losses = {
        lr: mean(pick(rows, variant, "validation_loss", lr)[0] for variant in TUNED) for lr in LEARNING_RATES
    }
    assert min(losses, key=losses.get) == RATE == LEARNING_RATES[1]  # and not at an end of what was tried


def test_committed_rows_add_up(rows):
    for row in rows:
        assert len(row["loss_curve"]) == PARTS
        assert row["parameters"] == parameters(make_config(row["variant"])).total
        if row["variant"] in DENSE:
            continue
        assert [len(layer) for layer in row["violation_curve"]] == [PARTS] * LAYERS
        for layer in range(LAYERS):
            counts, load = torch.tensor(row["class_counts"][layer]), row["load"][layer]
            assert load == pytest.approx((counts.sum(0) / counts.sum()).tolist(), abs=1e-5)
            assert row["class_information"][layer] == pytest.approx(mutual_information(counts), rel=1e-4)


def test_what_the_rows_show(rows):
    """With every seed: left alone a router starves experts, balanced it does not; 16 experts are worth more than 8."""
    for kind in ("top 1", "top 2"):
        for alone, *others in zip(
            *(_by_seed(rows, f"{kind}, {how}") for how in recipe.BALANCES), strict=True
        ):
            assert max(alone["max_violation"]) > 1.5
            assert sum(alone["starved"]) >= 2
            assert alone["loss_with_capacity"][0] > alone["held_out_loss"] + 0.2
            for balanced in others:
                assert max(balanced["max_violation"]) < 0.6
                assert sum(balanced["starved"]) == 0
                assert balanced["loss_with_capacity"][1] < balanced["held_out_loss"] + 0.01
            information = zip(
                others[0]["class_information"], others[0]["class_information_untrained"], strict=True
            )
            assert all(after > 1.4 * before for after, before in information)
    found = {one.variant: one for one in equal_quality(rows)}
    assert all(one.flops_ratio < 1 < one.parameter_ratio for one in found.values())
    assert found["16 experts"].widths[0] > found["top 2, loss"].widths[1] > WIDTH


def _by_seed(rows, variant):
    return [row for row in rows if (row["variant"], row["lr"]) == (variant, RATE)]


@pytest.mark.parametrize("variant", ["dense 64", "top 2, bias"])
def test_one_run_begins_as_it_did(rows, variant):
    """The first twentieth of one run, with the rates of the whole. Other CPUs sum in another order."""
    steps = STEPS // PARTS
    ids = split(byte_ids(king_james()))[0]
    _, losses, violations = train(variant, RATE, 0, stop=steps, ids=ids)
    assert mean(losses) == pytest.approx(pick(rows, variant, "loss_curve")[0][0], abs=0.02)
    committed = pick(rows, variant, "violation_curve")[0] if violations else []
    found = [mean(layer) for layer in zip(*violations, strict=True)]
    assert found == pytest.approx([layer[0] for layer in committed], abs=0.2)


def test_the_script_runs_only_what_is_missing(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "experts.json"
    write_json(out, {**load_results("experts"), "rows": rows[1:]})
    calls = []

    def instead(variant, lr, seed, *, ids):
        calls.append((variant, lr, seed))
        return {name: rows[0][name] for name in list(rows[0])[3:]}

    monkeypatch.setattr(recipe, "run", instead)
    recipe.main(out=out)
    assert calls == [("dense 64", LEARNING_RATES[0], 0)]
    assert json.loads(out.read_text())["rows"] == rows
    assert f"held-out loss {rows[0]['held_out_loss']:.4f}" in capsys.readouterr().out
