"""Position-wise feed-forward networks: the same small network on every token."""

from jaxtyping import Float
from torch import Tensor, nn

from llm_atlas.nn.activations import Activation, find_activation


class FeedForward(nn.Module):
    r"""$\operatorname{FFN}(x) = f(x W_1 + b_1)\,W_2 + b_2$, applied to every position alone.

    `dim` features in and out, `hidden` between them (4 x dim unless given), `activation` a name or a function.
    Cost per token: $2 \cdot 2 \cdot \text{dim} \cdot \text{hidden}$ FLOPs.
    Vaswani et al. 2017, section 3.3 (arXiv 1706.03762).
    """

    def __init__(
        self, dim: int, hidden: int | None = None, *, activation: str | Activation = "relu", bias: bool = True
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        _check(dim, hidden)
        self.activation = find_activation(activation)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        _check_features(x, self.up.in_features)
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nn.Module):
    r"""$(f(x W_g) \odot x W_u)\,W_d$: one projection gates the other. With SiLU it is SwiGLU, as in Llama.

    Three matrices instead of two, so `hidden` is usually about 8/3 x dim for equal parameters (`gated_hidden`).
    Shazeer 2020, section 2 (arXiv 2002.05202).
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: str | Activation = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        hidden = gated_hidden(dim) if hidden is None else hidden
        _check(dim, hidden)
        self.activation = find_activation(activation)
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        _check_features(x, self.up.in_features)
        return self.down(self.activation(self.gate(x)) * self.up(x))


def gated_hidden(dim: int, *, multiple_of: int = 1) -> int:
    r"""Hidden width of a gated layer with the parameters of a plain one of 4 x dim: $\lfloor 8\,\text{dim}/3 \rfloor$.

    Two matrices of 4 x dim are three of 8/3 x dim. Then up to the next multiple of `multiple_of`, as Llama's code does
    for its hardware: dim 4096 and multiples of 256 give 11008. Errors: ValueError below 1 and for fractions.
    Shazeer 2020, section 2 (arXiv 2002.05202); Touvron et al. 2023, section 2.2 (arXiv 2302.13971).
    """
    if dim < 1 or multiple_of < 1 or dim % 1 or multiple_of % 1:
        raise ValueError(f"dim {dim} and multiple_of {multiple_of} must be whole numbers, at least 1")
    return -(-(8 * dim // 3) // multiple_of) * multiple_of


def feed_forward_parameters(dim: int, hidden: int, *, gated: bool = False, bias: bool = False) -> int:
    """Weights of a feed-forward layer: 2 (gated: 3) matrices of dim x hidden, and their biases."""
    _check(dim, hidden)
    biases = (2 * hidden if gated else hidden) + dim
    return (3 if gated else 2) * dim * hidden + (biases if bias else 0)


def feed_forward_flops(dim: int, hidden: int, *, gated: bool = False) -> int:
    """FLOPs per token of its matrix products, a multiply and an add counted as two; element-wise work left out."""
    return 2 * feed_forward_parameters(dim, hidden, gated=gated)


def _check(dim: int, hidden: int) -> None:
    if dim < 1 or hidden < 1:
        raise ValueError(f"dim {dim} and hidden {hidden} must be at least 1")


def _check_features(x: Tensor, dim: int) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"x has {x.shape[-1]} features, this layer takes {dim}")
