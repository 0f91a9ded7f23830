"""The course kit: what students get, what nbgrader gives for it, and the plans."""

import contextlib
import csv
import functools
import html
import io
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llm_atlas.book.checks import check
from llm_atlas.book.concepts import chapters, load_concepts
from llm_atlas.book.course import (
    EXAMPLE_POINTS,
    FRESH_POINTS,
    PLANS,
    Week,
    assignment,
    kit,
    mark,
    prerequisites,
    syllabus,
    write_course,
    written,
)
from llm_atlas.book.course import marks as marking
from llm_atlas.book.course import myst as dialect

ROOT = Path(__file__).resolve().parent.parent.parent
CHAPTERS = ROOT / "chapters"
NAME = "01-core-transformer"
CHAPTER = CHAPTERS / f"{NAME}.ipynb"
# Four exercises of the chapter, so that grading needs no model and starts in seconds.
FEW = ("self-attention", "causal-mask", "feed-forward", "layer-norm")


def exercise_cells(nb: NotebookNode, concepts: Sequence[str]) -> list[NotebookNode]:
    """Markdown with the exercise, code, markdown with the solution, of each."""
    found = []
    for concept in concepts:
        place = next(i for i, cell in enumerate(nb.cells) if f":label: ex-{concept}\n" in cell.source)
        found += nb.cells[place : place + 3]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nb = nbformat.read(CHAPTER, as_version=4)
    start = new_code_cell("import math\n\nimport torch\n\nfrom llm_atlas.book import check", id="start")
    nb.cells = [new_markdown_cell("# A chapter", id="title"), start, *exercise_cells(nb, FEW)]
    path = tmp_path_factory.mktemp("chapters") / CHAPTER.name
    nbformat.write(nb, path)
    return path.parent


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "course"
    write_course(output, folder=folder)
    return output


def read(root: Path, version: str) -> NotebookNode:
    return nbformat.read(root / version / NAME / f"{NAME}.ipynb", as_version=4)


def graded(nb: NotebookNode) -> dict[str, NotebookNode]:
    return {cell.metadata.nbgrader.grade_id: cell for cell in nb.cells if "nbgrader" in cell.metadata}


def solutions(nb: NotebookNode) -> dict[str, str]:
    return {
        name.removesuffix("-answer"): cell.source
        for name, cell in graded(nb).items()
        if cell.metadata.nbgrader.solution
    }


@functools.cache
def chapter_solutions() -> dict[str, str]:
    return solutions(assignment(CHAPTER)[0])


