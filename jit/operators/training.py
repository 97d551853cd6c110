"""Optimizer steps of ai.onnx.preview.training: elementwise updates of any number of tensors."""

from __future__ import annotations

from onnxjit.codegen.expr import Expr, apply, cast
from onnxjit.codegen.tensor import DefinitionError, Tensor, elementwise
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw

DOMAIN = "ai.onnx.preview.training"


def _groups(tensors: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    """The inputs X1, X2, ..., G1, G2, ... as (X1, G1, ...), (X2, G2, ...), ..."""
    if not tensors or len(tensors) % size:
        raise DefinitionError(f"{len(tensors)} tensors are not {size} for each parameter")
    count = len(tensors) // size
    return [tensors[k::count] for k in range(count)]


def _sqrt(v: Expr) -> Expr:
    return apply("sqrt", v)


def _first_step(t: Expr, value: Expr, first: Expr | float) -> Expr:
    """`value` after the first update (t > 0), else `first`."""
    return apply("select", apply("lt", 0, t), value, first)


@operator("Adagrad", since=1, domain=DOMAIN, cases=[
    Case(draw("float32[]", "int64[]", "float32[3]", "float32[3]", "float32[3]", low=0.1),
         {"norm_coefficient": 0.1, "epsilon": 1e-5, "decay_factor": 0.1}, outputs=2),
])  # fmt: skip
def adagrad(
    r: Tensor,
    t: Tensor,
    *tensors: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> tuple[Tensor, ...]:
    """The learning rate shrinks with the sum of squared gradients (Duchi et al. 2011)."""
    updated, squares = [], []
    for x, g, h in _groups(tensors, 3):

        def gradient(x: Expr, g: Expr) -> Expr:
            return x * norm_coefficient + g

        total = elementwise(lambda x, g, h: h + gradient(x, g) * gradient(x, g), x, g, h)

        def step(r: Expr, t: Expr, x: Expr, g: Expr, h: Expr) -> Expr:
            rate = apply("div", r, cast(t, r.dtype) * decay_factor + 1.0)
            return x - apply("div", rate * gradient(x, g), _sqrt(h) + epsilon)

        updated.append(elementwise(step, r, t, x, g, total, dtype=x.dtype))
        squares.append(total)
    return (*updated, *squares)


@operator("Adam", since=1, domain=DOMAIN, cases=[
    Case(draw("float32[]", "int64[]", *["float32[3]"] * 4, low=0.1),
         {"norm_coefficient": 0.1, "alpha": 0.9, "beta": 0.99, "epsilon": 1e-3}, outputs=3),
])  # fmt: skip
def adam(
    r: Tensor,
    t: Tensor,
    *tensors: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Tensor, ...]:
    """Steps by running means of gradients and of their squares (Kingma and Ba 2015)."""
    updated, means, squares = [], [], []
    for x, g, v, h in _groups(tensors, 4):

        def gradient(x: Expr, g: Expr) -> Expr:
            return x * norm_coefficient + g

        mean = elementwise(lambda x, g, v: v * alpha + gradient(x, g) * (1 - alpha), x, g, v)
        square = elementwise(
            lambda x, g, h: h * beta + gradient(x, g) * gradient(x, g) * (1 - beta), x, g, h
        )

        def step(r: Expr, t: Expr, x: Expr, v: Expr, h: Expr) -> Expr:
            count = cast(t, r.dtype)
            top = _sqrt(1.0 - apply("pow", _like(beta, r), count))
            bottom = 1.0 - apply("pow", _like(alpha, r), count)
            rate = _first_step(t, apply("div", r * top, bottom), r)
            moved = x - apply("div", rate * v, _sqrt(h) + epsilon)
            return moved * (1 - norm_coefficient_post)

        updated.append(elementwise(step, r, t, x, mean, square, dtype=x.dtype))
        means.append(mean)
        squares.append(square)
    return (*updated, *means, *squares)


@operator("Momentum", since=1, domain=DOMAIN, cases=[
    Case(draw("float32[]", "int64[]", *["float32[3]"] * 3, low=0.1),
         {"norm_coefficient": 0.1, "alpha": 0.9, "beta": 0.5, "mode": mode}, outputs=2)
    for mode in ("standard", "nesterov")
])  # fmt: skip
def momentum(
    r: Tensor,
    t: Tensor,
    *tensors: Tensor,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> tuple[Tensor, ...]:
    """Gradient descent with momentum, plain or Nesterov's."""
    if mode not in ("standard", "nesterov"):
        raise DefinitionError(f"mode {mode!r} is not standard or nesterov")
    updated, means = [], []
    for x, g, v in _groups(tensors, 3):

        def gradient(x: Expr, g: Expr) -> Expr:
            return x * norm_coefficient + g

        def mean(t: Expr, x: Expr, g: Expr, v: Expr) -> Expr:
            return v * alpha + gradient(x, g) * _first_step(t, _like(beta, v), _like(1.0, v))

        new = elementwise(mean, t, x, g, v, dtype=v.dtype)

        def step(r: Expr, x: Expr, g: Expr, v: Expr) -> Expr:
            return x - r * (v if mode == "standard" else gradient(x, g) + v * alpha)

        updated.append(elementwise(step, r, x, g, new, dtype=x.dtype))
        means.append(new)
    return (*updated, *means)


def _like(value: float, e: Expr) -> Expr:
    from onnxjit.codegen.expr import Const

    return Const(value, e.dtype)
