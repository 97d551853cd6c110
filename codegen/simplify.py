"""Construction of simplified expressions: constant folding, index arithmetic with value ranges.

Integer rules are exact for every value that the axes can take (0 <= axis < extent) and every
non-negative value of the symbolic dims; nothing is assumed that cannot be proved from the
polynomial form. Floating-point rules are limited to those that hold for NaN, infinities and -0.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxjit.codegen.expr import (
    FALSE,
    INDEX,
    ONE,
    TRUE,
    ZERO,
    Apply,
    Axis,
    Const,
    Dim,
    Expr,
    as_int,
    from_terms,
    poly_add,
    poly_mul,
    poly_terms,
)
from onnxjit.codegen.scalar_functions import FUNCTIONS, numpy_dtype


def result_dtype(fn: str, args: tuple[Expr, ...]) -> str:
    rule = FUNCTIONS[fn].result
    return args[-1].dtype if rule == "same" else rule


def build(fn: str, args: tuple[Expr, ...], dtype: str | None = None) -> Expr:
    """`Apply(fn, args)` in simplest form. `dtype` is needed for casts only."""
    out = dtype if fn == "cast" and dtype is not None else result_dtype(fn, args)
    rule = _RULES.get(fn)
    if rule is not None:
        e = rule(args, out)
        if e is not None:
            return e
    for a in args:
        if not isinstance(a, Const):
            return Apply(fn, args, out)
    return _fold(fn, args, out)


def _fold(fn: str, args: tuple[Expr, ...], dtype: str) -> Expr:
    values = [numpy_dtype(a.dtype).type(a.value) for a in args if isinstance(a, Const)]
    if fn == "cast":
        result = FUNCTIONS["cast"].evaluate(values[0], dtype)
    else:
        result = FUNCTIONS[fn].evaluate(*values)
    return Const(np.asarray(result).astype(numpy_dtype(dtype)).item(), dtype)


# --- ranges ------------------------------------------------------------------------------------


def _extreme(e: Expr, upper: bool) -> Expr | None:
    """A bound of `e` over its axes as a polynomial in dims; None when no bound is known.

    Each axis of a term is replaced by the end of its range; sound because all atoms are
    non-negative, so a term is monotonic in each of them.
    """
    total: Expr = ZERO
    for atoms, c in poly_terms(e).items():
        term: Expr = Const(c, INDEX)
        high = (c > 0) == upper
        for a in atoms:
            b = _atom_bound(a, high)
            if b is None:
                return None
            term = poly_mul(term, b)
        total = poly_add(total, term)
    if any(not isinstance(a, Dim) for atoms in poly_terms(total) for a in atoms):
        again = {a for atoms in poly_terms(total) for a in atoms if not isinstance(a, Dim)}
        if any(isinstance(a, Axis) for a in again):
            return _extreme(total, upper)
    return total


def _atom_bound(a: Expr, high: bool) -> Expr | None:
    if isinstance(a, Axis):
        return poly_add(a.extent, ONE, -1) if high else ZERO
    if isinstance(a, Dim):
        return a
    if isinstance(a, Apply) and a.dtype == INDEX:
        if a.fn == "mod" and is_nonneg(a.args[1]):
            return poly_add(a.args[1], ONE, -1) if high else ZERO
        if a.fn == "floordiv" and (as_int(a.args[1]) or 0) > 0 and is_nonneg(a.args[0]):
            if not high:
                return ZERO
            if not any(isinstance(x, Axis) for x in _leaf_axes(a)):
                return a
            top = _extreme(a.args[0], True)
            return None if top is None else build("floordiv", (top, a.args[1]))
        if a.fn in ("min", "max", "select") and not _leaf_axes(a) and is_nonneg_atom(a):
            return a
    return None


def _leaf_axes(e: Expr) -> set[Axis]:
    from onnxjit.codegen.expr import axes_of

    return axes_of(e)


def is_nonneg_atom(a: Expr) -> bool:
    if isinstance(a, Axis | Dim):
        return True
    if isinstance(a, Const):
        return a.value >= 0
    if isinstance(a, Apply):
        if a.fn == "max":
            return is_nonneg(a.args[0]) or is_nonneg(a.args[1])
        if a.fn == "min":
            return is_nonneg(a.args[0]) and is_nonneg(a.args[1])
        if a.fn == "select":
            return is_nonneg(a.args[1]) and is_nonneg(a.args[2])
        if a.fn == "floordiv":
            return is_nonneg(a.args[0]) and is_nonneg(a.args[1])
        if a.fn == "mod":
            return is_nonneg(a.args[1])
        if a.fn == "cast":
            return a.args[0].dtype == "bool" or a.args[0].dtype.startswith("uint")
    return False


def is_nonneg(e: Expr) -> bool:
    """Whether `e >= 0` is proved for all axes in range and all non-negative dims."""
    if isinstance(e, Const):
        return e.value >= 0
    terms = poly_terms(e)
    if all(c > 0 and all(is_nonneg_atom(a) for a in atoms) for atoms, c in terms.items()):
        return True
    low = _extreme(e, False)
    if low is None:
        return False
    return all(
        c > 0 and all(is_nonneg_atom(a) for a in atoms) for atoms, c in poly_terms(low).items()
    )


def is_less(a: Expr, b: Expr) -> bool:
    """Whether `a < b` is proved."""
    return is_nonneg(poly_add(poly_add(b, a, -1), ONE, -1))


# --- integer rules -----------------------------------------------------------------------------


def _split(e: Expr, q: Expr) -> tuple[Expr, Expr] | None:
    """`e == q * quotient + rest` term by term, for a divisor that is a constant or one product."""
    divisor = poly_terms(q)
    if len(divisor) != 1:
        return None
    ((d_atoms, d),) = divisor.items()
    if d <= 0:
        return None
    quotient: dict[tuple[Expr, ...], int] = {}
    rest: dict[tuple[Expr, ...], int] = {}
    for atoms, c in poly_terms(e).items():
        left = list(atoms)
        try:
            for a in d_atoms:
                left.remove(a)
        except ValueError:
            rest[atoms] = c
            continue
        k, r = divmod(c, d)
        if k:
            quotient[tuple(left)] = quotient.get(tuple(left), 0) + k
        if r:
            rest[atoms] = r
    return from_terms(quotient), from_terms(rest)


def _in_range(e: Expr, q: Expr) -> bool:
    return is_nonneg(e) and is_less(e, q)


def _floordiv(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if dtype != INDEX:
        return a if dtype.startswith(("int", "uint")) and as_int(b) == 1 else None
    if b is ONE:
        return a
    if a is b and (isinstance(a, Dim) or as_int(a)):
        return ONE
    if as_int(b) == 0:
        return ZERO
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(a.value // b.value, INDEX)
    if isinstance(a, Const) and a.value == 0:
        return ZERO
    if _in_range(a, b):
        return ZERO
    parts = _split(a, b)
    if parts is None:
        return None
    quotient, rest = parts
    if rest is ZERO or _in_range(rest, b):
        return quotient
    inner = _divide_rest(rest, b)
    if quotient is ZERO:
        return inner
    return poly_add(quotient, inner if inner is not None else Apply("floordiv", (rest, b), INDEX))


def _divide_rest(rest: Expr, b: Expr) -> Expr | None:
    """floordiv of what `_split` left: nested divisions and common factors."""
    k = as_int(b)
    if k is None:
        return None
    if isinstance(rest, Apply) and rest.fn == "floordiv":
        inner = as_int(rest.args[1])
        if inner is not None and inner > 0 and k > 0:
            return build("floordiv", (rest.args[0], Const(inner * k, INDEX)))
    terms = poly_terms(rest)
    c0 = terms.get((), 0)
    g = math.gcd(k, *(c for atoms, c in terms.items() if atoms))
    if g > 1 and len(terms) > (1 if () in terms else 0):
        reduced = {atoms: c // g for atoms, c in terms.items() if atoms}
        if c0 // g:
            reduced[()] = c0 // g
        return build("floordiv", (from_terms(reduced), Const(k // g, INDEX)))
    return None


def _mod(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if dtype != INDEX:
        return None
    if b is ONE or a is ZERO:
        return ZERO
    if as_int(b) == 0:
        return None
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(a.value % b.value, INDEX)
    if _in_range(a, b):
        return a
    parts = _split(a, b)
    if parts is None:
        return None
    rest = parts[1]
    if _in_range(rest, b):
        return rest
    k = as_int(b)
    if k is not None and isinstance(rest, Apply) and rest.fn == "mod":
        inner = as_int(rest.args[1])
        if inner is not None and k > 0 and inner % k == 0:
            return build("mod", (rest.args[0], b))
    return None if rest is a else build("mod", (rest, b))


def _compare(fn: str) -> Callable[[tuple[Expr, ...], str], Expr | None]:
    def rule(args: tuple[Expr, ...], dtype: str) -> Expr | None:
        a, b = args
        if a.dtype != INDEX or b.dtype != INDEX:
            return None
        if fn == "lt":
            return TRUE if is_less(a, b) else FALSE if is_nonneg(poly_add(a, b, -1)) else None
        if fn == "le":
            return TRUE if is_nonneg(poly_add(b, a, -1)) else FALSE if is_less(b, a) else None
        if fn == "eq":
            return TRUE if a is b else FALSE if is_less(a, b) or is_less(b, a) else None
        return FALSE if a is b else TRUE if is_less(a, b) or is_less(b, a) else None

    return rule


def _add(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if dtype == INDEX:
        return poly_add(a, b)
    if dtype == "bool":
        return build("logical_or", args)
    if isinstance(b, Const) and b.value == 0 and not dtype.startswith(("float", "bfloat")):
        return a
    return None


def _sub(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if dtype == INDEX:
        return poly_add(a, b, -1)
    # x - 0 is x for every float; x + 0 is not, because of -0.0.
    return a if isinstance(b, Const) and b.value == 0 and not _is_negative_zero(b) else None


def _is_negative_zero(c: Const) -> bool:
    return isinstance(c.value, float) and math.copysign(1.0, c.value) < 0


def _mul(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if dtype == INDEX:
        return poly_mul(a, b)
    if dtype == "bool":
        return build("logical_and", args)
    if isinstance(b, Const) and b.value == 1:
        return a
    if isinstance(a, Const) and a.value == 1:
        return b
    return None


def _div(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if isinstance(b, Const) and b.value == 1:
        return a
    if dtype == INDEX:
        if is_nonneg(a) and is_nonneg(b) and as_int(b) != 0:
            return build("floordiv", args)
        return None
    if dtype.startswith("float") and isinstance(b, Const) and b.value != 0:
        mantissa, _ = math.frexp(b.value)
        if abs(mantissa) == 0.5 and 2.0**-100 < abs(b.value) < 2.0**100:
            return build("mul", (a, Const(1 / b.value, dtype)))
    return None


def _neg(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    if dtype == INDEX:
        return poly_mul(args[0], Const(-1, INDEX))
    return None


def _minmax(fn: str) -> Callable[[tuple[Expr, ...], str], Expr | None]:
    def rule(args: tuple[Expr, ...], dtype: str) -> Expr | None:
        a, b = args
        if a is b:
            return a
        if dtype == INDEX:
            if is_nonneg(poly_add(b, a, -1)):
                return a if fn == "min" else b
            if is_nonneg(poly_add(a, b, -1)):
                return b if fn == "min" else a
        return None

    return rule


def _cast(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    (a,) = args
    if a.dtype == dtype:
        return a
    if isinstance(a, Apply) and a.fn == "cast":
        inner = a.args[0]
        widening = (a.dtype, dtype) in _EXACT or inner.dtype == "bool"
        if (inner.dtype, a.dtype) in _EXACT and (inner.dtype == dtype or widening):
            return build("cast", (inner,), dtype)
    return None


_EXACT = {
    ("int8", "int16"), ("int8", "int32"), ("int8", "int64"), ("int16", "int32"),
    ("int16", "int64"), ("int32", "int64"), ("uint8", "int32"), ("uint8", "int64"),
    ("uint8", "uint64"), ("uint8", "uint32"), ("uint32", "int64"), ("uint32", "uint64"),
    ("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64"),
    ("float16", "float64"), ("bfloat16", "float64"), ("int32", "float64"),
    ("bool", "int32"), ("bool", "int64"), ("bool", "float32"), ("bool", "uint8"),
    ("int16", "float32"), ("int8", "float32"), ("uint8", "float32"), ("uint16", "float32"),
}  # fmt: skip


def _select(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    c, a, b = args
    if isinstance(c, Const):
        return a if c.value else b
    return a if a is b else None


def _and(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if a is FALSE or b is FALSE:
        return FALSE
    if a is TRUE or a is b:
        return b
    return a if b is TRUE else None


def _or(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if a is TRUE or b is TRUE:
        return TRUE
    if a is FALSE or a is b:
        return b
    return a if b is FALSE else None


def _not(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    (a,) = args
    if isinstance(a, Apply):
        if a.fn == "logical_not":
            return a.args[0]
        if a.args[0].dtype == INDEX:
            if a.fn == "lt":
                return build("le", (a.args[1], a.args[0]))
            if a.fn == "le":
                return build("lt", (a.args[1], a.args[0]))
    return None


def _round_int(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    return args[0] if dtype.startswith(("int", "uint")) else None


def _abs(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    return args[0] if dtype == INDEX and is_nonneg(args[0]) else None


def _pow(args: tuple[Expr, ...], dtype: str) -> Expr | None:
    a, b = args
    if isinstance(b, Const):
        if b.value == 1:
            return build("cast", (a,), dtype) if a.dtype != dtype else a
        if a.dtype == dtype:
            if b.value == 2:
                return build("mul", (a, a))
            if b.value == 3 and dtype.startswith("float"):
                return build("mul", (build("mul", (a, a)), a))
            if b.value == 0.5 and dtype.startswith("float"):
                # pow(-inf, 0.5) is +inf and pow(-0.0, 0.5) is +0.0, where sqrt gives NaN and -0.0.
                return None
    return None


_RULES: dict[str, Callable[[tuple[Expr, ...], str], Expr | None]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "floordiv": _floordiv,
    "mod": _mod,
    "min": _minmax("min"),
    "max": _minmax("max"),
    "lt": _compare("lt"),
    "le": _compare("le"),
    "eq": _compare("eq"),
    "ne": _compare("ne"),
    "cast": _cast,
    "select": _select,
    "logical_and": _and,
    "logical_or": _or,
    "logical_not": _not,
    "floor": _round_int,
    "ceil": _round_int,
    "round": _round_int,
    "trunc": _round_int,
    "abs": _abs,
    "pow": _pow,
}


def assume(e: Expr, facts: dict[Expr, Expr]) -> Expr:
    """`e` with subexpressions that are known (conditions, loads) replaced and re-simplified."""
    from onnxjit.codegen.expr import rewrite

    return rewrite(e, lambda x: facts.get(x))


__all__ = ["assume", "build", "is_less", "is_nonneg", "result_dtype"]
