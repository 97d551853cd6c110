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

Loop order inside a tile: blocks of k (so that a panel stays in L1/L2), panels, rows. See Goto and
van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008) for the blocking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxjit.codegen import microkernels
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
    Address,
    Assign,
    Call,
    For,
    If,
    Local,
    LoopNest,
    Stmt,
    Store,
)
from onnxjit.codegen.schedule.axes import (
    typical,
)
from onnxjit.codegen.schedule.contraction_match import (
    Contraction,
    column_axis,
    recognise,
    stride_of,
)
from onnxjit.codegen.schedule.contraction_operands import Operand, Operands
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Request

ROWS_BYTES = 256 * 1024
"""Part of x (or of the copied window) that one tile works on, so that it stays in L2."""

PANEL_BYTES = 256 * 1024
RESIDENT_BYTES = 400 * 1024
DEPTH = 1024
"""Longest k that is not blocked: a panel of 32 columns is then 128 KB, an eighth of L2."""

BLOCK_DEPTH = 768
TILES = 8
"""Parallel tiles wanted, so that two to four threads finish together."""


class ContractionNest(Operands):
    """Builds the nest step by step; every attribute is set once, in order, by `nest`."""

    def __init__(self, r: Request, c: Contraction) -> None:
        self.r, self.c = r, c
        self.locals: list[Local] = []
        self.notes: list[str] = []
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
        row = m_sorted[-2] if len(m_sorted) > 1 else None
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
        self.outer = [self.axis(a) for a in outer]
        self.row = self.axis(row) if row is not None else None
        self.mi = self.axis(m_tile) if m_tile is not None else None
        self.ni = self.axis(n_tile)
        k_axes = [self.axis(a) for a in c.k]

        m_extent = self.mi.extent if self.mi is not None else ONE
        columns = as_int(self.ni.extent)
        self.cover = microkernels.select(as_int(m_extent), columns, self.r.target)
        self.mr, self.nr = self.cover.main.mr, self.cover.nr
        self.depth = product(a.extent for a in k_axes)
        self.panels = (self.ni.extent + (self.nr - 1)) // self.nr
        m_tiles = (m_extent + (self.mr - 1)) // self.mr

        self.plan_rows(m_extent, m_tiles)
        operand, k_axes = self.row_operand(x, k_axes)
        self.columns_operand(y, k_axes)
        return self.assemble(operand, k_axes, m_extent, m_tiles)

    # --- blocking -----------------------------------------------------------------------------

    def plan_rows(self, m_extent: Expr, m_tiles: Expr) -> None:
        """How many rows and panels one parallel tile covers.

        `block` counts rows of the row axis, or row tiles where there is none; it is an expression
        when a symbolic size decides how many rows fit.
        """
        depth = typical(self.depth)
        line: Expr = index(4 * (depth if depth <= DEPTH else BLOCK_DEPTH))
        if self.c.window is not None:
            line = self.window_row_bytes()
        if self.row is not None:
            per = line if self.c.window is not None else poly_mul(line, m_extent)
            extent = self.row.extent
        else:
            per = index(ROWS_BYTES) if self.c.window is not None else line * self.mr
            extent = m_tiles
            if self.c.window is not None:
                per = apply("floordiv", index(ROWS_BYTES), apply("max", m_tiles, 1))
        n, fixed = as_int(extent), as_int(per)
        outer = typical(product(a.extent for a in self.outer))
        panels = max(1, typical(self.panels))
        self.group = panels
        if n is not None and fixed is not None:
            block = max(1, min(ROWS_BYTES // max(1, fixed), n))
            block = -(-n // -(-n // block)) if n else 1
            count = outer * -(-n // block)
            work = depth * typical(m_extent) * panels * self.nr
            work *= n if self.row is not None else 1
            if count < TILES and work > 200_000:
                if block > 1 and panels < 4 and self.c.window is None:
                    block = max(1, -(-n // -(-TILES // outer)))
                    count = outer * -(-n // block)
                if count < TILES:
                    self.group = max(1, panels // -(-TILES // max(1, count)))
            self.block: Expr = index(block)
        else:
            fits = apply("floordiv", index(ROWS_BYTES), apply("max", per, 1))
            share = (extent + 3) // 4
            self.block = apply("max", apply("min", fits, share), 1)
            if fixed is not None:
                self.block = index(max(1, ROWS_BYTES // max(1, fixed)))
            if self.c.window is None:
                # There may be one row only: the panels alone must give every thread work.
                self.group = min(panels, max(4, -(-panels // TILES)))
        if as_int(self.panels) is None:
            most = PANEL_BYTES // (max(1, depth) * 4 * self.nr)
            self.group = min(self.group, max(1, most))
        self.row_blocks = ceil_div_by(extent, self.block)
        self.depth_blocks = 1
        whole = as_int(self.block) is not None and (self.row is None or as_int(m_tiles) is not None)
        if as_int(self.depth) is not None and depth > DEPTH and self.c.window is None and whole:
            self.depth_blocks = -(-depth // BLOCK_DEPTH)
        if self.depth_blocks > 1:
            rows = typical(self.block) * (typical(m_tiles) if self.row is not None else 1)
            self.group = min(self.group, max(1, PANEL_BYTES // (rows * self.mr * self.nr * 4)))
        self.panel_blocks = (self.panels + (self.group - 1)) // self.group

    def block_vars(self) -> tuple[Expr, Expr]:
        """First and one-past-last row (or row tile) of the block of this tile."""
        extent = self.row.extent if self.row is not None else self.m_tiles()
        start = poly_mul(Var("rb"), self.block)
        n, b = as_int(extent), as_int(self.block)
        if n is not None and b is not None and n % b == 0:
            return start, start + self.block
        return start, apply("min", start + self.block, extent)

    def m_tiles(self) -> Expr:
        extent = self.mi.extent if self.mi is not None else ONE
        return (extent + (self.mr - 1)) // self.mr

    def panel_stop(self) -> Expr:
        first = Var("pb") * self.group
        n = as_int(self.panels)
        if n is not None and n % self.group == 0:
            return first + self.group
        return apply("min", first + self.group, self.panels)

    # --- assembly -----------------------------------------------------------------------------

    def assemble(
        self, x: Operand, k_axes: Sequence[Axis], m_extent: Expr, m_tiles: Expr
    ) -> LoopNest:
        mr, nr = self.mr, self.nr
        if as_int(x.count) != 1:
            self.depth_blocks = 1
        blocked = self.depth_blocks > 1
        tiles_in_block = typical(self.block) * (typical(m_tiles) if self.row is not None else 1)
        cells = mr * nr * (self.group * tiles_in_block if blocked else 1)
        stack = cells * 4 <= 8192
        self.locals.append(Local("acc", "float32", index(cells), stack))

        mt, panel, m0 = Var("mt"), Var("panel"), Var("m0")
        first, last = self.block_vars()
        acc_at: Expr = ZERO
        if blocked:
            slot = panel - Var("pb") * self.group
            if self.row is not None:
                r = self.row - first
                slot = poly_mul(slot, index(tiles_in_block)) + poly_mul(r, m_tiles) + mt
            else:
                slot = poly_mul(slot, index(tiles_in_block)) + mt - first
            acc_at = poly_mul(slot, index(mr * nr))
        x_base = x.base
        if self.mi is not None:
            x_base = substitute(x_base, {self.mi: m0})
        depth_step = 0
        run: Expr = x.run
        x_shift: Expr = ZERO
        y_shift: Expr = ZERO
        kb = Var("kb")
        if blocked:
            total = as_int(self.depth)
            assert total is not None
            depth_step = -(-total // self.depth_blocks)
            depth_step = -(-depth_step // 16) * 16
            run = apply("min", index(depth_step), index(total) - kb * depth_step)
            x_shift = kb * depth_step
            y_shift = kb * (depth_step * nr)
            self.depth_blocks = -(-total // depth_step)
        copied: tuple[Stmt, ...] = ()
        if self.conflicting(x):
            length = depth_step if blocked else as_int(x.run) or 0
            x, copied = self.copied_rows(x, m_extent, length, run, x_shift)
            x_base, x_shift = x.base, ZERO
            if self.mi is not None:
                x_base = substitute(x_base, {self.mi: m0})

        def tile_call(symbol: str, at: Expr, row0: int | Expr = 0) -> Call:
            shift = (
                poly_mul(x.step, index(row0))
                if not isinstance(row0, Expr)
                else poly_mul(x.step, row0)
            )
            where = acc_at + poly_mul(index(nr), row0 if isinstance(row0, Expr) else index(row0))
            return Call(
                symbol,
                (
                    Address(x.buffer, x_base + x_shift + shift),
                    x.step,
                    Address("segments"),
                    x.count,
                    run,
                    Address(self.y_buffer, self.y_panel + y_shift),
                    Address("acc", where),
                    index(nr),
                ),
            )

        symbols: list[str] = []

        def variants(rows: int, at: Expr, row0: Expr | int) -> tuple[Stmt, ...]:
            plain = microkernels.gemm(rows, nr, self.cover.main.isa)
            symbols.append(plain)
            call = tile_call(plain, at, row0)
            if not blocked:
                return (call,)
            more = microkernels.gemm(rows, nr, self.cover.main.isa, accumulate=True)
            symbols.append(more)
            return (If(apply("eq", kb, 0), (call,), (tile_call(more, at, row0),)),)

        static = as_int(m_extent)
        rows: Expr = index(mr)
        main = variants(mr, ZERO, 0)
        compute: tuple[Stmt, ...] = main
        if static is None:
            rows = Var("rows")
            done = Var("done")
            tail: list[Stmt] = [Assign(done, ZERO)]
            for t in self.cover.tails:
                tail.append(
                    If(
                        apply("le", index(t.mr), rows - done),
                        (*variants(t.mr, ZERO, done), Assign(done, done + t.mr)),
                    )
                )
            compute = (
                Assign(rows, apply("min", index(mr), m_extent - m0)),
                If(apply("eq", rows, mr), main, tuple(tail)),
            )
        elif static % mr:
            rest = static % mr
            rows = Var("rows")
            compute = (
                Assign(rows, apply("min", index(mr), m_extent - m0)),
                If(apply("eq", rows, mr), main, variants(rest, ZERO, 0)),
            )
        finish = self.epilogue(m0, rows, acc_at)
        if blocked:
            finish = (If(apply("eq", kb, self.depth_blocks - 1), finish),)
        pb = Var("pb")

        def panels(*inner: Stmt) -> tuple[Stmt, ...]:
            return (For(panel, pb * self.group, self.panel_stop(), inner),)

        body: tuple[Stmt, ...] = (*compute, *finish)
        rows_outside = self.panels_stay()
        body = (Assign(m0, mt * mr), *(panels(*body) if rows_outside else body))
        if self.row is not None:
            rv = self.row
            body = (Assign(Var("row_in_block"), rv - first), For(mt, ZERO, m_tiles, body))
            body = (For(rv, first, last, body),)
        else:
            body = (For(mt, first, last, body),)
        body = (*copied, *(body if rows_outside else panels(*body)))
        if blocked:
            body = (For(kb, ZERO, index(self.depth_blocks), body),)
        body = (*x.setup, *self.pack_setup, *body)
        rb_axis, pb_axis = Axis("rb", self.row_blocks), Axis("pb", self.panel_blocks)
        # Row blocks outermost: neighbouring tiles then share the rows and stream the panels.
        nest, tiles = with_tiles([*self.outer, rb_axis, pb_axis], body)
        notes = [
            f"tile {mr}x{nr}; a step takes {to_text(self.block)} "
            f"{'rows' if self.row is not None else 'row tiles'} and {self.group} panels"
        ]
        result = finish_nest(
            self.r,
            nest,
            tiles,
            "contraction: window" if self.c.window is not None else "contraction",
            locals=tuple(self.locals),
            symbols=tuple(dict.fromkeys(symbols)),
            notes=(*notes, *self.notes),
        )
        packed = (self.packing,) if self.packing is not None else ()
        return replace(result, packings=packed)

    def panels_stay(self) -> bool:
        """Whether all panels of a tile stay in L2, so that rows can be the outer loop: results are
        then written row by row, which touches far fewer pages at a time."""
        depth = as_int(self.depth)
        if depth is None or self.depth_blocks > 1:
            return False
        return depth * self.nr * 4 * self.group <= RESIDENT_BYTES

    def epilogue(self, m0: Expr, rows: Expr, acc_at: Expr) -> tuple[Stmt, ...]:
        """Stores one tile through the output stage's own expression."""
        nr = self.nr
        i, j = Var("ei"), Var("ej")
        n0 = poly_mul(Var("panel"), index(nr))
        value = replace_node(
            self.stage.value,
            self.red,
            Load("acc", (acc_at + poly_mul(i, index(nr)) + j,), "float32"),
        )
        table: dict[Expr, Expr] = {self.ni: n0 + j}
        if self.mi is not None:
            table[self.mi] = m0 + i
        store = Store(
            self.stage.buffer, substitute(self.stage.offset, table), substitute(value, table)
        )

        def loops_(stop: Expr) -> tuple[Stmt, ...]:
            return (For(i, ZERO, rows, (For(j, ZERO, stop, (store,)),)),)

        n = as_int(self.ni.extent)
        if n is None:
            return loops_(apply("min", index(nr), self.ni.extent - n0))
        rest = n % nr
        if not rest:
            return loops_(index(nr))
        if n < nr:
            return loops_(index(n))
        full = apply("lt", Var("panel"), n // nr)
        return (If(full, loops_(index(nr)), loops_(index(rest))),)


def ceil_div_by(a: Expr, b: Expr) -> Expr:
    """a / b rounded up."""
    return apply("floordiv", a + b - 1, b)


def contraction(r: Request) -> LoopNest:
    """The nest of a contraction."""
    return ContractionNest(r, recognise(r)).nest()


__all__ = ["contraction"]
