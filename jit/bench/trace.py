"""A profiled run in the Trace Event Format, which Perfetto and chrome://tracing open.

A thread's bar begins with the step and lasts as long as the thread computed in it: when a thread
took its parts within the step is not recorded.
"""

from __future__ import annotations

from typing import Any

from onnxjit.bench.kernels import KernelTable


def trace(table: KernelTable, model: str) -> dict[str, Any]:
    """The trace as plain data: one process, one thread for each of the run's, times in us."""
    threads = max((len(row.busy) for row in table.rows), default=1)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"onnxjit: {model}"}}
    ]
    for number in range(threads):
        name = "calling thread" if number == 0 else f"worker {number}"
        label = {"name": name}
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": label})
    for row in table.rows:
        facts = {
            "rule": row.rule,
            "nodes": ", ".join(row.origin),
            "limit": row.limit,
            "FLOP": row.flops,
            "bytes": row.bytes,
            "GFLOP/s": round(row.gflops, 2),
            "GB/s": round(row.gbytes, 2),
            "share of the run": round(row.share, 5),
            "share of the roofline": None if row.of_roof is None else round(row.of_roof, 3),
        }
        for number, seconds in enumerate(row.busy):
            if seconds > 0:
                events.append(
                    {"ph": "X", "pid": 1, "tid": number, "name": row.name, "cat": row.limit,
                     "ts": row.start * 1e6, "dur": seconds * 1e6, "args": facts}
                )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ns"}
