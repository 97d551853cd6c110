"""Operators that read elements at computed indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxjit.codegen.expr import Const, Expr, apply, as_int, cast, index
from onnxjit.codegen.simplify import is_nonneg
from onnxjit.codegen.tensor import DefinitionError, Tensor, current, same_dim
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.sizes import (
    assume_at_least,
    assume_within,
    axis_list,
    expect_within,
    normal_axis,
    size_list,
    wrap_index,
)

Index = tuple[Expr, ...]

# --- slices ------------------------------------------------------------------------------------

_FAR = 2**31 - 1  # what exporters write for "to the end"


def _bound(v: Expr, d: Expr, step: int, is_end: bool) -> Expr:
    """A start or end of a slice, resolved against size `d` and clamped as NumPy does.

    A symbolic bound that is a size is relied on to lie within `d` (guarded), so that x[:n] has
    exactly n elements.
    """
    k = as_int(v)
    low = index(0 if step > 0 else -1)
    high = d if step > 0 else d - 1
    if k is not None:
        if k >= _FAR:
            return high
        if k <= -_FAR:
            return low
        if k < 0:
            if step > 0 and assume_at_least(d, -k):
                return d + k
            return apply("max", apply("min", d + k, high), low)
        if (not is_end or k <= 1) and step > 0 and assume_at_least(d, k):
            return v
        return apply("max", apply("min", v, high), low)
    if is_nonneg(v):
        return assume_within(v, high)
    if is_nonneg(-v):
        return assume_within(-v, d) * -1 + d if assume_at_least(-v, 1) else d + v
    v = apply("select", apply("lt", v, 0), v + d, v)
    return apply("max", apply("min", v, high), low)


def _span(start: Expr, end: Expr, span: Expr, step: int) -> Expr:
    """The distance between resolved bounds, at least 0. A symbolic one is relied on not to be
    negative (guarded), except where constant bounds say that the slice is empty."""
    a, b = as_int(start), as_int(end)
    if a is not None and b is not None and (a < 0) == (b < 0) and (b - a) * step <= 0:
        return index(0)
    if as_int(span) is None and not is_nonneg(span):
        current().guards.append((apply("min", span, 0), index(0)))
        return span
    return apply("max", span, 0)


def slice_one(x: Tensor, axis: int, start: Expr, end: Expr, step: int) -> Tensor:
    """x[start:end:step] along one axis with Python's meaning of negative and far bounds."""
    d = x.shape[axis]
    if step == 0:
        raise DefinitionError("Slice: a step of 0")
    first, last = _bound(start, d, step, False), _bound(end, d, step, True)
    span = _span(start, end, last - first if step > 0 else first - last, step)
    length = span if abs(step) == 1 else apply("floordiv", span + (abs(step) - 1), abs(step))
    if first is index(0) and length is d and step == 1:
        return x
    shape = list(x.shape)
    shape[axis] = length

    def at(idx: Index) -> Expr:
        source = list(idx)
        source[axis] = first + idx[axis] * step
        return x.at(*source)

    return Tensor(shape, x.dtype, at)


def _slice(
    x: Tensor, starts: list[Expr], ends: list[Expr], axes: list[int] | None, steps: list[int]
) -> Tensor:
    places = list(range(len(starts))) if axes is None else [normal_axis(a, x.rank) for a in axes]
    if len({len(starts), len(ends), len(places), len(steps)}) != 1:
        raise DefinitionError("Slice: starts, ends, axes and steps differ in number")
    for axis, start, end, step in zip(places, starts, ends, steps, strict=True):
        x = slice_one(x, axis, start, end, step)
    return x


