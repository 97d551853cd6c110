"""How the tiles of a contraction reach its result: at once, through an epilogue, or turned."""

from __future__ import annotations

from collections.abc import Callable

from onnxjit.codegen import instruction_sets, microkernels
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    index,
    poly_mul,
    substitute,
)
from onnxjit.codegen.loops import Address, Call, For, Local, Stmt, Store
from onnxjit.codegen.schedule.axes import FlatStage, coefficient
from onnxjit.codegen.schedule.contraction_operands import Operands
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.register_tile import LINE, odd_lines, panel_columns


class Results(Operands):
    """The storing part of `ContractionNest`, which sets the attributes declared here."""

    stage: FlatStage
    red: Reduce
    m_tiles: Expr

    def size(self, name: str, value: Expr) -> Expr:
        """A constant, or a local variable for what is only known at run time."""
        raise NotImplementedError

    def across(self) -> bool:
        """Whether the output is contiguous along rows, not along columns."""
        offset, m = self.stage.offset, self.mi
        return (
            m is not None
            and coefficient(offset, m) is ONE
            and coefficient(offset, self.ni) is not ONE
        )

    def result(self, m0: Expr) -> tuple[Address, Expr] | None:
        """Where a whole tile lies in the result; None where the result is something else than its
        sums, or its columns are apart."""
        stage, m = self.stage, self.mi
        step = ZERO if m is None else coefficient(stage.offset, m)
        plain = stage.value is self.red and coefficient(stage.offset, self.ni) is ONE
        if step is None or not plain:
            return None
        table: dict[Expr, Expr] = {self.ni: poly_mul(Var("panel"), index(self.nr))}
        if m is not None:
            table[m] = m0
        return Address(stage.buffer, substitute(stage.offset, table)), step

    def epilogue(self, m0: Expr, rows: Expr, acc_at: Expr, stop: Expr) -> tuple[Stmt, ...]:
        """Stores `stop` columns of a tile through the output stage's own expression."""
        i, j = Var("ei"), Var("ej")
        store = self.store(m0 + i, j, "acc", acc_at + poly_mul(i, index(self.nr)) + j)
        return (For(i, ZERO, rows, (For(j, ZERO, stop, (store,)),)),)

    def turned(
        self, m0: Expr, rows: Expr, acc_at: Expr
    ) -> tuple[tuple[Stmt, ...], tuple[Stmt, ...]]:
        """Transposes one tile in registers, and stores a line of tiles along its rows."""
        isa = instruction_sets.ISAS[self.cover.main.isa]
        symbol = microkernels.pack(ceil_to(self.mr, isa.lanes), isa.name)
        self.symbols.append(symbol)
        first, last = self.strip_vars()
        begin: Expr = ZERO
        end, tiles = self.m, self.m_tiles
        if self.row is None:
            begin = poly_mul(first, self.height)
            end = apply("min", poly_mul(last, self.height), self.m)
            most = self.blocking.most_tiles
            tiles = self.strip if most is None else index(most)
        step = self.size("step", odd_lines(poly_mul(tiles, index(self.mr)) + LINE))
        self.locals.append(Local("turned", "float32", poly_mul(step, index(self.nr)), stack=False))
        arguments = (
            Address("acc", acc_at),
            index(self.nr),
            rows,
            index(self.nr),
            Address("turned", m0 - begin),
            step,
        )
        i, j = Var("ei"), Var("ej")
        store = self.store(i, j, "turned", poly_mul(j, step) + i - begin)

        def loops_(stop: Expr) -> tuple[Stmt, ...]:
            return (For(j, ZERO, stop, (For(i, begin, end, (store,)),)),)

        return (Call(symbol, arguments),), self.columns(loops_)

    def store(self, i: Expr, j: Expr, sums: str, at: Expr) -> Stmt:
        """Stores the element of row `i` and column `j` of the panel, whose sum is `sums[at]`."""
        value = replace_node(self.stage.value, self.red, Load(sums, (at,), "float32"))
        table: dict[Expr, Expr] = {self.ni: poly_mul(Var("panel"), index(self.nr)) + j}
        if self.mi is not None:
            table[self.mi] = i
        return Store(
            self.stage.buffer, substitute(self.stage.offset, table), substitute(value, table)
        )

    def columns(self, loops_: Callable[[Expr], tuple[Stmt, ...]]) -> tuple[Stmt, ...]:
        """`loops_` over the columns of the panel `panel`."""
        return panel_columns(self.ni.extent, self.nr, loops_)


def ceil_to(n: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-n // unit) * unit


__all__ = ["Results"]
