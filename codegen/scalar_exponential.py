"""Exponentials and logarithms as branch-free LLVM IR on scalars (see `scalar_math`).

Sources: Cephes (log in single precision), FreeBSD msun (log in double precision).
"""

from __future__ import annotations

import math
from typing import Any

from onnxjit.codegen.scalar_builder import Scalar

_LN2_HIGH_32 = 0.693359375  # few bits: n * high is exact for |n| < 2**15
_LN2_LOW_32 = -2.12194440e-4
_LN2_HIGH_64 = 6.93147180369123816490e-01
_LN2_LOW_64 = 1.90821492927058770002e-10

SMALLEST_EXPONENT = -126 * math.log(2)  # of e: below, results are denormal and count as zero


_SERIES = (
    1.38825077313e-3, 8.36654723622e-3, 4.16672008242e-2, 1.66665434230e-1, 4.99999981496e-1,
)  # fmt: skip
"""Coefficients of e**r - 1 - r from r**6 to r**2: the minimax fit for |r| <= ln(2) / 2, with errors
of at most 1.3e-8 of e**r - 1."""


def _power_less_one(s: Scalar, r: Any) -> Any:
    """e**r - 1 for |r| <= ln(2) / 2."""
    p = s.poly(r, _SERIES)
    return s.fma(s.mul(r, r), p, r)


def _exp_core(s: Scalar, bits: Any, r: Any) -> Any:
    """2**n * e**r for |r| <= ln(2) / 2, where the result is a normal number.

    `bits` have n in the low ones: shifted to the exponent's place they are added to it, which
    wraps where the result is no normal number.
    """
    y = s.add(_power_less_one(s, r), 1.0)
    return s.from_bits(s.iadd(s.to_bits(y), s.shl(bits, s.mantissa_bits)))


def _reduced(s: Scalar, x: Any, bias: int = 0) -> tuple[Any, Any]:
    """(bits, r) with x = n ln(2) + r, n the nearest integer: the low bits are those of n + bias."""
    magic = 1.5 * 2.0**s.mantissa_bits + bias
    shifted = s.fma(x, 1 / math.log(2), magic)
    n = s.sub(shifted, magic)
    r = s.fma(n, -_LN2_HIGH_32, x)
    return s.to_bits(shifted), s.fma(n, -_LN2_LOW_32, r)


def exp_of_minus(s: Scalar, x: Any) -> Any:
    """e**-x for |x| up to 89 or so: 0 and infinity where the nearest power of 2 is no normal
    number, which is that of 127.5 ln(2) already."""
    magic = 1.5 * 2.0**s.mantissa_bits + 127
    shifted = s.fma(x, -1 / math.log(2), magic)
    n = s.sub(shifted, magic)
    minus_r = s.fma(n, _LN2_LOW_32, s.fma(n, _LN2_HIGH_32, x))
    power = s.from_bits(s.shl(s.to_bits(shifted), s.mantissa_bits))
    p = s.poly(minus_r, [c * (-1) ** k for k, c in zip(range(6, 1, -1), _SERIES, strict=True)])
    y = s.fma(s.mul(minus_r, minus_r), p, s.sub(1.0, minus_r))
    return s.mul(y, power)  # a product, so that a NaN stays one whatever its bits


def exp_of_double_less_one(s: Scalar, x: Any) -> Any:
    """e**2x - 1 for 0 <= x <= 10, where one step of the reduction is exact enough: the float next
    to ln(2) is off by 2e-9, and n is small."""
    magic = 1.5 * 2.0**s.mantissa_bits + 127
    shifted = s.fma(x, 2 / math.log(2), magic)
    r = s.fma(s.sub(shifted, magic), -math.log(2) / 2, x)
    bits = s.shl(s.to_bits(shifted), s.mantissa_bits)
    power, twice = s.from_bits(bits), s.from_bits(s.iadd(bits, 1 << s.mantissa_bits))
    p = s.poly(r, [c * 2.0 ** (k - 1) for k, c in zip(range(6, 1, -1), _SERIES, strict=True)])
    return s.fma(twice, s.fma(s.mul(r, r), p, r), s.sub(power, 1.0))


def half_exp_less_one(s: Scalar, x: Any) -> Any:
    """(e**x - 1) / 2 where x is not NaN and e**x at least 2**-125, infinity where that overflows:
    2**(n-1) times e**r - 1, plus 2**(n-1) - 1/2."""
    bits, r = _reduced(s, x, 126)
    power = s.from_bits(s.shl(bits, s.mantissa_bits))
    return s.fma(power, _power_less_one(s, r), s.sub(power, 0.5))


def _exp_range(s: Scalar, x: Any, y: Any, low: float, high: float) -> Any:
    """y, or what belongs to x outside of [low, high): zero, infinity, NaN."""
    y = s.select(s.lt(x, high), y, s.add(x, math.inf))
    return s.select(s.lt(x, low), 0.0, y)


def exp32(s: Scalar, x: Any) -> Any:
    y = _exp_core(s, *_reduced(s, x))
    return _exp_range(s, x, y, SMALLEST_EXPONENT, 88.72283935546875)


def exp2_32(s: Scalar, x: Any) -> Any:
    magic = 1.5 * 2.0**s.mantissa_bits
    shifted = s.add(x, magic)
    n = s.sub(shifted, magic)
    r = s.mul(s.sub(x, n), math.log(2))
    return _exp_range(s, x, _exp_core(s, s.to_bits(shifted), r), -126.0, 128.0)


def exp64(s: Scalar, x: Any) -> Any:
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


def log32(s: Scalar, x: Any) -> Any:
    return _log_edges(s, x, _log_core(s, *_split(s, x)))


def log1p32(s: Scalar, x: Any) -> Any:
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


def log64(s: Scalar, x: Any) -> Any:
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
