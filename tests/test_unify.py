"""Sources that differ in constants alone become one: which may differ, and the results."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

import onnxjit
from onnxjit.codegen.unify import SMALL, unified

SOURCE = '''"""Schedule: contraction."""


def kernel(ptrs, ints, scratch, begin, end):
    b0 = buffer_float32(ptrs, 0)
    n0 = ints[0]
    s0 = stack_float32({stack}, 5)
    s1 = scratch_float32(scratch, {offset}, 6)
    for tile in range(begin, end):
        rb = umod_(tile, {divisor})
        for i in range(0, {count}, {step}):
            b0[(i*{stride} + rb*{stride} + n0 + udiv_(i, {inner}))] = ({value} + float32({real}))
        {call}(b0, 0)
'''
USUAL = {
    "stack": "96", "offset": "1536", "divisor": "100", "count": "64", "step": "40", "stride": "640",
    "value": "int32(77)", "real": "-1e-05", "inner": "3", "call": "softmax_f32_avx2",
}  # fmt: skip


def source(**changes: str) -> str:
    return SOURCE.format(**{**USUAL, **changes})


def test_a_differing_size_becomes_an_argument() -> None:
    (text, first), (other, second) = unified([source(), source(stride="1280")])
    assert text == other
    assert "    n1 = ints[1]\n" in text and text.count("n1") == 3
    assert (first, second) == ((640,), (1280,))


def test_sizes_that_differ_alike_are_one_argument() -> None:
    texts = [source(stride="640", offset="640"), source(stride="1280", offset="1280")]
    (text, first), (_, second) = unified(texts)
    assert (first, second) == ((640,), (1280,))
    assert text.count("ints[") == 2
    texts.append(source(stride="1280", offset="640"))
    assert [sizes for _, sizes in unified(texts)] == [(640, 640), (1280, 1280), (640, 1280)]


@pytest.mark.parametrize("kept", ["inner", "step", "value"])
def test_what_decides_the_machine_code_stays(kept: str) -> None:
    other = {"value": "int32(78)"}.get(kept, "50")
    texts = [source(), source(**{kept: other})]
    assert unified(texts) == [(text, ()) for text in texts]


def test_arrays_get_the_largest_size() -> None:
    texts = [source(), source(stack="50"), source(stack="10")]
    assert unified(texts) == [(source(), ())] * 3


def test_divisors_outside_of_innermost_loops_become_arguments() -> None:
    (text, first), (other, second) = unified([source(), source(divisor="50")])
    assert text == other and "umod_(tile, n1)" in text
    assert (first, second) == ((100,), (50,))
    real = source().replace("rb = umod_(tile, 100)", "rb = divide_by(b0[0], float32(3.0))")
    (text, first), _ = unified([real, real.replace("3.0", "5.0")])
    assert "divide_by(b0[0], f1)" in text
    assert first == (int(np.float32(3).view(np.int32)),)


def test_micro_kernels_may_differ_and_stay() -> None:
    other = source(call="softmax_f32_avx512", divisor="50")
    (text, first), (renamed, second) = unified([source(), other])
    assert text.replace("softmax_f32_avx2", "softmax_f32_avx512") == renamed != text
    assert (first, second) == ((100,), (50,))
    families = [source(), source(call="pack_f32_8_avx2", divisor="50")]
    assert unified(families) == [(text, ()) for text in families]
    # Two calls of one micro-kernel are not two of two.
    twice = [text.rstrip() + "; softmax_f32_avx2(b0, 1)\n" for text in (source(), other)]
    assert unified(twice) == [(text, ()) for text in twice]


@pytest.mark.parametrize("kept", ["count", "stride"])
def test_small_bounds_and_strides_of_innermost_loops_stay(kept: str) -> None:
    texts = [source(**{kept: n}) for n in (str(SMALL), "8", str(SMALL + 1))]
    assert unified(texts) == [(text, ()) for text in texts]
    around = [text.replace("b0[", "for j in range(5):\n                b0[") for text in texts]
    assert len({text for text, _ in unified(around)}) == 1


def test_a_differing_real_is_passed_as_its_bits() -> None:
    texts = [source(), source(real="0.25")]
    (text, first), (other, second) = unified(texts)
    assert text == other
    assert "    f1 = bitcast_float32(int32(ints[1]))\n" in text
    assert (first, second) == tuple(
        (int(np.float32(x).view(np.int32)),) for x in (-1e-05, 0.25)
    )  # fmt: skip
    divided = [text.replace("(int32(77) + ", "divide_by(b0[0], ") for text in texts]
    assert unified(divided) == [(text, ()) for text in divided]


def test_equal_and_single_sources_are_left_alone() -> None:
    texts = [source(), source(), "def kernel(ptrs, ints, scratch, begin, end):\n    pass\n"]
    assert unified(texts) == [(text, ()) for text in texts]


@pytest.mark.parametrize("scales", [False, True])
def test_a_network_of_several_layers(scales: bool) -> None:
    """Layers of other widths, or with other scales, share a kernel and compute what the reference
    does; so does the kernel alone."""
    widths = [96, 96, 96, 96] if scales else [128, 256, 512, 1024]
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for n, (into, out) in enumerate(itertools.pairwise(widths)):
        data = (rng.standard_normal((into, out)) / np.sqrt(into)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(data, f"w{n}"))
        scale = np.float32(-0.5 - n if scales else 2)
        weights.append(onnx.numpy_helper.from_array(scale, f"s{n}"))
        nodes.append(helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"y{n}"]))
        nodes.append(helper.make_node("Tanh", [f"y{n}"], [f"z{n}"]))
        nodes.append(helper.make_node("Mul", [f"z{n}", f"s{n}"], [f"x{n + 1}"]))
    shapes = [[37, c] for c in (widths[0], widths[-1])]
    names = ("x0", f"x{len(widths) - 1}")
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "layers", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    compiled = onnxjit.compile(model)
    x = rng.standard_normal(shapes[0]).astype(np.float32)
    (want,) = ReferenceEvaluator(model).run(None, {"x0": x})
    np.testing.assert_allclose(compiled(x), want, atol=1e-5)
    assert len({k.source for k in compiled.kernels.values()}) < len(compiled.kernels)
    for kernel in compiled.kernels.values():
        kernel.check(kernel.source)
