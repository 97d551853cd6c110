"""The time that one kernel takes by itself, measured through the same executor as a model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxjit.bench import Timing, take_turns
from onnxjit.codegen.evaluate import evaluate_int
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.target import host
from onnxjit.compiler import executor_object
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
    made = {name: _calls(problem, one, threads, cache) for name, one in built.items()}
    timings = take_turns({name: call for name, (call, _) in made.items()}, seconds)
    kernel = problem.signature.definition
    flops, nbytes = (evaluate_int(e, problem.sizes) for e in (kernel.flops(), kernel.bytes_moved()))

    def each(timing: Timing, repeats: int) -> KernelTime:
        return KernelTime(
            timing.minimum / repeats, timing.median / repeats, timing.runs, flops, nbytes
        )

    return {name: each(timings[name], repeats) for name, (_, repeats) in made.items()}


def _calls(
    problem: Problem, built: Built, threads: int, cache: Cache | None
) -> tuple[Callable[[], Any], int]:
    """A call that executes the kernel several times, and how often."""
    objects = [built.image, *built.tiles.values(), executor_object(host(), cache)]
    library = link(objects)
    constants = [problem.physical(p.buffer) for p in problem.signature.params if not p.written]
    once = Executable(_plan(problem, built.symbol, 1), library, constants, threads)
    once()
    spent = min(once.profile(())[1][0].seconds for _ in range(3))
    repeats = int(min(max(CALL_SECONDS / max(spent, 1e-9), 1), MOST_REPEATS))
    return Executable(_plan(problem, built.symbol, repeats), library, constants, threads), repeats


def _plan(problem: Problem, symbol: str, repeats: int) -> Plan:
    """Inputs as constants, outputs in the arena: nothing is allocated while the clock runs."""
    buffers = []
    for p in problem.signature.params:
        if p.written:
            nbytes = problem.memory(p.buffer) * numpy_dtype(p.dtype).itemsize
        else:
            nbytes = problem.physical(p.buffer).nbytes
        buffers.append(Buffer("arena" if p.written else "constant", p.dtype, nbytes))
    kernel = problem.signature.definition
    step = Step(
        symbol,
        tuple(range(len(buffers))),
        tuple(problem.ints.tolist()),
        problem.tiles,
        problem.scratch_bytes,
        problem.rounds,
        evaluate_int(kernel.flops(), problem.sizes),
        evaluate_int(kernel.bytes_moved(), problem.sizes),
        kernel.name,
    )
    return Plan(tuple(buffers), (step,) * repeats, (), ())
