"""Normalization: put a token's features on a common scale."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def layer_norm(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"] | None = None,
    bias: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch dim"]:
    r"""$\gamma\,(x-\mu)/\sqrt{\sigma^2+\epsilon} + \beta$, with mean and (biased) variance over the last axis.

    Every token is normalised alone: no statistics are shared across the batch or the sequence. Reduces in float32,
    returns the dtype of `x`. Cost: two passes over `x`. Ba et al. 2016, equation 4 (arXiv 1607.06450).
    """
    _check_scale(x, weight, "weight")
    _check_scale(x, bias, "bias")
    wide = _widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"] | None = None, eps: float = 1e-6
) -> Float[Tensor, "*batch dim"]:
    r"""$\gamma\,x/\sqrt{\operatorname{mean}(x^2)+\epsilon}$ over the last axis: LayerNorm without centring and shift.

    Reduces in float32, returns the dtype of `x`. Zhang and Sennrich 2019, equation 4 (arXiv 1910.07467).
    """
    _check_scale(x, weight, "weight")
    wide = _widen(x)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)


class LayerNorm(nn.Module):
    r"""`layer_norm` with a learnt scale $\gamma$ (`weight`, starts at 1) and shift $\beta$ (`bias`, at 0; optional).

    Two numbers a feature. Equal to `torch.nn.LayerNorm`. Raises ValueError where the last axis is not `dim`.
    Ba et al. 2016, section 3 (arXiv 1607.06450).
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        _check_dim(dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        _check_scale(x, self.weight, "weight")
        # The fused kernel of torch: `layer_norm` above is its readable twin and is tested equal to it.
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    r"""`rms_norm` with a learnt scale $\gamma$ (`weight`, starts at 1). One number a feature.

    Equal to `torch.nn.RMSNorm`. Raises ValueError where the last axis is not `dim`.
    Zhang and Sennrich 2019, section 4 (arXiv 1910.07467).
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        _check_dim(dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        _check_scale(x, self.weight, "weight")
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _widen(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"x must hold floating-point numbers, got {x.dtype}")
    return x if x.dtype == torch.float64 else x.float()


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim {dim} must be at least 1")


def _check_scale(x: Tensor, scale: Tensor | None, name: str) -> None:
    if scale is not None and scale.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)}, but the last axis of x has {x.shape[-1]} features"
        )
