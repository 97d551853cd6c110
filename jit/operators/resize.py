"""Resize and Upsample: sizes and scales of every axis, then `resample`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from onnxjit.codegen.expr import Const, Expr, apply, as_int, cast, index
from onnxjit.codegen.tensor import (
    DefinitionError,
    NeedsValue,
    Tensor,
)
from onnxjit.operators.norm import axis_number
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.resample import Resized, Rule, resample
from onnxjit.operators.samples import draw


def by_scale(size: Expr, scale: float) -> Resized:
    """An axis scaled by a constant: floor(size · scale) elements, that product in float32."""
    s = float(np.float32(scale))
    if not s > 0:
        raise DefinitionError(f"scales must be positive, not {s}")
    ratio = Fraction(s)
    n = as_int(size)
    if n is not None:
        out = index(int(np.floor(np.float32(n) * np.float32(s))))
    elif ratio.denominator <= 64:
        out = apply("floordiv", size * ratio.numerator, index(ratio.denominator))
    else:
        out = cast(apply("floor", cast(size, "float32") * s), "int64")
    return Resized(size, out, index(ratio.numerator), index(ratio.denominator))


def by_size(size: Expr, out: Expr) -> Resized:
    """An axis resized to `out` elements; the ratio is reduced where that is provable."""
    n, m = as_int(size), as_int(out)
    if n and m:
        ratio = Fraction(m, n)
        return Resized(size, out, index(ratio.numerator), index(ratio.denominator))
    if out is size:
        return Resized(size, out, index(1), index(1))
    for big, small, up in ((out, size, True), (size, out, False)):
        times = as_int(apply("floordiv", big, small)) if as_int(small) is None else None
        if times and small * times is big:
            num, den = (times, 1) if up else (1, times)
            return Resized(size, out, index(num), index(den))
    return Resized(size, out, out, size)


def keep_aspect(sizes: Sequence[Expr], wanted: Sequence[Expr], policy: str) -> list[Resized]:
    """One common scale, the smallest or largest of wanted / size; sizes are rounded half up."""
    if policy not in ("not_larger", "not_smaller"):
        raise DefinitionError(f"unknown keep_aspect_ratio_policy {policy!r}")
    num, den = wanted[0], sizes[0]
    for w, s in zip(wanted[1:], sizes[1:], strict=True):
        less = apply("lt", w * den, num * s)
        if policy == "not_smaller":
            less = apply("lt", num * s, w * den)
        num, den = apply("select", less, w, num), apply("select", less, s, den)
    return [Resized(s, (s * num * 2 + den) // (den * 2), num, den) for s in sizes]


def floats(x: Tensor) -> list[float]:
    """The elements of a tensor that must be known constants."""
    values = x.values()
    if not all(isinstance(v, Const) for v in values):
        raise NeedsValue(x.buffer or "an intermediate value")
    return [float(v.value) for v in values if isinstance(v, Const)]


def given(x: Tensor | None) -> Tensor | None:
    """An optional input; an empty tensor counts as omitted, as exporters write it so."""
    return None if x is None or (x.rank == 1 and as_int(x.shape[0]) == 0) else x


_GRID = np.arange(1, 25, dtype="float32").reshape(1, 1, 4, 6)


def _scaled(*scales: float) -> list[np.ndarray | None]:
    return [_GRID, None, np.array([1, 1, *scales], "float32")]


def _sized(*sizes: int) -> list[np.ndarray | None]:
    return [_GRID, None, None, np.array([1, 1, *sizes], "int64")]


def _modes() -> list[Case]:
    cases = []
    for mode in ("nearest", "linear", "cubic"):
        for transform in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"):
            attrs = {"mode": mode, "coordinate_transformation_mode": transform}
            label = f"{mode} {transform}"
            cases.append(Case(lambda: _scaled(2, 2), attrs, label=f"{label} x2"))
            cases.append(Case(lambda: _sized(7, 5), attrs, label=f"{label} sizes"))
    for rounding in ("floor", "ceil", "round_prefer_ceil"):
        cases.append(Case(lambda: _sized(3, 9), {"nearest_mode": rounding}, label=rounding))
    cases.append(
        Case(lambda: _scaled(0.8, 1.5), {"mode": "cubic", "exclude_outside": 1}, label="exclude")
    )
    return cases


@operator(
    "Resize",
    since=11,
    cases=[
        *_modes(),
        Case(
            lambda: [
                _GRID,
                np.array([0, 0, 0.4, 0.6, 1, 1, 1.2, 1.7], "float32"),
                None,
                np.array([1, 1, 3, 5], "int64"),
            ],
            {
                "mode": "linear",
                "coordinate_transformation_mode": "tf_crop_and_resize",
                "extrapolation_value": 10.0,
            },
            label="crop",
        ),
        Case(
            lambda: [_GRID, None, None, np.array([3, 4], "int64")],
            {"mode": "linear", "antialias": 1, "axes": [2, 3]},
            label="antialias",
        ),
        Case(
            lambda: [_GRID, None, None, np.array([9, 9], "int64")],
            {"keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]},
            label="keep aspect",
        ),
        Case(
            draw("float32[1,64,64,64]", None, np.array([1, 1, 2, 2], "float32")),
            {
                "mode": "nearest",
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            },
            bench=True,
            label="yolo upsampling",
        ),
        Case(
            draw("float32[1,64,64,64]", None, np.array([1, 1, 2, 2], "float32")),
            {"mode": "linear"},
            bench=True,
            label="bilinear x2",
        ),
    ],
)
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resizes the chosen axes by scales or to sizes."""
    over = [axis_number(a, x.rank) for a in axes] if axes else list(range(x.rank))
    scales, sizes, roi = given(scales), given(sizes), given(roi)
    dims = [x.shape[k] for k in over]
    if scales is not None:
        changed = [by_scale(d, s) for d, s in zip(dims, floats(scales), strict=True)]
    elif sizes is not None:
        wanted = sizes.values()
        if len(wanted) != len(over):
            raise DefinitionError(f"{len(wanted)} sizes for {len(over)} axes")
        if keep_aspect_ratio_policy == "stretch":
            changed = [by_size(d, o) for d, o in zip(dims, wanted, strict=True)]
        else:
            changed = keep_aspect(dims, wanted, keep_aspect_ratio_policy)
    else:
        raise DefinitionError("Resize needs scales or sizes")
    if coordinate_transformation_mode == "tf_crop_and_resize":
        if roi is None:
            raise DefinitionError("tf_crop_and_resize needs roi")
        changed = [cropped(a, roi, i, len(over)) for i, a in enumerate(changed)]
    full = [Resized(d, d, index(1), index(1)) for d in x.shape]
    for k, a in zip(over, changed, strict=True):
        full[k] = a
    rule = Rule(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(exclude_outside),
        bool(antialias),
        extrapolation_value,
    )
    return resample(x, full, rule)


