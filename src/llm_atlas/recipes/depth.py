"""How deep a stack can be and still learn, with residual connections and without (chapter 1).

Byte-level decoders of 4 to 120 blocks on the King James Bible. Without the residual connections a block
passes on what its sublayers return and nothing else; weights, data and learning rate are the same.

    python -m llm_atlas.recipes.depth

writes assets/results/depth.json; rows that are there already are not run again.
He et al. 2015, sections 1 and 4.2 (arXiv 1512.03385); Dong et al. 2021, section 2 (arXiv 2103.03404).
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.block import Residual
from llm_atlas.recipes import initialize, one_thread, sweep
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import fit

NAME = "depth"
DEPTHS = (4, 16, 64, 120)
OTHER_RATES = {4: (1e-3, 1e-2), 16: (1e-3, 1e-2)}
"""Other learning rates, where they cost little: is it the rate that stops a stack from learning?"""
SEEDS = (0, 1, 2)

STEPS = 100
BATCH = 8
LENGTH = 32
LR = 3e-3
SETTINGS = {
    "corpus": "king-james, one token a byte",
    "held_out": "the last tenth",
    "dim": 32,
    "heads": 2,
    "hidden": 64,
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "optimizer": "AdamW with torch's defaults; constant rate, no warm-up; gradient clipped to length 1",
    "units": "losses in nats a byte; gradient norms at the first step, over all parameters of a block",
}


class Plain(nn.Module):
    r"""A sublayer without its residual connection: $f(\operatorname{norm}(x))$, and no $x$ added to it."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.norm, self.sublayer = residual.norm, residual.sublayer

    def forward(self, x: Float[Tensor, "batch seq dim"], **how) -> Float[Tensor, "batch seq dim"]:
        """`how` goes to the sublayer as it is."""
        return self.sublayer(self.norm(x), **how)


def make_model(depth: int, seed: int, *, residual: bool = True) -> Decoder:
    """A decoder of `depth` pre-norm blocks; its weights are the same with and without `residual`."""
    shape = {name: SETTINGS[name] for name in ("dim", "heads", "hidden")}
    model = Decoder(DecoderConfig(vocab=BYTES, layers=depth, context=LENGTH, **shape))
    initialize(model, generator(seed))
    if not residual:
        for block in model.blocks:
            block.mixer, block.feedforward = Plain(block.mixer), Plain(block.feedforward)
    return model


def gradient_norms(model: Decoder, windows: Int[Tensor, "batch length"]) -> list[float]:
    """Length of the loss's gradient in the parameters of each block, from the first to the last."""
    model.zero_grad()
    next_byte_loss(model, windows)[0].backward()
    # In float64: without residuals the squares of a deep stack's gradients leave the range of float32.
    norms = [
        float(torch.stack([p.grad.double().norm() for p in block.parameters()]).norm())
        for block in model.blocks
    ]
    model.zero_grad()
    return norms


@torch.inference_mode()
def similarity(model: Decoder, windows: Int[Tensor, "batch length"]) -> float:
    """Mean cosine between the vectors of a window's different tokens at the end: at 1 all are the same."""
    x = nn.functional.normalize(model.hidden(windows[:, :-1]), dim=-1)
    cosines = x @ x.transpose(-2, -1)
    n = x.shape[1]
    return float((cosines.sum((-2, -1)) - n).mean() / (n * (n - 1)))


@one_thread()
def run(
    depth: int,
    residual: bool,
    seed: int,
    *,
    lr: float = LR,
    steps: int = STEPS,
    ids: Int[Tensor, " bytes"] | None = None,
) -> dict[str, Any]:
    """One stack: its gradients and token similarity before training, its loss after `steps`.

    About 0.3 s a block on two cores. ids: the text as bytes; the King James Bible unless given.
    """
    train, held_out = split_held_out(byte_ids(king_james()) if ids is None else ids)
    windows = held_out_windows(held_out, batch=64, length=LENGTH)
    draw = partial(batches, train, batch=BATCH, length=LENGTH)
    model = make_model(depth, seed, residual=residual)
    norms = gradient_norms(model, next(draw(seed)))
    alike = similarity(model, windows)
    rows = fit(model, draw(seed), next_byte_loss, steps=steps, lr=lr, clip=1.0)
    losses = [row["loss"] for row in rows]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_gradient": norms[0],
        "last_gradient": norms[-1],
        "gradient_ratio": norms[0] / norms[-1],
        "similarity_at_start": alike,
        "train_loss": sum(losses[-10:]) / len(losses[-10:]),
        "held_out_loss": measure(model.eval(), windows),
        "loss_curve": [sum(losses[i : i + 10]) / len(losses[i : i + 10]) for i in range(0, steps, 10)],
        "gradient_norms": norms,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
) -> None:
    """Run what the file does not hold yet."""
    ids = byte_ids(king_james())
    points = [
        {"depth": depth, "residual": residual, "lr": lr, "seed": seed}
        for depth in DEPTHS
        for lr in (LR, *OTHER_RATES.get(depth, ()))
        for seed in SEEDS
        for residual in (True, False)
    ]
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points, run=partial(run, ids=ids))
    kinds = dict.fromkeys((row["depth"], row["lr"], row["residual"]) for row in document["rows"])
    for kind in kinds:
        rows = [row for row in document["rows"] if (row["depth"], row["lr"], row["residual"]) == kind]
        losses = ", ".join(f"{row['held_out_loss'] or math.nan:.3f}" for row in rows)
        ratios = ", ".join(f"{row['gradient_ratio'] or math.nan:.2g}" for row in rows)
        name = "depth {}, lr {}, residual {}".format(*kind)
        typer.echo(f"{name}: held-out loss {losses}; first/last gradient {ratios}")


if __name__ == "__main__":
    app()
