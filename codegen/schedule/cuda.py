"""Schedules for CUDA: which thread computes what. A tile is the work of one block of threads.

- `contraction`: a sum of products over a square block of outputs, operands staged in shared
  memory, 4 x 4 outputs a thread;
- `rows`: several stages that share rows (softmax, layer norm), one row a block, or a thread;
- `reduction`: one long contiguous sum, maximum ... an output element, one element a block;
- `elements`: anything else that is one stage or the parts of a concatenation, one output element a
  thread, neighbouring threads on neighbouring elements.
"""

from __future__ import annotations

from onnxjit.codegen.expr import (
    ONE,
    Axis,
    Expr,
    Var,
    apply,
    loads,
)
from onnxjit.codegen.kernel import product
from onnxjit.codegen.loops import (
    THREAD,
    TILE,
    For,
    If,
    LoopNest,
    Stmt,
    Store,
)
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    ceil_div,
    flatten_stage,
    merge_axes,
    split_axes,
)
from onnxjit.codegen.schedule.cuda_contraction import contraction
from onnxjit.codegen.schedule.cuda_rows import reduction, rows
from onnxjit.codegen.schedule.cuda_threads import (
    block_threads,
    numbered,
    positions,
    replaced,
    serial,
)
from onnxjit.codegen.schedule.pointwise import concatenated, finish_nest
from onnxjit.codegen.schedule.request import Declined, Request

ITEMS = 4
"""Outputs of one thread in `elements`; amortises the tile loop."""


def elements(r: Request) -> LoopNest:
    """Stages that read no other stage's result, each output element computed by one thread."""
    k = r.kernel
    made = {s.buffer for s in k.stages}
    if any(x.buffer in made for s in k.stages for x in loads(s.value)):
        raise Declined("a stage reads another stage's result")
    if any(x.buffer in made for s in k.stages for i in s.index for x in loads(i)):
        raise Declined("a stage is placed by another stage's result")
    threads = block_threads(r)
    parts = []
    for n, s in enumerate(k.stages):
        prefix = f"i{n}_" if len(k.stages) > 1 else "i"
        parts.append(piece(flatten_stage(s, k.types, r.layouts), threads, prefix))
    # Only one part runs in a tile, and its loops end before the tile does.
    body, tiles = concatenated(parts)
    return finish_nest(r, body, tiles, "elements", threads=threads)


def piece(s: FlatStage, threads: int, prefix: str) -> tuple[tuple[Stmt, ...], Expr]:
    """The tile body and the number of tiles of one stage."""
    s = split_axes(s)
    s, order = merge_axes(s, by_stride(s.axes, s.offset))
    offset, value, *axes = numbered([s.offset, s.value], order, prefix)
    total = product(a.extent for a in axes if isinstance(a, Axis))
    stmts, value = serial(value, f"acc{prefix}")
    e = Var(f"e{prefix}")
    sets, table = positions([a for a in axes if isinstance(a, Axis)], e)
    work = [*sets, *(replaced(x, table) for x in (*stmts, Store(s.buffer, offset, value)))]
    if not axes:
        return (If(apply("lt", THREAD, 1), tuple(work)),), ONE
    chunk = threads * ITEMS
    stop = apply("min", TILE * chunk + chunk, total)
    return (For(e, TILE * chunk + THREAD, stop, tuple(work), step=threads),), ceil_div(total, chunk)


RULES = (contraction, rows, reduction, elements)

__all__ = ["RULES", "contraction", "elements", "reduction", "rows"]
