"""Arena planning: what lives together never overlaps, and little is wasted."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxjit.runtime.memory import ArenaLayout

# (size in bytes, first use, steps until the last use)
LIFETIMES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 12)), max_size=40
)


def columns(rows: list[tuple[int, int, int]]) -> tuple[list[int], list[int], list[int]]:
    """First uses, last uses and sizes."""
    return [at for _, at, _ in rows], [at + n for _, at, n in rows], [size for size, _, _ in rows]


def place(first, last, sizes, alignment: int = 64) -> tuple[list[int], int]:
    offsets, total = ArenaLayout(first, last, alignment).place(np.array(sizes, np.int64))
    return offsets.tolist(), total


def assert_apart(first, last, offsets, sizes, total: int) -> None:
    rows = list(zip(first, last, offsets, sizes, strict=True))
    for i, (f1, l1, o1, s1) in enumerate(rows):
        assert o1 >= 0 and o1 + s1 <= total
        for f2, l2, o2, s2 in rows[:i]:
            if f1 <= l2 and f2 <= l1 and s1 and s2:
                assert o1 + s1 <= o2 or o2 + s2 <= o1


def live_bytes(first, last, sizes, alignment: int = 64) -> int:
    """The most bytes live at one step, counted step by step."""
    rows = list(zip(first, last, sizes, strict=True))
    return max(
        (
            sum(-(-size // alignment) * alignment for f, e, size in rows if f <= step <= e)
            for step in set(first)
        ),
        default=0,
    )


@settings(max_examples=150, deadline=None)
@given(LIFETIMES, st.sampled_from([1, 16, 64, 4096]))
def test_first_placement(rows, alignment):
    first, last, sizes = columns(rows)
    offsets, total = place(first, last, sizes, alignment)
    assert all(offset % alignment == 0 for offset in offsets)
    assert_apart(first, last, offsets, sizes, total)
    assert live_bytes(first, last, sizes, alignment) <= total
    assert total <= sum(-(-size // alignment) * alignment for size in sizes)


@settings(max_examples=150, deadline=None)
@given(LIFETIMES, st.data())
def test_layout_at_other_sizes(rows, data):
    first, last, _ = columns(rows)
    layout = ArenaLayout(first, last, slack=data.draw(st.sampled_from([0.0, 0.25, 100.0])))
    for _ in range(4):
        sizes = [data.draw(st.integers(0, 5000)) for _ in rows]
        offsets, total = layout.place(np.array(sizes, np.int64))
        assert_apart(first, last, offsets.tolist(), sizes, total)
        bound = live_bytes(first, last, sizes)
        assert total >= bound
        if sizes:
            assert layout.live_bytes(-(-np.array(sizes, np.int64) // 64) * 64) == bound


def test_a_chain_takes_turns():
    assert place(range(50), range(1, 51), [1000] * 50)[1] == 2 * 1024


def test_larger_values_first_wins_where_time_order_fragments():
    """In time order the small early value splits the room that the two big ones could share."""
    first, last, sizes = [0, 1, 2, 3, 5], [4, 2, 6, 5, 6], [64, 640, 128, 704, 640]
    assert place(first, last, sizes)[1] <= 1.25 * live_bytes(first, last, sizes)


def test_many_lifetimes():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 1 << 20, 2000)
    first = np.arange(2000)
    last = first + generator.integers(1, 6, 2000)
    layout = ArenaLayout(first, last)
    for scale in (1, 1, 3):
        offsets, total = layout.place(sizes * scale)
        for i in range(2000):  # no lifetime is longer than six steps
            near = slice(max(0, i - 6), i + 1)
            assert_apart(first[near], last[near], offsets[near], sizes[near] * scale, total)
        assert total <= 1.25 * layout.live_bytes(-(-sizes * scale // 64) * 64)


def test_no_lifetimes():
    assert place([], [], []) == ([], 0)
