"""The profile of a session: Chrome trace events of loading, runs and steps."""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxjit.runtime.profile import StepTime


class SessionProfile:
    """Events since `start` (ns of time.monotonic_ns); runs on several threads may add to it."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.start = time.monotonic_ns()
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []

    def session(self, name: str, begin: int) -> None:
        """Something that began at `begin` and ends now."""
        self._add("Session", name, begin, time.monotonic_ns() - begin, {})

    def run(self, begin: int, steps: Sequence[StepTime]) -> None:
        """A run that ends now. Steps are drawn one after the other from its begin."""
        self.session("model_run", begin)
        at = begin
        for number, s in enumerate(steps):
            nanoseconds = round(s.seconds * 1e9)
            arguments = {
                "op_name": s.name,
                "provider": "CPUExecutionProvider",
                "node_index": str(number),
                "kernel": s.kernel,
                "flops": s.flops,
                "bytes": s.bytes,
                "chunks": s.chunks,
            }
            self._add("Node", f"{s.name or s.kernel}_{number}_kernel_time", at, nanoseconds,
                      arguments)  # fmt: skip
            at += nanoseconds

    def write(self) -> str:
        """Writes the events as JSON; the name of the file."""
        now = datetime.datetime.now()
        stamp = f"{now:%Y-%m-%d_%H-%M-%S}_{now.microsecond // 1000:03d}"
        name = f"{self.prefix}_{stamp}.json"
        with self._lock:
            events = sorted(self._events, key=lambda e: e["ts"])
        with open(name, "w", encoding="utf-8") as file:
            json.dump(events, file, indent=0)
        return name

    def _add(self, category: str, name: str, begin: int, nanoseconds: int, arguments: Any) -> None:
        event = {
            "cat": category,
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "dur": nanoseconds // 1000,
            "ts": (begin - self.start) // 1000,
            "ph": "X",
            "name": name,
            "args": arguments,
        }
        with self._lock:
            self._events.append(event)
