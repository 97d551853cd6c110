"""Schedule for depthwise convolutions on channels-last data: rows of pixels over a micro-kernel.

Matched by structure: one `sum` over at most two tap axes of `x * w`, where the innermost output
axis (the channels) is contiguous in x, w and the result, and w depends on nothing else but the
taps. One tile is one row of output pixels and a block of channels: the micro-kernel leaves the sums
of the row in L1, from where the output stage's own expression stores them. Padding is read as a
condition on the taps; a pixel at the border has fewer of them, so no condition is left inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from onnxjit.codegen import microkernel_depthwise as microkernel
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
    index,
    loads,
    substitute,
    walk,
)
from onnxjit.codegen.loops import Address, Assign, Call, For, Local, LoopNest, Stmt, Store
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    coefficient,
    flatten_stage,
    magnitude,
    split_axes,
    without,
)
from onnxjit.codegen.schedule.pointwise import finish_nest, rename, with_tiles
from onnxjit.codegen.schedule.reduction import guarded, ordered_reduction, replace_node
from onnxjit.codegen.schedule.request import Declined, Request

SUMS = 4096
"""Sums of a tile: 16 KB, half of L1, beside the rows of x."""

MOST_SUMS = 16384
"""Sums of a tile whose rows are long: 64 KB, which L2 holds."""

CHANNELS = 64
"""Channels of a tile where rows are long or of unknown length: whole pages are then read in few
pieces, which the hardware's prefetchers follow."""

STEPS = 4
"""Largest stride and dilation along a row."""


@dataclass(frozen=True, slots=True)
class Taps:
    """A tap axis and the bounds that padding sets: `axis` runs over [first, first + count)."""

    axis: Axis
    first: Expr
    count: Expr


@dataclass(frozen=True, slots=True)
class Depthwise:
    """What the rule found, over canonical axes. `column` is the axis along which pixels are
    neighbours: a step along it moves `stride` of the units of which a tap moves `dilation`."""

    outer: tuple[Axis, ...]
    column: Axis
    lane: Axis
    row: Taps | None
    tap: Taps
    x: Load
    w: Load
    unit: Expr
    stride: int
    dilation: int
    interior: tuple[Expr, Expr]
    offset: Expr
    value: Expr
    reduce: Reduce


def depthwise(r: Request) -> LoopNest:
    """A single stage that sums products of a window of x with one filter a channel."""
    k = r.kernel
    if len(k.stages) != 1:
        raise Declined("more than one stage")
    s = split_axes(flatten_stage(k.stages[0], k.types, r.layouts))
    d = recognise(s)
    isa = microkernel.isa_for(as_int(d.lane.extent) or 0, r.target)
    if isa is None:
        raise Declined("fewer channels than a vector holds")
    return nest(r, s.buffer, d, isa)


# --- recognition -------------------------------------------------------------------------------


def recognise(s: FlatStage) -> Depthwise:
    found = [x for x in walk(s.value) if isinstance(x, Reduce)]
    if len(found) != 1 or found[0].fn != "sum" or found[0].dtype != "float32":
        raise Declined("not one sum of float32 values")
    order = by_stride(s.axes, s.offset)
    if len(order) < 2 or len(found[0].axes) > 2:
        raise Declined("no window over an image")
    taps = ordered_reduction(found[0])
    names, (offset, value) = rename([*order, *taps], [s.offset, s.value], "i")
    (red,) = [x for x in walk(value) if isinstance(x, Reduce)]
    lane, outer, taps = names[len(order) - 1], names[: len(order) - 1], names[len(order) :]
    guard, body = guarded(red)
    if not (isinstance(body, Apply) and body.fn == "mul"):
        raise Declined("not a sum of products")
    x, w = operands(body, set(outer))
    unit_lanes = all(coefficient(e, lane) is ONE for e in (offset, x.index[0], w.index[0]))
    if not unit_lanes or as_int(lane.extent) is None:
        raise Declined("channels are not contiguous")
    tap = taps[-1]
    column, stride, dilation, unit = neighbours(x.index[0], tap, outer)
    width = as_int(tap.extent)
    if width is None or width > microkernel.WIDEST:
        raise Declined("the window's width is not a small constant")
    row = taps[0] if len(taps) == 2 else None
    for e in (x.index[0], w.index[0]):
        if any(coefficient(e, a) is None for a in (column, *taps)):
            raise Declined("an index is not affine in the window")
    bounds = bounds_of(guard)
    for axis, slack in bounds:
        allowed = {axis, column} if axis is tap else {axis, *outer} - {column}
        if axis not in taps or not axes_of(slack) <= allowed:
            raise Declined("a border condition of more than one direction")
    return Depthwise(
        tuple(a for a in outer if a is not column),
        column,
        lane,
        limits(row, bounds) if row is not None else None,
        limits(tap, bounds),
        x,
        w,
        unit,
        stride,
        dilation,
        inside(tap, width, column, bounds),
        offset,
        value,
        red,
    )


