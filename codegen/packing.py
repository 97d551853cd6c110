"""Packing of constant operands into panels of `nr` columns, done once when a model is compiled.

A panel holds, for each k in turn, nr neighbouring columns; the last panel is filled with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Packing:
    """Strided view of an operand: outer axes, the column axis, the k axes (element strides)."""

    buffer: str
    offset: int
    outer: tuple[tuple[int, int], ...]
    column: tuple[int, int]
    inner: tuple[tuple[int, int], ...]
    nr: int

    @property
    def panels(self) -> int:
        return -(-self.column[0] // self.nr)

    @property
    def depth(self) -> int:
        total = 1
        for extent, _ in self.inner:
            total *= extent
        return total

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


def pack(source: np.ndarray, p: Packing, out: np.ndarray | None = None) -> np.ndarray:
    """The packed form [outer..., panels, k, nr] of an operand, as one flat array of its dtype.

    `out`, when given, is a flat array of `p.elements` elements that receives the result.
    """
    flat = flattened(source)
    extents = [*(e for e, _ in p.outer), p.column[0], *(e for e, _ in p.inner)]
    steps = [*(s for _, s in p.outer), p.column[1], *(s for _, s in p.inner)]
    item = flat.strides[0] if flat.ndim and flat.size else flat.itemsize
    view = np.lib.stride_tricks.as_strided(
        flat[p.offset :], extents, [s * item for s in steps], writeable=False
    )
    groups = int(np.prod([e for e, _ in p.outer], dtype=np.int64)) if p.outer else 1
    n, depth = p.column[0], p.depth
    if out is None:
        out = np.empty(p.elements, flat.dtype)
    panels = out.reshape(groups, p.panels, depth, p.nr)
    whole, rest = divmod(n, p.nr)
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
