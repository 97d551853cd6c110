"""LSTM, GRU and RNN with constant weights against peers: rows of `python -m benchmarks operators`.

Few steps of a large state, many of a small one, one sequence and many, in one direction and both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OPSET = 17
SEED = 20


class Sizes(NamedTuple):
    """Steps, sequences, elements of the input and of the state."""

    time: int
    batch: int
    size: int
    hidden: int


SIZES = (
    Sizes(100, 1, 64, 40),
    Sizes(100, 1, 128, 128),
    Sizes(50, 1, 256, 512),
    Sizes(200, 4, 40, 320),
    Sizes(64, 16, 256, 256),
    Sizes(32, 64, 128, 128),
)
DIRECTIONS = ("forward", "bidirectional")


def models(
    only: Sequence[str] | None,
) -> Iterator[tuple[str, onnx.ModelProto, dict[str, np.ndarray]]]:
    """A name, a model and its inputs per operator, sizes and direction."""
    for op, sizes, direction in itertools.product(GATES, SIZES, DIRECTIONS):
        if only and op not in only:
            continue
        model, feeds = model_of(op, sizes, direction)
        yield f"{op} {'x'.join(map(str, sizes))} {direction}", model, feeds


def model_of(op: str, s: Sizes, direction: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, as PyTorch exports it, and its input."""
    rng = np.random.default_rng(SEED)
    d, rows, bound = 1 + (direction == "bidirectional"), GATES[op] * s.hidden, s.hidden**-0.5
    shapes = {"w": (d, rows, s.size), "r": (d, rows, s.hidden), "b": (d, 2 * rows)}
    weights = [
        numpy_helper.from_array(rng.uniform(-bound, bound, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    attributes = {"linear_before_reset": 1} if op == "GRU" else {}
    node = helper.make_node(
        op, ["x", "w", "r", "b"], ["y", "h"],
        hidden_size=s.hidden, direction=direction, **attributes,
    )  # fmt: skip
    x = rng.standard_normal((s.time, s.batch, s.size)).astype(np.float32)
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "recurrence",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info(n, kind, None) for n in ("y", "h")],
        weights,
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8), {"x": x}
