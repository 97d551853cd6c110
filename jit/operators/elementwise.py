"""Arithmetic and mathematical functions, element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from onnxjit.codegen.expr import Expr, apply, cast
from onnxjit.codegen.tensor import (
    NARROW,
    DefinitionError,
    Tensor,
    aligned,
    broadcast_shape,
    compute,
    elementwise,
    full,
)
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, INTEGERS, draw


def map_cases(*dtypes: str, low: float = -3.0, high: float = 3.0) -> list[Case]:
    """Cases of an operator with one input: an odd shape for every dtype, and edge shapes."""
    cases = [Case(draw(f"{d}[3,5]", low=low, high=high)) for d in dtypes]
    edges = ("[]", "[0,3]", "[1,7,1]")
    cases += [Case(draw(dtypes[0] + e, low=low, high=high)) for e in edges]
    big = draw(f"{dtypes[0]}[128,3072]", low=low, high=high)
    return [*cases, Case(big, bench=True, label="hidden layer")]


def pair_cases(*dtypes: str, low: float = -3.0, high: float = 3.0) -> list[Case]:
    """Cases of an operator with two broadcast inputs."""
    cases = [Case(draw(f"{d}[3,5]", f"{d}[3,5]", low=low, high=high)) for d in dtypes]
    shapes = (("[3,1,5]", "[7,1]"), ("[]", "[5]"), ("[0,3]", "[1,3]"), ("[2,3,4,5]", "[3,4,5]"))
    d = dtypes[0]
    cases += [Case(draw(d + a, d + b, low=low, high=high)) for a, b in shapes]
    big = [f"{d}[64,56,56]", f"{d}[64,56,56]"]
    return [*cases, Case(draw(*big, low=low, high=high), bench=True, label="feature map")]


def _unary(
    name: str,
    since: int,
    fn: str | Callable[[Expr], Expr],
    *dtypes: str,
    low: float = -3.0,
    high: float = 3.0,
) -> None:
    def define(x: Tensor) -> Tensor:
        return elementwise(fn, x)

    define.__name__ = name.lower()
    operator(name, since=since, cases=map_cases(*dtypes or FLOATS, low=low, high=high))(define)


_SIGNED = (*FLOATS, "int8", "int16", "int32", "int64")

_unary("Abs", 1, "abs", *_SIGNED, "uint8", "uint64")
_unary("Neg", 1, "neg", *_SIGNED)
_unary("Sign", 9, "sign", *_SIGNED, "uint8", "uint64")
_unary("Ceil", 1, "ceil")
_unary("Floor", 1, "floor")
_unary("Round", 11, "round")
_unary("Exp", 1, "exp")
_unary("Log", 1, "log", low=0.01)
_unary("Sqrt", 1, "sqrt", low=0.0)
_unary("Reciprocal", 1, lambda v: apply("div", 1, v), low=0.3)
_unary("Erf", 9, "erf")
_unary("Sin", 7, "sin")
_unary("Cos", 7, "cos")
_unary("Tan", 7, "tan", low=-1.4, high=1.4)
_unary("Asin", 7, "asin", low=-1.0, high=1.0)
_unary("Acos", 7, "acos", low=-1.0, high=1.0)
_unary("Atan", 7, "atan")
_unary("Sinh", 9, "sinh")
_unary("Cosh", 9, "cosh")
_unary("Tanh", 1, "tanh")
_unary("Asinh", 9, "asinh")
_unary("Acosh", 9, "acosh", low=1.0)
_unary("Atanh", 9, "atanh", low=-0.9, high=0.9)


@operator("Identity", since=1, cases=map_cases("float32", "bfloat16", "int8", "bool"))
def identity(x: Tensor) -> Tensor:
    """The input itself."""
    return x


# --- two inputs --------------------------------------------------------------------------------


def legacy_operand(a: Tensor, b: Tensor, axis: int | None, broadcast: int) -> Tensor:
    """`b` shaped for broadcasting against `a` as opsets before 7 did: its shape is a contiguous run
    of `a`'s shape that starts at `axis` (by default the trailing one)."""
    if not broadcast:
        if a.rank != b.rank:
            raise DefinitionError(f"ranks {a.rank} and {b.rank} differ, and broadcast is off")
        return b
    if axis is None or b.rank == 0:
        return b
    axis += a.rank if axis < 0 else 0
    trailing = a.rank - axis - b.rank
    if axis < 0 or trailing < 0:
        raise DefinitionError(f"axis {axis} does not fit ranks {a.rank} and {b.rank}")
    return Tensor((*b.shape, *[1] * trailing), b.dtype, lambda i: b.at(*i[: b.rank]))


