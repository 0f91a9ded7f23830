"""Real models, loaded into our own."""

import torch

from llm_atlas.core.assets import fetch
from llm_atlas.core.device import default_dtype, pick_device
from llm_atlas.core.weights import load_gguf
from llm_atlas.models.decoder import Decoder
from llm_atlas.models.families import build, from_gguf_metadata, gguf_weights
from llm_atlas.text.byte_bpe import ByteBPE

SMOLLM2 = "smollm2-135m-instruct"


def load_smollm2(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Decoder, ByteBPE]:
    """SmolLM2-135M-Instruct in our Decoder, and its tokenizer. Fetched once (93 MB), then from the cache.

    134,515,008 parameters, 30 layers, 576 features, 9 query heads over 3 key/value heads, context 8192, Apache-2.0.
    The file stores most weights in 4 bits (Q4_1); here they are dequantized to `dtype` (chosen by device unless given).
    Errors: `AssetError` when it is not in the cache and cannot be fetched. Ben Allal et al. 2025 (arXiv 2502.02737).
    """
    device = pick_device(device)
    file = load_gguf(fetch(SMOLLM2), dtype=dtype or default_dtype(device), device=device)
    config = from_gguf_metadata(file.metadata, tied="output.weight" not in file.tensors)
    model = build(config, gguf_weights(file.tensors, config), Decoder)
    return model.eval(), ByteBPE.from_gguf(file.metadata)
