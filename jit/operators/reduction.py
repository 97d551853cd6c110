"""Reductions over axes, searches for extrema, and running sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxjit.codegen import tensor as T
from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    Const,
    Expr,
    Reduce,
    apply,
    as_int,
    cast,
    fresh_axis,
    index,
)
from onnxjit.codegen.kernel import product
from onnxjit.codegen.tensor import NARROW, DefinitionError, Tensor, cast_to, elementwise
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, draw
from onnxjit.operators.sizes import axis_list, normal_axes, normal_axis

Index = tuple[Expr, ...]

# A reduction gets the tensor, the axes and keepdims; its result has the tensor's dtype again.
Reducer = Callable[[Tensor, list[int], bool], Tensor]


def _is_float(dtype: str) -> bool:
    return dtype.startswith("float") or dtype in NARROW


def _wide(x: Tensor, real: bool = False) -> Tensor:
    """`x` in the dtype that reductions compute in; float64 for integers when `real`."""
    if x.dtype in NARROW:
        return cast_to(x, "float32")
    return cast_to(x, "float64") if real and not _is_float(x.dtype) else x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return T.reduce("sum", _wide(x), axes, keep)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    total = _sum(x, axes, keep)
    count = cast(product(x.shape[a] for a in axes), total.dtype)
    return elementwise(lambda v: apply("div", v, count), total)


def _extreme(fn: str) -> Reducer:
    def reducer(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype == "bool":
            return T.reduce("any" if fn == "max" else "all", x, axes, keep)
        return T.reduce(fn, x, axes, keep)

    return reducer


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return T.reduce("prod", _wide(x), axes, keep)


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return T.reduce("sum", elementwise("abs", _wide(x)), axes, keep)


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    w = _wide(x)
    return T.reduce("sum", elementwise(lambda v: v * v, w), axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return elementwise("sqrt", _sum_square(_wide(x, real=True), axes, keep))


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return elementwise("log", _sum(_wide(x, real=True), axes, keep))


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """log(sum(exp(x - m))) + m with the maximum m, or 0 where that is infinite."""
    w = _wide(x, real=True)
    top = T.reduce("max", w, axes, keepdims=True)
    shift = T.materialize(
        elementwise(lambda m: apply("select", apply("isinf", m), Const(0, m.dtype), m), top)
    )
    total = T.reduce("sum", elementwise(lambda v, m: apply("exp", v - m), w, shift), axes, True)
    out = elementwise(lambda s, m: apply("log", s) + m, total, shift)
    return out if keep else _drop(out, axes)


def _drop(x: Tensor, axes: list[int]) -> Tensor:
    """`x` without axes of size 1."""
    kept = [k for k in range(x.rank) if k not in axes]

    def at(idx: Index) -> Expr:
        full: list[Expr] = [index(0)] * x.rank
        for k, i in zip(kept, idx, strict=True):
            full[k] = i
        return x.at(*full)

    return Tensor([x.shape[k] for k in kept], x.dtype, at)


def _reduced(reducer: Reducer, x: Tensor, axes: list[int] | None, keep: int, noop: int) -> Tensor:
    if not axes:
        axes = [] if noop else list(range(x.rank))
    return cast_to(reducer(x, normal_axes(axes, x.rank), bool(keep)), x.dtype)


def _register(
    name: str, reducer: Reducer, *dtypes: str, input_axes: int = 18, empty: bool = True, **ends: Any
) -> None:
    """A reduction with its axes as an attribute, and since version `input_axes` as an input."""

    def make(*specs: Any, **attrs: Any) -> Case:
        return Case(draw(*specs, **ends), attrs)

    @operator(name, since=1, until=input_axes - 1, cases=[
        make("float32[3,5,7]", axes=[1]), make("float32[3,5,7]", axes=[-1, 0], keepdims=0),
        make("float32[3,5]"),
    ])  # fmt: skip
    def old(x: Tensor, *, axes: Sequence[int] | None = None, keepdims: int = 1) -> Tensor:
        return _reduced(reducer, x, axis_list(axes), keepdims, 0)

    cases = [make(f"{d}[3,5,7]", [1]) for d in dtypes]
    cases += [
        make("float32[3,5,7]", [-1, 0], keepdims=0),
        make("float32[3,5,7]", [0, 1, 2], keepdims=0),
        make("float32[3,5]"),
        make("float32[3,5]", noop_with_empty_axes=1),
        make("float32[3,5]", np.zeros(0, np.int64), keepdims=0),
        make("float32[1,7]", [0]),
        make("float32[0,7]", [1]),
        Case(draw("float32[128,768]", [1], **ends), bench=True, label="rows"),
        Case(draw("float32[64,56,56]", [1, 2], **ends), bench=True, label="planes"),
    ]
    if empty:
        cases.append(make("float32[3,0,7]", [1]))

    @operator(name, since=input_axes, cases=cases)
    def define(
        x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        return _reduced(reducer, x, axis_list(axes), keepdims, noop_with_empty_axes)


_SOME = (*FLOATS, "int32", "int64", "uint32", "uint64")

_register("ReduceSum", _sum, *_SOME, input_axes=13)
_register("ReduceMean", _mean, *_SOME, empty=False)
_register("ReduceMax", _extreme("max"), *_SOME, "int8", "uint8", "bool")
_register("ReduceMin", _extreme("min"), *_SOME, "int8", "uint8", "bool")
_register("ReduceProd", _prod, *_SOME)
_register("ReduceL1", _l1, *_SOME)
_register("ReduceL2", _l2, *_SOME)
_register("ReduceSumSquare", _sum_square, *_SOME)
_register("ReduceLogSum", _log_sum, *FLOATS, low=0.5)
_register("ReduceLogSumExp", _log_sum_exp, *FLOATS)


# --- positions of extrema ----------------------------------------------------------------------


def arg_extreme(fn: str, x: Tensor, axis: int, last: bool) -> Tensor:
    """The first or last position of the largest (smallest) element; the axis keeps size 1.

    A NaN counts as the extremum, as NumPy has it. Positions have 32 bits where the axis is known to
    be short enough, so that a vector has as many of them as of elements.
    """
    axis = normal_axis(axis, x.rank)
    if as_int(x.shape[axis]) == 0:
        raise DefinitionError("the extremum of no elements")
    w = _wide(x)
    best = T.reduce(fn, w, [axis], keepdims=True)
    n = w.shape[axis]
    length = as_int(n)
    narrow = "int32" if length is not None and length < 2**31 else INDEX
    none = cast(index(-1) if last else n, narrow)

    def body(idx: Index, red: Index) -> Expr:
        place = [*idx[:axis], red[0], *idx[axis:]]
        v, b = w.at(*place), best.at(*place[:axis], 0, *place[axis + 1 :])
        hit = apply("eq", v, b)
        if _is_float(w.dtype):
            hit = apply("logical_or", hit, apply("isnan", v))
        return apply("select", hit, cast(red[0], narrow), none)

    rows = [d for k, d in enumerate(x.shape) if k != axis]
    found = T.reduce_over("max" if last else "min", rows, [n], body)
    shape = [ONE if k == axis else d for k, d in enumerate(x.shape)]
    return Tensor(shape, narrow, lambda i: found.at(*i[:axis], *i[axis + 1 :]))


def _register_arg(name: str, fn: str) -> None:
    cases = [Case(draw(f"{d}[3,5,7]"), {"axis": 1}) for d in (*FLOATS, "int8", "uint64")]
    cases += [
        Case(draw("int32[3,5,7]"), {"axis": -1, "keepdims": 0, "select_last_index": 1}),
        Case(draw("float32[3,5]")),
        Case(draw("float32[1,5]")),
        Case(draw("float32[3,0]")),
        Case(draw("float32[1,50257]"), {"axis": -1}, bench=True, label="vocabulary"),
    ]

    @operator(name, since=1, cases=cases)
    def define(
        x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
    ) -> Tensor:
        out = cast_to(arg_extreme(fn, x, axis, bool(select_last_index)), INDEX)
        return out if keepdims else _drop(out, [normal_axis(axis, x.rank)])


_register_arg("ArgMax", "max")
_register_arg("ArgMin", "min")


# --- running sums ------------------------------------------------------------------------------

_BLOCK = 64


def running(fn: str, x: Tensor, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    """`fn` ("sum" or "prod") of all elements up to each position of an axis.

    An element combines its own block up to itself with the results of all blocks before: for n
    elements in blocks of b, b + n/b steps instead of n.
    """
    w = _wide(x)
    n = w.shape[axis]
    neutral = T.reduce_identity(fn, w.dtype)
    small = as_int(n) is not None and (as_int(n) or 0) <= 4 * _BLOCK
    block = n if small else index(_BLOCK)
    last = apply("max", n - 1, 0)

    def read(idx: Index, i: Expr) -> Expr:
        """Element i of the row in its direction; inside the row whatever i is."""
        i = apply("max", apply("min", i, last), 0)
        return w.at(*idx[:axis], last - i if reverse else i, *idx[axis + 1 :])

    def guarded(keep: Expr, idx: Index, i: Expr) -> Expr:
        return apply("select", keep, read(idx, i), neutral)

    count = apply("floordiv", n + (_BLOCK - 1), _BLOCK)
    if not small:
        shape = [*w.shape[:axis], count, *w.shape[axis + 1 :]]

        def whole(idx: Index, red: Index) -> Expr:
            i = idx[axis] * block + red[0]
            return guarded(apply("lt", i, n), idx, i)

        blocks = T.reduce_over(fn, shape, [block], whole)

    order = "lt" if exclusive else "le"

    def at(idx: Index) -> Expr:
        i = last - idx[axis] if reverse else idx[axis]
        start = index(0) if small else apply("floordiv", i, block) * block
        r = fresh_axis(block, "r")
        own: Expr = Reduce(fn, (r,), guarded(apply(order, start + r, i), idx, start + r))
        if small:
            return own
        b = fresh_axis(count, "r")
        before = apply("lt", b, apply("floordiv", i, block))
        other = blocks.at(*idx[:axis], b, *idx[axis + 1 :])
        rest = Reduce(fn, (b,), apply("select", before, other, neutral))
        return own + rest if fn == "sum" else own * rest

    return cast_to(T.materialize(Tensor(w.shape, w.dtype, at)), x.dtype)


def _register_running(name: str, fn: str, since: int) -> None:
    def make(*specs: Any, **attrs: Any) -> Case:
        return Case(draw(*specs, low=-1.0, high=2.0), attrs)

    cases = [make(f"{d}[3,5]", np.array(1)) for d in (*FLOATS, "int32", "int64")]
    cases += [
        make("float32[5,3]", np.array(0), exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)
    ]
    cases += [
        make("float32[2,293]", np.array([-1], np.int32), reverse=r, exclusive=r) for r in (0, 1)
    ]
    cases.append(make("float32[0,3]", np.array(0)))
    cases.append(Case(draw("float32[8,2048]", np.array(1)), bench=True, label="sequence"))

    @operator(name, since=since, cases=cases)
    def define(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        place = normal_axis(axis.ints()[0], x.rank)
        return running(fn, x, place, bool(exclusive), bool(reverse))


_register_running("CumSum", "sum", 11)
_register_running("CumProd", "prod", 26)

__all__ = ["arg_extreme", "running"]
