"""The key/value cache as a state machine against lists."""

from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_atlas.nn.cache import KVCache, LayerCache, RollingLayerCache

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


# ------------------------------------------------------------------------------------- rolling caches


class RollingMachine(RuleBasedStateMachine):
    """A mixed cache, a full layer and a rolling one: the second has of the first what may still be looked at."""

    @initialize(
        window=st.integers(1, 5), sinks=st.integers(0, 3), rows=st.integers(1, 3), padding=st.integers(0, 3)
    )
    def start(self, window, sinks, rows, padding):
        self.window, self.sinks = window, sinks
        self.cache = KVCache(2, layer=[LayerCache, partial(RollingLayerCache, window=window, sinks=sinks)])
        self.left_behind = []
        self.next = 0
        self.gone = 0
        padding = 0 if sinks else min(padding, rows - 1)
        self.place = None
        if padding:  # row r has r slots of it
            self.place = torch.arange(4 + rows) - torch.arange(rows)[:, None]
            self.place = self.place.clamp(min=-1)
        self.add(rows, 4 + rows if padding else 1, self.place)

    def add(self, rows, new, positions=None):
        seen = self.cache.length
        kept = [*range(min(self.sinks, seen)), *range(min(seen, self.sinks + self.gone), seen)]
        numbers = torch.arange(self.next, self.next + rows * new, dtype=torch.float32).view(rows, 1, new, 1)
        self.next += rows * new
        self.cache.place(new, positions)
        full = self.cache[0].append(
            numbers.expand(-1, HEADS, -1, K_DIM), -numbers.expand(-1, HEADS, -1, V_DIM)
        )
        near = self.cache[1].append(
            numbers.expand(-1, HEADS, -1, K_DIM), -numbers.expand(-1, HEADS, -1, V_DIM)
        )
        returned = [*kept, *range(seen, seen + new)]
        for whole, part in zip(full, near, strict=True):
            assert torch.equal(part, whole[:, :, returned])
        assert torch.equal(self.cache[1].positions, self.cache.positions[:, returned])
        # Every new token finds its whole window, and the sinks.
        for slot in range(seen, seen + new):
            needed = {*range(max(0, slot - self.window + 1), slot + 1), *range(min(self.sinks, slot))}
            assert needed <= set(returned)
        self.gone = max(self.gone, seen + new - self.sinks - self.window)

    @rule(new=st.integers(1, 9))
    def append(self, new):
        self.add(max(self.cache.rows, 1), new)

    @precondition(lambda self: self.cache.length)
    @rule(data=st.data())
    def truncate(self, data):
        length = data.draw(st.integers(0, self.cache.length))
        kept = {*range(self.sinks), *range(self.sinks + self.gone, self.cache.length)}
        needed = {*range(max(0, length - self.window + 1), length), *range(min(self.sinks, length))}
        amid = self.sinks < length < self.sinks + self.gone  # a window of 1 needs nothing before the cut
        if needed <= kept and not amid:
            self.cache.truncate(length)
            self.gone = self.gone if length > self.sinks else 0
        else:
            with pytest.raises(ValueError, match=f"cannot truncate to {length}: a window of"):
                self.cache.truncate(length)

    @precondition(lambda self: self.cache.length)
    @rule(data=st.data())
    def select(self, data):
        self.cache.select(data.draw(st.lists(st.integers(0, self.cache.rows - 1), min_size=1, max_size=4)))

    @rule()
    def fork(self):
        self.left_behind.append((self.cache, self.gone))
        self.cache = self.cache.fork()

    @precondition(lambda self: self.left_behind)
    @rule()
    def go_back(self):
        self.cache, self.gone = self.left_behind.pop()

    @invariant()
    def holds_the_ends_of_what_the_full_layer_holds(self):
        for cache, gone in [(self.cache, self.gone), *self.left_behind]:
            assert cache[1].length == cache[0].length == cache.length
            assert cache[1].rows == cache[0].rows
            token = cache.rows * HEADS * (K_DIM + V_DIM) * 4
            assert cache[1].nbytes <= (self.window + self.sinks) * token
            if not cache.length:
                continue
            kept = [*range(min(self.sinks, cache.length)), *range(self.sinks + gone, cache.length)]
            assert cache[1].nbytes == len(kept) * token
            for whole, part in zip(cache[0].read(), cache[1].read(), strict=True):
                assert torch.equal(part, whole[:, :, kept])


