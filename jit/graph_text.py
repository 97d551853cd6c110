"""Graphs as text, one definition a line, and back.

    graph "name"
    dim d0 "batch"
    input "x" float32[d0, 3]
    constant "w" float32[3, 4] 5f2c...
    node "y", _ = MatMul:13("x", "w") {axis: 1, scale: 1.0, note: "text"} "node name"
    output "y" float32[d0, 4]
    end

An omitted name is `_`. Arrays appear as type, shape and digest; a subgraph is the word `graph`
among the attributes and follows its node, up to its own `end`. To parse a text, arrays are given
beside it by digest (`graph_arrays`), and what lowering put in place of an operator (`@"name"`) by
name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .dims import Dim, DimSymbol, parse_arithmetic, symbol
from .errors import GraphError
from .graph import Graph, Node, Value
from .tensors import array_dtype_name

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_TOKEN = re.compile(
    r"""\s*(?: (?P<string>b?"(?:[^"\\]|\\.)*")
             | (?P<type>[a-z][a-z0-9_(),]*\[[^\]]*\])
             | (?P<number>-?(?:[0-9][0-9.]*(?:e[+-]?[0-9]+)?|inf|nan)(?![A-Za-z0-9_]))
             | (?P<word>[A-Za-z0-9_]+)
             | (?P<mark>::|[-@:|=,(){}\[\]]) )""",
    re.VERBOSE | re.ASCII,
)


def array_digest(array: np.ndarray) -> str:
    """A 128-bit content hash of an array, its type and shape included (XXH3)."""
    import xxhash

    digest = xxhash.xxh3_128(f"{array_dtype_name(array)}{list(array.shape)}".encode())
    if array_dtype_name(array) == "string":
        digest.update(json.dumps(array.tolist()).encode())
    else:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def graph_arrays(graph: Graph) -> dict[str, np.ndarray]:
    """Every array of a graph, its attributes and its subgraphs, by digest."""
    arrays = {array_digest(array): array for array in graph.constants.values()}
    for node in graph.nodes:
        for value in node.attrs.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, np.ndarray):
                    arrays[array_digest(item)] = item
        for inner in node.subgraphs():
            arrays.update(graph_arrays(inner))
    return arrays


def graph_to_text(graph: Graph) -> str:
    """The text of a graph, ending with a newline."""
    return "".join(f"{line}\n" for line in _graph_lines(graph))


def _graph_lines(graph: Graph) -> Iterator[str]:
    yield f"graph {_string(graph.name)}"
    if graph.metadata:
        yield f"metadata {json.dumps(dict(graph.metadata))}"
    for dim in graph.dims:
        yield f"dim {dim.id} {_string(dim.name)}"
    for value in graph.inputs:
        yield f"input {_value(value)}"
    for name, array in graph.constants.items():
        yield f"constant {_string(name)} {_array(array)}"
    for value in graph.overridable:
        yield f"overridable {_value(value)}"
    for value in graph.values.values():
        yield f"value {_value(value)}"
    for node in graph.nodes:
        yield f"node {_node(node)}"
        for inner in node.subgraphs():
            yield from (f"  {line}" for line in _graph_lines(inner))
    for value in graph.outputs:
        yield f"output {_value(value)}"
    yield "end"


def _node(node: Node) -> str:
    op = _word(node.op) if isinstance(node.op, str) else f"@{_string(_kernel_name(node.op))}"
    domain = f"{_string(node.domain)}::" if node.domain else ""
    overload = f"|{_string(node.overload)}" if node.overload else ""
    attrs = ", ".join(f"{_word(name)}: {_attribute(item)}" for name, item in node.attrs.items())
    return (
        f"{', '.join(map(_name, node.outputs))} = {domain}{op}{overload}:{node.version}"
        f"({', '.join(map(_name, node.inputs))}) {{{attrs}}} {_string(node.name)}"
    )


def _attribute(value: Any) -> str:
    match value:
        case list():
            return f"[{', '.join(map(_attribute, value))}]"
        case str():
            return _string(value)
        case bytes():
            return f'b"{value.hex()}"'
        case float():
            return repr(value)
        case int():
            return str(value)
        case np.ndarray():
            return f"array {_array(value)}"
        case Value():
            return f"type {_value(value)}"
        case Graph():
            return "graph"
    raise GraphError(f"an attribute of type {type(value).__name__} has no text form")


def _kernel_name(op: Any) -> str:
    return str(getattr(op, "name", "") or type(op).__name__)


def _string(text: str) -> str:
    return json.dumps(text)


def _word(text: str) -> str:
    return text if _WORD.fullmatch(text) else _string(text)


def _name(name: str) -> str:
    return _string(name) if name else "_"


def _value(value: Value) -> str:
    shape = "?" if value.shape is None else ", ".join(map(str, value.shape))
    return f"{_string(value.name)} {value.dtype or 'unknown'}[{shape}]"


def _array(array: np.ndarray) -> str:
    shape = ", ".join(map(str, array.shape))
    return f"{array_dtype_name(array)}[{shape}] {array_digest(array)}"


def parse_text(
    text: str,
    arrays: Mapping[str, np.ndarray] | None = None,
    *,
    kernels: Mapping[str, Any] | None = None,
    dim: Callable[[str], Dim] | None = None,
) -> Graph:
    """The graph that `graph_to_text` printed as `text`.

    `arrays` are its arrays by digest, `kernels` what stands in place of operators by name, `dim`
    makes a dimension that is not an integer from its text (`DimExpr` by default). Raises GraphError
    for text that is not a graph, and for an array or kernel that is not given.
    """
    reader = _Reader(text, arrays or {}, kernels or {}, dim or _dim)
    reader.line()
    graph = reader.graph()
    if reader.line():
        raise reader.error("text after the end of the graph")
    return graph


def _dim(text: str) -> Dim:
    dim = parse_arithmetic(text, symbol)
    if dim is None:
        raise GraphError(f"{text!r} is not a dimension")
    return dim


class _Reader:
    """Reads tokens of one line at a time."""

    def __init__(
        self,
        text: str,
        arrays: Mapping[str, np.ndarray],
        kernels: Mapping[str, Any],
        dim: Callable[[str], Dim],
    ) -> None:
        self._lines = iter([line.strip() for line in text.split("\n") if line.strip()])
        self._arrays, self._kernels, self._dim = arrays, kernels, dim
        self._line, self._at = "", 0

    def error(self, what: str) -> GraphError:
        return GraphError(f"{what} in {self._line!r} at {self._at}")

    def line(self) -> bool:
        """Go to the next line; False when there is none."""
        self._line, self._at = next(self._lines, ""), 0
        return bool(self._line)

    def token(self, kind: str = "") -> str:
        """The next token, "" at the end of the line; GraphError if it is not of the given kind."""
        found = _TOKEN.match(self._line, self._at)
        if found is None:
            if kind or self._line[self._at :].strip():
                raise self.error(f"expected {kind or 'a token'}")
            return ""
        if kind and found.lastgroup != kind:
            raise self.error(f"expected {kind}")
        self._at = found.end()
        return found[0].strip()

    def peek(self) -> str:
        at = self._at
        token = self.token()
        self._at = at
        return token

    def take(self, token: str) -> bool:
        """Whether the next token is `token`, which is then consumed."""
        if self.peek() != token:
            return False
        self.token()
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f"expected {token!r}")

    def string(self) -> str:
        return json.loads(self.token("string"))

    def word(self) -> str:
        token = self.token()
        return json.loads(token) if token.startswith('"') else token

    def name(self) -> str:
        return "" if self.take("_") else self.string()

    def items(self, read: Callable[[], Any], end: str) -> list[Any]:
        """What `read` returns for each item of a comma-separated list that `end` closes."""
        found: list[Any] = []
        while not self.take(end):
            if found:
                self.expect(",")
            found.append(read())
        return found

    def value(self) -> Value:
        name = self.string()
        dtype, _, inside = self.token("type")[:-1].partition("[")
        shape = None
        if inside != "?":
            dims = inside.split(", ") if inside else []
            shape = tuple(int(dim) if dim.isdigit() else self._dim(dim) for dim in dims)
        return Value(name, "" if dtype == "unknown" else dtype, shape)

    def array(self) -> np.ndarray:
        self.token("type")
        digest = self.token()
        if digest not in self._arrays:
            raise self.error(f"array {digest} is not given")
        return self._arrays[digest]

    def graph(self) -> Graph:
        """The graph whose first line is the current one, up to its `end` line."""
        self.expect("graph")
        graph = Graph(self.string(), (), (), ())
        values: dict[str, list[Value]] = {"input": [], "output": [], "overridable": [], "value": []}
        constants: dict[str, np.ndarray] = {}
        dims: list[DimSymbol] = []
        nodes: list[Node] = []
        metadata: dict[str, Any] = {}
        while self.line():
            kind = self.token("word")
            match kind:
                case "end":
                    return graph.replace(
                        inputs=tuple(values["input"]),
                        outputs=tuple(values["output"]),
                        nodes=tuple(nodes),
                        constants=constants,
                        values={value.name: value for value in values["value"]},
                        dims=tuple(dims),
                        metadata=metadata,
                        overridable=tuple(values["overridable"]),
                    )
                case "metadata":
                    metadata = json.loads(self._line[self._at :])
                    continue
                case "dim":
                    dims.append(DimSymbol(self.token("word"), self.string()))
                case "constant":
                    name = self.string()
                    constants[name] = self.array()
                case "node":
                    nodes.append(self.node())
                    continue
                case _ if kind in values:
                    values[kind].append(self.value())
                case _:
                    raise self.error("unknown line")
            if self.peek():
                raise self.error("text after the definition")
        raise GraphError("the text ends inside a graph")

    def node(self) -> Node:
        outputs = tuple(self.items(self.name, "="))
        domain, op = "", None
        if self.take("@"):
            kernel = self.string()
            if kernel not in self._kernels:
                raise self.error(f"kernel {kernel!r} is not given")
            op = self._kernels[kernel]
        else:
            op = self.word()
            if self.take("::"):
                domain = op
                op = self.word()
        overload = self.string() if self.take("|") else ""
        self.expect(":")
        version = int(self.token("number"))
        self.expect("(")
        inputs = tuple(self.items(self.name, ")"))
        self.expect("{")
        attrs = dict(self.items(self.pair, "}"))
        name = self.string()
        if self.peek():
            raise self.error("text after the node")
        for key, item in attrs.items():
            attrs[key] = self.subgraphs(item)
        return Node(op, domain, version, inputs, outputs, attrs, name, overload)

    def pair(self) -> tuple[str, Any]:
        key = self.word()
        self.expect(":")
        return key, self.attribute()

    def attribute(self) -> Any:
        token = self.token()
        if token == "[":
            return self.items(self.attribute, "]")
        if token.startswith('b"'):
            return bytes.fromhex(token[2:-1])
        if token.startswith('"'):
            return json.loads(token)
        if token == "graph":
            return _Pending
        if token == "array":
            return self.array()
        if token == "type":
            return self.value()
        try:
            return int(token) if re.fullmatch("-?[0-9]+", token) else float(token)
        except ValueError as error:
            raise self.error(f"{token!r} is no attribute") from error

    def subgraphs(self, value: Any) -> Any:
        """`value` with the graphs that follow the node's line in their places."""
        if isinstance(value, list):
            return [self.subgraphs(item) for item in value]
        if value is _Pending:
            self.line()
            return self.graph()
        return value


class _Pending:
    """Stands for a subgraph whose lines have not been read yet."""
