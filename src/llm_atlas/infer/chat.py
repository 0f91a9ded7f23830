"""Talking with a model that thinks: its template, its parser, and a vote over several answers."""

from collections import Counter
from collections.abc import Sequence

from llm_atlas.text.thinking import ThinkingAnswer, ThinkingTemplate

__all__ = ["ThinkingAnswer", "ThinkingTemplate", "majority_vote"]


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first of those that tie; None, an answer that never came, has no vote.

    Self-consistency: sample several thoughts and keep the answer that most of them reach.
    None where nobody answered. Errors: ValueError for no answers at all.
    Wang et al. 2022, section 2 (arXiv 2203.11171).
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers {answers!r} must be a list of at least one answer")
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None
