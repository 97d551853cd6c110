"""Pooling over regions of interest: MaxRoiPool and RoiAlign."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxjit.codegen.expr import TRUE, Const, Expr, apply, cast, index
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    reduce_identity,
    reduce_over,
)
from onnxjit.operators.matmul import wide_dtype
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw


@operator(
    "MaxRoiPool",
    since=1,
    cases=[
        Case(
            draw(
                "float32[2,3,16,16]",
                np.array([[0, 1, 2, 9, 11], [1, 0, 0, 15, 7]], dtype="float32"),
            ),
            {"pooled_shape": [2, 3], "spatial_scale": 0.5},
        )
    ],
)
def max_roi_pool(
    x: Tensor, rois: Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """The maximum of each bin of each region [batch, x1, y1, x2, y2]; empty bins give 0.

    Bin borders as in Fast R-CNN: regions are rounded to pixels and are at least one pixel wide.
    """
    high, wide = pooled_shape
    lowest = reduce_identity("max", x.dtype)

    def pixel(n: Expr, k: int) -> Expr:
        v = cast(rois.at(n, k), "float32") * spatial_scale
        return cast(apply("floor", v + 0.5), "int64")

    def border(n: Expr, axis: int, p: Expr, bins: int, size: Expr, upper: bool) -> Expr:
        first, end = (pixel(n, 2), pixel(n, 4)) if axis == 0 else (pixel(n, 1), pixel(n, 3))
        length = cast(apply("max", end - first + 1, index(1)), "float32")
        step = apply("div", length, Const(bins, "float32"))
        if upper:
            edge = apply("ceil", cast(p + 1, "float32") * step)
        else:
            edge = apply("floor", cast(p, "float32") * step)
        at = cast(edge, "int64") + first
        return apply("min", apply("max", at, index(0)), size)

    def bounds(i: Index) -> list[tuple[Expr, Expr]]:
        return [
            (
                border(i[0], a, i[2 + a], bins, x.shape[2 + a], False),
                border(i[0], a, i[2 + a], bins, x.shape[2 + a], True),
            )
            for a, bins in enumerate((high, wide))
        ]

    def body(i: Index, r: Index) -> Expr:
        inside: Expr = TRUE
        for (low, up), at in zip(bounds(i), r, strict=True):
            within = apply("logical_and", apply("le", low, at), apply("lt", at, up))
            inside = apply("logical_and", inside, within)
        read = x.at(cast(rois.at(i[0], 0), "int64"), i[1], *r)
        return apply("select", inside, read, lowest)

    shape = (rois.shape[0], x.shape[1], high, wide)
    best = reduce_over("max", shape, x.shape[2:], body)

    def at(idx: Index) -> Expr:
        empty: Expr = Const(False, "bool")
        for low, up in bounds(idx):
            empty = apply("logical_or", empty, apply("le", up, low))
        return apply("select", empty, 0, best.at(*idx))

    return Tensor(best.shape, x.dtype, at)


_ROIS = np.array([[0.5, 1, 7.5, 6], [2, 2, 9, 4.5], [-9, 3, 2, 28]], "float32")


def _align_cases() -> list[Case]:
    inputs = draw("float32[2,3,8,9]", _ROIS, np.array([0, 1, 0], "int64"))
    size = {"output_height": 2, "output_width": 3, "spatial_scale": 0.9}
    return [
        Case(inputs, {**size, "sampling_ratio": 2}, label="average"),
        Case(inputs, {**size, "sampling_ratio": 2, "mode": "max"}, label="maximum"),
        Case(inputs, size, label="adaptive"),
        Case(inputs, {**size, "mode": "max"}, label="adaptive maximum"),
        Case(
            inputs,
            {**size, "sampling_ratio": 3, "coordinate_transformation_mode": "output_half_pixel"},
            label="unshifted",
        ),
    ]


@operator("RoiAlign", since=10, cases=_align_cases())
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    *,
    version: int = 22,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Samples every bin of every region [x1, y1, x2, y2] at a regular grid and pools the samples.

    With sampling_ratio 0 the number of samples follows from each region; the reduction then runs
    over as many samples as can fall on the data. `max` pools the weighted corners, as the reference
    and ONNX Runtime do.
    """
    if mode not in ("avg", "max"):
        raise DefinitionError(f"unknown mode {mode!r}")
    shifted = version >= 16 and coordinate_transformation_mode == "half_pixel"
    wide = wide_dtype(x.dtype)
    sizes, bins = x.shape[2:4], (output_height, output_width)

    def extent(n: Expr, axis: int) -> tuple[Expr, Expr, Expr]:
        """Start of the region, size of a bin, and the number of samples in a bin."""
        low, high = (
            cast(rois.at(n, k), wide) * spatial_scale - (0.5 if shifted else 0.0)
            for k in (1 - axis, 3 - axis)
        )
        length = high - low
        if not shifted:
            length = apply("max", length, 1.0)
        step = apply("div", length, Const(bins[axis], wide))
        if sampling_ratio > 0:
            return low, step, index(sampling_ratio)
        return low, step, apply("max", cast(apply("ceil", step), "int64"), index(0))

    def skipped(i: Index, axis: int) -> Expr:
        """How many samples of an adaptive grid lie before the data (position -1)."""
        if sampling_ratio > 0:
            return index(0)
        low, step, samples = extent(i[0], axis)
        start = low + cast(i[2 + axis], wide) * step
        gap = apply("div", step, cast(samples, wide))
        first = cast(apply("floor", apply("div", -1.0 - start, gap) - 0.5), "int64")
        return apply("max", first, index(0))

    def corners(i: Index, axis: int, r: Expr) -> tuple[Expr, Expr, list[tuple[Expr, Expr]]]:
        """Whether there is a sample `r`, whether it lies on the data, its neighbours' weights."""
        low, step, samples = extent(i[0], axis)
        size = cast(sizes[axis], wide)
        gap = apply("div", step, cast(samples, wide))
        r = r + skipped(i, axis)
        v = low + cast(i[2 + axis], wide) * step + (cast(r, wide) + 0.5) * gap
        on_data = apply("logical_and", apply("le", -1.0, v), apply("le", v, size))
        v = apply("min", apply("max", v, 0.0), size - 1.0)
        below = apply("floor", v)
        k = apply("min", cast(below, "int64"), sizes[axis] - 1)
        f = v - below
        after = apply("min", k + 1, sizes[axis] - 1)
        return apply("lt", r, samples), on_data, [(k, Const(1.0, wide) - f), (after, f)]

    def body(i: Index, r: Index) -> Expr:
        exists: Expr = TRUE
        on_data: Expr = TRUE
        found = []
        for axis in (0, 1):
            there, inside, pair = corners(i, axis, r[axis])
            exists = apply("logical_and", exists, there)
            on_data = apply("logical_and", on_data, inside)
            found.append(pair)
        plane = cast(batch.at(i[0]), "int64")
        parts = [
            cast(x.at(plane, i[1], a, b), wide) * (p * q) for a, p in found[0] for b, q in found[1]
        ]
        total = parts[0]
        for p in parts[1:]:
            total = total + p if mode == "avg" else apply("max", total, p)
        total = apply("select", on_data, total, 0)
        return apply("select", exists, total, 0 if mode == "avg" else -np.inf)

    taps = [index(sampling_ratio) if sampling_ratio > 0 else s * 2 + 4 for s in sizes]
    shape = (rois.shape[0], x.shape[1], output_height, output_width)
    pooled = reduce_over("sum" if mode == "avg" else "max", shape, taps, body)

    def at(idx: Index) -> Expr:
        value = pooled.at(*idx)
        samples = extent(idx[0], 0)[2] * extent(idx[0], 1)[2]
        if mode == "avg":
            return cast(apply("div", value, cast(apply("max", samples, index(1)), wide)), x.dtype)
        # A sample beside the data counts as 0, and so does an empty bin.
        before = skipped(idx, 0) + skipped(idx, 1)
        value = apply("select", apply("lt", index(0), before), apply("max", value, 0), value)
        return cast(apply("select", apply("le", samples, index(0)), 0, value), x.dtype)

    return Tensor(shape, x.dtype, at)
