"""Explorables: frames, limits, refused input, the mime bundle in and out of a kernel, nbval's view of it."""

import json
import math
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from llm_atlas.book.explore import MIME, Bars, Explorable, Heatmap, Lines, Tokens, explore

VIEW = "application/vnd.jupyter.widget-view+json"
TEXTS = {"title": "T", "caption": "C.", "alt": "A."}
X = [0.0, 1.0, 2.0]


def wave(k: float = 1, sine: bool = True) -> Lines:
    y = np.sin(np.array(X) * k) if sine else np.cos(np.array(X) * k)
    return Lines(X, {"wave": y}, x_label="x", note=f"k = {k}")


def made(**given) -> Explorable:
    return explore(wave, **{**TEXTS, "k": (1, 3, 1), "sine": [True, False], **given})


def test_each_choice_has_the_drawing_of_its_values() -> None:
    shown = made()
    for k in (1, 2, 3):
        for sine in (True, False):
            frame = shown.frame(k=k, sine=sine)
            wanted = wave(k, sine)
            assert frame["lines"][0]["y"] == pytest.approx(list(wanted.lines["wave"]), rel=1e-3)
            assert frame["note"] == wanted.note
    assert shown.data["common"]["x"] == [0, 1, 2]
    assert "x" not in shown.data["frames"][0]
    with pytest.raises(ValueError, match="k=9 is none of"):
        shown.frame(k=9)
    with pytest.raises(ValueError, match="'z' is no control"):
        shown.frame(z=9)


def test_ranges_become_controls() -> None:
    def values(**range_) -> tuple[str, list]:
        (control,) = explore(lambda a: wave(), **TEXTS, **range_).spec["controls"]
        return control["kind"], control["values"]

    assert values(a=(0.1, 0.5, 0.1)) == ("slider", [0.1, 0.2, 0.3, 0.4, 0.5])
    assert values(a=(0, 5, 2)) == ("slider", [0, 2, 4])
    assert values(a=range(3)) == ("slider", [0, 1, 2])
    assert values(a=[1, 10, 100]) == ("slider", [1, 10, 100])
    assert values(a=["x", "y"]) == ("choice", ["x", "y"])
    assert values(a=[True, False]) == ("choice", [True, False])


def test_the_default_is_shown_first() -> None:
    assert [c["default"] for c in made().spec["controls"]] == [1, 0]
    shown = made(default={"k": 3, "sine": False}, labels={"k": "frequency"})
    assert shown.frame() == shown.frame(k=3, sine=False)
    assert shown.spec["controls"][0]["label"] == "frequency"


def test_the_axis_stands_still_over_the_frames() -> None:
    shown = explore(lambda k: Bars(["a", "b"], [k, 2 * k]), **TEXTS, k=(1, 4, 1))
    assert shown.data["common"]["range"][0] == 0
    assert shown.data["common"]["range"][1] >= 8
    fixed = explore(lambda k: Bars(["a"], [k], value_range=(0, 9)), **TEXTS, k=(1, 4, 1))
    assert fixed.data["common"]["range"] == [0, 9]
    signed = explore(lambda k: Heatmap([[k, -1.0]]), **TEXTS, k=(1, 4, 1))
    assert signed.data["common"]["range"] == [-4, 4]


def test_masked_cells_are_null_and_numbers_are_rounded() -> None:
    shown = explore(
        lambda k: Heatmap([[1 / 3, -math.inf], [math.nan, 2.0]], ["a", "b"]), **TEXTS, k=[1], digits=3
    )
    assert shown.data["common"]["values"] == [[0.333, None], [None, 2]]
    json.dumps(shown.data, allow_nan=False)


def test_tensors_and_lists_are_numbers_alike() -> None:
    given = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), np.array([1, 2]), [1, 2]]
    frames = [explore(lambda k, v=v: Bars(["a", "b"], v), **TEXTS, k=[1]).data for v in given]
    assert frames[0] == frames[1] == frames[2]


@pytest.mark.parametrize(
    "drawing",
    [
        Lines(X, {"a": [1, 2, None], "b": [3.0, 2, 1]}, "x", "y", y_log=True),
        Bars(["a", "b"], [1.0, -2.0]),
        Bars([f"a label of some length {i}" for i in range(20)], range(20)),
        Heatmap(np.eye(40), y_label="row"),
        Tokens([" a", " very", " long", "\n"] * 20, np.linspace(0, 1, 80), focus=3),
    ],
    ids=["lines", "bars", "long bars", "heatmap", "tokens"],
)
def test_every_kind_has_a_still(drawing) -> None:
    shown = explore(lambda k: drawing, **TEXTS, k=[1, 2])
    still = shown.png()
    assert still.startswith(b"\x89PNG")
    assert len(still) < 150_000
    assert still == shown.png()
    assert still != shown.png(k=1)  # the title says which choice is drawn


