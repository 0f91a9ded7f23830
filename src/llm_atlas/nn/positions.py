"""Where a token stands. A scheme may act in three places; each one here uses the places it needs.

`embed`   adds to the token embeddings at the bottom of the model (sinusoidal, learnt).
`rotate`  turns queries and keys inside attention (rotary).
`bias`    adds to the attention logits (ALiBi, T5, Shaw).

`PositionScheme` itself does none of them: it is a model without positions (NoPE).
Positions are integers, shape (batch or 1, seq); padding has position -1 and may get any finite value.
Distances are key position minus query position: a key behind the query has a negative one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

RotaryLayout = Literal["half", "interleaved"]


class PositionScheme(nn.Module):
    """No positions (NoPE), and the interface of all schemes: override what the scheme acts on.

    As it stands, attention sees a set of tokens: without a causal mask, shuffling them shuffles the outputs alike.
    With the mask a query at position p looks at p + 1 keys, and from that a model can tell where it stands.
    Kazemnejad et al. 2023, section 5 (arXiv 2305.19466); in some layers only: `models.decoder.DecoderConfig`.
    """

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
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        query_positions: Int[Tensor, "batch2 queries"],
        key_positions: Int[Tensor, "batch3 keys"],
    ) -> Float[Tensor, "batch4 heads queries keys"] | None:
        """What is added to the scaled attention logits, or None. `q` is rotated already; most schemes ignore it."""
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
    r"""A trained vector for each position, added to the embeddings, $x_p + P_p$; there is none past `length - 1`.

    length x dim weights. A row that no training text was long enough to reach gets no gradient: it stays random (weight
    decay only shrinks it). float32 inside, the dtype of `x` out. Raises ValueError for a position past the
    table. Devlin et al. 2018, section 3 (arXiv 1810.04805).
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        _check_length(length)
        if dim < 1:
            raise ValueError(f"dim {dim} must be at least 1")
        self.table = nn.Embedding(length, dim)

    def embed(
        self, x: Float[Tensor, "batch seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """x + table[positions]."""
        _check_features(x, self.table.embedding_dim)
        _check_reach(positions, self.table.num_embeddings)
        return (x + self.table(positions.clamp(min=0))).to(x.dtype)


def apply_rotary(
    x: Float[Tensor, "*batch seq dim"],
    positions: Int[Tensor, "*at seq"],
    *,
    base: float = 10000.0,
    layout: RotaryLayout = "half",
) -> Float[Tensor, "*batch seq dim"]:
    r"""Rotary embedding, the readable form: each pair of features is one complex number, times $e^{i p \theta_j}$.

    $\theta_j = \text{base}^{-2j/d}$ for pair $j$. The product of a turned query and a turned key depends on the
    difference of their positions alone. `positions` (any integers; an offset is added to them) broadcasts against
    the axes of `x` before the last. Layout "half" pairs feature j with j + d/2 (GPT-NeoX, the Llama of
    `transformers`), "interleaved" 2j with 2j + 1 (the paper, GPT-J, Meta's own Llama); `interleaved_to_half` leads
    from one to the other. Works in float32 at least. Raises ValueError for an odd `dim` and an unknown layout,
    TypeError for whole numbers. Su et al. 2021, section 3.4 (arXiv 2104.09864).
    """
    _check_real(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = positions[..., None].to(wide) * _frequencies(x.shape[-1], base, x.device, wide)
    first, second = _pairs(x.to(wide), layout)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return _unpair(turned.real, turned.imag, layout).to(x.dtype)


def interleaved_to_half(x: Tensor, *, heads: int = 1, dim: int = -1) -> Tensor:
    """Reorder features from rotary pairs side by side (2i, 2i + 1) to pairs half a head apart (i, i + d/2).

    `x` may be queries and keys (`dim` their features), or a query or key matrix and its bias, whose rows (`dim=0`)
    make them. Each of the `heads` equal parts of that axis is reordered by itself. A model whose query *and* key rows
    are reordered gives the same scores in the other layout. Raises ValueError where there is no such axis or it does
    not divide.
    """
    _check_heads(x, heads, dim)
    dim = dim % x.dim()
    return x.unflatten(dim, (heads, -1, 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def half_to_interleaved(x: Tensor, *, heads: int = 1, dim: int = -1) -> Tensor:
    """The inverse of `interleaved_to_half`, with the same arguments and errors."""
    _check_heads(x, heads, dim)
    dim = dim % x.dim()
    return x.unflatten(dim, (heads, 2, -1)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


class RotaryPositions(PositionScheme):
    r"""Rotary embedding: feature pairs of queries and keys are turned by angle $p \cdot \text{base}^{-2i/d}$.

    The fast twin of `apply_rotary`: sines and cosines of `length` positions are kept as one table of
    2 x length x d/2 floats. With `rotary_dim` only the first so many features of a head are turned, and d is that
    number (GPT-NeoX, GPT-J). Raises ValueError for an odd `dim` or `rotary_dim`, an unknown layout and positions
    past the table. Su et al. 2021, section 3.4.2 (arXiv 2104.09864); partial: Black et al. 2022, section 2.1.1
    (arXiv 2204.06745).
    """

    table: Float[Tensor, "length 2 half"]

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        length: int = 2048,
        layout: RotaryLayout = "half",
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_even(dim)
        _check_length(length)
        _check_layout(layout)
        _check_rotary_dim(rotary_dim, dim)
        self.dim, self.base, self.length, self.layout = dim, base, length, layout
        self.rotary_dim = dim if rotary_dim is None else rotary_dim
        self._ready: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self.register_buffer("table", None, persistent=False)
        self.rebuild(torch.get_default_device())

    def rebuild(self, device: torch.device | str) -> None:
        """Compute the table of cosines and sines, (length, 2, rotary_dim / 2), on `device`."""
        angles = torch.arange(self.length, device=device)[:, None].float() * _frequencies(
            self.rotary_dim, self.base, device
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
        part = x if self.rotary_dim == self.dim else x[..., : self.rotary_dim]
        # (first, second) * cos + (second, first) * (-sin, sin)
        if self.layout == "half":
            partners = part.roll(self.rotary_dim // 2, -1)
        else:
            partners = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned = torch.addcmul(part * cos, partners, sin)
        return turned if part is x else torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)

    @contextmanager
    def reused(self, positions: Int[Tensor, "batch seq"], dtype: torch.dtype) -> Iterator[None]:
        """Within the context, the cosines and sines of these positions are looked up once for all layers."""
        self._ready = positions, self._look_up(positions, dtype)
        try:
            yield
        finally:
            self._ready = None

    def _look_up(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (-sin, sin) of each position's angles in the layout, shape (batch, 1, seq, rotary_dim)."""
        _check_reach(positions, self.table.shape[0])
        cos, sin = self.table[positions.clamp(min=0)].to(dtype)[:, None].unbind(-2)
        return _unpair(cos, cos, self.layout), _unpair(-sin, sin, self.layout)


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Float[Tensor, " {heads}"]:
    r"""How steeply each head's penalty grows with the distance: $2^{-8/n}, 2^{-16/n}, \dots, 2^{-8}$ for n heads.

    That is for a power of two. For another number the slopes of the power of two below it come first, then as many
    as are missing of those that lie between them (every second one of twice that power): the rule of the authors'
    code. float32. Raises ValueError for fewer than one head. Press et al. 2021, section 3 (arXiv 2108.12409).
    """
    if heads < 1:
        raise ValueError(f"heads {heads} must be at least 1")
    power = 2 ** (heads.bit_length() - 1)
    steps = torch.arange(1, power + 1, device=device)
    return torch.exp2(torch.cat([steps, steps - 0.5])[:heads] * (-8 / power))


def alibi_bias(
    slopes: Float[Tensor, " heads"],
    query_positions: Int[Tensor, "batch queries"],
    key_positions: Int[Tensor, "batch2 keys"],
) -> Float[Tensor, "batch3 heads queries keys"]:
    r"""ALiBi: $-m_h \, |j - i|$ is added to the logit of query position i and key position j in head h.

    `slopes` are the $m_h$, mostly `alibi_slopes(heads)`. In a causal model, the paper's case, j is never above i; the
    absolute value makes it a penalty in an encoder too. Follows the dtype of `slopes` (use float32: distances above
    256 have no exact bfloat16). Memory heads x queries x keys. Press et al. 2021, section 3 (arXiv 2108.12409).
    """
    return -slopes[:, None, None] * _distances(query_positions, key_positions)[:, None].abs()


class AlibiPositions(PositionScheme):
    """Adds `alibi_bias` to the attention logits. Has no weights and no longest position.

    Press et al. 2021, section 3 (arXiv 2108.12409).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads {heads} must be at least 1")
        self.heads = heads

    def bias(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        query_positions: Int[Tensor, "batch2 queries"],
        key_positions: Int[Tensor, "batch3 keys"],
    ) -> Float[Tensor, "batch4 heads queries keys"]:
        """A penalty for distance, the same for every content. Always float32."""
        _check_own_heads(q, self.heads)
        return alibi_bias(alibi_slopes(self.heads, device=q.device), query_positions, key_positions)


def relative_position_bucket(
    distance: Int[Tensor, "*shape"], *, buckets: int = 32, max_distance: int = 128, bidirectional: bool
) -> Int[Tensor, "*shape"]:
    r"""T5's buckets of distances: near ones have a bucket each, far ones share it, ever more of them.

    `distance` is key position minus query position, negative for keys behind the query. Of n buckets the first half
    holds one distance each; from there to `max_distance` they grow in proportion to it,
    $\frac n2 + \left\lfloor \frac n2 \ln\frac{d}{n/2} \big/ \ln\frac{\text{max}}{n/2} \right\rfloor$, and all beyond
    share the last one. Bidirectional: half of the buckets are for keys behind (and the query itself), the other half
    for keys ahead. Else all are for keys behind, and keys ahead get bucket 0.
    Raises ValueError where the buckets are too few or odd, or `max_distance` lies within the near ones, TypeError
    for distances that are no whole numbers. Raffel et al. 2019, section 2.1 (arXiv 1910.10683).
    """
    _check_buckets(buckets, max_distance, bidirectional)
    side = buckets // 2 if bidirectional else buckets
    near = side // 2
    if distance.is_floating_point() or distance.is_complex() or distance.dtype == torch.bool:
        raise TypeError(f"distances are whole numbers, not {distance.dtype}")
    distance = distance.long()  # -(-128) does not fit into int8
    d = distance.abs() if bidirectional else (-distance).clamp(min=0)
    growth = torch.log(d.clamp(min=near).float() / near) / math.log(max_distance / near) * (side - near)
    far = (near + growth.long()).clamp(max=side - 1)
    ahead = (distance > 0).long() * side if bidirectional else 0
    return torch.where(d < near, d, far) + ahead


class RelativePositionBias(PositionScheme):
    r"""T5's scheme: one learnt number for each head and bucket of distances, added to the attention logits.

    $\text{logit}_{ij} = q_i \cdot k_j + b_{h,\,\text{bucket}(j - i)}$, see `relative_position_bucket`. T5 uses one
    table for all layers and does not scale its logits (`MultiHeadAttention(scale=1.0)`). Has no longest position: what
    lies beyond `max_distance` shares a bucket. buckets x heads weights. Raises ValueError as the buckets do.
    Raffel et al. 2019, section 2.1 (arXiv 1910.10683).
    """

    def __init__(
        self, heads: int, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads {heads} must be at least 1")
        _check_buckets(buckets, max_distance, bidirectional)
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.table = nn.Embedding(buckets, heads)

    def of_distance(self, distance: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape heads"]:
        """The learnt number of every head at these distances (key position minus query position)."""
        bucket = relative_position_bucket(
            distance,
            buckets=self.table.num_embeddings,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return self.table(bucket)

    def bias(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        query_positions: Int[Tensor, "batch2 queries"],
        key_positions: Int[Tensor, "batch3 keys"],
    ) -> Float[Tensor, "batch4 heads queries keys"]:
        """table[bucket(key - query)], the same for every content."""
        _check_own_heads(q, self.table.embedding_dim)
        return self.of_distance(_distances(query_positions, key_positions)).permute(0, 3, 1, 2)


def relative_attention(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    v: Float[Tensor, "*batch keys value_dim"],
    key_table: Float[Tensor, "distances dim"],
    value_table: Float[Tensor, "distances value_dim"] | None = None,
    *,
    mask: Bool[Tensor, "*#mask queries keys"] | None = None,
) -> Float[Tensor, "*batch queries value_dim"]:
    r"""Shaw's attention, the readable form: vectors of the distance are added to the keys, and to the values.

    $e_{ij} = q_i \cdot (k_j + a^K_{j-i}) / \sqrt d$, and the output is $\sum_j \alpha_{ij} (v_j + a^V_{j-i})$.
    Row $\text{clip}(j - i, -K, K) + K$ of the tables (2K + 1 rows) is the vector of distance j - i, for all heads.
    Queries are the last of the keys' places, as in `causal_mask`. `mask` is True where a query may look. Without
    `value_table` nothing is added to the values. Works in float32 at least; memory queries x keys x dim, which
    `ShawPositions` avoids. Raises ValueError for an even number of rows. Shaw et al. 2018, equations 3 to 5
    (arXiv 1803.02155).
    """
    queries, keys, rows = q.shape[-2], k.shape[-2], key_table.shape[0]
    if rows % 2 == 0 or (value_table is not None and value_table.shape[0] != rows):
        found = rows if value_table is None else f"{rows} and {value_table.shape[0]}"
        raise ValueError(f"a table needs 2 K + 1 rows, for distances -K to K, and both as many; got {found}")
    if keys < queries:
        raise ValueError(f"there are {queries} queries and {keys} keys: queries are the last of the keys")
    wide = torch.promote_types(q.dtype, torch.float32)
    at = torch.arange(keys, device=q.device)
    row = _clipped(at - at[keys - queries :, None], rows // 2)
    key_vectors = k.to(wide)[..., None, :, :] + key_table.to(wide)[row]  # (..., queries, keys, dim)
    scores = (q.to(wide)[..., :, None, :] * key_vectors).sum(-1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    weights = scores.softmax(-1)
    if mask is not None:  # a query that may look nowhere gets zeros, as everywhere in this package
        weights = weights.masked_fill(~mask, 0.0)
    out = weights @ v.to(wide)
    if value_table is not None:
        out = out + (weights[..., None] * value_table.to(wide)[row]).sum(-2)
    return out.to(q.dtype)


class ShawPositions(PositionScheme):
    r"""Shaw's scheme for keys: $q_i \cdot a_{\text{clip}(j - i)} / \sqrt d$ is added to the scaled logits.

    The bias depends on what the query asks, unlike T5's. One vector for each of the 2 x max_distance + 1 clipped
    distances (a causal model reads those up to 0), shared by heads. Equal to `relative_attention` without
    a value table. Shaw's own split into two products keeps a vector for each pair of places, queries x keys x d,
    shared by heads and batch. Here each query meets each vector once and the products are looked up, as in Huang et
    al. 2018, section 3.4 (arXiv 1809.04281): cost queries x (2 x max_distance + 1) x d, memory queries x keys, a
    head. Raises ValueError for a `max_distance` below 1. Shaw et al. 2018, sections 3.2 and 3.3 (arXiv 1803.02155).
    """

    def __init__(self, head_dim: int, *, max_distance: int = 16) -> None:
        super().__init__()
        if head_dim < 1 or max_distance < 1:
            raise ValueError(f"head_dim {head_dim} and max_distance {max_distance} must be at least 1")
        self.max_distance = max_distance
        self.table = nn.Embedding(2 * max_distance + 1, head_dim)

    def bias(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        query_positions: Int[Tensor, "batch2 queries"],
        key_positions: Int[Tensor, "batch3 keys"],
    ) -> Float[Tensor, "batch4 heads queries keys"]:
        """The match of each query with the vector of each key's distance, divided by the root of head_dim."""
        _check_features(q, self.table.embedding_dim)
        wide = torch.promote_types(q.dtype, torch.float32)
        table = self.table.weight.to(wide) / math.sqrt(q.shape[-1])
        matches = q.to(wide) @ table.T  # (batch, heads, queries, distances)
        row = _clipped(_distances(query_positions, key_positions), self.max_distance)
        batch = max(q.shape[0], row.shape[0])
        row = row[:, None].expand(batch, q.shape[1], -1, -1)
        return matches.expand(batch, -1, -1, -1).gather(-1, row).to(q.dtype)


def _check_rotary_dim(rotary_dim: int | None, dim: int) -> None:
    if rotary_dim is not None and (rotary_dim % 2 or not 2 <= rotary_dim <= dim):
        raise ValueError(
            f"rotary_dim {rotary_dim} must be even and lie between 2 and the head's {dim} features"
        )


def _check_buckets(buckets: int, max_distance: int, bidirectional: bool) -> None:
    least = 4 if bidirectional else 2
    if buckets < least or buckets % 2:
        raise ValueError(f"buckets {buckets} must be even and at least {least}")
    near = buckets // 4 if bidirectional else buckets // 2
    if max_distance <= near:
        raise ValueError(f"max_distance {max_distance} must be above the {near} distances with a bucket each")


def _distances(
    query_positions: Int[Tensor, "batch queries"], key_positions: Int[Tensor, "batch2 keys"]
) -> Int[Tensor, "batch3 queries keys"]:
    return key_positions[:, None, :] - query_positions[:, :, None]


def _clipped(distance: Tensor, most: int) -> Tensor:
    """Row of a table with 2 x most + 1 rows."""
    return distance.clamp(-most, most) + most


def _pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """First and second features of the rotary pairs."""
    _check_layout(layout)
    _check_even(x.shape[-1])
    return x.chunk(2, dim=-1) if layout == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)


def _unpair(first: Tensor, second: Tensor, layout: str) -> Tensor:
    """The inverse of `_pairs`."""
    return (
        torch.cat([first, second], dim=-1)
        if layout == "half"
        else torch.stack([first, second], dim=-1).flatten(-2)
    )


def _check_layout(layout: str) -> None:
    if layout not in get_args(RotaryLayout):
        raise ValueError(f"layout {layout!r} is not one of {', '.join(get_args(RotaryLayout))}")


def _check_real(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"x holds {x.dtype}, and a position would be cut to whole numbers: pass a float tensor"
        )


def _check_heads(x: Tensor, heads: int, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim {dim} is no axis of x, which has {x.dim()}")
    size = x.shape[dim]
    if heads < 1 or size % (2 * heads):
        raise ValueError(f"{size} features do not divide into {heads} heads of feature pairs")


def _check_own_heads(q: Tensor, heads: int) -> None:
    if q.shape[1] != heads:
        raise ValueError(f"q has {q.shape[1]} heads, these positions are made for {heads}")


def _frequencies(
    dim: int, base: float, device: torch.device | str | None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " half"]:
    _check_even(dim)
    if not 0 < base < math.inf:
        raise ValueError(f"base {base} must be positive and finite")
    return base ** (-torch.arange(0, dim, 2, device=device).to(dtype) / dim)


def _check_even(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"dim {dim} must be even and positive: features are used in pairs")


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length {length} must be at least 1")


def _check_features(x: Tensor, dim: int) -> None:
    _check_real(x)
    if x.shape[-1] != dim:
        raise ValueError(f"x has {x.shape[-1]} features, these positions are made for {dim}")


def _check_reach(positions: Tensor, length: int) -> None:
    # Reading a value back would make a GPU wait at every layer; there, the model checks lengths on the host.
    if positions.device.type == "cpu" and positions.numel() and int(positions.max()) >= length:
        raise ValueError(f"position {int(positions.max())} is past the table of {length} positions")
