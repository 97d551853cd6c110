"""Operators that only move elements: every one is a map of indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxjit.codegen import tensor as T
from onnxjit.codegen.expr import ONE, Expr, apply, as_int, index
from onnxjit.codegen.kernel import product
from onnxjit.codegen.tensor import DefinitionError, Tensor, broadcast_shape
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.sizes import (
    axis_list,
    is_one,
    normal_axes,
    normal_axis,
    quotient,
    size_list,
)

# --- shape changes -----------------------------------------------------------------------------


@operator("Reshape", since=5, cases=[
    Case(draw("float32[2,3,5]", [5, 6])),
    Case(draw("float32[2,3,5]", [0, -1])),
    Case(draw("float32[2,3,5,7]", [2, 0, 35])),
    Case(draw("int8[2,3,5]", [-1])),
    Case(draw("float32[2,3,5,7]", [0, 0, 5, -1])),
    Case(draw("float32[6,5]", [2, 3, -1, 1]), fixed=(6,)),
    Case(draw("float32[0,3]", [3, 0]), {"allowzero": 1}),
    Case(draw("float32[1]", np.zeros(0, np.int64))),
])  # fmt: skip
def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Row-major reshape; 0 copies the input's size (unless `allowzero`), -1 takes the rest."""
    return _reshape_to(x, size_list(shape), allowzero)


@operator("Reshape", since=1, until=4, cases=[Case(draw("float32[2,3,5]"), {"shape": [0, -1]})])
def reshape_1(x: Tensor, *, shape: Sequence[int] = ()) -> Tensor:
    """`reshape` with the target as an attribute."""
    return _reshape_to(x, size_list(shape), 0)


def _reshape_to(x: Tensor, target: list[Expr], allowzero: int) -> Tensor:
    rest = None
    for k, d in enumerate(target):
        n = as_int(d)
        if n == 0 and not allowzero:
            if k >= x.rank:
                raise DefinitionError(f"Reshape: there is no input size {k} to copy")
            target[k] = x.shape[k]
        elif n == -1:
            if rest is not None:
                raise DefinitionError("Reshape: -1 occurs twice")
            rest = k
        elif n is not None and n < 0:
            raise DefinitionError(f"Reshape: the size {n} is negative")
    if rest is not None:
        target[rest] = quotient(x.shape, [d for k, d in enumerate(target) if k != rest])
    return T.reshape(x, target)


@operator("Flatten", since=1, cases=[
    *(Case(draw("float32[2,3,5]"), {"axis": a}) for a in range(-3, 4)),
    Case(draw("float32[2,3,5,7]")),
])  # fmt: skip
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix: the sizes before `axis` and those from it on are multiplied."""
    if not -x.rank <= axis <= x.rank:
        raise DefinitionError(f"Flatten: axis {axis} of a tensor of rank {x.rank}")
    axis += x.rank if axis < 0 else 0
    return T.reshape(x, [product(x.shape[:axis]), product(x.shape[axis:])])


@operator("Squeeze", since=13, cases=[
    Case(draw("float32[1,3,1,5]", [0, -2])), Case(draw("float32[1,3,1,5]"), symbolic=False),
])  # fmt: skip
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Drops axes of size 1 (all of them when `axes` is omitted)."""
    return _squeeze(x, axis_list(axes))


