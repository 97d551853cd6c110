"""LLVM IR of the GEMM register tile: one function over (rows, vectors, lanes).

    void f(const T* a, i64 rs, const i64* segs, i64 nseg, i64 run, const T* b, T* c, i64 ldc)
    C[i, j] = sum(s < nseg, k < run) a[i*rs + segs[s] + k] * b[(s*run + k)*nr + j]
    c[i*ldc + j] = C[i, j]      (or += in the accumulating variant)

The mr * nr block of C stays in vector registers through all segments. The IR goes to the code
generator without optimisation passes, so what is written here is what runs:

- Row addresses are one moving pointer plus a loop-invariant offset. On x86 an address is base +
  index * {1, 2, 4, 8}, so the odd multiples of the row stride reach every row: seven index
  registers for 14 rows, and one addition per iteration whatever the number of rows.
- Loop strength reduction would trade that for a pointer per row and spill. Passing the moving
  pointers through an empty inline assembly statement hides them from it.
- LLVM's scheduler would load ahead into registers that a full tile does not have. Empty inline
  assembly that takes each row's results keeps the loads of the next row behind them.
- A tile with few accumulators is bound by the latency of the multiply-add, so it gets several sets
  of accumulators, one for each of consecutive k, added up at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

_F32 = ir.FloatType()
_I8 = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """What the generator needs to know of a row of the table.

    `sets` accumulator sets take turns over k; the loop body holds `unroll` steps of k, a multiple
    of `sets`. `fused` asks for a single-rounding multiply-add (the target must have one), else
    LLVM may split it. `scaled_index` says that addresses are base + index * scale. `register` is
    the inline assembly constraint of a vector register, or "" to leave the order of steps to LLVM.
    """

    mr: int
    nv: int
    lanes: int
    sets: int
    unroll: int
    fused: bool
    scaled_index: bool
    register: str
    accumulate: bool


def module(symbol: str, tile: Tile) -> ir.Module:
    """A module that defines exactly `symbol`."""
    if tile.unroll % tile.sets:
        raise ValueError(f"{symbol}: {tile.unroll} steps of k do not divide into {tile.sets} sets")
    result = ir.Module(name=symbol)
    args = [_PTR, _I64, _PTR, _I64, _I64, _PTR, _PTR, _I64]
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), args), symbol)
    function.attributes.add("nounwind")
    names = ("a", "rs", "segs", "nseg", "run", "b", "c", "ldc")
    for argument, name in zip(function.args, names, strict=True):
        argument.name = name
    _Generator(function, tile).emit()
    return result


class _Generator:
    def __init__(self, function: ir.Function, tile: Tile) -> None:
        self.tile = tile
        self.function = function
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.vector = ir.VectorType(_F32, tile.lanes)
        name = "llvm.fma" if tile.fused else "llvm.fmuladd"
        self.fma = ir.Function(
            function.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"{name}.v{tile.lanes}f32",
        )
        self.zero = ir.Constant(self.vector, [0.0] * tile.lanes)
        self.undefined = ir.Constant(self.vector, ir.Undefined)
        self.first_lane = ir.Constant(ir.VectorType(_I32, tile.lanes), [0] * tile.lanes)
        self.b_step = tile.nv * tile.lanes * _FLOAT_BYTES

    def emit(self) -> None:
        """Blocks: entry -> segment -> (steps)* -> tail -> (step)* -> next -> ... -> store."""
        build, tile = self.build, self.tile
        a, rs, segs, nseg, run, b, c, ldc = self.function.args
        blocks = {
            name: self.function.append_basic_block(name)
            for name in ("segment", "steps", "tail", "step", "next", "store")
        }
        stride = build.shl(rs, _i64(2))
        # Row i is odd * 2**t rows away; only the odd multiples are kept in registers.
        odd = range(1, tile.mr, 2) if tile.scaled_index else range(1, tile.mr)
        self.multiples = {i: build.mul(stride, _i64(i)) if i > 1 else stride for i in odd}
        segs_end = self.at(segs, build.shl(nseg, _i64(3)))
        run_bytes = build.shl(run, _i64(2))
        unrolled = build.and_(run_bytes, _i64(-tile.unroll * _FLOAT_BYTES))
        entry = build.block
        zeros = [self.zero] * (tile.sets * tile.mr * tile.nv)
        empty = build.or_(
            build.icmp_signed("<=", nseg, _i64(0)), build.icmp_signed("<=", run, _i64(0))
        )
        build.cbranch(empty, blocks["store"], blocks["segment"])

        build.position_at_end(blocks["segment"])
        seg, seg_b, *seg_acc = self.phis([segs, b, *zeros], entry)
        offset = build.load(seg, align=8, typ=_I64)
        start = self.at(a, build.shl(offset, _i64(2)))
        steps_end = self.at(start, unrolled)
        run_end = self.at(start, run_bytes)
        has_steps = build.icmp_signed("!=", unrolled, _i64(0))
        build.cbranch(has_steps, blocks["steps"], blocks["tail"])

        values = [start, seg_b, *seg_acc]
        stepped = self.loop(blocks["steps"], blocks["segment"], values, tile.unroll, steps_end)
        build.cbranch(stepped.again, blocks["steps"], blocks["tail"])

        build.position_at_end(blocks["tail"])
        merged = self.phis(values, blocks["segment"])
        self.join(merged, stepped.values, blocks["steps"])
        at_end = build.icmp_unsigned("==", merged[0], run_end)
        build.cbranch(at_end, blocks["next"], blocks["step"])

        single = self.loop(blocks["step"], blocks["tail"], merged, 1, run_end)
        build.cbranch(single.again, blocks["step"], blocks["next"])

        build.position_at_end(blocks["next"])
        ended = self.phis(merged, blocks["tail"])
        self.join(ended, single.values, blocks["step"])
        _, next_b, *next_acc = ended
        next_seg = self.at(seg, _i64(8))
        self.join([seg, seg_b, *seg_acc], [next_seg, next_b, *next_acc], blocks["next"])
        more = build.icmp_unsigned("!=", next_seg, segs_end)
        build.cbranch(more, blocks["segment"], blocks["store"])

        build.position_at_end(blocks["store"])
        final = self.phis(zeros, entry)
        self.join(final, next_acc, blocks["next"])
        self.store(final, c, ldc)
        build.ret_void()

    def loop(
        self, block: ir.Block, before: ir.Block, values: list[Any], steps: int, end: Any
    ) -> _Loop:
        """Fill `block` with `steps` steps of k, entered from `before` with `values`."""
        build, tile = self.build, self.tile
        build.position_at_end(block)
        heads = self.phis(values, before)
        a, b = self.hidden(heads[0]), self.hidden(heads[1])
        acc = list(heads[2:])
        size = tile.mr * tile.nv
        for step in range(steps):
            base = (step % tile.sets) * size
            vectors = [
                build.load(
                    self.at(b, _i64(step * self.b_step + j * tile.lanes * _FLOAT_BYTES)),
                    align=_FLOAT_BYTES,
                    typ=self.vector,
                )
                for j in range(tile.nv)
            ]
            for i in range(tile.mr):
                address = self.at(self.row(a, i), _i64(step * _FLOAT_BYTES))
                scalar = build.load(address, align=_FLOAT_BYTES, typ=_F32)
                splat = build.shuffle_vector(
                    build.insert_element(self.undefined, scalar, ir.Constant(_I32, 0)),
                    self.undefined,
                    self.first_lane,
                )
                for j, vector in enumerate(vectors):
                    n = base + i * tile.nv + j
                    acc[n] = build.call(self.fma, [splat, vector, acc[n]])
                a = self.after(a, [splat, *acc[n + 1 - tile.nv : n + 1]])
            b = self.after(b, acc[n : n + 1])
        moved = [self.at(a, _i64(steps * _FLOAT_BYTES)), self.at(b, _i64(steps * self.b_step))]
        self.join(heads, [*moved, *acc], block)
        return _Loop([*moved, *acc], build.icmp_unsigned("!=", moved[0], end))

    def row(self, a: Any, i: int) -> Any:
        """The address of row i; the shift stays beside the load, where it becomes a scale."""
        if i == 0:
            return a
        shift = (i & -i).bit_length() - 1 if self.tile.scaled_index else 0
        multiple = self.multiples[i >> shift]
        return self.at(a, self.build.shl(multiple, _i64(shift)) if shift else multiple)

    def store(self, acc: list[Any], c: Any, ldc: Any) -> None:
        build, tile = self.build, self.tile
        size = tile.mr * tile.nv
        stride = build.shl(ldc, _i64(2))
        row = c
        for i in range(tile.mr):
            for j in range(tile.nv):
                sums = [acc[s * size + i * tile.nv + j] for s in range(tile.sets)]
                while len(sums) > 1:
                    half = len(sums) // 2
                    pairs = zip(sums[:half], sums[half : 2 * half], strict=True)
                    sums = [build.fadd(x, y) for x, y in pairs] + sums[2 * half :]
                address = self.at(row, _i64(j * tile.lanes * _FLOAT_BYTES))
                if tile.accumulate:
                    old = build.load(address, align=_FLOAT_BYTES, typ=self.vector)
                    sums[0] = build.fadd(old, sums[0])
                build.store(sums[0], address, align=_FLOAT_BYTES)
            row = self.at(row, stride)

    def at(self, pointer: Any, byte_offset: Any) -> Any:
        return self.build.gep(pointer, [byte_offset], source_etype=_I8)

    def hidden(self, pointer: Any) -> Any:
        """`pointer`, with its origin unknown to loop strength reduction."""
        return self.build.asm(ir.FunctionType(_PTR, [_PTR]), "", "=r,0", [pointer], False)

    def after(self, pointer: Any, values: list[Any]) -> Any:
        """`pointer`, from here on not known before `values`; without register letter, `pointer`.

        Loads through the result stay behind the multiply-adds that made `values`. That keeps the
        scheduler from filling registers that no tile has to spare, and a splat that lives on
        until here cannot become the destination of a multiply-add in place of its accumulator.
        """
        letter = self.tile.register
        if not letter:
            return pointer
        kind = ir.FunctionType(_PTR, [_PTR, *(value.type for value in values)])
        constraint = "=r,0" + f",{letter}" * len(values)
        return self.build.asm(kind, "", constraint, [pointer, *values], False)

    def phis(self, values: list[Any], block: ir.Block) -> list[Any]:
        result = []
        for value in values:
            phi = self.build.phi(value.type)
            phi.add_incoming(value, block)
            result.append(phi)
        return result

    @staticmethod
    def join(phis: list[Any], values: list[Any], block: ir.Block) -> None:
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)


@dataclass(frozen=True, slots=True)
class _Loop:
    values: list[Any]
    again: Any


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)
