"""What every committed notebook keeps to. That its numbers come out again is nbval's to say (make test)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import execute_chapters
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
LARGEST = 1_000_000  # bytes
EXPLORE = "application/vnd.llm-atlas.explore+json"
MAGICS = ("run_line_magic", "run_cell_magic")  # what IPython makes of %time f() and %%time
IGNORED = execute_chapters.IGNORED

code_cells, tags = execute_chapters.code_cells, execute_chapters.tags

# A white pixel with a palette, as the pictures of a notebook in normal form have.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAMAAAAoyzS7AAAAA1BMVEX///+nxBvIAAAACklEQVR4nGNg"
    "AAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def outputs(nb: NotebookNode) -> Iterator[tuple[NotebookNode, NotebookNode]]:
    for cell in code_cells(nb):
        for output in cell.outputs:
            yield cell, output


def texts(output: NotebookNode) -> Iterator[str]:
    """Everything in an output that a reader or a program sees as text."""
    if "text" in output:
        yield output.text
    yield from output.get("traceback", [])
    for mime, value in output.get("data", {}).items():
        if not mime.startswith("image/") or mime == "image/svg+xml":
            yield value if isinstance(value, str) else json.dumps(value)


def nodes(cell: NotebookNode) -> Iterator[ast.AST]:
    """The syntax nodes of a cell's code, also of code that stands behind a magic such as %time."""
    waiting = [TransformerManager().transform_cell(cell.source)]
    while waiting:
        try:
            tree = ast.parse(waiting.pop())
        except SyntaxError:  # a magic's argument that is no code
            continue
        for node in ast.walk(tree):
            yield node
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "run_line_magic",
                "run_cell_magic",
            ):
                waiting += [arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant)]


# ---- the policy: a problem a line


def small(nb: NotebookNode) -> list[str]:
    size = len(execute_chapters.dumps(nb).encode())
    return [f"{size:,} bytes, more than {LARGEST:,}"] if size > LARGEST else []


def executed(nb: NotebookNode) -> list[str]:
    return [f"cell {cell.id} was not executed" for cell in code_cells(nb) if cell.execution_count is None]


def no_errors(nb: NotebookNode) -> list[str]:
    return [f"cell {cell.id} ends in {out.ename}" for cell, out in outputs(nb) if out.output_type == "error"]


def no_stderr(nb: NotebookNode) -> list[str]:
    return [
        f"cell {cell.id} wrote to stderr: {out.text}"
        for cell, out in outputs(nb)
        if out.get("name") == "stderr"
    ]


def few_ignored(nb: NotebookNode) -> list[str]:
    shown = [cell for cell in code_cells(nb) if cell.outputs]
    ignored = [cell.id for cell in shown if IGNORED in tags(cell)]
    if len(ignored) * 3 > len(shown):
        return [f"{len(ignored)} of {len(shown)} outputs are tagged {IGNORED}, more than a third"]
    return []


def ignored_then_asserted(nb: NotebookNode) -> list[str]:
    """A tagged result is followed, within its section, by an untagged cell that asserts something of it."""
    wrong, waiting = [], None
    for cell in [*nb.cells, new_markdown_cell("# end")]:
        if cell.cell_type == "markdown" and re.search(r"^#+ ", cell.source, re.MULTILINE) and waiting:
            wrong.append(
                f"cell {waiting} is tagged, and no untagged cell of its section asserts anything after it"
            )
            waiting = None
        elif cell.cell_type == "code" and IGNORED in tags(cell):
            waiting = cell.id
        elif cell.cell_type == "code" and any(_asserts(node) for node in nodes(cell)):
            waiting = None
    return wrong


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name.startswith("assert_") or name == "claim"
    return isinstance(node, ast.Assert)


def mostly_visible(nb: NotebookNode) -> list[str]:
    cells = code_cells(nb)
    silent = [cell.id for cell in cells if not cell.outputs and "remove-cell" not in tags(cell)]
    return (
        [f"{len(silent)} of {len(cells)} code cells show nothing, more than half"]
        if len(silent) * 2 > len(cells)
        else []
    )


