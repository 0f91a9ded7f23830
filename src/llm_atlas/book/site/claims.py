"""The claims page: every claim of the ledger, what was measured and the verdict.

Value and verdict are read from the outputs of the committed notebook, where `claim` printed them, so that the
page cannot say anything else than its chapter. The chapter's cell carries the target `claim-ID`, the claim's
row on this page `ledger-ID`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_atlas.book.claims import NOTHING, Claim, judge, load_claims
from llm_atlas.book.concepts import chapters, load_concepts, read_yaml
from llm_atlas.book.site.links import claim_cells, escape, plural, read_notebook, ref
from llm_atlas.book.site.tables import indent
from llm_atlas.core.assets import bundled

__all__ = ["OUTCOMES", "Measurement", "claims_markdown", "markdown", "measurements", "printed_verdict"]

OUTCOMES = ("held", "partly", "not here", "planned")
_FIRST = re.compile(r"(?P<id>[a-z0-9.-]+): (?P<outcome>held|partly|not here)")
_FIELD = re.compile(r"  (?P<name>claimed|measured|because) +(?P<text>\S.*)")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a notebook printed for one claim."""

    outcome: str
    claimed: str
    measured: str
    because: str = ""


def printed_verdict(claim_id: str, cell: Mapping[str, Any]) -> Measurement | None:
    """The verdict on this claim in a code cell's outputs, or None where there is none."""
    lines: list[str] = []
    for output in cell["outputs"]:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        lines += (text if isinstance(text, str) else "".join(text)).splitlines()
    outcome, name = "", ""
    fields: dict[str, str] = {}
    for line in lines:
        if first := _FIRST.fullmatch(line):
            if outcome:
                break
            outcome = first["outcome"] if first["id"] == claim_id else ""
        elif outcome and (field := _FIELD.fullmatch(line)):
            name = field["name"]
            fields[name] = field["text"]
        elif outcome and name and line.startswith(" " * 12):
            # a long line breaks at a space or after a hyphen
            broken = re.search(r"\w-$", fields[name])
            fields[name] += ("" if broken else " ") + line.strip()
        elif outcome:
            break
    if not {"claimed", "measured"} <= set(fields):
        return None
    return Measurement(outcome=outcome, **fields)


def measurements(path: Path | None = None, folder: Path | None = None) -> dict[str, Measurement]:
    """What the committed notebooks measured, by claim.

    `path` is the ledger and `folder` the notebooks, the book's own unless given. ValueError naming the ledger's
    file and line for a measured claim that its notebook does not call, print or word as the ledger does, and
    for a planned one that a notebook measures all the same.
    """
    path = path or bundled("claims.yml")
    lines = {row["id"]: row["__line__"] for row in read_yaml(path)}
    found: dict[str, Measurement] = {}
    for row in load_claims(path).values():
        where = f"{path.name}:{lines[row.id]}: claim {row.id!r}"
        notebook = read_notebook(row.chapter, folder)
        try:
            index = claim_cells(notebook).get(row.id) if notebook else None
        except ValueError as error:
            raise ValueError(f"{where}: in {row.chapter}.ipynb {error}") from None
        if row.state == "planned":
            if index is not None:
                raise ValueError(f"{where} is planned, and cell {index} of {row.chapter}.ipynb measures it")
            continue
        if notebook is None or index is None:
            raise ValueError(
                f"{where} is measured, but no cell of {row.chapter}.ipynb calls claim({row.id!r})"
            )
        verdict = printed_verdict(row.id, notebook["cells"][index])
        if verdict is None:
            raise ValueError(
                f"{where}: cell {index} of {row.chapter}.ipynb shows no verdict; run the chapter"
            )
        for now, printed in (
            (f"{row.figure}: {row.statement}", verdict.claimed),
            (row.reasons.get(verdict.outcome, ""), verdict.because),
        ):
            if _letters(now) != _letters(printed):
                raise ValueError(
                    f"{where}: cell {index} of {row.chapter}.ipynb says {printed!r}, the ledger {now!r}; "
                    "run the chapter"
                )
        if (now := judge(row, _value(row, verdict.measured))) != verdict.outcome:
            raise ValueError(
                f"{where}: cell {index} of {row.chapter}.ipynb says {verdict.outcome} of {verdict.measured!r}, "
                f"the ledger's limits {now}; run the chapter"
            )
        found[row.id] = verdict
    return found


