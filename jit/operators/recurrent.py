"""LSTM, GRU and RNN: recurrences over time, computed on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxjit.codegen.expr import Expr
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.tensor import DefinitionError, Tensor
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw

Array = np.ndarray
Activation = Callable[[Array], Array]


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


@dataclass(frozen=True, slots=True)
class Shape:
    """An activation function with its default parameters; None means that it takes none."""

    compute: Callable[[Array, float, float], Array]
    alpha: float | None = None
    beta: float | None = None


_ACTIVATIONS: dict[str, Shape] = {
    "relu": Shape(lambda x, a, b: np.maximum(x, 0)),
    "tanh": Shape(lambda x, a, b: np.tanh(x)),
    "sigmoid": Shape(lambda x, a, b: _sigmoid(x)),
    "affine": Shape(lambda x, a, b: a * x + b, 1.0, 0.0),
    "leakyrelu": Shape(lambda x, a, b: np.where(x >= 0, x, a * x), 0.01),
    "thresholdedrelu": Shape(lambda x, a, b: np.where(x > a, x, 0), 1.0),
    "scaledtanh": Shape(lambda x, a, b: a * np.tanh(b * x), 1.0, 1.0),
    "hardsigmoid": Shape(lambda x, a, b: np.clip(a * x + b, 0, 1), 0.2, 0.5),
    "elu": Shape(lambda x, a, b: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))), 1.0),
    "softsign": Shape(lambda x, a, b: x / (1 + np.abs(x))),
    "softplus": Shape(lambda x, a, b: np.logaddexp(x, 0).astype(x.dtype)),
}


def activation_functions(
    names: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
) -> list[Activation]:
    """The named functions; parameters are consumed in order by the functions that take them."""
    alpha, beta = iter(alphas or ()), iter(betas or ())

    def build(name: str) -> Activation:
        shape = _ACTIVATIONS.get(name.lower())
        if shape is None:
            raise DefinitionError(f"unknown activation {name!r}")
        a = next(alpha, shape.alpha) if shape.alpha is not None else 0.0
        b = next(beta, shape.beta) if shape.beta is not None else 0.0

        def run(x: Array) -> Array:
            return shape.compute(x if clip is None else np.clip(x, -clip, clip), a, b)

        return run

    return [build(n) for n in names]


@dataclass(frozen=True, slots=True)
class Sequences:
    """The inputs that the three operators share, time first and in the working dtype."""

    x: Array
    lengths: Array | None
    hidden: int

    def steps(self, reverse: bool) -> Iterator[tuple[int, Array | None]]:
        """Times in processing order with the mask of sequences that are still running."""
        times = range(len(self.x))
        for t in reversed(times) if reverse else times:
            yield t, None if self.lengths is None else (t < self.lengths)[:, None]


def reversed_directions(direction: str) -> list[bool]:
    """For every direction whether it runs backwards in time."""
    # "foward" is how GRU 1 spells its default.
    known = {
        "forward": [False],
        "foward": [False],
        "reverse": [True],
        "bidirectional": [False, True],
    }
    if direction not in known:
        raise DefinitionError(f"unknown direction {direction!r}")
    return known[direction]


def _sequences(x: Array, lengths: Array | None, hidden: int, layout: int) -> Sequences:
    data = np.swapaxes(x, 0, 1) if layout else x
    return Sequences(data.astype(_working(x)), lengths, hidden)


def _working(x: Array) -> np.dtype:
    return x.dtype if x.dtype in (np.float32, np.float64) else np.dtype(np.float32)


def _state(initial: Array | None, d: int, seq: Sequences, layout: int) -> Array:
    if initial is None:
        return np.zeros((seq.x.shape[1], seq.hidden), seq.x.dtype)
    return (initial[:, d] if layout else initial[d]).astype(seq.x.dtype)


def _row(x: Array | None, d: int, size: int, dtype: np.dtype) -> Array:
    return np.zeros(size, dtype) if x is None else x[d].astype(dtype)


def _results(
    ys: Sequence[Array],
    states: Sequence[Sequence[Array]],
    dtype: np.dtype,
    layout: int,
    outputs: int,
) -> tuple[Array, ...]:
    """Y from one [T, N, H] per direction, and each last state from one [N, H] per direction."""
    y = np.stack(ys, 2 if layout else 1)
    if layout:
        y = np.swapaxes(y, 0, 1)
    last = [np.stack(s, 1 if layout else 0) for s in states]
    return tuple(a.astype(dtype) for a in (y, *last))[:outputs]


def _masked(mask: Array | None, new: Array, old: Array) -> Array:
    return new if mask is None else np.where(mask, new, old)


def _types(count: int) -> Callable[..., list[TensorType]]:
    """The inference function of an operator with `count` outputs."""

    def infer(
        x: Tensor,
        w: Tensor,
        r: Tensor,
        *rest: Tensor | None,
        outputs: int = 1,
        layout: int = 0,
        **_: object,
    ) -> list[TensorType]:
        directions, hidden = w.shape[0], r.shape[2]
        time, batch = (x.shape[1], x.shape[0]) if layout else x.shape[:2]
        y: tuple[Expr, ...] = (time, directions, batch, hidden)
        state: tuple[Expr, ...] = (directions, batch, hidden)
        if layout:
            y, state = (batch, time, directions, hidden), (batch, directions, hidden)
        types = [TensorType(x.dtype, y)] + [TensorType(x.dtype, state)] * (count - 1)
        return types[:outputs]

    return infer


_LSTM = draw("float32[4,2,3]", "float32[1,20,3]", "float32[1,20,5]", "float32[1,40]")
_BOTH = draw(
    *("float32[4,2,3]", "float32[2,20,3]", "float32[2,20,5]", "float32[2,40]"),
    *(np.array([4, 2], "int32"), "float32[2,2,5]", "float32[2,2,5]", "float32[2,15]"),
)


@operator(
    "LSTM",
    since=1,
    host=True,
    infer=_types(3),
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
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    initial_c: Array | None = None,
    p: Array | None = None,
    *,
    outputs: int = 1,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
) -> tuple[Array, ...]:
    """Long short-term memory; gates in the order input, output, forget, cell."""
    size = r.shape[2]
    seq = _sequences(x, sequence_lens, size, layout)
    backward = reversed_directions(direction)
    names = activations or ["Sigmoid", "Tanh", "Tanh"] * len(backward)
    functions = activation_functions(names, activation_alpha, activation_beta, clip)
    ys, hs, cs = [], [], []
    for d, back in enumerate(backward):
        gate, cell, out = functions[3 * d : 3 * d + 3]
        dtype = seq.x.dtype
        bias = _row(b, d, 8 * size, dtype)
        peep_i, peep_o, peep_f = np.split(_row(p, d, 3 * size, dtype), 3)
        into = seq.x @ w[d].astype(dtype).T + (bias[: 4 * size] + bias[4 * size :])
        again = r[d].astype(dtype).T
        h, c = _state(initial_h, d, seq, layout), _state(initial_c, d, seq, layout)
        y = np.zeros((*seq.x.shape[:2], size), dtype)
        for t, running in seq.steps(back):
            i, o, f, g = np.split(into[t] + h @ again, 4, axis=1)
            i = gate(i + peep_i * c)
            f = 1 - i if input_forget else gate(f + peep_f * c)
            new_c = f * c + i * cell(g)
            new_h = gate(o + peep_o * new_c) * out(new_c)
            y[t] = _masked(running, new_h, np.zeros_like(new_h))
            h, c = _masked(running, new_h, h), _masked(running, new_c, c)
        ys.append(y)
        hs.append(h)
        cs.append(c)
    return _results(ys, [hs, cs], x.dtype, layout, outputs)


_GRU = draw("float32[4,2,3]", "float32[1,15,3]", "float32[1,15,5]", "float32[1,30]")


@operator(
    "GRU",
    since=1,
    host=True,
    infer=_types(2),
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
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    outputs: int = 1,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 0,
) -> tuple[Array, ...]:
    """Gated recurrent unit; gates in the order update, reset, hidden."""
    size = r.shape[2]
    seq = _sequences(x, sequence_lens, size, layout)
    backward = reversed_directions(direction)
    names = activations or ["Sigmoid", "Tanh"] * len(backward)
    functions = activation_functions(names, activation_alpha, activation_beta, clip)
    ys, hs = [], []
    for d, back in enumerate(backward):
        gate, candidate = functions[2 * d : 2 * d + 2]
        dtype = seq.x.dtype
        bias_w, bias_r = np.split(_row(b, d, 6 * size, dtype), 2)
        into = seq.x @ w[d].astype(dtype).T + bias_w
        again = r[d].astype(dtype).T
        h = _state(initial_h, d, seq, layout)
        y = np.zeros((*seq.x.shape[:2], size), dtype)
        for t, running in seq.steps(back):
            in_z, in_r, in_h = np.split(into[t], 3, axis=1)
            own = h @ again[:, : 2 * size] + bias_r[: 2 * size]
            z, reset = gate(in_z + own[:, :size]), gate(in_r + own[:, size:])
            if linear_before_reset:
                part = reset * (h @ again[:, 2 * size :] + bias_r[2 * size :])
            else:
                part = (reset * h) @ again[:, 2 * size :] + bias_r[2 * size :]
            new_h = (1 - z) * candidate(in_h + part) + z * h
            y[t] = _masked(running, new_h, np.zeros_like(new_h))
            h = _masked(running, new_h, h)
        ys.append(y)
        hs.append(h)
    return _results(ys, [hs], x.dtype, layout, outputs)


_RNN = draw("float32[4,2,3]", "float32[1,5,3]", "float32[1,5,5]", "float32[1,10]")


_TANH = ["Tanh", "Tanh"]


@operator(
    "RNN",
    since=1,
    host=True,
    infer=_types(2),
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
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    outputs: int = 1,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = _TANH,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
) -> tuple[Array, ...]:
    """The plain recurrence h = f(x W + h R + b)."""
    size = r.shape[2]
    seq = _sequences(x, sequence_lens, size, layout)
    backward = reversed_directions(direction)
    functions = activation_functions(activations, activation_alpha, activation_beta, clip)
    ys, hs = [], []
    for d, back in enumerate(backward):
        dtype = seq.x.dtype
        bias = _row(b, d, 2 * size, dtype)
        into = seq.x @ w[d].astype(dtype).T + (bias[:size] + bias[size:])
        again = r[d].astype(dtype).T
        h = _state(initial_h, d, seq, layout)
        y = np.zeros((*seq.x.shape[:2], size), dtype)
        for t, running in seq.steps(back):
            new_h = functions[d](into[t] + h @ again)
            y[t] = _masked(running, new_h, np.zeros_like(new_h))
            h = _masked(running, new_h, h)
        ys.append(y)
        hs.append(h)
    return _results(ys, [hs], x.dtype, layout, outputs)
