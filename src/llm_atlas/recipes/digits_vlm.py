"""Small vision-language models that answer questions about pictures of digits (chapter 3).

The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each, a fifth of them held out. One or two images and a
question in words go in ("which is larger ?"), an answer in words comes out. As in the papers the vision tower learns
first and alone, here to tell digits apart; then it, a new decoder and what joins them learn from answers. Three ways:
patches as tokens ("splice"), layers that look across ("cross"), and the first of them on blank images ("blind"), which
can learn no more than what is answered how often.

    python -m llm_atlas.recipes.digits_vlm

writes assets/results/digits-vlm.json, and the first two of seed 0 to assets/models/digits-vlm-splice.safetensors and
digits-vlm-cross.safetensors, each with the facts about it beside it; rows that are there already are not run again.
Liu et al. 2023 (arXiv 2304.08485); Alayrac et al. 2022 (arXiv 2204.14198). The digits: Alpaydin and Kaynak 1998, UCI.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.core.weights import load_safetensors, save_safetensors
from llm_atlas.infer.generate import generate
from llm_atlas.models.decoder import DecoderConfig
from llm_atlas.models.families import load_weights
from llm_atlas.models.vision import ImageClassifier, VisionConfig
from llm_atlas.models.vision_language import (
    CrossVisionLanguage,
    CrossVisionLanguageConfig,
    VisionLanguage,
    VisionLanguageConfig,
    spread_images,
)
from llm_atlas.nn.masks import left_pad
from llm_atlas.recipes import environment, initialize, one_thread, sweep, warmup_then_cosine, write_json
from llm_atlas.train.loop import fit

NAME = "digits-vlm"

IMAGE, END = "<image>", "<end>"
# fmt: off
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]
# fmt: on
QUESTIONS: dict[str, str] = {
    "digit": f"{IMAGE} which digit is this ?",
    "even": f"{IMAGE} is it even ?",
    "greater": f"{IMAGE} is it greater than four ?",
    "same": f"{IMAGE} {IMAGE} are they the same digit ?",
    "larger": f"{IMAGE} {IMAGE} which is larger ?",
    "sum": f"{IMAGE} {IMAGE} what is the sum ?",
}
"""What is asked, by kind. Each image stands where its sign does."""
ANSWERS: dict[str, Callable[..., str]] = {
    "digit": lambda a: NUMBERS[a],
    "even": lambda a: "yes" if a % 2 == 0 else "no",
    "greater": lambda a: "yes" if a > 4 else "no",
    "same": lambda a, b: "yes" if a == b else "no",
    "larger": lambda a, b: "first" if a > b else "second",
    "sum": lambda a, b: NUMBERS[a + b],
}
WORDS = tuple(
    dict.fromkeys(
        [END, IMAGE, *" ".join(QUESTIONS.values()).split(), *NUMBERS, "yes", "no", "first", "second"]
    )
)
"""The vocabulary: a word's place is its id."""
_IDS = {word: index for index, word in enumerate(WORDS)}
END_ID, IMAGE_ID = _IDS[END], _IDS[IMAGE]

SHARES = {"digit": 3, "even": 1, "greater": 1, "same": 2, "larger": 2, "sum": 3}
"""How often each kind is asked in training: those with more answers, which say more about an image, more often."""
BLACK = -1.0
METHODS = ("splice", "cross", "blind")
SEEDS = (0, 1, 2)
HELD_OUT = 360
TOWER_STEPS = 600
STEPS = 1200
BATCH = 48
LR = 2e-3
SETTINGS = {
    "methods": METHODS,
    "questions": QUESTIONS,
    "shares": SHARES,
    "data": "scikit-learn digits, 1,797 images of 8 x 8; training images shifted by up to one pixel",
    "held_out": HELD_OUT,
    "image": 8,
    "patch": 2,
    "dim": 64,
    "heads": 4,
    "hidden": 128,
    "vision_layers": 2,
    "layers": 3,
    "tower_steps": TOWER_STEPS,
    "steps": STEPS,
    "batch": BATCH,
    "lr": LR,
    "optimizer": "AdamW, weight decay 0.01; 5% warm-up, then a half cosine to zero; gradient clipped to length 1",
    "units": "accuracies as shares, one a kind of question, in their order; losses in nats a word",
}

VLM = VisionLanguage | CrossVisionLanguage


class Digits(NamedTuple):
    """Images (digits, 1, 8, 8) with pixels from -1 (black) to 1 (white), and what each shows."""

    images: Float[Tensor, "digits 1 8 8"]
    labels: Int[Tensor, " digits"]


