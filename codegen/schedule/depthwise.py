"""Schedule for depthwise convolutions and pooling of channels-last data: rows of pixels over a
micro-kernel.

Matched by structure: one `sum` over at most two tap axes of `x * w`, or a `sum` or `max` of x,
where the innermost output axis (the channels) is contiguous in x, w and the result, and w depends
on nothing else but the taps. One tile is one row of output pixels and a block of channels. Padding
is read as a condition on the taps; a pixel at the border has fewer of them, so no condition is left
inside. Where the output stage computes more than the reduction, the micro-kernel leaves the results
of some pixels in L1, from where the stage's own expression stores them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import ceil

from onnxjit.codegen import microkernel_depthwise as microkernel
from onnxjit.codegen.expr import (
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
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Local, LoopNest, Stmt, Store
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    coefficient,
    magnitude,
    without,
)
from onnxjit.codegen.schedule.borders import conjuncts, slack
from onnxjit.codegen.schedule.pointwise import finish_nest, rename, with_tiles
from onnxjit.codegen.schedule.reduction import guarded, ordered_reduction, replace_node
from onnxjit.codegen.schedule.request import Declined, Request, single_stage

SUMS = 4096
"""Sums of a chunk: 16 KB, half of L1, beside the rows of x."""

WIDE = 256
"""Channels of a tile where the micro-kernel stores: whole pages are read and written."""

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
    neighbours: a step along it moves `stride` of the units of which a tap moves `dilation`. The
    next row of pixels reads `fresh` rows of x more, `line` apart."""

    outer: tuple[Axis, ...]
    column: Axis
    lane: Axis
    row: Taps | None
    tap: Taps
    kind: str
    x: Load
    w: Load | None
    unit: Expr
    stride: int
    dilation: int
    line: Expr
    fresh: int
    interior: tuple[Expr, Expr]
    offset: Expr
    value: Expr
    reduce: Reduce


def depthwise(r: Request) -> LoopNest:
    """A single stage that reduces a window of x, or its products with one filter a channel."""
    s = single_stage(r)
    d = recognise(s)
    isa = microkernel.isa_for(as_int(d.lane.extent) or 0, r.target)
    if isa is None:
        raise Declined("fewer channels than a vector holds")
    return WindowNest(r, s.buffer, d, isa).nest()


# --- recognition -------------------------------------------------------------------------------


def recognise(s: FlatStage) -> Depthwise:
    found = [x for x in walk(s.value) if isinstance(x, Reduce)]
    if len(found) != 1 or found[0].fn not in ("sum", "max") or found[0].dtype != "float32":
        raise Declined("not one sum or maximum of float32 values")
    order = by_stride(s.axes, s.offset)
    if len(order) < 2 or len(found[0].axes) > 2:
        raise Declined("no window over an image")
    taps = ordered_reduction(found[0])
    names, (offset, value) = rename([*order, *taps], [s.offset, s.value], "i")
    (red,) = [x for x in walk(value) if isinstance(x, Reduce)]
    lane, outer, taps = names[len(order) - 1], names[: len(order) - 1], names[len(order) :]
    guard, body = guarded(red)
    kind, x, w = operands(red.fn, body, set(outer))
    reads = [e.index[0] for e in (x, w) if e is not None]
    if any(coefficient(e, lane) is not ONE for e in (offset, *reads)) or not as_int(lane.extent):
        raise Declined("channels are not contiguous")
    tap = taps[-1]
    column, stride, dilation, unit = neighbours(x.index[0], tap, outer)
    width = as_int(tap.extent)
    if width is None:
        raise Declined("the window's width is not a constant")
    if w is None and 2 * stride > width * dilation:
        raise Declined("windows share too few columns")
    row = taps[0] if len(taps) == 2 else None
    if any(coefficient(e, a) is None for e in reads for a in (column, *taps)):
        raise Declined("an index is not affine in the window")
    bounds = bounds_of(guard)
    for axis, room in bounds:
        allowed = {axis, column} if axis is tap else {axis, *outer} - {column}
        if axis not in taps or not axes_of(room) <= allowed:
            raise Declined("a border condition of more than one direction")
    line: Expr = ZERO
    fresh = 0
    if row is not None:
        rest = [a for a in outer if a is not column]
        with suppress(Declined):
            _, fresh, _, line = neighbours(x.index[0], row, rest)
    return Depthwise(
        tuple(a for a in outer if a is not column),
        column,
        lane,
        limits(row, bounds) if row is not None else None,
        limits(tap, bounds),
        kind,
        x,
        w,
        unit,
        stride,
        dilation,
        line,
        fresh,
        inside(tap, width, column, bounds),
        offset,
        value,
        red,
    )


