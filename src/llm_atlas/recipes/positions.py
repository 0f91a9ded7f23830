"""Train short, test long: every kind of position in one small model (chapter 2).

Byte-level decoders on windows of 64 bytes of the King James Bible, then measured on windows of up to 512. Data,
steps and first weights are the same; only the positions differ.

    python -m llm_atlas.recipes.positions

writes assets/results/positions.json, and the model without positions of seed 0 to
assets/models/nope-bytes.safetensors; rows that are there already are not run again.
Press et al. 2021, section 2 (arXiv 2108.12409); Kazemnejad et al. 2023 (arXiv 2305.19466).
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.core.weights import load_safetensors, save_safetensors
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import load_weights
from llm_atlas.models.inspect import hooked, mixer, position_probe, residual_stream
from llm_atlas.nn.positions import RelativePositionBias, ShawPositions
from llm_atlas.recipes import initialize, one_thread, sweep, warmup_then_cosine
from llm_atlas.recipes.byte_models import batches, held_out_windows, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import fit

NAME = "positions"
NOPE = "nope-bytes"

LENGTH = 64

METHODS: dict[str, dict[str, Any]] = {
    "nope": {"positions": "none"},
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned"},
    "rope": {"positions": "rotary"},
    "rope+nope": {"positions": "rotary", "nope_layers": (1,)},
    "alibi": {"positions": "alibi"},
    # T5's own 32 buckets up to 128 would leave some that training at this length never sees.
    "t5": {"positions": "t5", "relative_buckets": 16, "relative_distance": LENGTH // 2},
    "shaw": {"positions": "shaw"},
}
"""What each method changes in the configuration."""
SEEDS = (0, 1, 2)

LENGTHS = (64, 80, 96, 128, 256, 512)
"""Bytes that a model reads when it is measured; it was trained on the first of them."""
LAST = 32
"""So many bytes at the end of a window are scored: at every length the very same ones."""
BUCKETS = 32
WINDOWS = 128
STEPS = 1000
BATCH = 16
LR = 3e-3
SETTINGS = {
    "methods": METHODS,
    "corpus": "king-james, one token a byte",
    "held_out": "the last tenth",
    "layers": 3,
    "dim": 64,
    "heads": 4,
    "hidden": 128,
    "length": LENGTH,
    "lengths": LENGTHS,
    "last": LAST,
    "buckets": BUCKETS,
    "windows": WINDOWS,
    "batch": BATCH,
    "steps": STEPS,
    "lr": LR,
    "optimizer": "AdamW, weight decay 0.01; 5% warm-up, then a half cosine to zero; gradient clipped to length 1",
    "units": "losses in nats a byte; probe errors in positions; biases in logits",
}


def make_model(method: str, seed: int, *, context: int | None = None) -> Decoder:
    """A decoder with the positions of `method`; all weights but those of the positions are the same for all.

    A learnt vector of a position is drawn as those of tokens; the tables of T5 and Shaw begin with zeros, so that
    at first every distance is as good as any other.

    `context` is the longest input: the longest of `LENGTHS` unless given, and the trained length for learned
    positions, which have a vector for each of these and none beyond. Errors: ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if context is None:
        context = LENGTH if method == "learned" else LENGTHS[-1]
    shape = {name: SETTINGS[name] for name in ("layers", "dim", "heads", "hidden")}
    config = partial(DecoderConfig, vocab=BYTES, context=context, tied=False, **shape)
    plain = Decoder(config(positions="none"))
    initialize(plain, generator(seed), embedding_std=1.0)
    model = Decoder(config(**METHODS[method]))
    initialize(model, generator(seed + 1000), embedding_std=1.0)
    scheme = model.attention_positions
    if isinstance(scheme, RelativePositionBias | ShawPositions):
        torch.nn.init.zeros_(scheme.table.weight)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