def load_digits() -> Digits:
    """All 1,797 digits that come with scikit-learn, in its order. Errors: ImportError where it is not installed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return Digits(images, torch.tensor(found.target, dtype=torch.long))


def split_digits(digits: Digits) -> tuple[Digits, Digits]:
    """(training, held out): `HELD_OUT` images drawn once for all, by a seed, from everywhere in the set."""
    order = torch.randperm(len(digits.labels), generator=generator(12345))
    parts = order[HELD_OUT:], order[:HELD_OUT]
    return tuple(Digits(digits.images[part], digits.labels[part]) for part in parts)


def encode(text: str) -> list[int]:
    """Words to ids. Errors: ValueError for a word that is not in `WORDS`."""
    unknown = next((word for word in text.split() if word not in _IDS), None)
    if unknown is not None:
        raise ValueError(
            f"word {unknown!r} is not one of the {len(WORDS)} words; a sign stands alone: 'it even ?'"
        )
    return [_IDS[word] for word in text.split()]


def decode(ids: Sequence[int]) -> str:
    """Ids to words, up to the end sign."""
    ids = list(ids)
    return " ".join(WORDS[i] for i in (ids[: ids.index(END_ID)] if END_ID in ids else ids))


class Example(NamedTuple):
    """One question: its kind, the numbers of its images, its answer."""

    kind: str
    images: tuple[int, ...]
    answer: str


def draw_example(kind: str, labels: Sequence[int], rng: random.Random, first: int | None = None) -> Example:
    """A question of this kind on images drawn from `labels`; `first`, if given, is the first of them.

    Of "same" the half shows one digit twice (two images of it); of "larger" no question does.
    """
    a = rng.randrange(len(labels)) if first is None else first
    if QUESTIONS[kind].count(IMAGE) == 1:
        return Example(kind, (a,), ANSWERS[kind](labels[a]))
    same = None if kind == "sum" else kind == "same" and rng.random() < 0.5
    b = a
    while b == a or (same is not None and (labels[a] == labels[b]) != same):
        b = rng.randrange(len(labels))
    return Example(kind, (a, b), ANSWERS[kind](labels[a], labels[b]))


def held_out_examples(labels: Sequence[int]) -> list[Example]:
    """For each kind one question that begins with each image: kinds x images of them, the same ones always."""
    rng = random.Random(12345)
    return [draw_example(kind, labels, rng, first) for kind in QUESTIONS for first in range(len(labels))]


def prompt_ids(model: VLM, text: str) -> list[int]:
    """A question as `model` reads it: with as many places for an image as it needs."""
    ids = encode(text)
    return spread_images(ids, IMAGE_ID, model.image_tokens) if isinstance(model, VisionLanguage) else ids


class Batch(NamedTuple):
    """Ids padded on the right, the next id at each place where it is learnt (-100 elsewhere), images row by row."""

    ids: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    images: list[Float[Tensor, "_images 1 8 8"]]


def make_batch(model: VLM, examples: Sequence[Example], images: Float[Tensor, "digits 1 8 8"]) -> Batch:
    """Examples as the model is trained on them: only the answer and the end sign are learnt."""
    prompts = [prompt_ids(model, QUESTIONS[example.kind]) for example in examples]
    answers = [[*encode(example.answer), END_ID] for example in examples]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    ids = torch.full((len(examples), longest), END_ID)
    targets = torch.full((len(examples), longest), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return Batch(ids, targets, [images[list(example.images)] for example in examples])


def shifted(images: Float[Tensor, "*batch 8 8"], rng: random.Random) -> Float[Tensor, "*batch 8 8"]:
    """All images moved by -1, 0 or 1 pixels up or down and left or right, with black behind."""
    down, right = rng.randrange(3), rng.randrange(3)
    return functional.pad(images, (1, 1, 1, 1), value=BLACK)[..., down : down + 8, right : right + 8]


def training_batches(model: VLM, digits: Digits, seed: int, *, blank: bool = False) -> Iterator[Batch]:
    """Endless batches of questions of all kinds (`SHARES`), the images of a row shifted together."""
    rng, labels = random.Random(seed), digits.labels.tolist()
    while True:
        kinds = rng.choices(list(SHARES), list(SHARES.values()), k=BATCH)
        examples = [draw_example(kind, labels, rng) for kind in kinds]
        batch = make_batch(model, examples, digits.images)
        images = blanked(batch.images) if blank else [shifted(row, rng) for row in batch.images]
        yield batch._replace(images=images)


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of the answers' words and end signs, in nats."""
    logits = model(batch.ids, images=batch.images)
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100), {}


