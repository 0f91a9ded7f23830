"""The shapes of published models, as configurations of the one Decoder: what ledgers count with.

Sizes are those of the models' own configuration files and reports. Nothing here is loaded or run: counting needs no
weights.
"""

from llm_atlas.models.decoder import DecoderConfig, LatentConfig

_LLAMA3 = {"vocab": 128256, "kv_heads": 8, "context": 8192, "rope_base": 500000.0, "tied": False}
_QWEN3 = {
    "vocab": 151936,
    "kv_heads": 8,
    "head_dim": 128,
    "context": 40960,
    "rope_base": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": True,
    "tied": False,
}
_DEEPSEEK = {
    "heads": 128,
    "head_dim": 128,
    "latent": LatentConfig(kv_rank=512, rope_dim=64, q_rank=1536),
    "rotary_layout": "interleaved",
    "norm_eps": 1e-6,
    "context": 163840,
    "tied": False,
}

SHAPES: dict[str, DecoderConfig] = {
    "Llama 2 7B": DecoderConfig(
        vocab=32000, dim=4096, layers=32, heads=32, hidden=11008, context=4096, tied=False
    ),
    "Llama 3 8B": DecoderConfig(dim=4096, layers=32, heads=32, hidden=14336, **_LLAMA3),
    "Llama 3 70B": DecoderConfig(dim=8192, layers=80, heads=64, hidden=28672, **_LLAMA3),
    "Mistral 7B": DecoderConfig(
        vocab=32000,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        hidden=14336,
        context=32768,
        window=4096,
        tied=False,
    ),
    "Qwen3 8B": DecoderConfig(dim=4096, layers=36, heads=32, hidden=12288, **_QWEN3),
    "Qwen3 32B": DecoderConfig(dim=5120, layers=64, heads=64, hidden=25600, **_QWEN3),
    "DeepSeek 67B": DecoderConfig(
        vocab=102400,
        dim=8192,
        layers=95,
        heads=64,
        kv_heads=8,
        hidden=22016,
        context=4096,
        norm_eps=1e-6,
        tied=False,
    ),
    "DeepSeek-V2": DecoderConfig(vocab=102400, dim=5120, layers=60, hidden=12288, **_DEEPSEEK),
    "DeepSeek-V3": DecoderConfig(vocab=129280, dim=7168, layers=61, hidden=18432, **_DEEPSEEK),
}
"""Name to shape. Of DeepSeek-V2 and V3 the mixers alone: their experts come with chapter 3."""
