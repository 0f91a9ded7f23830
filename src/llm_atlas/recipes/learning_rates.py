"""What a norm on queries and keys does at high learning rates: the runs behind chapter 1's QK-norm section.

A small byte-level decoder on the King James Bible, trained at learning rates up to where it breaks. Three
variants start from the same weights: norms before the sublayers, the same with QK-norm, and no norms at all.

    python -m llm_atlas.recipes.learning_rates

writes assets/results/learning-rates.json; rows that are there already are not run again.
Dehghani et al. 2023, section 2 (arXiv 2302.05442); Wortsman et al. 2023, section 3.1 (arXiv 2309.14322).
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Int
from torch import Tensor, nn

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.inspect import hooked, mixer
from llm_atlas.nn.attention import attention_weights
from llm_atlas.nn.masks import causal_mask
from llm_atlas.recipes import initialize, one_thread, sweep
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import Row, fit

NAME = "learning-rates"
VARIANTS = ("pre-norm", "pre-norm + QK-norm", "no norm")
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (0, 1, 2)

STEPS = 150
BATCH = 8
LENGTH = 64
PROBE_EVERY = 15
SETTINGS = {
    "corpus": "king-james, one token a byte",
    "held_out": "the last tenth",
    "layers": 3,
    "dim": 64,
    "heads": 4,
    "hidden": 128,
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "optimizer": "AdamW with torch's defaults; constant rate, no warm-up, no clipping",
    "probe_every": PROBE_EVERY,
    "units": "losses in nats a byte; entropy as a share of its largest value, the log of the visible keys",
}


def make_model(variant: str, seed: int) -> Decoder:
    """The decoder of a variant; the same seed gives the same weights in all of them."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    shape = {name: SETTINGS[name] for name in ("dim", "layers", "heads", "hidden")}
    model = Decoder(DecoderConfig(vocab=BYTES, context=LENGTH, qk_norm=variant == VARIANTS[1], **shape))
    initialize(model, generator(seed))
    if variant == "no norm":
        # Surgery from outside: a model without norms is an experiment, not a kind of Decoder.
        for block in model.blocks:
            block.mixer.norm = nn.Identity()
            block.feedforward.norm = nn.Identity()
        model.norm = nn.Identity()
    return model


@torch.inference_mode()
def probe(model: Decoder, ids: Int[Tensor, "batch seq"]) -> tuple[float, float]:
    """(largest attention logit, mean attention entropy) over all layers, heads and pairs that may be seen.

    The logit is |q . k| times the scale, before the softmax. The entropy of a row is divided by the log
    of how many keys it sees: 1 is attention spread evenly, 0 all of it on one key. The first query, which has
    no choice, is left out.
    """
    largest: list[Tensor] = []
    entropies: list[Tensor] = []
    seen = causal_mask(ids.shape[1], device=ids.device)
    most = seen.sum(-1)[1:].log()

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        q, k, _ = args
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        largest.append(scores.abs().masked_fill(~seen, 0).amax())
        weights = attention_weights(q, k, is_causal=True)
        entropies.append((torch.special.entr(weights).sum(-1)[..., 1:] / most).mean())

    with hooked([(mixer(model, layer).attend, record) for layer in range(len(model.blocks))], before=True):
        model.hidden(ids)
    return float(torch.stack(largest).amax()), float(torch.stack(entropies).mean())


@one_thread()
def run(
    variant: str, lr: float, seed: int, *, steps: int = STEPS, ids: Int[Tensor, " bytes"] | None = None
) -> dict[str, Any]:
    """One training run, and what is recorded of it; some five seconds for 150 steps on two cores.

    ids: the text as bytes; the King James Bible unless given. See `SETTINGS` for units.
    diverged: the model ended worse than guessing evenly among 256 bytes (5.55 nats), or at no number at all.
    """
    train, held_out = split_held_out(byte_ids(king_james()) if ids is None else ids)
    windows = held_out_windows(held_out, batch=64, length=LENGTH)
    model = make_model(variant, seed)
    probes = [(0, *probe(model, windows[:4, :-1]))]

    def look(step: int, row: Row) -> None:
        if (step + 1) % PROBE_EVERY == 0:
            probes.append((step + 1, *probe(model, windows[:4, :-1])))

    rows = fit(
        model,
        batches(train, seed, batch=BATCH, length=LENGTH),
        next_byte_loss,
        steps=steps,
        lr=lr,
        on_step=look,
    )
    losses = [row["loss"] for row in rows]
    loss = measure(model.eval(), windows)
    probe_steps, logits, entropies = (list(column) for column in zip(*probes, strict=True))
    return {
        "held_out_loss": loss,
        "bits_per_byte": loss / math.log(2),
        "diverged": not loss <= math.log(BYTES),
        "largest_logit": logits[-1],
        "entropy": entropies[-1],
        "loss_curve": [sum(losses[i : i + 10]) / len(losses[i : i + 10]) for i in range(0, steps, 10)],
        "probe_steps": probe_steps,
        "largest_logit_curve": logits,
        "entropy_curve": entropies,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
) -> None:
    """Run what the file does not hold yet."""
    ids = byte_ids(king_james())
    points = [
        {"variant": variant, "lr": lr, "seed": seed}
        for seed in SEEDS
        for lr in LEARNING_RATES
        for variant in VARIANTS
    ]
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points, run=partial(run, ids=ids))
    for variant in VARIANTS:
        for lr in LEARNING_RATES:
            rows = [row for row in document["rows"] if (row["variant"], row["lr"]) == (variant, lr)]
            losses = ", ".join(f"{row['held_out_loss'] or math.nan:.3f}" for row in rows)
            typer.echo(f"{variant:20} {lr:<6} held-out loss {losses}")


if __name__ == "__main__":
    app()
