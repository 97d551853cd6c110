"""Every kernel of a model against the machine's roofline: where the time goes, and what limits it.

A kernel cannot take less than its operations at the peak for its dtype, nor less than its bytes at
the bandwidth of where they lie: that is its *roof*, the greater of the two. Constants come from the
level that holds all that one run touches, since the rest of the run has been over the caches since;
other bytes come from the level that holds the kernel's own. Bytes count every operand once, so a
kernel that reads only some rows of a table (Gather) can seem faster than the memory.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52 (4), 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.bench.roofline import Roofline
from onnxjit.runtime.plan import Plan, Step

if TYPE_CHECKING:
    from onnxjit.compiled import CompiledModel
    from onnxjit.runtime.profile import StepTime

# A step this short that could take less than half of the time is bound by being a step: the call,
# the hand-over to other threads and the clock around it.
_SHORT = 1.5e-6


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One step. `seconds` is its least time, `share` that of the run; rates are GFLOP/s and GB/s,
    `intensity` is FLOP per byte (None without bytes). `roof` is the least time that the machine
    allows, `of_roof` that over `seconds` (None for steps whose work is not known). `limit` is
    "compute", "<level> bandwidth", "overhead" or "host step". `start` and `busy` (each thread's
    seconds in the kernel) are those of the fastest run."""

    name: str
    rule: str
    origin: tuple[str, ...]
    dtype: str
    seconds: float
    share: float
    flops: int
    bytes: int
    gflops: float
    gbytes: float
    intensity: float | None
    roof: float
    of_roof: float | None
    level: str
    limit: str
    start: float
    wall: float
    busy: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class KernelTable:
    """The steps of a model in running order; `seconds` is the sum of their least times, `run` the
    wall time of the fastest profiled run, of `runs`."""

    rows: tuple[KernelRow, ...]
    seconds: float
    run: float
    runs: int

    def slowest(self) -> list[KernelRow]:
        """The rows by falling time."""
        return sorted(self.rows, key=lambda row: -row.seconds)

    def limits(self) -> dict[str, float]:
        """The share of the run by what limits it, greatest first."""
        found: dict[str, float] = {}
        for row in self.rows:
            found[row.limit] = found.get(row.limit, 0.0) + row.share
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "limits": self.limits()}


def kernel_table(
    model: CompiledModel, arrays: Sequence[Any], machine: Roofline, runs: int = 10
) -> KernelTable:
    """Profile `runs` runs on `arrays` (in the model's order of inputs) and judge every step."""
    if runs < 1:
        raise ValueError(f"runs must be positive, not {runs}")
    outputs, _ = model.timed(arrays)
    tables = [model.timed(arrays)[1] for _ in range(runs)]
    spans = [rows[-1].start + rows[-1].seconds if rows else 0.0 for rows in tables]
    fastest = tables[int(np.argmin(spans))]
    least = [min(steps, key=lambda s: s.seconds) for steps in zip(*tables, strict=True)]
    shapes = tuple(np.shape(a) for a in arrays)
    plan = model.plan_for(shapes)
    constants, dtypes = _constants(plan), _dtypes(plan)
    touched = sum(plan_bytes(plan)) + model.arena_bytes()
    touched += sum(np.asarray(a).nbytes for a in [*arrays, *outputs])
    total = sum(step.seconds for step in least) or 1.0
    kernels = model.kernels
    rows = []
    for step, shown in zip(least, fastest, strict=True):
        kernel = kernels.get(step.name)
        dtype = dtypes.get(step.name, "")
        fixed = min(constants.get(step.name, 0), step.bytes)
        roof, level, limit = _roof(step, dtype, fixed, touched, machine)
        known = bool(step.flops or step.bytes)
        rows.append(
            KernelRow(
                name=step.name or step.kernel,
                rule=kernel.rule if kernel else "host step",
                origin=tuple(kernel.origin) if kernel else (),
                dtype=dtype,
                seconds=step.seconds,
                share=step.seconds / total,
                flops=step.flops,
                bytes=step.bytes,
                gflops=step.gflops,
                gbytes=step.gbytes,
                intensity=step.flops / step.bytes if step.bytes else None,
                roof=roof,
                of_roof=roof / step.seconds if known and step.seconds else None,
                level=level,
                limit=limit if step.name in dtypes else "host step",
                start=shown.start,
                wall=shown.seconds,
                busy=shown.busy,
            )
        )
    return KernelTable(tuple(rows), total, min(spans), runs)


def _roof(
    step: StepTime, dtype: str, fixed: int, touched: int, machine: Roofline
) -> tuple[float, str, str]:
    """(least seconds, level of memory that matters most, what limits the step)."""
    outer = machine.level(touched)
    inner = machine.level(step.bytes)
    of_constants = fixed / outer.best
    of_values = (step.bytes - fixed) / inner.best
    memory = of_constants + of_values
    compute = step.flops / machine.peak(dtype)
    level = (outer if of_constants > of_values else inner).level
    roof = max(compute, memory)
    if step.seconds < _SHORT and roof < step.seconds / 2:
        return roof, level, "overhead"
    return roof, level, "compute" if compute >= memory else f"{level} bandwidth"


def plan_bytes(plan: Plan) -> list[int]:
    """Bytes of each constant buffer."""
    return [_number(plan.buffers[b].nbytes) for b in plan.constants()]


def _constants(plan: Plan) -> dict[str, int]:
    """Bytes of the distinct constants that each step reads, by its name."""
    found = {}
    for step in plan.steps:
        if isinstance(step, Step):
            roots = {_root(plan, b) for b in step.buffers}
            fixed = [plan.buffers[b] for b in roots if plan.buffers[b].kind == "constant"]
            found[step.name] = sum(_number(buffer.nbytes) for buffer in fixed)
    return found


def _dtypes(plan: Plan) -> dict[str, str]:
    """The dtype that each step's arithmetic has: the widest float among its buffers, else that of
    the first."""
    found = {}
    for step in plan.steps:
        if isinstance(step, Step):
            kinds = [plan.buffers[b].dtype for b in step.buffers]
            floats = [k for k in ("float64", "float32", "float16", "bfloat16") if k in kinds]
            found[step.name] = (floats or kinds or ["float32"])[0]
    return found


def _root(plan: Plan, buffer: int) -> int:
    while (alias := plan.buffers[buffer].alias) is not None:
        buffer = alias.buffer
    return buffer


def _number(size: int | str) -> int:
    return size if isinstance(size, int) else 0  # a constant's size is a number
