"""Byte-level byte pair encoding: the tokenizer of GPT-2, Llama 3, SmolLM2 and most others."""

import codecs
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal, SupportsIndex

import regex
import tiktoken

SMOLLM_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s++(?!\P{N})|\s+(?!\S)|\s+"
"""Where SmolLM2 cuts a text before merging: at each digit, at words with the space before them, at runs.

The reference cuts in two steps, at every digit and then by GPT-2's pattern inside the pieces. There a run of
spaces before a digit stands at the end of its piece and stays whole, which `\\s++(?!\\P{N})` says in one
step.
"""

_LONG_RUN = 10_000  # spaces; far below where the regex engine under tiktoken gives up, see _short_runs
_PATTERNS = {"smollm": SMOLLM_PATTERN}
_CONTROL = 3  # GGUF's token type of special tokens


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, by byte.

    Vocabulary files are text, so bytes that print stand for themselves and the others, in order, for U+0100
    onward: a space is Ġ (U+0120), a newline Ċ (U+010A). Radford et al. 2019, the `bytes_to_unicode` of the
    released code.
    """
    printable = {ord(c) + i for c, n in (("!", 94), ("¡", 12), ("®", 82)) for i in range(n)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


class ByteBPE:
    """Byte-level BPE with given merges: text -> token ids -> text.

    The text is cut into pieces by a pattern; each piece, as UTF-8 bytes, starts as single-byte tokens, and
    as long as two neighbours together are a token, the pair whose token has the lowest rank is merged. Here
    the rank of a token is its id. Decoding joins the tokens' bytes. Merging is tiktoken's, in Rust.
    Sennrich et al. 2016, section 3.2 (arXiv 1508.07909); bytes: Radford et al. 2019, section 2.2.

    ranks:   bytes of a token -> its id; at most the 256 single bytes may be missing, and a missing byte is
             dropped from texts, as the `tokenizers` library does (SmolLM2 lacks 21 bytes, all but unused).
    special: name -> id of tokens that are no text, such as `<|im_end|>`.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        pattern: str,
        special: Mapping[str, int] | None = None,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ):
        self.special: dict[str, int] = dict(special or {})
        ids = sorted([*ranks.values(), *self.special.values()])
        if ids != list(range(len(ids))):
            raise ValueError(f"token ids must be 0 to {len(ids) - 1}, each once; got {ids[0]} to {ids[-1]}")
        for role, name in (("bos", bos), ("eos", eos), ("pad", pad)):
            if name is not None and name not in self.special:
                raise ValueError(f"{role} token {name!r} is not among the special tokens")
        self.vocab_size = len(ids)
        """How many token ids there are, special ones included."""
        self.bos_id = None if bos is None else self.special[bos]
        self.eos_id = None if eos is None else self.special[eos]
        self.pad_id = None if pad is None else self.special[pad]
        self._bytes: list[bytes] = [b""] * len(ids)
        for token, number in [*ranks.items(), *((name.encode(), n) for name, n in self.special.items())]:
            self._bytes[number] = token
        self._special_ids = frozenset(self.special.values())
        self._ranks = dict(ranks)
        self._pattern = pattern
        missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        self._missing = bytes(b for token in missing for b in token)
        # tiktoken panics on a byte it has no token for, so those get ids past the vocabulary; see encode.
        stand_ins = {token: self.vocab_size + i for i, token in enumerate(missing)}
        self._encoding = tiktoken.Encoding(
            "llm-atlas", pat_str=pattern, mergeable_ranks=self._ranks | stand_ins, special_tokens=self.special
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "ByteBPE":
        """The tokenizer that a GGUF file's metadata describes.

        Errors: ValueError where a key is missing, for a model or pre-tokenizer that is not known here, and
        for a vocabulary whose ids do not follow its merges.
        """
        need = ("model", "pre", "tokens", "token_type", "merges")
        if absent := [key for key in need if f"tokenizer.ggml.{key}" not in metadata]:
            raise ValueError(f"metadata lacks tokenizer.ggml.{absent[0]}")
        model, pre, tokens, types, merges = (metadata[f"tokenizer.ggml.{key}"] for key in need)
        if model != "gpt2":
            raise ValueError(f"tokenizer model {model!r} is not byte-level BPE; expected 'gpt2'")
        if pre not in _PATTERNS:
            raise ValueError(f"pre-tokenizer {pre!r} is unknown; known are {', '.join(_PATTERNS)}")
        if len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(types)} token types; there must be one each")
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        special = {token: i for i, token in enumerate(tokens) if types[i] == _CONTROL}
        try:
            ranks = {bytes(byte_of[c] for c in t): i for i, t in enumerate(tokens) if types[i] != _CONTROL}
        except KeyError as error:
            raise ValueError(f"a token holds {error}, which stands for no byte") from None
        # tiktoken knows ranks alone. They say the same as the merge list if that makes each longer token, in
        # order.
        made = [merge.replace(" ", "") for merge in merges]
        longer = [t for t, kind in zip(tokens, types, strict=True) if kind != _CONTROL and len(t) > 1]
        if made != longer:
            at = next((i for i, (a, b) in enumerate(zip(made, longer, strict=False)) if a != b), "the end")
            raise ValueError(f"merges do not make the tokens in the order of their ids; they part at {at}")

        def named(key: str) -> str | None:
            number = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if number is not None and not 0 <= number < len(tokens):
                raise ValueError(f"{key}_token_id {number} is no token; there are {len(tokens)}")
            return None if number is None else tokens[number]

        return cls(
            ranks,
            pattern=_PATTERNS[pre],
            special=special,
            bos=named("bos"),
            eos=named("eos"),
            pad=named("padding"),
        )

    def encode(self, text: str, *, special: Literal["text", "allow"] = "text") -> list[int]:
        """The token ids of `text`.

        special: "text" reads `<|im_end|>` and the like as the characters they are, which is right for what a
        user wrote; "allow" reads them as the special tokens, for strings that a template made.
        Cost: about linear in the text. Errors: ValueError for a lone surrogate, which UTF-8 cannot hold, and
        for another value of `special`.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        if special not in ("text", "allow"):
            raise ValueError(f"special {special!r} must be 'text' or 'allow'")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate, {text[error.start]!r}, at {error.start}"
            ) from None
        ids = [number for part in self._short_runs(text) for number in self._encode(part, special)]
        if ids and max(ids) >= self.vocab_size:
            ids = self._encode_without_missing(text, special)
        return ids

    def _encode(self, text: str, special: str) -> list[int]:
        if special == "allow":
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    @staticmethod
    def _short_runs(text: str) -> list[str]:
        # tiktoken's engine keeps a state for every space of a run before a word and panics when there are
        # too many. The pattern cuts such a run before its last space in any case, so cut it there beforehand.
        if len(text) < _LONG_RUN:
            return [text]
        cuts = [0]
        for run in regex.finditer(rf"(?<!\s)\s{{{_LONG_RUN},}}+", text):
            if regex.match(r"\P{N}", text, pos=run.end()):
                cuts += [run.start(), run.end() - 1]
        return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]

    def _encode_without_missing(self, text: str, special: str) -> list[int]:
        # The reference drops a byte without a token after cutting the text and before merging, so that its
        # neighbours may merge. Texts that hold one are rare; this is the plain loop.
        names = sorted(self.special, key=len, reverse=True)
        parts = [text]
        if special == "allow" and names:
            parts = regex.split(f"({'|'.join(map(regex.escape, names))})", text)
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special[part])
                continue
            for piece in regex.findall(self._pattern, part):
                kept = piece.encode().translate(None, self._missing)
                text = kept.decode(errors="ignore")
                # A control character leaves whole text, still one piece; one past U+40000 leaves a fragment.
                whole = text.encode() == kept and regex.fullmatch(self._pattern, text)
                ids += self._encoding.encode_ordinary(text) if whole else self._merge(kept)
        return ids

    def _merge(self, piece: bytes) -> list[int]:
        def rank(i: int) -> int:
            return self._ranks.get(b"".join(parts[i : i + 2]), self.vocab_size)

        parts = [bytes([byte]) for byte in piece]
        ranks = [rank(i) for i in range(len(parts) - 1)]
        while ranks and (lowest := min(ranks)) < self.vocab_size:
            i = ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del ranks[i]
            for j in range(max(i - 1, 0), min(i + 1, len(ranks))):
                ranks[j] = rank(j)
        return [self._ranks[part] for part in parts]

    def decode_bytes(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> bytes:
        """The bytes of the tokens, joined; they need not be whole UTF-8. Errors: as `decode`."""
        numbers = list(map(operator.index, ids))  # 0-d tensors and numpy integers too
        if skip_special:
            numbers = [number for number in numbers if number not in self._special_ids]
        return b"".join(map(self.token_bytes, numbers))

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD.

        skip_special: leave special tokens out rather than write their names.
        Errors: ValueError for an id out of range, TypeError for one that is no integer.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode(errors="replace")

    def token_bytes(self, number: int) -> bytes:
        """The bytes of one token; a special token's are those of its name. Errors: as `decode`."""
        if not 0 <= number < self.vocab_size:
            raise ValueError(f"token id {number} must be at least 0 and below {self.vocab_size}")
        return self._bytes[number]

    def tokens(self, text: str) -> list[str]:
        """The tokens of `text` to look at, in GPT-2's printable alphabet: Ġ for a space, Ċ for a newline."""
        alphabet = byte_alphabet()
        return ["".join(alphabet[byte] for byte in self._bytes[number]) for number in self.encode(text)]

    def stream(self, *, skip_special: bool = False) -> "StreamDecoder":
        """A decoder to give ids one by one, as they are generated."""
        return StreamDecoder(self, skip_special=skip_special)


class StreamDecoder:
    """Decodes token ids one at a time and never gives half a character.

    A character of up to four bytes may be spread over several tokens; its bytes are held until the last is
    there. The pieces joined, `flush` included, equal `decode` of all the ids.
    """

    def __init__(self, tokenizer: ByteBPE, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, number: int) -> str:
        """What can be written now that token `number` has come; maybe nothing. Errors: as `decode`."""
        return self._utf8.decode(self._tokenizer.decode_bytes([number], skip_special=self._skip_special))

    def flush(self) -> str:
        """What is still held, at the end; U+FFFD where a character was cut off."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
