"""One Decoder: GPT-2, Llama, Qwen3 and the rest are configurations of it."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.models.inputs import check_ids, place
from llm_atlas.nn.activations import Activation
from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.block import Block, Parallel, Placement
from llm_atlas.nn.cache import KVCache, LayerCache, RollingLayerCache
from llm_atlas.nn.dropout import Dropout
from llm_atlas.nn.feedforward import FeedForward, GatedFeedForward
from llm_atlas.nn.latent_attention import LatentAttention
from llm_atlas.nn.linear_attention import Decay, Kind, LinearAttention, find_feature_map
from llm_atlas.nn.moe import ExpertsConfig, MixtureOfExperts
from llm_atlas.nn.norm import LayerNorm, RMSNorm
from llm_atlas.nn.positions import (
    AlibiPositions,
    LearnedPositions,
    PositionScheme,
    RelativePositionBias,
    RotaryLayout,
    RotaryPositions,
    ShawPositions,
    SinusoidalPositions,
)

Norm = Literal["layer", "rms"]
Positions = Literal["none", "sinusoidal", "learned", "rotary", "alibi", "t5", "shaw"]


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention: one vector of `kv_rank` numbers a token stands for the keys and values of all heads.

    Beside it one rotary key of `rope_dim` features is shared by the heads; each head's own part of a key has the
    decoder's `head_dim`, its value `value_dim` (as many unless given). With `q_rank` queries too come from a small
    vector. DeepSeek-AI 2024, section 2.1 (arXiv 2405.04434).
    """

    kv_rank: int
    rope_dim: int
    value_dim: int | None = None
    q_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Linear attention: a state of fixed size in the place of keys and values; see `nn.linear_attention`.

    kind:        what happens to the state before a token is added to it.
    feature_map: name of the function on queries and keys; the kind's own unless given.
    decay:       what the gates of the gated kinds belong to.
    conv:        length of the short causal convolution on queries, keys and values; 0 for none.
    Katharopoulos et al. 2020 (arXiv 2006.16236).
    """

    kind: Kind = "linear"
    feature_map: str | None = None
    decay: Decay = "channel"
    conv: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay {self.decay!r} is not one of {', '.join(get_args(Decay))}")
        if self.feature_map is not None:
            find_feature_map(self.feature_map)
        if self.conv < 0:
            raise ValueError(f"conv {self.conv} must be 0 (none) or a number of tokens")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. Sizes in features or tokens; `kv_heads` and `head_dim` follow `heads` unless given.

    Mixers: softmax attention over the whole past unless one of three is given. `window`: over the last so many tokens,
    itself included. `latent`: from a small vector a token. `linear`: a state of fixed size. `full_layers` (numbers of
    layers, from 0) keep softmax attention over the whole past in a model with `window` or `linear`.

    positions: "sinusoidal" and "learned" are added to the embeddings; "rotary", "alibi", "t5" and "shaw" act inside
    attention, one scheme for all layers but `nope_layers` (numbers of layers, from 0), which see no positions, as
    in SmolLM3. Rotary alone: `rope_base`, `rotary_layout`, `rotary_dim` (the first features of a head that turn),
    `window_rope_base`, another base for the layers with a window (Gemma 3).
    T5 alone: `relative_buckets`. T5 and Shaw: `relative_distance`, beyond which distances are one (128 and 16).

    `experts` puts a mixture of experts in the place of every feed-forward network but those of `dense_layers` (numbers
    of layers, from 0; DeepSeek-V3 keeps its first three), which have `hidden` features and the options around it;
    experts are gated, without biases, and `hidden` alone says nothing of them. `parallel`: attention and feed-forward
    side by side (see `Block`). `attention_scale` multiplies the attention logits, `embed_scale` the token embeddings
    (both as in Gemma), `embed_norm` is one more norm, on the embeddings (BLOOM); `head_bias` is one of the logits.

    `dropout` is the rate in training, on the embeddings and on what each sublayer adds to the stream (Vaswani et al.
    2017, section 5.4, arXiv 1706.03762). Attention weights are never dropped.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    latent: LatentConfig | None = None
    linear: LinearConfig | None = None
    full_layers: tuple[int, ...] = ()
    experts: ExpertsConfig | None = None
    dense_layers: tuple[int, ...] = ()
    parallel: Parallel | None = None
    activation: str | Activation = "silu"
    gated: bool = True
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    placement: Placement = "pre"
    positions: Positions = "rotary"
    rope_base: float = 10000.0
    window_rope_base: float | None = None
    rotary_layout: RotaryLayout = "half"
    rotary_dim: int | None = None
    nope_layers: tuple[int, ...] = ()
    relative_buckets: int = 32
    relative_distance: int | None = None
    attention_bias: bool = False
    out_bias: bool = False
    feedforward_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    embed_scale: float = 1.0
    embed_norm: bool = False
    tied: bool = True
    head_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab", "dim", "layers", "heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("norm_eps", "rope_base", "window_rope_base", "attention_scale", "embed_scale"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads")
        for name, kinds in (("norm", Norm), ("positions", Positions), ("placement", Placement)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(kinds))}")
        if self.head_bias and self.tied:
            raise ValueError("head_bias needs a head of its own: with tied embeddings there is none")
        self._check_blocks()
        self._check_mixers()
        self._check_positions()

    def is_full(self, layer: int) -> bool:
        """Whether this layer looks at the whole past, each token of it."""
        return layer in self.full_layers or (self.window is None and self.linear is None)

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's feed-forward network is a mixture of experts."""
        return self.experts is not None and layer not in self.dense_layers

    def _check_blocks(self) -> None:
        if self.parallel not in (None, *get_args(Parallel)):
            raise ValueError(f"parallel {self.parallel!r} is not one of {', '.join(get_args(Parallel))}")
        if self.parallel is not None and self.placement == "post":
            raise ValueError(
                "a parallel block adds its branches in one sum: placement 'post' has no place in it"
            )
        if self.dense_layers and self.experts is None:
            raise ValueError(f"dense_layers {self.dense_layers} need experts: all layers are dense as it is")
        self._check_layers("dense_layers")

    def _check_mixers(self) -> None:
        chosen = [name for name in ("window", "latent", "linear") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are given: a layer has one mixer")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1")
        if self.latent is not None and self.positions not in ("none", "rotary"):
            raise ValueError(f"latent attention goes with rotary positions or none, not {self.positions!r}")
        if self.latent is not None and self.kv_heads is not None:
            raise ValueError(
                f"kv_heads {self.kv_heads} has no meaning with latent attention: its heads share a latent"
            )
        if self.latent is not None and self.qk_norm:
            raise ValueError(
                "qk_norm goes with key heads, and latent attention has none: its latents are normalised"
            )
        if self.linear is not None and self.positions in ("alibi", "t5", "shaw"):
            raise ValueError(
                f"linear attention has no logits that positions {self.positions!r} could be added to"
            )
        if self.full_layers and self.window is None and self.linear is None:
            raise ValueError(
                f"full_layers {self.full_layers} need a window or linear: all layers are full as it is"
            )
        self._check_layers("full_layers")

    def _check_layers(self, name: str) -> None:
        layers, what = getattr(self, name), name.removesuffix("_layers")
        for layer in layers:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise TypeError(f"{what} layer {layer!r} must be an int, the number of a layer")
            if not 0 <= layer < self.layers:
                raise ValueError(f"{what} layer {layer} is not one of the {self.layers} layers")
        if len(set(layers)) < len(layers):
            raise ValueError(f"{name} {layers} name a layer twice")

    def _check_positions(self) -> None:
        if self.rotary_layout not in get_args(RotaryLayout):
            kinds = ", ".join(get_args(RotaryLayout))
            raise ValueError(f"rotary_layout {self.rotary_layout!r} is not one of {kinds}")
        if self.rotary_dim is not None and self.positions != "rotary":
            raise ValueError(f"rotary_dim {self.rotary_dim} needs rotary positions, not {self.positions!r}")
        if self.nope_layers and self.positions in ("none", "sinusoidal", "learned"):
            raise ValueError(
                f"nope_layers {self.nope_layers} need positions that act inside attention, not {self.positions!r}"
            )
        self._check_layers("nope_layers")
        if self.window_rope_base is not None and (self.window is None or self.positions != "rotary"):
            raise ValueError(
                f"window_rope_base {self.window_rope_base} needs a window and rotary positions, not {self.positions!r}"
            )


