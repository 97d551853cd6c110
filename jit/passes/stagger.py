"""Rows of products that would share cache sets get a gap between them.

Rows a multiple of 4 KB apart fall into the same few sets of L1, and a register tile that reads a
dozen of them at a time evicts what it is about to read: a 14x32 tile runs at 0.75 of its speed, at
16 KB at 0.45. A value that a product reads so, and that kernels of the program make, is stored with
a cache line's gap after each row. What others lay out (inputs, outputs, values of the host) is
copied by the schedule instead.
"""

from __future__ import annotations

from onnxjit.codegen.expr import ZERO, as_int
from onnxjit.codegen.kernel import TensorType, product
from onnxjit.codegen.layout import Layout, Strided, strides
from onnxjit.codegen.schedule.axes import typical
from onnxjit.codegen.schedule.contraction_operands import CONFLICT
from onnxjit.codegen.schedule.recognised import Recogniser
from onnxjit.codegen.target import Target
from onnxjit.program import Call, HostCall, JoinCall, KernelCall, Place, Program

GAP = 16
"""Elements of a gap: a cache line of float32."""

ROWS = 9
"""Fewest rows at a time that do not fit in the eight ways of a set."""


def stagger_rows(p: Program, target: Target) -> Program:
    """The program with gaps in the values of which rows would conflict."""
    if target.kind != "cpu":
        return p
    seen = {*p.inputs, *p.outputs, *p.constants, *p.places}
    seen |= {place.base for place in p.places.values()}
    for c in p.calls:
        if isinstance(c, HostCall):
            seen |= {*c.inputs, *c.outputs}
    recogniser = Recogniser(target, frozenset(p.constants))
    read: dict[str, None] = {}
    for call in p.kernels():
        found = recogniser.operands(call.kernel, p.layouts)
        if found is not None and found.x not in seen:
            read[found.x] = None
    types, layouts, places = dict(p.types), dict(p.layouts), dict(p.places)
    fresh = p.fresh()
    bases: dict[str, str] = {}
    for v in read:
        layout = layouts.get(v)
        if v not in types or isinstance(layout, Strided):
            continue
        wider = with_gap(types[v], layout)
        if wider is None:
            continue
        base = bases[v] = next(fresh)
        types[base] = wider
        if layout is not None:
            layouts[base] = layout
        layouts[v], places[v] = Strided(strides(wider, layout)), Place(base, ZERO)
    if not bases:
        return p
    calls: list[Call] = []
    for c in p.calls:
        calls.append(c)
        if isinstance(c, KernelCall):
            calls += [JoinCall((v,), bases[v], ()) for v in c.outputs if v in bases]
    return p.replace(calls=tuple(calls), types=types, layouts=layouts, places=places)


def with_gap(t: TensorType, layout: Layout | None) -> TensorType | None:
    """The type with a gap after each row; None where rows do not conflict."""
    assert not isinstance(layout, Strided)
    order = layout or tuple(range(t.rank))
    if t.dtype != "float32" or t.rank < 2:
        return None
    inner = order[-1]
    size = as_int(t.shape[inner])
    rows = typical(product(d for q, d in enumerate(t.shape) if q != inner))
    if size is None or size % CONFLICT or size == 0 or rows < ROWS:
        return None
    return TensorType(t.dtype, tuple(d + GAP if q == inner else d for q, d in enumerate(t.shape)))


__all__ = ["stagger_rows"]
