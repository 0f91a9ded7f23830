"""Residual stream: where the norms stand, what an empty branch leaves, and the blocks of BERT, GPT-2 and torch."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llm_atlas.core.seeds import generator
from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.block import Block, Residual
from llm_atlas.nn.dropout import Dropout, dropout
from llm_atlas.nn.feedforward import FeedForward, GatedFeedForward
from llm_atlas.nn.norm import LayerNorm, RMSNorm
from llm_atlas.nn.positions import RotaryPositions


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


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_dropout_acts_on_what_is_added(placement):
    part = Residual(nn.Linear(8, 8), norm, placement=placement, dropout=0.5)
    x, f = randn(2, 3, 8), part.sublayer
    part.dropout.generator = generator(0)

    def drop(branch):
        return dropout(branch, 0.5, training=part.training, generator=generator(0))

    def expected():
        return {
            "pre": lambda: x + drop(f(part.norm(x))),
            "post": lambda: part.norm(x + drop(f(x))),
            "sandwich": lambda: x + drop(part.norm_after(f(part.norm(x)))),
        }[placement]()

    dropped = part(x)
    assert_close(dropped, expected())
    part.eval()
    assert_close(part(x), expected())
    assert not torch.allclose(part(x), dropped)


def test_a_block_drops_in_every_sublayer():
    parts = (MultiHeadAttention(8, 2), FeedForward(8), lambda: LayerNorm(8))
    rates = [m.p for m in Block(*parts, dropout=0.2).modules() if isinstance(m, Dropout)]
    assert rates == [0.2, 0.2]
    block = Block(*parts, dropout=0.2, cross=MultiHeadAttention(8, 2))
    assert len([m for m in block.modules() if isinstance(m, Dropout)]) == 3
    assert not [m for m in Block(*parts).modules() if isinstance(m, Dropout)]


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


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_cross_attention_is_placed_as_the_others(placement):
    parts = MultiHeadAttention(8, 2), FeedForward(8), lambda: LayerNorm(8)
    block = Block(*parts, cross=MultiHeadAttention(8, 2), placement=placement)
    x, context = randn(2, 5, 8), randn(2, 6, 8, seed=1)
    assert {part.placement for part in (block.mixer, block.cross, block.feedforward)} == {placement}
    expected = block.feedforward(block.cross(block.mixer(x), context=context))
    assert_close(block(x, context=context), expected)
    assert isinstance(block.cross.norm_after, nn.Identity) == (placement != "sandwich")


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


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_torch_encoder_layer_norm_first_or_not(placement):
    theirs = nn.TransformerEncoderLayer(
        8, 2, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=placement == "pre"
    )
    randomise(theirs)
    ours = Block(
        MultiHeadAttention(8, 2, causal=False, bias=True),
        FeedForward(8, 20, activation="gelu"),
        lambda: LayerNorm(8),
        placement=placement,
    )
    copy_self_attention(ours, theirs)
    ours.feedforward.norm.load_state_dict(theirs.norm2.state_dict())
    x = randn(2, 5, 8)
    expected = theirs(x)
    assert relative(ours(x), expected) < 1e-5
    other = {"pre": "post", "post": "pre"}[placement]
    ours.mixer.placement = ours.feedforward.placement = other
    assert relative(ours(x), expected) > 0.1


def test_sandwich_is_gemma_2_by_hand():
    """Gemma 2 norms what goes into a sublayer and what comes out of it: four RMSNorms a block."""
    block = Block(
        MultiHeadAttention(8, 2), FeedForward(8, activation="gelu_tanh"), norm, placement="sandwich"
    )
    x = randn(2, 5, 8).double()
    block.double()
    with torch.no_grad():
        scales = {
            name: p for name, p in block.named_parameters() if "norm" in name and name.endswith("weight")
        }
        assert len(scales) == 4

        def rms(v, scale):
            return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scales[scale]

        attended = block.mixer.sublayer(rms(x, "mixer.norm.weight"))
        middle = x + rms(attended, "mixer.norm_after.weight")
        fed = block.feedforward.sublayer(rms(middle, "feedforward.norm.weight"))
        expected = middle + rms(fed, "feedforward.norm_after.weight")
        assert relative(block(x), expected) < 1e-10


def test_sandwich_is_the_layer_of_a_tiny_gemma_2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=None,
        sliding_window=64,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).model.eval()
    randomise(model)
    theirs = model.layers[0]
    ours = Block(
        MultiHeadAttention(8, 2, kv_heads=1, positions=RotaryPositions(4, length=16)),
        GatedFeedForward(8, 20, activation="gelu_tanh"),
        lambda: RMSNorm(8, eps=1e-5),
        placement="sandwich",
    )
    one = {
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    }
    # Gemma stores a scale as its distance from 1.
    state = {name: t + (name.removesuffix(".weight") in one) for name, t in theirs.state_dict().items()}
    names = {
        "mixer.norm": "input_layernorm",
        "mixer.norm_after": "post_attention_layernorm",
        "feedforward.norm": "pre_feedforward_layernorm",
        "feedforward.norm_after": "post_feedforward_layernorm",
        **{f"mixer.sublayer.{part}": f"self_attn.{part}_proj" for part in "qkv"},
        "mixer.sublayer.out": "self_attn.o_proj",
        **{f"feedforward.sublayer.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    }
    wanted = {f"{ours_name}.weight": state[f"{name}.weight"] for ours_name, name in names.items()}
    assert len(wanted) == len(state)  # nothing of theirs is left out
    x, positions = randn(2, 5, 8), torch.arange(5)[None]
    how = {"position_embeddings": model.rotary_emb(x, positions), "position_ids": positions}
    causal = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    out = theirs(x, attention_mask=causal, **how)
    expected = out[0] if isinstance(out, tuple) else out
    agree_and_need_every_tensor(ours, wanted, lambda: ours(x), expected)


def test_post_norm_block_is_the_layer_of_a_tiny_bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    theirs = BertModel(config).eval().encoder.layer[0]
    randomise(theirs)
    ours = Block(
        MultiHeadAttention(8, 2, causal=False, bias=True),
        FeedForward(8, 20, activation="gelu"),
        lambda: LayerNorm(8, eps=1e-12),
        placement="post",
    )
    names = {
        "mixer.sublayer.q": "attention.self.query",
        "mixer.sublayer.k": "attention.self.key",
        "mixer.sublayer.v": "attention.self.value",
        "mixer.sublayer.out": "attention.output.dense",
        "mixer.norm": "attention.output.LayerNorm",
        "feedforward.sublayer.up": "intermediate.dense",
        "feedforward.sublayer.down": "output.dense",
        "feedforward.norm": "output.LayerNorm",
    }
    state = theirs.state_dict()
    wanted = {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    assert len(wanted) == len(state)
    x = randn(2, 5, 8)
    out = theirs(x)
    # A bias on the keys adds the same to a query's scores on all keys: the softmax cannot see it.
    agree_and_need_every_tensor(
        ours,
        wanted,
        lambda: ours(x),
        out[0] if isinstance(out, tuple) else out,
        unseen={"mixer.sublayer.k.bias"},
    )


def test_pre_norm_block_is_the_layer_of_a_tiny_gpt_2():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=11,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_inner=20,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2Model(config).eval().h[0]
    randomise(theirs)
    ours = Block(
        MultiHeadAttention(8, 2, bias=True), FeedForward(8, 20, activation="gelu_tanh"), lambda: LayerNorm(8)
    )
    state = theirs.state_dict()
    wanted = {}
    for a, b in {
        "mixer.norm": "ln_1",
        "feedforward.norm": "ln_2",
        "mixer.sublayer.out": "attn.c_proj",
        "feedforward.sublayer.up": "mlp.c_fc",
        "feedforward.sublayer.down": "mlp.c_proj",
    }.items():
        # GPT-2's Conv1D multiplies by x from the left: its matrices lie transposed.
        weight = state[f"{b}.weight"]
        wanted[f"{a}.weight"] = weight if weight.dim() == 1 else weight.T
        wanted[f"{a}.bias"] = state[f"{b}.bias"]
    for part, weight, bias in zip(
        "qkv", state["attn.c_attn.weight"].T.chunk(3), state["attn.c_attn.bias"].chunk(3), strict=True
    ):
        wanted[f"mixer.sublayer.{part}.weight"], wanted[f"mixer.sublayer.{part}.bias"] = weight, bias
    x = randn(2, 5, 8)
    causal = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    out = theirs(x, attention_mask=causal)
    agree_and_need_every_tensor(
        ours,
        wanted,
        lambda: ours(x),
        out[0] if isinstance(out, tuple) else out,
        unseen={"mixer.sublayer.k.bias"},
    )


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Every parameter: zeros and ones as they come would hide what is left out."""
    rng = generator(9)
    for parameter in module.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng) + 0.1)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def agree_and_need_every_tensor(ours, wanted, run, expected, *, unseen=frozenset()) -> None:
    """Equal with the copied weights, and no longer when any one of them is zero, save what the result cannot see."""
    ours.load_state_dict(wanted)
    assert relative(run(), expected) < 1e-5
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.zero_()
        assert (relative(run(), expected) < 1e-5) == (name in unseen), name
        parameter.copy_(kept)
    assert relative(run(), expected) < 1e-5


