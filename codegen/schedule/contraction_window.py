"""The window of a padded input: what the rows of one parallel tile read, copied with its border."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxjit.codegen import instruction_sets, microkernels
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
    poly_mul,
    substitute,
)
from onnxjit.codegen.kernel import TensorType, product, rename_axes
from onnxjit.codegen.loops import Address, Call, For, If, Local, Stmt, Store, loop
from onnxjit.codegen.schedule.axes import coefficient, flatten_loads, strides, without
from onnxjit.codegen.schedule.borders import conjuncts, loop_bound
from onnxjit.codegen.schedule.contraction_match import Contraction
from onnxjit.codegen.schedule.request import Declined, Request

WINDOW = "window"
ROW_IN_BLOCK = Var("row_in_block")


class Windows:
    """The window half of `ContractionNest`, which sets the attributes declared here."""

    r: Request
    c: Contraction
    locals: list[Local]
    notes: list[str]
    symbols: list[str]
    cover: microkernels.Cover
    names: dict[Expr, Expr]
    outer: list[Axis]
    row: Axis | None
    mi: Axis | None
    m: Expr
    mr: int
    height: Expr
    lines: Expr
    block: Expr

    def block_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last line (row, or row tile) that a call computes of this block."""
        raise NotImplementedError

    def line_axis(self) -> tuple[Axis | None, int]:
        """The axis that lines are cut from, and how many of its values make a line, at most."""
        return (self.row, 1) if self.row is not None else (self.mi, self.mr)

    def line_bytes(self) -> tuple[Expr, int]:
        """Bytes of the padded input that one more line of results needs, of one group's channels,
        and how many lines more are read beyond the last one."""
        w = self.c.window
        assert w is not None
        logical = self.logical_index()
        summed = axes_of(logical[1]) & set(self.final_sum().axes) if len(logical) > 1 else set()
        channels = product(a.extent for a in summed)
        axis, per = self.line_axis()
        if axis is None:
            return poly_mul(poly_mul(w.axes[-1].extent, channels), index(4)), 0
        reach, stride = self.reach(axis)
        step = poly_mul(index(4 * stride * per), channels)
        if self.row is not None:
            step = poly_mul(step, w.axes[-1].extent)
        return step, -(-max(0, reach - stride) // per)

    def reach(self, axis: Axis) -> tuple[int, int]:
        """Input positions that one result reads along an axis of results, and how many the next
        one is further on."""
        reach, stride = 1, 1
        for i in self.logical_index():
            e = rename_axes(i, dict(self.names))
            if axis not in axes_of(e):
                continue
            for a in axes_of(e) - set(self.outer):
                c = as_int(coefficient(e, a) or ZERO)
                if a is axis:
                    stride = c or 1
                elif c is not None:
                    reach += c * ((as_int(a.extent) or 1) - 1)
        return reach, stride

    def final_sum(self) -> Reduce:
        return self.r.kernel.stages[-1].reduces[0]

    def logical_index(self) -> tuple[Expr, ...]:
        """Where the sum reads the window, in its logical axes."""
        w = self.c.window
        assert w is not None
        final = self.r.kernel.stages[-1]
        unit: dict[Expr, Expr] = {a: ZERO for a in final.axes if a.extent is ONE}
        for red in final.reduces:
            unit.update({a: ZERO for a in red.axes if a.extent is ONE})
        (read,) = [v for v in loads(final.value) if v.buffer == w.buffer]
        return tuple(substitute(i, unit) for i in read.index)

    def copy_window(self) -> tuple[str, Expr, list[Stmt]]:
        """Copies the part of the padded input that the tile's rows read into scratch: its name,
        where an element of a row lies in it, and the statements."""
        w = self.c.window
        assert w is not None
        table = dict(self.names)
        axis, per = self.line_axis()
        begin, end = self.block_vars()
        if self.row is None:
            begin, end = (poly_mul(e, self.height) for e in (begin, end))
            end = apply("min", end, self.m)
        count = poly_mul(self.block, index(per))
        order = (0, *range(2, len(w.axes)), 1)
        extents: list[Expr] = []
        starts: list[Expr] = []
        local: list[Expr] = []
        stops: dict[int, Expr] = {}
        for d, i in enumerate(self.logical_index()):
            e = rename_axes(i, table)
            start = without(e, [a for a in axes_of(e) if a not in self.outer])
            rel = e - start
            size: Expr = ONE
            for a in axes_of(e):
                c = coefficient(e, a)
                if c is None:
                    raise Declined("a window index is not affine")
                if a in self.outer:
                    continue
                if a is axis:
                    start = start + poly_mul(c, begin)
                    here: Expr = ROW_IN_BLOCK if a is self.row else a - begin
                    rel = rel - poly_mul(c, a) + poly_mul(c, here)
                    stops[d] = poly_mul(c, end - begin - count)
                size = size + poly_mul(c, (count if a is axis else a.extent) - 1)
            if d in stops:
                stops[d] = stops[d] + size
            extents.append(size)
            starts.append(start)
            local.append(rel)
        step = strides(TensorType("float32", tuple(extents)), order)
        offset: Expr = ZERO
        for i, s in zip(local, step, strict=True):
            offset = offset + poly_mul(i, s)
        by_dim = {d: Axis(f"w{d}", extents[d]) for d in order if extents[d] is not ONE}
        where: dict[Expr, Expr] = {}
        at: Expr = ZERO
        for d in range(len(w.axes)):
            inner: Expr = by_dim.get(d, ZERO)
            where[w.axes[d]] = starts[d] + inner
            at = at + poly_mul(inner, step[d])
        value = flatten_loads(substitute(w.value, where), self.r.kernel.types, self.r.layouts)
        walk_order = list(order)
        channel, last = by_dim.get(1), by_dim.get(walk_order[-2])
        reads = [v.index[0] for v in loads(value)]
        across = channel is not None and not any(coefficient(e, channel) is ONE for e in reads)
        if across:
            # Channels are not contiguous in the source: its last axis is, so that goes innermost.
            walk_order[-2:] = walk_order[-1:] + walk_order[-2:-1]
        limits = {by_dim[d]: s for d, s in stops.items() if d in by_dim and s is not extents[d]}
        copy = Copy([by_dim[d] for d in walk_order if d in by_dim], limits, at, value)
        size = product(extents)
        line: Line | None = None
        if across and channel is not None and last is not None:
            isa = instruction_sets.ISAS[self.cover.main.isa]
            symbol = microkernels.pack(isa.lanes, isa.name)
            line = copy.transposed(channel, last, symbol, isa.lanes)
        if line is not None:
            self.symbols.append(symbol)
            size = size + isa.lanes
        self.locals.append(Local(WINDOW, "float32", size, stack=False))
        return WINDOW, offset, list(copy.statements(line))


@dataclass(frozen=True, slots=True)
class Line:
    """Copies a run of pixels [low, high) with all channels; `channel` and `pixel` are the axes."""

    channel: Axis
    pixel: Axis
    copy: Callable[[Expr, Expr], tuple[Stmt, ...]]


class Copy:
    """Loops that store `value` into the window at `at`; border conditions become loop bounds,
    tested as far out as they can be. `limits` end some axes earlier."""

    def __init__(
        self, loops: Sequence[Axis], limits: Mapping[Axis, Expr], at: Expr, value: Expr
    ) -> None:
        self.loops, self.limits, self.at, self.value = list(loops), limits, at, value
        self.fill: Expr = ZERO
        self.conds: list[Expr] = []
        if isinstance(value, Apply) and value.fn == "select" and not loads(value.args[0]):
            self.conds = list(conjuncts(value.args[0]))
            self.value, self.fill = value.args[1], value.args[2]

    def transposed(self, channel: Axis, pixel: Axis, symbol: str, lanes: int) -> Line | None:
        """The two innermost axes by a transposing copy in registers: where pixels are contiguous
        in the source, channels in the window, and conditions ask for whole pixels."""
        read, inner = self.value, (channel, pixel)
        if tuple(self.loops[-2:]) != inner or not isinstance(read, Load):
            return None
        outermost_first = [a for a in self.loops if a is not channel]
        for cond in self.conds:
            deepest = [a for a in outermost_first if a in axes_of(cond)][-1:]
            if channel in axes_of(cond) or not deepest or loop_bound(cond, deepest[0]) is None:
                return None
        (source,) = read.index
        stride, step = coefficient(source, channel), coefficient(self.at, pixel)
        if coefficient(source, pixel) is not ONE or stride is None or step is None:
            return None
        block = Var("cb")
        blocks = apply("floordiv", channel.extent + (lanes - 1), lanes)
        # The last channels first: what is written beyond them is replaced by the next pixel's.
        first = (blocks - 1 - block) * lanes
        rows = apply("min", index(lanes), channel.extent - first)

        def copy(low: Expr, high: Expr) -> tuple[Stmt, ...]:
            where: dict[Expr, Expr] = {channel: first, pixel: low}
            arguments = (
                Address(read.buffer, substitute(source, where)),
                stride,
                rows,
                high - low,
                Address(WINDOW, substitute(self.at, where)),
                step,
            )
            return (For(block, ZERO, blocks, (Call(symbol, arguments),)),)

        return Line(channel, pixel, copy)

    def statements(self, line: Line | None = None) -> tuple[Stmt, ...]:
        """The copy; `line` takes the two innermost axes, if given."""
        left = list(self.conds)

        def nested(depth: int) -> tuple[Stmt, ...]:
            if line is not None and depth == len(self.loops) - 2:
                low, high = self.bounds(line.pixel, left, self.loops)
                rest = (loop(line.channel, Store(WINDOW, self.at, self.fill)),)
                stop = self.stop(line.pixel)
                end = stop if high is line.pixel.extent else apply("min", high, stop)
                inside = line.copy(low, apply("max", end, low))
                return (*inside, *self.outside(line.pixel, low, high, rest))
            if depth == len(self.loops):
                return self.element(left)
            a = self.loops[depth]
            low, high = self.bounds(a, left, self.loops[: depth + 1])
            body = nested(depth + 1)
            stop = self.stop(a)
            end = stop if high is a.extent else apply("min", high, stop)
            return (For(a, low, end, body), *self.outside(a, low, high, self.filled(depth + 1)))

        return nested(0)

    def stop(self, a: Axis) -> Expr:
        return self.limits.get(a, a.extent)

    def bounds(self, a: Axis, left: list[Expr], known: Sequence[Axis]) -> tuple[Expr, Expr]:
        """The values [low, high) of `a` that conditions of `left` allow, taking those out that ask
        for nothing else."""
        low: Expr = ZERO
        high: Expr = a.extent
        for cond in [c for c in left if a in axes_of(c)]:
            bound = loop_bound(cond, a)
            if bound is None or not (axes_of(cond) & set(self.loops)) <= set(known):
                continue
            left.remove(cond)
            if bound[0] == "low":
                low = apply("max", low, bound[1])
            else:
                high = apply("min", high, bound[1])
        return low, high if high is a.extent else apply("max", high, low)

    def outside(self, a: Axis, low: Expr, high: Expr, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        """The border on both sides of [low, high)."""
        out: list[Stmt] = []
        if low is not ZERO:
            out.append(For(a, ZERO, apply("min", low, self.stop(a)), body))
        if high is not a.extent:
            out.append(For(a, high, self.stop(a), body))
        return tuple(out)

    def filled(self, depth: int) -> tuple[Stmt, ...]:
        out: tuple[Stmt, ...] = (Store(WINDOW, self.at, self.fill),)
        for a in reversed(self.loops[depth:]):
            out = (For(a, ZERO, self.stop(a), out),)
        return out

    def element(self, left: Sequence[Expr]) -> tuple[Stmt, ...]:
        """One element, under the conditions that bounded no loop."""
        store: Stmt = Store(WINDOW, self.at, self.value)
        if not left:
            return (store,)
        cond = left[0]
        for c in left[1:]:
            cond = apply("logical_and", cond, c)
        return (If(cond, (store,), (Store(WINDOW, self.at, self.fill),)),)


__all__ = ["ROW_IN_BLOCK", "WINDOW", "Windows"]
