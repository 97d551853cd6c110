"""Models of one recurrent node, and what they compute, step by step in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUTS = {
    "LSTM": ("x", "w", "r", "b", "lengths", "h", "c", "p"),
    "GRU": ("x", "w", "r", "b", "lengths", "h"),
    "RNN": ("x", "w", "r", "b", "lengths", "h"),
}
OUTPUTS = {"LSTM": ("y", "yh", "yc"), "GRU": ("y", "yh"), "RNN": ("y", "yh")}
USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
OF_TIME = ("x", "lengths", "h", "c")
"""Inputs that are no weights."""


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "Sigmoid": lambda v: sigmoid(v),
    "Tanh": np.tanh,
    "Relu": lambda v: np.maximum(v, 0),
    "Softsign": lambda v: v / (1 + abs(v)),
    "Softplus": lambda v: np.log1p(np.exp(v)),
    "HardSigmoid": lambda v, a, b: np.clip(a * v + b, 0, 1),
    "ScaledTanh": lambda v, a, b: a * np.tanh(b * v),
    "Affine": lambda v, a, b: a * v + b,
    "LeakyRelu": lambda v, a: np.where(v < 0, a * v, v),
    "ThresholdedRelu": lambda v, a: np.where(v > a, v, 0),
    "Elu": lambda v, a: np.where(v < 0, a * np.expm1(v), v),
}
TAKES = {"HardSigmoid": 2, "ScaledTanh": 2, "Affine": 2, "LeakyRelu": 1, "ThresholdedRelu": 1,
         "Elu": 1}  # fmt: skip


@dataclass
class Problem:
    """`extra` inputs beside x, w, r: letters of b, l (lengths), h, c, p. `time`, `batch`: sizes of
    the data; a model has them free where `free` is set."""

    op: str
    time: int
    batch: int
    size: int
    hidden: int
    extra: str = "b"
    direction: str = "forward"
    layout: int = 0
    constant: bool = True
    free: bool = False
    dtype: str = "float32"
    outputs: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def data(self, seed: int = 0) -> dict[str, np.ndarray]:
        """All inputs by name."""
        rng = np.random.default_rng(seed)
        d, g, n = self.directions, GATES[self.op], self.hidden
        state = (self.batch, d, n) if self.layout else (d, self.batch, n)
        x = (self.batch, self.time) if self.layout else (self.time, self.batch)
        shapes = {
            "x": (*x, self.size), "w": (d, g * n, self.size), "r": (d, g * n, n),
            "b": (d, 2 * g * n), "h": state, "c": state, "p": (d, 3 * n),
        }  # fmt: skip
        wide = 1 / np.sqrt(max(n, 1))
        out = {
            k: rng.uniform(-wide, wide, s) if k in "wrb" else rng.normal(size=s)
            for k, s in shapes.items()
            if k in "xwr" or k in self.extra
        }
        out = {k: v.astype(self.dtype) for k, v in out.items()}
        if "l" in self.extra:
            out["lengths"] = rng.integers(0, self.time + 1, self.batch).astype(np.int32)
        return out

    def feeds(self, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {k: v for k, v in data.items() if k in OF_TIME or not self.constant}

    def model(self, data: dict[str, np.ndarray]) -> onnx.ModelProto:
        names = [n if n in data else "" for n in INPUTS[self.op]]
        outputs = self.outputs or OUTPUTS[self.op]
        attributes = {"hidden_size": self.hidden, "direction": self.direction, **self.attributes}
        if self.layout:
            attributes["layout"] = 1
        feeds = self.feeds(data)
        inputs = []
        for name, value in feeds.items():
            shape: list[Any] = list(value.shape)
            if self.free:
                places = {"x": ("time", "batch"), "lengths": ("batch",), "h": (None, "batch")}
                free = places["h" if name == "c" else name]
                free = free[::-1] if self.layout and name != "lengths" else free
                shape = [f or s for f, s in zip((*free, *[None] * 3), shape, strict=False)]
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = helper.make_graph(
            [helper.make_node(self.op, names, list(outputs), **attributes)],
            "recurrence",
            inputs,
            [helper.make_tensor_value_info(n, kind, None) for n in outputs if n],
            [numpy_helper.from_array(v, k) for k, v in data.items() if k not in feeds],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def functions(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        a = self.attributes
        names = a.get("activations") or USUAL[self.op] * self.directions
        alpha, beta = iter(a.get("activation_alpha", ())), iter(a.get("activation_beta", ()))
        clip = a.get("clip", np.inf)
        made = []
        for name in names:
            given = [next(v) for v in (alpha, beta)[: TAKES.get(name, 0)]]
            made.append(lambda v, f=FUNCTIONS[name], g=given: f(np.clip(v, -clip, clip), *g))
        return made

    def expected(self, data: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, from the formulas of the operators' specifications."""
        wide = {k: v.astype(np.float64) for k, v in data.items()}
        swap = (lambda v: np.swapaxes(v, 0, 1)) if self.layout else (lambda v: v)
        x, n, g, d = swap(wide["x"]), self.hidden, GATES[self.op], self.directions
        zero = np.zeros((d, self.batch, n))
        h, c = (swap(wide[k]) if k in wide else zero for k in "hc")
        h, c = h.copy(), c.copy()
        b = wide.get("b", np.zeros((d, 2 * g * n)))
        p = wide.get("p", np.zeros((d, 3 * n)))
        lengths = data.get("lengths", np.full(self.batch, self.time))
        functions = self.functions()
        y = np.zeros((self.time, d, self.batch, n))
        per = len(functions) // d
        for k in range(d):
            backward = self.direction == "reverse" or k == 1
            own = functions[k * per : (k + 1) * per]
            for t in reversed(range(self.time)) if backward else range(self.time):
                for row in np.flatnonzero(t < lengths):
                    cell = (wide["w"][k], wide["r"][k], b[k], p[k], own)
                    h[k, row], c[k, row] = getattr(self, f"step_{self.op.lower()}")(
                        x[t, row], h[k, row], c[k, row], *cell
                    )
                    y[t, k, row] = h[k, row]
        if self.layout:
            y, h, c = np.moveaxis(y, 2, 0), swap(h), swap(c)
        known = {"y": y, "yh": h, "yc": c}
        return [known[name] for name in self.outputs or OUTPUTS[self.op] if name]

    def step_lstm(self, x, h, c, w, r, b, p, f):  # type: ignore[no-untyped-def]
        i, o, forget, cell = np.split(w @ x + r @ h + b[: len(w)] + b[len(w) :], 4)
        pi, po, pf = np.split(p, 3)
        i = f[0](i + pi * c)
        forget = 1 - i if self.attributes.get("input_forget") else f[0](forget + pf * c)
        c = forget * c + i * f[1](cell)
        return f[0](o + po * c) * f[2](c), c

    def step_gru(self, x, h, c, w, r, b, p, f):  # type: ignore[no-untyped-def]
        wz, wr, wh = np.split(w @ x + b[: len(w)], 3)
        rz, rr, rh = np.split(r, 3)
        bz, br, bh = np.split(b[len(w) :], 3)
        z, reset = f[0](wz + rz @ h + bz), f[0](wr + rr @ h + br)
        if self.attributes.get("linear_before_reset"):
            new = f[1](wh + reset * (rh @ h + bh))
        else:
            new = f[1](wh + rh @ (reset * h) + bh)
        return (1 - z) * new + z * h, c

    def step_rnn(self, x, h, c, w, r, b, p, f):  # type: ignore[no-untyped-def]
        return f[0](w @ x + r @ h + b[: len(w)] + b[len(w) :]), c
