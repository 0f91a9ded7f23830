"""Mixtures of experts trained: who balances the load, and what parameters buy without compute (chapter 3).

Byte-level decoders on the King James Bible that differ in their feed-forward layers alone: dense ones of several
widths, and mixtures in which every token goes through as many hidden units as in the dense one of `WIDTH`. Two
kinds of routing, one expert with its softmax as the weight (Switch) and two whose weights add up to 1 (Mixtral), are
each trained with nothing against imbalance, with the balancing loss, and with the selection bias that is moved between
steps. Of every mixture is recorded where its tokens go, what a capacity would turn away, and which kinds of bytes an
expert gets.

    python -m llm_atlas.recipes.experts

writes assets/results/experts.json; rows that are there already are not run again.
Fedus et al. 2021, section 2 (arXiv 2101.03961); Jiang et al. 2024, section 2.1 (arXiv 2401.04088); Wang et al. 2024
(arXiv 2408.15664); Dai et al. 2024, section 3 (arXiv 2401.06066).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.ledger import flops_per_token, parameters
from llm_atlas.nn.moe import (
    ExpertsConfig,
    Routing,
    balancing_loss,
    expert_capacity,
    expert_load,
    recorded_routing,
    routing_statistics,
    within_capacity,
)
from llm_atlas.recipes import initialize, one_thread, sweep, warmup_then_cosine
from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import BYTES, byte_ids, king_james, split_held_out
from llm_atlas.train.loop import Row, fit

NAME = "experts"
SEEDS = (0, 1, 2)

STEPS = 1500
BATCH = 16
LENGTH = 64
DIM = 64
LAYERS = 3
HEADS = 4
WINDOWS = 512
"""Held-out windows of `LENGTH` bytes."""
PARTS = 20
"""Stretches of training over which what changes in it is averaged."""

WIDTH = 64
"""Hidden units that a token goes through in every mixture."""
WIDTHS = (WIDTH // 2, WIDTH, 2 * WIDTH, 4 * WIDTH)
"""Hidden widths of the dense networks."""
LOSS_FACTOR = 0.01
"""Of the balancing loss of every layer, divided by the number of active experts so that it is 1 where the load is even
(Switch, section 2.2; DeepSeekMoE, equations 12 to 14, divides too)."""
BIAS_RATE = 0.003
"""Step of the selection bias: Wang et al. take 0.001 for runs that are many times as long."""
CAPACITIES = (1.0, 1.25, 2.0)
STARVED = 0.1
"""An expert is starved that gets less than this part of the even share."""

Balance = Literal["none", "loss", "bias"]
BALANCES = get_args(Balance)


class Variant(NamedTuple):
    """A feed-forward layer: a width or experts, and what keeps their load even."""

    hidden: int = WIDTH
    experts: ExpertsConfig | None = None
    balance: Balance = "none"


def _mixture(balance: Balance = "loss", **shape: Any) -> Variant:
    return Variant(experts=ExpertsConfig(**shape, selection_bias=balance == "bias"), balance=balance)


VARIANTS = {
    **{f"dense {width}": Variant(width) for width in WIDTHS},
    **{
        f"top 2, {balance}": _mixture(balance, experts=8, active=2, hidden=WIDTH // 2) for balance in BALANCES
    },
    **{
        f"top 1, {balance}": _mixture(balance, experts=8, active=1, hidden=WIDTH, renormalize=False)
        for balance in BALANCES
    },
    "top 2, sigmoid": _mixture("bias", experts=8, active=2, hidden=WIDTH // 2, score="sigmoid"),
    "16 experts": _mixture(experts=16, active=2, hidden=WIDTH // 2),
    "fine": _mixture(experts=16, active=4, hidden=WIDTH // 4),
    "shared": _mixture(experts=7, active=1, hidden=WIDTH // 2, shared=1, renormalize=False),
}
"""By name. All mixtures have `WIDTH` active hidden units. Hidden units in all, in units of `WIDTH`: 4 for "top 2",
"fine" and "shared", 8 for "top 1" and "16 experts". "top 2, sigmoid" has the selection
bias as it was published, with sigmoids for scores; the three after it have the balancing loss."""
LEARNING_RATES = (4e-3, 5.6e-3, 8e-3)
TUNED = ("dense 64", "dense 256", "top 2, loss")
"""These were trained with the first seed at every rate."""
RATE = 5.6e-3
"""The rate with the lowest loss on the validation text, mean over `TUNED`; all variants are trained at it."""

VOWELS, CONSONANTS = b"aeiou", b"bcdfghjklmnpqrstvwxyz"
CLASSES = ("vowels", "consonants", "capitals", "white space", "others")
"""Of bytes; "others" are punctuation, digits and what is not ASCII."""

SETTINGS = {
    "corpus": "king-james, one token a byte",
    "held_out": f"the last tenth; {WINDOWS} windows. Validation: the last tenth of the rest",
    "shape": {"dim": DIM, "layers": LAYERS, "heads": HEADS},
    "variants": {
        name: {
            "hidden": None if of.experts else of.hidden,
            "experts": of.experts and asdict(of.experts),
            "balance": of.balance,
        }
        for name, of in VARIANTS.items()
    },
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "loss_factor": f"{LOSS_FACTOR} a layer, of the balancing loss over the number of active experts",
    "bias_rate": BIAS_RATE,
    "capacities": CAPACITIES,
    "starved": STARVED,
    "classes": CLASSES,
    "rate": f"{RATE} for all: of {LEARNING_RATES} the best on the validation text, mean over {TUNED}",
    "optimizer": "AdamW, weight decay 0.01; 5% warm-up, then a half cosine to zero; gradient clipped to length 1",
    "units": "losses in nats a byte; FLOPs a token, forward; information in bits",
}


def make_config(variant: str) -> DecoderConfig:
    """The shape of a variant's decoder. Raises ValueError for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {'; '.join(VARIANTS)}")
    hidden, experts, _ = VARIANTS[variant]
    return DecoderConfig(
        vocab=BYTES,
        dim=DIM,
        layers=LAYERS,
        heads=HEADS,
        context=LENGTH,
        hidden=hidden,
        experts=experts,
    )


