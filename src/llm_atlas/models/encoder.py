"""One Encoder: BERT, RoBERTa, and the reading halves of T5 and BART are configurations of it.

A decoder's token sees what stands before it; here every token sees all of them, so each comes out as a vector of itself
in its sentence.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.models.decoder import Norm
from llm_atlas.models.inputs import check_ids, check_positions
from llm_atlas.nn.activations import find_activation
from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.block import Block, Placement
from llm_atlas.nn.dropout import Dropout
from llm_atlas.nn.feedforward import FeedForward, GatedFeedForward
from llm_atlas.nn.masks import padding_mask
from llm_atlas.nn.norm import LayerNorm, RMSNorm
from llm_atlas.nn.positions import (
    LearnedPositions,
    PositionScheme,
    RelativePositionBias,
    SinusoidalPositions,
)

SidePositions = Literal["none", "sinusoidal", "learned", "t5"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder; as it stands, that of BERT. Sizes in features or tokens.

    vocab: None for an encoder that is fed embeddings alone (patches of an image, the half of an encoder-decoder).
    positions: "learned" and "sinusoidal" are added to the embeddings, "t5" to the attention logits, by one table for
    all layers of `relative_buckets` buckets up to `relative_distance`. `embed_norm` normalises what enters the first
    block. `embed_scale` multiplies the token embeddings (the root of `dim` in Vaswani et al. 2017, section 3.4).
    `attention_scale` as in `MultiHeadAttention` (T5: 1.0). `bias` is that of all linear layers of the blocks.
    `token_types`: how many kinds of segment have a vector of their own (BERT: 2, first and second sentence).
    `pooler` and `masked_lm` are BERT's heads, see `Encoder.pool` and `Encoder.unembed`.
    `dropout` is the rate in training, on the embeddings and on what each sublayer adds to the stream.
    """

    vocab: int | None = None
    dim: int
    layers: int
    heads: int
    hidden: int
    context: int
    head_dim: int | None = None
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    norm: Norm = "layer"
    norm_eps: float = 1e-12
    placement: Placement = "post"
    positions: SidePositions = "learned"
    relative_buckets: int = 32
    relative_distance: int = 128
    attention_scale: float | None = None
    embed_norm: bool = True
    embed_scale: float = 1.0
    token_types: int = 0
    pooler: bool = False
    masked_lm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, ("dim", "layers", "heads", "hidden", "context"))
        if self.vocab is not None and self.vocab < 1:
            raise ValueError(f"vocab {self.vocab} must be at least 1, or None for no tokens")
        if self.token_types < 0:
            raise ValueError(f"token_types {self.token_types} must not be negative")
        if self.vocab is None and (self.token_types or self.masked_lm):
            raise ValueError("token_types and masked_lm need tokens: vocab is None")


def check_sizes(config: object, sizes: tuple[str, ...]) -> None:
    """What the configurations of an encoder and of an encoder-decoder must both fulfil; ValueError names the field."""
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be at least 1")
    for name in ("norm_eps", "embed_scale"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} {getattr(config, name)} must be positive and finite")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout {config.dropout} must be at least 0 and below 1")
    if config.head_dim is None and config.dim % config.heads:
        raise ValueError(f"dim {config.dim} must divide into {config.heads} heads")
    for name, kinds in (("norm", Norm), ("positions", SidePositions), ("placement", Placement)):
        if getattr(config, name) not in get_args(kinds):
            raise ValueError(f"{name} {getattr(config, name)!r} is not one of {', '.join(get_args(kinds))}")


