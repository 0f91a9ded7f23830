"""FlashAttention-2 for GPUs: one kernel forward, three backward; no score leaves the chip."""

from __future__ import annotations  # without Triton, `tl.constexpr` is a word and nothing more

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_atlas.nn.attention import check_attention
from llm_atlas.nn.flash import _check_window
from llm_atlas.nn.kernels._triton import check, jit, tl, triton

Tiles = tuple[int, int, int, int]
# What is tried on each shape, the fastest kept: (rows of the block that a program keeps, rows of the blocks that pass
# by, warps, stages of the pipeline). The forward kernel and that of the queries' gradient keep queries, that of the
# keys' gradient keeps keys. Of (bytes of a number, features at most); all fit the shared memory of an A100, and few
# spill registers, as compiling them for it and for an H100 has shown.
TILES: dict[str, dict[tuple[int, int], list[Tiles]]] = {
    "forward": {
        (2, 64): [(128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
        (2, 128): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)],
        (2, 256): [(128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)],
        (4, 64): [(64, 32, 8, 2), (32, 32, 4, 2), (64, 16, 8, 2)],
        (4, 128): [(32, 16, 8, 2), (16, 16, 4, 2), (16, 32, 4, 2)],
        (4, 256): [(32, 16, 8, 1), (16, 16, 4, 1)],
    },
    "queries": {
        (2, 64): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)],
        (2, 128): [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)],
        (2, 256): [(32, 32, 4, 1), (64, 32, 8, 1)],
        (4, 64): [(64, 32, 8, 1), (32, 32, 8, 2), (32, 16, 4, 2)],
        (4, 128): [(32, 16, 8, 1), (32, 16, 4, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "keys": {
        (2, 64): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)],
        (2, 128): [(128, 32, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2)],
        (2, 256): [(32, 32, 8, 1), (64, 16, 8, 1)],
        (4, 64): [(32, 16, 4, 1), (64, 16, 8, 1), (32, 32, 8, 2)],
        (4, 128): [(32, 16, 8, 1), (16, 16, 4, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
}
MAX_DIM = 256
_LENGTHS = ["heads", "queries", "keys", "window", "near"]  # another value is no reason to compile again
_INTERPRETED = {"BLOCK_Q": 32, "BLOCK_K": 16}  # not square: so are tests of the edges


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    r"""The Triton twin of `llm_atlas.nn.flash.flash_attention_2`: $\operatorname{softmax}(QK^\top/\sqrt d)\,V$.

    q: (*batch, heads, queries, dim), k: (*batch, kv_heads, keys, dim), v: (*batch, kv_heads, keys, value_dim), in
    float32, float16 or bfloat16, on a GPU; any strides, copied only where the features do not lie side by side. Key
    heads are shared by groups of query heads and are read, not repeated. Tiles that causality or `window` hides are
    skipped, so a window costs $O(T \cdot \text{window} \cdot d)$. Sums in float32, returns the dtype of `q`; products
    of float32 are exact to float32 unless `torch.set_float32_matmul_precision` allows TF32.
    The output lies in memory as (batch, queries, heads, value_dim), so that merging heads copies nothing. The backward
    pass is deterministic. On a GPU a few tile sizes are tried the first time that a dtype, head dimension, kind of
    mask and (to the next power of two) length is seen.

    Errors: ValueError for a mask or a bias (use the readable form, or `nn.attention.fused_attention`), for shapes that
    do not fit, more than 256 features a head and tensors on a CPU (outside of Triton's interpreter), TypeError for
    other dtypes, ImportError without Triton. It has no second derivative.
    Dao 2023, algorithms 1 and 2 (arXiv 2307.08691); Triton: Tillet et al. 2019 (doi 10.1145/3315508.3329973).
    """
    for name, given in (("mask", mask), ("bias", bias)):
        if given is not None:
            raise ValueError(
                f"the Triton form of flash_attention takes no {name}: use nn.flash.flash_attention_2"
                " or nn.attention.fused_attention"
            )
    check_attention(q, k, v, None, None, is_causal)
    _check_window(window, q.shape[-2], k.shape[-2])
    check("flash_attention", _forward, q, k, v)
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        raise ValueError(
            f"heads of {max(q.shape[-1], v.shape[-1])} features are over {MAX_DIM}: use nn.flash.flash_attention_2"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale <= 0:  # the kernels find the maximum before they multiply
        q, scale = q * scale, 1.0
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    batch, kv_heads = math.prod(lead), k.shape[-3] if k.dim() > 2 else 1
    heads = max(kv_heads, q.shape[-3] if q.dim() > 2 else 1)

    def four_axes(t: Tensor, heads: int) -> Tensor:
        return t.expand(*lead, heads, *t.shape[-2:]).reshape(batch, heads, *t.shape[-2:])

    out = _FlashAttention.apply(
        four_axes(q, heads), four_axes(k, kv_heads), four_axes(v, kv_heads), is_causal, scale, window
    )
    return out[0, 0] if q.dim() == k.dim() == 2 else out.view(*lead, *out.shape[1:])


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = (_features_together(t) for t in (q, k, v))
        batch, heads, queries, _ = q.shape
        out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        logsumexp = q.new_empty(batch, heads, queries, dtype=torch.float32)
        # The sizes that every kernel needs, in the order of their arguments.
        sizes = (heads, heads // max(1, k.shape[1]), queries, k.shape[-2], scale, window or 0)
        how = {
            "CAUSAL": is_causal,
            "WINDOWED": window is not None,
            "WIDTH": q.shape[-1],
            "VALUE_WIDTH": v.shape[-1],
            # Tensor cores that take float32 keep 10 bits of its fraction.
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }
        if out.numel():
            tensors = (q, k, v, out, logsumexp, *_strides(q, k, v, out))
            _launch("forward", "BLOCK_Q", queries, batch * heads, tensors, sizes, how)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.sizes, ctx.how = sizes, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        grad = _features_together(grad)
        batch, heads, queries, _ = q.shape
        delta = torch.empty_like(logsumexp)
        grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        saved = (q, k, v, grad, logsumexp, delta)
        strides = _strides(q, k, v, grad)
        if out.numel():
            _launch_delta(out, grad, delta)
            _launch(
                "queries", "BLOCK_Q", queries, batch * heads, (*saved, grad_q, *strides), ctx.sizes, ctx.how
            )
        if grad_k.numel() or grad_v.numel():
            tensors = (*saved, grad_k, grad_v, *strides)
            _launch("keys", "BLOCK_K", k.shape[-2], batch * k.shape[1], tensors, ctx.sizes, ctx.how)
        return grad_q, grad_k, grad_v, None, None, None


def _features_together(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, head and token, of each."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def _launch(
    name: str, block: str, length: int, heads: int, tensors: tuple, sizes: tuple, how: dict[str, object]
) -> None:
    """Run a kernel: a program for each block of `length` rows and each head."""
    q = tensors[0]
    width = max(how["WIDTH"], how["VALUE_WIDTH"])
    dims = {"DIM": _padded(how["WIDTH"]), "VALUE_DIM": _padded(how["VALUE_WIDTH"])}
    kernel, fixed = _tuned(name, q.element_size(), min(d for d in (64, 128, 256) if d >= width))
    near = triton.next_power_of_2(max(sizes[2], sizes[3], 16))
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of q
        kernel[lambda meta: (triton.cdiv(length, meta[block]) * heads,)](
            *tensors, *sizes, near, **how, **dims, **fixed
        )


def _launch_delta(out: Tensor, grad: Tensor, delta: Tensor) -> None:
    _, heads, queries, width = out.shape
    rows = 32
    with torch.cuda.device_of(out):
        _delta[(triton.cdiv(queries, rows) * out.shape[0] * heads,)](
            out, grad, delta, *_strides(out, grad), heads, queries,
            WIDTH=width, DIM=_padded(width), BLOCK=rows,
        )  # fmt: skip


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # products of tiles want sides of 16 and more, powers of 2


@cache
def _tuned(name: str, size: int, dim: int) -> tuple[Callable, dict[str, int]]:
    """A kernel with the tiles to try on heads of `dim` numbers of `size` bytes; in the interpreter, with one tile."""
    kernel = {"forward": _forward, "keys": _backward_keys, "queries": _backward_queries}[name]
    if not isinstance(kernel, triton.JITFunction):
        return kernel, _INTERPRETED
    configs = [triton.Config(tile, **options) for tile, options in tilings(name, size, dim)]
    return triton.autotune(configs, key=["near", "CAUSAL", "WINDOWED", "WIDTH", "VALUE_WIDTH"])(kernel), {}


def tilings(name: str, size: int, dim: int) -> list[tuple[dict[str, int], dict[str, int]]]:
    """(tile, options of the compiler) of all that is tried for a kernel: forward, keys or queries."""
    kept, passing = ("BLOCK_K", "BLOCK_Q") if name == "keys" else ("BLOCK_Q", "BLOCK_K")
    return [
        ({kept: rows, passing: others}, {"num_warps": warps, "num_stages": stages})
        for rows, others, warps, stages in TILES[name][size, dim]
    ]


@jit
def _load(
    at, first, count, stride, EDGE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows `first`, `first + 1`, ... of a matrix; zeros beyond the last of `count` and beyond its WIDTH."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, DIM)
    tile = at + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if EDGE and WIDTH < DIM:
        return tl.load(tile, mask=(first + rows < count)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif EDGE:
        return tl.load(tile, mask=(first + rows < count)[:, None], other=0.0)
    elif WIDTH < DIM:
        return tl.load(tile, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(tile)


@jit
def _store(at, tile, first, count, stride, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, DIM)
    inside = (first + rows < count)[:, None] & (columns < WIDTH)[None, :]
    to = at + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(to, tile.to(at.dtype.element_ty), mask=inside)


@jit
def _start(at, batch, head, batch_stride, head_stride):
    return at + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@jit
def _may_look(rows, columns, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The rule of `nn.flash`; `rows` and `columns` broadcast against each other."""
    allowed = (columns < keys) & (rows >= 0)
    if CAUSAL:
        allowed = allowed & (columns <= rows)
    if WINDOWED:
        allowed = allowed & (rows - columns < window)
        if not CAUSAL:
            allowed = allowed & (columns - rows < window)
    return allowed


@jit
def _columns_of(
    first,
    keys,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which keys BLOCK_Q queries from `first` on may see: from low to high, all of them from a to b, whole blocks."""
    low, high = 0, keys
    a, b = low, high
    if CAUSAL:
        high = tl.minimum(keys, first + BLOCK_Q)
        b = tl.minimum(keys, first + 1)
    if WINDOWED:
        low = tl.maximum(0, first - window + 1) // BLOCK_K * BLOCK_K
        a = tl.cdiv(tl.maximum(0, first + BLOCK_Q - window), BLOCK_K) * BLOCK_K
        if not CAUSAL:
            high = tl.minimum(keys, first + BLOCK_Q + window - 1)
            b = tl.minimum(keys, first + window)
    a = tl.minimum(a, tl.cdiv(high, BLOCK_K) * BLOCK_K)
    b = tl.maximum(a, b // BLOCK_K * BLOCK_K)
    return low, a, b, high


@jit
def _rows_of(
    first,
    queries,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which queries may see BLOCK_K keys from `first` on, in the same way."""
    low, high = 0, queries
    a, b = low, high
    if CAUSAL:
        low = first // BLOCK_Q * BLOCK_Q
        a = tl.cdiv(first + BLOCK_K - 1, BLOCK_Q) * BLOCK_Q
    if WINDOWED:
        high = tl.minimum(queries, first + BLOCK_K + window - 1)
        b = tl.minimum(queries, first + window)
        if not CAUSAL:
            low = tl.maximum(0, first - window + 1) // BLOCK_Q * BLOCK_Q
            a = tl.cdiv(tl.maximum(0, first + BLOCK_K - window), BLOCK_Q) * BLOCK_Q
    a = tl.minimum(a, tl.cdiv(high, BLOCK_Q) * BLOCK_Q)
    if WINDOWED:
        b = tl.maximum(a, b // BLOCK_Q * BLOCK_Q)
    return low, a, b, high


@jit
def _read_keys(
    mixed, total, top, q_tile, k, v, k_row, v_row, low, high, rows, keys, scale, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, BLOCK_K):
        k_tile = _load(k, first, keys, k_row, MASKED, WIDTH, DIM, BLOCK_K)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            columns = first + tl.arange(0, BLOCK_K)
            allowed = _may_look(rows[:, None], columns[None, :], keys, window, CAUSAL, WINDOWED)
            scores = tl.where(allowed, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        shift = new
        if (
            MASKED and WINDOWED
        ):  # the first tile of a window may hold nothing for a row: -inf - (-inf) is no number
            shift = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores * scale - shift[:, None])
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(weights, 1)
        v_tile = _load(v, first, keys, v_row, MASKED, VALUE_WIDTH, VALUE_DIM, BLOCK_K)
        mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * kept[:, None], input_precision=PRECISION)
        top = new
    return mixed, total, top


@jit(do_not_specialize=_LENGTHS)
def _forward(
    q, k, v, out, logsumexp,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, group, queries, keys, scale, window, near,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_Q)
    index = tl.program_id(0)
    # The last queries first: under causality they have the most to do, and short programs fill the end.
    first = (blocks - 1 - index % blocks) * BLOCK_Q
    batch, head = index // blocks // heads, index // blocks % heads
    q_tile = _load(_start(q, batch, head, q_batch, q_head), first, queries, q_row, True, WIDTH, DIM, BLOCK_Q)
    k = _start(k, batch, head // group, k_batch, k_head)
    v = _start(v, batch, head // group, v_batch, v_head)
    rows = first + tl.arange(0, BLOCK_Q)
    scale = scale * 1.4426950408889634  # of 2 to the power, which the hardware computes: log2(e)
    mixed = tl.zeros((BLOCK_Q, VALUE_DIM), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    low, a, b, high = _columns_of(first, keys, window, CAUSAL, WINDOWED, BLOCK_Q, BLOCK_K)
    if WINDOWED:
        mixed, total, top = _read_keys(
            mixed, total, top, q_tile, k, v, k_row, v_row, low, tl.minimum(a, high), rows, keys, scale, window,
            True, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip
    mixed, total, top = _read_keys(
        mixed, total, top, q_tile, k, v, k_row, v_row, a, b, rows, keys, scale, window,
        False, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_K,
    )  # fmt: skip
    mixed, total, top = _read_keys(
        mixed, total, top, q_tile, k, v, k_row, v_row, b, high, rows, keys, scale, window,
        True, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_K,
    )  # fmt: skip
    seen = total > 0
    mixed = mixed / tl.where(seen, total, 1.0)[:, None]
    _store(
        _start(out, batch, head, out_batch, out_head),
        mixed,
        first,
        queries,
        out_row,
        VALUE_WIDTH,
        VALUE_DIM,
        BLOCK_Q,
    )
    at = logsumexp + (index // blocks).to(tl.int64) * queries
    # To base 2, as the scores are. Where there is no key at all: any number, since no kernel will read it.
    tl.store(at + rows, top + tl.log2(tl.where(seen, total, 1.0)), mask=rows < queries)


@jit(do_not_specialize=["heads", "queries"])
def _delta(
    out, grad, delta, out_batch, out_head, out_row, grad_batch, grad_head, grad_row, heads, queries,
    WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The sum over features of output times gradient.
    blocks = tl.cdiv(queries, BLOCK)
    index = tl.program_id(0)
    first = index % blocks * BLOCK
    batch, head = index // blocks // heads, index // blocks % heads
    o = _load(_start(out, batch, head, out_batch, out_head), first, queries, out_row, True, WIDTH, DIM, BLOCK)
    g = _load(
        _start(grad, batch, head, grad_batch, grad_head), first, queries, grad_row, True, WIDTH, DIM, BLOCK
    )
    rows = first + tl.arange(0, BLOCK)
    at = delta + (index // blocks).to(tl.int64) * queries
    tl.store(at + rows, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=rows < queries)


@jit
def _pass_queries(
    grad_k, grad_v, k_tile, v_tile, q, grad, logsumexp, delta, q_head, q_row, grad_head, grad_row,
    group, low, high, columns, queries, keys, scale, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    # One loop over the group's heads and their blocks, not two: what an outer loop keeps costs registers.
    # Tiles stand on their sides, keys by queries, as both products want them.
    blocks = tl.cdiv(tl.maximum(0, high - low), BLOCK_Q)
    for step in range(0, group * blocks):
        member = (step // blocks).to(tl.int64)
        first = low + step % blocks * BLOCK_Q
        rows = first + tl.arange(0, BLOCK_Q)
        q_tile = _load(q + member * q_head, first, queries, q_row, True, WIDTH, DIM, BLOCK_Q)
        ahead = _load(
            grad + member * grad_head, first, queries, grad_row, True, VALUE_WIDTH, VALUE_DIM, BLOCK_Q
        )
        # A logsumexp of +inf makes all weights of a row that is not there 0: no mask for the last tile.
        top = tl.load(logsumexp + member * queries + rows, mask=rows < queries, other=float("inf"))
        d = tl.load(delta + member * queries + rows, mask=rows < queries, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        exponents = scores * scale - top[None, :]
        if MASKED:
            allowed = _may_look(rows[None, :], columns[:, None], keys, window, CAUSAL, WINDOWED)
            exponents = tl.where(allowed, exponents, float("-inf"))
        weights = tl.exp2(exponents)
        grad_v = tl.dot(weights.to(ahead.dtype), ahead, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(ahead), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - d[None, :])
        grad_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@jit(do_not_specialize=_LENGTHS)
def _backward_keys(
    q, k, v, grad, logsumexp, delta, grad_k, grad_v,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    heads, group, queries, keys, scale, window, near,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program has a block of keys and lets the queries of all heads of its group pass by: no two write to one place.
    blocks = tl.cdiv(keys, BLOCK_K)
    index = tl.program_id(0)
    first = index % blocks * BLOCK_K
    kv_heads = heads // group
    batch, kv_head = index // blocks // kv_heads, index // blocks % kv_heads
    k_tile = _load(_start(k, batch, kv_head, k_batch, k_head), first, keys, k_row, True, WIDTH, DIM, BLOCK_K)
    v_tile = _load(
        _start(v, batch, kv_head, v_batch, v_head), first, keys, v_row, True, VALUE_WIDTH, VALUE_DIM, BLOCK_K
    )
    columns = first + tl.arange(0, BLOCK_K)
    dk = tl.zeros((BLOCK_K, DIM), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, VALUE_DIM), dtype=tl.float32)
    low, a, b, high = _rows_of(first, queries, window, CAUSAL, WINDOWED, BLOCK_Q, BLOCK_K)
    in_base_2 = scale * 1.4426950408889634
    head = kv_head * group  # the first of the group
    q = _start(q, batch, head, q_batch, q_head)
    grad = _start(grad, batch, head, grad_batch, grad_head)
    of_head = (batch.to(tl.int64) * heads + head) * queries
    logsumexp += of_head
    delta += of_head
    if CAUSAL or WINDOWED:
        dk, dv = _pass_queries(
            dk, dv, k_tile, v_tile, q, grad, logsumexp, delta, q_head, q_row, grad_head, grad_row,
            group, low, tl.minimum(a, high), columns, queries, keys, in_base_2, window,
            True, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_Q,
        )  # fmt: skip
    dk, dv = _pass_queries(
        dk, dv, k_tile, v_tile, q, grad, logsumexp, delta, q_head, q_row, grad_head, grad_row,
        group, a, b, columns, queries, keys, in_base_2, window,
        False, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_Q,
    )  # fmt: skip
    if WINDOWED:
        dk, dv = _pass_queries(
            dk, dv, k_tile, v_tile, q, grad, logsumexp, delta, q_head, q_row, grad_head, grad_row,
            group, b, high, columns, queries, keys, in_base_2, window,
            True, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_Q,
        )  # fmt: skip
    of_kv = (index // blocks).to(tl.int64) * keys
    _store(grad_k + of_kv * WIDTH, dk * scale, first, keys, WIDTH, WIDTH, DIM, BLOCK_K)
    _store(grad_v + of_kv * VALUE_WIDTH, dv, first, keys, VALUE_WIDTH, VALUE_WIDTH, VALUE_DIM, BLOCK_K)


@jit
def _pass_keys(
    grad_q, q_tile, ahead, top, d, k, v, k_row, v_row, low, high, rows, keys, scale, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, BLOCK_K):
        k_tile = _load(k, first, keys, k_row, MASKED, WIDTH, DIM, BLOCK_K)
        v_tile = _load(v, first, keys, v_row, MASKED, VALUE_WIDTH, VALUE_DIM, BLOCK_K)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        exponents = scores * scale - top[:, None]
        if MASKED:
            columns = first + tl.arange(0, BLOCK_K)
            allowed = _may_look(rows[:, None], columns[None, :], keys, window, CAUSAL, WINDOWED)
            exponents = tl.where(allowed, exponents, float("-inf"))
        weights = tl.exp2(exponents)
        grad_weights = tl.dot(ahead, tl.trans(v_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - d[:, None])
        grad_q = tl.dot(grad_scores.to(k_tile.dtype), k_tile, grad_q, input_precision=PRECISION)
    return grad_q


@jit(do_not_specialize=_LENGTHS)
def _backward_queries(
    q, k, v, grad, logsumexp, delta, grad_q,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    heads, group, queries, keys, scale, window, near,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_Q)
    index = tl.program_id(0)
    first = (blocks - 1 - index % blocks) * BLOCK_Q
    batch, head = index // blocks // heads, index // blocks % heads
    q_tile = _load(_start(q, batch, head, q_batch, q_head), first, queries, q_row, True, WIDTH, DIM, BLOCK_Q)
    grad = _start(grad, batch, head, grad_batch, grad_head)
    ahead = _load(grad, first, queries, grad_row, True, VALUE_WIDTH, VALUE_DIM, BLOCK_Q)
    k = _start(k, batch, head // group, k_batch, k_head)
    v = _start(v, batch, head // group, v_batch, v_head)
    rows = first + tl.arange(0, BLOCK_Q)
    of_head = (index // blocks).to(tl.int64) * queries
    top = tl.load(logsumexp + of_head + rows, mask=rows < queries, other=float("inf"))
    d = tl.load(delta + of_head + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros((BLOCK_Q, DIM), dtype=tl.float32)
    low, a, b, high = _columns_of(first, keys, window, CAUSAL, WINDOWED, BLOCK_Q, BLOCK_K)
    in_base_2 = scale * 1.4426950408889634
    if WINDOWED:
        dq = _pass_keys(
            dq, q_tile, ahead, top, d, k, v, k_row, v_row, low, tl.minimum(a, high), rows, keys, in_base_2, window,
            True, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip
    dq = _pass_keys(
        dq, q_tile, ahead, top, d, k, v, k_row, v_row, a, b, rows, keys, in_base_2, window,
        False, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_K,
    )  # fmt: skip
    dq = _pass_keys(
        dq, q_tile, ahead, top, d, k, v, k_row, v_row, b, high, rows, keys, in_base_2, window,
        True, CAUSAL, WINDOWED, PRECISION, WIDTH, VALUE_WIDTH, DIM, VALUE_DIM, BLOCK_K,
    )  # fmt: skip
    _store(grad_q + of_head * WIDTH, dq * scale, first, queries, WIDTH, WIDTH, DIM, BLOCK_Q)
