"""What LSTM, GRU and RNN share: activations, and a layer's sizes, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from onnxjit.codegen import tensor as T
from onnxjit.codegen.expr import INDEX, Axis, Expr, apply, cast, index
from onnxjit.codegen.recurrence import State, record, steps
from onnxjit.codegen.tensor import (
    NARROW,
    DefinitionError,
    Tensor,
    cast_to,
    elementwise,
    materialize,
    same_dim,
)
from onnxjit.operators.activations import (
    elu,
    hard_sigmoid,
    leaky_relu,
    relu,
    softplus_of,
    thresholded_relu,
)


def _affine(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return x * alpha + beta


def _scaled_tanh(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return elementwise("tanh", x * beta) * alpha


def _softsign(x: Tensor) -> Tensor:
    return x / (elementwise("abs", x) + 1)


_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "relu": (relu, {}),
    "tanh": (lambda x: elementwise("tanh", x), {}),
    "sigmoid": (lambda x: elementwise("sigmoid", x), {}),
    "affine": (_affine, {"alpha": 1.0, "beta": 0.0}),
    "leakyrelu": (leaky_relu, {"alpha": 0.01}),
    "thresholdedrelu": (thresholded_relu, {"alpha": 1.0}),
    "scaledtanh": (_scaled_tanh, {"alpha": 1.0, "beta": 1.0}),
    "hardsigmoid": (hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "elu": (elu, {"alpha": 1.0}),
    "softsign": (_softsign, {}),
    "softplus": (lambda x: elementwise(softplus_of, x), {}),
}
"""The functions, with the defaults of their parameters."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of a gate, whose argument is limited to [-clip, clip] first."""

    name: str
    parameters: tuple[tuple[str, float], ...]
    clip: float | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.clip is not None:
            x = elementwise("max", elementwise("min", x, self.clip), -self.clip)
        return _ACTIVATIONS[self.name][0](x, **dict(self.parameters))


def activation_functions(
    names: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
) -> list[Activation]:
    """The named functions; parameters are consumed in order by the functions that take them."""
    given = {"alpha": iter(alphas or ()), "beta": iter(betas or ())}
    found = []
    for name in (n.lower() for n in names):
        if name not in _ACTIVATIONS:
            raise DefinitionError(f"unknown activation {name!r}")
        defaults = _ACTIVATIONS[name][1].items()
        parameters = tuple((k, float(next(given[k], default))) for k, default in defaults)
        found.append(Activation(name, parameters, clip))
    return found


# "foward" is how GRU 1 spells its default.
_DIRECTIONS = {
    "forward": (False,),
    "foward": (False,),
    "reverse": (True,),
    "bidirectional": (False, True),
}
"""For every direction whether it runs backwards in time."""


