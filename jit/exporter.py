"""Graphs back into ONNX messages: for reference runs, and to ask ONNX itself about a node."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .dims import DimExpr
from .errors import GraphError
from .graph import Graph, Node, Value
from .tensors import array_dtype_name, dtype_code

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

_CONTAINER = re.compile(r"(sequence|optional|sparse|map)\((.*)\)")


def graph_to_model(graph: Graph, opset_imports: Mapping[str, int] | None = None) -> ModelProto:
    """A ModelProto that computes what `graph` computes.

    `opset_imports` has the imports of the imported model as default. Nodes that were inlined from a
    function with another opset may not mean the same there. Raises GraphError for a node whose
    operator is a kernel.
    """
    from onnx import ModelProto

    imports = opset_imports or graph.metadata.get("opset_imports", {})
    model = ModelProto(ir_version=max(10, graph.metadata.get("ir_version", 0)))
    for domain, version in imports.items():
        model.opset_import.add(domain=domain, version=version)
    model.graph.CopyFrom(graph_to_proto(graph))
    return model


def graph_to_proto(graph: Graph) -> GraphProto:
    """A GraphProto; overridable constants are listed as inputs too."""
    from onnx import GraphProto

    proto = GraphProto(name=graph.name or "graph")
    for value in (*graph.inputs, *graph.overridable):
        proto.input.add(name=value.name, type=type_to_proto(value))
    for value in graph.outputs:
        proto.output.add(name=value.name, type=type_to_proto(value))
    for name, array in graph.constants.items():
        proto.initializer.append(tensor_to_proto(array, name))
    proto.node.extend(map(node_to_proto, graph.nodes))
    return proto


def node_to_proto(node: Node) -> NodeProto:
    """A NodeProto."""
    from onnx import NodeProto

    if not isinstance(node.op, str):
        raise GraphError(f"{node} is lowered; only operators have an ONNX form")
    proto = NodeProto(
        op_type=node.op,
        domain=node.domain,
        name=node.name,
        input=node.inputs,
        output=node.outputs,
    )
    if node.overload:
        proto.overload = node.overload
    proto.attribute.extend(attribute_to_proto(name, value) for name, value in node.attrs.items())
    return proto


def attribute_to_proto(name: str, value: Any) -> AttributeProto:
    """An AttributeProto; an empty list becomes an empty list of integers."""
    from onnx import AttributeProto

    # Python types, scalar type code and field, list type code and field, conversion.
    forms: tuple[tuple[Any, int, str, int, str, Callable[[Any], Any]], ...] = (
        ((float, np.floating), 1, "f", 6, "floats", float),
        ((int, np.integer), 2, "i", 7, "ints", int),
        (str, 3, "s", 8, "strings", str.encode),
        (bytes, 3, "s", 8, "strings", bytes),
        (np.ndarray, 4, "t", 9, "tensors", lambda array: tensor_to_proto(array, "")),
        (Graph, 5, "g", 10, "graphs", graph_to_proto),
        (Value, 13, "tp", 14, "type_protos", type_to_proto),
    )
    proto = AttributeProto(name=name)
    sample = (value[0] if value else 0) if isinstance(value, list) else value
    for types, code, field, list_code, list_field, convert in forms:
        if not isinstance(sample, types):
            continue
        if isinstance(value, list):
            proto.type = list_code  # type: ignore[assignment]
            getattr(proto, list_field).extend(map(convert, value))
        elif code <= 3:
            proto.type = code  # type: ignore[assignment]
            setattr(proto, field, convert(value))
        else:
            proto.type = code  # type: ignore[assignment]
            getattr(proto, field).CopyFrom(convert(value))
        return proto
    raise GraphError(f"attribute {name!r} has no ONNX form: {type(value).__name__}")


def tensor_to_proto(array: np.ndarray, name: str) -> TensorProto:
    """A TensorProto."""
    from onnx import TensorProto, numpy_helper

    if array_dtype_name(array) == "string":
        proto = TensorProto(name=name, dims=array.shape, data_type=dtype_code("string"))
        proto.string_data.extend(
            str(item).encode("utf-8", "surrogateescape") for item in array.reshape(-1)
        )
        return proto
    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)


def type_to_proto(value: Value) -> TypeProto:
    """The TypeProto of a value; empty when its type is unknown."""
    from onnx import TypeProto

    proto = TypeProto()
    _fill_type(proto, value.dtype)
    if proto.HasField("tensor_type") and value.shape is not None:
        shape = proto.tensor_type.shape
        shape.SetInParent()
        for dim in value.shape:
            if isinstance(dim, int):
                shape.dim.add(dim_value=dim)
            elif isinstance(dim, DimExpr):
                shape.dim.add(dim_param=str(dim))
            else:
                shape.dim.add()
    return proto


def _fill_type(proto: TypeProto, dtype: str) -> None:
    container = _CONTAINER.fullmatch(dtype)
    if container is None:
        if dtype_code(dtype):
            proto.tensor_type.elem_type = dtype_code(dtype)
        return
    kind, inner = container.groups()
    match kind:
        case "sequence":
            _fill_type(proto.sequence_type.elem_type, inner)
        case "optional":
            _fill_type(proto.optional_type.elem_type, inner)
        case "sparse":
            proto.sparse_tensor_type.elem_type = dtype_code(inner)
        case "map":
            key, _, content = inner.partition(",")
            proto.map_type.key_type = dtype_code(key)
            _fill_type(proto.map_type.value_type, content)
