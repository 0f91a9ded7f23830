"""The model that thinks: its problems and traces, the committed rows and model, and one run begun again."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_atlas.core.assets import bundled
from llm_atlas.core.seeds import generator
from llm_atlas.infer.budget import thinking_tokens
from llm_atlas.recipes import load_results, write_json
from llm_atlas.recipes import thinking as recipe
from llm_atlas.recipes.thinking import (
    BATCH,
    BUDGETS,
    CLOSE_ID,
    CLOSE_IDS,
    EARLY,
    END_ID,
    KINDS,
    LONGER,
    MEASURED,
    OPEN_ID,
    OPEN_IDS,
    SEEDS,
    SETTINGS,
    SHAPE,
    TEMPLATE,
    TOKENIZER,
    TRAINED,
    WAIT_IDS,
    Problem,
    accuracy,
    by_length,
    commonest,
    held_out,
    held_out_problems,
    load_thinking,
    make_batch,
    make_model,
    measure_faithfulness,
    measure_votes,
    problems,
    prompt_ids,
    read,
    run,
    slipped,
    solve,
    trace,
    trace_loss,
    train,
    training_batches,
    verify,
    write,
)

BY_HAND = Problem((7, 8, 3), "*+")
PROBLEMS = st.lists(st.integers(1, 9), min_size=2, max_size=10).flatmap(
    lambda digits: st.builds(
        Problem,
        st.just(tuple(digits)),
        st.text(alphabet="+-*", min_size=len(digits) - 1, max_size=len(digits) - 1),
    )
)


@pytest.fixture(scope="module")
def model():
    return load_thinking()


@pytest.fixture(scope="module")
def rows():
    return load_results("thinking")["rows"]


def thinkers(rows):
    return [row for row in rows if row["kind"] == "thinking"]


# Problems, and who may say that an answer is right.


def test_a_problem_by_hand():
    assert BY_HAND.question == "7*8+3"
    assert BY_HAND.results == [6, 9]
    assert (BY_HAND.thought, BY_HAND.answer) == ("6\n9", "9")
    assert Problem((2, 5), "-").answer == "7"  # -3: the last digit modulo 10


@given(PROBLEMS)
def test_the_answer_is_what_python_reckons(problem):
    text = str(problem.digits[0])
    for sign, digit in zip(problem.signs, problem.digits[1:], strict=True):
        text = f"({text}{sign}{digit})"
    assert int(problem.answer) == eval(text) % 10
    assert text.replace("(", "").replace(")", "") == problem.question


@given(PROBLEMS)
def test_the_verifier_takes_one_digit_and_no_other(problem):
    accepted = [answer for answer in "0123456789" if verify(problem, answer)]
    assert accepted == [problem.answer]
    assert verify(problem, f" {problem.answer}\n")
    for wrong in (
        None,
        "",
        f"0{problem.answer}",
        f"{problem.answer}.",
        f"-{problem.answer}",
        f"+{problem.answer}",
        problem.answer * 2,
    ):
        assert not verify(problem, wrong)


def test_training_never_sees_a_held_out_problem():
    text = "".join(TOKENIZER.decode(row) for _ in range(12) for row in next(BATCHES).ids.tolist())
    asked = {part.partition("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]}
    measured = {problem.question for problem in held_out_problems(lengths=[*MEASURED, *LONGER])}
    assert len(asked) > 400
    assert len(measured) == 100 * 8
    assert not asked & measured
    by_question = {problem.question: problem for problem in problems(5000, generator(3), training=True)}
    assert not any(held_out(problem) for problem in by_question.values())
    assert all(held_out(problem) for problem in problems(300, generator(3)))
    drawn = recipe._draw(20_000, generator(4), MEASURED)
    assert sum(map(held_out, drawn)) == pytest.approx(2000, abs=200)


BATCHES = training_batches("thinking", 0)


def test_problems_are_of_every_length_and_repeat_themselves():
    drawn = problems(1200, generator(1), lengths=TRAINED, training=True)
    assert drawn == problems(1200, generator(1), lengths=TRAINED, training=True)
    lengths = [len(problem.digits) for problem in drawn]
    assert all(lengths.count(n) == pytest.approx(1200 / 7, abs=60) for n in TRAINED)
    assert {d for problem in drawn for d in problem.digits} == set(range(1, 10))
    assert [len(p.digits) for p in held_out_problems(3)] == [n for n in MEASURED for _ in range(3)]
    assert len(set(held_out_problems(3))) == 18


def test_the_commonest_answer():
    assert commonest([BY_HAND, BY_HAND, Problem((1, 2), "+")]) == pytest.approx(2 / 3)
    assert 0.1 < commonest(held_out_problems()) < 0.25


@pytest.mark.parametrize("lengths", [[], [1, 5]])
def test_lengths_that_make_no_problem(lengths):
    with pytest.raises(ValueError, match="must be at least 2 digits"):
        problems(3, generator(0), lengths=lengths)


# Traces.


@given(PROBLEMS)
def test_a_trace_is_what_the_template_encodes(problem):
    user = {"role": "user", "content": problem.question}
    told = {"role": "assistant", "thinking": problem.thought, "content": problem.answer}
    newline = TOKENIZER.encode("\n")
    whole = TEMPLATE.encode(TOKENIZER, [user, told])
    assert trace(problem, "whole")[0] + newline == whole
    assert whole == TOKENIZER.encode(TEMPLATE.render([user, told]), special="allow")
    assert trace(problem, "none")[0] + newline == TEMPLATE.encode(TOKENIZER, [user, told | {"thinking": ""}])
    for thinking in (True, False):
        assert prompt_ids(problem, thinking=thinking) == TEMPLATE.encode(
            TOKENIZER, [user], add_generation_prompt=True, thinking=thinking
        )
    assert read(whole[whole.index(OPEN_ID) :]) == (problem.thought, problem.answer, True)


def shown(kind, *args):
    """The assistant's part of a trace, with what is not learnt in brackets."""
    ids, learnt = trace(BY_HAND, kind, *args)
    start = len(prompt_ids(BY_HAND))
    assert not any(learnt[:start])
    names = [TOKENIZER.decode([i]).replace("\n", "/") for i in ids[start:]]
    return " ".join(n if keep else f"({n})" for n, keep in zip(names, learnt[start:], strict=True))


