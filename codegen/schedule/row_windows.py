"""Schedule for windows of row-major data that are sums, maxima and the like: pools.

Such a window is joined in two passes: its rows element by element into one padded line in L1, by
reads that are contiguous whatever the stride, and then the columns of that line, without border
conditions. So 3 x 3 elements take 6 reads, and with stride 2 few shuffles. On an AVX2 core (Zen 3),
against a loop over 9 taps whose sums lie in memory: the maximum of 3 x 3 with stride 2 over 64
planes of 112 x 112 takes 0.12 ms for 1.02, the mean over 3 x 3 of 256 planes of 28 x 28 0.11 for
0.73.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    TRUE,
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
    index,
    loads,
    map_loads,
    rewrite,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import product
from onnxjit.codegen.loops import Assign, For, If, Local, LoopNest, Stmt, Store, loop
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    coefficient,
    typical,
    without,
)
from onnxjit.codegen.schedule.borders import conjuncts, slack
from onnxjit.codegen.schedule.pointwise import (
    finish_nest,
    inner_loops,
    rename,
    rename_statement,
    tile_axes,
    with_tiles,
)
from onnxjit.codegen.schedule.reduction import (
    STEPS,
    UNROLL,
    combine,
    guarded,
    identity,
    ordered_reduction,
    replace_node,
    written_out,
)
from onnxjit.codegen.schedule.request import Declined, Request, single_stage

BLOCK = 256
"""Columns of results at a time: with the largest stride two lines of them are kept."""

LINES = 2048
"""Elements of the lines that are kept at a time, 8 KB of float32."""

LINE = Var("line")
"""Which of them."""

FEWEST = 8
"""Columns of results below which vectors of them are not worth while."""


@dataclass(frozen=True, slots=True)
class Window:
    """A window over lines of x: the result in `column` joins the elements
    column * stride + tap * dilation of a line that itself joins lines, one for each of `rows`.

    Of the line the elements [low, high) exist, where `guard` (of the rows alone) holds.
    """

    outer: list[Axis]
    column: Axis
    rows: list[Axis]
    tap: Axis
    stride: int
    dilation: int
    low: Expr
    high: Expr
    guard: Expr
    body: Expr
    offset: Expr
    value: Expr
    red: Reduce


def row_windows(r: Request) -> LoopNest:
    """A single stage that reduces windows which run along contiguous lines of x and of y."""
    stage = single_stage(r)
    return nest(r, stage.buffer, recognise(stage))


# --- recognition -------------------------------------------------------------------------------


def recognise(s: FlatStage) -> Window:
    found = [x for x in walk(s.value) if isinstance(x, Reduce)]
    order = by_stride(s.axes, s.offset)
    if len(found) != 1 or not order:
        raise Declined("not one reduction")
    taps = ordered_reduction(found[0])
    names, (offset, value) = rename([*order, *taps], [s.offset, s.value], "i")
    (red,) = [x for x in walk(value) if isinstance(x, Reduce)]
    column, taps = names[len(order) - 1], names[len(order) :]
    if (as_int(column.extent) or FEWEST) < FEWEST:
        raise Declined("lines are too short")
    if (as_int(product(a.extent for a in taps[:-1])) or UNROLL + 1) > UNROLL:
        raise Declined("too many rows of a window, or a number that is not known")
    if (as_int(taps[-1].extent) or UNROLL + 1) > UNROLL:
        raise Declined("too many columns of a window, or a number that is not known")
    tap = taps[-1]
    guard, body = guarded(red)
    if len(taps) == 1 and guard is None:
        raise Declined("no rows to join, and no border")
    if coefficient(offset, column) is not ONE:
        raise Declined("results are not contiguous")
    stride, dilation = steps(body, column, tap)
    low, high, rest = bounds(guard, column, tap, stride, dilation)
    return Window(
        names[: len(order) - 1], column, taps[:-1], tap, stride, dilation,
        low, high, rest, body, offset, value, red,
    )  # fmt: skip


def steps(body: Expr, column: Axis, tap: Axis) -> tuple[int, int]:
    """How far neighbouring results and taps are apart in each read that moves with them."""
    found: set[tuple[int | None, int | None]] = set()
    for x in loads(body):
        pair = [coefficient(x.index[0], a) for a in (column, tap)]
        found.add((as_int(pair[0]) if pair[0] else None, as_int(pair[1]) if pair[1] else None))
    moving = found - {(0, 0)}
    if len(moving) != 1:
        raise Declined("reads that do not move as one window")
    ((stride, dilation),) = moving
    if not stride or not dilation or not (0 < stride <= STEPS and 0 < dilation <= STEPS):
        raise Declined("the window does not run along contiguous lines")
    if {column, tap} & axes_of(map_loads(body, lambda _: ZERO)):
        raise Declined("what is reduced depends on its place")
    return stride, dilation


def bounds(
    guard: Expr | None, column: Axis, tap: Axis, stride: int, dilation: int
) -> tuple[Expr, Expr, Expr]:
    """A border condition as the part of a line that exists, [low, high), and what is left of it."""
    low: Expr = ZERO
    high: Expr = (column.extent - 1) * stride + ((as_int(tap.extent) or 0) - 1) * dilation + 1
    rest: Expr = TRUE
    for e in conjuncts(guard) if guard is not None else ():
        if not {column, tap} & axes_of(e):
            rest = apply("logical_and", rest, e)
            continue
        room = slack(e)
        pair = [coefficient(room, a) for a in (column, tap)] if room is not None else []
        if room is None or any(c is None for c in pair):
            raise Declined("a border condition that is not affine in the window")
        fixed = without(room, [column, tap])
        sign = {(stride, dilation): 1, (-stride, -dilation): -1}.get(
            tuple(as_int(c) for c in pair if c is not None)  # type: ignore[arg-type]
        )
        if sign is None or axes_of(fixed):
            raise Declined("a border condition of more than one direction")
        if sign > 0:
            low = apply("max", low, -fixed)
        else:
            high = apply("min", high, fixed + 1)
    return low, high, rest


# --- construction ------------------------------------------------------------------------------


def nest(r: Request, buffer: str, d: Window) -> LoopNest:
    columns, taps = as_int(d.column.extent), as_int(d.tap.extent) or 0
    whole = columns is not None and columns <= BLOCK
    most = columns if whole and columns is not None else BLOCK
    pitch = (most - 1) * d.stride + (taps - 1) * d.dilation + 1
    lines = max(1, LINES // pitch)
    outer = list(d.outer)
    here: dict[Expr, Expr] = {}
    height: Expr = ONE
    if outer:
        # Lines of neighbouring results, as many as L1 keeps.
        a = outer.pop()
        lines = min(lines, as_int(a.extent) or lines)
        blocks = Axis("rb", (a.extent + (lines - 1)) // lines)
        here[a] = blocks * lines + LINE
        height = index(lines)
        if (as_int(a.extent) or 1) % lines or as_int(a.extent) is None:
            height = apply("min", lines, a.extent - blocks * lines)
        outer.append(blocks)
    else:
        lines = 1
        here[LINE] = ZERO
    start: Expr = ZERO
    count: Expr = d.column.extent
    if not whole:
        blocks = Axis("cb", (d.column.extent + (BLOCK - 1)) // BLOCK)
        outer.append(blocks)
        start = blocks * BLOCK
        count = apply("min", BLOCK, d.column.extent - start)
    outer = [a for a in outer if a.extent is not ONE]
    width = (count - 1) * d.stride + (taps - 1) * d.dilation + 1
    # Where the line begins and ends to exist, of the elements that its windows read.
    setup: list[Stmt] = []
    edges: list[Expr] = []
    for name, edge in (("first", d.low), ("last", d.high)):
        least = edges[0] if edges else ZERO
        value = apply("max", apply("min", edge - start * d.stride, width), least)
        if as_int(value) is None:
            setup.append(Assign(Var(name), value))
            value = Var(name)
        edges.append(value)
    first, last = edges
    w = Var("w")
    nothing = Store("acc", LINE * pitch + w, identity(d.red.fn, d.red.dtype))
    ends = [For(w, low, high, (nothing,)) for low, high in ((ZERO, first), (last, width))]
    joined = joined_rows(d, pitch, first, last, start)
    results = joined_columns(d, buffer, pitch, start, count)
    # All rows before all columns: a vector of a line that was stored just now, cut elsewhere, waits
    # until the stores have reached L1 (the means above take 0.16 ms line by line).
    body = tuple(
        For(LINE, ZERO, height, tuple(rename_statement(x, here) for x in part))
        for part in ([*ends, *joined], results)
    )
    work = typical(product(a.extent for a in d.rows)) * most * d.stride * lines
    split = tile_axes(outer, work)
    statements, tiles = with_tiles(outer[:split], inner_loops(outer[split:], *setup, *body))
    gone: dict[Expr, Expr] = {Axis(n, ONE): ZERO for n in ("rb", "cb")}
    statements = tuple(rename_statement(x, gone) for x in statements)
    local = Local("acc", d.red.dtype, index(lines * pitch))
    return finish_nest(r, statements, tiles, "row windows", locals=(local,))


def joined_rows(d: Window, pitch: int, first: Expr, last: Expr, start: Expr) -> list[Stmt]:
    """The rows of a window in one line: as one expression where all of them are inside."""
    w = Var("w")
    fn, dtype = d.red.fn, d.red.dtype
    here: dict[Expr, Expr] = {d.column: start, d.tap: ZERO}
    # A read at column * stride + tap * dilation is `w` further on than at the start of the line.
    moved = map_loads(d.body, lambda x: shifted(x, d, w))
    element = substitute(moved, here)
    at = LINE * pitch + w
    total, inside = written_out(d.red, d.rows, d.guard, element)
    fast: tuple[Stmt, ...] = (For(w, first, last, (Store("acc", at, total),)),)
    if inside is TRUE:
        return list(fast)
    more = Store("acc", at, combine(fn, Load("acc", (at,), dtype), element))
    slow: tuple[Stmt, ...] = (If(d.guard, (For(w, first, last, (more,)),)),)
    for a in reversed(d.rows):
        slow = (loop(a, *slow),)
    clear = For(w, first, last, (Store("acc", at, identity(fn, dtype)),))
    return [If(inside, fast, (clear, *slow))]


def shifted(x: Load, d: Window, w: Expr) -> Expr | None:
    if coefficient(x.index[0], d.column) is ZERO:
        return None
    return Load(x.buffer, (x.index[0] + w,), x.dtype)


def joined_columns(d: Window, buffer: str, pitch: int, start: Expr, count: Expr) -> list[Stmt]:
    """Results from the line, in three loops where the ends of a row have an expression of their
    own: the mean of what is inside of x divides by a number of elements that is the same between.
    """
    v = Var(d.column.name)
    total: Expr | None = None
    for k in range(as_int(d.tap.extent) or 0):
        one = Load("acc", (LINE * pitch + v * d.stride + k * d.dilation,), d.red.dtype)
        total = one if total is None else combine(d.red.fn, total, one)
    assert total is not None
    mark = Var("acc_value", d.red.dtype)
    value = replace_node(d.value, d.red, mark)

    def columns(low: Expr, high: Expr, value: Expr) -> For:
        here: dict[Expr, Expr] = {d.column: start + v}
        store = substitute(substitute(value, here), {mark: total})
        return For(v, low, high, (Store(buffer, substitute(d.offset, here), store),))

    low, high, between = middle(value, d.column)
    if start is not ZERO or between is value:
        return [columns(ZERO, count, value)]
    ends = [columns(ZERO, index(low), value), columns(index(high), count, value)]
    return [ends[0], columns(index(low), index(high), between), ends[1]]


def middle(value: Expr, column: Axis) -> tuple[int, int, Expr]:
    """`value` with each minimum and maximum of indices replaced by the side that it has in the
    middle of a line, and the columns [low, high) where that is right."""
    n = as_int(column.extent)
    if n is None:
        return 0, 0, value
    low, high = 0, n

    def decided(x: Expr) -> Expr | None:
        nonlocal low, high
        if not (isinstance(x, Apply) and x.fn in ("min", "max") and x.dtype == INDEX):
            return None
        if column not in axes_of(x):
            return None
        more = x.args[0] - x.args[1]
        step = as_int(coefficient(more, column) or ZERO)
        rest = as_int(without(more, [column]))
        if not step or rest is None:
            return None
        positive = step * (n // 2) + rest >= 0
        if not positive:
            step, rest = -step, -rest
        # Now step * column + rest >= 0 is what has to hold; where it is 0, both sides are right.
        if step > 0:
            low = max(low, -(rest // step))
        else:
            high = min(high, rest // -step + 1)
        return x.args[0] if positive == (x.fn == "max") else x.args[1]

    between = rewrite(value, decided)
    return low, high, between


__all__ = ["row_windows"]
