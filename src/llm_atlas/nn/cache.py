"""The key/value cache: what attention has computed of the past, kept so that it is not computed again.

A model's cache is a list of layer caches and, once for all of them, the position of every slot.
Positions are what masks are made of (`nn.masks.visible`), so rows of different length need no other bookkeeping.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_atlas.nn.masks import check_rising, check_window


class LayerCache:
    """One layer's part of a `KVCache`: what its mixer keeps of the past.

    Either tensors with a slot for every token (`append`: keys and values, or latents), or tensors of fixed size that
    sum up all tokens (`keep`: the state of a recurrent mixer), or both. Other caches override these methods.
    """

    def __init__(self, owner: "KVCache") -> None:
        self._owner = owner
        self._buffers: tuple[Tensor, ...] | None = None
        self.state: tuple[Tensor, ...] | None = None
        self.length = 0

    @property
    def positions(self) -> Int[Tensor, "batch length"] | None:
        """The position of every slot, this step's included; None before the model has placed any."""
        return self._owner.positions

    @property
    def plain(self) -> bool:
        """Whether every row holds positions 0, 1, 2, ... (also when no model has placed any)."""
        return self._owner.plain

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 when nothing is kept."""
        kept = self.state or self._buffers
        return kept[0].shape[0] if self.length else 0

    def append(
        self, *new: Float[Tensor, "batch _heads new _dim"]
    ) -> tuple[Float[Tensor, "batch _heads _length _dim"], ...]:
        """Keep the new slots behind the old ones and return all of them, views without a copy.

        Keys and values, or as many tensors as the mixer likes (latent attention keeps one); heads and features may
        differ between them, batch and new tokens may not.
        """
        end = self.length + new[0].shape[-2]
        self._reserve(new, end)
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[:, :, self.length : end] = tensor
        self.length = end
        return self.read()

    def read(self) -> tuple[Float[Tensor, "batch _heads _length _dim"], ...]:
        """All that is kept, views without a copy."""
        if self._buffers is None:
            raise ValueError("the cache is empty: append before read")
        return tuple([buffer[:, :, : self.length] for buffer in self._buffers])

    def keep(self, new: int, *state: Tensor) -> None:
        """Put `state` (tensors with the batch first) in the place of the old one: it now covers `new` more tokens."""
        self.state = state
        self.length += new

    def truncate(self, length: int) -> None:
        """Forget the slots from `length` on. A state cannot go back: fork before what you may want to undo."""
        self.check_cut(length)
        if length == 0:
            self.state = None
        self.length = length

    def check_cut(self, length: int) -> None:
        """Raise ValueError where `truncate(length)` would."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} slots")
        if self.state is not None and 0 < length < self.length:
            raise ValueError(
                f"cannot truncate to {length}: a recurrent state of {self.length} tokens cannot go back; fork it first"
            )

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once."""
        if self._buffers is not None:
            self._buffers = tuple(buffer[rows.to(buffer.device)] for buffer in self._buffers)
        if self.state is not None:
            self.state = tuple(tensor[rows.to(tensor.device)] for tensor in self.state)

    def fork(self, owner: "KVCache") -> "LayerCache":
        """A copy that can go its own way."""
        twin = copy.copy(self)  # keeps the kind, and a state, which is replaced and never written into
        twin._owner = owner
        twin._buffers = None if self._buffers is None else tuple(buffer.clone() for buffer in self._buffers)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use, keys and values together (room that is only reserved is not counted)."""
        kept = (() if self._buffers is None else self.read()) + (self.state or ())
        return sum(t.numel() * t.element_size() for t in kept)

    def _reserve(self, new: tuple[Tensor, ...], end: int) -> None:
        misfit = None if self._buffers is None else _misfit(self._buffers, new)
        if misfit and self.length:
            raise ValueError(misfit)
        if misfit or self._buffers is None:  # an empty cache takes whatever comes first
            room = max(end, self._owner.capacity)
            self._buffers = _empty(new, room)
        elif (
            end > self._buffers[0].shape[2]
        ):  # double, so that growing one token at a time copies O(length) in all
            room = max(end, 2 * self._buffers[0].shape[2])
            grown = _empty(self._buffers, room)
            for big, old in zip(grown, self._buffers, strict=True):
                big[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = grown


@torch.inference_mode(False)
def _empty(like: tuple[Tensor, ...], room: int) -> tuple[Tensor, ...]:
    """Buffers of `room` slots. Made in inference mode they could not be written to outside of it later."""
    return tuple(t.new_empty(*t.shape[:2], room, t.shape[-1]) for t in like)


def _misfit(kept: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> str | None:
    """Why the new tensors (keys and values, mostly) cannot stand behind the kept ones, or None."""
    if len(kept) != len(new):
        return f"the cache holds {len(kept)} tensors a slot, the new tokens have {len(new)}"
    for name, old, t in zip(("keys", "values", *range(2, len(new))), kept, new, strict=False):
        if old.shape[0] != t.shape[0]:
            return f"the cache holds {old.shape[0]} rows, the new {name} have {t.shape[0]}"
        if (old.shape[1], old.shape[3]) != (t.shape[1], t.shape[3]):
            have = f"{t.shape[1]} of {t.shape[3]}"
            return f"the cache holds {old.shape[1]} heads of {old.shape[3]}, the new {name} have {have}"
        if old.dtype != t.dtype or old.device != t.device:
            return f"the cache is {old.dtype} on {old.device}, the new {name} are {t.dtype} on {t.device}"
    return None


class KVCache:
    r"""Contiguous cache of a whole model, grown as needed; reserve `capacity` slots when you know the length.

    Bytes a token and row: 2 x layers x key/value heads x head dim x bytes a number.
    Use: `cache = KVCache(layers)`, then pass it to every call of the model. `layer` makes one layer's part: another
    kind of cache is another `LayerCache`, and where its slots stand differently another `place`. A sequence of them,
    one a layer, mixes kinds (windowed layers between full ones: `partial(RollingLayerCache, window=1024)`).
    Shazeer 2019, section 2.4 (arXiv 1911.02150).
    """

    def __init__(
        self,
        layers: int,
        *,
        capacity: int = 0,
        layer: Callable[["KVCache"], LayerCache] | Sequence[Callable[["KVCache"], LayerCache]] = LayerCache,
    ) -> None:
        if layers < 1 or capacity < 0:
            raise ValueError(f"layers {layers} must be at least 1 and capacity {capacity} not negative")
        kinds = [layer] * layers if callable(layer) else layer
        if len(kinds) != layers:
            raise ValueError(f"there are {len(kinds)} kinds of cache for {layers} layers")
        self.capacity = capacity
        self.positions: Int[Tensor, "batch length"] | None = None
        self._in_order = 0  # so many slots from the first hold positions 0, 1, 2, ... in every row
        self._layers = [kind(self) for kind in kinds]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def length(self) -> int:
        """Slots in use (of the longest row)."""
        return 0 if self.positions is None else self.positions.shape[1]

    @property
    def plain(self) -> bool:
        """Whether every row holds positions 0, 1, 2, ... and no padding: then no mask is needed."""
        return self._in_order == self.length

    @property
    def rows(self) -> int:
        """Rows of the batch that it holds; 0 before the first tokens."""
        return max(layer.rows for layer in self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' slots in use."""
        return sum(layer.nbytes for layer in self._layers)

    def place(
        self,
        new: int,
        positions: Int[Tensor, "batch {new}"] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Int[Tensor, "batch {new}"]:
        """Make `new` slots in every row, before the layers append to them, and say where their tokens stand.

        Without `positions` each row counts on from its own last token; with them padding has position -1. Shape
        (batch or 1, new); `self.positions` then has all slots, these included.
        """
        plain = positions is None and self.plain
        if plain:
            positions = torch.arange(self.length, self.length + new, device=device)[None]
        elif positions is None:  # behind padding
            positions = self.positions[:, -1:] + 1 + torch.arange(new, device=self.positions.device)
        placed = positions
        if self.positions is not None and self.positions.shape[0] != positions.shape[0]:
            rows = max(self.positions.shape[0], positions.shape[0])
            self.positions, placed = self.positions.expand(rows, -1), positions.expand(rows, -1)
        self.positions = placed if self.positions is None else torch.cat([self.positions, placed], dim=1)
        self._in_order += new if plain else 0
        return positions

    def truncate(self, length: int) -> None:
        """Forget the slots from `length` on, in every layer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} slots")
        for layer in self._layers:  # all of them before any is changed
            layer.check_cut(min(length, layer.length))
        if self.positions is not None:
            self.positions = self.positions[:, :length] if length else None
            self._in_order = min(self._in_order, length)
        for layer in self._layers:
            layer.truncate(min(length, layer.length))

    def select(self, rows: Int[Tensor, " rows"] | Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once (beams)."""
        if not self.rows:
            return  # nothing is kept yet
        rows = torch.as_tensor(rows)
        if rows.dim() != 1 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
            raise ValueError(
                f"rows must be a list of row numbers, got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        if rows.device.type == "cpu":  # elsewhere reading a value back would make the device wait
            wrong = [row for row in rows.tolist() if not 0 <= row < self.rows]
            if wrong:
                raise ValueError(f"row {wrong[0]} is not one of the {self.rows} rows of the cache")
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions[rows.to(self.positions.device)]
        for layer in self._layers:
            layer.select(rows)

    def fork(self) -> "KVCache":
        """A copy that can go its own way: both may append from here."""
        twin = copy.copy(self)
        twin._layers = [layer.fork(twin) for layer in self._layers]
        return twin


class RollingLayerCache(LayerCache):
    r"""Keeps the last `window` tokens, and the first `sinks` if asked: bounded memory for text of any length.

    `append` returns what the new tokens may look at, the old window and all of the new ones, and forgets afterwards;
    so a prompt longer than the window may come in one piece. `length` goes on counting the tokens seen, `positions`
    are those of the slots that the last `append` returned. `truncate` needs the whole window before the cut: one
    token can be taken back, more only while nothing is gone; fork before drafts.

    Slots are dropped by their number, so tokens must stand in order, and padding on the left; the first slots of a
    row must be tokens where `sinks` are kept. ValueError otherwise, on the CPU (`nn.masks.check_rising`).
    Keys keep the rotation of their place in the text: sinks grow more distant, where the paper counts places within
    the cache. For that reason alone the context of a rotary table still ends the text.
    Bytes: (window + sinks) x those of one token. Cost of an append: one copy of that.
    Use: `KVCache(layers, layer=partial(RollingLayerCache, window=256))`.
    Jiang et al. 2023, section 2 (arXiv 2310.06825); sinks: Xiao et al. 2023, section 3.2 (arXiv 2309.17453).
    """

    def __init__(self, owner: KVCache, *, window: int, sinks: int = 0) -> None:
        super().__init__(owner)
        check_window(window)
        if sinks < 0:
            raise ValueError(f"sinks {sinks} must not be negative")
        self.window, self.sinks = window, sinks
        self._gone = 0  # so many slots behind the sinks are dropped
        self._returned = 0  # and so many were, before the last append

    @property
    def positions(self) -> Int[Tensor, "batch length"] | None:
        """The position of every slot that the last `append` returned; slot numbers where no model has placed any."""
        return None if self._buffers is None else self._places(self._returned, self.length)

    def append(
        self, *new: Float[Tensor, "batch _heads new _dim"]
    ) -> tuple[Float[Tensor, "batch _heads _length _dim"], ...]:
        """The kept slots and the new ones behind them; then only the last `window` and the sinks are kept."""
        misfit = None if self._buffers is None else _misfit(self._buffers, new)
        if misfit:
            raise ValueError(misfit)
        end = self.length + new[0].shape[-2]
        self._check_order(end)
        joined = new
        if self._buffers is not None:
            joined = tuple(torch.cat(pair, dim=2) for pair in zip(self._buffers, new, strict=True))
        self._returned, self.length = self._gone, end
        self._gone = max(self._gone, end - self.sinks - self.window)
        drop = self._gone - self._returned
        # A copy, so that what is dropped is freed.
        parts = [(t[:, :, : self.sinks], t[:, :, self.sinks + drop :]) for t in joined]
        self._buffers = tuple(torch.cat(part, dim=2) for part in parts) if drop else joined
        return joined

    def read(self) -> tuple[Float[Tensor, "batch _heads _length _dim"], ...]:
        """What is kept for the next tokens: the sinks and the last window."""
        if self._buffers is None:
            raise ValueError("the cache is empty: append before read")
        return self._buffers

    def keep(self, new: int, *state: Tensor) -> None:
        """Not here: a state is of fixed size already."""
        raise TypeError("a rolling cache keeps slots, not a state: use LayerCache")

    def truncate(self, length: int) -> None:
        """Forget the slots from `length` on. ValueError when part of the window before them is gone already."""
        self.check_cut(length)
        if length <= self.sinks:
            self._gone = 0
        kept = length - self._gone
        self._buffers = tuple(t[:, :, :kept] for t in self.read()) if length else None
        self.length, self._returned = length, self._gone

    def check_cut(self, length: int) -> None:
        """Raise ValueError where `truncate(length)` would."""
        super().check_cut(length)
        first = self.sinks + self._gone  # of those that are kept behind the sinks
        if self._gone and self.sinks < length < first + self.window - 1:
            raise ValueError(
                f"cannot truncate to {length}: a window of {self.window} there begins in slot"
                f" {max(0, length - self.window + 1)}, and slots {self.sinks} to {first - 1} are gone; fork it first"
            )

    def _places(self, gone: int, end: int) -> Tensor:
        placed = self._owner.positions
        if placed is None:
            placed = torch.arange(end, device=self._buffers[0].device)[None]
        if not gone:
            return placed[:, :end]
        return torch.cat([placed[:, : self.sinks], placed[:, self.sinks + gone : end]], dim=1)

    def _check_order(self, end: int) -> None:
        placed = self._owner.positions
        if placed is None or self.plain or placed.device.type != "cpu":
            return
        check_rising(placed[:, :end])
        first = placed[:, : min(self.sinks, end)]
        if (first != torch.arange(first.shape[1])).any():
            raise ValueError(
                f"the first {first.shape[1]} slots are kept as sinks and must hold positions 0, 1, ... in every row,"
                f" not {first.tolist()}"
            )
