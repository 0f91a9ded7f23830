"""What every text model asks of its input: ids that are rows of its table, positions that fit, and a mask of them."""

import torch
from torch import Tensor, nn

from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.masks import visible


def check_ids(ids: Tensor, table: nn.Embedding, what: str = "id") -> None:
    """Raise ValueError or TypeError for ids that are no rows of `table`."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{what}s must have shape (batch, seq) with both at least 1, got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{what}s must be int64 or int32, got {ids.dtype}")
    if ids.device != table.weight.device:
        raise ValueError(f"{what}s are on {ids.device}, the model is on {table.weight.device}")
    if ids.device.type == "cpu":  # elsewhere reading values back would make the device wait
        low, high = map(int, ids.aminmax())
        if low < 0 or high >= table.num_embeddings:
            bad = low if low < 0 else high
            raise ValueError(f"token {what} {bad} is outside the vocabulary of {table.num_embeddings}")


def check_positions(x: Tensor, positions: Tensor | None, context: int, past: int = 0) -> None:
    """Raise ValueError where positions do not fit the tokens, or the tokens the context."""
    (rows, new) = x.shape[:2]
    if positions is not None and positions.shape != (rows, new):
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}, the tokens have {(rows, new)}: they must be equal"
        )
    if past + new > context:
        raise ValueError(f"{past + new} tokens do not fit the context of {context}")


def place(
    x: Tensor, positions: Tensor | None, mask: Tensor | None, cache: KVCache | None, *, context: int
) -> tuple[Tensor, Tensor | None]:
    """Where the new tokens `x` (batch, seq, dim) of a decoder stand, and the mask that it needs.

    Without `positions` they follow on from what `cache` holds, which gets their places here. The mask is the one given,
    or None where causal order is enough, or made of positions where there is padding. Raises ValueError, before the
    cache is touched, where positions, rows or length do not fit.
    """
    (rows, new), past = x.shape[:2], 0 if cache is None else cache.length
    check_positions(x, positions, context, past)
    if past and cache.rows != rows:
        raise ValueError(f"the cache holds {cache.rows} rows, the new ids have {rows}")
    plain = positions is None
    if cache is not None:
        positions = cache.place(new, positions, device=x.device)
        plain = cache.plain
    elif plain:
        positions = torch.arange(new, device=x.device)[None]
    if mask is None and not plain:
        mask = visible(positions, positions if cache is None else cache.positions)
    return positions, mask
