"""Looking inside changes nothing, and what is seen is what the model computes with."""

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.inspect import (
    ablate,
    ablate_heads,
    attention_maps,
    feed_forward,
    first_token_score,
    hooked,
    logit_lens,
    mixer,
    parameter_ledger,
    position_probe,
    pre_activations,
    previous_token_score,
    residual_stream,
    self_score,
    unit_statistics,
)
from llm_atlas.nn.attention import merge_heads, split_heads
from llm_atlas.nn.feedforward import FeedForward, GatedFeedForward

IDS = torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Decoder:
    config = DecoderConfig(
        vocab=13, dim=16, layers=3, heads=4, kv_heads=2, hidden=24, context=32, qk_norm=True, tied=False
    )
    made, generator = Decoder(config), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return made.eval().requires_grad_(False)


def hooks(model: Decoder) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_map_rows_add_up_to_one_and_see_no_future(model):
    maps = attention_maps(model, IDS)
    assert maps.shape == (3, 2, 4, 7, 7)
    assert_close(maps.sum(-1), torch.ones(3, 2, 4, 7))
    assert (maps.triu(1) == 0).all()
    assert hooks(model) == 0


def test_maps_times_values_are_the_output_of_every_layer(model):
    maps = attention_maps(model, IDS)
    for layer in range(3):
        attention, seen = mixer(model, layer), {}
        with hooked(
            [(attention, lambda module, args, kwargs, out, seen=seen: seen.update(x=args[0], out=out))]
        ):
            model(IDS)
        v = split_heads(attention.v(seen["x"]), 2).repeat_interleave(2, dim=1)
        assert_close(attention.out(merge_heads(maps[layer] @ v)), seen["out"], atol=1e-5, rtol=1e-5)


def test_the_last_point_of_the_lens_is_the_logits(model):
    stream = residual_stream(model, IDS)
    assert stream.shape == (4, 2, 7, 16)
    assert torch.equal(stream[0], model.embed(IDS))
    lens = logit_lens(model, stream)
    assert_close(lens[-1], model(IDS))
    assert (lens[0] - lens[-1]).abs().max() > 0.1
    assert hooks(model) == 0


def test_every_point_is_the_one_before_and_what_the_block_adds(model):
    stream = residual_stream(model, IDS)
    for before, after, block in zip(stream, stream[1:], model.blocks, strict=False):
        assert_close(block(before), after)


def test_an_ablated_head_is_a_head_whose_part_of_the_output_matrix_is_zero(model):
    with ablate_heads(model, [(1, 2), (1, 0)]):
        ablated = model(IDS)
    whole = model(IDS)
    weight = mixer(model, 1).out.weight
    for head in (0, 2):
        weight.data[:, 4 * head : 4 * head + 4] = 0
    assert_close(ablated, model(IDS))
    assert (ablated - whole).abs().max() > 1e-2


def test_ablated_sublayers_leave_the_stream_as_it_was(model):
    sublayers = [part.sublayer for block in model.blocks for part in (block.mixer, block.feedforward)]
    with ablate(*sublayers):
        stream = residual_stream(model, IDS)
    assert all(torch.equal(point, stream[0]) for point in stream)
    assert not torch.equal(residual_stream(model, IDS)[1], stream[0])


def test_nothing_stays_behind_even_after_an_error(model):
    before = model(IDS)

    def fail():
        with ablate_heads(model, [(0, 0)]), ablate(model.blocks[1].mixer.sublayer):
            assert hooks(model) == 2
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    with pytest.raises(ValueError, match="context"):
        attention_maps(model, IDS.repeat(1, 6))
    with pytest.raises(ValueError, match="context"):
        residual_stream(model, IDS.repeat(1, 6))
    assert hooks(model) == 0
    assert torch.equal(model(IDS), before)


def test_a_hook_that_cannot_be_set_takes_the_others_off(model):
    with pytest.raises(AttributeError), hooked([(model.blocks[0], print), (None, print)]):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(3, 0)], "layer 3 is not one of the model's 3"),
        ([(0, 4)], "layer 0 has 4 heads, there is no head 4"),
    ],
)
def test_heads_that_do_not_exist(model, heads, message):
    with pytest.raises(ValueError, match=message), ablate_heads(model, heads):
        pass
    assert hooks(model) == 0


