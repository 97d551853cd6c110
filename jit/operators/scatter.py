"""Operators that write elements at computed indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxjit.codegen.expr import Expr, apply, index
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.tensor import DefinitionError, Tensor
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.sizes import normal_axis

_UPDATES = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _like_data(data: Tensor, *others: Tensor, **attrs: Any) -> list[TensorType]:
    return [TensorType(data.dtype, data.shape)]


def _store(
    data: np.ndarray, where: tuple[np.ndarray, ...], updates: np.ndarray, reduction: str
) -> np.ndarray:
    """A copy of `data` with updates written or combined at the given index arrays.

    Indices outside the array raise IndexError. Where "none" has duplicates, the last one stays.
    """
    out = data.copy()
    if reduction == "none":
        out[where] = updates
    elif reduction in _UPDATES:
        _UPDATES[reduction].at(out, where, updates)
    else:
        raise DefinitionError("Scatter: unknown reduction")
    return out


def _rows(reduction: str = "none", **attrs: Any) -> list[Case]:
    attrs = {"reduction": reduction, **attrs} if reduction != "none" else attrs
    return [
        Case(draw("float32[3,5]", [[0, 2, 1], [2, 0, -1]], "float32[2,3]"), attrs),
        Case(draw("int32[3,5]", [[1, 1, -3]], "int32[1,3]"), attrs)
        if reduction != "none"
        else Case(draw("bfloat16[3,5]", np.array([[1], [0]], np.int32), "bfloat16[2,1]"), attrs),
    ]


@operator("ScatterElements", since=11, host=True, infer=_like_data, cases=[
    *_rows(), *_rows(axis=1), *_rows("add"), *_rows("mul", axis=1), *_rows("max"), *_rows("min"),
])  # fmt: skip
def scatter_elements(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    *,
    axis: int = 0,
    reduction: str = "none",
) -> np.ndarray:
    """`data` with update i at the position i, but for `axis`, where the index says."""
    where: list[np.ndarray] = list(np.indices(indices.shape, sparse=True))
    where[normal_axis(axis, data.ndim)] = indices
    return _store(data, tuple(where), updates, reduction)


@operator("Scatter", since=9, host=True, infer=_like_data, cases=[
    Case(draw("float32[3,5]", [[0, 2, 1]], "float32[1,3]"), version=9),
])  # fmt: skip
def scatter(
    data: np.ndarray, indices: np.ndarray, updates: np.ndarray, *, axis: int = 0
) -> np.ndarray:
    """The first name of `scatter_elements`."""
    return scatter_elements(data, indices, updates, axis=axis)


@operator("ScatterND", since=11, host=True, infer=_like_data, cases=[
    Case(draw("float32[3,5]", [[0, 1], [2, -1]], "float32[2]"), {"reduction": r})
    for r in ("none", "add", "mul", "max", "min")
] + [
    Case(draw("float32[5,3]", [[1], [1]], "float32[2,3]"), {"reduction": "add"}),
    Case(draw("int64[3,5]", [[[0, 1]], [[1, 2]]], "int64[2,1]")),
])  # fmt: skip
def scatter_nd(
    data: np.ndarray, indices: np.ndarray, updates: np.ndarray, *, reduction: str = "none"
) -> np.ndarray:
    """`data` with slices written at index tuples, the last axis of `indices`."""
    return _store(data, tuple(np.moveaxis(indices, -1, 0)), updates, reduction)


@operator("TensorScatter", since=24, cases=[
    Case(draw("float32[2,3,7,5]", "float32[2,3,2,5]", [1, 4]), fixed=(2,)),
    Case(draw("float32[2,3,7,5]", "float32[2,3,4,5]", [5, 2]), {"mode": "circular"}, fixed=(2, 4)),
    Case(draw("bfloat16[2,7,5]", "bfloat16[2,3,5]"), {"axis": 1}),
])  # fmt: skip
def tensor_scatter(
    past_cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """A cache with `update` written from each batch's index on (circular: modulo the length)."""
    place = normal_axis(axis, past_cache.rank)
    length, count = past_cache.shape[place], update.shape[place]

    def at(idx: tuple[Expr, ...]) -> Expr:
        start = index(0) if write_indices is None else write_indices.at(idx[0])
        offset = idx[place] - start
        if mode == "circular":
            offset = apply("mod", offset, length)
        inside = apply("logical_and", apply("le", 0, offset), apply("lt", offset, count))
        source = list(idx)
        source[place] = offset
        return apply("select", inside, update.at(*source), past_cache.at(*idx))

    if mode not in ("linear", "circular"):
        raise DefinitionError("TensorScatter: the mode is neither linear nor circular")
    return Tensor(past_cache.shape, past_cache.dtype, at)
