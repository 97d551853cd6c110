"""Schedule for running sums and products: reductions over all positions up to that of the result.

The definition asks for each result anew (or for each block of results and for what lies before the
block); here the axis is walked in order and the last result is kept, one operation for each. Along
a contiguous axis that is a chain of additions in a register, across it a line of vectors in L1.
8 rows of 2048 take 21 µs for 519 (one core of Zen 3; ONNX Runtime 69).
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    ZERO,
    Apply,
    Axis,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    as_int,
    axes_of,
    fresh_axis,
    index,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import rename_axes
from onnxjit.codegen.loops import Assign, For, If, Local, LoopNest, Stmt, Store
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    ceil_div,
    coefficient,
    without,
)
from onnxjit.codegen.schedule.borders import conjuncts, slack
from onnxjit.codegen.schedule.pointwise import finish_nest, rename_statement, with_tiles
from onnxjit.codegen.schedule.reduction import combine, guarded, identity, replace_node
from onnxjit.codegen.schedule.request import Declined, Request, single_stage

LANES = 256
"""Neighbouring results that are computed side by side, 1 KB of float32 for each reduction."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A reduction of `body` at all values of `over` up to `axis`, or with `exclusive` before it."""

    red: Reduce
    axis: Axis
    over: Axis
    exclusive: bool
    body: Expr


def scan(r: Request) -> LoopNest:
    """A single stage all of whose reductions run up to the place of the result."""
    s = single_stage(r)
    reds = [x for x in walk(s.value) if isinstance(x, Reduce)]
    if not reds or any(len(x.axes) != 1 for x in reds):
        raise Declined("not reductions over one axis each")
    for flip in (None, *s.axes):
        turned = s if flip is None else flipped(s, flip)
        whole, limit = blocks(turned)
        found = prefixes(whole)
        if found is not None:
            return nest(r, whole, found, limit)
    raise Declined("not reductions up to the place of the result")


# --- recognition -------------------------------------------------------------------------------


def flipped(s: FlatStage, a: Axis) -> FlatStage:
    """The stage with an axis counted from its end."""
    back = fresh_axis(a.extent)
    return replaced(s, a, [back], apply("max", a.extent - 1, 0) - back)


def replaced(s: FlatStage, a: Axis, by: list[Axis], value: Expr) -> FlatStage:
    k = s.axes.index(a)
    table: dict[Expr, Expr] = {a: value}
    axes = (*s.axes[:k], *by, *s.axes[k + 1 :])
    return FlatStage(s.buffer, axes, substitute(s.offset, table), substitute(s.value, table))


def blocks(s: FlatStage) -> tuple[FlatStage, dict[Axis, Expr]]:
    """The stage with an axis that is divided by a constant as two, and how far the inner goes."""
    for x in walk(s.value):
        if not (isinstance(x, Apply) and x.fn == "floordiv" and x.dtype == INDEX):
            continue
        a, size = x.args
        if not isinstance(a, Axis) or a not in s.axes or as_int(size) is None:
            continue
        outer, inner = fresh_axis(ceil_div(a.extent, as_int(size) or 1)), fresh_axis(size)
        here = replaced(s, a, [outer, inner], outer * size + inner)
        return here, {inner: apply("min", size, a.extent - outer * size)}
    return s, {}


def prefixes(s: FlatStage) -> list[Prefix] | None:
    """Its reductions, None where one of them is something else."""
    out: list[Prefix] = []
    for red in [x for x in walk(s.value) if isinstance(x, Reduce)]:
        (over,) = red.axes
        guard, body = guarded(red)
        bounds = list(conjuncts(guard)) if guard is not None else []
        mine = [e for e in bounds if over in axes_of(e)]
        room = slack(mine[0]) if len(mine) == len(bounds) == 1 else None
        if room is None or as_int(coefficient(room, over) or ZERO) != -1:
            return None
        places = [a for a in s.axes if a in axes_of(room)]
        if len(places) != 1 or coefficient(room, places[0]) is not ONE:
            return None
        (place,) = places
        first = as_int(without(room, [over, place]))
        if first not in (0, -1) or place in axes_of(body):
            return None
        least, most = as_int(place.extent), as_int(over.extent)
        if place.extent is not over.extent and (least is None or most is None or most < least):
            return None
        out.append(Prefix(red, place, over, first == -1, body))
    return out


# --- construction ------------------------------------------------------------------------------


def nest(r: Request, s: FlatStage, found: list[Prefix], limit: dict[Axis, Expr]) -> LoopNest:
    order = by_stride(s.axes, s.offset)
    places = {p.axis for p in found} | set(limit)
    walked = [a for a in order if a in places]
    for p in found:
        later = walked[walked.index(p.axis) + 1 :]
        if any(a in axes_of(p.body) for a in later):
            raise Declined("what is reduced depends on a place inside")
    lane = order[-1] if order[-1] not in places else None
    outer = [a for a in order if a not in places and a is not lane]
    names: dict[Expr, Expr] = {}
    for a in [*outer, *walked, *([lane] if lane is not None else []), *(p.over for p in found)]:
        names[a] = Axis(f"i{len(names)}", rename_axes(a.extent, names))
    v = Var("lane")
    tiled = [rename_axes(a, names) for a in outer]
    here: dict[Expr, Expr] = {}
    count: Expr = ONE
    if lane is not None:
        cb = Axis("cb", ceil_div(lane.extent, LANES))
        tiled.append(cb)
        here[names[lane]] = cb * LANES + v
        count = apply("min", LANES, lane.extent - cb * LANES)

    def named(e: Expr) -> Expr:
        return substitute(rename_axes(e, names), here)

    def lanes(s: Stmt) -> Stmt:
        return s if lane is None else For(v, ZERO, count, (s,))

    locals_: list[Local] = []
    reset: dict[Axis, list[Stmt]] = {a: [] for a in walked}
    update: dict[Axis, list[Stmt]] = {a: [] for a in walked}
    value = s.value
    for n, p in enumerate(found):
        fn, dtype = p.red.fn, p.red.dtype
        acc = Var(f"acc{n}", dtype)
        kept: Expr = acc if lane is None else Load(acc.name, (v,), dtype)

        def put(e: Expr, acc: Var = acc) -> Stmt:
            return Assign(acc, e) if lane is None else Store(acc.name, v, e)

        if lane is not None:
            locals_.append(Local(acc.name, dtype, index(LANES)))
        reset[p.axis].append(lanes(put(identity(fn, dtype))))
        at = p.axis - 1 if p.exclusive else p.axis
        more = lanes(put(combine(fn, kept, named(substitute(p.body, {p.over: at})))))
        if p.exclusive:
            more = If(apply("lt", 0, named(p.axis)), (more,))
        update[p.axis].append(more)
        value = replace_node(value, p.red, Var(f"acc_value{n}", dtype))
        here[Var(f"acc_value{n}", dtype)] = kept
    body: tuple[Stmt, ...] = (lanes(Store(s.buffer, named(s.offset), named(value))),)
    for a in reversed(walked):
        stop = named(limit.get(a, a.extent))
        axis = names[a]
        assert isinstance(axis, Axis)
        body = (*reset[a], For(axis, ZERO, stop, (*update[a], *body)))
    axes = [a for a in tiled if isinstance(a, Axis) and a.extent is not ONE]
    if lane is not None and cb.extent is ONE:
        body = tuple(rename_statement(x, {cb: ZERO}) for x in body)
    body, tiles = with_tiles(axes, body) if axes else (body, ONE)
    return finish_nest(r, body, tiles, "scan", locals=tuple(locals_))


__all__ = ["scan"]
