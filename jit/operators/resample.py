"""Interpolation on a regular grid: source coordinates, taps and their weights.

Coordinates are rationals p / q of int64 expressions, so that nearest neighbours are exact and an
integer scale leaves a plain floordiv of the output index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxjit.codegen.expr import FALSE, Const, Expr, apply, as_int, cast, index
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    elementwise,
    materialize,
    reduce,
    reduce_over,
)


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
