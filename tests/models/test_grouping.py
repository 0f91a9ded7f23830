"""Heads into groups: the arithmetic of the mean, and what a whole model computes afterwards."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig, LatentConfig, LinearConfig
from llm_atlas.models.grouping import group_kv_heads, pool_heads
from llm_atlas.recipes import initialize

CONFIG = DecoderConfig(
    vocab=31, dim=24, layers=2, heads=6, hidden=32, context=32, attention_bias=True, qk_norm=True
)
IDS = torch.randint(31, (2, 9), generator=generator(0))


def model(**changes) -> Decoder:
    made = Decoder(dataclasses.replace(CONFIG, **changes))
    initialize(made, generator(1))
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() == 1:
                p.normal_(generator=generator(2))
    return made.eval()


@pytest.mark.parametrize("shape", [(12, 5), (12,), (12, 2, 3)])
def test_a_group_is_the_mean_of_neighbours(shape):
    weight = torch.randn(shape, generator=generator(3))
    pooled = pool_heads(weight, 6, 2)  # heads of 2 rows, groups of 3 heads
    for group in range(2):
        for row in range(2):
            wanted = sum(weight[6 * group + 2 * member + row] for member in range(3)) / 3
            assert_close(pooled[2 * group + row], wanted)


def test_other_ways_to_pool():
    weight = torch.randn(12, 5, generator=generator(3))
    assert torch.equal(pool_heads(weight, 6, 2, how="first"), weight[[0, 1, 6, 7]])
    drawn = pool_heads(weight, 6, 2, how="random", generator=generator(0))
    assert torch.equal(drawn, pool_heads(weight, 6, 2, how="random", generator=generator(0)))
    assert not torch.equal(drawn, pool_heads(weight, 6, 2, how="random", generator=generator(1)))
    large = pool_heads(
        torch.randn(400, 50, generator=generator(4)) * 7, 4, 2, how="random", generator=generator(0)
    )
    assert float(large.std()) == pytest.approx(7, rel=0.02)


def test_as_many_groups_as_heads_change_nothing():
    full = model()
    assert torch.equal(group_kv_heads(full, 6)(IDS), full(IDS))


@pytest.mark.parametrize(("have", "want"), [(6, 3), (6, 2), (6, 1), (2, 1)])
def test_equal_heads_can_be_shared_without_loss(have, want):
    """Where the heads of a group are copies of each other, grouping is exact: all other weights were kept."""
    full = model(kv_heads=have)
    size = have // want
    with torch.no_grad():
        for name, p in full.named_parameters():
            if ".sublayer.k." in name or ".sublayer.v." in name:
                heads = p.unflatten(0, (want, size, -1))
                heads.copy_(heads[:, :1].expand_as(heads))
    grouped = group_kv_heads(full, want)
    assert grouped.config.kv_heads == want
    assert_close(grouped(IDS), full(IDS), atol=1e-5, rtol=1e-5)
    for how in ("first", "mean"):
        assert_close(group_kv_heads(full, want, how=how)(IDS), full(IDS), atol=1e-5, rtol=1e-5)


def test_the_original_is_left_alone_and_the_copy_trains_apart():
    full = model()
    before = {name: p.clone() for name, p in full.named_parameters()}
    grouped = group_kv_heads(full.train(), 2)
    assert grouped.training
    grouped(IDS).sum().backward()
    with torch.no_grad():
        for p in grouped.parameters():
            p.add_(1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in full.named_parameters())


def test_it_follows_the_dtype():
    assert group_kv_heads(model().to(torch.bfloat16), 2).embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pool_heads(torch.ones(7, 2), 2, 1), "7 rows do not divide into 2 heads"),
        (lambda: pool_heads(torch.ones(8, 2), 4, 3), "4 heads do not divide into 3 groups"),
        (lambda: pool_heads(torch.ones(8, 2), 4, 0), "4 heads do not divide into 0 groups"),
        (lambda: pool_heads(torch.ones(8, 2), 4, 2, how="random"), "'random' needs a generator"),
        (lambda: group_kv_heads(model(), 4), "6 heads must divide into groups over 4"),
        (
            lambda: group_kv_heads(model(latent=LatentConfig(kv_rank=4, rope_dim=2), qk_norm=False), 1),
            "only softmax",
        ),
        (lambda: group_kv_heads(model(linear=LinearConfig(), qk_norm=False), 1), "only softmax"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.untyped
def test_an_unknown_way_is_named():
    with pytest.raises(ValueError, match=r"^how 'max' is not one of mean, first, random$"):
        pool_heads(torch.ones(8, 2), 4, 2, how="max")