def _value(row: Claim, measured: str) -> float | bool | str | None:
    """The value that was printed: `0.55 of the pairs, on ...`, `yes`, or a word."""
    if measured.partition(", on ")[0] == NOTHING:
        return None
    if row.kind == "boolean":
        return measured.startswith("yes")
    if row.kind == "category":
        return measured.partition(", on ")[0]
    number = re.match(r"-?[\d,]*\.?\d+(e[+-]\d+)?", measured)
    return float(number[0].replace(",", "")) if number else math.nan


def _letters(text: str) -> str:
    return re.sub(r"\s", "", text)


def _row(row: Claim, name: str, number: int, measured: Measurement | None) -> str:
    concept = [
        f"(ledger-{row.id})=",
        ref(name, row.concept),
        "",
        "{.atlas-chapter}",
        f"Chapter {number}",
    ]
    statement = [f"[“{escape(row.figure)}”]{{.atlas-quoted}}", "", escape(row.statement)]
    source = [f"{{cite:p}}`{row.source}`", "", escape(row.note)]
    outcome = measured.outcome if measured else "planned"
    result = [f"[{outcome}]{{.atlas-verdict .atlas-{outcome.replace(' ', '-')}}}"]
    if measured:
        value, _, on = measured.measured.partition(", on ")
        result += ["", f"**{escape(value)}**" + (f" [on {escape(on)}]{{.atlas-on}}" if on else "")]
        if measured.because:
            because = measured.because
            result += ["", f"{escape(because[0].upper() + because[1:])}."]
        result += ["", ref("See the cell", f"claim-{row.id}")]
    cells = zip(("* -", "  -", "  -", "  -"), (concept, statement, source, result), strict=True)
    return "\n".join(line for bullet, lines in cells for line in indent(bullet, lines))


def _totals(counts: Mapping[str, int]) -> str:
    shown = [(outcome, counts[outcome]) for outcome in OUTCOMES if counts[outcome]]
    segments = "".join(
        f'<i class="atlas-{name.replace(" ", "-")}" style="flex-grow: {count}"></i>' for name, count in shown
    )
    legend = "".join(
        f'<li><span class="atlas-verdict atlas-{name.replace(" ", "-")}">{name}</span> <b>{count}</b></li>'
        for name, count in shown
    )
    return (
        '<div class="atlas-claims-totals">\n'
        f'<div class="atlas-claims-bar" aria-hidden="true">{segments}</div>\n<ul>{legend}</ul>\n</div>'
    )


def claims_markdown(path: Path | None = None, folder: Path | None = None) -> str:
    """The claims page as MyST: totals and one table; errors as `measurements`."""
    rows = load_claims(path)
    measured = measurements(path, folder)
    concepts = load_concepts()
    numbers = {chapter.slug: chapter.number for chapter in chapters()}
    counts = Counter(measured[id_].outcome if id_ in measured else "planned" for id_ in rows)
    intro = (
        f"{plural(len(rows), 'claim')} that are often made about language models, {len(measured)} of them "
        "measured so far, each by a cell of its chapter against limits that were set before. "
        "*Not here* is a result too: it says that the claim did not come out under the conditions named "
        "beside it."
    )
    header = "* - Concept\n  - Claim\n  - What the source says\n  - Measured here"
    options = ":header-rows: 1\n:widths: 16 24 33 27\n:class: atlas-table atlas-claims"
    table = "\n".join(
        _row(row, concepts[row.concept].name, numbers[row.chapter], measured.get(row.id))
        for row in rows.values()
    )
    return f"{intro}\n\n{_totals(counts)}\n\n````{{list-table}}\n{options}\n\n{header}\n{table}\n````"


def markdown() -> str:
    """The claims page of the book."""
    return claims_markdown()
