"""Elementary functions as branch-free LLVM IR on scalars, which LLVM's vectorisers widen.

`function(module, name, type)` returns a small internal always-inline function. None of its
instructions carries a fast-math flag: reassociation would undo the compensated steps (Cody-Waite
argument reduction, rounding by adding a large constant), so nothing may add flags to functions
whose name starts with `PREFIX`.

Exponentials and logarithms, and what belongs to circles, are in files of their own; here are the
functions made of them, and the tables. The rarer single-precision functions work in double
precision, where cancellation that would cost too much in float does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir

from onnxjit.codegen.scalar_builder import FLOAT32, FLOAT64, Scalar
from onnxjit.codegen.scalar_exponential import (
    exp2_32,
    exp32,
    exp64,
    exp_of_double_less_one,
    exp_of_minus,
    half_exp_less_one,
    log1p32,
    log32,
    log64,
)
from onnxjit.codegen.scalar_trigonometry import (
    SMALL,
    acos32,
    asin32,
    atan32,
    cos32,
    sin32,
    tan32,
)

PREFIX = "onnxjit."


def _tanh32(s: Scalar, x: Any) -> Any:
    """(e**2x - 1) / (e**2x + 1), which needs no other formula near 0."""
    a = s.abs(x)
    # beyond 9.02 the result is 1; a NaN stays
    t = s.select(s.lt(9.02, a), 9.02, a)
    e = exp_of_double_less_one(s, t)
    return s.copysign(s.div(e, s.add(e, 2.0)), x)


def _erf32(s: Scalar, x: Any) -> Any:
    """x times a polynomial of x² up to 1, and beyond 1 minus the eighth power of a polynomial.

    erfc(x)**(1/8) is smooth enough for degree 6 (after Abramowitz and Stegun, 7.1.28, who take a
    16th power), and an error of it counts 8 erfc(x) fold, which beyond 1 is little. Minimax fits,
    in all 3 units in the last place at most.
    """
    a = s.abs(x)
    # beyond 3.93 the result is 1
    t = s.select(s.lt(3.95, a), 3.95, a)
    r = s.poly(
        t,
        (
            1.49848318e-4,
            -2.46972172e-3,
            1.29258260e-2,
            -1.13734854e-2,
            -6.14264272e-2,
            -1.45060539e-1,
            1.00083470,
        ),
    )
    r = s.mul(r, r)
    r = s.mul(r, r)
    far = s.copysign(s.fma(s.neg(r), r, 1.0), x)
    near = s.mul(
        x,
        s.poly(
            s.mul(x, x),
            (
                -5.63142182e-4,
                4.91755130e-3,
                -2.67113112e-2,
                1.12801798e-1,
                -3.76123250e-1,
                1.12837911,
            ),
        ),
    )
    # an unordered comparison: NaN takes the polynomial, which hands it on
    return s.select(s.lt(1.0, a), far, near)


def _sigmoid(s: Scalar, x: Any) -> Any:
    e = s.call("exp", s.neg(s.abs(x)))
    return s.div(s.select(s.lt(x, 0.0), e, 1.0), s.add(e, 1.0))


def _sigmoid32(s: Scalar, x: Any) -> Any:
    """1 / (1 + e**-x); zero where e**-x is infinite for `exp_of_minus`."""
    return s.div(1.0, s.add(exp_of_minus(s, s.clamp_keep_nan(x, -89.0, 88.0)), 1.0))


def _divide_by(s: Scalar, x: Any, c: Any) -> Any:
    """x / c for a c whose reciprocal is a normal number and is computed once for many x.

    The quotient by the reciprocal is corrected by its exact remainder (Markstein, "Computation of
    elementary functions on the IBM RISC System/6000 processor", 1990), as a division rounds it.
    """
    r = s.div(1.0, c)
    q = s.mul(x, r)
    rest = s.fma(s.neg(q), c, x)
    return s.select(s.lt(s.abs(rest), math.inf), s.fma(rest, r, q), q)


def _rsqrt(s: Scalar, x: Any) -> Any:
    return s.div(1.0, s.intrinsic("sqrt", x))


def _expm1_32(s: Scalar, x: Any) -> Any:
    # below -18 the result is -1, beyond 89 infinite
    half = half_exp_less_one(s, s.clamp_keep_nan(x, -18.0, 89.0))
    # near 0 the half may be denormal, and the sign of zero is lost
    return s.select(s.lt(s.abs(x), 2.0**-24), x, s.add(half, half))


def _hyperbolic(s: Scalar, x: Any, sign: int) -> Any:
    d = s.wide()
    e = d.call("exp", s.extend(x))
    both = d.fma(d.div(1.0, e), float(sign), e)
    return s.truncate(d.mul(both, 0.5))


def _sinh32(s: Scalar, x: Any) -> Any:
    near = s.mul(x, s.fma(s.mul(x, x), 1 / 6, 1.0))
    return s.select(s.lt(s.abs(x), SMALL), near, _hyperbolic(s, x, -1))


def _cosh32(s: Scalar, x: Any) -> Any:
    return _hyperbolic(s, x, 1)


def _asinh32(s: Scalar, x: Any) -> Any:
    d = s.wide()
    a = d.abs(s.extend(x))
    far = d.call("log", d.add(a, d.intrinsic("sqrt", d.fma(a, a, 1.0))))
    near = s.mul(x, s.fma(s.mul(x, x), -1 / 6, 1.0))
    return s.select(s.lt(s.abs(x), SMALL), near, s.copysign(s.truncate(far), x))


def _acosh32(s: Scalar, x: Any) -> Any:
    d = s.wide()
    a = s.extend(x)
    y = d.call("log", d.add(a, d.intrinsic("sqrt", d.fma(a, a, -1.0))))
    return s.select(s.lt(x, 1.0), math.nan, s.truncate(y))


def _atanh32(s: Scalar, x: Any) -> Any:
    d = s.wide()
    a = s.extend(x)
    y = d.call("log", d.div(d.add(a, 1.0), d.sub(1.0, a)))
    near = s.mul(x, s.fma(s.mul(x, x), 1 / 3, 1.0))
    return s.select(s.lt(s.abs(x), SMALL), near, s.truncate(d.mul(y, 0.5)))


def _pow32(s: Scalar, x: Any, y: Any) -> Any:
    """C's powf, as exp(y * log|x|) in double precision."""
    d = s.wide()
    one = s.eq(s.abs(x), 1.0)
    product = d.mul(d.call("log", s.extend(s.abs(x))), s.extend(y))
    size = s.truncate(d.call("exp", product))
    size = s.select(s.both(one, s.eq(y, y)), 1.0, size)  # 0 * inf is not NaN here
    half = s.mul(y, 0.5)
    whole = s.eq(s.intrinsic("rint", y), y)
    odd = s.both(whole, s.ne(s.intrinsic("rint", half), half))
    signed = s.copysign(size, s.select(odd, x, 1.0))
    negative = s.both(s.lt(x, 0.0), s.lt(-math.inf, x))
    result = s.select(s.both(negative, s.negate(whole)), math.nan, signed)
    result = s.select(s.is_nan(y), y, result)
    result = s.select(s.either(s.eq(y, 0.0), s.eq(x, 1.0)), 1.0, result)
    return _common_powers(s, x, y, result)


def _power_three_quarters(s: Scalar, x: Any) -> Any:
    """x**(-3/4), the exponent of local response normalisation, without division or root.

    From an approximation of the bits, two steps of third order towards x**3 * r**4 = 1.
    """
    bits = s.to_bits(x)
    quarter = s.ashr(bits, 2)
    r = s.from_bits(s.iadd(s.isub(quarter, bits), 0x6F14EC00))
    for _ in range(2):
        w = s.mul(s.mul(x, r), r)
        e = s.fma(s.neg(s.mul(w, w)), x, 1.0)
        r = s.fma(s.mul(r, e), s.fma(e, 5 / 32, 0.25), r)
    r = s.select(s.lt(x, s.smallest_normal), math.inf, r)
    r = s.select(s.lt(x, 0.0), math.nan, r)
    return s.select(s.eq(s.abs(x), math.inf), 0.0, r)


def _common_powers(s: Scalar, x: Any, y: Any, otherwise: Any) -> Any:
    """The exponents that models use: where y is a constant, nothing else of pow is left."""
    square = s.mul(x, x)
    root = s.add(s.intrinsic("sqrt", x), 0.0)  # pow(-0, 1/2) is +0
    root = s.select(s.eq(x, -math.inf), math.inf, root)
    for exponent, power in (
        (1.0, x), (2.0, square), (3.0, s.mul(square, x)), (0.5, root), (-1.0, s.div(1.0, x)),
        (-0.75, _power_three_quarters(s, x)),
    ):  # fmt: skip
        otherwise = s.select(s.eq(y, exponent), power, otherwise)
    return otherwise


def _remainder(s: Scalar, x: Any, y: Any) -> Any:
    """Python's float modulo: the result has the sign of y."""
    r = s.rem(x, y)
    wrong = s.both(s.ne(r, 0.0), s.differ_in_sign(r, y))
    return s.select(s.eq(r, 0.0), s.copysign(0.0, y), s.select(wrong, s.add(r, y), r))


def _sign(s: Scalar, x: Any) -> Any:
    y = s.select(s.lt(x, 0.0), -1.0, s.select(s.lt(0.0, x), 1.0, 0.0))
    return s.select(s.is_nan(x), x, y)


def _llvm(name: str) -> Callable[..., Any]:
    return lambda s, *args: s.intrinsic(name, *args)


def _libm(name: str) -> Callable[..., Any]:
    return lambda s, *args: s.external(name, *args)


_COMMON: dict[str, Callable[..., Any]] = {
    "sqrt": _llvm("sqrt"),
    "rsqrt": _rsqrt,
    "floor": _llvm("floor"),
    "ceil": _llvm("ceil"),
    "trunc": _llvm("trunc"),
    "round": _llvm("rint"),
    "abs": _llvm("fabs"),
    "sign": _sign,
    "divide_by": _divide_by,
    "minus": lambda s, x, y: s.sub(x, y),
    "mod_floor": _remainder,
    "mod_trunc": lambda s, x, y: s.rem(x, y),
}

_FLOAT32: dict[str, Callable[..., Any]] = {
    **_COMMON,
    "exp": exp32, "exp2": exp2_32, "log": log32, "tanh": _tanh32, "erf": _erf32,
    "sin": sin32, "cos": cos32, "tan": tan32, "asin": asin32, "acos": acos32,
    "atan": atan32, "sinh": _sinh32, "cosh": _cosh32, "asinh": _asinh32, "acosh": _acosh32,
    "sigmoid": _sigmoid32, "atanh": _atanh32, "log1p": log1p32, "expm1": _expm1_32, "pow": _pow32,
}  # fmt: skip

_LIBM = (
    "tanh", "erf", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh",
    "atanh", "log1p", "expm1", "pow", "exp2",
)  # fmt: skip

_FLOAT64: dict[str, Callable[..., Any]] = {
    **_COMMON,
    "exp": exp64,
    "log": log64,
    "sigmoid": _sigmoid,
    **{name: _libm(name) for name in _LIBM},
}

BINARY: tuple[str, ...] = ("pow", "mod_floor", "mod_trunc", "divide_by", "minus")
UNARY: tuple[str, ...] = tuple(sorted(set(_FLOAT32) - set(BINARY)))


def function(module: ir.Module, name: str, type_: ir.Type) -> ir.Function:
    """The function `name` (of UNARY or BINARY) on float or double, defined in `module` on demand.

    Raises KeyError for an unknown name.
    """
    single = isinstance(type_, ir.FloatType)
    symbol = f"{PREFIX}{name}.{'f32' if single else 'f64'}"
    existing = module.globals.get(symbol)
    if existing is not None:
        return existing
    emit = (_FLOAT32 if single else _FLOAT64)[name]
    scalar = FLOAT32 if single else FLOAT64
    arity = 2 if name in BINARY else 1
    result = ir.Function(module, ir.FunctionType(type_, [type_] * arity), symbol)
    result.linkage = "internal"
    for attribute in ("alwaysinline", "nounwind"):
        result.attributes.add(attribute)
    builder = ir.IRBuilder(result.append_basic_block("entry"))
    builder.ret(emit(Scalar(builder, scalar, function), *result.args))
    return result


def external_symbols() -> list[str]:
    """C library symbols that compiled kernels may refer to.

    The double-precision functions; the remainder, which has no instruction; rounding, on targets
    without SSE4.1; and what LLVM makes of these (sincos, exp10, ldexp) and of copying loops.
    """
    rounding: Iterable[str] = ("floor", "ceil", "trunc", "rint", "fmod")
    made: Iterable[str] = ("memcpy", "memmove", "memset", "sincos", "exp10", "ldexp")
    return sorted({*_LIBM, *rounding, *(f"{name}f" for name in rounding), *made})