@operator("Slice", since=10, cases=[
    Case(draw("float32[5,7]", [1, 2], [4, 7])),
    Case(draw("float32[5,7]", [-3], [2**63 - 1], [1])),
    Case(draw("float32[5,7]", [0], [-1], [-1])),
    Case(draw("float32[5,7]", [-1, 5], [-(2**63), 0], [0, 1], [-1, -2])),
    Case(draw("int64[5,7]", [0, 1], [2**31 - 1, 100], [0, 1], [2, 3])),
    Case(draw("float32[5,7]", [20], [30], [0])),
    Case(draw("float32[5,7]", [3], [3], [0])),
    Case(draw("float32[5,7]", [-100], [3], [0])),
])  # fmt: skip
def slice_10(
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """x[start:end:step] along the given axes."""
    begin = size_list(starts)
    strides = [1] * len(begin) if steps is None else steps.ints()
    return _slice(x, begin, size_list(ends), axis_list(axes), strides)


@operator("Slice", since=1, until=9, cases=[
    Case(draw("float32[5,7]"), {"starts": [1], "ends": [-1], "axes": [1]}),
    Case(draw("float32[5,7]"), {"starts": [0, 2], "ends": [1000, 6]}),
])  # fmt: skip
def slice_1(
    x: Tensor, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None
) -> Tensor:
    """x[start:end] along the given axes."""
    begin = size_list(starts)
    return _slice(x, begin, size_list(ends), axis_list(axes), [1] * len(begin))


# --- gathering ---------------------------------------------------------------------------------


@operator("Gather", since=1, cases=[
    Case(draw("float32[5,7]", [[0, -1], [4, 2]])),
    Case(draw("float32[5,7]", [6, 0, -7]), {"axis": 1}),
    Case(draw("int64[5]", np.array(3))),
    Case(draw("bool[5,7]", np.array([1, -2], np.int32)), {"axis": -1}),
    Case(draw("float32[5,7]", np.zeros((0,), np.int64))),
    Case(draw("float32[30522,768]", "int64[128]", low=0, high=30000), bench=True, label="words"),
])  # fmt: skip
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices of `x` along `axis`; the axes of `indices` take its place."""
    axis = normal_axis(axis, x.rank)
    q = indices.rank
    expect_within(indices, x.shape[axis], axis)
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    def at(idx: Index) -> Expr:
        i = wrap_index(indices.at(*idx[axis : axis + q]), x.shape[axis])
        return x.at(*idx[:axis], i, *idx[axis + q :])

    return Tensor(shape, x.dtype, at)


@operator("GatherElements", since=11, cases=[
    Case(draw("float32[3,5]", [[0, 2, -1], [4, -5, 1]]), {"axis": 1}, fixed=(2,)),
    Case(draw("float32[3,5]", np.array([[0, 2, -1, 1, 0]], np.int32))),
])  # fmt: skip
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Elements of `x` at the output's own index, except along `axis`."""
    axis = normal_axis(axis, x.rank)
    if indices.rank != x.rank:
        raise DefinitionError(f"GatherElements: ranks {x.rank} and {indices.rank} differ")
    expect_within(indices, x.shape[axis], axis)

    def at(idx: Index) -> Expr:
        source = list(idx)
        source[axis] = wrap_index(indices.at(*idx), x.shape[axis])
        return x.at(*source)

    return Tensor(indices.shape, x.dtype, at)


@operator("GatherND", since=11, cases=[
    Case(draw("float32[3,5]", [[0, 1], [-1, 4]]), fixed=(2,)),
    Case(draw("float32[3,5]", [[1], [0]])),
    Case(draw("float32[3,5,7]", [[1], [0], [-1]]), {"batch_dims": 1}),
    Case(draw("int32[3,5]", [[[0, 1]], [[2, 3]]]), fixed=(2,)),
])  # fmt: skip
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices of `x` at index tuples, the last axis of `indices`."""
    count = as_int(indices.shape[-1])
    if count is None:
        raise DefinitionError("GatherND: the length of the index tuples is symbolic")
    outer = indices.rank - 1
    known = batch_dims + count
    if known > x.rank:
        raise DefinitionError(f"GatherND: {known} indices into rank {x.rank}")
    for k in range(batch_dims):
        same_dim(x.shape[k], indices.shape[k])
    for k in range(count):
        each = Tensor(indices.shape[:-1], indices.dtype, lambda idx, k=k: indices.at(*idx, k))  # type: ignore[misc]
        expect_within(each, x.shape[batch_dims + k], batch_dims + k)

    def at(idx: Index) -> Expr:
        where = [
            wrap_index(indices.at(*idx[:outer], k), x.shape[batch_dims + k]) for k in range(count)
        ]
        return x.at(*idx[:batch_dims], *where, *idx[outer:])

    return Tensor((*indices.shape[:-1], *x.shape[known:]), x.dtype, at)


# --- patterns ----------------------------------------------------------------------------------


def _one_hot(indices: Tensor, depth: Tensor, values: Tensor, axis: int, negative: bool) -> Tensor:
    n = size_list(depth)[0]
    place = normal_axis(axis, indices.rank + 1)
    shape = (*indices.shape[:place], n, *indices.shape[place:])

    def at(idx: Index) -> Expr:
        i = cast(indices.at(*idx[:place], *idx[place + 1 :]), "int64")
        if negative:
            i = apply("select", apply("lt", i, 0), i + n, i)
        return apply("select", apply("eq", i, idx[place]), values.at(1), values.at(0))

    return Tensor(shape, values.dtype, at)


@operator("OneHot", since=11, cases=[
    Case(draw([[0, 6], [-1, -8], [2, 9]], np.array(7), [2, 5])),
    Case(draw([1, 2], [3], "float32[2]"), {"axis": 0}, fixed=(2,)),
    Case(draw(np.array([1.0, 2.0], np.float32), np.array([4.0], np.float32),
              np.array([True, False])),
         fixed=(2,), expect=lambda i, depth, v: ~np.eye(4, dtype=bool)[1:3]),
])  # fmt: skip
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """values[1] where the new axis has the index, else values[0]."""
    return _one_hot(indices, depth, values, axis, True)


@operator("OneHot", since=9, until=10)
def one_hot_9(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """`one_hot` where a negative index selects nothing."""
    return _one_hot(indices, depth, values, axis, False)


@operator(
    "Trilu",
    since=14,
    cases=[
        Case(draw("float32[2,5,7]", np.array(k)), {"upper": u}) for k in (-1, 0, 2) for u in (0, 1)
    ]
    + [Case(draw("bool[3,5]")), Case(draw("int64[5,3]"), {"upper": 0}), Case(draw("float32[0,3]"))],
)
def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of matrices, from or up to the k-th diagonal; 0 elsewhere."""
    diagonal = index(0) if k is None else k.at(*[0] * k.rank)

    def at(idx: Index) -> Expr:
        offset = idx[-1] - idx[-2]
        keep = apply("le", diagonal, offset) if upper else apply("le", offset, diagonal)
        return apply("select", keep, x.at(*idx), Const(0, x.dtype))

    return Tensor(x.shape, x.dtype, at)


__all__ = ["slice_one"]
