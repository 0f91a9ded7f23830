"""Mixture of experts: a feed-forward layer of many networks, of which every token goes through a few.

A router scores the experts for each token, a few are chosen, and their outputs are added up with weights from the
scores. Parameters grow with the number of experts, work per token with the number chosen.

The steps of routing are functions, in this order: `router_scores`, `choose_experts`, `mixing_weights`,
`within_capacity`. Their result is a `Routing`, from which loads and losses are computed. A layer keeps none:
`recorded_routing` hands them out.

Anything with the signature of `dense_experts` can compute the experts:
`compute(x, routing, gate, up, down, *, activation) -> out`.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.nn.activations import Activation, find_activation, silu
from llm_atlas.nn.feedforward import GatedFeedForward, feed_forward_parameters

Score = Literal["softmax", "sigmoid"]
Priority = Literal["order", "score"]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    r"""The shape of a mixture of experts and how it routes.

    - `experts` networks of `hidden` features, of which a token goes through `active`; `shared` more that every token
      goes through (Dai et al. 2024, section 3.2, arXiv 2401.06066), computed as one network `shared` times as wide;
    - `score`: softmax over the experts, or a sigmoid for each of them (DeepSeek-V3, section 2.1.2, arXiv 2412.19437);
    - `renormalize`: the weights of the chosen experts are divided by their sum. With one active expert the weight is
      then 1 whatever its score, and the router learns nothing from the output: Switch (`active` 1) goes without;
    - `scale` multiplies the weights;
    - `selection_bias`: a number per expert is added to its score where experts are chosen, and nowhere else
      (Wang et al. 2024, section 3, arXiv 2408.15664);
    - `groups` of consecutive experts, as many in each, of which the best `active_groups` may be chosen from
      (DeepSeek-V3, section 2.1.2: nodes);
    - `capacity_factor`: an expert takes at most this many times its even share of the tokens, None as many as come.
      `priority` says who goes without: "order" those that come last, "score" those with the lowest score.
      With a capacity what a token gets depends on the others of its batch, so left padding and caches change outputs.

    Mixtral: 8 experts, 2 active. Qwen3-MoE: 128, 8, and `renormalize` as its norm_topk_prob. DeepSeek-V3: 256, 8,
    1 shared, sigmoid, `scale` 2.5, `selection_bias`, 8 groups of which 4 are active.
    Errors: ValueError for a number out of its range.
    """

    experts: int
    active: int
    hidden: int
    shared: int = 0
    activation: str = "silu"
    score: Score = "softmax"
    renormalize: bool = True
    scale: int | float = 1.0
    selection_bias: bool = False
    groups: int = 1
    active_groups: int = 1
    capacity_factor: int | float | None = None
    priority: Priority = "order"

    def __post_init__(self) -> None:
        for name, least in {"experts": 1, "active": 1, "hidden": 1, "shared": 0, "groups": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        _check_score(self.score)
        if self.priority not in get_args(Priority):
            raise ValueError(f"priority {self.priority!r} is not one of {', '.join(get_args(Priority))}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale {self.scale} must be a number above 0")
        _check_choice(self.experts, self.active, self.groups, self.active_groups)
        if self.capacity_factor is not None:
            _check_factor(self.capacity_factor)


@dataclass(frozen=True)
class Routing:
    """What a router decided for every token. `experts` is the number of experts, `active` that of each token."""

    logits: Float[Tensor, "*batch experts"]
    """What the router computed, float32."""
    scores: Float[Tensor, "*batch experts"]
    """Softmax or sigmoid of the logits, float32."""
    chosen: Int[Tensor, "*batch active"]
    """Indices of the experts, the first choice first."""
    weights: Float[Tensor, "*batch active"]
    """What the outputs of the chosen experts are multiplied with, float32; 0 where the expert was full."""
    kept: Bool[Tensor, "*batch active"]
    """False where the expert was full: the token goes through without it."""


def router_scores(
    logits: Float[Tensor, "*batch experts"], score: Score = "softmax"
) -> Float[Tensor, "*batch experts"]:
    """How well each expert fits each token: softmax over experts, or a sigmoid for each alone. float32.

    Softmax: Shazeer et al. 2017, section 2.1 (arXiv 1701.06538); sigmoid: DeepSeek-V3, equation 15 (arXiv 2412.19437).
    """
    _check_score(score)
    logits = logits.to(_wide(logits))
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def keep_top_k(logits: Float[Tensor, "*batch experts"], active: int) -> Float[Tensor, "*batch experts"]:
    r"""Logits of the `active` largest, $-\infty$ for the others: a softmax of it has weights on those alone.

    Choosing first and then the softmax gives what the softmax and then renormalised weights give.
    Shazeer et al. 2017, equation 5 (arXiv 1701.06538), without its noise.
    """
    _check_choice(logits.shape[-1], active, 1, 1)
    top = logits.topk(active, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, top.indices, top.values)


def choose_experts(
    scores: Float[Tensor, "*batch experts"],
    active: int,
    *,
    bias: Float[Tensor, " experts"] | None = None,
    groups: int = 1,
    active_groups: int = 1,
) -> Int[Tensor, "*batch active"]:
    """The `active` experts with the highest score plus `bias`, best first.

    With `groups`, only from the best `active_groups` of them: a group counts what its best two experts count together.
    Errors: ValueError where there are too few experts to choose from, or groups that are not alike.
    DeepSeek-V3, section 2.1.2, equations 14 and 16 and "node-limited routing" (arXiv 2412.19437).
    """
    experts = scores.shape[-1]
    _check_choice(experts, active, groups, active_groups)
    ranked = scores.detach() if bias is None else scores.detach() + bias.detach()
    if active_groups < groups:
        in_groups = ranked.unflatten(-1, (groups, -1))
        best_two = in_groups.topk(min(2, experts // groups), dim=-1).values.sum(-1)
        best = best_two.topk(active_groups, dim=-1).indices
        outside = torch.ones_like(best_two, dtype=torch.bool).scatter(-1, best, False)
        ranked = in_groups.masked_fill(outside[..., None], -math.inf).flatten(-2)
    return ranked.topk(active, dim=-1).indices


def mixing_weights(
    scores: Float[Tensor, "*batch experts"],
    chosen: Int[Tensor, "*batch active"],
    *,
    renormalize: bool = True,
    scale: int | float = 1.0,
) -> Float[Tensor, "*batch active"]:
    r"""$\text{scale} \cdot s_i / \sum_{j \in \text{chosen}} s_j$, or $\text{scale} \cdot s_i$ without `renormalize`.

    Of the scores alone: a selection bias decides who is chosen, not what the chosen weigh.
    Mixtral, section 2.1 (arXiv 2401.04088); DeepSeek-V3, equation 13 (arXiv 2412.19437).
    """
    weights = scores.gather(-1, chosen)
    if renormalize:
        # Sigmoids may all be 0.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def expert_capacity(tokens: int, experts: int, active: int, factor: int | float) -> int:
    r"""Tokens an expert takes at most: its even share tokens x active / experts, times `factor`, rounded up.

    At factor 1 there is room for all tokens if the load is even. Errors: ValueError for a factor that is not above 0.
    Switch, equation 3 (arXiv 2101.03961); GShard, section 2.2 (arXiv 2006.16668).
    """
    _check_choice(experts, active, 1, 1)
    _check_factor(factor)
    # 1.1 * 110 is a little over 121 in floating point, and must not become 122.
    return math.ceil(factor * tokens * active / experts - 1e-9)


def within_capacity(
    chosen: Int[Tensor, "*batch active"],
    experts: int,
    capacity: int,
    *,
    priority: Float[Tensor, "*batch active"] | None = None,
) -> Bool[Tensor, "*batch active"]:
    """Which choices find a place where every expert has `capacity` of them, True = it does.

    Without `priority` those that come first: first choices of all tokens, then second ones and so on, as GShard does
    (Lepikhin et al. 2020, algorithm 1, arXiv 2006.16668). With it, those with the highest numbers, as DeepSeek-V2
    drops the lowest scores (section 2.2.4, arXiv 2405.04434).
    Two sorts of tokens x active numbers. Errors: ValueError for a capacity under 0.
    """
    if capacity < 0:
        raise ValueError(f"capacity {capacity} must be at least 0")
    wanted = _flat_by_choice(chosen)
    # `first` lists the choices, the most important one first.
    if priority is None:
        first = torch.arange(len(wanted), device=chosen.device)
    else:
        first = _flat_by_choice(priority).argsort(descending=True, stable=True)
    # A stable sort by expert keeps that order within each expert.
    first = first[wanted[first].argsort(stable=True)]
    load = _count(chosen, experts)
    start = load.cumsum(0) - load
    place = torch.arange(len(wanted), device=chosen.device) - start[wanted[first]]
    kept = torch.zeros_like(wanted, dtype=torch.bool).scatter(0, first, place < capacity)
    return kept.view(chosen.shape[-1], -1).T.reshape(chosen.shape)


class Router(nn.Module):
    r"""A linear layer that scores `experts` for every token and chooses `active` of them.

    Parameters: `weight` (experts, dim) and, with `selection_bias`, `bias` (experts), which no gradient reaches:
    `rebalance` moves it between steps. Keep `bias` in float32 when the model is trained in bfloat16: a step of 0.001
    is lost beside a bias over 0.25 there.
    The product is computed in float32 (Switch, section 2.4, arXiv 2101.03961).
    """

    def __init__(self, dim: int, config: ExpertsConfig) -> None:
        super().__init__()
        _check_dim(dim)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, dim))
        # Not a buffer: it comes and goes with the weights of a model, which are its parameters.
        self.bias = (
            nn.Parameter(torch.empty(config.experts), requires_grad=False) if config.selection_bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        r"""Weights from $\mathcal N(0, 1/\text{dim})$, the selection bias 0."""
        self.weight.normal_(std=self.weight.shape[-1] ** -0.5, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Routing:
        """Score, choose, weigh, and with a capacity turn away. All axes but the last are tokens."""
        how = self.config
        _check_features(x, self.weight.shape[-1])
        wide = _wide(x)
        logits = functional.linear(x.to(wide), self.weight.to(wide))
        scores = router_scores(logits, how.score)
        chosen = choose_experts(
            scores, how.active, bias=self.bias, groups=how.groups, active_groups=how.active_groups
        )
        weights = mixing_weights(scores, chosen, renormalize=how.renormalize, scale=how.scale)
        kept = torch.ones_like(chosen, dtype=torch.bool)
        if how.capacity_factor is not None:
            capacity = expert_capacity(math.prod(x.shape[:-1]), how.experts, how.active, how.capacity_factor)
            priority = scores.detach().gather(-1, chosen) if how.priority == "score" else None
            kept = within_capacity(chosen, how.experts, capacity, priority=priority)
            weights = weights * kept
        return Routing(logits, scores, chosen, weights, kept)

    @torch.no_grad()
    def rebalance(self, load: Tensor, *, rate: int | float = 0.001) -> None:
        """Move the selection bias one step of `balanced_bias`, by the `load` (experts) of the batch just trained on.

        Errors: ValueError for a router without one.
        """
        if self.bias is None:
            raise ValueError("this router has no bias to move: its config has selection_bias=False")
        self.bias.copy_(balanced_bias(self.bias, load, rate=rate))


@runtime_checkable
class ExpertsFunction(Protocol):
    """The signature of what computes experts."""

    def __call__(
        self, x: Tensor, routing: Routing, gate: Tensor, up: Tensor, down: Tensor, *, activation: Activation
    ) -> Tensor:
        """Outputs of the chosen experts, weighted and added up."""


def dense_experts(
    x: Float[Tensor, "*batch dim"],
    routing: Routing,
    gate: Float[Tensor, "experts hidden dim"],
    up: Float[Tensor, "experts hidden dim"],
    down: Float[Tensor, "experts dim hidden"],
    *,
    activation: Activation = silu,
) -> Float[Tensor, "*batch dim"]:
    r"""$\sum_i w_i\,E_i(x)$ with $E_i(x) = (f(x G_i^\top) \odot x U_i^\top)\,D_i^\top$: all experts on all tokens.

    The readable form: the weight of an expert that is not chosen is 0. Work and memory of all `experts` per token.
    Added up in float32, returned in the dtype of `x`. Shazeer et al. 2017, equation 1 (arXiv 1701.06538).
    """
    weights = routing.weights.new_zeros(routing.scores.shape).scatter(-1, routing.chosen, routing.weights)
    hidden = activation(torch.einsum("...d,ehd->...eh", x, gate)) * torch.einsum("...d,ehd->...eh", x, up)
    out = torch.einsum("...eh,edh->...ed", hidden, down)
    return torch.einsum("...ed,...e->...d", out.to(weights.dtype), weights).to(x.dtype)


def grouped_experts(
    x: Float[Tensor, "*batch dim"],
    routing: Routing,
    gate: Float[Tensor, "experts hidden dim"],
    up: Float[Tensor, "experts hidden dim"],
    down: Float[Tensor, "experts dim hidden"],
    *,
    activation: Activation = silu,
) -> Float[Tensor, "*batch dim"]:
    """What `dense_experts` computes, with the work of the chosen experts alone.

    Choices are sorted by expert, so that the tokens of an expert lie side by side and go through it as one matrix;
    then each token's outputs are put back and added up. Three products for each expert that was chosen at all.
    The lengths of the segments are read as numbers, which on a GPU waits for the router.
    Megablocks, section 3 (Gale et al. 2022, arXiv 2211.15841), has kernels for the same idea.
    """
    tokens, active = x.reshape(-1, x.shape[-1]), routing.chosen.shape[-1]
    experts = len(gate)
    # Choices without a place are sorted behind the last expert.
    wanted = routing.chosen.masked_fill(~routing.kept, experts).flatten()
    lengths = _count(wanted, experts + 1).tolist()[:experts]
    order = wanted.argsort(stable=True)[: sum(lengths)]
    segments = tokens[order // active].split(lengths)
    # unbind, not [i]: its backward writes all experts' gradients once, [i] a tensor of zeros for each expert.
    weights = zip(gate.unbind(), up.unbind(), down.unbind(), strict=True)
    parts = [
        functional.linear(activation(functional.linear(part, g)) * functional.linear(part, u), d)
        for part, (g, u, d) in zip(segments, weights, strict=True)
        if len(part)
    ]
    out = tokens.new_zeros(len(wanted), tokens.shape[-1])
    if parts:
        out = out.index_copy(0, order, torch.cat(parts))
    out = out.view(*routing.chosen.shape, x.shape[-1]) * routing.weights[..., None]
    return out.sum(-2).to(x.dtype)


class Experts(nn.Module):
    r"""`experts` gated feed-forward networks in three tensors.

    `gate` and `up` (experts, hidden, dim), `down` (experts, dim, hidden): slice i is the weights of the three linear
    layers of a `GatedFeedForward`. `compute` is a function with the signature of `dense_experts`.
    """

    def __init__(
        self,
        experts: int,
        dim: int,
        hidden: int,
        *,
        activation: str | Activation = "silu",
        compute: ExpertsFunction = grouped_experts,
    ) -> None:
        super().__init__()
        _check_dim(dim)
        if experts < 1 or hidden < 1:
            raise ValueError(f"experts {experts} and hidden {hidden} must be at least 1")
        self.activation = find_activation(activation)
        self.compute = compute
        self.gate = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        r"""Every matrix from $\mathcal N(0, 1/\text{in features})$."""
        for weight in (self.gate, self.up, self.down):
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)

    def forward(self, x: Float[Tensor, "*batch dim"], routing: Routing) -> Float[Tensor, "*batch dim"]:
        """The chosen experts' outputs, weighted and added up. A token that found every expert full gets zeros."""
        return self.compute(x, routing, self.gate, self.up, self.down, activation=self.activation)


