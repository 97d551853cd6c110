"""Memory of results, used again once nobody holds them any more.

A large array is new pages each time, which the system clears one by one. Memory that a call
returned, and that the caller has let go of, is therefore given out again. Whether somebody still
holds it is what its reference count says: views, buffers and other libraries' arrays over a result
all hold the memory itself.
"""

from __future__ import annotations

from sys import getrefcount

import numpy as np

LEAST = 128 * 1024
"""Bytes from which an allocation is new pages (glibc's default threshold for mmap)."""

MOST = 128 << 20
"""Beyond, what is kept would weigh more than what is saved."""

KEPT = 2
"""Blocks for each result: the caller of `y = f(x)` still holds one when it asks for the next."""


class Results:
    """The memory of one run at a time; not for several threads at once."""

    __slots__ = ("_rings",)

    def __init__(self) -> None:
        self._rings: dict[int, list[np.ndarray]] = {}

    def array(
        self, number: int, shape: tuple[int, ...], dtype: np.dtype, nbytes: int
    ) -> np.ndarray:
        """An uninitialised array for result `number`, of `nbytes` from LEAST to MOST."""
        ring = self._rings.setdefault(number, [])
        found = None
        for block in ring:
            if nbytes <= block.nbytes - 64 <= 2 * nbytes and getrefcount(block) == _UNSHARED:
                found = block
                break
        if found is None:
            found = np.empty(nbytes + 64, np.uint8)
            ring.append(found)
            if len(ring) > KEPT:
                del ring[0]
        return np.ndarray(shape, dtype, found, -found.ctypes.data % 64)


def _count() -> int:
    """The reference count of a block that only its ring holds, as `array` would read it."""
    ring = [np.empty(1, np.uint8)]
    for block in ring:
        return getrefcount(block)
    raise AssertionError


_UNSHARED = _count()
