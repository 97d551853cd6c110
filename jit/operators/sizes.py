"""Sizes that models compute: axes, and small integer tensors read as size expressions."""

from __future__ import annotations

from collections.abc import Sequence

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    Apply,
    Const,
    Expr,
    Poly,
    apply,
    as_int,
    cast,
    fresh_axis,
    from_terms,
    index,
    loads,
    poly_add,
    poly_mul,
    poly_terms,
)
from onnxjit.codegen.kernel import product
from onnxjit.codegen.simplify import build, is_nonneg
from onnxjit.codegen.tensor import DefinitionError, NeedsValue, Tensor, current, reduce
from onnxjit.runtime.plan import NO_FAULT

# A kernel may be compiled on the assumption that a symbolic size is at least as large as a constant
# of the model, when the constant is no larger than this; a guard then checks it at run time.
_ASSUMED = 8


def normal_axis(axis: int, rank: int) -> int:
    """`axis` in [0, rank); negative values count from the end."""
    if not -rank <= axis < rank:
        raise DefinitionError(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank


def normal_axes(axes: Sequence[int], rank: int) -> list[int]:
    """Sorted distinct axes in [0, rank)."""
    out = sorted(normal_axis(a, rank) for a in axes)
    if len(set(out)) != len(out):
        raise DefinitionError(f"an axis occurs twice in {list(axes)}")
    return out


def axis_list(axes: Tensor | Sequence[int] | None) -> list[int] | None:
    """The axes that an input or an attribute lists; None when omitted."""
    if axes is None:
        return None
    return axes.ints() if isinstance(axes, Tensor) else list(axes)


def size_list(x: Tensor | Sequence[int]) -> list[Expr]:
    """The elements of a shape-like input or attribute as int64 expressions over dims."""
    if isinstance(x, Tensor):
        return [as_size(v) for v in x.values()]
    return [index(v) for v in x]


_WHOLE = frozenset(("add", "sub", "mul", "neg", "min", "max", "abs", "mod", "floordiv", "div"))


def as_size(e: Expr) -> Expr:
    """An integer expression over dims, of any dtype, computed in int64 instead.

    Models narrow sizes to int32, or scale them in floating point and round. Sizes are below 2^24 in
    the latter and 2^31 in the former, so that neither loses a digit.
    """
    if isinstance(e, Const):
        return index(int(e.value))
    if e.dtype.startswith("float"):
        return cast(e, INDEX)
    if isinstance(e, Poly):
        total: Expr = index(0)
        for atoms, c in e.terms:
            term: Expr = index(c)
            for a in atoms:
                term = poly_mul(term, as_size(a))
            total = poly_add(total, term)
        return total
    if isinstance(e, Apply):
        if e.fn == "cast":
            inner = e.args[0]
            if inner.dtype.startswith("float"):
                return _rounded(inner, "trunc") or cast(e, INDEX)
            return cast(inner, INDEX) if inner.dtype == "bool" else as_size(inner)
        if e.fn in _WHOLE:
            return apply(e.fn, *(as_size(a) for a in e.args))
        if e.fn == "select":
            return apply("select", e.args[0], as_size(e.args[1]), as_size(e.args[2]))
    return cast(e, INDEX)


def _rounded(e: Expr, way: str) -> Expr | None:
    """A non-negative size times or over a constant, rounded, without floating point."""
    if isinstance(e, Apply) and e.fn in ("floor", "ceil", "round", "trunc"):
        way, e = e.fn, e.args[0]
    ratio = _ratio(e)
    if ratio is None:
        return None
    size, up, down = ratio
    total = poly_mul(size, index(up))
    if down == 1:
        return total
    if way == "ceil":
        return apply("floordiv", total + (down - 1), down)
    return None if way == "round" else apply("floordiv", total, down)


def _ratio(e: Expr) -> tuple[Expr, int, int] | None:
    """`e` as size * up / down with integers up and down, when it is one."""
    if not isinstance(e, Apply):
        return None
    if e.fn == "cast":
        inner = e.args[0]
        if inner.dtype.startswith("float"):
            return _ratio(inner)
        size = as_size(inner) if inner.dtype.startswith(("int", "uint")) else None
        return (size, 1, 1) if size is not None and is_nonneg(size) else None
    if e.fn not in ("mul", "div"):
        return None
    a, b = e.args
    if e.fn == "mul" and isinstance(a, Const):
        a, b = b, a
    known = _ratio(a)
    if known is None or not isinstance(b, Const) or not b.value > 0:
        return None
    size, up, down = known
    factor = b.value if e.fn == "mul" else 1 / b.value
    if float(b.value).is_integer() and b.value < 2**20:
        k = int(b.value)
        return (size, up * k, down) if e.fn == "mul" else (size, up, down * k)
    if (1 / factor).is_integer() and 1 / factor < 2**20:
        k = int(1 / factor)
        return (size, up, down * k) if e.fn == "mul" else (size, up * k, down)
    return None


def assume_at_least(size: Expr, k: int) -> bool:
    """Whether `size >= k` may be relied on: proved, or small enough to be guarded at run time."""
    if is_nonneg(size - k):
        return True
    if as_int(size) is not None or k > _ASSUMED:
        return False
    current().guards.append((apply("min", size, k), index(k)))
    return True


def assume_within(value: Expr, size: Expr) -> Expr:
    """`value`, relied on to be at most `size`; guarded at run time unless that is proved."""
    if not is_nonneg(size - value):
        current().guards.append((apply("min", value, size), value))
    return value


def wrap_index(i: Expr, size: Expr) -> Expr:
    """An element index that counts from the end when negative, kept inside [0, size).

    ONNX forbids indices outside; a kernel must not follow them out of the buffer.
    """
    k, n = as_int(i), as_int(size)
    if k is not None:
        if n is not None and not -n <= k < n:
            raise DefinitionError(f"index {k} into {n} elements")
        if assume_at_least(size, k + 1 if k >= 0 else -k):
            return i if k >= 0 else size + k
    i = cast(i, INDEX)
    if not is_nonneg(i):
        i = apply("select", apply("lt", i, 0), i + size, i)
    return apply("max", apply("min", i, size - 1), 0)


def expect_within(indices: Tensor, size: Expr, axis: int) -> None:
    """Makes an index of the run outside of [-size, size) an error; `axis` is for its message."""
    if not loads(indices.at(*(fresh_axis(d) for d in indices.shape))):
        return

    def worst() -> Tensor:
        def at(idx: Sequence[Expr]) -> Expr:
            i = cast(indices.at(*idx), INDEX)
            outside = apply("logical_or", apply("lt", i, -size), apply("le", size, i))
            return apply("select", outside, i, index(NO_FAULT))

        found = Tensor(indices.shape, INDEX, at)
        return reduce("max", found, range(found.rank)) if found.rank else found

    n = as_int(size)
    has = "" if n is None else f", which has {n} elements"
    current().faults.append((worst, f"an index is outside of axis {axis}{has}"))


def is_one(size: Expr) -> bool:
    """Whether a size is 1; a symbolic size has no answer at compile time."""
    n = as_int(size)
    if n is None and not is_nonneg(size - 2):
        raise NeedsValue(repr(size))
    return n == 1


def divide_exactly(e: Expr, q: Expr) -> Expr | None:
    """The polynomial e / q when it has no remainder, by division of leading terms."""
    lead_atoms, lead = next(iter(_ordered(q)))
    quotient: dict[tuple[Expr, ...], int] = {}
    rest = e
    for _ in range(len(poly_terms(e)) * 4):
        terms = poly_terms(rest)
        if not terms:
            return from_terms(quotient)
        found = None
        for atoms, c in _ordered(rest):
            left = list(atoms)
            try:
                for a in lead_atoms:
                    left.remove(a)
            except ValueError:
                continue
            if c % lead == 0:
                found = (tuple(left), c // lead)
                break
        if found is None:
            return None
        quotient[found[0]] = quotient.get(found[0], 0) + found[1]
        rest = poly_add(rest, poly_mul(from_terms({found[0]: found[1]}), q), -1)
    return None


def _ordered(e: Expr) -> list[tuple[tuple[Expr, ...], int]]:
    return sorted(poly_terms(e).items(), key=lambda t: (-len(t[0]), [repr(a) for a in t[0]]))


def quotient(sizes: Sequence[Expr], over: Sequence[Expr]) -> Expr:
    """product(sizes) // product(over), with equal factors cancelled first."""
    top, bottom = list(sizes), []
    for d in over:
        if d in top:
            top.remove(d)
        elif d is not ONE:
            bottom.append(d)
    a, b = product(top), product(bottom)
    if b is ONE:
        return a
    if as_int(b) == 0:
        return index(0)
    exact = divide_exactly(a, b)
    return exact if exact is not None else build("floordiv", (a, b))


__all__ = [
    "as_size", "assume_at_least", "assume_within", "axis_list", "divide_exactly", "is_one",
    "normal_axes", "normal_axis", "quotient", "size_list", "wrap_index",
]  # fmt: skip
