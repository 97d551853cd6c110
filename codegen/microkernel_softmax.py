"""Exponentials of rows, measured against the rows' maxima, and their sums: a softmax without the
division.

    softmax_f32_{isa}

    void f(const float* source, int64 lds, float* target, int64 ldt, int64 rows, int64 n,
           float* highest, float* sums)
    highest[i] = max(highest[i], source[i*lds + j] for j < n)
    target[i*ldt + j] = exp(source[i*lds + j] - highest[i])  (0 where highest[i] is -inf)
    sums[i] = sum(j < n) target[i*ldt + j]                   for i < rows

Source and target may be the same rows. The target is written up to n rounded up to whole vectors,
with 0 beyond n. NaN does not raise the maximum, but makes the row's sum NaN, as +inf does.

One exponential is a chain of some fifteen operations of four cycles each. The scheduler of an
out-of-order core holds about a hundred operations, so that chains one after the other run about
three at a time, too few to fill the units. The loop body therefore works on several vectors in
step, as many as registers last for: with 16, four are slower than two (0.33 and 0.30 ns an element
of Zen 3). Maxima of all rows come first, as each ends in a horizontal maximum that the row's
exponentials would wait for. As many rows behind the last are prefetched, so that the next call need
not wait for memory to find maxima, while nothing is computed (rows of 1024: 1.17 times as fast).

Multiplications bound the loop, so there are nine: the float next to ln(2) is so near to it that one
step reduces the argument (an error of 2.4e-7 for the smallest results, less in proportion to the
logarithm), and the lowest argument gives the power 0, so that no result is selected. The polynomial
is the minimax fit with 1 + ..., of relative error 9e-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from onnxjit.codegen.ir_loops import counted, join, phis

_F32 = ir.FloatType()
_I1 = ir.IntType(1)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()

LOG2E = 1.44269504088896341
LN2 = 0.69314718055994531
TERMS = (
    8.2902742710886e-3, 4.1898160150585e-2, 1.6667638081182e-1, 4.9999147833586e-1,
    9.9999970633495e-1, 1.0,
)  # fmt: skip
ROUND = 12582912.0 + 127.0
"""1.5 * 2**23: adding it leaves the nearest integer in the low bits, here with the bias of an
exponent."""

LOWEST = -88.0
"""Its nearest integer is the power -127, whose bits are those of 0."""


@dataclass(frozen=True, slots=True)
class Vector:
    """`lanes` floats; `chains` vectors in step; `fused`: the target has a multiply-add."""

    lanes: int
    chains: int
    fused: bool


def module(name: str, vector: Vector) -> ir.Module:
    """A module that defines exactly `name`."""
    result = ir.Module(name=name)
    types = [_PTR, _I64, _PTR, _I64, _I64, _I64, _PTR, _PTR]
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), types), name)
    function.attributes.add("nounwind")
    _Generator(function, vector).emit()
    return result


class _Generator:
    def __init__(self, function: ir.Function, vector: Vector) -> None:
        self.function, self.lanes, self.chains = function, vector.lanes, vector.chains
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.type = ir.VectorType(_F32, self.lanes)
        self.ints = ir.VectorType(_I32, self.lanes)
        self.bits = ir.VectorType(_I1, self.lanes)
        kind = f"v{self.lanes}f32"
        fma = "llvm.fma" if vector.fused else "llvm.fmuladd"
        self.fma_function = self.declared(f"{fma}.{kind}", self.type, [self.type] * 3)
        self.prefetch = self.declared("llvm.prefetch.p0", ir.VoidType(), [_PTR, _I32, _I32, _I32])
        self.masked_load = self.declared(
            f"llvm.masked.load.{kind}.p0", self.type, [_PTR, _I32, self.bits, self.type]
        )

    def declared(self, name: str, result: ir.Type, types: list[Any]) -> ir.Function:
        return ir.Function(self.function.module, ir.FunctionType(result, types), name)

    def emit(self) -> None:
        build, lanes, chains = self.build, self.lanes, self.chains
        source, lds, target, ldt, rows, n, highest, sums = self.function.args
        whole = build.and_(n, _i64(-lanes))
        rest = build.trunc(build.sub(n, whole), _I32)
        steps = build.and_(n, _i64(-lanes * chains))
        iota = ir.Constant(self.ints, list(range(lanes)))
        self.inside = build.icmp_signed("<", iota, self.splat(rest, self.ints))
        self.lowest = self.constant(float("-inf"))
        has_rest = build.icmp_signed("<", whole, n)

        def row(i: Any) -> Any:
            return self.at(source, build.mul(i, lds))

        def edge(values: list[Any], body: Any) -> list[Any]:
            """`values` after `body` where a partial vector is left."""
            then, after = self.block("edge"), self.block("after")
            before = build.block
            build.cbranch(has_rest, then, after)
            build.position_at_end(then)
            new = body(values)
            end = build.block
            build.branch(after)
            build.position_at_end(after)
            out = phis(build, values, before)
            join(out, new, end)
            return out

        def masked(where: Any) -> Any:
            four = ir.Constant(_I32, 4)
            return build.call(self.masked_load, [where, four, self.inside, self.lowest])

        def find(i: Any, _: list[Any]) -> list[Any]:
            start = row(i)

            def many_of(j: Any, tops: list[Any]) -> list[Any]:
                at = [self.at(start, build.add(j, _i64(lanes * c))) for c in range(chains)]
                return [self.larger(t, self.load(a)) for t, a in zip(tops, at, strict=True)]

            def one(j: Any, tops: list[Any]) -> list[Any]:
                return [self.larger(tops[0], self.load(self.at(start, j)))]

            tops = self.loop(_i64(0), steps, lanes * chains, [self.lowest] * chains, many_of)
            tops = [self.tree(tops, self.larger)]
            tops = self.loop(steps, whole, lanes, tops, one)
            tops = edge(tops, lambda t: [self.larger(t[0], masked(self.at(start, whole)))])
            here = self.at(highest, i)
            top = self.larger(self.across(tops[0], self.larger), build.load(here, typ=_F32))
            build.store(top, here)
            return []

        def weigh(i: Any, _: list[Any]) -> list[Any]:
            start, out = row(i), self.at(target, build.mul(i, ldt))
            next_ = row(build.add(i, rows))
            top = build.load(self.at(highest, i), typ=_F32)
            none = build.fcmp_ordered("==", top, ir.Constant(_F32, float("-inf")))
            shift = self.splat(build.select(none, ir.Constant(_F32, 0.0), top), self.type)

            def many(j: Any, totals: list[Any]) -> list[Any]:
                at = [build.add(j, _i64(lanes * c)) for c in range(len(totals))]
                for a in at[:: max(1, 16 // lanes)]:
                    self.ahead(self.at(next_, a))
                xs = [self.load(self.at(start, a)) for a in at]
                made = self.exponentials([build.fsub(x, shift) for x in xs])
                for a, e in zip(at, made, strict=True):
                    build.store(e, self.at(out, a), align=4)
                return [build.fadd(t, e) for t, e in zip(totals, made, strict=True)]

            def last(totals: list[Any]) -> list[Any]:
                (e,) = self.exponentials([build.fsub(masked(self.at(start, whole)), shift)])
                build.store(e, self.at(out, whole), align=4)
                return [build.fadd(totals[0], e)]

            zero = self.constant(0.0)
            totals = self.loop(_i64(0), steps, lanes * chains, [zero] * chains, many)
            totals = [self.tree(totals, build.fadd)]
            totals = self.loop(steps, whole, lanes, totals, many)
            totals = edge(totals, last)
            build.store(self.across(totals[0], build.fadd), self.at(sums, i))
            return []

        self.loop(_i64(0), rows, 1, [], find)
        self.loop(_i64(0), rows, 1, [], weigh)
        build.ret_void()

    # --- arithmetic ---------------------------------------------------------------------------

    def exponentials(self, xs: list[Any]) -> list[Any]:
        """exp of vectors of numbers that are not positive, one operation of all at a time."""
        build = self.build
        low, magic = self.constant(LOWEST), self.constant(ROUND)
        # In this order x86's maximum returns a NaN of x.
        xs = [build.select(build.fcmp_ordered(">", low, x), low, x) for x in xs]
        turns = [self.fma(x, self.constant(LOG2E), magic) for x in xs]
        powers = [build.fsub(t, magic) for t in turns]
        rests = [self.fma(p, self.constant(-LN2), x) for p, x in zip(powers, xs, strict=True)]
        values = [self.constant(TERMS[0]) for _ in xs]
        for term in TERMS[1:]:
            c = self.constant(term)
            values = [self.fma(v, r, c) for v, r in zip(values, rests, strict=True)]
        places = self.splat(ir.Constant(_I32, 23), self.ints)
        bits = [build.shl(build.bitcast(t, self.ints), places) for t in turns]
        # A product, so that a NaN stays one whatever its bits.
        return [
            build.fmul(v, build.bitcast(b, self.type)) for v, b in zip(values, bits, strict=True)
        ]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.build.call(self.fma_function, [a, b, c])

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of two; `a` where `b` is NaN."""
        return self.build.select(self.build.fcmp_ordered(">", b, a), b, a)

    def across(self, v: Any, combine: Any) -> Any:
        """All lanes of a vector combined."""
        build, width = self.build, self.lanes
        while width > 1:
            width //= 2
            mask = [k + width if k < width else k for k in range(self.lanes)]
            other = build.shuffle_vector(v, v, ir.Constant(self.ints, mask))
            v = combine(v, other)
        return build.extract_element(v, ir.Constant(_I32, 0))

    @staticmethod
    def tree(values: list[Any], combine: Any) -> Any:
        while len(values) > 1:
            values = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    # --- structure ----------------------------------------------------------------------------

    def loop(self, start: Any, stop: Any, step: int, values: list[Any], body: Any) -> list[Any]:
        """`for k in range(start, stop, step): values = body(k, values)`; the last values."""
        return counted(self.build, start, stop, step, values, body)[1]

    def block(self, name: str) -> ir.Block:
        return self.function.append_basic_block(name)

    def load(self, pointer: Any) -> Any:
        return self.build.load(pointer, align=4, typ=self.type)

    def at(self, pointer: Any, element: Any) -> Any:
        return self.build.gep(pointer, [element], source_etype=_F32)

    def ahead(self, pointer: Any) -> None:
        """Prefetches a line into L2."""
        self.build.call(self.prefetch, [pointer, *(ir.Constant(_I32, k) for k in (0, 2, 1))])

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * self.lanes)

    def splat(self, value: Any, kind: ir.VectorType) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.build.insert_element(undefined, value, ir.Constant(_I32, 0))
        mask = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.build.shuffle_vector(first, undefined, mask)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)
