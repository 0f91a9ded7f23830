"""Where a token stands. A scheme may act in three places; each one here uses the places it needs.

`embed`   adds to the token embeddings at the bottom of the model (sinusoidal, learnt).
`rotate`  turns queries and keys inside attention (rotary).
`bias`    adds to the attention logits (ALiBi, T5).

`PositionScheme` itself does none of them: it is a model without positions (NoPE).
Positions are integers, shape (batch or 1, seq); padding has position -1 and may get any finite value.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class PositionScheme(nn.Module):
    """No positions, and the interface of all schemes: override what the scheme acts on."""

    def embed(
        self, x: Float[Tensor, "batch seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """Token embeddings with their positions mixed in."""
        return x

    def rotate(
        self, x: Float[Tensor, "batch heads seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> Float[Tensor, "batch heads seq dim"]:
        """Queries or keys turned by their positions."""
        return x

    def bias(
        self, query_positions: Int[Tensor, "batch queries"], key_positions: Int[Tensor, "batch2 keys"]
    ) -> Float[Tensor, "batch3 heads queries keys"] | None:
        """What is added to the attention logits, or None."""
        return None

    @contextmanager
    def reused(self, positions: Int[Tensor, "batch seq"], dtype: torch.dtype) -> Iterator[None]:
        """Within the context, what `rotate` needs of these positions is looked up once for all layers."""
        yield

    def rebuild(self, device: torch.device | str) -> None:
        """Make again, on `device`, what is computed and not learnt (for a model that was made without memory)."""


NoPositions = PositionScheme


def sinusoidal_positions(
    positions: Int[Tensor, "*shape"], dim: int, *, base: float = 10000.0
) -> Float[Tensor, "*shape dim"]:
    r"""$PE(p, 2i) = \sin(p / \text{base}^{2i/d})$ and $PE(p, 2i+1) = \cos(p / \text{base}^{2i/d})$, in turn.

    float32, shape (*positions.shape, dim). Raises ValueError for an odd `dim`.
    Vaswani et al. 2017, section 3.5 (arXiv 1706.03762).
    """
    angles = positions[..., None].float() * _frequencies(dim, base, positions.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SinusoidalPositions(PositionScheme):
    """Adds `sinusoidal_positions` to the embeddings. Has no weights and no longest position."""

    def __init__(self, dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        _check_even(dim)
        self.dim, self.base = dim, base

    def embed(
        self, x: Float[Tensor, "batch seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """x + PE(positions)."""
        _check_features(x, self.dim)
        return x + sinusoidal_positions(positions, self.dim, base=self.base).to(x.dtype)


class LearnedPositions(PositionScheme):
    """A trained vector for each position, added to the embeddings; there is none past `length - 1`."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        _check_length(length)
        self.table = nn.Embedding(length, dim)

    def embed(
        self, x: Float[Tensor, "batch seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """x + table[positions]."""
        _check_features(x, self.table.embedding_dim)
        _check_reach(positions, self.table.num_embeddings)
        return x + self.table(positions.clamp(min=0))


class RotaryPositions(PositionScheme):
    r"""Rotary embedding: feature pairs of queries and keys are turned by angle $p \cdot \text{base}^{-2i/d}$.

    The half-split layout of Llama: feature $i$ is paired with feature $i + d/2$. Sines and cosines of `length`
    positions are kept as one table of 2 x length x dim/2 floats. Raises ValueError for an odd `dim` and for
    positions past the table. Su et al. 2021, section 3.4.2 (arXiv 2104.09864).
    """

    table: Float[Tensor, "length 2 half"]

    def __init__(self, dim: int, *, base: float = 10000.0, length: int = 2048) -> None:
        super().__init__()
        _check_even(dim)
        _check_length(length)
        self.dim, self.base, self.length = dim, base, length
        self._ready: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self.register_buffer("table", None, persistent=False)
        self.rebuild(torch.get_default_device())

    def rebuild(self, device: torch.device | str) -> None:
        """Compute the table of cosines and sines, (length, 2, dim / 2), on `device`."""
        angles = torch.arange(self.length, device=device)[:, None].float() * _frequencies(
            self.dim, self.base, device
        )
        self.table = torch.stack([angles.cos(), angles.sin()], dim=1)

    def _apply(self, fn, recurse: bool = True) -> "RotaryPositions":
        # model.to(bfloat16) must not round the table: bfloat16 has 8 bits, and a cosine of 8 bits turns keys wrongly.
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32:
            self.rebuild(self.table.device)
        return self

    def rotate(
        self, x: Float[Tensor, "batch heads seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> Float[Tensor, "batch heads seq dim"]:
        """Turn each pair; the length of every vector stays as it was."""
        _check_features(x, self.dim)
        ready = self._ready
        known = ready is not None and ready[0] is positions and ready[1][0].dtype == x.dtype
        cos, sin = ready[1] if known else self._look_up(positions, x.dtype)
        # (first, second) * cos + (second, first) * (-sin, sin)
        return torch.addcmul(x * cos, x.roll(self.dim // 2, -1), sin)

    @contextmanager
    def reused(self, positions: Int[Tensor, "batch seq"], dtype: torch.dtype) -> Iterator[None]:
        """Within the context, the cosines and sines of these positions are looked up once for all layers."""
        self._ready = positions, self._look_up(positions, dtype)
        try:
            yield
        finally:
            self._ready = None

    def _look_up(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (-sin, sin) of each position's angles, shape (batch, 1, seq, dim)."""
        _check_reach(positions, self.table.shape[0])
        cos, sin = self.table[positions.clamp(min=0)].to(dtype)[:, None].unbind(-2)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _frequencies(dim: int, base: float, device: torch.device | str | None) -> Float[Tensor, " half"]:
    _check_even(dim)
    if base <= 0:
        raise ValueError(f"base {base} must be positive")
    return base ** (-torch.arange(0, dim, 2, device=device).float() / dim)


def _check_even(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"dim {dim} must be even and positive: features are used in pairs")


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length {length} must be at least 1")


def _check_features(x: Tensor, dim: int) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"x has {x.shape[-1]} features, these positions are made for {dim}")


def _check_reach(positions: Tensor, length: int) -> None:
    # Reading a value back would make a GPU wait at every layer; there, the model checks lengths on the host.
    if positions.device.type == "cpu" and positions.numel() and int(positions.max()) >= length:
        raise ValueError(f"position {int(positions.max())} is past the table of {length} positions")
