"""Positions: closed forms, relative properties, and what a model can tell without them."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_atlas.core.assets import fetch
from llm_atlas.core.weights import load_safetensors
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import build
from llm_atlas.nn.attention import MultiHeadAttention, scaled_dot_product_attention
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.masks import causal_mask
from llm_atlas.nn.positions import (
    AlibiPositions,
    LearnedPositions,
    NoPositions,
    PositionScheme,
    RelativePositionBias,
    RotaryPositions,
    ShawPositions,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    apply_rotary,
    half_to_interleaved,
    interleaved_to_half,
    relative_attention,
    relative_position_bucket,
    sinusoidal_positions,
)

LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sinusoidal_is_its_closed_form():
    table = sinusoidal_positions(torch.arange(40), 6)
    for p in range(40):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@given(st.integers(0, 500), st.integers(0, 50))
def test_a_shift_of_sinusoidal_positions_is_one_rotation_wherever_it_starts(p, shift):
    here, there = sinusoidal_positions(torch.tensor([p, p + shift]), 8).view(2, 4, 2)
    angle = shift / 10000 ** (torch.arange(4) / 4)
    sin, cos = here.unbind(-1)
    turned = torch.stack(
        [sin * angle.cos() + cos * angle.sin(), cos * angle.cos() - sin * angle.sin()], dim=-1
    )
    assert_close(there, turned, atol=2e-4, rtol=0)


def test_sinusoidal_adds_to_the_embeddings():
    x, at = randn(2, 5, 6), torch.tensor([[3, 4, 5, 6, 7]])
    assert_close(SinusoidalPositions(6).embed(x, at), x + sinusoidal_positions(at, 6))
    assert SinusoidalPositions(6).embed(x.bfloat16(), at).dtype == torch.bfloat16
    assert_close(SinusoidalPositions(6, base=50.0).embed(x, at), x + sinusoidal_positions(at, 6, base=50.0))
    assert (sinusoidal_positions(at, 6, base=50.0) - sinusoidal_positions(at, 6)).abs().max() > 0.1


def test_learned_positions_are_rows_of_the_table_and_padding_is_finite():
    scheme = LearnedPositions(7, 4)
    x, at = randn(2, 3, 4), torch.tensor([[4, 5, 6], [-1, 0, 1]])
    out = scheme.embed(x, at)
    assert_close(out[0], x[0] + scheme.table.weight[4:])
    assert_close(out[1, 1:], x[1, 1:] + scheme.table.weight[:2])
    assert torch.isfinite(out).all()
    assert scheme.embed(x.bfloat16(), at).dtype == torch.bfloat16


def test_the_table_of_minilm_is_read_as_in_transformers():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    weights, part = load_safetensors(fetch("all-minilm-l6-v2")), "embeddings."
    words = weights[part + "word_embeddings.weight"].float()
    config = BertConfig(
        vocab_size=len(words), hidden_size=384, max_position_embeddings=512, layer_norm_eps=1e-12
    )
    theirs = BertEmbeddings(config).eval()
    theirs.load_state_dict(
        {name.removeprefix(part): w.float() for name, w in weights.items() if name.startswith(part)},
        strict=False,
    )
    ours = LearnedPositions(512, 384)
    ours.load_state_dict({"table.weight": weights[part + "position_embeddings.weight"].float()})
    ids = torch.randint(len(words), (2, 512), generator=torch.Generator().manual_seed(0))
    kind = weights[part + "token_type_embeddings.weight"].float()[
        0
    ]  # BERT adds it to every token of one sentence
    x = ours.embed(words[ids], torch.arange(512)[None]) + kind
    with torch.no_grad():
        assert_close(theirs.LayerNorm(x), theirs(ids), atol=1e-5, rtol=1e-5)
        shifted = ours.embed(words[ids], torch.arange(512)[None].roll(1, -1)) + kind
        assert (theirs.LayerNorm(shifted) - theirs(ids)).abs().max() > 1e-2


def test_rotation_is_multiplication_by_a_complex_number():
    x, at = randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 7, 30], [5, 4, 3, 2, 1]])
    turned = RotaryPositions(8, base=100.0, length=31).rotate(x, at)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = at[:, None, :, None].double() * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1).float(), atol=1e-5, rtol=1e-5)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_scores_depend_on_the_distance_alone(m, n, shift):
    scheme = RotaryPositions(8, length=121)
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)

    def score(i, j):
        return (scheme.rotate(q, torch.tensor([[i]])) * scheme.rotate(k, torch.tensor([[j]]))).sum()

    assert_close(score(m, n), score(m + shift, n + shift), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_at_all():
    scheme = RotaryPositions(8, length=9)
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)
    scores = [(scheme.rotate(q, torch.tensor([[p]])) * k).sum().item() for p in range(9)]
    assert max(scores) - min(scores) > 0.5


def test_rotation_keeps_lengths_and_dtype_and_padding_is_finite():
    scheme, x = RotaryPositions(8, length=9), randn(1, 2, 3, 8)
    turned = scheme.rotate(x, torch.tensor([[-1, 4, 8]]))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert scheme.rotate(x.bfloat16(), torch.tensor([[-1, 4, 8]])).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_table_stays_float32_and_unrounded(dtype):
    scheme = RotaryPositions(8, length=9)
    before = scheme.table.clone()
    scheme.to(dtype)
    assert scheme.table.dtype == torch.float32
    assert torch.equal(scheme.table, before)


@LAYOUTS
def test_apply_rotary_is_a_complex_product_written_out(layout):
    x, at = randn(2, 3, 5, 6).double(), [0, 1, 4, -1, 30]
    turned = apply_rotary(x, torch.tensor(at), base=50.0, layout=layout)
    for t, position in enumerate(at):
        for j in range(3):
            first, second = (j, j + 3) if layout == "half" else (2 * j, 2 * j + 1)
            turn = cmath.exp(1j * position * 50.0 ** (-2 * j / 6))
            for before, after in zip(x[:, :, t].reshape(-1, 6), turned[:, :, t].reshape(-1, 6), strict=True):
                wanted = complex(before[first], before[second]) * turn
                assert complex(after[first], after[second]) == pytest.approx(wanted, abs=1e-12)


@LAYOUTS
@pytest.mark.parametrize("rotary_dim", [None, 2, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_rotary_is_the_readable_one(layout, rotary_dim, dtype):
    x, at = randn(2, 3, 5, 8).to(dtype), torch.tensor([[0, 1, 2, 7, 30], [5, 4, 3, 2, 1]])
    fast = RotaryPositions(8, base=100.0, length=31, layout=layout, rotary_dim=rotary_dim).rotate(x, at)
    d = 8 if rotary_dim is None else rotary_dim
    readable = apply_rotary(x[..., :d], at[:, None], base=100.0, layout=layout)
    rough = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 2e-2}
    assert fast.dtype == readable.dtype == dtype
    assert_close(fast[..., :d], readable, **rough)
    assert torch.equal(fast[..., d:], x[..., d:])


@LAYOUTS
@given(st.integers(-3000, 3000), st.integers(-3000, 3000), st.integers(-3000, 3000))
def test_turned_products_depend_on_the_distance_alone(layout, m, n, shift):
    q, k = randn(6).double()[None], randn(6, seed=1).double()[None]

    def score(i, j):
        turned = [apply_rotary(x, torch.tensor([p]), layout=layout) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(m, n), score(m + shift, n + shift), atol=1e-10, rtol=0)


@LAYOUTS
@pytest.mark.parametrize("rotary_dim", [None, 2])
def test_within_the_context_the_look_up_is_made_once(layout, rotary_dim):
    scheme = RotaryPositions(8, length=31, layout=layout, rotary_dim=rotary_dim)
    x, at = randn(2, 3, 5, 8), torch.arange(5)[None]
    wanted = scheme.rotate(x, at)
    with scheme.reused(at, x.dtype):
        table, scheme.table = scheme.table, torch.zeros_like(scheme.table)
        assert torch.equal(scheme.rotate(x, at), wanted)
        assert not torch.equal(scheme.rotate(x, at.clone()), wanted)  # other positions are looked up
    scheme.table = table
    assert torch.equal(scheme.rotate(x, at), wanted)


def test_the_two_layouts_by_hand_and_back():
    x = torch.arange(8.0)
    assert interleaved_to_half(x).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert half_to_interleaved(x).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved_to_half(x, heads=2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    for shape, heads, dim in (((12,), 3, -1), ((2, 8, 3), 2, 1), ((8, 3), 1, 0), ((3, 8), 4, -1)):
        x = randn(*shape)
        assert torch.equal(
            half_to_interleaved(interleaved_to_half(x, heads=heads, dim=dim), heads=heads, dim=dim), x
        )
        assert torch.equal(
            interleaved_to_half(half_to_interleaved(x, heads=heads, dim=dim), heads=heads, dim=dim), x
        )


def test_reordered_features_turn_the_same_in_the_other_layout():
    x, at = randn(2, 3, 5, 8), torch.arange(5)
    turned = apply_rotary(x, at, layout="interleaved")
    assert_close(half_to_interleaved(apply_rotary(interleaved_to_half(x), at)), turned)


def test_reordered_rows_give_the_same_attention_and_the_wrong_layout_does_not():
    """The well-known bug: weights of one layout in a model of the other."""
    ours = randomised(
        MultiHeadAttention(12, 3, kv_heads=1, bias=True, positions=RotaryPositions(4, layout="interleaved"))
    )
    half = MultiHeadAttention(12, 3, kv_heads=1, bias=True, positions=RotaryPositions(4))
    x, state = randn(2, 7, 12), dict(ours.state_dict())
    half.load_state_dict(state)
    assert (half(x) - ours(x)).abs().max() > 1e-2
    for name, heads in (("q", 3), ("k", 1)):
        for part in ("weight", "bias"):
            state[f"{name}.{part}"] = interleaved_to_half(state[f"{name}.{part}"], heads=heads, dim=0)
    half.load_state_dict(state)
    assert_close(half(x), ours(x), atol=1e-6, rtol=1e-5)


def test_partial_rotation_is_that_of_gpt_neox():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(
        hidden_size=24, num_attention_heads=3, max_position_embeddings=32, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = randomised(GPTNeoXAttention(config, layer_idx=0), seed=2)
    ours = MultiHeadAttention(
        24, 3, bias=True, positions=RotaryPositions(8, base=100.0, length=32, rotary_dim=4)
    )
    # Their one matrix holds, head by head, query, key and value rows.
    parts = {
        part: getattr(theirs.query_key_value, part).unflatten(0, (3, 3, 8)).transpose(0, 1)
        for part in ("weight", "bias")
    }
    state = {f"{n}.{part}": parts[part][i].flatten(0, 1) for i, n in enumerate("qkv") for part in parts}
    ours.load_state_dict(state | {f"out.{part}": getattr(theirs.dense, part) for part in parts})
    x, at = randn(2, 7, 24), torch.arange(3, 10)[None]
    hidden = torch.full((1, 1, 7, 7), float("-inf")).triu(1)
    turns = GPTNeoXRotaryEmbedding(config)(x, at)
    expected = theirs(x, attention_mask=hidden, position_embeddings=turns)[0]
    assert_close(ours(x, positions=at), expected, atol=1e-6, rtol=1e-5)
    ours.positions = RotaryPositions(8, base=100.0, length=32)  # all features turned: another model
    assert (ours(x, positions=at) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_interleaved_rotation_is_that_of_gpt_j(rotary_dim):
    from transformers import GPTJConfig
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    config = GPTJConfig(
        n_embd=24, n_head=3, n_positions=32, rotary_dim=rotary_dim, attn_pdrop=0.0, resid_pdrop=0.0
    )
    theirs = randomised(GPTJAttention(config, layer_idx=0), seed=2)
    ours = MultiHeadAttention(
        24, 3, positions=RotaryPositions(8, length=32, layout="interleaved", rotary_dim=rotary_dim)
    )
    ours.load_state_dict({f"{n}.weight": getattr(theirs, f"{n}_proj").weight for n in ("q", "k", "v", "out")})
    x, at = randn(2, 7, 24), torch.arange(3, 10)[None]
    hidden = torch.full((1, 1, 7, 7), float("-inf")).triu(1)
    expected = theirs(x, attention_mask=hidden, position_ids=at)[0]
    assert_close(ours(x, positions=at), expected, atol=1e-6, rtol=1e-5)
    ours.positions = RotaryPositions(8, length=32, rotary_dim=rotary_dim)
    assert (ours(x, positions=at) - expected).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------- ALiBi


def test_slopes_by_hand():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    # Three heads: those of two, then the first of four.
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize("heads", range(1, 34))
def test_slopes_are_those_of_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    assert_close(slopes, theirs, atol=0, rtol=1e-6)
    assert len(set(slopes.tolist())) == heads


def test_the_penalty_grows_with_the_distance_on_both_sides():
    at = torch.tensor([[0, 1, 5]])
    bias = alibi_bias(torch.tensor([0.5, 2.0]), at, at)
    assert bias[0, 0].tolist() == [[0, -0.5, -2.5], [-0.5, 0, -2], [-2.5, -2, 0]]
    assert torch.equal(bias[0, 1], 4 * bias[0, 0])


def test_far_penalties_are_exact_for_queries_of_eight_bits():
    q = randn(1, 8, 1, 4).bfloat16()
    far = AlibiPositions(8).bias(q, torch.tensor([[301]]), torch.tensor([[0, 300, 301]]))
    assert far.dtype == torch.float32
    assert far[0, 0, 0].tolist() == [-150.5, -0.5, 0]  # 301 has no bfloat16


@pytest.mark.parametrize("heads", [3, 4])
def test_attention_with_alibi_is_that_of_bloom(heads):
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    dim = 8 * heads
    config = BloomConfig(hidden_size=dim, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    theirs = randomised(BloomAttention(config, layer_idx=0), seed=2)
    ours = MultiHeadAttention(dim, heads, bias=True, positions=AlibiPositions(heads))
    parts = {
        part: getattr(theirs.query_key_value, part).unflatten(0, (heads, 3, 8)).transpose(0, 1)
        for part in ("weight", "bias")
    }
    state = {f"{n}.{part}": parts[part][i].flatten(0, 1) for i, n in enumerate("qkv") for part in parts}
    ours.load_state_dict(state | {f"out.{part}": getattr(theirs.dense, part) for part in parts})
    x = randn(2, 7, dim)
    # Bloom adds slope times key position: it differs by slope times query position, the same in a whole row.
    alibi = build_alibi_tensor(torch.ones(2, 7, dtype=torch.long), heads, torch.float32)
    hidden = torch.full((1, 1, 7, 7), float("-inf")).triu(1)
    expected = theirs(x, torch.zeros_like(x), alibi, hidden)[0]
    assert_close(ours(x), expected, atol=1e-6, rtol=1e-5)
    ours.positions = PositionScheme()
    assert (ours(x) - expected).abs().max() > 1e-2


# -------------------------------------------------------------------------------- relative positions


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (32, 32), (8, 20), (64, 500), (4, 3)])
def test_buckets_are_those_of_t5(bidirectional, buckets, most):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-3000, 3001).view(-1, 17)
    ours = relative_position_bucket(distance, buckets=buckets, max_distance=most, bidirectional=bidirectional)
    theirs = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=most
    )
    assert torch.equal(ours, theirs)
    assert (ours.min(), ours.max()) == (0, buckets - 1)


def test_buckets_by_hand():
    near = relative_position_bucket(
        torch.tensor([0, -1, -7, -8, -9, -200, 5]), buckets=16, bidirectional=False
    )
    assert near.tolist() == [0, 1, 7, 8, 8, 15, 0]  # keys ahead are in bucket 0
    both = relative_position_bucket(torch.tensor([0, -1, 1, -500, 500]), bidirectional=True)
    assert both.tolist() == [0, 1, 17, 15, 31]
    least = torch.tensor([-128, 127], dtype=torch.int8)
    assert relative_position_bucket(least, bidirectional=False).tolist() == [31, 0]
    assert relative_position_bucket(least, bidirectional=True).tolist() == [15, 31]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_first_layer_of_t5_with_its_bias(kind):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    decodes = kind == "decoder"
    config = T5Config(
        d_model=12, d_kv=5, num_heads=3, dropout_rate=0.0, is_decoder=decodes,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    theirs = randomised(T5Attention(config, has_relative_attention_bias=True, layer_idx=0), seed=3)
    scheme = RelativePositionBias(3, buckets=8, max_distance=20, bidirectional=not decodes)
    ours = MultiHeadAttention(12, 3, head_dim=5, scale=1.0, causal=decodes, positions=scheme)
    state = {f"{n}.weight": getattr(theirs, n[0]).weight for n in ("q", "k", "v", "out")}
    ours.load_state_dict(state | {"positions.table.weight": theirs.relative_attention_bias.weight})
    x = randn(2, 30, 12)
    hidden = torch.full((1, 1, 30, 30), float("-inf")).triu(1) if decodes else torch.zeros(1, 1, 30, 30)
    expected = theirs(x, mask=hidden)[0]
    assert_close(ours(x), expected, atol=1e-6, rtol=1e-5)
    if not decodes:
        return
    cache = KVCache(1)[0]
    steps = [ours(part, cache=cache) for part in x.split([7, 1, 1, 21], dim=1)]
    assert_close(torch.cat(steps, dim=1), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["q.weight", "positions.table.weight"])
def test_the_table_and_the_missing_scale_matter(name):
    scheme = RelativePositionBias(3, buckets=8, max_distance=20, bidirectional=False)
    ours = randomised(MultiHeadAttention(12, 3, head_dim=5, scale=1.0, positions=scheme))
    x, before = randn(2, 9, 12), None
    before = ours(x)
    ours.scale = None
    assert (ours(x) - before).abs().max() > 1e-2
    ours.scale = 1.0
    ours.get_parameter(name).data.zero_()
    assert (ours(x) - before).abs().max() > 1e-2


def slow_shaw(q, k, v, key_table, value_table, mask):
    """One query, one key at a time."""
    most, out = key_table.shape[0] // 2, torch.zeros(q.shape[0], v.shape[1], dtype=q.dtype)
    for i in range(q.shape[0]):
        place = i + k.shape[0] - q.shape[0]
        row = [min(max(j - place, -most), most) + most for j in range(k.shape[0])]
        scores = [(q[i] @ (k[j] + key_table[row[j]])) / math.sqrt(q.shape[1]) for j in range(k.shape[0])]
        scores = [score if mask[i, j] else torch.tensor(-math.inf) for j, score in enumerate(scores)]
        weights = torch.stack(scores).softmax(0)
        out[i] = sum(weights[j] * (v[j] + value_table[row[j]]) for j in range(k.shape[0]))
    return out


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_shaw_is_its_equations_written_out(queries, keys, causal):
    q, k, v = (randn(n, d, seed=i).double() for i, (n, d) in enumerate([(queries, 4), (keys, 4), (keys, 3)]))
    tables = randn(7, 4, seed=4).double(), randn(7, 3, seed=5).double()
    mask = causal_mask(queries, keys) if causal else torch.ones(queries, keys, dtype=torch.bool)
    assert_close(relative_attention(q, k, v, *tables, mask=mask), slow_shaw(q, k, v, *tables, mask))
    zero = torch.zeros(7, 3, dtype=torch.float64)
    assert_close(relative_attention(q, k, v, tables[0], mask=mask), slow_shaw(q, k, v, tables[0], zero, mask))


def test_shaw_of_zero_tables_is_plain_attention_and_an_empty_row_is_zero():
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 5, 4, seed=1), randn(2, 3, 5, 6, seed=2)
    mask = causal_mask(5).clone()
    mask[2] = False
    plain = scaled_dot_product_attention(q, k, v, mask=mask)
    assert_close(relative_attention(q, k, v, torch.zeros(3, 4), torch.zeros(3, 6), mask=mask), plain)
    assert torch.equal(plain[:, :, 2], torch.zeros(2, 3, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scheme_of_shaw_is_the_readable_form_without_values(dtype):
    scheme = randomised(ShawPositions(4, max_distance=3)).to(dtype)
    q, k, v = (randn(2, 3, 9, 4, seed=i).to(dtype) for i in range(3))
    at, mask = torch.arange(9)[None], causal_mask(9)
    bias = scheme.bias(q, at, at)
    assert bias.dtype == dtype
    ours = scaled_dot_product_attention(q, k, v, mask=mask, bias=bias)
    rough = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2e-2}
    assert_close(ours, relative_attention(q, k, v, scheme.table.weight, mask=mask), **rough)
    # Products are taken in float32 and rounded once.
    wide = ShawPositions(8, max_distance=3)
    wide.table.weight.data = randn(7, 8, seed=5).bfloat16().float()
    narrow = ShawPositions(8, max_distance=3).bfloat16()
    narrow.load_state_dict(wide.state_dict())
    q8 = randn(2, 3, 9, 8, seed=6).bfloat16()
    assert torch.equal(narrow.bias(q8, at, at), wide.bias(q8.float(), at, at).bfloat16())
    # In a batch whose rows stand at different places, and with one query that all rows share.
    apart = scheme.bias(q[:1], torch.stack([at[0], at[0] + 1]), at)
    assert_close(apart[0], bias[0])
    assert_close(apart[1, :, :, 1:], scheme.bias(q[:1], at, at - 1)[0, :, :, 1:])


def test_gradients_reach_the_learnt_tables_at_the_distances_that_occur():
    q, at = randn(1, 2, 4, 3), torch.arange(4)[None]
    mask = causal_mask(4)
    for scheme, used in (
        (RelativePositionBias(2, buckets=8, max_distance=20, bidirectional=False), [0, 1, 2, 3]),
        (ShawPositions(3, max_distance=2), [0, 1, 2]),
    ):
        weights = scaled_dot_product_attention(q, q, q, mask=mask, bias=scheme.bias(q, at, at))
        weights.square().sum().backward()
        grown = scheme.table.weight.grad.abs().sum(1) > 0
        assert grown.nonzero().flatten().tolist() == used


SCHEMES = {
    "sinusoidal": lambda: SinusoidalPositions(8),
    "learned": lambda: LearnedPositions(20, 8),
    "rotary": lambda: RotaryPositions(8, length=20),
    "rotary, interleaved and partial": lambda: RotaryPositions(
        8, length=20, layout="interleaved", rotary_dim=4
    ),
    "alibi": lambda: AlibiPositions(3),
    "t5": lambda: RelativePositionBias(3, bidirectional=False),
    "t5, both ways": lambda: RelativePositionBias(3, bidirectional=True),
    "shaw": lambda: ShawPositions(8, max_distance=4),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_padding_gets_finite_numbers_and_changes_no_other(name):
    scheme = randomised(SCHEMES[name]())
    q, x = randn(2, 3, 5, 8), randn(2, 5, 8, seed=1)
    plain, padded = torch.arange(5)[None].expand(2, -1), torch.tensor([[-1, -1, 2, 3, 4], [0, 1, 2, 3, 4]])
    for act in (scheme.embed, scheme.rotate):
        tokens = x if act == scheme.embed else q
        out = act(tokens, padded)
        assert torch.isfinite(out).all()
        assert torch.equal(out[..., 2:, :], act(tokens, plain)[..., 2:, :])
    bias = scheme.bias(q, padded, padded)
    if bias is not None:
        assert bias.shape == (2, 3, 5, 5)
        assert torch.isfinite(bias).all()
        assert_close(bias[:, :, 2:, 2:], scheme.bias(q, plain, plain).expand(2, -1, -1, -1)[:, :, 2:, 2:])


@pytest.mark.parametrize("name", ["alibi", "t5", "t5, both ways", "shaw"])
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 500))
def test_biases_depend_on_the_distance_alone(name, i, j, shift):
    scheme, q = randomised(SCHEMES[name]()), randn(1, 3, 1, 8)
    here, there = (scheme.bias(q, torch.tensor([[i + s]]), torch.tensor([[j + s]])) for s in (0, shift))
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", ["alibi", "t5", "t5, both ways", "shaw"])
def test_biases_differ_between_distances(name):
    scheme, q = randomised(SCHEMES[name]()), randn(1, 3, 1, 8)
    bias = scheme.bias(q, torch.tensor([[9]]), torch.arange(10)[None])
    near = bias[0, :, 0, 6:]  # within every limit
    assert (near.diff(dim=-1).abs() > 1e-3).all()


def test_only_shaw_reads_the_query():
    at = torch.arange(4)[None]
    for name in ("alibi", "t5", "shaw"):
        scheme = randomised(SCHEMES[name]())
        same = torch.equal(
            scheme.bias(randn(1, 3, 4, 8), at, at), scheme.bias(randn(1, 3, 4, 8, seed=1), at, at)
        )
        assert same == (name != "shaw")


CONFIG = DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_of_a_built_model_is_real_and_float32(dtype):
    model = Decoder(CONFIG)
    twin = build(CONFIG, {n: p.detach().to(dtype) for n, p in model.named_parameters()}, Decoder)
    tables = [m.table for m in twin.modules() if isinstance(m, RotaryPositions)]
    assert tables
    for table in tables:
        assert table.device.type == "cpu"
        assert torch.equal(table, model.blocks[0].mixer.sublayer.positions.table)


@settings(max_examples=20)
@given(st.permutations(range(7)))
def test_without_positions_a_transformer_is_permutation_equivariant(order):
    model = decoder("none")
    ids, everything = torch.arange(7)[None] + 2, torch.ones(1, 1, 7, 7, dtype=torch.bool)
    assert_close(
        model(ids[:, order], mask=everything), model(ids, mask=everything)[:, order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "alibi", "t5", "shaw"])
def test_with_positions_it_is_not(positions):
    model = decoder(positions)
    ids, everything = torch.arange(7)[None] + 2, torch.ones(1, 1, 7, 7, dtype=torch.bool)
    order = [1, 0, 2, 3, 4, 5, 6]
    moved = model(ids[:, order], mask=everything) - model(ids, mask=everything)[:, order]
    assert moved.abs().max() > 1e-2


def test_without_positions_the_causal_mask_breaks_the_symmetry():
    model, ids = decoder("none"), torch.arange(7)[None] + 2
    order = [1, 0, 2, 3, 4, 5, 6]
    moved = model(ids[:, order]) - model(ids)[:, order]
    assert moved[:, :2].abs().max() > 1e-2
    # What a later token sees of the two is a set in the first block, and no longer one in the second.
    assert moved[:, 2:].abs().max() > 1e-2
    # But a text of one token repeated is the same everywhere: a mean of equal values tells nothing of their number.
    same = model(torch.full((1, 7), 3))
    assert_close(same, same[:, :1].expand_as(same), atol=1e-5, rtol=1e-5)


def test_layers_without_positions_turn_nothing_and_the_others_share_one_table():
    sizes = {"vocab": 11, "dim": 8, "layers": 3, "heads": 2, "hidden": 12, "context": 16}
    for positions, kind in (
        ("rotary", RotaryPositions),
        ("t5", RelativePositionBias),
        ("alibi", AlibiPositions),
    ):
        model = Decoder(DecoderConfig(**sizes, positions=positions, nope_layers=(1,)))
        schemes = [block.mixer.sublayer.positions for block in model.blocks]
        assert schemes[0] is schemes[2]
        assert [type(scheme) for scheme in schemes] == [kind, PositionScheme, kind]
    every = Decoder(DecoderConfig(**sizes, nope_layers=(0, 1, 2)))
    none = Decoder(DecoderConfig(**sizes, positions="none"))
    none.load_state_dict(every.state_dict())
    ids = torch.arange(7)[None]
    assert torch.equal(none(ids), every(ids))


@pytest.mark.parametrize("positions", ["t5", "shaw"])
def test_a_table_that_layers_share_is_built_once(positions):
    config = DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, positions=positions)
    model = randomised(Decoder(config))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert [name for name in weights if "table" in name] == ["attention_positions.table.weight"]
    twin, ids = build(config, weights, Decoder), torch.arange(7)[None]
    assert torch.equal(twin(ids), model(ids))
    tables = {id(p) for name, p in twin.named_parameters(remove_duplicate=False) if "table" in name}
    assert len(tables) == 1


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 1.0 if parameter.dim() < 2 else parameter.shape[1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module.eval()


def decoder(positions: str) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    model = Decoder(
        DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, positions=positions)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def test_no_positions_do_nothing():
    x, at = randn(1, 2, 3, 4), torch.arange(3)[None]
    assert NoPositions is PositionScheme
    assert NoPositions().rotate(x, at) is x
    tokens = x[0]
    assert NoPositions().embed(tokens, at) is tokens
    assert NoPositions().bias(x, at, at) is None
