"""WordPiece against the tokenizers of Hugging Face, with the real vocabulary of all-MiniLM-L6-v2."""

import random
import unicodedata

import pytest

from llm_atlas.core.assets import fetch
from llm_atlas.text.wordpiece import WordPiece, words

TEXTS = [
    "A cat sits on the mat.",
    "Tokenization, unaffordably: supercalifragilisticexpialidocious!",
    "Café Zürich naïve façade señor Ångström Ελλάδα ΟΔΟΣ Σ İstanbul ß ﬁ",
    "e\u0301le\u0300ve versus élève; \u1e9b\u0323",
    "我爱自然语言处理abc漢字 かな カナ 한국어 ｶﾅ",
    "don't can't O'Neil's $5.00 50% a^b `x` ~y~ <tag> [CLS] |pipe|",
    "tabs\tand\nnewlines\r\nand\u00a0no-break\u3000wide\u2028line\u200bzero",
    "control\x00\x01\x7f\x0b\x0c\x85characters\ufffd\ufeff\u00ad",
    "emoji 😀👩‍👩‍👧 🇩🇪 flags",
    "مرحبا بالعالم नमस्ते दुनिया สวัสดี שלום",
    "x" * 100 + " " + "x" * 101,
    "«quotes» “curly” — dash… ¿qué? ¡sí! §5 ™ ©",
    "",
    "   ",
]


@pytest.fixture(scope="module")
def ours() -> WordPiece:
    return WordPiece.from_file(fetch("all-minilm-l6-v2-vocab"))


def oracle(lowercase: bool):
    """The tokenizer of `tokenizers` without special tokens, which it would look for in the text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    path = str(fetch("all-minilm-l6-v2-vocab"))
    made = Tokenizer(models.WordPiece.from_file(path, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def known_long(c: str) -> bool:
    """Whether a character has not changed since Unicode 3.2: libraries have tables of different age."""
    return unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) != "Cn"


def every_character() -> list[str]:
    return [chr(o) for o in range(0x110000) if not 0xD800 <= o < 0xE000 and known_long(chr(o))]


def fuzzed(seed: int) -> str:
    """Words of the vocabulary's letters, marks, ideographs and controls in any order."""
    rng = random.Random(seed)
    pools = [
        "abcdefghijklmnopqrstuvwxyz",
        "ABCXYZÄÖÜÉÑŠŁØ",
        "0123456789",
        " \t\n\r\u00a0\u3000",
        "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
        "\u0301\u0308\u0327\u0323",
        "中文字漢語日本",
        "한국어가",
        "かなカナ",
        "αβγσςΣΩ",
        "\x00\x01\x1f\x7f\x85\u200b\ufeff\ufffd\u00ad",
        "«»“”—…¿¡§",
        "אבג",
        "مرحبا",
        "हिन्दी",
    ]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(60)))


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_those_of_tokenizers(ours, lowercase):
    theirs = oracle(lowercase)
    mine = WordPiece(ours.names, lowercase=lowercase)
    for text in [*TEXTS, *map(fuzzed, range(2000))]:
        expected = theirs.encode(text)
        assert mine.encode(text) == expected.ids, repr(text)
        assert mine.tokens(text) == expected.tokens


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_is_treated_as_in_tokenizers(lowercase):
    from tokenizers import normalizers, pre_tokenizers

    normalize, cut = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    characters = every_character()
    assert len(characters) > 200_000
    ideographs = [c for c in characters if unicodedata.category(c) in ("Lo", "Co")]
    others = [c for c in characters if unicodedata.category(c) not in ("Lo", "Co")]
    for some in (others, ideographs[::7]):
        some += ["\u0378", "\uffff"]  # assigned in no version
        text = " ".join(f"a{c}b" for c in some)
        assert words(text, lowercase=lowercase) == [
            word for word, _ in cut.pre_tokenize_str(normalize.normalize_str(text))
        ]


def test_framed_ids_and_types_are_those_of_transformers(ours):
    from transformers import BertTokenizer

    theirs = BertTokenizer(vocab=str(fetch("all-minilm-l6-v2-vocab")), do_lower_case=True)
    for first, second in zip(TEXTS[:5], TEXTS[5:10], strict=True):
        second = second.replace("[CLS]", "")  # there the text's own [CLS] would be the special token
        for pair in ((first,), (first, second)):
            expected = theirs(*pair)
            ids, types = ours.frame(*map(ours.encode, pair))
            assert ids == expected["input_ids"]
            assert types == expected["token_type_ids"]


def test_by_hand(ours):
    assert ours.vocab_size == 30522
    assert ours.tokens("Embeddings") == ["em", "##bed", "##ding", "##s"]
    assert ours.tokens("[SEP]") == ["[", "sep", "]"]
    assert ours.tokens("x" * 101) == ["[UNK]"]
    assert ours.frame([7], [8, 9]) == ([101, 7, 102, 8, 9, 102], [0, 0, 0, 1, 1, 1])
    assert ours.frame([]) == ([101, 102], [0, 0])


def test_a_word_with_one_unknown_letter_is_unknown_whole():
    tiny = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "ab", "##c"])
    assert tiny.tokens("abc abd a") == ["ab", "##c", "[UNK]", "a"]
    # Greedy: "abb" begins with "ab", the longest, though a ##b ##b has as many letters.
    assert tiny.tokens("abb") == ["ab", "##b"]


def test_bad_vocabularies_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^the vocabulary lacks \[CLS\]$"):
        WordPiece(["[PAD]", "[UNK]", "[SEP]"])
    with pytest.raises(ValueError, match=r"^token 'a' is in the vocabulary twice$"):
        WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "a"])
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\na\r\n")
    assert WordPiece.from_file(tmp_path / "vocab.txt").names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]
