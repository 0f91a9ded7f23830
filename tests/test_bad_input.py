# ruff: noqa: E501 (a table: each line is one mistake and its message)
"""A mistake gets one line that names the value and the rule.

These run without --jaxtyping-packages (marker `untyped`): with it, jaxtyping would answer for wrong shapes before the
package's own messages, which are what a user sees.
"""

import math

import pytest
import torch

from llm_atlas.infer.generate import generate
from llm_atlas.infer.sampling import temperature
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import unpermute
from llm_atlas.models.inspect import position_probe
from llm_atlas.nn.activations import find_activation, gelu
from llm_atlas.nn.attention import (
    MultiHeadAttention,
    attention_weights,
    fused_attention,
    scaled_dot_product_attention,
)
from llm_atlas.nn.block import Block, Residual
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.dropout import Dropout, dropout
from llm_atlas.nn.feedforward import FeedForward, GatedFeedForward, feed_forward_flops
from llm_atlas.nn.masks import causal_mask, left_pad, visible
from llm_atlas.nn.norm import (
    LayerNorm,
    RMSNorm,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from llm_atlas.nn.positions import (
    AlibiPositions,
    LearnedPositions,
    RelativePositionBias,
    RotaryPositions,
    ShawPositions,
    SinusoidalPositions,
    alibi_slopes,
    apply_rotary,
    half_to_interleaved,
    interleaved_to_half,
    relative_attention,
    relative_position_bucket,
    sinusoidal_positions,
)

pytestmark = pytest.mark.untyped

SIZES = {"vocab": 11, "dim": 8, "layers": 1, "heads": 2, "hidden": 12, "context": 6}
MODEL = Decoder(DecoderConfig(**SIZES)).eval().requires_grad_(False)
BOTH = [scaled_dot_product_attention, fused_attention]


def x(*shape: int, **how) -> torch.Tensor:
    return torch.zeros(shape, **how)


def ids(*shape: int, fill: int = 0, **how) -> torch.Tensor:
    return torch.full(shape, fill, **how)


def filled(rows: int = 2, length: int = 3) -> KVCache:
    cache = KVCache(1)
    cache.place(length)
    cache[0].append(x(rows, 2, length, 4), x(rows, 2, length, 4))
    return cache


def crossed(rows: int, keys: int) -> torch.Tensor:
    """Cross-attention behind the cached keys of another context."""
    return MultiHeadAttention(8, 2)(x(rows, 1, 8), context=x(rows, keys, 8), cache=filled()[0])


def config(**change) -> DecoderConfig:
    return DecoderConfig(**SIZES | change)


CASES = [
    # attention: shapes, dtypes, devices
    *(
        case
        for attend in BOTH
        for case in [
            (lambda a=attend: a(x(8), x(3, 8), x(3, 8)), ValueError, "q, k and v need at least 2 axes (tokens, features), got 1, 2 and 2"),
            (lambda a=attend: a(x(2, 8), x(3, 7), x(3, 7)), ValueError, "q has 8 features and k has 7: they must be equal"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(4, 8)), ValueError, "there are 3 keys and 4 values: they must be equal"),
            (lambda a=attend: a(x(5, 2, 8), x(2, 3, 8), x(2, 3, 8)), ValueError, "5 query heads do not divide into groups over 2 key heads"),
            (lambda a=attend: a(x(4, 2, 8), x(2, 3, 8), x(4, 3, 8)), ValueError, "keys have leading axes (2,) and values (4,): they must be equal"),
            (lambda a=attend: a(x(2, 4, 2, 8), x(3, 4, 3, 8), x(3, 4, 3, 8)), ValueError, "queries have leading axes (2,) and keys (3,): they do not fit"),
            (lambda a=attend: a(x(2, 8), x(3, 8).double(), x(3, 8)), ValueError, "q, k and v must share a dtype, got torch.float32, torch.float64 and torch.float32"),
            (lambda a=attend: a(x(2, 8), x(3, 8, device="meta"), x(3, 8)), ValueError, "q, k and v must be on one device, got cpu, meta and cpu"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), is_causal=True), ValueError, "is_causal with 2 queries and 3 keys is ambiguous: pass mask=causal_mask(queries, keys)"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), mask=x(2, 3)), TypeError, "mask must be bool (True = may look), got torch.float32; additive terms go into bias"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), mask=torch.ones(2, 3, dtype=torch.int64)), TypeError, "mask must be bool (True = may look), got torch.int64; additive terms go into bias"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), mask=x(3, 2).bool()), ValueError, "mask ends in 3 x 2, but there are 2 queries and 3 keys"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), mask=x(3).bool()), ValueError, "mask ends in 3, but there are 2 queries and 3 keys"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), mask=x(2, 3, device="meta").bool()), ValueError, "mask is on meta, q, k and v are on cpu"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), bias=x(2, 2)), ValueError, "bias ends in 2 x 2, but there are 2 queries and 3 keys"),
            (lambda a=attend: a(x(2, 8), x(3, 8), x(3, 8), bias=x(2, 3, device="meta")), ValueError, "bias is on meta, q, k and v are on cpu"),
        ]
    ),
    (lambda: attention_weights(x(2, 8), x(3, 7)), ValueError, "q has 8 features and k has 7: they must be equal"),
    (lambda: MultiHeadAttention(10, 4), ValueError, "dim 10 must divide into 4 heads"),
    (lambda: MultiHeadAttention(10, 0), ValueError, "dim 10 must divide into 0 heads"),
    (lambda: MultiHeadAttention(12, 6, kv_heads=4), ValueError, "6 heads must divide into groups over 4 key/value heads"),
    (lambda: MultiHeadAttention(12, 6, kv_heads=0), ValueError, "6 heads must divide into groups over 0 key/value heads"),
    (lambda: MultiHeadAttention(8, 2)(x(1, 3, 9)), ValueError, "x has 9 features, this layer takes 8"),
    (lambda: MultiHeadAttention(8, 2, context_dim=5)(x(1, 3, 8), context=x(1, 3, 8)), ValueError, "context has 8 features, this layer takes 5"),
    (lambda: MultiHeadAttention(8, 2, head_dim=0), ValueError, "head_dim 0 must be at least 1"),
    (lambda: crossed(rows=1, keys=4), ValueError, "the cache holds 2 rows of 3 keys, the context has 1 rows of 4: use a new cache for a new context"),
    (lambda: scaled_dot_product_attention(ids(2, 8), ids(3, 8), ids(3, 8)), TypeError, "q, k and v must hold floating-point numbers, got torch.int64"),
    # masks
    (lambda: causal_mask(0), ValueError, "a causal mask needs 1 <= queries <= keys, got queries 0 and keys 0"),
    (lambda: causal_mask(4, 3), ValueError, "a causal mask needs 1 <= queries <= keys, got queries 4 and keys 3"),
    (lambda: visible(ids(1, 2), ids(1, 2), window=0), ValueError, "window 0 must be at least 1"),
    (lambda: left_pad([]), ValueError, "a prompt needs at least one token: no prompts at all"),
    (lambda: left_pad([[1], [], []]), ValueError, "a prompt needs at least one token: prompt 1 is empty"),
    # norms, activations, feed-forward
    (lambda: layer_norm(x(2, 8), x(7)), ValueError, "weight has shape (7,), but the last axis of x has 8 features"),
    (lambda: layer_norm(x(2, 8), x(8), x(1)), ValueError, "bias has shape (1,), but the last axis of x has 8 features"),
    (lambda: rms_norm(x(2, 8), x(8, 1)), ValueError, "weight has shape (8, 1), but the last axis of x has 8 features"),
    (lambda: rms_norm(ids(2, 8)), TypeError, "x must hold floating-point numbers, got torch.int64"),
    (lambda: LayerNorm(8)(x(2, 7)), ValueError, "weight has shape (8,), but the last axis of x has 7 features"),
    (lambda: RMSNorm(8)(x(2, 7)), ValueError, "weight has shape (8,), but the last axis of x has 7 features"),
    (lambda: RMSNorm(0), ValueError, "dim 0 must be at least 1"),
    (lambda: layer_norm_backward(x(2, 8), x(3, 8)), ValueError, "grad has shape (2, 8), but x has (3, 8): they must be equal"),
    (lambda: layer_norm_backward(x(2, 8), x(2, 8), x(7)), ValueError, "weight has shape (7,), but the last axis of x has 8 features"),
    (lambda: rms_norm_backward(x(8), x(2, 8)), ValueError, "grad has shape (8,), but x has (2, 8): they must be equal"),
    (lambda: rms_norm_backward(ids(2, 8), ids(2, 8)), TypeError, "x must hold floating-point numbers, got torch.int64"),
    (lambda: dropout(x(2), 1.0), ValueError, "p 1.0 must be at least 0 and below 1"),
    (lambda: dropout(x(2), float("nan"), training=False), ValueError, "p nan must be at least 0 and below 1"),
    (lambda: dropout(ids(2), 0.0), TypeError, "x must hold floating-point numbers, got torch.int64"),
    (lambda: dropout(x(2, device="meta"), 0.5, generator=torch.Generator()), ValueError, "generator is on cpu, x is on meta: they must be equal"),
    (lambda: Dropout(-0.1), ValueError, "p -0.1 must be at least 0 and below 1"),
    (lambda: Residual(torch.nn.Linear(8, 8), lambda: RMSNorm(8), dropout=1.5), ValueError, "p 1.5 must be at least 0 and below 1"),
    (lambda: config(dropout=1.0), ValueError, "dropout 1.0 must be at least 0 and below 1"),
    (lambda: gelu(x(2), approximate="exact"), ValueError, "approximate 'exact' must be 'none' or 'tanh'"),
    (lambda: find_activation("swish"), ValueError, "activation 'swish' is not one of relu, gelu, gelu_tanh, silu"),
    (lambda: FeedForward(8, 0), ValueError, "dim 8 and hidden 0 must be at least 1"),
    (lambda: feed_forward_flops(0, 3), ValueError, "dim 0 and hidden 3 must be at least 1"),
    (lambda: FeedForward(8)(x(2, 7)), ValueError, "x has 7 features, this layer takes 8"),
    (lambda: GatedFeedForward(8)(x(2, 7)), ValueError, "x has 7 features, this layer takes 8"),
    # positions
    (lambda: sinusoidal_positions(ids(3), 7), ValueError, "dim 7 must be even and positive: features are used in pairs"),
    (lambda: sinusoidal_positions(ids(3), 8, base=0.0), ValueError, "base 0.0 must be positive and finite"),
    (lambda: sinusoidal_positions(ids(3), 8, base=math.nan), ValueError, "base nan must be positive and finite"),
    (lambda: SinusoidalPositions(8).embed(ids(1, 3, 8), ids(1, 3)), TypeError, "x holds torch.int64, and a position would be cut to whole numbers: pass a float tensor"),
    (lambda: LearnedPositions(3, 0), ValueError, "dim 0 must be at least 1"),
    (lambda: RotaryPositions(8, length=4).rotate(ids(1, 1, 1, 8), ids(1, 1)), TypeError, "x holds torch.int64, and a position would be cut to whole numbers: pass a float tensor"),
    (lambda: apply_rotary(ids(3, 8), ids(3)), TypeError, "x holds torch.int64, and a position would be cut to whole numbers: pass a float tensor"),
    (lambda: apply_rotary(x(3, 8), ids(3), base=math.inf), ValueError, "base inf must be positive and finite"),
    (lambda: interleaved_to_half(x(6), dim=5), ValueError, "dim 5 is no axis of x, which has 1"),
    (lambda: half_to_interleaved(x(6, 2), dim=-3), ValueError, "dim -3 is no axis of x, which has 2"),
    (lambda: relative_position_bucket(x(3), bidirectional=False), TypeError, "distances are whole numbers, not torch.float32"),
    (lambda: position_probe(x(8, 5, 3), ids(4)), ValueError, "there are 4 positions for 5 vectors a row"),
    (lambda: position_probe(x(8, 0, 3), ids(0)), ValueError, "states have no vectors: there is nothing to predict"),
    (lambda: position_probe(x(8, 5, 3), ids(5)), ValueError, "the positions are all alike: there is nothing to predict"),
    (lambda: position_probe(x(8, 1, 3), ids(1)), ValueError, "the positions are all alike: there is nothing to predict"),
    (lambda: position_probe(x(8, 5, 3) + math.nan, torch.arange(5)), ValueError, "states hold numbers that are not finite"),
    (lambda: position_probe(x(8, 5, 3), torch.arange(5), ridge=0.0), ValueError, "ridge 0.0 must be positive and finite"),
    (lambda: SinusoidalPositions(8).embed(x(1, 3, 7), ids(1, 3)), ValueError, "x has 7 features, these positions are made for 8"),
    (lambda: LearnedPositions(0, 8), ValueError, "length 0 must be at least 1"),
    (lambda: LearnedPositions(4, 8).embed(x(1, 3, 8), ids(1, 3, fill=4)), ValueError, "position 4 is past the table of 4 positions"),
    (lambda: LearnedPositions(4, 8).embed(x(1, 3, 1), ids(1, 3)), ValueError, "x has 1 features, these positions are made for 8"),
    (lambda: RotaryPositions(7), ValueError, "dim 7 must be even and positive: features are used in pairs"),
    (lambda: RotaryPositions(8, length=0), ValueError, "length 0 must be at least 1"),
    (lambda: RotaryPositions(8, length=4).rotate(x(1, 1, 1, 8), ids(1, 1, fill=9)), ValueError, "position 9 is past the table of 4 positions"),
    (lambda: RotaryPositions(8, length=4).rotate(x(1, 1, 1, 2), ids(1, 1)), ValueError, "x has 2 features, these positions are made for 8"),
    (lambda: RotaryPositions(8, layout="paired"), ValueError, "layout 'paired' is not one of half, interleaved"),
    (lambda: RotaryPositions(8, rotary_dim=3), ValueError, "rotary_dim 3 must be even and lie between 2 and the head's 8 features"),
    (lambda: RotaryPositions(8, rotary_dim=10), ValueError, "rotary_dim 10 must be even and lie between 2 and the head's 8 features"),
    (lambda: RotaryPositions(8, rotary_dim=0), ValueError, "rotary_dim 0 must be even and lie between 2 and the head's 8 features"),
    (lambda: apply_rotary(x(3, 7), ids(3)), ValueError, "dim 7 must be even and positive: features are used in pairs"),
    (lambda: apply_rotary(x(3, 8), ids(3), layout="paired"), ValueError, "layout 'paired' is not one of half, interleaved"),
    (lambda: apply_rotary(x(3, 8), ids(3), base=-1.0), ValueError, "base -1.0 must be positive and finite"),
    (lambda: interleaved_to_half(x(6), heads=2), ValueError, "6 features do not divide into 2 heads of feature pairs"),
    (lambda: half_to_interleaved(x(6, 2), heads=0, dim=0), ValueError, "6 features do not divide into 0 heads of feature pairs"),
    (lambda: alibi_slopes(0), ValueError, "heads 0 must be at least 1"),
    (lambda: AlibiPositions(0), ValueError, "heads 0 must be at least 1"),
    (lambda: AlibiPositions(3).bias(x(1, 2, 4, 8), ids(1, 4), ids(1, 4)), ValueError, "q has 2 heads, these positions are made for 3"),
    (lambda: RelativePositionBias(0, bidirectional=True), ValueError, "heads 0 must be at least 1"),
    (lambda: RelativePositionBias(3, bidirectional=True).bias(x(1, 2, 4, 8), ids(1, 4), ids(1, 4)), ValueError, "q has 2 heads, these positions are made for 3"),
    (lambda: relative_position_bucket(ids(3), buckets=2, bidirectional=True), ValueError, "buckets 2 must be even and at least 4"),
    (lambda: relative_position_bucket(ids(3), buckets=7, bidirectional=False), ValueError, "buckets 7 must be even and at least 2"),
    (lambda: relative_position_bucket(ids(3), max_distance=16, bidirectional=False), ValueError, "max_distance 16 must be above the 16 distances with a bucket each"),
    (lambda: RelativePositionBias(3, max_distance=8, bidirectional=True), ValueError, "max_distance 8 must be above the 8 distances with a bucket each"),
    (lambda: relative_attention(x(3, 8), x(3, 8), x(3, 8), x(6, 8)), ValueError, "a table needs 2 K + 1 rows, for distances -K to K, and both as many; got 6"),
    (lambda: relative_attention(x(3, 8), x(3, 8), x(3, 8), x(7, 8), x(5, 8)), ValueError, "a table needs 2 K + 1 rows, for distances -K to K, and both as many; got 7 and 5"),
    (lambda: relative_attention(x(4, 8), x(3, 8), x(3, 8), x(7, 8)), ValueError, "there are 4 queries and 3 keys: queries are the last of the keys"),
    (lambda: ShawPositions(8, max_distance=0), ValueError, "head_dim 8 and max_distance 0 must be at least 1"),
    (lambda: ShawPositions(8).bias(x(1, 2, 4, 6), ids(1, 4), ids(1, 4)), ValueError, "x has 6 features, these positions are made for 8"),
    # cache
    (lambda: KVCache(0), ValueError, "layers 0 must be at least 1 and capacity 0 not negative"),
    (lambda: KVCache(1, capacity=-1), ValueError, "layers 1 must be at least 1 and capacity -1 not negative"),
    (lambda: KVCache(1)[0].read(), ValueError, "the cache is empty: append before read"),
    (lambda: filled().truncate(4), ValueError, "cannot truncate to 4: the cache holds 3 slots"),
    (lambda: filled().truncate(-1), ValueError, "cannot truncate to -1: the cache holds 3 slots"),
    (lambda: filled()[0].truncate(4), ValueError, "cannot truncate to 4: the cache holds 3 slots"),
    (lambda: filled().select([0, 2]), ValueError, "row 2 is not one of the 2 rows of the cache"),
    (lambda: filled().select([-1]), ValueError, "row -1 is not one of the 2 rows of the cache"),
    (lambda: filled().select(torch.tensor([True, False])), ValueError, "rows must be a list of row numbers, got torch.bool of shape (2,)"),
    (lambda: filled()[0].append(x(3, 2, 1, 4), x(3, 2, 1, 4)), ValueError, "the cache holds 2 rows, the new keys have 3"),
    (lambda: filled()[0].append(x(2, 1, 1, 4), x(2, 1, 1, 4)), ValueError, "the cache holds 2 heads of 4, the new keys have 1 of 4"),
    (lambda: filled()[0].append(x(2, 2, 1, 4), x(2, 2, 1, 1)), ValueError, "the cache holds 2 heads of 4, the new values have 2 of 1"),
    (lambda: filled()[0].append(x(2, 2, 1, 4).half(), x(2, 2, 1, 4)), ValueError, "the cache is torch.float32 on cpu, the new keys are torch.float16 on cpu"),
    (lambda: filled()[0].append(x(2, 2, 1, 4, device="meta"), x(2, 2, 1, 4)), ValueError, "the cache is torch.float32 on cpu, the new keys are torch.float32 on meta"),
    # block
    (lambda: Residual(FeedForward(8), lambda: RMSNorm(8), placement="middle"), ValueError, "placement 'middle' is not one of pre, post, sandwich"),
    (lambda: Block(MultiHeadAttention(8, 2), FeedForward(8), lambda: RMSNorm(8))(x(1, 2, 8), context=x(1, 2, 8)), ValueError, "context and a cross-attention layer go together: one of them is missing"),
    # the model
    (lambda: config(layers=0), ValueError, "layers 0 must be at least 1"),
    (lambda: config(norm_eps=0.0), ValueError, "norm_eps 0.0 must be positive and finite"),
    (lambda: config(rope_base=float("nan")), ValueError, "rope_base nan must be positive and finite"),
    (lambda: config(norm="batch"), ValueError, "norm 'batch' is not one of layer, rms"),
    (lambda: config(positions="polar"), ValueError, "positions 'polar' is not one of none, sinusoidal, learned, rotary, alibi, t5, shaw"),
    (lambda: config(rotary_layout="paired"), ValueError, "rotary_layout 'paired' is not one of half, interleaved"),
    (lambda: config(rotary_dim=2, positions="alibi"), ValueError, "rotary_dim 2 needs rotary positions, not 'alibi'"),
    (lambda: Decoder(config(rotary_dim=3)), ValueError, "rotary_dim 3 must be even and lie between 2 and the head's 4 features"),
    (lambda: config(nope_layers=(1,)), ValueError, "nope layer 1 is not one of the 1 layers"),
    (lambda: config(nope_layers=(-1,)), ValueError, "nope layer -1 is not one of the 1 layers"),
    (lambda: config(nope_layers=(0, 0)), ValueError, "nope_layers (0, 0) name a layer twice"),
    (lambda: config(nope_layers=(0.0,)), TypeError, "nope layer 0.0 must be an int, the number of a layer"),
    (lambda: config(nope_layers=(0,), positions="learned"), ValueError, "nope_layers (0,) need positions that act inside attention, not 'learned'"),
    (lambda: config(heads=3), ValueError, "dim 8 must divide into 3 heads"),
    (lambda: Decoder(config(heads=8)), ValueError, "dim 1 must be even and positive: features are used in pairs"),
    (lambda: MODEL(ids(5)), ValueError, "ids must have shape (batch, seq) with both at least 1, got (5,)"),
    (lambda: MODEL(ids(1, 0)), ValueError, "ids must have shape (batch, seq) with both at least 1, got (1, 0)"),
    (lambda: MODEL(ids(0, 3)), ValueError, "ids must have shape (batch, seq) with both at least 1, got (0, 3)"),
    (lambda: MODEL(x(1, 3)), TypeError, "ids must be int64 or int32, got torch.float32"),
    (lambda: MODEL(ids(1, 3, fill=-1)), ValueError, "token id -1 is outside the vocabulary of 11"),
    (lambda: MODEL(ids(1, 3, fill=11)), ValueError, "token id 11 is outside the vocabulary of 11"),
    (lambda: MODEL(ids(1, 7)), ValueError, "7 tokens do not fit the context of 6"),
    (lambda: MODEL(ids(1, 3, device="meta")), ValueError, "ids are on meta, the model is on cpu"),
    (lambda: MODEL(ids(2, 3), positions=ids(3)), ValueError, "positions have shape (3,), the tokens have (2, 3): they must be equal"),
    (lambda: MODEL(ids(1, 3), positions=ids(1, 3, fill=6)), ValueError, "position 6 is past the table of 6 positions"),
    (lambda: MODEL(ids(1, 3), mask=x(1, 1, 3, 3)), TypeError, "mask must be bool (True = may look), got torch.float32; additive terms go into bias"),
    (lambda: MODEL(ids(1, 3), mask=x(1, 1, 3, 4).bool()), ValueError, "mask ends in 3 x 4, but there are 3 queries and 3 keys"),
    (lambda: unpermute(x(6, 2), 2), ValueError, "6 rows do not divide into 2 heads of feature pairs"),
    # writing
    (lambda: generate(MODEL, [], max_new_tokens=1), ValueError, "a prompt needs at least one token: no prompts at all"),
    (lambda: generate(MODEL, [[]], max_new_tokens=1), ValueError, "a prompt needs at least one token: prompt 0 is empty"),
    (lambda: generate(MODEL, [[1]], max_new_tokens=0), ValueError, "max_new_tokens 0 must be at least 1"),
    (lambda: generate(MODEL, [[1] * 5], max_new_tokens=3), ValueError, "a past of 0, a prompt of 5 and 3 new tokens do not fit the context of 6"),
    (lambda: generate(MODEL, [[1, 12]], max_new_tokens=1), ValueError, "token id 12 is outside the vocabulary of 11"),
    (lambda: generate(MODEL, [[1]], max_new_tokens=1, temperature=-1), ValueError, "temperature -1 must be finite and not negative"),
    (lambda: temperature(0.0), ValueError, "temperature 0.0 must be at least 1e-6 and finite; 0 is greedy decoding"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "message"), CASES, ids=[f"{i}: {m[:60]}" for i, (_, _, m) in enumerate(CASES)]
)
def test_one_line_names_the_value_and_the_rule(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
    assert type(error.value) is kind


def test_a_refused_append_leaves_the_cache_as_it_was():
    cache = filled()
    with pytest.raises(ValueError, match="rows"):
        cache[0].append(x(3, 2, 1, 4), x(3, 2, 1, 4))
    assert cache[0].length == 3
    assert cache[0].read()[0].shape == (2, 2, 3, 4)


def test_a_refused_call_of_the_model_leaves_its_cache_as_it_was():
    cache = MODEL.make_cache()
    MODEL(ids(2, 3), cache=cache)
    for bad in (ids(2, 4), ids(2, 1, fill=11)):
        with pytest.raises(ValueError, match=r"context|vocabulary"):
            MODEL(bad, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, the new ids have 3"):
        MODEL(ids(3, 1), cache=cache)
    assert cache.length == 3
    assert cache.positions.shape == (1, 3)
