"""Plans by weeks over all chapters, written and planned ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_atlas.book.concepts import Chapter, chapters, load_concepts
from llm_atlas.book.course.marks import EXAMPLE_POINTS, FRESH_POINTS

__all__ = ["PLANS", "Week", "prerequisites", "syllabus"]


@dataclass(frozen=True)
class Week:
    """A week of a plan: its theme, its chapters by number, and something to do together."""

    theme: str
    chapters: tuple[int, ...]
    activity: str


PLANS: dict[str, tuple[Week, ...]] = {
    "Twelve weeks": (
        Week(
            "Attention and order",
            (1, 2),
            "Take one part out of SmolLM2 at a time. Guess the loss before you measure it.",
        ),
        Week(
            "Architectures and tokens",
            (3, 4),
            "Count the tokens of one paragraph in several languages. Explain the differences.",
        ),
        Week(
            "Learning to predict, learning a task",
            (5, 6),
            "Adapt one model with LoRA at several ranks. Plot quality against trained parameters.",
        ),
        Week(
            "Preferences and rewards",
            (7,),
            "Train against a weak verifier until it is fooled, then repair the verifier.",
        ),
        Week(
            "Fast inference",
            (8,),
            "Time decoding with and without a cache against length. Fit the two slopes.",
        ),
        Week(
            "Decoding, and training on a budget",
            (9, 10),
            "Read samples at five temperatures without their labels, and put them in order.",
        ),
        Week(
            "Many devices, small models", (11, 12), "Step a ring all-reduce by hand, each student one rank."
        ),
        Week(
            "Long context and prompts",
            (13, 14),
            "Plot perplexity past the trained length for every scaling method.",
        ),
        Week(
            "Scaling, activations, norms",
            (15, 16, 17),
            "Fit a scaling law to the small models. Predict a larger one, then look.",
        ),
        Week(
            "Evaluation",
            (18,),
            "Score one model on the same questions in three prompt formats. Compare the intervals.",
        ),
        Week(
            "Cheaper attention, harder training",
            (19, 20),
            "Take a claimed figure apart: what was compared with what?",
        ),
        Week(
            "Merging and agents",
            (21, 22),
            "Let an agent answer questions over the book's own text. Sort its failures.",
        ),
    ),
    "Six weeks": (
        Week(
            "The model",
            (1, 2, 3, 4),
            "Take one part out of SmolLM2 at a time. Guess the loss before you measure it.",
        ),
        Week(
            "Training it",
            (5, 6, 7),
            "Adapt one model with LoRA at several ranks. Plot quality against trained parameters.",
        ),
        Week(
            "Running it",
            (8, 9, 10),
            "Time decoding with and without a cache against length. Fit the two slopes.",
        ),
        Week(
            "Fitting it in",
            (11, 12, 13, 14),
            "Plot perplexity past the trained length for every scaling method.",
        ),
        Week(
            "Judging it",
            (15, 16, 17, 18),
            "Score one model on the same questions in three prompt formats. Compare the intervals.",
        ),
        Week(
            "Going further",
            (19, 20, 21, 22),
            "Let an agent answer questions over the book's own text. Sort its failures.",
        ),
    ),
}


def syllabus(*, link: bool = True) -> str:
    """The plans as Markdown, a heading and a table each; the concept list says what is written.

    With `link`, the titles are links of the site, to a chapter or to the table of one that is planned.
    """
    parts = []
    for name, plan in PLANS.items():
        rows = ["| Week | Chapters | To do together |", "|--:|---|---|"]
        for number, week in enumerate(plan, start=1):
            titles = "<br>".join(_title(chapter, link) for chapter in _of(week))
            size = f"{sum(len(chapter.concepts) for chapter in _of(week))} concepts"
            if done := sum(_exercises(chapter) for chapter in _of(week)):
                size += f"; written: {done} exercises, {done * (EXAMPLE_POINTS + FRESH_POINTS)} points"
            rows.append(f"| {number} | **{week.theme}**<br>{titles}<br>{size} | {week.activity} |")
        table = "\n".join(rows)
        if link:
            table = f"```{{table}}\n:widths: 8 54 38\n\n{table}\n```"
        parts.append(f"### {name}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _of(week: Week) -> list[Chapter]:
    return [chapters()[number - 1] for number in week.chapters]


def _exercises(chapter: Chapter) -> int:
    """How many exercises of a chapter are written: one a concept."""
    concepts = load_concepts()
    return sum(concepts[id_].is_written for id_ in chapter.concepts)


def _title(chapter: Chapter, link: bool) -> str:
    done = _exercises(chapter)
    state = "written" if done == len(chapter.concepts) else "begun" if done else "planned"
    title = f"{chapter.number}. {chapter.title}"
    if link:
        title = f"[{title}]({f'{chapter.slug}.ipynb' if done else f'table-{chapter.number}'})"
    return f"{title}, {state}"


def prerequisites(numbers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each of the chapters, the chapters that it needs and that are not among them."""
    concepts, found = load_concepts(), {}
    for number in numbers:
        needs = {concepts[n].number for id_ in chapters()[number - 1].concepts for n in concepts[id_].needs}
        if missing := needs - set(numbers):
            found[number] = tuple(sorted(missing))
    return found