TestRolling = RollingMachine.TestCase
TestRolling.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


def rolling(window: int, sinks: int = 0) -> KVCache:
    return KVCache(1, layer=partial(RollingLayerCache, window=window, sinks=sinks))


def test_a_rolling_cache_does_not_grow_with_the_text():
    cache = rolling(4, sinks=2)
    for new in (1, 9, 1, 30, 1):
        fill(cache, new)
        kept = cache[0].read()
        # Nor does what the tensors hold on to.
        assert all(t.untyped_storage().nbytes() <= 6 * 2 * 3 * 4 for t in kept)
    assert (cache.length, cache[0].length, kept[0].shape[2], cache.plain) == (42, 42, 6, True)
    assert cache.nbytes == 2 * 6 * 2 * 3 * 4


def test_a_window_before_the_cut_that_is_gone_is_said_so():
    cache = rolling(4)
    fill(cache, 10)
    cache.truncate(9)
    with pytest.raises(
        ValueError, match="to 8: a window of 4 there begins in slot 5, and slots 0 to 5 are gone"
    ):
        cache.truncate(8)
    assert cache.length == 9
    fill(cache, 1)
    assert cache[0].positions.tolist() == [[6, 7, 8, 9]]
    cache.truncate(0)
    fill(cache, 2, rows=3)
    assert cache[0].read()[0].shape == (3, 2, 2, 3)


def test_a_rolling_cache_that_no_model_places_counts_its_slots():
    cache = rolling(2, sinks=1)
    assert cache[0].positions is None
    for at in ([0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]):
        new = torch.ones(1, 1, 4 if at[1] == 1 else 1, 1)
        cache[0].append(new, new)
        assert cache[0].positions.tolist() == [at]


@pytest.mark.parametrize("late", [[[4, 4]], [[3, 4]], [[-1, 4]]])
def test_tokens_out_of_order_are_not_rolled(late):
    cache = rolling(3)
    fill(cache, 4)
    cache.place(2, torch.tensor(late))
    new = torch.ones(1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"position 4 in slot 5|position 3 in slot 4"):
        cache[0].append(new, new)
    assert cache[0].length == 4


def test_sinks_must_be_tokens():
    cache = rolling(3, sinks=2)
    cache.place(3, torch.tensor([[0, 1, 2], [-1, 0, 1]]))
    new = torch.ones(2, 1, 3, 1)
    with pytest.raises(ValueError, match=r"first 2 slots are kept as sinks .* not \[\[0, 1\], \[-1, 0\]\]"):
        cache[0].append(new, new)


def test_what_a_rolling_cache_refuses():
    with pytest.raises(ValueError, match="window 0 must be at least 1"):
        rolling(0)
    with pytest.raises(ValueError, match="sinks -1 must not be negative"):
        rolling(1, sinks=-1)
    cache = rolling(2)
    with pytest.raises(ValueError, match="empty: append before read"):
        cache[0].read()
    with pytest.raises(TypeError, match="keeps slots, not a state"):
        cache[0].keep(1, torch.ones(1, 1))
    fill(cache, 1)
    with pytest.raises(ValueError, match="holds 1 rows, the new keys have 2"):
        fill(cache, 1, rows=2)


def test_a_kind_for_each_layer():
    cache = KVCache(3, layer=[LayerCache, partial(RollingLayerCache, window=2), LayerCache])
    fill(cache, 5)
    assert [layer.read()[0].shape[2] for layer in cache] == [5, 2, 5]
    assert [type(layer) for layer in cache.fork()] == [LayerCache, RollingLayerCache, LayerCache]
    with pytest.raises(ValueError, match="there are 2 kinds of cache for 3 layers"):
        KVCache(3, layer=[LayerCache] * 2)
