"""The Encoder's promises: padding is not seen, order is, every token sees all; its pools, heads and messages."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llm_atlas.models.encoder import (
    Encoder,
    EncoderConfig,
    check_keep,
    cls_pool,
    mean_pool,
    unit_length,
)
from llm_atlas.models.inputs import check_ids
from llm_atlas.nn.masks import PAD, left_pad
from llm_atlas.nn.norm import LayerNorm

SIZES = {"dim": 16, "layers": 2, "heads": 4, "hidden": 24, "context": 12}
BERT = EncoderConfig(**SIZES, vocab=31, token_types=2, pooler=True, masked_lm=True)
T5 = EncoderConfig(
    **SIZES, vocab=31, head_dim=5, activation="gelu_tanh", gated=True, bias=False, norm="rms", norm_eps=1e-6,
    placement="pre", positions="t5", relative_buckets=8, relative_distance=10, attention_scale=1.0, embed_norm=False,
)  # fmt: skip
PATCHES = EncoderConfig(**SIZES, norm_eps=1e-6, placement="pre", embed_norm=False)
CONFIGS = {
    "bert": BERT,
    "t5": T5,
    "sinusoidal": dataclasses.replace(T5, positions="sinusoidal", placement="sandwich", embed_scale=4.0),
    "none": dataclasses.replace(BERT, positions="none", masked_lm=False),
}
ROWS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)


def made(name: str) -> Encoder:
    return randomised(Encoder(CONFIGS[name]))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_padded_batch_is_the_row_alone(name, side):
    model = made(name)
    batch, positions = left_pad(ROWS, pad_id=3)
    if side == "right":
        order = (positions == PAD).long().argsort(dim=1, stable=True)
        batch, positions = batch.gather(1, order), positions.gather(1, order)
        assert positions[1].tolist() == [0, PAD, PAD, PAD, PAD, PAD]
    keep = positions > PAD
    hidden = model.hidden(batch, positions=positions)
    means, firsts = mean_pool(hidden, keep), cls_pool(hidden, keep)
    for index, row in enumerate(ROWS):
        alone = model.hidden(torch.tensor([row]))
        assert_close(hidden[index][keep[index]], alone[0], atol=1e-5, rtol=1e-5)
        assert_close(means[index], alone[0].mean(0), atol=1e-5, rtol=1e-5)
        assert_close(firsts[index], alone[0, 0], atol=1e-5, rtol=1e-5)
        if model.pooler is not None:
            assert_close(model.pool(hidden, keep)[index], model.pool(alone)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_padding_holds_does_not_matter(name):
    model = made(name)
    positions = torch.tensor([[0, 1, 2, PAD, PAD]])
    first = model.hidden(torch.tensor([[5, 6, 7, 0, 0]]), positions=positions)
    second = model.hidden(torch.tensor([[5, 6, 7, 29, 30]]), positions=positions)
    assert torch.equal(first[:, :3], second[:, :3])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_is_seen_by_every_token(name):
    model = made(name)
    row = ids(1, 6)
    before = model.hidden(row)
    for at in range(6):
        changed = row.clone()
        changed[0, at] = (row[0, at] + 1) % 31
        assert ((model.hidden(changed) - before).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_order_matters_but_without_positions(name):
    model, row = made(name), ids(1, 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled, moved = model.hidden(row[:, order]), model.hidden(row)[:, order]
    if name == "none":
        assert_close(shuffled, moved, atol=1e-5, rtol=1e-5)
    else:
        assert (shuffled - moved).abs().max() > 1e-2


def test_a_mask_replaces_the_one_of_positions():
    model, row = made("bert"), ids(2, 5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    whole = model.hidden(row, mask=causal)
    for length in range(1, 5):
        assert_close(whole[:, :length], model.hidden(row[:, :length], mask=causal[..., :length, :length]))
    assert (whole - model.hidden(row)).abs().max() > 1e-2


def test_pre_norm_from_embeddings_is_torchs_encoder():
    # The stack of a vision transformer: what comes in is not tokens.
    model = randomised(Encoder(PATCHES))
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(
        layer, 2, nn.LayerNorm(16, eps=1e-6), enable_nested_tensor=False
    ).requires_grad_(False)
    theirs.norm.load_state_dict(model.norm.state_dict())
    for ours, torchs in zip(model.blocks, theirs.layers, strict=True):
        attention, feedforward = ours.mixer.sublayer, ours.feedforward.sublayer
        stacked = [attention.q, attention.k, attention.v]
        torchs.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in stacked]))
        torchs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in stacked]))
        for mine, of_torch in [
            (attention.out, torchs.self_attn.out_proj),
            (feedforward.up, torchs.linear1),
            (feedforward.down, torchs.linear2),
            (ours.mixer.norm, torchs.norm1),
            (ours.feedforward.norm, torchs.norm2),
        ]:
            of_torch.load_state_dict(mine.state_dict())
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    theirs.train()  # torch's own fast path of evaluation is not what is compared
    expected = theirs(x + model.positions.table.weight[:7])
    assert_close(model.mix(x), expected, atol=1e-5, rtol=1e-5)


def test_token_types_are_zero_unless_given():
    model, row = made("bert"), ids(2, 5)
    types = torch.zeros(2, 5, dtype=torch.long)
    assert_close(model.hidden(row, token_types=types), model.hidden(row))
    types[0, 3:] = 1
    other = model.hidden(row, token_types=types)
    assert (other[0] - model.hidden(row)[0]).abs().max() > 1e-2
    assert_close(other[1], model.hidden(row)[1])


def test_the_head_reads_the_embeddings_by_hand():
    model, row = made("bert"), ids(2, 5)
    hidden, head = model.hidden(row), model.head
    inner = nn.functional.layer_norm(
        nn.functional.gelu(hidden @ head.dense.weight.T + head.dense.bias),
        (16,),
        head.norm.weight,
        head.norm.bias,
        1e-12,
    )
    assert_close(model(row), inner @ model.embed.weight.T + head.bias)


def test_a_masked_token_is_learnt_from_both_sides():
    # "a b a" or "c d c": what is masked in the middle is told by what stands on either side.
    generator = torch.Generator().manual_seed(0)
    config = dataclasses.replace(BERT, vocab=9, token_types=0, pooler=False, layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        left, right = torch.randint(1, 5, (2, 32), generator=generator)
        target = (left + right) % 4 + 5
        row = torch.stack([left, torch.zeros_like(left), right], dim=1)  # 0 is the mask
        loss = nn.functional.cross_entropy(model(row)[:, 1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 1.2
    assert sum(losses[-5:]) / 5 < 0.1


def test_every_parameter_gets_a_gradient():
    for config in CONFIGS.values():
        model = randomised(Encoder(config)).requires_grad_(True)
        hidden = model.hidden(ids(2, 5))
        out = hidden.sum() if config.pooler is False else model.pool(hidden).sum()
        out = out + (model.unembed(hidden).square().sum() if config.masked_lm else hidden.square().sum())
        out.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_the_dtype_is_kept():
    model = made("bert").bfloat16()
    positions = torch.tensor([[0, 1, 2, PAD, PAD]] * 2)
    hidden = model.hidden(ids(2, 5), positions=positions)
    pooled = unit_length(mean_pool(hidden, positions > PAD))
    assert hidden.dtype == pooled.dtype == model(ids(2, 5)).dtype == torch.bfloat16
    assert_close(hidden[:, :3].float(), made("bert").hidden(ids(2, 5)[:, :3]), atol=0.15, rtol=0.1)


def test_dropout_is_drawn_in_training_alone():
    model = randomised(Encoder(dataclasses.replace(BERT, dropout=0.5)))
    assert torch.equal(model.hidden(ids(2, 5)), made("bert").hidden(ids(2, 5)))
    model.train()
    assert (model.hidden(ids(2, 5)) - made("bert").hidden(ids(2, 5))).abs().max() > 0.1


# ------------------------------------------------------------------------------------------- pools


def test_pools_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, float("nan")]], [[5.0, 5.0]] * 3])
    keep = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_pool(hidden, keep).tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert mean_pool(hidden[1:]).tolist() == [[5.0, 5.0]]
    assert cls_pool(hidden)[0].tolist() == [1.0, 2.0]
    assert cls_pool(hidden, torch.tensor([[False, True, True]] * 2))[0].tolist() == [3.0, 6.0]
    assert unit_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [0.6000000238418579, 0.800000011920929],
        [0, 0],
    ]


def test_a_long_bfloat16_mean_is_summed_in_float32():
    hidden = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    assert mean_pool(hidden, torch.ones(1, 3000, dtype=torch.bool)).item() == 1.0  # bfloat16 counts to 256


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers 0 must be at least 1"),
        ({"vocab": 0}, "vocab 0 must be at least 1, or None for no tokens"),
        ({"vocab": None}, "token_types and masked_lm need tokens: vocab is None"),
        ({"token_types": -1}, "token_types -1 must not be negative"),
        ({"heads": 3}, "dim 16 must divide into 3 heads"),
        ({"norm": "batch"}, "norm 'batch' is not one of layer, rms"),
        ({"positions": "rotary"}, "positions 'rotary' is not one of none, sinusoidal, learned, t5"),
        ({"placement": "mid"}, "placement 'mid' is not one of pre, post, sandwich"),
        ({"norm_eps": 0.0}, "norm_eps 0.0 must be positive and finite"),
        ({"embed_scale": float("nan")}, "embed_scale nan must be positive and finite"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and below 1"),
    ],
)
@pytest.mark.untyped
def test_a_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(BERT, **change)


MODEL = made("bert")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODEL(ids(2, 13)), r"13 tokens do not fit the context of 12"),
        (lambda: made("t5").hidden(ids(1, 13)), r"13 tokens do not fit the context of 12"),
        (lambda: MODEL(torch.tensor([[1, 31]])), r"token id 31 is outside the vocabulary of 31"),
        (lambda: MODEL(torch.tensor([[1, -2]])), r"token id -2 is outside the vocabulary of 31"),
        (
            lambda: MODEL(torch.tensor([1, 2])),
            r"ids must have shape \(batch, seq\) with both at least 1, got \(2,\)",
        ),
        (
            lambda: MODEL.hidden(ids(1, 2), token_types=torch.tensor([[0, 2]])),
            r"token type 2 is outside the vocabulary of 2",
        ),
        (
            lambda: MODEL.hidden(ids(1, 2), token_types=torch.tensor([[0, 1, 1]])),
            r"token types have shape \(1, 3\), ids \(1, 2\): they must be equal",
        ),
        (
            lambda: made("t5").hidden(ids(1, 2), token_types=torch.tensor([[0, 1]])),
            r"this encoder has no token types",
        ),
        (
            lambda: MODEL.hidden(ids(1, 2), positions=torch.tensor([[0, 1, 2]])),
            r"positions have shape \(1, 3\), the tokens have \(1, 2\): they must be equal",
        ),
        (lambda: MODEL.hidden(ids(1, 2), positions=torch.tensor([[0, 12]])), r".*12.*"),
        (
            lambda: made("t5")(ids(1, 2)),
            r"this encoder has no language-model head: its configuration has masked_lm=False",
        ),
        (
            lambda: made("t5").pool(torch.zeros(1, 2, 16)),
            r"this encoder has no pooler: its configuration has pooler=False",
        ),
        (
            lambda: Encoder(PATCHES).hidden(ids(1, 2)),
            r"this encoder has no vocabulary: give embeddings to `mix`",
        ),
        (
            lambda: check_keep(torch.zeros(1, 2, 4), torch.ones(1, 3, dtype=torch.bool)),
            r"keep has shape \(1, 3\), the tokens have \(1, 2\): they must be equal",
        ),
    ],
)
@pytest.mark.untyped
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


@pytest.mark.untyped
def test_wrong_kinds_of_numbers_are_named():
    with pytest.raises(TypeError, match=r"^ids must be int64 or int32, got torch.float32$"):
        MODEL(torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"^keep must hold booleans, got torch.int64$"):
        mean_pool(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^ids are on meta, the model is on cpu$"):
        check_ids(torch.zeros(1, 2, dtype=torch.long, device="meta"), nn.Embedding(3, 2))


def test_the_norm_of_embeddings_comes_after_positions():
    model, row = made("bert"), ids(1, 4)
    entered = []
    with model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0])):
        model.hidden(row)
    x = model.embed.weight[row] + model.positions.table.weight[:4] + model.token_types.weight[0]
    assert isinstance(model.embed_norm, LayerNorm)
    assert_close(entered[0], model.embed_norm(x))
