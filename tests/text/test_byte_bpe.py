"""Our tokenizer on SmolLM2's vocabulary, against the `tokenizers` library on the same."""

import random
import sys
import unicodedata
from functools import lru_cache

import numpy as np
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from llm_atlas.core.assets import fetch
from llm_atlas.core.weights import load_gguf
from llm_atlas.text.byte_bpe import ByteBPE, byte_alphabet


@lru_cache
def metadata() -> dict:
    return dict(load_gguf(fetch("smollm2-135m-instruct")).metadata)


@lru_cache
def smol() -> ByteBPE:
    return ByteBPE.from_gguf(metadata())


@lru_cache
def reference() -> Tokenizer:
    tokens = metadata()["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata()["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def assert_same(texts: list[str]) -> None:
    ours = [smol().encode(text) for text in texts]
    theirs = [encoding.ids for encoding in reference().encode_batch(texts, add_special_tokens=False)]
    if ours != theirs:
        at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        pytest.fail(f"{texts[at]!r}: ours {ours[at]}, the reference's {theirs[at]}")


# Drawn from more often than chance would: what the pattern tells apart, and what lies on its edges.
PIECES = [
    *"0123456789²½Ⅳ٣५１",
    *["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "''", "’s", "'", "n't", "I'll've"],
    *[" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003", "\u3000"],
    *["\u200b", "\u2028", "\x85"],
    *["\x00", "\x04", "\x07", "\x13", "\x1c", "\x1d", "\x1f", "\x7f", "\ufeff", "\u202e"],
    *["\U00040000", "\U000f0000"],
    *["the", " the", "Hello", " world", "naïve", "e\u0301", "ß", "İ", "straße", "ﬁ", "Ω"],
    *["привет", "שלום", "مرحبا"],
    *["日本語", "한국어", "中文", "नमस्ते", "ไทย", "ქართული", "ខ្មែរ", "አማርኛ", "𝕳𝖊𝖑𝖑𝖔", "𐍈", "Ⓐ", "ª", "ʰ"],
    *["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "☃", "→", "€", "£", "—", "…", "«»", "()", "!!!", "://"],
    *["_", "__init__", "\\n"],
    *["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "Ġ", "Ċ", "3.14", "1,000"],
    *["2024-01-31", "x86"],
]  # fmt: skip


def made_up(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)

    def character() -> str:
        while True:
            code = draw.randrange(sys.maxunicode + 1) if draw.random() < 0.2 else draw.randrange(0x3000)
            # Characters newer than Python's own tables are left out: libraries know them or not by their age.
            if unicodedata.category(chr(code)) not in ("Cs", "Cn"):
                return chr(code)

    def piece() -> str:
        kind = draw.random()
        if kind < 0.6:
            return draw.choice(PIECES)
        if kind < 0.8:
            return "".join(draw.choice(" \n\ta1.é'") for _ in range(draw.randint(1, 6)))
        return "".join(character() for _ in range(draw.randint(1, 4)))

    return ["".join(piece() for _ in range(draw.randint(1, 12))) for _ in range(count)]


def test_the_vocabulary():
    assert smol().vocab_size == 49152
    assert len(smol().special) == 17
    assert smol().special["<|im_end|>"] == smol().eos_id == smol().pad_id == 2
    assert smol().special["<|im_start|>"] == smol().bos_id == 1


def test_a_sentence_by_hand():
    assert smol().tokens("Hello  world, it's 2024") == (
        ["Hello", "Ġ", "Ġworld", ",", "Ġit", "'s", "Ġ", "2", "0", "2", "4"]
    )
    assert smol().encode("") == []
    assert smol().decode([]) == ""


def test_same_tokens_on_made_up_texts():
    texts = made_up(6000, seed=0)
    assert len(set(texts)) > 5500
    assert_same(texts)


def test_same_tokens_on_pairs_of_pieces():
    assert_same([f"{a}{b}" for a in PIECES for b in PIECES])


def test_same_tokens_on_every_character():
    """Each assigned character in the places where its class matters."""
    every = map(chr, range(sys.maxunicode + 1))
    characters = [c for c in every if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    assert len(characters) > 140_000
    assert_same([f"a{c} {c}{c}1 {c}!  {c}b" for c in characters])


def test_same_tokens_on_the_whole_vocabulary():
    texts = [smol().token_bytes(i).decode(errors="replace") for i in range(17, smol().vocab_size)]
    assert_same(texts)


def test_same_tokens_where_merges_compete():
    """tiktoken merges any neighbours that make a token, the reference only listed pairs."""
    draw = random.Random(0)
    vocabulary = [
        smol().token_bytes(i).decode(errors="replace").strip() for i in range(17, smol().vocab_size)
    ]
    short = [token for token in vocabulary if regex.fullmatch(r"\p{L}{1,4}", token)]
    assert_same(["".join(draw.choices(short, k=draw.randint(2, 4))) for _ in range(20_000)])


@given(st.text())
@settings(max_examples=300)
@example("\x13 \x13!\x13! \x04")
def test_same_tokens_and_round_trip(text):
    newer = any(unicodedata.category(c) == "Cn" for c in text)
    if not newer:
        assert_same([text])
    missing = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    kept = bytes(byte for byte in text.encode() if byte not in missing)
    assert smol().decode_bytes(smol().encode(text)) == kept


def test_round_trip_on_made_up_texts():
    for text in made_up(2000, seed=1):
        kept = regex.sub("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]", "", text)
        if kept == text:
            assert smol().decode(smol().encode(text)) == text


def test_bytes_the_vocabulary_lacks_are_dropped_between_cutting_and_merging():
    assert smol().tokens("!!") == ["!!"]
    assert smol().tokens("!\x13!") == ["!!"]  # one piece, and neighbours once the byte is gone
    assert smol().tokens("a\x13b") == ["a", "b"]  # three pieces
    assert smol().encode("\x13") == []
    assert smol().encode("a\x13<|im_end|>b", special="allow") == [*smol().encode("a"), 2, *smol().encode("b")]
    assert_same(["!\x13!", "a\x13b", "\x13", "é\x04\x04é", "  \x06  x\x061 \x061", "\U00040000\U00080001"])
    assert_same(["!" * 30_000 + "\x13", "\U00040000" * 1000, " \x13", "\x13 ", "'\x13s", "a \x13 1"])


def test_special_tokens_are_text_unless_allowed():
    text = "a<|im_end|>\n<|im_start|>b<|im_en"
    assert not set(smol().special.values()) & set(smol().encode(text))
    assert smol().decode(smol().encode(text)) == text
    allowed = smol().encode(text, special="allow")
    assert [i for i in allowed if i < 17] == [2, 1]
    assert smol().decode(allowed) == text
    assert smol().decode(allowed, skip_special=True) == "a\nb<|im_en"
    for name, number in smol().special.items():
        assert smol().encode(name, special="allow") == [number]
        assert len(smol().encode(name)) > 1


@pytest.mark.parametrize("tail", ["", "x", "1", "\n", "!"])
@pytest.mark.parametrize("character", [" ", "\n", "a", "!", "7", "é"])
def test_long_runs(character, tail):
    """A million spaces before a word make tiktoken's own way of cutting panic."""
    assert_same(["y" + character * 12_000 + tail])  # past the length where runs are treated apart
    if character.isspace():
        text = "y" + character * 300_000 + tail
        assert smol().decode(smol().encode(text)) == text


def test_a_million_spaces():
    text = " " * 1_000_000 + "x"
    assert smol().decode(smol().encode(text)) == text


def test_streaming_never_gives_half_a_character():
    for text in [*made_up(300, seed=2), "😀é日"]:
        ids = smol().encode(text, special="allow")
        stream = smol().stream()
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.flush() == smol().decode(ids)
        if "\ufffd" not in smol().decode(ids):
            assert not any("\ufffd" in part for part in parts)
    stream = smol().stream()
    assert [stream.push(i) for i in smol().encode("\U0001f9ff")] == ["", "", "\U0001f9ff"]


@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
def test_streaming_any_ids_equals_decoding(ids, skip):
    stream = smol().stream(skip_special=skip)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == smol().decode(ids, skip_special=skip)


def test_a_cut_character_is_flushed_once():
    stream = smol().stream()
    first = smol().encode("\U0001f9ff")[0]
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(smol().encode("a")[0]) == "a"


@pytest.mark.parametrize("number", [-1, 49152, 10**9])
def test_ids_out_of_range(number):
    for call in (smol().decode, smol().decode_bytes, lambda ids: smol().stream().push(ids[1])):
        with pytest.raises(ValueError, match=f"token id {number} must be at least 0 and below 49152"):
            call([19556, number])


def test_ids_of_other_integer_types():
    ids = smol().encode("Hello<|im_end|>", special="allow")
    for other in (torch.tensor(ids), np.array(ids), tuple(ids), iter(ids)):
        assert smol().decode(other, skip_special=True) == "Hello"
    with pytest.raises(TypeError):
        smol().decode([1.0])


def test_bad_texts():
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud800', at 1"):
        smol().encode("a\ud800")
    # The type checker of the tests, where it is on, speaks first.
    with pytest.raises((ValueError, TypeError), match="'yes'"):
        smol().encode("a", special="yes")
    with pytest.raises(TypeError, match="text"):
        smol().encode(b"a")


def test_the_byte_alphabet():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert [alphabet[byte] for byte in b" \n\tA~"] == ["Ġ", "Ċ", "ĉ", "A", "~"]
    used = {c for i, token in enumerate(metadata()["tokenizer.ggml.tokens"]) if i > 16 for c in token}
    assert used <= set(alphabet)
    assert {byte for byte in range(256) if alphabet[byte] not in used} == (
        {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    )


def changed(**entries) -> dict:
    return metadata() | {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


def test_metadata_that_does_not_fit():
    tokens, merges = metadata()["tokenizer.ggml.tokens"], metadata()["tokenizer.ggml.merges"]
    lacking = {key: value for key, value in metadata().items() if key != "tokenizer.ggml.merges"}
    for wrong, told in [
        (lacking, "lacks tokenizer.ggml.merges"),
        (changed(model="llama"), "'llama' is not byte-level BPE"),
        (changed(pre="qwen2"), "'qwen2' is unknown; known are smollm"),
        (changed(token_type=[1, 1]), "49152 tokens have 2 token types"),
        (changed(tokens=[*tokens[:-1], "日"]), "'日', which stands for no byte"),
        (changed(merges=[merges[1], merges[0], *merges[2:]]), "part at 0"),
        (changed(merges=merges[:-1]), "part at the end"),
        (changed(eos_token_id=17), "eos token '!' is not among the special tokens"),
        (changed(bos_token_id=49152), "bos_token_id 49152 is no token"),
    ]:
        with pytest.raises(ValueError, match=told):
            ByteBPE.from_gguf(wrong)


def test_a_small_tokenizer_by_hand():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    small = ByteBPE(ranks, pattern=r"\S+|\s+", special={"<end>": 259}, eos="<end>")
    assert small.vocab_size == 260
    assert small.encode("abc bc") == [258, 32, 257]  # ab before bc, then abc
    assert small.encode("bcab<end>", special="allow") == [257, 256, 259]
    assert small.eos_id == 259
    assert small.bos_id is None
    with pytest.raises(ValueError, match="ids must be 0 to 258, each once; got 0 to 300"):
        ByteBPE(ranks | {b"abc": 300}, pattern=r"\S+|\s+")
    with pytest.raises(ValueError, match="'<s>' is not among"):
        ByteBPE(ranks, pattern=r"\S+|\s+", bos="<s>")
