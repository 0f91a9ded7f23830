"""Who may look where. A mask is True where a query may look at a key, everywhere in this package."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD = -1
"""The position of a token that is only padding."""


def causal_mask(
    queries: int, keys: int | None = None, *, device: torch.device | str | None = None
) -> Bool[Tensor, "{queries} keys"]:
    r"""The lower triangle: query $i$ may look at key $j$ where $j \le i + (\text{keys} - \text{queries})$.

    The last query sees every key, so the same function serves a whole sequence (`keys == queries`) and new tokens
    behind a cache (`keys > queries`). PyTorch's `is_causal` aligns the *first* query with the first key instead:
    the two agree only on squares.

    Raises ValueError when there are more queries than keys: the first queries could look nowhere.
    Vaswani et al. 2017, section 3.2.3 (arXiv 1706.03762).
    """
    keys = queries if keys is None else keys
    if queries < 1 or keys < queries:
        raise ValueError(f"a causal mask needs 1 <= queries <= keys, got queries {queries} and keys {keys}")
    i = torch.arange(keys - queries, keys, device=device)
    j = torch.arange(keys, device=device)
    return j <= i[:, None]


def visible(
    query_positions: Int[Tensor, "batch queries"],
    key_positions: Int[Tensor, "batch2 keys"],
    *,
    window: int | None = None,
) -> Bool[Tensor, "batch3 1 queries keys"]:
    r"""Causal mask from positions: key position $\le$ query position, neither of them padding (`PAD`, -1).

    One rule for whole sequences, left or right padding, rows of different length in one cache, and caches whose
    keys are not in order: whatever a cache stores, it stores the position beside it. With `window`, a query also
    looks no further back than `window - 1` positions. Shape (batch, 1, queries, keys), ready for all heads.
    """
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1")
    q, k = query_positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (k <= q) & (k > PAD)
    return seen if window is None else seen & (k > q - window)


def padding_mask(positions: Int[Tensor, "batch keys"]) -> Bool[Tensor, "batch 1 1 keys"]:
    """True at real tokens, False at padding, for attention that is not causal (encoders, cross-attention)."""
    return (positions > PAD)[:, None, None, :]


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int = 0, *, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Rows of token ids of different length -> (ids, positions), both (batch, longest).

    Padding stands on the left, so that the last column holds every row's last token and all rows grow together.
    Its positions are `PAD`; the first real token of each row has position 0.
    """
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) == 0:
        empty = lengths.index(0) if lengths else None
        where = "no prompts at all" if empty is None else f"prompt {empty} is empty"
        raise ValueError(f"a prompt needs at least one token: {where}")
    longest = max(lengths)
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    positions = [[PAD] * (longest - n) + list(range(n)) for n in lengths]
    return torch.tensor(ids, device=device), torch.tensor(positions, device=device)


def sliding_window_mask(
    queries: int,
    keys: int | None = None,
    *,
    window: int,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "{queries} keys"]:
    r"""A band: query $i$ may look at key $j$ where $i - \text{window} < j \le i$ ($i$ counted as in `causal_mask`).

    The window counts the query's own key: window 1 is the diagonal, and a window of at least `keys` the causal mask.
    Not `causal`: $|i - j| < \text{window}$, as far ahead as back (the $w$ of Longformer is 2 window - 2). A mask over
    all pairs of full attention hides most of them and saves none: `nn.local_attention` leaves them out.
    Raises ValueError for a window below 1 and where `causal_mask` does.
    Beltagy et al. 2020, section 3.1 (arXiv 2004.05150); Jiang et al. 2023, section 2 (arXiv 2310.06825).
    """
    check_window(window)
    mask = causal_mask(queries, keys, device=device)
    keys = mask.shape[1]
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    return mask & (j > i - window) if causal else (i - j).abs() < window


def check_window(window: int) -> None:
    """Raise TypeError for a window that is no whole number, ValueError for one below 1."""
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window {window!r} must be an int, the number of keys a query sees")
    if window < 1:
        raise ValueError(f"window {window} must be at least 1: it counts the query's own key")


def check_rising(positions: Int[Tensor, "batch seq"]) -> None:
    """Raise ValueError unless positions grow by at least 1 from slot to slot, padding aside, in every row.

    Then two tokens are never further apart in slots than in positions, and the last `window` slots hold all that a
    window of positions reaches. Padding on the left or right keeps to it, padding between tokens does not, nor do two
    candidates for one position. Checked on the CPU only: elsewhere reading a value back would make the device wait.
    """
    if positions.device.type != "cpu":
        return
    ahead = positions - torch.arange(positions.shape[1])
    padded = positions <= PAD
    most = ahead.masked_fill(padded, torch.iinfo(ahead.dtype).min).cummax(-1).values
    late = ~padded & (most > ahead)
    if late.any():
        row, slot = late.nonzero()[0].tolist()
        raise ValueError(
            f"position {int(positions[row, slot])} in slot {slot} of row {row} does not lie as far from an earlier"
            " one as their slots: a window needs tokens in order, and padding at the ends alone"
        )
