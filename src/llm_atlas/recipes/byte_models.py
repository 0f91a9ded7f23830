"""What the experiments on small byte-level models share: data, loss and measure.

Text is the King James Bible, one token a byte, its last tenth held out.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.seeds import generator
from llm_atlas.text.corpora import BYTES, random_windows


def next_byte_loss(model: nn.Module, windows: Int[Tensor, "batch length"]) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of every byte given those before it, in nats."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), {}


def batches(
    ids: Int[Tensor, " bytes"], seed: int, *, batch: int, length: int
) -> Iterator[Int[Tensor, "batch length2"]]:
    """Endless random windows of the text: `length` bytes to read and, one further on, as many to predict."""
    rng = generator(seed)
    while True:
        yield random_windows(ids, batch=batch, length=length + 1, generator=rng)


def held_out_windows(
    ids: Int[Tensor, " bytes"], *, batch: int, length: int, seed: int = 12345
) -> Int[Tensor, "batch length2"]:
    """The windows on which runs are compared: the same for all of them, whatever their own seed."""
    return random_windows(ids, batch=batch, length=length + 1, generator=generator(seed))


@torch.inference_mode()
def measure(model: nn.Module, windows: Int[Tensor, "batch length"]) -> float:
    """Loss on `windows`, in nats a byte."""
    return float(next_byte_loss(model, windows)[0])


def unigram_loss(ids: Int[Tensor, " bytes"]) -> float:
    """Entropy of the bytes' frequencies, in nats: the best a model can do that sees no byte before."""
    share = torch.bincount(ids, minlength=BYTES) / len(ids)
    return float(torch.special.entr(share).sum())
