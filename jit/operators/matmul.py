"""Matrix products."""

from __future__ import annotations

import numpy as np

from onnxjit.codegen.expr import ONE, Expr, cast, index
from onnxjit.codegen.tensor import (
    NARROW,
    DefinitionError,
    Index,
    Tensor,
    broadcast_shape,
    cast_to,
    reduce_over,
    same_dim,
    transpose,
)
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw


def wide_dtype(dtype: str) -> str:
    """The dtype in which sums of `dtype` are accumulated: float32 for 16-bit floats."""
    return "float32" if dtype in NARROW else dtype


def times(a: Expr, b: Expr) -> Expr:
    """a · b in the accumulation dtype."""
    wide = wide_dtype(a.dtype)
    return cast(a, wide) * cast(b, wide)


def aligned_batch(x: Tensor, batch: Index, tail: Index) -> Expr:
    """`x` at broadcast batch indices followed by `tail`."""
    own = x.shape[: x.rank - len(tail)]
    idx = batch[len(batch) - len(own) :] if own else ()
    return x.at(*(index(0) if d is ONE else i for d, i in zip(own, idx, strict=True)), *tail)


def product_of(a: Tensor, b: Tensor) -> Tensor:
    """NumPy's `matmul` as one stage in the accumulation dtype: 1-D operands, broadcast batches."""
    if a.rank == 0 or b.rank == 0:
        raise DefinitionError("a matrix product needs operands of rank 1 or more")
    k = same_dim(a.shape[-1], b.shape[-2] if b.rank > 1 else b.shape[0])
    batch = broadcast_shape(a.shape[:-2], b.shape[:-2])
    rows = a.shape[-2:-1]
    columns = b.shape[-1:] if b.rank > 1 else ()

    def body(i: Index, r: Index) -> Expr:
        lead, row = i[: len(batch)], i[len(batch) : len(batch) + len(rows)]
        column = i[len(batch) + len(rows) :]
        left = aligned_batch(a, lead, (*row, r[0]))
        right = aligned_batch(b, lead, (r[0], *column))
        return times(left, right)

    return reduce_over("sum", (*batch, *rows, *columns), (k,), body)


@operator(
    "MatMul",
    since=1,
    cases=[
        Case(draw("float32[5,7]", "float32[7,6]"), label="2d"),
        Case(draw("float32[2,1,5,7]", "float32[3,7,4]"), label="broadcast batch"),
        Case(draw("float32[7]", "float32[3,7,4]"), label="vector left"),
        Case(draw("float32[3,4,7]", "float32[7]"), label="vector right"),
        Case(draw("float32[7]", "float32[7]"), label="dot"),
        Case(draw("float16[4,33]", "float16[33,5]"), label="half"),
        Case(lambda: tuple(np.arange(12).reshape(s) for s in ((3, 4), (4, 3))), label="int64"),
        Case(draw("float32[512,512]", "float32[512,512]"), bench=True, label="512"),
        Case(draw("float32[128,768]", "float32[768,3072]"), bench=True, label="transformer"),
    ],
)
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """numpy.matmul; 16-bit floats are accumulated in float32 and rounded once."""
    return cast_to(product_of(a, b), a.dtype)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x · factor; an integer tensor and a fractional factor are multiplied in float64."""
    if factor == 1.0:
        return x
    if x.dtype.startswith(("int", "uint")):
        if factor == int(factor):
            return x * int(factor)
        return cast_to(cast_to(x, "float64") * factor, x.dtype)
    return x * factor


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha · op(A) op(B) + beta · C, with C broadcast to the result."""
    if a.rank != 2 or b.rank != 2:
        raise DefinitionError("Gemm needs two matrices")
    left = transpose(a, (1, 0)) if transA else a
    right = transpose(b, (1, 0)) if transB else b
    out = scaled(product_of(left, right), alpha)
    if c is not None and beta != 0.0:
        bias = cast_to(c, out.dtype)
        shape = broadcast_shape(out.shape, bias.shape)
        if len(shape) > 2 or any(
            d is ONE and s is not d for s, d in zip(shape, out.shape, strict=False)
        ):
            raise DefinitionError("Gemm's C must broadcast to the product")
        out = out + scaled(bias, beta)
    return cast_to(out, a.dtype)


operator(
    "Gemm",
    since=7,
    cases=[
        Case(draw("float32[5,7]", "float32[7,6]", "float32[6]"), label="row bias"),
        Case(
            draw("float32[7,5]", "float32[6,7]", "float32[5,1]"),
            {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 0.25},
            label="transposed",
        ),
        Case(draw("float32[5,7]", "float32[7,6]"), label="no bias"),
        Case(draw("float16[5,7]", "float16[7,6]", "float16[5,6]"), {"beta": 2.0}, label="half"),
        Case(lambda: tuple(np.ones(s, "int32") for s in ((3, 4), (4, 2), (2,))), label="int32"),
        Case(
            draw("float32[64,1024]", "float32[1000,1024]", "float32[1000]"),
            {"transB": 1},
            bench=True,
            label="classifier",
        ),
    ],
)(gemm)


@operator("Gemm", since=1, until=6)
def gemm_1(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    broadcast: int = 0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Gemm where C is required and broadcasts only when asked."""
    if not broadcast and c.rank != 2:
        raise DefinitionError("Gemm's C must have the shape of the product")
    return gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