def operands(fn: str, body: Expr, outer: set[Axis]) -> tuple[str, Load, Load | None]:
    """The kind of micro-kernel, x, and w: the factor that no output axis but the channels has."""
    pooled = fn == "max" or isinstance(body, Load)
    factors: tuple[Expr, ...] = (body,) if pooled else ()
    if not pooled and isinstance(body, Apply) and body.fn == "mul":
        factors = body.args
    plain = [a for a in factors if isinstance(a, Load) and not loads(a.index[0])]
    if len(plain) != 2 - pooled or any(a.dtype != "float32" for a in plain):
        raise Declined("not a plain read of float32 values, or a product of two")
    if pooled:
        return f"{fn}pool", plain[0], None
    fixed = [a for a in plain if not axes_of(a.index[0]) & outer]
    if len(fixed) != 1:
        raise Declined("no factor that all pixels share")
    return "depthwise", next(a for a in plain if a is not fixed[0]), fixed[0]


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
    for cond in conjuncts(guard) if guard is not None else ():
        room = slack(cond)
        if room is None:
            raise Declined("a condition that is no comparison of indices")
        found = sorted(axes_of(room), key=lambda x: int(x.name[1:]))
        out.append((found[-1] if found else None, room))
    return out


def limits(axis: Axis, bounds: list[Bound]) -> Taps:
    """The taps of a pixel that read inside of x."""
    first: Expr = ZERO
    stop: Expr = axis.extent
    for a, room in bounds:
        if a is not axis:
            continue
        c, rest = affine(room, axis)
        if c > 0:
            first = apply("max", first, apply("floordiv", c - 1 - rest, c))
        else:
            stop = apply("min", stop, apply("floordiv", rest, -c) + 1)
    return Taps(axis, first, apply("max", stop - first, 0))


def inside(tap: Axis, width: int, column: Axis, bounds: list[Bound]) -> tuple[Expr, Expr]:
    """The pixels of a row [low, high) all of whose taps read inside of x."""
    low: Expr = ZERO
    high: Expr = column.extent
    for a, room in bounds:
        if a is not tap:
            continue
        worst = substitute(room, {tap: index(0 if affine(room, tap)[0] > 0 else width - 1)})
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


def affine(room: Expr, axis: Axis) -> tuple[int, Expr]:
    c = coefficient(room, axis)
    n = as_int(c) if c is not None else None
    if not n:
        raise Declined("a border condition that is not affine in the window")
    return n, without(room, [axis])


# --- construction ------------------------------------------------------------------------------


