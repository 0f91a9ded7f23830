"""One budget for every kind of attention: language modelling and associative recall (chapter 19).

Small decoders that differ in their mixer alone. The feed-forward layers are made wider or narrower until all of them
have the parameters of the one with full multi-head attention. Each is trained on two tasks with the same steps and
batches: bytes of the King James Bible, and lists of key-value pairs that are asked for again. A last set of rows
converts the multi-head models into grouped ones and trains them on.

    python -m llm_atlas.recipes.efficient_attention

writes assets/results/efficient-attention.json; rows that are there already are not run again.
Shazeer 2019, section 4 (arXiv 1911.02150); Arora et al. 2023, section 3 (arXiv 2312.04927); Ainslie et al. 2023,
section 3 (arXiv 2305.13245).
"""

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig, LatentConfig, LinearConfig
from llm_atlas.models.grouping import group_kv_heads
from llm_atlas.models.ledger import cached_numbers
from llm_atlas.recipes import initialize, one_thread, sweep, warmup_then_cosine
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import fit

NAME = "efficient-attention"
SEEDS = (0, 1, 2)

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa-4": {"kv_heads": 4},
    "gqa-2": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "mla": {"latent": LatentConfig(kv_rank=32, rope_dim=8)},
    "local": {"window": 32},
    "linear": {"linear": LinearConfig(conv=4)},
    "gated": {"linear": LinearConfig(kind="gated", decay="head", conv=4)},
    "delta": {"linear": LinearConfig(kind="gated-delta", conv=4)},
    "hybrid": {"linear": LinearConfig(kind="gated-delta", conv=4), "full_layers": (1,)},
}
"""What each variant changes in the configuration.

"delta" is the gated delta rule, and "hybrid" the same with full attention in its second layer.
"""


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value


KEYS = 64
"""Tokens 0 to KEYS - 1 are keys, as many behind them values."""
PAIRS = (4, 8, 16, 32)
TASKS: dict[str, dict[str, Any]] = {
    "language": {"vocab": BYTES, "layers": 3, "hidden": 128, "length": 256, "batch": 8, "steps": 600},
    "recall": {
        "vocab": 2 * KEYS,
        "layers": 2,
        "hidden": 128,
        "length": 4 * PAIRS[-1],
        "batch": 16,
        "steps": 500,
    },
}
RATES = {"language": (3e-3,), "recall": (3e-3, 1e-2)}
"""Linear kinds learn to recall at the higher rate, softmax kinds at both: every variant gets its better one."""
POOLINGS = ("mean", "first", "random")
GROUPS = (4, 2, 1)
UPTRAINING = (5, 25)
"""Percent of its steps that a converted model is trained on for: the paper's, and more."""
UPTRAINING_RATE = 1e-3
SHAPE = {"dim": 64, "heads": 8, "head_dim": 16}
SETTINGS = {
    "variants": {
        name: {key: _plain(value) for key, value in changes.items()} for name, changes in VARIANTS.items()
    },
    "shape": SHAPE,
    "tasks": TASKS,
    "pairs": PAIRS,
    "keys": KEYS,
    "corpus": "king-james, one token a byte; the last tenth held out",
    "rates": RATES,
    "recall": "every token also carries a vector of the token before it, so linear layers have no convolution; only"
    " values that are asked for count",
    "optimizer": "AdamW, weight decay 0.01; 5% warm-up, then a half cosine to zero; gradient"
    " clipped to length 1",
    "conversion": f"of the trained mha models, then {UPTRAINING} percent of the steps at rate {UPTRAINING_RATE}",
    "units": "losses in nats; recall: share of values said right, by number of pairs",
}


def changed(variant: str) -> dict[str, Any]:
    """What `variant` changes in the configuration. Raises ValueError for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def make_config(variant: str, task: str) -> DecoderConfig:
    """The shape of a variant for a task, its feed-forward width such that all variants have as many parameters.

    They differ by less than one hidden unit a layer. Raises ValueError for an unknown variant or task.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
    of = TASKS[task]
    full = DecoderConfig(
        **SHAPE, vocab=of["vocab"], layers=of["layers"], hidden=of["hidden"], context=of["length"], tied=False
    )
    mine = replace(full, **changed(variant))
    if task == "recall" and mine.linear is not None:
        mine = replace(mine, linear=replace(mine.linear, conv=0))  # `Recall` does what it is for
    unit = of["layers"] * 3 * SHAPE["dim"]  # parameters that a hidden unit in every layer has
    return replace(mine, hidden=mine.hidden + round((parameters(full) - parameters(mine)) / unit))


