"""Importing models: ways in, names, nodes, inputs, attributes, subgraphs."""

import io
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from small_models import FLOAT, info, model_of, weight

from onnxjit.errors import ModelError
from onnxjit.graph import Value
from onnxjit.importer import import_model

LIGHT = sorted((Path(onnx.backend.test.__file__).parent / "data" / "light").glob("*.onnx"))

# Ways in


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_models(path):
    graph = import_model(path)
    assert len(graph.inputs) == len(graph.outputs) == 1
    assert graph.inputs[0].shape == (1, 3, 224, 224)


def test_light_models_are_there():
    assert len(LIGHT) >= 9


def test_import_is_fast():
    path = next(path for path in LIGHT if "resnet50" in path.stem)
    best = 1.0
    for _ in range(3):
        start = time.perf_counter()
        import_model(path)
        best = min(best, time.perf_counter() - start)
    assert best < 0.15


def test_all_ways_to_give_a_model(tmp_path):
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], initializers=[weight()])
    path = tmp_path / "m.onnx"
    path.write_bytes(data := model.SerializeToString())
    ways = [model, data, bytearray(data), io.BytesIO(data), path, str(path), os.fsencode(path)]
    graphs = [import_model(way) for way in ways[:-1]]
    assert all(graph == graphs[0] for graph in graphs)
    np.testing.assert_array_equal(graphs[0].constants["w"], numpy_helper.to_array(weight()))
    with pytest.raises(ModelError, match="not an ONNX model"):
        import_model(ways[-1])  # bytes are a model, not a path
    with pytest.raises(TypeError):
        import_model(3)


def test_big_weights_are_views_of_the_data():
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], initializers=[weight()])
    shares = []
    for pad in range(4):  # the position of the weights in the file decides about alignment
        model.producer_name = "p" * pad
        data = model.SerializeToString()
        array = import_model(data).constants["w"]
        assert array.flags.aligned and not array.flags.writeable
        np.testing.assert_array_equal(array, numpy_helper.to_array(weight()))
        shares.append(np.shares_memory(array, np.frombuffer(data, np.uint8)))
    assert sum(shares) == 1


# Structure


def test_nodes_are_sorted_pruned_and_versioned():
    model = model_of(
        [
            helper.make_node("Add", ["a", "b"], ["y"]),
            helper.make_node("Neg", ["x"], ["dead"]),
            helper.make_node("Relu", ["x"], ["a"], name="r"),
            helper.make_node("Softmax", ["x"], ["b"], axis=1),
        ],
        value_info=[info("a", ("n", 3)), info("dead", (1,))],
    )
    model.opset_import[0].version = 12
    graph = import_model(model)
    assert [(node.op, node.version) for node in graph.nodes] == [
        ("Relu", 6),
        ("Softmax", 11),
        ("Add", 7),
    ]
    assert graph.nodes[1].attrs == {"axis": 1}
    assert graph.values == {"a": Value("a", "float32", graph.inputs[0].shape)}


def test_odd_names_stay_as_they_are():
    names = ["gpu_0/data:0", "a b", "日本", "import os\n", "%s{}"]
    nodes = [helper.make_node("Neg", [a], [b], name="same") for a, b in pairwise(names)]
    graph = import_model(model_of(nodes, [info(names[0])], [info(names[-1])]))
    assert [node.outputs[0] for node in graph.nodes] == names[1:]


def test_inputs_and_outputs_without_nodes():
    graph = import_model(model_of([], outputs=[info("x"), info("w")], initializers=[weight()]))
    assert [value.name for value in graph.outputs] == ["x", "w"]
    assert set(graph.constants) == {"w"}


def test_omitted_optionals():
    nodes = [helper.make_node("Clip", ["x", "", ""], ["y"])]
    assert import_model(model_of(nodes)).nodes[0].inputs == ("x",)
    nodes = [helper.make_node("Clip", ["x", "", "x"], ["y"])]
    assert import_model(model_of(nodes)).nodes[0].inputs == ("x", "", "x")


def test_initializers_that_are_inputs():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    for ir, overridable in ((3, 0), (4, 2)):
        graph = import_model(
            model_of(
                nodes,
                [info("x"), info("w", (64, 64)), info("unused", (64, 64))],
                initializers=[weight(), weight("unused")],
                ir=ir,
            )
        )
        assert [value.name for value in graph.inputs] == ["x"]
        assert len(graph.overridable) == overridable
        assert len(graph.constants) == max(1, overridable)