class Encoder(nn.Module):
    """Token ids to one vector a token, each of which has seen the whole text.

    The blocks are the decoder's without the causal mask. Cost as a decoder's; there is no cache, since a new token
    would change the vectors of all others. Devlin et al. 2018, section 3 (arXiv 1810.04805); Liu et al. 2019, section 2
    (arXiv 1907.11692).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = None if c.vocab is None else nn.Embedding(c.vocab, c.dim)
        self.token_types = nn.Embedding(c.token_types, c.dim) if c.token_types else None
        self.positions = embedded_positions(c)
        norm = norm_maker(c)
        self.embed_norm = norm() if c.embed_norm else nn.Identity()
        self.dropout = Dropout(c.dropout) if c.dropout else None
        scheme = self.attention_positions = attention_positions(c, bidirectional=True)  # shared by all layers
        self.blocks = nn.ModuleList(make_block(c, scheme) for _ in range(c.layers))
        # A post-norm stack already ends in a norm.
        self.norm = nn.Identity() if c.placement == "post" else norm()
        self.pooler = nn.Linear(c.dim, c.dim) if c.pooler else None
        self.head = MaskedLMHead(c) if c.masked_lm else None

    def hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        token_types: Int[Tensor, "batch seq"] | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 queries2 seq"] | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The residual stream after the last norm, one vector a token.

        Rows of different length: padding has position -1 (`nn.masks.left_pad`; either side will do), no token sees it,
        and its own vectors mean nothing. `token_types` are 0 unless given. `mask` replaces the one made of positions.
        Raises ValueError for ids, token types and positions outside their tables.
        """
        if self.embed is None:
            raise ValueError("this encoder has no vocabulary: give embeddings to `mix`")
        check_ids(ids, self.embed)
        x = self.embed(ids) * self.config.embed_scale
        if self.token_types is None and token_types is not None:
            raise ValueError("this encoder has no token types")
        if token_types is not None:
            if token_types.shape != ids.shape:
                raise ValueError(
                    f"token types have shape {tuple(token_types.shape)}, ids {tuple(ids.shape)}: they must be equal"
                )
            check_ids(token_types, self.token_types, "type")
            x = x + self.token_types(token_types)
        elif self.token_types is not None:
            x = x + self.token_types.weight[0]
        return self.mix(x, positions=positions, mask=mask)

    def mix(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 queries2 seq"] | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """`hidden` from embeddings: what comes in need not be tokens (patches of an image)."""
        check_positions(x, positions, self.config.context)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        elif mask is None:
            mask = padding_mask(positions)
        x = self.embed_norm(self.positions.embed(x, positions))
        if self.dropout is not None:
            x = self.dropout(x)
        for block in self.blocks:
            x = block(x, positions=positions, mask=mask)
        return self.norm(x)

    def pool(
        self, hidden: Float[Tensor, "batch seq dim"], keep: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        r"""BERT's sentence vector, $\tanh(W x_1 + b)$ of the first token's vector (`cls_pool`).

        Raises ValueError for an encoder without a pooler. Devlin et al. 2018, section 3.1 (the vector C).
        """
        if self.pooler is None:
            raise ValueError("this encoder has no pooler: its configuration has pooler=False")
        return self.pooler(cls_pool(hidden, keep)).tanh()

    def unembed(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Hidden vectors to logits of the token that stands there (where it was masked, the guess of the model)."""
        if self.head is None:
            raise ValueError("this encoder has no language-model head: its configuration has masked_lm=False")
        return self.head(x, self.embed.weight)

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        token_types: Int[Tensor, "batch seq"] | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 queries2 seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the token at each place; arguments as in `hidden`."""
        return self.unembed(self.hidden(ids, token_types=token_types, positions=positions, mask=mask))


class MaskedLMHead(nn.Module):
    r"""BERT's guess at a masked token: $\operatorname{norm}(f(xW + b))\,E^\top + c$ with the token embeddings $E$.

    The layer in between is the model's only chance to turn "a vector of this token in its sentence" into "the embedding
    of what stands here". dim x dim + 3 x dim + vocab weights; E is the embedding's own. Devlin et al. 2018, section 3.1
    (arXiv 1810.04805), and the released code for the layer.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.activation = find_activation(config.activation)
        self.norm = norm_maker(config)()
        self.bias = nn.Parameter(torch.zeros(config.vocab))

    def forward(
        self, x: Float[Tensor, "*batch dim"], embeddings: Float[Tensor, "vocab dim"]
    ) -> Float[Tensor, "*batch vocab"]:
        """Shape (..., dim) to (..., vocab)."""
        return functional.linear(self.norm(self.activation(self.dense(x))), embeddings, self.bias)


def mean_pool(
    hidden: Float[Tensor, "batch seq dim"], keep: Bool[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch dim"]:
    """The mean of the vectors of the tokens kept (all unless given), summed in float32; zeros where none is.

    Reimers and Gurevych 2019, section 3 (arXiv 1908.10084).
    """
    check_keep(hidden, keep)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if keep is None:
        return wide.mean(1).to(hidden.dtype)
    # Padding may hold anything, infinities too, so it is replaced and not multiplied away.
    total = wide.masked_fill(~keep[..., None], 0).sum(1)
    return (total / keep.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)


def cls_pool(
    hidden: Float[Tensor, "batch seq dim"], keep: Bool[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch dim"]:
    """The vector of the first token kept: BERT writes [CLS] there and trains it to stand for the whole sentence."""
    check_keep(hidden, keep)
    if keep is None:
        return hidden[:, 0]
    first = keep.long().argmax(1)
    return hidden.take_along_dim(first[:, None, None], dim=1)[:, 0]


def unit_length(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    r"""$x / \lVert x \rVert_2$, in float32 inside: the dot product of two such vectors is their cosine. Zeros stay."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return functional.normalize(wide, dim=-1).to(x.dtype)


def make_block(config: EncoderConfig, positions: PositionScheme, *, decodes: bool = False) -> Block:
    """One block: attention and feed-forward; where it `decodes`, causal attention, cross-attention, feed-forward."""
    c = config
    attention = partial(
        MultiHeadAttention,
        c.dim,
        c.heads,
        head_dim=c.head_dim,
        bias=c.bias,
        scale=c.attention_scale,
    )
    make = GatedFeedForward if c.gated else FeedForward
    return Block(
        attention(causal=decodes, positions=positions),
        make(c.dim, c.hidden, activation=c.activation, bias=c.bias),
        norm_maker(c),
        placement=c.placement,
        dropout=c.dropout,
        cross=attention(causal=False) if decodes else None,
    )


def norm_maker(config: EncoderConfig) -> partial:
    """Makes a fresh norm at every call."""
    return partial({"layer": LayerNorm, "rms": RMSNorm}[config.norm], config.dim, eps=config.norm_eps)


def embedded_positions(config: EncoderConfig) -> PositionScheme:
    """The scheme that acts on the embeddings, if the configuration names one."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions(config.dim)
    if config.positions == "learned":
        return LearnedPositions(config.context, config.dim)
    return PositionScheme()


def attention_positions(config: EncoderConfig, *, bidirectional: bool) -> PositionScheme:
    """The scheme that acts inside attention, if the configuration names one."""
    if config.positions == "t5":
        return RelativePositionBias(
            config.heads,
            buckets=config.relative_buckets,
            max_distance=config.relative_distance,
            bidirectional=bidirectional,
        )
    return PositionScheme()


def check_keep(hidden: Tensor, keep: Tensor | None) -> None:
    """Raise ValueError or TypeError where `keep` does not say of each token whether it counts."""
    if keep is None:
        return
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must hold booleans, got {keep.dtype}")
    if keep.shape != hidden.shape[:2]:
        raise ValueError(
            f"keep has shape {tuple(keep.shape)}, the tokens have {tuple(hidden.shape[:2])}: they must be equal"
        )
