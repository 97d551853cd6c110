"""From a program to kernel sources and a plan: one nest, source and step per kernel call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from onnxjit.codegen.build import Source, symbol_of
from onnxjit.codegen.build import key as source_key
from onnxjit.codegen.canonical import Canonical, canonical
from onnxjit.codegen.emit_cpu import emit
from onnxjit.codegen.expr import (
    INDEX,
    Apply,
    Const,
    Dim,
    Expr,
    Load,
    Poly,
    Reduce,
    as_int,
    index,
    poly_mul,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Kernel, Stage, TensorType, used_inputs
from onnxjit.codegen.layout import Layout
from onnxjit.codegen.loops import LoopNest
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.scalar_functions import FUNCTIONS, numpy_dtype
from onnxjit.codegen.schedule import NoSchedule, Request, schedule
from onnxjit.codegen.schedule.request import expressions
from onnxjit.codegen.signature import structure
from onnxjit.codegen.target import Target
from onnxjit.codegen.tuned import Table, Tuned
from onnxjit.codegen.unify import unified
from onnxjit.errors import ModelError
from onnxjit.program import HostCall, JoinCall, KernelCall, Program
from onnxjit.runtime.plan import Alias, Buffer, Check, HostStep, Plan, Step
from onnxjit.runtime.plan import Dim as PlanDim
from onnxjit.runtime.plan import Source as DimOrigin


@dataclass(frozen=True, slots=True)
class ScheduledCall:
    """A kernel call with its nest and source. A buffer is a value id, or "pack:N": a packed
    constant. `tuned` says which variant it is, where there is a choice."""

    call: KernelCall
    nest: LoopNest
    source: Source
    buffers: tuple[str, ...]
    tuned: Tuned | None = None


@dataclass(slots=True)
class Generated:
    """Everything code generation made of a program."""

    plan: Plan
    sources: list[Source]
    constants: list[str]
    packings: dict[str, Packing]
    scheduled: list[ScheduledCall | HostCall] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Planned:
    """A distinct kernel: the request that was scheduled, what came of it, its `structure`, and what
    tuning says of that."""

    request: Request
    nest: LoopNest
    source: Source
    structure: str
    tuned: Tuned | None = None


def planned(request: Request, name: str, structure: str, tuned: Tuned | None = None) -> Planned:
    """A kernel under standard names scheduled and printed; `name` is for messages."""
    nest = schedule(request)
    source = Source(emit(nest), nest.symbols, name, wide=wide(nest))
    return Planned(request, nest, source, structure, tuned)


@dataclass(frozen=True, slots=True)
class Named:
    """A kernel under standard names, with the layouts and the constants among its buffers."""

    same: Canonical
    layouts: dict[str, Layout]
    constants: frozenset[str]

    @property
    def key(self) -> object:
        """Equal for kernels that are the same but for names."""
        return self.same.key, tuple(self.layouts.items()), self.constants


def likeness(kernel: Kernel) -> object:
    """Equal for kernels that do the same, of whatever sizes and index arithmetic."""
    return tuple(
        (
            len(s.axes),
            tuple(
                (type(x).__name__, x.fn if isinstance(x, Apply) else x.dtype)
                for x in walk(s.value)
                if isinstance(x, Load | Reduce) or (isinstance(x, Apply) and x.dtype != INDEX)
            ),
        )
        for s in kernel.stages
    )


def unified_kernels(kernels: Sequence[Planned]) -> list[Planned]:
    """The kernels with one source for those that differ in constants alone."""
    groups: dict[object, list[int]] = {}
    for n, k in enumerate(kernels):
        groups.setdefault(k.source.wide, []).append(n)
    result = list(kernels)
    for members in groups.values():
        if len(members) == 1:
            continue
        texts = unified([kernels[n].source.text for n in members])
        for n, (text, sizes) in zip(members, texts, strict=True):
            k = kernels[n]
            if text != k.source.text:
                nest = replace(k.nest, sizes=(*k.nest.sizes, *map(index, sizes)))
                result[n] = replace(k, nest=nest, source=replace(k.source, text=text))
    return result


def generate(
    p: Program,
    target: Target,
    submit: Callable[[Source], object] | None = None,
    tuned: Table | None = None,
) -> Generated:
    """Schedules and prints every kernel and builds the plan.

    `constants` of the result name, in plan order, values of the program or keys of `packings`.
    `submit` is told of each distinct source as soon as it is there. `tuned` has variants of
    kernels, by structure.
    """
    return _Generator(p, target, submit or (lambda source: None), tuned or Table()).run()


def single_stages(c: KernelCall) -> list[KernelCall]:
    """One call per buffer written: what remains when no rule takes the stages together."""
    k = c.kernel
    groups: list[list[Stage]] = []
    for s in k.stages:
        if groups and groups[-1][0].buffer == s.buffer:
            groups[-1].append(s)
        else:
            groups.append([s])
    out = []
    for g in groups:
        made = {s.buffer for s in g}
        candidates = [b for b in (*k.inputs, *(s.buffer for s in k.stages)) if b not in made]
        inputs = used_inputs(g, dict.fromkeys(candidates))
        kernel = Kernel(k.name, inputs, (g[0].buffer,), tuple(g), k.types)
        out.append(KernelCall(kernel, c.origin))
    return out


WIDE_COST = 15
"""Functions from this cost on (exp, erf, …) gain 1.2 to 1.6 times from 512-bit vectors."""


def wide(nest: LoopNest) -> bool:
    """Whether a kernel should use the widest vectors, as register tiles and long formulas do."""
    if nest.symbols:
        return True
    return any(
        isinstance(x, Apply) and FUNCTIONS[x.fn].cost >= WIDE_COST
        for e in expressions(nest.body)
        for x in walk(e)
    )


class _Generator:
    def __init__(
        self,
        p: Program,
        target: Target,
        submit: Callable[[Source], object],
        tuned: Table,
    ) -> None:
        self.p, self.target, self.submit, self.tuned = p, target, submit, tuned
        self.types: dict[str, TensorType] = dict(p.types)
        self.packings: dict[str, Packing] = {}
        self.pack_ids: dict[Packing, str] = {}
        self.scheduled: list[ScheduledCall | HostCall] = []
        order = {d.name: f"d{k}" for k, d in enumerate(p.dims)}
        self.rename: dict[Expr, Expr] = {Dim(a): Dim(b) for a, b in order.items()}
        self.order = order
        self.plans: dict[object, Planned] = {}
        size = sum(a.nbytes for a in p.constants.values())
        self.resident = size <= target.kept

    def run(self) -> Generated:
        self.plan_alike()
        for c in self.p.calls:
            if isinstance(c, HostCall):
                self.scheduled.append(c)
            elif isinstance(c, KernelCall):
                self.schedule(c)
        return self.build_plan()

    def plan_alike(self) -> None:
        """Plans kernels that compute the same at other sizes together, because their sources may
        become one. Few first, so that there is soon something to compile. Those that no rule takes
        are left to `schedule`."""
        groups: dict[object, list[Kernel]] = {}
        for c in self.p.calls:
            if isinstance(c, KernelCall):
                groups.setdefault(likeness(c.kernel), []).append(c.kernel)
        for kernels in sorted(groups.values(), key=len):
            made: dict[object, Planned] = {}
            for kernel in kernels:
                named = self.named(kernel)
                if named.key not in made:
                    with suppress(NoSchedule):
                        made[named.key] = self.made(named)
            self.plans.update(zip(made, unified_kernels(list(made.values())), strict=True))
            for key in made:
                self.submit(self.plans[key].source)

    def schedule(self, c: KernelCall) -> None:
        try:
            made, names = self.planned(c.kernel)
        except NoSchedule as e:
            parts = single_stages(c)
            if len(parts) == 1 or c.kernel.clock is not None:
                raise ModelError(str(e)) from e
            for b, t in c.kernel.types.items():
                self.types.setdefault(b, t)
            for part in parts:
                self.schedule(part)
            return
        nest = made.nest
        packed = {q.buffer: self.packed(replace(q, buffer=names[q.buffer])) for q in nest.packings}
        buffers = tuple(packed.get(x.buffer) or names[x.buffer] for x in nest.params)
        self.scheduled.append(ScheduledCall(c, nest, made.source, buffers, made.tuned))

    def planned(self, kernel: Kernel) -> tuple[Planned, dict[str, str]]:
        """A kernel scheduled under standard names, and what those stand for. Kernels that are equal
        but for names, as the layers of a network, are planned once."""
        named = self.named(kernel)
        if named.key not in self.plans:
            self.plans[named.key] = made = self.made(named)
            self.submit(made.source)
        return self.plans[named.key], named.same.buffers

    def named(self, kernel: Kernel) -> Named:
        """A kernel as its plan depends on it."""
        same = canonical(kernel)
        values, p = same.buffers.items(), self.p
        layouts = {b: p.layouts[v] for b, v in values if v in p.layouts}
        return Named(same, layouts, frozenset(b for b, v in values if v in p.constants))

    def made(self, k: Named) -> Planned:
        """The plan of a kernel by itself. Raises `NoSchedule`."""
        kernel = k.same.kernel
        name = structure(kernel, k.layouts, k.constants)
        row = self.tuned.rows.get(name)
        variant = {} if row is None else row.choices
        request = Request(
            kernel, k.layouts, self.target, k.constants, variant, resident=self.resident
        )
        return planned(request, kernel.name, name, row)

    def packed(self, q: Packing) -> str:
        if q not in self.pack_ids:
            name = f"pack:{len(self.pack_ids)}"
            self.pack_ids[q] = name
            self.packings[name] = q
        return self.pack_ids[q]

    # --- plan ---------------------------------------------------------------------------------

    def text(self, e: Expr) -> int | str:
        """A size as the plan's expression language has it."""
        n = as_int(e)
        return n if n is not None else plan_text(substitute(e, self.rename))

    def build_plan(self) -> Generated:
        p = self.p
        buffers: list[Buffer] = []
        ids: dict[str, int] = {}
        constants: list[str] = []

        def add(v: str, kind: str) -> int:
            if v in ids:
                return ids[v]
            if v in self.packings:
                q = self.packings[v]
                buffers.append(Buffer("constant", "float32", q.elements * 4, (q.elements,)))
            else:
                t = self.types[v]
                shape = tuple(self.text(d) for d in t.shape)
                nbytes = self.text(t.nbytes)
                label = p.labels.get(v, "")
                alias = None
                if v in p.places:
                    place = p.places[v]
                    offset = poly_mul(place.offset, index(numpy_dtype(t.dtype).itemsize))
                    alias = Alias(add(place.base, kind), self.text(offset))
                buffers.append(Buffer(kind, t.dtype, nbytes, shape, alias, label))
            ids[v] = len(buffers) - 1
            if buffers[-1].kind == "constant":
                constants.append(v)
            return ids[v]

        for v in p.inputs:
            add(v, "input")
        made = {
            v
            for c in self.scheduled
            for v in (c.call.outputs if isinstance(c, ScheduledCall) else c.outputs)
        } | {c.output for c in p.calls if isinstance(c, JoinCall)}
        host_made = {v for c in self.scheduled if isinstance(c, HostCall) for v in c.outputs}

        def kind(v: str) -> str:
            if v in p.places:
                v = p.places[v].base
            if v in p.constants or v in self.packings:
                return "constant"
            if v in host_made:
                return "host"
            return "output" if v in p.outputs and v in made else "arena"

        steps: list[Step | HostStep] = []
        for c in self.scheduled:
            if isinstance(c, HostCall):
                steps.append(
                    HostStep(
                        "::".join(str(x) for x in c.operator),
                        tuple(add(v, kind(v)) if v else -1 for v in c.inputs),
                        tuple(add(v, kind(v)) for v in c.outputs),
                        dict(c.attrs),
                        c.operator[1],
                    )
                )
                continue
            k = c.call.kernel
            steps.append(
                Step(
                    symbol_of(source_key(c.source, self.target)),
                    tuple(add(v, kind(v)) for v in c.buffers),
                    tuple(self.text(e) for e in c.nest.sizes),
                    self.text(c.nest.tiles),
                    self.text(c.nest.scratch),
                    self.text(c.nest.rounds),
                    self.text(k.flops()),
                    self.text(k.bytes_moved()),
                    k.name,
                )
            )
        outputs = tuple(add(v, kind(v)) for v in p.outputs)
        dims = tuple(
            PlanDim(
                self.order[d.name],
                DimOrigin(ids[d.value], d.axis, d.factor, d.offset),
                d.label,
            )
            for d in p.dims
            if d.value in ids
        )
        checks = tuple(
            Check(self.text(g.left), "==", self.text(g.right), g.message, g.assumed)
            for g in p.guards
        )
        plan = Plan(
            tuple(buffers),
            tuple(steps),
            tuple(ids[v] for v in p.inputs),
            outputs,
            dims,
            checks,
            p.faults,
        )
        sources = [c.source for c in self.scheduled if isinstance(c, ScheduledCall)]
        distinct = list(self.plans.values())
        return Generated(plan, sources, constants, self.packings, self.scheduled, distinct)


def plan_text(e: Expr) -> str:
    """An int64 expression over dims in the plan's language: + - * // % min max."""
    if isinstance(e, Const):
        return str(e.value)
    if isinstance(e, Dim):
        return e.name
    if isinstance(e, Poly):
        parts = []
        for atoms, c in e.terms:
            factors = [plan_text(a) for a in atoms]
            if c != 1 or not factors:
                factors.append(str(c) if c >= 0 else f"({c})")
            parts.append("*".join(factors))
        return "(" + " + ".join(parts) + ")"
    if isinstance(e, Apply) and e.dtype == "int64":
        args = [plan_text(a) for a in e.args]
        if e.fn in ("floordiv", "mod"):
            return f"({args[0]} {'//' if e.fn == 'floordiv' else '%'} {args[1]})"
        if e.fn in ("min", "max"):
            return f"{e.fn}({', '.join(args)})"
    raise ModelError(f"a size that this version cannot compute at run time: {e}")


__all__ = ["Generated", "ScheduledCall", "generate"]
