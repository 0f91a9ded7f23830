"""The generate loop on tiny models: against transformers, and the promises of its docstring."""

import pytest
import torch

from llm_atlas.infer.generate import generate, stream
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import LLAMA, build, from_llama_config, rename

CONFIG = DecoderConfig(vocab=31, dim=16, layers=2, heads=4, kv_heads=2, hidden=24, context=48)
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 3 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return randomised(Decoder(CONFIG))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_is_that_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = randomised(LlamaForCausalLM(config))
    ours = build(from_llama_config(config.to_dict()), rename(theirs.state_dict(), LLAMA, 2), Decoder).eval()
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
    written = theirs.generate(
        ids,
        attention_mask=(ids > 0).long(),
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
    )[:, longest:].tolist()
    assert len({*map(tuple, written)}) == 3
    assert len(set(written[0])) > 3  # not one token over and over
    assert generate(ours, PROMPTS, max_new_tokens=30) == written


def test_greedy_is_the_argmax_of_the_whole_sequence_read_again(model):
    row = PROMPTS[0]
    for token in generate(model, [row], max_new_tokens=10)[0]:
        assert token == model(torch.tensor([row]))[0, -1].argmax()
        row = [*row, token]


def test_rows_of_a_batch_are_the_rows_alone(model):
    alone = [generate(model, [row], max_new_tokens=12)[0] for row in PROMPTS]
    assert len({*map(tuple, alone)}) == 3
    assert generate(model, PROMPTS, max_new_tokens=12) == alone
    assert generate(model, PROMPTS[::-1], max_new_tokens=12) == alone[::-1]


def test_a_row_ends_with_its_stop_id_and_the_others_go_on(model):
    whole = generate(model, PROMPTS, max_new_tokens=12)
    stop = whole[0][4]
    ends = [row.index(stop) + 1 if stop in row else 12 for row in whole]
    assert len(set(ends)) > 1
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids=[stop]) == [
        row[:end] for row, end in zip(whole, ends, strict=True)
    ]
    steps = list(stream(model, PROMPTS, max_new_tokens=12, stop_ids=[stop]))
    assert [sum(step[i] is not None for step in steps) for i in range(3)] == ends
    assert len(steps) == max(ends)


def test_stop_ids_stop_all_work_when_every_row_has_stopped(model):
    first = generate(model, [PROMPTS[0]], max_new_tokens=1)[0][0]
    calls = []
    with model.norm.register_forward_hook(lambda *_: calls.append(1)):
        assert generate(model, [PROMPTS[0]], max_new_tokens=12, stop_ids=[first]) == [[first]]
    assert len(calls) == 1


def test_tokens_come_as_they_are_computed(model):
    calls = []
    with model.norm.register_forward_hook(lambda *_: calls.append(1)):
        steps = stream(model, PROMPTS, max_new_tokens=5)
        assert len(calls) == 0
        for expected in (1, 2, 3):
            assert len(next(steps)) == 3
            assert len(calls) == expected


def test_the_callers_grad_mode_is_his_own_between_steps(model):
    for _ in stream(model, PROMPTS, max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_prompt_behind_a_cache_is_the_whole_prompt(model, cut):
    whole = generate(model, [PROMPTS[0]], max_new_tokens=12)
    cache = model.make_cache()
    with torch.inference_mode():
        model.hidden(torch.tensor([PROMPTS[0][:cut]]), cache=cache)
    kept = cache.fork()
    assert generate(model, [PROMPTS[0][cut:]], max_new_tokens=12, cache=cache) == whole
    assert cache.length == 5 + 12 - 1
    kept.select([0, 0])
    assert generate(model, [PROMPTS[0][cut:]] * 2, max_new_tokens=12, cache=kept) == whole * 2


def test_the_context_may_be_filled_to_the_last_slot(model):
    assert len(generate(model, [[5] * 40], max_new_tokens=9)[0]) == 9


def test_same_seed_same_tokens_other_seed_others(model):
    def write(seed):
        return generate(model, PROMPTS, max_new_tokens=12, temperature=1.5, generator=seeded(seed))

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_the_global_seed_does_not_matter_and_is_not_touched(model):
    state = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_cold_sampling_is_greedy(model):
    cold = generate(model, PROMPTS, max_new_tokens=12, temperature=1e-4, generator=seeded(0))
    assert cold == generate(model, PROMPTS, max_new_tokens=12)


def test_sampled_first_tokens_follow_the_tempered_distribution(model):
    draws, t = 4000, 2.0
    rows = generate(model, [PROMPTS[0]] * draws, max_new_tokens=1, temperature=t, generator=seeded(3))
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=31).double()
    expected = draws * (model(torch.tensor([PROMPTS[0]]))[0, -1].double() / t).softmax(-1)
    assert chi_square(counts, expected) > 1e-3
    untempered = draws * model(torch.tensor([PROMPTS[0]]))[0, -1].double().softmax(-1)
    assert chi_square(counts, untempered) < 1e-9  # the test can tell


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value; bins under 5 expected are put together."""
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    # The chi-square distribution with n degrees of freedom is the gamma distribution of shape n/2 and scale 2.
    freedom = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def test_transforms_see_every_row_so_far_and_act_in_order(model):
    seen = []

    def record(logits, history):
        seen.append([list(row) for row in history])
        return logits

    def only(token):
        def transform(logits, history):
            return torch.full_like(logits, float("-inf")).index_fill(1, torch.tensor([token]), 0.0)

        return transform

    rows = generate(model, PROMPTS, max_new_tokens=3, transforms=[record, only(4), only(7)])
    assert rows == [[7, 7, 7]] * 3
    assert seen == [[row + [7] * n for row in PROMPTS] for n in range(3)]


def test_prompts_are_not_changed(model):
    prompts = [list(row) for row in PROMPTS]
    generate(model, prompts, max_new_tokens=3)
    assert prompts == PROMPTS


@pytest.mark.parametrize(
    ("prompts", "how", "message"),
    [
        ([], {}, "no prompts at all"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature -0.5 must be finite and not negative"),
        ([[1]], {"temperature": float("nan")}, "temperature nan must be finite"),
        ([[1]], {"temperature": float("inf")}, "temperature inf must be finite"),
        (
            [[1] * 40],
            {"max_new_tokens": 10},
            "a past of 0, a prompt of 40 and 10 new tokens do not fit the context of 48",
        ),
        ([[1] * 49], {}, "do not fit the context of 48"),
    ],
)
def test_a_mistake_is_told_before_any_work(model, prompts, how, message):
    calls = []
    with (
        model.embed.register_forward_hook(lambda *_: calls.append(1)),
        pytest.raises(ValueError, match=message),
    ):
        stream(model, prompts, **({"max_new_tokens": 1} | how))
    assert not calls


def test_ragged_prompts_behind_a_cache_are_refused_and_the_past_counts(model):
    cache = model.make_cache()
    with torch.inference_mode():
        model.hidden(torch.tensor([[1] * 30] * 2), cache=cache)
    with pytest.raises(ValueError, match="prompts behind a cache must be of equal length"):
        stream(model, [[1], [1, 2]], max_new_tokens=1, cache=cache)
    with pytest.raises(ValueError, match="a past of 30, a prompt of 10 and 10 new tokens do not fit"):
        stream(model, [[1] * 10] * 2, max_new_tokens=10, cache=cache)
    assert cache.length == 30
