"""Comparisons, logic, bits and selection, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxjit.codegen.expr import Const, Expr, apply, cast
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import DefinitionError, Tensor, elementwise, select
from onnxjit.operators.elementwise import binary, map_cases
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, INTEGERS, draw

binary("And", "logical_and", "bool", numpy=np.logical_and)
binary("Or", "logical_or", "bool", numpy=np.logical_or)
binary("Xor", "logical_xor", "bool", numpy=np.logical_xor)
binary("Equal", "eq", "int32", "int64", "bool", "float32", "bfloat16", "uint8", numpy=np.equal)
binary("Less", "lt", *FLOATS, *INTEGERS, numpy=np.less)
binary("Greater", lambda a, b: apply("lt", b, a), *FLOATS, *INTEGERS, numpy=np.greater)
binary("LessOrEqual", "le", *FLOATS, *INTEGERS, since=12)
binary("GreaterOrEqual", lambda a, b: apply("le", b, a), *FLOATS, *INTEGERS, since=12)
binary("BitwiseAnd", "bit_and", *INTEGERS, since=18, low=0, high=100)
binary("BitwiseOr", "bit_or", *INTEGERS, since=18, low=0, high=100)
binary("BitwiseXor", "bit_xor", *INTEGERS, since=18, low=0, high=100)


@operator("Not", since=1, cases=map_cases("bool"))
def logical_not(x: Tensor) -> Tensor:
    """Negation of truth values."""
    return elementwise("logical_not", x)


@operator("BitwiseNot", since=18, cases=map_cases(*INTEGERS))
def bitwise_not(x: Tensor) -> Tensor:
    """All bits inverted."""
    return elementwise("bit_not", x)


@operator("BitShift", since=11, cases=[
    *(Case(draw(f"{d}[3,5]", f"{d}[5]", high=9), {"direction": way})
      for d in INTEGERS[4:] for way in ("LEFT", "RIGHT")),
])  # fmt: skip
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """x shifted by y bits. A count outside [0, bits) leaves only the fill: copies of the sign for a
    right shift of a signed number, else 0."""
    if direction not in ("LEFT", "RIGHT"):
        raise DefinitionError("BitShift: the direction is neither LEFT nor RIGHT")
    bits = numpy_dtype(x.dtype).itemsize * 8
    signed = x.dtype.startswith("int")

    def scalar(v: Expr, n: Expr) -> Expr:
        inside = apply("lt", n, bits)
        if signed:
            inside = apply("logical_and", inside, apply("le", 0, n))
        shift = "shift_left" if direction == "LEFT" else "shift_right"
        moved = apply(shift, v, apply("select", inside, n, 0))
        fill: Any = 0
        if signed and direction == "RIGHT":
            fill = apply("select", apply("lt", v, 0), Const(-1, v.dtype), 0)
        return apply("select", inside, moved, fill)

    return elementwise(scalar, x, y)


_SPECIAL = np.array([[1.0, np.inf, -np.inf], [np.nan, -0.0, 2.0]], np.float32)


def _special(*dtypes: str, **attrs: int) -> list[Case]:
    def make(d: str) -> Callable[[], list[Any]]:
        return lambda: [_SPECIAL.astype(numpy_dtype(d))]

    return [Case(make(d), attrs) for d in dtypes]


@operator("IsNaN", since=9, cases=_special(*FLOATS))
def is_nan(x: Tensor) -> Tensor:
    """Whether an element is not a number."""
    return elementwise("isnan", x)


@operator("IsInf", since=10, cases=[
    *_special(*FLOATS[:3]), *_special("float32", detect_negative=0),
    *_special("float32", detect_positive=0),
    *_special("float32", detect_negative=0, detect_positive=0),
])  # fmt: skip
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Whether an element is infinite, with the signs that are asked for."""

    def scalar(v: Expr) -> Expr:
        if detect_negative and detect_positive:
            return apply("isinf", v)
        wide = v if v.dtype == "float64" else cast(v, "float32")
        if detect_positive:
            return apply("eq", wide, float("inf"))
        return apply("eq", wide, -float("inf")) if detect_negative else Const(False, "bool")

    return elementwise(scalar, x)


@operator("Where", since=9, cases=[
    *(Case(draw("bool[3,1]", f"{d}[3,5]", f"{d}[5]")) for d in (*FLOATS, *INTEGERS, "bool")),
    Case(draw("bool[]", "float32[3,5]", "float32[]")),
    Case(draw("bool[0,1]", "float32[1,5]", "float32[]")),
])  # fmt: skip
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the condition holds, else y."""
    return select(condition, x, y)
