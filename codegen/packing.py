"""Packing of constant operands into panels of `nr` columns, done once when a model is compiled.

A panel holds, for each k in turn, nr neighbouring columns; the last panel is filled with zeros.
Filters of a minimal filtering algorithm are transformed first (`Packing.filter`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

_PIECE = 4 << 20


@dataclass(frozen=True, slots=True)
class Packing:
    """Strided view of an operand: outer axes, the column axis, the k axes (element strides).

    With `filter`, a matrix G of a rows, the last two k axes are the taps of a filter g and are
    replaced by the a x a elements of G g Gᵀ (computed in float64), which become the first two.
    """

    buffer: str
    offset: int
    outer: tuple[tuple[int, int], ...]
    column: tuple[int, int]
    inner: tuple[tuple[int, int], ...]
    nr: int
    filter: tuple[tuple[float, ...], ...] = ()

    @property
    def panels(self) -> int:
        return -(-self.column[0] // self.nr)

    @property
    def depth(self) -> int:
        total = 1
        for extent, _ in self.inner[:-2] if self.filter else self.inner:
            total *= extent
        return total * len(self.filter) ** 2 if self.filter else total

    @property
    def elements(self) -> int:
        total = self.panels * self.nr * self.depth
        for extent, _ in self.outer:
            total *= extent
        return total


def flattened(source: np.ndarray) -> np.ndarray:
    """The elements in row-major order; an array that repeats one element stays a repetition."""
    if source.size and not any(source.strides):
        return np.broadcast_to(source.reshape(-1)[:1], source.size)
    return source.reshape(-1)


def arranged(source: np.ndarray, order: tuple[int, ...] | None) -> np.ndarray:
    """A C-contiguous array whose axes are those of `source` in physical order (None: as is)."""
    return np.ascontiguousarray(source if order is None else source.transpose(order))


def strided(
    flat: np.ndarray, offset: int, extents: Sequence[int], steps: Sequence[int]
) -> np.ndarray:
    """The read-only view with these extents and element strides that starts at `offset`."""
    item = flat.strides[0] if flat.ndim and flat.size else flat.itemsize
    return np.lib.stride_tricks.as_strided(
        flat[offset:], extents, [s * item for s in steps], writeable=False
    )


class Packed:
    """The packed form [outer..., panels, k, nr] of an operand, made when it is asked for.

    `shape`, `dtype` and `nbytes` are those of the whole, one flat array.
    """

    def __init__(self, source: np.ndarray, packing: Packing) -> None:
        p = self.packing = packing
        if p.filter and p.outer:
            raise ValueError("filters have no outer axes")
        flat = flattened(source)
        extents = [*(e for e, _ in p.outer), p.column[0], *(e for e, _ in p.inner)]
        steps = [*(s for _, s in p.outer), p.column[1], *(s for _, s in p.inner)]
        self._view = strided(flat, p.offset, extents, steps)
        self._groups = tuple(extents[: len(p.outer)])
        self.panels = math.prod(self._groups) * p.panels
        self.shape = (p.elements,)
        self.dtype = flat.dtype
        self.nbytes = p.elements * flat.itemsize

    def array(self, out: np.ndarray | None = None) -> np.ndarray:
        """All of it; `out`, when given, is a flat array of as many elements that receives it."""
        if out is None:
            out = np.empty(self.shape, self.dtype)
        self._fill(0, self.panels, out)
        return out

    def pieces(self, nbytes: int = _PIECE) -> Iterator[np.ndarray]:
        """Consecutive pieces of about `nbytes`; each is made while the one before is in use, and
        is only valid until the next one is asked for. A large operand never needs memory for all of
        it: new pages of a system are slower than packing."""
        panel = self.nbytes // max(1, self.panels)
        count = max(1, nbytes // max(1, panel))
        starts = range(0, self.panels, count)
        if len(starts) < 2:
            yield self.array()
            return
        memory = np.empty((2, count * self.packing.depth * self.packing.nr), self.dtype)

        def piece(n: int) -> np.ndarray:
            start, stop = starts[n], min(starts[n] + count, self.panels)
            out = memory[n % 2, : (stop - start) * self.packing.depth * self.packing.nr]
            self._fill(start, stop, out)
            return out

        with ThreadPoolExecutor(1, "onnxjit-packing") as thread:
            made = thread.submit(piece, 0)
            for n in range(len(starts)):
                ready = made.result()
                if n + 1 < len(starts):
                    made = thread.submit(piece, n + 1)
                yield ready

    def _fill(self, start: int, stop: int, out: np.ndarray) -> None:
        """Panels [start, stop), counted over all groups."""
        p = self.packing
        target = out.reshape(stop - start, p.depth, p.nr)
        while start < stop:
            group, first = divmod(start, p.panels)
            last = min(p.panels, first + stop - start)
            part, target = target[: last - first], target[last - first :]
            rows = self._view[np.unravel_index(group, self._groups) if self._groups else ()]
            if p.filter:
                _filter(rows, np.asarray(p.filter, np.float64), part, first)
            else:
                _copy(rows, part, first)
            start += last - first


def pack(source: np.ndarray, p: Packing) -> np.ndarray:
    """The packed form [outer..., panels, k, nr] of an operand, as one flat array of its dtype."""
    return Packed(source, p).array()


def _copy(rows: np.ndarray, panels: np.ndarray, first: int) -> None:
    """Fill panels [panels, k, nr], from panel `first` on, with the columns of [columns, k...]."""
    nr, depth = panels.shape[-1], rows.shape[1:]
    rows = rows[first * nr : (first + len(panels)) * nr]
    whole, rest = divmod(len(rows), nr)
    if whole:
        full = rows[: whole * nr].reshape(whole, nr, *depth)
        panels[:whole].reshape(whole, *depth, nr)[...] = np.moveaxis(full, 1, -1)
    if rest:
        target = panels[whole].reshape(*depth, nr)
        target[..., rest:] = 0
        target[..., :rest] = np.moveaxis(rows[whole * nr :], 0, -1)


def _filter(rows: np.ndarray, g: np.ndarray, panels: np.ndarray, first: int) -> None:
    """Fill panels [panels, a * a * k, nr], from panel `first` on, with the transformed filters
    [columns, k..., taps]."""
    count, depth, nr = panels.shape
    both = np.kron(g, g)  # element (i, j) of G g G^T from the taps in row-major order
    _, elements = both.shape
    channels = depth // len(both)
    taps = np.zeros((elements, channels, nr))  # of one panel: its transform stays in the cache
    for q in range(count):
        part = rows[(first + q) * nr : (first + q + 1) * nr]
        taps[..., len(part) :] = 0
        taps[..., : len(part)] = part.reshape(len(part), channels, elements).transpose(2, 1, 0)
        panels[q].reshape(len(both), -1)[...] = both @ taps.reshape(elements, -1)
