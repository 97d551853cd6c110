"""Schedule for a copy between two orders of axes whose contiguous axes differ: a transposition.

A tile is a block of both contiguous axes, so that what one line of cache holds is read and written
while it is in L1, and vectors are transposed in registers (`microkernel_pack`). One loop over the
results, which gathers each vector element by element, takes 51 µs for 64 x 3136 float32 and
this 36, which is 0.86 of the bandwidth (one core of Zen 3; ONNX Runtime 41).

Where results are a multiple of `ALIASED` bytes apart, the lines of a column of results share a set
or a few of L1 and wait for each other to arrive. There a block is transposed within L1 and then
stored row by row: 1024 x 1024 at 23 GB/s for 12, 512 x 512 at 40 for 22, 256 x 4000 at 41 for 30;
rows of 1000 would lose a quarter.
"""

from __future__ import annotations

from onnxjit.codegen import instruction_sets, microkernels
from onnxjit.codegen import microkernel_depthwise as windows
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Expr,
    Load,
    Var,
    apply,
    as_int,
    axes_of,
    index,
    loads,
    substitute,
)
from onnxjit.codegen.loops import Address, Call, For, Local, LoopNest, Store
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.schedule.axes import (
    by_stride,
    coefficient,
    merge_axes,
)
from onnxjit.codegen.schedule.depthwise import channel_block
from onnxjit.codegen.schedule.pointwise import finish_nest, rename, rename_statement, with_tiles
from onnxjit.codegen.schedule.request import Declined, Request, single_stage

BLOCK = 64
"""Elements of a tile in both directions: four lines of cache, 16 KB of float32 in L1."""

ALIASED = 1024
"""Bytes between results of which a multiple leaves four of L1's 64 sets to a column of them."""

FEWEST = 8
"""Columns from which a vector shorter than the machine's is worth while."""


def transposition(r: Request) -> LoopNest:
    """A single stage that copies float32 values whose contiguous axis is another one than where
    they are stored."""
    s = single_stage(r)
    if not isinstance(s.value, Load) or s.value.dtype != "float32" or loads(s.value.index[0]):
        raise Declined("not a copy of float32 values")
    order = by_stride(s.axes, s.offset)
    s, order = merge_axes(s, order)
    axes, (offset, value) = rename(order, [s.offset, s.value], "i")
    assert isinstance(value, Load)
    (source,) = value.index
    along = [a for a in axes if coefficient(offset, a) is ONE]
    across = [a for a in axes if coefficient(source, a) is ONE]
    if len(along) != 1 or len(across) != 1 or along == across:
        raise Declined("read and stored along the same axis")
    column, row = along[0], across[0]
    stride, step = coefficient(source, column), coefficient(offset, row)
    if stride is None or stride is ZERO or step is None or step is ZERO:
        raise Declined("not a transposition of two axes")
    if any(coefficient(e, a) is None for e in (source, offset) for a in axes_of(source)):
        raise Declined("an index that is not affine")
    columns = as_int(column.extent) or 0
    isa = windows.isa_for(columns, r.target)
    lanes = instruction_sets.ISAS[isa].lanes if isa is not None else 0
    rows = as_int(row.extent)
    if isa is None or (rows is not None and rows < lanes):
        raise Declined("a side shorter than a vector, or columns of an unknown number")
    if lanes < FEWEST and isa != instruction_sets.isa_of(r.target):
        raise Declined("so few columns that they are written out")
    symbol = microkernels.pack(lanes, isa)

    width = channel_block(columns, BLOCK, lanes)
    cb = Axis("cb", index(-(-columns // width)))
    rb = Axis("rb", (row.extent + (BLOCK - 1)) // BLOCK)
    c0: Expr = cb * width
    count: Expr = index(width)
    if columns % width:
        count = apply("min", count, columns - c0)
    vector = Var("vector")
    vectors = apply("floordiv", count + (lanes - 1), lanes)
    # A last vector that is cut begins sooner, and stores again what the one before it did.
    here: dict[Expr, Expr] = {
        column: c0 + apply("min", vector * lanes, count - lanes),
        row: rb * BLOCK,
    }
    depth = apply("min", BLOCK, row.extent - rb * BLOCK)
    results = Address(s.buffer, substitute(offset, here))
    locals_: tuple[Local, ...] = ()
    store: tuple[For, ...] = ()
    if (as_int(step) or 1) * numpy_dtype(value.dtype).itemsize % ALIASED == 0:
        i, j = Var("i"), Var("j")
        place = substitute(offset, {column: c0 + j, row: rb * BLOCK + i})
        line = Store(s.buffer, place, Load("block", (i * width + j,), value.dtype))
        store = (For(i, ZERO, depth, (For(j, ZERO, count, (line,)),)),)
        results, step = Address("block", here[column] - c0), index(width)
        locals_ = (Local("block", value.dtype, index(BLOCK * width)),)
    read = Address(value.buffer, substitute(source, here))
    call = Call(symbol, (read, stride, index(lanes), depth, results, step))
    rest = [a for a in axes if a not in (column, row)]
    outer = [*rest, *(a for a in (rb, cb) if a.extent is not ONE)]
    body, tiles = with_tiles(outer, (For(vector, ZERO, vectors, (call,)), *store))
    gone: dict[Expr, Expr] = {Axis(n, ONE): ZERO for n in ("rb", "cb")}
    body = tuple(rename_statement(x, gone) for x in body)
    note = f"blocks of {BLOCK} x {width}"
    return finish_nest(
        r, body, tiles, "transposition", locals=locals_, symbols=(symbol,), notes=(note,)
    )


__all__ = ["transposition"]
