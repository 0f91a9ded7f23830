"""The house model of cross-attention: English number words to digits, "four hundred seventeen" -> "417".

A one-block encoder reads the words, a one-block decoder writes the digits, and one cross-attention head lies
between them. With one head in one layer there is nowhere else to look a word up: the alignment can be read.

    python -m llm_atlas.recipes.number_words

trains it again and writes assets/models/number-words.safetensors, and the facts about it beside it.
"""

import itertools
import json
import random
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.core.weights import load_safetensors, save_safetensors
from llm_atlas.models.inspect import hooked
from llm_atlas.nn.attention import MultiHeadAttention, attention_weights
from llm_atlas.nn.block import Block
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.feedforward import FeedForward
from llm_atlas.nn.masks import PAD, padding_mask
from llm_atlas.nn.norm import LayerNorm
from llm_atlas.nn.positions import SinusoidalPositions
from llm_atlas.recipes import environment, initialize, one_thread, warmup_then_cosine, write_json
from llm_atlas.train.loop import Row, fit

NAME = "number-words"
LARGEST = 999_999
MOST_DIGITS = 6

# fmt: off
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
WORDS = (*_SMALL, *_TENS, "hundred", "thousand")
"""The source vocabulary: a word's place is its id."""
BOS, EOS = 10, 11
"""The target vocabulary: the digits are ids 0 to 9, then the sign to begin and the sign to end."""

_WORD_IDS = {word: index for index, word in enumerate(WORDS)}


def number_words(n: int) -> list[str]:
    """A whole number from 0 to 999,999 in English words: 417 -> ["four", "hundred", "seventeen"]."""
    return [word for word, _ in _words_and_places(n)]


def word_of_digit(n: int) -> list[int | None]:
    """For each digit of `n`, which of its words says it; None for a zero that no word says.

    "seventeen" says both its digits, "twenty" only the first of its two. 20,417 -> [0, None, 2, 4, 4].
    """
    said = {place: index for index, (_, places) in enumerate(_words_and_places(n)) for place in places}
    return [said.get(place) for place in range(len(str(n)) - 1, -1, -1)]