class MixtureOfExperts(nn.Module):
    r"""$\sum_{i \in \text{chosen}(x)} w_i(x)\,E_i(x) + E_{\text{shared}}(x)$, in the place of a feed-forward network.

    `router`, `experts` and, with shared experts, `shared` (a `GatedFeedForward`). `compute` as in `Experts`.
    On the residual stream a token that no expert has room for goes on unchanged.
    Cost per token: `expert_flops`. Shazeer et al. 2017, section 2 (arXiv 1701.06538); shared experts: Dai et al. 2024,
    equation 9 (arXiv 2401.06066).
    """

    def __init__(
        self, dim: int, config: ExpertsConfig, *, compute: ExpertsFunction = grouped_experts
    ) -> None:
        super().__init__()
        self.config = config
        self.router = Router(dim, config)
        self.experts = Experts(
            config.experts, dim, config.hidden, activation=config.activation, compute=compute
        )
        self.shared = (
            GatedFeedForward(dim, config.shared * config.hidden, activation=config.activation)
            if config.shared
            else None
        )

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Shape (..., dim) to the same shape."""
        out = self.experts(x, self.router(x))
        return out if self.shared is None else out + self.shared(x)


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """The `Routing` of every router in `model` by the router's name, as of its latest call inside the `with`.

    Gradients flow through them, so a balancing loss can be added to what is trained:

        with recorded_routing(model) as routings:
            loss = cross_entropy(model(ids), targets)
        loss = loss + 0.01 * sum(balancing_loss(routing) for routing in routings.values())

    The dict stays when the `with` ends; the hooks do not. Errors: ValueError for a model without a router.
    """
    routings: dict[str, Routing] = {}
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if not routers:
        raise ValueError("the model has no Router, so no mixture of experts")

    with ExitStack() as stack:
        for name, router in routers.items():

            def record(module: nn.Module, inputs: object, routing: Routing, *, name: str = name) -> None:
                routings[name] = routing

            stack.callback(router.register_forward_hook(record).remove)
        yield routings


def expert_load(routing: Routing, *, mask: Bool[Tensor, "*batch"] | None = None) -> Int[Tensor, " experts"]:
    """How many tokens chose each expert, those it had no room for among them. `mask` is True for tokens that count."""
    return _count(routing.chosen, routing.scores.shape[-1], _each_choice(routing, mask))


def balancing_loss(routing: Routing, *, mask: Bool[Tensor, "*batch"] | None = None) -> Float[Tensor, ""]:
    r"""$n \sum_i f_i P_i$: $f_i$ the share of tokens that chose expert i, $P_i$ its mean share of the scores.

    `active` where both are even, up to $n$ where few experts get all. $f$ has no gradient, $P$ has: the loss takes
    score away from the experts that are chosen most. `mask` is True for tokens that count (no padding). To be added
    to a training loss with a factor of about 0.01. Sigmoid scores are divided by their sum over the experts first.
    Shazeer et al. 2017, section 4, in the form of GShard, section 2.2 (arXiv 2006.16668), and Switch, equations 4 to 6
    (arXiv 2101.03961; there `active` is 1).
    """
    counts = _counts(routing, mask)
    tokens = counts.sum()
    share = expert_load(routing, mask=mask) / tokens
    mean_score = (_probabilities(routing) * counts[..., None]).flatten(0, -2).sum(0) / tokens
    return routing.scores.shape[-1] * (share * mean_score).sum()


def sequence_balancing_loss(routing: Routing) -> Float[Tensor, ""]:
    r"""The balancing loss of every sequence alone, over `active`, and their mean: 1 where a sequence is even.

    The last axis of tokens is the sequence. What is counted are the `active` highest scores, without selection bias or
    groups. DeepSeek-V3, equations 17 to 20 (arXiv 2412.19437).
    """
    active, experts = routing.chosen.shape[-1], routing.scores.shape[-1]
    top = routing.scores.detach().topk(active, dim=-1).indices
    counted = torch.zeros_like(routing.scores).scatter(-1, top, 1.0)
    return (experts / active * counted.mean(-2) * _probabilities(routing).mean(-2)).sum(-1).mean()


def z_loss(routing: Routing, *, mask: Bool[Tensor, "*batch"] | None = None) -> Float[Tensor, ""]:
    r"""$\operatorname{mean}\,(\log \sum_i e^{z_i})^2$ over tokens: keeps the router's logits $z$ small.

    `mask` is True for tokens that count. To be added with a factor of about 0.001.
    ST-MoE, equation 5 (Zoph et al. 2022, arXiv 2202.08906).
    """
    counts = _counts(routing, mask)
    return (routing.logits.logsumexp(-1).square() * counts).sum() / counts.sum()


def balanced_bias(
    bias: Float[Tensor, " experts"],
    load: Int[Tensor, " experts"] | Float[Tensor, " experts"],
    *,
    rate: int | float = 0.001,
) -> Float[Tensor, " experts"]:
    r"""$b_i + u \operatorname{sign}(\bar c - c_i)$: the selection bias after a batch of load $c$, moved by `rate` $u$.

    Up for experts with less than the mean load, down for those with more. No loss and no gradient takes part, so the
    balance costs the model nothing of what it learns. Wang et al. 2024, algorithm 1 (arXiv 2408.15664).
    """
    load = load.to(torch.float32)
    return (bias + rate * (load.mean() - load).sign()).to(bias.dtype)


@dataclass(frozen=True, kw_only=True)
class RoutingStatistics:
    """Loads and losses of one `Routing`, as tensors without gradients."""

    load: Int[Tensor, " experts"]
    """Tokens that chose each expert."""
    dropped: Int[Tensor, " experts"]
    """Those of them that it had no room for."""
    lost: Int[Tensor, ""]
    """Tokens that no expert had room for."""
    max_violation: Float[Tensor, ""]
    """The highest load over the mean load, minus 1: MaxVio in Wang et al. 2024 (arXiv 2408.15664)."""
    balancing_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]


@torch.no_grad()
def routing_statistics(routing: Routing, *, mask: Bool[Tensor, "*batch"] | None = None) -> RoutingStatistics:
    """How even the load is, what was dropped, and both losses. `mask` is True for tokens that count."""
    counts = _counts(routing, mask)
    load = expert_load(routing, mask=mask)
    dropped = _count(routing.chosen, len(load), _each_choice(routing, mask) * ~routing.kept)
    return RoutingStatistics(
        load=load,
        dropped=dropped,
        lost=(counts * ~routing.kept.any(-1)).sum().long(),
        max_violation=load.max() / load.float().mean() - 1,
        balancing_loss=balancing_loss(routing, mask=mask),
        z_loss=z_loss(routing, mask=mask),
    )


class ExpertParameters(NamedTuple):
    """Weights of a mixture of experts: all of them, and those a token goes through."""

    total: int
    active: int


def expert_parameters(dim: int, config: ExpertsConfig) -> ExpertParameters:
    """Parameters of `MixtureOfExperts(dim, config)`. The router and its selection bias are always active."""
    _check_dim(dim)
    one = feed_forward_parameters(dim, config.hidden, gated=True)
    always = config.experts * (dim + config.selection_bias) + config.shared * one
    return ExpertParameters(always + config.experts * one, always + config.active * one)


def expert_flops(dim: int, config: ExpertsConfig) -> int:
    """FLOPs per token of its matrix products, router included, a multiply and an add counted as two.

    Without a capacity; a choice that is dropped saves its part. Sorting and element-wise work are left out.
    """
    _check_dim(dim)
    one = feed_forward_parameters(dim, config.hidden, gated=True)
    return 2 * (config.experts * dim + (config.active + config.shared) * one)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _probabilities(routing: Routing) -> Tensor:
    """Scores that add up to 1 for each token; those of a softmax do already."""
    return routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)


def _counts(routing: Routing, mask: Tensor | None) -> Tensor:
    """1.0 for the tokens that count."""
    shape = routing.scores.shape[:-1]
    if mask is None:
        return routing.scores.new_ones(shape)
    if mask.shape != shape:
        raise ValueError(
            f"mask is {tuple(mask.shape)}, the routed tokens are {tuple(shape)}: one entry a token"
        )
    return mask.to(routing.scores.dtype)


def _each_choice(routing: Routing, mask: Tensor | None) -> Tensor:
    """1 for the choices of the tokens that count."""
    return _counts(routing, mask).long()[..., None].expand_as(routing.chosen)


def _count(chosen: Tensor, bins: int, each: Tensor | None = None) -> Tensor:
    """How often each number of 0 to bins - 1 stands in `chosen`, or the sum of `each` there."""
    # bincount would do, but on CUDA it waits, and its size is not known beforehand.
    each = torch.ones_like(chosen) if each is None else each.to(chosen.dtype)
    return chosen.new_zeros(bins).scatter_add(0, chosen.flatten(), each.flatten())


def _flat_by_choice(each: Tensor) -> Tensor:
    """(*batch, active) as one list: what belongs to the first choice of all tokens, then to the second, and so on."""
    return each.reshape(-1, each.shape[-1]).T.flatten()


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim {dim} must be at least 1")


def _check_features(x: Tensor, dim: int) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"x has {x.shape[-1]} features, this layer takes {dim}")


def _check_score(score: str) -> None:
    if score not in get_args(Score):
        raise ValueError(f"score {score!r} is not one of {', '.join(get_args(Score))}")


def _check_factor(factor: int | float) -> None:
    if not 0 < factor < math.inf:
        raise ValueError(f"capacity_factor {factor} must be a number above 0")


def _check_choice(experts: int, active: int, groups: int, active_groups: int) -> None:
    if groups < 1 or experts % groups:
        raise ValueError(f"experts {experts} must divide into {groups} groups")
    if not 1 <= active_groups <= groups:
        raise ValueError(f"active_groups {active_groups} must be 1 to groups {groups}")
    among = experts // groups * active_groups
    if not 1 <= active <= among:
        raise ValueError(f"active {active} must be 1 to the {among} experts there are to choose from")
