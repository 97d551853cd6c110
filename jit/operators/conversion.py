"""Conversion of elements between dtypes."""

from __future__ import annotations

import numpy as np

from onnxjit.codegen.expr import Const, Expr, apply, cast
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import DefinitionError, Tensor, cast_to
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, INTEGERS, draw
from onnxjit.tensors import dtype_name

_SCALE = "float8_e8m0fnu"
_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")


def convert(x: Tensor, dtype: str, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in another dtype. Out of range, float to integer saturates (ONNX leaves it open), integer
    to integer wraps around, and float to float8 gives the largest finite value when `saturate`."""
    if "string" in (x.dtype, dtype) and x.dtype != dtype:
        raise DefinitionError(f"conversion from {x.dtype} to {dtype}")
    if x.dtype == dtype:
        return x
    if dtype == _SCALE:
        return _to_scale(x, saturate, round_mode)
    if x.dtype in _FLOAT8 or x.dtype in ("float4_e2m1fn", _SCALE):
        x = cast_to(x, "float32")
    if dtype not in _FLOAT8:
        return cast_to(x, dtype)
    import ml_dtypes

    top = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)

    def scalar(v: Expr) -> Expr:
        w = v if v.dtype == "float64" else cast(v, "float32")
        if saturate:
            w = apply("max", apply("min", w, top), -top)
        return cast(w, dtype)

    return Tensor(x.shape, dtype, lambda i: scalar(x.at(*i)))


def _to_scale(x: Tensor, saturate: int, round_mode: str) -> Tensor:
    """`x` rounded to a power of two from 2^-127 to 2^127, the values of float8_e8m0fnu.

    The power below is found bit by bit of its exponent. Negative numbers are undefined in ONNX.
    """
    if round_mode not in ("up", "down", "nearest"):
        raise DefinitionError("Cast: unknown rounding mode")

    def scalar(v: Expr) -> Expr:
        v = cast(v, "float32")
        low, high = Const(2.0**-127, "float32"), Const(2.0**127, "float32")
        p = apply("select", apply("le", 1.0, v), Const(1.0, "float32"), low)
        for k in (64, 32, 16, 8, 4, 2, 1):
            p = apply("select", apply("le", p * 2.0**k, v), p * 2.0**k, p)
        if round_mode != "down":
            above = apply("lt", p, v) if round_mode == "up" else apply("le", p * 1.5, v)
            p = apply("select", above, p * 2.0, p)
        nan = Const(float("nan"), "float32")
        outside = apply("logical_or", apply("lt", v, low), apply("lt", high, p))
        bounded = apply("min", apply("max", p, low), high)
        p = bounded if saturate else apply("select", outside, nan, p)
        return cast(apply("select", apply("isnan", v), nan, p), _SCALE)

    return Tensor(x.shape, _SCALE, lambda i: scalar(x.at(*i)))


_CONVERSIONS = (
    ("float32", 1), ("float64", 11), ("float16", 10), ("bfloat16", 16), ("int8", 3), ("int32", 6),
    ("int64", 7), ("uint8", 2), ("uint64", 13), ("bool", 9),
)  # fmt: skip


@operator("Cast", since=6, cases=[
    Case(draw(f"{a}[3,5]", low=0.0 if b.startswith("uint") else -3.0), {"to": code})
    for a, _ in _CONVERSIONS for b, code in _CONVERSIONS
] + [
    *(Case(draw("float32[3,5]", low=-600, high=600), {"to": code, "saturate": s})
      for code in (17, 19) for s in (0, 1)),
    *(Case(draw("float32[3,5]", low=0.1, high=9), {"to": 24, "round_mode": r})
      for r in ("up", "down", "nearest")),
    Case(draw("float32[128,3072]"), {"to": 16}, bench=True, label="narrow"),
])  # fmt: skip
def cast_operator(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`convert` to the dtype of a TensorProto.DataType number."""
    dtype = dtype_name(to)
    if not dtype:
        raise DefinitionError(f"Cast: {to} is no element type")
    return convert(x, dtype, saturate, round_mode)


@operator("Cast", since=1, until=5)
def cast_1(x: Tensor, *, to: str) -> Tensor:
    """`convert` to the dtype of a TensorProto.DataType name."""
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    dtype = names.get(to.upper(), to.lower())
    if dtype not in (*FLOATS, *INTEGERS, "bool"):
        raise DefinitionError("Cast: unknown element type")
    return convert(x, dtype)


@operator("CastLike", since=15, cases=[
    Case(draw("float32[3,5]", "int32[2]")), Case(draw("int64[3,5]", "bfloat16[1]")),
])  # fmt: skip
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`convert` to the dtype of another tensor."""
    return convert(x, like.dtype, saturate, round_mode)


def _bit_cast_type(x: Tensor, *, to: int) -> list[TensorType]:
    return [TensorType(dtype_name(to), x.shape)]


@operator("BitCast", since=26, host=True, infer=_bit_cast_type, cases=[
    Case(draw("float32[3,5]"), {"to": 6}), Case(draw("int64[3,5]"), {"to": 11}),
    Case(draw("uint8[3,5]"), {"to": 3}),
])  # fmt: skip
def bit_cast(x: np.ndarray, *, to: int) -> np.ndarray:
    """The same bits read as another dtype of the same width."""
    dtype = numpy_dtype(dtype_name(to))
    if dtype.itemsize != x.dtype.itemsize:
        raise DefinitionError("BitCast between dtypes of different width")
    return x.view(dtype)


__all__ = ["convert"]