def test_scores_of_patterns_written_by_hand():
    first, previous, own = torch.zeros(3, 5, 5).unbind(0)
    first[:, 0] = 1
    own.fill_diagonal_(1)
    previous[range(1, 5), range(4)] = 1
    previous[0, 0] = 1
    maps = torch.stack([first, previous, own])
    assert first_token_score(maps).tolist() == [
        1,
        0.25,
        0,
    ]  # the query at 1: its previous token is the first one
    assert previous_token_score(maps).tolist() == [0, 1, 0]
    assert self_score(maps).tolist() == [0, 0, 1]


def test_scores_want_three_tokens():
    for score in (first_token_score, previous_token_score, self_score):
        with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
            score(torch.ones(2, 2))


def test_the_stream_under_another_mask_is_the_one_the_model_computes(model):
    everything = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    points = residual_stream(model, IDS, mask=everything)
    assert_close(model.norm(points[-1]), model.hidden(IDS, mask=everything))
    assert torch.equal(points[0], residual_stream(model, IDS)[0])
    assert (points - residual_stream(model, IDS))[1:].abs().amax((1, 2, 3)).min() > 1e-2


# --------------------------------------------------------------------------------- position probe


def states(rows: int = 40, seq: int = 9, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, seq, dim, generator=torch.Generator().manual_seed(seed))


def test_a_position_that_stands_in_the_states_is_read():
    x, at = states(), torch.arange(9)
    x[..., 2] += 100 - 30 * at  # one feature holds it, with a scale and an offset of its own
    probe = position_probe(x, at)
    assert probe.predicted.shape == (10, 9)
    assert probe.r2 > 0.99
    assert probe.error < 0.2
    # A turn of the features changes nothing that a linear probe could see.
    turn = torch.linalg.qr(states(1, 6)[0])[0]
    assert position_probe(x @ turn, at).r2 == pytest.approx(probe.r2, abs=0.01)
    assert position_probe(x, at + 7).predicted == pytest.approx(probe.predicted + 7, abs=1e-3)


def test_states_that_know_nothing_give_the_mean():
    probe = position_probe(states(400), torch.arange(9))
    assert -0.05 < probe.r2 < 0.05
    assert probe.error == pytest.approx(20 / 9, abs=0.1)  # the mean distance of 0..8 from 4
    constant = position_probe(torch.ones(8, 9, 3), torch.arange(9))
    assert constant.r2 == pytest.approx(0, abs=1e-9)


def test_the_probe_is_measured_on_rows_it_was_not_fitted_to():
    # As many features as vectors: what is fitted is fitted exactly, and says nothing of other rows.
    probe = position_probe(states(4, 9, 60), torch.arange(9), ridge=1e-9)
    assert probe.r2 < 0
    x, at = states(8), torch.arange(9)
    held_out = position_probe(x, at, held_out=0.5)
    changed = x.clone()
    changed[4:] = 0
    assert position_probe(changed, at, held_out=0.5).predicted[0, 0] != held_out.predicted[0, 0]
    mean, spread = x[:4].flatten(0, 1).mean(0), x[:4].flatten(0, 1).std(0, correction=0)
    a = ((x - mean) / spread).double()
    ridge = 36 * 1e-3 * torch.eye(6, dtype=torch.float64)
    fitted = a[:4].flatten(0, 1)
    weights = torch.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ (at.repeat(4) - 4.0).double())
    assert_close(held_out.predicted, (a[4:] @ weights + 4).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0.25), (3, 0.1), (4, 1.0)])
def test_a_probe_needs_rows_on_both_sides(rows, held_out):
    with pytest.raises(ValueError, match=f"^{rows} rows cannot be split with {held_out} of them held out"):
        position_probe(states(rows), torch.arange(9), held_out=held_out)


@pytest.mark.parametrize("positions", ["t5", "shaw"])
def test_tables_of_attention_are_in_its_part_of_the_ledger(positions):
    sizes = {"vocab": 13, "dim": 16, "layers": 3, "heads": 4, "hidden": 24, "context": 32}
    ledger = parameter_ledger(Decoder(DecoderConfig(**sizes, positions=positions)))
    plain = parameter_ledger(Decoder(DecoderConfig(**sizes, positions="none")))
    table = 32 * 4 if positions == "t5" else 33 * 4
    assert ledger == plain | {"attention": plain["attention"] + table}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_the_ledger_adds_up_to_the_whole(positions, tied, placement):
    config = DecoderConfig(
        vocab=13, dim=16, layers=3, heads=4, hidden=24, context=32, qk_norm=True,
        positions=positions, tied=tied, placement=placement,
    )  # fmt: skip
    model = Decoder(config)
    ledger = parameter_ledger(model)
    assert sum(ledger.values()) == sum(p.numel() for p in model.parameters())
    norms = 2 * (2 if placement == "sandwich" else 1)
    assert ledger == {
        "embedding": 13 * 16 + (32 * 16 if positions == "learned" else 0),
        "attention": 3 * 4 * 16 * 16,
        "feed-forward": 3 * 3 * 16 * 24,
        "norms": 3 * (norms * 16 + 2 * 4) + 16,
        "head": 0 if tied else 13 * 16,
    }


