"""One EncoderDecoder: T5 and BART are configurations of it.

The encoder reads the source once, with every token seeing all others. The decoder writes, and in every block its tokens
look at their own past first and then, by cross-attention, at what the encoder made of the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.models.decoder import Norm
from llm_atlas.models.encoder import (
    Encoder,
    EncoderConfig,
    SidePositions,
    attention_positions,
    check_sizes,
    embedded_positions,
    make_block,
    norm_maker,
)
from llm_atlas.models.inputs import check_ids, place
from llm_atlas.nn.block import Placement
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.dropout import Dropout
from llm_atlas.nn.masks import padding_mask


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """The shape of an encoder-decoder, both halves alike but for their number of `layers`.

    `decoder_layers` is `layers` unless given. `context` holds for source and target each. `tied`: the logits use the
    embedding's own weights; `scale_logits` divides them by the root of `dim` (T5 where tied); `logits_bias` adds a
    number for every token (BART). The other fields as in `EncoderConfig`.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    context: int
    decoder_layers: int | None = None
    head_dim: int | None = None
    activation: str = "relu"
    gated: bool = False
    bias: bool = False
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    placement: Placement = "pre"
    positions: SidePositions = "t5"
    relative_buckets: int = 32
    relative_distance: int = 128
    attention_scale: float | None = None
    embed_norm: bool = False
    embed_scale: float = 1.0
    tied: bool = True
    scale_logits: bool = False
    logits_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "dim", "layers", "heads", "hidden", "context"))
        if self.decoder_layers is not None and self.decoder_layers < 1:
            raise ValueError(f"decoder_layers {self.decoder_layers} must be at least 1")

    def half(self, layers: int) -> EncoderConfig:
        """One half of the model, fed with embeddings, as the configuration of an encoder."""
        return EncoderConfig(
            dim=self.dim,
            layers=layers,
            heads=self.heads,
            hidden=self.hidden,
            context=self.context,
            head_dim=self.head_dim,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            norm=self.norm,
            norm_eps=self.norm_eps,
            placement=self.placement,
            positions=self.positions,
            relative_buckets=self.relative_buckets,
            relative_distance=self.relative_distance,
            attention_scale=self.attention_scale,
            embed_norm=self.embed_norm,
            dropout=self.dropout,
        )


