"""Integer products and convolutions: 8-bit operands less their zero points, summed in int32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from onnxjit.codegen.expr import ONE, Expr, apply, as_int, cast, index
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.tensor import DefinitionError, Tensor, compute, elementwise
from onnxjit.graph import Node
from onnxjit.operators.conv import conv_windows, convolve, with_bias
from onnxjit.operators.matmul import product_of
from onnxjit.operators.quantize import RANGES, each, requantized
from onnxjit.operators.registry import Case, Expansion, Known, operator
from onnxjit.operators.samples import draw


def centred(x: Tensor, zero: Tensor | None) -> Tensor:
    """x - zero in int32, under broadcasting."""
    for t in (x, zero):
        if t is not None and t.dtype not in RANGES:
            raise DefinitionError(f"{t.dtype} operands of integer products are not supported")
    if zero is None:
        return elementwise(lambda v: cast(v, "int32"), x)
    return elementwise(lambda v, z: cast(v, "int32") - cast(z, "int32"), x, zero)


def rows(s: Tensor | None) -> Tensor | None:
    """A parameter of the left operand: a vector holds one value a row."""
    if s is None or s.rank != 1 or s.shape[0] is ONE:
        return single(s)
    return compute((s.shape[0], 1), s.dtype, lambda i, _: s.at(i))


def single(s: Tensor | None) -> Tensor | None:
    """A vector of one value as a scalar."""
    if s is None or s.rank != 1 or s.shape[0] is not ONE:
        return s
    return Tensor((), s.dtype, lambda _: s.at(0))


_EXACT = 1 << 24
"""Integers up to this size are float32 numbers, and so are sums of products that stay below."""

_FLOAT, _INT32 = 1, 6
"""TensorProto.DataType."""

FEWEST = 256
"""Terms that a block of 8-bit products has room for, whatever the zero points."""


def float_products(node: Node, inputs: Sequence[Known], prefix: str) -> Expansion | None:
    """Float32 products of so many terms at a time that all sums are exact integers, added in int32.

    Register tiles of float32 are several times as fast as sums of int32 products. None where the
    number of terms is not known, an operand has less than two axes or more than 8 bits, or the
    definition has to say what is wrong.
    """
    if not 2 <= len(inputs) <= 4:
        return None
    a, b, *zeros = [*inputs, None, None][:4]
    if not isinstance(a, TensorType) or b is None or min(a.rank, len(b.shape)) < 2:
        return None
    depth = as_int(a.shape[-1])
    if not depth or index(b.shape[-2]) is not a.shape[-1]:
        return None
    known = {a.dtype, str(b.dtype)} <= RANGES.keys()
    if not known or not all(map(single_or_each, zeros, (a.shape[-2], b.shape[-1]))):
        return None
    terms = _EXACT // max(1, math.prod(map(magnitude, (a, b), zeros)))
    if terms < FEWEST:
        return None
    count = -(-depth // terms)
    edges = [depth * k // count for k in range(count + 1)]
    sizes = [stop - start for start, stop in pairwise(edges)]
    nodes: list[Node] = []
    constants: dict[str, np.ndarray] = {}

    def make(op: str, version: int, *names: str, made: Sequence[str], **attrs: object) -> None:
        nodes.append(Node(op, "", version, names, tuple(made), attrs, node.name))

    def parts(k: int, axis: int) -> list[str]:
        """The parts of operand `k` less its zero point."""
        own, zero = prefix + "ab"[k], [*node.inputs, "", ""][k + 2]
        made = [f"{own}{n}" for n in range(count)]
        x, z = inputs[k], zeros[k]
        if isinstance(x, np.ndarray) and not isinstance(z, TensorType):
            data = x.astype(np.float32)
            if z is not None:
                data -= z.astype(np.float32)
            constants.update(zip(made, np.split(data, edges[1:-1], axis), strict=True))
            return made
        make("Cast", 13, node.inputs[k], made=[own], to=_FLOAT)
        if z is not None:
            make("Cast", 13, zero, made=[own + "z"], to=_FLOAT)
            one_each = k == 0 and len(z.shape) == 1 and index(z.shape[0]) is not ONE
            if one_each:  # of the left operand's zero points there is one a row
                make("Unsqueeze", 11, own + "z", made=[own + "r"], axes=[1])
            make("Sub", 7, own, own + ("r" if one_each else "z"), made=[own + "c"])
            own += "c"
        make("Split", 11, own, made=made, axis=axis, split=sizes)
        return made

    left, right = parts(0, a.rank - 1), parts(1, len(b.shape) - 2)
    for k in range(count):
        total = node.outputs[0] if k == count - 1 else f"{prefix}s{k}"
        make("MatMul", 13, left[k], right[k], made=[f"{prefix}p{k}"])
        make("Cast", 13, f"{prefix}p{k}", made=[f"{prefix}i{k}" if k else total], to=_INT32)
        if k:
            make("Add", 7, f"{prefix}s{k - 1}", f"{prefix}i{k}", made=[total])
    return nodes, constants


def single_or_each(zero: Known, count: Expr | int) -> bool:
    """Whether a zero point is left out, one 8-bit integer, or one for each row or column."""
    if zero is None:
        return True
    allowed = ONE, index(count)
    small = len(zero.shape) < 2 and str(zero.dtype) in RANGES
    return small and all(index(n) in allowed for n in zero.shape)


def magnitude(x: Known, zero: Known) -> int:
    """The largest of |x - zero| that there can be."""
    (low, high), (first, last) = bounds(x), bounds(zero)
    return max(last - low, high - first)


def bounds(x: Known) -> tuple[int, int]:
    """The least and the greatest integer that an input can hold."""
    if isinstance(x, TensorType):
        return RANGES[x.dtype]
    return (int(x.min()), int(x.max())) if x is not None and x.size else (0, 0)


@operator(
    "MatMulInteger",
    since=10,
    expand=float_products,
    cases=[
        Case(
            draw("uint8[4,3]", "int8[3,2]", np.array(2, "uint8"), np.array(1, "int8")),
            label="scalars",
        ),
        Case(
            draw("uint8[2,4,3]", "uint8[3,5]", None, np.array([1, 2, 0, 1, 2], "uint8")),
            label="per column",
        ),
        Case(draw("int8[4,3]", "int8[3,2]"), label="no zero points"),
        Case(
            draw("uint8[128,768]", "int8[768,768]", np.array(128, "uint8")),
            bench=True,
            label="bert",
        ),
    ],
)
def matmul_integer(
    a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """The int32 product of (a - a_zero) and (b - b_zero)."""
    return product_of(centred(a, rows(a_zero)), centred(b, single(b_zero)))


def _scalar(value: float, dtype: str = "float32") -> np.ndarray:
    return np.array(value, dtype)


def quantized_nodes(node: Node, inputs: Sequence[Known], prefix: str) -> Expansion | None:
    """`MatMulInteger` and what `qlinear_matmul` makes of its sums; None where that has no nodes, or
    where there are several scales or zero points of an operand."""
    if len(inputs) != 8:
        return None
    a, left, a_zero, b, right, b_zero, out, y_zero = node.inputs
    rest = (*inputs[1:3], *inputs[4:])
    alone = all(x is not None and [*x.shape] in ([], [1], [ONE]) for x in rest)
    plain = all(x is not None and x.dtype == "float32" for x in (inputs[1], inputs[4], inputs[6]))
    product = Node(
        "MatMulInteger", "", 10, (a, b, a_zero, b_zero), (prefix + "sum",), {}, node.name
    )
    known = [inputs[k] for k in (0, 3, 2, 5)]
    if not alone or not plain or float_products(product, known, prefix) is None:
        return None

    def make(op: str, *names: str, made: str, **attrs: object) -> Node:
        return Node(op, "", 13, names, (made,), attrs, node.name)

    nodes = [
        product,
        make("Cast", prefix + "sum", made=prefix + "real", to=_FLOAT),
        make("Mul", left, right, made=prefix + "both"),
        make("Div", prefix + "both", out, made=prefix + "scale"),
        make("Mul", prefix + "real", prefix + "scale", made=prefix + "scaled"),
        make("QuantizeLinear", prefix + "scaled", prefix + "one", y_zero, made=node.outputs[0]),
    ]
    return nodes, {prefix + "one": np.array(1, np.float32)}


@operator(
    "QLinearMatMul",
    since=10,
    expand=quantized_nodes,
    cases=[
        Case(
            draw(
                *("uint8[2,4,5]", _scalar(0.1), _scalar(1, "uint8")),
                *("uint8[2,5,3]", _scalar(0.2), _scalar(2, "uint8")),
                *(_scalar(0.3), _scalar(7, "uint8")),
            ),
            label="uint8",
        ),
        Case(
            draw(
                *("int8[4,5]", _scalar(0.1), _scalar(1, "int8")),
                *("int8[5,3]", _scalar(0.2), _scalar(-2, "int8")),
                *(_scalar(0.3), _scalar(7, "int8")),
            ),
            label="int8",
        ),
    ],
)
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """A matrix product of quantized operands, quantized again."""
    total = product_of(centred(a, rows(a_zero)), centred(b, single(b_zero)))

    def at(v: Expr, p: Expr, q: Expr, s: Expr, z: Expr) -> Expr:
        left, right, out = (cast(t, "float32") for t in (p, q, s))
        return requantized(cast(v, "float32") * apply("div", left * right, out), z, y_zero.dtype)

    scales = (rows(a_scale), single(b_scale), rows(y_scale), rows(y_zero))
    args = [t for t in scales if t is not None]
    return each(at, y_zero.dtype, total, *args)


def filters(s: Tensor | None, rank: int) -> Tensor | None:
    """A parameter of the weights: a vector holds one value an output channel."""
    s = single(s)
    if s is None or s.rank == 0:
        return s
    vector = s
    return compute((s.shape[0], *[1] * (rank - 1)), s.dtype, lambda k, *_: vector.at(k))


def quantized_sum(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None,
    w_zero: Tensor | None,
    group: int,
    auto_pad: str,
    dilations: Sequence[int] | None,
    kernel_shape: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> Tensor:
    """The int32 convolution; padding holds the zero point, which counts as 0."""
    geometry = conv_windows(x, w, auto_pad, dilations, kernel_shape, pads, strides)
    zero = single(x_zero)
    fill = 0 if zero is None else zero.at()
    weights = centred(w, filters(w_zero, w.rank))
    return convolve(x, weights, geometry, group, fill, lambda t: centred(t, zero))


@operator(
    "ConvInteger",
    since=10,
    cases=[
        Case(
            draw(
                "uint8[1,2,5,6]",
                "uint8[3,2,3,3]",
                _scalar(1, "uint8"),
                np.array([1, 2, 0], "uint8"),
            ),
            {"pads": [1, 1, 1, 1]},
            label="padded",
        ),
        Case(
            draw("uint8[1,3,6,6]", "uint8[3,1,3,3]", _scalar(1, "uint8")),
            {"group": 3, "pads": [1, 1, 1, 1]},
            label="depthwise",
        ),
    ],
)
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The int32 convolution of (x - x_zero) with (w - w_zero)."""
    return quantized_sum(
        x, w, x_zero, w_zero, group, auto_pad, dilations, kernel_shape, pads, strides
    )


