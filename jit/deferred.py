"""Parts of a model that are compiled when they first run, and the functions behind host steps.

What a node needs at compile time may be known only at run time: the rank of a value, or the
contents of an input (a target shape, say). Such a node, and all that depends on it, becomes one
host step. The step compiles its part for the ranks, element types and needed contents that came,
and keeps what it compiled for the next call that is like it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.errors import ModelError
from onnxjit.runtime.inputs import AssumptionError
from onnxjit.runtime.plan import HostStep, Plan
from onnxjit.runtime.threads import available_threads

if TYPE_CHECKING:
    from onnxjit.codegen.build import Builder
    from onnxjit.codegen.cache import Cache
    from onnxjit.codegen.tuned import Table
    from onnxjit.graph import Graph, Node, Value

HostFunction = Callable[[list[Any], Mapping[str, Any]], Sequence[Any]]

DOMAIN = "onnxjit"
DEFERRED, INTERPRETED, CONTROL = "deferred", "interpreted", "control"
MAX_VARIANTS = 64


class Settings:
    """How parts are compiled at run time: where objects are kept, and the threads they run on.

    `builder` compiles; without one, a builder without worker processes is made when it is needed.
    """

    __slots__ = ("_builder", "_lock", "_owner", "cache", "threads")

    def __init__(
        self, cache: Cache | None = None, threads: int | None = None, builder: Builder | None = None
    ) -> None:
        self.cache, self.threads = cache, threads
        self._builder = builder
        self._owner = os.getpid()
        self._lock = threading.Lock()

    @property
    def builder(self) -> Builder:
        with self._lock:
            if self._builder is None or self._owner != os.getpid():  # no builder survives a fork
                from onnxjit.codegen.build import Builder

                self._builder = Builder(jobs=0, cache=self.cache)
                self._owner = os.getpid()
            return self._builder

    @property
    def tuned(self) -> Table:
        """What is known of variants of kernels."""
        from onnxjit.codegen.target import host
        from onnxjit.codegen.tuned import Table

        return Table.open(self.cache, host(), self.threads or available_threads())


def host_functions(
    plan: Plan,
    *,
    cache: Cache | None = None,
    threads: int | None = None,
    builder: Builder | None = None,
    settings: Settings | None = None,
) -> dict[str, HostFunction]:
    """The functions of the host steps of `plan`, by the key that the steps name.

    A key is "domain::name::since" of an operator of the table, or "onnxjit::kind::number" for a
    part that is compiled or interpreted at run time (`cache`, `threads`, `builder`: see
    `Settings`).
    """
    settings = settings or Settings(cache, threads, builder)
    return {
        s.function: _function(s.function, s.attributes, settings)
        for s in plan.steps
        if isinstance(s, HostStep)
    }


def _function(key: str, attributes: Mapping[str, Any], settings: Settings) -> HostFunction:
    domain, name, since = key.rsplit("::", 2)
    if domain != DOMAIN:
        return operator_function(domain, name, int(since))
    graph = decode_graph(attributes)
    if name == DEFERRED:
        return Deferred(graph, settings, attributes["values"], attributes["fixed"])
    if name == INTERPRETED:
        return Interpreted(graph.nodes[0])
    from onnxjit.control import control_function

    return control_function(graph.nodes[0], graph, settings)


def operator_function(domain: str, name: str, since: int) -> HostFunction:
    """The NumPy function of a host operator."""
    from onnxjit import operators as _operators  # noqa: F401  (fills the operator table)
    from onnxjit.operators.registry import find

    row = find(domain, name, since)
    if row is None or not row.host:
        raise KeyError(f"no host operator {domain}::{name} of version {since}")
    define = row.define

    def call(arrays: list[Any], attributes: Mapping[str, Any]) -> Sequence[Any]:
        result = define(*arrays, **attributes)
        return result if isinstance(result, tuple) else (result,)

    return call


def encode_graph(graph: Graph) -> dict[str, Any]:
    """A graph as attributes of a host step."""
    from onnxjit.graph_text import graph_arrays, graph_to_text

    arrays = graph_arrays(graph)
    return {
        "graph": graph_to_text(graph),
        "digests": list(arrays),
        "arrays": [encode_array(a) for a in arrays.values()],
    }


def encode_array(array: np.ndarray) -> dict[str, Any]:
    from onnxjit.tensors import array_dtype_name

    name = array_dtype_name(array)
    data = array.ravel().tolist() if name == "string" else array.tobytes()
    return {"dtype": name, "shape": list(array.shape), "data": data}


def decode_array(row: Mapping[str, Any]) -> np.ndarray:
    from onnxjit.runtime.plan import dtype_of

    dtype, data = dtype_of(row["dtype"]), row["data"]
    if isinstance(data, bytes):
        return np.frombuffer(data, dtype).reshape(row["shape"])
    array = np.empty(len(data), object)
    array[:] = data
    return array.reshape(row["shape"])


def decode_graph(attributes: Mapping[str, Any]) -> Graph:
    """The inverse of `encode_graph`."""
    from onnxjit.graph_text import parse_text

    arrays = zip(attributes["digests"], map(decode_array, attributes["arrays"]), strict=True)
    return parse_text(attributes["graph"], dict(arrays))


class Deferred:
    """A graph without input types, compiled for the inputs that come; safe to call from threads.

    values: inputs whose contents the compiler needs. fixed: inputs that are the same in each call;
    they are compiled in as constants. Sizes other than 0 and 1 are symbolic at first; inputs for
    which that code's assumptions fail get code for exactly their shapes.
    """

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        values: Iterable[str] = (),
        fixed: Iterable[str] = (),
    ) -> None:
        self.graph = graph
        self._settings = settings
        self._fixed = frozenset(fixed)
        self._values = frozenset(values) - self._fixed
        self._names = [v.name for v in graph.inputs]
        self._lock = threading.Lock()
        self._variants: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def __call__(
        self, arrays: Sequence[Any], attributes: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        key = self._key(arrays, False)
        found = self._find(key)
        if found is None:
            try:
                found = self._keep(key, self._compile(arrays, False))
            except ModelError:  # not for free sizes
                found = self._keep(key, "exact")
        if found != "exact":
            try:
                return self._run(found, arrays)
            except AssumptionError:
                self._keep(key, "exact")
        key = self._key(arrays, True)
        found = self._find(key) or self._keep(key, self._compile(arrays, True))
        return self._run(found, arrays)

    def _run(self, executable: Any, arrays: Sequence[Any]) -> Sequence[Any]:
        call = [a for n, a in zip(self._names, arrays, strict=True) if not self._constant(n, a)]
        return executable(*call)

    def _find(self, key: tuple[Any, ...]) -> Any:
        with self._lock:
            found = self._variants.get(key)
            if found is not None:
                self._variants.move_to_end(key)
            return found

    def _keep(self, key: tuple[Any, ...], variant: Any) -> Any:
        with self._lock:
            self._variants[key] = variant
            if len(self._variants) > MAX_VARIANTS:
                self._variants.popitem(last=False)
        return variant

    def _constant(self, name: str, value: Any) -> bool:
        return isinstance(value, np.ndarray) and (name in self._fixed or name in self._values)

    def _key(self, arrays: Sequence[Any], exact: bool) -> tuple[Any, ...]:
        key: list[Any] = [exact]
        for name, a in zip(self._names, arrays, strict=True):
            if not isinstance(a, np.ndarray):
                key.append(type(a))
            elif name in self._values:
                content = a.tobytes() if a.dtype != object else tuple(a.ravel().tolist())
                key.append((a.dtype, a.shape, content))
            elif name not in self._fixed:
                key.append((a.dtype, a.shape if exact else tuple(min(d, 2) for d in a.shape)))
        return tuple(key)

    def _compile(self, arrays: Sequence[Any], exact: bool) -> Any:
        from onnxjit.compiler import build_model
        from onnxjit.dims import DimSymbol, symbol
        from onnxjit.graph import Value
        from onnxjit.runtime.executor import Executable
        from onnxjit.runtime.link import link

        constants = dict(self.graph.constants)
        inputs: list[Value] = []
        symbols: list[DimSymbol] = []
        for name, a in zip(self._names, arrays, strict=True):
            if self._constant(name, a):
                constants[name] = a
                continue
            if not isinstance(a, np.ndarray):
                inputs.append(Value(name, container_type(a), None))
                continue
            shape: list[Any] = []
            for axis, d in enumerate(a.shape):
                if exact or d < 2:
                    shape.append(d)
                    continue
                symbols.append(DimSymbol(f"d{len(symbols)}", f"{name}[{axis}]"))
                shape.append(symbol(symbols[-1].id))
            dtype = "string" if a.dtype == object else a.dtype.name
            inputs.append(Value(name, dtype, tuple(shape)))
        graph = self.graph.replace(inputs=tuple(inputs), constants=constants, dims=tuple(symbols))
        settings = self._settings
        _, parts = build_model(
            graph, cache=settings.cache, builder=settings.builder, tuned=settings.tuned
        )
        plan = parts.generated.plan
        return Executable(
            plan,
            link(list(parts.objects.values())),
            parts.constants,
            settings.threads,
            host=host_functions(plan, settings=settings),
        )


def container_type(value: Any) -> str:
    """The type name of a value that is no array."""
    if not isinstance(value, list):
        return "optional(float32)" if value is None else "map()"
    first = next((a for a in value if isinstance(a, np.ndarray)), None)
    if first is None:
        return "sequence(float32)"
    return f"sequence({'string' if first.dtype == object else first.dtype.name})"


class Interpreted:
    """One node with element types that kernels do not have: its definition evaluated by NumPy."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __call__(
        self, arrays: Sequence[Any], attributes: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        return interpret(self.node, arrays)


