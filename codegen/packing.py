"""Packing of constant operands into panels of `nr` columns, done once when a model is compiled.

A panel holds, for each k in turn, nr neighbouring columns; the last panel is filled with zeros.
Filters of a minimal filtering algorithm are transformed first (`Packing.filter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def pack(source: np.ndarray, p: Packing, out: np.ndarray | None = None) -> np.ndarray:
    """The packed form [outer..., panels, k, nr] of an operand, as one flat array of its dtype.

    `out`, when given, is a flat array of `p.elements` elements that receives the result.
    """
    if p.filter and p.outer:
        raise ValueError("filters have no outer axes")
    flat = flattened(source)
    extents = [*(e for e, _ in p.outer), p.column[0], *(e for e, _ in p.inner)]
    steps = [*(s for _, s in p.outer), p.column[1], *(s for _, s in p.inner)]
    view = strided(flat, p.offset, extents, steps)
    groups = int(np.prod([e for e, _ in p.outer], dtype=np.int64)) if p.outer else 1
    if out is None:
        out = np.empty(p.elements, flat.dtype)
    panels = out.reshape(groups, p.panels, p.depth, p.nr)
    if p.filter:
        _filter(view, np.asarray(p.filter, np.float64), panels)
        return out
    whole, rest = divmod(p.column[0], p.nr)
    outer = len(p.outer)
    for g, index in enumerate(np.ndindex(*extents[:outer])):
        rows = view[index]  # [n, k axes...]
        if whole:
            full = rows[: whole * p.nr].reshape(whole, p.nr, *extents[outer + 1 :])
            target = panels[g, :whole].reshape(whole, *extents[outer + 1 :], p.nr)
            target[...] = np.moveaxis(full, 1, -1)
        if rest:
            target = panels[g, whole].reshape(*extents[outer + 1 :], p.nr)
            target[..., rest:] = 0
            target[..., :rest] = np.moveaxis(rows[whole * p.nr :], 0, -1)
    return out


def _filter(view: np.ndarray, g: np.ndarray, panels: np.ndarray) -> None:
    """Fill panels [1, panels, a * a * k, nr] with the transformed filters [columns, k..., taps]."""
    _, count, depth, nr = panels.shape
    both = np.kron(g, g)  # element (i, j) of G g G^T from the taps in row-major order
    _, elements = both.shape
    channels = depth // len(both)
    taps = np.zeros((elements, channels, nr))  # of one panel: its transform stays in the cache
    for q in range(count):
        part = view[q * nr : (q + 1) * nr]
        taps[..., len(part) :] = 0
        taps[..., : len(part)] = part.reshape(len(part), channels, elements).transpose(2, 1, 0)
        panels[0, q].reshape(len(both), -1)[...] = both @ taps.reshape(elements, -1)
