"""What is asked of ids and positions, and where tokens stand: the models' own tests try it through every model."""

import pytest
import torch

from llm_atlas.models.inputs import check_ids, check_positions, place
from llm_atlas.nn.cache import KVCache

X = torch.zeros(2, 3, 4)
PADDED = torch.tensor([[-1, 0, 1], [0, 1, 2]])


def filled(rows: int = 2) -> KVCache:
    cache = KVCache(1)
    cache.place(2)
    cache[0].append(*[torch.zeros(rows, 1, 2, 4)] * 2)
    return cache


def test_without_padding_causal_order_is_enough():
    positions, mask = place(X, None, None, None, context=3)
    assert positions.tolist() == [[0, 1, 2]]
    assert mask is None
    positions, mask = place(X, None, None, filled(), context=5)
    assert positions.tolist() == [[2, 3, 4]]
    assert mask is None


def test_positions_make_a_mask_and_a_given_one_stays():
    positions, mask = place(X, PADDED, None, None, context=3)
    assert positions is PADDED
    assert mask[0, 0].tolist() == [[False] * 3, [False, True, False], [False, True, True]]
    cache = filled()
    _, mask = place(X, PADDED + 2, None, cache, context=5)
    assert mask.shape == (2, 1, 3, 5)
    assert cache.length == 5
    given = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert place(X, PADDED, given, None, context=3)[1] is given


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place(X, PADDED[:1], None, None, context=3), r"positions have shape \(1, 3\), .* \(2, 3\)"),
        (lambda: place(X, None, None, filled(), context=4), "5 tokens do not fit the context of 4"),
        (lambda: place(X, None, None, filled(1), context=5), "the cache holds 1 rows, the new ids have 2"),
        (lambda: check_positions(X, None, 4, past=2), "5 tokens do not fit the context of 4"),
        (
            lambda: check_ids(torch.tensor([[0, 5]]), torch.nn.Embedding(5, 2)),
            "token id 5 .* vocabulary of 5",
        ),
        (lambda: check_ids(torch.tensor([[-1]]), torch.nn.Embedding(5, 2), "type"), "token type -1 .* of 5"),
    ],
)
@pytest.mark.untyped
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_refused_leaves_the_cache_as_it_was():
    cache = filled()
    with pytest.raises(ValueError, match="do not fit"):
        place(X, None, None, cache, context=4)
    assert cache.length == 2
