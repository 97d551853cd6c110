"""The graph that passes work on: values, nodes, constants, and the rules they keep.

A graph is in SSA form: each name is defined once, by an input, a constant or one node output, and
nodes are in topological order. Names are the model's own and may hold any character; they are
dictionary keys and message text only, and reach neither source nor file names.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .dims import Dim, DimExpr, DimSymbol, dim_symbols
from .errors import GraphError

__all__ = ["Dim", "DimExpr", "DimSymbol", "Graph", "GraphError", "Node", "Value", "sort_nodes"]


@dataclass(frozen=True, slots=True)
class Value:
    """Type of a named value.

    `dtype` is a NumPy dtype name, "string", a container such as "sequence(float32)", or "" when the
    model does not say. `shape` is None when even the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operator application.

    `op` is the ONNX operator name until lowering puts a kernel there. `version` is the version
    since which the operator's schema has been as it is. "" among `inputs` or `outputs` is an
    omitted optional. `attrs` holds int, float, str, bytes, NumPy arrays, `Value` (a type), `Graph`
    (a subgraph), and lists of these.
    """

    op: Any
    domain: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    overload: str = ""

    def replace(self, **changes: Any) -> Node:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def subgraphs(self) -> Iterator[Graph]:
        """The graphs among the attributes."""
        for value in self.attrs.values():
            if isinstance(value, Graph):
                yield value
            elif isinstance(value, list):
                yield from (item for item in value if isinstance(item, Graph))

    def reads(self) -> Iterator[str]:
        """Every name the node reads: its inputs, then what its subgraphs capture."""
        yield from filter(None, self.inputs)
        for graph in self.subgraphs():
            yield from graph.free

    def __str__(self) -> str:
        """How messages call the node."""
        label = repr(self.name) if self.name else f"that makes {', '.join(map(repr, self.outputs))}"
        return f"{self.domain}::{self.op} {label}" if self.domain else f"{self.op} {label}"

    def __eq__(self, other: object) -> bool:
        return _same_fields(self, other) if isinstance(other, Node) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.domain, self.version, self.inputs, self.outputs, self.name))


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A whole model, or the body of a control-flow node.

    `constants` are read-only C-contiguous arrays. `overridable` are the constants that the model
    lists as inputs too, which a caller may be allowed to replace. `values` are types the model
    declares for inner values: hints, nothing enforces them. `dims` lists the free dimensions of the
    whole model (empty in a subgraph, which shares the outermost graph's). `free` are the names a
    subgraph takes from the graphs around it, in order of first use.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)
    dims: tuple[DimSymbol, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    overridable: tuple[Value, ...] = ()
    free: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return _same_fields(self, other) if isinstance(other, Graph) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.inputs, self.outputs, len(self.nodes)))

    def replace(self, **changes: Any) -> Graph:
        """A copy with some fields changed; `free` follows from the others unless it is given."""
        changed = dataclasses.replace(self, **changes)
        if "free" in changes:
            return changed
        return dataclasses.replace(changed, free=changed.captured())

    def captured(self) -> tuple[str, ...]:
        """The names that are used here and defined nowhere here, in order of first use."""
        defined = {value.name for value in self.inputs} | self.constants.keys()
        for node in self.nodes:
            defined.update(filter(None, node.outputs))
        free: dict[str, None] = {}
        for node in self.nodes:
            free.update((name, None) for name in node.reads() if name not in defined)
        free.update((v.name, None) for v in self.outputs if v.name not in defined)
        return tuple(free)

    def producers(self) -> dict[str, int]:
        """For each name that a node makes, the position of that node."""
        return {name: i for i, node in enumerate(self.nodes) for name in node.outputs if name}

    def uses(self) -> dict[str, list[int]]:
        """For each name that nodes read (captures included), their positions, each once.

        Being a graph output is not a use: see `outputs`.
        """
        uses: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.reads()):
                uses.setdefault(name, []).append(i)
        return uses

    def prune(self) -> Graph:
        """Drop nodes that no output depends on, and constants that nothing reads any more.

        Overridable constants stay: they belong to the interface of the model.
        """
        wanted = {value.name for value in self.outputs}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(name in wanted for name in node.outputs if name):
                kept.append(node)
                wanted.update(node.reads())
        wanted.update(value.name for value in self.overridable)
        constants = {name: array for name, array in self.constants.items() if name in wanted}
        if len(kept) == len(self.nodes) and len(constants) == len(self.constants):
            return self
        return self.replace(nodes=tuple(reversed(kept)), constants=constants)

    def sorted(self) -> Graph:
        """The same graph with its nodes in topological order, otherwise in the order they had.

        Raises GraphError, naming the nodes, when they form a cycle.
        """
        order = sort_nodes(self.nodes)
        if order == list(range(len(self.nodes))):
            return self
        return self.replace(nodes=tuple(self.nodes[i] for i in order))

    def verify(self, outer: frozenset[str] = frozenset()) -> None:
        """Raise GraphError unless the graph keeps its rules; `outer` are names it may capture.

        Checked: each name is defined once, each use and output is defined, nodes are in topological
        order, `free` is right, overridable values are constants, and every dimension's symbols are
        listed (in the outermost graph).
        """
        defined: set[str] = set()

        def define(name: str, what: object) -> None:
            if not name:
                raise GraphError(f"{what} defines an unnamed value")
            if name in defined:
                raise GraphError(f"{what} defines {name!r}, which is defined already")
            defined.add(name)

        for value in self.inputs:
            define(value.name, "the graph inputs")
        for name in self.constants:
            define(name, "a constant")
        free = outer.intersection(self.free)
        for node in self.nodes:
            for name in node.reads():
                if name not in defined and name not in free:
                    raise GraphError(f"{node} reads {name!r}, which nothing before it defines")
            for graph in node.subgraphs():
                graph.verify(outer | defined)
            for name in node.outputs:
                if name:
                    define(name, node)
        for value in self.outputs:
            if value.name not in defined and value.name not in free:
                raise GraphError(f"the output {value.name!r} is not defined")
        for name in self.free:
            if name not in free:
                raise GraphError(f"{name!r} is captured, but nothing around the graph defines it")
        if self.free != self.captured():
            raise GraphError(f"free is {self.free!r} but {self.captured()!r} are captured")
        for value in self.overridable:
            if value.name not in self.constants:
                raise GraphError(f"{value.name!r} is overridable but not a constant")
        if not outer:
            self._verify_dims()

    def _verify_dims(self) -> None:
        known = {symbol.id for symbol in self.dims}
        if len(known) != len(self.dims):
            raise GraphError("two dimensions share an id")
        for value in (*self.inputs, *self.outputs, *self.overridable, *self.values.values()):
            for dim in value.shape or ():
                for id in dim_symbols(dim):
                    if id not in known:
                        raise GraphError(f"the shape of {value.name!r} has an unknown symbol {id}")


def sort_nodes(nodes: Iterable[Node]) -> list[int]:
    """Positions of `nodes` in topological order, the earliest node first where several may go.

    A name that no node makes is taken to be there already. Raises GraphError for a cycle.
    Kahn's algorithm with a heap instead of a queue.
    """
    nodes = list(nodes)
    producer = {name: i for i, node in enumerate(nodes) for name in node.outputs if name}
    waiting: list[int] = []
    readers: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        sources = {producer[name] for name in node.reads() if name in producer}
        waiting.append(len(sources))
        for source in sources:
            readers[source].append(i)
    ready = [i for i, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers[i]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        names = _cycle(nodes, producer, waiting)
        raise GraphError(f"these nodes wait for each other: {', '.join(names)}")
    return order


def _cycle(nodes: list[Node], producer: Mapping[str, int], waiting: list[int]) -> list[str]:
    """The nodes of one cycle: every stuck node has a stuck source, so walking back must close."""
    at = next(i for i, count in enumerate(waiting) if count)
    path: list[int] = []
    while at not in path:
        path.append(at)
        sources = (producer[name] for name in nodes[at].reads() if name in producer)
        at = next(source for source in sources if waiting[source])
    return [str(nodes[i]) for i in reversed(path[path.index(at) :])]


def _same_fields(left: Any, right: Any) -> bool:
    return all(
        _same(getattr(left, entry.name), getattr(right, entry.name))
        for entry in dataclasses.fields(left)
    )


def _same(left: Any, right: Any) -> bool:
    """Structural equality that looks into arrays and takes NaN for equal to NaN."""
    if left is right:
        return True
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return (
            isinstance(left, np.ndarray)
            and isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and (left.tobytes() == right.tobytes() if left.dtype != object else _all(left, right))
        )
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def _all(left: np.ndarray, right: np.ndarray) -> bool:
    return left.tolist() == right.tolist()
