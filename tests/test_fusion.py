"""Fusion: how many kernels common patterns become, and that the numbers stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from kernels_support import Lowered, close, lower_model, model, run_program, sample
from onnx import TensorProto
from onnx.helper import make_node as node
from onnx.reference import ReferenceEvaluator

from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.importer import import_model
from onnxjit.passes.lower import lower
from onnxjit.program import KernelCall, Program

F = "float32"
Inputs = dict[str, tuple[str, Sequence[int | str]]]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Pattern:
    """A graph and the most kernels that it may become."""

    kernels: int
    inputs: Inputs
    nodes: Sequence[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    outputs: Sequence[str] = ("y",)

    def model(self) -> onnx.ModelProto:
        return model(self.nodes, self.inputs, self.outputs, self.constants, opset=20)

    def feeds(self, n: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(n)
        return {
            name: sample(rng, dtype, [n if isinstance(d, str) else d for d in shape])
            for name, (dtype, shape) in self.inputs.items()
        }


AXES = {"last": np.array([-1]), "one": np.array([1]), "two": np.array([2])}
GELU = [
    node("Div", ["b", "root"], ["g1"]),
    node("Erf", ["g1"], ["g2"]),
    node("Add", ["g2", "unit"], ["g3"]),
    node("Mul", ["b", "g3"], ["g4"]),
    node("Mul", ["g4", "half"], ["y"]),
]
SCALARS = {
    name: np.array(v, np.float32)
    for name, v in {"root": 2**0.5, "unit": 1, "half": 0.5, "eps": 1e-3, "two_f": 2}.items()
}
NORM = {"s": normal(8), "t": normal(8, seed=1), "m": normal(8, seed=2), "v": normal(8) ** 2 + 1}

PATTERNS = {
    "chain of elementwise": Pattern(
        1,
        {"x": (F, ("n", 5))},
        [
            node("Mul", ["x", "two_f"], ["a"]),
            node("Add", ["a", "unit"], ["b"]),
            node("Sigmoid", ["b"], ["c"]),
            node("Sub", ["c", "half"], ["d"]),
            node("Abs", ["d"], ["y"]),
        ],
        SCALARS,
    ),
    "matmul, bias, gelu": Pattern(
        1,
        {"x": (F, ("n", 3, 16))},
        [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "bias"], ["b"]), *GELU],
        {"w": normal(16, 24), "bias": normal(24), **SCALARS},
    ),
    "matmul, bias, residual": Pattern(
        1,
        {"x": (F, ("n", 16)), "r": (F, ("n", 24))},
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Add", ["a", "bias"], ["b"]),
            node("Add", ["r", "b"], ["y"]),
        ],
        {"w": normal(16, 24), "bias": normal(24)},
    ),
    "gemm, relu": Pattern(
        1,
        {"x": (F, ("n", 16))},
        [node("Gemm", ["x", "w", "bias"], ["a"], transB=1), node("Relu", ["a"], ["y"])],
        {"w": normal(24, 16), "bias": normal(24)},
    ),
    "convolution, norm, add, relu": Pattern(
        1,
        {"x": (F, ("n", 3, 9, 7)), "r": (F, ("n", 8, 9, 7))},
        [
            node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["a", "s", "t", "m", "v"], ["b"]),
            node("Add", ["b", "r"], ["c"]),
            node("Relu", ["c"], ["y"]),
        ],
        {"w": normal(8, 3, 3, 3), **NORM},
    ),
    "convolution, hard swish": Pattern(
        1,
        {"x": (F, (1, 8, "n", 7))},
        [
            node("Conv", ["x", "w"], ["a"]),
            node("HardSigmoid", ["a"], ["b"], alpha=1 / 6),
            node("Mul", ["a", "b"], ["y"]),
        ],
        {"w": normal(8, 8, 1, 1)},
    ),
    "depthwise, norm, clip": Pattern(
        1,
        {"x": (F, (1, 8, 9, "n"))},
        [
            node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1], group=8),
            node("BatchNormalization", ["a", "s", "t", "m", "v"], ["b"]),
            node("Clip", ["b", "low", "high"], ["y"]),
        ],
        {"w": normal(8, 1, 3, 3), "low": np.zeros((), F), "high": np.full((), 6, F), **NORM},
    ),
    "softmax": Pattern(1, {"x": (F, ("n", 3, 17))}, [node("Softmax", ["x"], ["y"], axis=-1)], {}),
    "softmax, written out, masked": Pattern(
        1,
        {"x": (F, ("n", 17)), "mask": (F, (17,))},
        [
            node("Add", ["x", "mask"], ["a"]),
            node("ReduceMax", ["a", "last"], ["b"]),
            node("Sub", ["a", "b"], ["c"]),
            node("Exp", ["c"], ["d"]),
            node("ReduceSum", ["d", "last"], ["e"]),
            node("Div", ["d", "e"], ["y"]),
        ],
        AXES,
    ),
    "layer norm, written out": Pattern(
        1,
        {"x": (F, ("n", 32))},
        [
            node("ReduceMean", ["x", "last"], ["a"]),
            node("Sub", ["x", "a"], ["b"]),
            node("Mul", ["b", "b"], ["c"]),
            node("ReduceMean", ["c", "last"], ["d"]),
            node("Add", ["d", "eps"], ["e"]),
            node("Sqrt", ["e"], ["f"]),
            node("Div", ["b", "f"], ["g"]),
            node("Mul", ["g", "scale"], ["h"]),
            node("Add", ["h", "shift"], ["y"]),
        ],
        {"scale": normal(32), "shift": normal(32, seed=1), **AXES, **SCALARS},
    ),
    "residual, layer norm": Pattern(
        1,
        {"x": (F, ("n", 3, 32)), "r": (F, ("n", 3, 32))},
        [
            node("Add", ["x", "r"], ["a"]),
            node("LayerNormalization", ["a", "scale", "shift"], ["y"], axis=-1),
        ],
        {"scale": normal(32), "shift": normal(32, seed=1)},
    ),
    "rms norm": Pattern(
        1,
        {"x": (F, ("n", 32))},
        [
            node("Mul", ["x", "x"], ["a"]),
            node("ReduceMean", ["a", "last"], ["b"]),
            node("Add", ["b", "eps"], ["c"]),
            node("Sqrt", ["c"], ["d"]),
            node("Reciprocal", ["d"], ["e"]),
            node("Mul", ["x", "e"], ["f"]),
            node("Mul", ["scale", "f"], ["y"]),
        ],
        {"scale": normal(32), **AXES, **SCALARS},
    ),
    "heads into a product": Pattern(
        1,
        {"q": (F, ("n", 5, 24)), "k": (F, ("n", 5, 24))},
        [
            node("Reshape", ["q", "heads"], ["a"]),
            node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3]),
            node("Reshape", ["k", "heads"], ["c"]),
            node("Transpose", ["c"], ["d"], perm=[0, 2, 3, 1]),
            node("MatMul", ["b", "d"], ["e"]),
            node("Mul", ["e", "half"], ["y"]),
        ],
        {"heads": np.array([0, 0, 3, 8]), **SCALARS},
    ),
    "heads out of a product": Pattern(
        2,
        {"p": (F, ("n", 3, 5, 6)), "v": (F, ("n", 3, 6, 8))},
        [
            node("MatMul", ["p", "v"], ["a"]),
            node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3]),
            node("Reshape", ["b", "flat"], ["y"]),
        ],
        {"flat": np.array([0, 0, 24])},
    ),
    "movement": Pattern(
        1,
        {"x": (F, ("n", 6, 4))},
        [
            node("Transpose", ["x"], ["a"], perm=[1, 0, 2]),
            node("Unsqueeze", ["a", "one"], ["b"]),
            node("Slice", ["b", "from", "to", "zero"], ["c"]),
            node("Squeeze", ["c", "one"], ["y"]),
        ],
        {"from": np.array([1]), "to": np.array([5]), "zero": np.array([0]), **AXES},
    ),
    "diamond": Pattern(
        1,
        {"x": (F, ("n", 5))},
        [
            node("Relu", ["x"], ["a"]),
            node("Mul", ["a", "two_f"], ["b"]),
            node("Add", ["a", "half"], ["c"]),
            node("Sub", ["b", "c"], ["y"]),
        ],
        SCALARS,
    ),
    "diamond behind a product": Pattern(
        1,
        {"x": (F, ("n", 16))},
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Sigmoid", ["a"], ["b"]),
            node("Mul", ["a", "b"], ["y"]),
        ],
        {"w": normal(16, 24)},
    ),
    "pool to classes": Pattern(
        2,
        {"x": (F, ("n", 8, 5, 6))},
        [
            node("GlobalAveragePool", ["x"], ["a"]),
            node("Flatten", ["a"], ["b"]),
            node("Gemm", ["b", "w", "bias"], ["y"]),
        ],
        {"w": normal(8, 10), "bias": normal(10)},
    ),
    "mask of integers": Pattern(
        1,
        {"x": ("int64", ("n", 7))},
        [
            node("Unsqueeze", ["x", "one"], ["a"]),
            node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
            node("Sub", ["unit", "b"], ["c"]),
            node("Mul", ["c", "least"], ["y"]),
        ],
        {"least": np.array(-3e37, np.float32), **AXES, **SCALARS},
    ),
    "casts there and back": Pattern(
        1,
        {"x": ("int32", ("n", 7))},
        [
            node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
            node("Mul", ["a", "half"], ["b"]),
            node("Cast", ["b"], ["c"], to=TensorProto.INT64),
            node("Cast", ["c"], ["d"], to=TensorProto.INT8),
            node("Cast", ["d"], ["y"], to=TensorProto.DOUBLE),
        ],
        SCALARS,
    ),
    "integer arithmetic": Pattern(
        1,
        {"x": ("int64", ("n", 7)), "z": ("int64", ("n", 1))},
        [
            node("Mul", ["x", "seven"], ["a"]),
            node("Add", ["a", "z"], ["b"]),
            node("Mod", ["b", "seven"], ["c"]),
            node("Div", ["b", "seven"], ["d"]),
            node("Max", ["c", "d"], ["y"]),
        ],
        {"seven": np.array(7)},
    ),
    "lookup and norm": Pattern(
        3,  # one looks for indices outside of the table, so that two read what Cast makes
        {"ids": ("uint8", ("n", 6))},
        [
            node("Cast", ["ids"], ["at"], to=TensorProto.INT64),
            node("Gather", ["table", "at"], ["a"]),
            node("Gather", ["other", "order"], ["b"]),
            node("Add", ["a", "b"], ["c"]),
            node("LayerNormalization", ["c", "scale"], ["y"], axis=-1),
        ],
        {
            "table": normal(256, 16),
            "other": normal(9, 16, seed=1),
            "order": np.array([3, 1, 4, 1, 5, 0]),
            "scale": normal(16),
        },
    ),
    "shapes are not computed": Pattern(
        1,
        {"x": (F, ("n", 6, 4))},
        [
            node("Shape", ["x"], ["a"]),
            node("Gather", ["a", "zero"], ["b"]),
            node("Concat", ["b", "minus"], ["c"], axis=0),
            node("Reshape", ["x", "c"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ],
        {"zero": np.array([0]), "minus": np.array([-1])},
    ),
    "joined": Pattern(
        1,
        {"x": (F, ("n", 6)), "z": (F, ("n", 3))},
        [
            node("Relu", ["x"], ["a"]),
            node("Neg", ["z"], ["b"]),
            node("Concat", ["a", "b"], ["y"], axis=1),
        ],
        {},
    ),
    "split and joined": Pattern(
        2,
        {"x": (F, ("n", 8))},
        [
            node("Split", ["x", "halves"], ["a", "b"], axis=1),
            node("Neg", ["b"], ["c"]),
            node("Concat", ["c", "a"], ["d"], axis=1),
            node("Mul", ["d", "x"], ["y"]),
        ],
        {"halves": np.array([4, 4])},
    ),
    "constants fold": Pattern(
        1,
        {"x": (F, ("n", 6))},
        [
            node("Transpose", ["w"], ["a"]),
            node("Mul", ["a", "two_f"], ["b"]),
            node("Softmax", ["b"], ["c"]),
            node("MatMul", ["x", "c"], ["y"]),
        ],
        {"w": normal(5, 6), **SCALARS},
    ),
    "a value in the middle is an output": Pattern(
        2,
        {"x": (F, ("n", 16))},
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["z"]),
            node("Exp", ["z"], ["b"]),
            node("Neg", ["b"], ["y"]),
        ],
        {"w": normal(16, 24) / 16},
        ("z", "y"),
    ),
    "two outputs of one node": Pattern(
        2,
        {"x": (F, ("n", 6))},
        [node("Split", ["x", "cut"], ["y", "z"], axis=1)],
        {"cut": np.array([2, 4])},
        ("y", "z"),
    ),
    "an output that is an input": Pattern(
        2,
        {"x": (F, ("n", 6))},
        [node("Identity", ["x"], ["y"]), node("Neg", ["x"], ["z"])],
        {},
        ("y", "z"),
    ),
    "one producer, two products": Pattern(
        3,
        {"x": (F, ("n", 16))},
        [
            node("Erf", ["x"], ["a"]),
            node("MatMul", ["a", "w"], ["y"]),
            node("MatMul", ["a", "u"], ["z"]),
        ],
        {"w": normal(16, 24), "u": normal(16, 20)},
        ("y", "z"),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name: str) -> None:
    p = PATTERNS[name]
    m = p.model()
    low = lower_model(m)
    reference = ReferenceEvaluator(m)
    for n in (1, 5, 18):
        feeds = p.feeds(n)
        with np.errstate(all="ignore"):
            wanted = reference.run(None, feeds)
        for got, want in zip(run_program(low, feeds, n), wanted, strict=True):
            close(got, np.asarray(want), 1e-5, f"{name}, n = {n}")
    assert len(low.kernels) <= p.kernels, "\n".join(str(k) for k in low.kernels)


@pytest.mark.parametrize("name", PATTERNS)
def test_fused_kernels_mean_the_same(name: str) -> None:
    """The lowered graph node by node against the fused one, both evaluated with NumPy."""
    p = PATTERNS[name]
    m = p.model()
    graph = import_model(m.SerializeToString())
    low = lower_model(m)
    feeds = p.feeds(3)
    one_by_one = evaluated(lower(graph), [feeds[v.name] for v in graph.inputs])
    fused = evaluated(low.program, [feeds[v.name] for v in graph.inputs])
    for got, want in zip(fused, one_by_one, strict=True):
        close(got, want, 1e-5, name)


def evaluated(p: Program, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    values = {**p.constants, **dict(zip(p.inputs, arrays, strict=True))}
    dims = {d.name: (values[d.value].shape[d.axis] - d.offset) // d.factor for d in p.dims}
    for c in p.calls:
        assert isinstance(c, KernelCall)
        results = evaluate(c.kernel, {v: values[v] for v in c.inputs}, dims)
        values.update(zip(c.outputs, results, strict=True))
    return [values[v] for v in p.outputs]


def work(low: Lowered, n: int) -> int:
    """Arithmetic operations of all kernels."""
    dims = {d.name: n for d in low.program.dims}
    return sum(evaluate_int(k.flops(), dims) for k in low.kernels)


def test_expensive_work_is_not_repeated() -> None:
    """`exp` of [n, 64] is read by a reduction and twice by a product: it is computed once."""
    nodes = [
        node("Exp", ["x"], ["e"]),
        node("ReduceSum", ["e", "one"], ["s"]),
        node("Div", ["e", "s"], ["a"]),
        node("MatMul", ["a", "w"], ["y"]),
    ]
    m = model(nodes, {"x": (F, ("n", 64))}, ["y"], {"w": normal(64, 32), **AXES}, opset=20)
    low = lower_model(m)
    n = 100
    product = 2 * n * 64 * 32
    assert work(low, n) <= product + 10 * n * 64


def test_a_shared_producer_of_wide_reads_stays_its_own_kernel() -> None:
    """A [n, 1] column that a [n, 512] output reads is not computed 512 times a row."""
    nodes = [
        node("Tanh", ["x"], ["a"]),
        node("Exp", ["a"], ["b"]),
        node("Add", ["b", "z"], ["y"]),
    ]
    m = model(nodes, {"x": (F, ("n", 1)), "z": (F, ("n", 512))}, ["y"], opset=20)
    low = lower_model(m)
    assert work(low, 64) <= 64 * 512 * 2 + 64 * 10
    feeds = {"x": normal(5, 1), "z": normal(5, 512)}
    want = np.exp(np.tanh(feeds["x"])) + feeds["z"]
    close(run_program(low, feeds)[0], want, 1e-6)


def test_long_chains_stay_below_the_size_limit() -> None:
    """Three hundred nodes compile to few kernels, none of which is huge."""
    nodes = [node("Sin" if k % 2 else "Cos", [f"t{k}"], [f"t{k + 1}"]) for k in range(300)]
    m = model(nodes, {"t0": (F, ("n",))}, ["t300"])
    low = lower_model(m)
    assert 1 <= len(low.kernels) <= 4
    x = normal(7)
    want = x.astype(np.float64)
    for k in range(300):
        want = np.sin(want) if k % 2 else np.cos(want)
    close(run_program(low, {"t0": x})[0], want.astype(np.float32), 1e-5)


def test_many_inputs_stay_below_the_buffer_limit() -> None:
    names = [f"x{k}" for k in range(60)]
    inputs: Inputs = {n: (F, ("n", 3)) for n in names}
    low = lower_model(model([node("Sum", names, ["y"])], inputs, ["y"]))
    feeds = {n: normal(4, 3, seed=k) for k, n in enumerate(names)}
    close(run_program(low, feeds)[0], np.sum(list(feeds.values()), axis=0), 1e-5)


def test_the_same_layer_twice_is_one_source() -> None:
    nodes = []
    for k in range(6):
        nodes.append(node("MatMul", [f"x{k}", f"w{k}"], [f"a{k}"]))
        nodes.append(node("Relu", [f"a{k}"], [f"x{k + 1}"]))
    constants = {f"w{k}": normal(16, 16, seed=k) / 4 for k in range(6)}
    low = lower_model(model(nodes, {"x0": (F, ("n", 16))}, ["x6"], constants))
    assert len(low.kernels) == 6
    assert len({s.text for s in low.generated.sources}) == 1
    x = want = normal(5, 16)
    for k in range(6):
        want = np.maximum(want @ constants[f"w{k}"], 0)
    close(run_program(low, {"x0": x})[0], want, 1e-5)


def test_names_of_the_model_reach_no_source() -> None:
    evil = 'x"""); import os; os.system("true") #'
    nodes = [node("MatMul", [evil, "w"], ["m\n"]), node("Relu", ["m\n"], ["y'"], name="\\")]
    low = lower_model(model(nodes, {evil: (F, ("n'); del (", 4))}, ["y'"], {"w": normal(4, 8)}))
    for s in low.generated.sources:
        assert not any(text in s.text + s.name for text in ("import", "os.", "del", "m\n'", "\\"))
