"""Every mixer as a configuration of the one Decoder: caches, padding, generation, and what a configuration refuses."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core.seeds import generator
from llm_atlas.infer.generate import generate
from llm_atlas.models.decoder import Decoder, DecoderConfig, LatentConfig, LinearConfig
from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.cache import LayerCache, RollingLayerCache
from llm_atlas.nn.latent_attention import LatentAttention
from llm_atlas.nn.linear_attention import LinearAttention
from llm_atlas.nn.masks import left_pad
from llm_atlas.nn.moe import ExpertsConfig
from llm_atlas.recipes import initialize

SHAPE = DecoderConfig(vocab=31, dim=32, layers=3, heads=4, hidden=48, context=64)
KINDS = {
    "window": {"window": 5},
    "window, grouped": {"window": 5, "kv_heads": 2, "qk_norm": True},
    "window, ALiBi": {"window": 5, "positions": "alibi"},
    "window and full": {"window": 5, "full_layers": (1,)},
    "window and full, two rotary bases": {"window": 5, "full_layers": (1,), "window_rope_base": 50.0},
    "latent": {"latent": LatentConfig(kv_rank=6, rope_dim=4)},
    "latent, small queries": {"latent": LatentConfig(kv_rank=6, rope_dim=4, q_rank=5, value_dim=3)},
    "latent, no positions": {"latent": LatentConfig(kv_rank=6, rope_dim=4), "positions": "none"},
    "latent, experts": {
        "latent": LatentConfig(kv_rank=6, rope_dim=4),
        "experts": ExpertsConfig(experts=4, active=2, hidden=10, shared=1, groups=2, active_groups=1),
        "dense_layers": (0,),
    },
    "linear": {"linear": LinearConfig()},
    "gated": {"linear": LinearConfig(kind="gated", conv=4)},
    "gated, a decay a head": {"linear": LinearConfig(kind="gated", decay="head"), "kv_heads": 2},
    "delta": {"linear": LinearConfig(kind="delta", conv=2)},
    "gated delta and full": {"linear": LinearConfig(kind="gated-delta", conv=4), "full_layers": (2,)},
}
IDS = torch.randint(31, (2, 20), generator=generator(0))


def model(kind: str) -> Decoder:
    made = Decoder(dataclasses.replace(SHAPE, **KINDS[kind]))
    initialize(made, generator(1))
    return made.eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@torch.no_grad()
def test_cached_is_uncached(kind):
    made = model(kind)
    cache = made.make_cache()
    parts = torch.cat([made(part, cache=cache) for part in IDS.split([7, 1, 1, 6, 5], dim=1)], dim=1)
    assert_close(parts, made(IDS), atol=1e-4, rtol=1e-4)
    assert cache.length == 20


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(kind):
    made = model(kind)
    ids, positions = left_pad([IDS[0].tolist(), IDS[1, :9].tolist()])
    alone = made(IDS[1:, :9])[0]
    assert_close(made(ids, positions=positions)[1, -9:], alone, atol=1e-4, rtol=1e-4)
    cache = made.make_cache()
    made(ids[:, :-2], positions=positions[:, :-2], cache=cache)
    steps = torch.cat([made(ids[:, i : i + 1], cache=cache) for i in (-2, 19)], dim=1)
    assert_close(steps[1], alone[-2:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_flows_back_in_time(kind):
    made = model(kind)
    changed = IDS.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 31
    assert torch.equal(made(changed)[:, :12], made(IDS)[:, :12])
    assert not torch.equal(made(changed)[:, 12:], made(IDS)[:, 12:])


def test_every_weight_learns(kind):
    made = model(kind).train()
    made(IDS).square().mean().backward()
    still = {name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()}
    # Without positions the rotary features of a latent layer are content like others: all learn there too.
    assert not still


def test_the_generate_loop_takes_it(kind):
    made = model(kind)
    rows = [IDS[0, :8].tolist(), IDS[1, :3].tolist()]
    together = generate(made, rows, max_new_tokens=9)
    assert together == [generate(made, [row], max_new_tokens=9)[0] for row in rows]
    with torch.no_grad():
        for row, new in zip(rows, together, strict=True):
            again = made(torch.tensor([row + new[:-1]]))[0, len(row) - 1 :].argmax(-1)
            assert again.tolist() == new


def test_the_layers_and_their_caches_are_those_asked_for():
    mixed = model("window and full")
    mixers = [block.mixer.sublayer for block in mixed.blocks]
    assert [mixer.window for mixer in mixers] == [5, None, 5]
    assert [type(layer) for layer in mixed.make_cache()._layers] == [
        RollingLayerCache,
        LayerCache,
        RollingLayerCache,
    ]
    hybrid = [type(block.mixer.sublayer) for block in model("gated delta and full").blocks]
    assert hybrid == [LinearAttention, LinearAttention, MultiHeadAttention]
    assert {type(block.mixer.sublayer) for block in model("latent").blocks} == {LatentAttention}
    assert model("latent").attention_positions.dim == 4


@torch.no_grad()
def test_a_window_hides_and_a_full_layer_sees():
    """Token 3 changes; with a window of 5 and three layers nothing past 3 + 3 x 4 can know."""
    changed = IDS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 31
    for name, last in (("window", 15), ("window and full", 19)):
        made = model(name)
        moved = (made(changed) != made(IDS)).any(-1)[0].nonzero().flatten()
        assert int(moved.max()) == last


@torch.no_grad()
def test_a_mask_of_ones_own():
    everything = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    for name in ("window", "window and full", "latent"):
        made = model(name)
        assert_close(made(IDS, mask=everything), made(IDS), atol=1e-4, rtol=1e-4)
        nothing_before = torch.eye(20, dtype=torch.bool)[None, None]
        assert not torch.allclose(made(IDS, mask=nothing_before), made(IDS), atol=1e-2)
    with pytest.raises(ValueError, match="linear attention cannot take a mask"):
        model("linear")(IDS, mask=everything)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 0}, "window 0 must be at least 1"),
        ({"window": 3, "linear": LinearConfig()}, "window and linear are given: a layer has one mixer"),
        (
            {"latent": LatentConfig(kv_rank=6, rope_dim=4), "kv_heads": 2},
            "kv_heads 2 has no meaning with latent",
        ),
        (
            {"latent": LatentConfig(kv_rank=6, rope_dim=4), "positions": "alibi"},
            "latent attention goes with rotary positions or none, not 'alibi'",
        ),
        ({"latent": LatentConfig(kv_rank=6, rope_dim=4), "qk_norm": True}, "qk_norm goes with key heads"),
        ({"linear": LinearConfig(), "positions": "t5"}, "no logits that positions 't5' could be added to"),
        ({"full_layers": (1,)}, "full_layers .1,. need a window or linear"),
        ({"window": 3, "full_layers": (3,)}, "full layer 3 is not one of the 3 layers"),
        ({"window": 3, "full_layers": (1, 1)}, "full_layers .* name a layer twice"),
    ],
)
def test_a_configuration_that_makes_no_sense(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SHAPE, **change)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"kind": "quadratic"}, "kind 'quadratic' is not one of linear, gated, delta, gated-delta"),
        ({"decay": "token"}, "decay 'token' is not one of channel, head, fixed"),
        ({"feature_map": "exp"}, "feature map 'exp' is not one of elu, relu"),
        ({"conv": -1}, "conv -1 must be 0"),
    ],
)
def test_linear_options(how, says):
    with pytest.raises(ValueError, match=says):
        LinearConfig(**how)


def mixer(**changes):
    """The first layer's mixer of a decoder with these changes."""
    return Decoder(dataclasses.replace(SHAPE, **changes)).blocks[0].mixer.sublayer