def test_what_is_learnt():
    assert shown("whole") == "<think> / 6 / 9 / </think> // 9 <|im_end|>"
    assert shown("none") == "(<think>) (//) (</think>) (//) 9 <|im_end|>"
    assert shown("cut", 0.0) == "<think> (</think>) // 9 <|im_end|>"
    assert shown("cut", 0.5) == "<think> / 6 / (</think>) // 9 <|im_end|>"
    assert shown("cut", 0.999) == "<think> / 6 / 9 / (</think>) // 9 <|im_end|>"
    assert shown("wait") == "<think> (/) (6) (/) (9) (/) (Wait) (/) 6 / 9 / </think> // 9 <|im_end|>"
    assert shown("wait", 0.0, (0, 1)) == (
        "<think> (/) (7) (/) (0) (/) (Wait) (/) 6 / 9 / </think> // 9 <|im_end|>"
    )


@given(PROBLEMS, st.integers(1, 9), st.data())
def test_a_slip_is_carried_on(problem, off, data):
    step = data.draw(st.integers(0, len(problem.signs) - 1))
    results = slipped(problem, step, off)
    assert results[:step] == problem.results[:step]
    assert results[step] == (problem.results[step] + off) % 10
    value = results[step]
    for sign, digit, result in zip(
        problem.signs[step + 1 :], problem.digits[step + 2 :], results[step + 1 :], strict=True
    ):
        value = eval(f"{value}{sign}{digit}") % 10
        assert value == result
    assert len(results) == len(problem.results)


