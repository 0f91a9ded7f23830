"""Mixture of experts against transformers, its fast form against the readable one, and every step against a loop."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import (
    MixtralConfig,
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.block import Block
from llm_atlas.nn.feedforward import GatedFeedForward
from llm_atlas.nn.moe import (
    Experts,
    ExpertsConfig,
    MixtureOfExperts,
    Router,
    Routing,
    balanced_bias,
    balancing_loss,
    choose_experts,
    dense_experts,
    expert_capacity,
    expert_flops,
    expert_load,
    expert_parameters,
    grouped_experts,
    keep_top_k,
    mixing_weights,
    recorded_routing,
    router_scores,
    routing_statistics,
    sequence_balancing_loss,
    within_capacity,
    z_loss,
)
from llm_atlas.nn.norm import RMSNorm
from llm_atlas.recipes import initialize

DIM, HIDDEN = 10, 6
SMALL = ExpertsConfig(experts=5, active=2, hidden=HIDDEN)
DEEPSEEK = ExpertsConfig(
    experts=8, active=3, hidden=HIDDEN, shared=2, score="sigmoid", scale=2.5, selection_bias=True, groups=4,
    active_groups=2,
)  # fmt: skip
TIGHT = dataclasses.replace(SMALL, capacity_factor=0.7)
CONFIGS = {
    "mixtral": SMALL,
    "qwen": dataclasses.replace(SMALL, renormalize=False),
    "switch": ExpertsConfig(experts=4, active=1, hidden=HIDDEN, renormalize=False, capacity_factor=1),
    "deepseek": DEEPSEEK,
    "tight": TIGHT,
    "tight by score": dataclasses.replace(TIGHT, priority="score"),
    "one": ExpertsConfig(experts=1, active=1, hidden=HIDDEN),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Everything a module holds, buffers too: what stays 0 or 1 is not seen."""
    draw = rng(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.5)


def layer(config: ExpertsConfig, seed: int = 0, **how) -> MixtureOfExperts:
    made = MixtureOfExperts(DIM, config, **how)
    randomize(made, seed)
    return made


