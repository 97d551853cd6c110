"""Expands operators into the function bodies that their ONNX schemas carry."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ModelError
from .exporter import node_to_proto, type_to_proto
from .graph import Graph, Node, Value, sort_nodes
from .importer import Body, Importer, Scope
from .proto import ModelSource
from .wire import Tickets

if TYPE_CHECKING:
    from onnx import FunctionProto


def inline_schema_function(
    node: Node,
    input_values: Sequence[Value | None],
    *,
    taken: Collection[str] = (),
) -> list[Node] | None:
    """The nodes that ONNX defines `node` by, in topological order; None when it has no such body.

    `input_values` are the types of the node's inputs, None for unknown or omitted ones: some bodies
    depend on them, and there is no body (None) without them. The nodes read `node.inputs`, make
    `node.outputs`, and use names for the values between that are not in `taken`. Constants come as
    Constant nodes with the one attribute `value`, see `split_constants`. The versions of the nodes
    are those of the body's own opset, which may be newer than the model's.
    """
    function = _schema_function(node, input_values)
    if function is None:
        return None
    from onnx import ModelProto, defs

    schema = defs.get_schema(node.op, node.version, node.domain)
    importer = Importer(ModelSource(ModelProto(), Tickets(), "a function body", ()))
    # Some bodies do not say which version of the standard operators they use.
    importer.model_imports = {"": defs.onnx_opset_version()}
    importer.taken.update(taken, node.inputs, node.outputs)
    defaults = [entry.default_value for entry in schema.attributes.values()]
    attrs = importer.attributes([entry for entry in defaults if entry.name], Scope({}))
    body = Body()
    importer.call(function, node.inputs, node.outputs, {**attrs, **node.attrs}, (), body)
    nodes = [body.nodes[i] for i in sort_nodes(body.nodes)]
    # A body computes all outputs; what only an omitted one needs is dead.
    outputs = tuple(Value(name, "", None) for name in node.outputs if name)
    graph = Graph("", (), outputs, tuple(nodes), body.constants).prune()
    version = importer.version("Constant", "", importer.model_imports, str(node))
    constants = [
        Node("Constant", "", version, (), (name,), {"value": importer.constant(made, name)})
        for name, made in graph.constants.items()
    ]
    return [*constants, *graph.nodes]


def split_constants(nodes: Sequence[Node]) -> tuple[list[Node], dict[str, np.ndarray]]:
    """`nodes` without its Constant nodes, and those as arrays by name."""
    constants = {
        node.outputs[0]: node.attrs["value"]
        for node in nodes
        if node.op == "Constant" and not node.domain
    }
    return [node for node in nodes if node.op != "Constant" or node.domain], constants


def _schema_function(node: Node, input_values: Sequence[Value | None]) -> FunctionProto | None:
    """The newest function body of the schema of `node`."""
    from onnx import FunctionProto, defs

    if not isinstance(node.op, str):
        return None
    try:
        schema: Any = defs.get_schema(node.op, node.version, node.domain)
    except defs.SchemaError:
        return None
    data = b""
    if schema.has_function:
        data = schema.get_function_with_opset_version(max(schema.function_opset_versions))
    elif schema.has_context_dependent_function:
        types = [
            type_to_proto(value or Value("", "", None)).SerializeToString()
            for value in input_values
        ]
        version = max(schema.context_dependent_function_opset_versions)
        proto = node_to_proto(node).SerializeToString()
        try:
            data = schema.get_context_dependent_function_with_opset_version(version, proto, types)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{node} cannot be expanded: {error}") from error
    if not data:
        return None
    function = FunctionProto.FromString(data)
    return function if function.node else None
