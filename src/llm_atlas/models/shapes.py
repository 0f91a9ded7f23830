"""The shapes of published models, as configurations of the one Decoder: what ledgers count with.

Sizes are those of the models' own configuration files and reports. Nothing here is loaded or run: counting needs no
weights.
"""

from llm_atlas.models.decoder import DecoderConfig, LatentConfig
from llm_atlas.nn.moe import ExpertsConfig

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
_GPT = {
    "vocab": 50257,
    "activation": "gelu_tanh",
    "gated": False,
    "norm": "layer",
    "positions": "learned",
    "attention_bias": True,
    "out_bias": True,
    "feedforward_bias": True,
}

SHAPES: dict[str, DecoderConfig] = {
    "GPT-2 small": DecoderConfig(dim=768, layers=12, heads=12, hidden=3072, context=1024, **_GPT),
    "GPT-3 175B": DecoderConfig(dim=12288, layers=96, heads=96, hidden=49152, context=2048, **_GPT),
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
    "Mixtral 8x7B": DecoderConfig(
        vocab=32000,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        hidden=14336,
        experts=ExpertsConfig(experts=8, active=2, hidden=14336),
        context=32768,
        rope_base=1e6,
        tied=False,
    ),
    "Qwen3 8B": DecoderConfig(dim=4096, layers=36, heads=32, hidden=12288, **_QWEN3),
    "Qwen3 32B": DecoderConfig(dim=5120, layers=64, heads=64, hidden=25600, **_QWEN3),
    "Qwen3-235B-A22B": DecoderConfig(
        dim=4096,
        layers=94,
        heads=64,
        hidden=12288,
        experts=ExpertsConfig(experts=128, active=8, hidden=1536),
        **(_QWEN3 | {"kv_heads": 4}),
    ),
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
    "DeepSeek-V2": DecoderConfig(
        vocab=102400,
        dim=5120,
        layers=60,
        hidden=12288,
        experts=ExpertsConfig(
            experts=160,
            active=6,
            hidden=1536,
            shared=2,
            renormalize=False,
            scale=16.0,
            groups=8,
            active_groups=3,
        ),
        dense_layers=(0,),
        **_DEEPSEEK,
    ),
    "DeepSeek-V3": DecoderConfig(
        vocab=129280,
        dim=7168,
        layers=61,
        hidden=18432,
        experts=ExpertsConfig(
            experts=256,
            active=8,
            hidden=2048,
            shared=1,
            score="sigmoid",
            scale=2.5,
            selection_bias=True,
            groups=8,
            active_groups=4,
        ),
        dense_layers=(0, 1, 2),
        **_DEEPSEEK,
    ),
}
"""Name to shape. DeepSeek-V3 without its module that predicts a second token."""