def make_model(method: str, seed: int) -> VLM:
    """A new model. All draw their weights in the same way. Errors: ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    shape = {name: SETTINGS[name] for name in ("dim", "heads", "hidden")}
    vision = VisionConfig(
        image=SETTINGS["image"],
        patch=SETTINGS["patch"],
        channels=1,
        layers=SETTINGS["vision_layers"],
        **shape,
    )
    text = DecoderConfig(vocab=len(WORDS), layers=SETTINGS["layers"], context=64, tied=False, **shape)
    if method == "cross":
        model = CrossVisionLanguage(CrossVisionLanguageConfig(vision=vision, text=text, image_id=IMAGE_ID))
    else:  # the tower goes on learning, so no block of it is left out
        model = VisionLanguage(VisionLanguageConfig(vision=vision, text=text, image_id=IMAGE_ID, layer=-1))
    initialize(model, generator(seed), embedding_std=1.0)
    return model


def answer(
    model: VLM, texts: Sequence[str], images: Sequence[Float[Tensor, "_images 1 8 8"]], *, words: int = 3
) -> list[str]:
    """What the model writes after each question, greedily, at most so many words: prefill, then the generate loop.

    `texts` may differ in length and in their number of images (signs `<image>`), `images[row]` are those of a row.
    """
    device = next(model.parameters()).device
    ids, positions = left_pad([prompt_ids(model, text) for text in texts], END_ID, device=device)
    cache = model.make_cache()
    with torch.inference_mode():
        model.hidden(
            ids[:, :-1],
            images=[row.to(device) for row in images],
            positions=positions[:, :-1],
            cache=cache,
        )
    writer = model.decoder if isinstance(model, VisionLanguage) else model
    written = generate(writer, ids[:, -1:].tolist(), max_new_tokens=words, stop_ids=[END_ID], cache=cache)
    return [decode(row) for row in written]


def accuracies(
    model: VLM,
    digits: Digits,
    examples: Sequence[Example],
    *,
    change: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> list[float]:
    """The share of right answers for each kind of question; `change` may replace the images of the rows of a kind."""
    found = []
    for kind in QUESTIONS:
        some = [example for example in examples if example.kind == kind]
        images = [digits.images[list(example.images)] for example in some]
        images = images if change is None else change(images)
        right = answer(model, [QUESTIONS[kind]] * len(some), images)
        found.append(sum(w == e.answer for w, e in zip(right, some, strict=True)) / len(some))
    return found


def blanked(images: list[Tensor]) -> list[Tensor]:
    """Black images."""
    return [torch.full_like(row, BLACK) for row in images]


def shuffled(images: list[Tensor]) -> list[Tensor]:
    """Each row gets the images of another one: as real as its own, and nothing to do with its answer."""
    order = list(range(len(images)))
    random.Random(12345).shuffle(order)
    return [images[i] for i in order]


def swapped(images: list[Tensor]) -> list[Tensor]:
    """The images of a row in the opposite order."""
    return [row.flip(0) for row in images]


def commonest(examples: Sequence[Example]) -> list[float]:
    """For each kind of question the share of its most frequent answer: what guessing it would get right."""
    answers = {kind: Counter(e.answer for e in examples if e.kind == kind) for kind in QUESTIONS}
    return [max(count.values()) / sum(count.values()) for count in answers.values()]


def make_optimizer(
    model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and the schedule of its rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    return optimizer, warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))


@one_thread()
def train_tower(model: VLM, training: Digits, seed: int, *, steps: int = TOWER_STEPS) -> float:
    """Train the vision tower of `model` in place to tell the digits apart; the loss, mean over the last tenth.

    A linear layer on the class token reads it, and is thrown away. What learnt to see comes before what learns to say:
    LLaVA and Flamingo take a tower that was trained on pictures and captions.
    """
    classifier = ImageClassifier(model.vision.config, 10)
    initialize(classifier, generator(seed), embedding_std=1.0)
    classifier.vision = model.vision
    optimizer, schedule = make_optimizer(classifier, steps)
    rng = random.Random(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn = [rng.randrange(len(training.labels)) for _ in range(BATCH)]
            yield shifted(training.images[drawn], rng), training.labels[drawn]

    rows = fit(
        classifier,
        batches(),
        lambda tower, batch: (functional.cross_entropy(tower(batch[0]), batch[1]), {}),
        steps=steps,
        optimizer=optimizer,
        clip=1.0,
        on_step=lambda step, row: schedule.step(),
    )
    last = rows[-math.ceil(steps / 10) :]
    return sum(row["loss"] for row in last) / len(last)


@one_thread()
def train(
    method: str,
    seed: int,
    *,
    steps: int = STEPS,
    tower_steps: int = TOWER_STEPS,
    stop: int | None = None,
    digits: Digits | None = None,
) -> tuple[VLM, list[float]]:
    """A newly trained model in eval mode, and its training loss, mean over each tenth of the steps.

    The tower of "blind", which never sees a digit, is not trained before. stop: end after so many steps, with the rates
    of the whole. digits: all of them, scikit-learn's unless given.
    """
    model = make_model(method, seed)
    training, _ = split_digits(load_digits() if digits is None else digits)
    if method != "blind":
        train_tower(model, training, seed, steps=tower_steps)
    optimizer, schedule = make_optimizer(model, steps)
    rows = fit(
        model,
        training_batches(model, training, seed, blank=method == "blind"),
        answer_loss,
        steps=steps if stop is None else min(stop, steps),
        optimizer=optimizer,
        clip=1.0,
        on_step=lambda step, row: schedule.step(),
    )
    losses = torch.tensor([row["loss"] for row in rows])
    return model.eval(), [float(part.mean()) for part in losses.split(math.ceil(steps / 10))]


@one_thread()
def measure(method: str, model: VLM, digits: Digits) -> dict[str, Any]:
    """What a row says of a trained model, each a list of shares, one a kind of question.

    accuracy:   on held-out images ("blind": blank ones, as it was trained)
    shuffled:   the same questions with the images of others: what is left is chance
    blank:      the same questions with black images
    swapped:    two images in the opposite order, the answers as before: right where order makes no difference
    training:   on as many questions about training images
    gates:      "cross" alone, tanh of the gates of its layers, attention and feed-forward in turn
    """
    training, held_out = split_digits(digits)
    seen = Digits(training.images[:HELD_OUT], training.labels[:HELD_OUT])
    examples = held_out_examples(held_out.labels.tolist())
    own = blanked if method == "blind" else None
    gates = None
    if isinstance(model, CrossVisionLanguage):
        gates = [
            float(g.detach().tanh()) for layer in model.cross for g in (layer.gate, layer.feedforward_gate)
        ]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracies(model, held_out, examples, change=own),
        "shuffled": accuracies(model, held_out, examples, change=shuffled),
        "blank": accuracies(model, held_out, examples, change=blanked),
        "swapped": accuracies(model, held_out, examples, change=swapped),
        "training": accuracies(model, seen, held_out_examples(seen.labels.tolist()), change=own),
        "gates": gates,
    }


def run(
    method: str,
    seed: int,
    *,
    steps: int = STEPS,
    tower_steps: int = TOWER_STEPS,
    save: Path | None = None,
) -> dict[str, Any]:
    """One model, trained and measured (see `measure`), about a minute on one core.

    loss_curve: the training loss, mean over each tenth of the steps. save: a file to keep the model's weights in; the
    facts about it are written beside it.
    """
    digits = load_digits()
    model, curve = train(method, seed, steps=steps, tower_steps=tower_steps, digits=digits)
    row = measure(method, model, digits) | {"loss_curve": curve}
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(dict(model.named_parameters()), save, {"recipe": NAME, "method": method})
        facts = {"recipe": NAME, **environment(NAME), "seeds": [seed], "settings": SETTINGS}
        write_json(save.with_suffix(".json"), {**facts, "results": {"method": method, **_rounded(row)}})
    return row


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return round(value, 6) if isinstance(value, float) else value

    return {name: [plain(x) for x in v] if isinstance(v, list) else plain(v) for name, v in row.items()}


def load_digits_vlm(
    method: str = "splice", *, path: Path | None = None, device: torch.device | str = "cpu"
) -> VLM:
    """The trained model ("splice" or "cross", seed 0 of the sweep), in eval mode; give it to `answer`.

    From the package's own files, or from `path`. Errors: ValueError for another method.
    """
    if method not in METHODS[:2]:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS[:2])}")
    path = bundled(f"models/{NAME}-{method}.safetensors") if path is None else path
    model = make_model(method, 0)
    load_weights(model, load_safetensors(path, device=device))
    return model.to(device).eval()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
    models: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("assets/models"),
) -> None:
    """Run what the files do not hold yet."""
    points = [{"method": method, "seed": seed} for seed in SEEDS for method in METHODS]
    held_out = split_digits(load_digits())[1]
    common = commonest(held_out_examples(held_out.labels.tolist()))
    settings = {**SETTINGS, "commonest_answer": [round(share, 4) for share in common]}

    def point(method: str, seed: int) -> dict[str, Any]:
        kept = models / f"{NAME}-{method}.safetensors" if seed == 0 and method != "blind" else None
        return run(method, seed, save=kept)

    document = sweep(out, recipe=NAME, settings=settings, points=points, run=point)
    for row in document["rows"]:
        shown = ", ".join(
            f"{kind} {share:.3f}" for kind, share in zip(QUESTIONS, row["accuracy"], strict=True)
        )
        typer.echo(f"{row['method']}, seed {row['seed']}: {shown}")


if __name__ == "__main__":
    app()
