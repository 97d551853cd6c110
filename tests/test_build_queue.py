"""Which job comes first."""

from __future__ import annotations

import threading

from onnxjit.codegen.build_queue import JobQueue


def test_the_longest_comes_first_and_equal_ones_in_order() -> None:
    queue: JobQueue[str] = JobQueue()
    for item in ("a1", "b5", "a2", "b3", "c4", "b4"):
        queue.put(item, int(item[1]))
    assert [queue.take() for _ in range(6)] == ["b5", "c4", "b4", "b3", "a2", "a1"]


def test_take_waits_and_ends_with_the_queue() -> None:
    queue: JobQueue[int] = JobQueue()
    taken: list[int | None] = []
    threads = [
        threading.Thread(target=lambda: taken.append(queue.take()), daemon=True) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    queue.put(7, 0)
    while not taken:
        pass
    queue.close()
    for thread in threads:
        thread.join(10)
    assert sorted(taken, key=str) == [7, None, None]
    queue.put(8, 0)
    assert queue.take() is None