def make_model(variant: str, seed: int) -> Decoder:
    """The decoder of a variant. The same seed gives all of them the same embedding and attention, and those whose
    feed-forward layers have the same shapes the same weights there.
    """
    model, rng = Decoder(make_config(variant)), generator(seed)
    initialize(model.embed, rng)
    for part in ("mixer", "feedforward"):
        for block in model.blocks:
            initialize(getattr(block, part), rng)
    return model


# ------------------------------------------------------------------------------------------ training


class Balanced:
    """What a training run of `variant` adds to the plain one: `loss` for `fit`, and `after` every update.

    `violations` has the largest load over the mean load, minus 1, of every step and layer.
    """

    def __init__(self, variant: str) -> None:
        self.balance = VARIANTS[variant].balance
        self.mixture = VARIANTS[variant].experts is not None
        self.routings: dict[str, Routing] = {}
        self.violations: list[list[float]] = []

    def loss(self, model: nn.Module, windows: Int[Tensor, "batch length"]) -> tuple[Tensor, dict[str, Any]]:
        """The next byte's, and the balancing loss if the variant has it; `bytes` is without that."""
        if not self.mixture:
            value, _ = next_byte_loss(model, windows)
            return value, {"bytes": value.detach()}
        with recorded_routing(model) as self.routings:
            value, _ = next_byte_loss(model, windows)
        plain = value.detach()
        if self.balance == "loss":
            for routing in self.routings.values():
                value = value + LOSS_FACTOR * balancing_loss(routing) / routing.chosen.shape[-1]
        return value, {"bytes": plain}

    def after(self, model: Decoder) -> None:
        """Record the loads of the step, and move the selection biases if the variant has them."""
        loads = {name: expert_load(routing) for name, routing in self.routings.items()}
        if loads:
            self.violations.append([float(_violation(load)) for load in loads.values()])
        if self.balance == "bias":
            for name, load in loads.items():
                model.get_submodule(name).rebalance(load, rate=BIAS_RATE)


