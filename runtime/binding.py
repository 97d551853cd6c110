"""A stage at known sizes (`Binding`), the memory of one run at a time (`Slot`), and both together.

A `Context` is the step table of one binding over one slot's memory. Slots are pooled, so as many
runs as there are slots go on at once, and a model keeps one arena per concurrent run however many
shapes it sees.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxjit.runtime import layout
from onnxjit.runtime.executor_source import (
    ARRAY,
    ARRAY_BYTES,
    CONTEXT,
    CONTEXT_BYTES,
    MAX_CHUNKS,
    ROW,
    ROW_BYTES,
)
from onnxjit.runtime.results import Results
from onnxjit.runtime.stages import Stage
from onnxjit.runtime.threads import aligned

# One core's pace, used only to decide how far to split a step: too low splits steps that are too
# small.
FLOPS_PER_NS = 16.0
BYTES_PER_NS = 8.0
NS_PER_TILE = 1000.0  # where a step gives no cost
PARALLEL_NS = 2000.0  # below, the 0.3 us of meeting the other threads do not pay
CHUNK_NS = 1500.0
WAKE_NS = 20_000.0  # waking a parked worker takes this long or longer
QUICK_NS = 2000.0  # runs shorter than this keep the GIL: handing it over would take longer

HUGE_PAGE = 2 << 20
MAX_CONTEXTS = 128


class Binding:
    """Everything of a stage that follows from the sizes: shared, read-only, by all its contexts."""

    def __init__(self, stage: Stage, values: np.ndarray, kernels: np.ndarray, threads: int) -> None:
        """`values`: the stage's table at these sizes; `kernels`: int64 address per native step."""
        self.stage = stage
        self.kernels = kernels
        self.ints = values[stage.ints]
        self.flops, self.bytes = values[stage.flops], values[stage.bytes]
        self.offsets, self.arena_bytes = stage.layout.place(self._arena_sizes(values))
        self.use_offset = values[stage.use_offset]
        self.scratch_bytes = -int(-values[stage.scratch].max(initial=0) // 64) * 64
        self.shapes = {b: tuple(values[at].tolist()) for b, at in stage.shapes.items()}
        self.byte_offsets = {b: int(values[at]) for b, at in stage.offsets.items()}
        self._split(values[stage.tiles], values[stage.rounds], threads)
        self.threads = threads if bool((self.chunks > 1).any()) else 1
        self.attempt: Callable[[tuple[Any, ...]], list[Any] | None] | None = None

    def _arena_sizes(self, values: np.ndarray) -> np.ndarray:
        sizes = values[self.stage.arena_bytes]
        if len(self.stage.extents):
            root, offset, nbytes = self.stage.extents.T
            np.maximum.at(sizes, root, values[offset] + values[nbytes])
        return sizes

    def _split(self, tiles: np.ndarray, rounds: np.ndarray, threads: int) -> None:
        tiles, rounds = np.maximum(tiles, 0), np.maximum(rounds, 1)
        cost = np.maximum(self.flops / FLOPS_PER_NS, self.bytes / BYTES_PER_NS)
        cost = np.where(cost > 0, cost, tiles * NS_PER_TILE)
        self.wake = cost >= WAKE_NS
        total = float(cost.sum())
        # Within a round all is as for a step of its own.
        share, cost = tiles // rounds, cost / rounds
        most = np.minimum(share, MAX_CHUNKS)
        chunks = np.minimum(most, (cost / CHUNK_NS).astype(np.int64))
        split = (cost >= PARALLEL_NS) & (chunks > 1) & (threads > 1)
        size = -(-share // np.where(split, chunks, 1))
        self.tiles = tiles
        self.round = share
        self.chunk = size
        self.chunks = np.where(split, -(-share // np.maximum(size, 1)), 1)
        self.quick = not split.any() and total < QUICK_NS


class Slot:
    """Memory that one run uses at a time, and the contexts made over it."""

    __slots__ = ("arena", "contexts", "results", "scratch")

    def __init__(self) -> None:
        self.arena = aligned(0)
        self.scratch = aligned(0)
        self.contexts: dict[Binding, Context] = {}
        self.results = Results()

    def context(self, binding: Binding, constants: np.ndarray, pool: int) -> Context:
        """The context of a binding; growing the memory discards those of the old memory."""
        found = self.contexts.get(binding)
        if found is not None:
            return found
        if binding.arena_bytes > len(self.arena):
            self.contexts.clear()
            # A little more each time, so that slowly growing shapes do not allocate at every step.
            nbytes = max(binding.arena_bytes, len(self.arena) * 5 // 4)
            self.arena = aligned(nbytes, HUGE_PAGE if nbytes >= HUGE_PAGE else 64)
        if binding.scratch_bytes * binding.threads > len(self.scratch):
            self.contexts.clear()
            self.scratch = aligned(binding.scratch_bytes * binding.threads)
        if len(self.contexts) >= MAX_CONTEXTS:
            self.contexts.clear()
        found = self.contexts[binding] = Context(self, binding, constants, pool)
        return found


class Context:
    """Tables of one run at a time.

    `table` is what each kernel's pointer arguments are read from.
    """

    def __init__(self, slot: Slot, binding: Binding, constants: np.ndarray, pool: int) -> None:
        """`constants`: int64 address per buffer id, 0 where it is not a constant."""
        stage = self.stage = binding.stage
        self.binding = binding
        steps = len(stage.steps)
        self.arena, self.scratch = slot.arena, slot.scratch
        base = constants.copy()
        base[stage.arena] = self.arena.ctypes.data + binding.offsets
        self.table = base[stage.use_root] + binding.use_offset
        self._rows = aligned(steps * ROW_BYTES)
        self.header = aligned(CONTEXT_BYTES).view(np.int64)
        self.address = self.header.ctypes.data

        def put(name: str, value: int) -> None:
            self.header[CONTEXT[name] // 8] = value

        self.header[:] = 0
        put("ROWS", self._rows.ctypes.data)
        put("LAST", steps)
        put("STEPS", steps)
        put("THREADS", binding.threads)
        put("POOL", pool)
        put("SCRATCH", self.scratch.ctypes.data)
        put("SCRATCH_STRIDE", binding.scratch_bytes)
        rows = self._rows.view(np.int64).reshape(steps, ROW_BYTES // 8)
        columns = {
            "KERNEL": binding.kernels,
            "PTRS": self.table.ctypes.data + 8 * stage.first_use,
            "INTS": binding.ints.ctypes.data + 8 * stage.first_int,
            "TILES": binding.tiles,
            "CHUNK": binding.chunk,
            "CHUNKS": binding.chunks,
            "WAKE": binding.wake,
            "CONTEXT": self.address,
            "ROUND": binding.round,
        }
        for name, column in columns.items():
            rows[:, ROW[name] // 8] = column
        self._keep: list[np.ndarray] = []
        self.call: Callable[..., bool] | None = None

    def enter_by(
        self, address: int, inputs: Sequence[tuple[int, np.dtype]], outputs: Sequence[int]
    ) -> Callable[..., bool]:
        """The native way in, which checks and reads array arguments itself (needs `layout.TABLE`).

        address: `onnxjit_run`. inputs: (buffer id, dtype) in the order of the arguments; outputs:
        buffer ids. The answer takes a tuple and a list of arrays and is False if they do not fit.
        """
        assert layout.TABLE is not None
        dtypes = [id(dtype) for _, dtype in inputs]
        shapes = [self.binding.shapes[b] for b, _ in inputs]
        for name, buffers in (("INPUT", [b for b, _ in inputs]), ("OUTPUT", list(outputs))):
            table = np.zeros((len(buffers), ARRAY_BYTES // 8), np.int64)
            for i, b in enumerate(buffers):
                uses = self.stage.outside_uses[b]
                patches = np.empty((len(uses), 2), np.int64)
                patches[:, 0] = self.table.ctypes.data + 8 * uses
                patches[:, 1] = self.binding.use_offset[uses]
                self._keep.append(patches)
                table[i, ARRAY["PATCH_COUNT"] // 8] = len(uses)
                table[i, ARRAY["PATCHES"] // 8] = patches.ctypes.data
                if name == "INPUT":
                    shape = np.array(shapes[i], np.int64)
                    self._keep.append(shape)
                    table[i, ARRAY["DTYPE"] // 8] = dtypes[i]
                    table[i, ARRAY["RANK"] // 8] = len(shape)
                    table[i, ARRAY["SHAPE"] // 8] = shape.ctypes.data
            self._keep.append(table)
            self.header[CONTEXT[f"{name}_COUNT"] // 8] = len(buffers)
            self.header[CONTEXT[f"{name}S"] // 8] = table.ctypes.data
        self.header[CONTEXT["LAYOUT"] // 8] = layout.TABLE.ctypes.data
        self.header[CONTEXT["QUICK"] // 8] = self.binding.quick
        self.call = layout.builtin(address, self.header)
        return self.call

    def patch(self, root: int, address: int) -> None:
        """Point every use of a buffer that lives outside the context at `address`."""
        uses = self.stage.outside_uses.get(root)
        if uses is not None and len(uses):
            self.table[uses] = address + self.binding.use_offset[uses]

    def forget(self) -> None:
        """The native executor's record of addresses no longer holds after `patch`."""
        for name in ("INPUT", "OUTPUT"):
            count = int(self.header[CONTEXT[f"{name}_COUNT"] // 8])
            start = int(self.header[CONTEXT[f"{name}S"] // 8]) + ARRAY["SEEN"]
            for i in range(count):
                ctypes.c_int64.from_address(start + i * ARRAY_BYTES).value = 0

    def limit(self, begin: int, end: int) -> None:
        """Which steps the next native call runs."""
        self.header[CONTEXT["FIRST"] // 8] = begin
        self.header[CONTEXT["LAST"] // 8] = end

    def profile(self, on: bool) -> np.ndarray | None:
        """Start or end recording.

        The int64 buffer holds 2 times a step, then busy ns[thread][step].
        """
        at = CONTEXT["PROFILE"] // 8
        if not on:
            self.header[at] = 0
            return None
        times = np.zeros(len(self.stage.steps) * (2 + self.binding.threads), np.int64)
        self.header[at] = times.ctypes.data
        return times
