"""What holds for the exercises of every chapter: solutions pass, slips are named, memorised answers fail.

Each written chapter has its `SOLUTIONS` and `WRONG` answers in a file of its own beside this one.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llm_atlas.book import check
from llm_atlas.book.concepts import Chapter, chapters, load_concepts

SEEDS = range(8)
WRITTEN = [c for c in chapters() if all(load_concepts()[id_].is_written for id_ in c.concepts)]


def _answers(chapter: Chapter) -> ModuleType:
    name = "test_" + chapter.slug.partition("-")[2].replace("-", "_")
    spec = importlib.util.spec_from_file_location(f"answers_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ANSWERS = {chapter.slug: _answers(chapter) for chapter in WRITTEN}
SOLUTIONS = {concept: answer for module in ANSWERS.values() for concept, answer in module.SOLUTIONS.items()}
WRONG = [slip for module in ANSWERS.values() for slip in module.WRONG]


@pytest.mark.parametrize("chapter", WRITTEN, ids=lambda chapter: chapter.slug)
def test_every_concept_has_an_exercise_and_known_slips(chapter: Chapter) -> None:
    module = ANSWERS[chapter.slug]
    assert list(module.SOLUTIONS) == list(chapter.concepts)
    assert {concept for concept, _, _ in module.WRONG} == set(module.SOLUTIONS)


@pytest.mark.parametrize("concept", SOLUTIONS)
def test_the_solution_passes_with_a_steady_message(concept: str) -> None:
    verdicts = [check(concept, SOLUTIONS[concept], seed=seed) for seed in SEEDS]
    verdicts.append(check(concept, SOLUTIONS[concept]))
    assert all(verdicts), verdicts
    assert len({repr(verdict) for verdict in verdicts}) == 1


@pytest.mark.parametrize(
    ("concept", "answer", "hint"), WRONG, ids=[f"{concept}: {hint}" for concept, _, hint in WRONG]
)
def test_a_slip_is_named(concept: str, answer: Callable[..., Any], hint: str) -> None:
    for seed in SEEDS:
        verdict = check(concept, answer, seed=seed)
        assert verdict.state == "wrong"
        assert hint in verdict.message.split("\n")[0], verdict
    assert check(concept, answer).state == "wrong"


@pytest.mark.parametrize("concept", SOLUTIONS)
def test_a_hard_coded_answer_fails(concept: str) -> None:
    """Results learnt on one seed, keyed by the inputs' shapes and numbers, do not pass on another."""
    solution, learnt = SOLUTIONS[concept], {}

    def key(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(tuple(i.shape) if isinstance(i, torch.Tensor) else str(i) for i in inputs)

    def study(*inputs: Any) -> Any:
        return learnt.setdefault(key(inputs), solution(*inputs))

    def recite(*inputs: Any) -> Any:
        return learnt.get(key(inputs), next(iter(learnt.values())))

    check(concept, study, seed=1)
    assert learnt
    assert check(concept, recite, seed=2).state == "wrong"
    assert check(concept, recite).state == "wrong"


@pytest.mark.parametrize("concept", SOLUTIONS)
@pytest.mark.parametrize("blank", [..., None, lambda *_: None, lambda *_: ...])
def test_a_blank_is_unattempted(concept: str, blank: Any) -> None:
    verdict = check(concept, blank)
    assert verdict.state == "unattempted"
    assert verdict.message.startswith("Write ")
