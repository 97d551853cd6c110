"""Drives a compilation: import, passes, code generation, parallel build, packing."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.artifact import Artifact, TensorInfo
from onnxjit.codegen.build import Builder
from onnxjit.codegen.build import key as source_key
from onnxjit.codegen.cache import Cache
from onnxjit.codegen.layout import Strided
from onnxjit.codegen.packing import Packed, arranged
from onnxjit.codegen.signature import signature, to_data
from onnxjit.codegen.target import Target, host
from onnxjit.codegen.tuned import Table
from onnxjit.codegen_calls import Generated, ScheduledCall, generate
from onnxjit.dims import DimExpr
from onnxjit.errors import ModelError
from onnxjit.graph import Graph, Value
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline
from onnxjit.program import Program
from onnxjit.runtime.executor_source import SOURCE, SYMBOLS
from onnxjit.runtime.plan import Expression, Plan, Step
from onnxjit.runtime.threads import aligned

if TYPE_CHECKING:
    from onnxjit.tuning import Budget

Progress = Callable[[int, int], None]
Shapes = Sequence[tuple[int, ...]]


def submit_executor(builder: Builder) -> Callable[[], bytes]:
    """Have the plan executor compiled; the result waits for its object file."""
    name = builder.target.code_key
    if name in _executors:
        return lambda: _executors[name]
    key = builder.submit_words(SOURCE, SYMBOLS)
    return lambda: _executors.setdefault(name, builder.result(key))


_executors: dict[str, bytes] = {}
"""Executor objects that this process has, by target."""


@dataclass(frozen=True, slots=True)
class Artifacts:
    """All parts of a compiled model, before it is loaded."""

    program: Program
    generated: Generated
    objects: dict[str, bytes]
    constants: list[np.ndarray]


def build_model(
    model: Any,
    *,
    overrides: Mapping[str, int] | None = None,
    shapes: Shapes | None = None,
    target: Target | None = None,
    cache: Cache | None = None,
    jobs: int | None = None,
    builder: Builder | None = None,
    progress: Progress | None = None,
    observe: Callable[[str, Program], None] | None = None,
    constants: Callable[[Iterator[np.ndarray | Packed]], None] | None = None,
    tuned: Table | None = None,
    budget: Budget | None = None,
) -> tuple[Graph, Artifacts]:
    """Compiles a model; returns the imported graph and the artifacts.

    `shapes` are concrete shapes of all inputs, for code that serves only those. `builder` is used
    instead of a new one and stays open (many small models share its workers). `constants` takes
    the plan's constants one after the other, while kernels are being compiled, and the result then
    has none: no two of them need memory at the same time. `tuned` has the variants of kernels that
    were measured before; with a `budget`, those that it lacks are measured now and added.
    """
    target = target or host()
    with (
        without_collection(),
        nullcontext(builder) if builder else Builder(target, jobs, cache) as builder,
    ):
        builder.start()
        executor = submit_executor(builder)
        graph = model if isinstance(model, Graph) else import_model(model, overrides=overrides)
        if shapes is not None:
            graph = with_shapes(graph, shapes)
        program = run_pipeline(graph, target, observe)
        if budget is not None and tuned is not None:
            from onnxjit.tuning import tune

            check_names(budget.sizes, graph)
            tune(program, builder, cache, tuned, budget, progress)
        generated = generate(program, target, builder.submit, tuned)
        generated.plan = with_names(generated.plan)
        distinct = {s.text: s for s in generated.sources}
        ordered = sorted(distinct.values(), key=lambda s: -len(s.text))
        keys = [builder.submit(s) for s in ordered]
        symbols = sorted({x for s in ordered for x in s.symbols})
        packed: list[np.ndarray] = []
        if constants is None:
            packed = packed_constants(program, generated)
        else:
            constants(plan_constants(program, generated))
        objects: dict[str, bytes] = {"executor": executor()}
        for n, k in enumerate(keys):
            objects[k] = builder.result(k)
            if progress is not None:
                progress(n + 1, len(keys))
        objects.update(builder.tile_objects(symbols))
    return graph, Artifacts(program, generated, objects, packed)


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage is not looked for in the meantime: what a compilation makes lives until its end, and
    going through it again and again takes an eighth of the time before kernels are built."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def plan_constants(program: Program, generated: Generated) -> Iterator[np.ndarray | Packed]:
    """The plan's constants in order: C-contiguous arrays, and what is to be packed."""
    for v in generated.constants:
        q = generated.packings.get(v)
        if q is None:
            order = program.layouts.get(v)
            assert not isinstance(order, Strided), f"the constant {v} has no memory of its own"
            data = arranged(program.constants[v], order)
            yield np.require(data, requirements=["C", "A"])
        else:
            yield Packed(program.constants[q.buffer], q)


def packed_constants(program: Program, generated: Generated) -> list[np.ndarray]:
    """The plan's constants in order, packed ones at the start of a cache line (a vector that
    straddles two lines costs a product 7 %)."""
    return [
        x if isinstance(x, np.ndarray) else x.array(aligned(x.nbytes).view(x.dtype))
        for x in plan_constants(program, generated)
    ]


