"""Schedule for kernels of several stages that share rows: softmax, layer norm and their like.

All stages agree on some leading *row* axes; reductions run inside a row only. One tile computes
whole rows, so a row is read from memory once and its temporaries stay in L1.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Expr,
    Load,
    Reduce,
    Var,
    as_int,
    axes_of,
    index,
    loads,
    map_loads,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Stage, product, rename_axes
from onnxjit.codegen.loops import Assign, Local, LoopNest, Stmt, Store
from onnxjit.codegen.schedule.axes import (
    by_stride,
    drop_unit,
    flat_offset,
    join_loops,
    typical,
)
from onnxjit.codegen.schedule.pointwise import GRAIN, finish_nest, inner_loops, with_tiles
from onnxjit.codegen.schedule.reduction import accumulate, replace_node
from onnxjit.codegen.schedule.request import Declined, Request

STACK_BYTES = 16384
"""Largest row temporary on the stack; longer or symbolic rows use the thread's scratch memory."""


def rows(r: Request) -> LoopNest:
    """Any number of stages whose temporaries are all local to a row."""
    k = r.kernel
    shared, named = align_rows(k.stages, set(k.outputs))
    final = named[-1]
    where = flat_offset(final.store, k.types[final.buffer], r.layouts.get(final.buffer), False)
    order = by_stride([a for a in shared if a.extent is not ONE], where)
    canonical = {a: Axis(f"i{n}", a.extent) for n, a in enumerate(order)}
    table: dict[Expr, Expr] = {a: axis for a, axis in canonical.items()}
    table.update({a: ZERO for a in shared if a.extent is ONE})

    body: list[Stmt] = []
    locals_: list[Local] = []
    scalars: dict[str, Var] = {}
    counter = len(order)
    temps = set(k.temporaries)
    inner_work: Expr = ONE
    for n, s in enumerate(named):
        inner = [a for a in s.axes if a not in shared and a.extent is not ONE]
        gone: dict[Expr, Expr] = {a: ZERO for a in s.axes if a.extent is ONE}
        value = substitute(drop_unit(s.value), gone)
        value = local_loads(value, temps, scalars, k, shared)
        value = flatten_loads_except(value, r, temps)
        reds = [x for x in walk(value) if isinstance(x, Reduce)]
        fresh: dict[Axis, Axis] = {}
        for a in [*inner, *(a for x in reds for a in x.axes)]:
            fresh[a] = Axis(f"i{counter}", a.extent)
            counter += 1
        both = table | {a: axis for a, axis in fresh.items()}
        value = rename_axes(value, both)
        reds = [x for x in walk(value) if isinstance(x, Reduce)]
        nested = [x for x in reds if any(isinstance(y, Reduce) for y in walk(x.body))]
        if nested:
            raise Declined("a reduction inside a reduction")
        stmts: list[Stmt] = []
        for m, red in enumerate(reds):
            if any(a in axes_of(red) for a in fresh.values() if a not in red.axes):
                raise Declined("a reduction that varies inside the row")
            live = [a for a in red.axes if a.extent is not ONE]
            code, acc = accumulate(red, live, f"acc{n}_{m}")
            stmts += code
            value = replace_node(value, red, acc)
            inner_work = inner_work + product(a.extent for a in red.axes)
        loops = [fresh[a] for a in inner]
        if s.buffer in temps:
            if not inner:
                v = Var(f"v{n}", k.types[s.buffer].dtype)
                scalars[s.buffer] = v
                body += [*stmts, Assign(v, value)]
                continue
            count = product(a.extent for a in loops)
            size = as_int(count)
            stack = size is not None and size * 8 <= STACK_BYTES
            locals_.append(Local(s.buffer, k.types[s.buffer].dtype, count, stack))
            loops, at, value = join_loops(loops, row_offset(loops), value)
            body += [*stmts, *inner_loops(loops, Store(s.buffer, at, value))]
        else:
            offset = flat_offset(
                [rename_axes(substitute(i, gone), both) for i in s.store],
                k.types[s.buffer],
                r.layouts.get(s.buffer),
                False,
            )
            loops, offset, value = join_loops(loops, offset, value)
            body += [*stmts, *inner_loops(loops, Store(s.buffer, offset, value))]
        inner_work = inner_work + product(a.extent for a in loops)
    outer = [canonical[a] for a in order]
    split = len(outer)
    while split > 1 and typical(product(a.extent for a in outer[split:]) * inner_work) < GRAIN:
        split -= 1
    nest, tiles = with_tiles(outer[:split], inner_loops(outer[split:], *body))
    return finish_nest(r, nest, tiles, "rows", locals=tuple(locals_))


