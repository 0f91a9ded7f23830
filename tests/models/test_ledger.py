"""The cache, counted from the configuration: what a real cache of the model weighs."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_atlas.models.decoder import Decoder, DecoderConfig, LatentConfig, LinearConfig
from llm_atlas.models.inspect import parameter_ledger
from llm_atlas.models.ledger import cached_bytes, cached_numbers, flops_per_token, parameters
from llm_atlas.models.shapes import SHAPES
from llm_atlas.nn.attention import Attend, scaled_dot_product_attention
from llm_atlas.nn.moe import Experts, ExpertsConfig

SHAPE = DecoderConfig(vocab=31, dim=32, layers=3, heads=4, hidden=48, context=64)
KINDS = {
    "multi-head": {},
    "grouped": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1, "head_dim": 10},
    "latent": {"latent": LatentConfig(kv_rank=6, rope_dim=4)},
    "window": {"window": 5},
    "window and full": {"window": 5, "full_layers": (1,)},
    "linear": {"linear": LinearConfig()},
    "linear, taylor": {"linear": LinearConfig(feature_map="taylor"), "kv_heads": 2},
    "gated": {"linear": LinearConfig(kind="gated", conv=4)},
    "delta": {"linear": LinearConfig(kind="delta", conv=2)},
    "gated delta and full": {"linear": LinearConfig(kind="gated-delta", conv=4), "full_layers": (0, 2)},
    "all full": {"linear": LinearConfig(), "full_layers": (0, 1, 2)},
}


@pytest.mark.parametrize("tokens", [1, 4, 5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_what_a_real_cache_weighs(kind, tokens):
    model = Decoder(dataclasses.replace(SHAPE, **KINDS[kind])).eval()
    cache = model.make_cache()
    assert cached_numbers(model.config, 0) == cache.nbytes == 0
    with torch.inference_mode():
        model(torch.zeros(1, tokens, dtype=torch.long), cache=cache)
    assert cached_numbers(model.config, tokens) == cache.nbytes / 4
    assert cached_bytes(model.config, tokens, bytes_per_number=4) == cache.nbytes


def test_a_state_does_not_grow_and_a_window_stops():
    linear = dataclasses.replace(SHAPE, linear=LinearConfig())
    assert cached_numbers(linear, 1) == cached_numbers(linear, 10**6)
    window = dataclasses.replace(SHAPE, window=5)
    assert cached_numbers(window, 4) < cached_numbers(window, 5) == cached_numbers(window, 10**6)


# Layers and numbers a token that the models' own papers give, or their product of layers, heads and features.
PUBLISHED = {
    "Llama 2 7B": 2 * 32 * 32 * 128,
    "Llama 3 8B": 2 * 32 * 8 * 128,
    "Llama 3 70B": 2 * 80 * 8 * 128,
    "DeepSeek 67B": 2 * 95 * 8 * 128,
    "DeepSeek-V2": 60 * (512 + 64),  # table 1 of its paper: 9/2 of a head's features a layer
    "DeepSeek-V3": 61 * (512 + 64),
    "Qwen3 32B": 2 * 64 * 8 * 128,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_keep_what_their_papers_say(name):
    assert cached_numbers(SHAPES[name], 1) == PUBLISHED[name]
    assert cached_numbers(SHAPES[name], 1000) == 1000 * PUBLISHED[name]


def test_mistral_stops_at_its_window():
    shape = SHAPES["Mistral 7B"]
    assert cached_numbers(shape, 4096) == cached_numbers(shape, 32768) == 4096 * 2 * 32 * 8 * 128


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama 2 7B", 6.738),
        ("Llama 3 8B", 8.030),
        ("Llama 3 70B", 70.554),
        ("Mistral 7B", 7.242),
        ("Qwen3 8B", 8.191),
        ("Qwen3 32B", 32.762),
        ("DeepSeek 67B", 67.425),
        ("GPT-2 small", 0.124),
        ("Mixtral 8x7B", 46.703),
        ("Qwen3-235B-A22B", 235.094),
        ("DeepSeek-V3", 671.026),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, billions):
    """The counts on the models' own cards: a wrong size anywhere in a shape shows."""
    with torch.device("meta"):
        model = Decoder(SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


# --------------------------------------------------------------------------------- parameters, FLOPs

BIASES = {"attention_bias": True, "out_bias": True, "feedforward_bias": True}
EXPERTS = ExpertsConfig(experts=6, active=2, hidden=10, shared=2)
MODELS = KINDS | {
    "gpt": BIASES | {"norm": "layer", "gated": False, "positions": "learned"},
    "post": {"placement": "post", "positions": "sinusoidal", "out_bias": True},
    "sandwich": {"placement": "sandwich", "qk_norm": True, "embed_norm": True, "tied": False},
    "gptj": BIASES | {"norm": "layer", "parallel": "one norm", "tied": False, "head_bias": True},
    "neox": {"norm": "layer", "parallel": "two norms", "rotary_dim": 4, "gated": False},
    "sandwich, parallel": {"placement": "sandwich", "parallel": "one norm"},
    "t5": {"positions": "t5", "relative_buckets": 10},
    "shaw": {"positions": "shaw", "relative_distance": 7, "nope_layers": (1,)},
    "experts": {"experts": EXPERTS},
    "experts, a bias, some dense": {
        "experts": dataclasses.replace(EXPERTS, shared=0, selection_bias=True),
        "dense_layers": (0, 2),
        **BIASES,
    },
    "deepseek": {
        "latent": LatentConfig(kv_rank=30, rope_dim=4, q_rank=5, value_dim=3),
        "experts": EXPERTS,
        "dense_layers": (0,),
        "attention_bias": True,
    },
}


def agree(config: DecoderConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    ledger, parts = parameters(config), parameter_ledger(model)
    assert ledger.total == sum(p.numel() for p in model.parameters())
    assert ledger.feedforward + ledger.experts == parts.pop("feed-forward")
    assert {name: getattr(ledger, name) for name in parts} == parts
    sleeping = 0
    for part in model.modules():
        if isinstance(part, Experts):
            each = sum(p.numel() for p in part.parameters()) // config.experts.experts
            sleeping += each * (config.experts.experts - config.experts.active)
    assert ledger.active == ledger.total - sleeping


@pytest.mark.parametrize("kind", MODELS)
def test_the_ledger_is_the_models_own(kind):
    agree(dataclasses.replace(SHAPE, **MODELS[kind]))


@pytest.mark.parametrize("name", SHAPES)
def test_the_ledger_of_every_published_shape_is_the_models_own(name):
    agree(SHAPES[name])


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # billions, as the models' reports and cards give them
        ("GPT-3 175B", 175, 175),
        ("Mixtral 8x7B", 47, 13),
        ("Qwen3-235B-A22B", 235, 22),
        ("DeepSeek-V2", 236, 21),
        ("DeepSeek-V3", 671, 37),
    ],
)
def test_published_models_have_what_their_reports_say(name, total, active):
    ledger = parameters(SHAPES[name])
    assert ledger.total / 1e9 == pytest.approx(total, abs=0.6)
    assert ledger.active / 1e9 == pytest.approx(active, abs=0.6)


