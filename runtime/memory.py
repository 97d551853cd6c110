"""Arena planning: lifetimes in, byte offsets out.

Placing intervals of given sizes is the "dynamic storage allocation" problem, NP-hard: two greedy
orders are tried and the smaller arena is taken (after "Efficient Memory Management for Deep Neural
Net Inference", Pisarchyk and Lee 2020). `ArenaLayout` then keeps who lies above whom, so that the
same lifetimes with other sizes (symbolic shapes) are placed again by one longest-path sweep.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class ArenaLayout:
    """Repeated planning of the same lifetimes at different sizes.

    The first call of `place` plans from scratch. Its result says, for every pair of intervals that
    are live together, which one lies below. Any sizes are then placed by `offset = max(end of those
    below)`, which keeps every such pair apart whatever the sizes are. When the result wastes more
    than `slack` of the live bytes, the sizes are planned from scratch and the order is recorded
    anew.
    """

    def __init__(
        self, first: ArrayLike, last: ArrayLike, alignment: int = 64, slack: float = 0.25
    ) -> None:
        self._first = np.asarray(first, np.int64)
        self._last = np.asarray(last, np.int64)
        self._alignment = alignment
        self._slack = slack
        # A model of fixed shapes is placed once: the order is recorded when a second call comes.
        self._placed: tuple[np.ndarray, np.ndarray] | None = None
        self._order: tuple[tuple[int, tuple[int, ...]], ...] | None = None
        starts = np.argsort(self._first, kind="stable")
        ends = np.argsort(self._last, kind="stable")
        self._starts, self._ends = starts, ends
        # Live bytes when the k-th interval starts: sizes started so far less sizes ended before it.
        self._ended = np.searchsorted(self._last[ends], self._first[starts], side="left")

    def place(self, nbytes: np.ndarray) -> tuple[np.ndarray, int]:
        """Offsets (int64, order of the lifetimes) and arena bytes for sizes `nbytes` (int64)."""
        sizes = _align(nbytes, self._alignment)
        if not len(sizes):
            return np.zeros(0, np.int64), 0
        placed = self._placed
        if placed is not None and self._order is None:
            self._order = self._record(*placed)
        order = self._order  # one read: another thread may replace it
        if order is not None:
            size = sizes.tolist()
            end = [0] * len(size)
            total = 0
            for i, below in order:
                base = 0
                for j in below:
                    if end[j] > base:
                        base = end[j]
                base += size[i]
                end[i] = base
                if base > total:
                    total = base
            if total <= self.live_bytes(sizes) * (1 + self._slack):
                return np.array(end, np.int64) - sizes, total
        offsets, total = _place(self._first, self._last, sizes)
        self._placed = (offsets, sizes)
        self._order = None
        return offsets, total

    def live_bytes(self, sizes: np.ndarray) -> int:
        """The most bytes live at one step: no arena can be smaller."""
        started = np.cumsum(sizes[self._starts])
        ended = np.concatenate([[0], np.cumsum(sizes[self._ends])])
        return int((started - ended[self._ended]).max())

    def _record(
        self, offsets: np.ndarray, sizes: np.ndarray
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        # Zero-sized intervals share an offset with others: ties go to the one that ends lower.
        order = np.lexsort((offsets + sizes, offsets))
        first, last = self._first[order], self._last[order]
        live = (first[:, None] <= last[None, :]) & (last[:, None] >= first[None, :])
        packed = np.packbits(np.tril(live, -1), axis=1, bitorder="little")
        names = order.tolist()
        reach: list[int] = []  # bit set, by position in `order`, of everything known to lie below
        rows = []
        for name, bits in zip(names, packed, strict=True):
            left = int.from_bytes(bits.tobytes(), "little")
            covered, below = 0, []
            while left:
                j = left.bit_length() - 1
                below.append(names[j])
                covered |= reach[j] | (1 << j)
                left &= ~covered
            reach.append(covered)
            rows.append((name, tuple(below)))
        return tuple(rows)


def _align(nbytes: np.ndarray, alignment: int) -> np.ndarray:
    return (nbytes + (alignment - 1)) & -alignment


def _place(first: np.ndarray, last: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    if not len(sizes):
        return np.zeros(0, np.int64), 0
    best = _place_by_time(first, last, sizes)
    bound = ArenaLayout(first, last).live_bytes(sizes)
    if best[1] > bound * (1.0 if len(sizes) <= 500 else 1.05):  # the second order costs 15 us each
        other = _place_by_size(first, last, sizes)
        if other[1] < best[1]:
            best = other
    return best


def _place_by_time(
    first: np.ndarray, last: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, int]:
    """Best fit in order of first use, as an allocator would serve the same requests."""
    offsets = np.zeros(len(sizes), np.int64)
    gaps: list[tuple[int, int]] = []  # free (start, end) below `top`, sorted, never touching
    live: list[tuple[int, int, int]] = []  # heap of (last use, start, end)
    top = peak = 0
    order = np.lexsort((-sizes, first))
    columns = zip(order.tolist(), first[order].tolist(), sizes[order].tolist(), strict=True)
    for i, begin, size in columns:
        while live and live[0][0] < begin:
            _, start, end = heappop(live)
            at = bisect_left(gaps, (start, end))
            if at < len(gaps) and gaps[at][0] == end:
                end = gaps.pop(at)[1]
            if at and gaps[at - 1][1] == start:
                start = gaps.pop(at - 1)[0]
            if end == top:
                top = start
            else:
                insort(gaps, (start, end))
        if not size:
            continue
        chosen, room = -1, 0
        for at, (start, end) in enumerate(gaps):
            if end - start >= size and (chosen < 0 or end - start < room):
                chosen, room = at, end - start
        if chosen >= 0:
            offset, end = gaps.pop(chosen)
            if offset + size < end:
                insort(gaps, (offset + size, end))
        else:
            offset = top
            top += size
            peak = max(peak, top)
        offsets[i] = offset
        heappush(live, (int(last[i]), offset, offset + size))
    return offsets, peak


def _place_by_size(
    first: np.ndarray, last: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, int]:
    """Best fit in order of falling size, each among those already placed that live with it."""
    count = len(sizes)
    offsets = np.zeros(count, np.int64)
    placed_first, placed_last = np.empty(count, np.int64), np.empty(count, np.int64)
    placed_start, placed_end = np.empty(count, np.int64), np.empty(count, np.int64)
    total = 0
    for k, i in enumerate(np.lexsort((first, -sizes)).tolist()):
        size, begin, end = int(sizes[i]), first[i], last[i]
        met = ((placed_first[:k] <= end) & (placed_last[:k] >= begin)).nonzero()[0]
        offset = 0
        if len(met) and size:
            starts = placed_start[met]
            order = starts.argsort()
            offset = _best_gap(starts[order], placed_end[met][order], size)
        offsets[i] = offset
        placed_first[k], placed_last[k] = begin, end
        placed_start[k], placed_end[k] = offset, offset + size
        total = max(total, offset + size)
    return offsets, total


def _best_gap(starts: np.ndarray, ends: np.ndarray, size: int) -> int:
    if len(starts) <= 24:
        cursor, best, room = 0, -1, 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if start - cursor >= size and (best < 0 or start - cursor < room):
                best, room = cursor, start - cursor
            if end > cursor:
                cursor = end
        return cursor if best < 0 else best
    cursors = np.empty(len(starts) + 1, np.int64)
    cursors[0] = 0
    np.maximum.accumulate(ends, out=cursors[1:])
    gaps = starts - cursors[:-1]
    gaps[gaps < size] = np.iinfo(np.int64).max
    at = int(gaps.argmin())
    return int(cursors[at] if gaps[at] != np.iinfo(np.int64).max else cursors[-1])
