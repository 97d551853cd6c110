"""Softmax over rows of a strip in L1, without the division.

    softmax_f32_{isa}

    void f(float* strip, int64 ld, int64 rows, int64 n, float* highest, float* sums)
    highest[i] = max(highest[i], strip[i*ld + j] for j < n)
    strip[i*ld + j] = exp(strip[i*ld + j] - highest[i])      (0 where highest[i] is -inf)
    sums[i] = sum(j < n) strip[i*ld + j]                     for i < rows

The strip is read and written up to n rounded up to whole vectors; what lies beyond n becomes 0.
NaN does not raise the maximum, but makes the row's sum NaN, as +inf does.

One exponential is a chain of some twenty operations of four cycles each. The scheduler of an
out-of-order core holds about a hundred operations, so that chains one after the other run about
three at a time, too few to fill the units. The loop body therefore works on `CHAINS` vectors in
step. Maxima of all rows come first, as each ends in a horizontal maximum that the row's
exponentials would wait for. The polynomial is that of expf in Cephes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from onnxjit.codegen.ir_loops import counted, join, phis

_F32 = ir.FloatType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()

CHAINS = 4
"""Exponentials computed in step."""

LOG2E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
TERMS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1, 1.0, 1.0,
)  # fmt: skip
ROUND = 12582912.0
"""1.5 * 2**23: adding it leaves the nearest integer in the low bits."""

LOWEST = -87.3
"""Below this, exp is less than the smallest normal number and counts as 0."""


@dataclass(frozen=True, slots=True)
class Vector:
    """`lanes` floats; `fused`: the target has a multiply-add; `scalef`: AVX-512's x * 2**n."""

    lanes: int
    fused: bool
    scalef: bool


def module(name: str, vector: Vector) -> ir.Module:
    """A module that defines exactly `name`."""
    result = ir.Module(name=name)
    types = [_PTR, _I64, _I64, _I64, _PTR, _PTR]
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), types), name)
    function.attributes.add("nounwind")
    _Generator(function, vector).emit()
    return result


class _Generator:
    def __init__(self, function: ir.Function, vector: Vector) -> None:
        self.function, self.lanes, self.scalef = function, vector.lanes, vector.scalef
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.type = ir.VectorType(_F32, self.lanes)
        self.ints = ir.VectorType(_I32, self.lanes)
        fma = "llvm.fma" if vector.fused else "llvm.fmuladd"
        self.fma_function = self.declared(f"{fma}.v{self.lanes}f32", [self.type] * 3)
        if self.scalef:
            self.scalef_function = self.declared(
                "llvm.x86.avx512.mask.scalef.ps.512", [*[self.type] * 3, _I16, _I32]
            )

    def declared(self, name: str, types: list[Any]) -> ir.Function:
        return ir.Function(self.function.module, ir.FunctionType(self.type, types), name)

    def emit(self) -> None:
        build, lanes = self.build, self.lanes
        strip, ld, rows, n, highest, sums = self.function.args
        whole = build.and_(n, _i64(-lanes))
        rest = build.trunc(build.sub(n, whole), _I32)
        steps = build.and_(n, _i64(-lanes * CHAINS))
        iota = ir.Constant(self.ints, list(range(lanes)))
        self.inside = build.icmp_signed("<", iota, self.splat(rest, self.ints))
        self.lowest = self.constant(float("-inf"))
        has_rest = build.icmp_signed("<", whole, n)

        def row(i: Any) -> Any:
            return self.at(strip, build.mul(i, ld))

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
            return build.select(self.inside, self.load(where), self.lowest)

        def find(i: Any, _: list[Any]) -> list[Any]:
            start = row(i)

            def four(j: Any, tops: list[Any]) -> list[Any]:
                at = [self.at(start, build.add(j, _i64(lanes * c))) for c in range(CHAINS)]
                return [self.larger(t, self.load(a)) for t, a in zip(tops, at, strict=True)]

            def one(j: Any, tops: list[Any]) -> list[Any]:
                return [self.larger(tops[0], self.load(self.at(start, j)))]

            tops = self.loop(_i64(0), steps, lanes * CHAINS, [self.lowest] * CHAINS, four)
            tops = [self.tree(tops, self.larger)]
            tops = self.loop(steps, whole, lanes, tops, one)
            tops = edge(tops, lambda t: [self.larger(t[0], masked(self.at(start, whole)))])
            here = self.at(highest, i)
            top = self.larger(self.across(tops[0], self.larger), build.load(here, typ=_F32))
            build.store(top, here)
            return []

        def weigh(i: Any, _: list[Any]) -> list[Any]:
            start = row(i)
            top = build.load(self.at(highest, i), typ=_F32)
            none = build.fcmp_ordered("==", top, ir.Constant(_F32, float("-inf")))
            shift = self.splat(build.select(none, ir.Constant(_F32, 0.0), top), self.type)

            def many(j: Any, totals: list[Any]) -> list[Any]:
                at = [self.at(start, build.add(j, _i64(lanes * c))) for c in range(len(totals))]
                made = self.exponentials([build.fsub(self.load(a), shift) for a in at])
                for a, e in zip(at, made, strict=True):
                    build.store(e, a, align=4)
                return [build.fadd(t, e) for t, e in zip(totals, made, strict=True)]

            def last(totals: list[Any]) -> list[Any]:
                a = self.at(start, whole)
                (e,) = self.exponentials([build.fsub(masked(a), shift)])
                build.store(e, a, align=4)
                return [build.fadd(totals[0], e)]

            zero = self.constant(0.0)
            totals = self.loop(_i64(0), steps, lanes * CHAINS, [zero] * CHAINS, many)
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
        low = self.constant(LOWEST)
        # In this order x86's maximum returns a NaN of x.
        clamped = [build.select(build.fcmp_ordered(">", low, x), low, x) for x in xs]
        magic = self.constant(ROUND)
        turns = [self.fma(x, self.constant(LOG2E), magic) for x in clamped]
        powers = [build.fsub(t, magic) for t in turns]
        for part in (LN2_HIGH, LN2_LOW):
            factor = self.constant(-part)
            clamped = [self.fma(p, factor, x) for p, x in zip(powers, clamped, strict=True)]
        values = [self.constant(TERMS[0]) for _ in xs]
        for term in TERMS[1:]:
            c = self.constant(term)
            values = [self.fma(v, r, c) for v, r in zip(values, clamped, strict=True)]
        small = [build.fcmp_ordered(">", low, x) for x in xs]
        if self.scalef:
            everywhere, nearest = ir.Constant(_I16, -1), ir.Constant(_I32, 4)
            scaled = [
                build.call(self.scalef_function, [v, p, v, everywhere, nearest])
                for v, p in zip(values, powers, strict=True)
            ]
        else:
            places = self.splat(ir.Constant(_I32, 23), self.ints)
            bits = [build.shl(build.bitcast(t, self.ints), places) for t in turns]
            added = [build.add(build.bitcast(v, self.ints), b)
                     for v, b in zip(values, bits, strict=True)]  # fmt: skip
            scaled = [build.bitcast(a, self.type) for a in added]
        zero = self.constant(0.0)
        return [build.select(s, zero, v) for s, v in zip(small, scaled, strict=True)]

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

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * self.lanes)

    def splat(self, value: Any, kind: ir.VectorType) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.build.insert_element(undefined, value, ir.Constant(_I32, 0))
        mask = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.build.shuffle_vector(first, undefined, mask)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)
