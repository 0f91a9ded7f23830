"""A chapter's notebook as an assignment: the instructor's version, from which nbgrader makes the release."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_atlas.book.course.marks import EXAMPLE_POINTS, FRESH_POINTS
from llm_atlas.book.course.myst import anchors_of, directive_body, directives, parser, plain

__all__ = ["INSTRUCTOR", "Exercise", "assignment"]

NotebookNode = Any  # nbformat's; students do not have it, so the name is not imported here
# Cells with this tag are for the instructor: nbgrader drops them from the release (see kit.CONFIG).
INSTRUCTOR = "instructor"


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

    for token, name in directives(cell.source, where):
        if name not in ("exercise", "solution"):
            continue
        argument, options, body = directive_body(token, name)
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
    blocks = [t for t in parser().parse(piece.text) if t.type == "fence" and t.info.strip() == "python"]
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
    mark, call = "from llm_atlas.book.course import mark\n\n", f'mark("{concept}", answer'
    yield _locked(
        f"# {EXAMPLE_POINTS} point: the smallest example.\n{mark}{call}, example=True)",
        f"{concept}-example",
        EXAMPLE_POINTS,
    )
    yield _locked(
        f"# {FRESH_POINTS} points: fresh inputs, drawn when this notebook is graded.\n"
        # a cell that cannot be read leaves the last exercise's answer, which would be marked for this one
        f"### BEGIN HIDDEN TESTS\n{mark}try:\n    {call})\nfinally:\n    answer = ...\n### END HIDDEN TESTS",
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
    anchors = anchors_of(pieces)
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
            head = f"**Exercise. {piece.title}** ({worth}; your function keeps the name `answer`)"
            cells.append(
                new_markdown_cell(f"{head}\n\n{plain(piece.text, piece.where, anchors)}", id=piece.id)
            )
            asked = _Piece("code", code.where, code.id, label=piece.label)
            cells.extend(_exercise_cells(asked, code.cell, solutions[piece.label]))
            exercises.append(Exercise(concept=piece.label.removeprefix("ex-"), title=piece.title))
        elif piece.kind == "solution":
            if piece.label not in {f"ex-{e.concept}" for e in exercises}:
                raise ValueError(f"{piece.where}: solution {piece.label!r} has no exercise above it")
            if notes := _solution(piece)[1]:
                told = f"**Solution.** {plain(notes, piece.where, anchors)}"
                cells.append(new_markdown_cell(told, id=piece.id, metadata={"tags": [INSTRUCTOR]}))
        elif piece.kind == "text":
            cells.append(new_markdown_cell(plain(piece.text, piece.where, anchors), id=piece.id))
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
