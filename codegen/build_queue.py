"""Which build process gets which job.

Compiling a kernel makes a template (`dialect_templates`), which only the process that made it has.
So each template is begun somewhere before any is begun twice, and its process is preferred for the
kernels that share it. Long jobs go first: none of them is left over when the other processes have
finished.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
_INTEGER = re.compile(r"(?<![\w.])\d+(?![\w.])")


def template_name(text: str, symbols: Sequence[str] = ()) -> str:
    """Equal for sources with one template, and rarely for others. Reads the text only."""
    for symbol in symbols:
        text = text.replace(symbol, "#")
    return _INTEGER.sub("#", text)


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Item]):
    item: Item
    template: str
    size: int


class JobQueue(Generic[Item]):
    """Jobs that wait for a process; safe to use from several threads."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting[Item]] = []
        self._begun: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item, template: str, size: int) -> None:
        """Add a job; `size` compares its time with that of others."""
        with self._changed:
            self._waiting.append(_Waiting(item, template, size))
            self._changed.notify()

    def take(self, own: set[str]) -> Item | None:
        """The best job for a process with the templates `own`, to which the job's is added.

        Waits for one; None once the queue is closed.
        """
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            best = max(self._waiting, key=lambda job: self._rank(job, own))
            self._waiting.remove(best)
            self._begun.add(best.template)
            own.add(best.template)
            return best.item

    def close(self) -> None:
        """Let every `take` return; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _rank(self, job: _Waiting[Item], own: set[str]) -> tuple[bool, bool, int]:
        return job.template not in self._begun, job.template in own, job.size
