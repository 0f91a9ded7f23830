"""Sliding-window (local) attention whose cost grows with the sequence, not with its square.

A band mask over full attention (`nn.masks.sliding_window_mask`) hides pairs after their scores have been computed.
Here most pairs never meet: the queries are cut into blocks, and a block meets the keys near it alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from llm_atlas.nn.attention import AttendFunction, check_attention, fused_attention
from llm_atlas.nn.masks import PAD, check_rising, check_window, sliding_window_mask, visible

Bias = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(queries, their positions, the keys' positions) -> what is added to the logits: `PositionScheme.bias`."""


def local_attention(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    window: int,
    positions: Int[Tensor, "*#batch keys"] | None = None,
    bias: Bias | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    block: int | None = None,
    attend: AttendFunction = fused_attention,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    r"""Every query attends to the `window` keys up to its own: $O(n \cdot \text{window})$ time and memory.

    A block of `block` queries meets $\text{window} + \text{block}$ keys, its own block and the window before, so
    each query is scored with that many; blocks lie in the batch axis of one call of `attend`. With the `block` as
    long as the window (the default, but at least 64) that is 2 window keys; shorter blocks score fewer and copy the
    keys more often. Equal to `scaled_dot_product_attention` under `sliding_window_mask`, and no tensor has an axis
    of all queries and one of all keys: an n x n `mask` or `bias` is no argument for that reason.

    Axes as in `scaled_dot_product_attention`: any leading ones, groups of heads that share keys. There may be more
    keys than queries (new tokens behind a cache): the queries are the last of them. Not `is_causal`: the window
    reaches as far ahead as back, $|i - j| < \text{window}$, and there are as many queries as keys.

    `positions` of the keys (batch or 1, keys; for inputs without a batch just (keys)): who sees whom is then decided
    by `nn.masks.visible`, so padding (`PAD`) is seen by nobody, and a query that is padding gets zeros. Tokens must
    stand in order and padding on the left or right. `bias` is asked for each block's part of the additive terms, with
    the blocks in the batch axis: `PositionScheme.bias` fits.

    Raises ValueError for a window or block below 1, for more queries than keys, for positions that are not in order
    (on the CPU) and where shapes do not fit. Beltagy et al. 2020, section 3.1 (arXiv 2004.05150).
    """
    check_window(window)
    check_attention(q, k, v, None, None, False)
    queries, keys = q.shape[-2], k.shape[-2]
    if queries < 1 or keys < queries:
        raise ValueError(f"local attention needs 1 <= queries <= keys, got queries {queries} and keys {keys}")
    if not is_causal and queries != keys:
        raise ValueError(
            f"a window to both sides needs as many queries as keys, got queries {queries} and keys {keys}"
        )
    block = _block(window, block)
    bare = q.dim() == k.dim() == 2
    q, k, v = (t[None] if t.dim() == 2 else t for t in (q, k, v))
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    rows = math.prod(lead)
    q, k, v = (t.expand(*lead, *t.shape[-3:]).reshape(rows, *t.shape[-3:]) for t in (q, k, v))

    plain = positions is None
    if plain:
        positions = torch.arange(keys, device=q.device)[None]
    else:
        positions, plain = _rows_of_positions(positions, lead, keys)
    if is_causal:  # nobody looks further back than the first query's window
        near = min(keys, queries + window - 1)
        k, v, positions = k[..., -near:, :], v[..., -near:, :], positions[:, -near:]

    def mix(
        q: Tensor, k: Tensor, v: Tensor, at: tuple[Tensor, Tensor], **how: Tensor | bool | None
    ) -> Tensor:
        return attend(q, k, v, bias=None if bias is None else bias(q, *at), scale=scale, **how)

    if queries <= block:
        out = _one_block(mix, q, k, v, positions, window, is_causal, plain)
    else:
        out = _blocks(mix, q, k, v, positions, window, is_causal, plain, block)
    out = out.reshape(*lead, *out.shape[1:])
    return out[0] if bare else out


def _one_block(
    mix: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int,
    is_causal: bool,
    plain: bool,
) -> Tensor:
    """All queries with all keys: so few that nothing is worth leaving out."""
    queries, keys = q.shape[-2], k.shape[-2]
    at = positions[:, -queries:], positions
    if not plain:
        return mix(q, k, v, at, mask=_mask(*at, window, is_causal), is_causal=False)
    if queries == 1 or (keys <= window and queries == keys):  # no band to be seen
        return mix(q, k, v, at, mask=None, is_causal=is_causal and queries > 1)
    mask = sliding_window_mask(queries, keys, window=window, causal=is_causal, device=q.device)
    return mix(q, k, v, at, mask=mask, is_causal=False)


def _blocks(
    mix: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int,
    is_causal: bool,
    plain: bool,
    block: int,
) -> Tensor:
    batch, queries, past = q.shape[0], q.shape[-2], k.shape[-2] - q.shape[-2]
    reach = min(window, k.shape[-2])  # in slots; in positions, which may leave some out, it stays as it is
    count, ahead = -(-queries // block), 0 if is_causal else reach
    rest, front, span = count * block - queries, reach - past, reach + block + ahead

    q_positions = functional.pad(positions[:, past:], (0, rest), value=PAD).unflatten(1, (count, block))
    k_positions = functional.pad(positions, (front, rest + ahead), value=PAD).unfold(1, span, block)
    # (batch, blocks, heads, tokens, features); the keys of neighbours overlap, as views of one tensor.
    q = functional.pad(q, (0, 0, 0, rest)).unflatten(2, (count, block)).transpose(1, 2)
    k, v = (
        functional.pad(t, (0, 0, front, rest + ahead)).unfold(2, span, block).transpose(1, 2).mT
        for t in (k, v)
    )

    out = []
    for first, last, alike in _parts(count, block, front, queries - ahead, plain):
        part = [t[:, first:last].flatten(0, 1) for t in (q, k, v)]
        at = tuple(t[:, first:last].expand(batch, -1, -1).flatten(0, 1) for t in (q_positions, k_positions))
        mask = _mask(*(t[:1] if alike else t for t in at), window, is_causal)
        out.append(mix(*part, at, mask=mask, is_causal=False).unflatten(0, (batch, last - first)))
    return torch.cat(out, dim=1).transpose(1, 2).flatten(2, 3)[:, :, :queries]


def _parts(count: int, block: int, front: int, inner: int, plain: bool) -> list[tuple[int, int, bool]]:
    """Ranges of blocks that go through one call, and whether their masks are all alike.

    Without padding only the blocks at the ends differ from the others: they meet keys that are not there, `front` of
    them before the first and what lies behind `inner` queries.
    """
    if not plain:
        return [(0, count, False)]
    first = min(count, -(-front // block))
    last = max(first, inner // block)
    parts = [(0, first, False), (first, last, True), (last, count, False)]
    return [part for part in parts if part[0] < part[1]]


def _mask(q_positions: Tensor, k_positions: Tensor, window: int, is_causal: bool) -> Tensor:
    seen = visible(q_positions, k_positions, window=window)
    return seen if is_causal else seen | visible(k_positions, q_positions, window=window).mT


def _block(window: int, block: int | None) -> int:
    if block is None:
        return max(window, 64)  # many tiny products are slower than fewer and larger ones
    if block < 1:
        raise ValueError(f"block {block} must be at least 1")
    return block


def _rows_of_positions(positions: Tensor, lead: torch.Size, keys: int) -> tuple[Tensor, bool]:
    """Positions as (batch or 1, keys), and whether they are known to count on one by one from slot to slot."""
    if positions.shape[-1:] != (keys,):
        raise ValueError(f"positions have shape {tuple(positions.shape)}, but there are {keys} keys")
    flat = positions.reshape(-1, keys)
    if len(flat) > 1:
        try:
            flat = positions.expand(*lead, keys).reshape(-1, keys)
        except RuntimeError:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}, the inputs have leading axes {tuple(lead)}"
            ) from None
    check_rising(flat)
    if flat.device.type != "cpu":  # reading values back would make the device wait
        return flat, False
    low, high = (flat - torch.arange(keys)).aminmax()
    return flat, bool(low == high) and int(low) > PAD


class WindowCost(NamedTuple):
    """Pairs of a query and a key, over all heads, and what the two products with them cost.

    seen: pairs inside the window; scored: pairs that `local_attention` computes; masked: pairs that full attention
    under a mask computes; flops and masked_flops: 4 dim for each pair of the last two (a product with the keys and
    one with the values, a multiplication and an addition each).
    """

    seen: int
    scored: int
    masked: int
    flops: int
    masked_flops: int


def local_attention_cost(
    seq: int, window: int, dim: int, heads: int = 1, *, block: int | None = None, is_causal: bool = True
) -> WindowCost:
    """What `local_attention` computes for one sequence, exactly; `dim` is the features of one head."""
    check_window(window)
    if min(seq, dim, heads) < 1:
        raise ValueError(f"seq {seq}, dim {dim} and heads {heads} must be at least 1")
    block, window = _block(window, block), min(window, seq)
    seen = seq * window - window * (window - 1) // 2
    if not is_causal:
        seen = 2 * seen - seq  # both sides hold the pair of a token with itself
    count, sides = -(-seq // block), 1 if is_causal else 2
    scored = seq * seq if count == 1 else count * block * (block + sides * window)
    seen, scored, masked = heads * seen, heads * scored, heads * seq * seq
    return WindowCost(seen, scored, masked, 4 * dim * scored, 4 * dim * masked)
