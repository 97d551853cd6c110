"""Which build process gets which job."""

from __future__ import annotations

import threading

from onnxjit.codegen.build_queue import JobQueue, template_name


def test_order_of_jobs() -> None:
    queue: JobQueue[str] = JobQueue()
    for item in ("a1", "b5", "a2", "b3", "c4", "b4"):
        queue.put(item, item[0], int(item[1]))
    first: set[str] = set()
    second: set[str] = set()
    takers = [first, second, first, second, first, second]
    # The longest of a new template; then the process's own; then what others have begun.
    assert [queue.take(own) for own in takers] == ["b5", "c4", "a2", "b4", "b3", "a1"]
    assert first == {"a", "b"} and second == {"a", "b", "c"}


def test_take_waits_and_ends_with_the_queue() -> None:
    queue: JobQueue[int] = JobQueue()
    taken: list[int | None] = []
    threads = [
        threading.Thread(target=lambda: taken.append(queue.take(set())), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    queue.put(7, "", 0)
    while not taken:
        pass
    queue.close()
    for thread in threads:
        thread.join(10)
    assert sorted(taken, key=str) == [7, None, None]
    queue.put(8, "", 0)
    assert queue.take(set()) is None


def test_template_name() -> None:
    a = template_name("x1[i*3 + 4] = call_6x16(1.5)", ["call_6x16"])
    assert a == template_name("x1[i*77 + 1] = call_4x8(1.5)", ["call_4x8"])
    assert a != template_name("x2[i*3 + 4] = call_6x16(1.5)", ["call_6x16"])
    assert a != template_name("x1[i*3 + 4] = call_6x16(2.5)", ["call_6x16"])
