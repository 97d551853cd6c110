"""ONNX model in, `Graph` out.

Model-local functions are inlined, initializers and Constant nodes become constants, nodes are
sorted and dead ones dropped. Nothing here decides whether an operator is supported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .dims import Dim, DimTable
from .errors import GraphError, ModelError
from .graph import Graph, Node, Value, sort_nodes
from .proto import ModelSource, read_model
from .proto_fields import (
    STANDARD_DOMAINS,
    all_names,
    attribute_type,
    constant_value,
    defined_names,
    domain_name,
    opset_imports,
    overload_name,
    readable,
    require_text,
    text,
    trimmed,
    type_name,
)
from .tensors import dtype_name

if TYPE_CHECKING:
    from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TypeProto, ValueInfoProto

_LARGEST_VERSION = 2**31 - 1
_DEEPEST_CALL = 100
_MOST_NODES = 1_000_000


def import_model(
    model: Any,
    *,
    overrides: Mapping[str, int] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Graph:
    """Import an ONNX model.

    `model` is a path, bytes, a binary file object, an `onnx.ModelProto`, or what `read_model` made
    of one. `overrides` fixes free
    dimensions by the model's name of them. `folder` is where external data is looked for when the
    model is not given as a path. Raises ModelError for everything that is wrong with the model,
    an override that names no dimension included.
    """
    for name, size in (overrides or {}).items():
        if size < 0:
            raise ModelError(f"the dimension {name!r} cannot be {size}")
    try:
        source = model if isinstance(model, ModelSource) else read_model(model, folder)
        graph = Importer(source, overrides).model()
        graph.verify()
    except GraphError as error:
        raise ModelError(f"the model is inconsistent: {error}") from error
    return graph


@dataclass(frozen=True, slots=True)
class Scope:
    """How names, attributes and operator versions are looked up for a run of nodes.

    `names` maps the names of an inlined body to the graph's; None means that they are the same.
    `attributes` are the arguments that `ref_attr_name` refers to; None outside of functions.
    """

    imports: Mapping[str, int]
    names: dict[str, str] | None = None
    attributes: Mapping[str, Any] | None = None
    calls: tuple[str, ...] = ()

    def name(self, name: str) -> str:
        """The graph's name of a value that is read."""
        if not name or self.names is None:
            return name
        if name not in self.names:
            raise ModelError(f"{self.calls[-1]} reads {name!r}, which nothing in it defines")
        return self.names[name]


