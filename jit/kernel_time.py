"""The time that one kernel takes by itself, measured through the same executor as a model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.bench import Timing, take_turns
from onnxjit.codegen.build import Builder
from onnxjit.codegen.evaluate import evaluate_int
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.compiler import submit_executor
from onnxjit.kernel_run import Problem
from onnxjit.runtime.executor import Executable
from onnxjit.runtime.link import link
from onnxjit.runtime.plan import Buffer, Plan, Step

if TYPE_CHECKING:
    from onnxjit.codegen.cache import Cache
    from onnxjit.kernel_source import Built

CALL_SECONDS = 200e-6
"""A call repeats the kernel for about this long, so that entering it does not count."""

MOST_REPEATS = 2000

MOST_SLOTS = 16
"""Arrays of one input that a call is given: more cost time to enter."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Seconds of one execution of a kernel: the least and the median over `runs` calls.

    `flops` and `bytes` (each input and output counted once) are those of its definition.
    """

    minimum: float
    median: float
    runs: int
    flops: int
    bytes: int

    @property
    def gflops(self) -> float:
        """GFLOP/s at the least time."""
        return self.flops / self.minimum * 1e-9

    @property
    def gbytes(self) -> float:
        """GB/s at the least time."""
        return self.bytes / self.minimum * 1e-9


def time_kernels(
    problem: Problem,
    built: Mapping[str, Built],
    threads: int,
    seconds: float,
    cache: Cache | None,
) -> dict[str, KernelTime]:
    """Time kernels of one signature in turns on the same data, for about `seconds` in all.

    The data is the same in each execution, so what fits into the caches is read from there.
    """
    made = {name: timed_call(problem, one, threads, cache) for name, one in built.items()}
    timings = take_turns({name: call for name, (call, _) in made.items()}, seconds)
    kernel = problem.signature.definition
    flops, nbytes = (evaluate_int(e, problem.sizes) for e in (kernel.flops(), kernel.bytes_moved()))

    def each(timing: Timing, repeats: int) -> KernelTime:
        return KernelTime(
            timing.minimum / repeats, timing.median / repeats, timing.runs, flops, nbytes
        )

    return {name: each(timings[name], repeats) for name, (_, repeats) in made.items()}


def timed_call(
    problem: Problem,
    built: Built,
    threads: int,
    cache: Cache | None,
    arrays: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> tuple[Callable[[], Any], int]:
    """A call that executes the kernel several times, and how often.

    `arrays` are what the inputs hold, as the kernel gets them: several of an input are taken in
    turns, one for each execution, so that they come from as far away as all of them together.
    """
    if arrays is None:
        params = problem.signature.params
        arrays = {p.buffer: [problem.physical(p.buffer)] for p in params if not p.written}
    with Builder(jobs=0, cache=cache) as builder:
        executor = submit_executor(builder)()
    library = link([built.image, *built.tiles.values(), executor])
    fixed = [of[0] for of in arrays.values() if len(of) == 1]
    turning = [of for of in arrays.values() if len(of) > 1]
    copies = min(map(len, turning), default=1)

    def executable(repeats: int) -> tuple[Executable, list[list[np.ndarray]]]:
        slots = min(repeats, copies, MOST_SLOTS)
        plan = _plan(problem, built.symbol, repeats, arrays, slots)
        groups = [
            [of[group * slots + slot] for of in turning for slot in range(slots)]
            for group in range(copies // slots)
        ]
        return Executable(plan, library, fixed, threads), groups

    once, groups = executable(1)
    once(*groups[0])
    spent = min(once.profile(group)[1][0].seconds for group in (groups * 3)[:3])
    repeats = int(min(max(CALL_SECONDS / max(spent, 1e-9), 1), MOST_REPEATS))
    several, groups = executable(repeats)
    if len(groups) == 1 and not groups[0]:
        return several, repeats
    turns = itertools.cycle(groups)
    return lambda: several(*next(turns)), repeats


def _plan(
    problem: Problem,
    symbol: str,
    repeats: int,
    arrays: Mapping[str, Sequence[np.ndarray]],
    slots: int,
) -> Plan:
    """Inputs as constants, or `slots` of each as the plan's inputs where they take turns; outputs
    in the arena: nothing is allocated while the clock runs."""
    kernel = problem.signature.definition
    buffers: list[Buffer] = []
    places: list[list[int]] = []
    for p in problem.signature.params:
        places.append([len(buffers)])
        if p.written:
            nbytes = problem.memory(p.buffer) * numpy_dtype(p.dtype).itemsize
            buffers.append(Buffer("arena", p.dtype, nbytes))
            continue
        held = arrays[p.buffer]
        if len(held) == 1:
            buffers.append(Buffer("constant", p.dtype, held[0].nbytes))
            continue
        places[-1] = list(range(len(buffers), len(buffers) + slots))
        buffers += [Buffer("input", p.dtype, held[0].nbytes, held[0].shape)] * slots
    steps = [
        Step(
            symbol,
            tuple(place[slot % len(place)] for place in places),
            tuple(problem.ints.tolist()),
            problem.tiles,
            problem.scratch_bytes,
            problem.rounds,
            evaluate_int(kernel.flops(), problem.sizes),
            evaluate_int(kernel.bytes_moved(), problem.sizes),
            kernel.name,
        )
        for slot in range(min(slots, repeats))
    ]
    inputs = tuple(n for n, b in enumerate(buffers) if b.kind == "input")
    chosen = tuple(itertools.islice(itertools.cycle(steps), repeats))
    return Plan(tuple(buffers), chosen, inputs, ())
