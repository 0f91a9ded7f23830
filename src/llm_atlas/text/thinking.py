"""Thinking before answering, at the level of text: a chat template with a thinking span, and its parser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llm_atlas.text.chat_template import chatml

if TYPE_CHECKING:
    from llm_atlas.text.byte_bpe import ByteBPE

START, END = "<|im_start|>", "<|im_end|>"


class ThinkingAnswer(NamedTuple):
    """An assistant's message taken apart.

    thought: what stands in the span; None where there is no span.
    answer:  what stands behind it; None where the span was never closed, so that no answer was begun.
    closed:  whether a closing tag was found.
    """

    thought: str | None
    answer: str | None
    closed: bool


@dataclass(frozen=True, kw_only=True)
class ThinkingTemplate:
    r"""ChatML in which the assistant thinks before it answers: `<think>\nthought\n</think>\n\nanswer`.

    Thoughts are for the turn they were thought in: an assistant's turn that a user's message follows is rendered
    without its thought, so a long conversation does not fill up with them (DeepSeek-R1's and Qwen3's own templates do
    so). The turns after the user's last message keep theirs; the very last turn gets an empty span if it has none.
    A message's thought is its `thinking`, or else the first closed span in its content.

    open, close: the tags.
    system:      a system message for conversations that have none; None puts none there.

    DeepSeek-AI 2025, table 1 (arXiv 2501.12948); Qwen Team 2025, section 4.3 (arXiv 2505.09388).
    Errors: ValueError for tags that are empty, equal, or ChatML's.
    """

    open: str = "<think>"
    close: str = "</think>"
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            tag = getattr(self, name)
            if not tag or tag in (START, END):
                raise ValueError(f"{name} {tag!r} must be a tag of its own")
        if self.open in self.close or self.close in self.open:
            raise ValueError(f"open {self.open!r} and close {self.close!r} must not lie in one another")

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        thinking: bool = True,
    ) -> str:
        r"""The conversation as one string.

        add_generation_prompt: end with the opening of an assistant's message. The model opens the span itself.
        thinking: False ends the generation prompt with an empty, closed span, so that the model goes on with the
        answer: Qwen3's way of switching thinking off. Without a generation prompt it says nothing.
        Errors: ValueError as `chatml`; for `thinking` in the message of another role, and for a thought that holds
        the closing tag, which would end it early.
        """
        found = self._bodies(messages)  # first, for it checks the messages
        plain = [
            {"role": message["role"], "content": "".join(body)}
            for message, body in zip(messages, found, strict=True)
        ]
        text = chatml(plain, add_generation_prompt=add_generation_prompt, system=self.system)
        return text + (f"{self.open}\n\n{self.close}\n\n" if add_generation_prompt and not thinking else "")

    def encode(
        self,
        tokenizer: "ByteBPE",
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        thinking: bool = True,
    ) -> list[int]:
        """The token ids of `render(...)`, with only the template's own marks and tags as special tokens.

        A tag is its special token where the tokenizer has one of that name (Qwen3), else the tokens of its
        characters (many distilled models). What a message spells out stays text, see `chat_template.encode_chat`:
        a user who writes `</think>` or `<|im_end|>` closes nothing.
        Errors: as `render`; ValueError for a tokenizer without ChatML's special tokens.
        """
        missing = next((name for name in (START, END) if name not in tokenizer.special), None)
        if missing is not None:
            raise ValueError(f"the tokenizer has no special token {missing!r}, which ChatML needs")
        found = self._bodies(messages)  # first, for it checks the messages
        bodies = list(zip([message["role"] for message in messages], found, strict=True))
        if self.system is not None and bodies[0][0] != "system":
            bodies.insert(0, ("system", ["", "", self.system]))
        ids: list[int] = []
        for role, (opened, thought, closed, answer) in ((r, _four(body)) for r, body in bodies):
            ids.append(tokenizer.special[START])
            ids += self._tagged(tokenizer, f"{role}\n", opened, thought, closed, answer)
            ids += [tokenizer.special[END], *tokenizer.encode("\n")]
        if add_generation_prompt:
            span = ("", "", "", "") if thinking else (self.open, "\n\n", self.close, "\n\n")
            ids += [tokenizer.special[START], *self._tagged(tokenizer, "assistant\n", *span)]
        return ids

    def parse(self, text: str, *, opened: bool = False) -> ThinkingAnswer:
        r"""Thought and answer of an assistant's message, as a model wrote it.

        The thought runs from the first opening tag to the first closing tag, whatever lies between, so a second
        opening tag is part of it and a second closing tag part of the answer. A closing tag alone ends a thought that
        the prompt had opened (DeepSeek-R1's template ends in `<think>\n`). What stands before the opening tag belongs
        to neither. Without tags all is answer; a span that is not closed was cut off and has no answer yet.

        opened: the prompt opened the span, so that a text without tags is a thought that was cut off.
        One newline behind the opening tag, one before the closing tag and two behind it are the template's and are
        taken off, as is a last `<|im_end|>`.
        """
        if text.endswith((END, f"{END}\n")):
            text = text.removesuffix("\n").removesuffix(END)
        return self._split(text, opened=opened)

    def _split(self, text: str, *, opened: bool = False) -> ThinkingAnswer:
        before, closing, answer = text.partition(self.close)
        _, opening, thought = before.partition(self.open)
        if not opening:
            thought = before
        if closing:
            answer = answer.removeprefix("\n").removeprefix("\n")
            return ThinkingAnswer(_inside(thought), answer, True)
        if opening or opened:
            return ThinkingAnswer(thought.removeprefix("\n"), None, False)
        return ThinkingAnswer(None, text, False)

    def _bodies(self, messages: Sequence[Mapping[str, str]]) -> list[list[str]]:
        """What stands in each turn: [text], or [opening tag, thought, closing tag, answer]."""
        if isinstance(messages, str | Mapping) or not messages:
            raise ValueError(f"messages {messages!r} must be a list of at least one message")
        for i, message in enumerate(messages):
            if isinstance(message, Mapping) and "thinking" in message and message.get("role") != "assistant":
                raise ValueError(
                    f"message {i} of role {message.get('role')!r} has thinking; only assistant's may"
                )
        chatml(
            [
                {k: v for k, v in m.items() if k != "thinking"} if isinstance(m, Mapping) else m
                for m in messages
            ]
        )
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return [
            self._body(i, message, current=i > asked, last=i == len(messages) - 1)
            if message["role"] == "assistant"
            else [message["content"]]
            for i, message in enumerate(messages)
        ]

    def _body(self, i: int, message: Mapping[str, str], *, current: bool, last: bool) -> list[str]:
        content, thought = message["content"], message.get("thinking")
        if thought is not None and not isinstance(thought, str):
            raise ValueError(f"message {i} has thinking {thought!r}, which is no string")
        if thought is None and self.close in content:
            thought, content, _ = self._split(content)
        if thought is not None and self.close in thought:
            raise ValueError(f"message {i} has thinking that holds {self.close!r}: it would end there")
        if not current or (not last and not thought):
            return [content]
        return [self.open, f"\n{thought or ''}\n", self.close, f"\n\n{content}"]

    def _tagged(
        self, tokenizer: "ByteBPE", role: str, opened: str, thought: str, closed: str, answer: str
    ) -> list[int]:
        # Text between two special tokens is encoded in one piece, as it is in the rendered string.
        ids, text = [], role
        for tag, after in ((opened, thought), (closed, answer)):
            if tag in tokenizer.special:
                ids += [*tokenizer.encode(text), tokenizer.special[tag]]
                text = after
            else:
                text += tag + after
        return ids + tokenizer.encode(text)


def _four(body: list[str]) -> tuple[str, str, str, str]:
    return tuple(body) if len(body) == 4 else ("", body[-1], "", "")


def _inside(thought: str) -> str:
    r"""Without the template's newlines. An empty thought is `\n\n`; cut off at once it may be one newline or none."""
    return thought.removeprefix("\n").removesuffix("\n")
