"""The key/value cache as a state machine against lists."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_atlas.nn.cache import KVCache, LayerCache

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
        self.cache.place(new, numbers.long())
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
    cache.place(new)
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
    cache.place(1, torch.tensor([[7]]))
    assert not cache.plain


@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_of_positions_serves_all_rows(rows):
    cache = KVCache(1)
    fill(cache, 2, rows=rows)
    cache.place(1, torch.tensor([[2]] * 3))
    assert cache.positions.tolist() == [[0, 1, 2]] * 3


def test_rows_behind_padding_count_on_from_their_own_last_token():
    cache = KVCache(1)
    assert cache.place(3, torch.tensor([[-1, 0, 1], [0, 1, 2]])).tolist() == [[-1, 0, 1], [0, 1, 2]]
    assert cache.place(2).tolist() == [[2, 3], [3, 4]]
    assert cache.positions.tolist() == [[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert not cache.plain


def test_what_was_placed_out_of_order_and_is_cut_off_leaves_a_plain_cache():
    cache = KVCache(1)
    fill(cache, 3)
    cache.place(2, torch.tensor([[3, 3]]))  # two candidates for one position, as in a tree of drafts
    assert not cache.plain
    cache.truncate(4)
    assert not cache.plain
    cache.truncate(3)
    assert cache.plain
    assert cache.place(1).tolist() == [[3]]


@pytest.mark.parametrize("tensors", [1, 3])
def test_a_mixer_may_keep_any_number_of_tensors(tensors):
    cache = KVCache(1)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 1 + i, 5, 3 - i, generator=generator) for i in range(tensors)]
    cache[0].append(*(part[:, :, :4] for part in parts))
    for kept, part in zip(cache[0].append(*(part[:, :, 4:] for part in parts)), parts, strict=True):
        assert torch.equal(kept, part)
    with pytest.raises(
        ValueError, match=f"holds {tensors} tensors a slot, the new tokens have {tensors + 1}"
    ):
        cache[0].append(*parts, parts[0])


def test_a_state_is_replaced_selected_and_forked_but_never_cut():
    cache = KVCache(1)
    cache[0].keep(5, torch.tensor([[1.0], [2.0]]))
    twin = cache.fork()
    cache[0].keep(1, torch.tensor([[3.0], [4.0]]))
    twin[0].select(torch.tensor([1, 1, 0]))
    assert twin[0].state[0].tolist() == [[2.0], [2.0], [1.0]]
    assert twin[0].length == 5
    assert cache[0].state[0].tolist() == [[3.0], [4.0]]
    assert cache[0].nbytes == 8
    with pytest.raises(ValueError, match="to 3: a recurrent state of 6 tokens cannot go back"):
        cache[0].truncate(3)
    cache[0].truncate(0)
    assert cache[0].state is None


def test_a_refused_truncate_leaves_every_layer_as_it_was():
    cache = KVCache(2)
    cache.place(3)
    cache[0].append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    cache[1].keep(3, torch.ones(1, 2))
    with pytest.raises(ValueError, match="to 2: a recurrent state of 3 tokens cannot go back"):
        cache.truncate(2)
    assert (cache.length, cache[0].length, cache[1].length) == (3, 3, 3)


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it():
    cache = KVCache(1, capacity=4)
    with torch.inference_mode():
        fill(cache, 2)
    fill(cache, 2)
    assert cache[0].read()[0].shape[2] == 4


def test_a_fork_is_of_the_same_kind():
    class Kind(LayerCache):
        pass

    assert isinstance(KVCache(2, layer=Kind).fork()[1], Kind)


def test_select_reaches_a_cache_that_no_model_places():
    cache = KVCache(1)  # as of an encoder's keys, or of one mixer alone
    content = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 1)
    cache[0].append(content, content)
    cache.select([2, 0])
    assert cache[0].read()[0][:, 0, 0, 0].tolist() == [2.0, 0.0]


def test_a_fork_and_its_original_go_their_own_ways():
    """Both have room to append in place, so that a shared buffer would be written by the one and read by the other."""
    cache = KVCache(1, capacity=8)
    first, mine, theirs = (torch.full((1, 1, 2, 3), float(n)) for n in (1, 2, 3))
    cache.place(2)
    cache[0].append(first, first)
    twin = cache.fork()
    for kept, new in ((twin, theirs), (cache, mine)):
        kept.place(2)
        kept[0].append(new, new)
    for kept, new in ((twin, theirs), (cache, mine)):
        assert torch.equal(kept[0].read()[0], torch.cat([first, new], dim=2))


def test_rotations_kept_for_other_positions_are_not_used():
    from llm_atlas.nn.positions import RotaryPositions

    scheme, x = (
        RotaryPositions(4, length=9),
        torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)),
    )
    here, there = torch.arange(3)[None], torch.arange(3, 6)[None]
    alone = scheme.rotate(x, there)
    with scheme.reused(here, x.dtype):
        assert torch.equal(scheme.rotate(x, there), alone)
        assert not torch.allclose(scheme.rotate(x, here), alone)
