"""Plain values out of single protobuf messages of a model; no state, no other module's types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ModelError
from .tensors import dtype_name

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, OperatorSetIdProto, TypeProto

# Domains that ONNX defines; an operator in one of them cannot be used without an import.
STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"})


def domain_name(domain: str) -> str:
    """The one spelling of a domain: "ai.onnx" is the default domain ""."""
    return "" if domain == "ai.onnx" else domain


def overload_name(proto: Any) -> str:
    """The overload of a NodeProto or FunctionProto; "" where the field does not exist yet."""
    return getattr(proto, "overload", "")


def require_text(*texts: str | bytes) -> None:
    """ModelError if one of a message's string fields is not UTF-8: protobuf hands it out as bytes.

    Everything from a model that becomes part of a graph goes through here or `readable`.
    """
    for item in texts:
        if isinstance(item, bytes):
            raise ModelError(f"the model holds a name that is not UTF-8: {item!r}")


def readable(item: str | bytes) -> str:
    """A string field that is only ever shown, with U+FFFD for what is not UTF-8."""
    return item.decode(errors="replace") if isinstance(item, bytes) else item


def opset_imports(protos: Iterable[OperatorSetIdProto]) -> dict[str, int]:
    """Version by domain; the highest one where a domain is imported more than once."""
    imports: dict[str, int] = {}
    for proto in protos:
        require_text(proto.domain)
        domain = domain_name(proto.domain)
        imports[domain] = max(proto.version, imports.get(domain, 0))
    return imports


def trimmed(names: Iterable[str]) -> tuple[str, ...]:
    """Inputs without the omitted ones at the end, which mean nothing."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


def defined_names(proto: GraphProto) -> Iterator[str]:
    """Every name that a graph defines, not those inside its subgraphs."""
    yield from (info.name for info in proto.input)
    yield from (tensor.name for tensor in proto.initializer)
    yield from (sparse.values.name for sparse in proto.sparse_initializer)
    for node in proto.node:
        yield from filter(None, node.output)


def all_names(proto: GraphProto) -> Iterator[str]:
    """Every name that a graph or a graph inside of it defines."""
    yield from defined_names(proto)
    for node in proto.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_names(attribute.g)
            for graph in attribute.graphs:
                yield from all_names(graph)


def attribute_type(proto: AttributeProto) -> int:
    """The AttributeProto.AttributeType, deduced from the content where the model leaves it out."""
    if proto.type:
        return proto.type
    for code, name in ((1, "f"), (2, "i"), (3, "s"), (4, "t"), (5, "g")):
        if proto.HasField(name):
            return code
    for code, name in ((6, "floats"), (7, "ints"), (8, "strings"), (9, "tensors"), (10, "graphs")):
        if len(getattr(proto, name)):
            return code
    return 0


def text(data: bytes) -> str | bytes:
    """A string attribute: `str`, or the bytes as they are where they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def type_name(proto: TypeProto) -> str:
    """A type as text: "float32" for a tensor, "sequence(float32)", "map(int64,float32)"; ""."""
    kind = proto.WhichOneof("value")
    match kind:
        case "tensor_type":
            return dtype_name(proto.tensor_type.elem_type)
        case "sparse_tensor_type":
            return f"sparse({dtype_name(proto.sparse_tensor_type.elem_type)})"
        case "sequence_type" | "optional_type":
            return f"{kind[:-5]}({type_name(getattr(proto, kind).elem_type)})"
        case "map_type":
            key = dtype_name(proto.map_type.key_type)
            return f"map({key},{type_name(proto.map_type.value_type)})"
        case None:
            return ""
    return "opaque"


_CONSTANT_FORMS: dict[str, Any] = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_string": object,
    "value_strings": object,
}


def constant_value(attrs: Mapping[str, Any], label: str) -> np.ndarray:
    """The array that a Constant node stands for, whichever attribute holds it."""
    for name in ("value", "sparse_value"):
        if isinstance(attrs.get(name), np.ndarray):
            return attrs[name]
    for name, dtype in _CONSTANT_FORMS.items():
        if name in attrs:
            try:
                array = np.array(attrs[name], dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise ModelError(f"{label}: {name} is malformed: {error}") from error
            array.flags.writeable = False
            return array
    raise ModelError(f"{label} has no value")
