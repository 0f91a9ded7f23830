"""What the experiments on byte-level models share."""

import math

import pytest
import torch

from llm_atlas.recipes.byte_models import batches, held_out_windows, measure, next_byte_loss, unigram_loss
from llm_atlas.text.corpora import byte_ids


class Says(torch.nn.Module):
    """A model that answers with what it was given, whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, ids):
        assert ids.shape == self.logits.shape[:2]
        return self.logits


def test_the_loss_of_a_model_that_knows_nothing_and_of_one_that_knows_all():
    windows = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    assert measure(Says(torch.zeros(2, 8, 256)), windows) == pytest.approx(math.log(256))
    knows = Says(100 * torch.nn.functional.one_hot(windows[:, 1:], 256).float())
    assert float(next_byte_loss(knows, windows)[0]) == pytest.approx(0, abs=1e-6)
    repeats = Says(100 * torch.nn.functional.one_hot(windows[:, :-1], 256).float())
    assert measure(repeats, windows) > 50


def test_batches_have_one_byte_more_to_predict_and_follow_the_seed():
    ids = torch.arange(100)
    first, second, other = (next(batches(ids, seed, batch=3, length=8)) for seed in (0, 0, 1))
    assert first.shape == (3, 9)
    assert torch.equal(first.diff(), torch.ones(3, 8, dtype=torch.long))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_held_out_windows_are_the_same_for_all_runs():
    ids = torch.arange(1000)
    a, b = (held_out_windows(ids, batch=4, length=16) for _ in range(2))
    assert a.shape == (4, 17)
    assert torch.equal(a, b)


def test_unigram_loss_is_the_entropy_of_the_frequencies():
    assert unigram_loss(byte_ids("aabc")) == pytest.approx(1.5 * math.log(2))
    assert unigram_loss(byte_ids("aaaa")) == 0
