"""What lowering leaves for run time: the nodes of the late part, and host steps around graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onnxjit.codegen.expr import walk
from onnxjit.codegen.kernel import Kernel
from onnxjit.control import CONTROL_OPERATORS
from onnxjit.deferred import CONTROL, DEFERRED, DOMAIN, INTERPRETED, encode_graph
from onnxjit.graph import Graph, Node, Value
from onnxjit.operators.registry import find
from onnxjit.operators.sequence import OPAQUE
from onnxjit.program import HostCall

__all__ = [
    "OPAQUE", "LatePart", "control_call", "deferred_call", "has_function", "has_meaning",
    "interpreted_call", "node_graph", "unstored",
]  # fmt: skip

STORED = frozenset(
    """float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64
    bool""".split()
)
"""Element types that kernels read and write."""


class LatePart:
    """The nodes that wait for ranks or contents, and everything that depends on them.

    They are closed under dependence, so one host step at the end of the program computes them all.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: set[str] = set()
        self.needed: set[str] = set()

    def add(self, node: Node, needed: Collection[str] = ()) -> None:
        """Leave `node` for later; the compiler will want the contents of the values `needed`."""
        self.nodes.append(node)
        self.names.update(n for n in node.outputs if n)
        self.needed.update(needed)

    def graph(self, outputs: Sequence[Value]) -> Graph:
        """The late part as a graph; what it takes from the rest are its inputs."""
        made = tuple(v for v in outputs if v.name in self.names)
        graph = Graph("", (), made, tuple(self.nodes)).prune()
        captured = graph.captured()
        return graph.replace(inputs=tuple(Value(n, "", None) for n in captured))


def node_graph(node: Node) -> Graph:
    """A graph of one node, whose inputs are all that the node reads."""
    inputs = tuple(Value(n, "", None) for n in dict.fromkeys(node.reads()))
    outputs = tuple(Value(n, "", None) for n in node.outputs if n)
    return Graph("", inputs, outputs, (node,))


def deferred_call(
    graph: Graph, number: int, ids: Mapping[str, str], needed: Collection[str],
    fixed: Collection[str], outputs: Sequence[str],
) -> HostCall:  # fmt: skip
    """The step that compiles `graph` when it runs."""
    names = [v.name for v in graph.inputs]
    attrs = {
        **encode_graph(graph),
        "values": [n for n in names if n in needed],
        "fixed": [n for n in names if n in fixed],
    }
    origin = tuple(str(n) for n in graph.nodes)
    return HostCall(
        (DOMAIN, DEFERRED, number), attrs, tuple(ids[n] for n in names), tuple(outputs), origin
    )


def control_call(
    node: Node, number: int, ids: Mapping[str, str], outputs: Sequence[str]
) -> HostCall:
    """The step that runs a control-flow node."""
    graph = node_graph(node)
    inputs = tuple(ids[v.name] for v in graph.inputs)
    return HostCall(
        (DOMAIN, CONTROL, number), encode_graph(graph), inputs, tuple(outputs), (str(node),)
    )


def interpreted_call(
    node: Node, number: int, inputs: Sequence[str], outputs: Sequence[str]
) -> HostCall:
    """The step that evaluates a node's definition. Its arguments follow the node's inputs."""
    attrs = encode_graph(node_graph(node))
    return HostCall(
        (DOMAIN, INTERPRETED, number), attrs, tuple(inputs), tuple(outputs), (str(node),)
    )


def unstored(kernel: Kernel) -> bool:
    """Whether the kernel computes with an element type that compiled kernels do not have."""
    if any(kernel.types[b].dtype not in STORED for b in (*kernel.inputs, *kernel.outputs)):
        return True
    return any(e.dtype not in STORED for s in kernel.stages for e in walk(s.value))


def has_meaning(node: Node) -> bool:
    """Whether a node (and whatever is in its bodies) can be compiled once its inputs are there."""
    inner = [n for g in node.subgraphs() for n in g.nodes]
    if not all(map(has_meaning, inner)):
        return False
    if not node.domain and node.op in CONTROL_OPERATORS:
        return True
    return find(node.domain, node.op, node.version) is not None or has_function(node)


def has_function(node: Node) -> bool:
    """Whether ONNX defines the operator by other operators."""
    from onnx import defs

    try:
        schema = defs.get_schema(node.op, node.version, node.domain)
    except defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)