def operands(body: Apply, outer: set[Axis]) -> tuple[Load, Load]:
    """x and w: w is the factor that no output axis but the channels selects."""
    plain = [a for a in body.args if isinstance(a, Load) and not loads(a.index[0])]
    if len(plain) != 2 or any(a.dtype != "float32" for a in plain):
        raise Declined("a factor is not a plain read of float32 values")
    fixed = [a for a in plain if not axes_of(a.index[0]) & outer]
    if len(fixed) != 1:
        raise Declined("no factor that all pixels share")
    return next(a for a in plain if a is not fixed[0]), fixed[0]


def neighbours(x: Expr, tap: Axis, outer: list[Axis]) -> tuple[Axis, int, int, Expr]:
    """The output axis that moves through x as the taps do, with both steps and their unit."""
    step = coefficient(x, tap)
    if step is None or step is ZERO:
        raise Declined("the window's columns do not move through x")
    steps = [(a, c) for a in outer if (c := coefficient(x, a)) is not None and c is not ZERO]
    for a, c in sorted(steps, key=lambda item: magnitude(item[1])):
        for stride in range(1, STEPS + 1):
            for dilation in range(1, STEPS + 1):
                if c * dilation is step * stride:
                    unit = apply("floordiv", step, dilation)
                    return a, stride, dilation, unit
    raise Declined("no output axis moves through x as the window's columns do")


Bound = tuple[Axis | None, Expr]
"""A tap axis and what must not be negative."""


def bounds_of(guard: Expr | None) -> list[Bound]:
    """The comparisons of a condition, each with the tap axis (of the axes i0, i1, … a last one)
    that it bounds."""
    out: list[Bound] = []

    def collect(e: Expr) -> None:
        if isinstance(e, Apply) and e.fn == "logical_and":
            for a in e.args:
                collect(a)
        elif isinstance(e, Apply) and e.fn in ("lt", "le") and e.args[0].dtype == INDEX:
            a, b = e.args
            # a < b and a <= b as 0 <= slack
            slack = b - a - (1 if e.fn == "lt" else 0)
            found = sorted(axes_of(slack), key=lambda x: int(x.name[1:]))
            out.append((found[-1] if found else None, slack))
        else:
            raise Declined("a condition that is no comparison of indices")

    if guard is not None:
        collect(guard)
    return out


def limits(axis: Axis, bounds: list[Bound]) -> Taps:
    """The taps of a pixel that read inside of x."""
    first: Expr = ZERO
    stop: Expr = axis.extent
    for a, slack in bounds:
        if a is not axis:
            continue
        c, rest = affine(slack, axis)
        if c > 0:
            first = apply("max", first, apply("floordiv", c - 1 - rest, c))
        else:
            stop = apply("min", stop, apply("floordiv", rest, -c) + 1)
    return Taps(axis, first, apply("max", stop - first, 0))


def inside(tap: Axis, width: int, column: Axis, bounds: list[Bound]) -> tuple[Expr, Expr]:
    """The pixels of a row [low, high) all of whose taps read inside of x."""
    low: Expr = ZERO
    high: Expr = column.extent
    for a, slack in bounds:
        if a is not tap:
            continue
        worst = substitute(slack, {tap: index(0 if affine(slack, tap)[0] > 0 else width - 1)})
        c = as_int(coefficient(worst, column) or ZERO) or 0
        rest = without(worst, [column])
        if c > 0:
            low = apply("max", low, apply("floordiv", c - 1 - rest, c))
        elif c < 0:
            high = apply("min", high, apply("floordiv", rest, -c) + 1)
        else:
            raise Declined("a border that does not depend on the column")
    low = apply("max", apply("min", low, column.extent), 0)
    return low, apply("max", low, high)


def affine(slack: Expr, axis: Axis) -> tuple[int, Expr]:
    c = coefficient(slack, axis)
    n = as_int(c) if c is not None else None
    if not n:
        raise Declined("a border condition that is not affine in the window")
    return n, without(slack, [axis])


# --- construction ------------------------------------------------------------------------------