class _ScaledEmbedding(nn.Embedding):
    """Rows of the table times `scale`; the table itself, which a tied head reads too, stays as it is."""

    def __init__(self, vocab: int, dim: int, scale: float) -> None:
        super().__init__(vocab, dim)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        # Rounded as the table is: a model of bfloat16 was trained with a scale of bfloat16.
        rows = super().forward(ids)
        return rows * torch.full((), self.scale, dtype=rows.dtype, device=rows.device)


class Decoder(nn.Module):
    """Token ids to logits: embed, a stack of blocks, a last norm, and the unembedding.

    Radford et al. 2018, section 3.1 (GPT); Touvron et al. 2023, section 2.2 (arXiv 2302.13971).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        plain = config.embed_scale == 1
        embed = nn.Embedding if plain else partial(_ScaledEmbedding, scale=config.embed_scale)
        self.embed = embed(config.vocab, config.dim)
        self.positions = embedded_positions(config)
        scheme = self.attention_positions = attention_positions(config)  # one table, shared by all layers
        near = config.window_rope_base
        self.window_positions = None if near is None else attention_positions(replace(config, rope_base=near))
        self.dropout = Dropout(config.dropout) if config.dropout else None
        norm = partial({"layer": LayerNorm, "rms": RMSNorm}[config.norm], config.dim, eps=config.norm_eps)
        self.embed_norm = norm() if config.embed_norm else None
        self.blocks = nn.ModuleList(self._block(layer, norm, scheme) for layer in range(config.layers))
        # A post-norm stack already ends in a norm.
        self.norm = nn.Identity() if config.placement == "post" else norm()
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=config.head_bias)

    def _block(self, layer: int, norm: partial, scheme: PositionScheme) -> Block:
        c = self.config
        if self.window_positions is not None and not c.is_full(layer):
            scheme = self.window_positions
        mixer = self._mixer(layer, PositionScheme() if layer in c.nope_layers else scheme)
        return Block(
            mixer,
            self._feedforward(layer),
            norm,
            placement=c.placement,
            dropout=c.dropout,
            parallel=c.parallel,
        )

    def _feedforward(self, layer: int) -> nn.Module:
        c = self.config
        if c.has_experts(layer):
            return MixtureOfExperts(c.dim, c.experts)
        make = GatedFeedForward if c.gated else FeedForward
        return make(c.dim, c.hidden, activation=c.activation, bias=c.feedforward_bias)

    def _mixer(self, layer: int, positions: PositionScheme) -> nn.Module:
        c = self.config
        if c.latent is not None:
            return LatentAttention(
                c.dim,
                c.heads,
                head_dim=_head_dim(c),
                kv_rank=c.latent.kv_rank,
                rope_dim=c.latent.rope_dim,
                value_dim=c.latent.value_dim,
                q_rank=c.latent.q_rank,
                norm_eps=c.norm_eps,
                bias=c.attention_bias,
                positions=positions,
                scale=c.attention_scale,
            )
        if c.linear is not None and layer not in c.full_layers:
            return LinearAttention(
                c.dim,
                c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                kind=c.linear.kind,
                feature_map=c.linear.feature_map,
                decay=c.linear.decay,
                conv=c.linear.conv,
                bias=c.attention_bias,
                norm_eps=c.norm_eps,
            )
        return MultiHeadAttention(
            c.dim,
            c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            bias=c.attention_bias,
            out_bias=c.out_bias,
            window=None if layer in c.full_layers else c.window,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            positions=positions,
            scale=c.attention_scale,
        )

    def hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The residual stream after the last norm, one vector a token.

        Without `positions` the tokens follow on from what the cache holds. With them (`nn.masks.left_pad` makes them)
        rows may be of different length; padding has position -1. `mask` replaces the causal mask.
        """
        check_ids(ids, self.embed)
        return self.mix(self.embed(ids), positions=positions, mask=mask, cache=cache)

    def mix(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """`hidden` from embeddings: what comes in need not be tokens (soft prompts, patches of an image)."""
        given = mask
        positions, mask = place(x, positions, mask, cache, context=self.config.context)
        x = self.positions.embed(x, positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.dropout is not None:
            x = self.dropout(x)
        schemes = [self.attention_positions, self.window_positions]
        with ExitStack() as stack:
            for scheme in schemes:
                if scheme is not None:
                    stack.enter_context(scheme.reused(positions, x.dtype))
            for index, block in enumerate(self.blocks):
                # A window and a state go by the positions themselves: they know padding, and what is too far back.
                seen = mask if self.config.is_full(index) else given
                x = block(x, positions=positions, mask=seen, cache=None if cache is None else cache[index])
        return self.norm(x)

    def unembed(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Hidden vectors to logits, with the embedding's own weights where they are tied."""
        return functional.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits for the token after each token; arguments as in `hidden`."""
        return self.unembed(self.hidden(ids, positions=positions, mask=mask, cache=cache))

    def make_cache(self, *, capacity: int = 0) -> KVCache:
        """An empty cache that fits this model: layers with a window keep no more than that."""
        window = self.config.window
        layers = [
            LayerCache
            if self.config.is_full(layer) or window is None
            else partial(RollingLayerCache, window=window)
            for layer in range(self.config.layers)
        ]
        return KVCache(self.config.layers, capacity=capacity, layer=layers)


def embedded_positions(config: DecoderConfig) -> PositionScheme:
    """The scheme that acts on the embeddings, if the configuration names one."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions(config.dim)
    if config.positions == "learned":
        return LearnedPositions(config.context, config.dim)
    return PositionScheme()


def attention_positions(config: DecoderConfig) -> PositionScheme:
    """The scheme that acts inside attention, if the configuration names one."""
    if config.positions == "rotary":
        return RotaryPositions(
            _head_dim(config) if config.latent is None else config.latent.rope_dim,
            base=config.rope_base,
            length=config.context,
            layout=config.rotary_layout,
            rotary_dim=config.rotary_dim,
        )
    if config.positions == "alibi":
        return AlibiPositions(config.heads)
    if config.positions == "t5":
        most = 128 if config.relative_distance is None else config.relative_distance
        return RelativePositionBias(
            config.heads, buckets=config.relative_buckets, max_distance=most, bidirectional=False
        )
    if config.positions == "shaw":
        most = 16 if config.relative_distance is None else config.relative_distance
        return ShawPositions(_head_dim(config), max_distance=most)
    return PositionScheme()


def _head_dim(config: DecoderConfig) -> int:
    return config.dim // config.heads if config.head_dim is None else config.head_dim
