"""From logits to a token."""

import math

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.infer.sampling import greedy, sample, temperature

LOGITS = torch.tensor([[0.0, 1.0, 2.0, -math.inf], [3.0, 0.0, -1.0, 0.5]])


def test_temperature_divides():
    assert_close(temperature(0.5)(LOGITS, []), 2 * LOGITS)


@pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
def test_temperature_must_be_positive_and_finite(t):
    with pytest.raises(
        ValueError, match=f"^temperature {t} must be at least 1e-6 and finite; 0 is greedy decoding$"
    ):
        temperature(t)


def test_greedy_takes_the_largest():
    assert greedy(LOGITS).tolist() == [2, 0]


def test_sample_follows_the_softmax_and_never_takes_what_is_excluded():
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS[:1].expand(draws, -1), generator)
    counts = torch.bincount(drawn, minlength=4).double()
    assert counts[3] == 0
    expected = draws * LOGITS[0, :3].double().softmax(-1)
    statistic = ((counts[:3] - expected) ** 2 / expected).sum()
    assert statistic < 13.8  # the 99.9 % point of chi-square with 2 degrees of freedom


def test_sample_draws_every_row_from_its_own_logits():
    logits = torch.full((5, 7), -math.inf)
    logits[range(5), [6, 0, 3, 3, 1]] = 0.0
    assert sample(logits, torch.Generator().manual_seed(0)).tolist() == [6, 0, 3, 3, 1]


def test_sample_in_bfloat16_does_not_round_the_probabilities_to_eight_bits():
    logits = torch.randn(4000, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    narrow, wide = (sample(x, torch.Generator().manual_seed(0)) for x in (logits, logits.float()))
    assert torch.equal(narrow, wide)