def parameters(config: DecoderConfig) -> int:
    """How many weights a decoder of this shape has, counted without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


class Recall(nn.Module):
    """A decoder whose tokens know the one before them: to its embedding every token adds another one's of that token.

    To answer, a model has to learn two things: that a value belongs to the key before it, and to remember. The first is
    the job of a head that looks one token back, or of a short convolution, and is not what is compared here.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.decoder, self.before = Decoder(config), nn.Embedding(config.vocab, config.dim)

    def hidden(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq dim"]:
        """As `Decoder.hidden`."""
        before = functional.pad(self.before(ids[:, :-1]), (0, 0, 1, 0))
        return self.decoder.mix(self.decoder.embed(ids) + before)

    def unembed(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """As `Decoder.unembed`."""
        return self.decoder.unembed(x)


def make_model(variant: str, task: str, seed: int) -> Decoder | Recall:
    """The model of `make_config` with weights drawn from `seed`."""
    config = make_config(variant, task)
    model = Decoder(config) if task == "language" else Recall(config)
    initialize(model, generator(seed), embedding_std=1.0)
    return model


def recall_lists(pairs: int, rows: int, *, generator: torch.Generator) -> Int[Tensor, "{rows} length"]:
    """`pairs` keys, each with its value behind it; then all the keys again in another order, each with its value.

    Keys of a row differ, values may repeat. Shape (rows, 4 x pairs): keys are 0 to KEYS - 1, values KEYS to
    2 KEYS - 1. The task is to say the value behind every key of the second half.
    Arora et al. 2023, section 3.1 (arXiv 2312.04927), there with gaps between the questions.
    """
    if not 1 <= pairs <= KEYS or rows < 1:
        raise ValueError(f"pairs {pairs} must be 1 to {KEYS} and rows {rows} at least 1")
    keys = torch.rand(rows, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(KEYS, 2 * KEYS, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(-1)
    told = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    return torch.cat([told, asked], dim=1)


def recall_batches(seed: int, *, tokens: int) -> Iterator[Int[Tensor, "rows length"]]:
    """Endless lists, each batch of one length drawn from `PAIRS`, of `tokens` tokens in all."""
    rng = generator(seed)
    while True:
        pairs = PAIRS[int(torch.randint(len(PAIRS), (), generator=rng))]
        yield recall_lists(pairs, tokens // (4 * pairs), generator=rng)


def recall_loss(model: Recall, lists: Int[Tensor, "rows length"]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the values that are asked for, in nats; with the share that is said right."""
    half = lists.shape[1] // 2
    logits = model.unembed(model.hidden(lists[:, :-1])[:, half::2])
    wanted = lists[:, half + 1 :: 2]
    right = (logits.argmax(-1) == wanted).float().mean()
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), {"right": right}


@torch.inference_mode()
def recall_by_pairs(model: Recall, *, rows: int = 64, seed: int = 12345) -> list[float]:
    """Share of values said right, one number for each of `PAIRS`, on lists that are the same for all models."""
    rng = generator(seed)
    return [
        float(recall_loss(model, recall_lists(pairs, rows, generator=rng))[1]["right"]) for pairs in PAIRS
    ]


def train(
    model: Decoder | Recall,
    task: str,
    seed: int,
    *,
    ids: Int[Tensor, " bytes"],
    rate: float,
    steps: int | None = None,
    stop: int | None = None,
) -> list[float]:
    """Train in place; the mean loss of every tenth of the steps. `stop` ends early, at the rates of the whole.

    ids: the text that the language task reads.
    """
    of = TASKS[task]
    steps = of["steps"] if steps is None else steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))
    if task == "language":
        data, loss = batches(ids, seed, batch=of["batch"], length=of["length"]), next_byte_loss
    else:
        data, loss = recall_batches(seed, tokens=of["batch"] * of["length"]), recall_loss
    rows = fit(
        model,
        data,
        loss,
        steps=steps if stop is None else stop,
        optimizer=optimizer,
        clip=1.0,
        on_step=lambda step, row: schedule.step(),
    )
    tenth = max(1, steps // 10)
    parts = [rows[i : i + tenth] for i in range(0, len(rows), tenth)]
    return [sum(row["loss"] for row in part) / len(part) for part in parts]


@lru_cache(maxsize=1)
def _trained(seed: int) -> Decoder:
    """The multi-head model of the language task, trained: what conversions begin with."""
    model = make_model("mha", "language", seed)
    train(model, "language", seed, ids=split_held_out(byte_ids(king_james()))[0], rate=RATES["language"][0])
    return model


def convert(
    model: Decoder,
    groups: int,
    how: str,
    seed: int,
    *,
    ids: Int[Tensor, " bytes"],
    windows: Int[Tensor, "batch length"],
    steps: int,
    rate: float = UPTRAINING_RATE,
) -> tuple[Decoder, dict[str, float]]:
    """A grouped copy of `model`, trained on for `steps`; its loss before and after that.

    how: "mean", "first" or "random" as in `group_kv_heads`, or "none" for the same model trained on as it is.
    """
    if how == "none":
        grouped = group_kv_heads(model, groups, how="mean")
    else:
        grouped = group_kv_heads(model, groups, how=how, generator=generator(2000 + seed))
    before = measure(grouped.eval(), windows)
    # Windows that the model has not seen in training.
    train(grouped, "language", 3000 + seed, ids=ids, steps=steps, rate=rate)
    return grouped, {"loss_converted": before, "loss_trained_on": measure(grouped.eval(), windows)}


@one_thread()
def run(
    task: str,
    variant: str,
    rate: float,
    seed: int,
    *,
    steps: int | None = None,
    ids: Int[Tensor, " bytes"] | None = None,
) -> dict[str, Any]:
    """One row: train a variant on a task, or convert a trained model; one to three minutes on one core.

    task: "language", "recall", or "conversion", whose variant is such as "mean-2-5": how, key/value heads, percent of
    the steps.
    ids: the text as bytes, the King James Bible unless given.
    """
    text, held_out = split_held_out(byte_ids(king_james()) if ids is None else ids)
    windows = held_out_windows(held_out, batch=64, length=TASKS["language"]["length"])
    if task == "conversion":
        how, groups, percent = variant.split("-")
        few = round(int(percent) / 100 * TASKS["language"]["steps"]) if steps is None else steps
        how_long = {"steps": few, "rate": rate}
        return convert(_trained(seed), int(groups), how, seed, ids=text, windows=windows, **how_long)[1]
    model = make_model(variant, task, seed)
    curve = train(model, task, seed, ids=text, steps=steps, rate=rate)
    model.eval()
    config = make_config(variant, task)
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden": config.hidden,
        "cached_numbers": cached_numbers(config, TASKS[task]["length"]),
        "loss_curve": curve,
    }
    measured = (
        {"held_out_loss": measure(model, windows)}
        if task == "language"
        else {"recall": recall_by_pairs(model)}
    )
    return row | measured


def points() -> list[dict[str, Any]]:
    """All rows: both tasks for every variant, and the conversions, for every seed."""
    found = [
        {"task": task, "variant": variant, "rate": rate, "seed": seed}
        for seed in SEEDS
        for task in TASKS
        for variant in VARIANTS
        for rate in RATES[task]
    ]
    few, many = UPTRAINING
    conversions = [f"none-8-{few}", *(f"{how}-{groups}-{few}" for groups in GROUPS for how in POOLINGS)]
    conversions += [f"none-8-{many}", *(f"mean-{groups}-{many}" for groups in GROUPS)]
    return found + [
        {"task": "conversion", "variant": variant, "rate": UPTRAINING_RATE, "seed": seed}
        for seed in SEEDS
        for variant in conversions
    ]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
) -> None:
    """Run what the file does not hold yet."""
    ids = byte_ids(king_james())
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split_held_out(ids)[1]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points(), run=partial(run, ids=ids))
    for task, what in (
        ("language", "held_out_loss"),
        ("recall", "recall"),
        ("conversion", "loss_trained_on"),
    ):
        for variant in dict.fromkeys(p["variant"] for p in points() if p["task"] == task):
            rows = [row for row in document["rows"] if (row["task"], row["variant"]) == (task, variant)]
            found = [row[what][-1] if task == "recall" else row[what] for row in rows]
            typer.echo(f"{task:10} {variant:9} {', '.join(f'{value:.3f}' for value in found)}")


if __name__ == "__main__":
    app()
