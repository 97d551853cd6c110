"""LSTM, GRU and RNN as compiled kernels against their formulas in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper
from recurrences import OF_TIME, Problem

import onnxjit

TOLERANCES = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-3}
BOTH, BACK = "bidirectional", "reverse"
OWN = {
    "activations": ["HardSigmoid", "Softsign", "Affine", "Elu", "LeakyRelu", "ScaledTanh"],
    "activation_alpha": [0.3, 0.5, 1.5, 0.1, 0.9],
    "activation_beta": [0.4, 0.1, 0.7],
}

CASES = [
    Problem("LSTM", 7, 1, 3, 5),
    Problem("LSTM", 7, 13, 9, 33, "b", BACK),
    Problem("LSTM", 5, 14, 16, 64, "bhc", BOTH),
    Problem("LSTM", 5, 15, 4, 65, "blhcp", BOTH),
    Problem("LSTM", 5, 3, 4, 31, "blhcp", BOTH, layout=1),
    Problem("LSTM", 6, 2, 4, 12, "lp", BACK, layout=1, outputs=("", "yh", "yc")),
    Problem("LSTM", 6, 2, 4, 7, "bp", attributes={"input_forget": 1, "clip": 0.4}),
    Problem("LSTM", 6, 2, 4, 7, "b", BOTH, attributes=OWN),
    Problem("LSTM", 3, 2, 4, 1, "bhc"),
    Problem("LSTM", 0, 2, 4, 5, "bhc"),
    Problem("LSTM", 3, 0, 4, 5, "b"),
    Problem("LSTM", 4, 2, 3, 40, "blhcp", BOTH, constant=False),
    Problem("LSTM", 4, 2, 3, 5, "blhcp", BOTH, dtype="float64"),
    Problem("LSTM", 4, 2, 3, 5, "b", dtype="float16"),
    Problem("LSTM", 2, 130, 3, 20, "b"),
    Problem("GRU", 7, 1, 3, 5, ""),
    Problem("GRU", 7, 1, 3, 17, "bh", BOTH, attributes={"linear_before_reset": 1}),
    Problem("GRU", 5, 14, 16, 64, "blh", BOTH),
    Problem("GRU", 5, 17, 16, 48, "blh", BACK, layout=1, attributes={"linear_before_reset": 1}),
    Problem("GRU", 5, 3, 2, 33, "b", constant=False),
    Problem("GRU", 5, 3, 2, 1, "b"),
    Problem("GRU", 0, 3, 2, 6, "bh"),
    Problem("GRU", 4, 2, 3, 5, "bl", BOTH, dtype="float64"),
    Problem("GRU", 4, 2, 3, 5, "b", dtype="float16"),
    Problem("GRU", 6, 2, 4, 9, "b", outputs=("", "yh"), attributes={"clip": 0.3}),
    Problem("RNN", 7, 1, 3, 128),
    Problem("RNN", 7, 29, 3, 16, "blh", BOTH),
    Problem("RNN", 7, 4, 3, 16, "b", BACK, layout=1, outputs=("y",)),
    Problem("RNN", 4, 2, 3, 5, "b", attributes={"activations": ["Softplus"]}),
    Problem("RNN", 4, 2, 3, 5, "h", constant=False, dtype="float64"),
]


def name(p: Problem) -> str:
    sizes = f"{p.time}x{p.batch}x{p.size}x{p.hidden}"
    return "-".join([p.op, sizes, p.extra, p.direction, p.dtype, *p.attributes])


def compare(p: Problem, got: Any, data: dict[str, np.ndarray]) -> None:
    want = p.expected(data)
    got = [got] if isinstance(got, np.ndarray) else got
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert g.dtype == p.dtype
        np.testing.assert_allclose(g.astype(np.float64), w, rtol=0, atol=TOLERANCES[p.dtype])


def compiled(p: Problem, data: dict[str, np.ndarray], **options: Any) -> Any:
    model = onnxjit.compile(p.model(data).SerializeToString(), **options)
    assert " 0 host steps" in model.report()
    return model


@pytest.mark.parametrize("p", CASES, ids=name)
def test_matches_the_formulas(p: Problem) -> None:
    data = p.data()
    compare(p, compiled(p, data)(**p.feeds(data)), data)


FREE = [
    Problem("LSTM", 0, 0, 3, 20, "blhcp", BOTH, free=True),
    Problem("GRU", 0, 0, 3, 20, "bh", BACK, free=True, layout=1),
    Problem("RNN", 0, 0, 3, 17, "b", free=True),
]


@pytest.mark.parametrize("p", FREE, ids=name)
def test_free_sizes_need_one_compilation(p: Problem) -> None:
    model = compiled(p, p.data())
    weights = {k: v for k, v in p.data().items() if k not in OF_TIME}
    for time, batch in itertools.product((1, 0, 2, 9), (1, 0, 2, 13, 15, 29, 67)):
        at = replace(p, time=time, batch=batch)
        data = {**at.data(seed=1), **weights}
        compare(at, model(**at.feeds(data)), data)
    assert "compiled for" not in model.report()


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_threads_do_not_change_the_result(op: str) -> None:
    p = Problem(op, 9, 5, 33, 160, "blh", BOTH)
    data = p.data()
    results = [compiled(p, data, threads=n)(**p.feeds(data)) for n in (1, 2, 3, 4)]
    compare(p, results[0], data)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, again)


def test_a_kernel_stays_within_its_buffers() -> None:
    """The check of an edited source: tiles of a round in any order, between guard bands."""
    for p in (FREE[0], replace(FREE[1], extra="blh")):
        model = compiled(p, p.data())
        kernel = model.kernels[next(k for k, v in model.kernels.items() if v.rule == "recurrence")]
        assert kernel.check(kernel.source).elements > 1000


def test_recurrent_weights_are_packed_once() -> None:
    p = Problem("LSTM", 7, 4, 16, 64)
    model = compiled(p, p.data())
    (kernel,) = (k for k in model.kernels.values() if k.rule == "recurrence")
    assert any(s.startswith("gemm_f32") for s in kernel.symbols)


def test_input_product_is_one_kernel_for_all_steps() -> None:
    p = Problem("GRU", 7, 4, 16, 64, "b", BOTH)
    rules = [k.rule for k in compiled(p, p.data()).kernels.values()]
    assert rules == ["contraction", "recurrence"]


REFUSED = [
    ({"direction": "sideways"}, "unknown direction"),
    ({"activations": ["Tan"]}, "unknown activation"),
    ({"hidden_size": 6}, "differ"),
]


@pytest.mark.parametrize(("attributes", "message"), REFUSED)
def test_refuses(attributes: dict[str, Any], message: str) -> None:
    p = Problem("RNN", 2, 2, 3, 5, attributes=attributes)
    with pytest.raises(onnxjit.ModelError, match=message):
        onnxjit.compile(p.model(p.data()).SerializeToString())


def test_outputs_are_stored_where_a_concatenation_has_them() -> None:
    forward, back = Problem("RNN", 5, 2, 3, 16, outputs=("y",)), Problem("GRU", 5, 2, 3, 16)
    first, second = forward.data(), back.data(seed=1)
    model, other = forward.model(first), back.model(second)
    for table in (other.graph.initializer, other.graph.input, other.graph.output):
        for item in table:
            item.name = f"other_{item.name}" if item.name != "x" else "x"
    (node,) = other.graph.node
    node.input[:] = [f"other_{n}" if n not in ("", "x") else n for n in node.input]
    node.output[:] = [f"other_{n}" for n in node.output]
    model.graph.node.append(node)
    model.graph.initializer.extend(other.graph.initializer)
    model.graph.node.append(helper.make_node("Concat", ["y", "other_y"], ["both"], axis=3))
    model.graph.node.append(helper.make_node("Relu", ["both"], ["joined"]))
    model.graph.output[0].name = "joined"
    second["x"] = first["x"]
    got = onnxjit.compile(model.SerializeToString())(first["x"])
    parts = [forward.expected(first)[0], back.expected(second)[0]]
    np.testing.assert_allclose(got, np.maximum(np.concatenate(parts, 3), 0), atol=2e-6, rtol=0)
