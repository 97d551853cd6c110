"""How operands of a contraction reach the register tiles: in place, copied, gathered or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Var,
    apply,
    as_int,
    index,
    poly_mul,
    substitute,
)
from onnxjit.codegen.kernel import product
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
    without,
)
from onnxjit.codegen.schedule.contraction_blocking import STRIP_TILES, Blocking
from onnxjit.codegen.schedule.contraction_match import stride_of
from onnxjit.codegen.schedule.contraction_window import Windows
from onnxjit.codegen.schedule.request import Declined

SEGMENTS = 512
CONFLICT = 1024
"""Row strides that are a multiple of 4 KB map all rows of a tile to the same L1 sets; measured on
14x32 tiles: 143 GFLOP/s apart from that, 109 at 4 KB, 65 at 16 KB."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows as micro-kernels see them: element (i, s, k) is at base + i*step + segments[s] + k."""

    buffer: str
    base: Expr
    step: Expr
    count: Expr
    run: Expr
    setup: tuple[Stmt, ...]


class Operands(Windows):
    """The operand half of `ContractionNest`, which sets the attributes declared here."""

    k_split: dict[Expr, Expr]
    ni: Axis
    nr: int
    panels: Expr
    strip: Expr
    group: Expr
    blocking: Blocking
    prologue: Expr | None

    def strip_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last line of the strip."""
        raise NotImplementedError

    def panel_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last panel that a call computes of this block."""
        raise NotImplementedError

    def row_operand(self, x: Load, k_axes: list[Axis]) -> tuple[Operand, list[Axis]]:
        """Where micro-kernels read rows, and the order of the k axes that this wants."""
        setup: list[Stmt] = []
        offset = x.index[0]
        buffer = x.buffer
        if self.c.window is not None:
            buffer, offset, setup = self.copy_window()
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
                index(width),
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
        """Packs y: at compile time when it is constant, else once per block into scratch."""
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
            stop: Expr = j.extent
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
            loops_ = (
                Call(symbol, (Address(y.buffer, here), stride, stop, depth, panel, index(self.nr))),
            )
        elif contiguous:
            # A constant number of columns where there are as many: copied by whole vectors.
            whole: tuple[Stmt, ...] = (For(j, ZERO, j.extent, fill),)
            rest: tuple[Stmt, ...] = (For(j, ZERO, stop, fill), For(j, stop, j.extent, edge))
            for a in reversed(ordered):
                whole, rest = (loop(a, *whole),), (loop(a, *rest),)
            loops_ = whole if stop is j.extent else (If(apply("eq", stop, self.nr), whole, rest),)
        else:
            inner: tuple[Stmt, ...] = fill
            zero: tuple[Stmt, ...] = edge
            for a in reversed(ordered):
                inner, zero = (loop(a, *inner),), (loop(a, *zero),)
            loops_ = (For(j, ZERO, stop, inner),)
            if stop is not j.extent:
                loops_ = (*loops_, For(j, stop, j.extent, zero))
        self.pack_setup = [For(Var("panel"), *self.panel_vars(), loops_)]
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
        two, and computes them meanwhile where there is a prologue."""
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
        value: Expr = Load(x.buffer, (x.base + shift + k,), "float32")
        if self.prologue is not None:
            (summed,) = self.c.k
            value = substitute(self.prologue, {self.names[summed]: shift + k})
        body: Stmt = For(self.mi, start, stop, (loop(k, Store("rows", at * step + k, value)),))
        if self.row is not None:
            body = For(self.row, first, last, (body,))
        self.notes.append(
            "rows computed into scratch"
            if self.prologue is not None
            else "rows copied to a stride without cache conflicts"
        )
        return replace(x, buffer="rows", base=at * step, step=index(step)), (body,)


__all__ = ["Operand", "Operands"]
