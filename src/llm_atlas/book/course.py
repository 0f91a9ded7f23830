"""The course kit: chapters as nbgrader assignments, with points and a plan by weeks.

`write_course` turns each chosen chapter into one assignment: the instructor's version with solutions and hidden
tests, and, made from it by nbgrader itself, the students' release without them. In a chapter an exercise is a
MyST directive, a cell with a blank `answer` and its check, and a solution directive; here it becomes

    NAME-answer    what the student edits; the solution in nbgrader's solution region
    NAME-check     the chapter's own check: fresh inputs, no points
    NAME-example   1 point: the smallest example, the same for everyone
    NAME-fresh     2 points, all or none: three runs of the check with seeds drawn when the notebook is graded

`mark` is what the last two call, in the kernel of a student's notebook, where neither nbgrader nor a MyST
parser is needed. Writing a course needs both: pip install "llm-atlas[course]".
"""

import ast
import contextlib
import csv
import importlib.util
import io
import itertools
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from llm_atlas.book.concepts import Chapter, chapters, load_concepts
from llm_atlas.core.assets import bundled

__all__ = [
    "EXAMPLE_POINTS",
    "FRESH_POINTS",
    "PLANS",
    "Exercise",
    "Week",
    "assignment",
    "mark",
    "prerequisites",
    "syllabus",
    "write_course",
    "written",
]

# What nbformat and markdown-it give; students have neither, so the names are not imported here.
NotebookNode = Token = Any

EXAMPLE_POINTS = 1
FRESH_POINTS = 2
# Runs of the check behind the points for fresh inputs.
RUNS = 3
# For nbgrader to make all releases; a chapter takes it a second or two.
RELEASE_SECONDS = 300
# Cells with this tag are for the instructor: nbgrader drops them from the release (see CONFIG).
INSTRUCTOR = "instructor"

CONFIG = f'''\
"""How nbgrader makes releases of this course and grades them. Run its commands in this folder."""

from nbconvert.preprocessors import TagRemovePreprocessor

c = get_config()  # noqa: F821  nbgrader defines it

c.CourseDirectory.course_id = "llm-atlas"
# A blank answer raises nothing, so that a student can always run the whole notebook.
c.ClearSolutions.code_stub = {{"python": "...  # your code here"}}
# The notes on solutions stand in cells tagged "{INSTRUCTOR}".
c.GenerateAssignment.preprocessors.prepend([TagRemovePreprocessor])
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = {{"{INSTRUCTOR}"}}
# Seconds a cell. An answer that never ends costs its own points, and the notebook goes on.
c.Execute.timeout = 120
'''


# ------------------------------------------------------------------------------------------- grading


class _Enough(BaseException):
    """The first example has been compared. No Exception, so that no grader takes it for a crash of the answer."""


def mark(concept: str, answer: Any = ..., *, example: bool = False) -> None:
    """Grade `answer` for nbgrader; AssertionError with the counterexample takes the cell's points.

    With `example`, on the first and smallest input of seed 0 alone. Otherwise in whole runs of the check with
    seeds that nobody has seen; the message names the seed, so that the run can be repeated. Outside nbgrader's
    grading and validation nothing is raised: the verdict is printed and the notebook goes on. ValueError for an
    unknown concept or one without an exercise.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # nbgrader takes anything on stderr for a failure, even a warning from a right answer
        warnings.simplefilter("ignore")
        told = _first_fault(concept, answer) if example else _fault(concept, answer)
    if told and os.environ.get("NBGRADER_EXECUTION"):
        raise AssertionError(told)
    print(told or f"✓ {concept}: {'the smallest example' if example else 'fresh inputs'}: right")


def _fault(concept: str, answer: Any) -> str:
    from llm_atlas.book.checks import check

    for _ in range(RUNS):
        seed = secrets.randbelow(2**53)
        verdict = check(concept, answer, seed=seed)
        if not verdict:
            return f"{verdict!r}\nThe same inputs again: check({concept!r}, answer, seed={seed})"
    return ""


def _first_fault(concept: str, answer: Any) -> str:
    from llm_atlas.book.checks import check

    calls = itertools.count()

    def once(*inputs: Any) -> Any:
        if next(calls):
            raise _Enough
        return answer(*inputs)

    try:
        verdict = check(concept, once if callable(answer) else answer, seed=0)
    except _Enough:
        return ""
    return "" if verdict else repr(verdict)


# ------------------------------------------------------------------------------- a chapter's notebook


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise of an assignment: the concept's id, and the title that the chapter gives it."""

    concept: str
    title: str


