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
    returns the dtype of `x`. A token whose features are all equal has no variance and gives `bias`.
    Cost: three passes over `x`. Ba et al. 2016, equation 4 (arXiv 1607.06450).
    """
    _check_eps(eps)
    _check_scale(x, weight, "weight")
    _check_scale(x, bias, "bias")
    centred = _centre(_widen(x))
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

    Reduces in float32, returns the dtype of `x`. Squares must fit float32: features beyond about 1e19 give zeros.
    Zhang and Sennrich 2019, equation 4 (arXiv 1910.07467).
    """
    _check_eps(eps)
    _check_scale(x, weight, "weight")
    wide = _widen(x)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)


def layer_norm_backward(
    grad: Float[Tensor, "*batch dim"],
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    r"""Gradients of `layer_norm` in `x`, `weight` and `bias`, from the gradient `grad` of its output.

    With $s = \sqrt{\sigma^2+\epsilon}$, $\hat x = (x-\mu)/s$ and $g = \gamma \odot \text{grad}$, means over features:

    $$\frac{\partial \hat x_j}{\partial x_i} = \frac1s\Big(\delta_{ij} - \frac1n - \frac{\hat x_i \hat x_j}n\Big)
    \quad\Rightarrow\quad
    \nabla_x = \frac1s\Big(g - \operatorname{mean}(g) - \hat x \operatorname{mean}(g \odot \hat x)\Big)$$

    The first mean takes out of $g$ its part along $(1, \dots, 1)$, the second its part along $\hat x$: shifting or
    scaling a token does not change what its norm returns, so no gradient points that way. The first holds exactly; of
    the second the share $\epsilon/(\sigma^2+\epsilon)$ stays. $1/s$ makes the gradient of a small token large.
    $\nabla_\gamma$ sums $\text{grad} \odot \hat x$ over all tokens, $\nabla_\beta$ sums grad.

    `weight` None stands for ones; its gradient is returned all the same. Reduces in float32; `grad_x` has the dtype of
    `x`, the other two that of `weight` (of `x` without one). A token without variance gets a finite gradient, its part
    off $(1, \dots, 1)$ over $\sqrt\epsilon$. Derived from Ba et al. 2016, equation 4 (arXiv 1607.06450).
    """
    _check_eps(eps)
    _check_scale(x, weight, "weight")
    _check_grad(grad, x)
    wide_grad, centred = _widen(grad), _centre(_widen(x))
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * inverse
    g = wide_grad if weight is None else wide_grad * weight
    along_mean = g.mean(-1, keepdim=True)
    along_scale = normed * (g * normed).mean(-1, keepdim=True)
    grad_x = inverse * (g - along_mean - along_scale)
    narrow = (x if weight is None else weight).dtype
    return grad_x.to(x.dtype), _sum_tokens(wide_grad * normed, narrow), _sum_tokens(wide_grad, narrow)


def rms_norm_backward(
    grad: Float[Tensor, "*batch dim"],
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, " dim"]]:
    r"""Gradients of `rms_norm` in `x` and `weight`, from the gradient `grad` of its output.

    With $r = \sqrt{\operatorname{mean}(x^2)+\epsilon}$, $\hat x = x/r$, $g = \gamma \odot \text{grad}$ and means over
    features:

    $$\nabla_x = \frac1r\Big(g - \hat x \operatorname{mean}(g \odot \hat x)\Big), \qquad
    \nabla_\gamma = \sum_{\text{tokens}} \text{grad} \odot \hat x$$

    One projection where LayerNorm has two: scaling a token changes nothing, shifting it does. Of the part along
    $\hat x$ the share $\epsilon/r^2$ stays. A token of zeros gets $g/\sqrt\epsilon$.

    Arguments and dtypes as in `layer_norm_backward`. Zhang and Sennrich 2019, section 4.2 (arXiv 1910.07467).
    """
    _check_eps(eps)
    _check_scale(x, weight, "weight")
    _check_grad(grad, x)
    wide_grad, wide = _widen(grad), _widen(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    g = wide_grad if weight is None else wide_grad * weight
    grad_x = inverse * (g - normed * (g * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), _sum_tokens(wide_grad * normed, (x if weight is None else weight).dtype)


class LayerNorm(nn.Module):
    r"""`layer_norm` with a learnt scale $\gamma$ (`weight`, starts at 1) and shift $\beta$ (`bias`, at 0; optional).

    Two numbers a feature. Equal to `torch.nn.LayerNorm`. Raises ValueError where the last axis is not `dim`.
    Ba et al. 2016, section 3 (arXiv 1607.06450).
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        _check_dim(dim)
        _check_eps(eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        _check_floating(x, "x")
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
        _check_eps(eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        _check_floating(x, "x")
        _check_scale(x, self.weight, "weight")
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _widen(x: Tensor) -> Tensor:
    _check_floating(x, "x")
    return x if x.dtype == torch.float64 else x.float()


def _centre(x: Tensor) -> Tensor:
    """Minus the mean, twice: the first is rounded, and in a row of equal large numbers that alone would be left."""
    centred = x - x.mean(-1, keepdim=True)
    centred -= centred.mean(-1, keepdim=True)
    return centred


def _sum_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.sum(tuple(range(x.dim() - 1))).to(dtype) if x.dim() > 1 else x.to(dtype)


def _check_grad(grad: Tensor, x: Tensor) -> None:
    if grad.shape != x.shape:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}, but x has {tuple(x.shape)}: they must be equal"
        )


def _check_floating(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {x.dtype}")


def _check_eps(eps: float) -> None:
    if not eps >= 0:  # false for NaN as well
        raise ValueError(f"eps {eps} must be at least 0")


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim {dim} must be at least 1")


def _check_scale(x: Tensor, scale: Tensor | None, name: str) -> None:
    if scale is not None:
        _check_floating(scale, name)
    if scale is not None and scale.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)}, but the last axis of x has {x.shape[-1]} features"
        )
