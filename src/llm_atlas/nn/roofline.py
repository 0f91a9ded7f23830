"""Roofline: how fast can attention be on a machine? Counts of its arithmetic and of its memory traffic."""

import math

_STATISTIC = 4  # bytes of one row's maximum, sum or logsumexp: float32 whatever the tokens are


def attainable(intensity: float, peak_flops: float, bandwidth: float) -> float:
    r"""FLOP/s that a kernel can reach: $\min(\text{peak}, \text{intensity} \cdot \text{bandwidth})$.

    intensity: FLOPs of the kernel per byte it moves from or to slow memory; peak_flops: FLOP/s of the machine;
    bandwidth: bytes/s of its slow memory. Left of `ridge` memory is the limit, right of it arithmetic.
    Errors: ValueError for numbers that are not positive.
    Williams et al. 2009, "Roofline" (doi 10.1145/1498765.1498785).
    """
    _positive(intensity=intensity, peak_flops=peak_flops, bandwidth=bandwidth)
    return min(peak_flops, intensity * bandwidth)


def ridge(peak_flops: float, bandwidth: float) -> float:
    """FLOPs a byte from where on arithmetic, not memory, is the limit: peak over bandwidth (see `attainable`)."""
    _positive(peak_flops=peak_flops, bandwidth=bandwidth)
    return peak_flops / bandwidth


def visible_pairs(queries: int, keys: int, *, is_causal: bool = False, window: int | None = None) -> int:
    """How many (query, key) pairs attention has to look at.

    Causal: the lower triangle with its diagonal, T (T + 1) / 2. `window`: each query sees itself and `window - 1` keys
    before it, and as many after it unless `is_causal`.
    Errors: ValueError for counts below 0, a window below 1, and either form where queries and keys differ in number.
    """
    if queries < 0 or keys < 0:
        raise ValueError(f"queries {queries} and keys {keys} must be at least 0")
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1")
    if (is_causal or window is not None) and queries != keys:
        raise ValueError(f"is_causal and window need as many keys as queries, got {queries} and {keys}")
    if not is_causal and window is None:
        return queries * keys
    seen = queries if window is None else min(window, queries)
    # The first `seen` rows see 1, 2, ..., seen keys on their left, themselves among them; all others `seen`.
    left = seen * (seen + 1) // 2 + (queries - seen) * seen
    return left if is_causal else 2 * left - queries


def attention_flops(
    queries: int,
    keys: int,
    dim: int,
    *,
    value_dim: int | None = None,
    heads: int = 1,
    is_causal: bool = False,
    window: int | None = None,
    backward: bool = False,
) -> int:
    r"""FLOPs of the matrix products of attention: forward $4 T^2 d$ a head, about half of it where causal.

    Two products a pair (the score, the weighted value), a multiply-add counts as two. `heads` is the number of query
    heads, times the batch; key heads that are shared save memory, not arithmetic. `backward` counts the backward
    pass alone, 2.5 times as much where the widths are equal: scores again, gradients of weights, values, queries, keys.
    The softmax is not counted. Pairs are those of `visible_pairs`; papers leave out the diagonal and halve.
    Dao 2023, section 4.1 (arXiv 2307.08691).
    """
    value_dim = dim if value_dim is None else value_dim
    _positive(dim=dim, value_dim=value_dim, heads=heads)
    pairs = heads * visible_pairs(queries, keys, is_causal=is_causal, window=window)
    return 2 * pairs * (3 * dim + 2 * value_dim if backward else dim + value_dim)


def minimal_bytes(
    queries: int,
    keys: int,
    dim: int,
    *,
    value_dim: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    size: int = 2,
) -> int:
    """Bytes that any attention must move: queries, keys and values read once, the output written once.

    `heads` and `kv_heads` count those of all sequences; `size` is the bytes of a number.
    """
    value_dim, kv_heads = dim if value_dim is None else value_dim, heads if kv_heads is None else kv_heads
    _positive(dim=dim, value_dim=value_dim, heads=heads, kv_heads=kv_heads, size=size)
    return size * (heads * queries + kv_heads * keys) * (dim + value_dim)


def standard_bytes(
    queries: int, keys: int, dim: int, *, value_dim: int | None = None, heads: int = 1, size: int = 2
) -> int:
    r"""Bytes read and written by attention that stores scores and weights: $\Theta(Td + T^2)$ numbers.

    Three kernels, each from and to slow memory: scores (read Q and K, write S), softmax (read S, write P), output (read
    P and V, write O), so $4 T d + 4 T^2$ numbers a head. Dao 2022, algorithm 0 and theorem 2 (arXiv 2205.14135).
    """
    return minimal_bytes(queries, keys, dim, value_dim=value_dim, heads=heads, size=size) + (
        4 * size * heads * queries * keys
    )


