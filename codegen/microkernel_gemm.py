"""LLVM IR of the GEMM register tile: one function over (rows, vectors, lanes).

    void f(const T* a, i64 rs, const i64* segs, i64 nseg, i64 run, const T* b, T* c, i64 ldc,
           i64 more, const T* ahead)
    C[i, j] = sum(s < nseg, k < run) a[i*rs + segs[s] + k] * b[(s*run + k)*nr + j]
    c[i*ldc + j] = C[i, j]      (+= where `more` is not 0)

The mr * nr block of C stays in vector registers through all segments. B is prefetched into L2: at
`ahead`, for the tiles behind this one, the lines of one step of k in each iteration of `unroll`
steps; or where `ahead` is `b`, because no other tile shares B, the lines of every step, FAR bytes
ahead of it, unless the tile has too few rows for that. The IR goes to the code generator without
optimisation passes, so what is written here is what runs:

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from onnxjit.codegen.ir_loops import join, phis

_F32 = ir.FloatType()
_I8 = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()
_FLOAT_BYTES = 4
_LINE_BYTES = 64
FAR = 16 * 1024
"""Bytes from what a tile reads of B to what it prefetches of it: enough for memory's latency, and
still in L2 when its turn comes."""

_READ_INTO_L2 = [ir.Constant(_I32, n) for n in (0, 2, 1)]  # read, locality, data cache


@dataclass(frozen=True, slots=True)
class Tile:
    """What the generator needs to know of a row of the table.

    `sets` accumulator sets take turns over k; the loop body holds `unroll` steps of k, a multiple
    of `sets`. Without `alone` the tile prefetches nothing of a B that no other one shares. `fused`
    asks for a single-rounding multiply-add (the target must have one), else LLVM may split it.
    `scaled_index` says that addresses are base + index * scale. `register` is the inline assembly
    constraint of a vector register, or "" to leave the order of steps to LLVM.
    """

    mr: int
    nv: int
    lanes: int
    sets: int
    unroll: int
    alone: bool
    fused: bool
    scaled_index: bool
    register: str

    @property
    def lines(self) -> int:
        """Cache lines that a row of B has a part of, which are prefetched together."""
        return -(-self.nv * self.lanes * _FLOAT_BYTES // _LINE_BYTES)


_ARGUMENTS = ("a", "rs", "segs", "nseg", "run", "b", "c", "ldc", "more", "ahead")
_TYPES = (_PTR, _I64, _PTR, _I64, _I64, _PTR, _PTR, _I64, _I64, _PTR)


def module(symbol: str, tile: Tile) -> ir.Module:
    """A module that defines exactly `symbol`."""
    result = ir.Module(name=symbol)
    _define(result, symbol, tile)
    return result


def switch(symbol: str, tiles: Sequence[Tile]) -> ir.Module:
    """A module that defines exactly `symbol`: the tiles behind one function, whose additional last
    argument is the number of rows. It does nothing for a number that no tile has.

    The tiles take that argument too, so that the call of one is a jump, which x86 can promise."""
    result = ir.Module(name=symbol)
    types = [*_TYPES, _I64]
    inner = {tile.mr: _define(result, f"{symbol}.{tile.mr}", tile, types) for tile in tiles}
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), types), symbol)
    function.attributes.add("nounwind")
    build = ir.IRBuilder(function.append_basic_block("entry"))
    end = function.append_basic_block("end")
    cases = build.switch(function.args[-1], end)
    for mr, tile_function in inner.items():
        tile_function.linkage = "internal"
        block = function.append_basic_block(f"rows{mr}")
        cases.add_case(_i64(mr), block)
        build.position_at_end(block)
        kind = "musttail" if tiles[0].scaled_index else "tail"
        build.call(tile_function, function.args, tail=kind)
        build.ret_void()
    build.position_at_end(end)
    build.ret_void()
    return result


def _define(
    into: ir.Module, symbol: str, tile: Tile, types: Sequence[ir.Type] = _TYPES
) -> ir.Function:
    if tile.unroll % tile.sets:
        raise ValueError(f"{symbol}: {tile.unroll} steps of k do not divide into {tile.sets} sets")
    function = ir.Function(into, ir.FunctionType(ir.VoidType(), types), symbol)
    function.attributes.add("nounwind")
    for argument, name in zip(function.args, _ARGUMENTS, strict=False):
        argument.name = name
    _Generator(function, tile).emit()
    return function


class _Generator:
    def __init__(self, function: ir.Function, tile: Tile) -> None:
        self.tile = tile
        self.function = function
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.vector = ir.VectorType(_F32, tile.lanes)
        name = "llvm.fma" if tile.fused else "llvm.fmuladd"
        self.fma = _intrinsic(
            function.module,
            f"{name}.v{tile.lanes}f32",
            ir.FunctionType(self.vector, [self.vector] * 3),
        )
        self.prefetch = _intrinsic(
            function.module,
            "llvm.prefetch.p0",
            ir.FunctionType(ir.VoidType(), [_PTR, _I32, _I32, _I32]),
        )
        self.zero = ir.Constant(self.vector, [0.0] * tile.lanes)
        self.undefined = ir.Constant(self.vector, ir.Undefined)
        self.first_lane = ir.Constant(ir.VectorType(_I32, tile.lanes), [0] * tile.lanes)
        self.b_step = tile.nv * tile.lanes * _FLOAT_BYTES

    def emit(self) -> None:
        """Blocks: entry -> (old) -> start -> segment -> (steps)* -> tail -> (step)* -> next -> ...
        -> store."""
        build, tile = self.build, self.tile
        a, rs, segs, nseg, run, b, c, ldc, more, ahead = self.function.args[: len(_ARGUMENTS)]
        blocks = {
            name: self.function.append_basic_block(name)
            for name in ("old", "start", "segment", "steps", "tail", "step", "next", "store")
        }
        stride = build.shl(rs, _i64(2))
        # Row i is odd * 2**t rows away; only the odd multiples are kept in registers.
        odd = range(1, tile.mr, 2) if tile.scaled_index else range(1, tile.mr)
        self.multiples = {i: build.mul(stride, _i64(i)) if i > 1 else stride for i in odd}
        segs_end = self.at(segs, build.shl(nseg, _i64(3)))
        run_bytes = build.shl(run, _i64(2))
        unrolled = build.and_(run_bytes, _i64(-tile.unroll * _FLOAT_BYTES))
        own = build.icmp_unsigned("==", ahead, b)
        row, still = _i64(self.b_step), _i64(0)
        if tile.alone:
            ahead = build.select(own, self.at(b, _i64(FAR)), ahead)
            self.spread, self.onward = build.select(own, row, still), row
        else:
            self.onward = build.select(own, still, row)
        zeros = [self.zero] * (tile.sets * tile.mr * tile.nv)
        entry = build.block
        build.cbranch(build.icmp_signed("!=", more, _i64(0)), blocks["old"], blocks["start"])
        build.position_at_end(blocks["old"])
        old = [
            build.load(address, align=_FLOAT_BYTES, typ=self.vector)
            for address in self.tile_addresses(c, ldc)
        ]
        build.branch(blocks["start"])

        build.position_at_end(blocks["start"])
        first = phis(build, zeros[: len(old)], entry)
        join(first, old, blocks["old"])
        first += zeros[len(old) :]
        empty = build.or_(
            build.icmp_signed("<=", nseg, _i64(0)), build.icmp_signed("<=", run, _i64(0))
        )
        build.cbranch(empty, blocks["store"], blocks["segment"])

        build.position_at_end(blocks["segment"])
        seg, seg_ahead, seg_b, *seg_acc = phis(build, [segs, ahead, b, *first], blocks["start"])
        offset = build.load(seg, align=8, typ=_I64)
        start = self.at(a, build.shl(offset, _i64(2)))
        steps_end = self.at(start, unrolled)
        run_end = self.at(start, run_bytes)
        has_steps = build.icmp_signed("!=", unrolled, _i64(0))
        build.cbranch(has_steps, blocks["steps"], blocks["tail"])

        values = [start, seg_ahead, seg_b, *seg_acc]
        stepped = self.loop(blocks["steps"], blocks["segment"], values, tile.unroll, steps_end)
        build.cbranch(stepped.again, blocks["steps"], blocks["tail"])

        build.position_at_end(blocks["tail"])
        merged = phis(build, values, blocks["segment"])
        join(merged, stepped.values, blocks["steps"])
        at_end = build.icmp_unsigned("==", merged[0], run_end)
        build.cbranch(at_end, blocks["next"], blocks["step"])

        single = self.loop(blocks["step"], blocks["tail"], merged, 1, run_end)
        build.cbranch(single.again, blocks["step"], blocks["next"])

        build.position_at_end(blocks["next"])
        ended = phis(build, merged, blocks["tail"])
        join(ended, single.values, blocks["step"])
        _, next_ahead, next_b, *next_acc = ended
        next_seg = self.at(seg, _i64(8))
        heads = [seg, seg_ahead, seg_b, *seg_acc]
        join(heads, [next_seg, next_ahead, next_b, *next_acc], blocks["next"])
        again = build.icmp_unsigned("!=", next_seg, segs_end)
        build.cbranch(again, blocks["segment"], blocks["store"])

        build.position_at_end(blocks["store"])
        final = phis(build, first, blocks["start"])
        join(final, next_acc, blocks["next"])
        self.store(final, c, ldc)
        build.ret_void()

    def loop(
        self, block: ir.Block, before: ir.Block, values: list[Any], steps: int, end: Any
    ) -> _Loop:
        """Fill `block` with `steps` steps of k, entered from `before` with `values`."""
        build, tile = self.build, self.tile
        build.position_at_end(block)
        heads = phis(build, values, before)
        a, ahead, b = (self.hidden(head) for head in heads[:3])
        acc = list(heads[3:])
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
            last = step + 1 == steps
            if tile.alone or last:
                for line in range(tile.lines):
                    address = self.at(ahead, _i64(line * _LINE_BYTES))
                    build.call(self.prefetch, [address, *_READ_INTO_L2])
                if not last:
                    ahead = self.at(ahead, self.spread)
        moved = [
            self.at(a, _i64(steps * _FLOAT_BYTES)),
            self.at(ahead, self.onward),
            self.at(b, _i64(steps * self.b_step)),
        ]
        join(heads, [*moved, *acc], block)
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
        for n, address in enumerate(self.tile_addresses(c, ldc)):
            sums = [acc[s * size + n] for s in range(tile.sets)]
            while len(sums) > 1:
                half = len(sums) // 2
                pairs = zip(sums[:half], sums[half : 2 * half], strict=True)
                sums = [build.fadd(x, y) for x, y in pairs] + sums[2 * half :]
            build.store(sums[0], address, align=_FLOAT_BYTES)

    def tile_addresses(self, c: Any, ldc: Any) -> Iterator[Any]:
        """The addresses of the vectors of C, row by row."""
        stride = self.build.shl(ldc, _i64(2))
        row = c
        for i in range(self.tile.mr):
            if i:
                row = self.at(row, stride)
            for j in range(self.tile.nv):
                yield self.at(row, _i64(j * self.tile.lanes * _FLOAT_BYTES))

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


@dataclass(frozen=True, slots=True)
class _Loop:
    values: list[Any]
    again: Any


def _intrinsic(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    return module.globals.get(name) or ir.Function(module, kind, name)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)