def _words_and_places(n: int) -> list[tuple[str, tuple[int, ...]]]:
    """Each word with the places (0 for ones, 1 for tens, ...) of the digits that it says."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"number {n!r} must be an int")
    if not 0 <= n <= LARGEST:
        raise ValueError(f"number {n} must lie between 0 and {LARGEST}")
    if n == 0:
        return [("zero", (0,))]
    thousands, ones = divmod(n, 1000)
    said = [*_below_1000(thousands, 3), ("thousand", ())] if thousands else []
    return said + _below_1000(ones, 0)


def _below_1000(n: int, base: int) -> list[tuple[str, tuple[int, ...]]]:
    hundreds, rest = divmod(n, 100)
    said = [(_SMALL[hundreds], (base + 2,)), ("hundred", ())] if hundreds else []
    if rest >= 20:
        said.append((_TENS[rest // 10 - 2], (base + 1,)))
        rest %= 10
        return [*said, (_SMALL[rest], (base,))] if rest else said
    if rest >= 10:
        return [*said, (_SMALL[rest], (base + 1, base))]
    return [*said, (_SMALL[rest], (base,))] if rest else said


def held_out(n: int) -> bool:
    """Whether `n` is kept for measuring: about one number in ten, by a checksum, so the same ones everywhere.

    0 is not: no other number says "zero".
    """
    return zlib.crc32(str(n).encode()) % 10 == 0


def draw_number(rng: random.Random) -> int:
    """A number with 1 to 6 digits, each length as likely: drawn evenly, nine in ten would have six."""
    length = rng.randint(1, MOST_DIGITS)
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


def encode(text: str) -> list[int]:
    """Words to ids. Errors: ValueError for an empty text and for a word that is not in `WORDS`."""
    words = text.split()
    if not words:
        raise ValueError("text is empty: give number words such as 'forty two'")
    unknown = next((word for word in words if word not in _WORD_IDS), None)
    if unknown is not None:
        raise ValueError(f"word {unknown!r} is not a number word; use small letters, no hyphen, no 'and'")
    return [_WORD_IDS[word] for word in words]


def decode(ids: Sequence[int]) -> str:
    """Ids of digits to a string, up to the end sign; what is no digit is left out."""
    return "".join(str(i) for i in itertools.takewhile(lambda i: i != EOS, ids) if i < 10)


@dataclass(frozen=True, kw_only=True)
class NumberWordsConfig:
    """Sizes of the model."""

    dim: int = 64
    heads: int = 4
    cross_heads: int = 1
    hidden: int = 128


class NumberWords(nn.Module):
    """Encoder and decoder of one block each; the decoder's cross-attention reads the encoder's output.

    Vaswani et al. 2017, section 3.1 (arXiv 1706.03762), with the norms before the sublayers.
    """

    def __init__(self, config: NumberWordsConfig | None = None) -> None:
        super().__init__()
        config = NumberWordsConfig() if config is None else config
        self.config = config
        dim = config.dim
        norm = partial(LayerNorm, dim)
        self.positions = SinusoidalPositions(dim)
        self.words = nn.Embedding(len(WORDS), dim)
        self.encoder = Block(
            MultiHeadAttention(dim, config.heads, causal=False), FeedForward(dim, config.hidden), norm
        )
        self.encoder_norm = norm()
        self.digits = nn.Embedding(12, dim)
        self.decoder = Block(
            MultiHeadAttention(dim, config.heads),
            FeedForward(dim, config.hidden),
            norm,
            cross=MultiHeadAttention(dim, config.cross_heads, context_dim=dim, causal=False),
        )
        self.decoder_norm = norm()

    def read(
        self, ids: Int[Tensor, "batch words"], positions: Int[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words dim"]:
        """The encoder: one vector a word. Padding has position -1 and nobody looks at it."""
        x = self.positions.embed(self.words(ids), positions)
        return self.encoder_norm(self.encoder(x, positions=positions, mask=padding_mask(positions)))

    def write(
        self,
        ids: Int[Tensor, "batch digits"],
        context: Float[Tensor, "batch words dim"],
        context_mask: Bool[Tensor, "batch 1 1 words"],
        cache: KVCache | None = None,
        context_cache: KVCache | None = None,
    ) -> Float[Tensor, "batch digits vocab"]:
        """The decoder: logits for the digit after each digit, tied to the digits' embedding.

        With the caches, `ids` are only the newest digits: `cache` keeps the keys and values of the digits
        before, `context_cache` those of the words, which are computed at the first call and never again.
        """
        past = 0 if cache is None else cache[0].length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        x = self.positions.embed(self.digits(ids), positions)
        x = self.decoder(
            x,
            positions=positions,
            context=context,
            context_mask=context_mask,
            cache=None if cache is None else cache[0],
            context_cache=None if context_cache is None else context_cache[0],
        )
        return functional.linear(self.decoder_norm(x), self.digits.weight)

    def forward(
        self,
        ids: Int[Tensor, "batch words"],
        positions: Int[Tensor, "batch words"],
        target: Int[Tensor, "batch digits"],
    ) -> Float[Tensor, "batch digits vocab"]:
        """Read the words, then write with the right digits before each (teacher forcing)."""
        return self.write(target, self.read(ids, positions), padding_mask(positions))


def pad_words(
    rows: Sequence[Sequence[int]], *, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "batch words"], Int[Tensor, "batch words"]]:
    """Rows of word ids -> (ids, positions), padded on the right with position -1."""
    longest = max(len(row) for row in rows)
    ids = [[*row, *[0] * (longest - len(row))] for row in rows]
    positions = [[*range(len(row)), *[PAD] * (longest - len(row))] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(positions, device=device)


@torch.inference_mode()
def translate(model: NumberWords, texts: Sequence[str], *, cached: bool = True) -> list[str]:
    """Write the digits of each text, greedily, all texts at once.

    cached: keep the keys and values of the words and of the digits before; else compute them again each step.
    A model that never ends is cut off after eight digits.
    """
    device = model.words.weight.device
    ids, positions = pad_words([encode(text) for text in texts], device=device)
    context, mask = model.read(ids, positions), padding_mask(positions)
    caches = (KVCache(1), KVCache(1)) if cached else (None, None)
    written = torch.full((len(texts), 1), BOS, device=device)
    for _ in range(MOST_DIGITS + 2):
        new = written[:, -1:] if cached else written
        logits = model.write(new, context, mask, *caches)[:, -1]
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], dim=1)
        if bool((written == EOS).any(1).all()):
            break
    return [decode(row) for row in written[:, 1:].tolist()]


class Alignment(NamedTuple):
    """`matrix[i, j]` is how much digit i looked at word j when it was chosen; every row adds up to 1."""

    digits: list[str]
    words: list[str]
    matrix: Float[Tensor, "digits words"]


@torch.inference_mode()
def alignments(model: NumberWords, texts: Sequence[str]) -> list[Alignment]:
    """The cross-attention weights while the model writes out each text by itself, seen through a hook.

    float32 on the CPU, the mean of the heads. Row i is the query that chose digit i, one place before it.
    """
    device = model.words.weight.device
    maps: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        maps.append(attention_weights(args[0], args[1], mask=kwargs["mask"]).mean(1).float().cpu())

    written = translate(model, texts)
    ids, positions = pad_words([encode(text) for text in texts], device=device)
    longest = max(len(digits) for digits in written)
    target = [[BOS, *map(int, digits), *[EOS] * (longest - len(digits))] for digits in written]
    with hooked([(model.decoder.cross.sublayer.attend, record)], before=True):
        model(ids, positions, torch.tensor(target, device=device))
    found = []
    for digits, text, weights in zip(written, texts, maps[0], strict=True):
        words = text.split()
        found.append(Alignment(list(digits), words, weights[: len(digits), : len(words)]))
    return found


def alignment(model: NumberWords, text: str) -> Alignment:
    """`alignments` of one text."""
    return alignments(model, [text])[0]


def alignment_share(model: NumberWords, numbers: Sequence[int]) -> tuple[float, int]:
    """(share, count): of `count` digits that a word says, the share that looks most at that very word.

    Digits that no word says (the zeros in 20,005) are not counted. See `word_of_digit`.
    """
    right = total = 0
    texts = [" ".join(number_words(n)) for n in numbers]
    for n, found in zip(numbers, alignments(model, texts), strict=True):
        looked = found.matrix.argmax(-1).tolist()
        for index, word in enumerate(word_of_digit(n)):
            if word is not None:
                total += 1
                right += index < len(looked) and looked[index] == word
    return right / total, total


def accuracy(model: NumberWords, numbers: Sequence[int]) -> float:
    """Share of `numbers` whose digits all come out right, with nothing behind them."""
    right = 0
    for start in range(0, len(numbers), 1000):
        part = numbers[start : start + 1000]
        written = translate(model, [" ".join(number_words(n)) for n in part])
        right += sum(text == str(n) for text, n in zip(written, part, strict=True))
    return right / len(numbers)


class Batch(NamedTuple):
    """Words, their positions, and the digits with BOS before and EOS (then PAD) behind."""

    ids: Int[Tensor, "batch words"]
    positions: Int[Tensor, "batch words"]
    target: Int[Tensor, "batch digits"]


def make_batch(numbers: Sequence[int], *, device: torch.device | str | None = None) -> Batch:
    """Numbers as the model is trained on them."""
    words = [[_WORD_IDS[word] for word in number_words(n)] for n in numbers]
    ids, positions = pad_words(words, device=device)
    rows = [[BOS, *map(int, str(n)), EOS] for n in numbers]
    longest = max(len(row) for row in rows)
    target = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=device)
    return Batch(ids, positions, target)


def training_batches(seed: int, batch: int, device: torch.device | str | None = None) -> Iterator[Batch]:
    """Endless batches of numbers that are not held out."""
    rng = random.Random(seed)
    drawn = (n for n in iter(lambda: draw_number(rng), None) if not held_out(n))
    while True:
        yield make_batch(list(itertools.islice(drawn, batch)), device=device)


def sequence_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of every next digit and of the end sign, in nats."""
    logits = model(batch.ids, batch.positions, batch.target[:, :-1].clamp(min=0))
    return functional.cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=PAD), {}