@dataclass(slots=True)
class Body:
    """A graph under construction. Constants are decoded at the end, and only those in use."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)


class Importer:
    """State of one import: the dimension table, the function table and the names taken."""

    def __init__(self, source: ModelSource, overrides: Mapping[str, int] | None = None) -> None:
        self.source = source
        self.dims = DimTable(overrides)
        self.functions: dict[tuple[str, str, str], FunctionProto] = {}
        self.model_imports: dict[str, int] = {}
        self.taken: set[str] = set()
        self._count = 0
        self._versions: dict[tuple[str, str, int], int] = {}

    def model(self) -> Graph:
        """The whole model."""
        proto = self.source.proto
        self.model_imports = opset_imports(proto.opset_import)
        if not proto.opset_import and proto.ir_version < 3:
            self.model_imports[""] = 1  # models had no opset imports before IR version 3
        for function in proto.functions:
            require_text(function.domain, function.name, overload_name(function))
            require_text(*function.input, *function.output)
            key = (domain_name(function.domain), function.name, overload_name(function))
            self.functions[key] = function
        if self.functions:
            self.taken.update(all_names(proto.graph))
        graph = self.graph(proto.graph, Scope(self.model_imports), outermost=True)
        if self.dims.unused_overrides:
            raise ModelError(
                f"no dimension is called {', '.join(map(repr, self.dims.unused_overrides))}; the "
                f"model has {', '.join(repr(dim.name) for dim in self.dims.symbols) or 'none'}"
            )
        overridable = graph.overridable if proto.ir_version >= 4 else ()
        graph = graph.replace(overridable=overridable, metadata=self._metadata()).prune()
        return graph.replace(dims=self.dims.symbols)

    def graph(self, proto: GraphProto, scope: Scope, outermost: bool = False) -> Graph:
        """A graph or subgraph. Only the outermost one keeps dead overridable constants."""
        if scope.names is not None:
            inner = {
                name: self.unique(f"{scope.calls[-1]}/{name}") for name in defined_names(proto)
            }
            scope = Scope(scope.imports, scope.names | inner, scope.attributes, scope.calls)
        body = Body()
        for tensor in proto.initializer:
            require_text(tensor.name)
            body.constants[scope.name(tensor.name)] = tensor
        for sparse in proto.sparse_initializer:
            require_text(sparse.values.name)
            body.constants[scope.name(sparse.values.name)] = sparse
        inputs = [self.value(info, scope) for info in proto.input]
        outputs = [self.value(info, scope) for info in proto.output]
        hints = [self.value(info, scope) for info in proto.value_info] if outermost else []
        overridable = [value for value in inputs if value.name in body.constants]
        inputs = [value for value in inputs if value.name not in body.constants]
        for node in proto.node:
            self.node(node, scope, body)
        if outermost and not outputs:
            raise ModelError("the model has no outputs")
        _check_names(inputs, body)
        order = sort_nodes(body.nodes)
        graph = Graph(
            name=readable(proto.name),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            nodes=tuple(body.nodes[i] for i in order),
            constants=body.constants,
            overridable=tuple(overridable) if outermost else (),
        ).prune()
        made = graph.producers().keys() | graph.constants.keys()
        return graph.replace(
            constants={name: self.constant(made, name) for name, made in graph.constants.items()},
            values={value.name: value for value in hints if value.name in made},
        )

    def node(self, proto: NodeProto, scope: Scope, body: Body) -> None:
        """Append a node to `body`, or what it stands for: a constant, the body of a function."""
        self._count += 1
        if self._count > _MOST_NODES:
            raise ModelError(f"the model has more than {_MOST_NODES} nodes with functions inlined")
        require_text(proto.op_type, proto.domain, proto.name, overload_name(proto))
        require_text(*proto.input, *proto.output)
        domain = domain_name(proto.domain)
        inputs = trimmed(scope.name(name) for name in proto.input)
        outputs = tuple(scope.name(name) for name in proto.output)
        attrs = self.attributes(proto.attribute, scope)
        overload = overload_name(proto)
        function = self.functions.get((domain, proto.op_type, overload))
        if function is not None:
            self.call(function, inputs, outputs, attrs, scope.calls, body)
            return
        label = f"{proto.op_type} node {proto.name!r}"
        version = self.version(proto.op_type, domain, scope.imports, label)
        if proto.op_type == "Constant" and not domain:
            if len(outputs) != 1 or not outputs[0]:
                raise ModelError(f"{label} does not have one output")
            if outputs[0] in body.constants:
                raise ModelError(f"{outputs[0]!r} is defined more than once")
            body.constants[outputs[0]] = constant_value(attrs, label)
            return
        body.nodes.append(
            Node(proto.op_type, domain, version, inputs, outputs, attrs, proto.name, overload)
        )

    def call(
        self,
        function: FunctionProto,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attrs: Mapping[str, Any],
        calls: tuple[str, ...],
        body: Body,
    ) -> None:
        """Append the nodes of a function's body, under names that nothing else has.

        `inputs`, `outputs` and `attrs` are the caller's; `calls` are the functions around it.
        """
        label = f"function {domain_name(function.domain)}::{function.name}"
        if overload_name(function):
            label += f":{overload_name(function)}"
        if label in calls:
            raise ModelError(f"{label} calls itself")
        if len(calls) >= _DEEPEST_CALL:
            raise ModelError(f"functions call each other more than {_DEEPEST_CALL} deep")
        if len(inputs) > len(function.input) or len(outputs) > len(function.output):
            raise ModelError(f"{label} is called with more inputs or outputs than it has")
        imports = {**self.model_imports, **opset_imports(function.opset_import)}
        defaults = self.attributes(function.attribute_proto, Scope(imports))
        names: dict[str, str] = dict.fromkeys(function.input, "")
        names.update(zip(function.input, inputs, strict=False))
        made = {name for node in function.node for name in node.output if name}
        for name in made & names.keys():
            raise ModelError(f"{label} defines its own input {name!r}")
        copies: list[tuple[str, str]] = []
        for formal, actual in zip(function.output, outputs, strict=False):
            if actual and formal in names:
                copies.append((formal, actual))
            elif actual and formal in made:
                names[formal] = actual
            elif actual:
                raise ModelError(f"{label} does not define its output {formal!r}")
        prefix = f"{next(filter(None, outputs), '')}/{function.name}"
        for node in function.node:
            for name in node.output:
                if name and name not in names:
                    names[name] = self.unique(f"{prefix}/{name}")
        scope = Scope(imports, names, {**defaults, **attrs}, (*calls, label))
        for node in function.node:
            self.node(node, scope, body)
        for formal, actual in copies:
            if not names[formal]:
                raise ModelError(f"{label} returns its input {formal!r}, which is not given")
            version = self.version("Identity", "", imports, label)
            body.nodes.append(Node("Identity", "", version, (names[formal],), (actual,)))

    def unique(self, wanted: str) -> str:
        """`wanted`, or a name like it, that no other value of the model has."""
        made, number = wanted, 1
        while made in self.taken:
            number += 1
            made = f"{wanted}#{number}"
        self.taken.add(made)
        return made

    def attributes(self, protos: Iterable[AttributeProto], scope: Scope) -> dict[str, Any]:
        """Attribute values by name; references to an argument that was not given are left out."""
        attrs: dict[str, Any] = {}
        for proto in protos:
            require_text(proto.name, proto.ref_attr_name)
            if proto.ref_attr_name:
                if scope.attributes is None:
                    raise ModelError(
                        f"attribute {proto.name!r} refers to {proto.ref_attr_name!r} outside of a "
                        f"function"
                    )
                if proto.ref_attr_name in scope.attributes:
                    attrs[proto.name] = scope.attributes[proto.ref_attr_name]
                continue
            attrs[proto.name] = self.attribute(proto, scope)
        return attrs

    def attribute(self, proto: AttributeProto, scope: Scope) -> Any:
        """The value of an attribute, see `Node.attrs`."""
        kind = attribute_type(proto)
        match kind:
            case 1:
                return proto.f
            case 2:
                return proto.i
            case 3:
                return text(proto.s)
            case 4:
                return self.constant(proto.t, proto.name)
            case 5:
                return self.graph(proto.g, scope)
            case 6:
                return list(proto.floats)
            case 7:
                return list(proto.ints)
            case 8:
                return [text(item) for item in proto.strings]
            case 9:
                return [self.constant(tensor, proto.name) for tensor in proto.tensors]
            case 10:
                return [self.graph(graph, scope) for graph in proto.graphs]
            case 11:
                return self.constant(proto.sparse_tensor, proto.name)
            case 12:
                return [self.constant(tensor, proto.name) for tensor in proto.sparse_tensors]
            case 13:
                return self.type("", proto.tp)
            case 14:
                return [self.type("", item) for item in proto.type_protos]
        raise ModelError(f"attribute {proto.name!r} has the unknown type {kind}")

    def constant(self, made: Any, name: str) -> np.ndarray:
        """The array of a TensorProto, a SparseTensorProto, or an array."""
        if isinstance(made, np.ndarray):
            return made
        if made.DESCRIPTOR.name == "SparseTensorProto":
            return self.source.dense(made, name)
        return self.source.array(made, name)

    def value(self, info: ValueInfoProto, scope: Scope) -> Value:
        """The type of a named value."""
        require_text(info.name)
        return self.type(scope.name(info.name), info.type)

    def type(self, name: str, proto: TypeProto) -> Value:
        """A type as a `Value` called `name`."""
        kind = proto.WhichOneof("value")
        if kind != "tensor_type":
            return Value(name, type_name(proto), None)
        tensor = proto.tensor_type
        shape: tuple[Dim, ...] | None = None
        if tensor.HasField("shape"):
            shape = tuple(map(self.dim, tensor.shape.dim))
        return Value(name, dtype_name(tensor.elem_type), shape)

    def dim(self, proto: Any) -> Dim:
        """One dimension: an integer, or symbols when it is named, unknown or negative."""
        match proto.WhichOneof("value"):
            case "dim_value":
                value = proto.dim_value
                return value if value >= 0 else self.dims.dim(str(value))
            case "dim_param":
                require_text(proto.dim_param)
                dim = self.dims.dim(proto.dim_param)
                if isinstance(dim, int) and dim < 0:
                    raise ModelError(f"the dimension {proto.dim_param!r} would become {dim}")
                return dim
        return self.dims.fresh("")

    def version(self, op: str, domain: str, imports: Mapping[str, int], label: str) -> int:
        """The version since which the imported schema of an operator has been as it is.

        An operator without a schema has the version of its domain's import; a domain of others
        that is not imported counts as version 1.
        """
        from onnx import defs

        imported = imports.get(domain)
        if imported is None:
            if domain in STANDARD_DOMAINS:
                shown = domain or "ai.onnx"
                raise ModelError(
                    f"{label} needs the domain {shown}, which the model does not import"
                )
            imported = 1
        key = (op, domain, imported)
        if key not in self._versions:
            try:
                version = defs.get_schema(op, min(imported, _LARGEST_VERSION), domain).since_version
            except defs.SchemaError:
                version = imported
            self._versions[key] = version
        return self._versions[key]

    def _metadata(self) -> dict[str, Any]:
        proto = self.source.proto
        return {
            "ir_version": proto.ir_version,
            "opset_imports": dict(self.model_imports),
            "producer_name": readable(proto.producer_name),
            "producer_version": readable(proto.producer_version),
            "domain": readable(proto.domain),
            "model_version": proto.model_version,
            "doc_string": readable(proto.doc_string),
            "graph_name": readable(proto.graph.name),
            "graph_doc_string": readable(proto.graph.doc_string),
            "metadata_props": {readable(e.key): readable(e.value) for e in proto.metadata_props},
        }


def _check_names(inputs: Iterable[Value], body: Body) -> None:
    """ModelError for a name that is defined twice; SSA is what everything else relies on."""
    seen = set(body.constants)
    for value in inputs:
        if not value.name:
            raise ModelError("the model has an input without a name")
        if value.name in seen:
            raise ModelError(f"{value.name!r} is defined more than once: two inputs have that name")
        seen.add(value.name)
    for node in body.nodes:
        for name in filter(None, node.outputs):
            if name in seen:
                raise ModelError(f"{name!r} is defined more than once, the last time by {node}")
            seen.add(name)
