"""From multi-head attention to grouped: several key/value heads of a trained model become one."""

import dataclasses
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from llm_atlas.models.decoder import Decoder

Pooling = Literal["mean", "first", "random"]


def pool_heads(
    weight: Float[Tensor, "_rows ..."],
    heads: int,
    groups: int,
    *,
    how: Pooling = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "_pooled ..."]:
    r"""Rows of a key or value matrix (or its bias) for `heads` heads, to rows for `groups` of them.

    Neighbours form a group: with "mean" its rows are $\frac gh \sum_{i \in \text{group}} W_i$. "first" keeps the first
    head of each, "random" draws new rows of the same spread with `generator`: what the mean is measured against.
    Raises ValueError where heads do not divide rows, or groups heads. Ainslie et al. 2023, section 2.1 and figure 4
    (arXiv 2305.13245).
    """
    if how not in get_args(Pooling):
        raise ValueError(f"how {how!r} is not one of {', '.join(get_args(Pooling))}")
    if heads < 1 or weight.shape[0] % heads:
        raise ValueError(f"{weight.shape[0]} rows do not divide into {heads} heads")
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups")
    members = weight.unflatten(0, (groups, heads // groups, -1))  # groups, members, head_dim, ...
    if how == "first":
        return members[:, 0].flatten(0, 1).clone()
    mean = members.mean(1).flatten(0, 1)
    if how == "mean":
        return mean
    if generator is None:
        raise ValueError("how 'random' needs a generator")
    return torch.randn(mean.shape, generator=generator).to(mean) * weight.std()


@torch.no_grad()
def group_kv_heads(
    model: Decoder, kv_heads: int, *, how: Pooling = "mean", generator: torch.Generator | None = None
) -> Decoder:
    """A copy of `model` with `kv_heads` key/value heads in every layer; all else is as it was.

    With as many groups as heads the copy computes the same. With fewer it needs some more training: the paper's 5% of
    the steps it had. `how` and errors as in `pool_heads`; ValueError too for a model whose mixers have no key and value
    heads. Ainslie et al. 2023, section 2.1 (arXiv 2305.13245).
    """
    config = model.config
    if config.latent is not None or config.linear is not None:
        raise ValueError("only softmax attention has key and value heads to group")
    heads = config.heads if config.kv_heads is None else config.kv_heads
    with torch.device(model.embed.weight.device):
        grouped = Decoder(dataclasses.replace(config, kv_heads=kv_heads)).to(model.embed.weight)
    state = model.state_dict()
    for name in state:
        if ".mixer.sublayer.k." in name or ".mixer.sublayer.v." in name:
            state[name] = pool_heads(state[name], heads, kv_heads, how=how, generator=generator)
    grouped.load_state_dict(state)
    return grouped.train(model.training)
