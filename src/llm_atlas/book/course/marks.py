"""What a graded cell calls, in the kernel of a student's notebook: neither nbgrader nor a MyST parser is needed."""

import contextlib
import io
import itertools
import os
import secrets
import warnings
from typing import Any

__all__ = ["EXAMPLE_POINTS", "FRESH_POINTS", "RUNS", "mark"]

EXAMPLE_POINTS = 1
FRESH_POINTS = 2
# Runs of the check behind the points for fresh inputs.
RUNS = 3


class _Enough(BaseException):
    """The first example has been compared. No Exception, so that no grader takes it for a crash of the answer."""


def mark(concept: str, answer: Any = ..., *, example: bool = False) -> None:
    """Grade `answer` for nbgrader; AssertionError with the counterexample takes the cell's points.

    With `example`, on the first and smallest input of seed 0 alone. Otherwise in whole runs of the check with
    seeds that nobody has seen; the message names the seed, so that the run can be repeated. Outside nbgrader's
    grading and validation nothing is raised: the verdict is printed and the notebook goes on. ValueError for an
    unknown concept or one without an exercise.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # nbgrader takes anything on stderr for a failure, even a warning from a right answer
        warnings.simplefilter("ignore")
        told = _first_fault(concept, answer) if example else _fault(concept, answer)
    if told and os.environ.get("NBGRADER_EXECUTION"):
        raise AssertionError(told)
    print(told or f"✓ {concept}: {'the smallest example' if example else 'fresh inputs'}: right")


def _fault(concept: str, answer: Any) -> str:
    from llm_atlas.book.checks import check

    for _ in range(RUNS):
        seed = secrets.randbelow(2**53)
        verdict = check(concept, answer, seed=seed)
        if verdict.state == "unattempted":
            return repr(verdict)
        if not verdict:
            return f"{verdict!r}\nThe same inputs again: check({concept!r}, answer, seed={seed})"
    return ""


def _first_fault(concept: str, answer: Any) -> str:
    from llm_atlas.book.checks import check

    calls = itertools.count()

    def once(*inputs: Any) -> Any:
        if next(calls):
            raise _Enough
        return answer(*inputs)

    try:
        verdict = check(concept, once if callable(answer) else answer, seed=0)
    except _Enough:
        return ""
    return "" if verdict else repr(verdict)
