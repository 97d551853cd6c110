"""Axis analysis shared by the schedules: flat offsets, strides, splitting and merging of axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    ZERO,
    Apply,
    Axis,
    Dim,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    as_int,
    fresh_axis,
    leaves,
    loads,
    map_loads,
    poly_add,
    poly_mul,
    poly_terms,
    substitute,
    walk,
)
from onnxjit.codegen.expr import from_terms as _from_terms
from onnxjit.codegen.kernel import Stage, TensorType, rename_axes
from onnxjit.codegen.layout import Layout, strides


def flat_offset(
    idx: Sequence[Expr], t: TensorType, layout: Layout | None = None, clamp: bool = True
) -> Expr:
    """Physical element offset of a logical index.

    An index that comes from data is clamped to the axis, so that no input can make a kernel read
    outside its buffers.
    """
    total: Expr = ZERO
    for i, s, d in zip(idx, strides(t, layout), t.shape, strict=True):
        if d is ONE:
            continue
        if clamp and any(isinstance(x, Load) for x in walk(i)):
            i = apply("max", apply("min", i, d - 1), 0)
        total = poly_add(total, poly_mul(i, s))
    return total


def flatten_loads(e: Expr, types: Mapping[str, TensorType], layouts: Mapping[str, Layout]) -> Expr:
    """Every load of `e` with a flat physical offset."""

    def flat(x: Load) -> Expr:
        t = types[x.buffer]
        return Load(x.buffer, (flat_offset(x.index, t, layouts.get(x.buffer)),), x.dtype)

    return map_loads(e, flat)


@dataclass(frozen=True, slots=True)
class FlatStage:
    """A stage with flat loads and a flat store offset."""

    buffer: str
    axes: tuple[Axis, ...]
    offset: Expr
    value: Expr


def flatten_stage(
    s: Stage, types: Mapping[str, TensorType], layouts: Mapping[str, Layout]
) -> FlatStage:
    axes = tuple(a for a in s.axes if a.extent is not ONE)
    gone: dict[Expr, Expr] = {a: ZERO for a in s.axes if a.extent is ONE}
    t = types[s.buffer]
    where = flat_offset(s.store, t, layouts.get(s.buffer), clamp=False)
    value = flatten_loads(s.value, types, layouts)
    return FlatStage(s.buffer, axes, substitute(where, gone), substitute(drop_unit(value), gone))


def drop_unit(e: Expr) -> Expr:
    """Removes reduced axes of extent 1."""
    from onnxjit.codegen.expr import rewrite

    def fix(x: Expr) -> Expr | None:
        if isinstance(x, Reduce) and any(a.extent is ONE for a in x.axes):
            keep = tuple(a for a in x.axes if a.extent is not ONE)
            body = substitute(x.body, {a: ZERO for a in x.axes if a.extent is ONE})
            return Reduce(x.fn, keep, body) if keep else body
        return None

    return rewrite(e, fix)


def coefficient(e: Expr, a: Axis | Var) -> Expr | None:
    """The factor of `a` in `e` when `e` is affine in it, else None."""
    out: dict[tuple[Expr, ...], int] = {}
    for atoms, c in poly_terms(e).items():
        n = atoms.count(a)
        if n == 0:
            if any(a in leaves(x) for x in atoms):
                return None
            continue
        rest = list(atoms)
        rest.remove(a)
        if n > 1 or any(a in leaves(x) for x in rest):
            return None
        key = tuple(rest)
        out[key] = out.get(key, 0) + c
    return _from_terms(out)


def without(e: Expr, axes: Sequence[Axis]) -> Expr:
    """`e` with the given axes at zero."""
    return substitute(e, {a: ZERO for a in axes})


def offsets_of(s: FlatStage) -> list[Expr]:
    """All flat offsets of a stage: the store's first, then every load's."""
    return [s.offset, *(x.index[0] for x in loads(s.value))]


# --- splitting ---------------------------------------------------------------------------------


def split_axes(s: FlatStage) -> FlatStage:
    """Splits every axis that is divided by a factor of its extent, so that offsets become affine.

    `a // c` and `a % c` appear where a reshape was fused; with a = c * outer + inner both vanish.
    """
    for _ in range(16):
        found = _find_split(s)
        if found is None:
            return s
        a, c = found
        inner, outer = fresh_axis(c), fresh_axis(a.extent // c)
        table: dict[Expr, Expr] = {a: outer * c + inner}
        if a in s.axes:
            k = s.axes.index(a)
            axes = (*s.axes[:k], outer, inner, *s.axes[k + 1 :])
            value = substitute(s.value, table)
            s = FlatStage(s.buffer, axes, substitute(s.offset, table), value)
        else:
            s = replace(s, value=_split_reduced(s.value, a, outer, inner, table))
        s = _drop_unit_axes(s)
    return s


def _drop_unit_axes(s: FlatStage) -> FlatStage:
    gone: dict[Expr, Expr] = {a: ZERO for a in s.axes if a.extent is ONE}
    if not gone:
        return s
    axes = tuple(a for a in s.axes if a.extent is not ONE)
    return FlatStage(s.buffer, axes, substitute(s.offset, gone), substitute(s.value, gone))


def _split_reduced(e: Expr, a: Axis, outer: Axis, inner: Axis, table: dict[Expr, Expr]) -> Expr:
    from onnxjit.codegen.expr import rebuild

    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if x in memo:
            return memo[x]
        if isinstance(x, Reduce) and a in x.axes:
            k = x.axes.index(a)
            axes = (*x.axes[:k], outer, inner, *x.axes[k + 1 :])
            y: Expr = Reduce(x.fn, axes, substitute(x.body, table))
        else:
            y = rebuild(x, go)
        memo[x] = y
        return y

    return go(e)


def _find_split(s: FlatStage) -> tuple[Axis, Expr] | None:
    bound = {a for x in walk(s.value) if isinstance(x, Reduce) for a in x.axes}
    best: tuple[Axis, Expr] | None = None
    for e in (s.offset, s.value):
        for x in walk(e):
            if not (isinstance(x, Apply) and x.dtype == INDEX and x.fn in ("floordiv", "mod")):
                continue
            a, c = x.args
            if not isinstance(a, Axis) or (a not in s.axes and a not in bound):
                continue
            if apply("mod", a.extent, c) is not ZERO or a.extent is c:
                continue
            if best is None or (as_int(c) or 0) < (as_int(best[1]) or 0):
                best = (a, c)
    return best


# --- merging and ordering ----------------------------------------------------------------------


def magnitude(e: Expr) -> float:
    """A number for comparing strides; every symbolic dim counts as a typical size."""
    total = 0.0
    for atoms, c in poly_terms(e).items():
        total += abs(c) * 61.0 ** len(atoms)
    return total


def by_stride(axes: Sequence[Axis], offset: Expr) -> list[Axis]:
    """Axes ordered from the largest stride in `offset` to the smallest."""

    def key(a: Axis) -> float:
        c = coefficient(offset, a)
        return -magnitude(c) if c is not None else 0.0

    return sorted(axes, key=key)


def used_outside_offsets(s: FlatStage, a: Axis) -> bool:
    """Whether the axis occurs in the value other than inside load offsets."""
    e = map_loads(s.value, lambda x: Load(x.buffer, (ZERO,), x.dtype))
    return a in leaves(e)


def merge_axes(s: FlatStage, order: Sequence[Axis]) -> tuple[FlatStage, list[Axis]]:
    """Joins neighbouring axes of a stage that every access walks as one longer axis."""
    out = list(order)
    k = len(out) - 2
    while k >= 0:
        a, b = out[k], out[k + 1]
        if _mergeable(s, a, b):
            joined = fresh_axis(poly_mul(a.extent, b.extent))
            table: dict[Expr, Expr] = {a: ZERO, b: joined}
            s = FlatStage(
                s.buffer,
                tuple(joined if x is b else x for x in s.axes if x is not a),
                substitute(s.offset, table),
                substitute(s.value, table),
            )
            out[k : k + 2] = [joined]
            k = min(k, len(out) - 2)
        else:
            k -= 1
    return s, out


def join_loops(order: Sequence[Axis], offset: Expr, value: Expr) -> tuple[list[Axis], Expr, Expr]:
    """`merge_axes` for loops that have their names: a joined one has that of the inner."""
    out = list(order)
    for k in reversed(range(len(out) - 1)):
        a, b = out[k], out[k + 1]
        if _mergeable(FlatStage("", (), offset, value), a, b):
            joined = Axis(b.name, poly_mul(a.extent, b.extent))
            table: dict[Expr, Expr] = {a: ZERO, b: joined}
            offset, value = substitute(offset, table), substitute(value, table)
            out[k : k + 2] = [joined]
    return out, offset, value


def _mergeable(s: FlatStage, a: Axis, b: Axis) -> bool:
    for e in offsets_of(s):
        ca, cb = coefficient(e, a), coefficient(e, b)
        if ca is None or cb is None or ca is not poly_mul(cb, b.extent):
            return False
    return not used_outside_offsets(s, a) and not used_outside_offsets(s, b)


def canonical(
    names: Sequence[Axis], exprs: Sequence[Expr], prefix: str = "i"
) -> tuple[list[Axis], list[Expr]]:
    """Renames axes to i0, i1, … so that equal kernels have equal text."""
    new = [Axis(f"{prefix}{k}", a.extent) for k, a in enumerate(names)]
    table: dict[Expr, Expr] = dict(zip(names, new, strict=True))
    return new, [rename_axes(e, table) for e in exprs]


def typical(e: Expr, guess: int = 64) -> int:
    """A representative integer for a size: constants as they are, each symbolic dim `guess`."""
    total = 0
    for atoms, c in poly_terms(e).items():
        term = c
        for x in atoms:
            term *= guess if isinstance(x, Dim) else max(1, guess // 2)
        total += term
    return max(total, 0)


def ceil_div(a: Expr, b: Expr | int) -> Expr:
    """a / b rounded up."""
    return apply("floordiv", a + b - 1, b)


__all__ = [
    "FlatStage", "Layout", "by_stride", "canonical", "ceil_div", "coefficient", "flat_offset",
    "flatten_loads", "flatten_stage", "join_loops", "magnitude", "merge_axes", "split_axes",
    "strides", "typical", "without",
]  # fmt: skip