# ---------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
@pytest.mark.parametrize("parallel", ["one norm", "two norms"])
def test_a_parallel_block_is_its_equation(parallel, placement):
    block = Block(MultiHeadAttention(8, 2), FeedForward(8), norm, placement=placement, parallel=parallel)
    x, f, g = randn(2, 5, 8), block.mixer, block.feedforward
    mixed, read = f.sublayer(f.norm(x)), f.norm(x) if parallel == "one norm" else g.norm(x)
    fed = g.sublayer(read)
    if placement == "sandwich":
        mixed, fed = f.norm_after(mixed), g.norm_after(fed)
    assert_close(block(x), x + mixed + fed)
    norms = sum(isinstance(m, RMSNorm) for m in block.modules())
    assert norms == (1 if parallel == "one norm" else 2) + (2 if placement == "sandwich" else 0)
    assert (block(x) - Block.forward(_sequential(block), x)).abs().max() > 1e-3


def _sequential(block: Block) -> Block:
    twin = Block(block.mixer.sublayer, block.feedforward.sublayer, norm, placement=block.mixer.placement)
    twin.mixer, twin.feedforward = block.mixer, block.feedforward
    return twin


def test_a_parallel_block_drops_what_it_adds():
    parts = (MultiHeadAttention(8, 2), FeedForward(8), lambda: LayerNorm(8))
    block = Block(*parts, dropout=0.5, parallel="two norms")
    for part, seed in ((block.mixer, 0), (block.feedforward, 1)):
        part.dropout.generator = generator(seed)
    x = randn(2, 3, 8)
    mixed, fed = (part.sublayer(part.norm(x)) for part in (block.mixer, block.feedforward))
    drops = [dropout(b, 0.5, training=True, generator=generator(i)) for i, b in enumerate((mixed, fed))]
    assert_close(block(x), x + drops[0] + drops[1])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"parallel": "both"}, r"parallel 'both' is not one of one norm, two norms"),
        ({"parallel": "one norm", "placement": "post"}, r".* one sum: placement 'post' has no place in it"),
        (
            {"parallel": "two norms", "cross": MultiHeadAttention(8, 2)},
            r".* one sum: cross-attention has no place in it",
        ),
    ],
)
def test_parallel_blocks_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Block(MultiHeadAttention(8, 2), FeedForward(8), norm, **how)
