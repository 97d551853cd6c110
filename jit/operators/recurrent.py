"""LSTM, GRU and RNN: recurrences over time.

The input's part of every gate is a matrix product of all steps at once. What is left to each step
is the product with the state and the gates; `codegen.recurrence` is how it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

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
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw


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
        self, value: Tensor, shape: tuple[Expr, ...], where: Callable[..., tuple[Expr, ...]]
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


_LSTM = draw("float32[4,2,3]", "float32[1,20,3]", "float32[1,20,5]", "float32[1,40]")
_BOTH = draw(
    *("float32[4,2,3]", "float32[2,20,3]", "float32[2,20,5]", "float32[2,40]"),
    *(np.array([4, 2], "int32"), "float32[2,2,5]", "float32[2,2,5]", "float32[2,15]"),
)


@operator(
    "LSTM",
    since=1,
    cases=[
        Case(_LSTM, {"hidden_size": 5}, outputs=3, label="forward"),
        Case(
            _LSTM,
            {"hidden_size": 5, "direction": "reverse"},
            outputs=3,
            label="reverse",
        ),
        Case(
            _BOTH,
            {"hidden_size": 5, "direction": "bidirectional"},
            outputs=3,
            label="both, lengths, peepholes",
        ),
        Case(
            _LSTM,
            {
                "hidden_size": 5,
                "activations": ["HardSigmoid", "Softsign", "Affine"],
                "activation_alpha": [0.3, 0.5],
                "activation_beta": [0.4, 0.1],
                "input_forget": 1,
            },
            outputs=3,
            label="activations",
        ),
    ],
)
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
) -> tuple[Tensor, ...]:
    """Long short-term memory; gates in the order input, output, forget, cell."""
    names = activations or ["Sigmoid", "Tanh", "Tanh"] * (2 if direction == "bidirectional" else 1)
    layer = Layer(
        4, x, w, r, b, sequence_lens,
        direction=direction, hidden_size=hidden_size, layout=layout,
        activations=activation_functions(names, activation_alpha, activation_beta, clip),
    )  # fmt: skip
    gate = layer.inputs(joined=4)
    h = State(layer.initial(initial_h), slots=2)
    c = State(layer.initial(initial_c))

    def peep(x: Tensor, number: int, cell: Tensor) -> Tensor:
        return x if p is None else x + layer.rows(p, number) * cell

    with layer.steps():
        own = layer.product(h.before, layer.r, 4)
        i, o, f, g = (gate(n) + own[n] for n in range(4))
        i = layer.activate(0, peep(i, 0, c.before))
        f = 1 - i if input_forget else layer.activate(0, peep(f, 2, c.before))
        new_c = materialize(f * c.before + i * layer.activate(1, g))
        new_h = materialize(layer.activate(0, peep(o, 1, new_c)) * layer.activate(2, new_c))
        c.set(layer.running(new_c, c.before))
        y = layer.emit(h, new_h)
    return y, layer.last(h), layer.last(c)


_GRU = draw("float32[4,2,3]", "float32[1,15,3]", "float32[1,15,5]", "float32[1,30]")


@operator(
    "GRU",
    since=1,
    cases=[
        Case(_GRU, {"hidden_size": 5}, outputs=2, label="forward"),
        Case(
            _GRU,
            {"hidden_size": 5, "linear_before_reset": 1},
            outputs=2,
            label="linear before reset",
        ),
        Case(
            draw(
                *("float32[4,2,3]", "float32[2,15,3]", "float32[2,15,5]", None),
                *(np.array([4, 2], "int32"), "float32[2,2,5]"),
            ),
            {"hidden_size": 5, "direction": "bidirectional"},
            outputs=2,
            label="both, lengths",
        ),
    ],
)
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 0,
) -> tuple[Tensor, ...]:
    """Gated recurrent unit; gates in the order update, reset, hidden."""
    names = activations or ["Sigmoid", "Tanh"] * (2 if direction == "bidirectional" else 1)
    layer = Layer(
        3, x, w, r, b, sequence_lens,
        direction=direction, hidden_size=hidden_size, layout=layout,
        activations=activation_functions(names, activation_alpha, activation_beta, clip),
    )  # fmt: skip
    gate = layer.inputs(joined=2 if linear_before_reset else 3)
    h = State(layer.initial(initial_h), slots=2)
    if linear_before_reset:
        with layer.steps():
            own_z, own_r, own = layer.product(h.before, layer.r, 3)
            own = own if b is None else own + layer.rows(b, 5)
            z = layer.activate(0, gate(0) + own_z)
            reset = layer.activate(0, gate(1) + own_r)
            new = layer.activate(1, gate(2) + reset * own)
            y = layer.emit(h, materialize((1 - z) * new + z * h.before))
        return y, layer.last(h)
    # The candidate needs all of reset * h: a second product in each step.
    first, second = layer.split(2)
    none = layer.initial(None)
    z, kept = State(none), State(none)
    with layer.steps():
        own_z, own_r = layer.product(h.before, first, 2)
        z.set(layer.activate(0, gate(0) + own_z))
        kept.set(layer.activate(0, gate(1) + own_r) * h.before)
        (own,) = layer.product(kept.after, second, 1)
        new = layer.activate(1, gate(2) + own)
        y = layer.emit(h, materialize((1 - z.after) * new + z.after * h.before))
    return y, layer.last(h)


_RNN = draw("float32[4,2,3]", "float32[1,5,3]", "float32[1,5,5]", "float32[1,10]")


_TANH = ["Tanh", "Tanh"]


@operator(
    "RNN",
    since=1,
    cases=[
        Case(_RNN, {"hidden_size": 5}, outputs=2, label="forward"),
        Case(
            _RNN,
            {"hidden_size": 5, "direction": "reverse", "activations": ["Relu"]},
            outputs=2,
            label="reverse relu",
        ),
    ],
)
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = _TANH,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
) -> tuple[Tensor, ...]:
    """The plain recurrence h = f(x W + h R + b)."""
    layer = Layer(
        1, x, w, r, b, sequence_lens,
        direction=direction, hidden_size=hidden_size, layout=layout,
        activations=activation_functions(activations, activation_alpha, activation_beta, clip),
    )  # fmt: skip
    gate = layer.inputs(joined=1)
    h = State(layer.initial(initial_h), slots=2)
    with layer.steps():
        (own,) = layer.product(h.before, layer.r, 1)
        y = layer.emit(h, materialize(layer.activate(0, gate(0) + own)))
    return y, layer.last(h)
