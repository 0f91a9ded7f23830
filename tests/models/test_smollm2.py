"""The real SmolLM2 in our Decoder against transformers loading the same file."""

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core.assets import fetch
from llm_atlas.infer.generate import generate
from llm_atlas.models.inspect import parameter_ledger
from llm_atlas.models.pretrained import SMOLLM2, load_smollm2
from llm_atlas.nn.masks import left_pad
from llm_atlas.text.chat_template import chatml

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "The theory of general relativity says that",
    "Ich hätte gern ein Stück Käsekuchen, aber",
    "La vida es sueño, y los sueños",
    "Le chat s'est assis sur l'appui de la fenêtre et",
    "Съешь же ещё этих мягких французских булок",
    "吾輩は猫である。名前はまだ無い。",
    "天地玄黃，宇宙洪荒。",
    "مرحبا بالعالم",
    "नमस्ते दुनिया, आज मौसम",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {",
    "SELECT name, COUNT(*) FROM orders WHERE price > 9.99 GROUP BY",
    "3141592653589793 + 2718281828459045 =",
    "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    "😀🎉   spaces   and\ttabs\n\n\nand lines ...",
    chatml([{"role": "user", "content": "What is the boiling point of water?"}], add_generation_prompt=True),
    chatml(
        [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Is the sky blue?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And grass?"},
        ],
        add_generation_prompt=True,
    ),
    "A long one. " + " ".join(f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(22)),
]


@pytest.fixture(scope="module")
def ours():
    model, tokenizer = load_smollm2("cpu", torch.float32)
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = fetch(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_logits_are_those_of_transformers(ours, theirs, prompt):
    model, tokenizer = ours
    ids = torch.tensor([tokenizer.encode(prompt, special="allow")])
    expected = theirs(ids).logits
    assert expected.std() > 1
    assert (model(ids) - expected).abs().max() < 1e-3


def test_the_long_prompt_is_long(ours):
    assert 280 <= len(ours[1].encode(PROMPTS[-1])) <= 400


@pytest.mark.parametrize("index", [0, 11, 17])
def test_the_greedy_continuation_is_that_of_transformers(ours, theirs, index):
    model, tokenizer = ours
    ids = tokenizer.encode(PROMPTS[index], special="allow")
    written = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
    )[0, len(ids) :].tolist()
    assert len(written) == 64
    assert generate(model, [ids], max_new_tokens=64) == [written]


@pytest.mark.parametrize("chunks", [[1] * 24, [16, 8], [5, 1, 11, 7], [24]], ids=str)
def test_cached_is_uncached(ours, chunks):
    model, tokenizer = ours
    ids = torch.tensor([tokenizer.encode(PROMPTS[-1])[:24]])
    cache = model.make_cache()
    parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-3, rtol=0)
    assert cache.length == 24
    assert cache.nbytes == 2 * 30 * 3 * 64 * 4 * 24


def test_a_row_behind_padding_is_the_row_alone(ours):
    model, tokenizer = ours
    rows = [tokenizer.encode(PROMPTS[i], special="allow") for i in (0, 17, 11, 7)]
    ids, positions = left_pad(rows, pad_id=2)
    batch = model(ids, positions=positions)
    for row, logits in zip(rows, batch, strict=True):
        alone = model(torch.tensor([row]))[0]
        assert_close(logits[-len(row) :], alone, atol=1e-3, rtol=0)


def test_a_batch_writes_what_its_rows_write_alone(ours):
    model, tokenizer = ours
    rows = [tokenizer.encode(PROMPTS[i], special="allow") for i in (0, 17, 11)]
    alone = [generate(model, [row], max_new_tokens=12)[0] for row in rows]
    assert generate(model, rows, max_new_tokens=12) == alone


def test_the_ledger_is_that_of_the_published_model(ours):
    ledger = parameter_ledger(ours[0])
    assert sum(ledger.values()) == 134_515_008
    assert ledger["embedding"] == 49152 * 576
    assert ledger["head"] == 0
    assert ledger["feed-forward"] == 30 * 3 * 576 * 1536


def test_it_answers_in_english(ours):
    model, tokenizer = ours
    ids = tokenizer.encode(PROMPTS[17], special="allow")
    written = generate(model, [ids], max_new_tokens=40, stop_ids=[tokenizer.eos_id])[0]
    assert "100" in tokenizer.decode(written, skip_special=True)
