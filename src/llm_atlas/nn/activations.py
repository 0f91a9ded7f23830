"""Activation functions: the one place where a feed-forward network is not linear."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$\max(0, x)$. Nair and Hinton 2010."""
    return x.clamp(min=0)


def gelu(x: Float[Tensor, "*shape"], *, approximate: str = "none") -> Float[Tensor, "*shape"]:
    r"""$x\,\Phi(x)$ with the normal distribution function $\Phi$; `approximate="tanh"` is GPT-2's form.

    Hendrycks and Gimpel 2016, section 2 (arXiv 1606.08415).
    """
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if approximate == "tanh":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"approximate {approximate!r} must be 'none' or 'tanh'")


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$x\,\sigma(x)$, also called Swish. Ramachandran et al. 2017 (arXiv 1710.05941)."""
    return x * torch.sigmoid(x)


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
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
