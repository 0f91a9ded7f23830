r"""Linear attention: a match of query and key that is a product of features needs no list of the past, only a sum.

Softmax attention weighs a value by $\exp(q \cdot k)$, and every new query must meet every old key. Where the weight is
$\phi(q) \cdot \phi(k)$ instead, the sum over the past can be taken before the query comes:

$$\sum_s \big(\phi(q_t) \cdot \phi(k_s)\big)\, v_s^\top
  = \phi(q_t)^\top \underbrace{\sum_s \phi(k_s)\, v_s^\top}_{S_t,\ d_k \times d_v}, \qquad
S_t = S_{t-1} + \phi(k_t)\, v_t^\top .$$

The same result has three forms, all here and tested equal: *parallel* (every query against every key, $O(T^2)$),
*recurrent* (one token at a time, a state of fixed size), and *chunked* (parallel inside a chunk, the state between
chunks; the one to train with). With `log_decay` the state forgets; with the delta rule it overwrites what a key held.

The normaliser is one more column of the state: it sums a value that is always 1.
Katharopoulos et al. 2020 (arXiv 2006.16236).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.nn.attention import check_attention, merge_heads, share_heads, split_heads
from llm_atlas.nn.cache import LayerCache
from llm_atlas.nn.masks import PAD
from llm_atlas.nn.norm import RMSNorm

FeatureMap = Callable[[Tensor], Tensor]
Form = Literal["parallel", "recurrent", "chunked"]
Kind = Literal["linear", "gated", "delta", "gated-delta"]
Decay = Literal["channel", "head", "fixed"]


# Feature maps: phi with phi(q) . phi(k) for the weight of a key.


def elu_features(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    r"""$\operatorname{elu}(x) + 1$: $x + 1$ above zero, $e^x$ below. Positive, as weights of a mean must be.

    Katharopoulos et al. 2020, equation 7 (arXiv 2006.16236).
    """
    return functional.elu(x) + 1


def taylor_features(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch features"]:
    r"""Features whose product is the Taylor series of softmax's weight $\exp(q \cdot k/\sqrt d)$, to second order.

    $$\phi(q) \cdot \phi(k) = 1 + z + z^2/2, \qquad z = q \cdot k / \sqrt d$$

    It is never below 1/2, and wrong by about $z^3/6$: good for small logits alone. $1 + d + d(d+1)/2$ features: 1, the
    $x_i$, and the products $x_i x_j$ with $i \le j$ (those off the diagonal stand for two, hence a factor of
    $\sqrt 2$). Keles et al. 2022 (arXiv 2209.04881); Arora et al. 2024, section 4.1 (arXiv 2402.18668).
    """
    dim = x.shape[-1]
    x = x * dim**-0.25
    i, j = torch.triu_indices(dim, dim, device=x.device)
    pairs = x[..., i] * x[..., j] * torch.where(i == j, math.sqrt(0.5), 1.0).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], dim=-1)


class RandomFeatures(nn.Module):
    r"""Positive random features: their product is $\exp(q \cdot k/\sqrt d)$ on average over the directions.

    $$\phi(x) = \exp\big(\omega_i \cdot x' - |x'|^2/2\big)_{i \le m} / \sqrt m, \qquad x' = x\, d^{-1/4}$$

    The $m$ = `features` directions are normal, orthogonal among each `dim` of them: fewer are then needed. The error
    falls like $1/\sqrt m$ and grows with the logits. Choromanski et al. 2020, section 2.3 and lemma 1
    (arXiv 2009.14794).
    """

    def __init__(self, dim: int, features: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if dim < 1 or features < 1:
            raise ValueError(f"dim {dim} and features {features} must be at least 1")
        blocks = []
        for start in range(0, features, dim):
            q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
            q = q * r.diagonal().sign()  # as QR leaves them, the signs of q are no accident
            lengths = torch.randn(dim, dim, generator=generator).norm(dim=-1, keepdim=True)
            blocks.append((q.T * lengths)[: features - start])
        self.directions: Tensor
        self.register_buffer("directions", torch.cat(blocks))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch features"]:
        """Shape (..., dim) to (..., features), all positive."""
        features, dim = self.directions.shape
        if x.shape[-1] != dim:
            raise ValueError(f"x has {x.shape[-1]} features, the random directions have {dim}")
        x = x * dim**-0.25
        # The largest exponent is |omega|^2/2, whatever x is: for dim up to about 100 it fits float32.
        exponents = x @ self.directions.T.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
        return exponents.exp() / math.sqrt(features)


def _identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu": elu_features,
    "relu": functional.relu,
    "taylor": taylor_features,
    "identity": _identity,
    "silu": functional.silu,
}
"""What `feature_map` may name. "identity" and "silu" can be negative: they go with `normalize=False` alone."""

_SIGNED = ("identity", "silu")


def find_feature_map(feature_map: str | FeatureMap) -> FeatureMap:
    """A feature map by its name, or the function itself."""
    if callable(feature_map):
        return feature_map
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature map {feature_map!r} is not one of {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[feature_map]


def feature_size(feature_map: str | FeatureMap, dim: int) -> int:
    """How many features a map makes of `dim`."""
    if dim < 1:
        raise ValueError(f"dim {dim} must be at least 1")
    if isinstance(feature_map, RandomFeatures):
        return feature_map.directions.shape[0]
    one = torch.zeros(1, dim, device=None if callable(feature_map) else "meta")
    return find_feature_map(feature_map)(one).shape[-1]


def retention_log_decay(
    heads: int, *, device: torch.device | str | None = None
) -> Float[Tensor, "{heads} 1 1"]:
    r"""RetNet's constant decays, $\gamma_h = 1 - 2^{-5-h}$ for heads from 0: their logarithms, for `log_decay`.

    Head 0 forgets half in 22 tokens, each next one in twice as many. Sun et al. 2023, equation 8 (arXiv 2307.08621).
    """
    if heads < 1:
        raise ValueError(f"heads {heads} must be at least 1")
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device)))[:, None, None]


# The additive rule, in three forms.


def linear_attention(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch queries2 keys2"] | None = None,
    bias: Float[Tensor, "*#bias_batch queries3 keys3"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    feature_map: str | FeatureMap = "elu",
    normalize: bool = True,
    log_decay: Float[Tensor, "*decay_batch keys3 channels"] | None = None,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    r"""$\sum_s w_{ts} v_s \big/ \sum_s w_{ts}$ with $w_{ts} = \phi(q_t) \cdot \phi(k_s)$: the parallel form.

    The readable one, with all weights in a matrix as in `scaled_dot_product_attention`, and with its signature: it can
    stand in for it in `MultiHeadAttention`. Of that signature `mask` and `is_causal` mean the same; `bias` is refused,
    since what is added to a logit is no product of features; `scale` multiplies the weights (1 unless given), which
    only `normalize=False` can see.

    `feature_map`: a name in `FEATURE_MAPS` or a function of the last axis. `normalize` divides by the sum of the
    weights; a query whose weights are all 0 gets zeros. `log_decay` $= \log a \le 0$, shape (..., keys, 1) for one
    decay a head or (..., keys, features) for one a channel of the key's features, needs `is_causal`:

    $$w_{ts} = \sum_c \phi(q_t)_c\, \phi(k_s)_c \prod_{i=s+1}^{t} a_{i,c}$$

    (with `normalize` the sum of these). A key that a mask (..., 1, keys) drops has no decay either; a mask with a row a
    query does not go with `log_decay`.

    Any leading axes; `k` and `v` may have fewer heads than `q` when they divide them. Follows the dtype of `q`, works
    in float32. Time $O(T^2 d)$, memory $O(T^2)$, with a decay a channel $O(T^2 d)$.
    Katharopoulos et al. 2020, equations 4 and 5 (arXiv 2006.16236); decays: Sun et al. 2023, equation 5
    (arXiv 2307.08621), Yang et al. 2023, section 4.1 (arXiv 2312.06635).
    """
    check_attention(q, k, v, mask, bias, is_causal)
    if bias is not None:
        raise ValueError("linear attention takes no bias: what is added to a logit is no product of features")
    if log_decay is not None and not is_causal:
        raise ValueError("log_decay needs is_causal=True: a decay counts the tokens since the key")
    # Without a decay a mask drops scores, any of them; with one it drops tokens, and their decay with them.
    p = _prepare(q, k, v, mask if log_decay is not None else None, feature_map, normalize, scale, log_decay)
    keys = share_heads(q, p.k)
    if log_decay is None:
        scores = p.q @ keys.transpose(-2, -1)
    else:
        decay = _decay_between(share_heads(q, p.log_decay))
        if decay.shape[-1] == 1:
            scores = p.q @ keys.transpose(-2, -1) * decay.squeeze(-1)
        else:
            scores = torch.einsum("...td,...sd,...tsd->...ts", p.q, keys, decay)
    if is_causal:
        scores = scores.tril()
    if mask is not None and log_decay is None:
        scores = scores.masked_fill(~mask, 0.0)
    return _finish(scores @ share_heads(q, p.v), q, normalize)


def bidirectional_linear_attention(
    q: Float[Tensor, "*q_batch queries dim"],
    k: Float[Tensor, "*k_batch keys dim"],
    v: Float[Tensor, "*v_batch keys value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch one keys2"] | None = None,
    scale: float | None = None,
    feature_map: str | FeatureMap = "elu",
    normalize: bool = True,
) -> Float[Tensor, "*out_batch queries value_dim"]:
    r"""$(\phi(Q)\,\phi(K)^\top)\,V = \phi(Q)\,(\phi(K)^\top V)$: where all see all, other brackets are all it takes.

    `linear_attention` without `is_causal`, in time $O(T d_k d_v)$. `mask` (..., 1, keys) is True at real keys.
    Katharopoulos et al. 2020, equation 6 (arXiv 2006.16236).
    """
    check_attention(q, k, v, mask, None, False)
    p = _prepare(q, k, v, mask, feature_map, normalize, scale, None)
    return _finish(p.q @ share_heads(q, p.k.transpose(-2, -1) @ p.v), q, normalize)


def linear_attention_recurrent(
    q: Float[Tensor, "*q_batch seq dim"],
    k: Float[Tensor, "*k_batch seq dim"],
    v: Float[Tensor, "*v_batch seq value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch one seq2"] | None = None,
    state: Float[Tensor, "*k_batch features columns"] | None = None,
    scale: float | None = None,
    feature_map: str | FeatureMap = "elu",
    normalize: bool = True,
    log_decay: Float[Tensor, "*decay_batch seq3 channels"] | None = None,
) -> tuple[Float[Tensor, "*out_batch seq value_dim"], Float[Tensor, "*k_batch features columns"]]:
    r"""Causal `linear_attention` one token at a time.

    $$S_t = \operatorname{diag}(a_t)\, S_{t-1} + \phi(k_t)\,v_t^\top, \qquad o_t = S_t^\top \phi(q_t)$$

    Returns the outputs and the last state, which `state` hands to the next call. The state is float32, (..., heads of
    `k`, features, value_dim), with one more column where `normalize`: the sum of $\phi(k)$, by which the output is
    divided. `mask` (..., 1, keys) is True at real tokens; others leave the state as it is. There is no other mask: what
    is in the state cannot be hidden from one query and shown to the next.

    Other arguments as in `linear_attention`. Time $O(T d_k d_v)$, one step after the other; the state does not grow.
    Katharopoulos et al. 2020, equations 16 to 20 (arXiv 2006.16236).
    """
    _check_recurrent(q, k, v, mask)
    p = _group(q, _prepare(q, k, v, mask, feature_map, normalize, scale, log_decay, state))
    state, outs = p.state, []
    for t in range(q.shape[-2]):
        if p.log_decay is not None:
            state = state * p.log_decay[..., t, :, None].exp()
        state = state + p.k[..., t, :, None] * p.v[..., t, None, :]
        outs.append(p.q[..., t, None, :] @ state)
    return _finish(torch.cat(outs, dim=-2), q, normalize, p.grouped), _ungroup_state(state, p.grouped)


def linear_attention_chunked(
    q: Float[Tensor, "*q_batch seq dim"],
    k: Float[Tensor, "*k_batch seq dim"],
    v: Float[Tensor, "*v_batch seq value_dim"],
    *,
    mask: Bool[Tensor, "*#mask_batch one seq2"] | None = None,
    state: Float[Tensor, "*k_batch features columns"] | None = None,
    chunk: int = 64,
    scale: float | None = None,
    feature_map: str | FeatureMap = "elu",
    normalize: bool = True,
    log_decay: Float[Tensor, "*decay_batch seq3 channels"] | None = None,
) -> tuple[Float[Tensor, "*out_batch seq value_dim"], Float[Tensor, "*k_batch features columns"]]:
    r"""Causal `linear_attention`, `chunk` tokens at once: the parallel form inside a chunk, the state between chunks.

    A token's output has two parts: what its own chunk says (a small matrix of weights), and what the state says that
    came into the chunk. All chunks are worked on together; only the states go from one to the next. Arguments and
    results of `linear_attention_recurrent`; the result does not depend on `chunk` (with a decay a channel the next
    power of two is taken). No number is ever divided by a decay, so strong ones do no harm.

    Time $O(T\,(\text{chunk}\,(d_k + d_v) + d_k d_v))$. Sun et al. 2023, equation 7 (arXiv 2307.08621);
    Yang et al. 2023, sections 2 and 4.3 (arXiv 2312.06635).
    """
    _check_recurrent(q, k, v, mask)
    _check_chunk(chunk)
    if q.shape[-2] > _SEGMENT:
        how = {"chunk": chunk, "scale": scale, "feature_map": feature_map, "normalize": normalize}
        run = partial(linear_attention_chunked, **how)
        return _in_segments(run, (q, k, v), mask, state, log_decay=log_decay)
    p = _group(q, _prepare(q, k, v, mask, feature_map, normalize, scale, log_decay, state))
    size = min(chunk, q.shape[-2])
    per_channel = p.log_decay is not None and p.log_decay.shape[-1] > 1
    if per_channel:
        size = 1 << (size - 1).bit_length()
    qs, ks, vs = (_chunks(t, size) for t in (p.q, p.k, p.v))  # (..., chunks, size, features)
    if p.log_decay is None:
        states, last = _summed_states(p.state, ks.transpose(-2, -1) @ vs)
        out = (qs @ ks.transpose(-2, -1)).tril() @ vs + qs @ states
    else:
        since = _chunks(p.log_decay, size).cumsum(
            -2
        )  # log of the decay from the chunk's start up to each token
        whole = since[..., -1:, :]
        updates = (ks * (whole - since).exp()).transpose(-2, -1) @ vs
        states, last = _decayed_states(p.state, whole.transpose(-2, -1).exp(), updates)
        if per_channel:
            inside = _inside_by_channel(qs, ks, vs, since)
        else:
            inside = (qs @ ks.transpose(-2, -1) * _decay_inside(since)) @ vs
        out = inside + (qs * since.exp()) @ states
    out = out.flatten(-3, -2)[..., : q.shape[-2], :]
    return _finish(out, q, normalize, p.grouped), _ungroup_state(last, p.grouped)


# The delta rule: what a key held is taken out before its new value goes in.


def delta_rule_recurrent(
    q: Float[Tensor, "*q_batch seq dim"],
    k: Float[Tensor, "*k_batch seq dim"],
    v: Float[Tensor, "*v_batch seq value_dim"],
    beta: Float[Tensor, "*beta_batch seq4 one2"],
    *,
    mask: Bool[Tensor, "*#mask_batch one seq2"] | None = None,
    state: Float[Tensor, "*k_batch dim value_dim"] | None = None,
    scale: float | None = None,
    unit_keys: bool = True,
    log_decay: Float[Tensor, "*decay_batch seq3 one3"] | None = None,
) -> tuple[Float[Tensor, "*out_batch seq value_dim"], Float[Tensor, "*k_batch dim value_dim"]]:
    r"""The state as a memory that overwrites, one token at a time.

    $$S_t = a_t\, (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad o_t = S_t^\top q_t$$

    $S^\top k$ is what the memory returns for a key. The additive rule adds $v$ to it; this one moves it towards $v$
    by the share `beta`, one step of gradient descent on $|S^\top k - v|^2/2$. With $\beta = 1$ and a key of length 1
    the old value is gone. `beta` (..., seq, 1) lies between 0 and 2. `unit_keys` divides each key by its length,
    without which the state may grow without bound (then `beta` times the squared length must stay below 2).
    `log_decay` (..., seq, 1), at most 0, is the gated delta rule: one decay a head, before the write.

    Returns outputs and the last state, float32 (..., heads of `k`, dim, value_dim). `scale` multiplies the output. No
    feature map and no normaliser: apply what you like to `q` and `k` before. `mask` as in `linear_attention_recurrent`.
    Time $O(T d_k d_v)$, one step after the other. Schlag et al. 2021, section 4.2 (arXiv 2102.11174); Yang et al. 2024,
    section 2.2 (arXiv 2406.06484); gated: Yang et al. 2024, section 3.1 (arXiv 2412.06464).
    """
    _check_recurrent(q, k, v, mask)
    p = _group(q, _prepare_delta(q, k, v, beta, mask, unit_keys, scale, log_decay, state))
    state, outs = p.state, []
    for t in range(q.shape[-2]):
        key = p.k[..., t, None, :]
        if p.log_decay is not None:
            state = state * p.log_decay[..., t, :, None].exp()
        error = p.v[..., t, None, :] - key @ state
        state = state + key.transpose(-2, -1) * (p.beta[..., t, :, None] * error)
        outs.append(p.q[..., t, None, :] @ state)
    return _finish(torch.cat(outs, dim=-2), q, False, p.grouped), _ungroup_state(state, p.grouped)


def delta_rule_chunked(
    q: Float[Tensor, "*q_batch seq dim"],
    k: Float[Tensor, "*k_batch seq dim"],
    v: Float[Tensor, "*v_batch seq value_dim"],
    beta: Float[Tensor, "*beta_batch seq4 one2"],
    *,
    mask: Bool[Tensor, "*#mask_batch one seq2"] | None = None,
    state: Float[Tensor, "*k_batch dim value_dim"] | None = None,
    chunk: int = 64,
    scale: float | None = None,
    unit_keys: bool = True,
    log_decay: Float[Tensor, "*decay_batch seq3 one3"] | None = None,
) -> tuple[Float[Tensor, "*out_batch seq value_dim"], Float[Tensor, "*k_batch dim value_dim"]]:
    r"""`delta_rule_recurrent`, `chunk` tokens at once: the same arguments, the same results.

    Every state of a chunk is the one it began with, decayed, plus $\sum_s k_s u_s^\top$ where $u_s$ is what token $s$
    really wrote: its value less what the memory held. Put into the recurrence, with $g_t$ the decay since the chunk's
    start, the $u$ of a chunk solve a triangular system:

    $$u_t + \beta_t \sum_{s<t} \tfrac{g_t}{g_s} (k_t \cdot k_s)\, u_s = \beta_t \big(v_t - g_t S^\top k_t\big)
    \quad\Rightarrow\quad U = U_0 - W S .$$

    $U_0$ and $W$ do not need the state $S$ that comes in, so they are found for all chunks together; a chunk then maps
    $S$ to $M S + B$, and these small products are the only thing done one after the other.

    Time $O(T\,(\text{chunk}\,(d_k + d_v) + d_k^2 + d_k d_v))$. Yang et al. 2024, section 3 (arXiv 2406.06484: the WY
    representation and its UT transform); gated: Yang et al. 2024, section 3.3 (arXiv 2412.06464).
    """
    _check_recurrent(q, k, v, mask)
    _check_chunk(chunk)
    if q.shape[-2] > _SEGMENT:
        run = partial(delta_rule_chunked, chunk=chunk, scale=scale, unit_keys=unit_keys)
        return _in_segments(run, (q, k, v, beta), mask, state, log_decay=log_decay)
    p = _group(q, _prepare_delta(q, k, v, beta, mask, unit_keys, scale, log_decay, state))
    qs, ks, vs, betas = (_chunks(t, min(chunk, q.shape[-2])) for t in (p.q, p.k, p.v, p.beta))
    matches, seen = ks @ ks.transpose(-2, -1), qs @ ks.transpose(-2, -1)
    from_start, to_end, whole = qs, ks, torch.ones_like(betas[..., -1:, :])
    system = torch.cat([vs, ks], dim=-1)
    if p.log_decay is not None:
        since = _chunks(p.log_decay, qs.shape[-2]).cumsum(-2)
        inside = _decay_inside(since)
        matches, seen = matches * inside, seen * inside
        grown, whole = since.exp(), since[..., -1:, :].exp()
        from_start, to_end = qs * grown, ks * (since[..., -1:, :] - since).exp()
        system = torch.cat([vs, ks * grown], dim=-1)
    # Its diagonal is taken for ones and what lies above is not read.
    solved = torch.linalg.solve_triangular(betas * matches, betas * system, upper=False, unitriangular=True)
    written, read = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # U_0 and W
    kept = whole * torch.eye(k.shape[-1], dtype=ks.dtype, device=ks.device)
    states, last = _mapped_states(
        p.state, kept - to_end.transpose(-2, -1) @ read, to_end.transpose(-2, -1) @ written
    )
    out = from_start @ states + seen.tril() @ (written - read @ states)
    out = out.flatten(-3, -2)[..., : q.shape[-2], :]
    return _finish(out, q, False, p.grouped), _ungroup_state(last, p.grouped)


# What the forms share.


class _Prepared(NamedTuple):
    """Features in float32, padding made harmless, heads grouped."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    log_decay: Tensor | None
    beta: Tensor | None = None
    grouped: bool = False


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    feature_map: str | FeatureMap,
    normalize: bool,
    scale: float | None,
    log_decay: Tensor | None,
    state: Tensor | None = None,
) -> _Prepared:
    _check_normalizer(feature_map, normalize)
    wide = torch.promote_types(q.dtype, torch.float32)
    features = find_feature_map(feature_map)
    q, k, v = features(q.to(wide)), features(k.to(wide)), v.to(wide)
    if scale is not None:
        q = q * scale
    if normalize:
        v = functional.pad(v, (0, 1), value=1.0)
    log_decay = _check_beside("log_decay", log_decay, k, wide, per_channel=True)
    if mask is not None:
        k, v, log_decay, _ = _drop(mask, k, v, log_decay, None)
    return _Prepared(q, k, v, _check_state(state, k, v), log_decay)