class WindowNest:
    """Builds the nest: chunks of a row, each some border pixels and calls for whole windows, and
    then the output stage's expression where it is more than the reduction."""

    def __init__(self, r: Request, buffer: str, d: Depthwise, isa: str) -> None:
        self.r, self.buffer, self.d, self.isa = r, buffer, d, isa
        self.symbols: list[str] = []
        self.taps = as_int(d.tap.axis.extent) or 0
        self.low, self.high = d.interior
        pixels = as_int(self.high - self.low)
        narrow = self.taps <= microkernel.WIDEST
        self.step = 1
        if narrow:
            self.step = microkernel.choose_pixels(
                d.kind, pixels, isa, self.taps, d.stride, d.dilation
            )
        self.steps = apply("floordiv", self.high - self.low, self.step) if narrow else ZERO
        self.chunks = apply("max", self.steps, 1)
        self.rest = pixels % self.step if narrow and pixels is not None else 0
        # The micro-kernel stores where nothing else is computed.
        ldy = coefficient(d.offset, d.column)
        self.direct = ldy if d.value is d.reduce else None
        self.held = d.column.extent - (self.steps - 1) * self.step
        self.split_channels()

    def split_channels(self) -> None:
        d = self.d
        lanes = microkernel.ISAS[self.isa].lanes
        channels = as_int(d.lane.extent) or 0
        held = as_int(self.held) or 3 * self.step
        most = WIDE if self.direct is not None else max(lanes, SUMS // held)
        most = self.r.choice("channels", most, (32, 128))
        self.width = channel_block(channels, most, lanes)
        blocks = -(-channels // self.width)
        self.block = Axis("cb", blocks)
        self.c0: Expr = self.block * self.width if blocks > 1 else ZERO
        self.count: Expr = index(self.width)
        if channels % self.width:
            self.count = apply("min", self.count, channels - self.c0)
        self.outer = [*d.outer, self.block] if blocks > 1 else list(d.outer)

    def nest(self) -> LoopNest:
        d = self.d
        setup: list[Stmt] = []
        if d.row is not None:
            setup = [Assign(Var("row0"), d.row.first), Assign(Var("rows"), d.row.count)]
        pb = Var("pb")
        last = apply("eq", pb + 1, self.chunks)
        first, stop = Var("first"), Var("stop")
        here = self.low + pb * self.step
        body: list[Stmt] = [
            Assign(first, apply("select", apply("eq", pb, 0), ZERO, here)),
            Assign(stop, apply("select", last, d.column.extent, here + self.step)),
            *self.border(first, self.low),
        ]
        if self.steps is not ZERO:
            whole = self.whole(self.step, here)
            some = as_int(self.steps) is not None
            body.append(whole if some else If(apply("lt", ZERO, self.steps), (whole,)))
        at = self.low + self.steps * self.step
        if self.rest:
            body.append(If(last, (self.whole(self.rest, at),)))
            at = at + self.rest
        body += self.border(at, stop)
        locals_: tuple[Local, ...] = ()
        if self.direct is None:
            body += self.finish()
            sums = self.held * self.width
            size = as_int(sums)
            locals_ = (Local("acc", "float32", sums, size is not None and size <= SUMS),)
        chunks = (*setup, For(pb, ZERO, self.chunks, tuple(body)))
        statements, tiles = with_tiles(self.outer, chunks) if self.outer else (chunks, ONE)
        note = f"{self.step} pixels a step, {self.width} channels a tile"
        return finish_nest(
            self.r, statements, tiles, "depthwise",
            locals=locals_, symbols=tuple(dict.fromkeys(self.symbols)), notes=(note,),
        )  # fmt: skip

    def call(
        self, symbol: str, at: Expr, tap0: Expr, taps: Expr, pixel: Expr, rows: Expr, fresh: int
    ) -> Call:
        self.symbols.append(symbol)
        d = self.d
        table: dict[Expr, Expr] = {d.column: at, d.lane: self.c0, d.tap.axis: tap0}
        if d.row is not None:
            table[d.row.axis] = Var("row0")

        def step(e: Load, taps: Taps | None) -> Expr:
            return (coefficient(e.index[0], taps.axis) or ZERO) if taps is not None else ZERO

        def place(e: Load) -> Address:
            return Address(e.buffer, substitute(e.index[0], table))

        if self.direct is not None:
            y, ldy = Address(self.buffer, substitute(d.offset, table)), self.direct
        else:
            y, ldy = Address("acc", (at - Var("first")) * self.width), index(self.width)
        weights: list[Expr | Address] = [place(d.x), ZERO, ZERO]
        if d.w is not None:
            weights = [place(d.w), step(d.w, d.row), step(d.w, d.tap)]
        return Call(
            symbol,
            (
                place(d.x), step(d.x, d.row), pixel, rows, *weights, taps,
                y, ldy, self.count, d.line, index(fresh),
            ),
        )  # fmt: skip

    def whole(self, count: int, at: Expr) -> Call:
        """`count` pixels whose windows lie inside of x."""
        d = self.d
        symbol = microkernel.pixels(d.kind, count, self.taps, d.stride, d.dilation, self.isa)
        rows = Var("rows") if d.row is not None else ONE
        return self.call(symbol, at, ZERO, index(self.taps), d.unit, rows, d.fresh)

    def border(self, start: Expr, stop: Expr) -> list[Stmt]:
        """Pixel by pixel, with the taps that read inside of x."""
        if stop is ZERO or start is self.d.column.extent:
            return []
        d = self.d
        at, tap0, taps = Var("px"), Var("tap0"), Var("taps")
        here: dict[Expr, Expr] = {d.column: at}
        # The micro-kernel takes one tap at least; a window that lies outside has no rows.
        rows = apply("min", taps, 1) * (Var("rows") if d.row is not None else ONE)
        code = self.call(
            microkernel.border(d.kind, self.isa), at, tap0, taps, d.unit * d.dilation, rows, 0
        )
        bounds = (
            Assign(tap0, substitute(d.tap.first, here)),
            Assign(taps, substitute(d.tap.count, here)),
        )
        return [For(at, start, stop, (*bounds, code))]

    def finish(self) -> list[Stmt]:
        """The output stage's expression on the chunk's results."""
        d = self.d
        p, v = Var("px"), Var("ch")
        acc = Load("acc", ((p - Var("first")) * self.width + v,), "float32")
        here: dict[Expr, Expr] = {d.column: p, d.lane: self.c0 + v}
        value = substitute(replace_node(d.value, d.reduce, acc), here)
        store = Store(self.buffer, substitute(d.offset, here), value)
        return [For(p, Var("first"), Var("stop"), (For(v, ZERO, self.count, (store,)),))]


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
