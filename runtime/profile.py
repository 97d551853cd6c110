"""Step times of one run, next to what the plan says about each step's work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnxjit.runtime.binding import Binding


class StepTime(NamedTuple):
    """One step of one run. `seconds` is wall time; `busy` is each thread's time in the kernel;
    `start` is in seconds after the run's first step began."""

    name: str
    kernel: str
    seconds: float
    flops: int
    bytes: int
    tiles: int
    chunks: int
    busy: tuple[float, ...]
    start: float = 0.0

    @property
    def gflops(self) -> float:
        """GFLOP/s, 0 where the plan gives no operation count."""
        return self.flops / self.seconds * 1e-9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """GB/s, 0 where the plan gives no byte count."""
        return self.bytes / self.seconds * 1e-9 if self.seconds else 0.0


class Record(NamedTuple):
    """What some steps of a stage left behind.

    Labels and costs per step, and the raw clock values.
    """

    names: Sequence[str]
    kernels: Sequence[str]
    flops: np.ndarray
    bytes: np.ndarray
    tiles: np.ndarray
    chunks: np.ndarray
    times: np.ndarray  # int64 ns: (start, end) per step, then busy per thread and step


def native_record(binding: Binding, begin: int, end: int, times: np.ndarray) -> Record:
    """The record of native steps [begin, end) of a stage, from the clock values of all of it."""
    steps, span = binding.stage.steps, slice(begin, end)
    count = len(steps)
    busy = times[2 * count :].reshape(-1, count)[:, span]
    return Record(
        [s.name for s in steps[span]],
        [s.kernel for s in steps[span]],
        binding.flops[span],
        binding.bytes[span],
        binding.tiles[span],
        binding.chunks[span],
        np.concatenate([times[2 * begin : 2 * end], busy.ravel()]),
    )


def host_record(name: str, function: str, start: int, end: int) -> Record:
    """The record of one host step, from clock values in ns; what it computes is not known."""
    nothing, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    times = np.array([start, end, end - start], np.int64)
    return Record([name], [function], nothing, nothing, one, one, times)


def step_times(records: Sequence[Record]) -> list[StepTime]:
    """Rows in the order in which the steps ran."""
    rows = []
    first = min((int(r.times[0]) for r in records if len(r.names)), default=0)
    for record in records:
        steps = len(record.names)
        spans = record.times[: 2 * steps].reshape(steps, 2)
        seconds = (spans[:, 1] - spans[:, 0]) * 1e-9
        busy = record.times[2 * steps :].reshape(-1, steps).T * 1e-9 if steps else seconds
        rows += [
            StepTime(
                record.names[i],
                record.kernels[i],
                float(seconds[i]),
                int(record.flops[i]),
                int(record.bytes[i]),
                int(record.tiles[i]),
                int(record.chunks[i]),
                tuple(busy[i].tolist()),
                float(spans[i, 0] - first) * 1e-9,
            )
            for i in range(steps)
        ]
    return rows


def table(rows: Sequence[StepTime]) -> str:
    """The rows as text, slowest first, with each one's share of the total."""
    total = sum(row.seconds for row in rows) or 1.0
    lines = [f"{'step':<40} {'us':>10} {'%':>6} {'GFLOP/s':>9} {'GB/s':>8} {'chunks':>7}"]
    lines += [
        f"{row.name or row.kernel:<40.40} {row.seconds * 1e6:>10.2f} "
        f"{row.seconds / total * 100:>6.1f} {row.gflops:>9.2f} {row.gbytes:>8.2f} {row.chunks:>7}"
        for row in sorted(rows, key=lambda row: -row.seconds)
    ]
    return "\n".join(lines)
