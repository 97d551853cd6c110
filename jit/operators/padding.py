"""Padding in all modes."""

from __future__ import annotations

from collections.abc import Sequence

from onnxjit.codegen.expr import Const, Expr, apply, as_int, cast, index
from onnxjit.codegen.simplify import is_nonneg
from onnxjit.codegen.tensor import DefinitionError, Tensor, pad_with, slice_axis
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.sizes import axis_list, normal_axis, size_list


def _source(i: Expr, d: Expr, mode: str, single: bool) -> Expr:
    """The element that position `i` (0 = the first element of the input) shows."""
    if mode == "edge":
        return apply("max", apply("min", i, d - 1), 0)
    if mode == "wrap":
        return apply("mod", i, d)
    last = d - 1
    if single:
        folded = apply("select", apply("lt", i, 0), -i, i)
        return apply("select", apply("lt", last, folded), last * 2 - folded, folded)
    # Reflections repeat with this period; a single element reflects onto itself.
    period = apply("max", last * 2, 1)
    m = apply("mod", i, period)
    return apply("select", apply("lt", last, m), period - m, m)


def _pad(x: Tensor, before: list[Expr], after: list[Expr], mode: str, value: Expr) -> Tensor:
    if mode == "constant":
        return pad_with(x, before, after, value)
    if mode not in ("reflect", "edge", "wrap"):
        raise DefinitionError("Pad: unknown mode")
    for axis in range(x.rank):
        low, high = (apply("max", p[axis], 0) for p in (before, after))
        cut_low, cut_high = low - before[axis], high - after[axis]
        if as_int(cut_low) != 0 or as_int(cut_high) != 0:
            x = slice_axis(x, axis, cut_low, x.shape[axis] - cut_low - cut_high)
        if as_int(low) != 0 or as_int(high) != 0:
            x = _extend(x, axis, low, high, mode)
    return x


def _extend(x: Tensor, axis: int, low: Expr, high: Expr, mode: str) -> Tensor:
    d = x.shape[axis]
    if as_int(d) == 0:
        raise DefinitionError(f"Pad: mode {mode} of an empty axis")
    single = is_nonneg(d - 1 - low) and is_nonneg(d - 1 - high)
    shape = list(x.shape)
    shape[axis] = d + low + high

    def at(idx: tuple[Expr, ...]) -> Expr:
        source = list(idx)
        source[axis] = _source(idx[axis] - low, d, mode, single)
        return x.at(*source)

    return Tensor(shape, x.dtype, at)


def _pairs(pads: list[Expr], axes: list[int] | None, rank: int) -> tuple[list[Expr], list[Expr]]:
    places = list(range(rank)) if axes is None else [normal_axis(a, rank) for a in axes]
    if len(pads) != 2 * len(places):
        raise DefinitionError(f"Pad: {len(pads)} pads for {len(places)} axes")
    before, after = ([index(0)] * rank for _ in range(2))
    for k, a in enumerate(places):
        before[a], after[a] = pads[k], pads[len(places) + k]
    return before, after


_MODES = ("constant", "reflect", "edge")


@operator("Pad", since=11, cases=[
    *(Case(draw("float32[3,5]", [1, 2, 2, 3]), {"mode": m}) for m in _MODES),
    *(Case(draw("int32[3,5]", [1, 2, 0, -1]), {"mode": m}, version=19) for m in ("constant",)),
    Case(draw("float32[3,5]", [0, 3, 2, 4]), {"mode": "wrap"}, version=19),
    Case(draw("bfloat16[3,5]", [1, 0, 0, 2], "bfloat16[]")),
    Case(draw("float32[3,5]", [2, 1], "float32[]", [-1])),
    Case(draw("float32[2,3]", [0, 7, 0, 6]), {"mode": "reflect"}),
    Case(draw("float32[0,3]", [2, 1, 1, 1], "float32[]")),
])  # fmt: skip
def pad(
    x: Tensor,
    pads: Tensor,
    constant_value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Adds (or cuts, where negative) elements at both ends of axes."""
    value: Expr = Const(0, x.dtype)
    if constant_value is not None:
        value = cast(constant_value.at(*[0] * constant_value.rank), x.dtype)
    before, after = _pairs(size_list(pads), axis_list(axes), x.rank)
    return _pad(x, before, after, mode, value)


@operator("Pad", since=2, until=10, cases=[
    Case(draw("float32[3,5]"), {"pads": [1, 2, 2, 3], "mode": m, "value": 1.5}) for m in _MODES
])  # fmt: skip
def pad_2(x: Tensor, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """`pad` with everything in attributes."""
    before, after = _pairs(size_list(pads), None, x.rank)
    return _pad(x, before, after, mode, Const(value, x.dtype))


@operator("Pad", since=1, until=1)
def pad_1(
    x: Tensor, *, paddings: Sequence[int], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """`pad` under the attribute's first name."""
    return pad_2(x, pads=paddings, mode=mode, value=value)
