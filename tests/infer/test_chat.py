"""Chat with a model that thinks: the template is the one of text.thinking, and answers can be voted on."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_atlas.infer import chat
from llm_atlas.infer.chat import ThinkingAnswer, ThinkingTemplate, majority_vote
from llm_atlas.text import thinking

USER = {"role": "user", "content": "7*8+3"}


def test_the_template_is_that_of_the_text_layer():
    assert ThinkingTemplate is thinking.ThinkingTemplate
    assert ThinkingAnswer is thinking.ThinkingAnswer
    assert set(chat.__all__) == {"ThinkingAnswer", "ThinkingTemplate", "majority_vote"}


@given(st.text(alphabet="69\n <>k/"), st.text(alphabet="69\n <>k/"))
def test_what_a_model_writes_behind_the_prompt_is_read_back_and_goes_into_the_next_turn(thought, answer):
    template = ThinkingTemplate()
    prompt = template.render([USER], add_generation_prompt=True)
    told = [USER, {"role": "assistant", "thinking": thought, "content": answer}]
    found = template.parse(template.render(told).removeprefix(prompt))
    assert found == ThinkingAnswer(thought=thought, answer=answer, closed=True)
    again = template.render([*told, USER], add_generation_prompt=True)
    assert again.startswith(prompt + answer + "<|im_end|>")
    assert again.endswith("<|im_start|>assistant\n")


def test_the_template_cannot_be_changed_under_way():
    with pytest.raises(AttributeError):
        ThinkingTemplate().open = "<t>"


@given(st.lists(st.sampled_from(["6", "9", "4", None]), min_size=1))
def test_the_majority(answers):
    voted = majority_vote(answers)
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        assert voted is None
        return
    best = [a for a in answers if a is not None and counts[a] == max(counts.values())]
    assert voted == best[0]


def test_ties_go_to_the_first_and_silence_has_no_vote():
    assert majority_vote(["4", "9", "9", "4"]) == "4"
    assert majority_vote([None, None, "9"]) == "9"
    assert majority_vote([None]) is None


@pytest.mark.untyped
@pytest.mark.parametrize("answers", [[], "999"])
def test_no_answers(answers):
    with pytest.raises(ValueError, match="must be a list of at least one answer"):
        majority_vote(answers)
