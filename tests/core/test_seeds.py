import pytest
import torch

from llm_atlas.core.seeds import generator


def test_same_seed_same_draws_whatever_is_drawn_between():
    first = torch.rand(5, generator=generator(3))
    torch.rand(7)
    assert torch.equal(first, torch.rand(5, generator=generator(3)))
    assert not torch.equal(first, torch.rand(5, generator=generator(4)))


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    torch.rand(5, generator=generator(0))
    assert torch.equal(state, torch.get_rng_state())


def test_bad_seeds():
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed {seed} must be at least 0"):
            generator(seed)


@pytest.mark.gpu
def test_on_a_gpu():
    draws = [torch.rand(3, generator=generator(1, "cuda"), device="cuda") for _ in range(2)]
    assert torch.equal(*draws)
