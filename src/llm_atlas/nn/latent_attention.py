"""Multi-head latent attention: a cache keeps one short vector a token, every head makes its keys and values of it.

Names beside those of DeepSeek-V2: `kv_rank` is $d_c$, `q_rank` $d_c'$, `head_dim` $d_h$ and `rope_dim` $d_h^R$.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_atlas.nn.attention import Attend, AttendFunction, fused_attention, merge_heads, split_heads
from llm_atlas.nn.cache import LayerCache
from llm_atlas.nn.masks import causal_mask
from llm_atlas.nn.norm import RMSNorm
from llm_atlas.nn.positions import PositionScheme, RotaryPositions


def rebuilt_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    q_rotary: Float[Tensor, "batch heads queries rope_dim"],
    latent: Float[Tensor, "batch 1 keys kv_rank"],
    k_rotary: Float[Tensor, "batch 1 keys rope_dim"],
    k_up: Float[Tensor, "heads head_dim kv_rank"],
    v_up: Float[Tensor, "heads value_dim kv_rank"],
    *,
    scale: float,
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
    is_causal: bool = False,
    attend: AttendFunction = fused_attention,
) -> Float[Tensor, "batch heads queries value_dim"]:
    r"""The readable form: make every head's keys and values from the latents $c_j$, then ordinary attention.

    Head $h$ has the keys $[U^K_h c_j;\, k^R_j]$ and the values $U^V_h c_j$. The rotary key $k^R_j$ is the same for all
    heads. `mask`, `bias` and `is_causal` are those of `attend`. Memory keys x heads x (head_dim + rope_dim +
    value_dim); FLOPs: `latent_attention_flops`. DeepSeek-V2, equations 10, 11 and 16 to 18 (arXiv 2405.04434).
    """
    k = torch.einsum("bkr,hdr->bhkd", latent.squeeze(1), k_up)
    v = torch.einsum("bkr,hdr->bhkd", latent.squeeze(1), v_up)
    k = torch.cat([k, k_rotary.expand(-1, k.shape[1], -1, -1)], dim=-1)
    q = torch.cat([q, q_rotary], dim=-1)
    return attend(q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale)


def absorbed_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    q_rotary: Float[Tensor, "batch heads queries rope_dim"],
    latent: Float[Tensor, "batch 1 keys kv_rank"],
    k_rotary: Float[Tensor, "batch 1 keys rope_dim"],
    k_up: Float[Tensor, "heads head_dim kv_rank"],
    v_up: Float[Tensor, "heads value_dim kv_rank"],
    *,
    scale: float,
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
    is_causal: bool = False,
    attend: AttendFunction = fused_attention,
) -> Float[Tensor, "batch heads queries value_dim"]:
    r"""The twin of `rebuilt_attention` for few queries: no key and no value of any head is ever made.

    A product may be bracketed the other way, and a sum of products too:

    $$q^\top (U^K c_j) = (U^{K\top} q)^\top c_j, \qquad
    \textstyle\sum_j \alpha_j\, U^V c_j = U^V \sum_j \alpha_j c_j$$

    So the queries move into the space of the latents, and what comes out of attention moves from there to values. In
    between, all heads share one key head $[c_j; k^R_j]$ and one value head $c_j$: multi-query attention. Without the
    split into content and rotary features this would fail: a rotation stands between $q$ and $U^K$ that depends on
    both positions. `scale` has to be given, since $1/\sqrt{\text{features}}$ of these longer queries is not that of
    the heads. Memory keys x (kv_rank + rope_dim), if `attend` repeats no key for the heads that share it (the fused
    one does not for one new token). DeepSeek-V2, sections 2.1.2 and 2.1.3 (arXiv 2405.04434).
    """
    q = torch.einsum("bhqd,hdr->bhqr", q, k_up)
    q = torch.cat([q, q_rotary], dim=-1)
    k = torch.cat([latent, k_rotary], dim=-1)
    mixed = attend(q, k, latent, mask=mask, bias=bias, is_causal=is_causal, scale=scale)
    return torch.einsum("bhqr,hdr->bhqd", mixed, v_up)


class LatentAttention(nn.Module):
    r"""Attention whose keys and values all come from one latent $c_t = \operatorname{norm}(W^{DKV} x_t)$ a token.

    Each head makes of it its content keys $U^K_h c_t$ and its values $U^V_h c_t$. Positions stand apart, in one rotary
    key $k^R_t = \operatorname{rotate}(W^{KR} x_t)$ that all heads share; a query has `head_dim` content and then
    `rope_dim` rotary features a head. With `q_rank` queries come from a latent of their own, norm included. A cache
    keeps $c_t$ and $k^R_t$, `latent_cache_numbers` a token, and nothing of any head.

    A mixer as `MultiHeadAttention` is: causal without a `mask`, and a mask, where given, is the whole truth; there is
    no cross-attention. `positions` rotates the rotary features (`RotaryPositions(rope_dim)`; DeepSeek's own weights
    pair them "interleaved"). `value_dim` is `head_dim` unless given, `scale` $1/\sqrt{\text{head\_dim} +
    \text{rope\_dim}}$ (YaRN models multiply it by a constant). `bias` is for what reads or writes the stream, and not
    for queries without `q_rank`, as in `transformers`; the up-matrices never have one.

    `absorb` says which of two equal ways is taken: `absorbed_attention` (True), `rebuilt_attention` (False), or None,
    whichever takes fewer FLOPs (`absorbed_is_cheaper`): absorbed for a few new tokens behind a cache, rebuilt where
    all tokens are new.

    Raises ValueError for sizes below 1, an odd `rope_dim`, rotary positions of another size, and inputs of another
    width. DeepSeek-V2, section 2.1 (arXiv 2405.04434), its norms in 3.1.2; DeepSeek-V3, section 2.1.1
    (arXiv 2412.19437).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_rank: int,
        rope_dim: int,
        head_dim: int,
        value_dim: int | None = None,
        q_rank: int | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
        positions: PositionScheme | None = None,
        scale: float | None = None,
        attend: AttendFunction = fused_attention,
        absorb: bool | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        _check_sizes(dim=dim, heads=heads, kv_rank=kv_rank, head_dim=head_dim, value_dim=value_dim)
        if q_rank is not None:
            _check_sizes(q_rank=q_rank)
        if rope_dim < 2 or rope_dim % 2:
            raise ValueError(f"rope_dim {rope_dim} must be even and positive: features are turned in pairs")
        if isinstance(positions, RotaryPositions) and positions.dim != rope_dim:
            raise ValueError(
                f"rope_dim is {rope_dim}, but the positions are made for {positions.dim} features"
            )
        self.heads, self.kv_rank, self.rope_dim = heads, kv_rank, rope_dim
        self.head_dim, self.value_dim, self.q_rank, self.absorb = head_dim, value_dim, q_rank, absorb
        q_features = heads * (head_dim + rope_dim)
        if q_rank is None:
            self.q = nn.Linear(dim, q_features, bias=False)
        else:
            self.q_down = nn.Linear(dim, q_rank, bias=bias)
            self.q_norm = RMSNorm(q_rank, eps=norm_eps)
            self.q_up = nn.Linear(q_rank, q_features, bias=False)
        self.kv_down = nn.Linear(dim, kv_rank, bias=bias)
        self.kv_norm = RMSNorm(kv_rank, eps=norm_eps)
        self.k_rotary = nn.Linear(dim, rope_dim, bias=bias)
        self.k_up = nn.Linear(kv_rank, heads * head_dim, bias=False)
        self.v_up = nn.Linear(kv_rank, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=bias)
        self.positions = PositionScheme() if positions is None else positions
        self.scale = 1 / math.sqrt(head_dim + rope_dim) if scale is None else scale
        self.attend = Attend(attend)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        positions: Int[Tensor, "batch2 seq"] | None = None,
        mask: Bool[Tensor, "#batch #heads #seq keys"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Shape (batch, seq, dim) to the same shape; see the class for the arguments."""
        if x.shape[-1] != self.kv_down.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this layer takes {self.kv_down.in_features}")
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        q, q_rotary = self.queries(x, positions)
        latent, k_rotary = self.compress(x, positions)
        if cache is not None:
            latent, k_rotary = cache.append(latent, k_rotary)
        queries, keys = x.shape[1], latent.shape[-2]
        key_positions = positions if cache is None else cache.positions
        if key_positions is None:  # this module is used alone: no model has placed the slots
            key_positions = torch.arange(keys, device=x.device)[None]
        bias = self.positions.bias(torch.cat([q, q_rotary], dim=-1), positions, key_positions)
        is_causal = mask is None and queries > 1
        if is_causal and keys != queries:
            mask, is_causal = causal_mask(queries, keys, device=x.device)[None, None], False
        absorb = self.absorb
        if absorb is None:
            absorb = absorbed_is_cheaper(
                queries, keys, kv_rank=self.kv_rank, head_dim=self.head_dim, value_dim=self.value_dim
            )
        mixed = (absorbed_attention if absorb else rebuilt_attention)(
            q,
            q_rotary,
            latent,
            k_rotary,
            self.k_up.weight.unflatten(0, (self.heads, -1)),
            self.v_up.weight.unflatten(0, (self.heads, -1)),
            scale=self.scale,
            mask=mask,
            bias=bias,
            is_causal=is_causal,
            attend=self.attend,
        )
        return self.out(merge_heads(mixed))

    def queries(
        self, x: Float[Tensor, "batch seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> tuple[Float[Tensor, "batch heads seq head_dim"], Float[Tensor, "batch heads seq rope_dim"]]:
        """Every head's content queries, and its rotary ones, turned."""
        q = self.q(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q, q_rotary = split_heads(q, self.heads).split([self.head_dim, self.rope_dim], dim=-1)
        return q, self.positions.rotate(q_rotary, positions)

    def compress(
        self, x: Float[Tensor, "batch seq dim"], positions: Int[Tensor, "batch2 seq"]
    ) -> tuple[Float[Tensor, "batch 1 seq kv_rank"], Float[Tensor, "batch 1 seq rope_dim"]]:
        """What a cache keeps of each token: the latent behind its norm, and the rotary key, turned."""
        latent = self.kv_norm(self.kv_down(x))[:, None]
        return latent, self.positions.rotate(self.k_rotary(x)[:, None], positions)


def latent_cache_numbers(*, kv_rank: int, rope_dim: int) -> int:
    """Numbers that one layer caches for a token: the latent and the rotary key, whatever the number of heads.

    Multi-head attention caches 2 x heads x head_dim. DeepSeek-V2, section 2.1.4 and table 1 (arXiv 2405.04434).
    """
    _check_sizes(kv_rank=kv_rank, rope_dim=rope_dim)
    return kv_rank + rope_dim


def latent_attention_flops(
    new: int,
    total: int,
    *,
    heads: int,
    kv_rank: int,
    rope_dim: int,
    head_dim: int,
    value_dim: int,
    absorb: bool,
) -> int:
    r"""FLOPs of one layer's `absorbed_attention` or `rebuilt_attention`, for a row of `new` queries and `total` keys.

    With $n$ queries, $T$ keys, $h$ heads, rank $r$, and $d$, $d_R$, $v$ features of content, rotation and values:

    - rebuilt: $2hTr(d + v)$ for keys and values of all tokens, $2hnT(d + d_R + v)$ for attention;
    - absorbed: $2hnr(d + v)$ to move queries and results, $2hnT(2r + d_R)$ for attention.

    A multiply and an add are two; every query counts against every key, also where a causal mask covers half of them;
    softmax is left out. The projections from and to the stream are the same for both, 2 a weight and new token.
    """
    _check_tokens(new, total)
    _check_sizes(heads=heads, kv_rank=kv_rank, rope_dim=rope_dim, head_dim=head_dim, value_dim=value_dim)
    moved, features = (new, 2 * kv_rank) if absorb else (total, head_dim + value_dim)
    return 2 * heads * (moved * kv_rank * (head_dim + value_dim) + new * total * (features + rope_dim))


def absorbed_is_cheaper(new: int, total: int, *, kv_rank: int, head_dim: int, value_dim: int) -> bool:
    r"""Whether `absorbed_attention` takes fewer FLOPs than `rebuilt_attention`: `latent_attention_flops` of both.

    The heads and the rotary features fall out. With its letters, absorbed is cheaper where what it does not rebuild
    costs more than its longer queries do:

    $$(T - n)\,r\,(d + v) \;>\; n\,T\,(2r - d - v)$$

    One new token behind a long cache: nearly always. All tokens new ($n = T$): not while $2r \ge d + v$. DeepSeek-V2
    ($r = 512$, $d = v = 128$): up to 170 new tokens behind a very long cache.
    """
    _check_tokens(new, total)
    _check_sizes(kv_rank=kv_rank, head_dim=head_dim, value_dim=value_dim)
    made = head_dim + value_dim
    return (total - new) * kv_rank * made > new * total * (2 * kv_rank - made)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size} must be at least 1")


def _check_tokens(new: int, total: int) -> None:
    if not 1 <= new <= total:
        raise ValueError(f"new tokens are part of all: 1 <= new <= total, got new {new} and total {total}")
