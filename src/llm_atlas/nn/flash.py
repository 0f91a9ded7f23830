"""FlashAttention, readable: exact attention in tiles, which never holds a score for every pair of tokens.

`flash_attention` is the first version and `flash_attention_2` the second; both stand in for
`nn.attention.scaled_dot_product_attention`. On a CPU they teach; `nn.kernels.flash` is the form that is fast.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_atlas.nn.attention import check_attention


def online_softmax(x: Float[Tensor, "*batch n"], *, block: int = 1) -> Float[Tensor, "*batch n"]:
    r"""Softmax over the last axis that finds maximum and sum in one pass, `block` numbers at a time.

    With the maximum $m$ and the sum $l = \sum_j e^{x_j - m}$ of what has been read so far, a new block $x'$ gives

    $$m_\text{new} = \max(m, \max x'), \qquad l_\text{new} = e^{m - m_\text{new}}\, l + \sum_j e^{x'_j - m_\text{new}}$$

    so the sum is corrected whenever the maximum grows, and no exponent is ever above 0. A second pass writes
    $e^{x - m}/l$. Three passes become two, and in attention the second is not needed either: the output is corrected
    like the sum. Reduces in float32, returns the dtype of `x`; a row of -inf alone gives zeros.
    Milakov and Gimelshein 2018, algorithm 3 (arXiv 1805.02867).
    """
    _check_blocks(block=block)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    state = _nothing(wide, wide.shape[:-1])
    for columns in _blocks(x.shape[-1], block):
        state, _, _ = _read(wide[..., columns], *state)
    top, total = state
    return ((wide - _finite(top)).exp() / _not_zero(total)).to(x.dtype)


def flash_attention(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch queries2 keys2"] | None = None,
    bias: Float[Tensor, "*#bias_batch queries3 keys3"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    r"""FlashAttention: for each block of keys, correct what all queries have gathered so far.

    With a tile of scores $S$ and for its rows the output $O$, maximum $m$ and sum $l$ of the keys read before:

    $$P = e^{S - m_\text{new}}, \qquad l_\text{new} = e^{m - m_\text{new}}\, l + P\,\mathbf 1, \qquad
    O_\text{new} = \big(l\, e^{m - m_\text{new}}\, O + P V\big) / l_\text{new}$$

    Arguments and results are those of `scaled_dot_product_attention`: any leading axes, key heads that are shared,
    zeros for a row that may look nowhere. `window`: a query sees itself and `window - 1` keys before it, and as many
    after it unless `is_causal`. The backward pass keeps only inputs, output and one logsumexp a row, and computes every
    tile again; q, k, v and `bias` get gradients (that of a bias is as large as the bias).

    Time $O(T^2 d)$, memory $O(T d)$ and one tile of `block_q` by `block_k` scores; see `nn.roofline.flash_bytes` for
    the traffic. Errors: those of `scaled_dot_product_attention`; ValueError for blocks or a window below 1, and for a
    window where queries and keys differ in number. It has no second derivative.
    Dao et al. 2022, algorithms 1 and 4 (arXiv 2205.14135).
    """
    return _attend(_keys_first, q, k, v, mask, bias, is_causal, scale, window, block_q, block_k)


def flash_attention_2(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch queries2 keys2"] | None = None,
    bias: Float[Tensor, "*#bias_batch queries3 keys3"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    r"""FlashAttention-2: each block of queries reads all its keys, alone, and divides once at the end.

    Blocks of queries share nothing, so they are the unit of parallel work, and what they gather stays on chip. The
    output is left without its denominator until the last key:
    $O_\text{new} = e^{m - m_\text{new}}\, O + P V$ in each step, $O / l$ and $L = m + \log l$ at the end. Tiles that
    causality or the window hides are not computed.

    Arguments, results, gradients, cost and errors are those of `flash_attention`.
    Dao 2023, algorithms 1 and 2 (arXiv 2307.08691).
    """
    return _attend(_queries_first, q, k, v, mask, bias, is_causal, scale, window, block_q, block_k)


@dataclass(frozen=True, kw_only=True)
class _How:
    """What does not change from tile to tile."""

    scale: float
    is_causal: bool
    window: int | None
    block_q: int
    block_k: int
    mask: Tensor | None

    def meet(self, rows: slice, columns: slice) -> bool:
        """May any of these queries look at any of these keys, as far as causality and window say?"""
        if self.is_causal and columns.start > rows.stop - 1:
            return False
        reach = math.inf if self.window is None else self.window - 1
        return columns.stop - 1 >= rows.start - reach and columns.start <= rows.stop - 1 + reach


def _attend(
    forward: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    block_q: int,
    block_k: int,
) -> Tensor:
    check_attention(q, k, v, mask, bias, is_causal)
    _check_window(window, q.shape[-2], k.shape[-2])
    _check_blocks(block_q=block_q, block_k=block_k)
    grouped = q.dim() > 2 and k.dim() > 2 and q.shape[-3] > k.shape[-3] > 1
    if grouped:
        # A new axis for the query heads of a group, along which keys and values broadcast.
        groups = (k.shape[-3], q.shape[-3] // k.shape[-3])
        q, k, v = q.unflatten(-3, groups), k.unsqueeze(-3), v.unsqueeze(-3)
        mask, bias = (_group(t, groups) for t in (mask, bias))
    how = _How(
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        is_causal=is_causal,
        window=window,
        block_q=block_q,
        block_k=block_k,
        mask=mask,
    )
    out = _Flash.apply(q, k, v, bias, how, forward)
    return out.flatten(-4, -3) if grouped else out


def _keys_first(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: _How, lead: torch.Size
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp: Dao et al. 2022, algorithm 1."""
    queries, keys, wide = q.shape[-2], k.shape[-2], torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*lead, queries, v.shape[-1], dtype=wide)
    top, total = _nothing(out, (*lead, queries))
    for columns in _blocks(keys, how.block_k):
        for rows in _blocks(queries, how.block_q):
            at = (..., rows, slice(None))
            scores = _scores(q, k, bias, how, rows, columns)
            (new_top, new_total), weights, kept = _read(scores, top[at], total[at])
            mixed = total[at] * kept * out[at] + weights @ v[..., columns, :].to(wide)
            out[at] = mixed / _not_zero(new_total)
            top[at], total[at] = new_top, new_total
    return out.to(q.dtype), top + total.log()