def _prepare_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    unit_keys: bool,
    scale: float | None,
    log_decay: Tensor | None,
    state: Tensor | None,
) -> _Prepared:
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if scale is not None:
        q = q * scale
    if unit_keys:
        k = unit_length(k)
    beta = _check_beside("beta", beta, k, wide, top=2.0 if unit_keys else math.inf)
    log_decay = _check_beside("log_decay", log_decay, k, wide)
    if mask is not None:
        k, v, log_decay, beta = _drop(mask, k, v, log_decay, beta)
    return _Prepared(q, k, v, _check_state(state, k, v), log_decay, beta)


def unit_length(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Every vector of the last axis divided by its length; zeros stay zeros."""
    return functional.normalize(x, dim=-1, eps=1e-6)


def _drop(mask: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> tuple:
    """Tokens that the mask drops write nothing (even where they hold NaN) and let nothing decay."""
    if mask.shape[-2] != 1 or not _fits(mask.transpose(-2, -1).shape, (*k.shape[:-1], 1)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: linear attention takes no mask but one of whole keys,"
            f" (..., key heads or 1, 1, {k.shape[-2]})"
        )
    padding = ~mask.transpose(-2, -1)
    dropped = (None if t is None else t.masked_fill(padding, 0.0) for t in (k, v, log_decay, beta))
    return tuple(dropped)


def _group(q: Tensor, p: _Prepared) -> _Prepared:
    """Query heads in groups, (..., key heads, group, seq, features), and an axis of 1 for the group in all else."""
    if q.dim() < 3 or p.k.dim() < 3 or not q.shape[-3] > p.k.shape[-3] > 1:
        return p
    log_decay, beta = (None if t is None else t.unsqueeze(-3) for t in (p.log_decay, p.beta))
    q = p.q.unflatten(-3, (p.k.shape[-3], -1))
    return _Prepared(
        q, p.k.unsqueeze(-3), p.v.unsqueeze(-3), p.state.unsqueeze(-3), log_decay, beta, grouped=True
    )


def _ungroup_state(state: Tensor, grouped: bool) -> Tensor:
    return state.squeeze(-3) if grouped else state


def _finish(out: Tensor, like: Tensor, normalize: bool, grouped: bool = False) -> Tensor:
    """Heads in one axis again, divided by the last column, in the dtype that came in."""
    if grouped:
        out = out.flatten(-4, -3)
    if normalize:
        out, total = out[..., :-1], out[..., -1:]
        empty = total.abs() < torch.finfo(total.dtype).tiny
        out = (out / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return out.to(like.dtype)


_SEGMENT = 4096
"""So many tokens are worked on together: what lies between the steps then stays small, and time goes by the length."""


def _in_segments(
    run: Callable[..., tuple[Tensor, Tensor]],
    tokens: tuple[Tensor, ...],
    mask: Tensor | None,
    state: Tensor | None,
    *,
    log_decay: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A long sequence in pieces, each of which begins with the state that the one before has left."""
    outs = []
    for first in range(0, tokens[0].shape[-2], _SEGMENT):
        here = slice(first, first + _SEGMENT)
        part = [t if t.shape[-2] == 1 else t[..., here, :] for t in tokens]
        decay = log_decay if log_decay is None or log_decay.shape[-2] == 1 else log_decay[..., here, :]
        real = mask if mask is None or mask.shape[-1] == 1 else mask[..., here]
        out, state = run(*part, mask=real, state=state, log_decay=decay)
        outs.append(out)
    return torch.cat(outs, dim=-2), state


def _chunks(x: Tensor, size: int) -> Tensor:
    """(..., seq, features) to (..., chunks, size, features). Zeros fill the last: they write and decay nothing."""
    short = -x.shape[-2] % size
    return (functional.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, size))


