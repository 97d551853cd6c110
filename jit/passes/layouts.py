"""Layout assignment: which physical axis order each intermediate value has.

A convolution writes its column axis (output channels) innermost, so that register tiles store
whole vectors and the next convolution reads channels contiguously. Pooling, elementwise and
concatenation kernels keep the order of what they read. Model inputs and outputs are row-major;
conversion happens inside the kernels at the border of a region, through their index maps.
"""

from __future__ import annotations

from onnxjit.codegen.expr import ONE, Axis, Expr, Load, as_int, axes_of, loads
from onnxjit.codegen.kernel import Kernel, Stage
from onnxjit.codegen.schedule.axes import coefficient, flat_offset, magnitude, typical
from onnxjit.codegen.schedule.recognised import Recogniser
from onnxjit.codegen.target import Target
from onnxjit.program import HostCall, Program

Layout = tuple[int, ...]


def assign_layouts(p: Program, target: Target) -> Program:
    """The program with `layouts` filled in."""
    fixed = {*p.inputs, *p.outputs, *p.constants}
    for c in p.calls:
        if isinstance(c, HostCall):
            fixed |= {*c.inputs, *c.outputs}
    layouts: dict[str, Layout] = {}
    constants = frozenset(p.constants)
    recogniser = Recogniser(target, constants)
    for call in p.kernels():
        if call.kernel.clock is not None:
            continue  # a step reads its state as rows
        out = call.outputs[0]
        rank = p.types[out].rank
        if rank < 3:
            continue
        order = column_last(call.kernel, layouts, recogniser, constants)
        if order is None:
            order = inherited(call.kernel, layouts)
        if order is None or order == tuple(range(rank)):
            continue
        for v in call.outputs:
            if v not in fixed and p.types[v].rank == rank:
                layouts[v] = order
    return p.replace(layouts={**layouts, **constant_layouts(p, layouts, recogniser)})


def constant_layouts(
    p: Program, layouts: dict[str, Layout], recogniser: Recogniser
) -> dict[str, Layout]:
    """Orders for constants that a kernel reads side by side along its innermost output axis.

    Depthwise filters [C, 1, kh, kw] become [1, kh, kw, C]. The operands of contractions are packed
    and keep their order.
    """
    out: dict[str, Layout] = {}
    constants = frozenset(p.constants)
    frozen = {v for c in p.calls if isinstance(c, HostCall) for v in c.inputs} | set(p.outputs)
    for call in p.kernels():
        k = call.kernel
        if k.clock is not None or recogniser.operands(k, layouts) is not None:
            frozen |= {b for b in k.inputs if b in constants}
            continue
        for s in k.stages:
            t = k.types[s.buffer]
            if t.rank == 0:
                continue
            if s.index:
                side = summed_side_by_side(s, k, layouts)
                if side is None:
                    continue
                lane = side
            else:
                lane = s.axes[layouts.get(s.buffer, tuple(range(t.rank)))[-1]]
            for x in loads(s.value):
                if x.buffer not in constants or x.buffer in frozen:
                    continue
                rank = len(x.index)
                where = [q for q, i in enumerate(x.index) if lane in axes_of(i)]
                wide = [q for q in range(rank) if k.types[x.buffer].shape[q] is not ONE]
                if len(where) == 1 and wide and where[0] != wide[-1]:
                    (q,) = where
                    out[x.buffer] = (*(i for i in range(rank) if i != q), q)
                frozen.add(x.buffer)
    return out


def summed_side_by_side(s: Stage, k: Kernel, layouts: dict[str, Layout]) -> Axis | None:
    """The reduced axis along which a value that is no constant of rank 1 is read contiguously."""
    for red in s.reduces:
        for x in loads(red.body):
            t = k.types[x.buffer]
            if t.rank < 2:
                continue
            offset = flat_offset(x.index, t, layouts.get(x.buffer))
            for a in red.axes:
                if coefficient(offset, a) is ONE:
                    return a
    return None


def column_last(
    k: Kernel, layouts: dict[str, Layout], recogniser: Recogniser, constants: frozenset[str]
) -> Layout | None:
    """The order that puts a contraction's column axis last; None for other kernels."""
    c = recogniser.operands(k, layouts)
    if c is None:
        return None
    final = k.stages[-1]
    # The column axis in the logical output: the axis that occurs in y's index but not in x's.
    reads = {x.buffer: x for x in loads(final.value)}
    y = reads[c.y]
    in_y = {a for i in y.index for a in axes_of(i)}
    x = reads.get(c.x)
    in_x = {a for i in x.index for a in axes_of(i)} if x is not None else set()
    # Output dims that only select a filter (channels and their groups) go last, filters innermost;
    # what selects a batch of a run-time operand is no filter.
    only = in_y if c.y in constants else in_y - in_x
    rows: list[int] = []
    channels: list[int] = []
    for p, e in enumerate(final.store):
        axes = {a for a in axes_of(e) if a.extent is not ONE}
        (channels if axes and axes <= only else rows).append(p)
    channels.sort(key=lambda p: bool(axes_of(final.store[p]) - in_x))
    return (*rows, *channels) if channels else None


def inherited(k: Kernel, layouts: dict[str, Layout]) -> Layout | None:
    """The order in which the largest input is walked: output axes by their stride in its storage.

    A transposition of a channels-last value therefore stays where its elements are. Where no input
    says it, the stage before the last one does: the transposed rows of a normalisation are written
    as they are made.
    """
    final = k.stages[-1]
    best: tuple[int, Layout] | None = None
    made = set(k.temporaries)
    for s in k.stages:
        if len(s.axes) != len(final.axes):
            continue
        for x in loads(s.value):
            t = k.types.get(x.buffer)
            if t is None or x.buffer not in k.inputs or t.rank < 2:
                continue
            order = walked(x, s.axes, flat_offset(x.index, t, layouts.get(x.buffer)))
            size = typical(t.elements)
            if order is None and t.rank == len(final.axes):
                pairs = zip(x.index, s.axes, strict=True)
                if all(a in axes_of(i) or a.extent is ONE for i, a in pairs):
                    order = layouts.get(x.buffer)
            if order is not None and (best is None or size > best[0]):
                best = (size, order)
    if best is not None:
        return best[1]
    for x in loads(final.value):
        if x.buffer in made and k.types[x.buffer].rank > 1:
            return walked(x, final.axes, flat_offset(x.index, k.types[x.buffer]))
    return None


def walked(x: Load, axes: tuple[Axis, ...], offset: Expr) -> Layout | None:
    """Axis positions from the largest stride to the smallest; None unless all of them vary."""
    steps: dict[int, float] = {}
    for p, a in enumerate(axes):
        if a.extent is ONE:
            continue
        c = coefficient(offset, a)
        if c is None or as_int(c) == 0:
            return None
        steps[p] = magnitude(c)
    unit = [p for p in range(len(axes)) if p not in steps]
    return (*unit, *sorted(steps, key=lambda p: -steps[p]))
