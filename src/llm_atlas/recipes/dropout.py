"""Where dropout helps and where it costs: the runs behind chapter 17's dropout section.

One byte-level decoder, the same steps, two texts. "over": a small slice of the King James Bible, read many
times, which the model can learn by heart. "under": fresh windows of the whole text, a fraction of one epoch.

    python -m llm_atlas.recipes.dropout

writes assets/results/dropout.json; rows that are there already are not run again.
Srivastava et al. 2014, section 7 (JMLR 15); Vaswani et al. 2017, section 5.4 (arXiv 1706.03762).
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from jaxtyping import Int
from torch import Tensor

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.dropout import seed_dropout
from llm_atlas.recipes import initialize, one_thread, sweep
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import Row, fit

NAME = "dropout"
REGIMES = ("over", "under")
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)

STEPS = 800
BATCH = 8
LENGTH = 64
LR = 3e-3
SLICE = 20_000
PROBE_EVERY = 80
SETTINGS = {
    "corpus": "king-james, one token a byte",
    "held_out": "the last tenth",
    "slice": SLICE,
    "over": f"reads the {SLICE:,} bytes right before the held-out text, again and again",
    "under": "reads random windows of the nine tenths",
    "layers": 3,
    "dim": 64,
    "heads": 4,
    "hidden": 128,
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "optimizer": f"AdamW with torch's defaults; constant rate {LR}; gradient clipped to length 1",
    "probe_every": PROBE_EVERY,
    "units": "losses in nats a byte, always with dropout off; epochs: bytes read over bytes there are",
}


def make_model(p: int | float, seed: int) -> Decoder:
    """The decoder with dropout at rate `p`; the same seed gives the same weights at every rate."""
    shape = {name: SETTINGS[name] for name in ("dim", "layers", "heads", "hidden")}
    model = Decoder(DecoderConfig(vocab=BYTES, context=LENGTH, dropout=float(p), **shape))
    initialize(model, generator(seed))
    # Draws of its own, so that the windows are the same at every rate.
    seed_dropout(model, generator(1000 + seed))
    return model


def text_of(regime: str, ids: Int[Tensor, " bytes"]) -> Int[Tensor, " bytes2"]:
    """What a regime reads, from the nine tenths that may be read."""
    if regime not in REGIMES:
        raise ValueError(f"regime {regime!r} is not one of {', '.join(REGIMES)}")
    return ids[-SLICE:] if regime == "over" else ids


@one_thread()
def run(
    regime: str, p: int | float, seed: int, *, steps: int = STEPS, ids: Int[Tensor, " bytes"] | None = None
) -> dict[str, Any]:
    """One training run, its losses with dropout off on what it reads and on held-out text; some 20 s on two cores.

    ids: the text as bytes; the King James Bible unless given. See `SETTINGS` for units.
    best_step, best_held_out_loss: the lowest of the measured steps, where one that watches would stop.
    """
    train, held_out = split_held_out(byte_ids(king_james()) if ids is None else ids)
    text = text_of(regime, train)
    unseen, seen = (held_out_windows(part, batch=96, length=LENGTH) for part in (held_out, text))
    model = make_model(p, seed)
    probes: list[tuple[int, float, float]] = []

    def look(step: int, row: Row) -> None:
        if (step + 1) % PROBE_EVERY == 0 or step + 1 == steps:
            model.eval()
            probes.append((step + 1, measure(model, seen), measure(model, unseen)))
            model.train()

    fit(
        model,
        batches(text, seed, batch=BATCH, length=LENGTH),
        next_byte_loss,
        steps=steps,
        lr=LR,
        clip=1.0,
        on_step=look,
    )
    at, on_seen, on_unseen = (list(column) for column in zip(*probes, strict=True))
    best = min(range(len(at)), key=on_unseen.__getitem__)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": steps * BATCH * LENGTH / len(text),
        "train_loss": on_seen[-1],
        "held_out_loss": on_unseen[-1],
        "gap": on_unseen[-1] - on_seen[-1],
        "best_held_out_loss": on_unseen[best],
        "best_step": at[best],
        "probe_steps": at,
        "train_loss_curve": on_seen,
        "held_out_loss_curve": on_unseen,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
) -> None:
    """Run what the file does not hold yet."""
    ids = byte_ids(king_james())
    points = [{"regime": regime, "p": p, "seed": seed} for seed in SEEDS for regime in REGIMES for p in RATES]
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points, run=partial(run, ids=ids))
    for regime in REGIMES:
        for p in RATES:
            rows = [row for row in document["rows"] if (row["regime"], row["p"]) == (regime, p)]
            last, best, read = (
                ", ".join(f"{row[name]:.3f}" for row in rows)
                for name in ("held_out_loss", "best_held_out_loss", "train_loss")
            )
            typer.echo(f"{regime:5} p {p:<4}: held-out loss {last}; best {best}; on its text {read}")


if __name__ == "__main__":
    app()
