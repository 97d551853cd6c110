"""The output transform of minimal filtering, and the output stage's expression on its results."""

from __future__ import annotations

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Expr,
    Load,
    Var,
    apply,
    index,
    poly_mul,
    substitute,
)
from onnxjit.codegen.loops import Address, Assign, Call, For, Local, Stmt, Store
from onnxjit.codegen.schedule.axes import coefficient
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.register_tile import odd_lines, panel_columns
from onnxjit.codegen.schedule.winograd_tiles import F, Tiles


class Outputs(Tiles):
    """The output half of `WinogradNest`."""

    def output_transform(self) -> tuple[Stmt, ...]:
        m, a, nr = self.m, self.a, self.nr
        tx, ty, t = Var("tx"), Var("ty"), Var("t")
        turned = self.across()
        pixels = self.line_pixels if turned else m
        at = (tx - self.x0) * (m * nr) if turned else ZERO
        self.locals.append(Local("results", F, index(m * pixels * nr), stack=not turned))
        symbol = microkernels.winograd("out", m, self.isa.name)
        self.symbols.append(symbol)
        transform = Call(
            symbol,
            (
                Address("products", t * (a * a * nr)),
                Address("results", at),
                index(pixels * nr),
                index(nr),
            ),
        )
        return (
            Assign(t, ZERO),
            For(Var("g"), Var("g0"), Var("g1"), (
                *self.place(),
                Assign(Var("top"), ty * m),
                For(tx, self.x0, self.x1, (
                    transform,
                    *(() if turned else self.epilogue()),
                    Assign(t, t + 1),
                )),
                *(self.turned_epilogue() if turned else ()),
            )),
        )  # fmt: skip

    def across(self) -> bool:
        """Whether the output is contiguous along pixels, not along channels."""
        offset = self.c.stage.offset
        return (
            coefficient(offset, self.c.column) is ONE and coefficient(offset, self.c.n) is not ONE
        )

    def epilogue(self) -> tuple[Stmt, ...]:
        """Stores the tile's pixels inside the output."""
        c, m, nr = self.c, self.m, self.nr
        i, o, j = Var("i"), Var("o"), Var("ej")
        left = Var("tx") * m
        store = self.store(left + o, j, "results", i * (m * nr) + o * nr + j)
        return panel_columns(index(self.columns), nr, lambda stop: (
            For(i, ZERO, apply("min", index(m), c.row.extent - Var("top")), (
                For(o, ZERO, apply("min", index(m), c.column.extent - left), (
                    For(j, ZERO, stop, (store,)),
                )),
            )),
        ))  # fmt: skip

    def turned_epilogue(self) -> tuple[Stmt, ...]:
        """Transposes the lines of a row of tiles in registers, one after the other, and stores what
        is inside the output along pixels."""
        c, m, nr, lanes = self.c, self.m, self.nr, self.isa.lanes
        i, o, p, j = Var("i"), Var("o"), Var("p"), Var("ej")
        symbol = microkernels.pack(lanes, self.isa.name)
        self.symbols.append(symbol)
        step = odd_lines(index(self.line_pixels + lanes))
        self.locals.append(Local("turned", F, step * nr, stack=False))
        left, pixels = Var("left"), Var("pixels")
        call = Call(
            symbol,
            (
                Address("results", (i * self.line_pixels + p) * nr),
                index(nr),
                apply("min", index(lanes), pixels - p),
                index(nr),
                Address("turned", p),
                step,
            ),
        )
        store = self.store(left + o, j, "turned", j * step + o)
        return (
            Assign(left, poly_mul(self.x0, index(m))),
            Assign(pixels, apply("min", poly_mul(self.x1, index(m)), c.column.extent) - left),
            For(i, ZERO, apply("min", index(m), c.row.extent - Var("top")), (
                For(p, ZERO, pixels, (call,), step=lanes),
                *panel_columns(index(self.columns), nr, lambda stop: (
                    For(j, ZERO, stop, (For(o, ZERO, pixels, (store,)),)),
                )),
            )),
        )  # fmt: skip

    def store(self, column: Expr, j: Expr, sums: str, at: Expr) -> Stmt:
        """Stores channel `j` of the panel at line `i` of the tile through the stage's own
        expression; its sum is `sums[at]`."""
        c = self.c
        value = replace_node(c.stage.value, c.total, Load(sums, (at,), F))
        table: dict[Expr, Expr] = {
            c.n: Var("panel") * self.nr + j,
            c.row: Var("top") + Var("i"),
            c.column: column,
            **self.image(),
        }
        return Store(c.stage.buffer, substitute(c.stage.offset, table), substitute(value, table))


__all__ = ["Outputs"]
