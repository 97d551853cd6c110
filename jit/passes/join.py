"""Concatenations without a copy: whoever makes a part stores it where the joined value has it.

The joined value owns the memory; a part gets a `Place` in it and strides with gaps, and everything
that reads or writes the part does so through these. What cannot be placed (an input, a constant, an
output of the model, a part whose elements lie in another order, one that already has a place
elsewhere) is still copied, by a kernel that makes that part alone.

Concatenations are visited from the last to the first, so that one whose result is a part of a later
one already knows where it lies. One whose parts all have their places side by side in a later one,
as in a dense block, is nothing but a view of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen.expr import ONE, ZERO, Axis, Dim, Expr, Load, leaves, poly_mul
from onnxjit.codegen.kernel import Kernel, Stage, TensorType, split_reader, used_inputs
from onnxjit.codegen.layout import Layout, Strided, strides
from onnxjit.codegen.schedule.axes import coefficient, flat_offset, magnitude, typical, without
from onnxjit.codegen.target import Target
from onnxjit.passes.stagger import with_gap
from onnxjit.program import Call, HostCall, JoinCall, KernelCall, Place, Program

RUN = 16
"""Fewest elements side by side, a cache line of float32: else a dense value and a copy are better
than loads and stores of a few elements each."""


def join_in_place(p: Program, target: Target) -> Program:
    """The program with `places` filled in and concatenations replaced by `JoinCall`s."""
    return _Joins(p, target).program()


@dataclass(frozen=True, slots=True)
class Part:
    """The memory of one part of a joined value: strides by its stage's axes, and its start."""

    stage: Stage
    steps: tuple[Expr, ...]
    offset: Expr


