"""CUDA schedule for recurrences: a block computes all steps of one direction of one row.

The block's threads share the elements of every stage of a step and meet before the next one. States
are in global memory, which a block sees as it has written it; what only one step needs is in shared
memory.
"""

from __future__ import annotations

from onnxjit.codegen.expr import ZERO, Const, Expr, Load, Var, as_int, index, map_loads, substitute
from onnxjit.codegen.kernel import Stage
from onnxjit.codegen.loops import Assign, Barrier, For, Local, LoopNest, Stmt, Store
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.schedule.axes import flat_offset
from onnxjit.codegen.schedule.cuda_rows import SHARED_TOTAL
from onnxjit.codegen.schedule.cuda_threads import block_threads, over_threads, positions
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.recurrence_match import STEP, Product, recognise
from onnxjit.codegen.schedule.request import Declined, Request


def recurrence(r: Request) -> LoopNest:
    """Steps over a clock: LSTM, GRU, RNN."""
    found = recognise(r)
    threads = block_threads(r)
    types, layouts = r.kernel.types, r.layouts
    unit = found.unit
    units = as_int(unit.extent)
    if units is None:
        raise Declined("the number of units is not constant")
    at = Var("e")
    locals_: dict[str, Local] = {}

    def read(x: Load) -> Expr:
        if x.buffer not in locals_:
            where = flat_offset(x.index, types[x.buffer], layouts.get(x.buffer))
            return Load(x.buffer, (where,), x.dtype)
        group = x.index[2] if len(x.index) == 4 else ZERO
        return Load(x.buffer, (group * units + unit,), x.dtype)

    def elements(s: Stage) -> tuple[Stmt, ...]:
        value = map_loads(s.value, read)
        if s.buffer in r.kernel.outputs:
            where = flat_offset(s.store, types[s.buffer], layouts.get(s.buffer), clamp=False)
        else:
            where = unit
            locals_[s.buffer] = Local(s.buffer, types[s.buffer].dtype, index(units), False)
        table: dict[Expr, Expr] = {unit: at}
        store = Store(s.buffer, substitute(where, table), substitute(value, table))
        return over_threads(at, index(units), threads, store), Barrier()

    def sums(q: Product) -> tuple[Stmt, ...]:
        count = index(q.groups * units)
        dtype = types[q.buffer].dtype
        locals_[q.buffer] = Local(q.buffer, dtype, count, False)
        sets, table = positions([q.group, unit], at)
        acc = Var("acc", dtype)
        x, y = (substitute(read(v), table) for v in (q.x, q.y))
        step = For(q.k, ZERO, q.k.extent, (Assign(acc, acc + x * y),))
        work = (*sets, Assign(acc, Const(0.0, dtype)), step, Store(q.buffer, at, acc))
        return over_threads(at, count, threads, *work), Barrier()

    steps: list[Stmt] = []
    for p in found.phases:
        for q in p.products:
            steps += sums(q)
        for s in p.stages:
            steps += elements(s)
    body: list[Stmt] = [x for s in found.before for x in elements(s)]
    assert isinstance(STEP, Var)
    body.append(For(STEP, ZERO, found.count, tuple(steps)))
    body += [x for s in found.after for x in elements(s)]
    sizes = ((as_int(x.count) or 0) * numpy_dtype(x.dtype).itemsize for x in locals_.values())
    if sum(sizes) > SHARED_TOTAL:
        raise Declined("a step's sums do not fit into shared memory")
    nest, tiles = with_tiles([found.direction, found.row], tuple(body))
    return finish_nest(
        r, nest, tiles, "recurrence: one block a row",
        locals=tuple(locals_.values()), threads=threads,
    )  # fmt: skip


__all__ = ["recurrence"]