def _decay_between(log_decay: Tensor) -> Tensor:
    """The decay between any two tokens, (..., t, s, channels): the product over s+1 ... t, and 0 for s > t.

    The logs are summed from s on and never subtracted: nothing is lost where decays are strong.
    """
    seq = log_decay.shape[-2]
    after = torch.ones(seq, seq, dtype=torch.bool, device=log_decay.device).tril(-1)[..., None]
    sums = log_decay.unsqueeze(-2).expand(*log_decay.shape[:-1], seq, -1).masked_fill(~after, 0.0).cumsum(-3)
    return sums.exp().masked_fill(after.transpose(0, 1), 0.0)


def _decay_inside(since: Tensor) -> Tensor:
    """The same inside chunks, from running sums of one log decay a token: (..., t, 1) to (..., t, s)."""
    size = since.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=since.device).triu(1)
    # Masked before exp: the logs of later keys are positive and could overflow.
    return (since - since.transpose(-2, -1)).masked_fill(later, -math.inf).exp()


def _inside_by_channel(q: Tensor, k: Tensor, v: Tensor, since: Tensor) -> Tensor:
    r"""The part of the outputs that comes from a token's own chunk, where every channel has its own decay.

    $\exp(c_t - c_s)$ must be split between query and key to be a matrix product, and $\exp(-c_s)$ overflows. So:
    halves. For keys in the first half and queries in the second, both sides are measured from the border between
    them, and neither exponent is positive. Each half is then cut in halves itself, down to single tokens.
    """
    out = (q * k).sum(-1, keepdim=True) * v
    half = 1
    while half < q.shape[-2]:
        qh, kh, vh, ch = (t.unflatten(-2, (-1, 2, half)) for t in (q, k, v, since))
        border = ch[..., 0, -1:, :]
        late = qh[..., 1, :, :] * (ch[..., 1, :, :] - border).exp()
        early = kh[..., 0, :, :] * (border - ch[..., 0, :, :]).exp()
        seen = late @ early.transpose(-2, -1) @ vh[..., 0, :, :]
        out = out + torch.stack([torch.zeros_like(seen), seen], dim=-3).flatten(-4, -2)
        half *= 2
    return out


