"""The real all-MiniLM-L6-v2 in our Encoder against transformers loading the same file."""

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core.assets import fetch
from llm_atlas.core.weights import load_safetensors
from llm_atlas.models.encoder import mean_pool
from llm_atlas.models.minilm import MINILM, embed_sentences, load_minilm
from llm_atlas.nn.masks import left_pad

SENTENCES = [
    "A cat sits on the mat.",
    "A kitten is resting on a rug.",
    "The stock market fell sharply on Monday after the central bank raised interest rates again.",
    "Interest rates went up and shares went down.",
    "How do I bake sourdough bread?",
    "Die Katze sitzt auf der Matte; naïve café, 我爱你!",
    "Short.",
    "",
    "A long one. " + " ".join(f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(60)),
]


@pytest.fixture(scope="module")
def ours():
    model, tokenizer = load_minilm("cpu")
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def theirs():
    """transformers' model, and its tokenizer, pooling and length as the package of the model says."""
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config).eval().requires_grad_(False)
    state = load_safetensors(fetch(MINILM), dtype=torch.float32)
    state.pop("embeddings.position_ids", None)
    model.load_state_dict(state)
    tokenizer = BertTokenizer(vocab=str(fetch(f"{MINILM}-vocab")), do_lower_case=True)

    def embed(sentences: list[str]) -> torch.Tensor:
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
        keep = batch["attention_mask"][..., None]
        total = (model(**batch).last_hidden_state * keep).sum(1)
        return torch.nn.functional.normalize(total / keep.sum(1), dim=1)

    return model, embed


def test_sentence_vectors_are_those_of_transformers(ours, theirs):
    expected = theirs[1](SENTENCES)
    found = embed_sentences(*ours, SENTENCES)
    assert (found - expected).abs().max() < 1e-5
    assert (found * expected).sum(1).min() > 1 - 1e-5
    assert_close(found.norm(dim=1), torch.ones(len(SENTENCES)))
    assert (found @ found.T).fill_diagonal_(0).max() < 0.99  # no two are one


def test_a_sentence_in_a_batch_is_the_sentence_alone(ours):
    together = embed_sentences(*ours, SENTENCES)
    for sentence, vector in zip(SENTENCES, together, strict=True):
        assert (embed_sentences(*ours, [sentence])[0] - vector).abs().max() < 1e-5


def test_the_longest_text_is_read_to_its_limit(ours):
    model, tokenizer = ours
    ids = tokenizer.encode(SENTENCES[-1])
    assert len(ids) > 510
    cut = embed_sentences(model, tokenizer, SENTENCES[-1:], limit=64)
    rows = [tokenizer.frame(ids[:62])[0]]
    assert len(rows[0]) == 64
    mean = mean_pool(model.hidden(torch.tensor(rows)))
    assert_close(cut, mean / mean.norm(), atol=1e-6, rtol=0)
    assert (cut - embed_sentences(model, tokenizer, SENTENCES[-1:], limit=512)).abs().max() > 1e-3


def test_hidden_vectors_and_the_pooler_are_those_of_transformers(ours, theirs):
    model, tokenizer = ours
    ids, types = tokenizer.frame(tokenizer.encode(SENTENCES[0]), tokenizer.encode(SENTENCES[1]))
    ids, types = torch.tensor([ids]), torch.tensor([types])
    expected = theirs[0](ids, token_type_ids=types)
    hidden = model.hidden(ids, token_types=types)
    assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert_close(model.pool(hidden), expected.pooler_output, atol=1e-5, rtol=0)
    assert (hidden - model.hidden(ids)).abs().max() > 1e-2  # the second sentence's type matters


def test_like_sentences_are_close(ours):
    close = embed_sentences(*ours, SENTENCES[:5])
    cosines = close @ close.T
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]
    assert cosines[2, 3] > 0.5 > 0.2 > cosines[2, 4]


def test_the_model_is_the_published_one(ours):
    assert sum(p.numel() for p in ours[0].parameters()) == 22_713_216
    ids, _ = left_pad([ours[1].encode(SENTENCES[0])])
    assert ours[0].hidden(ids).shape == (1, 7, 384)


def test_bad_input_is_named(ours):
    with pytest.raises(TypeError, match=r"^sentences must be a list of strings, not one string$"):
        embed_sentences(*ours, "one")
    with pytest.raises(ValueError, match=r"^a prompt needs at least one token: no prompts at all$"):
        embed_sentences(*ours, [])
    for limit in (2, 513):
        with pytest.raises(ValueError, match=rf"^limit {limit} must lie between 3 and the context of 512$"):
            embed_sentences(*ours, ["a"], limit=limit)
