"""The passes from a graph to a program: before and after, and the same numbers all along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from kernels_support import close, lab, lower_model, model, run_program
from onnx.helper import make_node as node
from onnx.reference import ReferenceEvaluator

from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.codegen.expr import Dim, as_int
from onnxjit.codegen.kernel import Kernel
from onnxjit.errors import ModelError, UnsupportedOperators
from onnxjit.importer import import_model
from onnxjit.passes import PIPELINE, run_pipeline
from onnxjit.passes.fold_constants import fold_constants
from onnxjit.passes.lower import lower, prune_program
from onnxjit.program import HostCall, KernelCall, Program

F = "float32"


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def lowered(m: onnx.ModelProto) -> Program:
    return lower(import_model(m.SerializeToString()))


def evaluated(p: Program, *arrays: np.ndarray) -> list[np.ndarray]:
    """A program by the meaning of its kernels."""
    values = {**p.constants, **dict(zip(p.inputs, arrays, strict=True))}
    dims = {d.name: (values[d.value].shape[d.axis] - d.offset) // d.factor for d in p.dims}
    for c in p.calls:
        assert isinstance(c, KernelCall)
        made = evaluate(c.kernel, {v: values[v] for v in c.inputs}, dims)
        values.update(zip(c.outputs, made, strict=True))
    return [values[v] for v in p.outputs]


def residual_block() -> onnx.ModelProto:
    constants = {"w": weights(6, 5, 3, 3), "u": weights(6, 6, 1, 1), "d": weights(6, 1, 3, 3),
                 "v": weights(24, 4)}  # fmt: skip
    return model(
        [
            node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "u"], ["c"]),
            node("Conv", ["c", "d"], ["e"], pads=[1] * 4, group=6),
            node("Add", ["e", "b"], ["f"]),
            node("MaxPool", ["f"], ["g"], kernel_shape=[2, 2], strides=[2, 2]),
            node("AveragePool", ["g"], ["h"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", ["h"], ["i"]),
            node("MatMul", ["i", "v"], ["y"]),
        ],
        {"x": (F, ("n", 5, 8, 8))},
        ["y"],
        constants,
    )


def test_every_pass_keeps_the_numbers() -> None:
    m = residual_block()
    x = np.random.default_rng(0).standard_normal((2, 5, 8, 8)).astype(np.float32)
    want = np.asarray(ReferenceEvaluator(m).run(None, {"x": x})[0])
    seen: list[str] = []

    def observe(name: str, p: Program) -> None:
        seen.append(name)
        p.verify()
        close(evaluated(p, x)[0], want, 1e-5, name)

    run_pipeline(import_model(m.SerializeToString()), lab().target, observe)
    assert seen == ["lower", *(name for name, _ in PIPELINE)]


def test_passes_leave_their_input_as_it_was() -> None:
    """A pass makes a new program; what it was given can be used again."""
    before = lowered(residual_block())
    text = str(before)
    for _, step in PIPELINE:
        after = step(before, lab().target)
        assert str(before) == text
        after.verify()


# --- lowering ----------------------------------------------------------------------------------


def test_every_unsupported_node_is_listed() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("NoSuch", ["a"], ["b"], domain="made.up", name="first"),
        node("Other", ["b"], ["c"], domain="made.up", name="second"),
        node("Neg", ["c"], ["y"]),
    ]
    m = model(nodes, {"x": (F, (2,))}, ["y"])
    m.opset_import.append(onnx.helper.make_opsetid("made.up", 3))
    with pytest.raises(UnsupportedOperators) as caught:
        lowered(m)
    text = str(caught.value)
    assert all(word in text for word in ("NoSuch", "Other", "first", "second", "made.up", "3"))


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([node("MatMul", ["x", "w"], ["y"])], (2, 3)),
        ([node("Add", ["x", "w"], ["y"])], (5, 7)),
        ([node("Concat", ["x", "w"], ["y"], axis=0)], (5, 7)),
        ([node("Transpose", ["x"], ["y"], perm=[0, 0])], (5, 7)),
        ([node("Softmax", ["x"], ["y"], axis=2)], (5, 7)),
    ],
)
def test_nodes_that_break_their_specification(
    nodes: Sequence[onnx.NodeProto], shape: tuple[int, ...]
) -> None:
    nodes[0].name = "culprit"
    with pytest.raises(ModelError, match="culprit"):
        lowered(model(nodes, {"x": (F, shape)}, ["y"], {"w": weights(4, 6)}))


def test_shape_arithmetic_leaves_no_kernels() -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["head"]),
        node("ReduceProd", ["head"], ["rows"], keepdims=1),
        node("Concat", ["rows", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "two": np.array([2]), "minus": np.array([-1])}
    m = model(nodes, {"x": (F, ("a", "b", 6))}, ["y"], constants)
    low = lower_model(m)
    assert len(low.kernels) == 1
    y = low.program.types[low.program.outputs[0]]
    assert evaluate_int(y.shape[0], {d.name: 3 for d in low.program.dims}) == 9
    assert as_int(y.shape[1]) == 6


def test_outputs_that_are_plain_reads_are_kernels_of_their_own() -> None:
    nodes = [
        node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
        node("MatMul", ["a", "b"], ["d"]),
        node("Add", ["d", "c"], ["y"]),
    ]
    low = lower_model(model(nodes, {"x": (F, (6, 18))}, ["y"]))
    assert len(low.kernels) == 1
    x = weights(6, 18)
    a, b, c = np.split(x, 3, axis=1)
    close(run_program(low, {"x": x})[0], a @ b + c, 1e-5)


def test_unused_nodes_and_constants_go() -> None:
    nodes = [
        node("Relu", ["x"], ["y"]),
        node("MatMul", ["x", "w"], ["unused"]),
        node("Exp", ["unused"], ["unused2"]),
    ]
    p = lowered(model(nodes, {"x": (F, ("n", 3))}, ["y"], {"w": weights(3, 3)}))
    assert len(p.calls) == 1 and not p.constants
    assert prune_program(p).calls == p.calls


# --- constants ---------------------------------------------------------------------------------


def test_large_constant_results_are_computed_once() -> None:
    """Above the limit of lowering: folded after fusion."""
    nodes = [
        node("Transpose", ["w"], ["a"], perm=[1, 0]),
        node("Exp", ["a"], ["b"]),
        node("MatMul", ["x", "b"], ["y"]),
    ]
    w = weights(400, 300) / 4
    m = model(nodes, {"x": (F, ("n", 300))}, ["y"], {"w": w})
    assert len(lowered(m).calls) == 3
    low = lower_model(m)
    assert [k.inputs[0] for k in low.kernels] == [low.program.inputs[0]]
    x = weights(3, 300)
    close(run_program(low, {"x": x})[0], x @ np.exp(w.T), 1e-5)


def test_a_constant_shape_with_symbolic_contents_is_not_folded() -> None:
    """`Shape` has no inputs that are not constants, yet it depends on sizes."""
    m = model([node("Shape", ["x"], ["y"])], {"x": (F, ("n", 4))}, ["y"])
    p = fold_constants(lowered(m))
    (call,) = p.calls
    assert isinstance(call, KernelCall) and not call.inputs
    low = lower_model(m)
    for n in (0, 7):
        (got,) = run_program(low, {"x": np.zeros((n, 4), np.float32)})
        assert got.tolist() == [n, 4]


def test_constants_that_are_outputs_stay() -> None:
    nodes = [node("Neg", ["w"], ["z"]), node("Relu", ["x"], ["y"])]
    low = lower_model(model(nodes, {"x": (F, (3,))}, ["y", "z", "w"], {"w": weights(2, 2)}))
    x = weights(3)
    got = run_program(low, {"x": x})
    for a, b in zip(got, (np.maximum(x, 0), -weights(2, 2), weights(2, 2)), strict=True):
        close(a, b)


# --- layouts -----------------------------------------------------------------------------------


def test_inputs_outputs_and_host_values_stay_row_major() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["y"]),
        node("Conv", ["y", "u"], ["b"]),
        node("NonZero", ["b"], ["z"]),
    ]
    constants = {"w": weights(8, 4, 3, 3), "u": weights(8, 8, 1, 1)}
    m = model(nodes, {"x": (F, ("n", 4, 6, 5))}, ["y", "z"], constants)
    p = run_pipeline(import_model(m.SerializeToString()), lab().target)
    host = {v for c in p.calls if isinstance(c, HostCall) for v in (*c.inputs, *c.outputs)}
    assert host
    for v in (*p.inputs, *p.outputs, *host):
        assert p.layouts.get(v, tuple(range(p.types[v].rank))) == tuple(range(p.types[v].rank))


def test_layouts_are_permutations_of_the_axes() -> None:
    p = run_pipeline(import_model(residual_block().SerializeToString()), lab().target)
    assert p.layouts, "the values between convolutions are stored channels last"
    for v, order in p.layouts.items():
        assert sorted(order) == list(range(p.types[v].rank))


def test_a_constant_with_a_layout_is_read_the_same_by_everyone() -> None:
    """A depthwise filter is re-laid for its convolution; another kernel reads it, too."""
    nodes = [
        node("Conv", ["x", "u"], ["a"]),
        node("Conv", ["a", "d"], ["b"], pads=[1] * 4, group=8),
        node("ReduceSum", ["d", "axes"], ["s"], keepdims=0),
        node("Mul", ["s", "k"], ["t"]),
        node("MatMul", ["t", "q"], ["z"]),
        node("Conv", ["b", "u"], ["y"]),
    ]
    constants = {"u": weights(8, 8, 1, 1), "d": weights(8, 1, 3, 3), "axes": np.array([1]),
                 "q": weights(3, 6)}  # fmt: skip
    inputs = {"x": (F, (1, 8, 5, "n")), "k": (F, ("m", 3, 3))}
    m = model(nodes, inputs, ["y", "z"], constants)
    feeds = {"x": weights(1, 8, 5, 7), "k": weights(8, 3, 3)}
    want = ReferenceEvaluator(m).run(None, feeds)
    for got, w in zip(run_program(lower_model(m), feeds), want, strict=True):
        close(got, np.asarray(w), 1e-5)


# --- programs ----------------------------------------------------------------------------------


def test_a_broken_program_is_noticed() -> None:
    p = lowered(residual_block())
    with pytest.raises(AssertionError, match="read before it is made"):
        p.replace(calls=p.calls[::-1]).verify()
    with pytest.raises(AssertionError, match="made twice"):
        p.replace(calls=(*p.calls, p.calls[-1])).verify()
    with pytest.raises(AssertionError, match="never made"):
        p.replace(calls=p.calls[:-1]).verify()


def test_symbolic_sizes_are_read_from_the_inputs() -> None:
    inputs = {"x": (F, ("n", "2*m", 3)), "z": (F, ("n", "m"))}
    nodes = [node("ReduceSum", ["x"], ["a"], keepdims=0), node("Add", ["a", "z"], ["y"])]
    p = lowered(model(nodes, inputs, ["y"]))
    found = {(p.inputs.index(d.value), d.axis, d.factor) for d in p.dims}
    assert found in ({(0, 0, 1), (0, 1, 2)}, {(0, 0, 1), (1, 1, 1)})
    kernel: Kernel = next(iter(p.kernels())).kernel
    extents = {a.extent for s in kernel.stages for r in s.reduces for a in r.axes}
    assert any(isinstance(e, Dim) for e in extents)
