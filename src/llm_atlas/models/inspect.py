"""Look inside a running model: attention maps, the residual stream, feed-forward units, and parts taken out.

Everything here is done with hooks from outside; no forward pass knows that it is watched.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_atlas.models.decoder import Decoder
from llm_atlas.nn.attention import MultiHeadAttention, attention_weights
from llm_atlas.nn.feedforward import FeedForward, GatedFeedForward

Hook = Callable[..., object]


@contextmanager
def hooked(hooks: Collection[tuple[nn.Module, Hook]], *, before: bool = False) -> Iterator[None]:
    """Run with these forward hooks (with keyword arguments) on these modules, and take them off again."""
    with ExitStack() as stack:
        for module, hook in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook, with_kwargs=True).remove)
        yield


def mixer(model: Decoder, layer: int) -> MultiHeadAttention:
    """The attention module of a layer."""
    _check_layer(model, layer)
    return model.blocks[layer].mixer.sublayer


def feed_forward(model: Decoder, layer: int) -> FeedForward | GatedFeedForward:
    """The feed-forward module of a layer."""
    _check_layer(model, layer)
    return model.blocks[layer].feedforward.sublayer


@torch.inference_mode()
def attention_maps(
    model: Decoder, ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "layers batch heads seq seq"]:
    """How much every token looks at every other, in every head: rows are queries and add up to 1.

    float32 on the CPU; memory layers x heads x seq^2, so keep `ids` short.
    """
    maps: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        q, k, _ = args
        how = {name: kwargs[name] for name in ("mask", "bias", "is_causal", "scale") if name in kwargs}
        maps.append(attention_weights(q, k, **how).float().cpu())

    layers = range(len(model.blocks))
    with hooked([(mixer(model, layer).attend, record) for layer in layers], before=True):
        model.hidden(ids)
    return torch.stack(maps)


@torch.inference_mode()
def residual_stream(
    model: Decoder,
    ids: Int[Tensor, "batch seq"],
    *,
    mask: Bool[Tensor, "#batch #heads seq seq"] | None = None,
) -> Float[Tensor, "points batch seq dim"]:
    """The stream before the first block and after every block: layers + 1 points. `mask` replaces the causal one."""
    points: list[Tensor] = []

    def entering(module: nn.Module, args: tuple, kwargs: dict) -> None:
        points.append(args[0])

    def leaving(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        points.append(out)

    with (
        hooked([(model.blocks[0], entering)], before=True),
        hooked([(block, leaving) for block in model.blocks]),
    ):
        model.hidden(ids, mask=mask)
    return torch.stack(points)


class PositionProbe(NamedTuple):
    """How well a linear probe reads the position, on rows it was not fitted to.

    r2: the share of the positions' variance it explains (0: no better than their mean; it may be negative);
    error: mean distance from the true position; predicted: what it says, (held-out rows, seq).
    """

    r2: float
    error: float
    predicted: Float[Tensor, "rows seq"]


def position_probe(
    states: Float[Tensor, "rows seq dim"],
    positions: Int[Tensor, " seq"],
    *,
    held_out: float = 0.25,
    ridge: float = 1e-3,
) -> PositionProbe:
    r"""Predict where a token stands from its vector alone: ridge regression, $\min_w \|Xw - p\|^2 + n\lambda\|w\|^2$.

    Fitted to the first rows and measured on the last `held_out` of them, so that no text is in both. Features are
    standardised first, so `ridge` ($\lambda$) has no unit. What a *linear* map cannot read may still be there.
    Raises ValueError where one of the two parts would be empty, for positions that are all alike or not as many as
    the vectors, for vectors that are not finite and for a `ridge` that is not positive. float64 inside, cost
    rows x seq x dim^2.
    Alain & Bengio 2016, section 3 (arXiv 1610.01644); for positions Haviv et al. 2022, section 4 (arXiv 2203.16634).
    """
    rows, seq, dim = states.shape
    if len(positions) != seq:
        raise ValueError(f"there are {len(positions)} positions for {seq} vectors a row")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge {ridge} must be positive and finite")
    if seq == 0:
        raise ValueError("states have no vectors: there is nothing to predict")
    last = round(rows * held_out)
    if not 0 < last < rows:
        raise ValueError(f"{rows} rows cannot be split with {held_out} of them held out: both parts need one")
    x, target = states.double().flatten(0, 1), positions.double().repeat(rows)
    cut = (rows - last) * seq
    mean, spread = x[:cut].mean(0), x[:cut].std(0, correction=0)
    # A feature that never changes tells nothing: 0 in place of 0/0.
    x = (x - mean) / spread.clamp(min=1e-12)
    centre = target[:cut].mean()
    gram = x[:cut].T @ x[:cut] / cut + ridge * torch.eye(dim, dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x[:cut].T @ (target[:cut] - centre) / cut)
    predicted = x[cut:] @ weights + centre
    missed = predicted - target[cut:]
    error, variance = float(missed.abs().mean()), float(target[cut:].var(correction=0))
    if not math.isfinite(error):
        raise ValueError("states hold numbers that are not finite")
    if variance == 0:
        raise ValueError("the positions are all alike: there is nothing to predict")
    r2 = 1 - float(missed.square().mean()) / variance
    return PositionProbe(r2, error, predicted.float().view(last, seq))


@torch.inference_mode()
def logit_lens(
    model: Decoder, stream: Float[Tensor, "points batch seq dim"]
) -> Float[Tensor, "points batch seq vocab"]:
    """Read every point of the stream as if it were the last: the model's own final norm and unembedding.

    nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return model.unembed(model.norm(stream))