def nest(r: Request, buffer: str, d: Depthwise, isa: str) -> LoopNest:
    lanes = microkernel.ISAS[isa].lanes
    channels = as_int(d.lane.extent) or 0
    columns = as_int(d.column.extent)
    most = r.choice("channels", CHANNELS, (32, 128))
    if columns is not None:
        most = max(min(most, MOST_SUMS // max(1, columns)), SUMS // max(1, columns), lanes)
    width = channel_block(channels, most, lanes)
    blocks = -(-channels // width)
    block = Axis("cb", blocks)
    c0: Expr = block * width if blocks > 1 else ZERO
    count: Expr = index(width)
    if channels % width:
        count = apply("min", count, channels - c0)
    sums = d.column.extent * width
    size = as_int(sums)
    local = Local("acc", "float32", sums, size is not None and size <= SUMS)

    width_taps = as_int(d.tap.axis.extent) or 0
    first_row: Expr = Var("row0") if d.row is not None else ZERO
    rows: Expr = Var("rows") if d.row is not None else ONE
    step_x: Expr = ZERO
    step_w: Expr = ZERO
    setup: list[Stmt] = []
    if d.row is not None:
        a = d.row.axis
        step_x = coefficient(d.x.index[0], a) or ZERO
        step_w = coefficient(d.w.index[0], a) or ZERO
        setup = [Assign(Var("row0"), d.row.first), Assign(Var("rows"), d.row.count)]
    tap_w = coefficient(d.w.index[0], d.tap.axis) or ZERO

    def call(symbol: str, at: Expr, tap0: Expr, taps: Expr, pixel: Expr, rows: Expr = rows) -> Call:
        table: dict[Expr, Expr] = {d.column: at, d.lane: c0, d.tap.axis: tap0}
        if d.row is not None:
            table[d.row.axis] = first_row
        return Call(
            symbol,
            (
                Address(d.x.buffer, substitute(d.x.index[0], table)),
                step_x,
                pixel,
                rows,
                Address(d.w.buffer, substitute(d.w.index[0], table)),
                step_w,
                tap_w,
                taps,
                Address("acc", at * width),
                index(width),
                count,
            ),
        )

    symbols: list[str] = []

    def border(start: Expr, stop: Expr) -> list[Stmt]:
        """Pixel by pixel, with the taps that read inside of x."""
        if start is stop:
            return []
        symbol = microkernel.border(isa)
        symbols.append(symbol)
        at, tap0, taps = Var("px"), Var("tap0"), Var("taps")
        here: dict[Expr, Expr] = {d.column: at}
        # The micro-kernel takes one tap at least; a window that lies outside has no rows.
        some = rows * apply("min", taps, 1)
        code = call(symbol, at, tap0, taps, d.unit * d.dilation, some)
        bounds = (
            Assign(tap0, substitute(d.tap.first, here)),
            Assign(taps, substitute(d.tap.count, here)),
        )
        return [For(at, start, stop, (*bounds, code))]  # type: ignore[arg-type]

    low, high = d.interior
    pixels = as_int(high - low)
    step = microkernel.choose_pixels(pixels, isa, width_taps, d.stride, d.dilation)
    body: list[Stmt] = [*setup, *border(ZERO, low)]

    def whole(count_: int, at: Expr) -> Call:
        symbol = microkernel.depthwise(count_, width_taps, d.stride, d.dilation, isa)
        symbols.append(symbol)
        return call(symbol, at, ZERO, index(width_taps), d.unit)

    if pixels is None:
        steps = apply("floordiv", high - low, step)
        body.append(For(Var("pb"), ZERO, steps, (whole(step, low + Var("pb") * step),)))
        body += border(low + steps * step, d.column.extent)
    else:
        if pixels >= step:
            body.append(
                For(Var("pb"), ZERO, index(pixels // step), (whole(step, low + Var("pb") * step),))
            )
        if pixels % step:
            body.append(whole(pixels % step, low + pixels // step * step))
        body += border(high, d.column.extent)

    p, v = Var("px"), Var("ch")
    value = replace_node(d.value, d.reduce, Load("acc", (p * width + v,), "float32"))
    here: dict[Expr, Expr] = {d.column: p, d.lane: c0 + v}
    store = Store(buffer, substitute(d.offset, here), substitute(value, here))
    body.append(For(p, ZERO, d.column.extent, (For(v, ZERO, count, (store,)),)))
    outer = [*d.outer, block] if blocks > 1 else list(d.outer)
    statements, tiles = with_tiles(outer, tuple(body)) if outer else (tuple(body), ONE)
    note = f"{step} pixels a step, {width} channels a tile"
    return finish_nest(
        r, statements, tiles, "depthwise",
        locals=(local,), symbols=tuple(dict.fromkeys(symbols)), notes=(note,),
    )  # fmt: skip


def channel_block(channels: int, most: int, lanes: int) -> int:
    """Channels of a tile, about `most`: equal blocks of whole vectors where there are such, else
    blocks of which the last one is smaller, though no smaller than a vector."""
    if channels <= most:
        return channels
    equal = [w for w in range(lanes, most + 1, lanes) if channels % w == 0]
    if equal and 2 * equal[-1] > most:
        return equal[-1]
    for blocks in range(ceil(channels / most), 1, -1):
        width = ceil(channels / (blocks * lanes)) * lanes
        if width * (blocks - 1) + lanes <= channels:
            return width
    return channels


__all__ = ["depthwise"]