# ------------------------------------------------------------------------------ feed-forward units


def made(gated, activation):
    config = DecoderConfig(
        vocab=13, dim=16, layers=3, heads=4, hidden=24, context=32, gated=gated, activation=activation
    )
    model, rng = Decoder(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn(parameter.shape, generator=rng) * parameter.shape[1] ** -0.5
    return model.eval().requires_grad_(False)


KINDS = [(False, "relu"), (True, "relu"), (False, "gelu"), (True, "silu")]


@pytest.mark.parametrize(("gated", "activation"), KINDS)
@pytest.mark.parametrize("rows", [None, 1, 2, 5])
def test_pre_activations_are_what_the_layers_compute_with(gated, activation, rows):
    model = made(gated, activation)
    ids = torch.cat([IDS, IDS.flip(1), IDS[:1]])
    pre = pre_activations(model, ids, rows=rows)
    assert pre.shape == (3, 5, 7, 24)
    stream = residual_stream(model, ids)
    for layer, z in enumerate(pre):
        block, module = model.blocks[layer], feed_forward(model, layer)
        assert isinstance(module, GatedFeedForward if gated else FeedForward)
        mixed = block.mixer(stream[layer], positions=torch.arange(7)[None])
        x = block.feedforward.norm(mixed)
        assert_close(z, (module.gate if gated else module.up)(x))
        hidden = module.activation(z) * (module.up(x) if gated else 1)
        assert_close(mixed + module.down(hidden), stream[layer + 1])
    assert hooks(model) == 0


@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_unit_statistics_are_what_loops_by_hand_count(gated, activation):
    model = made(gated, activation)
    threshold = 0.0 if activation == "relu" else 0.05
    found = unit_statistics(model, IDS, threshold=threshold, levels=(0.0, 0.5, 1.0), rows=1)
    pre = pre_activations(model, IDS)
    assert found.tokens == 14
    for layer in range(3):
        z = pre[layer].flatten(0, 1)
        out = feed_forward(model, layer).activation(z)
        active = [sum(abs(float(v)) > threshold for v in out[:, unit]) / 14 for unit in range(24)]
        assert found.active[layer].tolist() == pytest.approx(active)
        assert float(found.dead[layer]) == pytest.approx(sum(a == 0 for a in active) / 24)
        assert float(found.active_share[layer]) == pytest.approx(sum(active) / 24)
        assert float(found.mean[layer]) == pytest.approx(float(z.mean()), abs=1e-6)
        assert float(found.negative[layer]) == pytest.approx(
            sum(float(v) < 0 for v in z.flatten()) / (14 * 24)
        )
        ordered = sorted(out.flatten().tolist())
        expected = [ordered[0], ordered[round(0.5 * (14 * 24 - 1))], ordered[-1]]
        assert found.quantiles[layer].tolist() == pytest.approx(expected, abs=1e-6)
    if activation == "relu":
        assert 0.2 < float(found.active_share.mean()) < 0.8
        assert_close(found.active_share, 1 - found.negative)
    assert hooks(model) == 0


@pytest.mark.parametrize("gated", [False, True])
def test_a_unit_that_is_switched_off_is_found_dead(gated):
    model = made(gated, "relu")
    before = unit_statistics(model, IDS)
    module = feed_forward(model, 1)
    matrix = module.gate if gated else module.up
    alive = int(before.active[1].argmax())
    matrix.weight.data[alive] = 0
    after = unit_statistics(model, IDS)
    assert before.active[1, alive] > 0
    assert after.active[1, alive] == 0
    assert float(after.dead[1] - before.dead[1]) == pytest.approx(1 / 24)
    assert_close(after.dead[0], before.dead[0])
    # and it is what the gradient says: a dead unit's weights get none
    model.requires_grad_(True)
    model(IDS).logsumexp(-1).sum().backward()
    silent = after.active[1] == 0
    assert (matrix.weight.grad[silent] == 0).all()
    assert (matrix.weight.grad[~silent] != 0).any(-1).all()


def test_gates_that_are_hardly_ever_zero_need_a_threshold():
    model = made(True, "silu")
    assert unit_statistics(model, IDS).active_share.tolist() == [1, 1, 1]
    small = unit_statistics(model, IDS, threshold=0.1).active_share
    assert (small < unit_statistics(model, IDS, threshold=0.01).active_share).all()
    assert (unit_statistics(model, IDS).quantiles[:, 0] >= -0.2785).all()


def with_pre_activations(values, dtype=torch.float32):
    """A model of one layer and two units, whose pre-activations are these two on every token."""
    config = DecoderConfig(
        vocab=13, dim=4, layers=1, heads=1, hidden=2, context=32, gated=False, activation="relu"
    )
    model = Decoder(config).to(dtype).eval().requires_grad_(False)
    up = feed_forward(model, 0).up
    hook = up.register_forward_hook(lambda module, args, out: torch.zeros_like(out) + out.new_tensor(values))
    return model, hook


def test_exactly_zero_is_not_negative_and_the_threshold_itself_is_not_active():
    model, hook = with_pre_activations([0.0, 0.25])
    found = unit_statistics(model, IDS, threshold=0.25)
    assert found.negative.tolist() == [0]
    assert found.active.tolist() == [[0, 0]]
    assert unit_statistics(model, IDS).active.tolist() == [[0, 1]]
    hook.remove()
    model, hook = with_pre_activations([-0.0, 1e-6])
    assert unit_statistics(model, IDS).active.tolist() == [[0, 1]]  # little is not dead
    assert unit_statistics(model, IDS).negative.tolist() == [0]


def test_a_unit_that_is_hardly_ever_active_is_not_dead():
    model, ids = made(False, "relu"), torch.zeros(13, 32, dtype=torch.long)
    ids[-1, -1] = 1  # 1 of 416 tokens: fewer than one in a hundred
    up = feed_forward(model, 0).up
    rare = torch.full((13, 32), -1.0)
    rare[-1, -1] = 1.0
    with hooked([(up, lambda module, args, kwargs, out: rare[..., None].expand_as(out))]):
        found = unit_statistics(model, ids)
    assert found.active[0].tolist() == pytest.approx([1 / 416] * 24)
    assert float(found.dead[0]) == 0


def test_statistics_of_16_bits_are_taken_in_float32():
    model = made(False, "gelu").bfloat16()
    found, pre = unit_statistics(model, IDS), pre_activations(model, IDS).flatten(1, 2)
    assert pre.dtype == torch.bfloat16
    for field in (found.active, found.mean, found.negative, found.quantiles, found.dead):
        assert field.dtype == torch.float32
    for layer, z in enumerate(pre):
        exact = sum(z.flatten().tolist()) / z.numel()
        assert float(found.mean[layer]) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(("rows", "calls"), [(None, 1), (1, 5), (2, 3), (5, 1)])
def test_so_many_texts_at_a_time_go_through_the_model(rows, calls):
    model, seen = made(False, "relu"), []
    ids = torch.cat([IDS, IDS.flip(1), IDS[:1]])
    with hooked([(model.blocks[0], lambda module, args, kwargs, out: seen.append(len(out)))]):
        pre_activations(model, ids, rows=rows)
    assert len(seen) == calls
    assert max(seen) == (5 if rows is None else rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_counted_as_dead(value):
    model, _ = with_pre_activations([1.0, value])
    with pytest.raises(ValueError, match="activations of layer 0 must be finite, some are NaN or infinite"):
        unit_statistics(model, IDS)


def test_mistakes_about_units():
    model = made(True, "silu")
    with pytest.raises(ValueError, match="layer 3 is not one of the model's 3"):
        feed_forward(model, 3)
    with pytest.raises(ValueError, match="rows 0 must be at least 1"):
        unit_statistics(model, IDS, rows=0)
    with pytest.raises(ValueError, match="threshold -1 must be at least 0"):
        unit_statistics(model, IDS, threshold=-1)
    with pytest.raises(ValueError, match=r"levels \(2.0,\) must be numbers between 0 and 1, at least one"):
        unit_statistics(model, IDS, levels=(2.0,))
    with pytest.raises(ValueError, match=r"levels \(\) must be"):
        unit_statistics(model, IDS, levels=())
    with pytest.raises(ValueError, match="context"):
        unit_statistics(model, IDS.repeat(1, 6))
    assert hooks(model) == 0
