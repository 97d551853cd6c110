"""Recognises recurrences: steps of products with a state, and of elementwise stages after them.

A step falls into *phases*: within one, an element of what it stores depends on products over all of
a state, and on elements of the same place. Where a product reads what the same step has stored, a
new phase begins. All stages are named by the same axes: direction, batch row and unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxjit.codegen.expr import (
    Apply,
    Axis,
    Expr,
    Load,
    Reduce,
    Var,
    as_int,
    axes_of,
    index,
    loads,
    substitute,
)
from onnxjit.codegen.kernel import Stage, parts_in_time, rename_axes
from onnxjit.codegen.schedule.request import Declined, Request

STEP = Var("step")
"""The clock of a recurrence in the expressions of its stages."""


MOST_SLOTS = 2
"""Copies of a state that take turns."""


@dataclass(frozen=True, slots=True)
class Product:
    """`buffer[direction, row, group, unit]` = sum over k of x · y; a group is a gate's columns."""

    buffer: str
    group: Axis
    groups: int
    k: Axis
    x: Load
    y: Load


@dataclass(frozen=True, slots=True)
class Phase:
    """Products, and then stages over [direction, row, unit] in their order."""

    products: tuple[Product, ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Every stage stores at `index`, in terms of the axes and of `STEP`."""

    direction: Axis
    row: Axis
    unit: Axis
    count: Expr
    before: tuple[Stage, ...]
    phases: tuple[Phase, ...]
    after: tuple[Stage, ...]


def recognise(r: Request) -> Recurrence:
    """The recurrence that a kernel is, or `Declined`."""
    k = r.kernel
    if k.clock is None:
        raise Declined("there is no clock")
    before, during, after = parts_in_time(k)
    if any(s.reduces for s in (*before, *after)):
        raise Declined("a sum outside of the steps")
    own = next((s.axes for s in (*before, *after) if len(s.axes) == 3), None)
    if own is None:
        raise Declined("no state over directions, rows and units")
    axes = tuple(Axis(f"i{n}", a.extent) for n, a in enumerate(own))
    direction, row, unit = axes
    phases = phases_of(k.clock, during, axes)
    check_places(k.outputs, phases, axes)
    return Recurrence(
        direction, row, unit, k.clock.extent,
        tuple(named(s, None, axes) for s in before), phases,
        tuple(named(s, None, axes) for s in after),
    )  # fmt: skip


def named(s: Stage, clock: Axis | None, axes: Sequence[Axis]) -> Stage:
    """A stage in terms of the common axes."""
    own = [a for a in s.axes if a is not clock]
    if [a.extent for a in own] != [a.extent for a in axes]:
        raise Declined(f"a stage is not over {len(axes)} axes of the same extents")
    table: dict[Expr, Expr] = dict(zip(own, axes, strict=True))
    if clock is not None:
        table[clock] = STEP
    where = tuple(rename_axes(i, table) for i in s.store)
    return Stage(s.buffer, tuple(axes), rename_axes(s.value, table), where)


def phases_of(clock: Axis, stages: Sequence[Stage], axes: tuple[Axis, ...]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    products: list[Product] = []
    maps: list[Stage] = []
    for s in stages:
        if not s.reduces:
            maps.append(named(s, clock, axes))
            continue
        made = product_of(s, clock, axes)
        if any(may_meet(made.x, x) for x in maps):
            phases.append(Phase(tuple(products), tuple(maps)))
            products, maps = [], []
        products.append(made)
    phases.append(Phase(tuple(products), tuple(maps)))
    if any(may_meet(q.x, s) for p in phases for q in p.products for s in p.stages):
        raise Declined("a state is stored while others still read it")
    return tuple(phases)


def may_meet(x: Load, s: Stage) -> bool:
    """Whether a product reads the copy of a state that a stage of the same step stores."""
    if x.buffer != s.buffer:
        return False
    apart = [x.index[p] - i for p, i in enumerate(s.store) if not axes_of(x.index[p])]
    steps: list[dict[Expr, Expr]] = [{STEP: index(n)} for n in range(MOST_SLOTS)]
    return not all(any(as_int(substitute(e, at)) for e in apart) for at in steps)


def product_of(s: Stage, clock: Axis, axes: tuple[Axis, ...]) -> Product:
    """A stage that is nothing but a sum of products over [direction, row, group, unit]."""
    direction, row, unit = axes
    groups = as_int(s.axes[3].extent) if len(s.axes) == 5 else None
    if not groups:
        raise Declined("a product is not over directions, rows, groups and units")
    group = Axis("group", groups)
    s = named(s, clock, (direction, row, group, unit))
    red = s.value
    if not (isinstance(red, Reduce) and red.fn == "sum" and len(red.axes) == 1):
        raise Declined("a sum has something around it")
    if s.store != (direction, row, group, unit):
        raise Declined("a product is stored elsewhere")
    k = Axis("k", red.axes[0].extent)
    body = rename_axes(red.body, {red.axes[0]: k})
    if not (isinstance(body, Apply) and body.fn == "mul"):
        raise Declined("a sum is not over products")
    x, y = body.args
    if not (isinstance(x, Load) and isinstance(y, Load)):
        raise Declined("a factor is not a plain read")
    if unit in axes_of_load(x):
        x, y = y, x
    if axes_of_load(x) & {unit, group} or row in axes_of_load(y):
        raise Declined("a sum is no product of rows and columns")
    return Product(s.buffer, group, groups, k, x, y)


def check_places(outputs: Sequence[str], phases: Sequence[Phase], axes: tuple[Axis, ...]) -> None:
    """Elementwise stages read nothing of another place that the same step may store."""
    stored = {s.buffer for p in phases for s in p.stages} | {
        q.buffer for p in phases for q in p.products
    }
    for p in phases:
        own = {q.buffer for q in p.products} | {s.buffer for s in p.stages}
        for s in p.stages:
            if s.reduces:
                raise Declined("a sum inside of a stage")
            local = s.buffer not in outputs
            if local and s.store != axes:
                raise Declined("a value of one phase is stored elsewhere")
            if not local and not same_place(s.store, axes):
                raise Declined("a stage stores elsewhere")
            for x in loads(s.value):
                if x.buffer not in stored:
                    continue
                if not same_place(x.index, axes):
                    raise Declined("a stage reads another place")
                if x.buffer not in outputs and x.buffer not in own:
                    raise Declined("a phase reads what only the one before has")


def same_place(index: Sequence[Expr], axes: Sequence[Axis]) -> bool:
    """Whether an index is at a place of its own for every direction, row and unit."""
    return all(a in index or as_int(a.extent) == 1 for a in axes)


def axes_of_load(x: Load) -> set[Axis]:
    return {a for i in x.index for a in axes_of(i)}


__all__ = ["STEP", "Phase", "Product", "Recurrence", "recognise"]