def test_dimensions():
    shapes = {"a": ("n", "2*n"), "b": ("?", "?"), "c": (None, -1), "d": ("n", 5), "e": None}
    inputs = [info(name, shape) for name, shape in shapes.items()]
    inputs[2].type.tensor_type.shape.dim[1].dim_value = -1
    nodes = [helper.make_node("Foo", list(shapes), ["y"], domain="my")]
    graph = import_model(model_of(nodes, inputs, imports=[("", 18), ("my", 1)]))
    texts = [None if v.shape is None else tuple(map(str, v.shape)) for v in graph.inputs]
    assert texts == [("d0", "(2 * d0)"), ("d1", "d2"), ("d3", "d4"), ("d0", "5"), None]
    assert [dim.name for dim in graph.dims] == ["n", "?", "?", "", "-1"]
    fixed = import_model(model_of(nodes, inputs, imports=[("my", 1)]), overrides={"n": 4})
    assert fixed.inputs[0].shape == (4, 8) and fixed.outputs[0].shape == (4, 3)
    for overrides in ({"m": 3}, {"n": -1}):
        with pytest.raises(ModelError):
            import_model(model_of(nodes, inputs, imports=[("my", 1)]), overrides=overrides)


def test_types_that_are_not_tensors():
    floats = helper.make_tensor_type_proto(FLOAT, None)
    types = {
        "sequence(float32)": helper.make_sequence_type_proto(floats),
        "optional(sequence(float32))": helper.make_optional_type_proto(
            helper.make_sequence_type_proto(floats)
        ),
        "map(int64,float32)": helper.make_map_type_proto(TensorProto.INT64, floats),
        "sparse(float32)": helper.make_sparse_tensor_type_proto(FLOAT, [3]),
    }
    for text, proto in types.items():
        value = helper.make_value_info("x", proto)
        assert import_model(model_of([], [value], [value])).inputs == (Value("x", text, None),)


def test_attributes_of_all_types():
    attrs = {
        "f": 1.5,
        "i": 3,
        "s": "text",
        "t": weight("t", (2,)),
        "fs": [1.0, 2.0],
        "is": [1, 2],
        "ss": ["a", "b"],
        "ts": [weight("t", (2,))],
        "bytes": b"\xff",
        "tp": helper.make_tensor_type_proto(FLOAT, [2]),
    }
    node = helper.make_node("Foo", ["x"], ["y"], domain="my", **attrs)
    untyped = node.attribute.add(name="old", ints=[4])
    assert untyped.type == 0
    made = import_model(model_of([node], imports=[("my", 3)])).nodes[0]
    assert made.version == 3
    expected = {
        **attrs,
        "t": np.arange(2, dtype=np.float32),
        "ts": [np.arange(2, dtype=np.float32)],
        "tp": Value("", "float32", (2,)),
        "old": [4],
    }
    assert made == made.replace(attrs=expected)


def test_metadata():
    model = model_of([helper.make_node("Neg", ["x"], ["y"])], imports=[("ai.onnx", 11), ("", 13)])
    model.producer_name, model.model_version, model.doc_string = "me", 7, "doc"
    model.metadata_props.add(key="k", value="v")
    metadata = import_model(model).metadata
    assert metadata["producer_name"] == "me" and metadata["model_version"] == 7
    assert metadata["opset_imports"] == {"": 13}
    assert metadata["metadata_props"] == {"k": "v"} and metadata["graph_name"] == "g"


@pytest.mark.parametrize(
    "model, message",
    [
        (model_of([helper.make_node("Neg", ["z"], ["y"])]), "'z'"),
        (model_of([helper.make_node("Neg", ["x"], ["z"])]), "'y'"),
        (model_of([helper.make_node("Neg", ["x"], ["y"])] * 2), "more than once"),
        (model_of([helper.make_node("Neg", ["x"], ["x"])]), "more than once"),
        (model_of([], [info("x"), info("x")], [info("x")]), "more than once"),
        (
            model_of([helper.make_node("Constant", [], ["y"], value_int=1)] * 2),
            "more than once",
        ),
        (model_of([helper.make_node("Constant", [], ["y"])]), "no value"),
        (model_of([helper.make_node("Neg", ["x"], ["y"])], imports=[("my", 1)]), "import"),
        (model_of([], outputs=[]), "no outputs"),
        (
            model_of(
                [
                    helper.make_node("Neg", ["b"], ["y"], name="one"),
                    helper.make_node("Neg", ["y"], ["b"], name="two"),
                ]
            ),
            "one.*two|two.*one",
        ),
    ],
)
def test_inconsistent_models(model, message):
    with pytest.raises(ModelError, match=message):
        import_model(model)


def test_subgraphs_capture_outer_names():
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        g (bool c, float[3] x) => (float[3] y) {
            late = Neg(x)
            y = If <then_branch = a () => (float[3] r) {
                        unused = Exp(x)
                        k = Constant <value = float {2.0}> ()
                        m = Mul(late, k)
                        r = Add(m, x) },
                    else_branch = b () => (float[3] r) { r = Identity(late) }> (c)
        }""")
    model.graph.node.append(first := model.graph.node.pop(0))
    assert first.op_type == "Neg"
    graph = import_model(model)
    then = graph.nodes[1].attrs["then_branch"]
    assert [node.op for node in graph.nodes] == ["Neg", "If"]
    assert then.free == ("late", "x") and list(then.constants) == ["k"]
    assert [node.op for node in then.nodes] == ["Mul", "Add"]