def flash_bytes(
    queries: int,
    keys: int,
    dim: int,
    *,
    block_q: int,
    block_k: int,
    value_dim: int | None = None,
    heads: int = 1,
    size: int = 2,
    version: int = 2,
    is_causal: bool = False,
    window: int | None = None,
) -> int:
    r"""Bytes read and written by the tiled forward pass: $\Theta(T^2 d^2 / M)$ numbers with $M$ on chip.

    `version` 1 (Dao 2022, algorithm 1 and theorem 2, arXiv 2205.14135): keys and values are read once; for each block
    of keys all queries are read and the output, the maxima and the sums are read and written. The first writes, which
    put zeros there, count too.
    `version` 2 (Dao 2023, algorithm 1, arXiv 2307.08691): queries are read once, output and logsumexp written once; for
    each block of queries the keys and values it may see are read, whole blocks at a time. Only here causal and
    windowed tiles are skipped.

    Each query head reads its own keys: what a cache between chip and memory saves is not counted.
    """
    value_dim = dim if value_dim is None else value_dim
    _positive(dim=dim, value_dim=value_dim, heads=heads, size=size, block_q=block_q, block_k=block_k)
    visible_pairs(queries, keys, is_causal=is_causal, window=window)  # for its errors
    if version == 1:
        passes = math.ceil(keys / block_k)
        once = size * (keys * (dim + value_dim) + queries * value_dim) + 2 * _STATISTIC * queries
        again = size * queries * (dim + 2 * value_dim) + 4 * _STATISTIC * queries
        return heads * (once + passes * again)
    if version != 2:
        raise ValueError(f"version {version} must be 1 or 2")
    read = 0  # keys, counted each time they are read
    for first in range(0, queries, block_q):
        last = min(first + block_q, queries) - 1
        low, high = 0, keys
        if window is not None:
            low, high = max(0, first - window + 1) // block_k * block_k, min(keys, last + window)
        if is_causal:
            high = min(high, last + 1)
        read += min(keys, math.ceil(high / block_k) * block_k) - low
    return heads * (size * (queries + read) * (dim + value_dim) + _STATISTIC * queries)


def tile_sizes(on_chip: int, dim: int, *, size: int = 2) -> tuple[int, int]:
    r"""(block_q, block_k) for `on_chip` bytes: $B_c = \lceil M/4d \rceil$, $B_r = \min(B_c, d)$, $M$ in numbers.

    A block each of queries, keys, values and output then fits. Dao 2022, algorithm 1, line 1 (arXiv 2205.14135).
    Errors: ValueError where not even one row of each does.
    """
    _positive(dim=dim, size=size)
    numbers = on_chip // size
    if numbers < 4 * dim:
        raise ValueError(f"{on_chip} bytes on chip hold no four rows of {dim} numbers of {size} bytes")
    block_k = math.ceil(numbers / (4 * dim))
    return min(block_k, dim), block_k


def softmax_flops(
    queries: int, keys: int, value_dim: int, *, block_q: int, block_k: int, heads: int = 1, version: int = 2
) -> int:
    """Operations of the tiled forward pass that are no matrix product, without a mask; exp counts as one.

    In a tile of n queries and m keys both versions do, for each score: scale, compare, subtract, exp, add (5 n m); and
    for each row: compare the maxima, subtract, exp, and the sum's multiply and add (5 n).
    Version 1 keeps the output normalised: a multiply of the old output by the old sum and the factor, an add and a
    division for every tile (3 n value_dim + n). Version 2 multiplies by the factor and adds (2 n value_dim), divides
    once at the end (n value_dim) and takes the logsumexp (2 n).
    Counted from Dao 2022, algorithm 1, and Dao 2023, section 3.1 (arXiv 2205.14135, 2307.08691).
    """
    _positive(value_dim=value_dim, heads=heads, block_q=block_q, block_k=block_k)
    tiles = math.ceil(keys / block_k)
    shared = 5 * queries * keys + 5 * queries * tiles
    if version == 1:
        return heads * (shared + tiles * queries * (3 * value_dim + 1))
    if version != 2:
        raise ValueError(f"version {version} must be 1 or 2")
    return heads * (shared + 2 * tiles * queries * value_dim + queries * (value_dim + 2))


def _positive(**numbers: float | int) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} {value} must be positive")