@pytest.mark.parametrize(
    ("fn", "given", "error", "said"),
    [
        (wave, {}, ValueError, "needs at least one range"),
        (wave, {"k": []}, ValueError, "range k is empty"),
        (wave, {"k": (1, 2)}, ValueError, "must be (start, stop, step)"),
        (wave, {"k": (2, 1, 1)}, ValueError, "must rise"),
        (wave, {"k": (1, 2, 0)}, ValueError, "positive step"),
        (wave, {"k": [2, 1]}, ValueError, "must rise"),
        (wave, {"k": ["a", "a"]}, ValueError, "repeats a value"),
        (wave, {"k": ["a", 1]}, TypeError, "all numbers, all texts or all booleans"),
        (wave, {"k": 3}, TypeError, "not int"),
        (wave, {"q": [1]}, TypeError, "fn has no parameter 'q'; it takes k, sine"),
        (lambda a, b: wave(), {"a": [1]}, TypeError, "no range is given for parameter 'b'"),
        (lambda a: 3, {"a": [1]}, TypeError, "not int"),
        (lambda a: wave() if a else Bars(["a"], [1]), {"a": [True, False]}, TypeError, "same kind"),
        (wave, {"k": [1], "default": {"k": 2}}, ValueError, "default k=2 is none of [1]"),
        (wave, {"k": [1], "labels": {"j": "x"}}, ValueError, "labels names 'j'"),
        (wave, {"k": [1], "title": " "}, ValueError, "title must be text"),
        (wave, {"k": [1], "digits": 0}, ValueError, "digits 0"),
        (wave, {"k": range(101), "sine": [False, True], "labels": {}}, None, ""),
        (lambda a, b: wave(), {"a": range(21), "b": range(20)}, ValueError, "21 a x 20 b are 420 frames"),
        (lambda a: Lines(range(9000), {"y": np.arange(9000) * math.pi * a}), {"a": range(1, 9)}, ValueError,
         "8 frames take"),
        (lambda a: Lines(X, {"y": [1, 2]}), {"a": [1]}, ValueError, "line 'y' has 2 values for 3 of x"),
        (lambda a: Lines(X, {"y": X}, y_log=True), {"a": [1]}, ValueError, "needs positive values"),
        (lambda a: Lines(X, {}), {"a": [1]}, ValueError, "lines is empty"),
        (lambda a: Lines(X, {"y": ["q"] * 3}), {"a": [1]}, TypeError, "must be numbers"),
        (lambda a: Bars(["a"], [1, 2]), {"a": [1]}, ValueError, "2 values for 1 labels"),
        (lambda a: Bars(["a"], [1], value_range=(1, 0)), {"a": [1]}, ValueError, "lower first"),
        (lambda a: Heatmap([1, 2]), {"a": [1]}, ValueError, "must have 2 dimensions, not shape (2,)"),
        (lambda a: Heatmap([[1, 2]], ["a"]), {"a": [1]}, ValueError, "1 x_ticks for 2 columns"),
        (lambda a: Tokens(["a"], [1], focus=4), {"a": [1]}, ValueError, "focus 4"),
        (lambda a: Tokens(["a"], [1, 2]), {"a": [1]}, ValueError, "2 weights for 1 tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(fn, given: dict, error: type | None, said: str) -> None:
    if error is None:
        assert explore(fn, **{**TEXTS, **given})
        return
    with pytest.raises(error) as caught:
        explore(fn, **{**TEXTS, **given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_outside_a_kernel_there_is_no_widget() -> None:
    bundle, metadata = made()._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", MIME}
    assert not metadata
    assert len(json.loads(bundle[MIME]["data"])["frames"]) == 6
    assert "text/html" not in bundle  # GitHub would show it in place of the still


def test_inexact_numbers_are_kept_where_nbval_does_not_look() -> None:
    bundle, metadata = made(exact=False)._repr_mimebundle_()
    assert "data" not in bundle[MIME]
    assert bundle[MIME]["controls"]
    assert len(json.loads(metadata[MIME]["data"])["frames"]) == 6


def test_the_widget_redraws() -> None:
    shown = made()
    box = shown.widget()
    slider, dropdown, picture, _ = box.children
    assert picture.value == shown.png()
    slider.value = 3
    assert picture.value == shown.png(k=3)
    dropdown.value = False
    assert picture.value == shown.png(k=3, sine=False)
    box.close_all()


CELL = """\
import math
from llm_atlas.book import Lines, explore
explore(
    lambda k: Lines([0, 1, 2], {"sine": [math.sin(k * x) for x in range(3)]}),
    title="T", caption="C.", alt="A.", k=(1, 3, 1),
)"""


def notebook(*cells: str, stdin: bool = False):
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    client = NotebookClient(nb, timeout=60, store_widget_state=False)
    if stdin:
        # what a front end with a reader before it does
        begin = client.create_kernel_manager

        def with_stdin():
            manager = begin()
            make = manager.client

            def client_with_stdin(*args, **kwargs):
                talk = make(*args, **kwargs)
                run = talk.execute
                talk.execute = lambda code, **kw: run(code, **{**kw, "allow_stdin": True})
                return talk

            manager.client = client_with_stdin
            return manager

        client.create_kernel_manager = with_stdin
    client.execute()
    return nb


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_kernel_the_widget_is_for_readers_only() -> None:
    (executed,) = notebook(CELL).cells[0].outputs
    assert set(executed.data) == {"text/plain", "image/png", MIME}
    (live,) = notebook(CELL, stdin=True).cells[0].outputs
    assert set(live.data) == {"text/plain", "image/png", MIME, VIEW}
    assert live.data[MIME] == executed.data[MIME]
    assert live.data["image/png"] == executed.data["image/png"]


def test_nbval_sees_a_changed_number(tmp_path) -> None:
    inexact = CELL.replace("k=(", "exact=False, k=(")
    nb = notebook(CELL, CELL, inexact, inexact)
    _, changed, moved, retitled = (cell.outputs[0] for cell in nb.cells)
    for place in (changed.data, moved.metadata):
        numbers = json.loads(place[MIME]["data"])
        numbers["frames"][1]["lines"][0]["y"][1] += 0.001
        place[MIME]["data"] = json.dumps(numbers, ensure_ascii=False, separators=(",", ":"))
    retitled.data[MIME]["title"] = "U"
    path = tmp_path / "committed.ipynb"
    nbformat.write(nb, path)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "-v", "--color=no", "-p", "no:cacheprovider", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    found = [word for line in ran.stdout.split("\n") if "::Cell" in line for word in line.split()[2:3]]
    assert found[:4] == ["PASSED", "FAILED", "PASSED", "FAILED"], ran.stdout