class Layer:
    """What the three operators share: their sizes, and how a step reads and writes.

    A gate and a state are tensors over [direction, batch, unit], in float32 for narrower inputs.
    W, R and the two halves of B hold `gates` blocks of a row a unit.
    """

    def __init__(
        self,
        gates: int,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None,
        lengths: Tensor | None,
        *,
        direction: str,
        hidden_size: int,
        layout: int,
        activations: Sequence[Activation],
    ) -> None:
        if direction not in _DIRECTIONS:
            raise DefinitionError(f"unknown direction {direction!r}")
        self.backward = _DIRECTIONS[direction]
        self.directions = index(len(self.backward))
        self.functions = activations
        self.layout = layout
        self.narrow = x.dtype
        self.dtype = "float32" if x.dtype in NARROW else x.dtype
        self.x = T.transpose(x, (1, 0, 2)) if layout else x
        self.time, self.batch = self.x.shape[:2]
        self.hidden = index(hidden_size) if hidden_size else r.shape[2]
        self.gates, self.w, self.r, self.b = gates, self.wide(w), self.wide(r), b
        self.lengths = lengths
        for have, want in (
            (w.shape[0], self.directions), (w.shape[1], self.hidden * gates),
            (w.shape[2], x.shape[2]), (r.shape[0], self.directions),
            (r.shape[1], self.hidden * gates), (r.shape[2], self.hidden),
        ):  # fmt: skip
            same_dim(have, want)
        self.shape = (self.directions, self.batch, self.hidden)
        self.now: Axis | None = None

    def wide(self, x: Tensor) -> Tensor:
        """The tensor in the working dtype."""
        return x if x.dtype == self.dtype else materialize(cast_to(x, self.dtype))

    def tensor(self, fn: Callable[..., Expr]) -> Tensor:
        """The tensor over [direction, batch, unit] whose elements `fn` gives."""
        return T.compute(self.shape, self.dtype, fn)

    def rows(self, x: Tensor, number: int) -> Tensor:
        """Block `number` of a tensor [direction, blocks of units], for the whole batch."""
        start = self.hidden * number
        return self.tensor(lambda d, b, j: cast(x.at(d, start + j), self.dtype))

    def inputs(self, joined: int) -> Callable[[int], Tensor]:
        """What the input and the biases add to each gate at a step, for all steps at once; the
        biases of the recurrent product are added here for the first `joined` gates."""
        x, bias, hidden, gates = self.wide(self.x), self.b, self.hidden, self.gates
        each = (self.directions, index(gates), hidden)

        def term(i: tuple[Expr, ...], k: tuple[Expr, ...]) -> Expr:
            t, b, d, g, j = i
            return x.at(t, b, k[0]) * self.w.at(d, g * hidden + j, k[0])

        made = T.reduce_over("sum", (self.time, self.batch, *each), (x.shape[2],), term)
        if bias is not None:

            def both(d: Expr, g: Expr, j: Expr) -> Expr:
                own, other = (bias.at(d, (g + n) * hidden + j) for n in (0, gates))
                total = apply("select", apply("lt", g, joined), own + other, own)
                return cast(total, self.dtype)

            made = materialize(made + materialize(T.compute(each, self.dtype, both)))

        def gate(number: int) -> Tensor:
            return self.tensor(lambda d, b, j: made.at(self.place(d), b, d, number, j))

        return gate

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Each step in processing order."""
        with steps(self.time) as self.now:
            yield

    def place(self, d: Expr) -> Expr:
        """The position in time that direction `d` has come to."""
        assert self.now is not None
        last = self.time - 1
        if self.backward == (False, True):
            return self.now + d * (last - self.now * 2)
        return last - self.now if self.backward[0] else self.now

    def product(self, x: Tensor, r: Tensor, blocks: int) -> list[Tensor]:
        """The rows of x times each block of r [direction, blocks of units, unit]."""
        hidden = self.hidden

        def term(i: tuple[Expr, ...], k: tuple[Expr, ...]) -> Expr:
            d, b, g, j = i
            return x.at(d, b, k[0]) * r.at(d, g * hidden + j, k[0])

        sizes = (self.directions, self.batch, index(blocks), hidden)
        made = T.reduce_over("sum", sizes, (hidden,), term)
        return [self.tensor(lambda d, b, j, g=g: made.at(d, b, g, j)) for g in range(blocks)]

    def activate(self, number: int, x: Tensor) -> Tensor:
        """Activation `number` of each direction, as a stage of its own."""
        per = len(self.functions) // len(self.backward)
        first, *other = (f(x) for f in dict.fromkeys(self.functions[number::per]))
        if not other:
            return materialize(first)

        def either(d: Expr, b: Expr, j: Expr) -> Expr:
            values = (f.at(d, b, j) for f in (first, *other))
            return apply("select", apply("eq", d, 0), *values)

        return materialize(self.tensor(either))

    def initial(self, x: Tensor | None) -> Tensor:
        """The initial value of a state."""
        if x is None:
            return T.full(self.shape, 0.0, self.dtype)
        given = T.transpose(x, (1, 0, 2)) if self.layout else x
        return cast_to(T.expand(given, self.shape), self.dtype)

    def running(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` for the sequences that have not ended, `old` for the others."""
        lengths = self.lengths
        if lengths is None:
            return new
        return self.tensor(
            lambda d, b, j: apply(
                "select",
                apply("lt", self.place(d), cast(lengths.at(b), INDEX)),
                new.at(d, b, j),
                old.at(d, b, j),
            )
        )

    def emit(self, h: State, new: Tensor) -> Tensor:
        """Ends a step with `new` as the hidden state; Y."""
        h.set(self.running(new, h.before))
        shown = self.running(new, T.full(self.shape, 0.0, self.dtype))
        d, b, n = self.shape
        if self.layout:
            shape = (b, self.time, d, n)
            return self.output(shown, shape, lambda d, b, j: (b, self.place(d), d, j))
        shape = (self.time, d, b, n)
        return self.output(shown, shape, lambda d, b, j: (self.place(d), d, b, j))

    def last(self, state: State) -> Tensor:
        """A state after the last step, as an output."""
        d, b, n = self.shape
        if self.layout:
            return self.output(state.last, (b, d, n), lambda d, b, j: (b, d, j))
        return self.output(state.last, (d, b, n), lambda d, b, j: (d, b, j))

    def output(
        self,
        value: Tensor,
        shape: tuple[Expr, ...],
        where: Callable[..., tuple[Expr, ...]],
    ) -> Tensor:
        return record(shape, cast_to(value, self.narrow), where)

    def split(self, first: int) -> tuple[Tensor, Tensor]:
        """The recurrent weights of the first gates and of the others."""
        parts = ((0, first), (first, self.gates - first))
        r, hidden = self.r, self.hidden
        first_part, second_part = (
            materialize(T.slice_axis(r, 1, hidden * start, hidden * count))
            for start, count in parts
        )
        return first_part, second_part


__all__ = ["Activation", "Layer", "activation_functions"]
