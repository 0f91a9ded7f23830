"""What a model weighs, what a token costs and what a cache keeps, counted from the configuration alone.

Parameters are those of the `Decoder` itself, cached numbers those of `KVCache.nbytes` for the cache that
`Decoder.make_cache` makes, FLOPs those that torch counts; the tests hold them equal.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.feedforward import feed_forward_flops, feed_forward_parameters
from llm_atlas.nn.latent_attention import absorbed_is_cheaper, latent_attention_flops, latent_cache_numbers
from llm_atlas.nn.linear_attention import LinearAttention, feature_size
from llm_atlas.nn.moe import expert_flops, expert_parameters


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where the parameters of a model are. All but `active_experts` add up to `total`."""

    embedding: int
    """Tokens, and positions that are added to them."""
    attention: int
    """Every mixer, and the tables of position schemes inside attention."""
    feedforward: int
    """The dense networks."""
    experts: int
    """Mixtures of experts: routers, shared experts and all of the others."""
    active_experts: int
    """Of these, what one token goes through."""
    norms: int
    """All of them, those inside attention too."""
    head: int
    """0 where the embedding is the head too."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.attention + self.feedforward + self.experts + self.norms + self.head

    @property
    def active(self) -> int:
        """Parameters that one token goes through; the whole embedding and head count, as in the models' reports."""
        return self.total - self.experts + self.active_experts


def parameters(config: DecoderConfig) -> Ledger:
    """The parameters of `Decoder(config)` by component, counted without its weights.

    Kaplan et al. 2020, table 1 (arXiv 2001.08361).
    """
    layers, sparse = range(config.layers), sum(map(config.has_experts, range(config.layers)))
    mixers = [_mixer_parameters(config, layer) for layer in layers]
    experts = (0, 0) if config.experts is None else expert_parameters(config.dim, config.experts)
    one = feed_forward_parameters(config.dim, config.hidden, gated=config.gated, bias=config.feedforward_bias)
    a_block = (4 if config.placement == "sandwich" else 2) - (config.parallel == "one norm")
    norms = config.layers * a_block + (config.placement != "post") + config.embed_norm
    return Ledger(
        embedding=config.dim * (config.vocab + (config.context if config.positions == "learned" else 0)),
        attention=sum(weights for weights, _ in mixers) + _scheme_parameters(config),
        feedforward=(config.layers - sparse) * one,
        experts=sparse * experts[0],
        active_experts=sparse * experts[1],
        norms=norms * config.dim * (2 if config.norm == "layer" else 1) + sum(inner for _, inner in mixers),
        head=0 if config.tied else config.vocab * (config.dim + config.head_bias),
    )


def flops_per_token(config: DecoderConfig, context: int) -> int:
    r"""FLOPs of a forward pass over `context` tokens, divided by them; a multiply and an add are two.

    Twice the active weights that are matrices, and attention: $4\,T\,h\,d$ for $T$ keys, $h$ heads of $d$ features, a
    layer. Every token counts against all keys, as the products are computed where a causal mask is laid over them;
    with a window against `window` of them at most. Latent attention as in `latent_attention_flops`, the cheaper of its
    two ways; a linear layer as its recurrence, a write and a read of its state. Norms, softmax, look-ups and other
    element-wise work are left out. A backward pass costs twice as much again. Raises ValueError for a context below 1.
    Kaplan et al. 2020, section 2.1 (arXiv 2001.08361).
    """
    if context < 1:
        raise ValueError(f"context {context} must be at least 1")
    dense = feed_forward_flops(config.dim, config.hidden, gated=config.gated)
    total = 2 * config.dim * config.vocab
    for layer in range(config.layers):
        total += _mixer_flops(config, layer, context)
        total += expert_flops(config.dim, config.experts) if config.has_experts(layer) else dense
    return total


def _mixer_parameters(config: DecoderConfig, layer: int) -> tuple[int, int]:
    """Of one layer: weights and biases, and those of norms inside."""
    c, dim, bias = config, config.dim, config.attention_bias
    head_dim = _head_dim(c)
    if c.latent is not None:
        value_dim = c.latent.value_dim or head_dim
        from_stream = c.latent.kv_rank + c.latent.rope_dim + (c.latent.q_rank or 0)
        queries = (c.latent.q_rank or dim) * c.heads * (head_dim + c.latent.rope_dim)
        made = c.latent.kv_rank * c.heads * (head_dim + value_dim) + c.heads * value_dim * dim + bias * dim
        return from_stream * (dim + bias) + queries + made, c.latent.kv_rank + (c.latent.q_rank or 0)
    if c.linear is not None and layer not in c.full_layers:
        sizes = {name: p.numel() for name, p in _linear_mixer(c).named_parameters()}
        inside = sum(size for name, size in sizes.items() if name.startswith("norm."))
        return sum(sizes.values()) - inside, inside
    wide, narrow = c.heads * head_dim, (c.kv_heads or c.heads) * head_dim
    weights = (wide + 2 * narrow) * (dim + bias) + dim * (wide + c.out_bias)
    return weights, 2 * head_dim * c.qk_norm


