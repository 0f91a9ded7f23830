"""The Decoder: causality, positions, caches, padding, masks."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.feedforward import GatedFeedForward
from llm_atlas.nn.masks import causal_mask, left_pad
from llm_atlas.nn.moe import ExpertsConfig, MixtureOfExperts

CONFIG = DecoderConfig(vocab=13, dim=16, layers=2, heads=4, kv_heads=2, hidden=24, context=32)
GPT = dataclasses.replace(
    CONFIG, kv_heads=None, norm="layer", gated=False, activation="gelu_tanh", positions="learned",
    attention_bias=True, out_bias=True, feedforward_bias=True,
)  # fmt: skip
CONFIGS = {
    "llama": CONFIG,
    "gpt": GPT,
    "post-norm, sinusoidal": dataclasses.replace(GPT, positions="sinusoidal", placement="post"),
    "sandwich, no positions, qk-norm": dataclasses.replace(
        CONFIG, placement="sandwich", positions="none", qk_norm=True, tied=False, head_dim=6
    ),
    "interleaved, partial": dataclasses.replace(
        CONFIG, rotary_layout="interleaved", rotary_dim=4, head_dim=6
    ),
    "rotary, one layer without": dataclasses.replace(CONFIG, nope_layers=(0,)),
    "alibi": dataclasses.replace(CONFIG, positions="alibi"),
    "t5": dataclasses.replace(CONFIG, positions="t5", layers=3, nope_layers=(1,)),
    "shaw": dataclasses.replace(CONFIG, positions="shaw"),
    "experts": dataclasses.replace(
        CONFIG,
        layers=3,
        experts=ExpertsConfig(experts=4, active=2, hidden=10, shared=1),
        dense_layers=(0,),
    ),
    "parallel, one norm, a bias on the head": dataclasses.replace(
        GPT, parallel="one norm", tied=False, head_bias=True
    ),
    "parallel, two norms, a norm on the embeddings": dataclasses.replace(
        CONFIG, parallel="two norms", embed_norm=True
    ),
    "scaled": dataclasses.replace(CONFIG, embed_scale=4.0, attention_scale=0.3),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def randomised(config: DecoderConfig) -> Decoder:
    model, generator = Decoder(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)


MODELS = {name: randomised(config) for name, config in CONFIGS.items()}
IDS = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(1))


@settings(max_examples=25)
@given(st.data(), st.sampled_from(list(CONFIGS)))
def test_changed_future_tokens_leave_past_logits_to_the_last_bit(data, name):
    length = data.draw(st.integers(2, 20))
    ids = torch.tensor([data.draw(st.lists(st.integers(0, 12), min_size=length, max_size=length))])
    first = data.draw(st.integers(1, length - 1))
    changed = ids.clone()
    changed[0, first:] = (changed[0, first:] + torch.randint(1, 13, (length - first,))) % 13
    before, after = MODELS[name](ids), MODELS[name](changed)
    if (
        name == "experts"
    ):  # how many tokens share a product with one, and so its last bit, depends on all the others
        assert_close(after[:, :first], before[:, :first], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(after[:, :first], before[:, :first])
    assert not torch.equal(after[:, first:], before[:, first:])


@EACH
def test_with_another_mask_the_future_is_seen(name):
    everything = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 13
    model = MODELS[name]
    assert (model(IDS, mask=everything) - model(changed, mask=everything))[:, 0].abs().max() > 1e-4
    assert_close(model(IDS, mask=causal_mask(9)[None, None]), model(IDS), atol=1e-5, rtol=1e-5)


@EACH
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [3, 1, 1, 4]], ids=str)
def test_cached_is_uncached(name, chunks):
    model = MODELS[name]
    cache = model.make_cache(capacity=5)
    parts = [model(part, cache=cache) for part in IDS.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), model(IDS), atol=1e-5, rtol=1e-5)


@EACH
def test_a_cache_cut_back_and_forked_continues_as_if_nothing_had_been(name):
    model = MODELS[name]
    cache = model.make_cache()
    model(IDS, cache=cache)
    cache.truncate(4)
    twin = cache.fork()
    model(IDS[:, :3], cache=twin)  # a branch that must not be seen
    assert_close(model(IDS[:, 4:], cache=cache), model(IDS)[:, 4:], atol=1e-5, rtol=1e-5)
    cache.select([1, 0, 1])
    again = model(IDS[[1, 0, 1], :2], cache=cache)
    whole = model(torch.cat([IDS, IDS[:, :2]], dim=1))[[1, 0, 1], 9:]
    assert_close(again, whole, atol=1e-5, rtol=1e-5)


@EACH
def test_rows_behind_padding_are_the_rows_alone(name):
    model = MODELS[name]
    rows = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    ids, positions = left_pad(rows, pad_id=12)
    cache = model.make_cache()
    logits = model(ids, positions=positions, cache=cache)
    more = torch.tensor([[3, 4], [5, 6], [7, 8]])
    steps = torch.cat([model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)], dim=1)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row + more[i].tolist()]))[0]
        assert_close(logits[i, -len(row) :], alone[: len(row)], atol=1e-5, rtol=1e-5)
        assert_close(steps[i], alone[len(row) :], atol=1e-5, rtol=1e-5)
        assert torch.isfinite(logits[i]).all()


def test_positions_that_start_elsewhere_shift_learned_ones_and_leave_rotary_scores():
    at = torch.arange(9)[None].expand(2, -1) + 5
    assert_close(MODELS["llama"](IDS, positions=at), MODELS["llama"](IDS), atol=1e-5, rtol=1e-5)
    assert (MODELS["gpt"](IDS, positions=at) - MODELS["gpt"](IDS)).abs().max() > 1e-2


def test_the_options_of_a_scheme_reach_it():
    def scheme(**change):
        return Decoder(dataclasses.replace(CONFIG, **change)).attention_positions

    rotary = scheme(rope_base=77.0, rotary_layout="interleaved", rotary_dim=2)
    found = (rotary.dim, rotary.base, rotary.length, rotary.layout, rotary.rotary_dim)
    assert found == (4, 77.0, 32, "interleaved", 2)
    assert scheme(head_dim=6).dim == 6
    assert scheme(positions="alibi").heads == 4
    t5 = scheme(positions="t5", relative_buckets=8, relative_distance=20)
    assert (t5.table.weight.shape, t5.max_distance, t5.bidirectional) == ((8, 4), 20, False)
    assert scheme(positions="t5").max_distance == 128
    assert scheme(positions="shaw", head_dim=6, relative_distance=5).table.weight.shape == (11, 6)
    assert scheme(positions="shaw").max_distance == 16


def test_tied_embeddings_are_one_tensor():
    model = MODELS["llama"]
    assert model.head is None
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert_close(model.unembed(x), x @ model.embed.weight.T)


def test_forward_is_hidden_then_unembed_and_trains():
    model = Decoder(CONFIG)
    loss = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@EACH
def test_bfloat16_follows_float32(name):
    narrow = randomised(CONFIGS[name]).bfloat16()
    logits = narrow(IDS)
    assert logits.dtype == torch.bfloat16
    assert (logits - MODELS[name](IDS)).abs().max() < 0.06 * MODELS[name](IDS).abs().max()


def test_experts_stand_where_no_layer_is_dense():
    parts = [block.feedforward.sublayer for block in MODELS["experts"].blocks]
    assert [type(part) for part in parts] == [GatedFeedForward, MixtureOfExperts, MixtureOfExperts]
    assert (parts[0].up.out_features, parts[1].experts.up.shape) == (24, (4, 10, 16))


def test_scales_are_their_equations():
    scaled, plain = MODELS["scaled"], randomised(dataclasses.replace(CONFIG, attention_scale=0.3))
    plain.embed.weight.data *= 4  # the head reads the same table, so hidden vectors are compared
    assert_close(scaled.hidden(IDS), plain.hidden(IDS), atol=1e-5, rtol=1e-5)
    assert_close(scaled.unembed(scaled.hidden(IDS)), plain(IDS) / 4, atol=1e-5, rtol=1e-5)
    standard = randomised(dataclasses.replace(CONFIG, attention_scale=16**-0.5 * 2))
    assert_close(standard(IDS), MODELS["llama"](IDS), atol=1e-5, rtol=1e-5)


def test_the_bias_of_the_head_is_added_to_the_logits():
    model = MODELS["parallel, one norm, a bias on the head"]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert_close(model.unembed(x), x @ model.head.weight.T + model.head.bias)


def test_the_norm_of_the_embeddings_comes_first():
    model = MODELS["parallel, two norms, a norm on the embeddings"]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert_close(model.mix(x), model.mix(3 * x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(MODELS["llama"].mix(x), MODELS["llama"].mix(3 * x), atol=1e-2)


def test_layers_with_a_window_have_their_own_rotary_base():
    config = dataclasses.replace(CONFIG, layers=3, window=4, full_layers=(1,), window_rope_base=50.0)
    bases = [block.mixer.sublayer.positions.base for block in Decoder(config).blocks]
    assert bases == [50.0, 10000.0, 50.0]
    one = [block.mixer.sublayer.positions for block in Decoder(config).blocks]
    assert one[0] is one[2]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_layers": (0,)}, r"dense_layers \(0,\) need experts: all layers are dense as it is"),
        (
            {"experts": ExpertsConfig(experts=2, active=1, hidden=3), "dense_layers": (2,)},
            "dense layer 2 is not one of the 2 layers",
        ),
        ({"parallel": "yes"}, "parallel 'yes' is not one of one norm, two norms"),
        ({"parallel": "one norm", "placement": "post"}, "a parallel block adds its branches in one sum: .*"),
        ({"head_bias": True}, "head_bias needs a head of its own: .*"),
        ({"window_rope_base": 10.0}, "window_rope_base 10.0 needs a window and rotary positions, .*"),
        ({"attention_scale": 0.0}, "attention_scale 0.0 must be positive and finite"),
        ({"embed_scale": float("inf")}, "embed_scale inf must be positive and finite"),
    ],
)
def test_a_configuration_that_makes_no_sense(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(CONFIG, **change)
