"""Positions: closed forms, relative properties, and what a model can tell without them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import build
from llm_atlas.nn.positions import (
    LearnedPositions,
    NoPositions,
    PositionScheme,
    RotaryPositions,
    SinusoidalPositions,
    sinusoidal_positions,
)


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


def test_learned_positions_are_rows_of_the_table_and_padding_is_finite():
    scheme = LearnedPositions(7, 4)
    x, at = randn(2, 3, 4), torch.tensor([[4, 5, 6], [-1, 0, 1]])
    out = scheme.embed(x, at)
    assert_close(out[0], x[0] + scheme.table.weight[4:])
    assert_close(out[1, 1:], x[1, 1:] + scheme.table.weight[:2])
    assert torch.isfinite(out).all()


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


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_with_positions_it_is_not(positions):
    model = decoder(positions)
    ids, everything = torch.arange(7)[None] + 2, torch.ones(1, 1, 7, 7, dtype=torch.bool)
    order = [1, 0, 2, 3, 4, 5, 6]
    moved = model(ids[:, order], mask=everything) - model(ids, mask=everything)[:, order]
    assert moved.abs().max() > 1e-2


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
