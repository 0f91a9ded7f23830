"""Where the norm stands in a block, and what that asks of training: the runs behind chapter 17's pre-post-ln section.

Byte-level decoders of 2 to 12 blocks on the King James Bible, with the norm before each sublayer, after the
sum, or on both sides of the sublayer; with and without warm-up of the learning rate. Weights and data are the
same for the three.

    python -m llm_atlas.recipes.placement

writes assets/results/placement.json; rows that are there already are not run again.
Xiong et al. 2020, sections 3 and 4 (arXiv 2002.04745); Kim et al. 2025 (arXiv 2502.02732).
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Int
from torch import Tensor

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.inspect import residual_stream
from llm_atlas.recipes import initialize, one_thread, sweep
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import Row, fit

NAME = "placement"
PLACEMENTS = ("pre", "post", "sandwich")
DEPTHS = (2, 6, 12)
LEARNING_RATES = {2: (1e-3, 3e-3, 1e-2), 6: (1e-3, 3e-3, 1e-2), 12: (3e-4, 1e-3, 3e-3)}
"""Of every depth; the deepest stacks have a lower one in place of the highest."""
WARMUPS = (0, 150)
SEEDS = (0, 1, 2)

STEPS = 400
BATCH = 8
LENGTH = 32
MARGIN = 0.25
SETTINGS = {
    "corpus": "king-james, one token a byte",
    "held_out": "the last tenth",
    "dim": 32,
    "heads": 2,
    "hidden": 128,
    "block": "LayerNorm, ReLU, rotary positions, embedding and head apart",
    "init": "every matrix N(0, 1/in features), embedding N(0, 1), norms 1 and 0",
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "optimizer": "Adam, betas 0.9 and 0.98; no clipping; rate constant behind a linear warm-up of `warmup` steps",
    "learned": f"held-out loss more than {MARGIN} below the entropy of the bytes' frequencies",
    "units": "losses in nats a byte; gradients before the first step; stream: root mean square of a feature",
}


def make_model(placement: str, depth: int, seed: int) -> Decoder:
    """The decoder of a placement; matrices are the same in all three."""
    shape = {name: SETTINGS[name] for name in ("dim", "heads", "hidden")}
    config = DecoderConfig(
        vocab=BYTES,
        layers=depth,
        context=LENGTH,
        norm="layer",
        gated=False,
        activation="relu",
        placement=placement,
        tied=False,
        **shape,
    )
    model = Decoder(config)
    initialize(model, generator(seed), embedding_std=1.0)
    return model


def gradients(model: Decoder, windows: Int[Tensor, "batch length"]) -> dict[str, Any]:
    """Lengths of the loss's gradient; lists go block by block from the first to the last.

    gradient_norms:     over all parameters of the block.
    ffn_gradient_norms: in the last matrix of its feed-forward network, the one of Xiong et al.'s theorem 1.
    head_gradient:      in the unembedding.
    """
    model.zero_grad()
    next_byte_loss(model, windows)[0].backward()
    # In float64: squares of vanishing gradients leave the range of float32.
    whole = [
        float(torch.stack([p.grad.double().norm() for p in block.parameters()]).norm())
        for block in model.blocks
    ]
    last = [float(block.feedforward.sublayer.down.weight.grad.double().norm()) for block in model.blocks]
    head = float(model.head.weight.grad.double().norm())
    model.zero_grad()
    return {"gradient_norms": whole, "ffn_gradient_norms": last, "head_gradient": head}


@torch.inference_mode()
def stream(model: Decoder, windows: Int[Tensor, "batch length"]) -> list[float]:
    """Root mean square of a feature of the residual stream, before the first block and after each."""
    return [float(x.float().square().mean().sqrt()) for x in residual_stream(model, windows[:, :-1])]


def rate(step: int, lr: float, warmup: int) -> float:
    r"""The learning rate of a step (from 0): $\text{lr} \cdot \min(1, (\text{step}+1)/\text{warmup})$."""
    if step < 0 or warmup < 0:
        raise ValueError(f"step {step} and warmup {warmup} must be at least 0")
    return lr if warmup == 0 else lr * min(1.0, (step + 1) / warmup)


@one_thread()
def run(
    placement: str,
    depth: int,
    lr: float,
    warmup: int,
    seed: int,
    *,
    steps: int = STEPS,
    ids: Int[Tensor, " bytes"] | None = None,
) -> dict[str, Any]:
    """One stack: its gradients and stream before training, its losses in it. About 0.7 s a block on two cores.

    warmup: steps until the rate is reached; 0 begins with it.
    ids: the text as bytes; the King James Bible unless given. See `SETTINGS` for units and for `learned`.
    """
    train, held_out = split_held_out(byte_ids(king_james()) if ids is None else ids)
    windows = held_out_windows(held_out, batch=64, length=LENGTH)
    draw = partial(batches, train, batch=BATCH, length=LENGTH)
    model = make_model(placement, depth, seed)
    norms = gradients(model, next(draw(seed)))
    size = stream(model, windows[:8])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate(0, lr, warmup), betas=(0.9, 0.98))

    def next_rate(step: int, row: Row) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(step + 1, lr, warmup)

    rows = fit(model, draw(seed), next_byte_loss, steps=steps, optimizer=optimizer, on_step=next_rate)
    losses = [row["loss"] for row in rows]
    loss = measure(model.eval(), windows)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_gradient": norms["gradient_norms"][0],
        "last_gradient": norms["gradient_norms"][-1],
        "last_ffn_gradient": norms["ffn_gradient_norms"][-1],
        "held_out_loss": loss,
        "learned": loss < unigram_loss(held_out) - MARGIN,
        "diverged": not loss <= math.log(BYTES),
        "loss_curve": [sum(losses[i : i + 10]) / len(losses[i : i + 10]) for i in range(0, steps, 10)],
        **norms,
        "stream": size,
        "stream_after_training": stream(model, windows[:8]),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
) -> None:
    """Run what the file does not hold yet."""
    ids = byte_ids(king_james())
    points = [
        {"placement": placement, "depth": depth, "lr": lr, "warmup": warmup, "seed": seed}
        for depth in DEPTHS
        for lr in LEARNING_RATES[depth]
        for seed in SEEDS
        for warmup in WARMUPS
        for placement in PLACEMENTS
    ]
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points, run=partial(run, ids=ids))
    for kind in dict.fromkeys((r["placement"], r["depth"], r["lr"], r["warmup"]) for r in document["rows"]):
        rows = [r for r in document["rows"] if (r["placement"], r["depth"], r["lr"], r["warmup"]) == kind]
        losses = ", ".join(f"{row['held_out_loss'] or math.nan:.3f}" for row in rows)
        learned = sum(row["learned"] for row in rows)
        name = "{:8}  depth {:2}, lr {:5}, warmup {:2}".format(*kind)
        typer.echo(f"{name}: held-out loss {losses}; learned {learned} of {len(rows)}")


if __name__ == "__main__":
    app()
