"""Softmax, its logarithm, and the one-hot maximum."""

from __future__ import annotations

from collections.abc import Callable

from onnxjit.codegen import tensor as T
from onnxjit.codegen.expr import ONE, Expr, apply, cast
from onnxjit.codegen.kernel import product
from onnxjit.codegen.tensor import NARROW, DefinitionError, Tensor, cast_to, elementwise
from onnxjit.operators.reduction import arg_extreme
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, draw
from onnxjit.operators.sizes import normal_axis

# The result of a row function has the shape and dtype of the tensor; rows run along `axes`.
Row = Callable[[Tensor, list[int]], Tensor]


def softmax_of(x: Tensor, axes: list[int]) -> Tensor:
    """exp(x - max) / sum of the same over axes; each exponential is computed once."""
    w = cast_to(x, "float32") if x.dtype in NARROW else x
    top = T.reduce("max", w, axes, keepdims=True)
    e = T.materialize(elementwise(lambda v, m: apply("exp", v - m), w, top))
    total = T.reduce("sum", e, axes, keepdims=True)
    return cast_to(e / total, x.dtype)


def log_softmax_of(x: Tensor, axes: list[int]) -> Tensor:
    """x - max - log(sum(exp(x - max))) over axes."""
    w = cast_to(x, "float32") if x.dtype in NARROW else x
    top = T.reduce("max", w, axes, keepdims=True)
    total = T.reduce("sum", elementwise(lambda v, m: apply("exp", v - m), w, top), axes, True)
    return cast_to(elementwise(lambda v, m, s: v - m - apply("log", s), w, top, total), x.dtype)


def hardmax_of(x: Tensor, axes: list[int]) -> Tensor:
    """1 at the first maximum over axes (in row-major order), else 0."""
    if len(axes) > 1:
        if axes[-1] != x.rank - 1:
            raise DefinitionError("Hardmax: axes in the middle of the shape")
        matrix = T.reshape(x, [*x.shape[: axes[0]], product(x.shape[axes[0] :])])
        return T.reshape(hardmax_of(matrix, [axes[0]]), x.shape)
    (axis,) = axes
    best = arg_extreme("max", x, axis, last=False)

    def at(idx: tuple[Expr, ...]) -> Expr:
        place = best.at(*idx[:axis], 0, *idx[axis + 1 :])
        return cast(apply("eq", cast(idx[axis], best.dtype), place), x.dtype)

    return Tensor(x.shape, x.dtype, at)


def _register(name: str, row: Row, *dtypes: str) -> None:
    """A function of rows: since version 13 along one axis; before, of the matrix that the axes
    before `axis` and those from it on make."""

    @operator(name, since=1, until=12, cases=[
        Case(draw("float32[2,3,5]")), Case(draw("float32[2,3,5]"), {"axis": 2}),
        Case(draw("float32[2,3]"), {"axis": 0}), Case(draw("float32[2,7,1,1]")),
    ])  # fmt: skip
    def flat(x: Tensor, *, axis: int = 1) -> Tensor:
        first = normal_axis(axis, x.rank)
        axes = [k for k in range(first, x.rank) if x.shape[k] is not ONE]
        return row(x, axes if axes == [first] else list(range(first, x.rank)))

    @operator(name, since=13, cases=[
        *(Case(draw(f"{d}[3,5]")) for d in dtypes),
        Case(draw("float32[2,3,5]"), {"axis": 1}), Case(draw("float32[2,3,5]"), {"axis": 0}),
        Case(draw("float32[0,5]")), Case(draw("float32[7,1]")),
        Case(draw("float32[12,128,128]"), bench=True, label="attention"),
        Case(draw("float32[1,50257]"), bench=True, label="vocabulary"),
        Case(draw("float32[40,6625]"), bench=True, label="characters"),
    ])  # fmt: skip
    def define(x: Tensor, *, axis: int = -1) -> Tensor:
        return row(x, [normal_axis(axis, x.rank)])


_register("Softmax", softmax_of, *FLOATS)
_register("LogSoftmax", log_softmax_of, *FLOATS)
_register("Hardmax", hardmax_of, *FLOATS)

__all__ = ["hardmax_of", "log_softmax_of", "softmax_of"]
