"""The frame of the exercises: states, counterexamples, crashes, unknown names."""

import pytest
import torch

from llm_atlas.book import check
from llm_atlas.book.checks import Trial, Verdict, checker


def solution(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_only_right_is_true_and_one_text_is_shown() -> None:
    verdict = check("self-attention", solution)
    assert verdict
    assert repr(verdict).startswith("✓ self-attention: right\n")
    assert not check("self-attention")
    assert not check("self-attention", lambda q, k, v: v)
    assert not hasattr(Verdict, "_repr_html_")


def test_not_implemented_is_unattempted() -> None:
    def blank(q, k, v):
        raise NotImplementedError

    assert repr(check("self-attention", blank)) == repr(check("self-attention", ...))


def test_a_crash_is_wrong_in_one_line() -> None:
    verdict = check("self-attention", lambda q, k, v: q @ v.T)
    assert verdict.state == "wrong"
    assert verdict.message.split("\n")[0].startswith("it stopped with RuntimeError: ")
    assert "Traceback" not in verdict.message


def test_the_counterexample_is_the_smallest_and_can_be_replayed() -> None:
    verdict = check("self-attention", lambda q, k, v: solution(q, k, v) + 1, seed=3)
    lines = dict(line.split(maxsplit=1) for line in verdict.message.split("\n")[1:])
    q, k, v = (torch.tensor(eval(lines[name])) for name in "qkv")
    assert q.shape == (1, 2)
    torch.testing.assert_close(solution(q, k, v), torch.tensor(eval(lines["wanted"])), rtol=1e-3, atol=1e-3)
    assert lines["got"] != lines["wanted"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda q, k, v: solution(q, k, v).T, "the result has shape"),
        (lambda q, k, v: solution(q, k, v) * float("nan"), "NaN at [0, 0]"),
        (lambda q, k, v: solution(q, k, v).long(), "holds int64, wanted float32"),
        (lambda q, k, v: solution(q, k, v).tolist(), "returned a list"),
        (lambda q, k, v: q.zero_() if len(q) > 9 else solution(q.mul_(1.5), k, v), "changed its input q"),
        (torch.tensor([1.0]), "a function was wanted, not a Tensor"),
        (3, "a function was wanted, not an int"),
    ],
)
def test_a_result_of_the_wrong_kind_is_told(answer: object, said: str) -> None:
    verdict = check("self-attention", answer, seed=0)
    assert verdict.state == "wrong"
    assert said in verdict.message.split("\n")[0]


def test_none_after_a_first_result_is_wrong() -> None:
    verdict = check("self-attention", lambda q, k, v: solution(q, k, v) if len(q) == 1 else None)
    assert verdict.state == "wrong"
    assert "returned None here" in verdict.message


def test_numbers_of_any_library_count() -> None:
    def count(dim, hidden, gated, bias):
        return (3 if gated else 2) * dim * hidden + bias * ((2 if gated else 1) * hidden + dim)

    assert check("feed-forward", count)
    assert check("feed-forward", lambda *a: float(count(*a)))
    assert check("feed-forward", lambda *a: torch.tensor(count(*a)))
    assert "one number was wanted" in check("feed-forward", lambda *a: "12").message
    assert "one number was wanted" in check("feed-forward", lambda *a: torch.ones(2)).message


def test_large_tensors_are_told_by_their_first_difference() -> None:
    trial = Trial(lambda x: x, 0)
    x = torch.zeros(5, 8)
    wrong = x.clone()
    wrong[3, 2] = 1
    with pytest.raises(Exception, match=r"first at \[3, 2\]: got 1, wanted 0") as caught:
        trial.compare(wrong, x, {"x": x})
    assert "float32 tensor of shape (5, 8)" in str(caught.value)


def test_inputs_are_new_on_each_call_and_the_global_state_is_left_alone() -> None:
    seen: list[torch.Tensor] = []

    def watch(q, k, v):
        seen.append(q)
        return solution(q, k, v)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    check("self-attention", watch)
    half = len(seen)
    check("self-attention", watch)
    assert torch.equal(before, torch.get_rng_state())
    assert any(not torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    seen.clear()
    check("self-attention", watch, seed=7)
    check("self-attention", watch, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_unknown_concepts_are_refused_with_what_was_meant() -> None:
    with pytest.raises(
        ValueError, match=r"no concept is called 'self-atention'; did you mean 'self-attention'"
    ):
        check("self-atention")
    with pytest.raises(ValueError, match=r"no concept is called 'x'$"):
        check("x")


def test_a_concept_without_exercise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'agentic-rl' has no exercise yet: it is planned, in chapter 22"):
        check("agentic-rl")


def test_one_concept_has_one_exercise() -> None:
    check("self-attention")
    with pytest.raises(ValueError, match="already has an exercise"):

        @checker("self-attention", asks="?", praise="!")
        def another(trial: Trial) -> None: ...


def test_an_answer_has_to_refuse_what_it_was_told_to() -> None:
    def refuses(x):
        raise ValueError("no")

    def crashes(x):
        raise KeyError("x")

    assert Trial(refuses, 0).refuses(ValueError, "x is 3", x=3) is None
    with pytest.raises(Exception, match=r"x is 3: ValueError was wanted, it stopped with KeyError\n  x  3"):
        Trial(crashes, 0).refuses(ValueError, "x is 3", x=3)
    with pytest.raises(Exception, match=r"x is 3: ValueError was wanted\n  x    3\n  got  4"):
        Trial(lambda x: x + 1, 0).refuses(ValueError, "x is 3", x=3)


def test_a_list_that_is_written_to_is_told() -> None:
    history = [1, 2]
    with pytest.raises(Exception, match=r"it changed its input history in place\n  history  \[1, 2\]"):
        Trial(lambda history: history.append(3) or 1, 0).ask(history=history)
    assert history == [1, 2]