@pytest.mark.parametrize(
    "kind", [kind for kind in MODELS if "window" not in kind and "linear" not in MODELS[kind]]
)
@pytest.mark.parametrize("tokens", [1, 13])
def test_flops_are_those_that_torch_counts(kind, tokens):
    config = dataclasses.replace(SHAPE, **MODELS[kind])
    model = Decoder(config).eval()
    for part in model.modules():
        if isinstance(part, Attend):
            part.function = scaled_dot_product_attention  # plain products, which every counter knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(31, (1, tokens), generator=torch.Generator().manual_seed(0)))
    assert flops_per_token(config, tokens) * tokens == counter.get_total_flops()


def test_flops_of_a_window_stop_and_those_of_a_state_do_not_grow():
    full, window = SHAPE, dataclasses.replace(SHAPE, window=5)
    for tokens in (1, 4, 5):
        assert flops_per_token(window, tokens) == flops_per_token(full, tokens)
    assert flops_per_token(window, 6) == flops_per_token(window, 10**6) == flops_per_token(full, 5)
    mixed = dataclasses.replace(window, full_layers=(1,))
    assert flops_per_token(mixed, 9) - flops_per_token(window, 9) == 4 * 32 * (9 - 5)
    for kind, products in (("linear", 2), ("gated", 2), ("delta", 3), ("gated-delta", 3)):
        linear = dataclasses.replace(SHAPE, linear=LinearConfig(kind=kind))
        assert flops_per_token(linear, 1) == flops_per_token(linear, 10**6)
        gates = {"linear": 0, "gated": 32 * 32, "delta": 32 * 4, "gated-delta": 2 * 32 * 4}[kind]
        state = 4 * 8 * (9 if kind == "linear" else 8)
        outside = flops_per_token(full, 1) - 3 * 4 * 32
        assert flops_per_token(linear, 9) == outside + 3 * 2 * (gates + products * state)


def test_a_forward_pass_is_twice_the_active_weights():
    """The rule of thumb, where the text is short beside the width of the model."""
    for name in ("Llama 3 70B", "DeepSeek-V3", "Mixtral 8x7B"):
        config, ledger = SHAPES[name], parameters(SHAPES[name])
        assert flops_per_token(config, 1) / 2 == pytest.approx(ledger.active - ledger.embedding, rel=1e-3)


def test_no_flops_without_a_token():
    with pytest.raises(ValueError, match=r"^context 0 must be at least 1$"):
        flops_per_token(SHAPE, 0)


def test_bad_counts():
    with pytest.raises(ValueError, match=r"^tokens -1 must not be negative$"):
        cached_numbers(SHAPE, -1)
    for size in (0, -2, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"bytes_per_number .* must be positive and finite"):
            cached_bytes(SHAPE, 1, bytes_per_number=size)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DeepSeek-V2", (102400, 5120, 60, 128, 128, 512, 64, 1536)),
        ("DeepSeek-V3", (129280, 7168, 61, 128, 128, 512, 64, 1536)),
    ],
)
def test_the_latent_shapes_are_those_of_the_reports(name, fields):
    """Vocabulary, width, layers, heads, features of a head, ranks of latent, rotary key and query."""
    s = SHAPES[name]
    latent = (s.latent.kv_rank, s.latent.rope_dim, s.latent.q_rank)
    assert (s.vocab, s.dim, s.layers, s.heads, s.head_dim, *latent) == fields


def test_what_does_not_show_in_a_count():
    assert SHAPES["Llama 3 8B"].rope_base == SHAPES["Llama 3 70B"].rope_base == 5e5
    assert SHAPES["Qwen3 8B"].rope_base == 1e6
    assert (SHAPES["Mistral 7B"].kv_heads, SHAPES["Qwen3 8B"].kv_heads) == (8, 8)
