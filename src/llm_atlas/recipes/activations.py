"""Feed-forward layers side by side: ReLU, GELU, ReGLU, GeGLU and SwiGLU (chapter 16).

Byte-level decoders on the King James Bible that differ in their feed-forward layers alone. A gated layer has
three matrices: at two thirds of the hidden width it has the parameters and the FLOPs of a plain one, at the
same width half as many again. Each kind is tried at three learning rates and compared at its own best.

    python -m llm_atlas.recipes.activations

writes assets/results/activations.json (rows that are there already are not run again), and then the house
model assets/models/relu-bytes.safetensors, in which dead units can be counted.
Shazeer 2020, sections 2 and 3 (arXiv 2002.05202).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Int
from torch import Tensor

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.core.weights import load_safetensors, save_safetensors
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.inspect import unit_statistics
from llm_atlas.nn.feedforward import feed_forward_flops, feed_forward_parameters, gated_hidden
from llm_atlas.recipes import environment, initialize, one_thread, sweep, warmup_then_cosine, write_json
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import Row, fit

NAME = "activations"
MODEL = "relu-bytes"

STEPS = 800
WARMUP = 40
BATCH = 16
LENGTH = 64
DIM = 72
LAYERS = 2
HEADS = 3


class Kind(NamedTuple):
    """A feed-forward layer: its activation function, whether it is gated, its hidden width."""

    activation: str
    gated: bool
    hidden: int


KINDS = {
    "relu": Kind("relu", False, 4 * DIM),
    "gelu": Kind("gelu", False, 4 * DIM),
    "reglu": Kind("relu", True, gated_hidden(DIM)),
    "geglu": Kind("gelu", True, gated_hidden(DIM)),
    "swiglu": Kind("silu", True, gated_hidden(DIM)),
    "geglu, wide": Kind("gelu", True, 4 * DIM),
    "swiglu, wide": Kind("silu", True, 4 * DIM),
}
"""The first five have the same parameters and FLOPs; the wide ones the hidden width of the plain layers."""

LEARNING_RATES = (2e-3, 4e-3, 8e-3)
TUNING_SEEDS = (0, 1)
"""Every kind at every rate with these, but for the lowest rate: with the first seed it was worse for all kinds by
more than seeds differ, and it was not run again."""
TUNED_RATE = LEARNING_RATES[1]
"""The rate with the lowest mean loss over `TUNING_SEEDS`, the same for all kinds."""
SEEDS = (0, 1, 2, 3, 4)
"""Every kind at that rate with these (the wide ones with the first three): the same data for all, so that
differences can be taken seed by seed."""
NEAR_RATES = (5.7e-3, 8e-3)
COMPARED = ("gelu", "swiglu")
"""These two with all seeds at the rates above it too: does their order hang on the rate?"""
BEST: dict[str, float] = {**dict.fromkeys(KINDS, TUNED_RATE), "gelu": NEAR_RATES[0]}
"""Each kind's rate with the lowest mean loss: over `SEEDS` for those `COMPARED`, over `TUNING_SEEDS` for the others.
All losses are of the same held-out text. GELU's two lower rates differ by 0.0005 nats, less than its seeds do."""
HIGH_RATES = (3e-2, 1e-1, 3e-1)
"""ReLU with the first three seeds at rates where its units die; beside it GELU once, at 0.1."""

SETTINGS = {
    "corpus": "king-james, one token a byte",
    "held_out": "the last tenth; loss on 256 windows, units on 64 of them",
    "layers": LAYERS,
    "dim": DIM,
    "heads": HEADS,
    "hidden": {name: kind.hidden for name, kind in KINDS.items()},
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "optimizer": (
        f"AdamW with torch's defaults; {WARMUP} steps of warm-up, then a half cosine to zero; "
        "gradient clipped to length 1"
    ),
    "units": "losses in nats a byte; FLOPs a token, forward, matrix products alone; unit statistics a layer",
}