@operator("Squeeze", since=1, until=12, cases=[
    Case(draw("float32[1,3,1,5]"), {"axes": [0]}), Case(draw("float32[1,3]"), symbolic=False),
])  # fmt: skip
def squeeze_1(x: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """`squeeze` with the axes as an attribute."""
    return _squeeze(x, axis_list(axes))


def _squeeze(x: Tensor, axes: list[int] | None) -> Tensor:
    if axes is None:
        gone = [k for k, d in enumerate(x.shape) if is_one(d)]
    else:
        gone = normal_axes(axes, x.rank)
    for k in gone:
        T.same_dim(x.shape[k], ONE)
    kept = [k for k in range(x.rank) if k not in gone]

    def at(idx: tuple[Expr, ...]) -> Expr:
        full: list[Expr] = [index(0)] * x.rank
        for k, i in zip(kept, idx, strict=True):
            full[k] = i
        return x.at(*full)

    return Tensor([x.shape[k] for k in kept], x.dtype, at)


@operator("Unsqueeze", since=13, cases=[
    Case(draw("float32[3,5]", [0, -1])), Case(draw("float32[]", [0])),
    Case(draw("int64[3,5]", [2, 0, 1])),
])  # fmt: skip
def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """Inserts axes of size 1 at these places of the result."""
    return insert_axes(x, axes.ints())


@operator("Unsqueeze", since=1, until=12, cases=[Case(draw("float32[3,5]"), {"axes": [0, 3]})])
def unsqueeze_1(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    """`unsqueeze` with the axes as an attribute."""
    return insert_axes(x, axes)


def insert_axes(x: Tensor, axes: Sequence[int]) -> Tensor:
    """`x` with axes of size 1 at these places of the result."""
    rank = x.rank + len(axes)
    new = normal_axes(axes, rank)
    kept = [k for k in range(rank) if k not in new]
    shape: list[Expr] = [ONE] * rank
    for k, d in zip(kept, x.shape, strict=True):
        shape[k] = d
    return Tensor(shape, x.dtype, lambda idx: x.at(*(idx[k] for k in kept)))


@operator("Transpose", since=1, cases=[
    Case(draw("float32[2,3,5]"), {"perm": [1, 2, 0]}), Case(draw("bool[2,3,5]")),
    Case(draw("float32[2,3,5,7]"), {"perm": [0, 2, 1, 3]}),
    Case(draw("float32[1,128,12,64]"), {"perm": [0, 2, 1, 3]}, bench=True, label="heads"),
    Case(draw("float32[64,56,56]"), {"perm": [1, 2, 0]}, bench=True, label="channels last"),
])  # fmt: skip
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permutes the axes; reverses them by default."""
    order = list(range(x.rank))[::-1] if perm is None else [normal_axis(p, x.rank) for p in perm]
    if sorted(order) != list(range(x.rank)):
        raise DefinitionError(f"Transpose: {order} is no permutation of {x.rank} axes")
    return T.transpose(x, order)


# --- repetition --------------------------------------------------------------------------------


@operator("Expand", since=8, cases=[
    Case(draw("float32[3,1]", [2, 1, 5])), Case(draw("float32[3,5]", [1, 1])),
    Case(draw("int64[]", [2, 3])), Case(draw("float32[1,3]", [0, 3])),
])  # fmt: skip
def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Broadcasts to the common shape of the input and `shape`."""
    return T.expand(x, broadcast_shape(x.shape, size_list(shape)))


@operator("Tile", since=6, cases=[
    Case(draw("float32[3,5]", [2, 3])), Case(draw("float32[1,5]", [7, 1])),
    Case(draw("int64[3]", [0])),
])  # fmt: skip
def tile(x: Tensor, repeats: Tensor) -> Tensor:
    """Repeats the tensor along every axis."""
    return _tile(x, size_list(repeats))


@operator("Tile", since=1, until=5)
def tile_1(x: Tensor, tiles: Tensor, axis: Tensor) -> Tensor:
    """`tile` along one axis."""
    counts: list[Expr] = [ONE] * x.rank
    counts[normal_axis(axis.ints()[0], x.rank)] = size_list(tiles)[0]
    return _tile(x, counts)


def _tile(x: Tensor, counts: list[Expr]) -> Tensor:
    if len(counts) != x.rank:
        raise DefinitionError(f"Tile: {len(counts)} repeats for rank {x.rank}")

    def source(i: Expr, d: Expr, n: Expr) -> Expr:
        return index(0) if d is ONE else i if n is ONE else i % d

    return Tensor(
        [d * n for d, n in zip(x.shape, counts, strict=True)],
        x.dtype,
        lambda idx: x.at(*map(source, idx, x.shape, counts)),
    )


# --- joining and splitting ---------------------------------------------------------------------


@operator("Concat", since=4, cases=[
    *(Case(draw("float32[2,3,5]", "float32[2,3,5]"), {"axis": a}) for a in (0, 1, -1)),
    Case(draw("float32[2,3]", "float32[2,0]", "float32[2,7]"), {"axis": 1}),
    Case(draw("int64[3]"), {"axis": 0}),
    Case(draw("float32[1,64,56,56]", "float32[1,64,56,56]"), {"axis": 1}, bench=True, label="maps"),
])  # fmt: skip
def concat(*xs: Tensor, axis: int) -> Tensor:
    """Joins tensors along an axis."""
    return T.concat(xs, normal_axis(axis, xs[0].rank))


@operator("Concat", since=1, until=3, cases=[Case(draw("float32[2,3]", "float32[2,5]"))])
def concat_1(*xs: Tensor, axis: int = 1) -> Tensor:
    """`concat` with a default axis."""
    return concat(*xs, axis=axis)


@operator("Split", since=18, cases=[
    Case(draw("float32[6,5]"), {"num_outputs": 3}, outputs=3, fixed=(6,)),
    Case(draw("float32[7,5]"), {"num_outputs": 3}, outputs=3, symbolic=False),
    Case(draw("float32[3,7]", [2, 5]), {"axis": -1}, outputs=2, fixed=(7,)),
])  # fmt: skip
def split(
    x: Tensor,
    sizes: Tensor | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int = 1,
) -> Any:
    """Cuts along an axis into parts of the given sizes, or into equal ones (the last smaller)."""
    return _split(x, None if sizes is None else size_list(sizes), axis, num_outputs or outputs)


@operator("Split", since=13, until=17, cases=[
    Case(draw("float32[6,5]"), outputs=3, fixed=(6,)),
    Case(draw("float32[3,7]", [2, 5]), {"axis": 1}, outputs=2, fixed=(7,)),
])  # fmt: skip
def split_13(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, outputs: int = 1) -> Any:
    """`split` where the number of equal parts is that of the outputs."""
    return _split(x, None if sizes is None else size_list(sizes), axis, outputs)


@operator("Split", since=2, until=12, cases=[
    Case(draw("float32[6,5]"), outputs=3, fixed=(6,)),
    Case(draw("float32[3,7]"), {"axis": 1, "split": [2, 5]}, outputs=2, fixed=(7,)),
])  # fmt: skip
def split_2(
    x: Tensor, *, axis: int = 0, split: Sequence[int] | None = None, outputs: int = 1
) -> Any:
    """`split` with the sizes as an attribute."""
    return _split(x, None if split is None else size_list(split), axis, outputs)


@operator("Split", since=1, until=1)
def split_1(
    x: Tensor,
    sizes: Tensor | None = None,
    *,
    axis: int = 0,
    split: Sequence[int] | None = None,
    outputs: int = 1,
) -> Any:
    """`split` with the sizes as an attribute or an input."""
    given = sizes if sizes is not None else split
    return _split(x, None if given is None else size_list(given), axis, outputs)


def _split(x: Tensor, sizes: list[Expr] | None, axis: int, parts: int) -> Any:
    axis = normal_axis(axis, x.rank)
    d = x.shape[axis]
    if sizes is None:
        n = as_int(d)
        if n is None:
            part = d // parts
            T.same_dim(d, part * parts)
            sizes = [part] * parts
        else:
            whole = -(-n // parts)
            sizes = [index(max(0, min(whole, n - k * whole))) for k in range(parts)]
    out = []
    start: Expr = index(0)
    for s in sizes:
        out.append(T.slice_axis(x, axis, start, s))
        start = start + s
    T.same_dim(start, d)
    return tuple(out) if len(out) > 1 else out[0]


# --- blocks and sequences ----------------------------------------------------------------------


@operator("DepthToSpace", since=1, cases=[
    Case(draw("float32[2,12,3,5]"), {"blocksize": 2}, fixed=(12,)),
    Case(draw("float32[2,12,3,5]"), {"blocksize": 2, "mode": "CRD"}, fixed=(12,)),
])  # fmt: skip
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Moves blocks of channels into space."""
    n, c, h, w = x.shape
    b = index(blocksize)
    depth = quotient([c], [b, b])
    if mode == "DCR":
        y = T.transpose(T.reshape(x, [n, b, b, depth, h, w]), (0, 3, 4, 1, 5, 2))
    else:
        y = T.transpose(T.reshape(x, [n, depth, b, b, h, w]), (0, 1, 4, 2, 5, 3))
    return T.reshape(y, [n, depth, h * b, w * b])


@operator("SpaceToDepth", since=1, cases=[
    Case(draw("float32[2,3,4,6]"), {"blocksize": 2}, fixed=(4, 6)),
    Case(draw("float32[2,3,4,6]"), {"blocksize": 2, "mode": "CRD"}, fixed=(4, 6), version=28),
])  # fmt: skip
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Moves blocks of space into channels."""
    n, c, h, w = x.shape
    b = index(blocksize)
    y = T.reshape(x, [n, c, quotient([h], [b]), b, quotient([w], [b]), b])
    y = T.transpose(y, (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return T.reshape(y, [n, c * b * b, quotient([h], [b]), quotient([w], [b])])


@operator("ReverseSequence", since=10, cases=[
    Case(draw("float32[5,3]", [1, 2, 5])),
    Case(draw("float32[3,5,2]", [1, 2, 5]), {"batch_axis": 0, "time_axis": 1}),
])  # fmt: skip
def reverse_sequence(
    x: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """Reverses the first `sequence_lens[b]` steps of every sequence b."""
    batch, time = normal_axis(batch_axis, x.rank), normal_axis(time_axis, x.rank)

    def at(idx: tuple[Expr, ...]) -> Expr:
        t, length = idx[time], sequence_lens.at(idx[batch])
        source = list(idx)
        source[time] = apply("select", apply("lt", t, length), length - 1 - t, t)
        return x.at(*source)

    return Tensor(x.shape, x.dtype, at)


__all__ = ["insert_axes"]