def legacy_cases(d: str, numpy: Callable[..., Any], **ends: Any) -> list[Case]:
    """Cases of the broadcasting before opset 7."""

    def make(b: str, expect: Callable[..., Any], **attrs: int) -> Case:
        return Case(draw(f"{d}[2,3,5]", f"{d}{b}", **ends), attrs, expect=expect)

    return [
        make("[3]", lambda a, b: numpy(a, b[:, None]), axis=1, broadcast=1),
        make("[2,3]", lambda a, b: numpy(a, b[:, :, None]), axis=0, broadcast=1),
        make("[3,5]", numpy, broadcast=1),
        make("[2,3,5]", numpy),
    ]


def binary(
    name: str,
    fn: str | Callable[..., Expr],
    *dtypes: str,
    since: int = 7,
    numpy: Callable[..., Any] | None = None,
    **ends: Any,
) -> None:
    """Registers a broadcast operator of two inputs and, when opset 7 brought the broadcasting, its
    form before that; `numpy` computes what the tests expect of the latter."""
    if since == 7:
        d = "bool" if "float32" not in dtypes else "int32" if name == "Equal" else "float32"
        assert numpy is not None

        @operator(name, since=1, until=6, cases=legacy_cases(d, numpy, **ends))
        def old(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
            return elementwise(fn, a, legacy_operand(a, b, axis, broadcast))

    @operator(name, since=since, cases=pair_cases(*dtypes, **ends))
    def define(a: Tensor, b: Tensor) -> Tensor:
        return elementwise(fn, a, b)


binary("Add", "add", *FLOATS, *INTEGERS, numpy=np.add)
binary("Sub", "sub", *FLOATS, *INTEGERS, numpy=np.subtract)
binary("Mul", "mul", *FLOATS, *INTEGERS, numpy=np.multiply)
binary("Div", "div", *FLOATS, *INTEGERS, numpy=np.divide, low=1.0, high=7.0)


@operator(
    "Mod",
    since=10,
    cases=[
        *pair_cases("int32", "int8", "int16", "int64", "uint8", "uint64", low=-9, high=9),
        *(Case(draw(f"{d}[3,5]", f"{d}[5]"), {"fmod": 1}) for d in (*FLOATS, "int32", "int64")),
    ],
)
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder with the sign of b (fmod = 0) or of a (fmod = 1)."""
    return elementwise("fmod" if fmod else "mod", a, b)


def _power(x: Expr, y: Expr) -> Expr:
    """x to the power y in the dtype of x; an integer to a fraction is computed in float64."""
    kind = x.dtype
    if kind.startswith("float"):
        return apply("pow", x, cast(y, kind))
    if y.dtype.startswith(("float", "bfloat")):
        return cast(apply("pow", cast(x, "float64"), cast(y, "float64")), kind)
    return apply("pow", x, cast(y, kind))


@operator(
    "Pow",
    since=7,
    cases=[
        *pair_cases(*FLOATS, "int32", "int64", low=1.0, high=4.0),
        *(Case(draw(f"{a}[3,5]", f"{b}[5]", low=1.0, high=4.0)) for a, b in (
            ("float32", "int64"), ("float32", "uint8"), ("int64", "float32"), ("int32", "float64"),
            ("float16", "int32"), ("float64", "float32"),
        )),
    ],
)  # fmt: skip
def power(x: Tensor, y: Tensor) -> Tensor:
    """x to the power y; the result has the dtype of x."""
    shape = broadcast_shape(x.shape, y.shape)

    def at(*i: Expr) -> Expr:
        base, exponent = aligned(x, i), aligned(y, i)
        if x.dtype in NARROW:
            return cast(_power(cast(base, "float32"), exponent), x.dtype)
        return _power(base, exponent)

    return compute(shape, x.dtype, at)


@operator("Pow", since=1, until=6, cases=legacy_cases("float32", np.power, low=1.0))
def power_1(x: Tensor, y: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """x to the power y with the broadcasting of opset 1."""
    return power(x, legacy_operand(x, y, axis, broadcast))


# --- any number of inputs ----------------------------------------------------------------------


def _variadic(name: str, fn: str, *dtypes: str) -> None:
    cases = [
        Case(draw("float32[3,5]", "float32[5]", "float32[3,1]")),
        Case(draw("float32[3,5]")),
        Case(draw("float32[0,5]", "float32[5]")),
        *(Case(draw(f"{d}[3,5]", f"{d}[3,5]")) for d in dtypes),
    ]

    @operator(name, since=1, cases=cases)
    def define(*xs: Tensor) -> Tensor:
        return elementwise(lambda *v: reduce(lambda a, b: apply(fn, a, b), v), *xs)


_variadic("Sum", "add", *FLOATS)
_variadic("Max", "max", *FLOATS, *INTEGERS)
_variadic("Min", "min", *FLOATS, *INTEGERS)


@operator("Mean", since=1, cases=[Case(draw(f"{d}[3,5]", f"{d}[5]", f"{d}[3,1]")) for d in FLOATS])
def mean(*xs: Tensor) -> Tensor:
    """The arithmetic mean of all inputs."""
    return elementwise(lambda *v: apply("div", reduce(lambda a, b: a + b, v), len(xs)), *xs)


FLOAT32_MAX = 3.4028234663852886e38

# --- bounds and dropout ------------------------------------------------------------------------


@operator("Clip", since=1, until=10, cases=[
    Case(draw("float32[3,5]"), {"min": -0.5, "max": 1.5}, version=6),
    Case(draw("float32[3,5]"), {"max": 1.5}, version=6),
])  # fmt: skip
def clip_1(x: Tensor, *, min: float = -FLOAT32_MAX, max: float = FLOAT32_MAX) -> Tensor:
    """x limited to [min, max]; both are attributes."""
    return clip(x, full((), min, "float32"), full((), max, "float32"))


@operator("Clip", since=11, cases=[
    *(Case(draw(f"{d}[3,5]", f"{d}[]", f"{d}[]")) for d in (*FLOATS, "int8", "int32", "uint64")),
    Case(draw("float32[3,5]", None, "float32[]")),
    Case(draw("float32[3,5]", "float32[]")),
    Case(draw("float32[3,5]")),
])  # fmt: skip
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """min(high, max(x, low)) with scalar bounds; an omitted bound does not limit."""
    bounds = [b.at(*[0] * b.rank) if b is not None else None for b in (low, high)]

    def limit(v: Expr) -> Expr:
        for fn, b in zip(("max", "min"), bounds, strict=True):
            v = v if b is None else apply(fn, v, cast(b, v.dtype))
        return v

    return elementwise(limit, x)


@operator("Dropout", since=1, until=11, cases=[
    Case(draw("float32[3,5]"), {"ratio": 0.3}, version=10),
])  # fmt: skip
def dropout_1(
    x: Tensor, *, ratio: float = 0.5, is_test: int = 0, outputs: int = 1, version: int = 7
) -> Any:
    """The input: inference drops nothing. Before opset 10 the mask has the dtype of the data."""
    mask = full(x.shape, 1, "bool" if version >= 10 else x.dtype)
    return (x, mask)[:outputs] if outputs > 1 else x


@operator("Dropout", since=12, cases=[
    Case(draw("float32[3,5]"), outputs=2),
    Case(draw("float32[3,5]", "float32[]")),
    Case(draw("bfloat16[3,5]", "float32[]", np.array(False))),
])  # fmt: skip
def dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
    outputs: int = 1,
) -> Any:
    """The input, with a mask of ones. Training (random dropping) is refused."""
    if training_mode is not None and training_mode.values()[0].value:  # type: ignore[attr-defined]
        dropped = ratio.values()[0].value if ratio is not None else 0.5  # type: ignore[attr-defined]
        if dropped:
            raise DefinitionError("Dropout in training mode is not an inference operator")
    mask = full(x.shape, True, "bool")
    return (x, mask)[:outputs] if outputs > 1 else x


__all__ = ["binary", "legacy_operand", "map_cases", "pair_cases"]
