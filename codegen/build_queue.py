"""Jobs that wait for a build process, the longest first: none of those is left over when the other
processes have finished."""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class JobQueue(Generic[Item]):
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, Item]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item, size: int) -> None:
        """Add a job; `size` compares its time with that of others."""
        with self._changed:
            heapq.heappush(self._waiting, (-size, next(self._numbers), item))
            self._changed.notify()

    def take(self) -> Item | None:
        """The longest job. Waits for one; None once the queue is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return None if self._closed else heapq.heappop(self._waiting)[-1]

    def close(self) -> None:
        """Let every `take` return; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