@torch.inference_mode()
def byte_losses(
    model: Decoder, windows: Int[Tensor, "batch length"], *, rows: int = 32
) -> Float[Tensor, "batch predicted"]:
    """Loss of every byte but the first, in nats; `rows` windows at a time."""
    found = []
    for part in windows.split(rows):
        logits = model(part[:, :-1])
        found.append(functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(found)


def losses_by_length(model: Decoder, windows: Int[Tensor, "batch length"]) -> list[float | None]:
    """Mean loss of each window's last `LAST` bytes when the model reads only so many bytes before their end.

    One number for each of `LENGTHS`; None where the model has no positions for that many.
    """
    return [
        float(byte_losses(model, windows[:, -length - 1 :])[:, -LAST:].mean())
        if length <= model.config.context
        else None
        for length in LENGTHS
    ]


def losses_by_position(model: Decoder, windows: Int[Tensor, "batch length"]) -> list[float] | None:
    """Mean loss in `BUCKETS` equal stretches of the longest window; None where the model cannot read it."""
    if windows.shape[1] - 1 > model.config.context:
        return None
    return byte_losses(model, windows).unflatten(1, (BUCKETS, -1)).mean((0, 2)).tolist()


@torch.inference_mode()
def probe(
    model: Decoder, windows: Int[Tensor, "batch length"], *, mask: Bool[Tensor, "1 1 seq seq"] | None = None
) -> tuple[list[float], list[float]]:
    """(R squared, mean error) of a linear probe for the position, at each point of the residual stream."""
    stream = residual_stream(model, windows[:, :-1], mask=mask)
    found = [position_probe(states, torch.arange(states.shape[1])) for states in stream]
    return [probe.r2 for probe in found], [probe.error for probe in found]


@torch.inference_mode()
def bias_curves(model: Decoder, windows: Int[Tensor, "batch length"]) -> list[list[list[float]]] | None:
    """What a learnt scheme adds to the logits at the distances 0, -1, -2, ...: layers x heads x distances.

    T5: one layer, since all share it. Shaw: the mean over the queries of `windows`, since it depends on them; the
    last distance stands for all beyond. None for the other methods.
    """
    scheme = model.attention_positions
    if isinstance(scheme, RelativePositionBias):
        return [scheme.of_distance(-torch.arange(scheme.max_distance + 1)).T.tolist()]
    if not isinstance(scheme, ShawPositions):
        return None
    back = -torch.arange(scheme.max_distance + 1)[None]
    curves: list[list[list[float]]] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        q = args[0]
        at = torch.zeros(1, q.shape[2], dtype=torch.long)
        curves.append(scheme.bias(q, at, back).mean((0, 2)).tolist())

    with hooked([(mixer(model, i).attend, record) for i in range(len(model.blocks))], before=True):
        model.hidden(windows[:, :-1])
    return curves


@one_thread()
def train(
    method: str,
    seed: int,
    *,
    steps: int = STEPS,
    stop: int | None = None,
    ids: Int[Tensor, " bytes"] | None = None,
    context: int | None = None,
) -> tuple[Decoder, list[float]]:
    """A newly trained model in eval mode, and its training loss, mean over each tenth of the steps.

    stop: only so many of the steps are taken, with the learning rates of the whole. context: see `make_model`.
    """
    train, _ = split_held_out(byte_ids(king_james()) if ids is None else ids)
    model = make_model(method, seed, context=context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))
    rows = fit(
        model,
        batches(train, seed, batch=BATCH, length=LENGTH),
        next_byte_loss,
        steps=steps if stop is None else min(stop, steps),
        optimizer=optimizer,
        clip=1.0,
        on_step=lambda step, row: schedule.step(),
    )
    losses = torch.tensor([row["loss"] for row in rows])
    return model.eval(), [float(part.mean()) for part in losses.split(math.ceil(steps / 10))]


@one_thread()
def run(
    method: str,
    seed: int,
    *,
    steps: int = STEPS,
    ids: Int[Tensor, " bytes"] | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """One model: trained at one length and measured at all, see `measure`. About a minute on one core.

    probe_r2_untrained: the probe on the model's first weights; loss_curve: the training loss, mean over each tenth
    of the steps.
    ids: the text as bytes; the King James Bible unless given. save: a file to keep the model's weights in.
    """
    ids = byte_ids(king_james()) if ids is None else ids
    model, curve = train(method, seed, steps=steps, ids=ids)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(dict(model.named_parameters()), save, {"recipe": NAME, "method": method})
    windows = held_out_windows(split_held_out(ids)[1], batch=WINDOWS, length=LENGTHS[-1])
    untrained = probe(make_model(method, seed).eval(), windows[:, -LENGTH - 1 :])[0]
    return measure(model, windows) | {"probe_r2_untrained": untrained, "loss_curve": curve}


def measure(model: Decoder, windows: Int[Tensor, "batch length"]) -> dict[str, Any]:
    """What a row says of a trained model, on `windows` of the longest length.

    held_out_loss:       of all bytes of windows of the trained length
    loss_by_length:      of the last `LAST` bytes, for each of `LENGTHS` (see `losses_by_length`)
    loss_by_position:    in `BUCKETS` stretches of the longest window
    probe_r2, _error:    of the position, at each point of the residual stream, at the trained length
    probe_r2_unmasked:   the same where every token sees every other one
    bias_curves:         see there
    A number that a method cannot have is None.
    """
    short = windows[:, -LENGTH - 1 :]
    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    r2, error = probe(model, short)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": float(byte_losses(model, short).mean()),
        "loss_by_length": losses_by_length(model, windows),
        "loss_by_position": losses_by_position(model, windows),
        "probe_r2": r2,
        "probe_error": error,
        "probe_r2_unmasked": probe(model, short, mask=everything)[0],
        "bias_curves": bias_curves(model, short),
    }


def load_nope(path: Path | None = None, *, device: torch.device | str = "cpu") -> Decoder:
    """The trained byte model without positions (seed 0 of the sweep), in eval mode. It reads up to 512 bytes.

    From the package's own files, or from `path`.
    """
    path = bundled(f"models/{NOPE}.safetensors") if path is None else path
    model = make_model("nope", 0)
    load_weights(model, load_safetensors(path, device=device))
    return model.to(device).eval()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
    models: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("assets/models"),
) -> None:
    """Run what the files do not hold yet."""
    ids = byte_ids(king_james())
    points = [{"method": method, "seed": seed} for seed in SEEDS for method in METHODS]
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}

    def point(method: str, seed: int) -> dict[str, Any]:
        kept = models / f"{NOPE}.safetensors" if (method, seed) == ("nope", 0) else None
        return run(method, seed, ids=ids, save=kept)

    document = sweep(out, recipe=NAME, settings=settings, points=points, run=point)
    for method in METHODS:
        rows = [row for row in document["rows"] if row["method"] == method]
        for length, *losses in zip(LENGTHS, *(row["loss_by_length"] for row in rows), strict=True):
            shown = ", ".join("none" if loss is None else f"{loss:.3f}" for loss in losses)
            typer.echo(f"{method}, {length} bytes: loss of the last {LAST}: {shown}")


if __name__ == "__main__":
    app()