def routed(config: ExpertsConfig, *batch: int, seed: int = 0) -> Routing:
    return layer(config, seed).router(randn(*batch, DIM, seed=seed + 1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# --------------------------------------------------------------------------------------------- oracles


def mixtral() -> tuple[nn.Module, ExpertsConfig]:
    config = MixtralConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=5, num_experts_per_tok=2
    )
    return MixtralSparseMoeBlock(config), SMALL


def qwen3(renormalize: bool) -> tuple[nn.Module, ExpertsConfig]:
    config = Qwen3MoeConfig(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=renormalize,
    )  # fmt: skip
    return Qwen3MoeSparseMoeBlock(config), ExpertsConfig(
        experts=6, active=3, hidden=HIDDEN, renormalize=renormalize
    )


def deepseek() -> tuple[nn.Module, ExpertsConfig]:
    config = DeepseekV3Config(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, n_routed_experts=8, num_experts_per_tok=3,
        n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    return DeepseekV3MoE(config), DEEPSEEK


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of one block under our names: gate and up lie in one tensor there."""
    gate, up = theirs["experts.gate_up_proj"].chunk(2, dim=1)
    renamed = {"experts.gate": gate, "experts.up": up, "experts.down": theirs["experts.down_proj"]}
    names = {
        "gate.weight": "router.weight",
        "gate.e_score_correction_bias": "router.bias",
        "shared_experts.gate_proj.weight": "shared.gate.weight",
        "shared_experts.up_proj.weight": "shared.up.weight",
        "shared_experts.down_proj.weight": "shared.down.weight",
    }
    rest = {names[name]: tensor for name, tensor in theirs.items() if name.removeprefix("experts.") == name}
    return {name: tensor.clone() for name, tensor in (renamed | rest).items()}


ORACLES: dict[str, Callable[[], tuple[nn.Module, ExpertsConfig]]] = {
    "mixtral": mixtral,
    "qwen3": lambda: qwen3(renormalize=True),
    "qwen3, scores as they are": lambda: qwen3(renormalize=False),
    "deepseek-v3": deepseek,
}


@pytest.mark.parametrize("compute", [dense_experts, grouped_experts])
@pytest.mark.parametrize("make", ORACLES.values(), ids=ORACLES)
def test_the_layer_is_that_of_transformers(make, compute):
    theirs, config = make()
    theirs.eval()
    randomize(theirs)
    ours = MixtureOfExperts(DIM, config, compute=compute)
    weights = our_names(theirs.state_dict())
    ours.load_state_dict(weights)
    x, y = (randn(3, 7, DIM).requires_grad_() for _ in range(2))
    out, expected = ours(x), theirs(y)
    assert relative(out, expected) < 1e-5

    ahead = randn(3, 7, DIM, seed=2)
    out.backward(ahead)
    expected.backward(ahead)
    assert relative(x.grad, y.grad) < 1e-5
    found = {name: p.grad for name, p in theirs.named_parameters()}
    if config.selection_bias:
        found["gate.e_score_correction_bias"] = torch.zeros(config.experts)  # a buffer there
        assert ours.router.bias.grad is None
    for name, grad in our_names(found).items():
        if name != "router.bias":
            assert relative(ours.get_parameter(name).grad, grad) < 1e-5, name

    for name in weights:
        ours.load_state_dict(weights | {name: torch.zeros_like(weights[name])})
        assert relative(ours(x), expected) > 1e-2, f"{name} does nothing"


@pytest.mark.parametrize("masked", [False, True])
def test_the_balancing_loss_is_that_of_transformers(masked):
    routing = routed(SMALL, 4, 9)
    mask = torch.rand(4, 9, generator=rng(3)) < 0.7 if masked else None
    theirs = load_balancing_loss_func((routing.logits.flatten(0, 1),), 5, 2, mask)
    assert_close(balancing_loss(routing, mask=mask), theirs)


def test_the_z_loss_is_that_of_transformers():
    routing = routed(SMALL, 4, 9)
    assert_close(z_loss(routing), router_z_loss_func(routing.logits))
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[1, 3:5] = True
    assert_close(z_loss(routing, mask=mask), router_z_loss_func(routing.logits[1:2, 3:5]))


# --------------------------------------------------------------------------------- dense equivalences


@every_config
def test_grouped_is_dense_with_gradients(config):
    x = randn(3, 11, DIM, seed=5)
    found = []
    for compute in (dense_experts, grouped_experts):
        made, given = layer(config, compute=compute).double(), x.double().requires_grad_()
        out = made(given)
        out.square().sum().backward()
        learnt = [p.grad for p in made.parameters() if p.requires_grad]
        found.append((out, given.grad, *learnt))
    for dense, grouped in zip(*found, strict=True):
        assert_close(grouped, dense)


def test_gradients_are_right():
    made = layer(DEEPSEEK).double()
    assert torch.autograd.gradcheck(made, (randn(3, DIM).double().requires_grad_(),))


def test_all_experts_active_is_a_weighted_sum_of_networks():
    made = layer(ExpertsConfig(experts=4, active=4, hidden=HIDDEN))
    x = randn(2, 5, DIM)
    weights = functional.linear(x, made.router.weight).softmax(-1)
    expected = sum(weights[..., i : i + 1] * network(made, i)(x) for i in range(4))
    assert_close(made(x), expected)


def network(made: MixtureOfExperts, expert: int) -> GatedFeedForward:
    """One expert as the layer it is."""
    alone = GatedFeedForward(DIM, HIDDEN)
    alone.load_state_dict({f"{name}.weight": p[expert] for name, p in made.experts.named_parameters()})
    return alone


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_is_a_gated_feed_forward(score):
    made = layer(ExpertsConfig(experts=1, active=1, hidden=HIDDEN, score=score))
    x = randn(2, 5, DIM)
    assert_close(made(x), network(made, 0)(x))


def test_equal_experts_are_one_network_whoever_is_chosen():
    made = layer(SMALL)
    with torch.no_grad():
        for weight in made.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    x = randn(4, 6, DIM)
    assert_close(made(x), network(made, 0)(x))


def test_shared_experts_are_networks_that_every_token_goes_through():
    made = layer(DEEPSEEK)
    x = randn(2, 5, DIM)
    without = made.experts(x, made.router(x))
    halves = []
    for part in (slice(0, HIDDEN), slice(HIDDEN, 2 * HIDDEN)):
        one = GatedFeedForward(DIM, HIDDEN)
        one.load_state_dict(
            {
                "gate.weight": made.shared.gate.weight[part],
                "up.weight": made.shared.up.weight[part],
                "down.weight": made.shared.down.weight[:, part],
            }
        )
        halves.append(one(x))
    assert_close(made(x), without + halves[0] + halves[1])


@pytest.mark.parametrize("name", ["mixtral", "qwen", "deepseek"])
def test_without_a_capacity_a_token_alone_gives_what_it_gives_in_company(name):
    made, x = layer(CONFIGS[name]), randn(3, 6, DIM)
    assert_close(made(x[1, 2]), made(x)[1, 2])
    order = torch.randperm(6, generator=rng(1))
    assert_close(made(x[:, order]), made(x)[:, order])


@every_config
def test_no_tokens_give_none(config):
    assert layer(config)(torch.empty(2, 0, DIM)).shape == (2, 0, DIM)


def test_experts_that_nobody_chose_get_zero_gradients():
    made = layer(SMALL)
    made(randn(DIM)).sum().backward()
    chosen = set(made.router(randn(DIM)).chosen.tolist())
    for weight in made.experts.parameters():
        assert {i for i in range(5) if weight.grad[i].any()} == chosen
    assert len(chosen) == 2


# ------------------------------------------------------------------------------------- steps of routing


@given(st.integers(1, 6), st.integers(0, 99))
def test_choosing_first_and_then_the_softmax_is_renormalising(active, seed):
    logits = randn(4, 6, seed=seed)
    scores = router_scores(logits)
    chosen = choose_experts(scores, active)
    first = keep_top_k(logits, active).softmax(-1)
    assert_close(mixing_weights(scores, chosen), first.gather(-1, chosen))
    assert ((first > 0).sum(-1) == active).all()


def loop_choice(
    scores: list[float], active: int, bias: list[float], groups: int, active_groups: int
) -> list[int]:
    """One token's experts, by sorting lists."""
    ranked = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(ranked) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    worth = [sum(sorted((ranked[i] for i in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: -worth[g])[:active_groups]
    among = [i for g in best for i in members[g]]
    return sorted(among, key=lambda i: -ranked[i])[:active]


@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (12, 5), (3, 3)]), st.integers(1, 3), st.integers(0, 99)
)
def test_groups_are_the_loop_over_lists(groups, active, seed):
    scores, bias = randn(5, 12, seed=seed).sigmoid(), randn(12, seed=seed + 1)
    ours = choose_experts(scores, active, bias=bias, groups=groups[0], active_groups=groups[1])
    expected = [loop_choice(row, active, bias.tolist(), *groups) for row in scores.tolist()]
    assert ours.tolist() == expected


def test_the_bias_chooses_and_does_not_weigh():
    scores = torch.tensor([0.9, 0.5, 0.4, 0.1])
    chosen = choose_experts(scores, 2, bias=torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    assert chosen.tolist() == [3, 1]
    assert_close(mixing_weights(scores, chosen), torch.tensor([1 / 6, 5 / 6]))
    assert_close(mixing_weights(scores, chosen, renormalize=False, scale=2.5), torch.tensor([0.25, 1.25]))


def test_scores_of_zero_have_no_nan():
    scores = router_scores(torch.full((3, 4), -1e4), "sigmoid")
    assert mixing_weights(scores, choose_experts(scores, 2)).tolist() == [[0.0, 0.0]] * 3


def test_with_one_active_expert_renormalised_the_router_learns_nothing():
    for renormalize, learns in ((True, False), (False, True)):
        config = ExpertsConfig(experts=4, active=1, hidden=HIDDEN, renormalize=renormalize)
        made = layer(config)
        made(randn(7, DIM)).sum().backward()
        assert bool(made.router.weight.grad.abs().max() > 1e-6) is learns


# --------------------------------------------------------------------------------------------- capacity


def loop_kept(chosen: list[list[int]], capacity: int, priority: list[list[float]] | None) -> list[list[bool]]:
    """Choices as they come to their expert, one by one."""
    line = [(t, k) for k in range(len(chosen[0])) for t in range(len(chosen))]
    if priority is not None:
        line.sort(key=lambda at: -priority[at[0]][at[1]])
    kept, taken = [[False] * len(row) for row in chosen], {}
    for t, k in line:
        taken[chosen[t][k]] = taken.get(chosen[t][k], 0) + 1
        kept[t][k] = taken[chosen[t][k]] <= capacity
    return kept


@given(
    st.integers(1, 12), st.integers(1, 4), st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_capacity_is_a_queue(tokens, active, capacity, by_score, ties, seed):
    scores = randn(tokens, 4, seed=seed)
    chosen = choose_experts(scores, active)
    priority = scores.gather(-1, chosen) if by_score else None
    if priority is not None and ties:
        priority = priority.round()
    ours = within_capacity(chosen, 4, capacity, priority=priority)
    theirs = loop_kept(chosen.tolist(), capacity, None if priority is None else priority.tolist())
    assert ours.tolist() == theirs


@pytest.mark.parametrize("priority", ["order", "score"])
def test_drops_are_counted_and_go_through_as_zeros(priority):
    config = ExpertsConfig(experts=3, active=2, hidden=HIDDEN, capacity_factor=0.5, priority=priority)
    made = layer(config)
    x = randn(4, 6, DIM)
    with recorded_routing(made) as routings:
        out = made(x)
    routing = routings["router"]
    capacity = expert_capacity(24, 3, 2, 0.5)
    assert capacity == 8
    found = routing_statistics(routing)
    assert found.load.sum() == 48
    assert_close(found.dropped, (found.load - capacity).clamp(min=0))
    assert (found.dropped > 0).any()
    assert ((routing.weights == 0) == ~routing.kept).all()
    lost = ~routing.kept.any(-1)
    assert found.lost == lost.sum() > 0
    assert (out[lost] == 0).all()
    assert (out[~lost] != 0).any(-1).all()
    # What is kept weighs what it weighs without a capacity.
    free = Router(DIM, dataclasses.replace(config, capacity_factor=None))
    free.load_state_dict(made.router.state_dict())
    assert_close(routing.weights, free(x).weights * routing.kept)
    block = Block(MultiHeadAttention(DIM, 2), made, lambda: RMSNorm(DIM))
    assert block(x).shape == x.shape


def test_capacity_in_numbers():
    assert expert_capacity(1024, 8, 2, 1.25) == 320
    assert expert_capacity(110, 1, 1, 1.1) == 121  # 121.00000000000001 in floating point
    assert expert_capacity(10, 3, 1, 1) == 4
    assert expert_capacity(0, 3, 1, 1) == 0


def test_by_score_an_expert_keeps_those_that_fit_it_best():
    router = layer(dataclasses.replace(TIGHT, priority="score")).router
    routing = router(randn(3, 7, DIM))
    scores = routing.scores.gather(-1, routing.chosen)
    turned_away = 0
    for expert in range(5):
        here = routing.chosen == expert
        kept, dropped = scores[here & routing.kept], scores[here & ~routing.kept]
        turned_away += len(dropped)
        assert not len(dropped) or kept.min() >= dropped.max()
    assert turned_away > 3


def test_what_is_dropped_is_not_computed():
    made, x = layer(TIGHT), randn(3, 7, DIM)
    with FlopCounterMode(display=False) as counter:
        made(x)
    kept = int(made.router(x).kept.sum())
    assert kept < 42
    assert counter.get_total_flops() == 2 * DIM * (21 * 5 + kept * 3 * HIDDEN)


def test_room_for_all_is_no_capacity():
    made = layer(dataclasses.replace(SMALL, capacity_factor=2.5))  # 2.5 x 2 / 5: a place for every token
    free = layer(SMALL)
    x = randn(3, 5, DIM)
    assert_close(made(x), free(x))


# --------------------------------------------------------------------------------------------- balance


def even(tokens: int, experts: int, active: int) -> Routing:
    """Scores all alike, and every expert as often as every other."""
    chosen = torch.stack([(torch.arange(tokens) + i) % experts for i in range(active)], -1)
    scores = torch.full((tokens, experts), 1 / experts)
    return Routing(torch.zeros(tokens, experts), scores, chosen, scores.gather(-1, chosen), chosen >= 0)


def test_losses_by_hand():
    routing = even(12, 4, 2)
    assert_close(balancing_loss(routing), torch.tensor(2.0))
    assert_close(sequence_balancing_loss(routing), torch.tensor(1.0))
    assert_close(z_loss(routing), torch.tensor(math.log(4) ** 2))
    found = routing_statistics(routing)
    assert found.load.tolist() == [6] * 4
    assert found.max_violation == 0
    # One expert gets all the tokens and all the score.
    scores = torch.eye(4)[torch.zeros(12, dtype=torch.long)]
    one = Routing(scores, scores, torch.zeros(12, 1, dtype=torch.long), scores[:, :1], torch.ones(12, 1) > 0)
    assert balancing_loss(one) == 4
    assert sequence_balancing_loss(one) == 4
    assert routing_statistics(one).max_violation == 3


def test_the_loss_of_sequences_is_that_of_each_alone():
    routing = routed(dataclasses.replace(SMALL, score="sigmoid"), 3, 8)
    alone = [
        balancing_loss(Routing(*(getattr(routing, f.name)[row] for f in dataclasses.fields(routing)))) / 2
        for row in range(3)
    ]
    assert_close(sequence_balancing_loss(routing), torch.stack(alone).mean())


def test_the_loss_of_sequences_counts_scores_and_not_the_bias():
    made = layer(DEEPSEEK)
    x = randn(3, 8, DIM)
    before = sequence_balancing_loss(made.router(x))
    with torch.no_grad():
        made.router.bias[0] += 10
    after = made.router(x)
    assert expert_load(after)[0] == 24
    assert_close(sequence_balancing_loss(after), before)


def test_a_mask_leaves_padding_out():
    x = randn(2, 6, DIM)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :4] = False
    router = layer(TIGHT).router
    free = layer(SMALL).router
    assert_close(expert_load(free(x), mask=mask), expert_load(free(x[mask])))
    assert_close(balancing_loss(free(x), mask=mask), balancing_loss(free(x[mask])))
    whole, part = routing_statistics(router(x)), routing_statistics(router(x), mask=mask)
    dropped = ~router(x).kept
    assert whole.dropped.sum() == dropped.sum()
    assert part.dropped.sum() == dropped[mask].sum() < dropped.sum()


def test_the_balancing_loss_balances():
    router = Router(DIM, SMALL)
    router.reset_parameters(rng(0))
    x = randn(256, DIM) + 1.0  # a common part, so that some experts start as everyone's favourite
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    before = routing_statistics(router(x))
    for _ in range(60):
        loss = balancing_loss(router(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = routing_statistics(router(x))
    assert before.max_violation > 0.5
    assert after.max_violation < 0.25


def test_bias_steps_balance_without_a_gradient():
    config = dataclasses.replace(SMALL, selection_bias=True)
    router = Router(DIM, config)
    router.reset_parameters(rng(0))
    x = randn(256, DIM) + 1.0
    weight = router.weight.detach().clone()
    before = routing_statistics(router(x))
    for _ in range(150):
        router.rebalance(expert_load(router(x)), rate=0.005)
    after = routing_statistics(router(x))
    assert before.max_violation > 0.5
    assert after.max_violation < 0.25
    assert torch.equal(router.weight, weight)
    assert_close(router(x).scores, functional.linear(x, weight).softmax(-1))


def test_forward_does_not_move_the_bias():
    made = layer(DEEPSEEK).train()
    before = made.router.bias.clone()
    assert not made.router.bias.requires_grad  # or weight decay would pull at it
    made(randn(7, DIM)).sum().backward()
    assert torch.equal(made.router.bias, before)


def test_a_step_of_the_bias_by_hand():
    stepped = balanced_bias(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([9, 6, 3]), rate=0.01)
    assert_close(stepped, torch.tensor([0.49, 0.0, 0.01]))


@given(st.integers(0, 99))
def test_statistics_of_loads_are_counts(seed):
    routing = routed(SMALL, 3, 5, seed=seed)
    assert_close(expert_load(routing), torch.bincount(routing.chosen.flatten(), minlength=5))


# ------------------------------------------------------------------------------- routings of a model


def blocks(config: ExpertsConfig) -> nn.Sequential:
    return nn.Sequential(
        *(Block(MultiHeadAttention(DIM, 2), layer(config, i), lambda: RMSNorm(DIM)) for i in range(2))
    )


def test_routings_are_handed_out_and_the_hooks_taken_off():
    model, x = blocks(SMALL), randn(2, 5, DIM)
    with recorded_routing(model) as routings:
        out = model(x)
    assert list(routings) == ["0.feedforward.sublayer.router", "1.feedforward.sublayer.router"]
    assert_close(out, model(x))
    for name, routing in routings.items():
        assert routing.scores.shape == (2, 5, 5)
        assert not model.get_submodule(name)._forward_hooks
    first = dict(routings)
    model(randn(2, 5, DIM, seed=9))
    assert routings == first
    sum(balancing_loss(routing) for routing in routings.values()).backward()
    for name in routings:
        assert model.get_submodule(name).weight.grad.any()


def test_hooks_are_taken_off_after_an_error():
    model = blocks(SMALL)
    with pytest.raises(RuntimeError, match="stop"), recorded_routing(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_it_learns_what_one_network_of_its_size_does_not():
    """Four maps, told apart by the sign of two features: an expert for each."""
    draw = rng(1)
    maps = torch.randn(4, DIM, DIM, generator=draw)
    x = torch.randn(1024, DIM, generator=draw)
    kind = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    y = torch.einsum("td,tde->te", x, maps[kind])
    config = ExpertsConfig(experts=8, active=2, hidden=HIDDEN)
    mixed, plain = MixtureOfExperts(DIM, config), GatedFeedForward(DIM, 2 * HIDDEN)
    loss = {}
    for made in (mixed, plain):
        initialize(made, draw)
        optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            loss[made] = functional.mse_loss(made(x), y)
            loss[made].backward()
            optimizer.step()
    assert loss[mixed] < 0.7 * loss[plain]


# --------------------------------------------------------------------------------- counts, dtypes, errors


@every_config
def test_counts_are_those_of_the_module(config):
    made = layer(config)
    found = expert_parameters(DIM, config)
    assert found.total == sum(p.numel() for p in made.parameters())
    idle = config.experts - config.active
    assert found.total - found.active == idle * sum(p[0].numel() for p in made.experts.parameters())
    if config.capacity_factor is None:
        with FlopCounterMode(display=False) as counter:
            made(randn(2, 7, DIM))
        assert counter.get_total_flops() == 14 * expert_flops(DIM, config)


def test_mixtral_in_numbers():
    layer_of_mixtral = ExpertsConfig(experts=8, active=2, hidden=14336)
    found = expert_parameters(4096, layer_of_mixtral)
    assert found == (8 * 176_160_768 + 32768, 2 * 176_160_768 + 32768)
    assert expert_flops(4096, layer_of_mixtral) == 2 * found.active


@pytest.mark.parametrize("compute", [dense_experts, grouped_experts])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_goes_through(compute, dtype):
    made = layer(DEEPSEEK, compute=compute)
    x = randn(4, 5, DIM)
    exact, narrow = made(x), made.to(dtype)(x.to(dtype))
    assert narrow.dtype == dtype
    with recorded_routing(made) as routings:
        made(x.to(dtype))
    assert routings["router"].logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # A choice may tip over in a narrow dtype, and then its token differs by a whole expert.
    close = (narrow.to(exact.dtype) - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)
    assert close.float().mean() > 0.85


def test_drawn_with_a_generator_the_weights_are_the_same_again():
    made = [layer(DEEPSEEK, seed) for seed in range(2)]
    for module in made:
        initialize(module, rng(4))
    for (name, one), other in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not made[0].router.bias.any()
    big = Experts(4, 64, 256)
    big.reset_parameters(rng(0))
    assert_close(big.gate.std().item(), 64**-0.5, rtol=0.05, atol=0)
    assert_close(big.down.std().item(), 256**-0.5, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": 0}, "experts 0 must be at least 1"),
        ({"hidden": 0}, "hidden 0 must be at least 1"),
        ({"shared": -1}, "shared -1 must be at least 0"),
        ({"active": 6}, "active 6 must be 1 to the 5 experts there are to choose from"),
        ({"groups": 2}, "experts 5 must divide into 2 groups"),
        ({"groups": 5, "active_groups": 1}, "active 2 must be 1 to the 1 experts"),
        ({"active_groups": 2}, "active_groups 2 must be 1 to groups 1"),
        ({"scale": 0.0}, "scale 0.0 must be a number above 0"),
        ({"capacity_factor": 0}, "capacity_factor 0 must be a number above 0"),
        ({"capacity_factor": math.nan}, "capacity_factor nan must be a number above 0"),
        pytest.param(
            {"score": "tanh"}, "score 'tanh' is not one of softmax, sigmoid", marks=pytest.mark.untyped
        ),
        pytest.param(
            {"priority": "luck"}, "priority 'luck' is not one of order, score", marks=pytest.mark.untyped
        ),
    ],
)
def test_a_wrong_config_is_told_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)


def test_a_wrong_argument_is_told_so():
    with pytest.raises(ValueError, match="x has 9 features, this layer takes 10"):
        layer(SMALL)(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="dim 0 must be at least 1"):
        MixtureOfExperts(0, SMALL)
    with pytest.raises(ValueError, match="experts 0 and hidden 3 must be at least 1"):
        Experts(0, 4, 3)
    with pytest.raises(ValueError, match="capacity -1 must be at least 0"):
        within_capacity(torch.zeros(2, 1, dtype=torch.long), 3, -1)
    with pytest.raises(ValueError, match="active 4 must be 1 to the 3 experts"):
        keep_top_k(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="activation 'swoosh' is not one of"):
        layer(dataclasses.replace(SMALL, activation="swoosh"))
    with pytest.raises(ValueError, match="selection_bias=False"):
        layer(SMALL).router.rebalance(torch.zeros(5))
    with pytest.raises(ValueError, match="no Router"), recorded_routing(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"mask is \(3,\), the routed tokens are \(4,\)"):
        expert_load(routed(SMALL, 4), mask=torch.ones(3, dtype=torch.bool))
