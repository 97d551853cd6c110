"""Classification losses."""

from __future__ import annotations

import numpy as np

from onnxjit.codegen.expr import FALSE, Const, Expr, apply, cast, index
from onnxjit.codegen.kernel import product
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    cast_to,
    elementwise,
    materialize,
    reduce,
)
from onnxjit.operators.matmul import wide_dtype
from onnxjit.operators.norm import keep
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw


def nll(
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    reduction: str,
) -> Tensor:
    """Minus the weighted log-probability of the target class; `log_prob` is [N, C, d...]."""
    dtype = log_prob.dtype

    def chosen(idx: Index) -> tuple[Expr, Expr]:
        """The class, and whether it is ignored."""
        t = cast(target.at(*idx), "int64")
        ignored: Expr = FALSE
        if ignore_index is not None:
            ignored = apply("eq", t, index(ignore_index))
        return apply("select", ignored, index(0), t), ignored

    def weigh(idx: Index) -> Expr:
        t, ignored = chosen(idx)
        w = Const(1.0, dtype) if weight is None else cast(weight.at(t), dtype)
        return apply("select", ignored, 0.0, w)

    def loss(idx: Index) -> Expr:
        t, ignored = chosen(idx)
        value = -log_prob.at(idx[0], t, *idx[1:])
        if weight is not None:
            value = value * cast(weight.at(t), dtype)
        return apply("select", ignored, 0.0, value)

    each = Tensor(target.shape, dtype, loss)
    if reduction == "none":
        return each
    axes = range(each.rank)
    total = reduce("sum", each, axes)
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise DefinitionError(f"unknown reduction {reduction!r}")
    if weight is None and ignore_index is None:
        count = cast(product(target.shape), dtype)
        return elementwise(lambda v: apply("div", v, count), total)
    return total / reduce("sum", Tensor(target.shape, dtype, weigh), axes)


_TARGET = np.array([[0, 2, 1, 3], [3, 3, 0, 1]], "int64")


def _cases() -> list[Case]:
    scores, weight = "float32[2,4,4]", "float32[4]"
    return [
        *(
            Case(draw(scores, _TARGET, weight, low=-3.0, high=-0.1), {"reduction": r}, label=r)
            for r in ("none", "sum", "mean")
        ),
        Case(draw(scores, _TARGET), {"ignore_index": 3}, label="ignored"),
        Case(draw("float32[3,4]", np.array([1, 0, 3])), label="vector"),
    ]


@operator("NegativeLogLikelihoodLoss", since=12, cases=_cases())
def negative_log_likelihood_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of given log-probabilities."""
    data = cast_to(x, wide_dtype(x.dtype))
    return cast_to(nll(data, target, weight, ignore_index, reduction), x.dtype)


@operator("SoftmaxCrossEntropyLoss", since=12, cases=_cases())
def softmax_cross_entropy_loss(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    outputs: int = 1,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of scores, and as second output their log-probabilities over axis 1."""
    data = cast_to(scores, wide_dtype(scores.dtype))
    top = keep(reduce("max", data, [1]), [1], data.rank)
    centred = data - top
    total = reduce("sum", elementwise("exp", centred), [1])
    norm = keep(materialize(elementwise("log", total)), [1], data.rank)
    log_prob = centred - norm
    loss = nll(log_prob, target, weight, ignore_index, reduction)
    loss = cast_to(loss, scores.dtype)
    return loss if outputs < 2 else (loss, cast_to(log_prob, scores.dtype))