class _Joins:
    def __init__(self, p: Program, target: Target) -> None:
        self.p, self.target = p, target
        self.types = dict(p.types)
        self.layouts: dict[str, Layout] = dict(p.layouts)
        self.places: dict[str, Place] = {}
        self.calls: list[Call | None] = list(p.calls)
        self.maker: dict[str, int] = {}
        # What others see as it lies in memory.
        self.seen = {*p.outputs}
        for k, c in enumerate(p.calls):
            if isinstance(c, KernelCall):
                self.maker.update(dict.fromkeys(c.outputs, k))
            elif isinstance(c, HostCall):
                self.seen |= {*c.inputs, *c.outputs}
        self.sizes: set[Expr] = {Dim(d.name) for d in p.dims if d.value in p.inputs}
        self.fresh = p.fresh()
        self.added: dict[int, list[Call]] = {}

    def program(self) -> Program:
        for k in range(len(self.calls) - 1, -1, -1):
            c = self.calls[k]
            if isinstance(c, KernelCall) and is_concatenation(c.kernel):
                self.join(k, c)
        calls: list[Call] = []
        for k, c in enumerate(self.calls):
            if c is not None:
                calls.append(c)
            calls += self.added.get(k, ())
        return self.p.replace(
            calls=tuple(self.named(calls)),
            types=self.types,
            layouts=self.layouts,
            places=self.places,
        )

    def named(self, calls: Sequence[Call]) -> list[Call]:
        """Concatenations without a kernel count as work of the one that makes the last part."""
        out = list(calls)
        maker = {v: k for k, c in enumerate(out) for v in c.outputs}
        for c in calls:
            if isinstance(c, JoinCall):
                last = maker[c.output] = max(maker[v] for v in c.inputs)
                made = out[last]
                if isinstance(made, KernelCall):
                    out[last] = replace(made, origin=(*made.origin, *c.origin))
        return out

    def join(self, k: int, c: KernelCall) -> None:
        (joined,) = c.outputs
        t = self.types[joined]
        if any(isinstance(x, Dim) and x not in self.sizes for d in t.shape for x in leaves(d)):
            return  # memory is laid out before the size of the last part is known
        if self.view(k, c):
            return
        self.stagger(k, joined)
        parts = [self.part(s, joined) for s in c.kernel.stages]
        if any(q is None for q in parts):
            return
        inputs: list[str] = []
        left: list[Part] = []
        for q in parts:
            assert q is not None
            v = self.placed(q, joined)
            if v is None:
                left.append(q)
            inputs.append(v or "")
        if len(left) == len(parts):
            return
        names = [self.value(q, joined) for q in left]
        self.calls[k] = None
        if left:
            stages = tuple(
                Stage(v, q.stage.axes, q.stage.value) for v, q in zip(names, left, strict=True)
            )
            kernel = Kernel(
                c.kernel.name,
                used_inputs(stages, c.kernel.inputs),
                tuple(names),
                stages,
                {**c.kernel.types, **{v: self.types[v] for v in names}},
            )
            self.calls[k] = KernelCall(kernel, c.origin)
        rest = iter(names)
        origin = () if left else c.origin
        join = JoinCall(tuple(v or next(rest) for v in inputs), joined, origin)
        self.added[k] = [join, *self.added.get(k, ())]

    def stagger(self, k: int, joined: str) -> None:
        """Gives a joined value a gap after each row where rows would share cache sets; parts are
        placed once, so that nothing can do it later."""
        layout = self.layouts.get(joined)
        if self.target.kind != "cpu" or joined in self.places or joined in self.seen:
            return
        wider = with_gap(self.types[joined], layout)
        if wider is None:
            return
        base = next(self.fresh)
        self.types[base] = wider
        if layout is not None:
            self.layouts[base] = layout
        self.layouts[joined] = Strided(strides(wider, layout))
        self.places[joined] = Place(base, ZERO)
        self.added[k] = [JoinCall((joined,), base)]

    def part(self, s: Stage, joined: str) -> Part | None:
        """Where a stage stores, when that is affine in its axes."""
        where = flat_offset(s.store, self.types[joined], self.layouts.get(joined), clamp=False)
        steps = tuple(coefficient(where, a) for a in s.axes)
        if any(c is None for c in steps):
            return None
        return Part(s, steps, without(where, s.axes))  # type: ignore[arg-type]

    def place(self, q: Part, joined: str) -> Place:
        own = self.places.get(joined)
        return Place(joined, q.offset) if own is None else Place(own.base, own.offset + q.offset)

    def value(self, q: Part, joined: str) -> str:
        """A new value that is this part."""
        v = next(self.fresh)
        self.types[v] = TensorType(self.types[joined].dtype, tuple(a.extent for a in q.stage.axes))
        self.layouts[v] = Strided(q.steps)
        self.places[v] = self.place(q, joined)
        return v

    def placed(self, q: Part, joined: str) -> str | None:
        """The value that this part is a copy of, when that can be stored (or already is) here."""
        copied = whole_value(q.stage, self.types)
        if copied is None:
            return None
        v, stage, axes = copied
        again = self.part(stage, joined)
        if again is None or v not in self.maker or v in self.seen:
            return None
        steps = dict(zip(again.stage.axes, again.steps, strict=True))
        layout = Strided(tuple(ONE if a is None else steps[a] for a in axes))
        place = self.place(again, joined)
        if v in self.places:
            return v if self.places[v] == place and self.layouts[v] == layout else None
        if not self.fits(v, layout):
            return None
        self.places[v], self.layouts[v] = place, layout
        return v

    def fits(self, v: str, layout: Strided) -> bool:
        """Whether its elements lie in the order that the value has, and enough side by side."""
        t = self.types[v]
        varying = [d for d in range(t.rank) if t.shape[d] is not ONE]

        def order(steps: Sequence[Expr]) -> list[int]:
            return sorted(varying, key=lambda d: -magnitude(steps[d]))

        now = order(strides(t, self.layouts.get(v)))
        if order(layout.steps) != now:
            return False
        run: Expr = ONE
        for d in reversed(now):
            if layout.steps[d] is not run:
                break
            run = poly_mul(run, t.shape[d])
        return typical(run) >= RUN

    # --- views --------------------------------------------------------------------------------

    def view(self, k: int, c: KernelCall) -> bool:
        """Whether the parts already lie side by side, so that the joined value is there too."""
        (joined,) = c.outputs
        if joined in self.seen or joined in self.places:
            return False
        rank = self.types[joined].rank
        steps: list[Expr | None] = [None] * rank
        inputs: list[str] = []
        found_at: list[tuple[Place, list[Expr]]] = []
        for s in c.kernel.stages:
            copied = whole_value(s, self.types)
            if copied is None or copied[0] not in self.places:
                return False
            v, stage, axes = copied
            if stage is not s:
                return False
            own = dict(zip(axes, strides(self.types[v], self.layouts[v]), strict=True))
            origin = []
            for d, i in enumerate(s.store):
                found = [a for a in s.axes if a.extent is not ONE and coefficient(i, a) is ONE]
                if len(found) > 1 or (found and steps[d] not in (None, own[found[0]])):
                    return False
                if found:
                    steps[d] = own[found[0]]
                origin.append(without(i, s.axes))
            inputs.append(v)
            found_at.append((self.places[v], origin))
        shape = self.types[joined].shape
        if any(step is None and d is not ONE for step, d in zip(steps, shape, strict=True)):
            return False
        layout = Strided(tuple(step or ONE for step in steps))
        starts = set()
        for place, begin in found_at:
            start = place.offset
            for i, step in zip(begin, layout.steps, strict=True):
                start = start - poly_mul(i, step)
            starts.add(Place(place.base, start))
        if len(starts) != 1 or not self.fits(joined, layout):
            return False
        self.places[joined], self.layouts[joined] = starts.pop(), layout
        self.calls[k] = None
        self.added[k] = [JoinCall(tuple(inputs), joined, c.origin)]
        return True


def is_concatenation(k: Kernel) -> bool:
    """Several maps that store to parts of one value."""
    return (
        len(k.stages) > 1
        and {s.buffer for s in k.stages} == {*k.outputs}
        and len(k.outputs) == 1
        and not any(s.reduces for s in k.stages)
    )


def whole_value(
    s: Stage, types: Mapping[str, TensorType]
) -> tuple[str, Stage, tuple[Axis | None, ...]] | None:
    """The value that a stage copies as a whole, the stage with its axes split as the value's are,
    and which of them walks each of the value's axes (None where that has one element)."""
    if not isinstance(s.value, Load):
        return None
    stage, read = split_reader(s, s.value)
    axes: list[Axis | None] = []
    for i, d in zip(read.index, types[read.buffer].shape, strict=True):
        if d is ONE:
            axes.append(None)
        elif isinstance(i, Axis) and i.extent is d and i not in axes:
            axes.append(i)
        else:
            return None
    if {a for a in stage.axes if a.extent is not ONE} != {a for a in axes if a is not None}:
        return None
    return read.buffer, stage, tuple(axes)


__all__ = ["join_in_place"]