def make_model(kind: str, seed: int) -> Decoder:
    """The decoder of a kind. The same seed gives all kinds the same embedding and attention, and those whose
    feed-forward layers have the same shapes the same weights there.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {'; '.join(KINDS)}")
    activation, gated, hidden = KINDS[kind]
    config = DecoderConfig(
        vocab=BYTES, dim=DIM, layers=LAYERS, heads=HEADS, context=LENGTH,
        activation=activation, gated=gated, hidden=hidden,
    )  # fmt: skip
    model, rng = Decoder(config), generator(seed)
    initialize(model.embed, rng)
    for part in ("mixer", "feedforward"):
        for block in model.blocks:
            initialize(getattr(block, part), rng)
    return model


def forward_flops(kind: str) -> int:
    """FLOPs of a token's forward pass, matrix products alone: projections, scores and sums of values over all
    `LENGTH` keys, feed-forward layers, unembedding.
    """
    _, gated, hidden = KINDS[kind]
    attention = 2 * 4 * DIM * DIM + 2 * 2 * LENGTH * DIM
    return LAYERS * (attention + feed_forward_flops(DIM, hidden, gated=gated)) + 2 * BYTES * DIM


def train(
    kind: str,
    lr: float,
    seed: int,
    *,
    steps: int = STEPS,
    stop: int | None = None,
    ids: Int[Tensor, " bytes"],
    look: Callable[[int, Decoder], None] | None = None,
) -> tuple[Decoder, list[Row]]:
    """A newly trained model, and the row of every step: a short warm-up, then a half cosine to zero.

    stop: after so many of the steps, the rates being those of all.
    ids: the text to train on, as bytes. look: called with the step (from 0) and the model after every update.
    Errors: ValueError for a `stop` that is not one of the steps.
    """
    if stop is not None and not 1 <= stop <= steps:
        raise ValueError(f"stop {stop} must be from 1 to {steps}, the number of steps")
    model = make_model(kind, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=min(WARMUP, max(1, steps // 2)))

    def on_step(step: int, row: Row) -> None:
        schedule.step()
        if look is not None:
            look(step, model)

    draw = batches(ids, seed, batch=BATCH, length=LENGTH)
    rows = fit(
        model,
        draw,
        next_byte_loss,
        steps=steps if stop is None else stop,
        optimizer=optimizer,
        clip=1.0,
        on_step=on_step,
    )
    return model.eval(), rows


@one_thread()
def run(
    kind: str,
    lr: float,
    seed: int,
    *,
    steps: int = STEPS,
    stop: int | None = None,
    ids: Int[Tensor, " bytes"] | None = None,
) -> dict[str, Any]:
    """One training run, and what is recorded of it; some 25 seconds for 800 steps on one core.

    stop: after so many of the steps, the rates being those of all. ids: the text as bytes; the King James Bible
    unless given. See `SETTINGS` for units.
    Of the units, on 4096 held-out bytes, a number a layer: the share that is dead (active on none) and the share
    active on a byte, both for ReLU alone (the others are never exactly zero); mean of what enters the activation
    function and share of it below 0; levels of what leaves it. dead_curve: the share dead over all layers, at
    the start and every 100 steps.
    """
    text, held_out = split_held_out(byte_ids(king_james()) if ids is None else ids)
    windows = held_out_windows(held_out, batch=256, length=LENGTH)
    some = windows[:64, :-1]
    sparse = KINDS[kind].activation == "relu"
    dead_curve = [float(unit_statistics(make_model(kind, seed), some).dead.mean())] if sparse else []

    def look(step: int, model: Decoder) -> None:
        if sparse and (step + 1) % 100 == 0:
            dead_curve.append(float(unit_statistics(model, some).dead.mean()))

    model, rows = train(kind, lr, seed, steps=steps, stop=stop, ids=text, look=look)
    units = unit_statistics(model, some)
    losses = [row["loss"] for row in rows]
    loss = measure(model, windows)
    _, gated, hidden = KINDS[kind]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "feed_forward_parameters": LAYERS * feed_forward_parameters(DIM, hidden, gated=gated),
        "flops": forward_flops(kind),
        "held_out_loss": loss,
        "bits_per_byte": loss / math.log(2),
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "loss_curve": [sum(losses[i : i + 20]) / len(losses[i : i + 20]) for i in range(0, len(losses), 20)],
        "dead": units.dead.tolist() if sparse else None,
        "active_share": units.active_share.tolist() if sparse else None,
        "dead_curve": dead_curve,
        "pre_activation_mean": units.mean.tolist(),
        "pre_activation_negative": units.negative.tolist(),
        "levels": list(units.levels),
        "quantiles": units.quantiles.tolist(),
    }


def points() -> list[dict[str, Any]]:
    """All runs: every kind at every rate, more seeds at the tuned rate, high rates, two kinds at rates near it."""
    first, second = TUNING_SEEDS
    tuning = [(kind, lr, first) for lr in LEARNING_RATES for kind in KINDS]
    tuning += [(kind, lr, second) for lr in LEARNING_RATES[1:] for kind in KINDS]
    more = [
        (kind, TUNED_RATE, seed) for seed in SEEDS[2:] for kind in KINDS if seed < 3 or "wide" not in kind
    ]
    high = [("relu", lr, seed) for seed in SEEDS[:3] for lr in HIGH_RATES]
    high += [("gelu", HIGH_RATES[1], first)]
    near = [(kind, lr, seed) for lr in NEAR_RATES for seed in SEEDS for kind in COMPARED]
    every = dict.fromkeys(tuning + more + high + near)  # once each, in this order
    return [dict(zip(("kind", "lr", "seed"), point, strict=True)) for point in every]


def load_relu_bytes(path: Path | None = None, *, high_rate: bool = False) -> Decoder:
    """The trained ReLU decoder in eval mode, from the package's own files or from `path` and the .json beside it.

    It is the run of `KINDS["relu"]` at its best rate with seed 0; with `high_rate` the same one at 0.1, from the
    same weights and on the same text, in which a good part of the units has died. `unit_statistics` counts them.
    """
    if path is None:
        path = bundled(f"models/{MODEL}{'-high-rate' if high_rate else ''}.safetensors")
    config = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["settings"]["config"]
    # JSON has no tuples
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    model = Decoder(DecoderConfig(**settings))
    model.load_state_dict(load_safetensors(path))
    return model.eval()


@one_thread()
def save_relu_bytes(out: Path, lr: float, *, name: str = MODEL, steps: int = STEPS) -> dict[str, Any]:
    """Train the house model at `lr` with seed 0 and write it with the facts about it, which are returned."""
    text, held_out = split_held_out(byte_ids(king_james()))
    model, rows = train("relu", lr, 0, steps=steps, ids=text)
    windows = held_out_windows(held_out, batch=256, length=LENGTH)
    units = unit_statistics(model, windows[:64, :-1])
    facts = {
        "recipe": NAME,
        **environment(NAME),
        "seeds": [0],
        "settings": {
            "config": asdict(model.config),
            **{name: SETTINGS[name] for name in ("corpus", "held_out", "length", "batch", "optimizer")},
            "steps": steps,
            "lr": lr,
        },
        "results": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "final_loss": round(rows[-1]["loss"], 6),
            "held_out_loss": round(measure(model, windows), 6),
            "unit_tokens": units.tokens,
            "dead_units": [round(share * units.active.shape[1]) for share in units.dead.tolist()],
            "active_share": [round(share, 6) for share in units.active_share.tolist()],
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    save_safetensors(model.state_dict(), out / f"{name}.safetensors", {"recipe": NAME})
    write_json(out / f"{name}.json", facts)
    return facts["results"]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
    models: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("assets/models"),
) -> None:
    """Run what the file does not hold yet, then train the house models that are not there yet."""
    ids = byte_ids(king_james())
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points(), run=partial(run, ids=ids))
    for kind, lr in dict.fromkeys((row["kind"], row["lr"]) for row in document["rows"]):
        rows = [row for row in document["rows"] if (row["kind"], row["lr"]) == (kind, lr)]
        losses = ", ".join(f"{row['held_out_loss'] or math.nan:.4f}" for row in rows)
        typer.echo(f"{kind:12} {lr:<6} held-out loss {losses}")
    for name, lr in ((MODEL, BEST.get("relu")), (f"{MODEL}-high-rate", HIGH_RATES[1])):
        if lr is not None and not (models / f"{name}.json").exists():
            typer.echo(f"{name}: {json.dumps(save_relu_bytes(models, lr, name=name))}")


if __name__ == "__main__":
    app()
