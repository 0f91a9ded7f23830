"""Attention: every query takes a weighted mean of values, with weights from its match with their keys.

Anything with the signature of `scaled_dot_product_attention` can stand in for it (the *attend* seam):
`attend(q, k, v, *, mask=None, bias=None, is_causal=False, scale=None) -> out`.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.nn.cache import LayerCache, RollingLayerCache
from llm_atlas.nn.masks import causal_mask, check_window, visible
from llm_atlas.nn.norm import RMSNorm
from llm_atlas.nn.positions import PositionScheme


@runtime_checkable
class AttendFunction(Protocol):
    """The signature that every attention function of the package shares."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Values mixed for every query."""


def attention_weights(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch queries2 keys2"] | None = None,
    bias: Float[Tensor, "*#bias_batch queries3 keys3"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*out_batch queries keys"]:
    r"""$\operatorname{softmax}(QK^\top \cdot \text{scale} + \text{bias})$ over the keys, in float32.

    `scale` is $1/\sqrt{d}$ unless given. `mask` is True where a query may look; weights elsewhere are exactly 0,
    and a row that may look nowhere is all zeros (no NaN). `is_causal` is the square lower triangle.
    """
    check_attention(q, k, k, mask, bias, is_causal)
    wide = torch.promote_types(q.dtype, torch.float32)
    k = share_heads(q, k)
    scores = (
        q.to(wide) @ k.to(wide).transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    )
    if bias is not None:
        scores = scores + bias
    if is_causal:
        mask = _and(mask, causal_mask(q.shape[-2], device=q.device))
    if mask is None:
        return scores.softmax(-1)
    # The lowest finite number, not -inf: a row of -inf alone would be 0/0. What it leaves is then set to exactly 0.
    lowest = torch.finfo(wide).min
    return scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0.0)


def scaled_dot_product_attention(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch queries2 keys2"] | None = None,
    bias: Float[Tensor, "*#bias_batch queries3 keys3"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    r"""$\operatorname{softmax}(QK^\top/\sqrt{d} + \text{bias})\,V$, the readable form.

    Any leading axes. The axis before the last two is the heads: `k` and `v` may have fewer heads than `q` when they
    divide them, and each is then shared by a group of query heads. `mask` is True where a query may look; a row that
    may look nowhere gives zeros. Follows the dtype of `q`, works in float32. Raises ValueError where shapes, dtypes or
    devices do not fit, and for `is_causal` when queries and keys differ in number (say which alignment you mean
    with `causal_mask(queries, keys)`).

    Time $O(T^2 d)$, memory $O(T^2)$. Vaswani et al. 2017, section 3.2.1 (arXiv 1706.03762).
    """
    check_attention(q, k, v, mask, bias, is_causal)
    weights = attention_weights(q, k, mask=mask, bias=bias, is_causal=is_causal, scale=scale)
    return (weights @ share_heads(q, v).to(weights.dtype)).to(q.dtype)


def fused_attention(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch queries2 keys2"] | None = None,
    bias: Float[Tensor, "*#bias_batch queries3 keys3"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    """The fast twin of `scaled_dot_product_attention`: the same arguments and results, torch's fused kernels.

    Memory O(T) where the kernel is a tiled one. Tested equal to the readable form.
    """
    check_attention(q, k, v, mask, bias, is_causal)
    if bias is not None:
        # A row that may look nowhere would be NaN or a mean over all keys: mask and bias need the safe form.
        if mask is not None:
            return scaled_dot_product_attention(
                q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale
            )
        mask = bias.to(q.dtype)
        if is_causal:  # every query sees itself, so no row is empty and the mask may go into the bias
            mask = mask.where(causal_mask(q.shape[-2], device=q.device), float("-inf"))
            is_causal = False
    elif is_causal and mask is not None:
        mask, is_causal = _and(mask, causal_mask(q.shape[-2], device=q.device)), False
    shared = q.dim() > 2 and k.dim() > 2 and q.shape[-3] > k.shape[-3] and (k.shape[-3] > 1 or q.dim() == 4)
    few = q.shape[-2] == 1 or q.shape[-2] < k.shape[-2]
    if shared and few and (mask is None or (mask.dim() == 4 and mask.shape[-3] == 1)):
        # New tokens behind a cache: the heads of a group become queries of one head, and no key is repeated.
        grouped = q.unflatten(-3, (k.shape[-3], -1)).flatten(-3, -2)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.repeat(1, 1, q.shape[-3] // k.shape[-3], 1)
        out = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.unflatten(-2, (-1, q.shape[-2])).flatten(-4, -3)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=shared
    )


class Attend(nn.Module):
    """An attention function as a module without weights, so that hooks can see what goes in and what comes out."""

    def __init__(self, function: AttendFunction = fused_attention) -> None:
        super().__init__()
        self.function = function

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Calls the function."""
        return self.function(q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale)


class MultiHeadAttention(nn.Module):
    r"""$[\text{head}_1; \dots; \text{head}_h]\,W^O$, $\text{head}_i = \operatorname{attend}(xW^Q_i, xW^K_i, xW^V_i)$.

    One module for self-attention and cross-attention (keys and values from `context`), for all heads their own keys
    or groups that share them (`kv_heads`), causal or not, with any `PositionScheme` and optional `qk_norm`
    (RMSNorm on each head's queries and keys, before rotation, as in Qwen3). `scale` multiplies the logits,
    $1/\sqrt{d}$ unless given (T5: 1.0); what a scheme adds to them is not scaled.

    `mask`, where given, is the whole truth about who may look where (batch, heads or 1, queries, keys); without one a
    causal module lets every query see itself and all keys before it, and a module that is not causal lets it see all.
    Cost per token: four projections, and $2 \cdot 2 \cdot T \cdot \text{dim}$ FLOPs against $T$ keys.

    `window`: a query looks at the `window` positions up to its own and no further back (Mistral 7B, every other layer
    of Gemma 2). Without a `mask`, who may look where then follows from `positions`, padding (-1) included, and the cost
    against $T$ keys becomes one against $O(\text{window})$ (`nn.local_attention`). A `mask` still says who may look,
    and the window takes away what lies too far back. A `RollingLayerCache` brings its own window and sinks, which are
    seen from everywhere; behind another cache with padding all its keys are scored under a mask.
    Raises ValueError when `dim` does not divide into `heads`, or `heads` into `kv_heads`, and for a `window` in a
    module that is not causal or has a context.
    Vaswani et al. 2017, section 3.2.2 (arXiv 1706.03762); window: Jiang et al. 2023, section 2 (arXiv 2310.06825).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        causal: bool = True,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        positions: PositionScheme | None = None,
        scale: float | None = None,
        window: int | None = None,
        attend: AttendFunction = fused_attention,
    ) -> None:
        super().__init__()
        if window is not None:
            check_window(window)
            if not causal or context_dim is not None:
                kind = "cross-attention" if context_dim is not None else "attention that is not causal"
                raise ValueError(f"window {window} is one of causal self-attention, this is {kind}")
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"dim {dim} must divide into {heads} heads")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} heads must divide into groups over {kv_heads} key/value heads")
        head_dim = dim // heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim {head_dim} must be at least 1")
        source = dim if context_dim is None else context_dim
        self.heads, self.kv_heads, self.head_dim, self.causal = heads, kv_heads, head_dim, causal
        self.q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k = nn.Linear(source, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(source, kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias if out_bias is None else out_bias)
        self.q_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.positions = PositionScheme() if positions is None else positions
        self.scale = scale
        self.window = window
        self.attend = Attend(attend)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        positions: Int[Tensor, "batch2 seq"] | None = None,
        mask: Bool[Tensor, "#batch #heads #seq keys"] | None = None,
        context: Float[Tensor, "batch keys2 context_dim"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Shape (batch, seq, dim) to the same shape; see the class for the arguments."""
        if x.shape[-1] != self.q.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this layer takes {self.q.in_features}")
        if context is not None and context.shape[-1] != self.k.in_features:
            raise ValueError(
                f"context has {context.shape[-1]} features, this layer takes {self.k.in_features}"
            )
        window = self._window(context, cache)
        if positions is None:
            past = cache.length if cache is not None and context is None else 0
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        q = self.q_norm(split_heads(self.q(x), self.heads))
        if context is None:
            q = self.positions.rotate(q, positions)
            k = self.positions.rotate(self.k_norm(split_heads(self.k(x), self.kv_heads)), positions)
            v = split_heads(self.v(x), self.kv_heads)
            if cache is not None:
                k, v = cache.append(k, v)
        elif cache is not None and cache.length:
            # An encoder's keys and values do not change while the decoder writes. Whether they are *this* context's
            # cannot be seen here, but whether they can be.
            if (cache.rows, cache.length) != context.shape[:2]:
                raise ValueError(
                    f"the cache holds {cache.rows} rows of {cache.length} keys, the context has {context.shape[0]} rows"
                    f" of {context.shape[1]}: use a new cache for a new context"
                )
            k, v = cache.read()
        else:
            k, v = (
                self.k_norm(split_heads(self.k(context), self.kv_heads)),
                split_heads(self.v(context), self.kv_heads),
            )
            if cache is not None:
                k, v = cache.append(k, v)
        queries, keys = q.shape[-2], k.shape[-2]
        bias = None
        if context is None:
            key_positions = positions if cache is None else cache.positions
            if key_positions is None:  # this module is used alone: no model has placed the slots
                key_positions = torch.arange(keys, device=x.device)[None]
            if window is not None:
                mixed = self._attend_near(q, k, v, window, positions, key_positions, mask, cache)
                return self.out(merge_heads(mixed))
            bias = self.positions.bias(q, positions, key_positions)
        is_causal = self.causal and context is None and mask is None and queries > 1
        if is_causal and keys != queries:
            mask, is_causal = causal_mask(queries, keys, device=x.device), False
        mixed = self.attend(q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=self.scale)
        return self.out(merge_heads(mixed))

    def _window(self, context: Tensor | None, cache: LayerCache | None) -> int | None:
        """How far back a query sees: what the module says, or a rolling cache."""
        rolling = isinstance(cache, RollingLayerCache)
        if context is not None and (rolling or self.window is not None):
            window = self.window if self.window is not None else cache.window
            raise ValueError(f"window {window} is one of causal self-attention, this is cross-attention")
        if not rolling:
            return self.window
        if not self.causal:
            raise ValueError("a rolling cache is for causal attention: it forgets what others may look at")
        if self.window is not None and self.window > cache.window:
            raise ValueError(
                f"the cache keeps a window of {cache.window}, this layer looks back {self.window}"
            )
        return cache.window if self.window is None else self.window

    def _attend_near(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int,
        positions: Tensor,
        key_positions: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Attention within the window, in blocks where the slots' order is known, else under a mask."""
        from llm_atlas.nn.local_attention import local_attention  # which builds on this file

        rolling = isinstance(cache, RollingLayerCache)
        sinks = cache.sinks if rolling else 0
        in_order = cache is not None and cache.plain and not rolling  # the keys are 0, 1, 2, ...
        if mask is None and not sinks and (in_order or rolling or q.shape[-2] == k.shape[-2]):
            where = None if in_order else key_positions
            return local_attention(
                q,
                k,
                v,
                window=window,
                positions=where,
                bias=self.positions.bias,
                scale=self.scale,
                attend=self.attend,
            )
        near = key_positions[:, None, None, :] > positions[:, None, :, None] - window
        if sinks:
            near = near | (key_positions < sinks)[:, None, None, :]
        mask = near & (visible(positions, key_positions) if mask is None else mask)
        bias = self.positions.bias(q, positions, key_positions)
        return self.attend(q, k, v, mask=mask, bias=bias, is_causal=False, scale=self.scale)


def split_heads(
    x: Float[Tensor, "batch seq features"], heads: int
) -> Float[Tensor, "batch {heads} seq head_dim"]:
    """(batch, seq, heads x head_dim) to (batch, heads, seq, head_dim): first cut the features, then move the axis."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "batch heads seq head_dim"]) -> Float[Tensor, "batch seq features"]:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(-2)


def share_heads(q: Tensor, k: Tensor) -> Tensor:
    """Keys (or values) with each head repeated for its group of query heads: what shares heads, written out.

    `k` itself where it has as many heads as `q`, or one, which broadcasts. Heads are the axis before the last two.
    """
    if q.dim() < 3 or k.dim() < 3 or q.shape[-3] <= k.shape[-3] or k.shape[-3] == 1:
        return k
    return k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)


def _and(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool
) -> None:
    """Raise ValueError or TypeError where the arguments of an attention function do not fit each other.

    For every function of the *attend* seam, so that all of them refuse the same, in the same words.
    """
    if q.dim() < 2 or k.dim() < 2 or v.dim() < 2:
        raise ValueError(
            f"q, k and v need at least 2 axes (tokens, features), got {q.dim()}, {k.dim()} and {v.dim()}"
        )
    if not q.is_floating_point():
        raise TypeError(f"q, k and v must hold floating-point numbers, got {q.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has {q.shape[-1]} features and k has {k.shape[-1]}: they must be equal")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"there are {k.shape[-2]} keys and {v.shape[-2]} values: they must be equal")
    if k.shape[:-2] != v.shape[:-2]:
        raise ValueError(
            f"keys have leading axes {tuple(k.shape[:-2])} and values {tuple(v.shape[:-2])}: they must be equal"
        )
    if q.shape[:-3] != k.shape[:-3] and not _broadcast(q.shape[:-3], k.shape[:-3]):
        raise ValueError(
            f"queries have leading axes {tuple(q.shape[:-3])} and keys {tuple(k.shape[:-3])}: they do not fit"
        )
    if q.dim() > 2 and k.dim() > 2 and q.shape[-3] % k.shape[-3] and q.shape[-3] != 1:
        raise ValueError(f"{q.shape[-3]} query heads do not divide into groups over {k.shape[-3]} key heads")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if is_causal and q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"is_causal with {q.shape[-2]} queries and {k.shape[-2]} keys is ambiguous:"
            " pass mask=causal_mask(queries, keys)"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = may look), got {mask.dtype}; additive terms go into bias")
    for name, t in (("mask", mask), ("bias", bias)):
        if t is None:
            continue
        if t.dim() < 2 or t.shape[-2] not in (1, q.shape[-2]) or t.shape[-1] not in (1, k.shape[-2]):
            raise ValueError(
                f"{name} ends in {' x '.join(map(str, t.shape[-2:]))}, but there are {q.shape[-2]} queries"
                f" and {k.shape[-2]} keys"
            )
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}, q, k and v are on {q.device}")


def _broadcast(a: torch.Size, b: torch.Size) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))
