"""Masks against their definitions, pair by pair."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llm_atlas.nn.masks import (
    PAD,
    causal_mask,
    check_rising,
    left_pad,
    padding_mask,
    sliding_window_mask,
    visible,
)


@given(st.integers(1, 9), st.integers(0, 9))
def test_causal_mask_lets_a_query_see_itself_and_what_came_before(queries, past):
    mask = causal_mask(queries, queries + past)
    for i in range(queries):
        for j in range(queries + past):
            assert bool(mask[i, j]) == (j <= i + past)


def test_causal_mask_of_a_square_is_torch_tril():
    assert torch.equal(causal_mask(6), torch.ones(6, 6, dtype=torch.bool).tril())


@st.composite
def positions(draw, batch: int, length: int):
    row = st.lists(st.integers(PAD, 12), min_size=length, max_size=length)
    return torch.tensor([draw(row) for _ in range(batch)])


@given(st.data(), st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1)]), st.none() | st.integers(1, 6))
def test_visible_is_its_definition(data, batches, window):
    q = data.draw(positions(batches[0], data.draw(st.integers(1, 4))))
    k = data.draw(positions(batches[1], data.draw(st.integers(1, 4))))
    mask = visible(q, k, window=window)
    rows = max(batches)
    assert mask.shape == (rows, 1, q.shape[1], k.shape[1])
    for b in range(rows):
        for i, p in enumerate(q[b % len(q)].tolist()):
            for j, r in enumerate(k[b % len(k)].tolist()):
                allowed = r >= 0 and r <= p and (window is None or p - r < window)
                assert bool(mask[b, 0, i, j]) == allowed


@given(st.integers(1, 12), st.integers(1, 12))
def test_visible_of_plain_positions_is_the_causal_mask(queries, keys):
    assume(queries <= keys)
    at = torch.arange(keys)[None]
    assert torch.equal(visible(at[:, keys - queries :], at)[0, 0], causal_mask(queries, keys))


def test_padding_mask_is_true_at_tokens():
    mask = padding_mask(torch.tensor([[PAD, 0, 1], [0, 1, PAD]]))
    assert mask.tolist() == [[[[False, True, True]]], [[[True, True, False]]]]


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), min_size=1, max_size=5), st.integers(0, 99)
)
def test_left_pad_keeps_every_row_and_counts_its_tokens(rows, pad):
    ids, at = left_pad(rows, pad)
    longest = max(map(len, rows))
    for i, row in enumerate(rows):
        padding = longest - len(row)
        assert ids[i].tolist() == [pad] * padding + row
        assert at[i].tolist() == [PAD] * padding + list(range(len(row)))


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_counts_the_query_itself(window):
    at = torch.arange(8)[None]
    assert visible(at, at, window=window)[0, 0, 7].sum() == window


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 20), st.booleans())
def test_sliding_window_mask_is_its_definition(queries, past, window, causal):
    keys = queries + past
    mask = sliding_window_mask(queries, keys, window=window, causal=causal)
    for i in range(queries):
        for j in range(keys):
            distance = i + past - j
            allowed = 0 <= distance < window if causal else abs(distance) < window
            assert bool(mask[i, j]) == allowed


def test_sliding_window_mask_at_both_ends():
    assert torch.equal(sliding_window_mask(6, window=1), torch.eye(6, dtype=torch.bool))
    assert torch.equal(sliding_window_mask(4, 6, window=6), causal_mask(4, 6))
    assert sliding_window_mask(4, 6, window=3)[-1].tolist() == [False, False, False, True, True, True]


@given(st.integers(1, 12), st.integers(1, 14), st.integers(1, 15))
def test_visible_of_plain_positions_within_a_window_is_the_sliding_window_mask(queries, keys, window):
    assume(queries <= keys)
    at = torch.arange(keys)[None]
    seen = visible(at[:, keys - queries :], at, window=window)[0, 0]
    assert torch.equal(seen, sliding_window_mask(queries, keys, window=window))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window):
    with pytest.raises(ValueError, match=f"window {window} must be at least 1"):
        sliding_window_mask(3, window=window)
    with pytest.raises(ValueError, match="1 <= queries <= keys, got queries 3 and keys 2"):
        sliding_window_mask(3, 2, window=1)


@given(st.data())
def test_rising_is_that_no_two_tokens_are_nearer_in_positions_than_in_slots(data):
    at = data.draw(positions(2, data.draw(st.integers(1, 6))))
    pairs = [
        (row[i], row[j], j - i)
        for row in at.tolist()
        for i in range(len(row))
        for j in range(i + 1, len(row))
        if row[i] > PAD and row[j] > PAD
    ]
    if all(later - earlier >= slots for earlier, later, slots in pairs):
        check_rising(at)
    else:
        with pytest.raises(ValueError, match="does not lie as far"):
            check_rising(at)
