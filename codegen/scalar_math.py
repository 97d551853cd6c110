"""Elementary functions as branch-free LLVM IR on scalars, which LLVM's vectorisers widen.

`function(module, name, type)` returns a small internal always-inline function. None of its
instructions carries a fast-math flag: reassociation would undo the compensated steps (Cody-Waite
argument reduction, rounding by adding a large constant), so nothing may add flags to functions
whose name starts with `PREFIX`.

Sources: Cephes (exp, log, tanh, asin, atan in single precision), FreeBSD msun (log in double
precision). The rarer single-precision functions work in double
precision, where cancellation that would cost too much in float does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir

from onnxjit.codegen.scalar_builder import FLOAT32, FLOAT64, Scalar, inverse_turn_chunks

PREFIX = "onnxjit."

_LN2_HIGH_32 = 0.693359375  # few bits: n * high is exact for |n| < 2**15
_LN2_LOW_32 = -2.12194440e-4
_LN2_HIGH_64 = 6.93147180369123816490e-01
_LN2_LOW_64 = 1.90821492927058770002e-10
_SMALL = 2.0**-12  # below: a short Taylor series is exact to float32


_SMALLEST_EXPONENT = -126 * math.log(2)  # of e: below, results are denormal and count as zero


def _power_less_one(s: Scalar, r: Any) -> Any:
    """e**r - 1 for |r| <= ln(2) / 2 (Cephes expf)."""
    p = s.poly(
        r,
        (
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ),
    )
    return s.fma(s.mul(r, r), p, r)


def _exp_core(s: Scalar, bits: Any, r: Any) -> Any:
    """2**n * e**r for |r| <= ln(2) / 2, where the result is a normal number.

    `bits` are those of n plus 1.5 * 2**23, whose low ones are n: shifted to the exponent's place
    they are added to it, which wraps where the result is no normal number.
    """
    y = s.add(_power_less_one(s, r), 1.0)
    return s.from_bits(s.iadd(s.to_bits(y), s.shl(bits, s.mantissa_bits)))


def _reduced(s: Scalar, x: Any) -> tuple[Any, Any]:
    """(bits, r) with x = n ln(2) + r, n the nearest integer, in the form of `_exp_core`."""
    magic = 1.5 * 2.0**s.mantissa_bits
    shifted = s.fma(x, 1 / math.log(2), magic)
    n = s.sub(shifted, magic)
    r = s.fma(n, -_LN2_HIGH_32, x)
    return s.to_bits(shifted), s.fma(n, -_LN2_LOW_32, r)


def _exp_inside(s: Scalar, x: Any) -> Any:
    """e**x where neither x is NaN nor the result anything but a normal number."""
    return _exp_core(s, *_reduced(s, x))


def _half_exp_less_one(s: Scalar, x: Any) -> Any:
    """(e**x - 1) / 2 where x is not NaN and e**x at least 2**-125, infinity where that overflows:
    2**(n-1) times e**r - 1, plus 2**(n-1) - 1/2."""
    bits, r = _reduced(s, x)
    power = s.from_bits(s.iadd(s.shl(bits, s.mantissa_bits), s.bits_of(0.5)))
    return s.fma(power, _power_less_one(s, r), s.sub(power, 0.5))


def _exp_range(s: Scalar, x: Any, y: Any, low: float, high: float) -> Any:
    """y, or what belongs to x outside of [low, high): zero, infinity, NaN."""
    y = s.select(s.lt(x, high), y, s.add(x, math.inf))
    return s.select(s.lt(x, low), 0.0, y)


def _exp32(s: Scalar, x: Any) -> Any:
    return _exp_range(s, x, _exp_inside(s, x), _SMALLEST_EXPONENT, 88.72283935546875)


def _exp2_32(s: Scalar, x: Any) -> Any:
    magic = 1.5 * 2.0**s.mantissa_bits
    shifted = s.add(x, magic)
    n = s.sub(shifted, magic)
    r = s.mul(s.sub(x, n), math.log(2))
    return _exp_range(s, x, _exp_core(s, s.to_bits(shifted), r), -126.0, 128.0)


def _exp64(s: Scalar, x: Any) -> Any:
    x = s.clamp_keep_nan(x, -746.0, 710.0)
    n, k = s.nearest(s.mul(x, 1 / math.log(2)))
    r = s.fma(n, -_LN2_HIGH_64, x)
    r = s.fma(n, -_LN2_LOW_64, r)
    p = s.poly(r, [1 / math.factorial(i) for i in range(13, 1, -1)])
    y = s.add(s.fma(s.mul(r, r), p, r), 1.0)
    return s.scale(y, k)


def _split(s: Scalar, x: Any) -> tuple[Any, Any]:
    """(f, e) with |x| = (1 + f) * 2**e and sqrt(1/2) <= 1 + f < sqrt(2); x finite and > 0."""
    tiny = s.lt(x, s.smallest_normal)
    shift = s.mantissa_bits
    scaled = s.select(tiny, s.mul(x, 2.0**shift), x)
    half = s.bits_of(math.sqrt(0.5))
    bits = s.isub(s.to_bits(scaled), half)
    e = s.int_to_float(s.ashr(bits, shift))
    e = s.sub(e, s.select(tiny, float(shift), 0.0))
    m = s.from_bits(s.iadd(s.iand(bits, (1 << shift) - 1), half))
    return s.sub(m, 1.0), e


def _log_edges(s: Scalar, x: Any, y: Any) -> Any:
    """log outside of the finite positive numbers."""
    y = s.select(s.lt(x, math.inf), y, x)  # +inf and NaN are returned as they are
    y = s.select(s.lt(x, 0.0), math.nan, y)
    return s.select(s.eq(x, 0.0), -math.inf, y)


def _log_core(s: Scalar, f: Any, e: Any) -> Any:
    """log((1 + f) 2**e) for f of `_split` (Cephes logf)."""
    z = s.mul(f, f)
    p = s.poly(
        f,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    )
    y = s.mul(s.mul(f, z), p)
    y = s.fma(e, _LN2_LOW_32, y)
    y = s.fma(z, -0.5, y)
    return s.fma(e, _LN2_HIGH_32, s.add(f, y))


def _log32(s: Scalar, x: Any) -> Any:
    return _log_edges(s, x, _log_core(s, *_split(s, x)))


def _log1p32(s: Scalar, x: Any) -> Any:
    """log(u 2**e) for u 2**e = 1 + x, with what that sum has lost added to u."""
    sum_ = s.add(x, 1.0)
    f, e = _split(s, sum_)
    # exact: the smaller of the two is taken off first
    lost = s.select(s.lt(1.0, x), s.sub(1.0, s.sub(sum_, x)), s.sub(x, s.sub(sum_, 1.0)))
    # beyond 2**30 the 1 counts for nothing, and the scale would be denormal
    exponent = s.iand(s.isub(s.to_bits(sum_), s.bits_of(math.sqrt(0.5))), -1 << s.mantissa_bits)
    scale = s.from_bits(s.isub(s.integer(s.bits_of(1.0)), exponent))
    f = s.select(s.lt(x, 2.0**30), s.fma(lost, scale, f), f)
    y = _log_edges(s, sum_, _log_core(s, f, e))
    # keeps the sign of zero, and what is lost where denormals are zero
    return s.select(s.lt(s.abs(x), 2.0**-24), x, y)


def _log64(s: Scalar, x: Any) -> Any:
    f, e = _split(s, x)
    t = s.div(f, s.add(f, 2.0))
    z = s.mul(t, t)
    r = s.mul(
        z,
        s.poly(
            z,
            (
                1.479819860511658591e-01,
                1.531383769920937332e-01,
                1.818357216161805012e-01,
                2.222219843214978396e-01,
                2.857142874366239149e-01,
                3.999999999940941908e-01,
                6.666666666666735130e-01,
            ),
        ),
    )
    h = s.mul(s.mul(f, f), 0.5)
    inner = s.fma(e, _LN2_LOW_64, s.mul(t, s.add(h, r)))
    y = s.fma(e, _LN2_HIGH_64, s.sub(f, s.sub(h, inner)))
    return _log_edges(s, x, y)


def _tanh32(s: Scalar, x: Any) -> Any:
    """(e**2x - 1) / (e**2x + 1), which needs no other formula near 0."""
    a = s.abs(x)
    # beyond 9.02 the result is 1; a NaN stays
    t = s.select(s.lt(9.02, a), 9.02, a)
    half = _half_exp_less_one(s, s.add(t, t))
    return s.copysign(s.div(half, s.add(half, 1.0)), x)


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
    """1 / (1 + e**-x); zero where that is denormal."""
    t = s.clamp_keep_nan(s.neg(x), -87.0, -_SMALLEST_EXPONENT)
    y = s.div(1.0, s.add(_exp_inside(s, t), 1.0))
    y = s.select(s.lt(x, _SMALLEST_EXPONENT), 0.0, y)
    return s.select(s.is_nan(x), x, y)


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


def _quadrant(s: Scalar, x: Any) -> tuple[Any, Any]:
    """(r, q): x = q * pi/2 + r modulo 2 pi, |r| <= pi/4, for every finite float32.

    Payne and Hanek's reduction without a table: 1 / (2 pi) in chunks of 29 bits, so each product
    with a 24-bit mantissa is exact in double precision and so is its fractional part. Partial sums
    go from the largest chunk to the smallest and lose nothing that matters.
    """
    d = s.wide()
    wide = s.extend(x)
    turns = None
    for chunk in inverse_turn_chunks():
        p = d.mul(wide, chunk)
        p = d.sub(p, d.intrinsic("rint", p))
        turns = p if turns is None else d.add(turns, p)
        turns = d.sub(turns, d.intrinsic("rint", turns))
    quarter = d.mul(turns, 4.0)
    n, k = d.nearest(quarter)
    r = s.truncate(d.mul(d.sub(quarter, n), math.pi / 2))
    return r, s.narrow_int(k)


def _tiny_or(s: Scalar, x: Any, y: Any) -> Any:
    """x where sin x and tan x round to x (which also keeps the sign of zero), else y."""
    return s.select(s.lt(s.abs(x), _SMALL), x, y)  # x**3 / 3 < ulp / 2


def _sine_cosine(s: Scalar, r: Any) -> tuple[Any, Any]:
    """Sine and cosine on [-pi/4, pi/4] (Cephes)."""
    z = s.mul(r, r)
    p = s.poly(z, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
    sine = s.fma(s.mul(p, z), r, r)
    p = s.poly(z, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    cosine = s.add(s.fma(z, -0.5, s.mul(s.mul(z, z), p)), 1.0)
    return sine, cosine


def _trigonometric(s: Scalar, x: Any, shift: int) -> Any:
    r, q = _quadrant(s, x)
    sine, cosine = _sine_cosine(s, r)
    q = s.iadd(q, shift)
    y = s.select(s.odd(q), cosine, sine)
    return s.from_bits(s.ixor(s.to_bits(y), s.shl(s.iand(q, 2), 30)))


def _sin32(s: Scalar, x: Any) -> Any:
    return _tiny_or(s, x, _trigonometric(s, x, 0))


def _cos32(s: Scalar, x: Any) -> Any:
    return _trigonometric(s, x, 1)


def _tan32(s: Scalar, x: Any) -> Any:
    r, q = _quadrant(s, x)
    sine, cosine = _sine_cosine(s, r)
    odd = s.odd(q)
    y = s.div(s.select(odd, s.neg(cosine), sine), s.select(odd, sine, cosine))
    return _tiny_or(s, x, y)


def _asin_core(s: Scalar, x: Any, z: Any) -> Any:
    p = s.poly(
        z, (4.2163199048e-2, 2.4181311049e-2, 4.5470025998e-2, 7.4953002686e-2, 1.6666752422e-1)
    )
    return s.fma(s.mul(p, z), x, x)


def _asin32(s: Scalar, x: Any) -> Any:
    a = s.abs(x)
    far = s.lt(0.5, a)
    z = s.select(far, s.mul(s.sub(1.0, a), 0.5), s.mul(a, a))
    y = _asin_core(s, s.select(far, s.intrinsic("sqrt", z), a), z)
    y = s.select(far, s.sub(math.pi / 2, s.add(y, y)), y)
    return s.copysign(s.select(s.lt(1.0, a), math.nan, y), x)


def _acos32(s: Scalar, x: Any) -> Any:
    a = s.abs(x)
    far = s.lt(0.5, a)
    z = s.select(far, s.mul(s.sub(1.0, a), 0.5), s.mul(x, x))
    y = _asin_core(s, s.select(far, s.intrinsic("sqrt", z), x), z)
    twice = s.add(y, y)
    edge = s.select(s.lt(x, 0.0), s.sub(math.pi, twice), twice)
    # pi/2 in two parts: near x = 0.5 the difference has fewer bits than the operands
    inner = s.sub(math.pi / 2, s.add(y, 4.37113900e-8))
    return s.select(s.lt(1.0, a), math.nan, s.select(far, edge, inner))


def _atan32(s: Scalar, x: Any) -> Any:
    a = s.abs(x)
    high, middle = s.lt(2.414213562373095, a), s.lt(0.4142135623730950, a)
    top = s.select(high, -1.0, s.select(middle, s.sub(a, 1.0), a))
    bottom = s.select(high, a, s.select(middle, s.add(a, 1.0), 1.0))
    base = s.select(high, math.pi / 2, s.select(middle, math.pi / 4, 0.0))
    r = s.div(top, bottom)
    z = s.mul(r, r)
    p = s.poly(z, (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1))
    return s.copysign(s.add(base, s.fma(s.mul(p, z), r, r)), x)


def _expm1_32(s: Scalar, x: Any) -> Any:
    # below -18 the result is -1, beyond 89 infinite
    half = _half_exp_less_one(s, s.clamp_keep_nan(x, -18.0, 89.0))
    # near 0 the half may be denormal, and the sign of zero is lost
    return s.select(s.lt(s.abs(x), 2.0**-24), x, s.add(half, half))


def _hyperbolic(s: Scalar, x: Any, sign: int) -> Any:
    d = s.wide()
    e = d.call("exp", s.extend(x))
    both = d.fma(d.div(1.0, e), float(sign), e)
    return s.truncate(d.mul(both, 0.5))


def _sinh32(s: Scalar, x: Any) -> Any:
    near = s.mul(x, s.fma(s.mul(x, x), 1 / 6, 1.0))
    return s.select(s.lt(s.abs(x), _SMALL), near, _hyperbolic(s, x, -1))


def _cosh32(s: Scalar, x: Any) -> Any:
    return _hyperbolic(s, x, 1)


def _asinh32(s: Scalar, x: Any) -> Any:
    d = s.wide()
    a = d.abs(s.extend(x))
    far = d.call("log", d.add(a, d.intrinsic("sqrt", d.fma(a, a, 1.0))))
    near = s.mul(x, s.fma(s.mul(x, x), -1 / 6, 1.0))
    return s.select(s.lt(s.abs(x), _SMALL), near, s.copysign(s.truncate(far), x))


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
    return s.select(s.lt(s.abs(x), _SMALL), near, s.truncate(d.mul(y, 0.5)))


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
    "mod_floor": _remainder,
    "mod_trunc": lambda s, x, y: s.rem(x, y),
}

_FLOAT32: dict[str, Callable[..., Any]] = {
    **_COMMON,
    "exp": _exp32, "exp2": _exp2_32, "log": _log32, "tanh": _tanh32, "erf": _erf32,
    "sin": _sin32, "cos": _cos32, "tan": _tan32, "asin": _asin32, "acos": _acos32,
    "atan": _atan32, "sinh": _sinh32, "cosh": _cosh32, "asinh": _asinh32, "acosh": _acosh32,
    "sigmoid": _sigmoid32, "atanh": _atanh32, "log1p": _log1p32, "expm1": _expm1_32, "pow": _pow32,
}  # fmt: skip

_LIBM = (
    "tanh", "erf", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh",
    "atanh", "log1p", "expm1", "pow", "exp2",
)  # fmt: skip

_FLOAT64: dict[str, Callable[..., Any]] = {
    **_COMMON,
    "exp": _exp64,
    "log": _log64,
    "sigmoid": _sigmoid,
    **{name: _libm(name) for name in _LIBM},
}

BINARY: tuple[str, ...] = ("pow", "mod_floor", "mod_trunc", "divide_by")
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
