"""A mixture of experts against one gated feed-forward network of as many active weights.

python benchmarks/experts.py --rounds 9

Top 2 of 8 and top 4 of 32 experts, with as much hidden width in the chosen experts as the network has. Both do the same
work per token but for the router; what the mixture takes longer is choosing, sorting, products of fewer rows, and
memory: it reads the weights of every expert that is chosen at all, and its backward pass writes a gradient for each
expert. Its outputs are checked against the readable form, every expert on every token, before the clock starts.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write
from torch import Tensor, nn

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn.feedforward import GatedFeedForward, feed_forward_flops
from llm_atlas.nn.moe import (
    ExpertsConfig,
    MixtureOfExperts,
    dense_experts,
    expert_flops,
    expert_parameters,
)
from llm_atlas.recipes import initialize

DIM, HIDDEN = 576, 1536  # SmolLM2-135M
CONFIGS = (
    ExpertsConfig(experts=8, active=2, hidden=HIDDEN // 2),
    ExpertsConfig(experts=32, active=4, hidden=HIDDEN // 4),
)


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    tokens: Annotated[list[int], typer.Option(help="may be given more than once")] = [1, 32, 512, 2048],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-experts.json",
) -> None:
    """How many times as long as its active part alone does a mixture take?"""
    where = pick_device(device or None)
    rows = [
        compare(config, count, backward, where, rounds=rounds)
        for config in CONFIGS
        for count in tokens
        for backward in (False, True)
    ]
    write(
        out,
        f"a mixture of experts against a gated network of equal active width, {DIM} features, {HIDDEN} hidden, float32",
        environment(where),
        rows,
        rounds=rounds,
        note="slower: the mixture's time over the network's, the median of each round's own; "
        "weights: all of the mixture's over the network's; flops: of a token, the same way",
    )


def compare(
    config: ExpertsConfig, tokens: int, backward: bool, where: torch.device, *, rounds: int
) -> dict[str, object]:
    """One row: both layers in turns."""
    draw = generator(0)
    mixture, network = MixtureOfExperts(DIM, config), GatedFeedForward(DIM, HIDDEN)
    for layer in (mixture, network):
        initialize(layer, draw)
        layer.to(where)
    x = torch.randn(tokens, DIM, generator=draw).to(where)
    check(mixture, x[:64])

    run = train if backward else infer
    runs = {"network": partial(run, network, x), "mixture": partial(run, mixture, x)}
    times = take_turns(runs, rounds=rounds, device=where)
    middle = {name: 1e3 * sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    slower = ratio(times, "mixture", "network")
    return {
        "experts": config.experts,
        "active": config.active,
        "tokens": tokens,
        "backward": backward,
        "network ms": middle["network"],
        "mixture ms": middle["mixture"],
        "slower": slower["ratio"],
        "slower_min": slower["ratio_min"],
        "slower_max": slower["ratio_max"],
        "weights": expert_parameters(DIM, config).total / (3 * DIM * HIDDEN),
        "flops": expert_flops(DIM, config) / feed_forward_flops(DIM, HIDDEN, gated=True),
    }


@torch.no_grad()
def check(mixture: MixtureOfExperts, x: Tensor) -> None:
    """Sorted by expert gives what every expert on every token gives."""
    readable = MixtureOfExperts(DIM, mixture.config, compute=dense_experts).to(x.device)
    readable.load_state_dict(mixture.state_dict())
    torch.testing.assert_close(mixture(x), readable(x), rtol=1e-3, atol=1e-4)


def infer(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def train(layer: nn.Module, x: Tensor) -> None:
    """Forward and backward, gradients of the input and of every weight."""
    learnt = [x.detach().requires_grad_(), *layer.parameters()]
    out = layer(learnt[0])
    torch.autograd.grad(out, learnt, torch.ones_like(out))


if __name__ == "__main__":
    typer.run(main)
