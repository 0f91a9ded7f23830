"""Claims: verdicts on both sides of every threshold, printed values, refused rows and values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pybtex.database import parse_file

from llm_atlas.book import claim
from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import load_concepts
from llm_atlas.core.assets import bundled

ROW = """\
- id: some-claim
  concept: residual
  chapter: 01-core-transformer
  statement: "s"
  figure: "f"
  kind: at_least
  held: 2.0
  partly: 1.0
  source: he2016
  note: "n"
  reasons:
    not here: "r"
  cell: 01-core-transformer#residual
"""


def test_a_planted_wrong_value_turns_the_verdict() -> None:
    assert claim("ffn-4x", 4.0).outcome == "held"
    assert claim("ffn-4x", 1536 / 576).outcome == "partly"
    assert claim("ffn-4x", 1.0).outcome == "not here"
    assert claim("ffn-4x", 40.0).outcome == "not here"
    assert claim("residual-100-layers", 0.4)
    assert not claim("residual-100-layers", 1e-9)
    assert claim("plain-stack-vanishes", 1e-30)
    assert claim("plain-stack-vanishes", 0.5).outcome == "not here"
    assert claim("causal-mask-no-leak", True)
    assert claim("causal-mask-no-leak", False).outcome == "not here"
    assert claim("permutation-invariant", "equivariant").outcome == "partly"
    assert claim("permutation-invariant", "neither").outcome == "not here"


@pytest.mark.parametrize("row", load_claims().values(), ids=lambda row: row.id)
def test_every_claim_can_hold_and_fail(row) -> None:
    """A claim that no value can fail, or that no value can meet, says nothing."""
    if row.kind == "boolean":
        good, bad = row.held, not row.held
    elif row.kind == "category":
        good, bad = row.held[0], "something else"
    elif row.kind in ("at_least", "at_most"):
        outer = row.held if row.partly is None else row.partly
        good, bad = row.held, outer + (abs(outer) + 1) * (-1 if row.kind == "at_least" else 1)
    else:
        good, bad = sum(row.held) / 2, (row.partly or row.held)[1] * 2 + 1
    assert claim(row.id, good).outcome == "held"
    verdict = claim(row.id, bad)
    assert verdict.outcome == "not here"
    assert verdict.reason


def test_the_verdict_reads_as_a_whole() -> None:
    assert repr(claim("ffn-4x", 1536 / 576)) == (
        "ffn-4x: partly\n"
        "  claimed   about 4×: The feed-forward layer expands the width about four times\n"
        "            before projecting back.\n"
        "  measured  2.667 × the model width, on SmolLM2-135M-Instruct\n"
        "  because   the hidden layer is wider than the model, though not four times: a\n"
        "            gated layer of 8/3 has as many weights as a plain one of 4"
    )
    assert ", on a toy\n" in repr(claim("ffn-4x", 4, on="a toy"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(9722.2, "9,720"), (3e-31, "3.00e-31"), (0.0, "0"), (0.5, "0.5"), (99.96, "100"), (12345.0, "12,300")],
)
def test_values_are_rounded_by_the_rows_rule(value: float, shown: str) -> None:
    assert claim("lora-10000x", value).measured.split()[0] == shown


def test_scalars_of_numpy_and_torch_count_alike() -> None:
    texts = {repr(claim("ffn-4x", v)) for v in (4, 4.0, np.float32(4), torch.tensor(4.0))}
    assert len(texts) == 1
    assert claim("causal-mask-no-leak", np.bool_(True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        claim("ffn-4x", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ffn-4x", True),
        ("ffn-4x", "4"),
        ("ffn-4x", torch.ones(2)),
        ("causal-mask-no-leak", 1),
        ("permutation-invariant", True),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        claim(name, value)


def test_an_unknown_claim_is_refused_with_what_was_meant() -> None:
    with pytest.raises(ValueError, match="no claim is called 'ffn-x4'; did you mean 'ffn-4x'"):
        claim("ffn-x4", 4)


def test_sources_and_cells_exist() -> None:
    sources = set(parse_file(bundled("references.bib")).entries)
    concepts = load_concepts()
    for row in load_claims().values():
        assert row.source in sources, row.id
        chapter, _, target = row.cell.partition("#")
        assert chapter == row.chapter, row.id
        assert target in concepts, row.id


def test_every_concept_of_chapter_1_has_a_claim() -> None:
    done = {row.concept for row in load_claims().values()}
    assert done >= {c.id for c in load_concepts().values() if c.number == 1}


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (("kind: at_least", "kind: at_lest"), "kind 'at_lest'"),
        (("held: 2.0", "held: two"), "must be one number"),
        (("held: 2.0", "held: .nan"), "must be one number"),
        (("partly: 1.0", "partly: 3.0"), "must be wider than held"),
        (("kind: at_least", "kind: range"), "two numbers"),
        (("kind: at_least", "kind: boolean"), "true or false"),
        (("kind: at_least", "kind: category"), "lists of different words"),
        (("concept: residual", "concept: residue"), "no concept"),
        (("chapter: 01-core-transformer", "chapter: 02-positional-encoding"), "its concept in"),
        (('note: "n"', 'note: ""'), "note of 'some-claim' must be text"),
        (('    not here: "r"', '    held: "r"'), "no reason for 'not here'"),
        (('    not here: "r"', '    never: "r"'), "reasons of 'some-claim'"),
        (("  source: he2016\n", ""), "source"),
        (("  source: he2016\n", "  source: he2016\n  sauce: x\n"), "unknown field 'sauce'"),
        (("  source: he2016\n", "  source: he2016\n  state: done\n"), "state 'done'"),
        (("  source: he2016\n", "  source: he2016\n  digits: 0\n"), "digits"),
        (("- id: some-claim", ROW + "- id: some-claim"), "stands twice"),
    ],
)
def test_a_faulty_row_is_refused_with_its_line(tmp_path: Path, planted: tuple[str, str], said: str) -> None:
    path = tmp_path / "claims.yml"
    path.write_text(ROW)
    assert list(load_claims(path)) == ["some-claim"]
    faulty = tmp_path / "faulty.yml"
    faulty.write_text(ROW.replace(*planted))
    with pytest.raises(ValueError, match=r"^faulty\.yml:\d+: ") as caught:
        load_claims(faulty)
    assert said in str(caught.value)


def test_an_exploding_gradient_does_not_hold_the_residual_claim() -> None:
    assert claim("residual-100-layers", 27.0).outcome == "held"
    for ratio in (1e17, 1e-17):
        assert claim("residual-100-layers", ratio).outcome == "not here"


def test_what_could_not_be_measured_is_not_here() -> None:
    verdict = claim("flash-3-2x", None, on="no H100 here")
    assert not verdict
    assert verdict.outcome == "not here"
    assert "measured  nothing, on no H100 here" in repr(verdict)
