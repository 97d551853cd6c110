"""Functions of models and of ONNX's schemas, inlined."""

import numpy as np
import pytest
from onnx import helper, parser
from small_models import FUNCTIONS, model_of, run

from onnxjit.errors import ModelError
from onnxjit.exporter import graph_to_model
from onnxjit.graph import Graph, Node, Value
from onnxjit.importer import import_model
from onnxjit.importer_functions import inline_schema_function, split_constants

X = np.array([[1.0, 2.0, -0.5]], np.float32)


def expected_of_functions():
    """What FUNCTIONS computes for X."""

    def outer(a, scale=2.0):
        e = np.exp(np.exp(-a if a.sum() > 0 else a))
        return e / e.sum() * scale

    y = outer(X, 3.0)
    return y, outer(y), X


def assert_as_expected(graph):
    for got, wanted in zip(run(graph_to_model(graph), X), expected_of_functions(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_functions_are_inlined():
    graph = import_model(parser.parse_model(FUNCTIONS))
    assert_as_expected(graph)
    ops = [node.op for node in graph.nodes]
    assert ops.count("If") == 2 and ops.count("Identity") == 1 and "outer" not in ops
    softmax = next(node for node in graph.nodes if node.op == "Softmax")
    assert softmax.version == 11 and softmax.attrs == {}
    reduce = next(node for node in graph.nodes if node.op == "ReduceSum")
    assert reduce.version == 13
    assert sorted(array.item() for array in graph.constants.values()) == [0.0, 0.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["y/outer/s", "y/outer/t", "t/outer/t/inner/c", "a", "b"])
@pytest.mark.parametrize("replaced", ["x", "t"])
def test_a_function_does_not_capture_or_clash(name, replaced):
    """The model uses a name that the importer would give to an inner value, or a body uses."""
    model = parser.parse_model(FUNCTIONS)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if old == replaced else old for old in names]
    for value in model.graph.input:
        value.name = name if value.name == replaced else value.name
    assert_as_expected(import_model(model))


def test_overloads_are_told_apart():
    model = model_of(
        [helper.make_node("f", ["x"], ["y"], domain="my", overload="b")],
        imports=[("", 18), ("my", 1)],
    )
    for op, overload in (("Neg", ""), ("Exp", "b")):
        body = [helper.make_node(op, ["a"], ["b"])]
        imports = [helper.make_opsetid("", 18)]
        model.functions.append(
            helper.make_function("my", "f", ["a"], ["b"], body, imports, overload=overload)
        )
    assert [node.op for node in import_model(model).nodes] == ["Exp"]


@pytest.mark.parametrize(
    "inputs, outputs, body, message",
    [
        (["a"], ["b"], [helper.make_node("f", ["a"], ["b"], domain="my")], "calls itself"),
        (["a"], ["b"], [helper.make_node("Neg", ["q"], ["b"])], "'q'"),
        (["a"], ["b"], [helper.make_node("Neg", ["a"], ["c"])], "'b'"),
        (["a"], ["b"], [helper.make_node("Neg", ["a"], ["a"])], "own input"),
        ([], ["b"], [helper.make_node("Constant", [], ["b"], value_int=1)], "more inputs"),
        (["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])] * 2, "more than once"),
        (["o", "a"], ["a"], [], "not given"),
    ],
)
def test_broken_functions(inputs, outputs, body, message):
    model = model_of([helper.make_node("f", ["x"], ["y"], domain="my")], imports=[("", 18)])
    model.opset_import.add(domain="my", version=1)
    imports = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("my", "f", inputs, outputs, body, imports))
    with pytest.raises(ModelError, match=message):
        import_model(model)


def test_functions_that_explode():
    model = model_of([helper.make_node("f0", ["x"], ["y"], domain="my")], imports=[("my", 1)])
    imports = [helper.make_opsetid("my", 1), helper.make_opsetid("", 18)]
    for i in range(120):
        body = [helper.make_node(f"f{i + 1}", ["a"], ["b"], domain="my")]
        model.functions.append(helper.make_function("my", f"f{i}", ["a"], ["b"], body, imports))
    with pytest.raises(ModelError, match="deep"):
        import_model(model)


def test_schema_functions():
    x = np.array([[1.0, -2.0, 0.5]], np.float32)
    model = model_of(
        [helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")], imports=[("", 20)]
    )
    graph = import_model(model)
    nodes = inline_schema_function(graph.nodes[0], graph.inputs, taken={"y/Gelu/One"})
    nodes, constants = split_constants(nodes)
    expanded = graph.replace(nodes=tuple(nodes), constants=constants)
    expanded.verify()
    assert "y/Gelu/One#2" in constants and "Tanh" in [node.op for node in nodes]
    expected = run(model, x)[0]
    np.testing.assert_allclose(run(graph_to_model(expanded), x)[0], expected, rtol=1e-5)


def test_schema_functions_drop_what_omitted_outputs_need():
    types = [Value("x", "float32", (2, 3)), Value("s", "float32", (3,))]
    node = Node("LayerNormalization", "", 17, ("x", "s"), ("y",), {})
    nodes = inline_schema_function(node, types)
    assert Graph("", tuple(types), (Value("y", "", None),), tuple(nodes)).prune().nodes == tuple(
        nodes
    )


def test_operators_without_schema_function():
    x = Value("x", "float32", (1,))
    assert inline_schema_function(Node("Add", "", 14, ("x", "x"), ("y",)), [x, x]) is None
    assert inline_schema_function(Node("Nope", "my", 1, ("x",), ("y",)), [x]) is None
    # The body of this one depends on the type of the input.
    node = Node("LayerNormalization", "", 17, ("x", "x"), ("y",))
    assert inline_schema_function(node, [None, None]) is None
    assert inline_schema_function(node, [x, x]) is not None
