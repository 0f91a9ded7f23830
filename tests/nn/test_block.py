"""Residual stream: where the norms stand, and what an empty branch leaves."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.block import Block, Residual
from llm_atlas.nn.feedforward import FeedForward
from llm_atlas.nn.norm import LayerNorm, RMSNorm


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm() -> RMSNorm:
    """A norm unlike any other made here, so that exchanged norms are seen."""
    made = RMSNorm(8)
    made.weight.data = torch.rand(8, generator=norm.generator) + 0.5
    return made


norm.generator = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_placement_is_its_equation(placement):
    part = Residual(nn.Linear(8, 8), norm, placement=placement)
    x, f = randn(2, 3, 8), part.sublayer
    expected = {
        "pre": lambda: x + f(part.norm(x)),
        "post": lambda: part.norm(x + f(x)),
        "sandwich": lambda: x + part.norm_after(f(part.norm(x))),
    }[placement]()
    assert_close(part(x), expected)


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_a_zero_branch_is_the_identity_to_the_last_bit(placement):
    block = Block(MultiHeadAttention(8, 2), FeedForward(8), norm, placement=placement)
    for last in (block.mixer.sublayer.out, block.feedforward.sublayer.down):
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    x = randn(2, 5, 8).requires_grad_()
    out = block(x)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_zero_branch_behind_a_post_norm_is_the_norm():
    part = Residual(nn.Linear(8, 8), norm, placement="post")
    for parameter in part.sublayer.parameters():
        nn.init.zeros_(parameter)
    x = randn(2, 5, 8)
    assert_close(part(x), part.norm(x))


def test_gradients_of_a_block():
    block = Block(MultiHeadAttention(4, 2), FeedForward(4, activation="gelu"), lambda: LayerNorm(4)).double()
    torch.autograd.gradcheck(block, (randn(1, 3, 4).double().requires_grad_(),))


def test_post_norm_block_is_torch_transformer_encoder_layer():
    theirs = nn.TransformerEncoderLayer(8, 2, 20, dropout=0.0, batch_first=True)
    ours = Block(
        MultiHeadAttention(8, 2, causal=False, bias=True),
        FeedForward(8, 20),
        lambda: LayerNorm(8),
        placement="post",
    )
    copy_self_attention(ours, theirs)
    ours.feedforward.norm.load_state_dict(theirs.norm2.state_dict())
    x = randn(2, 5, 8)
    assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_block_with_cross_attention_is_torch_transformer_decoder_layer():
    theirs = nn.TransformerDecoderLayer(8, 2, 20, dropout=0.0, batch_first=True, norm_first=True)
    cross = MultiHeadAttention(8, 2, bias=True)
    ours = Block(MultiHeadAttention(8, 2, bias=True), FeedForward(8, 20), lambda: LayerNorm(8), cross=cross)
    copy_self_attention(ours, theirs)
    copy_attention(cross, theirs.multihead_attn)
    ours.cross.norm.load_state_dict(theirs.norm2.state_dict())
    ours.feedforward.norm.load_state_dict(theirs.norm3.state_dict())
    x, context = randn(2, 5, 8), randn(2, 6, 8, seed=1)
    seen = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(
        x,
        context,
        tgt_mask=causal,
        memory_key_padding_mask=torch.zeros(2, 6).masked_fill(~seen, float("-inf")),
    )
    assert_close(ours(x, context=context, context_mask=seen[:, None, None]), expected, atol=1e-6, rtol=1e-5)


def copy_attention(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> None:
    nn.init.normal_(theirs.in_proj_bias, generator=norm.generator)
    for part, weight, bias in zip(
        (ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
    ):
        part.load_state_dict({"weight": weight, "bias": bias})
    ours.out.load_state_dict(theirs.out_proj.state_dict())


def copy_self_attention(ours: Block, theirs: nn.Module) -> None:
    for scale in (theirs.norm1.weight, theirs.norm2.weight):
        nn.init.normal_(scale, generator=norm.generator)
    copy_attention(ours.mixer.sublayer, theirs.self_attn)
    ours.mixer.norm.load_state_dict(theirs.norm1.state_dict())
    ours.feedforward.sublayer.up.load_state_dict(theirs.linear1.state_dict())
    ours.feedforward.sublayer.down.load_state_dict(theirs.linear2.state_dict())