def held_out_numbers(count: int, seed: int = 12345) -> list[int]:
    """`count` different held-out numbers, lengths spread as in training."""
    rng = random.Random(seed)
    found: dict[int, None] = {}
    while len(found) < count:
        n = draw_number(rng)
        if held_out(n):
            found[n] = None
    return list(found)


@one_thread()
def train(
    *,
    steps: int = 3000,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    config: NumberWordsConfig | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> tuple[NumberWords, list[Row]]:
    """A newly trained model, and the row of every step: AdamW, 5% warm-up, then a half cosine to zero."""
    model = NumberWords(config)
    initialize(model, generator(seed))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))
    rows = fit(
        model,
        training_batches(seed, batch, device),
        sequence_loss,
        steps=steps,
        optimizer=optimizer,
        clip=1.0,
        require_finite=True,
        on_step=lambda step, row: schedule.step(),
        progress=progress,
    )
    return model.eval(), rows


def load_number_words(path: Path | None = None, *, device: torch.device | str = "cpu") -> NumberWords:
    """The trained model, in eval mode; give it to `translate` and `alignment`.

    From the package's own files, or from `path` and the .json beside it.
    """
    path = bundled(f"models/{NAME}.safetensors") if path is None else path
    config = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["settings"]["config"]
    model = NumberWords(NumberWordsConfig(**config))
    model.load_state_dict(load_safetensors(path, device=device))
    return model.to(device).eval()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("assets/models"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    held_out_count: Annotated[int, typer.Option(help="How many held-out numbers to measure on.")] = 3000,
    every: Annotated[bool, typer.Option(help="Try every held-out number too, about 100,000.")] = True,
) -> None:
    """Train the model, measure it on numbers it never saw, and write it with the facts about it."""
    config, batch, lr = NumberWordsConfig(), 64, 3e-3
    start = time.perf_counter()
    model, rows = train(steps=steps, batch=batch, lr=lr, seed=seed, config=config)
    seconds = time.perf_counter() - start
    spread = held_out_numbers(held_out_count)
    share, counted = alignment_share(model, spread[:1000])
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(rows[-1]["loss"], 6),
        "held_out_accuracy": round(accuracy(model, spread), 6),
        "held_out_numbers": len(spread),
        "alignment_share": round(share, 6),
        "alignment_digits": counted,
        "training_seconds": round(seconds),
    }
    if every:
        all_of_them = [n for n in range(LARGEST + 1) if held_out(n)]
        results["every_held_out_wrong"] = round(len(all_of_them) * (1 - accuracy(model, all_of_them)))
        results["every_held_out_number"] = len(all_of_them)
    facts = {
        "recipe": NAME,
        **environment(NAME),
        "seeds": [seed],
        "settings": {
            "config": asdict(config),
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "data": "numbers of 1 to 6 digits, each length as likely; one in ten held out by its checksum",
        },
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_safetensors(model.state_dict(), out / f"{NAME}.safetensors", {"recipe": NAME})
    write_json(out / f"{NAME}.json", facts)
    typer.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    app()