def _queries_first(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: _How, lead: torch.Size
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp: Dao 2023, algorithm 1."""
    queries, keys, wide = q.shape[-2], k.shape[-2], torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*lead, queries, v.shape[-1])
    logsumexp = q.new_empty(*lead, queries, 1, dtype=wide)
    for rows in _blocks(queries, how.block_q):
        mixed = out.new_zeros(*lead, rows.stop - rows.start, v.shape[-1], dtype=wide)
        state = _nothing(mixed, mixed.shape[:-1])
        for columns in _blocks(keys, how.block_k):
            if not how.meet(rows, columns):
                continue
            scores = _scores(q, k, bias, how, rows, columns)
            state, weights, kept = _read(scores, *state)
            mixed = kept * mixed + weights @ v[..., columns, :].to(wide)
        top, total = state
        out[..., rows, :] = (mixed / _not_zero(total)).to(q.dtype)
        logsumexp[..., rows, :] = top + total.log()
    return out, logsumexp


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        how: _How,
        forward: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        lead = torch.broadcast_shapes(
            q.shape[:-2], k.shape[:-2], *(t.shape[:-2] for t in (how.mask, bias) if t is not None)
        )
        out, logsumexp = forward(q, k, v, bias, how, lead)
        ctx.save_for_backward(q, k, v, bias, out, logsumexp)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Dao 2023, algorithm 2. With $P = e^{S - L}$ and $D$ the row sums of dO * O:

        dV = P^T dO, dP = dO V^T, dS = P * (dP - D), dQ = dS K * scale, dK = dS^T Q * scale.
        """
        q, k, v, bias, out, logsumexp = ctx.saved_tensors
        how, wide = ctx.how, logsumexp.dtype
        # A row that has seen nothing has a logsumexp of -inf. Of +inf all weights are 0, which is what they were.
        logsumexp = logsumexp.masked_fill(logsumexp == -math.inf, math.inf)
        delta = torch.empty_like(logsumexp)
        for rows in _blocks(q.shape[-2], how.block_q):
            at = (..., rows, slice(None))
            delta[at] = (grad[at].to(wide) * out[at].to(wide)).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for columns in _blocks(k.shape[-2], how.block_k):
            keys, values = k[..., columns, :].to(wide), v[..., columns, :].to(wide)
            for rows in _blocks(q.shape[-2], how.block_q):
                if not how.meet(rows, columns):
                    continue
                at = (..., rows, slice(None))
                ahead = grad[at].to(wide)
                weights = (_scores(q, k, bias, how, rows, columns) - logsumexp[at]).exp()
                grad_scores = weights * (ahead @ values.mT - delta[at])
                _add(grad_v[..., columns, :], weights.mT @ ahead)
                _add(grad_q[at], grad_scores @ keys * how.scale)
                _add(grad_k[..., columns, :], grad_scores.mT @ q[at].to(wide) * how.scale)
                if grad_bias is not None:
                    _add(_tile(grad_bias, rows, columns), grad_scores)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None, None


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, how: _How, rows: slice, columns: slice) -> Tensor:
    """One tile of logits, float32 or wider, -inf where a query may not look."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q[..., rows, :].to(wide) @ k[..., columns, :].to(wide).mT * how.scale
    if bias is not None:
        scores = scores + _tile(bias, rows, columns)
    if how.mask is not None:
        scores = scores.masked_fill(~_tile(how.mask, rows, columns), -math.inf)
    if how.is_causal or how.window is not None:
        ahead = (
            torch.arange(columns.start, columns.stop, device=q.device)
            - (torch.arange(rows.start, rows.stop, device=q.device)[:, None])
        )
        if how.is_causal:
            scores = scores.masked_fill(ahead > 0, -math.inf)
        if how.window is not None:
            scores = scores.masked_fill(ahead.abs() >= how.window, -math.inf)
    return scores


def _read(scores: Tensor, top: Tensor, total: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """One step of the online softmax: (new maximum, new sum), weights, and the factor for all that was summed before.

    `top` and `total` end in an axis of 1.
    """
    new = torch.maximum(top, scores.amax(-1, keepdim=True))
    weights, kept = (scores - _finite(new)).exp(), (top - _finite(new)).exp()
    return (new, kept * total + weights.sum(-1, keepdim=True)), weights, kept


def _nothing(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Maximum and sum before anything is read."""
    return like.new_full((*shape, 1), -math.inf), like.new_zeros(*shape, 1)


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == -math.inf, 0.0)  # -inf - (-inf) would be NaN; so it is -inf, whose exp is 0