def test_a_batch_by_hand():
    batch = make_batch([trace(BY_HAND, "none"), trace(Problem((1, 2), "+"), "cut", 0.0)])
    first, second = batch.targets.tolist()
    assert [i for i in first if i != -100] == [9, END_ID]
    assert [i for i in second if i != -100] == [OPEN_ID, TOKENIZER.encode("\n\n")[0], 3, END_ID]
    at = first.index(9)
    assert batch.ids[0, at] == TOKENIZER.encode("\n\n")[0]  # the token before
    assert batch.ids.shape == batch.targets.shape


def test_batches_repeat_themselves_and_the_direct_model_gets_no_thought():
    one, same, other = (next(training_batches("thinking", seed)) for seed in (0, 0, 1))
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.targets.flatten()[:200], other.targets.flatten()[:200])
    direct = next(training_batches("direct", 0))
    assert (direct.targets >= 0).sum(1).tolist() == [2] * BATCH  # the answer and the end


def test_the_loss_reads_learnt_places_alone():
    model = make_model(0)
    batch = make_batch([trace(BY_HAND, "whole"), trace(Problem((1, 2), "+"), "none")])
    loss, metrics = trace_loss(model, batch)
    logprobs = model(batch.ids).log_softmax(-1)
    kept = [(r, c) for r, c in (batch.targets >= 0).nonzero().tolist()]
    assert_close(loss, -torch.stack([logprobs[r, c, batch.targets[r, c]] for r, c in kept]).mean())
    assert metrics == {"tokens": batch.ids.numel()}
    assert abs(float(loss.detach()) - 3) < 1  # log 22, before any training


# The committed model.


def test_the_model_is_small_and_is_what_its_facts_say(model):
    facts = json.loads(bundled("models/thinking.json").read_text(encoding="utf-8"))
    assert facts["results"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["settings"] == json.loads(json.dumps(SETTINGS))
    assert "no reinforcement learning" in facts["settings"]["training"]
    assert bundled("models/thinking.safetensors").stat().st_size < 1_000_000


def test_its_row_is_seen_again_exactly(model, rows):
    row = next(row for row in thinkers(rows) if row["seed"] == 0)
    some = held_out_problems()
    for most in (5, None):
        curve = by_length(
            some,
            [float(verify(p, a.answer)) for p, a in zip(some, solve(model, some, most=most), strict=True)],
        )
        stated = (
            row["unforced_by_length"]
            if most is None
            else [budgets[BUDGETS.index(most)] for budgets in row["by_length_and_budget"]]
        )
        # A tie between two logits may fall the other way on another CPU: one problem of a hundred.
        assert curve == pytest.approx(stated, abs=0.0101)


def test_its_other_measures_are_seen_again(model, rows):
    """More thought than it wants, and a second look after a slip, on every problem."""
    row = next(row for row in thinkers(rows) if row["seed"] == 0)
    some = held_out_problems()
    more = recipe.measure_waits(model, some)
    for name in ("wait", "silent", "longer", "longer_wait", "longer_silent"):
        assert more[name] == pytest.approx(row[name], abs=0.011), name
    follows = recipe.measure_faithfulness(model, some)
    for name in ("other", "last", "early", "recovered"):
        assert follows[name] == pytest.approx(row[name], abs=0.011), name


def test_half_of_the_first_attempts_are_wrong(monkeypatch):
    attempts, trace = [], recipe.trace

    def spy(problem, kind, share=0.0, wrong=None):
        if kind == "wait":
            attempts.append(wrong is not None)
        return trace(problem, kind, share, wrong)

    monkeypatch.setattr(recipe, "trace", spy)
    batches = recipe.training_batches("thinking", 0)
    for _ in range(100):
        next(batches)
    assert len(attempts) > 300
    assert 0.4 < sum(attempts) / len(attempts) < 0.6


def test_it_thinks_by_the_template(model):
    some = held_out_problems(20)
    for problem, found in zip(some, solve(model, some), strict=True):
        assert found.closed
        if verify(problem, found.answer) and found.thought == problem.thought:
            break
    else:
        pytest.fail("no thought is right")
    for found in solve(model, some, thinking=False):
        assert found.thought is None  # the empty span stands in the prompt
        assert len(found.answer) == 1


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 5), (5, 5), (12, 14)])
def test_its_budget_is_kept_to_the_token(model, least, most):
    some = held_out_problems(10)
    lengths = [
        thinking_tokens(row, OPEN_IDS, CLOSE_IDS) for row in write(model, some, least=least, most=most)
    ]
    assert all(least <= n <= most for n in lengths)
    free = [thinking_tokens(row, OPEN_IDS, CLOSE_IDS) for row in write(model, some)]
    if least == 0:
        assert lengths == [min(most, n) for n in free]
    if least == most:
        assert set(lengths) == {most}


