"""Dropout: the statistics of its masks, what draws them, what the gradient sees, and where a Decoder drops."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.dropout import Dropout, dropout, seed_dropout

RATES = [0.01, 0.1, 0.25, 0.5, 0.9]
SIZES = {"vocab": 11, "dim": 8, "layers": 2, "heads": 2, "hidden": 12, "context": 6}


def within(count: int, n: int, share: float, deviations: float = 4.5) -> bool:
    """Whether a count of n draws lies where one in 150,000 fair ones does not."""
    return abs(count - n * share) <= deviations * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("p", RATES)
def test_share_mean_and_variance(p):
    n = 200_000
    y = dropout(torch.full((n,), 3.0), p, generator=generator(0))
    assert within(int((y == 0).sum()), n, p)
    assert_close(y[y != 0].unique(), torch.tensor([3 / (1 - p)]))
    variance = 9 * p / (1 - p)
    assert abs(y.double().mean() - 3) <= 4.5 * math.sqrt(variance / n)
    assert float(y.double().var()) == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("p", RATES)
def test_counts_are_binomial(p):
    """Chi-square over 4000 groups of 25: what is dropped of each must spread as Bernoulli draws do."""
    groups, size = 4000, 25
    dropped = (dropout(torch.ones(groups, size), p, generator=generator(1)) == 0).sum(-1)
    expected = [groups * math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
    # Bins with fewer than 10 expected are joined with their neighbours.
    observed = torch.bincount(dropped, minlength=size + 1).tolist()
    bins = [[0.0, 0.0]]
    for seen, wanted in zip(observed, expected, strict=True):
        if bins[-1][1] >= 10:
            bins.append([0.0, 0.0])
        bins[-1][0] += seen
        bins[-1][1] += wanted
    if bins[-1][1] < 10:
        last = bins.pop()
        bins[-1] = [bins[-1][0] + last[0], bins[-1][1] + last[1]]
    chi = sum((seen - wanted) ** 2 / wanted for seen, wanted in bins)
    freedom = len(bins) - 1
    assert freedom >= 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_mask_is_shared_along_an_axis(axis):
    p, shape = 0.3, (40, 50, 60)
    dropped = dropout(torch.ones(shape), p, generator=generator(2)) == 0
    first, second = dropped.narrow(axis, 0, shape[axis] - 1), dropped.narrow(axis, 1, shape[axis] - 1)
    both = int((first & second).sum())
    assert within(both, first.numel(), p * p, deviations=6)  # neighbours agree no more than chance has them
    shares = dropped.double().mean(dim=axis)
    assert shares.unique().numel() > 5
    assert float(shares.var()) == pytest.approx(p * (1 - p) / shape[axis], rel=0.15)


@pytest.mark.parametrize("p", RATES)
def test_statistics_are_those_of_torch(p):
    n, x = 100_000, torch.ones(100_000)
    ours = dropout(x, p, generator=generator(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = nn.functional.dropout(x, p)
    assert not torch.equal(ours, theirs)  # another use of the random numbers, so other masks
    deviation = math.sqrt(2 * n * p * (1 - p))
    assert abs(int((ours == 0).sum()) - int((theirs == 0).sum())) <= 4.5 * deviation
    assert_close(ours[ours != 0].unique(), theirs[theirs != 0].unique())


def test_the_generator_alone_decides():
    x = torch.ones(1000)
    first = dropout(x, 0.5, generator=generator(0))
    torch.rand(7)
    rng = generator(0)
    assert torch.equal(first, dropout(x, 0.5, generator=rng))
    assert not torch.equal(first, dropout(x, 0.5, generator=rng))  # each call draws on
    assert not torch.equal(first, dropout(x, 0.5, generator=generator(1)))
    before = torch.random.get_rng_state()
    dropout(x, 0.5, generator=rng)
    assert torch.equal(before, torch.random.get_rng_state())
    dropout(x, 0.5)
    assert not torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("how", [{"training": False}, {"p": 0.0}, {"p": 0}])
def test_nothing_to_drop_is_the_same_tensor_and_draws_nothing(how):
    x, rng = torch.randn(5, generator=generator(0)), generator(0)
    state = rng.get_state()
    assert dropout(x, how.get("p", 0.5), training=how.get("training", True), generator=rng) is x
    assert torch.equal(state, rng.get_state())


def test_the_gradient_has_the_same_mask():
    x = torch.randn(50, generator=generator(1)).requires_grad_()
    y = dropout(x, 0.4, generator=generator(0))
    y.backward(torch.full((50,), 2.0))
    kept = y.detach() != 0
    assert 0 < int(kept.sum()) < 50
    assert_close(x.grad, kept * 2 / 0.6)


def test_gradcheck():
    x = torch.randn(4, 3, generator=generator(1)).double().requires_grad_()
    torch.autograd.gradcheck(lambda x: dropout(x, 0.4, generator=generator(0)), x)


@given(p=st.floats(0.0, 0.999), shape=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0, 1000))
def test_every_element_is_dropped_or_scaled(p, shape, seed):
    x = torch.rand(shape, generator=generator(seed)) + 1
    y = dropout(x, p, generator=generator(seed))
    assert y.shape == x.shape
    assert_close(y, torch.where(y == 0, 0.0, x / (1 - p)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x = torch.ones(100_000, dtype=dtype)
    y = dropout(x, 0.1, generator=generator(0))
    assert y.dtype == dtype
    assert torch.equal(y == 0, dropout(x.float(), 0.1, generator=generator(0)) == 0)
    assert within(int((y == 0).sum()), len(x), 0.1)


def test_an_infinite_feature_can_be_dropped():
    y = dropout(torch.full((100,), math.inf), 0.5, generator=generator(0))
    assert not y.isnan().any()
    assert int((y == 0).sum()) > 20


@pytest.mark.parametrize("p", [1, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_a_rate_outside_is_named(p):
    for make in (lambda: dropout(torch.ones(3), p), lambda: Dropout(p)):
        with pytest.raises(ValueError, match=f"^p {p} must be at least 0 and below 1$"):
            make()
    with pytest.raises(ValueError, match=f"^p {p} must be at least 0 and below 1$"):
        dropout(torch.ones(3), p, training=False)


def test_the_module_follows_its_mode():
    layer, x = Dropout(0.5, generator=generator(0)), torch.ones(1000)
    assert torch.equal(layer(x), dropout(x, 0.5, generator=generator(0)))
    assert layer.eval()(x) is x
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert "p=0.5" in repr(layer)


# ------------------------------------------------------------------------------------------- in a Decoder


def make(**change) -> Decoder:
    model = Decoder(DecoderConfig(**SIZES | change))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=make.generator)
    return model


make.generator = generator(5)
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def test_a_decoder_without_dropout_has_no_module_for_it():
    plain, dropping = make(), make(dropout=0.1)
    assert not [m for m in plain.modules() if isinstance(m, Dropout)]
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    assert "ropout" not in repr(plain)
    # on the embeddings, and on the two sublayers of both blocks
    assert len([m for m in dropping.modules() if isinstance(m, Dropout)]) == 5


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_in_eval_mode_a_decoder_with_dropout_is_the_one_without(placement):
    plain, dropping = make(placement=placement), make(placement=placement, dropout=0.3)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping.eval()(IDS), plain.eval()(IDS))
    assert not torch.allclose(dropping.train()(IDS), plain(IDS))


def test_one_generator_for_a_whole_model():
    model = make(dropout=0.3)
    rng = generator(0)
    assert seed_dropout(model, rng) == 5
    first = model(IDS)
    before = torch.random.get_rng_state()
    assert not torch.equal(model(IDS), first)
    assert torch.equal(before, torch.random.get_rng_state())
    seed_dropout(model, generator(0))
    assert torch.equal(model(IDS), first)
    assert seed_dropout(model, None) == 5
    model(IDS)
    assert not torch.equal(before, torch.random.get_rng_state())
    assert seed_dropout(make(), rng) == 0


def test_a_copy_draws_for_itself():
    model = make(dropout=0.3)
    seed_dropout(model, generator(0))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))


def test_embeddings_are_dropped_after_their_positions():
    model = make(dropout=0.5, positions="learned", layers=1)
    seed_dropout(model, generator(0))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS)
    sums = model.embed(IDS) + model.positions.embed(torch.zeros(1, 5, 8), torch.arange(5)[None])
    assert_close(seen[0], dropout(sums, 0.5, generator=generator(0)))


def test_config_names_a_wrong_rate():
    for p in (1.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=f"^dropout {p} must be at least 0 and below 1$"):
            DecoderConfig(**SIZES, dropout=p)