def images_described(nb: NotebookNode) -> list[str]:
    wrong = []
    for cell, out in outputs(nb):
        data = out.get("data", {})
        if any(mime.startswith("image/") for mime in data):
            explorable = {**data.get(EXPLORE, {}), **out.get("metadata", {}).get(EXPLORE, {})}
            alt = explorable.get("alt") or cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
            if not str(alt or "").strip():
                wrong.append(f"cell {cell.id} shows an image without metadata mystnb.image.alt")
    for cell in nb.cells:
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"])", cell.source):
            wrong.append(f"cell {cell.id} has an image without alternative text")
    return wrong


# A path below one of these roots, not the end of an address such as https://host/home/.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|Users|root|tmp|opt|var|private|mnt|work|workspace|content|usr/(?:lib|local))/[\w.]"
    r"|\b[A-Z]:\\{1,2}\w"
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{7,}\b")


def no_machine_paths(nb: NotebookNode) -> list[str]:
    return [
        f"cell {cell.id} shows a path of one machine: {found[0]}"
        for cell, out in outputs(nb)
        for text in texts(out)
        if (found := MACHINE_PATH.search(text))
    ]


def no_addresses(nb: NotebookNode) -> list[str]:
    return [
        f"cell {cell.id} shows a memory address: {found[0]}"
        for cell, out in outputs(nb)
        for text in texts(out)
        if (found := ADDRESS.search(text))
    ]


def no_literal_device(nb: NotebookNode) -> list[str]:
    wrong = []
    for cell in code_cells(nb):
        for node in nodes(cell):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", value):
                wrong.append(
                    f"cell {cell.id} names the device {value!r}; take it from core.device.pick_device()"
                )
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "cuda"
            ):
                wrong.append(f"cell {cell.id} calls .cuda(); take the device from core.device.pick_device()")
    return wrong


def no_control_characters(nb: NotebookNode) -> list[str]:
    r"""A formula written through a string that was not raw: \text becomes a tab and "ext"."""
    return [
        f"cell {cell.id} holds the control character {found[0]!r}"
        for cell in nb.cells
        if (found := re.search(r"[\x00-\x09\x0b-\x1f]", cell.source))
    ]


def no_final_semicolon(nb: NotebookNode) -> list[str]:
    """IPython hides the value of `f();`, nbval shows it: the notebook would not come out the same."""
    return [
        f"cell {cell.id} ends with a semicolon; assign the value to _ instead"
        for cell in code_cells(nb)
        if cell.source.rstrip().endswith(";")
    ]


def normal_form(nb: NotebookNode) -> list[str]:
    same = execute_chapters.dumps(execute_chapters.normalise(nb)) == execute_chapters.dumps(nb)
    return [] if same else ["not in the form that `make chapters` writes"]


def tagged_outputs_fresh(nb: NotebookNode) -> list[str]:
    return [
        f"cell {name} is tagged, and its output was made from other code; run `make chapters`"
        for name in execute_chapters.stale(nb)
    ]


Rule = Callable[[NotebookNode], list[str]]
POLICY: list[Rule] = [
    small,
    executed,
    no_errors,
    no_stderr,
    few_ignored,
    ignored_then_asserted,
    mostly_visible,
    images_described,
    no_machine_paths,
    no_addresses,
    no_literal_device,
    no_final_semicolon,
    no_control_characters,
    normal_form,
    tagged_outputs_fresh,
]


def concepts_present(nb: NotebookNode, ids: list[str]) -> list[str]:
    """Each concept has its target right above a heading, and its exercise calls check with its id."""
    text = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    code = "\n\n".join(cell.source for cell in code_cells(nb))
    wrong = []
    for name in ids:
        if not re.search(rf"^\({re.escape(name)}\)=\n+#+ \S", text, re.MULTILINE):
            wrong.append(f"no target ({name})= right above a heading")
        if not re.search(rf"""\bcheck\(\s*["']{re.escape(name)}["']""", code):
            wrong.append(f'no check("{name}", ...) in a code cell')
    return wrong