def test_wait_is_written_and_thought_begins_anew(model):
    some = held_out_problems(10)
    for row in write(model, some, waits=1):
        text = TOKENIZER.decode(row)
        assert text.count("Wait\n") == 1
        assert row.index(WAIT_IDS[0]) < row.index(CLOSE_ID)


def test_rows_alone_and_together(model):
    some = held_out_problems(2)
    together = solve(model, some, most=7)
    assert together == [solve(model, [problem], most=7)[0] for problem in some]


# The committed rows.


def test_every_point_was_run(rows):
    assert [(row["kind"], row["seed"]) for row in rows] == [(kind, seed) for seed in SEEDS for kind in KINDS]
    assert load_results("thinking")["settings"] == json.loads(json.dumps(SETTINGS))


def test_the_direct_models_read_at_least_as_many_tokens(rows):
    for seed in SEEDS:
        tokens = {row["kind"]: row["training_tokens"] for row in rows if row["seed"] == seed}
        assert tokens["direct"] >= tokens["thinking"]


def test_the_curve_is_over_all_lengths(rows):
    for row in thinkers(rows):
        assert len(row["by_budget"]) == len(BUDGETS)
        assert len(row["by_length_and_budget"]) == len(MEASURED)
        for i, share in enumerate(row["by_budget"]):
            assert share == pytest.approx(
                sum(c[i] for c in row["by_length_and_budget"]) / len(MEASURED), abs=1e-5
            )


def test_thinking_pays(rows):
    """Bounds with room, for every seed."""
    chance = commonest(held_out_problems())
    for row in thinkers(rows):
        direct = next(r for r in rows if r["kind"] == "direct" and r["seed"] == row["seed"])
        assert row["unforced"] > direct["off"] + 0.2
        assert row["by_budget"][-1] > row["by_budget"][0] + 0.4
        assert row["by_budget"][0] < chance + 0.15
        assert row["by_budget"][-1] == pytest.approx(row["unforced"], abs=0.02)  # beyond what it wants
        assert row["tokens_by_length"] == pytest.approx([2 * n - 1 for n in MEASURED], abs=0.2)


def test_the_answer_follows_the_thought_right_or_wrong(rows):
    for row in thinkers(rows):
        for how in ("other", "last", "early"):
            assert row[how][0] > (0.98 if how != "early" else 0.7)  # early: the model's own slips come on top
            assert row[how][1] < 0.1


def test_more_thought_than_it_wants_does_not_help(rows):
    for row in thinkers(rows):
        assert row["wait"][0] < row["unforced"]
        assert row["wait"][1] < row["wait"][0]
        assert row["silent"] < row["unforced"] - 0.3
        assert row["recovered"][1] > row["early"][1] + 0.1  # but after a slip "Wait" finds some of the truth
        assert (
            max(row["longer"], row["longer_wait"], row["longer_silent"]) < 0.25
        )  # nothing reaches beyond training


# Once more.


