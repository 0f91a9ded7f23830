"""The real model twice: in our Decoder, and in transformers from the same GGUF file."""

from itertools import takewhile

import torch

from llm_atlas.core.assets import fetch
from llm_atlas.models.decoder import Decoder
from llm_atlas.models.pretrained import SMOLLM2, load_smollm2
from llm_atlas.text.byte_bpe import ByteBPE

TEXT = (
    "The city of Rome began as a village on the Tiber. Its people traded salt, built walls, quarrelled with their"
    " neighbours, and kept records of all of it. A traveller who came by the river saw the smoke first, then the"
    " hills, then the boats. "
)


def load_both(device: torch.device, dtype: torch.dtype) -> tuple[Decoder, torch.nn.Module, ByteBPE]:
    """Our model, theirs, and the tokenizer; both from one file, in `dtype`."""
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours, tokenizer = load_smollm2(device, dtype)
    path = fetch(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    ).to(device)
    return ours.requires_grad_(False), theirs.eval().requires_grad_(False), tokenizer


def prompts(tokenizer: ByteBPE, batch: int, length: int) -> list[list[int]]:
    """Rows of `length` tokens of English, each beginning elsewhere in the text."""
    ids = tokenizer.encode(TEXT * (2 + length // 40))
    return [ids[7 * row : 7 * row + length] for row in range(batch)]


def agreeing(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """How many first tokens of the rows are equal, over all rows."""
    return sum(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))
        for a, b in zip(ours, theirs, strict=True)
    )
