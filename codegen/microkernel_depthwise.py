"""Micro-kernel of depthwise convolutions and pooling: neighbouring output pixels share loads.

    {kind}_f32_{t}x{kw}s{stride}d{dilation}_{isa}     t pixels, windows of kw taps
    {kind}_f32_border_{isa}                           one pixel, `taps` taps

    void f(const float* x, i64 row, i64 pixel, i64 rows, const float* w, i64 wrow, i64 wtap,
           i64 taps, float* y, i64 ldy, i64 n, i64 line, i64 fresh)
    y[p*ldy + c] = over i < rows, j < taps    of e = x[i*row + (p*stride + j*dilation)*pixel + c]
                   depthwise: the sum of e * w[i*wrow + j*wtap + c]
                   sumpool:   the sum of e
                   maxpool:   the largest e; NaN where there is one        for p < t, c < n

All distances count elements; n is at least the number of lanes, and taps is kw where the symbol
says so (in the border kernel, `pixel` is the distance of two taps). With no row nothing is read and
the result is 0 or -inf. Nothing outside the elements named above is touched: the last vector of
channels overlaps the one before it where n is no multiple of the lanes. The border of a padded
image is a smaller window, with fewer rows and fewer taps, so there is no condition inside.
`line` and `fresh` are a hint: of so many rows of x below the window, `line` apart, the pixels that
come anew are prefetched, wherever they lie.

Of a convolution each loaded vector of x feeds every pixel whose window holds it, and each vector of
weights all t pixels, so that t * kw multiply-adds take about t * stride + 2 * kw loads where one
pixel at a time takes 2 * t * kw. All pixels take a tap before any takes the next, so that
neighbouring operations are independent: a scheduler of a hundred operations holds little more than
a row of taps. Pooling first joins the rows of each column, which all windows that hold the column
share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from onnxjit.codegen.dialect_table import WINDOW_SYMBOL
from onnxjit.codegen.instruction_sets import ISAS, Isa, isa_of, runs
from onnxjit.codegen.target import Target

if TYPE_CHECKING:
    from llvmlite import ir as ir_types

PIXELS = 8
"""Most pixels of one step: enough chains of multiply-adds to hide their latency."""

POOLED = 3
"""Most pixels of one step of a pool, which memory bounds: a hardware prefetcher follows some thirty
streams, of which each row of each column is one."""

WIDEST = 16
"""Most taps in a row of a window that has a kernel of its own."""

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Window:
    """What a symbol says. The border kernel has `taps` None: their number is an argument."""

    symbol: str
    kind: str
    isa: Isa
    pixels: int
    taps: int | None
    stride: int
    dilation: int


@cache
def window(symbol: str) -> Window:
    """The kernel that `symbol` names. Raises KeyError where there is none."""
    match = WINDOW_SYMBOL.fullmatch(symbol)
    if match is None or match["isa"] not in ISAS:
        raise KeyError(f"{symbol!r} does not name a depthwise micro-kernel")
    isa = ISAS[match["isa"]]
    if match["t"] is None:
        return Window(symbol, match["kind"], isa, 1, None, 1, 1)
    t, kw = int(match["t"]), int(match["kw"])
    if t > PIXELS or kw > WIDEST:
        raise KeyError(f"{symbol!r}: at most {PIXELS} pixels and {WIDEST} taps")
    stride, dilation = int(match["stride"]), int(match["dilation"])
    return Window(symbol, match["kind"], isa, t, kw, stride, dilation)


def pixels(kind: str, count: int, taps: int, stride: int, dilation: int, isa: str) -> str:
    """The symbol for `count` neighbouring output pixels."""
    return f"{kind}_f32_{count}x{taps}s{stride}d{dilation}_{isa}"


def border(kind: str, isa: str) -> str:
    """The symbol for one pixel with any number of taps."""
    return f"{kind}_f32_border_{isa}"


def isa_for(channels: int, target: Target) -> str | None:
    """The widest instruction set of `target` whose vectors are no longer than `channels`."""
    names = list(ISAS)
    for name in names[names.index(isa_of(target)) :]:
        if ISAS[name].lanes <= channels and runs(ISAS[name], target):
            return name
    return None


def positions(count: int, taps: int, stride: int, dilation: int) -> list[int]:
    """The columns of x, counted in pixels, that `count` neighbouring windows hold."""
    return sorted({p * stride + j * dilation for p in range(count) for j in range(taps)})


def live_vectors(kind: str, count: int, taps: int, stride: int, dilation: int) -> int:
    """Vectors that a row of taps keeps in registers: those that are summed up, and what is loaded
    of x and of the weights."""
    if kind != "depthwise":
        return len(positions(count, taps, stride, dilation)) + 2
    uses = [p * stride + j * dilation for j in range(taps) for p in range(count)]
    first = {position: uses.index(position) for position in uses}
    last = {position: k for k, position in enumerate(uses)}
    loaded = max(sum(first[q] <= k <= last[q] for q in first) for k in range(len(uses)))
    return count + loaded + 1


@cache
def most_pixels(kind: str, isa: str, taps: int, stride: int, dilation: int) -> int:
    """Pixels of a step whose vectors fit into the registers."""
    for t in range(PIXELS if kind == "depthwise" else POOLED, 1, -1):
        if live_vectors(kind, t, taps, stride, dilation) <= ISAS[isa].registers:
            return t
    return 1


def choose_pixels(
    kind: str, total: int | None, isa: str, taps: int, stride: int, dilation: int
) -> int:
    """Pixels per step for a run of `total` (None: symbolic): the least estimated time."""
    most = most_pixels(kind, isa, taps, stride, dilation)
    if total is None:
        return most

    def cycles(t: int) -> float:
        if kind != "depthwise":
            return len(positions(t, taps, stride, dilation)) + t * (taps - 1) / taps + 3
        loads = (t - 1) * stride + 2 * taps
        return max(t * taps, loads, 4 * taps) / 2 + 3

    def time(t: int) -> float:
        rest = total % t
        return total // t * cycles(t) + (cycles(rest) if rest else 0)

    return min(range(1, min(most, max(total, 1)) + 1), key=lambda t: (time(t), -t))


def module(symbol: str) -> ir_types.Module:
    """A module that defines exactly `symbol`."""
    from llvmlite import ir

    result = ir.Module(name=symbol)
    pointer, i64 = ir.PointerType(), ir.IntType(64)
    args = [pointer, i64, i64, i64, pointer, *[i64] * 3, pointer, *[i64] * 4]
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), args), symbol)
    function.attributes.add("nounwind")
    names = (
        "x", "row", "pixel", "rows", "w", "wrow", "wtap", "taps", "y", "ldy", "n", "line", "fresh",
    )  # fmt: skip
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
        identity = float("-inf") if spec.kind == "maxpool" else 0.0
        self.identity = ir.Constant(self.vector, [identity] * self.lanes)
        fma = "llvm.fma" if spec.isa.fused else "llvm.fmuladd"
        self.fma = self.declared(fma, 3) if spec.kind == "depthwise" else None
        self.maximum = self.declared("llvm.maximum", 2) if spec.kind == "maxpool" else None
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), i32, i32, i32])
        self.prefetch = ir.Function(function.module, kind, "llvm.prefetch.p0")
        self.into_l2 = [ir.Constant(i32, n) for n in (0, 2, 1)]  # read, locality, data cache

    def declared(self, name: str, operands: int) -> Any:
        kind = self.ir.FunctionType(self.vector, [self.vector] * operands)
        return self.ir.Function(self.function.module, kind, f"{name}.v{self.lanes}f32")

    def emit(self) -> None:
        """Channels outermost: several vectors a step while they last where one pixel alone would
        wait for its own sums, then one vector a step."""
        build = self.build
        y, n = self.function.args[8], self.function.args[10]
        places = (("row", 1), ("pixel", 2), ("wrow", 5), ("wtap", 6), ("ldy", 9), ("line", 11))
        self.bytes = {name: build.shl(self.function.args[k], self.const(2)) for name, k in places}
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
        self.ahead(x, vectors)
        shared = spec.taps is not None and spec.kind != "depthwise"
        columns = positions(spec.pixels, spec.taps or 1, spec.stride, spec.dilation)
        sums = [self.identity] * ((len(columns) if shared else spec.pixels) * vectors)
        head = self.function.append_basic_block("row")
        done = self.function.append_basic_block("sums")
        before = build.block
        build.cbranch(build.icmp_signed(">", rows, self.const(0)), head, done)
        build.position_at_end(head)
        xp, wp, left, *merged = self.loops.phis(build, [x, w, rows, *sums], before)
        moved = self.row(xp, wp, list(merged), vectors)
        tail = build.block
        following = [
            self.at(xp, self.bytes["row"]),
            self.at(wp, self.bytes["wrow"]),
            build.sub(left, self.const(1)),
            *moved,
        ]
        self.loops.join((xp, wp, left, *merged), following, tail)
        build.cbranch(build.icmp_signed("!=", following[2], self.const(0)), head, done)
        build.position_at_end(done)
        final = self.loops.phis(build, sums, before)
        self.loops.join(final, moved, tail)
        for p in range(spec.pixels):
            held = [p]
            if shared:
                taps = range(spec.taps or 1)
                held = [columns.index(p * spec.stride + j * spec.dilation) for j in taps]
            for v in range(vectors):
                result = final[held[0] * vectors + v]
                for k in held[1:]:
                    result = self.joined(result, final[k * vectors + v])
                build.store(result, self.lane(y, v), align=_FLOAT_BYTES)
            y = self.at(y, self.bytes["ldy"])

    def ahead(self, x: Any, vectors: int) -> None:
        """Prefetch what the window below reads anew."""
        build, spec = self.build, self.spec
        row, rows, fresh = (self.function.args[k] for k in (1, 3, 12))
        last = build.mul(build.sub(rows, self.const(1)), build.shl(row, self.const(2)))
        below = self.at(self.at(x, last), self.bytes["line"])

        def line(_: Any, values: list[Any]) -> list[Any]:
            here = values[0]
            for _ in range(spec.pixels * spec.stride if spec.taps is not None else 0):
                for v in range(0, vectors, max(1, 16 // self.lanes)):
                    build.call(self.prefetch, [self.lane(here, v), *self.into_l2])
                here = self.at(here, self.bytes["pixel"])
            return [self.at(values[0], self.bytes["line"])]

        self.loops.counted(build, self.const(0), fresh, 1, [below], line)

    def row(self, x: Any, w: Any, sums: list[Any], vectors: int) -> list[Any]:
        """One row of taps."""
        spec = self.spec
        x, w = self.hidden(x), self.hidden(w)
        if spec.taps is None:
            return self.counted_row(x, w, sums, vectors)
        if spec.kind != "depthwise":
            return self.columns(x, sums, vectors)
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

    def columns(self, x: Any, sums: list[Any], vectors: int) -> list[Any]:
        """One row of the columns that the windows hold."""
        spec, before = self.spec, 0
        for k, q in enumerate(positions(spec.pixels, spec.taps or 1, spec.stride, spec.dilation)):
            x = self.at(x, self.build.mul(self.bytes["pixel"], self.const(q - before)))
            before = q
            for v in range(vectors):
                m = k * vectors + v
                sums[m] = self.joined(sums[m], self.load(x, v))
        return sums

    def joined(self, a: Any, b: Any) -> Any:
        """Two values of a pool in one."""
        if self.maximum is None:
            return self.build.fadd(a, b)
        return self.build.call(self.maximum, [a, b], fastmath=("nsz",))

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
        moved = []
        for v in range(vectors):
            value = self.load(xp, v)
            if self.fma is None:
                moved.append(self.joined(accs[v], value))
            else:
                moved.append(build.call(self.fma, [value, self.load(wp, v), accs[v]]))
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


__all__ = [
    "Window", "border", "choose_pixels", "isa_for", "module", "pixels", "window",
]  # fmt: skip