# ---- the committed notebooks


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def notebook(chapter: Path) -> NotebookNode:
    return nbformat.read(chapter, as_version=nbformat.NO_CONVERT)


def test_notebook_is_valid(notebook: NotebookNode):
    nbformat.validate(notebook)


@pytest.mark.parametrize("rule", POLICY, ids=lambda rule: rule.__name__)
def test_policy(notebook: NotebookNode, rule: Rule):
    assert rule(notebook) == []


def test_file_is_what_the_tool_writes(chapter: Path, notebook: NotebookNode):
    assert chapter.read_text(encoding="utf-8") == execute_chapters.dumps(notebook)


def test_concepts(chapter: Path, notebook: NotebookNode):
    from llm_atlas.book.concepts import load_concepts

    ids = [concept.id for concept in load_concepts().values() if concept.chapter == chapter.stem]
    assert ids, f"no concept of assets/concepts.yml has the chapter {chapter.stem}"
    assert concepts_present(notebook, ids) == []


# ---- each rule on a notebook with that one fault


def stream(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def shown(data: dict[str, Any], **metadata: Any) -> NotebookNode:
    return new_output("display_data", data=data, metadata=metadata)


def good() -> NotebookNode:
    """A notebook that keeps to every rule; the faults are planted into copies of it."""
    nb = new_notebook(
        cells=[
            new_markdown_cell("# A chapter", id="title"),
            new_markdown_cell("(residual)=\n## Residual connections\n\n![a sum](sum.svg)", id="section"),
            new_code_cell("import torch", id="imports", execution_count=1),
            new_code_cell(
                "x = torch.ones(2)\nx.shape",
                id="shape",
                execution_count=2,
                outputs=[stream("Size([2])\n")],
            ),
            new_code_cell(
                "plot(x)",
                id="plot",
                execution_count=3,
                metadata={"mystnb": {"image": {"alt": "two ones"}}},
                outputs=[shown({"image/png": PIXEL, "text/plain": "<Figure with 1 Axes>"})],
            ),
            new_code_cell(
                "print(clock())",
                id="time",
                execution_count=4,
                metadata={"tags": [IGNORED]},
                outputs=[stream("see https://example.org/home/page, /var and 1/opt/2\n")],
            ),
            new_code_cell("assert x.sum() == 2", id="bound", execution_count=5),
            new_code_cell(
                'check("residual", answer)',
                id="exercise",
                execution_count=6,
                outputs=[stream("open\n")],
            ),
        ]
    )
    nb = execute_chapters.normalise(nb)
    for cell in nb.cells:
        if cell.id == "time":
            cell.metadata["llm_atlas"] = NotebookNode(sources=execute_chapters.source_digests(nb)["time"])
    return nb


def cell(nb: NotebookNode, name: str) -> NotebookNode:
    return next(cell for cell in nb.cells if cell.id == name)


def test_a_good_notebook_passes():
    nb = good()
    nbformat.validate(nb)
    assert {rule.__name__: rule(nb) for rule in POLICY} == {rule.__name__: [] for rule in POLICY}
    assert concepts_present(nb, ["residual"]) == []


def show(name: str, output: NotebookNode) -> Callable[[NotebookNode], None]:
    return lambda nb: cell(nb, name).outputs.append(output)


def write(name: str, source: str) -> Callable[[NotebookNode], None]:
    return lambda nb: cell(nb, name).update(source=source)


def tag(*names: str) -> Callable[[NotebookNode], None]:
    def plant(nb: NotebookNode) -> None:
        for name in names:
            cell(nb, name).metadata["tags"] = [IGNORED]

    return plant


def forget(name: str, key: str) -> Callable[[NotebookNode], None]:
    return lambda nb: cell(nb, name).metadata.pop(key)


def silence(*names: str) -> Callable[[NotebookNode], None]:
    return lambda nb: [cell(nb, name).update(outputs=[]) for name in names]


PNG = {"image/png": PIXEL}


@pytest.mark.parametrize(
    ("rule", "plant"),
    [
        (small, show("shape", stream("x" * LARGEST))),
        (executed, lambda nb: cell(nb, "shape").update(execution_count=None)),
        (no_errors, show("shape", new_output("error", ename="ValueError", evalue="no", traceback=[]))),
        (no_stderr, show("shape", stream("a warning", "stderr"))),
        (few_ignored, tag("shape", "time")),
        (ignored_then_asserted, write("bound", "print(x)")),
        (ignored_then_asserted, tag("exercise")),
        (mostly_visible, silence("shape", "time")),
        (images_described, forget("plot", "mystnb")),
        (images_described, show("shape", shown(PNG))),
        (images_described, show("shape", shown({**PNG, EXPLORE: {"alt": ""}}))),
        (images_described, write("section", "![](sum.svg)")),
        (images_described, write("section", '<img src="sum.svg">')),
        (no_machine_paths, show("shape", stream("saved in /home/reader/x.png"))),
        (no_machine_paths, show("shape", stream("'/tmp/tmpab12/x'"))),
        (no_machine_paths, show("shape", stream("C:\\Users\\reader"))),
        (no_machine_paths, show("shape", shown({"text/html": "<b>/Users/reader</b>"}))),
        (no_machine_paths, show("shape", shown({EXPLORE: {"note": "/root/x"}}))),
        (no_addresses, show("shape", stream("<function f at 0x7f76adec1450>"))),
        (no_literal_device, write("shape", 'x = torch.ones(2, device="cuda")')),
        (no_literal_device, write("shape", "x = x.to('cpu')")),
        (no_literal_device, write("shape", '%time x = x.to("cuda:0")')),
        (no_literal_device, write("shape", "x = x.cuda()")),
        (no_final_semicolon, write("plot", "plot(x);\n")),
        (no_control_characters, write("bound", "assert x.sum() == 2  # $\tanh$")),
        (normal_form, lambda nb: nb.metadata.update(widgets={"state": {}})),
        (normal_form, lambda nb: cell(nb, "plot").update(execution_count=17)),
        (normal_form, lambda nb: cell(nb, "plot").metadata.update(execution={"iopub.execute_input": "2020"})),
        (tagged_outputs_fresh, write("imports", "import torch, math")),
        (tagged_outputs_fresh, forget("time", "llm_atlas")),
    ],
)
def test_a_planted_fault_is_found(
    rule: Callable[[NotebookNode], list[str]], plant: Callable[[NotebookNode], Any]
):
    nb = good()
    plant(nb)
    assert len(rule(nb)) == 1


@pytest.mark.parametrize(
    ("plant", "missing"),
    [
        (write("section", "(residual)=\n\nprose\n\n## Residual connections"), "target"),
        (write("section", "## Residual connections"), "target"),
        (write("section", "Look at (residual)=\n## Residual connections"), "target"),
        (write("exercise", 'check("residuals", answer)'), "check"),
        (write("exercise", "check(residual)"), "check"),
    ],
)
def test_a_missing_concept_is_found(plant: Callable[[NotebookNode], Any], missing: str):
    nb = good()
    plant(nb)
    found = concepts_present(nb, ["residual"])
    assert len(found) == 1
    assert missing in found[0]


def test_explorables_carry_their_own_description():
    nb = good()
    cell(nb, "shape").outputs.append(shown({**PNG, EXPLORE: {"alt": "a bar for each token"}}))
    assert images_described(nb) == []


# ---- the tool that executes them


def test_normalise_is_idempotent_and_keeps_what_is_shown():
    rough = good()
    rough.metadata = nbformat.from_dict({"widgets": {}, "kernelspec": {"name": "elsewhere"}})
    cell(rough, "shape").outputs = [stream("a"), stream("b"), stream("c", "stderr")]
    cell(rough, "plot").outputs.append(shown({execute_chapters.WIDGET: {"model_id": "1"}}))
    cell(rough, "bound").id = "plot"
    cell(rough, "title").id = "not an id"
    once = execute_chapters.normalise(rough)
    assert once == execute_chapters.normalise(once)
    nbformat.validate(once)
    streams = [(out.name, out.text) for out in cell(once, "shape").outputs]
    assert streams == [("stdout", "ab"), ("stderr", "c")]
    assert len(cell(once, "plot").outputs) == 1
    assert [c.source for c in once.cells] == [c.source for c in rough.cells]
    assert len({c.id for c in once.cells}) == len(once.cells)
    assert rough.metadata.kernelspec.name == "elsewhere", "the argument was changed"


def test_a_tagged_output_is_kept_while_the_code_above_is_the_same():
    old, new = good(), good()
    cell(new, "time").outputs = [stream("another time\n")]
    assert execute_chapters.keep_stored(new, old) == 1
    assert cell(new, "time").outputs == cell(old, "time").outputs

    changed = good()
    cell(changed, "shape").source = "x = torch.zeros(2)"
    cell(changed, "time").outputs = [stream("another time\n")]
    assert execute_chapters.keep_stored(changed, old) == 0
    assert cell(changed, "time").outputs[0].text == "another time\n"
    assert execute_chapters.stale(changed) == []

    below = good()
    cell(below, "exercise").source = "check('residual', 1)"
    assert execute_chapters.keep_stored(below, old) == 1


def test_colab_cells_come_and_go_with_the_address():
    nb = good()
    once = execute_chapters.with_colab(nb, "https://github.com/owner/name", "chapters/01-x.ipynb")
    assert [c.id for c in once.cells[:4]] == ["title", "colab-badge", "colab-install", "section"]
    assert "/github/owner/name/blob/main/chapters/01-x.ipynb" in once.cells[1].source
    again = execute_chapters.with_colab(once, "https://github.com/owner/name", "chapters/01-x.ipynb")
    assert again == once
    assert execute_chapters.with_colab(once, "", "chapters/01-x.ipynb") == nb


@pytest.fixture
def a_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(execute_chapters, "ROOT", tmp_path)
    path = tmp_path / "chapters" / "01-x.ipynb"
    path.parent.mkdir()
    nb = new_notebook(
        cells=[
            new_markdown_cell("# X"),
            new_code_cell("from pathlib import Path\n\nprint(Path.cwd().name)", id="folder"),
            new_code_cell("import time\n\nprint(time.time_ns())", metadata={"tags": [IGNORED]}),
        ]
    )
    path.write_text(execute_chapters.dumps(nb))
    return path


@pytest.mark.slow
def test_a_second_execution_changes_nothing(a_chapter: Path):
    arguments = {"address": "", "cell_seconds": 60.0, "refresh": False}
    assert execute_chapters.update(a_chapter, **arguments) == "written"
    first = a_chapter.read_text()
    assert cell(nbformat.reads(first, as_version=4), "folder").outputs[0].text == "chapters\n"
    assert execute_chapters.update(a_chapter, **arguments) == "unchanged"
    assert a_chapter.read_text() == first
    assert execute_chapters.update(a_chapter, **arguments | {"refresh": True}) == "written"
    assert a_chapter.read_text() != first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\n\nwarnings.warn('old')", "wrote to stderr"),
        ("import time\n\ntime.sleep(60)", "timed out"),
    ],
)
def test_a_failed_execution_leaves_the_file(a_chapter: Path, source: str, message: str):
    nb = nbformat.read(a_chapter, as_version=4)
    nb.cells.append(new_code_cell(source))
    a_chapter.write_text(execute_chapters.dumps(nb))
    before = a_chapter.read_text()
    with pytest.raises(Exception, match=message):
        execute_chapters.update(a_chapter, address="", cell_seconds=3, refresh=False)
    assert a_chapter.read_text() == before
    assert list(a_chapter.parent.iterdir()) == [a_chapter]
