"""The clock: calls take turns in one process, so that all meet the same conditions."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

_TASKS = "/proc/self/task"
_POLL = 0.002
_TICK = 0.025  # a thread that runs on is charged for it so late at worst
_QUIET = 0.05  # share of a tick: below it no thread spins any more
_PATIENCE = 0.25
_LEAST, _MOST = 3, 10.0  # runs and seconds after which a slow call takes no further turns
_AWAKE = 1.0  # a run this long has woken its engine by itself


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of single runs: the least, the median, the first and third quartile, and how many
    runs there were."""

    minimum: float
    median: float
    lower: float
    upper: float
    runs: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """The summary of at least one run."""
        middle = median(seconds)
        lower, upper = middle, middle
        if len(seconds) > 1:
            lower, _, upper = quantiles(seconds, n=4, method="inclusive")
        return Timing(min(seconds), middle, lower, upper, len(seconds))


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float = 3.0,
    burst: float = 0.02,
    rounds: int = 5,
) -> dict[str, Timing]:
    """Times calls against each other for about `seconds` in all, at least `rounds` rounds.

    As long as one of the last `rounds` rounds has made a least time smaller by a hundredth, it goes
    on, four times `seconds` at most: on a shared machine the least of few runs is luck.

    In each round every call gets one turn: a pause until the threads of the engine before have
    stopped spinning, then runs for about `burst` seconds (two at least: the first one wakes the
    engine's threads and caches). The order rotates from round to round, so that no call always
    follows the same other. All runs count. A call that has taken ten seconds and `seconds`, and
    has had three runs, takes no further turns: an engine a hundred times slower than the others
    would else take all of the time.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = time.perf_counter
    for call in calls.values():
        call()
    begin = clock()
    done = idle = 0
    while (
        done < rounds
        or clock() < begin + seconds
        or (idle < rounds and clock() < begin + 4 * seconds)
    ):
        before = {name: min(rows, default=math.inf) for name, rows in times.items()}
        for position in range(len(names)):
            name = names[(position + done) % len(names)]
            call, rows = calls[name], times[name]
            if len(rows) >= _LEAST and sum(rows) > max(seconds, _MOST):
                continue
            settle()
            stop = clock() + burst
            turn = 0
            while clock() < stop or (turn < 2 and (not rows or rows[-1] < _AWAKE)):
                start = clock()
                call()
                rows.append(clock() - start)
                turn += 1
        better = any(min(rows) < 0.99 * before[name] for name, rows in times.items())
        done, idle = done + 1, 0 if better else idle + 1
    return {name: Timing.of(rows) for name, rows in times.items()}


def settle() -> None:
    """Waits until no other thread of this process is busy any more, a quarter of a second at most.

    The worker threads of onnxruntime spin for about 45 ms after a run, on cores that the next
    engine is about to use.
    """
    end = time.perf_counter() + _PATIENCE
    quiet = 0
    while quiet < 2 and time.perf_counter() < end:
        time.sleep(_POLL)
        quiet = 0 if _busy() else quiet + 1


def _busy() -> bool:
    """Whether another thread of this process is running or about to."""
    own = str(threading.get_native_id())
    with contextlib.suppress(OSError):  # not Linux, or without its /proc
        return any(_state(task) == "R" for task in os.listdir(_TASKS) if task != own)
    begin, busy = time.perf_counter(), time.process_time()
    time.sleep(_TICK)
    return time.process_time() - busy > _QUIET * (time.perf_counter() - begin)


def _state(task: str) -> str:
    """The letter that Linux has for what a thread of this process does; "" when it has ended."""
    try:
        with open(f"{_TASKS}/{task}/stat") as file:
            return file.read().rpartition(") ")[2][:1]
    except OSError:
        return ""
