"""The cache, counted from the configuration: what a real cache of the model weighs."""

import dataclasses

import pytest
import torch

from llm_atlas.models.decoder import Decoder, DecoderConfig, LatentConfig, LinearConfig
from llm_atlas.models.ledger import cached_bytes, cached_numbers
from llm_atlas.models.shapes import SHAPES

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
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, billions):
    """The counts on the models' own cards: a wrong size anywhere in a shape shows."""
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(SHAPES[name], context=8))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


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