def check_names(sizes: Mapping[str, int], graph: Graph) -> None:
    """Raises `ModelError` for sizes of dimensions that the model's inputs do not have."""
    dims = [d for v in graph.inputs for d in v.shape or () if isinstance(d, DimExpr)]
    known = {s.name for s in graph.dims} | {d.text for d in dims}
    unknown = sorted(sizes.keys() - known)
    if unknown:
        raise ModelError(
            f"no dimension is called {', '.join(map(repr, unknown))}; the model has "
            f"{', '.join(sorted(repr(name) for name in known if name)) or 'none'}"
        )


def with_shapes(graph: Graph, shapes: Shapes) -> Graph:
    """The graph for inputs of exactly these shapes."""
    if len(shapes) != len(graph.inputs):
        raise ModelError(f"{len(shapes)} shapes for {len(graph.inputs)} inputs")
    inputs = tuple(
        Value(v.name, v.dtype, tuple(s)) for v, s in zip(graph.inputs, shapes, strict=True)
    )
    return graph.replace(inputs=inputs)


def with_names(plan: Plan) -> Plan:
    """The plan with a readable name of its own for every kernel step: conv_relu_3."""
    count: Counter[str] = Counter()
    steps = []
    for s in plan.steps:
        if isinstance(s, Step):
            count[s.name] += 1
            s = s._replace(name=f"{s.name}_{count[s.name] - 1}")
        steps.append(s)
    return plan._replace(steps=tuple(steps))


def artifact_of(
    graph: Graph, parts: Artifacts, target: Target, shapes: Shapes | None = None
) -> Artifact:
    """The compiled model as plain data; `constants` as far as they are in `parts`."""
    plan = parts.generated.plan
    overridable = [[v.name, v.dtype, graph.constants[v.name].shape] for v in graph.overridable]
    return Artifact(
        plan,
        tuple(parts.objects.values()),
        tuple(parts.constants),
        tuple(_info(v, plan, b, graph) for v, b in zip(graph.inputs, plan.inputs, strict=True)),
        tuple(_info(v, plan, b, graph) for v, b in zip(graph.outputs, plan.results, strict=True)),
        {**graph.metadata, "overridable": overridable},
        kernels_text(parts.program, parts.generated, target),
        target.code_key,
        None if shapes is None else tuple(map(tuple, shapes)),
    )


def _info(v: Value, plan: Plan, b: int, graph: Graph) -> TensorInfo:
    """Name and type: the declared shape where there is one, else the one that was inferred."""
    buffer = plan.buffers[b]
    if buffer.dtype == "object":  # nothing is known before a run but what the model declares
        known = [d if isinstance(d, int) else getattr(d, "text", "") or None for d in v.shape or ()]
        return TensorInfo(v.name, v.dtype or "object", tuple(known))
    inferred = buffer.shape or ()
    declared: Sequence[Any] = v.shape if v.shape is not None else inferred
    if len(declared) != len(inferred):
        declared = inferred
    names = {s.id: s.name for s in graph.dims}
    labels = {d.name: d.label for d in plan.dims}
    shape: list[int | str | None] = []
    for d, e in zip(declared, inferred, strict=True):
        if isinstance(e, int):
            shape.append(e)
        elif isinstance(d, DimExpr):
            shape.append(d.text or names.get(str(d.args[0])) or None)
        else:
            shape.append(labelled(e, labels))
    return TensorInfo(v.name, buffer.dtype, tuple(shape))


def labelled(e: Expression, labels: Mapping[str, str]) -> int | str:
    """A size with the model's names for its free dimensions."""
    import re

    if isinstance(e, int):
        return e
    return re.sub(r"d\d+", lambda m: labels.get(m[0]) or m[0], e)


def kernels_text(program: Program, generated: Generated, target: Target) -> bytes:
    """What there is to know of each kernel step, as JSON: rows, each distinct source and signature
    once, and the sizes of the plan as the signatures call them."""
    sources: dict[str, dict[str, Any]] = {}
    signatures: dict[int, int] = {}
    texts: dict[str, int] = {}
    rows = []
    for step, c in zip(generated.plan.steps, generated.scheduled, strict=True):
        if not isinstance(c, ScheduledCall) or not isinstance(step, Step):
            rows.append({"host": step.name, "origin": c.origin})  # type: ignore[union-attr]
            continue
        nest, k = c.nest, source_key(c.source, target)
        sources[k] = {
            "text": c.source.text,
            "symbols": c.source.symbols,
            "wide": c.source.wide,
        }
        if id(nest) not in signatures:  # equal layers share one nest
            text = json.dumps(to_data(signature(c.call.kernel, nest, program.layouts)))
            signatures[id(nest)] = texts.setdefault(text, len(texts))
        rows.append(
            {
                "name": step.name,
                "key": k,
                "rule": nest.rule,
                "declined": nest.declined,
                "notes": nest.notes,
                "definition": str(c.call.kernel),
                "nest": str(nest),
                "origin": c.call.origin,
                "flops": step.flops,
                "bytes": step.bytes,
                "tiles": step.tiles,
                "scratch": step.scratch,
                "signature": signatures[id(nest)],
                "variant": dict(c.tuned.choices) if c.tuned else {},
                "gain": c.tuned.gain if c.tuned else 1.0,
            }
        )
    data = {
        "sources": sources,
        "rows": rows,
        "signatures": list(texts),
        "dims": [d.name for d in program.dims],
    }
    return json.dumps(data, separators=(",", ":")).encode()
