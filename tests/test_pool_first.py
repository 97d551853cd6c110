"""Sums that are moved before products: where, and that the results stay the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from kernels_support import Lowered, close, lower_model, model, run_model, run_program
from onnx.helper import make_node as node
from onnx.reference import ReferenceEvaluator

F = "float32"
Inputs = dict[str, tuple[str, Sequence[int | str]]]
IMAGES: Inputs = {"x": (F, ("n", 12, "h", "w"))}
SIZES = [{"n": 1, "h": 8, "w": 6}, {"n": 3, "h": 9, "w": 5}, {"n": 2, "h": 4, "w": 4}]
W, B = "w1", "b1"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compared(m: onnx.ModelProto, *sizes: dict[str, int]) -> Lowered:
    low, run = lower_model(m), run_model(m)
    for at in sizes or SIZES:
        shape = [
            d.dim_value or at[d.dim_param] for d in m.graph.input[0].type.tensor_type.shape.dim
        ]
        feeds = {"x": normal(*shape)}
        want = ReferenceEvaluator(m).run(None, feeds)
        for got in (run_program(low, feeds), run(feeds)):
            for a, b in zip(got, want, strict=True):
                close(a, np.asarray(b), 1e-5, str(at))
    return low


def network(pool: onnx.NodeProto, *before: onnx.NodeProto, bias: bool = False, **attributes: int):
    inputs = ["r", W, B] if bias else ["r", W]
    nodes = [node("Relu", ["x"], ["r"]), node("Conv", inputs, ["c"], **attributes), *before, pool]
    constants = {W: normal(10, 12 // attributes.get("group", 1), 1, 1), B: normal(10, seed=1)}
    return model(nodes, IMAGES, ["y"], constants)


POOLS = {
    "two by two": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "with a gap": {"kernel_shape": [2, 1], "strides": [3, 2]},
    "three by two": {"kernel_shape": [3, 2], "strides": [2, 2]},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_average_of_a_convolution(name: str, bias: bool) -> None:
    pool = node("AveragePool", ["c"], ["y"], **POOLS[name])
    low = compared(network(pool, bias=bias))
    assert [k.name for k in low.kernels] == ["averagepool", "conv"]


def test_global_average_and_strided_convolution() -> None:
    low = compared(network(node("GlobalAveragePool", ["c"], ["y"]), strides=[2, 2]))
    assert low.kernels[-1].name == "conv"


def test_means_of_a_matrix_product() -> None:
    nodes = [
        node("MatMul", ["x", W], ["c"]),
        node("ReduceMean", ["c", "axes"], ["y"], keepdims=0),
    ]
    constants = {W: normal(7, 20), "axes": np.array([1])}
    m = model(nodes, {"x": (F, ("n", "h", 7))}, ["y"], constants)
    low = compared(m, {"n": 2, "h": 5}, {"n": 1, "h": 1}, {"n": 3, "h": 64})
    assert [k.name for k in low.kernels] == ["reducemean", "matmul"]


STAY = {
    "a border": node(
        "AveragePool", ["c"], ["y"], kernel_shape=[2, 2], strides=[2, 2], pads=[1] * 4
    ),
    "as many results": node("AveragePool", ["c"], ["y"], kernel_shape=[2, 2]),
    "a maximum": node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
}


@pytest.mark.parametrize("name", STAY)
def test_sums_that_stay(name: str) -> None:
    low = compared(network(STAY[name]))
    names = [k.name for k in low.kernels]
    assert names.index("conv") < len(names) - 1


def test_columns_are_summed_when_the_model_is_compiled() -> None:
    m = network(node("ReduceSum", ["c", "axes"], ["y"]))
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    low = compared(m)
    assert len(low.kernels) <= 2
    assert [a.shape for a in low.program.constants.values()] == [(1, 12, 1, 1)]


def test_products_that_others_read_or_that_are_not_linear() -> None:
    pool = node("AveragePool", ["d"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    low = compared(network(pool, node("Relu", ["c"], ["d"])))
    assert low.kernels[-1].name == "averagepool"
    pool = node("AveragePool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2])
    low = compared(
        network(node("Mul", ["p", "q"], ["y"]), pool, node("GlobalMaxPool", ["c"], ["q"]))
    )
    assert low.kernels[0].name == "relu"
    grouped = network(node("AveragePool", ["c"], ["y"], **POOLS["two by two"]), group=2)
    assert compared(grouped).kernels[0].name == "relu"