def train(
    variant: str,
    lr: float,
    seed: int,
    *,
    steps: int = STEPS,
    stop: int | None = None,
    ids: Int[Tensor, " bytes"],
) -> tuple[Decoder, list[float], list[list[float]]]:
    """(model in eval mode, loss of every step, violation of every step and layer).

    The loss is the next byte's alone. The violations are an empty list for a dense model.
    ids: the text to train on. stop: after so many of the steps, at the rates of all of them.
    """
    model, how = make_model(variant, seed), Balanced(variant)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01
    )
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))

    def on_step(step: int, row: Row) -> None:
        schedule.step()
        how.after(model)

    rows = fit(
        model,
        batches(ids, seed, batch=BATCH, length=LENGTH),
        how.loss,
        steps=steps if stop is None else min(stop, steps),
        optimizer=optimizer,
        clip=1.0,
        on_step=on_step,
    )
    return model.eval(), [row["bytes"] for row in rows], how.violations


def _violation(load: Int[Tensor, " experts"]) -> Tensor:
    return load.max() / load.float().mean() - 1


def in_parts(values: Sequence[float], parts: int = PARTS) -> list[float]:
    """The mean of each of `parts` stretches of `values`, of a length that differs by 1 at most; fewer if there are
    fewer values."""
    parts = min(parts, len(values))
    cuts = [round(i * len(values) / parts) for i in range(parts + 1)] if parts else []
    return [mean(values[a:b]) for a, b in pairwise(cuts)]


# ----------------------------------------------------------------------------------------- measuring


