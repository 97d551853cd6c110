"""Sine, cosine, tangent and their inverses as branch-free LLVM IR on scalars (see `scalar_math`).

Sources: Cephes (asin, atan in single precision). The others work in double precision, where
cancellation that would cost too much in float does no harm.
"""

from __future__ import annotations

import math
from typing import Any

from onnxjit.codegen.scalar_builder import Scalar, inverse_turn_chunks

SMALL = 2.0**-12  # below: a short Taylor series is exact to float32


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
    return s.select(s.lt(s.abs(x), SMALL), x, y)  # x**3 / 3 < ulp / 2


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


def sin32(s: Scalar, x: Any) -> Any:
    return _tiny_or(s, x, _trigonometric(s, x, 0))


def cos32(s: Scalar, x: Any) -> Any:
    return _trigonometric(s, x, 1)


def tan32(s: Scalar, x: Any) -> Any:
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


def asin32(s: Scalar, x: Any) -> Any:
    a = s.abs(x)
    far = s.lt(0.5, a)
    z = s.select(far, s.mul(s.sub(1.0, a), 0.5), s.mul(a, a))
    y = _asin_core(s, s.select(far, s.intrinsic("sqrt", z), a), z)
    y = s.select(far, s.sub(math.pi / 2, s.add(y, y)), y)
    return s.copysign(s.select(s.lt(1.0, a), math.nan, y), x)


def acos32(s: Scalar, x: Any) -> Any:
    a = s.abs(x)
    far = s.lt(0.5, a)
    z = s.select(far, s.mul(s.sub(1.0, a), 0.5), s.mul(x, x))
    y = _asin_core(s, s.select(far, s.intrinsic("sqrt", z), x), z)
    twice = s.add(y, y)
    edge = s.select(s.lt(x, 0.0), s.sub(math.pi, twice), twice)
    # pi/2 in two parts: near x = 0.5 the difference has fewer bits than the operands
    inner = s.sub(math.pi / 2, s.add(y, 4.37113900e-8))
    return s.select(s.lt(1.0, a), math.nan, s.select(far, edge, inner))


def atan32(s: Scalar, x: Any) -> Any:
    a = s.abs(x)
    high, middle = s.lt(2.414213562373095, a), s.lt(0.4142135623730950, a)
    top = s.select(high, -1.0, s.select(middle, s.sub(a, 1.0), a))
    bottom = s.select(high, a, s.select(middle, s.add(a, 1.0), 1.0))
    base = s.select(high, math.pi / 2, s.select(middle, math.pi / 4, 0.0))
    r = s.div(top, bottom)
    z = s.mul(r, r)
    p = s.poly(z, (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1))
    return s.copysign(s.add(base, s.fma(s.mul(p, z), r, r)), x)
