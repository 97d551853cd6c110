"""Resampling on a regular grid: Resize and Upsample.

Coordinates are rationals p / q of int64 expressions, so that nearest neighbours are exact and an
integer scale leaves a plain floordiv of the output index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from onnxjit.codegen.expr import FALSE, Const, Expr, apply, as_int, cast, index
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    NeedsValue,
    Tensor,
    elementwise,
    materialize,
    reduce,
    reduce_over,
)
from onnxjit.operators.norm import axis_number
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw


@dataclass(frozen=True, slots=True)
class Resized:
    """One axis: `size` elements become `out`; the scale is the rational num / den.

    `begin` and `end` are the region of tf_crop_and_resize (float64), else None.
    """

    size: Expr
    out: Expr
    num: Expr
    den: Expr
    begin: Expr | None = None
    end: Expr | None = None

    @property
    def same(self) -> bool:
        return self.begin is None and self.out is self.size and self.num is self.den


@dataclass(frozen=True, slots=True)
class Position:
    """A source coordinate: the rational p / q with q > 0, or the float64 expression `real`."""

    p: Expr
    q: Expr
    real: Expr | None = None

    @property
    def value(self) -> Expr:
        """The coordinate in float64."""
        if self.real is not None:
            return self.real
        return apply("div", cast(self.p, "float64"), cast(self.q, "float64"))

    def split(self, dtype: str) -> tuple[Expr, Expr]:
        """floor(coordinate), and the fraction above it in `dtype`."""
        if self.real is None and as_int(self.q) is not None:
            below = apply("floordiv", self.p, self.q)
            rest = apply("mod", self.p, self.q)
            return below, apply("div", cast(rest, dtype), cast(self.q, dtype))
        low = apply("floor", self.value)
        return cast(low, "int64"), cast(self.value - low, dtype)

    def nearest(self, mode: str) -> Expr:
        """The integer that nearest_mode selects."""
        if mode not in _NEAREST:
            raise DefinitionError(f"unknown nearest_mode {mode!r}")
        exact, real = _NEAREST[mode]
        if self.real is not None:
            return cast(real(self.real), "int64")
        return exact(self.p, self.q)


_NEAREST: dict[str, tuple[Callable[[Expr, Expr], Expr], Callable[[Expr], Expr]]] = {
    "floor": (lambda p, q: p // q, lambda v: apply("floor", v)),
    "ceil": (lambda p, q: (p + q - 1) // q, lambda v: apply("ceil", v)),
    "round_prefer_floor": (
        lambda p, q: (p * 2 + q - 1) // (q * 2),
        lambda v: apply("ceil", v - 0.5),
    ),
    "round_prefer_ceil": (lambda p, q: (p * 2 + q) // (q * 2), lambda v: apply("floor", v + 0.5)),
}


def coordinate(mode: str, a: Resized, x: Expr) -> Position:
    """The source coordinate of output element `x`, by coordinate_transformation_mode."""
    one = index(1)
    centre = x * 2 + 1
    if mode == "half_pixel":
        return Position(centre * a.den - a.num, a.num * 2)
    if mode == "pytorch_half_pixel":
        p = apply("select", apply("eq", a.out, one), index(0), centre * a.den - a.num)
        return Position(p, a.num * 2)
    if mode == "half_pixel_symmetric":
        offset = a.size * a.num - a.out * a.den
        return Position(offset + centre * a.den - a.num, a.num * 2)
    if mode == "tf_half_pixel_for_nn":
        return Position(centre * a.den, a.num * 2)
    if mode == "asymmetric":
        return Position(x * a.den, a.num)
    if mode == "align_corners":
        # The output's width is the scaled one, which need not be an integer.
        q = a.size * a.num - a.den
        p = x * (a.size - 1) * a.den
        positive = apply("lt", index(0), q)
        return Position(apply("select", positive, p, index(0)), apply("max", q, one))
    if mode == "tf_crop_and_resize" and a.begin is not None and a.end is not None:
        last = cast(a.size - 1, "float64")
        steps = cast(apply("max", a.out - 1, one), "float64")
        along = a.begin * last + apply("div", cast(x, "float64") * (a.end - a.begin) * last, steps)
        middle = (a.begin + a.end) * last * 0.5
        real = apply("select", apply("lt", one, a.out), along, middle)
        return Position(index(0), one, real)
    raise DefinitionError(f"unknown coordinate_transformation_mode {mode!r}")


Taps = list[tuple[Expr, Expr]]


def linear_taps(at: Position, dtype: str) -> Taps:
    low, f = at.split(dtype)
    return [(low, Const(1.0, dtype) - f), (low + 1, f)]


def cubic_weight(distance: Expr, a: float) -> Expr:
    """Keys' cubic kernel for a distance of any size (non-negative)."""
    d = distance
    near = ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
    far = ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a
    outer = apply("select", apply("lt", d, 2.0), far, 0.0)
    return apply("select", apply("le", d, 1.0), near, outer)


