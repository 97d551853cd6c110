"""Operators that make tensors from attributes, shapes and scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxjit.codegen.expr import INDEX, Const, Expr, apply, as_int, cast
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import (
    NARROW,
    DefinitionError,
    NeedsValue,
    Tensor,
    array,
    compute,
    full,
    in_wide,
)
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.sizes import as_size, size_list
from onnxjit.tensors import array_dtype_name, dtype_name


@operator("Constant", since=1, cases=[
    Case(draw(), {"value_float": 1.5}), Case(draw(), {"value_ints": [1, 2]}),
    Case(draw(), {"value_int": 3}), Case(draw(), {"value_floats": [0.5]}),
])  # fmt: skip
def constant(
    *,
    value: np.ndarray | None = None,
    sparse_value: Any = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    value_string: str | None = None,
    value_strings: Sequence[str] | None = None,
) -> Tensor:
    """The tensor that an attribute holds. (Importers turn the node into a constant of the graph;
    this is for the small ones that are left.)"""
    if value is not None:
        return array(value, array_dtype_name(value))
    for number, dtype in (
        (value_float, "float32"), (value_floats, "float32"), (value_int, INDEX), (value_ints, INDEX)
    ):  # fmt: skip
        if number is not None:
            return array(np.asarray(number, dtype), dtype)
    raise DefinitionError("Constant: strings and sparse tensors have no kernel")


@operator("ConstantOfShape", since=9, cases=[
    Case(draw([2, 3]), {"value": np.array([7], np.int32)}), Case(draw([5])),
    Case(draw(np.zeros(0, np.int64)), {"value": np.array([True])}),
    Case(draw([2, 0])),
])  # fmt: skip
def constant_of_shape(shape: Tensor, *, value: np.ndarray | None = None) -> Tensor:
    """One value everywhere."""
    if value is None:
        return full(size_list(shape), 0.0, "float32")
    return full(size_list(shape), value.reshape(-1)[0], array_dtype_name(value))


@operator("Shape", since=1, cases=[
    Case(draw("float32[2,3,5]"), {"start": -2}), Case(draw("float32[2,3,5]"), {"end": 1}),
    Case(draw("float32[2,3,5]"), {"start": 2, "end": -2}), Case(draw("float32[]")),
    Case(draw("bool[0,7]")),
])  # fmt: skip
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes from `start` up to `end`."""
    first, last, _ = slice(start, end).indices(x.rank)
    return array(list(x.shape[first:last]) or np.zeros(0, np.int64), INDEX)


@operator("Size", since=1, cases=[Case(draw("float32[2,3,5]")), Case(draw("float32[0,5]"))])
def size(x: Tensor) -> Tensor:
    """The number of elements."""
    return full((), x.size, INDEX)


def _length(start: Expr, limit: Expr, delta: Expr) -> Expr:
    """max(0, ceil((limit - start) / delta)) of integers or floats."""
    if start.dtype.startswith(("float", "bfloat")):
        if all(isinstance(e, Const) for e in (start, limit, delta)):
            kind = numpy_dtype(start.dtype).type
            a, b, c = (kind(e.value) for e in (start, limit, delta))  # type: ignore[attr-defined]
            return cast(Const(max(0, math.ceil((b - a) / c)), INDEX), INDEX)
        if delta is Const(1, delta.dtype) and start is Const(0, start.dtype):
            whole = as_size(cast(limit, INDEX))
            if as_size(cast(apply("ceil", limit), INDEX)) is whole:
                return apply("max", whole, 0)
        steps = apply("ceil", apply("div", limit - start, delta))
        return apply("max", cast(steps, INDEX), 0)
    a, b, c = (as_size(e) for e in (start, limit, delta))
    step = as_int(c)
    if step is None:
        raise NeedsValue("the step of a range")
    if step == 0:
        raise DefinitionError("Range: a step of 0")
    span = b - a if step > 0 else a - b
    return apply("max", apply("floordiv", span + (abs(step) - 1), abs(step)), 0)


def _numbers(*dtypes: str) -> list[Case]:
    def case(dtype: str, *values: float) -> Case:
        return Case(draw(*(np.array(v, numpy_dtype(dtype)) for v in values)))

    cases = [case(d, *v) for d in dtypes for v in ((1, 5, 1), (7, 0, -2), (0, 7, 3), (3, 1, 1))]
    return [*cases, case("float32", 0.5, 2.75, 0.25)]


@operator("Range", since=11, cases=_numbers("int32", "int64", "int16", "float32", "float64"))
def arange(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    """start, start + delta, … before limit."""
    a, b, c = (t.scalar() for t in (start, limit, delta))
    dtype = start.dtype
    wide = "float32" if dtype in NARROW else dtype
    n = _length(cast(a, wide), cast(b, wide), cast(c, wide))
    return compute((n,), dtype, lambda i: in_wide(lambda s, d: s + cast(i, wide) * d, a, c))


@operator("EyeLike", since=9, cases=[
    Case(draw("float32[3,5]")), Case(draw("float32[3,5]"), {"k": 1, "dtype": 7}),
    Case(draw("int32[5,3]"), {"k": -1, "dtype": 9}),
])  # fmt: skip
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """1 on the k-th diagonal, else 0."""
    kind = x.dtype if dtype is None else dtype_name(dtype)
    return compute(x.shape, kind, lambda i, j: cast(apply("eq", j - i, k), kind))
