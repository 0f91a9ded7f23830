"""Activation functions: the one place where a feed-forward network is not linear.

Each is here three times: the function as its equation reads, its derivative by hand, and in `ACTIVATIONS` the
fused form of torch, which modules use. Those of 16-bit numbers are computed in float32 and rounded once.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]

_SLOPE = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$\max(0, x)$: what is negative becomes zero, the rest passes. One comparison an element.

    The gradient at 0 is taken to be 0, as in torch. Nair and Hinton 2010, section 2 (ICML); in the
    transformer Vaswani et al. 2017, section 3.3 (arXiv 1706.03762).
    """
    _check_floating(x)
    # What is not above 0 becomes 0. x.clamp(min=0) has these values too, but the gradient 1 at 0.
    return functional.threshold(x, 0, 0)


def relu_derivative(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$1$ where $x > 0$ and $0$ elsewhere, at 0 itself too: what `relu` multiplies a gradient with.

    A unit whose input is negative on every token gets the gradient 0 from all of them. NaN is not above 0 and
    gives 0. Errors: TypeError for integers, as in all functions here.
    Glorot, Bordes and Bengio 2011, section 3.1 (AISTATS).
    """
    _check_floating(x)
    return (x > 0).to(x.dtype)


def gelu(x: Float[Tensor, "*shape"], *, approximate: str = "none") -> Float[Tensor, "*shape"]:
    r"""$x\,\Phi(x)$ with the normal distribution function $\Phi(x) = \frac12(1 + \operatorname{erf}(x/\sqrt2))$.

    `approximate="tanh"` is the form of GPT-2 and Gemma,
    $\frac x2\bigl(1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3))\bigr)$: other numbers, so a model runs with the
    form it was trained with. Errors: ValueError for another `approximate`.
    Hendrycks and Gimpel 2016, section 2 (arXiv 1606.08415).
    """
    wide = _wide(x)
    return (wide * _share(wide, approximate)).to(x.dtype)


def gelu_derivative(x: Float[Tensor, "*shape"], *, approximate: str = "none") -> Float[Tensor, "*shape"]:
    r"""$\Phi(x) + x\,\varphi(x)$ with the normal density $\varphi(x) = e^{-x^2/2}/\sqrt{2\pi}$.

    For the tanh form, with $t = \tanh(u)$ and $u = \sqrt{2/\pi}\,(x + 0.044715\,x^3)$:
    $\frac12(1 + t) + \frac x2\,(1 - t^2)\,\sqrt{2/\pi}\,(1 + 3 \cdot 0.044715\,x^2)$.
    It is negative below $x \approx -0.75$ and above 1 for large $x$, by at most 0.13.
    From Hendrycks and Gimpel 2016, section 2 (arXiv 1606.08415), by the product rule.
    """
    wide = _wide(x)
    share = _share(wide, approximate)
    if approximate == "none":
        slope = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    else:
        # 1 - t^2 = 4 share (1 - share)
        slope = 2 * share * (1 - share) * _SLOPE * (1 + 3 * _CUBE * wide * wide)
    return (share + wide * slope).to(x.dtype)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$x\,\sigma(x)$ with the sigmoid $\sigma(x) = 1/(1 + e^{-x})$; also called Swish.

    Least at $x \approx -1.278$, where it is $-0.278$. Hendrycks and Gimpel 2016, section 2 (arXiv 1606.08415);
    Ramachandran et al. 2017, section 4 (arXiv 1710.05941).
    """
    wide = _wide(x)
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def silu_derivative(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$\sigma(x)\,\bigl(1 + x\,(1 - \sigma(x))\bigr)$: $\frac12$ at 0, between $-0.1$ and $1.1$ everywhere.

    Ramachandran et al. 2017, section 4 (arXiv 1710.05941), with their beta at 1.
    """
    wide = _wide(x)
    s = torch.sigmoid(wide)
    return (s * (1 + wide * (1 - s))).to(x.dtype)


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$\operatorname{silu}(g) \odot u$: one projection of the input, through SiLU, scales another.

    With $g = xW$ and $u = xV$ it is the hidden layer of Llama's feed-forward network (`GatedFeedForward`).
    Errors: ValueError for two shapes. Shazeer 2020, section 2 (arXiv 2002.05202).
    """
    _check_gate(gate, up)
    return silu(gate) * up


def swiglu_backward(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""The gradients in gate $g$ and up $u$, from the gradient $d$ in `swiglu`.

    They are $d \odot u \odot \operatorname{silu}'(g)$ and $d \odot \operatorname{silu}(g)$. Gate and up are all that
    has to be kept for it: SiLU is computed again, where autograd keeps $\operatorname{silu}(g)$ as a third tensor.
    Errors: ValueError for different shapes. By the product rule from Shazeer 2020, section 2 (arXiv 2002.05202).
    """
    _check_gate(gate, up, grad)
    return grad * up * silu_derivative(gate), grad * silu(gate)


def geglu(
    gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"], *, approximate: str = "none"
) -> Float[Tensor, "*shape"]:
    r"""$\operatorname{gelu}(g) \odot u$: as `swiglu`, with GELU for the gate. T5 v1.1 and Gemma take the tanh form.

    Errors: ValueError for two shapes, and for an `approximate` that `gelu` does not know.
    Shazeer 2020, section 2 (arXiv 2002.05202).
    """
    _check_gate(gate, up)
    return gelu(gate, approximate=approximate) * up


def geglu_backward(
    grad: Float[Tensor, "*shape"],
    gate: Float[Tensor, "*shape"],
    up: Float[Tensor, "*shape"],
    *,
    approximate: str = "none",
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""The gradients in gate $g$ and up $u$, from the gradient $d$ in `geglu`.

    They are $d \odot u \odot \operatorname{gelu}'(g)$ and $d \odot \operatorname{gelu}(g)$.
    Errors: ValueError for different shapes. By the product rule from Shazeer 2020, section 2 (arXiv 2002.05202).
    """
    _check_gate(gate, up, grad)
    return (
        grad * up * gelu_derivative(gate, approximate=approximate),
        grad * gelu(gate, approximate=approximate),
    )


# The fused twins of torch, tested equal to the functions above; modules use these.
ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def find_activation(name: str | Activation) -> Activation:
    """An activation by name (a key of `ACTIVATIONS`) or any function of one tensor."""
    if callable(name):
        return name
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _share(x: Tensor, approximate: str) -> Tensor:
    """The share of x that GELU lets through: the normal distribution function, or GPT-2's tanh in its place."""
    if approximate == "none":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if approximate == "tanh":
        # (1 + tanh u) / 2 is the sigmoid of 2 u
        return torch.sigmoid(2 * _SLOPE * x * (1 + _CUBE * x * x))
    raise ValueError(f"approximate {approximate!r} must be 'none' or 'tanh'")


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    _check_floating(x)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must hold floating-point numbers, got {x.dtype}")


def _check_gate(gate: Tensor, up: Tensor, grad: Tensor | None = None) -> None:
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}: they must be equal")
    if grad is not None and grad.shape != up.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)} and up {tuple(up.shape)}: they must be equal")