class CrossDecoder(nn.Module):
    """The writing half: blocks of causal self-attention, cross-attention to the source, feed-forward.

    Vaswani et al. 2017, section 3.1 (arXiv 1706.03762).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = embedded_positions(config)
        norm = norm_maker(config)
        self.embed_norm = norm() if config.embed_norm else nn.Identity()
        self.dropout = Dropout(config.dropout) if config.dropout else None
        scheme = self.attention_positions = attention_positions(config, bidirectional=False)
        self.blocks = nn.ModuleList(make_block(config, scheme, decodes=True) for _ in range(config.layers))
        self.norm = nn.Identity() if config.placement == "post" else norm()

    def mix(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        context: Float[Tensor, "batch source dim"],
        context_mask: Bool[Tensor, "batch 1 1 source"] | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
        context_cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Embeddings of the target to its residual stream after the last norm.

        `positions`, `mask` and `cache` as in `Decoder.hidden`. `context_cache` keeps the keys and values of `context`,
        and may be used for that one context alone.
        """
        if context.shape[0] != x.shape[0]:
            raise ValueError(
                f"the target has {x.shape[0]} rows, the source {context.shape[0]}: they must be equal"
            )
        positions, mask = place(x, positions, mask, cache, context=self.config.context)
        x = self.embed_norm(self.positions.embed(x, positions))
        if self.dropout is not None:
            x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x = block(
                x,
                positions=positions,
                mask=mask,
                context=context,
                context_mask=context_mask,
                cache=None if cache is None else cache[index],
                context_cache=None if context_cache is None else context_cache[index],
            )
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """Source and target ids to logits for the token after each target token; one embedding for both.

    To train: `model(source, target)`, all target tokens at once. To write: `infer.generate` with
    `model.read(source)` in a decoder's place. Vaswani et al. 2017, section 3 (arXiv 1706.03762); Raffel et al. 2019,
    section 2.1 (arXiv 1910.10683); Lewis et al. 2019, section 2.1 (arXiv 1910.13461).
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab, c.dim)
        self.encoder = Encoder(c.half(c.layers))
        self.decoder = CrossDecoder(c.half(c.layers if c.decoder_layers is None else c.decoder_layers))
        self.head = None if c.tied else nn.Linear(c.dim, c.vocab, bias=False)
        self.logits_bias = nn.Parameter(torch.zeros(c.vocab)) if c.logits_bias else None

    def encode(
        self, source: Int[Tensor, "batch source"], *, positions: Int[Tensor, "batch source"] | None = None
    ) -> Float[Tensor, "batch source dim"]:
        """The source's hidden vectors. Padding has position -1."""
        return self.encoder.mix(self._embedded(source), positions=positions)

    def read(
        self, source: Int[Tensor, "batch source"], *, positions: Int[Tensor, "batch source"] | None = None
    ) -> "Reading":
        """Encode the source, once, and return the decoder with the source in front of it."""
        context = self.encode(source, positions=positions)
        return Reading(self, context, None if positions is None else padding_mask(positions))

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch target"],
        *,
        source_positions: Int[Tensor, "batch source"] | None = None,
        positions: Int[Tensor, "batch target"] | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits for the token after each target token. Padding of either has position -1 and is seen by nobody."""
        context = self.encode(source, positions=source_positions)
        hidden = self.decoder.mix(
            self._embedded(target),
            context=context,
            context_mask=None if source_positions is None else padding_mask(source_positions),
            positions=positions,
        )
        return self.unembed(hidden)

    def unembed(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """The decoder's hidden vectors to logits."""
        if self.config.scale_logits:
            x = x * self.config.dim**-0.5
        weight = self.embed.weight if self.head is None else self.head.weight
        return functional.linear(x, weight, self.logits_bias)

    def _embedded(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.embed)
        return self.embed(ids) * self.config.embed_scale


class Reading:
    """A decoder that has a source in front of it, with the methods of a `Decoder`: `infer.generate` writes with it.

    The keys and values of the source are computed at the first token and kept here, not in the cache of the written
    text: forking and cutting that one leaves them as they are. Bytes: 2 x decoder layers x source tokens x heads x head
    dim x bytes a number, for each row.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        context: Float[Tensor, "batch source dim"],
        context_mask: Bool[Tensor, "batch 1 1 source"] | None = None,
    ) -> None:
        self.model, self.context, self.context_mask = model, context, context_mask
        self.context_cache = KVCache(len(model.decoder.blocks), capacity=context.shape[1])
        self.config, self.embed, self.unembed = model.config, model.embed, model.unembed

    def hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The decoder's residual stream after its last norm; arguments as in `Decoder.hidden`."""
        return self.model.decoder.mix(
            self.model._embedded(ids),
            context=self.context,
            context_mask=self.context_mask,
            positions=positions,
            mask=mask,
            cache=cache,
            context_cache=self.context_cache,
        )

    def __call__(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits for the token after each token."""
        return self.unembed(self.hidden(ids, positions=positions, mask=mask, cache=cache))

    def make_cache(self, *, capacity: int = 0) -> KVCache:
        """An empty cache for the written text."""
        return KVCache(len(self.model.decoder.blocks), capacity=capacity)

    def select(self, rows: Int[Tensor, " rows"] | Sequence[int]) -> "Reading":
        """These rows of the source, in this order; a row may be taken more than once (one for each beam)."""
        at = torch.as_tensor(rows, device=self.context.device)
        mask = self.context_mask
        chosen = Reading(self.model, self.context[at], None if mask is None else mask[at])
        chosen.context_cache = self.context_cache.fork()
        chosen.context_cache.select(rows)
        return chosen
