"""Lowering: traces every node's definition into a kernel over typed values with symbolic sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxjit import operators as _operators  # noqa: F401  (fills the operator table)
from onnxjit.codegen.evaluate import evaluate
from onnxjit.codegen.expr import (
    Const,
    Dim,
    Expr,
    Load,
    as_int,
    index,
    leaves,
    loads,
    map_loads,
    poly_terms,
    to_text,
)
from onnxjit.codegen.kernel import (
    Kernel,
    Stage,
    TensorType,
    parts_in_time,
    product,
    prune,
    used_inputs,
)
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import (
    DefinitionError,
    NeedsValue,
    Tensor,
    Trace,
    finish,
    placeholder,
)
from onnxjit.control import CONTROL_OPERATORS
from onnxjit.dims import DimExpr
from onnxjit.errors import ModelError, UnsupportedNode, UnsupportedOperators
from onnxjit.graph import Graph, Node, Value
from onnxjit.operators.registry import Operator, find, keyword_arguments
from onnxjit.operators.sequence import OPAQUE_OPERATORS
from onnxjit.passes.fold_constants import depends_on_sizes
from onnxjit.passes.late import (
    OPAQUE,
    LatePart,
    control_call,
    deferred_call,
    has_function,
    has_meaning,
    interpreted_call,
    unstored,
)
from onnxjit.program import Call, DimSource, Guard, HostCall, KernelCall, Program
from onnxjit.runtime.plan import NO_FAULT

FOLD_ELEMENTS = 65536
"""Constant results up to this size are computed while lowering; larger ones after fusion, when
most of them have become index maps of their readers."""

KNOWN_ELEMENTS = 256
"""Integer tensors up to this size are followed symbolically (shape arithmetic)."""


def lower(graph: Graph) -> Program:
    """The program that computes `graph`.

    Raises `UnsupportedOperators` listing every node without a definition, `ModelError` for nodes
    whose inputs break their specification.
    """
    return _Lowering(graph).program()


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids: dict[str, str] = {}
        self.types: dict[str, TensorType] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.known: dict[str, np.ndarray] = {}
        self.labels: dict[str, str] = {}
        self.calls: list[KernelCall | HostCall] = []
        self.dims: list[DimSource] = []
        self.guards: dict[tuple[Expr, Expr], str] = {}
        self.faults: dict[str, str] = {}
        self.declared: set[tuple[Expr, Expr]] = set()
        self.unsupported: list[UnsupportedNode] = []
        self.late = LatePart()
        self.declared_types: dict[str, str] = {}  # of opaque inputs
        self.count = 0

    def program(self) -> Program:
        g = self.graph
        for v in g.inputs:
            self.input(v)
        for name, data in g.constants.items():
            self.constant(self.value(name), data)
        for node in g.nodes:
            self.node(node)
        if self.unsupported:
            raise UnsupportedOperators(self.unsupported)
        if self.late.nodes:
            self.finish_late()
        inputs = tuple(self.ids[v.name] for v in g.inputs)
        program = Program(
            inputs,
            (*(self.ids[v.name] for v in g.outputs), *self.faults),
            tuple(self.calls),
            self.types,
            self.constants,
            self.labels,
            tuple(self.dims),
            tuple(Guard(*k, m, k not in self.declared) for k, m in self.guards.items()),
            tuple(self.faults.values()),
        )
        return prune_program(program)

    # --- values -------------------------------------------------------------------------------

    def value(self, name: str) -> str:
        """A new value id for a model's name ("" for a value that only we have)."""
        vid = f"v{self.count}"
        self.count += 1
        if name:
            self.ids[name] = vid
            self.labels[vid] = name
        return vid

    def constant(self, vid: str, data: np.ndarray) -> None:
        data = np.asarray(data)
        self.constants[vid] = data
        name = dtype_name(data)
        self.types[vid] = TensorType(name, tuple(index(d) for d in data.shape))
        if data.size <= KNOWN_ELEMENTS and data.dtype.kind in "iubfV" and data.dtype != object:
            self.known[vid] = data

    def input(self, v: Value) -> None:
        vid = self.value(v.name)
        if not v.dtype or not v.dtype.isidentifier() or v.shape is None:
            self.types[vid] = OPAQUE
            self.declared_types[vid] = v.dtype
            return
        shape: list[Expr] = []
        for axis, d in enumerate(v.shape):
            shape.append(self.input_dim(vid, axis, d, v.name))
        self.types[vid] = TensorType(v.dtype, tuple(shape))

    def input_dim(self, vid: str, axis: int, d: Any, name: str) -> Expr:
        if isinstance(d, int):
            return index(d)
        labels = {s.id: s.name for s in self.graph.dims}
        e = dim_expression(d)
        have = {s.name for s in self.dims}
        symbols = sorted(x.name for x in leaves(e) if isinstance(x, Dim))
        new = [s for s in symbols if s not in have]
        if not new:
            return e
        terms = poly_terms(e)
        simple = len(symbols) == 1 and all(t in ((), (Dim(new[0]),)) for t in terms)
        if simple and terms[(Dim(new[0]),)] > 0:
            factor, offset = terms[(Dim(new[0]),)], terms.get((), 0)
            label = labels.get(new[0]) or f"{name}[{axis}]"
            self.dims.append(DimSource(new[0], vid, axis, factor, offset, label))
            return e
        fresh = self.fresh_dim(vid, axis, to_text(e))
        if not set(symbols) - have:
            self.guards[(fresh, e)] = f"axis {axis} of input {name!r}"
            self.declared.add((fresh, e))
        return fresh

    def fresh_dim(self, vid: str, axis: int, label: str) -> Expr:
        taken = {s.name for s in self.dims} | {s.id for s in self.graph.dims}
        k = len(taken)
        while f"d{k}" in taken:
            k += 1
        self.dims.append(DimSource(f"d{k}", vid, axis, 1, 0, label))
        return Dim(f"d{k}")

    # --- nodes --------------------------------------------------------------------------------

    def node(self, node: Node, depth: int = 0) -> None:
        if any(n in self.late.names for n in node.reads()):
            self.defer(node)
            return
        op = find(node.domain, node.op, node.version)
        ready = all(x in self.ids for x in node.reads())
        if not node.domain and node.op in CONTROL_OPERATORS:
            if not has_meaning(node):
                self.reject(node, "a body has nodes without a definition")
            elif ready:
                self.control(node)
            return
        if op is None:
            self.inline(node, ready, depth)
            return
        if not ready:
            return
        try:
            if self.opaque(node) and node.op not in OPAQUE_OPERATORS:
                self.opaque_inputs(node)
            elif op.host:
                self.host(node, op)
            elif not self.expanded(node, op):
                self.kernel(node, op)
        except NeedsValue as e:
            self.defer(node, self.needed_by(node, e))
        except DefinitionError as e:
            raise ModelError(f"{node}: {e}") from e

    def expanded(self, node: Node, op: Operator) -> bool:
        """Lowers the nodes that an operator's `expand` gives for one; whether there are such."""
        if op.expand is None:
            return False
        vids = [self.ids[n] if n else "" for n in node.inputs]
        known = [self.constants.get(v, self.types[v]) if v else None for v in vids]
        prefix = f"{node.outputs[0]}/"
        while any(name.startswith(prefix) for name in self.ids):
            prefix += "/"
        made = op.expand(node, known, prefix)
        if made is None:
            return False
        nodes, constants = made
        for name, data in constants.items():
            self.constant(self.value(name), data)
        for inner in nodes:
            self.node(inner)
        return True

    # --- what waits for run time --------------------------------------------------------------

    def opaque(self, node: Node) -> bool:
        return any(n and self.types[self.ids[n]] is OPAQUE for n in node.inputs)

    def opaque_inputs(self, node: Node) -> None:
        """A node with an input of which not even the rank is known."""
        if node.op == "Identity" and not node.domain:
            self.ids[node.outputs[0]] = self.ids[node.inputs[0]]
            return
        for name in filter(None, node.inputs):
            declared = self.declared_types.get(self.ids[name], "")
            if declared and not declared.isidentifier():
                raise DefinitionError(f"input {name!r} is no tensor but a {declared}")
        self.defer(node)

    def needed_by(self, node: Node, e: NeedsValue) -> list[str]:
        """The inputs of `node` whose contents its definition lacks; [] when it has them all."""
        open_ = [n for n in node.inputs if n and self.ids[n] not in self.constants]
        return [n for n in open_ if self.ids[n] == e.buffer] or open_[1:] or open_

    def defer(self, node: Node, needed: Sequence[str] | None = None) -> None:
        """Leaves a node for the late part, unless nothing at run time could help it."""
        if not has_meaning(node):
            self.reject(node, "there is no definition of this operator")
        elif needed is not None and not needed:
            self.reject(node, "it needs contents that are no constant and no input")
        else:
            self.late.add(node, needed or ())

    def opaque_value(self, name: str) -> str:
        vid = self.value(name)
        self.types[vid] = OPAQUE
        return vid

    def finish_late(self) -> None:
        """The host step that compiles and runs the late part."""
        graph = self.late.graph(self.graph.outputs)
        fixed = {v.name for v in graph.inputs if self.ids[v.name] in self.constants}
        outputs = [self.opaque_value(v.name) for v in graph.outputs]
        self.calls.append(
            deferred_call(graph, len(self.calls), self.ids, self.late.needed, fixed, outputs)
        )

    def control(self, node: Node) -> None:
        """A control-flow node: the taken branch where that is known, else a host step."""
        if node.op == "If":
            condition = self.constants.get(self.ids[node.inputs[0]])
            if condition is not None and condition.size == 1:
                taken = bool(condition.reshape(-1)[0])
                self.branch(node, node.attrs["then_branch" if taken else "else_branch"])
                return
        made = [self.opaque_value(n) for n in node.outputs if n]
        self.calls.append(control_call(node, len(self.calls), self.ids, made))

    def branch(self, node: Node, body: Graph) -> None:
        for name, data in body.constants.items():
            self.constant(self.value(name), data)
        for inner in body.nodes:
            self.node(inner)
        for name, v in zip(node.outputs, body.outputs, strict=True):
            if v.name in self.late.names:
                self.late.add(Node("Identity", "", 1, (v.name,), (name,)))
            elif name and v.name in self.ids:
                self.ids[name] = self.ids[v.name]

    def reject(self, node: Node, reason: str) -> None:
        self.unsupported.append(
            UnsupportedNode(node.name, node.domain, str(node.op), node.version, reason)
        )

    def inline(self, node: Node, ready: bool, depth: int) -> None:
        """Expands a node by the function body of its schema."""
        from onnxjit.importer_functions import inline_schema_function

        if ready and has_function(node):
            opaque = [self.ids[n] for n in node.inputs if n and self.types[self.ids[n]] is OPAQUE]
            if not all(self.declared_types.get(v) for v in opaque):
                self.defer(node)  # some function bodies depend on the types of the inputs
                return
        values = [self.graph_value(x) if x and x in self.ids else None for x in node.inputs]
        taken = {*self.ids, *self.late.names}
        body = inline_schema_function(node, values, taken=taken) if depth < 8 else None
        if body is None:
            self.reject(node, "there is no definition of this operator")
            return
        if ready:
            for inner in body:
                self.node(inner, depth + 1)

    def graph_value(self, name: str) -> Value:
        t = self.types[self.ids[name]]
        if t is OPAQUE:
            return Value(name, self.declared_types.get(self.ids[name], ""), None)
        shape = tuple(
            s if (s := as_int(d)) is not None else DimExpr("symbol", (to_text(d),)) for d in t.shape
        )
        return Value(name, t.dtype, shape)

    def arguments(self, node: Node) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for name in node.inputs:
            if not name:
                out.append(None)
                continue
            vid = self.ids[name]
            out.append(placeholder(vid, self.types[vid], self.known.get(vid)))
        return out

    def kernel(self, node: Node, op: Operator) -> None:
        outputs = [o for o in node.outputs]
        while outputs and not outputs[-1]:
            outputs.pop()
        trace = Trace()
        with trace.active():
            args = self.arguments(node)
            try:
                keywords = keyword_arguments(op, node.attrs, len(outputs), node.version)
                result = op.define(*args, **keywords)
            except TypeError as e:
                raise DefinitionError(str(e)) from e
            results = list(result) if isinstance(result, tuple | list) else [result]
            if len(results) < len(outputs):
                raise DefinitionError(f"{len(outputs)} outputs, the operator has {len(results)}")
            made = [(self.value(n), n, t) for n, t in zip(outputs, results, strict=False) if n]
            inputs = [self.ids[n] for n in dict.fromkeys(node.inputs) if n]
            kernel = finish(kernel_name(node), trace, [(v, t) for v, _, t in made], inputs)
        if kernel.clock is not None:
            kernel = self.owned(kernel, kernel.outputs[len(made) :])
        self.guard(trace, node)
        fixed = all(v in self.constants for v in inputs)
        if unstored(kernel) and not fixed:
            for vid, _, _ in made:
                self.types[vid] = kernel.types[vid]
            args_ = [self.ids[n] if n else "" for n in node.inputs]
            vids = [v for v, _, _ in made]
            self.calls.append(interpreted_call(node, len(self.calls), args_, vids))
            return
        if fixed and self.fold(kernel, inputs):
            return
        for vid, _, t in made:
            self.types[vid] = kernel.types[vid]
            probe = Trace()
            with probe.active():
                followed = self.follow(vid, t)
            if followed:
                self.guard(probe, node)
        if all(v in self.constants for v, _, _ in made):
            return
        left = tuple(v for v in kernel.outputs if v not in self.constants)
        kernel = self.fold_stages(with_outputs(kernel, left))
        for part in self.before_clock(kernel) if kernel.clock is not None else separate(kernel):
            self.calls.append(KernelCall(part, (str(node),)))
        self.expect(trace, node, inputs)

    def expect(self, trace: Trace, node: Node, inputs: Sequence[str]) -> None:
        """A kernel for each question to the data that a definition has asked."""
        for ask, text in trace.faults:
            own = Trace()
            own.types.update(trace.types)
            with own.active():
                answer = ask()
            v = self.value("")
            kernel = finish("index_check", own, [(v, answer)], inputs)
            message = f"{node}: {text}"
            if all(i in self.constants for i in kernel.inputs) and not depends_on_sizes(kernel):
                (found,) = evaluate(kernel, {i: self.constants[i] for i in kernel.inputs})
                if found != NO_FAULT:
                    raise ModelError(f"{message}: {found}")
                continue
            self.types[v] = kernel.types[v]
            self.calls.append(KernelCall(kernel, (str(node),)))
            self.faults[v] = message

    def guard(self, trace: Trace, node: Node) -> None:
        for pair in trace.guards:
            self.guards.setdefault(pair, str(node))

    def follow(self, vid: str, t: Tensor) -> bool:
        """Keeps the contents of a small tensor when they are an expression of sizes alone.

        Answers whether it did, and then relies on the guards of the active trace.
        """
        count = as_int(product(t.shape))
        if count is None or count > KNOWN_ELEMENTS or t.dtype not in _FOLLOWED:
            return False
        try:
            values = t.values()
        except NeedsValue:
            return False
        shape = [as_int(d) or 0 for d in t.shape]
        if all(isinstance(v, Const) for v in values):
            data = np.array([v.value for v in values if isinstance(v, Const)])
            data = data.astype(numpy_dtype(t.dtype)).reshape(shape)
            self.constants[vid] = self.known[vid] = data
            return True
        array = np.empty(len(values), dtype=object)
        array[:] = values
        self.known[vid] = array.reshape(shape)
        return True

    def fold(self, kernel: Kernel, inputs: Sequence[str]) -> bool:
        """Computes a kernel of constants now, unless it is large."""
        (first, *more) = kernel.stages
        if not more and isinstance(first.value, Const) and not first.index:
            shape = [as_int(d) for d in kernel.types[first.buffer].shape]
            if all(d is not None for d in shape):
                # A fill of any size is one element with zero strides.
                fill = np.array(first.value.value, numpy_dtype(first.value.dtype))
                self.constant(first.buffer, np.broadcast_to(fill, [d or 0 for d in shape]))
                return True
        sizes = [as_int(kernel.types[v].elements) for v in (*kernel.outputs, *kernel.inputs)]
        if any(s is None or s > FOLD_ELEMENTS for s in sizes):
            return False
        if any(
            (as_int(product(a.extent for a in r.axes)) or 0)
            * (as_int(product(a.extent for a in s.axes)) or 0)
            > 1 << 22
            for s in kernel.stages
            for r in s.reduces
        ):
            return False
        results = evaluate(kernel, {v: self.constants[v] for v in kernel.inputs})
        for vid, data in zip(kernel.outputs, results, strict=True):
            self.constant(vid, data)
        return True

    def fold_stages(self, kernel: Kernel) -> Kernel:
        """Replaces stages that only constants enter by new constants."""
        stages: list[Stage] = []
        done: dict[str, str] = {}
        types = dict(kernel.types)

        def renamed(x: Load) -> Expr | None:
            return Load(done[x.buffer], x.index, x.dtype) if x.buffer in done else None

        for s in kernel.stages:
            if done:
                s = Stage(s.buffer, s.axes, map_loads(s.value, renamed), s.index)
            reads = {x.buffer for x in loads(s.value)}
            count = as_int(product(a.extent for a in s.axes))
            if (
                s.buffer in kernel.outputs
                or not reads
                or not reads <= self.constants.keys()
                or count is None
                or count > FOLD_ELEMENTS
                or s.index
            ):
                stages.append(s)
                continue
            part = Kernel("fold", tuple(reads), (s.buffer,), (s,), types)
            (data,) = evaluate(part, {v: self.constants[v] for v in reads})
            vid = self.value("")
            self.constant(vid, data)
            types[vid] = self.types[vid]
            done[s.buffer] = vid
        if not done:
            return kernel
        kept = prune(tuple(stages), kernel.outputs)
        candidates = [*kernel.inputs, *done.values()]
        ins = used_inputs(kept, candidates)
        return Kernel(kernel.name, ins, kernel.outputs, kept, types, kernel.clock)

    def owned(self, kernel: Kernel, buffers: Iterable[str]) -> Kernel:
        """The kernel with `buffers` as values of the program."""
        table = {b: self.value("") for b in buffers}
        kernel = kernel.renamed(table)
        for v in table.values():
            self.types[v] = kernel.types[v]
        return kernel

    def before_clock(self, kernel: Kernel) -> list[Kernel]:
        """A kernel for each value that a recurrence only reads, and the recurrence itself."""
        before, _, _ = parts_in_time(kernel)
        made = dict.fromkeys(s.buffer for s in before if s.buffer not in kernel.outputs)
        kernel = self.owned(kernel, made)
        k, parts = kernel, []
        candidates = [*k.inputs, *(s.buffer for s in k.stages)]
        apart = [s for s in k.stages if k.clock not in s.axes and s.buffer not in k.outputs]
        for s in apart:
            parts.append(Kernel(k.name, used_inputs((s,), candidates), (s.buffer,), (s,), k.types))
        rest = tuple(s for s in k.stages if s not in apart)
        stored = {s.buffer for s in rest}
        ins = used_inputs(rest, [b for b in dict.fromkeys(candidates) if b not in stored])
        return [*parts, Kernel(k.name, ins, k.outputs, rest, k.types, k.clock)]

    def host(self, node: Node, op: Operator) -> None:
        assert op.infer is not None
        outputs = list(node.outputs)
        while outputs and not outputs[-1]:
            outputs.pop()
        inputs = [self.ids[n] if n else "" for n in node.inputs]
        while inputs and not inputs[-1]:
            inputs.pop()
        known = all(not v or v in self.constants for v in inputs)
        trace = Trace()
        keywords = keyword_arguments(op, node.attrs, len(outputs), node.version)
        if known and not node.op.startswith(("Random", "Bernoulli", "Multinomial")):
            arrays = [self.constants[v] if v else None for v in inputs]
            result = op.define(*arrays, **keywords)
            results = list(result) if isinstance(result, tuple) else [result]
            if all(isinstance(r, np.ndarray | np.generic) for r in results):
                for name, data in zip(outputs, results, strict=False):
                    if name:
                        self.constant(self.value(name), np.asarray(data, order="C"))
                return
        with trace.active():
            types = list(op.infer(*self.arguments(node), **keywords))
        vids = []
        for name, t in zip(outputs, types, strict=False):
            vid = self.value(name)
            vids.append(vid)
            if t is OPAQUE:
                self.types[vid] = OPAQUE
                continue
            shape = tuple(
                self.fresh_dim(vid, axis, f"{name}[{axis}]") if d is None else index(d)
                for axis, d in enumerate(t.shape)
            )
            self.types[vid] = TensorType(t.dtype, shape)
        attrs = dict(keywords)
        self.calls.append(
            HostCall(
                (op.domain, op.name, op.since), attrs, tuple(inputs), tuple(vids), (str(node),)
            )
        )


