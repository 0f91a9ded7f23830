"""Exercises that grade themselves.

`check("self-attention", attend)` calls the reader's function on fresh random inputs, smallest first, and says
`unattempted`, `right`, or `wrong` with the smallest counterexample found. The exercises of one chapter live
in one module beside this file, named like the chapter (`01-core-transformer` is graded by
`core_transformer`), and every reference in them is written out again in plain torch, so that a fault of the
package cannot hide in its own grader.
"""

import difflib
import importlib
import importlib.util
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from llm_atlas.book.concepts import Concept, load_concepts

__all__ = ["Trial", "Verdict", "check", "checker"]

State = Literal["unattempted", "wrong", "right"]
_MARKS = {"unattempted": "○", "wrong": "✗", "right": "✓"}
# A counterexample has to fit under a cell: larger tensors are told by their shape and first difference.
_SHOWN_ELEMENTS = 24


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `check` found: `state` is unattempted, wrong or right, `message` says why. True only when
    right."""

    concept: str
    state: State
    message: str

    def __bool__(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        lines = [line for text in self.message.split("\n") for line in _wrapped(text)]
        return "\n".join([f"{_MARKS[self.state]} {self.concept}: {self.state}", *lines])


def _wrapped(text: str) -> list[str]:
    """A sentence in lines of a page's width; a line of a counterexample, which is indented, as it is."""
    return [text] if text.startswith(" ") else textwrap.wrap(text, 80) or [""]


class _Wrong(Exception):
    """The answer failed; the text is what the reader sees."""


class _Unattempted(Exception):
    """The answer is still the blank."""


class Trial:
    """One run of an exercise: the reader's answer, a source of fresh inputs, and the comparison.

    A grader draws inputs (`normal`, `integer`), calls the answer through `ask`, and hands result and
    reference to `compare`. It goes from small inputs to large ones: the first difference ends the run and is
    the counterexample.
    """

    def __init__(self, answer: Callable[..., Any], seed: int) -> None:
        self._answer = answer
        self._calls = 0
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Normal values rounded to one decimal, so that a printed counterexample is the exact input."""
        return (torch.randn(*shape, generator=self.generator) * 10).round() / 10

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def ask(self, **inputs: Any) -> Any:
        """Call the answer with copies of `inputs`, by position. A crash or a changed input makes the answer
        wrong."""
        copies = _copies(inputs)
        first, self._calls = self._calls == 0, self._calls + 1
        try:
            got = self._answer(*copies)
        except NotImplementedError:
            raise _Unattempted from None
        except Exception as error:  # the reader's code may raise anything
            reason = str(error).strip().split("\n")[0]
            raise _Wrong(
                _report(
                    f"it stopped with {type(error).__name__}: {reason}"
                    if reason
                    else f"it stopped with {type(error).__name__}",
                    inputs,
                )
            ) from None
        if got is None or got is ...:
            if first:
                raise _Unattempted
            raise _Wrong(_report(f"it returned {got!r} here, though not on a smaller input", inputs))
        for (name, value), copy in zip(inputs.items(), copies, strict=True):
            same = torch.equal(value, copy) if isinstance(value, Tensor) else value == copy
            if not same:
                raise _Wrong(_report(f"it changed its input {name} in place", inputs))
        return got

    def refuses(self, error: type[Exception], reason: str, **inputs: Any) -> None:
        """End the run unless the answer raises `error` on these inputs; `reason` says what is wrong with
        them."""
        try:
            got = self._answer(*_copies(inputs))
        except error:
            return
        except Exception as other:  # the reader's code may raise anything
            stopped = f"it stopped with {type(other).__name__}"
            self.fail(f"{reason}: {error.__name__} was wanted, {stopped}", inputs)
        self.fail(f"{reason}: {error.__name__} was wanted", inputs, got=got)

    def fail(self, fault: str, inputs: dict[str, Any], **results: Any) -> NoReturn:
        """End the run with `fault`, for what `compare` cannot see."""
        raise _Wrong(_report(fault, inputs, **results))

    def compare(
        self,
        got: Any,
        wanted: Tensor | float | int,
        inputs: dict[str, Any],
        *,
        hints: Sequence[tuple[str, Callable[[], Any]]] = (),
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> None:
        """End the run if `got` is not `wanted`.

        `hints` are well-known slips as pairs (what went wrong, a function that computes the slip's result):
        the first one whose result equals `got` names the mistake.
        """
        if isinstance(wanted, Tensor):
            fault = _tensor_fault(got, wanted, rtol, atol)
        else:
            got, fault = _number_fault(got, wanted, rtol)
        if fault is None:
            return
        for slip, compute in hints:
            if _matches(got, compute(), rtol, atol):
                fault = slip
                break
        raise _Wrong(_report(fault, inputs, got=got, wanted=wanted))


def _copies(inputs: dict[str, Any]) -> list[Any]:
    """What the reader's code gets: it may write to it."""
    return [
        value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        for value in inputs.values()
    ]


def _matches(got: Any, slip: Any, rtol: float, atol: float) -> bool:
    if isinstance(slip, Tensor):
        return _tensor_fault(got, slip, rtol, atol) is None
    return _number_fault(got, slip, rtol)[1] is None


def _tensor_fault(got: Any, wanted: Tensor, rtol: float, atol: float) -> str | None:
    """What is wrong with `got`, shortest reason first, or None."""
    if not isinstance(got, Tensor):
        return f"it returned {_a(got)}, a tensor of shape {tuple(wanted.shape)} was wanted"
    if got.shape != wanted.shape:
        return f"the result has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if (got.dtype == torch.bool) != (wanted.dtype == torch.bool):
        return f"the result holds {_dtype(got)}, wanted {_dtype(wanted)}"
    if got.dtype.is_complex or (wanted.dtype.is_floating_point and not got.dtype.is_floating_point):
        return f"the result holds {_dtype(got)}, wanted {_dtype(wanted)}"
    got = got.detach()
    if got.dtype == torch.bool:
        bad = got != wanted
    else:
        if got.isnan().any() and not wanted.isnan().any():
            return f"the result has NaN at {_index(got.isnan())}"
        bad = ~torch.isclose(got.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)
    if not bad.any():
        return None
    at = _index(bad)
    if wanted.numel() <= _SHOWN_ELEMENTS:
        return f"the result is off, first at {at}"
    here = tuple(int(i) for i in bad.nonzero()[0])
    return f"the result is off, first at {at}: got {_show(got[here])}, wanted {_show(wanted[here])}"


def _number_fault(got: Any, wanted: float | int, rtol: float) -> tuple[Any, str | None]:
    """`got` as a plain number where it is one, and what is wrong with it."""
    if isinstance(got, Tensor) or hasattr(got, "item"):
        if getattr(got, "ndim", 0) != 0 and getattr(got, "size", 0) != 1:
            return got, f"it returned shape {tuple(got.shape)}, one number was wanted"
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, int | float):
        return got, f"it returned {_a(got)}, one number was wanted"
    if math.isnan(got):
        return got, "it returned NaN"
    same = got == wanted if isinstance(wanted, int) else math.isclose(got, wanted, rel_tol=rtol, abs_tol=1e-9)
    return got, None if same else "the number is off"


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _dtype(x: Tensor) -> str:
    return "True/False" if x.dtype == torch.bool else str(x.dtype).removeprefix("torch.")


