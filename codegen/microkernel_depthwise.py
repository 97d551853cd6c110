"""Micro-kernel of depthwise convolutions: neighbouring output pixels share loads.

    depthwise_f32_{t}x{kw}s{stride}d{dilation}_{isa}     t pixels, windows of kw taps
    depthwise_f32_border_{isa}                           one pixel, `taps` taps

    void f(const float* x, i64 row, i64 pixel, i64 rows, const float* w, i64 wrow, i64 wtap,
           i64 taps, float* y, i64 ldy, i64 n)
    y[p*ldy + c] = sum(i < rows, j < taps) x[i*row + (p*stride + j*dilation)*pixel + c]
                                         * w[i*wrow + j*wtap + c]        for p < t, c < n

All distances count elements; n is at least the number of lanes, and taps is kw where the symbol
says so (in the border kernel, `pixel` is the distance of two taps). With no row nothing is read and
the sum is zero. Nothing outside the elements named above is touched: the last vector of channels
overlaps the one before it where n is no multiple of the lanes. The border of a padded image is a
smaller window, with fewer rows and fewer taps, so there is no condition inside.

Each loaded vector of x feeds every pixel whose window holds it, and each vector of weights all t
pixels, so that t * kw multiply-adds take about t * stride + 2 * kw loads where one pixel at a time
takes 2 * t * kw. All pixels take a tap before any takes the next, so that neighbouring operations
are independent: a scheduler of a hundred operations holds little more than a row of taps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from onnxjit.codegen.microkernels import ISAS, Isa, isa_of, runs
from onnxjit.codegen.target import Target

if TYPE_CHECKING:
    from llvmlite import ir as ir_types

SYMBOL = re.compile(
    r"depthwise_f32_(?:(?P<t>[1-9]\d*)x(?P<kw>[1-9]\d*)s(?P<stride>[1-9]\d*)d(?P<dilation>[1-9]\d*)"
    r"|border)_(?P<isa>[a-z0-9]+)"
)
PIXELS = 8
"""Most pixels of one step: enough chains of multiply-adds to hide their latency."""

WIDEST = 16
"""Most taps in a row of a window that has a kernel of its own."""

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Window:
    """What a symbol says. The border kernel has `taps` None: their number is an argument."""

    symbol: str
    isa: Isa
    pixels: int
    taps: int | None
    stride: int
    dilation: int


@cache
def window(symbol: str) -> Window:
    """The kernel that `symbol` names. Raises KeyError where there is none."""
    match = SYMBOL.fullmatch(symbol)
    if match is None or match["isa"] not in ISAS:
        raise KeyError(f"{symbol!r} does not name a depthwise micro-kernel")
    isa = ISAS[match["isa"]]
    if match["t"] is None:
        return Window(symbol, isa, 1, None, 1, 1)
    t, kw = int(match["t"]), int(match["kw"])
    if t > PIXELS or kw > WIDEST:
        raise KeyError(f"{symbol!r}: at most {PIXELS} pixels and {WIDEST} taps")
    return Window(symbol, isa, t, kw, int(match["stride"]), int(match["dilation"]))


def depthwise(pixels: int, taps: int, stride: int, dilation: int, isa: str) -> str:
    """The symbol for `pixels` neighbouring output pixels."""
    return f"depthwise_f32_{pixels}x{taps}s{stride}d{dilation}_{isa}"


def border(isa: str) -> str:
    """The symbol for one pixel with any number of taps."""
    return f"depthwise_f32_border_{isa}"


def isa_for(channels: int, target: Target) -> str | None:
    """The widest instruction set of `target` whose vectors are no longer than `channels`."""
    names = list(ISAS)
    for name in names[names.index(isa_of(target)) :]:
        if ISAS[name].lanes <= channels and runs(ISAS[name], target):
            return name
    return None


def live_vectors(pixels: int, taps: int, stride: int, dilation: int) -> int:
    """Vectors that a row of taps keeps in registers: sums, weights, and what is loaded of x."""
    uses = [p * stride + j * dilation for j in range(taps) for p in range(pixels)]
    first = {position: uses.index(position) for position in uses}
    last = {position: k for k, position in enumerate(uses)}
    loaded = max(sum(first[q] <= k <= last[q] for q in first) for k in range(len(uses)))
    return pixels + loaded + 1


@cache
def most_pixels(isa: str, taps: int, stride: int, dilation: int) -> int:
    """Pixels of a step whose vectors fit into the registers."""
    for t in range(PIXELS, 1, -1):
        if live_vectors(t, taps, stride, dilation) <= ISAS[isa].registers:
            return t
    return 1


def choose_pixels(count: int | None, isa: str, taps: int, stride: int, dilation: int) -> int:
    """Pixels per step for a run of `count` (None: symbolic): the least estimated time."""
    most = most_pixels(isa, taps, stride, dilation)
    if count is None:
        return most

    def cycles(t: int) -> float:
        loads = (t - 1) * stride + 2 * taps
        return max(t * taps, loads, 8 * taps) / 2 + 3

    def total(t: int) -> float:
        rest = count % t
        return count // t * cycles(t) + (cycles(rest) if rest else 0)

    return min(range(1, min(most, max(count, 1)) + 1), key=lambda t: (total(t), -t))


def module(symbol: str) -> ir_types.Module:
    """A module that defines exactly `symbol`."""
    from llvmlite import ir

    result = ir.Module(name=symbol)
    pointer, i64 = ir.PointerType(), ir.IntType(64)
    args = [pointer, i64, i64, i64, pointer, i64, i64, i64, pointer, i64, i64]
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), args), symbol)
    function.attributes.add("nounwind")
    names = ("x", "row", "pixel", "rows", "w", "wrow", "wtap", "taps", "y", "ldy", "n")
    for argument, name in zip(function.args, names, strict=True):
        argument.name = name
    _Generator(function, window(symbol)).emit()
    return result


class _Generator:
    def __init__(self, function: Any, spec: Window) -> None:
        from llvmlite import ir

        from onnxjit.codegen import ir_loops

        self.ir, self.loops, self.spec, self.function = ir, ir_loops, spec, function
        self.i64, self.i8 = ir.IntType(64), ir.IntType(8)
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.lanes = spec.isa.lanes
        self.vector = ir.VectorType(ir.FloatType(), self.lanes)
        name = "llvm.fma" if spec.isa.fused else "llvm.fmuladd"
        self.fma = ir.Function(
            function.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"{name}.v{self.lanes}f32",
        )

    def emit(self) -> None:
        """Channels outermost: several vectors a step while they last where one pixel alone would
        wait for its own sums, then one vector a step."""
        build = self.build
        y, n = self.function.args[8], self.function.args[10]
        self.bytes = {
            name: build.shl(self.function.args[k], self.const(2))
            for name, k in (("row", 1), ("pixel", 2), ("wrow", 5), ("wtap", 6), ("ldy", 9))
        }
        start: Any = self.const(0)
        vectors = 4 // self.spec.pixels

        def wide(c: Any, _: list[Any]) -> list[Any]:
            self.step(c, vectors, y)
            return []

        def narrow(c: Any, _: list[Any]) -> list[Any]:
            # The last vector ends where the channels do.
            last = build.sub(n, self.const(self.lanes))
            self.step(build.select(build.icmp_signed("<", c, last), c, last), 1, y)
            return []

        if vectors > 1:
            stop = build.sub(n, self.const(vectors * self.lanes - 1))
            start, _ = self.loops.counted(build, start, stop, vectors * self.lanes, [], wide)
        self.loops.counted(build, start, n, self.lanes, [], narrow)
        build.ret_void()

    def step(self, c: Any, vectors: int, y: Any) -> None:
        """All pixels of `vectors` vectors of channels from channel `c` on."""
        build, spec = self.build, self.spec
        x, rows, w = self.function.args[0], self.function.args[3], self.function.args[4]
        offset = build.shl(c, self.const(2))
        x, w, y = (self.at(p, offset) for p in (x, w, y))
        zero = self.ir.Constant(self.vector, [0.0] * self.lanes)
        zeros = [zero] * (spec.pixels * vectors)
        head = self.function.append_basic_block("row")
        done = self.function.append_basic_block("sums")
        before = build.block
        build.cbranch(build.icmp_signed(">", rows, self.const(0)), head, done)
        build.position_at_end(head)
        xp, wp, left, *sums = self.loops.phis(build, [x, w, rows, *zeros], before)
        moved = self.row(xp, wp, list(sums), vectors)
        tail = build.block
        following = [
            self.at(xp, self.bytes["row"]),
            self.at(wp, self.bytes["wrow"]),
            build.sub(left, self.const(1)),
            *moved,
        ]
        self.loops.join((xp, wp, left, *sums), following, tail)
        build.cbranch(build.icmp_signed("!=", following[2], self.const(0)), head, done)
        build.position_at_end(done)
        final = self.loops.phis(build, zeros, before)
        self.loops.join(final, moved, tail)
        for p in range(spec.pixels):
            for v in range(vectors):
                build.store(final[p * vectors + v], self.lane(y, v), align=_FLOAT_BYTES)
            y = self.at(y, self.bytes["ldy"])

    def row(self, x: Any, w: Any, sums: list[Any], vectors: int) -> list[Any]:
        """One row of taps."""
        spec = self.spec
        x, w = self.hidden(x), self.hidden(w)
        if spec.taps is None:
            return self.counted_row(x, w, sums, vectors)
        loaded: dict[int, list[Any]] = {}
        at: dict[int, Any] = {0: x}
        for j in range(spec.taps):
            weights = [self.load(w, v) for v in range(vectors)]
            w = self.at(w, self.bytes["wtap"])
            for p in range(spec.pixels):
                position = p * spec.stride + j * spec.dilation
                if position not in loaded:
                    near = max(q for q in at if q <= position)
                    if position != near:
                        step = self.build.mul(self.bytes["pixel"], self.const(position - near))
                        at[position] = self.at(at[near], step)
                    loaded[position] = [self.load(at[position], v) for v in range(vectors)]
                for v in range(vectors):
                    k = p * vectors + v
                    sums[k] = self.build.call(self.fma, [loaded[position][v], weights[v], sums[k]])
        return sums

    def counted_row(self, x: Any, w: Any, sums: list[Any], vectors: int) -> list[Any]:
        """One row of `taps` taps, at least one."""
        build = self.build
        taps = self.function.args[7]
        head = self.function.append_basic_block("tap")
        done = self.function.append_basic_block("taps")
        before = build.block
        build.branch(head)
        build.position_at_end(head)
        xp, wp, left, *accs = self.loops.phis(build, [x, w, taps, *sums], before)
        moved = [
            build.call(self.fma, [self.load(xp, v), self.load(wp, v), accs[v]])
            for v in range(vectors)
        ]
        following = [
            self.at(xp, self.bytes["pixel"]),
            self.at(wp, self.bytes["wtap"]),
            build.sub(left, self.const(1)),
            *moved,
        ]
        self.loops.join((xp, wp, left, *accs), following, head)
        build.cbranch(build.icmp_signed(">", following[2], self.const(0)), head, done)
        build.position_at_end(done)
        return moved

    def load(self, pointer: Any, v: int) -> Any:
        return self.build.load(self.lane(pointer, v), align=_FLOAT_BYTES, typ=self.vector)

    def lane(self, pointer: Any, v: int) -> Any:
        return self.at(pointer, self.const(v * self.lanes * _FLOAT_BYTES)) if v else pointer

    def at(self, pointer: Any, byte_offset: Any) -> Any:
        return self.build.gep(pointer, [byte_offset], source_etype=self.i8)

    def hidden(self, pointer: Any) -> Any:
        """`pointer`, with its origin unknown to loop strength reduction, which would keep one
        pointer for each position."""
        kind = self.ir.FunctionType(self.ir.PointerType(), [self.ir.PointerType()])
        return self.build.asm(kind, "", "=r,0", [pointer], False)

    def const(self, value: int) -> Any:
        return self.ir.Constant(self.i64, value)


__all__ = ["Window", "border", "choose_pixels", "depthwise", "isa_for", "module", "window"]
