"""The key/value cache as a state machine against lists."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_atlas.nn.cache import KVCache

LAYERS = 2
HEADS, K_DIM, V_DIM = 2, 3, 1


class CacheMachine(RuleBasedStateMachine):
    """A cache and, for every row, the plain list of the numbers that were put into it."""

    @initialize(rows=st.integers(1, 3), capacity=st.sampled_from([0, 1, 5]))
    def start(self, rows, capacity):
        self.cache = KVCache(LAYERS, capacity=capacity)
        self.rows = [[] for _ in range(rows)]
        self.next = 0
        self.left_behind = []

    @rule(new=st.integers(1, 4))
    def append(self, new):
        for row in self.rows:
            row.extend(range(self.next, self.next + new))
            self.next += new
        numbers = torch.tensor([row[-new:] for row in self.rows], dtype=torch.float32)
        self.cache.place(numbers.long(), plain=False)
        for layer in range(LAYERS):
            content = (numbers + 0.5 * layer)[:, None, :, None]
            self.cache[layer].append(
                content.expand(-1, HEADS, -1, K_DIM), -content.expand(-1, HEADS, -1, V_DIM)
            )

    @precondition(lambda self: self.rows[0])
    @rule(data=st.data())
    def truncate(self, data):
        length = data.draw(st.integers(0, len(self.rows[0])))
        self.cache.truncate(length)
        self.rows = [row[:length] for row in self.rows]

    @precondition(lambda self: self.rows[0])
    @rule(data=st.data())
    def select(self, data):
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.cache.select(chosen)
        self.rows = [list(self.rows[i]) for i in chosen]

    @rule()
    def fork(self):
        self.left_behind.append((self.cache, [list(row) for row in self.rows]))
        self.cache = self.cache.fork()

    @precondition(lambda self: self.left_behind)
    @rule()
    def go_back(self):
        self.cache, self.rows = self.left_behind.pop()

    @invariant()
    def holds_what_the_lists_hold(self):
        for cache, rows in [(self.cache, self.rows), *self.left_behind]:
            length = len(rows[0])
            assert cache.length == length
            assert cache.nbytes == LAYERS * len(rows) * length * HEADS * (K_DIM + V_DIM) * 4
            if not length:
                continue
            numbers = torch.tensor(rows, dtype=torch.float32)
            # One row of positions may stand for all.
            assert torch.equal(cache.positions.expand(len(rows), -1), numbers.long())
            for layer in range(LAYERS):
                k, v = cache[layer].read()
                assert torch.equal(k, (numbers + 0.5 * layer)[:, None, :, None].expand(-1, HEADS, -1, K_DIM))
                assert torch.equal(v, -(numbers + 0.5 * layer)[:, None, :, None].expand(-1, HEADS, -1, V_DIM))


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)


def fill(cache: KVCache, new: int, rows: int = 1) -> None:
    cache.place(torch.arange(cache.length, cache.length + new)[None], plain=True)
    for layer in range(len(cache)):
        cache[layer].append(torch.ones(rows, 2, new, 3), torch.ones(rows, 2, new, 3))


def test_reserved_room_is_used_without_a_copy():
    cache = KVCache(1, capacity=8)
    fill(cache, 3)
    first = cache[0].read()[0].data_ptr()
    fill(cache, 5)
    assert cache[0].read()[0].data_ptr() == first
    fill(cache, 1)
    assert cache[0].read()[0].data_ptr() != first


def test_growing_one_token_at_a_time_copies_seldom():
    cache, places = KVCache(1), set()
    for _ in range(200):
        fill(cache, 1)
        places.add(cache[0]._buffers[0].shape[2])
    assert places == {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_a_cache_emptied_by_truncate_takes_another_batch():
    cache = KVCache(2)
    fill(cache, 3, rows=2)
    cache.truncate(0)
    assert cache.plain
    fill(cache, 4, rows=5)
    assert cache[1].read()[0].shape == (5, 2, 4, 3)


def test_plain_until_something_else_is_placed():
    cache = KVCache(1)
    fill(cache, 2)
    assert cache.plain
    assert cache.fork().plain
    cache.place(torch.tensor([[7]]), plain=False)
    assert not cache.plain


@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_of_positions_serves_all_rows(rows):
    cache = KVCache(1)
    fill(cache, 2, rows=rows)
    cache.place(torch.tensor([[2]] * 3), plain=False)
    assert cache.positions.tolist() == [[0, 1, 2]] * 3