def function(source: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(f"import math\nimport torch\n{source}", names)
    return names["answer"]


def remembered(concept: str, right: Callable[..., Any]) -> str:
    """An answer that returns what the public example wants, whatever it is asked."""
    results = []

    def spy(*inputs: Any) -> Any:
        results.append(right(*inputs))
        return results[-1]

    check(concept, spy, seed=0)
    value = results[0]
    told = f"torch.tensor({value.tolist()})" if isinstance(value, torch.Tensor) else repr(value)
    return f"def answer(*inputs):\n    return {told}\n"


# ---- what the students get


def test_the_release_holds_no_solution_and_no_hidden_test(made: Path):
    source, release = read(made, "source"), read(made, "release")
    text = "\n".join(cell.source for cell in release.cells)
    assert set(solutions(source)) == set(FEW)
    for answer in solutions(source).values():
        body = answer.partition("BEGIN SOLUTION\n")[2].partition("    ### END")[0].strip().split("\n")
        assert body
        assert [line for line in body if line in text] == []
    for word in ("SOLUTION", "HIDDEN", "**Solution.**", "{solution}", "{exercise}"):
        assert word not in text
    assert "**Solution.**" in "\n".join(cell.source for cell in source.cells)
    for concept in FEW:
        cells = graded(release)
        assert cells[f"{concept}-answer"].source.endswith(":\n    ...  # your code here")
        assert "mark(" not in cells[f"{concept}-fresh"].source
        assert "mark(" in graded(source)[f"{concept}-fresh"].source
        assert cells[f"{concept}-answer"].metadata.get("editable", True)
        assert not cells[f"{concept}-fresh"].metadata.editable
    assert all(not cell.get("outputs") for cell in release.cells)


def test_a_blank_release_runs_to_its_end(made: Path, capsys: pytest.CaptureFixture[str]):
    names: dict[str, Any] = {}
    for cell in read(made, "release").cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    assert capsys.readouterr().out.count("unattempted") == len(FEW)


def test_the_points_are_those_of_the_cells(made: Path):
    rows = list(csv.DictReader((made / "points.csv").read_text().splitlines()))
    assert [row["concept"] for row in rows] == list(FEW)
    cells = graded(read(made, "release")).values()
    total = sum(cell.metadata.nbgrader.get("points", 0) for cell in cells)
    assert sum(int(row["points"]) for row in rows) == total == len(FEW) * (EXAMPLE_POINTS + FRESH_POINTS)
    assert f"**{total}** |" in (made / "points.md").read_text()


def test_the_course_lies_in_one_folder_that_can_be_moved(made: Path):
    assert {path.name for path in made.iterdir()} == kit._WRITTEN - {".ipynb_checkpoints"}
    assert list(made.parent.iterdir()) == [made], "something was left beside it"
    assert str(made.parent).encode() not in (made / "gradebook.db").read_bytes()
    assert "### Twelve weeks" in (made / "syllabus.md").read_text()


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in written(CHAPTERS).values()])
def test_every_chapter_becomes_an_assignment(path: Path):
    nb, exercises = assignment(path)
    nbformat.validate(nb)
    assert nb == assignment(path)[0], "not the same twice"
    done = [c.id for c in load_concepts().values() if c.chapter == path.stem and c.state != "planned"]
    assert [exercise.concept for exercise in exercises] == done
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    left = re.findall(r"^\([\w-]+\)=$|^(?:```|:::)\{.*$|(?<!\\)\{[\w:]+\}`.*?`", text, re.MULTILINE)
    assert left == []
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not re.match(r"#|https?://", link)] == []


def test_the_solutions_of_a_chapter_pass_their_own_tests():
    for concept, source in chapter_solutions().items():
        mark(concept, function(source))
        mark(concept, function(source), example=True)


# ---- what nbgrader gives for it

SLIPS = {
    "causal-mask": "def answer(queries, keys):\n    return torch.ones(queries, keys).triu().bool()\n",
    "feed-forward": "def answer(dim, hidden, gated, bias):\n    return 2 * dim * hidden\n",
    "layer-norm": "def answer(x, gamma, beta, eps):\n    return 1 / 0\n",
}
# The count without gate and bias is the smallest example, so that a student who stops there has a point.
EARNED = {("self-attention", "example"), ("feed-forward", "example")}


def submit(made: Path, root: Path, student: str, answers: dict[str, str], *, tampered: bool = False) -> None:
    nb = read(made, "release")
    for name, cell in graded(nb).items():
        if name.removesuffix("-answer") in answers and name.endswith("-answer"):
            cell.source = answers[name.removesuffix("-answer")]
        elif tampered and cell.metadata.nbgrader.grade:
            cell.source = "pass"
            cell.metadata.nbgrader.points = 100
    path = root / "submitted" / student / NAME / f"{NAME}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def marked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the course with three submissions, graded, and the feedback for one of them."""
    root = tmp_path_factory.mktemp("term") / "course"
    shutil.copytree(made, root)
    right = solutions(read(made, "source"))
    stored = remembered("self-attention", function(right["self-attention"]))
    noisy = "import warnings\n\n\n" + right["causal-mask"].replace(
        "    ### BEGIN SOLUTION", '    print("asked")\n    warnings.warn("old")'
    )
    submit(made, root, "right", right | {"causal-mask": noisy})
    submit(made, root, "half", {name: right[name] for name in FEW[:2]})
    submit(made, root, "wrong", SLIPS | {"self-attention": stored}, tampered=True)
    for command in (["autograde", NAME], ["generate_feedback", NAME, "--student=wrong"]):
        subprocess.run(
            [sys.executable, "-m", "nbgrader", *command],
            cwd=root,
            env=environment(root),
            check=True,
            timeout=200,
            capture_output=True,
        )
    return root


def environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "PYTHONPATH": str(Path(kit.__file__).parents[3]),
        "JUPYTER_CONFIG_DIR": str(root.parent / "jupyter"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def marks(marked: Path) -> dict[str, dict[tuple[str, str], float]]:
    """The gradebook: for each student, the score of every graded cell by concept and kind."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("PATH", environment(marked)["PATH"])
        warnings.simplefilter("ignore")  # nbgrader's own
        from nbgrader.api import Gradebook

        with Gradebook(f"sqlite:///{marked}/gradebook.db", "llm-atlas") as book:
            assert book.find_assignment(NAME).max_score == len(FEW) * (EXAMPLE_POINTS + FRESH_POINTS)
            return {
                submission.student.id: {
                    tuple(grade.name.rsplit("-", 1)): grade.score
                    for grade in book.find_submission_notebook(NAME, NAME, submission.student.id).grades
                }
                for submission in book.assignment_submissions(NAME)
            }


POINTS = {"example": EXAMPLE_POINTS, "fresh": FRESH_POINTS}


@pytest.mark.slow
def test_a_right_submission_has_every_point(marks: dict):
    assert marks["right"] == {(name, kind): POINTS[kind] for name in FEW for kind in POINTS}


@pytest.mark.slow
def test_a_half_right_submission_has_half_of_them(marks: dict):
    assert marks["half"] == {
        (name, kind): POINTS[kind] * (name in FEW[:2]) for name in FEW for kind in POINTS
    }
    assert 2 * sum(marks["half"].values()) == sum(marks["right"].values())


@pytest.mark.slow
def test_a_wrong_submission_has_what_its_examples_earn(marks: dict):
    """A stored answer passes the example and fails on fresh inputs; emptied tests are put back."""
    assert marks["wrong"] == {
        (name, kind): POINTS[kind] * ((name, kind) in EARNED) for name in FEW for kind in POINTS
    }


@pytest.mark.slow
def test_the_feedback_names_the_counterexample(marked: Path):
    page = (marked / "feedback" / "wrong" / NAME / f"{NAME}.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "the mask looks ahead, at later keys instead of earlier ones" in text
    assert re.search(r"\n  queries +2\n", text), "the input is missing"
    assert "it stopped with ZeroDivisionError" in text
    assert re.search(r"The same inputs again: check\('self-attention', answer, seed=\d+\)", text)


# ---- marking, without nbgrader


def test_a_cell_that_cannot_be_read_is_not_marked_by_the_answer_before_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    nb, _ = assignment(CHAPTER)
    cells = {cell.id: cell.source for cell in nb.cells if cell.cell_type == "code"}
    space: dict[str, Any] = {"math": math, "torch": torch}
    exec(cells["self-attention-answer"], space)
    exec(cells["self-attention-fresh"], space)
    with pytest.raises(AssertionError, match="multi-head-attention: unattempted"):
        exec(cells["multi-head-attention-fresh"], space)  # its answer's cell stopped with a SyntaxError


@pytest.fixture
def grading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")


CONCEPTS = [concept.id for concept in load_concepts().values() if concept.chapter == NAME]


@pytest.mark.usefixtures("grading")
@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_stored_answer_passes_the_example_alone(concept: str):
    right = function(chapter_solutions()[concept])
    stored = function(remembered(concept, right))
    mark(concept, right)
    mark(concept, stored, example=True)
    with pytest.raises(AssertionError, match=f"✗ {concept}: wrong"):
        mark(concept, stored)


@pytest.mark.usefixtures("grading")
@pytest.mark.parametrize("concept", CONCEPTS)
@pytest.mark.parametrize("answer", [..., lambda *_: None, lambda *_: torch.zeros(9, 9, 9), lambda: 1])
def test_neither_blank_nor_nonsense_passes(concept: str, answer: Any):
    for example in (True, False):
        with pytest.raises(AssertionError, match=concept):
            mark(concept, answer, example=example)


@pytest.mark.usefixtures("grading")
def test_the_seed_of_a_fault_repeats_it():
    def nearly(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out + (q.shape[0] == 4)

    with pytest.raises(AssertionError) as caught:
        mark("self-attention", nearly)
    *told, again = str(caught.value).split("\n")
    seed = int(re.search(r"seed=(\d+)", again)[1])
    assert repr(check("self-attention", nearly, seed=seed)) == "\n".join(told)


@pytest.mark.usefixtures("grading")
def test_seeds_are_drawn_anew(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def watch(q, k, v):
        seen.append(float(q.sum()))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    for _ in range(2):
        torch.manual_seed(0)
        mark("self-attention", watch)
    runs = len(seen) // (2 * marking.RUNS)
    firsts = [tuple(seen[i : i + runs]) for i in range(0, len(seen), runs)]
    assert len(set(firsts)) == 2 * marking.RUNS


@pytest.mark.usefixtures("grading")
def test_nothing_reaches_stderr(capsys: pytest.CaptureFixture[str]):
    def noisy(queries, keys):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        print("careful", file=sys.stderr)
        return torch.ones(queries, keys).tril(keys - queries).bool()

    mark("causal-mask", noisy)
    assert capsys.readouterr().err == ""


def test_outside_of_grading_the_verdict_is_printed():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        mark("causal-mask", lambda queries, keys: torch.ones(queries, keys))
    assert "the result holds float32, wanted True/False" in out.getvalue()


# ---- the text


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("(x)=\n## X\n\ntext", "## X\n\ntext"),
        ("see [this](here) and [that](rope), [the net](https://a.b)", "see [this](#Here) and that, [the net](https://a.b)"),
        ("by {cite}`vaswani2017`", "by [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)"),
        ("| a | b |\n|---|---|\n| [h](here) | {ref}`t <x>` |", "| a | b |\n|---|---|\n| [h](#Here) | t |"),
        ("```{note}\nsee [this](here)\n```", "> **Note**\n>\n> see [this](#Here)"),
        (":::{admonition} Mind\n:class: tip\n\na\n\nb\n:::\nc", "> **Mind**\n>\n> a\n>\n> b\nc"),
        ("```{math}\n:label: e\n\nx^2\n```", "$$\nx^2\n$$"),
        ("% a remark\n\ntext", "text"),
        ("`[a](b)` and $f(x)[a](b)$\n\n```python\n(x)=\n```", "`[a](b)` and $f(x)[a](b)$\n\n```python\n(x)=\n```"),
        ("- a [h](here)\n- b\n  c", "- a [h](#Here)\n- b\n  c"),
    ],
)  # fmt: skip
def test_myst_becomes_markdown(myst: str, plain: str):
    assert dialect.plain(myst, "x.ipynb, cell c", {"here": "#Here"}) == plain


EXERCISE = "```{exercise} T\n:label: ex-feed-forward\n\nCount.\n```"
SOLUTION = "```{solution} ex-feed-forward\n\n~~~python\ndef answer(a, b): return a\n~~~\n```"
BLANK = 'def answer(a, b): ...\n\n\ncheck("feed-forward", answer)'


def notebook(tmp_path: Path, *cells: tuple[str, str]) -> Path:
    make = {"md": new_markdown_cell, "py": new_code_cell}
    nb = new_notebook(cells=[make[kind](text, id=f"c{i}") for i, (kind, text) in enumerate(cells)])
    path = tmp_path / f"{NAME}.ipynb"
    nbformat.write(nb, path)
    return path


def test_the_smallest_assignment(tmp_path: Path):
    text = f"Before.\n\n{EXERCISE}", BLANK, f"{SOLUTION}\n\nAfter."
    nb, _ = assignment(notebook(tmp_path, *zip(("md", "py", "md"), text, strict=True)))
    prose = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    assert prose == [
        "Before.",
        "**Exercise. T** (3 points; your function keeps the name `answer`)\n\nCount.",
        "After.",
    ]
    source = graded(nb)["feed-forward-answer"].source
    assert source == "def answer(a, b):\n    ### BEGIN SOLUTION\n    return a\n    ### END SOLUTION"
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)


ASKED, TRIED, SOLVED = ("md", EXERCISE), ("py", BLANK), ("md", SOLUTION)


def other(cell: tuple[str, str], old: str, new: str) -> tuple[str, str]:
    assert old in cell[1]
    return cell[0], cell[1].replace(old, new)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([ASKED, TRIED], "c0: exercise 'ex-feed-forward' has no solution"),
        ([ASKED, SOLVED], "c0: exercise 'ex-feed-forward' has no code cell with a check after it"),
        (
            [ASKED, other(TRIED, "\ncheck", "\n# check"), SOLVED],
            "c1: the exercise's cell must end with check",
        ),
        (
            [ASKED, other(TRIED, "feed-forward", "residual"), SOLVED],
            "c1: exercise 'ex-feed-forward' is checked as 'residual'",
        ),
        ([ASKED, other(TRIED, "...", "a"), SOLVED], "c1: the exercise's cell must hold one blank"),
        ([ASKED, TRIED, other(SOLVED, "(a, b)", "(a)")], "c2: the solution takes (a), the blank (a, b)"),
        ([ASKED, TRIED, other(SOLVED, "return", "retrun")], "c2: the solution is not Python"),
        ([ASKED, TRIED, other(SOLVED, "~~~python", "~~~text")], "must hold one python block, not 0"),
        ([ASKED, TRIED, other(SOLVED, "def answer", "def f")], "c2: the solution must be one function"),
        ([SOLVED], "c0: solution 'ex-feed-forward' has no exercise above it"),
        ([other(ASKED, ":label: ex-feed-forward\n", ""), TRIED], "c0: the exercise has no label"),
        ([TRIED], "c0: a check that belongs to no exercise"),
        ([("md", "# Nothing")], ": no exercise, so nothing to grade"),
        (
            [("md", f"- a\n\n{textwrap.indent(EXERCISE, '  ')}")],
            "c0: directive 'exercise' stands inside a list",
        ),
        ([("md", "```{tikz}\nx\n```")], "c0: directive 'tikz' has no form in Jupyter yet"),
        ([("md", "{kbd}`x`")], "c0: role 'kbd' has no form in Jupyter yet"),
        ([("md", "{cite}`nobody1999`")], "c0: 'nobody1999' is not in references.bib"),
        ([("md", "![a sum](sum.svg)")], "c0: image 'sum.svg' is a file"),
    ],
)
def test_a_broken_chapter_is_told_with_file_and_cell(tmp_path: Path, cells: list, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        assignment(notebook(tmp_path, *cells))
    assert str(caught.value).startswith(f"{NAME}.ipynb")
    assert "\n" not in str(caught.value)


# ---- bad input of the whole


def test_chapters_must_exist(tmp_path: Path, folder: Path):
    refusals = {
        (0,): "chapter 0 must be 1 to 22",
        (1, 23): "chapter 23 must be 1 to 22",
        (2,): "chapter 2, Positional Encoding Variants, is not written yet; written: 1",
    }
    for numbers, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            write_course(tmp_path / "course", numbers, folder=folder)
    with pytest.raises(ValueError, match="holds no chapter; run this in the root"):
        write_course(tmp_path / "course", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("submitted/ann/x.ipynb", "holds students' work"),
        ("autograded/ann/x.ipynb", "holds students' work"),
        ("feedback/ann/x.html", "holds students' work"),
        ("thesis.tex", "holds something else than a course"),
        ("source/thesis.tex", "holds something else than a course"),
    ],
)
def test_nothing_of_others_is_replaced(tmp_path: Path, folder: Path, file: str, message: str):
    path = tmp_path / "course" / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match=message):
        write_course(tmp_path / "course", folder=folder)
    assert path.exists()


def test_a_failure_leaves_the_course_as_it_was(tmp_path: Path):
    old = tmp_path / "course" / "README.md"
    old.parent.mkdir()
    old.write_text("old")
    (old.parent / "nbgrader_config.py").write_text(kit.CONFIG)
    (tmp_path / "chapters").mkdir()
    broken = notebook(tmp_path / "chapters", ("md", EXERCISE))
    with pytest.raises(ValueError, match="has no solution"):
        write_course(old.parent, folder=broken.parent)
    assert old.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"course", "chapters"}


def test_without_nbgrader_one_line_says_what_to_install(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    find = kit.importlib.util.find_spec
    monkeypatch.setattr(
        kit.importlib.util, "find_spec", lambda name: None if name == "nbgrader" else find(name)
    )
    with pytest.raises(ValueError, match=re.escape("a course needs nbgrader: pip install '.[course]'")):
        write_course(tmp_path / "course", folder=folder)


def test_what_nbgrader_says_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^nbgrader made no release: .*No notebooks were matched"):
        kit._release(tmp_path)


@pytest.mark.parametrize(
    "cell",
    [
        new_markdown_cell("**Solution.** So.", metadata={"tags": [kit.INSTRUCTOR]}),
        new_code_cell("### BEGIN SOLUTION\n1\n### END SOLUTION"),
        new_code_cell("### BEGIN HIDDEN TESTS\n1\n### END HIDDEN TESTS"),
    ],
)
def test_a_release_that_gives_something_away_is_refused(tmp_path: Path, cell: NotebookNode):
    place = tmp_path / "release" / NAME
    place.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[cell]), place / "x.ipynb")
    with pytest.raises(ValueError, match=f"the release of {NAME} still holds"):
        kit._check_release(tmp_path)


# ---- the plans


def too_early(plan: Sequence[Week]) -> list[tuple[str, str]]:
    """The pairs of a concept and one that it needs, where the second comes in a later week."""
    concepts = load_concepts()
    week = {
        id_: number
        for number, entry in enumerate(plan)
        for chapter in entry.chapters
        for id_ in chapters()[chapter - 1].concepts
    }
    return [(id_, n) for id_ in week for n in concepts[id_].needs if week[n] > week[id_]]


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_holds_every_chapter_once_and_in_an_order_that_works(name: str):
    plan = PLANS[name]
    assert {"Twelve weeks": 12, "Six weeks": 6}[name] == len(plan)
    assert sorted(n for week in plan for n in week.chapters) == [c.number for c in chapters()]
    assert too_early(plan) == []
    assert too_early(plan[::-1]), "weeks turned round are not noticed"


def test_the_weeks_are_of_like_size():
    for plan in PLANS.values():
        sizes = [sum(len(chapters()[n - 1].concepts) for n in week.chapters) for week in plan]
        assert max(sizes) <= 1.5 * sum(sizes) / len(sizes), sizes


def test_the_syllabus_says_what_is_written():
    text = syllabus()
    assert "[1. Core Transformer Architecture](01-core-transformer.ipynb), written" in text
    states = [load_concepts()[id_].state for chapter in chapters()[:2] for id_ in chapter.concepts]
    done = sum(state != "planned" for state in states)  # the first of the twelve weeks
    assert f"15 concepts; written: {done} exercises, {3 * done} points |" in text
    for chapter in chapters():
        assert text.count(f"[{chapter.number}. {chapter.title}](") == len(PLANS)
    assert "](" not in syllabus(link=False)


def test_chapters_that_are_left_out_are_told():
    assert prerequisites([1]) == {}
    assert prerequisites([c.number for c in chapters()]) == {}
    assert 1 in prerequisites([2])[2]
    assert 1 not in prerequisites([1, 3]).get(3, ())
