"""The claims page says what the ledger and the committed notebooks say, and nothing else."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_atlas.book.claims import claim, load_claims
from llm_atlas.book.site.claims import claims_markdown, measurements, printed_verdict
from llm_atlas.book.site.links import chapters_folder, read_notebook
from llm_atlas.core.assets import bundled

SLUG = "01-core-transformer"


@pytest.fixture
def planted(tmp_path: Path) -> Callable[[Callable[[dict], Any]], Path]:
    """A folder with all chapters, the first after a change."""

    def plant(change: Callable[[dict], Any]) -> Path:
        notebook = copy.deepcopy(read_notebook(SLUG))
        for path in chapters_folder().glob("*.ipynb"):
            shutil.copy(path, tmp_path)
        change(notebook)
        (tmp_path / f"{SLUG}.ipynb").write_text(json.dumps(notebook))
        return tmp_path

    return plant


def _cell(notebook: dict, claim_id: str) -> dict:
    return next(
        c for c in notebook["cells"] if c["cell_type"] == "code" and f'"{claim_id}"' in "".join(c["source"])
    )


def _output(notebook: dict, old: str, new: str) -> None:
    changed = json.loads(json.dumps(notebook["cells"]).replace(old, new))
    assert changed != notebook["cells"]
    notebook["cells"][:] = changed


# ---- what a cell printed


def test_every_verdict_of_the_ledger_is_read_back_as_it_is_printed() -> None:
    for row in load_claims().values():
        values = {
            "boolean": [True, False],
            "category": [*(row.held if isinstance(row.held, list) else []), "other"],
        }.get(row.kind, [0.001, 0.5, 1.0, 7.25, 123456.0])
        for value in values:
            verdict = claim(row.id, value, on="a half-open set - 3 seeds, 32-bit")
            cell = {
                "outputs": [{"output_type": "stream", "text": ["before\n", *repr(verdict).splitlines(True)]}]
            }
            read = printed_verdict(row.id, cell)
            assert read is not None, row.id
            assert read.outcome == verdict.outcome
            assert read.claimed == f"{row.figure}: {row.statement}"
            assert read.measured == f"{verdict.measured}, on a half-open set - 3 seeds, 32-bit"
            assert read.because == verdict.reason


def test_two_verdicts_in_one_cell_are_told_apart() -> None:
    one, two = repr(claim("ffn-4x", 4.0)), repr(claim("residual-100-layers", 1e9))
    cell = {"outputs": [{"text": one + "\nprinted between\n" + two}]}
    assert printed_verdict("ffn-4x", cell).outcome == "held"
    assert printed_verdict("residual-100-layers", cell).outcome == "not here"
    assert printed_verdict("heads-independent", cell) is None


# ---- the whole ledger


def test_the_page_has_every_claim_with_its_verdict() -> None:
    rows, measured = load_claims(), measurements()
    text = claims_markdown()
    assert set(measured) == {row.id for row in rows.values() if row.state == "measured"}
    for row in rows.values():
        place = text.index(f"(ledger-{row.id})=")
        here = text[place : text.find("\n* - ", place)]
        outcome = measured[row.id].outcome if row.id in measured else "planned"
        assert re.findall(r"\[([a-z ]+)\]\{\.atlas-verdict", here) == [outcome], row.id
        assert (f"{{ref}}`See the cell <claim-{row.id}>`" in here) is (row.id in measured)
        assert f"{{cite:p}}`{row.source}`" in here
        assert f" <{row.concept}>`" in here
    for outcome in ("held", "partly", "not here"):
        count = sum(m.outcome == outcome for m in measured.values())
        assert f">{outcome}</span> <b>{count}</b>" in text
    assert f">planned</span> <b>{len(rows) - len(measured)}</b>" in text


def test_the_value_is_the_notebooks_own(planted: Callable) -> None:
    folder = planted(lambda notebook: _output(notebook, "2.667 ", "2.75 "))
    assert measurements(folder=folder)["ffn-4x"].measured.startswith("2.75 × the model width, on ")
    assert "**2.75 × the model width**" in claims_markdown(folder=folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda n: _cell(n, "ffn-4x").update(outputs=[]),
            r"claim 'ffn-4x': cell \d+ of 01-core-transformer.ipynb shows no verdict; run the chapter",
        ),
        (
            lambda n: _output(n, "ffn-4x: partly", "another: partly"),
            r"claim 'ffn-4x': cell \d+ of .* shows no verdict",
        ),
        (
            lambda n: _cell(n, "ffn-4x").update(source="pass"),
            r"claim 'ffn-4x' is measured, but no cell of 01-core-transformer.ipynb calls claim\('ffn-4x'\)",
        ),
        (
            lambda n: n["cells"].append(_cell(n, "ffn-4x")),
            r"claim '.*': in 01-core-transformer.ipynb cells \d+ and \d+ both call claim\('ffn-4x'\)",
        ),
        # the ledger was reworded, or judges otherwise, after the chapter was run
        (lambda n: _output(n, "about four times", "about five times"), r"claim 'ffn-4x': cell \d+ .* says"),
        (lambda n: _output(n, "ffn-4x: partly", "ffn-4x: held"), r"claim 'ffn-4x': cell \d+ .* says"),
        (
            lambda n: _output(n, "2.667 ", "9.125 "),
            r"claim 'ffn-4x': cell \d+ .* says partly of '9.125 .*, the ledger's limits not here; run the chapter",
        ),
        (
            lambda n: _cell(n, "ffn-4x").update(source='claim("ffn-4x", 1)\nclaim("soup-no-cost", 1)'),
            r"claim 'soup-no-cost' is planned, and cell|claim 'soup-no-cost' is measured",
        ),
    ],
)
def test_a_notebook_that_does_not_fit_is_refused(planted: Callable, fault: Callable, message: str) -> None:
    folder = planted(fault)
    if "soup" in message:  # another chapter's claim, measured in the first: there is no such notebook
        (folder / "21-merging.ipynb").write_text((folder / f"{SLUG}.ipynb").read_text())
    with pytest.raises(ValueError, match=r"^claims\.yml:(\d+): " + f"({message})") as error:
        measurements(folder=folder)
    # the line is that of the row itself
    line = int(re.match(r"claims\.yml:(\d+)", str(error.value))[1])
    named = re.search(r"claim '([^']+)'", str(error.value))[1]
    assert bundled("claims.yml").read_text().splitlines()[line - 1] == f"- id: {named}"


def test_a_missing_chapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^claims\.yml:\d+: claim 'attention-all-positions' is measured, but no cell"
    ):
        measurements(folder=tmp_path)
