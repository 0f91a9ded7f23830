"""A course in a folder: source and release of every chosen chapter, points and plans."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_atlas.book.concepts import chapters
from llm_atlas.book.course.assignment import INSTRUCTOR, Exercise, assignment
from llm_atlas.book.course.marks import EXAMPLE_POINTS, FRESH_POINTS
from llm_atlas.book.course.plans import syllabus

__all__ = ["CONFIG", "write_course", "written"]

# For nbgrader to make all releases; a chapter takes it a second or two.
RELEASE_SECONDS = 300
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
        raise ValueError(f"a course needs {', '.join(missing)}: pip install '.[course]'")


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
    if not output.exists() or (output.is_dir() and not os.listdir(output)):
        return
    config = output / "nbgrader_config.py"
    ours = config.is_file() and config.read_text(encoding="utf-8") == CONFIG
    if not ours or {*os.listdir(output)} - _WRITTEN:
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

Grading runs students' code, so do it in a container. Students need Python 3.11 or newer and, in a copy of the book's
repository, `pip install . jupyterlab` and `llm-atlas assets`. They write in the cells that say "your code here", and
hand the file in under its own name.
"""
