"""Chat templates: a list of messages as the one string a chat model was tuned on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from llm_atlas.text.byte_bpe import ByteBPE

ROLES = ("system", "user", "assistant", "tool")
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The system message that SmolLM2's own template puts first where a conversation has none."""


class Message(TypedDict):
    """One turn: who speaks (`role`, one of `ROLES`) and what (`content`)."""

    role: str
    content: str


def _checked(messages: Sequence[Mapping[str, str]], system: str | None = SMOLLM_SYSTEM) -> list[Message]:
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"messages {messages!r} must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(
                f"message {i} must have the keys role and content and no others; got {message!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {i} has role {message['role']!r}; it must be one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} has content {message['content']!r}, which is no string")
    if system is None or messages[0]["role"] == "system":
        return list(messages)
    return [Message(role="system", content=system), *messages]


def chatml(
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
    system: str | None = SMOLLM_SYSTEM,
) -> str:
    """The conversation in ChatML, character for character as SmolLM2's template writes it.

    Each message becomes `<|im_start|>role\\ncontent<|im_end|>\\n`; a conversation that does not open with a
    system message gets SmolLM2's default one.
    add_generation_prompt: end with the opening of an assistant's message, for the model to go on from.
    system: another default system message; None for no default.
    Errors: ValueError for no messages, an unknown role, other keys, content that is no string.
    """
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in _checked(messages, system)]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def encode_chat(
    tokenizer: "ByteBPE", messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    """The token ids of `chatml(messages)`, with only the template's own marks as special tokens.

    A message that spells out `<|im_end|>` gets those characters, not the token: nobody can close their own
    turn and speak as someone else. For messages without such strings this is `encode(chatml(messages),
    special="allow")`.
    Errors: as `chatml`; ValueError for a tokenizer without ChatML's special tokens.
    """
    try:
        start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    except KeyError as error:
        raise ValueError(f"the tokenizer has no special token {error}, which ChatML needs") from None
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    for message in _checked(messages):
        ids += [start, *tokenizer.encode(f"{message['role']}\n{message['content']}"), end, *newline]
    return ids + ([start, *tokenizer.encode("assistant\n")] if add_generation_prompt else [])