def cropped(a: Resized, roi: Tensor, i: int, count: int) -> Resized:
    """The axis with its region of interest, or as it is where the region is the whole axis."""
    begin, end = cast(roi.at(i), "float64"), cast(roi.at(count + i), "float64")
    whole = (
        isinstance(begin, Const) and isinstance(end, Const) and (begin.value, end.value) == (0, 1)
    )
    if whole and a.same:
        return a
    return Resized(a.size, a.out, a.num, a.den, begin, end)


def _upsampled(x: Tensor, scales: Sequence[float], mode: str) -> Tensor:
    """The rule of Upsample and of Resize 10: asymmetric coordinates, nearest rounds down."""
    axes = [by_scale(d, s) for d, s in zip(x.shape, scales, strict=True)]
    kind = "linear" if mode == "bilinear" else mode
    return resample(x, axes, Rule(kind, "asymmetric", "floor", -0.75, False, False, 0.0))


@operator("Resize", since=10, until=10)
def resize_10(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Resizes by scales with asymmetric coordinates."""
    return _upsampled(x, floats(scales), mode)


@operator("Upsample", since=9, until=10)
def upsample(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Resizes by scales with asymmetric coordinates."""
    return _upsampled(x, floats(scales), mode)


@operator("Upsample", since=7, until=8)
def upsample_7(x: Tensor, *, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    """Upsample with its scales as an attribute."""
    return _upsampled(x, scales, mode)


@operator("Upsample", since=1, until=6)
def upsample_1(
    x: Tensor, *, height_scale: float, width_scale: float, mode: str = "nearest"
) -> Tensor:
    """Upsample of the last two of four axes."""
    return _upsampled(x, [1.0] * (x.rank - 2) + [height_scale, width_scale], mode)