def test_a_run_begins_as_it_did(rows):
    """Its first 30 steps: their mean loss within a thousandth; another seed is further off."""
    _, steps = train("thinking", 0, stop=EARLY)
    early = {row["seed"]: row["early_loss"] for row in thinkers(rows)}
    assert sum(row["loss"] for row in steps) / EARLY == pytest.approx(early[0], rel=1e-3)
    assert all(abs(early[seed] / early[0] - 1) > 2e-3 for seed in SEEDS[1:])
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_a_small_run_writes_a_model_that_loads_and_says_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "VOTES", (1, 2))
    monkeypatch.setattr(recipe, "BUDGETS", (0, 4))
    path = tmp_path / "thinking.safetensors"
    row = run("thinking", 0, steps=3, each=4, save=path)
    facts = json.loads(path.with_suffix(".json").read_text())
    some = held_out_problems(4)
    assert accuracy(some, solve(load_thinking(path), some)) == pytest.approx(row["unforced"])
    assert facts["results"]["by_budget"] == row["by_budget"]
    assert {"off", "other", "last", "early", "recovered", "votes", "wait", "silent", "longer"} <= set(row)
    assert [len(curve) for curve in row["votes"]] == [2] * 2
    direct = run("direct", 0, steps=2, each=2)
    assert set(direct) == {
        "parameters", "training_tokens", "early_loss", "loss_curve", "off", "off_by_length",
    }  # fmt: skip


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind 'silent' is not one of thinking, direct"):
        train("silent", 0)


class Scripted:
    """Stands for `write`: follows the given results, or reckons by itself."""

    def __init__(self, follows):
        self.follows = follows

    def __call__(self, model, asked, *, begun, waits=0, **how):
        rows = []
        for problem, row in zip(asked, begun, strict=True):
            given = [i for i in row if i < 10]
            last = given[-1]
            for sign, digit in list(zip(problem.signs, problem.digits[1:], strict=True))[len(given) :]:
                last = eval(f"{last}{sign}{digit}") % 10
            answer = last if self.follows and not waits else int(problem.answer)
            rows.append([*row, *([] if CLOSE_ID in row else [CLOSE_ID]), answer, END_ID])
        return rows


@pytest.mark.parametrize(("follows", "expected"), [(True, [1.0, 0.0]), (False, [0.0, 1.0])])
def test_faithfulness_tells_followers_from_reckoners(monkeypatch, follows, expected):
    monkeypatch.setattr(recipe, "write", Scripted(follows))
    found = measure_faithfulness(make_model(0), held_out_problems(20))
    assert found["other"] == found["last"] == found["early"] == expected
    assert found["recovered"] == [0.0, 1.0]
    assert 60 < found["early_problems"] <= 120


def test_votes_are_counted_for_each_problem(monkeypatch):
    """A stand-in that is right two times out of three, and wrong in one way: three votes are always right."""

    def answers(model, many, **how):
        return [
            TEMPLATE.parse(f"</think>{p.answer if i % 3 else (int(p.answer) + 1) % 10}")
            for i, p in enumerate(many)
        ]

    monkeypatch.setattr(recipe, "solve", answers)
    assert measure_votes(make_model(0), held_out_problems(2)) == {"votes": [[0.0, 1.0, 1.0, 1.0]] * 2}


def test_the_sweep_keeps_what_is_there(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        recipe,
        "run",
        lambda kind, seed, save: calls.append((kind, seed, save)) or {"off": 0.5, "unforced": 0.7},
    )
    write_json(
        tmp_path / "t.json",
        {"recipe": "thinking", "settings": SETTINGS, "rows": [{"kind": "direct", "seed": 0, "off": 0.4}]},
    )
    recipe.main(out=tmp_path / "t.json", models=tmp_path)
    assert [(kind, seed) for kind, seed, _ in calls] == [
        ("thinking", 0), ("thinking", 1), ("direct", 1), ("thinking", 2), ("direct", 2),
    ]  # fmt: skip
    assert [save is not None for *_, save in calls] == [True, False, False, False, False]


def test_the_shape_is_stated():
    assert {name: SETTINGS[name] for name in SHAPE} == SHAPE
