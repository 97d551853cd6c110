"""Schedule for sums of products: matrix products and convolutions over register tiles.

Matched by structure: one `sum` over k of `x * y`, where output axes that occur only in x's index
are rows (m), those only in y's are columns (n), those in both are batch. What the loops look like
follows from the index expressions:

- y is a constant: packed into panels when the model is compiled; otherwise packed into the
  thread's scratch memory, once for each tile of the parallel space.
- x is read where it is when its rows have one stride and k is contiguous (a matrix, a 1x1
  convolution, a channels-last convolution without padding); a *window* of a padded input is first
  copied into scratch with its border (rows of one tile only); anything else is gathered.
- the epilogue is the output stage's own expression with the reduction replaced by the tile.

`contraction_blocking` decides the loop order and the sizes of blocks, `contraction_depth` how k is
cut; `contraction_results` stores what was summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    as_int,
    index,
    poly_mul,
    substitute,
    to_text,
    walk,
)
from onnxjit.codegen.kernel import product, rename_axes
from onnxjit.codegen.loops import (
    FIRST_PART,
    LAST_PART,
    Address,
    Assign,
    For,
    If,
    Local,
    LoopNest,
    Stmt,
)
from onnxjit.codegen.schedule.axes import ceil_div, coefficient, typical
from onnxjit.codegen.schedule.contraction_blocking import STRIP_TILES, Shape, choose, limits
from onnxjit.codegen.schedule.contraction_depth import DEPTH_BLOCK, KBlocks, k_blocks
from onnxjit.codegen.schedule.contraction_match import (
    Contraction,
    column_axis,
    recognise,
    stride_of,
    windowed,
)
from onnxjit.codegen.schedule.contraction_operands import Operand
from onnxjit.codegen.schedule.contraction_results import Results
from onnxjit.codegen.schedule.contraction_window import ROW_IN_BLOCK
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.register_tile import (
    ahead,
    register_tile,
    tile_call,
    tile_symbols,
)
from onnxjit.codegen.schedule.request import Declined, Request

LOW, HIGH = Var("low"), Var("high")
"""The lines, or the panels, that a call computes of a block."""


class ContractionNest(Results):
    """Builds the nest step by step; every attribute is set once, in order, by `nest`."""

    def __init__(self, r: Request, c: Contraction) -> None:
        self.r, self.c = r, c
        self.locals: list[Local] = []
        self.notes: list[str] = []
        self.symbols: list[str] = []
        self.k_split: dict[Expr, Expr] = {}
        self.names: dict[Expr, Expr] = {}

    def axis(self, a: Axis) -> Axis:
        """The canonical name of an axis."""
        if a not in self.names:
            self.names[a] = Axis(f"i{len(self.names)}", a.extent)
        return self.names[a]  # type: ignore[return-value]

    def nest(self) -> LoopNest:
        c = self.c
        off = c.stage.offset
        n_tile = column_axis(c.n, off)
        m_sorted = sorted(c.m, key=lambda a: stride_of(off, a), reverse=True)
        m_tile = m_sorted[-1] if m_sorted else None
        # A line of computed rows would be too long to be copied as a whole.
        row = m_sorted[-2] if len(m_sorted) > 1 and c.prologue is None else None
        outer = [a for a in c.stage.axes if a not in (n_tile, m_tile, row)]
        outer = [a for a in sorted(outer, key=lambda a: stride_of(off, a), reverse=True)]
        for a in [*outer, *(a for a in (row, m_tile, n_tile) if a is not None), *c.k]:
            self.axis(a)
        table = dict(self.names)
        stage = replace(
            c.stage,
            offset=rename_axes(c.stage.offset, table),
            value=rename_axes(c.stage.value, table),
        )
        red = next(v for v in walk(stage.value) if isinstance(v, Reduce))
        x = Load(c.x.buffer, (rename_axes(c.x.index[0], table),), c.x.dtype)
        y = Load(c.y.buffer, (rename_axes(c.y.index[0], table),), c.y.dtype)
        self.stage, self.red = stage, red
        self.prologue = None if c.prologue is None else rename_axes(c.prologue, table)
        self.outer = [self.axis(a) for a in outer]
        self.row = self.axis(row) if row is not None else None
        self.mi = self.axis(m_tile) if m_tile is not None else None
        self.ni = self.axis(n_tile)
        k_axes = [self.axis(a) for a in c.k]

        self.m = self.mi.extent if self.mi is not None else ONE
        static = as_int(self.m)
        self.depth = product(a.extent for a in k_axes)
        columns, depth = as_int(self.ni.extent), max(1, typical(self.depth))
        streams = self.streams()
        self.streamed = streams > 0
        self.cover = register_tile(self.r, static, columns, depth, streams)
        self.mr, self.nr = self.cover.main.mr, self.cover.nr
        self.height: Expr = Var("height") if static is None else index(self.mr)
        self.panels = (self.ni.extent + (self.nr - 1)) // self.nr
        self.m_tiles = (self.m + (self.mr - 1)) // self.mr
        self.lines = self.row.extent if self.row is not None else self.m_tiles
        self.line_tiles = self.m_tiles if self.row is not None else ONE

        shape = self.shape(x, y, k_axes)
        self.blocking = choose(shape)
        self.sizes: dict[Var, Expr] = {}
        self.block = self.size("block", self.blocking.block)
        same = self.blocking.strip is self.blocking.block
        self.strip = self.block if same else self.size("strip", self.blocking.strip)
        self.group = self.size("group", self.blocking.group)
        self.divided = "pb" if shape.packed else "rb"
        self.parts = self.blocking.group if shape.packed else self.blocking.block
        if self.parts is ONE:
            self.divided = ""
        operand, k_axes = self.row_operand(x, k_axes)
        y = Load(y.buffer, (substitute(y.index[0], self.k_split),), y.dtype)
        self.columns_operand(y, k_axes)
        return self.assemble(operand)

    def streams(self) -> int:
        """Buffers of the result's size, itself among them, if they do not stay in L2 (of a batch
        of 1) and tiles store them row by row."""
        if self.across():
            return 0
        types, c = self.r.kernel.types, self.c
        elements = types[c.stage.buffer].elements
        if 4 * typical(elements, 1) <= 3 * self.r.target.l2:
            return 0
        others = [b for b in self.r.kernel.inputs if b not in (c.x.buffer, c.y.buffer)]
        return 1 + sum(types[b].elements is elements for b in others)

    def size(self, name: str, value: Expr) -> Expr:
        """A constant, or a local variable for what is only known at run time."""
        if as_int(value) is not None:
            return value
        self.sizes[Var(name)] = value
        return Var(name)

    def shape(self, x: Load, y: Load, k_axes: Sequence[Axis]) -> Shape:
        """What the choice of blocks depends on."""
        window = self.c.window is not None
        in_place = not window and any(coefficient(x.index[0], k) is ONE for k in k_axes)
        packed = in_place and y.buffer not in self.r.constants
        halo = 0
        if window:
            line_bytes, halo = self.line_bytes()
        else:
            rows = self.m if self.row is not None else index(self.mr)
            line_bytes = poly_mul(rows, self.depth) * 4
        outer = 1
        for a in self.outer:
            outer *= as_int(a.extent) or 1
        return Shape(
            lines=self.lines,
            line_tiles=self.line_tiles,
            mr=self.mr,
            line_bytes=line_bytes,
            copied=window,
            packed=packed,
            gathered=not window and not in_place,
            halo=halo,
            panels=self.panels,
            nr=self.nr,
            depth=self.depth,
            outer=outer,
            limits=limits(self.r, window),
        )

    def block_vars(self) -> tuple[Expr, Expr]:
        return self.range_of("rb", self.block, self.lines)

    def panel_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last panel that a call computes of this block."""
        return self.range_of("pb", self.group, self.panels)

    def range_of(self, block: str, size: Expr, extent: Expr) -> tuple[Expr, Expr]:
        """The lines or panels that a call computes of a block."""
        if block == self.divided:
            return LOW, HIGH
        first = poly_mul(Var(block), size)
        last = first + size
        return first, last if divides(size, extent) else apply("min", last, extent)

    def part(self, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        """Sets the lines or panels that a call computes of a block, and computes them."""
        if not self.divided:
            return body
        size, extent = self.block, self.lines
        if self.divided == "pb":
            size, extent = self.group, self.panels
        first = poly_mul(Var(self.divided), size)
        last: Expr = first + LAST_PART
        if not divides(size, extent):
            last = apply("min", last, extent)
            body = (If(apply("lt", LOW, HIGH), body),)
        return (Assign(LOW, first + FIRST_PART), Assign(HIGH, last), *body)

    def strip_vars(self) -> tuple[Expr, Expr]:
        if self.strip is self.block:
            return self.block_vars()
        return Var("line0"), Var("line1")

    # --- assembly -----------------------------------------------------------------------------

    def assemble(self, x: Operand) -> LoopNest:
        """The nest: strips, depth blocks, panels, blocks of k, lines, row tiles."""
        first, last = self.strip_vars()
        mt, panel, pb = Var("mt"), Var("panel"), Var("pb")
        strip_tiles = poly_mul(self.strip, self.line_tiles)
        few = (as_int(strip_tiles) or STRIP_TILES) <= 2
        k = k_blocks(x, self.nr, self.blocking.depth_blocks, few=few)
        copied: tuple[Stmt, ...] = ()
        if self.prologue is not None or self.conflicting(x):
            x, copied = self.copied_rows(x, k.depth_length, k.depth_run, k.depth_start)
            k = replace(k, depth_start=ZERO)

        at: Expr = mt - first
        if self.row is not None:
            at = poly_mul(self.row - first, self.m_tiles) + mt
        slot: Expr = ZERO
        slots: Expr = ONE
        if k.depth_blocks > 1:
            slot = poly_mul(panel - poly_mul(pb, self.group), strip_tiles) + at
            slots = index(self.blocking.most_panels)
        elif k.loops:
            slot = at
        if slot is not ZERO:
            most = self.blocking.most_tiles
            slots = poly_mul(slots, strip_tiles if most is None else index(most))
        cells = slots * (self.mr * self.nr)
        stack = (as_int(cells) or 1 << 30) * 4 <= 8192
        acc = Local("acc", "float32", cells, stack)
        acc_at = poly_mul(slot, index(self.mr * self.nr))

        m0 = Var("m0")
        rows = Var("rows") if self.cover.uneven else index(self.mr)
        whole = k.depth_blocks == 1 and not k.loops
        # Where the result goes to memory and a whole k is one block: along its rows, so that each
        # tile goes on where the one before has stopped (1500x64 by 64x1500: 1.26 times as fast).
        by_rows = whole and self.streamed and self.row is None
        product = self.compute(x, k, (Address("acc", acc_at), index(self.nr)), by_rows)
        body: tuple[Stmt, ...]
        line: tuple[Stmt, ...] = ()
        if whole and (result := self.result(m0)) is not None:
            at_once = self.compute(x, k, result, by_rows)
            body = self.columns(
                lambda stop: (
                    at_once
                    if as_int(stop) == self.nr
                    else (*product, *self.epilogue(m0, rows, acc_at, stop))
                )
            )
            if body is not at_once:
                self.locals.append(acc)
        else:
            self.locals.append(acc)
            if self.across():
                finish, line = self.turned(m0, rows, acc_at)
            else:
                finish = self.columns(lambda stop: self.epilogue(m0, rows, acc_at, stop))
            if k.last is not None:
                finish = (If(k.last, finish),)
                line = (If(k.last, line),) if line else ()
            body = (*product, *finish)
        body = (Assign(m0, poly_mul(mt, self.height)), *body)
        if self.row is not None:
            body = (For(mt, ZERO, self.m_tiles, body), *line)
            if self.c.window is not None:
                body = (Assign(ROW_IN_BLOCK, self.row - self.block_vars()[0]), *body)
            body = (For(self.row, first, last, body),)
        elif not by_rows:
            body = (For(mt, first, last, body), *line)
        for var, count in reversed(k.loops):
            body = (For(var, ZERO, count, body),)
        body = (For(panel, *self.panel_vars(), body),)
        if by_rows:
            body = (For(mt, first, last, body),)
        body = (*copied, *body)
        if k.depth_blocks > 1:
            body = (For(DEPTH_BLOCK, ZERO, index(k.depth_blocks), body),)
        if self.strip is not self.block:
            start, stop = self.block_vars()
            strips = ceil_div(stop - start, self.strip)
            line0, line1 = first, last
            assert isinstance(line0, Var) and isinstance(line1, Var)
            body = (
                Assign(line0, start + poly_mul(Var("st"), self.strip)),
                Assign(line1, apply("min", line0 + self.strip, stop)),
                *body,
            )
            body = (For(Var("st"), ZERO, strips, body),)
        body = self.part((*x.setup, *self.pack_setup, *body))
        if self.height is Var("height"):
            # Tiles of equal height: of 128 rows ten times 13, not nine times 14 and 2.
            tiles = apply("max", self.m_tiles, 1)
            body = (Assign(Var("height"), ceil_div(self.m, tiles)), *body)
        body = (*(Assign(var, value) for var, value in self.sizes.items()), *body)
        row_blocks = Axis("rb", ceil_div(self.lines, self.blocking.block))
        panel_blocks = Axis("pb", ceil_div(self.panels, self.blocking.group))
        nest, blocks = with_tiles([*self.outer, *self.tile_order(row_blocks, panel_blocks)], body)
        return self.finished(nest, blocks)

    def tile_order(self, row_blocks: Axis, panel_blocks: Axis) -> tuple[Axis, Axis]:
        """Neighbouring parallel tiles share the larger of the operands."""
        rows = as_int(poly_mul(self.lines, self.line_tiles))
        larger = rows is not None and rows * self.mr > typical(self.panels) * self.nr
        if self.r.choice("rows_first", int(larger), (0, 1)):
            return row_blocks, panel_blocks
        return panel_blocks, row_blocks

    def finished(self, nest: tuple[Stmt, ...], blocks: Expr) -> LoopNest:
        kind = "rows" if self.row is not None else "row tiles"
        note = (
            f"tile {self.mr}x{self.nr}; a block has {to_text(self.block)} {kind} "
            f"({to_text(self.strip)} at a time) and {to_text(self.group)} panels, k in "
            f"{self.blocking.depth_blocks} blocks"
        )
        sizes: dict[Expr, Expr] = {var: value for var, value in self.sizes.items()}
        self.locals = [replace(x, count=substitute(x.count, sizes)) for x in self.locals]
        result = finish_nest(
            self.r,
            nest,
            poly_mul(blocks, self.parts),
            "contraction: window" if self.c.window is not None else "contraction",
            locals=tuple(self.locals),
            symbols=(*tile_symbols(self.cover), *self.symbols),
            notes=(note, *self.notes),
            parts=self.parts,
        )
        packed = (self.packing,) if self.packing is not None else ()
        return replace(result, packings=packed)

    def compute(
        self, x: Operand, k: KBlocks, sums: tuple[Address, Expr], by_rows: bool
    ) -> tuple[Stmt, ...]:
        """The micro-kernel call of one row tile and block of k; `sums` is where the tile's first
        row lies, and how far apart its rows. `by_rows`: the next call has the next panel, not the
        next row tile."""
        m0, rows, mt = Var("m0"), Var("rows"), Var("mt")
        base = substitute(x.base, {self.mi: m0}) if self.mi is not None else x.base
        y = self.y_panel + (k.depth_offset + k.start) * self.nr
        tiles: Expr = ONE if by_rows else poly_mul(self.strip, self.line_tiles)
        tile: Expr = mt if self.row is None else mt + poly_mul(self.row, self.m_tiles)
        shared = ahead(self.nr, poly_mul(k.segments, k.run), tile)
        next_ = apply("select", apply("le", tiles, ONE), ZERO, shared)
        arguments = (
            Address(x.buffer, base + k.depth_start + k.shift),
            x.step,
            Address("segments", k.segment),
            k.segments,
            k.run,
            Address(self.y_buffer, y),
            *sums,
            k.more,
            Address(self.y_buffer, y + next_),
        )
        call = tile_call(self.cover, arguments, rows, tile_symbols(self.cover))
        if not self.cover.uneven:
            return call
        return (Assign(rows, apply("min", self.height, self.m - m0)), *call)


def divides(size: Expr, extent: Expr) -> bool:
    """Whether parts of that size are known to end where the extent does."""
    n, m = as_int(size), as_int(extent)
    return n is not None and m is not None and n > 0 and m % n == 0


def contraction(r: Request) -> LoopNest:
    """The nest of a contraction."""
    wide = windowed(r)
    if wide is not r:
        with suppress(Declined):
            return ContractionNest(wide, recognise(wide)).nest()
    return ContractionNest(r, recognise(r, turned=True)).nest()


__all__ = ["contraction"]
