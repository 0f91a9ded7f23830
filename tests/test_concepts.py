"""The concept list: complete, in order, sound; and what a concept must have to call itself done."""

import ast
import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from pybtex.database import parse_file

from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import Concept, chapters, load_concepts
from llm_atlas.core.assets import bundled

ROOT = Path(__file__).resolve().parent.parent

# The 22 tables and their concepts as the book promises them. Only a decision changes this list.
TABLES = [
    ("Core Transformer Architecture", """
        self-attention multi-head-attention causal-mask cross-attention feed-forward residual layer-norm
        positional-encoding qk-norm
    """),
    ("Positional Encoding Variants", """
        rope learned-positions sinusoidal alibi relative-position nope
    """),
    ("Model Architecture Variants", """
        decoder-only encoder-only encoder-decoder mixture-of-experts reasoning-model multimodal
    """),
    ("Tokenization Algorithms", """
        bpe sentencepiece wordpiece unigram byte-level-bpe
    """),
    ("Pre-training Objectives", """
        causal-lm masked-lm multi-token-prediction denoising prefix-lm contrastive-image-text
    """),
    ("Fine-Tuning Techniques", """
        full-fine-tuning instruction-tuning lora qlora dora adapters prefix-tuning prompt-tuning
    """),
    ("Alignment and RLHF", """
        rlhf-ppo grpo dpo simpo orpo kto rlvr dapo constitutional-ai rlaif reward-model
    """),
    ("Inference Optimization Techniques", """
        kv-cache prefix-caching flash-attention paged-attention speculative-decoding medusa
        continuous-batching inference-quantization flash-attention-2-3
    """),
    ("Sampling and Decoding Strategies", """
        greedy temperature top-p top-k min-p beam-search contrastive-search
    """),
    ("Training Optimizations", """
        mixed-precision gradient-checkpointing gradient-accumulation adamw lr-warmup cosine-schedule galore
    """),
    ("Distributed Training Strategies", """
        data-parallel tensor-parallel zero fsdp pipeline-parallel sequence-parallel
    """),
    ("Model Compression Techniques", """
        ptq distillation pruning qat low-rank
    """),
    ("Context Window and Long-Context Techniques", """
        rag ntk-rope position-interpolation yarn sliding-window sparse-attention memory-compression
    """),
    ("Prompt Engineering Techniques", """
        few-shot zero-shot chain-of-thought self-consistency react-prompting tree-of-thoughts
        skeleton-of-thought
    """),
    ("Emergent Capabilities and Scaling", """
        scaling-laws compute-optimal in-context-learning emergent-abilities transfer-learning
    """),
    ("Activation Functions in Transformers", """
        swiglu gelu geglu relu
    """),
    ("Normalization Techniques", """
        rmsnorm layernorm pre-post-ln dropout
    """),
    ("Evaluation Metrics and Benchmarks", """
        mmlu gpqa humaneval swe-bench livebench chatbot-arena perplexity bleu rouge bertscore
    """),
    ("Attention Mechanism Optimizations", """
        gqa mla mqa flash-2-3 local-attention linear-attention
    """),
    ("Advanced Training Techniques", """
        multi-task curriculum continual contrastive data-augmentation
    """),
    ("Model Merging Techniques", """
        slerp ties dare task-arithmetic frankenmerge evolutionary-merging model-soup
    """),
    ("LLM Agent Concepts", """
        tool-use react-loop memory planning multi-agent agentic-rag agentic-rl
    """),
]  # fmt: skip


def test_all_147_concepts_stand_in_their_chapters_in_order() -> None:
    assert [(c.title, list(c.concepts)) for c in chapters()] == [(t, ids.split()) for t, ids in TABLES]
    assert len(load_concepts()) == 147


def test_names_are_distinct() -> None:
    seen: dict[str, str] = {}
    for concept in load_concepts().values():
        for name in (concept.name, *concept.aliases):
            assert seen.setdefault(name.lower(), concept.id) == concept.id, f"{name!r}: {concept.id}"