def _index(bad: Tensor) -> str:
    return "[" + ", ".join(str(int(i)) for i in bad.nonzero()[0]) + "]" if bad.ndim else "the only element"


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() > _SHOWN_ELEMENTS:
            return f"{_dtype(value)} tensor of shape {tuple(value.shape)}"
        value = value.detach().tolist()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _report(fault: str, inputs: dict[str, Any], **results: Any) -> str:
    lines = [fault]
    width = max((len(name) for name in (*inputs, *results)), default=0)
    for name, value in (*inputs.items(), *results.items()):
        lines.append(f"  {name:<{width}}  {_show(value)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Exercise:
    asks: str
    praise: str
    grade: Callable[[Trial], None]


_EXERCISES: dict[str, _Exercise] = {}


def checker(
    concept: str, *, asks: str, praise: str
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register the grader of a concept's exercise.

    `asks` is the instruction that a blank answer gets, `praise` what a right one gets: one line each, the
    same on every run. The grader takes a `Trial`, and returns if the answer is right. Registering one concept
    from two graders is an error.
    """

    def register(grade: Callable[[Trial], None]) -> Callable[[Trial], None]:
        known = _EXERCISES.get(concept)
        if known is not None and known.grade.__qualname__ != grade.__qualname__:
            raise ValueError(f"concept {concept!r} already has an exercise, {known.grade.__qualname__}")
        _EXERCISES[concept] = _Exercise(asks, praise, grade)
        return grade

    return register


def check(concept_id: str, answer: Any = ..., *, seed: int | None = None) -> Verdict:
    """Grade `answer`, the reader's function for the exercise of `concept_id`.

    A blank (`...`, None, a function that returns one of them or raises NotImplementedError) is unattempted
    and gets the instruction. Inputs are drawn anew on every call unless `seed` is given, so an answer that
    remembers results fails. ValueError for an unknown concept or one without an exercise.
    """
    exercise = _find(concept_id)
    unattempted = Verdict(concept_id, "unattempted", exercise.asks)
    if answer is ... or answer is None:
        return unattempted
    if not callable(answer):
        fault = f"a function was wanted, not {_a(answer)}"
        return Verdict(concept_id, "wrong", f"{fault}\n{exercise.asks}")
    if seed is None:
        seed = int.from_bytes(os.urandom(7), "big")
    try:
        exercise.grade(Trial(answer, seed))
    except _Unattempted:
        return unattempted
    except _Wrong as wrong:
        return Verdict(concept_id, "wrong", str(wrong))
    return Verdict(concept_id, "right", exercise.praise)


def _module_of(concept: Concept) -> str:
    return f"{__name__}.{concept.chapter.partition('-')[2].replace('-', '_')}"


def _find(concept_id: str) -> _Exercise:
    concepts = load_concepts()
    if concept_id not in concepts:
        close = difflib.get_close_matches(str(concept_id), concepts, n=3)
        meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"no concept is called {concept_id!r}{meant}")
    concept = concepts[concept_id]
    module = _module_of(concept)
    if concept_id not in _EXERCISES and importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
    if concept_id not in _EXERCISES:
        raise ValueError(
            f"concept {concept_id!r} has no exercise yet: it is {concept.state}, in chapter {concept.number}"
        )
    return _EXERCISES[concept_id]
