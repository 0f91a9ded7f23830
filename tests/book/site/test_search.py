"""What the search knows each concept by."""

import dataclasses
import json

import pytest

from llm_atlas.book.concepts import chapters, load_concepts
from llm_atlas.book.site.search import entries, queries, result_titles
from llm_atlas.core.assets import bundled

CONCEPTS = load_concepts()


@pytest.mark.parametrize(
    ("id_", "texts"),
    [
        (
            "self-attention",
            [
                "self-attention (scaled dot-product)",
                "self-attention",
                "self attention",
                "sdpa",
                "scaled dot product attention",
                "scaled_dot_product_attention",
                "llm_atlas.nn.attention.scaled_dot_product_attention",
            ],
        ),
        ("top-p", ["top-p", "top p", "nucleus sampling", "top-p sampling", "top-p (nucleus) sampling"]),
        ("humaneval", ["pass@k", "humaneval"]),
        ("inference-quantization", ["int8", "llm.int8()", "quantization for inference"]),
        ("ptq", ["gptq", "awq", "gptq, awq", "post-training quantization"]),
    ],
)
def test_a_concept_is_found_by_what_it_is_called(id_: str, texts: list[str]) -> None:
    assert set(texts) <= set(entries(CONCEPTS)[id_])


def test_every_name_and_alias_has_an_entry_and_every_entry_is_lower_case() -> None:
    for id_, texts in entries(CONCEPTS).items():
        concept = CONCEPTS[id_]
        for text in (concept.name, *concept.aliases, concept.symbol, id_):
            assert text.lower() in texts
        assert all(text == text.lower().strip() and text for text in texts)
        assert len(set(texts)) == len(texts)
        # Sphinx splits an entry at a semicolon
        assert not any(";" in text for text in texts)


def test_a_name_wins_over_the_symbol_and_the_derived_spelling_of_another() -> None:
    one, other = CONCEPTS["layer-norm"], CONCEPTS["layernorm"]
    assert one.symbol.endswith(".LayerNorm")
    assert other.name == "LayerNorm"
    found = entries(CONCEPTS)
    assert "layernorm" in found[other.id]
    assert "layernorm" not in found[one.id]
    twin = dataclasses.replace(CONCEPTS["greedy"], id="twin", name="Greedy decoding (twin)", aliases=())
    found = entries({"greedy": CONCEPTS["greedy"], "twin": twin})
    assert "greedy decoding" in found["greedy"]
    assert "greedy decoding" not in found["twin"]
    assert "greedy decoding" in queries(twin)[1]


def test_results_are_titled_as_html() -> None:
    odd = dataclasses.replace(CONCEPTS["lora"], name="Q&A <b>")
    (place, (title, context)), *_ = result_titles({"lora": odd}, chapters()).items()
    assert place == "chapters/tables#lora"
    assert title == "Q&amp;A &lt;b&gt;"
    assert context.startswith("concept, chapter 6: ")
    assert context.endswith(", planned")
    done = dataclasses.replace(odd, state="done")
    assert [*result_titles({"lora": done}, chapters())] == [f"chapters/{odd.chapter}#lora"]


def test_the_script_has_one_place_for_the_titles() -> None:
    text = bundled("site/search-scorer.js").read_text(encoding="utf-8")
    assert text.count("{} /* titles */") == 1
    assert json.loads(json.dumps(result_titles(CONCEPTS, chapters())))
