"""Constant factors and terms around products with constant weights, against onnx.reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxjit
from onnxjit.codegen.expr import Load
from onnxjit.codegen.target import host
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline

RNG = np.random.default_rng(7)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model(
    nodes: Sequence[onnx.NodeProto], x: Sequence[int | str], **weights: np.ndarray
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def operations(m: onnx.ModelProto) -> list[set[str]]:
    """The functions applied to the results of sums, kernel by kernel."""
    found = []
    for call in run_pipeline(import_model(m), host()).kernels():
        value = call.kernel.stages[-1].value
        names = set()
        todo = [value]
        while todo:
            e = todo.pop()
            names.add(getattr(e, "fn", type(e).__name__))
            if not isinstance(e, Load) and getattr(e, "fn", "") != "sum":
                todo += getattr(e, "args", ())
        found.append(names)
    return found


BATCH_NORM = {n: values(5) for n in ("scale", "bias", "mean")} | {"var": abs(values(5)) + 0.1}
CASES = {
    "convolution, batch norm, relu": model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
            helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["d"]),
            helper.make_node("Relu", ["d"], ["y"]),
        ],
        ["b", 3, 7, 6],
        w=values(5, 3, 3, 3),
        **BATCH_NORM,
    ),
    "matmul, terms and factors": model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Add", ["a", "p"], ["b"]),
            helper.make_node("Mul", ["q", "b"], ["c"]),
            helper.make_node("Sub", ["r", "c"], ["d"]),
            helper.make_node("Sub", ["d", "p"], ["e"]),
            helper.make_node("Sigmoid", ["e"], ["f"]),
            helper.make_node("Mul", ["e", "f"], ["y"]),
        ],
        ["m", 11],
        w=values(11, 17),
        p=values(17),
        q=values(),
        r=values(1, 17),
    ),
    "transposed weights": model(
        [
            helper.make_node("Gemm", ["x", "w", "p"], ["a"], transB=1, alpha=0.5, beta=2.0),
            helper.make_node("Mul", ["a", "q"], ["y"]),
        ],
        [4, 11],
        w=values(9, 11),
        p=values(9),
        q=values(9),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_result_and_what_is_left(name: str) -> None:
    m = CASES[name]
    x = values(*(3 if isinstance(d, str) else d for d in shape_of(m)))
    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    np.testing.assert_allclose(onnxjit.compile(m)(x), want, rtol=2e-5, atol=2e-5)
    (left,) = operations(m)[-1:]
    assert "mul" not in left or "div" in left or "sigmoid" in left
    assert "sub" not in left


def shape_of(m: onnx.ModelProto) -> list[int | str]:
    dims = m.graph.input[0].type.tensor_type.shape.dim
    return [d.dim_param or d.dim_value for d in dims]


def test_terms_without_axes() -> None:
    m = model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("HardSigmoid", ["c"], ["y"], alpha=0.25, beta=0.5),
        ],
        ["b", 3, 4, 4],
        w=values(5, 3, 1, 1),
    )
    x = values(2, 3, 4, 4)
    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    np.testing.assert_allclose(onnxjit.compile(m)(x), want, rtol=2e-5, atol=2e-5)


def test_a_factor_that_varies_along_the_rows_stays() -> None:
    m = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Mul", ["a", "q"], ["y"]),
        ],
        [4, 11],
        w=values(11, 6),
        q=values(4, 1),
    )
    x = values(4, 11)
    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    np.testing.assert_allclose(onnxjit.compile(m)(x), want, rtol=2e-5, atol=2e-5)
    assert "mul" in operations(m)[-1]


def test_a_product_that_is_used_twice_stays() -> None:
    m = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Mul", ["a", "q"], ["b"]),
            helper.make_node("Sub", ["b", "a"], ["y"]),
        ],
        [4, 11],
        w=values(11, 6),
        q=values(6),
    )
    x = values(4, 11)
    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    np.testing.assert_allclose(onnxjit.compile(m)(x), want, rtol=2e-5, atol=2e-5)


def test_factors_that_are_not_finite_stay() -> None:
    m = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Mul", ["a", "q"], ["y"]),
        ],
        [2, 3],
        w=np.zeros((3, 2), np.float32),
        q=np.array([np.inf, 1], np.float32),
    )
    got = onnxjit.compile(m)(np.ones((2, 3), np.float32))
    assert np.isnan(got[:, 0]).all() and (got[:, 1] == 0).all()
    assert "mul" in operations(m)[-1]