def test_every_size_of_a_latent_layer_arrives():
    found = mixer(
        head_dim=6,
        latent=LatentConfig(kv_rank=7, rope_dim=4, value_dim=5, q_rank=9),
        rotary_layout="interleaved",
        rope_base=77.0,
    )
    assert (found.kv_rank, found.rope_dim, found.head_dim, found.value_dim, found.q_rank) == (7, 4, 6, 5, 9)
    assert found.q_down.out_features == 9
    assert found.v_up.out_features == 4 * 5
    assert (found.positions.layout, found.positions.base) == ("interleaved", 77.0)


def test_every_option_of_a_linear_layer_arrives():
    found = mixer(linear=LinearConfig(kind="gated", decay="head", feature_map="relu", conv=3), kv_heads=2)
    assert (found.kind, found.feature_map, found.conv, found.kv_heads) == ("gated", "relu", 3, 2)
    assert found.decay.out_features == 2  # one decay a head, not one a channel
    assert mixer(linear=LinearConfig(kind="gated", decay="channel")).decay.out_features == 4 * 8
    assert mixer(linear=LinearConfig(kind="gated", decay="fixed")).decay is None


@pytest.mark.parametrize("positions", ["alibi", "t5", "shaw"])
def test_linear_attention_has_no_logits(positions):
    with pytest.raises(ValueError, match="no logits that positions"):
        dataclasses.replace(SHAPE, linear=LinearConfig(), positions=positions)
