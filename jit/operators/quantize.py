"""Linear quantization: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxjit.codegen.expr import ONE, Const, Expr, apply, cast, index
from onnxjit.codegen.tensor import (
    NARROW,
    DefinitionError,
    Tensor,
    aligned,
    broadcast_shape,
    cast_to,
    compute,
    elementwise,
    materialize,
    reduce,
    same_dim,
)
from onnxjit.operators.norm import axis_number
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.tensors import dtype_name

RANGES = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
    "uint4": (0, 15),
    "int4": (-8, 7),
    "uint2": (0, 3),
    "int2": (-2, 1),
}
LARGEST = {
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2": 57344.0,
    "float8_e5m2fnuz": 57344.0,
    "float4_e2m1fn": 6.0,
    "float6_e2m3fn": 7.5,
    "float6_e3m2fn": 28.0,
}
_WORKING = ("float32", "float16", "bfloat16")


def requantized(v: Expr, zero: Expr | None, dtype: str) -> Expr:
    """round-half-even(v) + zero, saturated to an integer dtype."""
    low, high = RANGES[dtype]
    total = apply("round", v)
    if zero is not None:
        total = total + cast(zero, v.dtype)
    return cast(apply("min", apply("max", total, low), high), dtype)


def spread(s: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point seen with the shape of `x`: per tensor, per axis or per block."""
    if s.rank == 0:
        return s
    if s.rank == 1 and s.shape[0] is ONE:
        return Tensor((), s.dtype, lambda _: s.at(0))
    k = axis_number(axis, x.rank)
    if s.rank == 1 and not block_size:
        same_dim(s.shape[0], x.shape[k])
        return compute(
            (*[1] * k, x.shape[k], *[1] * (x.rank - k - 1)), s.dtype, lambda *i: s.at(i[k])
        )
    if s.rank != x.rank or block_size < 1:
        raise DefinitionError("a blocked scale needs the rank of the data and a block_size")

    def at(*idx: Expr) -> Expr:
        return s.at(*idx[:k], apply("floordiv", idx[k], index(block_size)), *idx[k + 1 :])

    return compute(x.shape, s.dtype, at)


def each(fn: Callable[..., Expr], dtype: str, *args: Tensor) -> Tensor:
    """`elementwise` without its widening of 16-bit floats, which `fn` does itself."""
    shape = broadcast_shape(*(t.shape for t in args))
    return Tensor(shape, dtype, lambda idx: fn(*(aligned(t, idx) for t in args)))


_SCALES = np.array([0.5, 2.0, 1.5], "float32")


@operator(
    "QuantizeLinear",
    since=10,
    cases=[
        Case(
            draw("float32[3,5]", np.array(0.02, "float32"), np.array(128, "uint8")),
            label="uint8",
        ),
        Case(draw("float32[3,5]", np.array(0.02, "float32"), np.array(-3, "int8")), label="int8"),
        Case(
            draw("float32[2,3,5]", _SCALES, np.array([1, 2, 3], "uint8"), low=-200.0, high=300.0),
            {"axis": 1},
            label="per axis",
        ),
        Case(draw("float32[3,5]", np.array(0.1, "float32")), label="no zero point"),
        Case(
            draw("float32[3,6]", "float32[3,2]", np.zeros((3, 2), "int8"), low=0.1, high=4.0),
            {"axis": 1, "block_size": 3},
            label="blocked",
        ),
        Case(
            draw("float32[1,64,56,56]", np.array(0.02, "float32"), np.array(128, "uint8")),
            bench=True,
            label="activation",
        ),
    ],
)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """saturate(round(x / scale) + zero); the quotient is rounded to the scale's dtype."""
    dtype = zero.dtype if zero is not None else dtype_name(output_dtype) or "uint8"
    division = dtype_name(precision) or scale.dtype
    if division not in _WORKING:
        division = "float32"
    factor = spread(scale, x, axis, block_size)
    offset = spread(zero, x, axis, block_size) if zero is not None else None

    def quotient(v: Expr, s: Expr) -> Expr:
        a, b = (cast(cast(t, division), "float32") for t in (v, s))
        q = apply("div", a, b)
        return cast(cast(q, division), "float32") if division in NARROW else q

    scaled = each(quotient, "float32", x, factor)
    if dtype in RANGES:
        args = (scaled,) if offset is None else (scaled, offset)
        return each(lambda v, z=None: requantized(v, z, dtype), dtype, *args)
    if dtype not in LARGEST:
        raise DefinitionError(f"QuantizeLinear cannot produce {dtype}")
    if offset is not None and not dtype.startswith("float8"):
        scaled = each(lambda v, z: v + cast(z, "float32"), "float32", scaled, offset)
    top = LARGEST[dtype]
    if saturate or not dtype.startswith("float8"):
        scaled = elementwise(lambda v: apply("min", apply("max", v, -top), top), scaled)
    return cast_to(scaled, dtype)


@operator(
    "DequantizeLinear",
    since=10,
    cases=[
        Case(draw("uint8[3,5]", np.array(0.02, "float32"), np.array(2, "uint8")), label="uint8"),
        Case(
            draw("int8[2,3,5]", _SCALES, np.array([1, 0, 2], "int8")), {"axis": 1}, label="per axis"
        ),
        Case(draw("int32[3,5]", np.array(0.02, "float32")), label="int32"),
        Case(
            draw("int8[3,6]", "float32[3,2]", np.ones((3, 2), "int8")),
            {"axis": 1, "block_size": 3},
            label="blocked",
        ),
        Case(
            draw("int8[4096,4096]", "float32[4096,128]"),
            {"axis": 1, "block_size": 32},
            bench=True,
            label="weights in blocks",
        ),
    ],
)
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """(x - zero) · scale."""
    dtype = dtype_name(output_dtype) or scale.dtype
    middle = "int32" if x.dtype in RANGES or x.dtype == "int32" else "float32"
    data = each(lambda v: cast(v, middle), middle, x)
    if zero is not None and not x.dtype.startswith("float8"):
        offset = spread(zero, x, axis, block_size)
        data = each(lambda v, z: v - cast(z, middle), middle, data, offset)
    factor = spread(scale, x, axis, block_size)
    return each(
        lambda v, s: cast(cast(v, "float32") * cast(s, "float32"), dtype), dtype, data, factor
    )


@operator(
    "DynamicQuantizeLinear",
    since=11,
    cases=[
        Case(draw("float32[3,5]"), outputs=3, label="mixed signs"),
        Case(draw("float32[3,5]", low=1.0, high=4.0), outputs=3, label="positive"),
    ],
)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 data, scale and zero point from the range of the data, which is made to include 0."""
    axes = range(x.rank)
    high = elementwise("max", reduce("max", x, axes), 0.0)
    low = elementwise("min", reduce("min", x, axes), 0.0)

    def step(top: Expr, bottom: Expr) -> Expr:
        span = apply("select", apply("eq", top, bottom), 1.0, top - bottom)
        return apply("div", span, Const(255.0, x.dtype))

    scale = materialize(elementwise(step, high, low))

    def origin(bottom: Expr, s: Expr) -> Expr:
        at = apply("div", -bottom, s)
        return cast(apply("round", apply("min", apply("max", at, 0.0), 255.0)), "uint8")

    zero = materialize(elementwise(origin, low, scale))
    y = elementwise(lambda v, s, z: requantized(apply("div", v, s), z, "uint8"), x, scale, zero)
    return y, scale, zero