@dataclass
class _Piece:
    """Part of a cell: `text` for markdown, `cell` for code, a directive's title, label and body."""

    kind: str
    where: str
    id: str
    text: str = ""
    title: str = ""
    label: str = ""
    cell: Any = None


@lru_cache(maxsize=1)
def _parser() -> Any:
    # the site's own parser, so that what is a directive there is one here
    from markdown_it.renderer import RendererHTML
    from myst_parser.config.main import MdParserConfig
    from myst_parser.parsers.mdit import create_md_parser

    extensions = {"amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"}
    return create_md_parser(MdParserConfig(enable_extensions=extensions | {"substitution"}), RendererHTML)


def _directives(text: str, where: str) -> list[tuple[Token, str]]:
    """The directives of a text, outermost only, with their names."""
    found = []
    for token in _parser().parse(text):
        if token.type in ("fence", "colon_fence") and (name := _DIRECTIVE.match(token.info)):
            if token.level:
                raise ValueError(f"{where}: directive {name[1]!r} stands inside a list or a quotation")
            found.append((token, name[1]))
    return found


def _body(token: Token, name: str) -> tuple[str, dict[str, str], str]:
    """A directive's argument, options and body."""
    from docutils.parsers.rst import Directive
    from myst_parser.parsers.directives import parse_directive_text

    class AnyDirective(Directive):
        optional_arguments = 1
        final_argument_whitespace = True
        has_content = True
        option_spec: ClassVar = {"label": str}  # all options are read; with no list, none would be

    first = token.info.strip()[len(name) + 2 :].strip()
    result = parse_directive_text(AnyDirective, first, token.content, validate_options=False)
    return " ".join(result.arguments), result.options, "\n".join(result.body).strip("\n")


def _split(cell: NotebookNode, where: str) -> Iterator[_Piece]:
    """A cell as pieces: exercises and solutions apart from the text around them."""
    if cell.cell_type != "markdown":
        yield _Piece(cell.cell_type, where, cell.id, cell=cell)
        return
    lines, done, count = cell.source.split("\n"), 0, 0

    def piece(kind: str, **more: str) -> _Piece:
        nonlocal count
        count += 1
        return _Piece(kind, where, cell.id if count == 1 else f"{cell.id}-{count}", **more)

    for token, name in _directives(cell.source, where):
        if name not in ("exercise", "solution"):
            continue
        argument, options, body = _body(token, name)
        before = "\n".join(lines[done : token.map[0]]).strip("\n")
        if before:
            yield piece("text", text=before)
        done = token.map[1]
        label = options.get("label", "") if name == "exercise" else argument
        if not label:
            raise ValueError(f"{where}: the {name} has no label")
        yield piece(name, text=body, title=argument, label=label)
    rest = "\n".join(lines[done:]).strip("\n")
    if rest:
        yield piece("text", text=rest)


