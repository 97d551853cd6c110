"""How operands of a contraction reach the register tiles: in place, copied, gathered or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
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
from onnxjit.codegen.loops import (
    Address,
    Call,
    For,
    If,
    Local,
    Stmt,
    Store,
    loop,
)
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.schedule.axes import (
    coefficient,
    flatten_loads,
    strides,
    without,
)
from onnxjit.codegen.schedule.contraction_blocking import STRIP_TILES, Blocking
from onnxjit.codegen.schedule.contraction_match import Contraction, stride_of
from onnxjit.codegen.schedule.request import Declined, Request

SEGMENTS = 512
CONFLICT = 1024
"""Row strides that are a multiple of 4 KB map all rows of a tile to the same L1 sets; measured on
14x32 tiles: 143 GFLOP/s apart from that, 109 at 4 KB, 65 at 16 KB."""

ROW_IN_BLOCK = Var("row_in_block")


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows as micro-kernels see them: element (i, s, k) is at base + i*step + segments[s] + k."""

    buffer: str
    base: Expr
    step: Expr
    count: Expr
    run: Expr
    setup: tuple[Stmt, ...]


class Operands:
    """The operand half of `ContractionNest`, which sets the attributes declared here."""

    r: Request
    c: Contraction
    locals: list[Local]
    notes: list[str]
    symbols: list[str]
    k_split: dict[Expr, Expr]
    cover: microkernels.Cover
    names: dict[Expr, Expr]
    outer: list[Axis]
    row: Axis | None
    mi: Axis | None
    ni: Axis
    mr: int
    nr: int
    height: Expr
    panels: Expr
    block: Expr
    strip: Expr
    group: Expr
    blocking: Blocking

    def block_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last line (row, or row tile) of this parallel tile."""
        raise NotImplementedError

    def strip_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last line of the strip."""
        raise NotImplementedError

    def panel_stop(self) -> Expr:
        """One past the last panel of this tile."""
        raise NotImplementedError

    def window_row_bytes(self) -> Expr:
        """Bytes of one row of the padded input, channels of one group only."""
        w = self.c.window
        assert w is not None
        logical = self.logical_window_index()
        summed = axes_of(logical[1]) & set(self.final_red().axes) if len(logical) > 1 else set()
        channels = product(a.extent for a in summed)
        return poly_mul(poly_mul(w.axes[-1].extent, channels), index(4))

    def window_reach(self, row: Axis) -> tuple[int, int]:
        """Input rows that one row of results reads, and how many the next one is further down."""
        reach, stride = 1, 1
        for i in self.logical_window_index():
            e = rename_axes(i, dict(self.names))
            if row not in axes_of(e):
                continue
            for a in axes_of(e) - set(self.outer):
                c = as_int(coefficient(e, a) or ZERO)
                if a is row:
                    stride = c or 1
                elif c is not None:
                    reach += c * ((as_int(a.extent) or 1) - 1)
        return reach, stride

    def final_red(self) -> Reduce:
        return self.r.kernel.stages[-1].reduces[0]

    def logical_window_index(self) -> tuple[Expr, ...]:
        w = self.c.window
        assert w is not None
        final = self.r.kernel.stages[-1]
        unit: dict[Expr, Expr] = {a: ZERO for a in final.axes if a.extent is ONE}
        for red in final.reduces:
            unit.update({a: ZERO for a in red.axes if a.extent is ONE})
        (read,) = [v for v in loads(final.value) if v.buffer == w.buffer]
        return tuple(substitute(i, unit) for i in read.index)

    def row_operand(self, x: Load, k_axes: list[Axis]) -> tuple[Operand, list[Axis]]:
        """Where micro-kernels read rows, and the order of the k axes that this wants."""
        setup: list[Stmt] = []
        offset = x.index[0]
        buffer = x.buffer
        if self.c.window is not None:
            buffer, offset, setup = self.copy_window(x)
        k_axes = sorted(k_axes, key=lambda a: stride_of(offset, a), reverse=True)
        step = coefficient(offset, self.mi) if self.mi is not None else ZERO
        unit = k_axes and coefficient(offset, k_axes[-1]) is ONE
        if not unit:
            if self.c.window is not None:
                raise Declined("the window's channels are not contiguous")
            copied = self.transpose_rows(x, k_axes) or self.gather_rows(x, k_axes)
            buffer, offset, setup, k_axes = copied
            step = coefficient(offset, self.mi) if self.mi is not None else ZERO
        assert step is not None
        run: Expr = ONE
        split = len(k_axes)
        while split > 0 and coefficient(offset, k_axes[split - 1]) is run:
            run = poly_mul(run, k_axes[split - 1].extent)
            split -= 1
        segments = k_axes[:split]
        count = as_int(product(a.extent for a in segments))
        if count is None or count > SEGMENTS:
            raise Declined("too many runs of k")
        self.locals.append(Local("segments", "int64", index(max(1, count))))
        at: Expr = ZERO
        for a in segments:
            at = at * a.extent + a
        position: Expr = ZERO
        for a in segments:
            position = position + poly_mul(coefficient(offset, a) or ZERO, a)
        fill: Stmt = Store("segments", at, position)
        for a in reversed(segments):
            fill = loop(a, fill)
        base = without(offset, k_axes)
        return Operand(buffer, base, step, index(count), run, (fill, *setup)), k_axes

    def copy_window(self, x: Load) -> tuple[str, Expr, list[Stmt]]:
        """Copies the part of the padded input that the tile's rows read into scratch."""
        w = self.c.window
        assert w is not None
        table = dict(self.names)
        logical = self.logical_window_index()
        fixed = set(self.outer)
        first, _ = self.block_vars()
        order = (0, *range(2, len(w.axes)), 1)
        extents: list[Expr] = []
        starts: list[Expr] = []
        local: list[Expr] = []
        for i in logical:
            e = rename_axes(i, table)
            start = without(e, [a for a in axes_of(e) if a not in fixed])
            rel = e - start
            if self.row is not None and self.row in axes_of(e):
                c = coefficient(e, self.row)
                assert c is not None
                start = start + poly_mul(c, first)
                rel = rel - poly_mul(c, self.row) + poly_mul(c, ROW_IN_BLOCK)
            size: Expr = ONE
            for a in axes_of(e):
                if a in fixed:
                    continue
                c = coefficient(e, a)
                if c is None:
                    raise Declined("a window index is not affine")
                count = self.block if a is self.row else a.extent
                size = size + poly_mul(c, count - 1)
            extents.append(size)
            starts.append(start)
            local.append(rel)
        box = TensorType("float32", tuple(extents))
        step = strides(box, order)
        offset: Expr = ZERO
        for i, s in zip(local, step, strict=True):
            offset = offset + poly_mul(i, s)
        total = product(extents)
        self.locals.append(Local("window", "float32", total, stack=False))
        by_dim = {d: Axis(f"w{d}", extents[d]) for d in order if extents[d] is not ONE}
        where: dict[Expr, Expr] = {}
        at: Expr = ZERO
        for d in range(len(w.axes)):
            inner: Expr = by_dim.get(d, ZERO)
            where[w.axes[d]] = starts[d] + inner
            at = at + poly_mul(inner, step[d])
        value = substitute(w.value, where)
        value = flatten_loads(value, self.r.kernel.types, self.r.layouts)
        walk_order = list(order)
        channel = by_dim.get(1)
        reads = [v.index[0] for v in loads(value)]
        if channel is not None and not any(coefficient(e, channel) is ONE for e in reads):
            # Channels are not contiguous in the source: its last axis is, so that goes innermost.
            walk_order[-2:] = walk_order[-1:] + walk_order[-2:-1]
        setup = copy_loops([by_dim[d] for d in walk_order if d in by_dim], at, value)
        return "window", offset, setup

    def transpose_rows(
        self, x: Load, k_axes: list[Axis]
    ) -> tuple[str, Expr, list[Stmt], list[Axis]] | None:
        """Rows that are contiguous across, not along k (a 1x1 convolution of row-major data), are
        transposed in registers: blocks of k one after the other, each with k contiguous. None
        where that does not apply."""
        (k, *more) = k_axes
        depth = as_int(k.extent)
        if more or self.mi is None or depth is None or depth % 16:
            return None
        stride = coefficient(x.index[0], k)
        if stride is None or coefficient(x.index[0], self.mi) is not ONE:
            return None
        width = 32 if depth % 32 == 0 else 16
        symbol = microkernels.pack(width, self.cover.main.isa)
        self.symbols.append(symbol)
        outer, inner = Axis("ko", index(depth // width)), Axis("ki", index(width))
        self.k_split = {k: outer * width + inner}
        first, last = self.block_vars()
        start: Expr
        stop: Expr
        if self.row is not None:
            start, stop, lines = ZERO, self.mi.extent, poly_mul(self.row - first, self.mi.extent)
            count = poly_mul(self.block, self.mi.extent)
        else:
            start = poly_mul(first, self.height)
            stop = apply("min", poly_mul(last, self.height), self.mi.extent)
            lines = ZERO
            count = self.block * self.mr
        self.locals.append(Local("rows", "float32", poly_mul(count, index(depth)), stack=False))
        block = poly_mul(outer, poly_mul(count, index(width)))
        body: Stmt = Call(
            symbol,
            (
                Address(x.buffer, substitute(x.index[0], {k: outer * width, self.mi: start})),
                stride,
                index(width),
                stop - start,
                Address("rows", block + lines * width),
            ),
        )
        body = loop(outer, body)
        if self.row is not None:
            body = For(self.row, first, last, (body,))
        self.notes.append("rows transposed into scratch")
        return "rows", block + (lines + self.mi - start) * width + inner, [body], [outer, inner]

    def gather_rows(self, x: Load, k_axes: list[Axis]) -> tuple[str, Expr, list[Stmt], list[Axis]]:
        """Copies the tile's rows into scratch with k contiguous."""
        depth = product(a.extent for a in k_axes)
        extent = self.mi.extent if self.mi is not None else ONE
        first, last = self.block_vars()
        k: Expr = ZERO
        for a in k_axes:
            k = poly_mul(k, a.extent) + a
        mi = self.mi if self.mi is not None else ZERO
        start: Expr
        stop: Expr
        if self.row is not None:
            start, stop = ZERO, extent
            count = poly_mul(self.block, extent)
            at = poly_mul(self.row - first, extent) + mi
        else:
            start = poly_mul(first, self.height)
            stop = apply("min", poly_mul(last, self.height), extent)
            count = self.block * self.mr
            at = mi - start
        at = poly_mul(at, depth) + k
        self.locals.append(Local("rows", "float32", poly_mul(count, depth), stack=False))
        loops_ = [For(a, ZERO, a.extent, ()) for a in k_axes]
        if self.mi is not None:
            line = For(self.mi, start, stop, ())
            # Reading along what is contiguous.
            loops_.insert(len(loops_) if coefficient(x.index[0], self.mi) is ONE else 0, line)
        if self.row is not None:
            loops_.insert(0, For(self.row, first, last, ()))
        body: Stmt = Store("rows", at, Load(x.buffer, (x.index[0],), x.dtype))
        for around in reversed(loops_):
            body = replace(around, body=(body,))
        self.notes.append("rows gathered into scratch")
        return "rows", at, [body], k_axes

    def columns_operand(self, y: Load, k_axes: Sequence[Axis]) -> None:
        """Packs y: at compile time when it is constant, else once per tile into scratch."""
        offset = y.index[0]
        in_y = [a for a in self.outer if coefficient(offset, a) is not ZERO]
        self.pack_setup: list[Stmt] = []
        self.packing: Packing | None = None
        depth = product(a.extent for a in k_axes)
        if y.buffer in self.r.constants:
            pairs = {}
            for a in [*in_y, self.ni, *k_axes]:
                e, s = as_int(a.extent), as_int(coefficient(offset, a) or ZERO)
                if e is None or s is None:
                    raise Declined("a constant operand of symbolic size")
                pairs[a] = (e, s)
            base = as_int(without(offset, list(pairs)))
            assert base is not None
            self.packing = Packing(
                y.buffer,
                base,
                tuple(pairs[a] for a in in_y),
                pairs[self.ni],
                tuple(pairs[a] for a in k_axes),
                self.nr,
            )
            group: Expr = ZERO
            for a in in_y:
                group = poly_mul(group, a.extent) + a
            self.y_buffer = y.buffer
            self.y_panel = poly_mul(
                poly_mul(group, self.panels) + Var("panel"), poly_mul(depth, index(self.nr))
            )
            return
        count = poly_mul(index(self.blocking.most_panels * self.nr), depth)
        self.locals.append(Local("packed", "float32", count, stack=False))
        j = Axis("pj", index(self.nr))
        first = poly_mul(Var("pb"), self.group)
        local = Var("panel") - first
        at: Expr = ZERO
        for a in k_axes:
            at = poly_mul(at, a.extent) + a
        where = poly_mul(poly_mul(local, depth) + at, index(self.nr)) + j
        column = poly_mul(Var("panel"), index(self.nr)) + j
        source = substitute(offset, {self.ni: column})
        value: Expr = Load(y.buffer, (source,), y.dtype)
        columns = as_int(self.ni.extent)
        fill: tuple[Stmt, ...] = (Store("packed", where, value),)
        edge: tuple[Stmt, ...] = (Store("packed", where, Const(0.0, "float32")),)
        limit = apply("min", index(self.nr), self.ni.extent - Var("panel") * self.nr)
        ordered = sorted(k_axes, key=lambda a: stride_of(offset, a), reverse=True)
        contiguous = coefficient(offset, self.ni) is ONE
        loops_: tuple[Stmt, ...]
        if columns is not None and columns % self.nr == 0:
            stop: Expr = index(self.nr)
        else:
            stop = limit
        (k, *more) = ordered
        if not contiguous and not more and coefficient(offset, k) is ONE:
            # Columns that are contiguous along k: transposed in registers.
            isa = self.cover.main.isa
            symbol = microkernels.pack(self.nr, isa)
            self.symbols.append(symbol)
            here = substitute(offset, {self.ni: Var("panel") * self.nr, k: ZERO})
            stride = coefficient(offset, self.ni)
            assert stride is not None
            panel = Address("packed", poly_mul(local, depth) * self.nr)
            loops_ = (Call(symbol, (Address(y.buffer, here), stride, stop, depth, panel)),)
        elif contiguous:
            loops_ = (For(j, ZERO, stop, fill),)
            if stop is not j.extent:
                loops_ = (*loops_, For(j, stop, j.extent, edge))
            for a in reversed(ordered):
                loops_ = (loop(a, *loops_),)
        else:
            inner: tuple[Stmt, ...] = fill
            zero: tuple[Stmt, ...] = edge
            for a in reversed(ordered):
                inner, zero = (loop(a, *inner),), (loop(a, *zero),)
            loops_ = (For(j, ZERO, stop, inner),)
            if stop is not j.extent:
                loops_ = (*loops_, For(j, stop, j.extent, zero))
        self.pack_setup = [For(Var("panel"), first, self.panel_stop(), loops_)]
        self.y_buffer = "packed"
        self.y_panel = poly_mul(local, poly_mul(depth, index(self.nr)))

    def conflicting(self, x: Operand) -> bool:
        """Whether neighbouring rows fall into the same L1 sets, so that a tile evicts itself."""
        step = as_int(x.step)
        return (
            self.c.window is None
            and x.buffer == self.c.x.buffer
            and as_int(x.count) == 1
            and step is not None
            and step % CONFLICT == 0
            and step > 0
            and self.mr > 8
            and self.blocking.most_panels >= 4
            and (self.row is None or as_int(self.strip) is not None)
            and as_int(x.run) is not None
        )

    def copied_rows(
        self, x: Operand, length: int, run: Expr, shift: Expr
    ) -> tuple[Operand, tuple[Stmt, ...]]:
        """Copies the strip's rows (one depth block) into scratch with a stride that is no power of
        two."""
        assert self.mi is not None
        first, last = self.strip_vars()
        extent = self.mi.extent
        step = length + 16
        k = Axis("ck", run)
        start: Expr
        stop: Expr
        if self.row is not None:
            rows = poly_mul(self.strip, extent)
            at = poly_mul(self.row - first, extent) + self.mi
            start, stop = ZERO, extent
        else:
            rows = index((self.blocking.most_tiles or STRIP_TILES) * self.mr)
            start = poly_mul(first, self.height)
            at = self.mi - start
            stop = apply("min", poly_mul(last, self.height), extent)
        self.locals.append(Local("rows", "float32", rows * step, stack=False))
        value = Load(x.buffer, (x.base + shift + k,), "float32")
        body: Stmt = For(self.mi, start, stop, (loop(k, Store("rows", at * step + k, value)),))
        if self.row is not None:
            body = For(self.row, first, last, (body,))
        self.notes.append("rows copied to a stride without cache conflicts")
        return replace(x, buffer="rows", base=at * step, step=index(step)), (body,)


def copy_loops(loops: Sequence[Axis], at: Expr, value: Expr) -> list[Stmt]:
    """Loops that store `value`; border conditions become loop bounds, tested as far out as they
    can be."""
    conds: list[Expr] = []
    inner = value
    fill: Expr = ZERO
    if isinstance(value, Apply) and value.fn == "select" and not loads(value.args[0]):
        collect_and(value.args[0], conds)
        inner, fill = value.args[1], value.args[2]
    remaining = list(conds)

    def filled(depth: int) -> tuple[Stmt, ...]:
        out: tuple[Stmt, ...] = (Store("window", at, fill),)
        for a in reversed(loops[depth:]):
            out = (loop(a, *out),)
        return out

    def build(depth: int) -> tuple[Stmt, ...]:
        if depth == len(loops):
            if not remaining:
                return (Store("window", at, inner),)
            cond = remaining[0]
            for c in remaining[1:]:
                cond = apply("logical_and", cond, c)
            return (If(cond, (Store("window", at, inner),), (Store("window", at, fill),)),)
        a = loops[depth]
        known = set(loops[: depth + 1])
        low: Expr = ZERO
        high: Expr = a.extent
        for c in [c for c in remaining if a in axes_of(c) and axes_of(c) & set(loops) <= known]:
            bound = loop_bound(c, a)
            if bound is None:
                continue
            remaining.remove(c)
            if bound[0] == "low":
                low = apply("max", low, bound[1])
            else:
                high = apply("min", high, bound[1])
        body = build(depth + 1)
        if low is ZERO and high is a.extent:
            return (loop(a, *body),)
        high = apply("max", high, low)
        out: list[Stmt] = []
        rest = filled(depth + 1)
        if low is not ZERO:
            out.append(For(a, ZERO, apply("min", low, a.extent), rest))
        out.append(For(a, low, high, body))
        if high is not a.extent:
            out.append(For(a, high, a.extent, rest))
        return tuple(out)

    return list(build(0))


def loop_bound(cond: Expr, a: Axis) -> tuple[str, Expr] | None:
    """The bound on `a` that a comparison amounts to: ("low", first) or ("high", end)."""
    if not (isinstance(cond, Apply) and cond.fn in ("lt", "le")):
        return None
    left, right = cond.args
    slack = right - left if cond.fn == "le" else right - left - 1
    c = coefficient(slack, a)
    rest = without(slack, [a])
    if c is ONE:
        return "low", -rest
    if as_int(c) == -1 if c is not None else False:
        return "high", rest + 1
    return None


def collect_and(e: Expr, out: list[Expr]) -> None:
    if isinstance(e, Apply) and e.fn == "logical_and":
        for a in e.args:
            collect_and(a, out)
    else:
        out.append(e)


__all__ = ["ROW_IN_BLOCK", "Operand", "Operands"]