def cubic_taps(at: Position, dtype: str, a: float) -> Taps:
    low, f = at.split(dtype)
    g = Const(1.0, dtype) - f

    def far(d: Expr) -> Expr:
        return ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a

    def near(d: Expr) -> Expr:
        return ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0

    return [(low - 1, far(f + 1.0)), (low, near(f)), (low + 1, near(g)), (low + 2, far(g + 1.0))]


def renormalized(taps: Taps, size: Expr) -> Taps:
    """exclude_outside: taps outside the data weigh nothing and the rest sums to 1."""
    weights = [apply("select", within(i, size), w, 0.0) for i, w in taps]
    total = weights[0]
    for w in weights[1:]:
        total = total + w
    total = apply("select", apply("eq", total, 0.0), 1.0, total)
    return [(i, apply("div", w, total)) for (i, _), w in zip(taps, weights, strict=True)]


def within(i: Expr, size: Expr) -> Expr:
    return apply("logical_and", apply("le", index(0), i), apply("lt", i, size))


def clamped(i: Expr, size: Expr) -> Expr:
    return apply("max", apply("min", i, size - 1), index(0))


@dataclass(frozen=True, slots=True)
class Rule:
    """How values are interpolated: the attributes of Resize that do not concern shapes."""

    mode: str
    transform: str
    nearest: str
    cubic: float
    exclude: bool
    antialias: bool
    extrapolation: float

    def taps(self, a: Resized, at: Position, dtype: str) -> Taps:
        """Source indices (clamped) and weights for one axis."""
        taps = (
            linear_taps(at, dtype) if self.mode == "linear" else cubic_taps(at, dtype, self.cubic)
        )
        if self.exclude and self.mode == "cubic":
            taps = renormalized(taps, a.size)
        return [(clamped(i, a.size), w) for i, w in taps]


def resample(x: Tensor, axes: Sequence[Resized], rule: Rule) -> Tensor:
    """Interpolates along every axis that changes."""
    wide = "float64" if x.dtype in ("float64", "int32", "uint32", "int64", "uint64") else "float32"
    if rule.mode == "nearest":
        out = _nearest(x, axes, rule)
    elif rule.mode not in ("linear", "cubic"):
        raise DefinitionError(f"unknown mode {rule.mode!r}")
    else:
        out = x
        if rule.antialias:
            out, axes = _antialiased(x, axes, rule, wide)
        out = _interpolated(out, axes, rule, wide)
    return _extrapolated(_rounded(out, x.dtype), axes, rule)


def _rounded(x: Tensor, dtype: str) -> Tensor:
    """Back to the data's dtype; integers are rounded to even and saturated."""
    if x.dtype == dtype:
        return x
    if dtype.startswith(("int", "uint")):
        return elementwise(lambda v: cast(apply("round", v), dtype), x)
    return elementwise(lambda v: cast(v, dtype), x)


def _shape(axes: Sequence[Resized]) -> list[Expr]:
    return [a.out for a in axes]


def _nearest(x: Tensor, axes: Sequence[Resized], rule: Rule) -> Tensor:
    def at(idx: Index) -> Expr:
        source = []
        for a, i in zip(axes, idx, strict=True):
            if a.same:
                source.append(i)
            else:
                k = coordinate(rule.transform, a, i).nearest(rule.nearest)
                source.append(clamped(k, a.size))
        return x.at(*source)

    return Tensor(_shape(axes), x.dtype, at)