def _check_cell(source: str, where: str, concept: str) -> tuple[str, ast.FunctionDef]:
    """What stands above the check in an exercise's code cell, and the blank in it."""
    tree = ast.parse(source)
    blanks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "answer"]
    match tree.body[-1:]:
        case [ast.Expr(ast.Call(ast.Name("check"), [ast.Constant(id_), ast.Name("answer")], [])) as last]:
            pass
        case _:
            raise ValueError(f'{where}: the exercise\'s cell must end with check("{concept}", answer)')
    if id_ != concept:
        raise ValueError(f"{where}: exercise 'ex-{concept}' is checked as {id_!r}")
    match blanks:
        case [ast.FunctionDef(body=[ast.Expr(ast.Constant(value=value))]) as blank] if value is ...:
            pass
        case _:
            raise ValueError(f"{where}: the exercise's cell must hold one blank, def answer(...): ...")
    return "\n".join(source.split("\n")[: last.lineno - 1]).strip("\n"), blank


def _solution(piece: _Piece) -> tuple[str, str]:
    """The code of a solution, and the notes around it."""
    lines = piece.text.split("\n")
    blocks = [t for t in _parser().parse(piece.text) if t.type == "fence" and t.info.strip() == "python"]
    if len(blocks) != 1:
        raise ValueError(
            f"{piece.where}: the solution of {piece.label!r} must hold one python block, not {len(blocks)}"
        )
    begin, end = blocks[0].map
    return blocks[0].content, "\n".join(lines[:begin] + lines[end:]).strip("\n")