def _not_zero(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)


def _blocks(count: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, count)) for start in range(0, count, block))


def _tile(t: Tensor, rows: slice, columns: slice) -> Tensor:
    """A view of a mask's or a bias's part; an axis of 1 stands for all."""
    return t[..., slice(None) if t.shape[-2] == 1 else rows, slice(None) if t.shape[-1] == 1 else columns]


def _add(part: Tensor, more: Tensor) -> None:
    part += more.sum_to_size(part.shape)  # what was read for many is given back as their sum


def _group(t: Tensor | None, groups: tuple[int, int]) -> Tensor | None:
    """A mask or a bias with the axis of heads split as that of the queries is."""
    if t is None or t.dim() < 3:
        return t
    return t.unsqueeze(-3) if t.shape[-3] == 1 else t.unflatten(-3, groups)


def _check_window(window: int | None, queries: int, keys: int) -> None:
    if window is None:
        return
    if window < 1:
        raise ValueError(f"window {window} must be at least 1")
    if queries != keys:
        raise ValueError(
            f"window with {queries} queries and {keys} keys is ambiguous: pass it as a mask (nn.masks.visible)"
        )


def _check_blocks(**blocks: int) -> None:
    for name, block in blocks.items():
        if block < 1:
            raise ValueError(f"{name} {block} must be at least 1")