def _interpolated(x: Tensor, axes: Sequence[Resized], rule: Rule, wide: str) -> Tensor:
    def at(idx: Index) -> Expr:
        taps: list[Taps | None] = []
        for a, i in zip(axes, idx, strict=True):
            same = a.same
            taps.append(None if same else rule.taps(a, coordinate(rule.transform, a, i), wide))

        def read(k: int, source: tuple[Expr, ...]) -> Expr:
            if k == len(idx):
                return cast(x.at(*source), wide)
            mine = taps[k]
            if mine is None:
                return read(k + 1, (*source, idx[k]))
            terms = [read(k + 1, (*source, i)) * w for i, w in mine]
            total = terms[0]
            for t in terms[1:]:
                total = total + t
            return total

        return read(0, ())

    return Tensor(_shape(axes), wide, at)


def _antialiased(
    x: Tensor, axes: Sequence[Resized], rule: Rule, wide: str
) -> tuple[Tensor, list[Resized]]:
    """Axis by axis, a kernel stretched by 1 / scale where that is above 1; weights are a table."""
    out = Tensor(x.shape, wide, lambda idx: cast(x.at(*idx), wide))
    rest = list(axes)
    for k, a in enumerate(axes):
        if a.same or a.begin is not None:
            continue
        radius = 1 if rule.mode == "linear" else 2
        half = apply("max", (a.den * radius + a.num - 1) // a.num, index(radius))
        shrink = apply("min", apply("div", cast(a.num, wide), cast(a.den, wide)), 1.0)
        out = _stretched(out, k, a, rule, half, shrink)
        rest[k] = Resized(a.out, a.out, index(1), index(1))
    return out, rest


def _stretched(x: Tensor, k: int, a: Resized, rule: Rule, half: Expr, shrink: Expr) -> Tensor:
    """Sums 2 · half taps along axis `k`."""
    dtype = x.dtype

    def tap(o: Expr, t: Expr) -> tuple[Expr, Expr]:
        low, f = coordinate(rule.transform, a, o).split(dtype)
        offset = t - half + 1
        distance = apply("abs", (cast(offset, dtype) - f) * shrink)
        if rule.mode == "linear":
            weight = apply("max", Const(1.0, dtype) - distance, 0.0)
        else:
            weight = cubic_weight(distance, rule.cubic)
        if rule.exclude:
            weight = apply("select", within(low + offset, a.size), weight, 0.0)
        return clamped(low + offset, a.size), weight

    table = materialize(Tensor((a.out, half * 2), dtype, lambda i: tap(i[0], i[1])[1]), "weight")
    total = materialize(
        elementwise(
            lambda v: apply("select", apply("eq", v, 0.0), 1.0, v), reduce("sum", table, [1])
        )
    )

    def body(i: Index, r: Index) -> Expr:
        source = list(i)
        source[k] = tap(i[k], r[0])[0]
        return x.at(*source) * table.at(i[k], r[0])

    shape = list(x.shape)
    shape[k] = a.out
    sums = reduce_over("sum", shape, (half * 2,), body)
    return Tensor(shape, dtype, lambda i: apply("div", sums.at(*i), total.at(i[k])))


def _extrapolated(x: Tensor, axes: Sequence[Resized], rule: Rule) -> Tensor:
    """tf_crop_and_resize: elements whose source lies outside the data get a constant."""
    if all(a.begin is None for a in axes):
        return x
    fill = Const(numpy_dtype(x.dtype).type(rule.extrapolation).item(), x.dtype)

    def at(idx: Index) -> Expr:
        outside: Expr = FALSE
        for a, i in zip(axes, idx, strict=True):
            if a.begin is not None:
                v = coordinate(rule.transform, a, i).value
                outside = apply("logical_or", outside, apply("lt", v, 0.0))
                outside = apply("logical_or", outside, apply("lt", cast(a.size - 1, v.dtype), v))
        return apply("select", outside, fill, x.at(*idx))

    return Tensor(x.shape, x.dtype, at)


# --- sizes -------------------------------------------------------------------------------------


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
            ratio = (index(times), index(1)) if up else (index(1), index(times))
            return Resized(size, out, *ratio)
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
