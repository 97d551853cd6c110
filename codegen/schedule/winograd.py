"""Schedule for 3x3 correlations with stride 1 by minimal filtering (Winograd's algorithm).

A tile of m x m output pixels costs (m + 2)² multiplications per pair of channels instead of 9 m².
A step takes a block of T output tiles and some panels of output channels:

1. *Input transform*: each patch of the padded input, one column of pixels after the other (a column
   is kept for the two patches that share it), then the rows of a patch; vectors run along channels.
2. *Products*: for each of the (m + 2)² elements a matrix product of T rows by the block's panels
   of the filters, which were transformed when the model was compiled.
3. *Output transform* and the output stage's own expression, one panel and tile after the other.

Pixels outside the input are filled in while they are read; what lies past the last output row or
column is computed and not stored. Every tile of a block costs the same, so the number of tiles,
not their place, decides; rows of tiles of all images of a batch follow each other.

An infinity or NaN in a patch reaches all outputs of its tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Expr,
    Load,
    Var,
    apply,
    as_int,
    const,
    index,
    poly_mul,
    substitute,
)
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
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.schedule.axes import ceil_div
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Request
from onnxjit.codegen.schedule.winograd_cost import THREADS, Choice, choose
from onnxjit.codegen.schedule.winograd_match import Correlation, correlation
from onnxjit.codegen.schedule.winograd_transforms import Line

F = "float32"
LANES = 16
"""Channels in scratch are padded to a multiple of this, so that no transform has a remainder."""

LINE = 16
"""Elements of a cache line."""


class WinogradNest:
    """Builds the nest of a correlation for one choice of algorithm and block."""

    def __init__(self, r: Request, c: Correlation, choice: Choice) -> None:
        self.r, self.c, self.choice = r, c, choice
        self.alg = choice.algorithm
        self.m, self.a = self.alg.m, self.alg.a
        self.mr, self.nr = choice.tile.mr, choice.tile.nr
        depth, columns = as_int(c.k.extent), as_int(c.n.extent)
        assert depth is not None and columns is not None
        self.depth, self.columns = depth, columns
        self.step = -(-depth // LANES) * LANES  # channels of a pixel in scratch
        if self.step % 256 == 0:
            self.step += LANES  # rows a multiple of 1 KB apart would share few sets of L1
        self.panels = -(-columns // self.nr)

        self.sizes: list[Stmt] = []
        self.row_blocks, self.width_blocks = self.divide(lambda name, e: e)
        self.divide(self.named)
        tiles = as_int(poly_mul(self.rows, self.width))
        self.tiles = -(-(tiles or choice.tiles) // self.mr) * self.mr
        self.plane = self.tiles * self.step + LANES

    def divide(self, named: Callable[[str, Expr], Expr]) -> tuple[Expr, Expr]:
        """Divides the tiles into blocks of `rows` rows of `width` tiles, at most `choice.tiles` in
        all; returns the numbers of blocks. `named` may put run-time sizes into variables."""
        c, most = self.c, index(self.choice.tiles)
        batch = c.batch.extent if c.batch is not None else ONE
        self.tile_rows = named("high", ceil_div(c.row.extent, self.m))
        self.tile_columns = named("wide", ceil_div(c.column.extent, self.m))
        self.all_rows = named("count", poly_mul(batch, self.tile_rows))
        width_blocks = named("wide_parts", ceil_div(self.tile_columns, self.choice.tiles))
        self.width = named("width", even_size(self.tile_columns, width_blocks))
        fits = apply("floordiv", most, self.width)
        if as_int(self.all_rows) is None:
            # The choice could not weigh the number of steps: leave every thread some.
            fits = apply("min", fits, ceil_div(self.all_rows, THREADS))
        height = named("height", apply("max", fits, 1))
        row_blocks = named("parts", apply("floordiv", self.all_rows + height - 1, height))
        self.rows = named("block", even_size(self.all_rows, row_blocks))
        return row_blocks, width_blocks

    def named(self, name: str, e: Expr) -> Expr:
        """A run-time size as a variable that the body sets first."""
        if as_int(e) is not None:
            return e
        self.sizes.append(Assign(Var(name), e))
        return Var(name)

    def nest(self) -> LoopNest:
        m, a = self.m, self.a
        rb, wb = Var("rb"), Var("wb")
        group = self.choice.group
        whole_width = self.width_blocks is ONE
        self.x0: Expr = ZERO if whole_width else Var("x0")
        self.x1: Expr = self.tile_columns if whole_width else Var("x1")
        start_row, start_column = poly_mul(rb, self.rows), poly_mul(wb, self.width)
        limits: list[Stmt] = [
            *self.sizes,
            Assign(Var("g0"), start_row),
            Assign(Var("g1"), apply("min", start_row + self.rows, self.all_rows)),
        ]
        if not whole_width:
            limits += [
                Assign(Var("x0"), start_column),
                Assign(Var("x1"), apply("min", start_column + self.width, self.tile_columns)),
            ]
        body: tuple[Stmt, ...] = (
            *limits,
            Store("segments", ZERO, ZERO),
            *self.input_transform(),
            Assign(Var("rows"), ceil_div(Var("t"), self.mr)),
            *self.products(),
        )
        # Constants are set once, because each occurrence would be typed and lowered again.
        body = (*(Assign(v, const(c, F)) for c, v in self.alg.constants), *body)
        axes = [
            Axis("rb", self.row_blocks),
            Axis("wb", self.width_blocks),
            Axis("pb", index(-(-self.panels // group))),
        ]
        nest, tiles = with_tiles(axes, body)
        locals_ = (
            Local("segments", "int64", ONE),
            Local("column", F, index(a * self.step), stack=False),
            Local("lines", F, index(2 * m * a * self.step), stack=False),
            Local("inputs", F, index(a * a * self.plane), stack=False),
            Local("products", F, index(self.tiles * a * a * self.nr), stack=False),
            Local("halves", F, index(m * a * self.nr)),
            Local("results", F, index(m * m * self.nr)),
        )
        notes = (
            f"{self.alg.name}; a step takes up to {self.choice.tiles} tiles and {group} panels; "
            f"tile {self.mr}x{self.nr}",
        )
        symbols = (self.choice.tile.symbol,)
        nested = finish_nest(
            self.r, nest, tiles, "winograd", locals=locals_, symbols=symbols, notes=notes
        )
        buffer, offset, column, inner = self.c.weights
        packing = Packing(buffer, offset, (), column, inner, self.nr, self.alg.filter)
        return replace(nested, packings=(packing,))

    def line(
        self, name: str, source: Sequence[Expr], transform: Line, to: str, at: Expr, step: int
    ) -> tuple[Stmt, ...]:
        """Transforms one line of loads and stores the results `step` apart; `name` is the variable
        that holds the first offset."""
        setup, results = transform(source)
        out = Var(name)
        stores = [Store(to, out + n * step, e) for n, e in enumerate(results)]
        return (*setup, Assign(out, at), *stores)

    # --- 1: input ------------------------------------------------------------------------------

    def input_transform(self) -> tuple[Stmt, ...]:
        """inputs[e][t][k]: element e of the transformed patch of the block's tile t.

        `lines` keeps 2 m columns, transformed once: column w is at w % (2 m), so that a patch is
        the m columns of one half and the first two of the other.
        """
        c, m, a, step = self.c, self.m, self.a, self.step
        tx, w, i = Var("tx"), Var("w"), Var("i")
        ty, top, t, done = Var("ty"), Var("top"), Var("t"), Var("done")
        first, last = Var("vfirst"), Var("vlast")
        k = Axis("ik", c.k.extent)
        both = "logical_and"
        column_inside = apply(both, apply("le", c.columns.low, w), apply("lt", w, c.columns.high))
        row_inside = apply(both, apply("le", first, i), apply("lt", i, last))
        all_inside = apply(both, apply("le", first, 0), apply("le", index(a), last))
        slot = Var("slot")

        def vertical(lines: list[Expr], *setup: Stmt) -> Stmt:
            body = self.line("o", lines, self.alg.inputs, "lines", slot + k, step)
            return For(k, ZERO, k.extent, (*setup, *body))

        def filled(value: Expr) -> tuple[Stmt, ...]:
            return (For(k, ZERO, k.extent, (Store("column", i * step + k, value),)),)

        inside = apply(both, column_inside, row_inside)
        columns: tuple[Stmt, ...] = (
            For(i, ZERO, index(a), (If(inside, filled(self.pixel(i, k)), filled(c.fill)),)),
            vertical([Load("column", (k + n * step,), F) for n in range(a)]),
        )
        if c.contiguous:
            direct = self.direct(vertical, k)
            columns = (If(apply(both, column_inside, all_inside), direct, columns),)
        half = m * a * step
        columns = (Assign(slot, poly_mul(apply("mod", w, 2 * m), index(a * step))), *columns)

        kp = Axis("ip", index(-(-self.depth // LANES) * LANES))
        near, far = Var("near"), Var("far")
        lines: list[Expr] = [near + j * (a * step) for j in range(m)]
        lines += [far + j * (a * step) for j in range(a - m)]
        edge = tx * m + a
        return (
            Assign(t, ZERO),
            For(Var("g"), Var("g0"), Var("g1"), (
                *self.place(),
                Assign(top, ty * m),
                Assign(first, c.rows.low - top),
                Assign(last, c.rows.high - top),
                Assign(done, poly_mul(self.x0, index(m))),
                For(tx, self.x0, self.x1, (
                    For(w, done, edge, columns),
                    Assign(done, edge),
                    Assign(Var("half"), poly_mul(apply("mod", tx, 2), index(half))),
                    For(i, ZERO, index(a), (
                        For(kp, ZERO, kp.extent, (
                            Assign(near, Var("half") + i * step + kp),
                            Assign(far, half + i * step + kp - Var("half")),
                            *self.line(
                                "o", [Load("lines", (e,), F) for e in lines], self.alg.inputs,
                                "inputs", i * (a * self.plane) + t * step + kp, self.plane,
                            ),
                        )),
                    )),
                    Assign(t, t + 1),
                )),
            )),
        )  # fmt: skip

    def pixel(self, row: Expr, k: Axis) -> Expr:
        """The input at row `row` of the patch, column `w` and channel `k`, inside the border."""
        c = self.c
        table = {c.ph: Var("top") + row, c.pw: Var("w"), c.k: k, **self.image()}
        return substitute(c.pixel, table)

    def direct(self, vertical: Callable[..., Stmt], k: Axis) -> tuple[Stmt, ...]:
        """The column's transform with all rows read in place."""
        pixels = [self.pixel(index(n), k) for n in range(self.a)]
        first = pixels[0]
        if not isinstance(first, Load):
            return (vertical(pixels),)
        start, near = Var("source"), Var("near")
        reads: list[Expr] = []
        for p in pixels:
            assert isinstance(p, Load)
            reads.append(Load(p.buffer, (near + (p.index[0] - first.index[0]),), F))
        at = substitute(first.index[0], {k: ZERO})
        return Assign(start, at), vertical(reads, Assign(near, start + k))

    def image(self) -> dict[Expr, Expr]:
        return {self.c.batch: Var("image")} if self.c.batch is not None else {}

    def place(self) -> tuple[Stmt, ...]:
        """Image and tile row of the row `g` of all images' tiles."""
        g, ty = Var("g"), Var("ty")
        if self.c.batch is None:
            return (Assign(ty, g),)
        return (
            Assign(Var("image"), apply("floordiv", g, self.tile_rows)),
            Assign(ty, apply("mod", g, self.tile_rows)),
        )

    # --- 2: products ---------------------------------------------------------------------------

    def products(self) -> tuple[Stmt, ...]:
        """products[t][e]: a row of nr output channels of element e, then its output transform."""
        a, nr, group = self.a, self.nr, self.choice.group
        e, panel, rt, first = Var("e"), Var("panel"), Var("rt"), Var("pb") * group
        matrix = (panel * (a * a) + e) * (self.depth * nr)
        # Calls prefetch the next matrix, each from a line of `depth` steps further on.
        ahead = matrix + self.depth * nr + rt * (self.depth * LINE)
        call = Call(
            self.choice.tile.symbol,
            (
                Address("inputs", e * self.plane + rt * (self.mr * self.step)),
                index(self.step),
                Address("segments", ZERO),
                ONE,
                index(self.depth),
                Address(self.c.weights[0], matrix),
                Address("products", rt * (self.mr * a * a * nr) + e * nr),
                index(a * a * nr),
                ZERO,
                Address(self.c.weights[0], ahead),
            ),
        )
        last: Expr = index(self.panels)
        if self.panels > group:
            last = apply("min", first + group, last)
        return (
            For(panel, first, last, (
                For(e, ZERO, index(a * a), (For(rt, ZERO, Var("rows"), (call,)),)),
                *self.output_transform(),
            )),
        )  # fmt: skip

    # --- 3: output -----------------------------------------------------------------------------

    def output_transform(self) -> tuple[Stmt, ...]:
        m, a, nr = self.m, self.a, self.nr
        tx, ty, i, t = Var("tx"), Var("ty"), Var("i"), Var("t")
        j = Axis("j", index(nr))
        near, line, column = Var("near"), a * nr, j + i * nr

        def loaded(buffer: str, step: int) -> list[Expr]:
            return [Load(buffer, (near + n * step,), F) for n in range(a)]

        down = self.line("o", loaded("products", line), self.alg.outputs, "halves", column, line)
        at = j + i * (m * nr)
        across = self.line("o", loaded("halves", nr), self.alg.outputs, "results", at, nr)
        full = index(nr)
        return (
            Assign(t, ZERO),
            For(Var("g"), Var("g0"), Var("g1"), (
                *self.place(),
                Assign(Var("top"), ty * m),
                For(tx, self.x0, self.x1, (
                    For(i, ZERO, index(a), (
                        For(j, ZERO, full, (Assign(near, t * (a * line) + column), *down)),
                    )),
                    For(i, ZERO, index(m), (
                        For(j, ZERO, full, (Assign(near, i * line + j), *across)),
                    )),
                    *self.epilogue(),
                    Assign(t, t + 1),
                )),
            )),
        )  # fmt: skip

    def epilogue(self) -> tuple[Stmt, ...]:
        """Stores the tile's pixels inside the output through the stage's own expression."""
        c, m, nr = self.c, self.m, self.nr
        i, o, j = Var("i"), Var("o"), Var("ej")
        result = Load("results", (i * (m * nr) + o * nr + j,), F)
        value = replace_node(c.stage.value, c.total, result)
        left = Var("tx") * m
        table: dict[Expr, Expr] = {
            c.n: Var("panel") * nr + j,
            c.row: Var("top") + i,
            c.column: left + o,
            **self.image(),
        }
        store = Store(c.stage.buffer, substitute(c.stage.offset, table), substitute(value, table))

        def loops_(stop: int) -> tuple[Stmt, ...]:
            return (
                For(i, ZERO, apply("min", index(m), c.row.extent - Var("top")), (
                    For(o, ZERO, apply("min", index(m), c.column.extent - left), (
                        For(j, ZERO, index(stop), (store,)),
                    )),
                )),
            )  # fmt: skip

        whole, rest = divmod(self.columns, nr)
        if not rest:
            return loops_(nr)
        if not whole:
            return loops_(rest)
        return (If(apply("lt", Var("panel"), whole), loops_(nr), loops_(rest)),)


def even_size(extent: Expr, parts: Expr) -> Expr:
    """The size of even parts of an extent, at least 1."""
    size = apply("floordiv", extent + parts - 1, apply("max", parts, 1))
    return apply("max", size, 1)


def winograd(r: Request) -> LoopNest:
    """The nest of a 3x3 correlation with stride 1, where minimal filtering is estimated to pay."""
    c = correlation(r)
    return WinogradNest(r, c, choose(c, r)).nest()


__all__ = ["winograd"]
