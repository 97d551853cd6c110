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
from onnxjit.codegen.schedule.winograd_cost import Choice, choose
from onnxjit.codegen.schedule.winograd_match import Correlation, correlation

F = "float32"
LANES = 16
"""Channels in scratch are padded to a multiple of this, so that no transform has a remainder."""


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
        self.ring = 2 * self.m  # columns of pixels that are kept: a power of two, at least a

        self.tile_rows = ceil_div(c.row.extent, self.m)
        self.tile_columns = ceil_div(c.column.extent, self.m)
        batch = c.batch.extent if c.batch is not None else ONE
        self.all_rows = poly_mul(batch, self.tile_rows)
        # A block is `rows` rows of `width` tiles, at most `choice.tiles` in all.
        self.width_blocks, self.width = even_parts(self.tile_columns, index(choice.tiles))
        most = apply("max", apply("floordiv", index(choice.tiles), self.width), 1)
        self.row_blocks, self.rows = even_parts(self.all_rows, most)
        tiles = as_int(poly_mul(self.rows, self.width))
        self.tiles = -(-(tiles or choice.tiles) // self.mr) * self.mr
        self.plane = self.tiles * self.step + LANES

    def nest(self) -> LoopNest:
        m, a = self.m, self.a
        rb, wb, pb = Var("rb"), Var("wb"), Var("pb")
        start_row, start_column = poly_mul(rb, self.rows), poly_mul(wb, self.width)
        group = self.choice.group
        body: tuple[Stmt, ...] = (
            Assign(Var("g0"), start_row),
            Assign(Var("g1"), apply("min", start_row + self.rows, self.all_rows)),
            Assign(Var("x0"), start_column),
            Assign(Var("x1"), apply("min", start_column + self.width, self.tile_columns)),
            Assign(Var("q"), Var("x1") - Var("x0")),
            Store("segments", ZERO, ZERO),
            *self.input_transform(),
            Assign(Var("p1"), apply("min", pb * group + group, index(self.panels))),
            *self.products(),
        )
        axes = [
            Axis("rb", self.row_blocks),
            Axis("wb", self.width_blocks),
            Axis("pb", index(-(-self.panels // group))),
        ]
        nest, tiles = with_tiles(axes, body)
        products = self.tiles * a * a * self.nr
        locals_ = (
            Local("segments", "int64", ONE),
            Local("column", F, index(a * self.step), stack=False),
            Local("lines", F, index(self.ring * a * self.step), stack=False),
            Local("inputs", F, index(a * a * self.plane), stack=False),
            Local("products", F, index(products), stack=False),
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

    # --- 1: input ------------------------------------------------------------------------------

    def input_transform(self) -> tuple[Stmt, ...]:
        """inputs[e][t][k]: element e of the transformed patch of the block's tile t."""
        c, m, a = self.c, self.m, self.a
        g, tx, w = Var("g"), Var("tx"), Var("w")
        ty, top, i = Var("ty"), Var("top"), Var("i")
        first, last = Var("vfirst"), Var("vlast")
        channel = Axis("ik", c.k.extent)

        def pixel(row: Expr) -> Expr:
            return substitute(c.pixel, {c.ph: top + row, c.pw: w, c.k: channel, **self.image()})

        column_inside = apply(
            "logical_and", apply("le", c.columns.low, w), apply("lt", w, c.columns.high)
        )
        whole = apply(
            "logical_and", apply("le", first, 0), apply("le", index(a), last), dtype="bool"
        )
        slot = poly_mul(apply("mod", w, self.ring), index(a * self.step))

        def vertical(lines: list[Expr], k: Axis) -> For:
            setup, results = self.alg.inputs(lines)
            stores = [Store("lines", slot + n * self.step + k, e) for n, e in enumerate(results)]
            return For(k, ZERO, k.extent, (*setup, *stores))

        at = i * self.step + channel
        row_inside = apply("logical_and", apply("le", first, i), apply("lt", i, last))
        border: tuple[Stmt, ...] = (
            For(i, ZERO, index(a), (
                If(
                    apply("logical_and", column_inside, row_inside),
                    (For(channel, ZERO, channel.extent, (Store("column", at, pixel(i)),)),),
                    (For(channel, ZERO, channel.extent, (Store("column", at, c.fill),)),),
                ),
            )),
            vertical([Load("column", (n * self.step + channel,), F) for n in range(a)], channel),
        )  # fmt: skip
        columns: tuple[Stmt, ...] = border
        if c.contiguous:
            direct = vertical([pixel(index(n)) for n in range(a)], channel)
            columns = (If(apply("logical_and", column_inside, whole), (direct,), border),)

        t = poly_mul(g - Var("g0"), Var("q")) + tx - Var("x0")
        padded = Axis("ip", index(-(-self.depth // LANES) * LANES))
        slots = [Var(f"z{j}") for j in range(a)]
        lines = [Load("lines", (slots[j] + i * self.step + padded,), F) for j in range(a)]
        setup, results = self.alg.inputs(lines)
        to = Var("to")
        spread = [
            Store("inputs", to + i * (a * self.plane) + n * self.plane + padded, e)
            for n, e in enumerate(results)
        ]
        horizontal: tuple[Stmt, ...] = (
            Assign(to, poly_mul(t, index(self.step))),
            *(
                Assign(
                    slots[j],
                    poly_mul(apply("mod", tx * m + j, self.ring), index(a * self.step)),
                )
                for j in range(a)
            ),
            For(i, ZERO, index(a), (For(padded, ZERO, padded.extent, (*setup, *spread)),)),
        )
        edge = tx * m + a
        return (
            For(g, Var("g0"), Var("g1"), (
                *self.place(),
                Assign(top, ty * m),
                Assign(first, c.rows.low - top),
                Assign(last, c.rows.high - top),
                Assign(Var("done"), Var("x0") * m),
                For(tx, Var("x0"), Var("x1"), (
                    For(w, Var("done"), edge, columns),
                    Assign(Var("done"), edge),
                    *horizontal,
                )),
            )),
        )  # fmt: skip

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
        a, nr = self.a, self.nr
        e, panel, rt = Var("e"), Var("panel"), Var("rt")
        count = poly_mul(Var("g1") - Var("g0"), Var("q"))
        call = Call(
            self.choice.tile.symbol,
            (
                Address("inputs", e * self.plane + rt * (self.mr * self.step)),
                index(self.step),
                Address("segments"),
                ONE,
                index(self.depth),
                Address(self.c.weights[0], (panel * (a * a) + e) * (self.depth * nr)),
                Address("products", rt * (self.mr * a * a * nr) + e * nr),
                index(a * a * nr),
            ),
        )
        return (
            Assign(Var("rows"), ceil_div(count, self.mr)),
            For(panel, Var("pb") * self.choice.group, Var("p1"), (
                For(e, ZERO, index(a * a), (For(rt, ZERO, Var("rows"), (call,)),)),
                *self.output_transform(),
            )),
        )  # fmt: skip

    # --- 3: output -----------------------------------------------------------------------------

    def output_transform(self) -> tuple[Stmt, ...]:
        m, a, nr = self.m, self.a, self.nr
        g, tx, ty, i = Var("g"), Var("tx"), Var("ty"), Var("i")
        j = Axis("j", index(nr))
        t = poly_mul(g - Var("g0"), Var("q")) + tx - Var("x0")
        source = Var("to")
        column = [Load("products", (source + n * (a * nr) + i * nr + j,), F) for n in range(a)]
        setup, results = self.alg.outputs(column)
        down = [Store("halves", n * (a * nr) + i * nr + j, e) for n, e in enumerate(results)]
        line = [Load("halves", (i * (a * nr) + n * nr + j,), F) for n in range(a)]
        setup2, results2 = self.alg.outputs(line)
        across = [Store("results", i * (m * nr) + n * nr + j, e) for n, e in enumerate(results2)]
        full = index(nr)
        return (
            For(g, Var("g0"), Var("g1"), (
                *self.place(),
                For(tx, Var("x0"), Var("x1"), (
                    Assign(source, poly_mul(t, index(a * a * nr))),
                    For(i, ZERO, index(a), (For(j, ZERO, full, (*setup, *down)),)),
                    For(i, ZERO, index(m), (For(j, ZERO, full, (*setup2, *across)),)),
                    Assign(Var("top"), ty * m),
                    *self.epilogue(),
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


def even_parts(extent: Expr, most: Expr) -> tuple[Expr, Expr]:
    """The number of parts of at most `most` that an extent takes, and their even size (>= 1)."""
    parts = apply("floordiv", extent + most - 1, most)
    size = apply("floordiv", extent + parts - 1, apply("max", parts, 1))
    return parts, apply("max", size, 1)


def winograd(r: Request) -> LoopNest:
    """The nest of a 3x3 correlation with stride 1, where minimal filtering is estimated to pay."""
    c = correlation(r)
    return WinogradNest(r, c, choose(c, r.target)).nest()


__all__ = ["winograd"]