def _answer_cell(above: str, blank: ast.FunctionDef, code: str, where: str) -> str:
    """The cell that a student edits, with the solution's body in nbgrader's region."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"{where}: the solution is not Python: {error.msg}") from None
    match tree.body:
        case [ast.FunctionDef(name="answer") as given]:
            pass
        case _:
            raise ValueError(f"{where}: the solution must be one function, def answer(...)")
    if ast.dump(given.args) != ast.dump(blank.args):
        raise ValueError(
            f"{where}: the solution takes ({ast.unparse(given.args)}), the blank ({ast.unparse(blank.args)})"
        )
    lines = code.rstrip().split("\n")
    if given.body[0].lineno == given.lineno:  # def answer(x): return x
        lines = ast.unparse(given).split("\n")
        given = ast.parse("\n".join(lines)).body[0]
    head, body = lines[: given.body[0].lineno - 1], lines[given.body[0].lineno - 1 :]
    kept = "\n".join(above.split("\n")[: blank.lineno - 1])
    region = ["    ### BEGIN SOLUTION", *body, "    ### END SOLUTION"]
    return "\n".join([*([kept] if kept else []), *head, *region])


def _locked(source: str, grade_id: str, points: int = 0) -> NotebookNode:
    from nbformat.v4 import new_code_cell

    graded = {"grade": True, "points": points} if points else {"grade": False}
    return new_code_cell(
        source, id=grade_id, metadata={"nbgrader": _nbgrader(grade_id, locked=True, **graded)}
    )


def _nbgrader(grade_id: str, **values: Any) -> dict[str, Any]:
    fixed = {"schema_version": 3, "grade": False, "solution": False, "task": False, "cell_type": "code"}
    return fixed | values | {"grade_id": grade_id}


def _exercise_cells(exercise: _Piece, code: NotebookNode, solution: _Piece) -> Iterator[NotebookNode]:
    from nbformat.v4 import new_code_cell

    concept = exercise.label.removeprefix("ex-")
    above, blank = _check_cell(code.source, exercise.where, concept)
    source = _answer_cell(above, blank, _solution(solution)[0], solution.where)
    answer = f"{concept}-answer"
    yield new_code_cell(
        source, id=answer, metadata={"nbgrader": _nbgrader(answer, solution=True, locked=False)}
    )
    yield _locked(
        f'# No points: try as often as you like, the inputs are new each time.\ncheck("{concept}", answer)',
        f"{concept}-check",
    )
    call = f'from llm_atlas.book.course import mark\n\nmark("{concept}", answer'
    yield _locked(
        f"# {EXAMPLE_POINTS} point: the smallest example.\n{call}, example=True)",
        f"{concept}-example",
        EXAMPLE_POINTS,
    )
    yield _locked(
        f"# {FRESH_POINTS} points: fresh inputs, drawn when this notebook is graded.\n"
        f"### BEGIN HIDDEN TESTS\n{call})\n### END HIDDEN TESTS",
        f"{concept}-fresh",
        FRESH_POINTS,
    )


def _pieces(path: Path) -> list[_Piece]:
    import nbformat

    nb = nbformat.read(path, as_version=4)
    return [
        piece
        for cell in nb.cells
        # the badge and the installation of Colab would lead a student to the solutions
        if "remove-cell" not in cell.metadata.get("tags", [])
        for piece in _split(cell, f"{path.name}, cell {cell.id}")
    ]


def assignment(path: Path) -> tuple[NotebookNode, tuple[Exercise, ...]]:
    """The instructor's version of a chapter's notebook, and its exercises in order.

    ValueError with file and cell for an exercise without a check or a solution, a solution without an exercise,
    a check outside an exercise, and for MyST that has no form in Jupyter.
    """
    from nbformat.v4 import new_markdown_cell, new_notebook

    pieces = _pieces(path)
    solutions = {piece.label: piece for piece in pieces if piece.kind == "solution"}
    anchors = _anchors(pieces)
    cells, exercises = [], []
    taken: set[int] = set()
    for place, piece in enumerate(pieces):
        if piece.kind == "exercise":
            if piece.label not in solutions:
                raise ValueError(f"{piece.where}: exercise {piece.label!r} has no solution")
            code = next((p for p in pieces[place + 1 : place + 2] if p.kind == "code"), None)
            if code is None:
                raise ValueError(
                    f"{piece.where}: exercise {piece.label!r} has no code cell with a check after it"
                )
            taken.add(id(code))
            worth = f"{EXAMPLE_POINTS + FRESH_POINTS} points"
            head = f"**Exercise. {piece.title}** ({worth})"
            cells.append(
                new_markdown_cell(f"{head}\n\n{_plain(piece.text, piece.where, anchors)}", id=piece.id)
            )
            asked = _Piece("code", code.where, code.id, label=piece.label)
            cells.extend(_exercise_cells(asked, code.cell, solutions[piece.label]))
            exercises.append(Exercise(concept=piece.label.removeprefix("ex-"), title=piece.title))
        elif piece.kind == "solution":
            if piece.label not in {f"ex-{e.concept}" for e in exercises}:
                raise ValueError(f"{piece.where}: solution {piece.label!r} has no exercise above it")
            if notes := _solution(piece)[1]:
                told = f"**Solution.** {_plain(notes, piece.where, anchors)}"
                cells.append(new_markdown_cell(told, id=piece.id, metadata={"tags": [INSTRUCTOR]}))
        elif piece.kind == "text":
            cells.append(new_markdown_cell(_plain(piece.text, piece.where, anchors), id=piece.id))
        elif id(piece) not in taken:
            if re.search(r"^check\(", piece.cell.source, re.MULTILINE):
                raise ValueError(f"{piece.where}: a check that belongs to no exercise")
            cell = piece.cell.copy()
            cell.metadata = {}
            cells.append(cell)
    if not exercises:
        raise ValueError(f"{path.name}: no exercise, so nothing to grade")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel}), tuple(exercises)


# --------------------------------------------------------------------------- MyST as Jupyter draws it

_DIRECTIVE = re.compile(r"\{([\w:-]+)\}")
_BOXES = [
    "admonition",
    "attention",
    "caution",
    "danger",
    "dropdown",
    "hint",
    "important",
    "note",
    "seealso",
    "tip",
    "warning",
]
_TEXT_ROLES = ("ref", "term", "doc", "numref", "eq", "prf:ref")


def _anchors(pieces: Sequence[_Piece]) -> dict[str, str]:
    """The targets above headings, and the anchor that Jupyter gives to each of the headings."""
    found = {}
    for piece in pieces:
        tokens = _parser().parse(piece.text) if piece.kind == "text" else []
        for target, heading, title in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if target.type == "myst_target" and heading.type == "heading_open":
                found[target.content] = "#" + title.content.replace(" ", "-")
    return found


def _plain(text: str, where: str, anchors: Mapping[str, str]) -> str:
    """A text of the book in the Markdown that Jupyter draws: no targets, directives, roles, links to pages."""
    lines = text.split("\n")
    blocks: list[tuple[int, int, list[str]]] = []
    maps: list[list[int]] = []  # the lines of every open block; a table's cells have none of their own
    for token in _parser().parse(text):
        if token.nesting == 1:
            maps.append(token.map or maps[-1])
        elif token.nesting == -1:
            maps.pop()
        elif token.type in ("myst_target", "myst_line_comment"):
            blocks.append((*token.map, []))
        elif token.type in ("fence", "colon_fence") and (name := _DIRECTIVE.match(token.info)):
            blocks.append((*token.map, _box(token, name[1], where, anchors).split("\n")))
        elif token.type == "inline":
            begin, end = token.map or maps[-1]
            lines[begin:end] = _inline("\n".join(lines[begin:end]), token, where, anchors).split("\n")
        elif token.type.startswith(("myst_", "substitution")):
            raise ValueError(f"{where}: {token.type} has no form in Jupyter")
    for begin, end, new in reversed(blocks):
        lines[begin:end] = new
    return "\n".join(lines).strip("\n")


def _box(token: Token, name: str, where: str, anchors: Mapping[str, str]) -> str:
    """An admonition as a quotation with a bold title, displayed mathematics between dollar signs."""
    argument, _, body = _body(token, name)
    if token.level:
        raise ValueError(f"{where}: directive {name!r} stands inside a list or a quotation")
    if name == "math":
        return f"$$\n{body}\n$$"
    if name not in _BOXES:
        raise ValueError(f"{where}: directive {name!r} has no form in Jupyter yet; course.py gives it one")
    text = f"**{argument or name.capitalize()}**\n\n{_plain(body, where, anchors)}"
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _inline(block: str, token: Token, where: str, anchors: Mapping[str, str]) -> str:
    """The source of a block with the links and roles of its `token` rewritten; as many lines as before."""

    def swap(pattern: str, new: str | Callable[[re.Match[str]], str]) -> None:
        nonlocal block
        block, count = re.subn(pattern, new, block, count=1)
        if not count:
            raise ValueError(f"{where}: cannot rewrite {pattern!r}")

    for child in token.children or ():
        if child.type == "image" and "://" not in child.attrs["src"]:
            raise ValueError(
                f"{where}: image {child.attrs['src']!r} is a file, which a course does not carry"
            )
        if child.type == "link_open" and "://" not in (target := str(child.attrs["href"])):
            here = re.escape(target.removeprefix("#"))
            anchor = anchors.get(target.removeprefix("#"))
            swap(
                rf"\[([^\]]*)\]\(#?{here}\)",
                lambda m, anchor=anchor: f"[{m[1]}]({anchor})" if anchor else m[1],
            )
        if child.type == "myst_role":
            name, content = child.meta["name"], child.content
            swap(re.escape(f"{{{name}}}`{content}`"), lambda _, n=name, c=content: _role(n, c, where))
        if child.type.startswith("substitution"):
            raise ValueError(f"{where}: {child.type} has no form in Jupyter")
    return block


def _role(name: str, content: str, where: str) -> str:
    if name in ("cite", "cite:t", "cite:p"):
        return ", ".join(_citation(key.strip(), where) for key in content.split(","))
    if name in _TEXT_ROLES or name.startswith("py:"):
        return content.partition("<")[0].strip() or content
    if name == "octicon":
        return ""
    raise ValueError(f"{where}: role {name!r} has no form in Jupyter yet; course.py gives it one")


@lru_cache(maxsize=1)
def _bibliography() -> Any:
    from pybtex.database import parse_file

    return parse_file(str(bundled("references.bib"))).entries


def _citation(key: str, where: str) -> str:
    """Author and year, linked to the paper where it has an address."""
    if key not in _bibliography():
        raise ValueError(f"{where}: {key!r} is not in references.bib")
    entry = _bibliography()[key]
    names = [" ".join(person.last_names) for person in entry.persons.get("author", [])]
    who = names[0] if len(names) == 1 else f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    told = f"{who.replace('and others', 'et al.')} {entry.fields['year']}"
    return f"[{told}]({entry.fields['url']})" if "url" in entry.fields else told


# ------------------------------------------------------------------------------------ plans by weeks


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
    return sum(concepts[id_].state != "planned" for id_ in chapter.concepts)


def _title(chapter: Chapter, link: bool) -> str:
    is_written = _exercises(chapter) > 0
    title = f"{chapter.number}. {chapter.title}"
    if link:
        title = f"[{title}]({f'{chapter.slug}.ipynb' if is_written else f'table-{chapter.number}'})"
    return f"{title}, {'written' if is_written else 'planned'}"


def prerequisites(numbers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each of the chapters, the chapters that it needs and that are not among them."""
    concepts, found = load_concepts(), {}
    for number in numbers:
        needs = {concepts[n].number for id_ in chapters()[number - 1].concepts for n in concepts[id_].needs}
        if missing := needs - set(numbers):
            found[number] = tuple(sorted(missing))
    return found