_FOLLOWED = ("int64", "int32", "bool", "float32", "float64")


def separate(k: Kernel) -> list[Kernel]:
    """One kernel per output where all outputs are plain reads, so that each can be fused away."""
    plain = all(isinstance(s.value, Load) and not s.index for s in k.stages)
    if len(k.outputs) < 2 or len(k.stages) != len(k.outputs) or not plain:
        return [k]
    return [
        Kernel(k.name, used_inputs((s,), k.inputs), (s.buffer,), (s,), k.types) for s in k.stages
    ]


def kernel_name(node: Node) -> str:
    """A name of our own making for the kernel of a node: the operator's registered name."""
    return str(node.op).lower() if str(node.op).isidentifier() else "kernel"


def dtype_name(data: np.ndarray) -> str:
    return "string" if data.dtype == object or data.dtype.kind in "SU" else data.dtype.name


def dim_expression(d: Any) -> Expr:
    """An index expression for a size of the graph."""
    if isinstance(d, int):
        return index(d)
    if d.op == "symbol":
        return Dim(str(d.args[0]))
    a, b = (dim_expression(x) for x in d.args)
    return {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "//": lambda: a // b,
    }[d.op]()


def prune_program(p: Program) -> Program:
    """Drops calls, outputs of kernels and constants that no output of the program needs."""
    need = set(p.outputs)
    kept: list[Call] = []
    for c in reversed(p.calls):
        if not need & set(c.outputs):
            continue
        if isinstance(c, KernelCall):
            c = replace(c, kernel=with_outputs(c.kernel, [v for v in c.outputs if v in need]))
        kept.append(c)
        need |= set(c.inputs)
    constants = {v: a for v, a in p.constants.items() if v in need}
    return p.replace(calls=tuple(reversed(kept)), constants=constants)


def with_outputs(k: Kernel, outputs: Sequence[str]) -> Kernel:
    """The kernel with what makes these outputs alone. A recurrence keeps the states for it, too."""
    if len(outputs) == len(k.outputs):
        return k
    stages = prune(k.stages, outputs)
    stored = {s.buffer for s in stages}
    kept = tuple(b for b in k.outputs if b in outputs or (k.clock is not None and b in stored))
    return Kernel(k.name, used_inputs(stages, k.inputs), kept, stages, k.types, k.clock)
