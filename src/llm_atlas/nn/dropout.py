"""Dropout: noise on activations while training, nothing at all afterwards."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def dropout(
    x: Float[Tensor, "*shape"],
    p: int | float,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    r"""$y_i = m_i\,x_i/(1-p)$ with $m_i \sim \operatorname{Bernoulli}(1-p)$, drawn for every element alone.

    `p` is the share that is set to zero. Dividing what is kept by $1-p$ while training ("inverted" dropout) makes the
    expectation $x$, so that nothing has to be rescaled afterwards; the variance is $x^2\,p/(1-p)$. The gradient passes
    through the same mask: $\nabla_x = m\,\nabla_y/(1-p)$.

    Returns `x` itself with `training` False or `p` 0, and then draws nothing. `generator` must be on the device of `x`;
    None draws from PyTorch's own. Uniform numbers are drawn in float32 whatever the dtype of `x`: bfloat16 has too few
    values between 0 and 1 for a rate of 0.1. Cost: one random number an element.
    Errors: ValueError for `p` outside [0, 1) (or NaN), TypeError for a tensor that is not floating-point.
    Srivastava et al. 2014, sections 4 and 10 (JMLR 15); there weights are scaled after training instead.
    """
    _check_rate(p)
    if not x.is_floating_point():
        raise TypeError(f"x must hold floating-point numbers, got {x.dtype}")
    if not training or p == 0:
        return x
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(
            f"generator is on {generator.device.type}, x is on {x.device.type}: they must be equal"
        )
    dropped = torch.rand(x.shape, generator=generator, device=x.device) < p
    # Filled, not multiplied: an infinite feature that is dropped becomes 0, where 0 times it would be NaN.
    return x.masked_fill(dropped, 0) / (1 - p)


class Dropout(nn.Module):
    """`dropout` at rate `p` in training mode, the identity in eval mode. No parameters.

    `generator` draws the masks; None draws from PyTorch's own, and `seed_dropout` sets it for a whole model.
    Srivastava et al. 2014, section 4 (JMLR 15).
    """

    def __init__(self, p: int | float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_rate(p)
        self.p = p
        self.generator = generator

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Any shape to the same shape."""
        return dropout(x, self.p, training=self.training, generator=self.generator)

    def extra_repr(self) -> str:
        """The rate, for printing."""
        return f"p={self.p}"


def seed_dropout(model: nn.Module, generator: torch.Generator | None) -> int:
    """Let every `Dropout` in `model` draw from this one generator, so that a run can be repeated; how many there are.

    The layers draw in the order in which they run. None gives them back PyTorch's own generator.
    """
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    for layer in layers:
        layer.generator = generator
    return len(layers)


def _check_rate(p: int | float) -> None:
    if not 0 <= p < 1:  # not NaN either
        raise ValueError(f"p {p} must be at least 0 and below 1")