def byte_classes(ids: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The class of every byte, as an index into `CLASSES`."""
    table = torch.full((BYTES,), CLASSES.index("others"))
    for kind, members in (
        ("vowels", VOWELS),
        ("consonants", CONSONANTS),
        ("capitals", (VOWELS + CONSONANTS).upper()),
        ("white space", b" \n"),
    ):
        table[list(members)] = CLASSES.index(kind)
    return table.to(ids.device)[ids]


def joint_counts(
    kinds: Int[Tensor, "*batch"], chosen: Int[Tensor, "*batch active"], *, number: int, experts: int
) -> Int[Tensor, "number experts"]:
    """How often tokens of each of `number` kinds chose each expert; a token counts once for every choice."""
    pairs = kinds[..., None] * experts + chosen
    return torch.bincount(pairs.flatten(), minlength=number * experts).view(number, experts)


def mutual_information(counts: Int[Tensor, "kinds experts"] | Float[Tensor, "kinds experts"]) -> float:
    r"""$\sum_{k,e} p_{ke} \log_2 \frac{p_{ke}}{p_k p_e}$, in bits, of the shares of `counts`.

    How much is known of the expert when the kind is: 0 if experts get the same mixture of kinds, the entropy of the
    experts' load if the kind decides. It comes out too high by about $(K-1)(E-1) / (2 N \ln 2)$ for $N$ counts.
    """
    if counts.sum() <= 0:
        raise ValueError("counts are all 0: there is nothing to measure")
    share = counts.double() / counts.sum()
    entropy = [torch.special.entr(p).sum() for p in (share.sum(0), share.sum(1), share)]
    return max(0.0, float(entropy[0] + entropy[1] - entropy[2]) / math.log(2))


@torch.inference_mode()
def routed(model: Decoder, windows: Int[Tensor, "batch length"]) -> list[Routing]:
    """What the router of every layer decides for all bytes of `windows` but the last."""
    with recorded_routing(model) as routings:
        model.hidden(windows[:, :-1])
    return list(routings.values())


def dropped_share(routing: Routing, factor: float | int, *, batch: int = BATCH) -> float:
    """The share of all choices that find their expert full at a capacity `factor`, first come, first served.

    Capacity counts in a batch, here of `batch` sequences as in training. Errors: ValueError for sequences that do not
    divide into batches.
    """
    rows, active, experts = len(routing.chosen), routing.chosen.shape[-1], routing.scores.shape[-1]
    if batch < 1 or rows % batch:
        raise ValueError(f"{rows} sequences do not divide into batches of {batch}")
    dropped = 0
    for start in range(0, rows, batch):
        # A leading slice of every field.
        part = Routing(*(getattr(routing, name)[start : start + batch] for name in Routing.__annotations__))
        capacity = expert_capacity(part.kept.numel() // active, experts, active, factor)
        part = replace(part, kept=within_capacity(part.chosen, experts, capacity))
        dropped += int(routing_statistics(part).dropped.sum())
    return dropped / routing.chosen.numel()


def loss_with_capacity(model: Decoder, windows: Int[Tensor, "batch length"], factor: float | int) -> float:
    """Loss in nats a byte where experts take at most `factor` times their even share of a batch of `BATCH` windows.

    The model was trained without a capacity, and has not learnt to do without an expert.
    """
    full = replace(model.config, experts=replace(model.config.experts, capacity_factor=factor))
    limited = Decoder(full).eval()
    limited.load_state_dict(model.state_dict())
    return mean(measure(limited, part) for part in windows.split(BATCH))


def measure_routing(
    model: Decoder, untrained: Decoder, windows: Int[Tensor, "batch length"]
) -> dict[str, Any]:
    """What a row says of a mixture's routing on `windows`; a list has one entry a layer unless it says otherwise.

    load:                 share of all choices that each expert got (layers x experts)
    max_violation:        the largest load over the mean load, minus 1
    starved:              experts with less than `STARVED` of the even share
    dropped:              for each of `CAPACITIES`, the share of choices that would find their expert full, the layers
                          before it being without a capacity (capacities x layers)
    loss_with_capacity:   for each of `CAPACITIES`, the loss where all layers turn choices away
    class_counts:         choices by class of the byte that is read and by expert (layers x classes x experts)
    class_information:    mutual information of that class and the expert, in bits
    byte_information:     the same of the byte itself, next_information of the class of the byte that comes next
    *_untrained:          the same before training
    """
    found = routed(model, windows)
    load = [expert_load(routing) for routing in found]
    counts, information = _information(found, windows)
    before = _information(routed(untrained, windows), windows)[1]
    return {
        "load": [(one / one.sum()).tolist() for one in load],
        "max_violation": [float(_violation(one)) for one in load],
        "starved": [int((one < STARVED * one.float().mean()).sum()) for one in load],
        "dropped": [[dropped_share(routing, factor) for routing in found] for factor in CAPACITIES],
        "loss_with_capacity": [loss_with_capacity(model, windows, factor) for factor in CAPACITIES],
        "class_counts": counts,
        **information,
        **{f"{name}_untrained": value for name, value in before.items()},
    }


def _information(
    found: list[Routing], windows: Int[Tensor, "batch length"]
) -> tuple[list[list[list[int]]], dict[str, list[float]]]:
    read, coming = windows[:, :-1], windows[:, 1:]

    def joint(kinds: Tensor, number: int) -> list[Tensor]:
        return [
            joint_counts(kinds, routing.chosen, number=number, experts=routing.scores.shape[-1])
            for routing in found
        ]

    classes = joint(byte_classes(read), len(CLASSES))
    information = {
        "class_information": [mutual_information(counts) for counts in classes],
        "next_information": [
            mutual_information(counts) for counts in joint(byte_classes(coming), len(CLASSES))
        ],
        "byte_information": [mutual_information(counts) for counts in joint(read, BYTES)],
    }
    return [counts.tolist() for counts in classes], information


def split(ids: Int[Tensor, " bytes"]) -> tuple[Tensor, Tensor, Tensor]:
    """(train, validation, held out): the last tenth is held out, and the last tenth of the rest is for validation."""
    rest, held_out = split_held_out(ids)
    return *split_held_out(rest), held_out


@one_thread()
def run(
    variant: str,
    lr: float,
    seed: int,
    *,
    steps: int = STEPS,
    ids: Int[Tensor, " bytes"] | None = None,
) -> dict[str, Any]:
    """One row: a variant trained and measured; half a minute to a minute on one core.

    parameters, active_parameters, flops: of the whole model, as `models.ledger` counts them
    loss_curve:      training loss, of the next byte alone, the mean over each of `PARTS` stretches
    violation_curve: of every layer, the mean over the same stretches of the batches' max violation (layers x PARTS)
    and for mixtures what `measure_routing` says. ids: the text as bytes, the King James Bible unless given.
    """
    text, validation, held_out = split(byte_ids(king_james()) if ids is None else ids)
    model, losses, violations = train(variant, lr, seed, steps=steps, ids=text)
    windows = held_out_windows(held_out, batch=WINDOWS, length=LENGTH)
    ledger, loss = parameters(model.config), measure(model, windows)
    row = {
        "parameters": ledger.total,
        "active_parameters": ledger.active,
        "flops": flops_per_token(model.config, LENGTH),
        "held_out_loss": loss,
        "bits_per_byte": loss / math.log(2),
        "validation_loss": measure(model, held_out_windows(validation, batch=WINDOWS, length=LENGTH)),
        "loss_curve": in_parts(losses),
    }
    if not violations:
        return row
    curve = [in_parts(layer) for layer in zip(*violations, strict=True)]
    return (
        row | {"violation_curve": curve} | measure_routing(model, make_model(variant, seed).eval(), windows)
    )


@one_thread()
def train_a_little(
    variants: Sequence[str] = ("top 1, none", "top 1, loss"),
    *,
    steps: int = 60,
    seed: int = 0,
    ids: Int[Tensor, " bytes"] | None = None,
) -> dict[str, dict[str, Any]]:
    """A small slice of the runs, for a page: so many of the whole runs' steps, some two seconds a variant.

    By variant: `load` (layers x experts, shares on held-out text) and `violations` (layers x steps). The learning rate
    is `RATE` after a warm-up of a twentieth of `steps`, and then falls to zero within `steps`.
    ids: the text as bytes, the King James Bible unless given.
    """
    text, _, held_out = split(byte_ids(king_james()) if ids is None else ids)
    windows = held_out_windows(held_out, batch=64, length=LENGTH)
    found = {}
    for variant in variants:
        model, _, violations = train(variant, RATE, seed, steps=steps, ids=text)
        loads = [expert_load(routing) for routing in routed(model, windows)]
        found[variant] = {
            "load": [(load / load.sum()).tolist() for load in loads],
            "violations": [list(layer) for layer in zip(*violations, strict=True)],
        }
    return found


# ------------------------------------------------------------------------------------- equal quality


@dataclass(frozen=True, kw_only=True)
class EqualQuality:
    """A mixture and the dense model that is as good. A range is over seeds, lowest and highest."""

    variant: str
    loss: float
    """Mean over seeds, held out."""
    parameters: int
    flops: int
    """Of the mixture."""
    width: float
    """Hidden width at which the dense models have the mixture's loss: the geometric mean over seeds."""
    widths: tuple[float, float]
    dense_parameters: float
    dense_flops: float
    """Of a dense model of that width."""

    @property
    def parameter_ratio(self) -> float:
        """The mixture's parameters over those of the dense model as good."""
        return self.parameters / self.dense_parameters

    @property
    def flops_ratio(self) -> float:
        """The mixture's FLOPs over those of the dense model as good."""
        return self.flops / self.dense_flops


def equal_quality(
    rows: Sequence[Mapping[str, Any]], variants: Sequence[str] | None = None
) -> list[EqualQuality]:
    """Which dense width has the held-out loss of each mixture.

    Seed by seed: between two dense widths the loss is taken to be a straight line in the logarithm of the width.
    Parameters and FLOPs are straight lines in the width itself. Rows of other rates than `RATE` do not count.
    variants: all mixtures in `rows`, unless given.
    Errors: ValueError where a seed's dense losses do not fall with the width, or a mixture's loss is outside them: it
    is not extrapolated.
    """
    rows = [row for row in rows if row["lr"] == RATE]
    width = {name: of.hidden for name, of in VARIANTS.items() if of.experts is None}
    dense = [row for row in rows if row["variant"] in width]
    if variants is None:
        variants = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] not in width))
    size = {width[row["variant"]]: row for row in dense}
    low, high = min(size), max(size)

    def at(where: float, what: str) -> float:
        return size[low][what] + (where - low) / (high - low) * (size[high][what] - size[low][what])

    found = []
    for variant in variants:
        mine = [row for row in rows if row["variant"] == variant]
        logs = []
        for row in mine:
            curve = sorted(
                (width[other["variant"]], other["held_out_loss"])
                for other in dense
                if other["seed"] == row["seed"]
            )
            logs.append(_log_width(curve, row))
        middle = math.exp(mean(logs))
        found.append(
            EqualQuality(
                variant=variant,
                loss=mean(row["held_out_loss"] for row in mine),
                parameters=mine[0]["parameters"],
                flops=mine[0]["flops"],
                width=middle,
                widths=(math.exp(min(logs)), math.exp(max(logs))),
                dense_parameters=at(middle, "parameters"),
                dense_flops=at(middle, "flops"),
            )
        )
    return found