ABBREVIATIONS = {
    "self-attention": "SDPA",
    "multi-head-attention": "MHA",
    "rope": "RoPE",
    "nope": "NoPE",
    "alibi": "ALiBi",
    "mixture-of-experts": "MoE",
    "multimodal": "ViT VLM",
    "bpe": "BPE",
    "byte-level-bpe": "BBPE",
    "causal-lm": "CLM",
    "masked-lm": "MLM",
    "multi-token-prediction": "MTP",
    "contrastive-image-text": "CLIP",
    "full-fine-tuning": "SFT",
    "lora": "LoRA PEFT",
    "qlora": "QLoRA NF4",
    "rlhf-ppo": "RLHF PPO",
    "grpo": "GRPO",
    "dpo": "DPO IPO",
    "kto": "KTO",
    "rlvr": "RLVR",
    "constitutional-ai": "CAI",
    "reward-model": "RM",
    "inference-quantization": "INT8",
    "flash-attention-2-3": "FA2 FA3 FP8",
    "mixed-precision": "AMP FP16 BF16",
    "data-parallel": "DDP",
    "tensor-parallel": "TP",
    "pipeline-parallel": "PP",
    "sequence-parallel": "SP",
    "fsdp": "FSDP",
    "ptq": "PTQ GPTQ AWQ INT4",
    "distillation": "KD",
    "qat": "QAT STE",
    "low-rank": "SVD",
    "rag": "RAG BM25",
    "position-interpolation": "PI",
    "sliding-window": "SWA",
    "chain-of-thought": "CoT",
    "tree-of-thoughts": "ToT",
    "skeleton-of-thought": "SoT",
    "in-context-learning": "ICL",
    "swiglu": "SwiGLU SiLU GLU",
    "perplexity": "PPL",
    "gqa": "GQA",
    "mla": "MLA",
    "mqa": "MQA",
    "multi-task": "MTL",
    "continual": "EWC",
    "data-augmentation": "EDA",
    "slerp": "SLERP",
    "tool-use": "MCP",
}


def test_the_usual_abbreviations_lead_to_their_concept() -> None:
    """As a whole name or alias, in the usual spelling; in parentheses behind a name is not enough."""
    leads = {name: c.id for c in load_concepts().values() for name in (c.name, *c.aliases)}
    wanted = {short: id for id, shorts in ABBREVIATIONS.items() for short in shorts.split()}
    assert {short: leads.get(short) for short in wanted} == wanted


def test_an_alias_says_something_new() -> None:
    for concept in load_concepts().values():
        names = [name.lower() for name in (concept.name, *concept.aliases)]
        assert len(set(names)) == len(names), concept.id


def test_every_concept_says_two_things_in_a_sentence_each() -> None:
    for concept in load_concepts().values():
        assert len(concept.facts) == 2, concept.id
        for fact in concept.facts:
            assert re.fullmatch(r"[A-Z].{30,230}\.", fact), f"{concept.id}: {fact!r}"
    facts = [fact for concept in load_concepts().values() for fact in concept.facts]
    assert len(set(facts)) == len(facts)


def reading_path(target: str) -> set[str]:
    """All that `target` needs, directly or not, and itself."""
    concepts = load_concepts()
    found: set[str] = set()
    left = [target]
    while left:
        id = left.pop()
        if id not in found:
            found.add(id)
            left += concepts[id].needs
    return found


DECODER = """
    self-attention multi-head-attention causal-mask feed-forward residual layer-norm positional-encoding
    decoder-only
"""


@pytest.mark.parametrize(
    ("target", "after_the_decoder"),
    [
        ("kv-cache", "kv-cache"),
        ("dpo", "causal-lm full-fine-tuning rlhf-ppo dpo"),
        ("grpo", "causal-lm full-fine-tuning rlhf-ppo grpo"),
        ("qlora", "causal-lm full-fine-tuning lora qlora"),
        ("speculative-decoding", "causal-lm kv-cache speculative-decoding"),
        ("beam-search", "causal-lm kv-cache greedy beam-search"),
        ("yarn", "rope causal-lm ntk-rope position-interpolation yarn"),
        ("mla", "rope kv-cache low-rank gqa mla"),
        ("fsdp", "causal-lm mixed-precision gradient-accumulation adamw data-parallel zero fsdp"),
        ("rag", "encoder-only causal-lm full-fine-tuning instruction-tuning rag"),
    ],
)
def test_a_reading_path_misses_no_step_and_carries_no_baggage(target: str, after_the_decoder: str) -> None:
    assert reading_path(target) == set(f"{DECODER} {after_the_decoder}".split())


