"""The block: a mixer (attention) and a feed-forward network on one residual stream."""

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_atlas.nn.cache import LayerCache
from llm_atlas.nn.dropout import Dropout

Placement = Literal["pre", "post", "sandwich"]


class Residual(nn.Module):
    r"""A sublayer on the residual stream, with its norm before, after or on both sides of it.

    With $n$ for the norm, pre: $x + f(n(x))$; post: $n(x + f(x))$; sandwich: $x + n'(f(n(x)))$.
    He et al. 2015, equation 1 (arXiv 1512.03385); pre and post: Xiong et al. 2020, section 3
    (arXiv 2002.04745); sandwich: Ding et al. 2021, section 2.4 (arXiv 2105.13290).

    `dropout` is the rate at which features of what is added to $x$ are dropped in training, right before the sum (in a
    sandwich after its second norm): Vaswani et al. 2017, section 5.4 (arXiv 1706.03762).
    """

    def __init__(
        self,
        sublayer: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        placement: Placement = "pre",
        dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        if placement not in get_args(Placement):
            raise ValueError(f"placement {placement!r} is not one of {', '.join(get_args(Placement))}")
        self.placement = placement
        self.sublayer = sublayer
        self.norm = norm()
        self.norm_after = norm() if placement == "sandwich" else nn.Identity()
        # Without dropout there is no module for it: such a model is the same as before there was any.
        self.dropout = Dropout(dropout) if dropout else None

    def forward(self, x: Float[Tensor, "batch seq dim"], **how) -> Float[Tensor, "batch seq dim"]:
        """`how` goes to the sublayer as it is (positions, mask, context, cache)."""
        branch = self.sublayer(x if self.placement == "post" else self.norm(x), **how)
        branch = self.norm_after(branch)
        if self.dropout is not None:
            branch = self.dropout(branch)
        return self.norm(x + branch) if self.placement == "post" else x + branch


class Block(nn.Module):
    """Mixer, then (in an encoder-decoder) cross-attention, then feed-forward: each a `Residual` on the same stream.

    `norm` makes a fresh norm for each of them; `placement` and `dropout` are those of every `Residual`.
    Vaswani et al. 2017, section 3.1 (arXiv 1706.03762).
    """

    def __init__(
        self,
        mixer: nn.Module,
        feedforward: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        placement: Placement = "pre",
        dropout: int | float = 0.0,
        cross: nn.Module | None = None,
    ) -> None:
        super().__init__()
        how = {"placement": placement, "dropout": dropout}
        self.mixer = Residual(mixer, norm, **how)
        self.cross = None if cross is None else Residual(cross, norm, **how)
        self.feedforward = Residual(feedforward, norm, **how)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        positions: Int[Tensor, "batch2 seq"] | None = None,
        mask: Bool[Tensor, "batch3 heads2 queries2 keys2"] | None = None,
        context: Float[Tensor, "batch keys context_dim"] | None = None,
        context_mask: Bool[Tensor, "batch4 heads3 queries3 keys"] | None = None,
        cache: LayerCache | None = None,
        context_cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Shape (batch, seq, dim) to the same shape. `context` goes to the cross-attention alone."""
        if (context is None) != (self.cross is None):
            raise ValueError("context and a cross-attention layer go together: one of them is missing")
        x = self.mixer(x, positions=positions, mask=mask, cache=cache)
        if self.cross is not None:
            x = self.cross(x, positions=positions, mask=context_mask, context=context, cache=context_cache)
        return self.feedforward(x)
