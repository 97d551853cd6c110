"""Activation functions, element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxjit.codegen.expr import Const, Expr, apply
from onnxjit.codegen.tensor import DefinitionError, Tensor, elementwise
from onnxjit.operators.elementwise import map_cases
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, draw


def _over(a: Expr, b: Any) -> Expr:
    return apply("div", a, b)


def _where(c: Expr, a: Any, b: Any) -> Expr:
    return apply("select", c, a, b)


def _less(a: Any, b: Any) -> Expr:
    return apply("lt", a, b)


def softplus_of(v: Expr) -> Expr:
    """log(1 + exp(v)), which neither overflows nor loses small results."""
    return apply("max", v, 0) + apply("log1p", apply("exp", -apply("abs", v)))


def mish_of(v: Expr) -> Expr:
    """v tanh(log(1 + exp(v))): with w = (1 + exp(v))² - 1, the tangent is w / (w + 2), and 1 from
    v = 20 on, where products with w might overflow."""
    e = apply("exp", v)
    w = e * (e + 2)
    return apply("select", apply("lt", 20, v), v, v * apply("div", w, w + 2))


def _simple(name: str, since: int, fn: str | Callable[[Expr], Expr]) -> None:
    def define(x: Tensor) -> Tensor:
        return elementwise(fn, x)

    define.__name__ = name.lower()
    operator(name, since=since, cases=map_cases(*FLOATS, low=-6.0, high=6.0))(define)


def _hard_swish(v: Expr) -> Expr:
    return v * apply("max", apply("min", _over(v, 6) + 0.5, 1), 0)


_simple("Sigmoid", 1, "sigmoid")
_simple("Softplus", 1, softplus_of)
_simple("Softsign", 1, lambda v: _over(v, apply("abs", v) + 1))
_simple("Mish", 18, mish_of)
_simple("HardSwish", 14, _hard_swish)


@operator("Relu", since=1, cases=map_cases(*FLOATS, "int8", "int32", "int64"))
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return elementwise("max", x, 0)


def _cases(**attrs: float) -> list[Case]:
    return [*map_cases(*FLOATS), Case(draw("float32[3,5]"), attrs)]


@operator("LeakyRelu", since=1, cases=_cases(alpha=0.3))
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x where it is at least 0, else alpha x."""
    return elementwise(lambda v: _where(_less(v, 0), v * alpha, v), x)


@operator("ThresholdedRelu", since=10, cases=_cases(alpha=0.5))
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where it exceeds alpha, else 0."""
    return elementwise(lambda v: _where(_less(Const(alpha, v.dtype), v), v, 0), x)


@operator("Elu", since=1, cases=_cases(alpha=2.0))
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where it is at least 0, else alpha (exp(x) - 1)."""
    return elementwise(lambda v: _where(_less(v, 0), (apply("exp", v) - 1) * alpha, v), x)


@operator("Celu", since=12, cases=_cases(alpha=2.0))
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""

    def scalar(v: Expr) -> Expr:
        low = (apply("exp", _over(v, alpha)) - 1) * alpha
        return apply("max", v, 0) + apply("min", low, 0)

    return elementwise(scalar, x)


@operator("Selu", since=6, cases=_cases(alpha=2.0, gamma=3.0))
def selu(
    x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323
) -> Tensor:
    """gamma x where x is positive, else gamma alpha (exp(x) - 1)."""
    return elementwise(lambda v: _where(_less(0, v), v, (apply("exp", v) - 1) * alpha) * gamma, x)


@operator("Selu", since=1, until=5)
def selu_1(
    x: Tensor, *, alpha: float = 1.673200011253357, gamma: float = 1.0506999492645264
) -> Tensor:
    """`selu` with the less exact defaults of opset 1."""
    return selu(x, alpha=alpha, gamma=gamma)


@operator("HardSigmoid", since=1, cases=_cases(alpha=0.5, beta=0.3))
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha x + beta limited to [0, 1]."""
    return elementwise(lambda v: apply("max", apply("min", v * alpha + beta, 1), 0), x)


@operator("Shrink", since=9, cases=[
    *_cases(bias=0.5, lambd=1.0),
    Case(draw("int8[3,5]"), {"bias": 1.0, "lambd": 1.0}),
    Case(draw("uint8[3,5]", high=9), {"bias": 1.0, "lambd": 3.0}),
])  # fmt: skip
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x + bias below -lambd, x - bias above lambd, else 0; integers are computed in float32."""

    def scalar(v: Expr) -> Expr:
        w = v if v.dtype.startswith("float") else apply("cast", v, dtype="float32")
        inner = _where(_less(Const(lambd, w.dtype), w), w - bias, 0.0)
        out = _where(_less(w, -lambd), w + bias, inner)
        return out if w is v else apply("cast", out, dtype=v.dtype)

    return elementwise(scalar, x)


@operator("Gelu", since=20, cases=[
    *map_cases(*FLOATS), Case(draw("float32[3,5]"), {"approximate": "tanh"}),
])  # fmt: skip
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x/2 (1 + erf(x/√2)), or its tanh approximation."""
    if approximate == "tanh":

        def scalar(v: Expr) -> Expr:
            inner = (v + v * v * v * 0.044715) * 0.7978845608028654
            return v * 0.5 * (apply("tanh", inner) + 1.0)

        return elementwise(scalar, x)
    return elementwise(lambda v: v * 0.5 * (apply("erf", v * 0.7071067811865476) + 1.0), x)


@operator("Swish", since=24, cases=_cases(alpha=1.5))
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x sigmoid(alpha x)."""
    return elementwise(lambda v: v * apply("sigmoid", v * alpha), x)


@operator("SwiGLU", since=28, cases=[
    *(Case(draw(f"{d}[3,5]", f"{d}[3,5]")) for d in FLOATS),
    Case(draw("float32[3,5]", "float32[3,5]"), {"alpha": 1.5}),
])  # fmt: skip
def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """a sigmoid(alpha a) b for two tensors of one shape."""
    return elementwise(lambda v, w: v * apply("sigmoid", v * alpha) * w, a, b)


@operator("PRelu", since=7, cases=[
    *(Case(draw(f"{d}[2,3,5]", f"{d}[3,1]")) for d in (*FLOATS, "int32", "int64")),
    Case(draw("float32[2,3,5]", "float32[1]")),
])  # fmt: skip
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x where it is at least 0, else slope x; slope broadcasts to x."""
    if slope.rank > x.rank:
        raise DefinitionError(f"PRelu: a slope of rank {slope.rank} for data of rank {x.rank}")
    return elementwise(lambda v, s: _where(_less(v, 0), v * s, v), x, slope)


@operator("PRelu", since=1, until=6)
def prelu_1(x: Tensor, slope: Tensor) -> Tensor:
    """`prelu` with one slope for each channel (axis 1), or one for all."""
    shape: Sequence[Expr | int] = slope.shape
    if slope.rank == 1 and x.rank > 1:
        shape = (*slope.shape, *[1] * (x.rank - 2))
    return prelu(x, Tensor(shape, slope.dtype, lambda i: slope.at(*i[: slope.rank])))