def _mixer_flops(config: DecoderConfig, layer: int, context: int) -> int:
    c, head_dim = config, _head_dim(config)
    if c.latent is not None:
        value_dim = c.latent.value_dim or head_dim
        size = {"kv_rank": c.latent.kv_rank, "head_dim": head_dim, "value_dim": value_dim}
        absorb = absorbed_is_cheaper(context, context, **size)
        mixing = latent_attention_flops(
            context, context, heads=c.heads, rope_dim=c.latent.rope_dim, absorb=absorb, **size
        )
        matrices, _ = _mixer_parameters(_without_biases(c), layer)
        matrices -= c.latent.kv_rank * c.heads * (head_dim + value_dim)  # counted in `mixing`
        return 2 * matrices + mixing // context
    if c.linear is not None and layer not in c.full_layers:
        mixer = _linear_mixer(c)
        matrices = sum(p.numel() for p in mixer.parameters() if p.dim() == 2)
        cells = feature_size(mixer.feature_map, head_dim) * (head_dim + mixer.normalize)
        writes = 2 if "delta" in c.linear.kind else 1  # the delta rule looks up first what it overwrites
        return 2 * matrices + 2 * cells * (c.heads + writes * mixer.kv_heads)
    keys = context if c.window is None or layer in c.full_layers else min(context, c.window)
    matrices, _ = _mixer_parameters(_without_biases(c), layer)
    shaw = c.positions == "shaw" and layer not in c.nope_layers
    return 2 * matrices + c.heads * head_dim * (4 * keys + 2 * (2 * _reach(c) + 1) * shaw)


def _without_biases(config: DecoderConfig) -> DecoderConfig:
    return replace(config, attention_bias=False, out_bias=False)


def _scheme_parameters(config: DecoderConfig) -> int:
    if config.positions == "t5":
        return config.relative_buckets * config.heads
    return (2 * _reach(config) + 1) * _head_dim(config) if config.positions == "shaw" else 0


def _reach(config: DecoderConfig) -> int:
    return 16 if config.relative_distance is None else config.relative_distance


def _head_dim(config: DecoderConfig) -> int:
    return config.dim // config.heads if config.head_dim is None else config.head_dim


def cached_numbers(config: DecoderConfig, tokens: int) -> int:
    """Numbers in the cache of one row after `tokens` tokens, all layers together.

    A full layer keeps two vectors of key/value heads x head dim a token, or with latent attention a latent and one
    rotary key; a layer with a window the same of the last `window` tokens; a linear layer a state, as soon as there is
    a token. Raises ValueError for a negative number of tokens.
    Shazeer 2019, section 2.4 (arXiv 1911.02150); DeepSeek-AI 2024, table 1 (arXiv 2405.04434).
    """
    if tokens < 0:
        raise ValueError(f"tokens {tokens} must not be negative")
    if tokens == 0:
        return 0
    full = sum(map(config.is_full, range(config.layers)))
    others = config.layers - full
    kept = full * tokens * _a_token(config)
    if config.linear is not None:
        return kept + others * (_linear_mixer(config).cached_numbers if others else 0)
    return kept + others * min(tokens, config.window or 0) * _a_token(config)


def cached_bytes(config: DecoderConfig, tokens: int, *, bytes_per_number: float | int = 2) -> float:
    """Bytes of that cache: `cached_numbers` times the bytes of a number, 2 in bfloat16.

    Raises ValueError for numbers without a size.
    """
    if not 0 < bytes_per_number < float("inf"):
        raise ValueError(f"bytes_per_number {bytes_per_number} must be positive and finite")
    return cached_numbers(config, tokens) * float(bytes_per_number)


def _a_token(config: DecoderConfig) -> int:
    if config.latent is not None:
        return latent_cache_numbers(kv_rank=config.latent.kv_rank, rope_dim=config.latent.rope_dim)
    return 2 * (config.heads if config.kv_heads is None else config.kv_heads) * _head_dim(config)


@lru_cache(maxsize=64)
def _linear_mixer(config: DecoderConfig) -> LinearAttention:
    with torch.device("meta"):
        model = Decoder(config)
    mixers = (block.mixer.sublayer for block in model.blocks)
    return next(mixer for mixer in mixers if isinstance(mixer, LinearAttention))