def _log_width(curve: Sequence[tuple[int, float]], row: Mapping[str, Any]) -> float:
    """Where the broken line through `curve`, (width, loss) by width, has the loss of `row`."""
    seed, loss = row["seed"], row["held_out_loss"]
    if any(a <= b for (_, a), (_, b) in pairwise(curve)):
        raise ValueError(f"the dense losses of seed {seed} do not fall with the width: {curve}")
    for (narrow, above), (wide, below) in pairwise(curve):
        if below <= loss <= above:
            return math.log(narrow) + (above - loss) / (above - below) * math.log(wide / narrow)
    raise ValueError(
        f"the loss {loss} of {row['variant']!r}, seed {seed}, is outside the dense ones: {curve}"
    )


# ---------------------------------------------------------------------------------------- all of them


def points() -> list[dict[str, Any]]:
    """All rows: the rates tried with the first seed, then every variant with every seed."""
    tuning = [(variant, lr, SEEDS[0]) for variant in TUNED for lr in LEARNING_RATES]
    # Once each, in this order.
    every = dict.fromkeys(tuning + [(variant, RATE, seed) for seed in SEEDS for variant in VARIANTS])
    return [dict(zip(("variant", "lr", "seed"), point, strict=True)) for point in every]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
) -> None:
    """Run what the file does not hold yet."""
    ids = byte_ids(king_james())
    settings = {**SETTINGS, "unigram_loss": round(unigram_loss(split(ids)[2]), 4)}
    document = sweep(out, recipe=NAME, settings=settings, points=points(), run=partial(run, ids=ids))
    for variant, lr in dict.fromkeys((row["variant"], row["lr"]) for row in document["rows"]):
        rows = [row for row in document["rows"] if (row["variant"], row["lr"]) == (variant, lr)]
        losses = ", ".join(f"{row['held_out_loss']:.4f}" for row in rows)
        typer.echo(f"{variant:14} {lr:<6} held-out loss {losses}")


if __name__ == "__main__":
    app()