# ----------------------------------------------------------------------------------------- the course


def written(folder: Path) -> dict[int, Path]:
    """The notebooks of the chapters that `folder` holds, by number."""
    paths = {chapter.number: folder / f"{chapter.slug}.ipynb" for chapter in chapters()}
    return {number: path for number, path in paths.items() if path.is_file()}


def _chosen(numbers: Sequence[int], folder: Path) -> dict[int, Path]:
    have, last = written(folder), len(chapters())
    if not have:
        raise ValueError(f"{folder} holds no chapter; run this in the root of the book's repository")
    for number in numbers:
        if not 1 <= number <= last:
            raise ValueError(f"chapter {number} must be 1 to {last}")
        if number not in have:
            title, ready = chapters()[number - 1].title, ", ".join(map(str, have))
            raise ValueError(f"chapter {number}, {title}, is not written yet; written: {ready}")
    return {number: have[number] for number in sorted(set(numbers) or have)}


def _require_tools() -> None:
    wanted = {
        "nbgrader": "nbgrader",
        "myst_parser": "myst-parser",
        "nbformat": "nbformat",
        "pybtex": "pybtex",
    }
    missing = [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"a course needs {', '.join(missing)}: pip install 'llm-atlas[course]'")


def write_course(
    output: Path, numbers: Sequence[int] = (), *, folder: Path = Path("chapters")
) -> dict[int, tuple[Exercise, ...]]:
    """Write a course of these chapters, all written ones if none is given; the exercises of each.

    `output` gets source/ and release/ with an assignment a chapter, gradebook.db, nbgrader_config.py,
    points.csv, points.md, syllabus.md and README.md. An earlier course there is replaced, unless it holds
    students' work. Nothing is left half written. ValueError for an unknown or unwritten chapter, for a notebook
    that breaks the rules of `assignment`, for a folder that is in use, and without nbgrader.
    """
    _require_tools()
    chosen = _chosen(numbers, folder)
    _check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as made:
        root = Path(made) / "course"
        root.mkdir()
        (root / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
        exercises = {number: _write_source(path, root) for number, path in chosen.items()}
        _release(root)
        _check_release(root)
        _write_points(exercises, root)
        (root / "syllabus.md").write_text(f"# Syllabus\n\n{syllabus(link=False)}", encoding="utf-8")
        (root / "README.md").write_text(_README, encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(root, output)
    return exercises


def _check_output(output: Path) -> None:
    for name in ("submitted", "autograded", "feedback"):
        if (output / name).exists():
            raise ValueError(f"{output} holds students' work ({name}/); choose another folder")
    if output.exists() and (not output.is_dir() or {*os.listdir(output)} - _WRITTEN):
        raise ValueError(f"{output} holds something else than a course; choose another folder")


def _write_source(path: Path, root: Path) -> tuple[Exercise, ...]:
    import nbformat

    nb, exercises = assignment(path)
    nbformat.validate(nb)
    place = root / "source" / path.stem / path.name
    place.parent.mkdir(parents=True)
    nbformat.write(nb, place)
    return exercises


def _release(root: Path) -> None:
    """Let nbgrader make the students' version of every assignment, and enter the points into its gradebook."""
    scripts = sysconfig.get_path("scripts")
    # nbgrader starts alembic by its bare name, which a virtual environment that is not activated does not have
    environment = os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
        "JUPYTER_CONFIG_DIR": str(root.parent / "jupyter"),  # the user's own settings may name other folders
    }
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", "--assignment=*"]
    try:
        subprocess.run(
            command,
            cwd=root,
            env=environment,
            check=True,
            timeout=RELEASE_SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"nbgrader made no release within {RELEASE_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        told = [line for line in error.stdout.splitlines() if "ERROR" in line or "Error:" in line]
        reason = told[0].strip() if told else f"status {error.returncode}"
        raise ValueError(f"nbgrader made no release: {reason}") from None


def _check_release(root: Path) -> None:
    """nbgrader passes over a configuration that it cannot read; then the release would tell too much."""
    import nbformat

    for path in sorted((root / "release").glob("*/*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for secret in ("BEGIN SOLUTION", "BEGIN HIDDEN TESTS"):
                if secret in cell.source:
                    raise ValueError(f"the release of {path.parent.name} still holds {secret}")
            if INSTRUCTOR in cell.metadata.get("tags", []):
                raise ValueError(f"the release of {path.parent.name} still holds the instructor's notes")


def _write_points(exercises: Mapping[int, Sequence[Exercise]], root: Path) -> None:
    each = EXAMPLE_POINTS + FRESH_POINTS
    with (root / "points.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["chapter", "assignment", "concept", "exercise", "example", "fresh", "points"])
        for number, rows in exercises.items():
            slug = chapters()[number - 1].slug
            for row in rows:
                table.writerow([number, slug, row.concept, row.title, EXAMPLE_POINTS, FRESH_POINTS, each])
    parts = ["# Points"]
    for number, rows in exercises.items():
        lines = ["| Exercise | Concept | Smallest example | Fresh inputs | Points |", "|---|---|--:|--:|--:|"]
        lines += [f"| {r.title} | {r.concept} | {EXAMPLE_POINTS} | {FRESH_POINTS} | {each} |" for r in rows]
        total = len(rows)
        lines += [f"| **Total** | | {total * EXAMPLE_POINTS} | {total * FRESH_POINTS} | **{total * each}** |"]
        parts.append(f"## {number}. {chapters()[number - 1].title}\n\n" + "\n".join(lines))
    (root / "points.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# What a course consists of before students hand in anything.
_WRITTEN = {
    "README.md",
    "gradebook.db",
    "nbgrader_config.py",
    "points.csv",
    "points.md",
    "release",
    "source",
    "syllabus.md",
    ".ipynb_checkpoints",
}
_README = """\
# A course from LLM Atlas

- `release/` is for the students: no solutions, no hidden tests.
- `source/` is yours: solutions, hidden tests, notes. Keep it, and `gradebook.db`, to yourself.
- `points.md` and `points.csv` list the points, `syllabus.md` the plans by weeks.

Copy this folder to where you teach from. Activate the environment that nbgrader is installed in, and run:

    nbgrader generate_assignment ASSIGNMENT --force   # after a change in source/
    nbgrader autograde ASSIGNMENT                     # grades submitted/STUDENT/ASSIGNMENT/
    nbgrader generate_feedback ASSIGNMENT             # a page for each student, with the counterexamples
    nbgrader export                                   # all marks as grades.csv

Students need the package `llm-atlas`; grading runs their code, so do it in a container.
"""
