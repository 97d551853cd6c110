"""Schedule for 3x3 correlations with stride 1 by minimal filtering (Winograd's algorithm).

A tile of m x m output pixels costs (m + 2)² multiplications per pair of channels instead of 9 m².
A block is T output tiles; a call computes some of its rows of tiles, or some panels of output
channels:

1. *Input transform*: each patch of the padded input, one column of pixels after the other (a column
   is kept for the two patches that share it), then the rows of a patch, by a micro-kernel whose
   vectors run along channels. Row-major pixels are transposed into a window before.
2. *Products*: for each of the (m + 2)² elements a matrix product of T rows by the block's panels
   of the filters, which were transformed when the model was compiled.
3. *Output transform*, a micro-kernel too, and the output stage's own expression, one panel and tile
   after the other; row-major results are a row of tiles that is transposed before the expression.

Pixels outside the input are filled in while they are read; what lies past the last output row or
column is computed and not stored. Every tile of a block costs the same, so the number of tiles,
not their place, decides; rows of tiles of all images of a batch follow each other.

An infinity or NaN in a patch reaches all outputs of its tile.
"""

from __future__ import annotations

from dataclasses import replace

from onnxjit.codegen.expr import ONE, ZERO, Axis, Expr, Var, apply, index, poly_mul
from onnxjit.codegen.loops import (
    FIRST_PART,
    LAST_PART,
    Address,
    Assign,
    Call,
    For,
    Local,
    LoopNest,
    Stmt,
    Store,
)
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.schedule.axes import ceil_div
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.register_tile import ahead
from onnxjit.codegen.schedule.request import Request
from onnxjit.codegen.schedule.winograd_cost import choose
from onnxjit.codegen.schedule.winograd_input import Inputs
from onnxjit.codegen.schedule.winograd_match import correlation
from onnxjit.codegen.schedule.winograd_output import Outputs
from onnxjit.codegen.schedule.winograd_tiles import F


class WinogradNest(Inputs, Outputs):
    """Builds the nest of a correlation for one choice of algorithm and block."""

    def nest(self) -> LoopNest:
        rb, wb = Var("rb"), Var("wb")
        start_row, start_column = poly_mul(rb, self.rows), poly_mul(wb, self.width)
        group = self.choice.group
        parts: Expr = index(-(-self.panels // group)) if group else self.part_rows
        whole = parts is ONE or group
        first, last = (ZERO, self.rows) if whole else (FIRST_PART, LAST_PART)
        limits: list[Stmt] = [
            *self.sizes,
            Assign(Var("g0"), start_row + first),
            Assign(Var("g1"), apply("min", start_row + last, self.all_rows)),
        ]
        if not self.whole_width:
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
        nest, blocks = with_tiles(
            [Axis("rb", self.row_blocks), Axis("wb", self.width_blocks)], body
        )
        locals_ = (
            Local("segments", "int64", ONE),
            *self.locals,
        )
        notes = (
            f"{self.alg.name}; blocks of up to {self.choice.tiles} tiles, shared by "
            f"{f'{group} panels' if group else 'rows'}; tile {self.mr}x{self.nr}",
        )
        symbols = tuple(dict.fromkeys(self.symbols))
        nested = finish_nest(
            self.r,
            nest,
            poly_mul(blocks, parts),
            "winograd",
            locals=locals_,
            symbols=symbols,
            notes=notes,
            parts=parts,
        )
        buffer, offset, column, inner = self.c.weights
        packing = Packing(buffer, offset, (), column, inner, self.nr, self.alg.filter)
        return replace(nested, packings=(packing,))

    # --- 2: products ---------------------------------------------------------------------------

    def products(self) -> tuple[Stmt, ...]:
        """products[t][e]: a row of nr output channels of element e, then its output transform."""
        a, nr = self.a, self.nr
        self.locals.append(Local("products", F, index(self.tiles * a * a * nr), stack=False))
        e, panel, rt = Var("e"), Var("panel"), Var("rt")
        matrix = (panel * (a * a) + e) * (self.depth * nr)
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
                Address(self.c.weights[0], matrix + ahead(nr, index(self.depth), rt)),
            ),
        )
        first: Expr = ZERO
        last: Expr = index(self.panels)
        group = self.choice.group
        if 0 < group < self.panels:
            first, last = FIRST_PART * group, apply("min", LAST_PART * group, last)
        return (
            For(panel, first, last, (
                For(e, ZERO, index(a * a), (For(rt, ZERO, Var("rows"), (call,)),)),
                *self.output_transform(),
            )),
        )  # fmt: skip


def winograd(r: Request) -> LoopNest:
    """The nest of a 3x3 correlation with stride 1, where minimal filtering is estimated to pay."""
    c = correlation(r)
    return WinogradNest(r, c, choose(c, r)).nest()


__all__ = ["winograd"]
