"""Look inside a running model: attention maps, the residual stream, and what happens when a part is taken out.

Everything here is done with hooks from outside; no forward pass knows that it is watched.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_atlas.models.decoder import Decoder
from llm_atlas.nn.attention import MultiHeadAttention, attention_weights

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
    if not 0 <= layer < len(model.blocks):
        raise ValueError(f"layer {layer} is not one of the model's {len(model.blocks)}")
    return model.blocks[layer].mixer.sublayer


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
    Raises ValueError where one of the two parts would be empty. float64 inside, cost rows x seq x dim^2.
    Alain & Bengio 2016, section 3 (arXiv 1610.01644); for positions Haviv et al. 2022, section 4 (arXiv 2203.16634).
    """
    rows, seq, dim = states.shape
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
    r2 = 1 - missed.square().mean() / target[cut:].var(correction=0)
    return PositionProbe(float(r2), float(missed.abs().mean()), predicted.float().view(last, seq))


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


def _check_length(maps: Tensor) -> None:
    if maps.shape[-1] < 3:
        raise ValueError(f"a score needs at least 3 tokens, got {maps.shape[-1]}")