@operator(
    "QLinearConv",
    since=10,
    cases=[
        Case(
            draw(
                *("uint8[1,2,5,6]", _scalar(0.1), _scalar(1, "uint8")),
                *("int8[3,2,3,3]", np.array([0.1, 0.2, 0.3], "float32"), np.zeros(3, "int8")),
                *(_scalar(0.2), _scalar(9, "uint8"), np.array([1, -40, 3], "int32")),
            ),
            {"pads": [1, 1, 1, 1], "strides": [2, 1]},
            label="per channel",
        ),
        Case(
            draw(
                *("uint8[1,64,56,56]", _scalar(0.1), _scalar(128, "uint8")),
                *("int8[64,64,3,3]", _scalar(0.1), _scalar(0, "int8")),
                *(_scalar(0.2), _scalar(128, "uint8"), "int32[64]"),
            ),
            {"pads": [1, 1, 1, 1]},
            bench=True,
            label="resnet 3x3",
        ),
    ],
)
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution of quantized operands, quantized again; the bias counts x_scale · w_scale."""
    total = quantized_sum(
        x, w, x_zero, w_zero, group, auto_pad, dilations, kernel_shape, pads, strides
    )
    total = with_bias(total, bias, "int32")

    def at(v: Expr, p: Expr, q: Expr, s: Expr, z: Expr) -> Expr:
        return requantized(cast(v, "float32") * apply("div", p * q, s), z, y_zero.dtype)

    scales = (single(x_scale), filters(w_scale, w.rank - 1), single(y_scale), single(y_zero))
    return elementwise(at, total, *[t for t in scales if t is not None])
