"""The closed table of scalar functions that expressions may apply, with their NumPy meaning.

One row per function: what it computes on NumPy arrays (the executable definition that every other
form is checked against), its result type, and the name under which kernel sources call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Function:
    """`result`: "same" (dtype of the last argument), "bool", or a fixed dtype name."""

    name: str
    evaluate: Callable[..., Any]
    result: str = "same"
    cost: int = 1


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype name, ml_dtypes' extension types included; object for strings."""
    if name == "string":
        return np.dtype(object)
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def _quiet(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            return fn(*args)

    return call


def _int_div(a: Any, b: Any) -> Any:
    """C division: truncates towards zero; division by zero gives zero."""
    a, b = np.asarray(a), np.asarray(b)
    safe = np.where(b == 0, np.ones_like(b), b)
    q = np.abs(a) // np.abs(safe)
    q = np.where((a < 0) != (b < 0), -q, q)
    return np.where(b == 0, np.zeros_like(q), q).astype(np.result_type(a, b))


def _div(a: Any, b: Any) -> Any:
    if np.issubdtype(np.asarray(a).dtype, np.integer):
        return _int_div(a, b)
    return np.divide(a, b)


def _floordiv(a: Any, b: Any) -> Any:
    a, b = np.asarray(a), np.asarray(b)
    if np.issubdtype(a.dtype, np.integer):
        safe = np.where(b == 0, np.ones_like(b), b)
        return np.where(b == 0, np.zeros_like(a), a // safe).astype(a.dtype)
    return np.floor_divide(a, b)


def _mod(a: Any, b: Any) -> Any:
    a, b = np.asarray(a), np.asarray(b)
    if np.issubdtype(a.dtype, np.integer):
        safe = np.where(b == 0, np.ones_like(b), b)
        return np.where(b == 0, np.zeros_like(a), a % safe).astype(a.dtype)
    return np.mod(a, b)


def _fmod(a: Any, b: Any) -> Any:
    a, b = np.asarray(a), np.asarray(b)
    if np.issubdtype(a.dtype, np.integer):
        safe = np.where(b == 0, np.ones_like(b), b)
        return np.where(b == 0, np.zeros_like(a), np.fmod(a, safe)).astype(a.dtype)
    return np.fmod(a, b)


def _elementwise(fn: Callable[[float], float]) -> Callable[..., Any]:
    wrapped = np.vectorize(fn, otypes=[np.float64])

    def call(x: Any) -> Any:
        x = np.asarray(x)
        if x.size == 0:
            return x
        return wrapped(x.astype(np.float64)).astype(x.dtype)

    return call


def _erf(v: float) -> float:
    return math.erf(v)


def _sigmoid(x: Any) -> Any:
    x = np.asarray(x)
    wide = x.astype(np.float64)
    e = np.exp(-np.abs(wide))
    return np.where(wide >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def _saturating_cast(x: Any, dtype: str) -> Any:
    """Numeric conversion as C does it, but float to integer saturates and NaN becomes 0."""
    x = np.asarray(x)
    target = numpy_dtype(dtype)
    if dtype == "bool":
        return x != 0
    if x.dtype.kind not in "iub" and target.kind in "iu":
        info = np.iinfo(target)
        wide = np.trunc(x.astype(np.float64))
        wide = np.where(np.isnan(wide), 0.0, wide)
        low, high = wide <= float(info.min), wide >= float(info.max)
        inside = np.where(low | high, 0.0, wide)
        out = inside.astype(np.int64 if target.kind == "i" else np.uint64).astype(target)
        return np.where(low, target.type(info.min), np.where(high, target.type(info.max), out))
    return x.astype(target)


def _pow(a: Any, b: Any) -> Any:
    """Integer powers are modulo 2**bits; a negative exponent counts as huge, as in kernels."""
    a, b = np.asarray(a), np.asarray(b)
    if not np.issubdtype(a.dtype, np.signedinteger):
        return np.power(a, b)
    unsigned = np.dtype(f"uint{a.dtype.itemsize * 8}")
    return np.power(a.astype(unsigned), b.astype(unsigned)).astype(a.dtype)


def _shift_left(a: Any, b: Any) -> Any:
    return np.left_shift(a, b)


_ROWS = (
    Function("add", np.add),
    Function("sub", np.subtract),
    Function("mul", np.multiply),
    Function("div", _div, cost=4),
    Function("floordiv", _floordiv, cost=6),
    Function("mod", _mod, cost=6),
    Function("fmod", _fmod, cost=6),
    Function("neg", np.negative),
    Function("abs", np.abs),
    Function("sign", np.sign, cost=2),
    Function("min", np.minimum),
    Function("max", np.maximum),
    Function("pow", _pow, cost=30),
    Function("sqrt", np.sqrt, cost=6),
    Function("rsqrt", lambda x: (1 / np.sqrt(x)).astype(np.asarray(x).dtype), cost=8),
    Function("exp", np.exp, cost=15),
    Function("log", np.log, cost=15),
    Function("erf", _elementwise(_erf), cost=20),
    Function("sigmoid", _sigmoid, cost=20),
    Function("tanh", np.tanh, cost=20),
    Function("sin", np.sin, cost=20),
    Function("cos", np.cos, cost=20),
    Function("tan", np.tan, cost=40),
    Function("asin", np.arcsin, cost=40),
    Function("acos", np.arccos, cost=40),
    Function("atan", np.arctan, cost=40),
    Function("sinh", np.sinh, cost=30),
    Function("cosh", np.cosh, cost=30),
    Function("asinh", np.arcsinh, cost=40),
    Function("acosh", np.arccosh, cost=40),
    Function("atanh", np.arctanh, cost=40),
    Function("log1p", np.log1p, cost=20),
    Function("expm1", np.expm1, cost=20),
    Function("floor", np.floor),
    Function("ceil", np.ceil),
    Function("trunc", np.trunc),
    Function("round", np.rint),
    Function("isnan", np.isnan, "bool"),
    Function("isinf", np.isinf, "bool"),
    Function("lt", np.less, "bool"),
    Function("le", np.less_equal, "bool"),
    Function("eq", np.equal, "bool"),
    Function("ne", np.not_equal, "bool"),
    Function("logical_and", np.logical_and, "bool"),
    Function("logical_or", np.logical_or, "bool"),
    Function("logical_xor", np.logical_xor, "bool"),
    Function("logical_not", np.logical_not, "bool"),
    Function("bit_and", np.bitwise_and),
    Function("bit_or", np.bitwise_or),
    Function("bit_xor", np.bitwise_xor),
    Function("bit_not", np.bitwise_not),
    Function("shift_left", _shift_left),
    Function("shift_right", np.right_shift),
    Function("select", np.where),
    Function("cast", _saturating_cast, cost=1),
)

FUNCTIONS: dict[str, Function] = {
    r.name: r if r.name == "cast" else Function(r.name, _quiet(r.evaluate), r.result, r.cost)
    for r in _ROWS
}

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": np.sum,
    "prod": np.prod,
    "max": np.max,
    "min": np.min,
    "any": np.any,
    "all": np.all,
}

COMBINE = {
    "sum": "add",
    "prod": "mul",
    "max": "max",
    "min": "min",
    "any": "logical_or",
    "all": "logical_and",
}
"""The scalar function that joins two terms of a reduction."""


def reduction_identity(fn: str, dtype: str) -> Any:
    """The value that leaves `fn` unchanged, as a Python number of the dtype's range."""
    if fn in ("sum", "any"):
        return 0
    if fn in ("prod", "all"):
        return 1
    if dtype.startswith(("int", "uint")):
        info = np.iinfo(dtype)
        return int(info.min if fn == "max" else info.max)
    if dtype == "bool":
        return fn == "min"
    return -math.inf if fn == "max" else math.inf
