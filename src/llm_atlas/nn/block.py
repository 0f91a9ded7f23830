"""The block: a mixer (attention) and a feed-forward network on one residual stream."""

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_atlas.nn.cache import LayerCache
from llm_atlas.nn.dropout import Dropout

Placement = Literal["pre", "post", "sandwich"]
Parallel = Literal["one norm", "two norms"]


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
        if self.placement == "post":
            return self.norm(x + self.branch(x, **how))
        return x + self.branch(self.norm(x), **how)

    def branch(self, read: Float[Tensor, "batch seq dim"], **how) -> Float[Tensor, "batch seq dim"]:
        """What is added to the stream, of what the sublayer reads: the stream itself (post) or its norm."""
        branch = self.norm_after(self.sublayer(read, **how))
        return branch if self.dropout is None else self.dropout(branch)


class Block(nn.Module):
    r"""Mixer, then (in an encoder-decoder) cross-attention, then feed-forward: each a `Residual` on the same stream.

    `norm` makes a fresh norm for each of them; `placement` and `dropout` are those of every `Residual`.
    Vaswani et al. 2017, section 3.1 (arXiv 1706.03762).

    `parallel`: mixer $f$ and feed-forward $g$ read the same stream and are added together, so that their products
    need not wait for each other. "two norms": $x + f(n(x)) + g(n'(x))$ (Black et al. 2022, section 2.1.2, arXiv
    2204.06745); "one norm": $x + f(n(x)) + g(n(x))$, as in GPT-J, whose feed-forward has no norm of its own. Raises
    ValueError for a parallel block with cross-attention or norms after the sum.
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
        parallel: Parallel | None = None,
    ) -> None:
        super().__init__()
        if parallel is not None:
            if parallel not in get_args(Parallel):
                raise ValueError(f"parallel {parallel!r} is not one of {', '.join(get_args(Parallel))}")
            if placement == "post" or cross is not None:
                what = "cross-attention" if cross is not None else "placement 'post'"
                raise ValueError(f"a parallel block adds its branches in one sum: {what} has no place in it")
        self.parallel = parallel
        how = {"placement": placement, "dropout": dropout}
        self.mixer = Residual(mixer, norm, **how)
        self.cross = None if cross is None else Residual(cross, norm, **how)
        self.feedforward = Residual(feedforward, nn.Identity if parallel == "one norm" else norm, **how)
        if parallel == "one norm" and placement == "sandwich":
            self.feedforward.norm_after = norm()

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
        if self.parallel is not None:
            read = self.mixer.norm(x)
            mixed = self.mixer.branch(read, positions=positions, mask=mask, cache=cache)
            return (
                x
                + mixed
                + self.feedforward.branch(read if self.parallel == "one norm" else self.feedforward.norm(x))
            )
        x = self.mixer(x, positions=positions, mask=mask, cache=cache)
        if self.cross is not None:
            x = self.cross(x, positions=positions, mask=context_mask, context=context, cache=context_cache)
        return self.feedforward(x)