def interpret(node: Node, arrays: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """The outputs (the ones that are not omitted) of a node, by evaluating its definition."""
    from onnxjit import operators as _operators  # noqa: F401  (fills the operator table)
    from onnxjit.codegen.evaluate import evaluate
    from onnxjit.codegen.expr import index
    from onnxjit.codegen.kernel import TensorType
    from onnxjit.codegen.tensor import Trace, finish, placeholder
    from onnxjit.operators.registry import find, keyword_arguments

    op = find(node.domain, node.op, node.version)
    assert op is not None
    outputs = list(node.outputs)
    while outputs and not outputs[-1]:
        outputs.pop()
    given: dict[str, np.ndarray] = {}
    trace = Trace()
    with trace.active():
        args: list[Any] = []
        for k, a in enumerate(arrays):
            if a is None:
                args.append(None)
                continue
            given[f"a{k}"] = a
            dtype = "string" if a.dtype == object else a.dtype.name
            t = TensorType(dtype, tuple(index(d) for d in a.shape))
            args.append(placeholder(f"a{k}", t, a if a.dtype != object else None))
        keywords = keyword_arguments(op, node.attrs, len(outputs), node.version)
        result = op.define(*args, **keywords)
        results = list(result) if isinstance(result, tuple | list) else [result]
        made = [(f"r{k}", t) for k, (n, t) in enumerate(zip(outputs, results, strict=False)) if n]
        kernel = finish("interpreted", trace, made, list(given))
    return evaluate(kernel, given)