def test_every_concept_stands_on_another_or_carries_one() -> None:
    """Roots are few and known, and whatever needs nothing is needed."""
    concepts = load_concepts()
    roots = {c.id for c in concepts.values() if not c.needs}
    assert roots == {"self-attention", "feed-forward", "bpe", "bleu"}
    assert roots <= {need for c in concepts.values() for need in c.needs}


def test_sources_exist_and_none_is_idle() -> None:
    known = set(parse_file(bundled("references.bib")).entries)
    cited = {key for concept in load_concepts().values() for key in concept.sources}
    assert cited <= known
    text = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "chapters").glob("*.*") if path.is_file()
    )
    idle = known - cited - {row.source for row in load_claims().values()}
    assert not {key for key in idle if key not in text}


def test_arxiv_entries_are_whole_and_distinct() -> None:
    numbers: dict[str, str] = {}
    for key, entry in parse_file(bundled("references.bib")).entries.items():
        assert {"title", "year"} <= set(entry.fields), key
        assert entry.persons["author"], key
        number = entry.fields.get("eprint")
        if number:
            assert re.fullmatch(r"\d{4}\.\d{4,5}", number), key
            assert numbers.setdefault(number, key) == key, number


def test_every_symbol_and_test_lies_where_the_layers_put_it() -> None:
    packages = {path.name for path in (ROOT / "src/llm_atlas").iterdir() if path.is_dir()}
    planned = {"adapt", "align", "compress", "parallel", "merge", "scaling"}
    planned |= {"prompt", "retrieve", "agents", "evaluate", "train"}
    for concept in load_concepts().values():
        top, package, *rest = concept.symbol.split(".")
        assert top == "llm_atlas", concept.id
        assert package in packages | planned, concept.id
        assert len(rest) >= 2, concept.id
        assert re.fullmatch(r"tests/[a-z0-9_/]+\.py(::\w+)?", concept.test), concept.id


# ---- what done means


def resolve(symbol: str) -> object:
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = symbol.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name and not symbol.startswith(error.name):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(symbol)


def symbol_faults(concept: Concept) -> list[str]:
    try:
        found = resolve(concept.symbol)
    except (ImportError, AttributeError) as error:
        return [f"symbol {concept.symbol} does not import: {error}"]
    text = inspect.getdoc(found) or ""
    faults = []
    if len(text) < 150 or text.count(".") < 2:
        faults.append(f"{concept.symbol} has no full docstring")
    if not re.search(r"(19|20)\d\d|arXiv", text):
        faults.append(f"the docstring of {concept.symbol} names no source")
    return faults