def row_offset(loops: list[Axis]) -> Expr:
    at: Expr = index(0)
    for a in loops:
        at = at * a.extent + a
    return at


def align_rows(stages: tuple[Stage, ...], outputs: set[str]) -> tuple[list[Axis], list[Stage]]:
    """Renames every stage's row axes to those of the last stage; returns the row axes too."""
    final = stages[-1]
    if any(s.index for s in stages):
        raise Declined("a stage stores through an index map")
    axis_of: dict[str, dict[int, Axis]] = {final.buffer: dict(enumerate(final.axes))}
    done: dict[str, Stage] = {final.buffer: final}
    rows: set[Axis] = set(final.axes)
    buffers = {s.buffer for s in stages}
    for _ in range(len(final.axes) + 2):
        before = set(rows)
        done = {}
        axis_of = {final.buffer: {p: a for p, a in enumerate(final.axes) if a in rows}}
        for s in reversed(stages):
            mapping = axis_of.get(s.buffer)
            if mapping is None:
                if s.buffer not in outputs:
                    raise Declined("a stage that nothing reads")
                mapping = match_output(s, final, rows)
            rows &= set(mapping.values())
            table: dict[Expr, Expr] = {
                s.axes[p]: a for p, a in mapping.items() if s.axes[p] is not a
            }
            named = Stage(
                s.buffer,
                tuple(mapping.get(p, a) for p, a in enumerate(s.axes)),
                rename_axes(s.value, table),
            )
            done[s.buffer] = named
            for x in loads(named.value):
                if x.buffer not in buffers:
                    continue
                found = {p: i for p, i in enumerate(x.index) if isinstance(i, Axis) and i in rows}
                known = axis_of.get(x.buffer)
                if known is not None and known != found:
                    both = {p: a for p, a in known.items() if found.get(p) is a}
                    rows &= set(both.values())
                    found = both
                axis_of[x.buffer] = found
                rows &= set(found.values())
        if rows == before:
            break
    if any(s.buffer not in done for s in stages):
        raise Declined("stages that do not share rows")
    ordered = [a for a in final.axes if a in rows]
    checked = [done[s.buffer] for s in stages]
    for s in checked:
        for red in s.reduces:
            if rows & set(red.axes):
                raise Declined("a row axis is reduced")
    for s in checked:
        if rows - set(s.axes):
            raise Declined(f"stages do not share rows ({len(rows - set(s.axes))} axes differ)")
    return ordered, checked


def match_output(s: Stage, final: Stage, rows: set[Axis]) -> dict[int, Axis]:
    """Row axes of a further output that no stage reads: equal extents in equal positions."""
    out: dict[int, Axis] = {}
    for p, (a, b) in enumerate(zip(s.axes, final.axes, strict=False)):
        if b in rows and a.extent is b.extent:
            out[p] = b
    return out


def local_loads(
    e: Expr, temps: set[str], scalars: Mapping[str, Var], k: object, shared: list[Axis]
) -> Expr:
    """Reads of temporaries become scalars or offsets within the row."""
    from onnxjit.codegen.kernel import Kernel

    assert isinstance(k, Kernel)

    def put(x: Load) -> Expr | None:
        if x.buffer not in temps:
            return None
        if x.buffer in scalars:
            return scalars[x.buffer]
        at: Expr = index(0)
        for i, d in zip(x.index, k.types[x.buffer].shape, strict=True):
            if d is ONE or (isinstance(i, Axis) and i in shared):
                continue
            at = at * d + i
        return Load(x.buffer, (at,), x.dtype)

    return map_loads(e, put)


def flatten_loads_except(e: Expr, r: Request, temps: set[str]) -> Expr:
    """Flat offsets for loads of parameters; loads of row temporaries are flat already."""

    def flat(x: Load) -> Expr | None:
        if x.buffer in temps:
            return None
        t = r.kernel.types[x.buffer]
        return Load(x.buffer, (flat_offset(x.index, t, r.layouts.get(x.buffer)),), x.dtype)

    return map_loads(e, flat)


__all__ = ["rows"]