@contextmanager
def ablate_heads(model: Decoder, heads: Collection[tuple[int, int]]) -> Iterator[None]:
    """Within the context, the output of each (layer, head) is zero. The weights are not touched."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if not 0 <= head < mixer(model, layer).heads:
            raise ValueError(f"layer {layer} has {mixer(model, layer).heads} heads, there is no head {head}")
        by_layer.setdefault(layer, []).append(head)

    def silence(which: list[int]) -> Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, which] = 0
            return out

        return hook

    with hooked([(mixer(model, layer).attend, silence(which)) for layer, which in by_layer.items()]):
        yield


@contextmanager
def ablate(*modules: nn.Module) -> Iterator[None]:
    """Within the context, these modules give zeros: a sublayer that is out adds nothing to the stream."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    with hooked([(module, hook) for module in modules]):
        yield


@torch.inference_mode()
def pre_activations(
    model: Decoder, ids: Int[Tensor, "batch seq"], *, rows: int | None = None
) -> Float[Tensor, "layers batch seq hidden"]:
    """What goes into the activation function of every feed-forward layer: `up` of x, in a gated layer `gate` of x.

    On the model's device and in its dtype. `rows` texts at a time go through the model, all at once unless given.
    Memory layers x tokens x hidden. Errors: ValueError for `rows` below 1.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows {rows} must be at least 1")
    layers = [feed_forward(model, layer) for layer in range(len(model.blocks))]
    parts: list[Tensor] = []
    for some in ids.split(len(ids) if rows is None else rows):
        seen: list[Tensor] = []

        def record(
            module: nn.Module, args: tuple, kwargs: dict, out: Tensor, seen: list[Tensor] = seen
        ) -> None:
            seen.append(out)

        with hooked(
            [(layer.gate if isinstance(layer, GatedFeedForward) else layer.up, record) for layer in layers]
        ):
            model.hidden(some)
        parts.append(torch.stack(seen))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitStatistics:
    """What the feed-forward units of a model do over some text: one row a layer.

    A unit is a hidden feature; z is what enters its activation function f (in a gated layer: the gate's), and
    it is active on a token where |f(z)| is above the threshold that `unit_statistics` was given.

    tokens:    how many were read.
    active:    for each unit, the share of tokens on which it is active.
    mean:      of z, over tokens and units.
    negative:  share of all z below 0.
    levels, quantiles: f(z) of all tokens and units at these shares from below.
    """

    tokens: int
    active: Float[Tensor, "layers hidden"]
    mean: Float[Tensor, " layers"]
    negative: Float[Tensor, " layers"]
    levels: tuple[float, ...]
    quantiles: Float[Tensor, "layers levels"]

    @property
    def dead(self) -> Float[Tensor, " layers"]:
        """Share of units that were active on no token at all. More text can only find fewer."""
        return (self.active == 0).float().mean(-1)

    @property
    def active_share(self) -> Float[Tensor, " layers"]:
        """Share of units active on a token, on average over tokens. 1 less it is the sparsity."""
        return self.active.mean(-1)


@torch.inference_mode()
def unit_statistics(
    model: Decoder,
    ids: Int[Tensor, "batch seq"],
    *,
    threshold: int | float = 0.0,
    levels: tuple[float, ...] = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99),
    rows: int | None = None,
) -> UnitStatistics:
    r"""How often each feed-forward unit is active, which are dead, and how the activations are spread.

    A unit $i$ is active on a token where $|f(z_i)|$ is above `threshold`. With ReLU and 0 that is $z_i > 0$; a unit
    active on no token gets no gradient from this text and is called dead. SiLU and GELU are hardly ever exactly
    zero: there `threshold` says what counts as off. Quantiles are of all tokens and units of a layer, the
    value at the nearest rank. In float32. `rows` and memory as in `pre_activations`.
    Errors: ValueError for a threshold below 0, for levels outside [0, 1], and where an activation is NaN or infinite.
    Dead units: Glorot, Bordes and Bengio 2011, section 3 (AISTATS); sparsity in transformers: Li et al. 2022,
    section 2 (arXiv 2210.06313).
    """
    if not threshold >= 0:
        raise ValueError(f"threshold {threshold} must be at least 0")
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels {levels} must be numbers between 0 and 1, at least one")
    pre = pre_activations(model, ids, rows=rows).flatten(1, 2)
    active, mean, negative, quantiles = [], [], [], []
    for layer, z in enumerate(pre):
        out = feed_forward(model, layer).activation(z).float()
        # NaN is above no threshold: its units would count as dead. (On the meta device there are no values.)
        if not out.is_meta and not out.isfinite().all():
            raise ValueError(f"activations of layer {layer} must be finite, some are NaN or infinite")
        active.append((out.abs() > threshold).float().mean(0))
        mean.append(z.float().mean())
        negative.append((z < 0).float().mean())
        ordered = out.flatten().sort().values
        quantiles.append(torch.stack([ordered[round(level * (len(ordered) - 1))] for level in levels]))
    return UnitStatistics(
        tokens=ids.numel(),
        active=torch.stack(active),
        mean=torch.stack(mean),
        negative=torch.stack(negative),
        levels=levels,
        quantiles=torch.stack(quantiles),
    )


def first_token_score(maps: Float[Tensor, "*heads seq seq"]) -> Float[Tensor, "*heads"]:
    """Mean attention that queries give to the first token (the query at 0, which has no choice, left out)."""
    _check_length(maps)
    return maps[..., 1:, 0].mean(-1)


def previous_token_score(maps: Float[Tensor, "*heads seq seq"]) -> Float[Tensor, "*heads"]:
    """Mean attention that queries give to the token just before them.

    The queries at 0 and 1 are left out: for them the token before is none, or the first one.
    """
    _check_length(maps)
    return maps.diagonal(-1, -2, -1)[..., 1:].mean(-1)


def self_score(maps: Float[Tensor, "*heads seq seq"]) -> Float[Tensor, "*heads"]:
    """Mean attention that queries give to their own token (the query at 0 left out)."""
    _check_length(maps)
    return maps.diagonal(0, -2, -1)[..., 1:].mean(-1)


def parameter_ledger(model: Decoder) -> dict[str, int]:
    """Where the parameters are: embedding, attention, feed-forward, norms, head. Adds up to the whole model."""
    ledger = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        if ".norm" in name or name.startswith("norm") or "_norm." in name:
            part = "norms"
        elif name.startswith(("embed.", "positions.")):
            part = "embedding"
        elif name.startswith("head."):
            part = "head"
        else:
            part = (
                "attention"
                if ".mixer." in name or name.startswith("attention_positions.")
                else "feed-forward"
            )
        ledger[part] += parameter.numel()
    return ledger


def _check_layer(model: Decoder, layer: int) -> None:
    if not 0 <= layer < len(model.blocks):
        raise ValueError(f"layer {layer} is not one of the model's {len(model.blocks)}")


def _check_length(maps: Tensor) -> None:
    if maps.shape[-1] < 3:
        raise ValueError(f"a score needs at least 3 tokens, got {maps.shape[-1]}")
