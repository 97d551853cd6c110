"""The process-wide pool of worker threads, and how many threads this process may use.

Workers are daemon threads that sit in the native worker (GIL released). They spin for `SPIN_NS`
after their last chunk, then park on a condition variable; an idle process burns nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np

from onnxjit.runtime.executor_source import POOL, POOL_BYTES

SPIN_NS = 40_000
MAX_THREADS = 256

_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1
_FUNCTIONS = {
    "LOCK": "pthread_mutex_lock",
    "UNLOCK": "pthread_mutex_unlock",
    "WAIT": "pthread_cond_wait",
    "BROADCAST": "pthread_cond_broadcast",
    "CLOCK": "clock_gettime",
    "YIELD": "sched_yield",
}


def available_threads() -> int:
    """CPUs this process may use: scheduling affinity, capped by the cgroup's CPU quota.

    At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _quota()
    if quota is not None:
        count = min(count, math.ceil(quota))
    return max(1, min(count, MAX_THREADS))


def _quota(root: str = "/sys/fs/cgroup", table: str = "/proc/self/cgroup") -> float | None:
    """CPUs granted by the tightest cgroup limit on the way up (v2 `cpu.max`, v1 `cpu.cfs_*`)."""
    try:
        lines = _text(table).splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            named = (os.path.join(root, name) for name in (controllers, "cpu"))
            base = next(filter(os.path.isdir, named), root)
        names = [name for name in path.split("/") if name]
        limits += [_limit(os.path.join(base, *names[:n])) for n in range(len(names) + 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: str) -> float | None:
    try:
        if os.path.exists(f"{folder}/cpu.max"):
            quota, period = _text(f"{folder}/cpu.max").split()
        else:
            quota = _text(f"{folder}/cpu.cfs_quota_us")
            period = _text(f"{folder}/cpu.cfs_period_us")
        return None if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


def aligned(nbytes: int, alignment: int = 64) -> np.ndarray:
    """Uninitialised uint8 memory of `nbytes` whose address is a multiple of `alignment`."""
    block = np.empty(nbytes + alignment, np.uint8)
    start = -block.ctypes.data % alignment
    return block[start : start + nbytes]


class Pool:
    """Worker threads and the words through which the native executor reaches them.

    The memory's address never changes in a process and its children, so contexts may keep it.
    """

    def __init__(self) -> None:
        self._memory = aligned(POOL_BYTES, 128)
        self._words = self._memory.view(np.int64)
        self._sync = aligned(512)  # pthread_mutex_t and pthread_cond_t, at most 64 bytes each
        self._libc = ctypes.CDLL(None)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._executors: list[object] = []
        self._ended = False
        self.users: weakref.WeakSet = weakref.WeakSet()
        self.address = self._memory.ctypes.data
        self._reset()

    def _reset(self) -> None:
        libc, words = self._libc, self._words
        words[:] = 0
        self._sync[:] = 0
        mutex = self._sync.ctypes.data
        condition = mutex + 256
        libc.pthread_mutex_init(ctypes.c_void_p(mutex), None)
        libc.pthread_cond_init(ctypes.c_void_p(condition), None)
        for name, symbol in _FUNCTIONS.items():
            pointer = ctypes.cast(getattr(libc, symbol), ctypes.c_void_p)
            words[POOL[name] // 8] = pointer.value or 0
        words[POOL["MUTEX"] // 8] = mutex
        words[POOL["CONDITION"] // 8] = condition
        words[POOL["CLOCK_ID"] // 8] = _CLOCK_MONOTONIC
        words[POOL["SPIN"] // 8] = SPIN_NS

    def _word(self, name: str) -> int:
        return int(self._words[POOL[name] // 8])

    @property
    def workers(self) -> int:
        """Worker threads that are running now."""
        return self._word("WORKERS")

    @property
    def parked(self) -> int:
        """Workers that sleep until a run wakes them."""
        return self._word("SLEEPERS")

    def ensure(self, threads: int, worker: int, keep: object) -> None:
        """Have at least `threads` - 1 workers, new ones running the native function at `worker`.

        `keep` owns that code and is kept for as long as the process lives.
        """
        if len(self._threads) >= threads - 1 or self._ended:
            return
        with self._lock:
            if not any(keep is known for known in self._executors):
                self._executors.append(keep)
            body = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(worker)
            self._words[POOL["STOP"] // 8] = 0
            first = len(self._threads) + 1
            for number in range(first, threads):
                thread = threading.Thread(
                    target=body,
                    args=(self.address, number),
                    name=f"onnxjit-{number}",
                    daemon=True,
                )
                try:
                    thread.start()
                except (
                    RuntimeError
                ):  # no more threads allowed: the run has fewer, its results are the same
                    break
                self._threads.append(thread)
            # A run takes workers that exist: wait so that the first one has them already.
            limit = time.monotonic() + 1.0
            while self.workers < len(self._threads) and time.monotonic() < limit:
                time.sleep(0)

    def stop(self) -> None:
        """End the workers and wait for them. A later `ensure` starts new ones."""
        with self._lock:
            threads, self._threads = self._threads, []
            self._words[POOL["STOP"] // 8] = 1
            libc, mutex = self._libc, ctypes.c_void_p(self._word("MUTEX"))
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_unlock(mutex)
            libc.pthread_cond_broadcast(ctypes.c_void_p(self._word("CONDITION")))
            for thread in threads:
                thread.join()
        for user in list(self.users):
            user.rebind()

    def end(self) -> None:
        """Stop for good: the interpreter is about to exit."""
        self._ended = True
        self.stop()

    def _after_fork(self) -> None:
        # The child has this memory but none of the threads, and perhaps a held mutex.
        self._lock = threading.Lock()
        self._threads = []
        self._reset()
        for user in list(self.users):
            user.rebind(forked=True)


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """The process's pool, made on first use."""
    global _pool
    if _pool is None:
        with _pool_lock:
            if _pool is None:
                made = Pool()
                atexit.register(made.end)
                _register_fork(made._after_fork)
                _pool = made
    return _pool


def _register_fork(after: Callable[[], None]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=after)