def test_faults(concept: Concept, root: Path) -> list[str]:
    path, _, name = concept.test.partition("::")
    if not (root / path).is_file():
        return [f"test {path} does not exist"]
    text = (root / path).read_text(encoding="utf-8")
    tests = {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    if name and name not in tests:
        return [f"test {path} has no {name}"]
    symbol = concept.symbol.rpartition(".")[2]
    if not any(t.startswith("test") for t in tests) or not re.search(rf"\b{symbol}\b|{concept.id}", text):
        return [f"no test in {path} names {symbol} or {concept.id}"]
    return []


test_faults.__test__ = False  # type: ignore[attr-defined]


def section(concept: Concept, root: Path) -> tuple[str, str] | None:
    """The prose and the code of a concept's section: from its target to the next one."""
    path = root / "chapters" / f"{concept.chapter}.ipynb"
    if not path.is_file():
        return None
    prose, code, inside = [], [], False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            target = re.search(r"^\(([a-z0-9-]+)\)=\s*\n+#+ ", cell.source, re.MULTILINE)
            if target:
                inside = target[1] == concept.id
            elif re.search(r"^#{1,2} ", cell.source):
                inside = False
        if inside:
            (prose if cell.cell_type == "markdown" else code).append(cell.source)
    return ("\n".join(prose), "\n".join(code)) if prose else None


def chapter_faults(concept: Concept, root: Path) -> list[str]:
    found = section(concept, root)
    if found is None:
        return [f"chapters/{concept.chapter}.ipynb has no heading under ({concept.id})="]
    prose, code = found
    faults = []
    if not re.search(rf"\bcheck\(\s*[\"']{concept.id}[\"']", code):
        faults.append(f'the section does not call check("{concept.id}", ...)')
    if "{exercise" not in prose:
        faults.append("the section has no exercise")
    if "{solution" not in prose or "dropdown" not in prose:
        faults.append("the section has no solution in a dropdown")
    cited = {key.strip() for keys in re.findall(r"\{cite[:\w]*\}`([^`]+)`", prose) for key in keys.split(",")}
    if not cited & set(concept.sources):
        faults.append(f"the section cites none of {', '.join(concept.sources)}")
    for row in load_claims().values():
        if row.concept != concept.id:
            continue
        if not re.search(rf"\bclaim\(\s*[\"']{re.escape(row.id)}[\"']", code):
            faults.append(f'the section does not call claim("{row.id}", ...)')
        if row.state != "measured":
            faults.append(f"claim {row.id} is still {row.state}")
    return faults


def done_faults(concept: Concept, root: Path) -> list[str]:
    return [*symbol_faults(concept), *test_faults(concept, root), *chapter_faults(concept, root)]


@pytest.mark.parametrize("concept", load_concepts().values(), ids=lambda concept: concept.id)
def test_a_done_concept_has_all_its_parts(concept: Concept) -> None:
    if concept.state == "done":
        assert not done_faults(concept, ROOT)


def test_a_measured_claim_is_measured_in_its_chapter() -> None:
    for row in load_claims().values():
        if row.state == "measured":
            notebook = nbformat.read(ROOT / "chapters" / f"{row.chapter}.ipynb", as_version=4)
            code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
            assert re.search(rf"\bclaim\(\s*[\"']{re.escape(row.id)}[\"']", code), row.id


# ---- the rules catch their planted faults

SECTION = [
    ("markdown", "(layer-norm)=\n## Layer normalization\n\nAs in {cite:t}`ba2016`."),
    ("code", 'claim("layer-norm-higher-lr", 3.0)'),
    ("markdown", ":::{exercise} Norm\n:::\n:::{solution} x\n:class: dropdown\n:::"),
    ("code", 'check("layer-norm", layer_norm)'),
    ("markdown", "(qk-norm)=\n## QK-norm"),
]


def written(root: Path, cells: list[tuple[str, str]]) -> Path:
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    nb = nbformat.v4.new_notebook(cells=[make[kind](text) for kind, text in cells])
    (root / "chapters").mkdir(exist_ok=True)
    nbformat.write(nb, root / "chapters" / "01-core-transformer.ipynb")
    return root


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {id: replace(row, state="measured") for id, row in load_claims().items()}
    monkeypatch.setattr(f"{__name__}.load_claims", lambda: rows)


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize(
    ("text", "instead", "fault"),
    [
        ("", "", None),
        ("(layer-norm)=", "(layer-gnome)=", "has no heading under"),
        ("## Layer normalization", "Layer normalization", "has no heading under"),
        ('check("layer-norm"', 'check("qk-norm"', "does not call check"),
        ("{exercise}", "{exam}", "has no exercise"),
        (":class: dropdown", "", "no solution in a dropdown"),
        ("ba2016", "he2016", "cites none of ba2016"),
        ("layer-norm-higher-lr", "ffn-4x", 'does not call claim("layer-norm-higher-lr"'),
    ],
)
def test_a_section_with_a_part_missing_is_not_done(
    tmp_path: Path, text: str, instead: str, fault: str | None
) -> None:
    cells = [(kind, source.replace(text, instead) if text else source) for kind, source in SECTION]
    faults = chapter_faults(load_concepts()["layer-norm"], written(tmp_path, cells))
    assert faults == [] if fault is None else [f for f in faults if fault in f]


def test_parts_in_a_neighbours_section_do_not_count(tmp_path: Path) -> None:
    cells = [SECTION[0], SECTION[4], *SECTION[1:4]]
    assert len(chapter_faults(load_concepts()["layer-norm"], written(tmp_path, cells))) >= 4


def test_an_unmeasured_claim_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {id: replace(row, state="planned") for id, row in load_claims().items()}
    monkeypatch.setattr(f"{__name__}.load_claims", lambda: rows)
    faults = chapter_faults(load_concepts()["layer-norm"], written(tmp_path, SECTION))
    assert faults == ["claim layer-norm-higher-lr is still planned"]


def test_a_symbol_must_import_and_explain_itself() -> None:
    concept = load_concepts()["layer-norm"]
    assert "does not import" in symbol_faults(replace(concept, symbol="llm_atlas.nn.norm.LayerNrm"))[0]
    assert "does not import" in symbol_faults(replace(concept, symbol="llm_atlas.none.x"))[0]
    faults = symbol_faults(replace(concept, symbol="llm_atlas.book.checks.Verdict.__bool__"))
    assert [f.split()[-1] for f in faults] == ["docstring", "source"]


def test_a_test_must_exist_and_name_what_it_tests(tmp_path: Path) -> None:
    concept = replace(load_concepts()["layer-norm"], test="tests/test_x.py::test_it")
    assert test_faults(concept, tmp_path) == ["test tests/test_x.py does not exist"]
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests/test_x.py"
    file.write_text("def test_that(): ...")
    assert test_faults(concept, tmp_path) == ["test tests/test_x.py has no test_it"]
    file.write_text("def test_it(): ...")
    assert test_faults(concept, tmp_path) == ["no test in tests/test_x.py names LayerNorm or layer-norm"]
    file.write_text("def test_it():\n    LayerNorm(3)")
    assert test_faults(concept, tmp_path) == []


ROWS = """\
- number: 1
  title: "One"
  slug: 01-one
  concepts:
  - {first}
  - {second}
"""
CONCEPT = (
    "{{id: {id}, name: n, example: e, facts: [f], symbol: s, test: t, sources: [b], needs: [{needs}], "
    "previews: [{previews}], state: {state}}}"
)


def listed(first: dict[str, str], second: dict[str, str]) -> str:
    blank = {"needs": "", "previews": "", "state": "planned"}
    texts = [CONCEPT.format(**{**blank, "id": id, **given}) for id, given in [("a", first), ("b", second)]]
    return ROWS.format(first=texts[0], second=texts[1])


def test_a_sound_list_loads(tmp_path: Path) -> None:
    path = tmp_path / "concepts.yml"
    path.write_text(listed({"previews": "b"}, {"needs": "a"}))
    found = load_concepts(path)
    assert found["b"].needs == ("a",)
    assert found["a"].previews == ("b",)
    assert chapters(path)[0].concepts == ("a", "b")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (listed({}, {"needs": "c"}), 6, "'b' needs 'c', which is no concept"),
        (listed({"previews": "c"}, {}), 5, "'a' previews 'c', which is no concept"),
        (listed({"needs": "b"}, {}), 5, "'a' needs 'b', which comes later; make it a preview"),
        (listed({}, {"previews": "a"}), 6, "'b' previews 'a', which is not later; make it a need"),
        (listed({"needs": "b"}, {"needs": "a"}), None, "needs form a cycle: "),
        (listed({"needs": "a"}, {}), 5, "needs form a cycle: a -> a"),
        (listed({}, {"needs": "a, a"}), 6, "'b' needs a concept twice"),
        (listed({}, {"id": "a"}), 6, "id 'a' stands twice, first at"),
        (listed({"id": "A b"}, {}), 5, "must be lower-case words joined by hyphens"),
        (listed({"state": "finished"}, {}), 5, "state 'finished' of 'a' is none of planned, partial, done"),
        (listed({"state": "partial"}, {}), 5, "'a' is partial; `missing` belongs to partial"),
        (listed({"state": "done, missing: x"}, {}), 5, "`missing` belongs to partial"),
        (listed({}, {"state": "done, status: x"}), 6, "unknown field 'status'"),
        (listed({"state": "3"}, {}), 5, "state must be text, not 3"),
        (listed({}, {}).replace("facts: [f]", "facts: []", 1), 5, "facts of 'a' is empty"),
        (listed({}, {}).replace("facts: [f]", "facts: f", 1), 5, "facts must be a list of texts"),
        (listed({}, {}).replace("test: t, ", "", 1), 5, "test"),
        (listed({}, {}).replace("name: n,", "name: n, name: m,", 1), 5, "key 'name' stands twice"),
        (listed({}, {}).replace("number: 1", "number: 2"), 1, "chapter number 2, wanted 1"),
        (listed({}, {}).replace("01-one", "1-one"), 1, "slug '1-one'"),
        (listed({}, {}).replace('"One"', '"One'), None, "not YAML"),
        ("a: b\n", 1, "a list of mappings was wanted"),
    ],
)
def test_an_unsound_list_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int | None, said: str
) -> None:
    path = tmp_path / "concepts.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^concepts\.yml:\d+: ") as caught:
        load_concepts(path)
    assert said in str(caught.value)
    assert line is None or str(caught.value).startswith(f"concepts.yml:{line}: ")
