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
    fresh_axis,
    index,
    loads,
    poly_mul,
    substitute,
    to_text,
    walk,
)
from onnxjit.codegen.kernel import Stage, TensorType, product, rename_axes
from onnxjit.codegen.loops import (
    TILE,
    Address,
    Assign,
    Call,
    For,
    If,
    Local,
    LoopNest,
    Stmt,
    Store,
    loop,
)
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    coefficient,
    flat_offset,
    flatten_loads,
    flatten_stage,
    magnitude,
    merge_axes,
    split_axes,
    strides,
    typical,
    without,
)
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Declined, Request

DEPTH = 1024
"""Longest k that is not blocked: a panel of 32 columns is then 128 KB, an eighth of L2."""

BLOCK_DEPTH = 768
ROWS_BYTES = 256 * 1024
"""Part of x (or of the copied window) that one tile works on, so that it stays in L2."""

PANEL_BYTES = 256 * 1024
TILES = 8
"""Parallel tiles wanted, so that two to four threads finish together."""

SEGMENTS = 512
CONFLICT = 1024
"""Row strides that are a multiple of 4 KB map all rows of a tile to the same L1 sets; measured on
14x32 tiles: 143 GFLOP/s apart from that, 109 at 4 KB, 65 at 16 KB."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """A stage recognised as a contraction, its axes sorted by role."""

    stage: FlatStage
    red: Reduce
    x: Load
    y: Load
    batch: tuple[Axis, ...]
    m: tuple[Axis, ...]
    n: tuple[Axis, ...]
    k: tuple[Axis, ...]
    window: Stage | None


def recognise(r: Request) -> Contraction:
    """The contraction that a kernel is, or `Declined`."""
    k = r.kernel
    window: Stage | None = None
    final = k.stages[-1]
    layouts = dict(r.layouts)
    if len(k.stages) == 2 and not k.stages[0].reduces and not k.stages[0].index:
        window = k.stages[0]
        rank = len(window.axes)
        layouts[window.buffer] = (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))
    elif len(k.stages) != 1:
        raise Declined(f"{len(k.stages)} stages")
    if sum(s.buffer == final.buffer for s in k.stages) > 1:
        raise Declined("several stages store the output")
    reds = final.reduces
    if len(reds) != 1 or reds[0].fn != "sum":
        raise Declined("not one sum")
    body = reds[0].body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype == "float32"):
        raise Declined(f"the sum is not over a product of float32 values but {body.dtype}")
    if not all(isinstance(a, Load) for a in body.args):
        raise Declined("a factor is not a plain read")
    if as_int(product(a.extent for a in reds[0].axes)) == 0:
        raise Declined("nothing is summed")
    stage = split_axes(flatten_stage(final, k.types, layouts))
    (red,) = [x for x in walk(stage.value) if isinstance(x, Reduce)] or [None]
    if red is None:
        raise Declined("the sum has one term")
    order = sorted(stage.axes, key=lambda a: _stride(stage.offset, a), reverse=True)
    if window is None:
        stage, order = merge_axes(stage, order)
    (red,) = [x for x in walk(stage.value) if isinstance(x, Reduce)]
    p, q = red.body.args  # type: ignore[attr-defined]
    if not (isinstance(p, Load) and isinstance(q, Load)):
        raise Declined("a factor is not a plain read")
    in_p, in_q = axes_of(p.index[0]), axes_of(q.index[0])
    inner = order[-1] if order else None
    swap = inner is not None and inner in in_p and inner not in in_q
    fixed = [v.buffer in r.constants for v in (p, q)]
    if window is not None:
        swap = q.buffer == window.buffer
    elif k.types[final.buffer].rank > 2 and fixed[0] != fixed[1]:
        swap = fixed[0]
    elif not any(a in in_q and a not in in_p for a in order):
        swap = True
    x, y = (q, p) if swap else (p, q)
    in_x, in_y = (in_q, in_p) if swap else (in_p, in_q)
    for e in (x.index[0], y.index[0], stage.offset):
        for a in (*order, *red.axes):
            if coefficient(e, a) is None:
                raise Declined("an index is not affine")
    if any(isinstance(v, Load) for e in (x.index[0], y.index[0]) for v in walk(e)):
        raise Declined("an operand is read through data")
    others = [v for v in loads(replace_node(stage.value, red, Const(0, red.dtype)))]
    if any(v.buffer in (y.buffer, window.buffer if window else None) for v in others):
        raise Declined("an operand is read again after the sum")
    m = tuple(a for a in order if a in in_x and a not in in_y)
    n = tuple(a for a in order if a in in_y and a not in in_x)
    batch = tuple(a for a in order if (a in in_x) == (a in in_y))
    if not n and window is not None and y.buffer in r.constants and m:
        # One filter: a tile with one useful column still beats a scalar sum over the window.
        n = (fresh_axis(ONE),)
    if not n:
        raise Declined("no column axis")
    if window is not None and x.buffer != window.buffer:
        raise Declined("the padded operand is the column operand")
    if any(a not in in_x and a not in in_y for a in red.axes):
        raise Declined("a summed axis occurs in no operand")
    width = as_int(column_axis(n, stage.offset).extent)
    if width is not None and width < 4 and window is None:
        raise Declined(f"only {width} columns")
    return Contraction(stage, red, x, y, batch, m, n, red.axes, window)


def _stride(e: Expr, a: Axis) -> float:
    c = coefficient(e, a)
    return magnitude(c) if c is not None else 0.0


def column_axis(n: Sequence[Axis], offset: Expr) -> Axis:
    """The column axis that register tiles run along: contiguous in the output, or the longest."""

    def key(a: Axis) -> tuple[bool, int]:
        size = typical(a.extent)
        return (coefficient(offset, a) is ONE and size >= 8, size)

    return max(n, key=key)


def contraction(r: Request) -> LoopNest:
    """The nest of a contraction."""
    return _Builder(r, recognise(r)).nest()


class _Builder:
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
        m_sorted = sorted(c.m, key=lambda a: _stride(off, a), reverse=True)
        m_tile = m_sorted[-1] if m_sorted else None
        row = m_sorted[-2] if len(m_sorted) > 1 else None
        outer = [a for a in c.stage.axes if a not in (n_tile, m_tile, row)]
        outer = [a for a in sorted(outer, key=lambda a: _stride(off, a), reverse=True)]
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
        if as_int(self.panels) is None:
            most = PANEL_BYTES // (max(1, depth) * 4 * self.nr)
            self.group = min(self.group, max(1, most))
        self.row_blocks = ceil_div_by(extent, self.block)
        self.depth_blocks = 1
        whole = as_int(self.block) is not None and (
            self.row is None or as_int(m_tiles) is not None
        )
        if as_int(self.depth) is not None and depth > DEPTH and self.c.window is None and whole:
            self.depth_blocks = -(-depth // BLOCK_DEPTH)
        if self.depth_blocks > 1:
            rows = typical(self.block) * (typical(m_tiles) if self.row is not None else 1)
            self.group = min(self.group, max(1, PANEL_BYTES // (rows * self.mr * self.nr * 4)))
        self.panel_blocks = (self.panels + (self.group - 1)) // self.group

    def window_row_bytes(self) -> Expr:
        """Bytes of one row of the padded input, channels of one group only."""
        w = self.c.window
        assert w is not None
        logical = self.logical_window_index()
        summed = axes_of(logical[1]) & set(self.final_red().axes) if len(logical) > 1 else set()
        channels = product(a.extent for a in summed)
        return poly_mul(poly_mul(w.axes[-1].extent, channels), index(4))

    def final_red(self) -> Reduce:
        return self.r.kernel.stages[-1].reduces[0]

    def logical_window_index(self) -> tuple[Expr, ...]:
        w = self.c.window
        assert w is not None
        for v in loads(self.r.kernel.stages[-1].value):
            if v.buffer == w.buffer:
                return v.index
        raise Declined("the padded operand is not read")

    # --- operands -----------------------------------------------------------------------------

    def row_operand(self, x: Load, k_axes: list[Axis]) -> tuple[Operand, list[Axis]]:
        """Where micro-kernels read rows, and the order of the k axes that this wants."""
        setup: list[Stmt] = []
        offset = x.index[0]
        buffer = x.buffer
        if self.c.window is not None:
            buffer, offset, setup = self.copy_window(x)
        k_axes = sorted(k_axes, key=lambda a: _stride(offset, a), reverse=True)
        step = coefficient(offset, self.mi) if self.mi is not None else ZERO
        unit = k_axes and coefficient(offset, k_axes[-1]) is ONE
        if not unit:
            if self.c.window is not None:
                raise Declined("the window's channels are not contiguous")
            buffer, offset, setup, k_axes = self.gather_rows(x, k_axes)
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

    def copy_window(self, x: Load) -> tuple[str, Expr, list[Stmt]]:
        """Copies the part of the padded input that the tile's rows read into scratch."""
        w = self.c.window
        assert w is not None
        table = dict(self.names)
        logical = [self.split_names(i) for i in self.logical_window_index()]
        moving = {a for a in (self.row, self.mi) if a is not None}
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
                rel = rel - poly_mul(c, self.row) + poly_mul(c, Var("row_in_block"))
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
        del moving, x
        return "window", offset, setup

    def split_names(self, e: Expr) -> Expr:
        """A logical index of the kernel's stage in terms of the split axes of `c.stage`."""
        return substitute(e, self.splits())

    def splits(self) -> dict[Expr, Expr]:
        """How the stage's original axes are written in the axes after splitting."""
        original = self.r.kernel.stages[-1]
        flat = flatten_stage(original, self.r.kernel.types, self.r.layouts)
        table: dict[Expr, Expr] = {a: ZERO for a in original.axes if a.extent is ONE}
        for red in original.reduces:
            table.update({a: ZERO for a in red.axes if a.extent is ONE})
        if set(flat.axes) <= {*self.c.stage.axes} and all(
            a.extent is ONE or a in self.c.k for a in self.final_red().axes
        ):
            return table
        return {**table, **self.grouped_splits(flat)}

    def grouped_splits(self, flat: FlatStage) -> dict[Expr, Expr]:
        """The one split that a grouped convolution makes: filters into (group, filter)."""
        missing = [a for a in flat.axes if a not in self.c.stage.axes]
        new = [a for a in self.c.stage.axes if a not in flat.axes]
        if len(missing) != 1 or len(new) != 2:
            raise Declined("the window's axes were split more than once")
        outer, inner = new
        return {missing[0]: poly_mul(outer, inner.extent) + inner}

    def gather_rows(
        self, x: Load, k_axes: list[Axis]
    ) -> tuple[str, Expr, list[Stmt], list[Axis]]:
        """Copies the tile's rows into scratch with k contiguous."""
        if self.row is not None:
            raise Declined("rows with two strides and k not contiguous")
        rows = self.block * self.mr
        depth = product(a.extent for a in k_axes)
        self.locals.append(Local("rows", "float32", poly_mul(rows, depth), stack=False))
        first, _ = self.block_vars()
        r = Axis("gr", rows)
        extent = self.mi.extent if self.mi is not None else ONE
        source = substitute(
            x.index[0], {self.mi: poly_mul(first, index(self.mr)) + r} if self.mi else {}
        )
        at: Expr = r
        for a in k_axes:
            at = poly_mul(at, a.extent) + a
        body: tuple[Stmt, ...] = (Store("rows", at, Load(x.buffer, (source,), x.dtype)),)
        # The row with the smaller stride goes innermost on the reading side.
        for a in reversed(k_axes):
            body = (loop(a, *body),)
        left = extent - poly_mul(first, index(self.mr))
        setup: list[Stmt] = [For(r, ZERO, apply("min", rows, left), body)]
        offset: Expr = poly_mul(self.mi - poly_mul(first, index(self.mr)), depth) if self.mi else ZERO
        inner: Expr = ZERO
        for a in k_axes:
            inner = poly_mul(inner, a.extent) + a
        self.notes.append("rows gathered into scratch")
        return "rows", offset + inner, setup, k_axes

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
        count = poly_mul(index(self.group * self.nr), depth)
        self.locals.append(Local("packed", "float32", count, stack=False))
        j = Axis("pj", index(self.nr))
        first = Var("pb") * self.group
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
        ordered = sorted(k_axes, key=lambda a: _stride(offset, a), reverse=True)
        contiguous = coefficient(offset, self.ni) is ONE
        loops_: tuple[Stmt, ...]
        if columns is not None and columns % self.nr == 0:
            stop: Expr = index(self.nr)
        else:
            stop = limit
        if contiguous:
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
            shift = poly_mul(x.step, index(row0)) if not isinstance(row0, Expr) else poly_mul(
                x.step, row0
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
            return (
                If(apply("eq", kb, 0), (call,), (tile_call(more, at, row0),)),
            )

        static = as_int(m_extent)
        rows: Expr = index(mr)
        main = variants(mr, ZERO, 0)
        compute: tuple[Stmt, ...] = main
        if static is None:
            rows = Var("rows")
            left = Var("left")
            done = Var("done")
            tail: list[Stmt] = [Assign(done, ZERO)]
            for t in self.cover.tails:
                tail.append(
                    If(
                        apply("le", index(t.mr), rows - done),
                        (*variants(t.mr, ZERO, done), Assign(done, done + t.mr)),
                    )
                )
            del left
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
        body: tuple[Stmt, ...] = (Assign(m0, mt * mr), *compute, *finish)
        if self.row is not None:
            body = (For(mt, ZERO, m_tiles, body),)
            rv = self.row
            body = (Assign(Var("row_in_block"), rv - first), *body)
            body = (For(rv, first, last, body),)
        else:
            body = (For(mt, first, last, body),)
        pb = Var("pb")
        body = (*copied, For(panel, pb * self.group, self.panel_stop(), body))
        if blocked:
            body = (For(kb, ZERO, index(self.depth_blocks), body),)
        body = (*x.setup, *self.pack_setup, *body)
        rb_axis, pb_axis = Axis("rb", self.row_blocks), Axis("pb", self.panel_blocks)
        # Row blocks outermost: neighbouring tiles then share the rows and stream the panels.
        nest, tiles = with_tiles([*self.outer, rb_axis, pb_axis], body)
        notes = [
            f"tile {mr}x{nr}, {to_text(self.block)} row {'rows' if self.row is not None else 'tiles'} and "
            f"{self.group} panels a step"
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
            and self.group >= 4
            and as_int(self.block) is not None
            and as_int(x.run) is not None
        )

    def copied_rows(
        self, x: Operand, m_extent: Expr, length: int, run: Expr, shift: Expr
    ) -> tuple[Operand, tuple[Stmt, ...]]:
        """Copies the block's rows (one block of k) into scratch with a stride that is no power of
        two."""
        assert self.mi is not None
        first, last = self.block_vars()
        step = length + 16
        k = Axis("ck", run)
        if self.row is not None:
            rows = poly_mul(self.block, m_extent)
            at = poly_mul(self.row - first, m_extent) + self.mi
            start, stop = ZERO, m_extent
        else:
            rows = self.block * self.mr
            at = self.mi - poly_mul(first, index(self.mr))
            start = poly_mul(first, index(self.mr))
            stop = apply("min", poly_mul(last, index(self.mr)), m_extent)
        self.locals.append(Local("rows", "float32", rows * step, stack=False))
        value = Load(x.buffer, (x.base + shift + k,), "float32")
        body: Stmt = For(self.mi, start, stop, (loop(k, Store("rows", at * step + k, value)),))
        if self.row is not None:
            body = For(self.row, first, last, (body,))
        self.notes.append("rows copied to a stride without cache conflicts")
        return replace(x, buffer="rows", base=at * step, step=index(step)), (body,)

    def epilogue(self, m0: Expr, rows: Expr, acc_at: Expr) -> tuple[Stmt, ...]:
        """Stores one tile through the output stage's own expression."""
        nr = self.nr
        i, j = Var("ei"), Var("ej")
        n0 = poly_mul(Var("panel"), index(nr))
        value = replace_node(
            self.stage.value, self.red, Load("acc", (acc_at + poly_mul(i, index(nr)) + j,), "float32")
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


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows as micro-kernels see them: element (i, s, k) is at base + i*step + segments[s] + k."""

    buffer: str
    base: Expr
    step: Expr
    count: Expr
    run: Expr
    setup: tuple[Stmt, ...]


def walk_axes(e: Expr) -> set[Axis]:
    return axes_of(e)


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


def ceil_div_by(a: Expr, b: Expr) -> Expr:
    """a / b rounded up."""
    return apply("floordiv", a + b - 1, b)


def collect_and(e: Expr, out: list[Expr]) -> None:
    if isinstance(e, Apply) and e.fn == "logical_and":
        for a in e.args:
            collect_and(a, out)
    else:
        out.append(e)


__all__ = ["Contraction", "contraction", "flat_offset", "recognise"]
