"""Products of 8-bit integers as exact float32 products: every bit of the int32 results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

import onnxjit

CODES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


def compiled(
    arrays: dict[str, np.ndarray | None], constants: set[str], tail: Sequence[onnx.NodeProto] = ()
) -> Any:
    """MatMulInteger of named inputs, some of which are constants, and nodes that read its "y"."""
    given_ = {name: x for name, x in arrays.items() if x is not None}
    names = ["a", "b", "za", "zb"]
    while arrays.get(names[-1]) is None:
        names.pop()
    node = helper.make_node("MatMulInteger", [n if n in given_ else "" for n in names], ["y"])
    inputs = [
        helper.make_tensor_value_info(name, CODES[x.dtype.name], x.shape)
        for name, x in given_.items()
        if name not in constants
    ]
    made = [numpy_helper.from_array(given_[name], name) for name in constants & given_.keys()]
    result = tail[-1].output[0] if tail else "y"
    kind = TensorProto.FLOAT if tail else TensorProto.INT32
    output = helper.make_tensor_value_info(result, kind, None)
    graph = helper.make_graph([node, *tail], "g", inputs, [output], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return onnxjit.compile(model, jobs=0)


def exact(arrays: dict[str, np.ndarray | None]) -> np.ndarray:
    a, b = (arrays[n].astype(np.int64) for n in "ab")  # type: ignore[union-attr]
    za, zb = (arrays.get(n) for n in ("za", "zb"))
    if za is not None:
        a = a - (za.astype(np.int64)[:, None] if za.size > 1 else za.astype(np.int64))
    if zb is not None:
        b = b - zb.astype(np.int64)
    return (a @ b).astype(np.int32)


def run(model: Any, arrays: dict[str, np.ndarray | None], constants: set[str]) -> np.ndarray:
    return model(**{n: x for n, x in arrays.items() if x is not None and n not in constants})


@pytest.mark.parametrize("kind_a", CODES)
@pytest.mark.parametrize("kind_b", CODES)
@pytest.mark.parametrize("fixed", [True, False])
def test_the_largest_sums_are_exact(kind_a: str, kind_b: str, fixed: bool) -> None:
    """All operands at the end of their range that is furthest from the zero point."""
    a, b = np.iinfo(kind_a), np.iinfo(kind_b)
    constants = {"b", "zb"} if fixed else set()
    for ends in ((a.max, a.min, b.max, b.min), (a.min, a.max, b.max, b.min)):
        arrays: dict[str, np.ndarray | None] = {
            "a": np.full((7, 1031), ends[0], kind_a), "b": np.full((1031, 19), ends[2], kind_b),
            "za": np.array(ends[1], kind_a), "zb": np.array(ends[3], kind_b),
        }  # fmt: skip
        model = compiled(arrays, constants)
        np.testing.assert_array_equal(run(model, arrays, constants), exact(arrays))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_all_shapes_and_zero_points(data: st.DataObject) -> None:
    draw = data.draw
    m, n = (draw(st.sampled_from([1, 2, 5, 16, 17, 33])) for _ in range(2))
    k = draw(st.sampled_from([1, 3, 255, 256, 257, 258, 259, 511, 517, 777]))
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    kinds = [draw(st.sampled_from(sorted(CODES))) for _ in range(2)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    def some(shape: tuple[int, ...], kind: str) -> np.ndarray:
        limits = np.iinfo(kind)
        return rng.integers(limits.min, limits.max + 1, shape).astype(kind)

    zero_a = draw(st.sampled_from([None, (), (1,), (m,)])) if not batch else None
    zero_b = draw(st.sampled_from([None, (), (1,), (n,)]))
    arrays = {
        "a": some((*batch, m, k), kinds[0]),
        "b": some((k, n), kinds[1]),
        "za": None if zero_a is None else some(zero_a, kinds[0]),
        "zb": None if zero_b is None else some(zero_b, kinds[1]),
    }
    constants = draw(st.sampled_from([set(), {"b"}, {"b", "zb"}, {"za", "b", "zb"}]))
    model = compiled(arrays, constants)
    np.testing.assert_array_equal(run(model, arrays, constants), exact(arrays))


def test_a_quantised_layer_is_a_few_kernels() -> None:
    """Blocks of exact sums, the last with what follows; the constant is centred beforehand."""
    rng = np.random.default_rng(5)
    arrays: dict[str, np.ndarray | None] = {
        "a": rng.integers(0, 256, (31, 768)).astype(np.uint8),
        "b": rng.integers(-128, 128, (768, 64)).astype(np.int8),
        "za": np.array(121, np.uint8),
        "zb": np.array(0, np.int8),
    }
    tail = [
        helper.make_node("Cast", ["y"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["r"]),
    ]
    model = compiled(arrays, {"b", "zb"}, tail)
    found = run(model, arrays, {"b", "zb"})
    np.testing.assert_array_equal(found, np.maximum(exact(arrays), 0).astype(np.float32))
    rules = [kernel.rule for kernel in model.kernels.values()]
    assert rules.count("contraction") == 2 and len(rules) <= 3


def test_names_of_the_model_are_not_taken() -> None:
    """Values between the blocks get names that no value of the model has."""
    a, b = np.full((2, 600), 7, np.uint8), np.full((600, 3), 5, np.uint8)
    nodes = [
        helper.make_node("Identity", ["a"], ["y/a"]),
        helper.make_node("MatMulInteger", ["y/a", "b"], ["y"]),
        helper.make_node("MatMulInteger", ["y/a", "b"], ["y/s0"]),
        helper.make_node("Sub", ["y", "y/s0"], ["none"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("a", TensorProto.UINT8, a.shape)],
        [helper.make_tensor_value_info(n, TensorProto.INT32, None) for n in ("y", "none")],
        [numpy_helper.from_array(b, "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    y, none = onnxjit.compile(model, jobs=0)(a=a)
    assert (y == 21000).all() and not none.any()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_quantized_products_are_rounded_once(data: st.DataObject) -> None:
    """The exact sum, one product with the scales in float32, one rounding to even."""
    draw = data.draw
    m, n = (draw(st.sampled_from([1, 5, 16, 33])) for _ in range(2))
    k = draw(st.sampled_from([1, 64, 255, 519, 1031]))
    kind = draw(st.sampled_from(sorted(CODES)))
    shape = draw(st.sampled_from([(), (1,)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    limits = np.iinfo(kind)

    def some(*sizes: int) -> np.ndarray:
        return np.asarray(rng.integers(limits.min, limits.max + 1, sizes)).astype(kind)

    a, b, za, zb, zy = some(m, k), some(k, n), some(*shape), some(*shape), some(*shape)
    sa, sb, sy = (
        np.full(shape, x, np.float32)
        for x in (0.013, rng.uniform(0.001, 0.1), 0.013 * np.sqrt(k) * rng.uniform(0.5, 9))
    )
    arrays = dict(
        zip(
            ("a", "sa", "za", "b", "sb", "zb", "sy", "zy"),
            (a, sa, za, b, sb, zb, sy, zy),
            strict=True,
        )
    )
    fixed = draw(st.sampled_from([set(), set(arrays) - {"a"}, {"b", "zb"}]))
    code = {**CODES, "float32": TensorProto.FLOAT}
    inputs = [
        helper.make_tensor_value_info(name, code[x.dtype.name], x.shape)
        for name, x in arrays.items()
        if name not in fixed
    ]
    node = helper.make_node("QLinearMatMul", [*arrays], ["y"])
    output = helper.make_tensor_value_info("y", CODES[kind], None)
    made = [numpy_helper.from_array(arrays[name], name) for name in sorted(fixed)]
    graph = helper.make_graph([node], "g", inputs, [output], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    found = onnxjit.compile(model, jobs=0)(**{n: x for n, x in arrays.items() if n not in fixed})
    total = exact({"a": a, "b": b, "za": za.reshape(()), "zb": zb.reshape(())})
    scale = (sa * sb / sy).reshape(())
    wanted = np.rint(total.astype(np.float32) * scale) + zy.reshape(()).astype(np.float32)
    np.testing.assert_array_equal(found, np.clip(wanted, limits.min, limits.max).astype(kind))


@pytest.mark.parametrize("op", ["MatMulInteger", "QLinearMatMul"])
@pytest.mark.parametrize(
    "wrong", [("float", "float32[]"), ("none", "uint8[0]"), ("five", "uint8[5]"), ("missing", "")]
)
def test_bad_operands_are_refused_by_the_name_of_their_node(
    op: str, wrong: tuple[str, str]
) -> None:
    """What the expansion does not understand is left to the definition, which names the node."""
    name, text = wrong
    zero = np.zeros({"uint8[0]": 0, "uint8[5]": 5}.get(text, ()), text.partition("[")[0] or "uint8")
    arrays = {"a": np.ones((3, 4), np.uint8), "b": np.ones((4, 2), np.uint8), name: zero}
    names = ["a", "b", name] if text else ["a"]
    if op == "QLinearMatMul":
        arrays["s"] = np.array(0.5, np.float32)
        names = ["a", "s", name, "b", "s", name, "s", name] if text else ["a", "s", name]
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in arrays.items()
    ]
    node = helper.make_node(op, names, ["y"], name="the_node")
    output = helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(onnxjit.ModelError, match=f"{op}.*the_node"):
        onnxjit.compile(model, jobs=0)
