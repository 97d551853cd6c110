"""LSTM, GRU and RNN: recurrences over time.

The input's part of every gate is a matrix product of all steps at once. What is left to each step
is the product with the state and the gates; `codegen.recurrence` is how it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxjit.codegen.recurrence import State
from onnxjit.codegen.tensor import Tensor, materialize
from onnxjit.operators.recurrent_layer import Layer, activation_functions
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw

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
    update, kept = State(none), State(none)
    with layer.steps():
        own_z, own_r = layer.product(h.before, first, 2)
        update.set(layer.activate(0, gate(0) + own_z))
        kept.set(layer.activate(0, gate(1) + own_r) * h.before)
        (own,) = layer.product(kept.after, second, 1)
        z, new = update.after, layer.activate(1, gate(2) + own)
        y = layer.emit(h, materialize((1 - z) * new + z * h.before))
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
