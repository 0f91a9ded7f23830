"""The key/value cache: what attention has computed of the past, kept so that it is not computed again.

A model's cache is a list of layer caches and, once for all of them, the position of every slot.
Positions are what masks are made of (`nn.masks.visible`), so rows of different length need no other bookkeeping.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayerCache:
    """One layer's part of a `KVCache`: two growing tensors (keys and values, or whatever the mixer keeps)."""

    def __init__(self, owner: "KVCache") -> None:
        self._owner = owner
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.length = 0

    @property
    def positions(self) -> Int[Tensor, "batch length"] | None:
        """The position of every slot, this step's included; None before the model has placed any."""
        return self._owner.positions

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first append."""
        return 0 if self._buffers is None else self._buffers[0].shape[0]

    def append(
        self, k: Float[Tensor, "batch heads new dim"], v: Float[Tensor, "batch heads2 new value_dim"]
    ) -> tuple[Float[Tensor, "batch heads length dim"], Float[Tensor, "batch heads2 length value_dim"]]:
        """Keep the new slots behind the old ones and return all of them, views without a copy."""
        end = self.length + k.shape[-2]
        self._reserve(k, v, end)
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        return self.read()

    def read(self) -> tuple[Float[Tensor, "batch heads length dim"], Float[Tensor, "batch heads2 length value_dim"]]:
        """All that is kept, views without a copy."""
        if self._buffers is None:
            raise ValueError("the cache is empty: append before read")
        first, second = self._buffers
        return first[:, :, : self.length], second[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget the slots from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} slots")
        self.length = length

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once."""
        if self._buffers is not None:
            self._buffers = tuple(buffer[rows] for buffer in self._buffers)

    def fork(self, owner: "KVCache") -> "LayerCache":
        """A copy that can go its own way."""
        twin = LayerCache(owner)
        twin.length = self.length
        twin._buffers = None if self._buffers is None else tuple(buffer.clone() for buffer in self._buffers)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use, keys and values together (room that is only reserved is not counted)."""
        return 0 if self._buffers is None else sum(t.numel() * t.element_size() for t in self.read())

    def _reserve(self, k: Tensor, v: Tensor, end: int) -> None:
        misfit = None if self._buffers is None else _misfit(self._buffers, (k, v))
        if misfit and self.length:
            raise ValueError(misfit)
        if misfit or self._buffers is None:  # an empty cache takes whatever comes first
            room = max(end, self._owner.capacity)
            self._buffers = tuple(t.new_empty(*t.shape[:2], room, t.shape[-1]) for t in (k, v))
        elif end > self._buffers[0].shape[2]:  # double, so that growing one token at a time copies O(length) in all
            room = max(end, 2 * self._buffers[0].shape[2])
            grown = tuple(t.new_empty(*t.shape[:2], room, t.shape[-1]) for t in self._buffers)
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = grown


def _misfit(kept: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> str | None:
    """Why the new keys and values cannot stand behind the kept ones, or None."""
    for name, old, t in zip(("keys", "values"), kept, new, strict=True):
        if old.shape[0] != t.shape[0]:
            return f"the cache holds {old.shape[0]} rows, the new {name} have {t.shape[0]}"
        if (old.shape[1], old.shape[3]) != (t.shape[1], t.shape[3]):
            return f"the cache holds {old.shape[1]} heads of {old.shape[3]}, the new {name} have {t.shape[1]} of {t.shape[3]}"
        if old.dtype != t.dtype or old.device != t.device:
            return f"the cache is {old.dtype} on {old.device}, the new {name} are {t.dtype} on {t.device}"
    return None


class KVCache:
    r"""Contiguous cache of a whole model, grown as needed; reserve `capacity` slots when you know the length.

    Bytes: $2 \cdot \text{layers} \cdot \text{kv heads} \cdot \text{head dim} \cdot \text{bytes per number}$ a token and row.
    Use: `cache = KVCache(layers)`, then pass it to every call of the model. Shazeer 2019, section 2.4 (arXiv 1911.02150).
    """

    def __init__(self, layers: int, *, capacity: int = 0) -> None:
        if layers < 1 or capacity < 0:
            raise ValueError(f"layers {layers} must be at least 1 and capacity {capacity} not negative")
        self.capacity = capacity
        self.positions: Int[Tensor, "batch length"] | None = None
        self.plain = True  # every row holds positions 0, 1, 2, ... and no padding: no mask is needed
        self._layers = [LayerCache(self) for _ in range(layers)]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def length(self) -> int:
        """Slots in use."""
        return 0 if self.positions is None else self.positions.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the batch that it holds; 0 before the first tokens."""
        return max(layer.rows for layer in self._layers) if self.length else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' slots in use."""
        return sum(layer.nbytes for layer in self._layers)

    def place(self, positions: Int[Tensor, "batch new"], *, plain: bool) -> Int[Tensor, "batch length"]:
        """Say where the next tokens stand, before the layers append them. Returns the positions of all slots.

        `plain` says that they simply follow on, in every row, as they do without padding.
        """
        if self.positions is not None and self.positions.shape[0] != positions.shape[0]:
            rows = max(self.positions.shape[0], positions.shape[0])
            self.positions, positions = self.positions.expand(rows, -1), positions.expand(rows, -1)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        self.plain = self.plain and plain
        return self.positions

    def truncate(self, length: int) -> None:
        """Forget the slots from `length` on, in every layer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} slots")
        if self.positions is not None:
            self.positions = self.positions[:, :length] if length else None
            self.plain = self.plain or length == 0
        for layer in self._layers:
            layer.truncate(min(length, layer.length))

    def select(self, rows: Int[Tensor, " rows"] | Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once (beams)."""
        if self.positions is None:
            return  # nothing is kept yet
        rows = torch.as_tensor(rows)
        if rows.dim() != 1 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
            raise ValueError(f"rows must be a list of row numbers, got {rows.dtype} of shape {tuple(rows.shape)}")
        if rows.device.type == "cpu":  # elsewhere reading a value back would make the device wait
            wrong = [row for row in rows.tolist() if not 0 <= row < self.rows]
            if wrong:
                raise ValueError(f"row {wrong[0]} is not one of the {self.rows} rows of the cache")
        rows = rows.to(self.positions.device)
        if self.positions.shape[0] > 1:
            self.positions = self.positions[rows]
        for layer in self._layers:
            layer.select(rows)

    def fork(self) -> "KVCache":
        """A copy that can go its own way: both may append from here."""
        twin = KVCache(len(self), capacity=self.capacity)
        twin.positions, twin.plain = self.positions, self.plain
        twin._layers = [layer.fork(twin) for layer in self._layers]
        return twin
