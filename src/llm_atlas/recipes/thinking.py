"""A small model that thinks before it answers: chains of sums and products, worked out between two tags (chapter 3).

"7*8+3-5" is reckoned from left to right and only the last digit is kept: 6, 9, 4. The thinking model writes these
running results in the span of `ThinkingTemplate`, one a line, and then its answer. It is trained BY SUPERVISION on
traces that this recipe works out, not by reward: reinforcement learning comes with chapter 7. Its traces are whole,
cut off anywhere and closed by force, or empty, always with the right answer behind them, so that it answers as well as
it can from the thought it had. In one trace in ten a first attempt, half of them wrong, ends in "Wait" and the working
begins anew; the attempt and the "Wait" themselves are not learnt. The direct model reads at least as many training
tokens of the same problems and never thinks.

    python -m llm_atlas.recipes.thinking

writes assets/results/thinking.json, and the thinking model of seed 0 to assets/models/thinking.safetensors with the
facts about it beside it; rows that are there already are not run again.
Muennighoff et al. 2025, sections 3 and 4 (arXiv 2501.19393); Nye et al. 2021, scratchpads (arXiv 2112.00114).
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator as seeded
from llm_atlas.core.weights import load_safetensors, save_safetensors
from llm_atlas.infer.budget import force_budget, thinking_tokens
from llm_atlas.infer.chat import ThinkingAnswer, ThinkingTemplate, majority_vote
from llm_atlas.infer.generate import generate
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import load_weights
from llm_atlas.recipes import environment, initialize, one_thread, sweep, warmup_then_cosine, write_json
from llm_atlas.text.byte_bpe import ByteBPE
from llm_atlas.train.loop import Row, fit

NAME = "thinking"
TEMPLATE = ThinkingTemplate()
SIGNS = "+-*"

_TEXTS = (*"0123456789", *SIGNS, "\n", "\n\n", "user", "assistant", "Wait")
_MARKS = ("<|im_start|>", "<|im_end|>", TEMPLATE.open, TEMPLATE.close)
TOKENIZER = ByteBPE(
    {text.encode(): index for index, text in enumerate(_TEXTS)},
    pattern=r"[A-Za-z]+|\n+|.",
    special={mark: len(_TEXTS) + index for index, mark in enumerate(_MARKS)},
)
"""One token a digit or sign; the words of the template and its marks are one token each."""
_ID = {text: index for index, text in enumerate((*_TEXTS, *_MARKS))}
_START, END_ID, OPEN_ID, CLOSE_ID = (_ID[mark] for mark in _MARKS)
OPEN_IDS, CLOSE_IDS = [OPEN_ID], [CLOSE_ID]
WAIT_IDS = [_ID["Wait"], _ID["\n"]]

TRAINED = tuple(range(2, 9))
"""Lengths of training problems, in digits."""
MEASURED = tuple(range(3, 9))
"""Lengths that are measured; of two digits there are too few problems to hold some out."""
LONGER = (9, 10)
"""Lengths that no training problem has."""
EACH = 100
BUDGETS = tuple(range(19))
KINDS = ("thinking", "direct")
SEEDS = (0, 1, 2)
STEPS = {"thinking": 2400, "direct": 3900}
EARLY = 30
BATCH = 48
LR = 3e-3
MIX = {"whole": 0.35, "cut": 0.4, "none": 0.15, "wait": 0.1}
SHAPE = {"dim": 64, "layers": 3, "heads": 4, "hidden": 192, "context": 128}
SETTINGS = {
    "kinds": KINDS,
    "data": "chains of digits 1 to 9 joined by + - *, reckoned from left to right, last digit kept;"
    " one problem in ten held out by the checksum of its text",
    "training": "supervised on worked traces, no reinforcement learning",
    "trained_lengths": TRAINED,
    "measured_lengths": MEASURED,
    "longer_lengths": LONGER,
    "held_out_problems": EACH * len(MEASURED),
    "budgets": BUDGETS,
    "mix": MIX,
    **SHAPE,
    "steps": STEPS,
    "batch": BATCH,
    "lr": LR,
    "optimizer": "AdamW, weight decay 0.01; 5% warm-up, then a half cosine to zero; gradient clipped to length 1",
    "units": "shares of right answers unless said otherwise; budgets and thoughts in tokens; lengths in digits",
}


class Problem(NamedTuple):
    """Digits and the signs between them, such as (7, 8, 3) and "*+"."""

    digits: tuple[int, ...]
    signs: str

    @property
    def question(self) -> str:
        """As it is asked: "7*8+3"."""
        return str(self.digits[0]) + "".join(
            f"{sign}{digit}" for sign, digit in zip(self.signs, self.digits[1:], strict=True)
        )

    @property
    def results(self) -> list[int]:
        """The running results, from left to right, the last digit of each: [6, 9]."""
        return running(self.digits[0], self.signs, self.digits[1:])

    @property
    def answer(self) -> str:
        """The last running result."""
        return str(self.results[-1])

    @property
    def thought(self) -> str:
        """The running results, one a line."""
        return lines(self.results)


def running(first: int, signs: str, digits: Sequence[int]) -> list[int]:
    """What comes out after each step from `first` on, modulo 10."""
    results, value = [], first
    for sign, digit in zip(signs, digits, strict=True):
        value = (value + digit if sign == "+" else value - digit if sign == "-" else value * digit) % 10
        results.append(value)
    return results


def lines(results: Sequence[int]) -> str:
    """Results as a thought."""
    return "\n".join(map(str, results))


def held_out(problem: Problem) -> bool:
    """Whether no model was trained on this problem: one in ten, by the checksum of its text."""
    return zlib.crc32(problem.question.encode()) % 10 == 0


def verify(problem: Problem, answer: str | None) -> bool:
    """Whether an answer is right: the one digit, with nothing around it but white space. None is not.

    The reward that reinforcement learning from verifiable rewards would use (chapter 7).
    """
    return answer is not None and answer.strip() == problem.answer


def problems(
    count: int,
    generator: torch.Generator,
    *,
    lengths: Sequence[int] = MEASURED,
    training: bool = False,
) -> list[Problem]:
    """Problems at random, each length as likely: held-out ones, or with `training` those that are not.

    Errors: ValueError for lengths below 2.
    """
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths {tuple(lengths)} must be at least 2 digits")
    found: list[Problem] = []
    while len(found) < count:
        drawn = _draw(max(64, 2 * (count - len(found))), generator, lengths)
        found += [problem for problem in drawn if held_out(problem) != training]
    return found[:count]


def _draw(count: int, generator: torch.Generator, lengths: Sequence[int]) -> list[Problem]:
    longest = max(lengths)
    sizes = torch.randint(len(lengths), (count,), generator=generator).tolist()
    digits = torch.randint(1, 10, (count, longest), generator=generator).tolist()
    signs = torch.randint(3, (count, longest), generator=generator).tolist()
    return [
        Problem(tuple(row[: (n := lengths[size])]), "".join(SIGNS[sign] for sign in chosen[: n - 1]))
        for size, row, chosen in zip(sizes, digits, signs, strict=True)
    ]


def held_out_problems(each: int = EACH, lengths: Sequence[int] = MEASURED) -> list[Problem]:
    """`each` different held-out problems of each length, in the order of the lengths, the same ones always."""
    found: list[Problem] = []
    for length in lengths:
        generator, some = seeded(12345 + length), dict[Problem, None]()
        while len(some) < each:
            some |= dict.fromkeys(problems(each, generator, lengths=[length]))
        found += list(some)[:each]
    return found


def prompt_ids(problem: Problem, *, thinking: bool = True) -> list[int]:
    """The problem as the user's message, and the opening of the assistant's."""
    ask = [_ID[character] for character in problem.question]
    ids = [_START, _ID["user"], _ID["\n"], *ask, END_ID, _ID["\n"], _START, _ID["assistant"], _ID["\n"]]
    return ids if thinking else [*ids, OPEN_ID, _ID["\n\n"], CLOSE_ID, _ID["\n\n"]]


def _thought_ids(results: Sequence[int]) -> list[int]:
    # "\n6\n9\n": the newlines of the template are tokens of the thought.
    return [_ID["\n"], *(i for result in results for i in (result, _ID["\n"]))]


def trace(
    problem: Problem, kind: str, share: float = 0.0, wrong: tuple[int, int] | None = None
) -> tuple[list[int], list[bool]]:
    """(ids, which of them are learnt) of one training conversation.

    kind: "whole"; "cut", after `share` (0 to 1) of the thought; "none"; "wait", with a first attempt in which, if
    `wrong` is given, (step, digit to add) is a slip that the following results carry on.
    """
    answer = [int(problem.answer), END_ID]
    if kind == "none":
        prompt = prompt_ids(problem, thinking=False)
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    prompt, thought = prompt_ids(problem), _thought_ids(problem.results)
    close = [CLOSE_ID, _ID["\n\n"]]
    attempt: list[int] = []
    if kind == "wait":
        attempt = [*_thought_ids(slipped(problem, *wrong) if wrong else problem.results), *WAIT_IDS]
        thought = thought[1:]
    elif kind == "cut":
        thought = thought[: int(share * (len(thought) + 1))]
    # Where a thought was cut off, the close comes from outside: learning it would teach to stop anywhere.
    learnt = (
        [False] * len(prompt)
        + [True]
        + [False] * len(attempt)
        + [True] * len(thought)
        + [kind != "cut", True]
        + [True] * len(answer)
    )
    return [*prompt, OPEN_ID, *attempt, *thought, *close, *answer], learnt


def slipped(problem: Problem, step: int, off: int) -> list[int]:
    """The running results with `off` added to that of one step, and all after it reckoned from there."""
    results = [*problem.results[:step], (problem.results[step] + off) % 10]
    return results + running(results[-1], problem.signs[step + 1 :], problem.digits[step + 2 :])


class Batch(NamedTuple):
    """Ids padded on the right; the next id at each place where it is learnt, -100 elsewhere."""

    ids: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]


def make_batch(traces: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    """Traces as a model is trained on them."""
    longest = max(len(ids) for ids, _ in traces) - 1
    ids = torch.full((len(traces), longest), END_ID)
    targets = torch.full((len(traces), longest), -100)
    for row, (whole, learnt) in enumerate(traces):
        ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        targets[row, : len(whole) - 1] = torch.tensor(whole[1:]).masked_fill(~torch.tensor(learnt[1:]), -100)
    return Batch(ids, targets)


def training_batches(kind: str, seed: int) -> Iterator[Batch]:
    """Endless batches. Four at a time are drawn and sorted by length, so that little is padding."""
    generator = seeded(seed)
    count = 4 * BATCH
    while True:
        drawn = problems(count, generator, lengths=TRAINED, training=True)
        kinds = torch.multinomial(torch.tensor(list(MIX.values())), count, True, generator=generator).tolist()
        shares = torch.rand(3, count, generator=generator).tolist()
        offs = torch.randint(1, 10, (count,), generator=generator).tolist()
        traces = []
        for i, problem in enumerate(drawn):
            what = list(MIX)[kinds[i]] if kind == "thinking" else "none"
            slip = (int(shares[1][i] * len(problem.signs)), offs[i]) if shares[2][i] < 0.5 else None
            traces.append(trace(problem, what, shares[0][i], slip))
        traces.sort(key=lambda pair: len(pair[0]))
        for part in torch.randperm(4, generator=generator).tolist():
            yield make_batch(traces[part * BATCH : (part + 1) * BATCH])


def trace_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, int]]:
    """Mean cross-entropy of what is learnt, in nats a token."""
    logits = model(batch.ids)
    loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    return loss, {"tokens": batch.ids.numel()}


def make_model(seed: int) -> Decoder:
    """A new model."""
    model = Decoder(DecoderConfig(vocab=TOKENIZER.vocab_size, tied=False, **SHAPE))
    initialize(model, seeded(seed), embedding_std=1.0)
    return model


@one_thread()
def train(
    kind: str, seed: int, *, steps: int | None = None, stop: int | None = None
) -> tuple[Decoder, list[Row]]:
    """A newly trained model in eval mode, and the row of every step: its loss and how many tokens it read.

    stop: end after so many steps, with the rates of the whole. Errors: ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    steps = STEPS[kind] if steps is None else steps
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = warmup_then_cosine(optimizer, steps=steps, warmup=max(1, steps // 20))
    rows = fit(
        model,
        training_batches(kind, seed),
        trace_loss,
        steps=steps if stop is None else min(stop, steps),
        optimizer=optimizer,
        clip=1.0,
        require_finite=True,
        on_step=lambda step, row: schedule.step(),
    )
    return model.eval(), rows


def write(
    model: Decoder,
    problems: Sequence[Problem],
    *,
    thinking: bool = True,
    begun: Sequence[Sequence[int]] | None = None,
    most: int | None = None,
    least: int = 0,
    waits: int = 0,
    wait: bool = True,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    max_new_tokens: int = 72,
) -> list[list[int]]:
    """The assistant's messages as ids, `begun` (what each already begins with) included; arguments as in `solve`.

    wait: write "Wait" where `least` withholds the close; False withholds it without a word.
    """
    starts = [[] for _ in problems] if begun is None else [list(row) for row in begun]
    prompts = [
        prompt_ids(problem, thinking=thinking) + start
        for problem, start in zip(problems, starts, strict=True)
    ]
    budget = force_budget(
        OPEN_IDS, CLOSE_IDS, least=least, most=most, wait_ids=WAIT_IDS if wait else (), waits=waits
    )
    new = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        transforms=[budget],
        stop_ids=[END_ID],
        generator=generator,
    )
    return [start + row for start, row in zip(starts, new, strict=True)]


def read(ids: Sequence[int]) -> ThinkingAnswer:
    """Thought and answer of a message that was written."""
    return TEMPLATE.parse(TOKENIZER.decode(ids))


def solve(
    model: Decoder,
    problems: Sequence[Problem],
    *,
    most: int | None = None,
    least: int = 0,
    waits: int = 0,
    thinking: bool = True,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[ThinkingAnswer]:
    """What the model thinks and answers, all problems at once; greedy unless a temperature is given.

    most, least, waits: the budget in tokens, see `infer.budget.force_budget`. The newline behind the opening tag is
    the first token of a thought; then each running result takes two.
    thinking: False switches it off by an empty span in the prompt.
    """
    written = write(
        model, problems, most=most, least=least, waits=waits, thinking=thinking, temperature=temperature,
        generator=generator,
    )  # fmt: skip
    return [read(row) for row in written]


def accuracy(problems: Sequence[Problem], answers: Sequence[ThinkingAnswer]) -> float:
    """The share that `verify` accepts."""
    right = [verify(problem, found.answer) for problem, found in zip(problems, answers, strict=True)]
    return sum(right) / len(right)


def commonest(problems: Sequence[Problem]) -> float:
    """The share of the most frequent answer: what always giving that one would get right. Products make it 0."""
    counts = Counter(problem.answer for problem in problems)
    return max(counts.values()) / len(problems)


def by_length(problems: Sequence[Problem], values: Sequence[int | float]) -> list[float]:
    """The mean of `values` over the problems of each length, in the order of the lengths."""
    groups: dict[int, list[float]] = {}
    for problem, value in zip(problems, values, strict=True):
        groups.setdefault(len(problem.digits), []).append(value)
    return [sum(groups[length]) / len(groups[length]) for length in sorted(groups)]


def _right(problems: Sequence[Problem], answers: Sequence[ThinkingAnswer]) -> list[float]:
    return [float(verify(p, found.answer)) for p, found in zip(problems, answers, strict=True)]


def _mean(values: Sequence[int | float]) -> float:
    return sum(values) / len(values)


def measure_budgets(model: Decoder, some: Sequence[Problem]) -> dict[str, Any]:
    """Accuracy against budget, over all and by length (a list of budgets for each length), and without a budget."""
    right = [_right(some, solve(model, some, most=most)) for most in BUDGETS]
    free = write(model, some)
    tokens = [thinking_tokens(row, OPEN_IDS, CLOSE_IDS) or 0 for row in free]
    answers = [read(row) for row in free]
    curves = [by_length(some, row) for row in right]
    return {
        "by_budget": [_mean(row) for row in right],
        "by_length_and_budget": [list(curve) for curve in zip(*curves, strict=True)],
        "unforced": _mean(_right(some, answers)),
        "unforced_by_length": by_length(some, _right(some, answers)),
        "tokens_by_length": by_length(some, tokens),
        "closed": _mean([float(found.closed) for found in answers]),
    }


def measure_off(model: Decoder, some: Sequence[Problem]) -> dict[str, Any]:
    """Accuracy with thinking switched off."""
    right = _right(some, solve(model, some, thinking=False))
    return {"off": _mean(right), "off_by_length": by_length(some, right)}


def measure_waits(model: Decoder, some: Sequence[Problem]) -> dict[str, Any]:
    """More thought than the model wants.

    wait:    accuracy with the close replaced by "Wait" once and twice
    silent:  accuracy with the close withheld for two tokens (one line) more than a whole thought has, without a word
    longer:  on problems longer than any in training: unforced, with "Wait" once, and with the close withheld until
             the whole thought would fit; `longer_tokens` is how long it thinks there unforced
    """
    beyond = held_out_problems(len(some) // len(MEASURED), LONGER)
    full = {length: 2 * length - 1 for length in (*MEASURED, *LONGER)}

    def silent(group: Sequence[Problem], more: int) -> float:
        right = []
        for length in sorted({len(p.digits) for p in group}):
            part = [p for p in group if len(p.digits) == length]
            rows = write(model, part, least=full[length] + more, wait=False)
            right += _right(part, [read(row) for row in rows])
        return _mean(right)

    free = write(model, beyond)
    return {
        "wait": [accuracy(some, solve(model, some, waits=waits)) for waits in (1, 2)],
        "silent": silent(some, 2),
        "longer": accuracy(beyond, [read(row) for row in free]),
        "longer_tokens": by_length(beyond, [thinking_tokens(row, OPEN_IDS, CLOSE_IDS) or 0 for row in free]),
        "longer_wait": accuracy(beyond, solve(model, beyond, waits=1)),
        "longer_silent": silent(beyond, 0),
    }


def measure_faithfulness(model: Decoder, some: Sequence[Problem]) -> dict[str, Any]:
    """What the answer follows when the thought is wrong; each a pair of shares (what the thought says, the truth).

    other:     the whole thought of another problem, as long, with another result
    last:      its own thought with another last result
    early:     one result changed halfway, the rest thought by the model: what follows from the slip. Only problems
               where that differs from the truth, `early_problems` of them (a product may hide a slip)
    recovered: as `early`, with the close replaced by "Wait" once
    """
    others, last, early = [], [], []
    for i, problem in enumerate(some):
        same = [p for p in some if len(p.digits) == len(problem.digits) and p.answer != problem.answer]
        others.append((problem, same[7 * i % len(same)].results))
        last.append((problem, slipped(problem, len(problem.signs) - 1, 1 + i % 9)))
        results = slipped(problem, _halfway(problem), 1 + i % 9)
        if results[-1] != problem.results[-1]:
            early.append((problem, results))
    return {
        "other": _followed(model, others, closed=True),
        "last": _followed(model, last, closed=True),
        "early": _followed(model, early, closed=False),
        "recovered": _followed(model, early, closed=False, waits=1),
        "early_problems": len(early),
    }


def _halfway(problem: Problem) -> int:
    return (len(problem.signs) - 1) // 2


def _followed(
    model: Decoder, cases: Sequence[tuple[Problem, list[int]]], *, closed: bool, waits: int = 0
) -> list[float]:
    """Shares of (what the given results end in, the truth): results given whole and closed, or up to halfway."""
    begun = []
    for problem, results in cases:
        given = results if closed else results[: _halfway(problem) + 1]
        begun.append([OPEN_ID, *_thought_ids(given), *([CLOSE_ID, _ID["\n\n"]] if closed else [])])
    asked = [problem for problem, _ in cases]
    answers = [read(row).answer for row in write(model, asked, begun=begun, waits=waits)]
    said = [answer == str(results[-1]) for answer, (_, results) in zip(answers, cases, strict=True)]
    true = [verify(problem, answer) for answer, problem in zip(answers, asked, strict=True)]
    return [_mean(said), _mean(true)]


VOTES = (1, 3, 9, 27)
VOTE_BUDGETS = (5, 9)


def measure_votes(model: Decoder, some: Sequence[Problem]) -> dict[str, Any]:
    """Accuracy of the majority of 1, 3, 9 and 27 answers sampled at temperature 1, at each of two budgets."""
    found = []
    for most in VOTE_BUDGETS:
        many = [problem for problem in some for _ in range(VOTES[-1])]
        answers = solve(model, many, most=most, temperature=1.0, generator=seeded(7))
        rows = [answers[i : i + VOTES[-1]] for i in range(0, len(many), VOTES[-1])]
        voted = [[majority_vote([a.answer for a in row[:n]]) for row in rows] for n in VOTES]
        found.append([_mean([verify(p, v) for p, v in zip(some, vote, strict=True)]) for vote in voted])
    return {"votes": found}


@one_thread()
def measure(kind: str, model: Decoder, *, each: int = EACH) -> dict[str, Any]:
    """What a row says of a trained model; see the functions that it puts together."""
    some = held_out_problems(each)
    if kind == "direct":
        return measure_off(model, some)
    return (
        measure_off(model, some)
        | measure_budgets(model, some)
        | measure_waits(model, some)
        | measure_faithfulness(model, some)
        | measure_votes(model, some)
    )


def run(
    kind: str,
    seed: int,
    *,
    steps: int | None = None,
    each: int = EACH,
    save: Path | None = None,
) -> dict[str, Any]:
    """One model, trained and measured (see `measure`), two to three minutes on one core.

    training_tokens: how many it read. early_loss: the mean over the first 30 steps, to begin a run again by.
    loss_curve: the mean over each tenth of the steps.
    save: a file to keep the model's weights in; the facts about it are written beside it.
    """
    model, rows = train(kind, seed, steps=steps)
    losses = torch.tensor([row["loss"] for row in rows])
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": int(sum(row["tokens"] for row in rows)),
        "early_loss": float(losses[:EARLY].mean()),
        "loss_curve": [float(part.mean()) for part in losses.split(math.ceil(len(losses) / 10))],
        **measure(kind, model, each=each),
    }
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(dict(model.named_parameters()), save, {"recipe": NAME})
        facts = {"recipe": NAME, **environment(NAME), "seeds": [seed], "settings": SETTINGS}
        results = {
            name: row[name] for name in ("parameters", "training_tokens", "unforced", "by_budget", "off")
        }
        write_json(save.with_suffix(".json"), {**facts, "results": results})
    return row


def load_thinking(path: Path | None = None, *, device: torch.device | str = "cpu") -> Decoder:
    """The thinking model (seed 0 of the sweep), in eval mode; give it to `solve`.

    From the package's own files, or from `path`.
    """
    path = bundled(f"models/{NAME}.safetensors") if path is None else path
    model = make_model(0)
    load_weights(model, load_safetensors(path, device=device))
    return model.to(device).eval()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file of results.")] = Path(f"assets/results/{NAME}.json"),
    models: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("assets/models"),
) -> None:
    """Run what the file does not hold yet."""
    points = [{"kind": kind, "seed": seed} for seed in SEEDS for kind in KINDS]

    def point(kind: str, seed: int) -> dict[str, Any]:
        kept = models / f"{NAME}.safetensors" if seed == 0 and kind == "thinking" else None
        return run(kind, seed, save=kept)

    document = sweep(out, recipe=NAME, settings=SETTINGS, points=points, run=point)
    for row in document["rows"]:
        shown = f"off {row['off']:.3f}"
        if row["kind"] == "thinking":
            shown += f", unforced {row['unforced']:.3f}"
        typer.echo(f"{row['kind']}, seed {row['seed']}: {shown}")


if __name__ == "__main__":
    app()
