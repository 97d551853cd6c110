"""Pooling: a reduction over the taps of a window, padding read as a condition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxjit.codegen.expr import TRUE, Const, Expr, apply, cast, index
from onnxjit.codegen.kernel import product
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    cast_to,
    elementwise,
    flatten_index,
    reduce,
    reduce_identity,
    reduce_over,
    unflatten_index,
)
from onnxjit.operators.matmul import wide_dtype
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.window import Window, windows


def inside_all(geometry: Sequence[Window], o: Index, k: Index) -> Expr:
    """Whether a tap reads an element on every axis."""
    inside: Expr = TRUE
    for g, i, j in zip(geometry, o, k, strict=True):
        inside = apply("logical_and", inside, g.inside(i, j))
    return inside


def sources(geometry: Sequence[Window], o: Index, k: Index) -> list[Expr]:
    return [g.source(i, j) for g, i, j in zip(geometry, o, k, strict=True)]


def _shape(x: Tensor, geometry: Sequence[Window]) -> tuple[Expr, ...]:
    return (*x.shape[:2], *(g.count for g in geometry))


def _spatial(x: Tensor) -> tuple[Expr, ...]:
    if x.rank < 3:
        raise DefinitionError("pooling needs an input of rank 3 or more")
    return x.shape[2:]


@operator(
    "MaxPool",
    since=1,
    cases=[
        Case(
            draw("float32[2,3,8,9]"), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, label="pads"
        ),
        Case(
            draw("float32[1,3,9,10]"),
            {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
            label="ceil",
        ),
        Case(
            draw("float32[1,2,9,9]"),
            {"kernel_shape": [2, 2], "dilations": [2, 3], "strides": [2, 1]},
            outputs=2,
            label="dilations, indices",
        ),
        Case(
            draw("float32[2,2,5,6]"),
            {"kernel_shape": [2, 2], "storage_order": 1, "auto_pad": "SAME_UPPER"},
            outputs=2,
            label="column-major indices",
        ),
        Case(draw("float32[1,2,9]"), {"kernel_shape": [3], "auto_pad": "SAME_LOWER"}, label="1d"),
        Case(draw("float32[1,2,4,5,6]"), {"kernel_shape": [2, 2, 2]}, label="3d"),
        Case(
            lambda: (np.arange(-40, 40, dtype="int8").reshape(1, 1, 8, 10),),
            {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
            label="int8",
        ),
        Case(
            draw("float32[1,64,112,112]"),
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
            bench=True,
            label="resnet",
        ),
    ],
)
def max_pool(
    x: Tensor,
    *,
    outputs: int = 1,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest element of each window and, as second output, its flat position in the input."""
    geometry = windows(
        _spatial(x),
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    lowest = reduce_identity("max", x.dtype)
    taps = [g.kernel for g in geometry]

    def body(i: Index, r: Index) -> Expr:
        read = x.at(*i[:2], *sources(geometry, i[2:], r))
        return apply("select", inside_all(geometry, i[2:], r), read, lowest)

    best = reduce_over("max", _shape(x, geometry), taps, body)
    if outputs < 2:
        return best
    return best, _positions(x, best, geometry, storage_order)


def _positions(x: Tensor, best: Tensor, geometry: Sequence[Window], storage_order: int) -> Tensor:
    """The smallest flat position in each window that holds the window's maximum."""
    spatial = x.shape[2:]
    none = reduce_identity("min", "int64")

    def body(i: Index, r: Index) -> Expr:
        at = sources(geometry, i[2:], r)
        order = (at[::-1], spatial[::-1]) if storage_order else (at, spatial)
        plane = flatten_index(i[:2], x.shape[:2])
        flat = plane * product(spatial) + flatten_index(*order)
        same = apply("eq", x.at(*i[:2], *at), best.at(*i))
        here = apply("logical_and", inside_all(geometry, i[2:], r), same)
        return apply("select", here, flat, none)

    return reduce_over("min", best.shape, [g.kernel for g in geometry], body)


def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of each window, over elements only or over elements and padding."""
    geometry = windows(
        _spatial(x),
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    wide = wide_dtype(x.dtype)

    def body(i: Index, r: Index) -> Expr:
        read = cast(x.at(*i[:2], *sources(geometry, i[2:], r)), wide)
        return apply("select", inside_all(geometry, i[2:], r), read, 0)

    total = reduce_over("sum", _shape(x, geometry), [g.kernel for g in geometry], body)

    def mean(idx: Index) -> Expr:
        count: Expr = index(1)
        for g, o in zip(geometry, idx[2:], strict=True):
            whole = not g.ceil and (count_include_pad or not g.clips)
            count = count * (g.kernel if whole else g.taps(o, bool(count_include_pad)))
        return cast(apply("div", total.at(*idx), cast(count, wide)), x.dtype)

    return Tensor(total.shape, x.dtype, mean)


operator(
    "AveragePool",
    since=1,
    cases=[
        Case(
            draw("float32[2,3,8,9]"), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, label="pads"
        ),
        Case(
            draw("float32[2,3,8,9]"),
            {
                "kernel_shape": [3, 3],
                "pads": [1, 0, 1, 2],
                "count_include_pad": 1,
                "strides": [2, 2],
            },
            label="counted pads",
        ),
        Case(
            draw("float32[1,3,9,10]"),
            {"kernel_shape": [3, 2], "strides": [2, 3], "ceil_mode": 1},
            label="ceil",
        ),
        Case(
            draw("float32[1,2,9,9]"),
            {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1]},
            label="dilations",
        ),
        Case(draw("float16[1,2,9]"), {"kernel_shape": [3]}, label="half"),
        Case(
            draw("float32[1,64,56,56]"),
            {"kernel_shape": [2, 2], "strides": [2, 2]},
            bench=True,
            label="densenet",
        ),
        Case(
            draw("float32[1,256,28,28]"),
            {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
            bench=True,
            label="inception",
        ),
    ],
)(average_pool)


def _power(x: Expr, p: float) -> Expr:
    if p == 1:
        return apply("abs", x)
    if p == 2:
        return x * x
    return apply("pow", apply("abs", x), Const(p, x.dtype))


def _root(x: Expr, p: float) -> Expr:
    if p == 1:
        return x
    return apply("sqrt", x) if p == 2 else apply("pow", x, Const(1 / p, x.dtype))


@operator(
    "LpPool",
    since=1,
    cases=[
        Case(draw("float32[2,3,8,9]"), {"kernel_shape": [3, 3], "p": 3}, label="p = 3"),
        Case(
            draw("float32[1,3,8,9]"),
            {"kernel_shape": [2, 2], "pads": [1, 0, 1, 1], "strides": [2, 2], "dilations": [1, 2]},
            label="pads, dilations",
        ),
    ],
)
def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    p: float = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The p-norm of each window."""
    geometry = windows(
        _spatial(x),
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    wide = wide_dtype(x.dtype)

    def body(i: Index, r: Index) -> Expr:
        read = cast(x.at(*i[:2], *sources(geometry, i[2:], r)), wide)
        return apply("select", inside_all(geometry, i[2:], r), _power(read, p), 0)

    total = reduce_over("sum", _shape(x, geometry), [g.kernel for g in geometry], body)
    return cast_to(elementwise(lambda v: _root(v, p), total), x.dtype)


@operator(
    "GlobalAveragePool",
    since=1,
    cases=[
        Case(draw("float32[2,3,5,7]"), label="2d"),
        Case(draw("float16[2,3,5]"), label="half"),
        Case(draw("float32[1,2048,7,7]"), bench=True, label="resnet"),
    ],
)
def global_average_pool(x: Tensor) -> Tensor:
    """The mean over all spatial axes, which stay with size 1."""
    axes = range(2, x.rank)
    total = reduce("sum", x, axes, keepdims=True)
    count = cast(product(x.shape[2:]), total.dtype)
    return cast_to(elementwise(lambda v: apply("div", v, count), total), x.dtype)


@operator("GlobalMaxPool", since=1, cases=[Case(draw("float32[2,3,5,7]"))])
def global_max_pool(x: Tensor) -> Tensor:
    """The maximum over all spatial axes, which stay with size 1."""
    return cast_to(reduce("max", x, range(2, x.rank), keepdims=True), x.dtype)


@operator(
    "GlobalLpPool",
    since=1,
    cases=[
        Case(draw("float32[2,3,5,7]"), label="p = 2"),
        Case(draw("float32[2,3,5,7]"), {"p": 3}, label="p = 3"),
    ],
)
def global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    """The p-norm over all spatial axes, which stay with size 1."""
    wide = cast_to(x, wide_dtype(x.dtype))
    powers = elementwise(lambda v: _power(v, p), wide)
    total = reduce("sum", powers, range(2, x.rank), keepdims=True)
    return cast_to(elementwise(lambda v: _root(v, p), total), x.dtype)


@operator(
    "MaxUnpool",
    since=9,
    cases=[
        Case(
            lambda: (
                np.arange(1, 5, dtype="float32").reshape(1, 1, 2, 2),
                np.array([[[[0, 7], [13, 15]]]], dtype="int64"),
            ),
            {"kernel_shape": [2, 2], "strides": [2, 2]},
        )
    ],
)
def max_unpool(
    x: Tensor,
    positions: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Puts every element back at its flat position; all other elements are zero.

    An output element gathers from the elements of its own plane, so writes never collide.
    """
    rank = x.rank - 2
    stride = list(strides or [1] * rank)
    pad = list(pads or [0] * (2 * rank))
    inferred = [
        (d - 1) * s - pad[k] - pad[k + rank] + taps
        for k, (d, s, taps) in enumerate(zip(x.shape[2:], stride, kernel_shape, strict=True))
    ]
    natural = (*x.shape[:2], *inferred)
    shape = natural if output_shape is None else tuple(output_shape.values())
    pixels = product(x.shape[2:])

    def find(i: Index, r: Index) -> Expr:
        pixel = unflatten_index(r[0], x.shape[2:])
        flat = flatten_index(i, natural)
        here = apply("eq", cast(positions.at(*i[:2], *pixel), "int64"), flat)
        return apply("select", here, r[0] + 1, 0)

    found = reduce_over("max", natural, (pixels,), find)

    def at(idx: Index) -> Expr:
        inside: Expr = TRUE
        for i, d in zip(idx, natural, strict=True):
            inside = apply("logical_and", inside, apply("lt", i, d))
        hit = found.at(*idx)
        pixel = unflatten_index(apply("max", hit - 1, index(0)), x.shape[2:])
        filled = apply("logical_and", inside, apply("lt", index(0), hit))
        return apply("select", filled, x.at(*idx[:2], *pixel), 0)

    return Tensor(shape, x.dtype, at)
