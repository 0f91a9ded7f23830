"""From logits to a token. Transforms, `transform(logits, history) -> logits`, are applied in order."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Transform = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""(logits (batch, vocab), the ids of every row so far) -> logits."""


def temperature(t: float) -> Transform:
    r"""Divide the logits by $T$: below 1 sharpens the distribution, above 1 flattens it.

    Raises ValueError unless $T > 0$; the limit $T \to 0$ is `greedy`. Hinton et al. 2015, section 2 (arXiv 1503.02531).
    """
    if not 1e-6 <= t < float("inf"):
        raise ValueError(f"temperature {t} must be at least 1e-6 and finite; 0 is greedy decoding")
    return lambda logits, history: logits / t


def greedy(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    """The likeliest token of every row."""
    return logits.argmax(-1)


def sample(
    logits: Float[Tensor, "batch vocab"], generator: torch.Generator | None = None
) -> Int[Tensor, " batch"]:
    """One token a row, drawn from softmax(logits)."""
    return torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