def _summed_states(start: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The state that comes into each chunk, and the last: a running sum of (..., chunks, features, columns)."""
    states = torch.cat([start.unsqueeze(-3), updates], dim=-3).cumsum(-3)
    return states[..., :-1, :, :], states[..., -1, :, :]


def _decayed_states(start: Tensor, decay: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a chunk multiplies what comes in by its decay, (..., chunks, features or 1, 1)."""
    states = [start]
    for d, update in zip(decay.unbind(-3), updates.unbind(-3), strict=True):
        states.append(d * states[-1] + update)
    return torch.stack(states[:-1], dim=-3), states[-1]


def _mapped_states(start: Tensor, maps: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a chunk multiplies what comes in by a matrix, (..., chunks, features, features)."""
    states = [start]
    for m, update in zip(maps.unbind(-3), updates.unbind(-3), strict=True):
        states.append(m @ states[-1] + update)
    return torch.stack(states[:-1], dim=-3), states[-1]


def _check_recurrent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    check_attention(q, k, v, mask, None, False)
    if q.shape[-2] != k.shape[-2] or q.shape[-2] < 1:
        raise ValueError(
            f"there are {q.shape[-2]} queries and {k.shape[-2]} keys: a recurrence takes one of each a token,"
            " and at least one token"
        )


def _check_normalizer(feature_map: str | FeatureMap, normalize: bool) -> None:
    if normalize and isinstance(feature_map, str) and feature_map in _SIGNED:
        raise ValueError(
            f"{feature_map} features may be negative and their sum 0: use normalize=False with them"
        )


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 token")


def _check_state(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    shape = (*k.shape[:-2], k.shape[-1], v.shape[-1])
    if state is None:
        return k.new_zeros(shape)
    if state.shape != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}, these keys and values need {shape}")
    return state.to(k.dtype)


def _check_beside(
    name: str,
    t: Tensor | None,
    k: Tensor,
    dtype: torch.dtype,
    *,
    per_channel: bool = False,
    top: float | None = None,
) -> Tensor | None:
    """`log_decay` (no `top`) or `beta` (0 to `top`), one number a token or one a feature, checked and spread."""
    if t is None:
        return None
    if not t.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {t.dtype}")
    if t.dim() < 2 or t.shape[-1] not in ((1, k.shape[-1]) if per_channel else (1,)):
        channels = f"1 or {k.shape[-1]}" if per_channel else "1"
        raise ValueError(f"{name} has shape {tuple(t.shape)}: it must be (..., {k.shape[-2]}, {channels})")
    if not _fits(t.shape[:-1], k.shape[:-1]):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}, which does not spread over keys of {tuple(k.shape[:-1])}"
        )
    if t.device.type == "cpu" and t.numel():  # elsewhere reading values back would make the device wait
        low, high = (x.item() for x in t.detach().aminmax())
        if top is None and not (high <= 0 and low > -math.inf):
            bad = high if not high <= 0 else low
            raise ValueError(f"{name} {bad:g} must be finite and at most 0: decays lie in (0, 1]")
        if top is not None and not (low >= 0 and high <= top):
            bad = high if not high <= top else low
            raise ValueError(f"{name} {bad:g} must lie between 0 and {top:g}")
    return t.to(dtype).expand(*k.shape[:-1], t.shape[-1])


def _fits(shape: torch.Size | tuple[int, ...], over: torch.Size | tuple[int, ...]) -> bool:
    """Whether the one broadcasts to the other without growing it."""
    pairs = zip(reversed(shape), reversed(over), strict=False)
    return len(shape) <= len(over) and all(n in (1, m) for n, m in pairs)


# Counters.


def linear_state_size(heads: int, features: int, value_dim: int, *, normalize: bool = True) -> int:
    """Numbers in the state of a layer and row, at any length: a matrix a head, and its normaliser."""
    for name, n in (("heads", heads), ("features", features), ("value_dim", value_dim)):
        if n < 1:
            raise ValueError(f"{name} {n} must be at least 1")
    return heads * features * (value_dim + normalize)


def linear_attention_flops(
    features: int, value_dim: int, *, form: Form, seq: int, chunk: int = 64, normalize: bool = True
) -> int:
    r"""FLOPs a token and head of the additive rule's matrix products, forward, a multiply and an add counted as two.

    parallel: $2T(d_k + d_v)$, all pairs as `linear_attention` computes them; recurrent: $4 d_k d_v$, a write and a
    read; chunked: $2c(d_k + d_v) + 4 d_k d_v$. $d_v$ counts the normaliser's column. Decays and element-wise work left
    out. `seq` matters to the parallel form (and cuts a chunk that is longer).
    """
    _check_counts(form, features=features, value_dim=value_dim, seq=seq, chunk=chunk)
    columns = value_dim + normalize
    if form == "parallel":
        return 2 * seq * (features + columns)
    inside = 0 if form == "recurrent" else 2 * min(chunk, seq) * (features + columns)
    return inside + 4 * features * columns


def delta_rule_flops(dim: int, value_dim: int, *, form: Form, seq: int, chunk: int = 64) -> float:
    r"""FLOPs a token and head of the delta rule's matrix products, forward, a multiply and an add counted as two.

    recurrent: $6 d_k d_v$, what the key holds, the write, the read. chunked: the matches of keys and queries with keys,
    $4 c d_k$; the triangular system, $c (d_k + d_v)$; the chunk's map, $2 d_k^2 + 2 d_k d_v$, and its use,
    $2 d_k^2 d_v / c$; the outputs, $4 d_k d_v + 2 c d_v$. There is no parallel form.
    """
    _check_counts(form, dim=dim, value_dim=value_dim, seq=seq, chunk=chunk)
    if form == "parallel":
        raise ValueError("the delta rule has no parallel form: what a token writes depends on the state")
    if form == "recurrent":
        return 6.0 * dim * value_dim
    c = min(chunk, seq)
    solve = c * (dim + value_dim)
    maps = 2 * dim * dim + 2 * dim * value_dim + 2 * dim * dim * value_dim / c
    return 4 * c * dim + solve + maps + 4 * dim * value_dim + 2 * c * value_dim


def _check_counts(form: str, **counts: int) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form {form!r} is not one of {', '.join(get_args(Form))}")
    for name, n in counts.items():
        if n < 1:
            raise ValueError(f"{name} {n} must be at least 1")


# The mixer.


class LinearAttention(nn.Module):
    r"""A mixer with a state of fixed size in the place of keys and values: the seam of `MultiHeadAttention`.

    `kind` says how the state changes (with $\sigma$ for the sigmoid and $W$ for projections of a token $x$):

    - "linear": $S + \phi(k) v^\top$, $\phi$ = elu + 1 unless `feature_map` is given; normalised, unless `normalize` is
      False or $\phi$ can be negative.
    - "gated": decays $a = \sigma(Wx + b)$, one a `decay` "channel" of the keys (GLA) or one a "head", or "fixed" ones
      (RetNet); no feature map unless given, no normaliser.
    - "delta": $\beta = \sigma(Wx)$ a head; $\phi$ = SiLU unless given, then queries and keys have length 1.
    - "gated-delta": the same with a decay a head.

    Gates begin with decays near 1: $1 - 1/32$ in the first head to $1 - 1/512$ in the last, evenly in their logarithms.
    `conv`: a causal convolution over that many tokens, each feature of q, k and v alone, then SiLU; 0 for none. A layer
    that only adds up cannot by itself look one token back, which recall of "what came after this" needs. `out_norm`: an
    RMSNorm on each head's output, which a sum without normaliser needs.

    Always causal, and order is seen through the recurrence: there is no position scheme and no `context`. A token with
    position -1 (padding) changes no state. With a `cache` the state goes on from its last token (`LayerCache.keep`):
    a new token costs the same whatever the length. Sequences take the chunked form, single tokens the recurrent one.

    Raises ValueError when `dim` does not divide into `heads`, `heads` into `kv_heads`, and for a `mask`.
    Katharopoulos et al. 2020 (arXiv 2006.16236), Sun et al. 2023 (2307.08621), Yang et al. 2023 (2312.06635), 2024
    (2406.06484, section 3.3; 2412.06464, section 3.4).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kind: Kind = "linear",
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: str | FeatureMap | None = None,
        normalize: bool | None = None,
        decay: Decay = "channel",
        conv: int = 0,
        chunk: int = 64,
        bias: bool = False,
        out_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r} is not one of {', '.join(get_args(Kind))}")
        if decay not in get_args(Decay):
            raise ValueError(f"decay {decay!r} is not one of {', '.join(get_args(Decay))}")
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"dim {dim} must divide into {heads} heads")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} heads must divide into groups over {kv_heads} key/value heads")
        head_dim = dim // heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim {head_dim} must be at least 1")
        if conv < 0:
            raise ValueError(f"conv {conv} must be 0 (none) or a number of tokens")
        _check_chunk(chunk)
        default = {"linear": "elu", "gated": "identity"}.get(kind, "silu")
        feature_map = default if feature_map is None else feature_map
        find_feature_map(feature_map)
        if normalize is None:
            normalize = kind == "linear" and feature_map not in _SIGNED
        if normalize and "delta" in kind:
            raise ValueError("the delta rule has no normaliser: its state holds values, not sums of them")
        _check_normalizer(feature_map, normalize)
        self.kind, self.heads, self.kv_heads, self.head_dim = kind, heads, kv_heads, head_dim
        self.feature_map, self.normalize, self.chunk, self.conv = feature_map, normalize, chunk, conv
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=bias) for width in widths)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)
        self.decay = self.beta = self.taps = None
        if "gated" in kind:
            decay = "head" if kind == "gated-delta" and decay == "channel" else decay
            self._make_decay(dim, decay, feature_size(feature_map, head_dim) if decay == "channel" else 1)
        if "delta" in kind:
            self.beta = nn.Linear(dim, kv_heads)
            nn.init.zeros_(self.beta.bias)
        if conv:  # the last tap is the token itself
            self.taps = nn.Parameter(torch.empty(sum(widths), conv).uniform_(-1, 1) / math.sqrt(conv))
        self.norm = RMSNorm(head_dim, eps=norm_eps) if out_norm else nn.Identity()

    def _make_decay(self, dim: int, decay: Decay, channels: int) -> None:
        if decay == "fixed":
            self.fixed_log_decay: Tensor
            self.register_buffer("fixed_log_decay", retention_log_decay(self.kv_heads), persistent=False)
            return
        self.decay = nn.Linear(dim, self.kv_heads * channels)
        self._open_gates()

    @torch.no_grad()
    def _open_gates(self) -> None:
        forgotten = torch.exp2(-torch.linspace(5, 9, self.kv_heads, device=self.decay.bias.device))
        channels = len(self.decay.bias) // self.kv_heads
        self.decay.bias.copy_(torch.logit(1 - forgotten).repeat_interleave(channels))

    @torch.no_grad()
    def draw_gates(self, generator: torch.Generator | None) -> None:
        """Decays and convolution as a new layer has them, for code that draws a model's matrices by itself."""
        if self.decay is not None:
            self._open_gates()
        if self.taps is not None:
            self.taps.uniform_(-1, 1, generator=generator).div_(math.sqrt(self.conv))

    @property
    def cached_numbers(self) -> int:
        """Numbers that a cache keeps of one row, at any length: the states, and the convolution's last inputs."""
        features = feature_size(self.feature_map, self.head_dim)
        inputs = 0 if self.taps is None else self.taps.shape[0] * (self.conv - 1)
        return inputs + linear_state_size(self.kv_heads, features, self.head_dim, normalize=self.normalize)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        positions: Int[Tensor, "batch2 seq"] | None = None,
        mask: Bool[Tensor, "batch3 heads2 seq2 keys"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Shape (batch, seq, dim) to the same shape; what comes out at padding means nothing."""
        if x.shape[-1] != self.q.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this layer takes {self.q.in_features}")
        if mask is not None:
            raise ValueError(
                "linear attention cannot take a mask: its state holds all tokens before. Padding is told by positions"
            )
        real = _real_tokens(positions)
        old = None if cache is None else cache.state
        if cache is not None and cache.length and cache.rows != x.shape[0]:
            raise ValueError(f"the cache holds {cache.rows} rows, the new tokens have {x.shape[0]}")
        q, k, v = self.q(x), self.k(x), self.v(x)
        inputs = None
        if self.taps is not None:
            mixed = torch.cat([q, k, v], dim=-1)
            mixed, inputs = short_convolution(
                mixed, self.taps, real=real, past=None if old is None else old[1]
            )
            q, k, v = functional.silu(mixed).split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        out, state = self._mix(x, q, k, v, real, None if old is None else old[0])
        if cache is not None:
            cache.keep(x.shape[1], state, *([] if inputs is None else [inputs]))
        return self.out(merge_heads(self.norm(out)))

    def _mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        how = {"state": state, "mask": None if real is None else real[:, None, None, :]}
        if self.kind != "linear":
            how["log_decay"] = self.log_decay(x)
        one = x.shape[1] == 1
        if not one:
            how["chunk"] = self.chunk
        if self.beta is not None:
            phi = find_feature_map(self.feature_map)
            q, k = unit_length(phi(q)), phi(k)
            beta = split_heads(self.beta(x), self.kv_heads).sigmoid()
            return (delta_rule_recurrent if one else delta_rule_chunked)(q, k, v, beta, **how)
        how |= {"feature_map": self.feature_map, "normalize": self.normalize}
        if not self.normalize:
            how["scale"] = self.head_dim**-0.5
        return (linear_attention_recurrent if one else linear_attention_chunked)(q, k, v, **how)

    def log_decay(
        self, x: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch kv_heads seq _channels"] | None:
        """Log of each token's decay, in float32; None where nothing decays."""
        if self.decay is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            return functional.logsigmoid(split_heads(self.decay(x), self.kv_heads).to(wide))
        if self.kind in ("linear", "delta"):
            return None
        return self.fixed_log_decay.expand(x.shape[0], -1, x.shape[1], -1)


def short_convolution(
    x: Float[Tensor, "batch seq features"],
    taps: Float[Tensor, "features width"],
    *,
    real: Bool[Tensor, "#batch seq"] | None = None,
    past: Float[Tensor, "batch before features"] | None = None,
) -> tuple[Float[Tensor, "batch seq features"], Float[Tensor, "batch before2 features"]]:
    r"""A causal convolution, each feature alone: out$_t = \sum_j \text{taps}_j\, x_{t - (\text{width} - 1) + j}$.

    The last tap is the token itself. Returns the outputs and the last width - 1 inputs, which `past` hands to the next
    call. Tokens that are not `real` are skipped, wherever they stand, as if the row did not have them.
    """
    width = taps.shape[-1]
    if taps.shape[0] != x.shape[-1] or width < 1:
        raise ValueError(f"taps have shape {tuple(taps.shape)}, x has {x.shape[-1]} features")
    rows, seq, features = x.shape
    past = x.new_zeros(rows, width - 1, features) if past is None else past
    if past.shape != (rows, width - 1, features):
        raise ValueError(f"past has shape {tuple(past.shape)}, it must be {(rows, width - 1, features)}")
    window, back = torch.cat([past.to(x.dtype), x], dim=1), None
    if real is not None:
        # Padding, then what came before, then the real tokens: neighbours stand side by side.
        real = real.expand(rows, seq)
        behind = torch.cat([real.new_ones(rows, width - 1), real], dim=1)
        order = behind.to(torch.int8).argsort(dim=1, stable=True)
        window = window.masked_fill(~behind[..., None], 0.0).take_along_dim(order[..., None], dim=1)
        back = order.argsort(dim=1)[:, width - 1 :, None]
    kept = window[:, seq:]
    if back is None:
        out = functional.conv1d(window.transpose(1, 2), taps[:, None, :].to(x.dtype), groups=features)
        return out.transpose(1, 2), kept
    padded = functional.pad(window, (0, 0, width - 1, 0)).transpose(1, 2)
    out = functional.conv1d(padded, taps[:, None, :].to(x.dtype), groups=features).transpose(1, 2)
    return out.take_along_dim(back, dim=1), kept


def _real_tokens(positions: Tensor | None) -> Tensor | None:
    """True at real tokens, or None where all are known to be."""
    if positions is None:
        return None
    real = positions > PAD
    # On other devices reading the answer back would make them wait.
    return None if positions.device.type == "cpu" and bool(real.all()) else real
