"""Transposing copies: rows that are contiguous in k become columns.

    pack_f32_{nr}_{isa}

    void f(const float* src, int64 stride, int64 rows, int64 depth, float* dst, int64 step)
    dst[k*step + r] = src[min(r, rows - 1)*stride + k]       for k < depth, r < nr

With a `step` of nr that is a panel of columns for the GEMM tiles. Columns beyond `rows` repeat the
last one: what a tile makes of them is never stored, and no condition is needed inside. With one
vector of columns they are written in the order of k, so with a smaller `step` the next column
replaces what was too much. `rows` is at least 1; nothing outside the elements named is touched.

Blocks of lanes x lanes elements are transposed in registers: pairs of rows are interleaved, pairs
of pairs are, and then the 128-bit quarters of four such groups change places. A scalar transposing
loop would store each element by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir

from onnxjit.codegen.ir_loops import counted

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()


@dataclass(frozen=True, slots=True)
class Panel:
    """`vectors` vectors of `lanes` elements side by side."""

    vectors: int
    lanes: int


def module(name: str, panel: Panel) -> ir.Module:
    """A module that defines exactly `name`."""
    result = ir.Module(name=name)
    kind = ir.FunctionType(ir.VoidType(), [_PTR, _I64, _I64, _I64, _PTR, _I64])
    function = ir.Function(result, kind, name)
    function.attributes.add("nounwind")
    _Generator(function, panel).emit()
    return result


class _Generator:
    def __init__(self, function: ir.Function, panel: Panel) -> None:
        self.function, self.panel = function, panel
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.vector = ir.VectorType(_F32, panel.lanes)

    def emit(self) -> None:
        """For each vector of columns: whole blocks of k, then single steps of k."""
        build, lanes = self.build, self.panel.lanes
        src, stride, rows, depth, dst, self.stride = self.function.args
        last = build.sub(rows, _i64(1))
        whole = build.and_(depth, _i64(-lanes))
        for v in range(self.panel.vectors):
            starts = []
            for i in range(lanes):
                row = _i64(v * lanes + i)
                inside = build.icmp_signed("<", row, rows)
                starts.append(self.at(src, build.mul(build.select(inside, row, last), stride)))
            block, step = (partial(f, starts, dst, v) for f in (self.block, self.step))
            counted(build, _i64(0), whole, lanes, [], block)
            counted(build, whole, depth, 1, [], step)
        build.ret_void()

    def block(self, starts: list[Any], dst: Any, v: int, k: Any, _: list[Any]) -> list[Any]:
        build = self.build
        lines = [build.load(self.at(s, k), align=4, typ=self.vector) for s in starts]
        for c, column in enumerate(self.transposed(lines)):
            build.store(column, self.column(dst, v, k, c), align=4)
        return []

    def step(self, starts: list[Any], dst: Any, v: int, k: Any, _: list[Any]) -> list[Any]:
        build = self.build
        column = ir.Constant(self.vector, ir.Undefined)
        for i, s in enumerate(starts):
            x = build.load(self.at(s, k), align=4, typ=_F32)
            column = build.insert_element(column, x, ir.Constant(_I32, i))
        build.store(column, self.column(dst, v, k, 0), align=4)
        return []

    def column(self, dst: Any, v: int, k: Any, c: int) -> Any:
        build = self.build
        line = build.mul(build.add(k, _i64(c)), self.stride)
        return self.at(dst, build.add(line, _i64(v * self.panel.lanes)))

    def transposed(self, rows: list[Any]) -> list[Any]:
        """The columns of a square block. Within each 128-bit quarter q, four rows become columns
        4*q .. 4*q + 3; then quarters of different rows are put together."""
        lanes = self.panel.lanes
        quarters = lanes // 4
        groups: list[list[Any]] = []
        for g in range(0, lanes, 4):
            a, b, c, d = rows[g : g + 4]
            low, high = self.interleaved(a, b), self.interleaved(c, d)
            groups.append([self.halves(low[j], high[j], h) for j in (0, 1) for h in (0, 1)])
        out: list[Any] = [None] * lanes
        for j in range(4):
            for q, column in enumerate(self.gathered([g[j] for g in groups], quarters)):
                out[4 * q + j] = column
        return out

    def interleaved(self, a: Any, b: Any) -> tuple[Any, Any]:
        """a0 b0 a1 b1 and a2 b2 a3 b3 of every quarter."""
        lanes = self.panel.lanes
        starts = range(0, lanes, 4)
        low = [x for s in starts for x in (s, lanes + s, s + 1, lanes + s + 1)]
        return self.shuffle(a, b, low), self.shuffle(a, b, [x + 2 for x in low])

    def halves(self, a: Any, b: Any, which: int) -> Any:
        """Half `which` of every quarter of `a`, followed by that of `b`."""
        lanes = self.panel.lanes
        mask = [x for s in range(2 * which, lanes, 4)
                for x in (s, s + 1, lanes + s, lanes + s + 1)]  # fmt: skip
        return self.shuffle(a, b, mask)

    def gathered(self, groups: list[Any], quarters: int) -> list[Any]:
        """Quarter q of every group, for each q."""
        if quarters == 1:
            return groups

        def quarter(*of: int) -> list[int]:
            return [4 * q + i for q in of for i in range(4)]

        if quarters == 2:
            a, b = groups
            return [self.shuffle(a, b, quarter(q, 2 + q)) for q in (0, 1)]
        out: list[Any] = [None] * 4
        for odd in (0, 1):
            pick = quarter(odd, 2 + odd, 4 + odd, 6 + odd)
            first = self.shuffle(groups[0], groups[1], pick)
            second = self.shuffle(groups[2], groups[3], pick)
            for k in (0, 1):
                out[2 * k + odd] = self.shuffle(first, second, quarter(k, 2 + k, 4 + k, 6 + k))
        return out

    def shuffle(self, a: Any, b: Any, mask: list[int]) -> Any:
        kind = ir.VectorType(_I32, len(mask))
        return self.build.shuffle_vector(a, b, ir.Constant(kind, mask))

    def at(self, pointer: Any, element: Any) -> Any:
        return self.build.gep(pointer, [element], source_etype=_F32)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)
