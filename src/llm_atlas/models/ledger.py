"""What a model keeps of a text while it writes on, counted from its configuration.

The counts are those of `KVCache.nbytes` for the cache that `Decoder.make_cache` makes; the tests hold them equal.
"""

from functools import lru_cache

import torch

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.latent_attention import latent_cache_numbers
from llm_atlas.nn.linear_attention import LinearAttention


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
        return kept + others * (_state(config) if others else 0)
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
    head_dim = config.dim // config.heads if config.head_dim is None else config.head_dim
    return 2 * (config.heads if config.kv_heads is None else config.kv_heads) * head_dim


@lru_cache(maxsize=64)
def _state(config: DecoderConfig) -> int:
    with torch.device("meta"):
        model = Decoder(config)
    mixers = (block.mixer.sublayer for block in model.blocks)
    return next(mixer.cached_numbers for mixer in mixers if isinstance(mixer, LinearAttention))
