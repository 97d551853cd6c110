"""Schedule for kernels of several stages that share rows: softmax, layer norm and their like.

All stages agree on some leading *row* axes; reductions run inside a row only. One tile computes
whole rows, so a row is read from memory once and its temporaries stay in L1.

A stage is done for a *group* of rows before the next one begins: the sum of a row ends in a chain
of dependent operations for which the next stage of this row has to wait, but that of no other row.
Where rows are not contiguous and those of a group are neighbours, the group is the innermost loop,
and the rows are the *lanes* of vectors.
"""

from __future__ import annotations

from collections.abc import Collection

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    as_int,
    index,
    leaves,
    loads,
    map_loads,
    poly_mul,
    substitute,
    walk,
)
from onnxjit.codegen.instruction_sets import isa_of
from onnxjit.codegen.kernel import product
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Local, LoopNest, Stmt, Store
from onnxjit.codegen.schedule.axes import ceil_div, coefficient, join_loops, typical
from onnxjit.codegen.schedule.pointwise import finish_nest, inner_loops, tile_axes, with_tiles
from onnxjit.codegen.schedule.reduction import (
    accumulate,
    combine,
    guarded,
    identity,
    replace_node,
)
from onnxjit.codegen.schedule.request import Request
from onnxjit.codegen.schedule.row_stages import (
    Exponentials,
    RowStage,
    exponentials,
    hoisted,
    only_shares,
    row_stages,
    with_reciprocal,
)

STACK_BYTES = 16384
"""Largest temporary on the stack; longer or symbolic ones use the thread's scratch memory."""

ELEMENTS = 4096
"""Elements of a group of rows: 16 KB of float32, half of L1."""

FEW = 16
"""Elements of all rows together which are not worth a group: its temporaries would be memory."""

ROWS = 16
"""Most rows of a group; with run-time lengths a quarter of that."""

LANES = 256
"""Most rows side by side."""

SHORTEST = 9
"""Elements of a row from which the micro-kernel computes its exponentials."""

FLOAT = "float32"

Body = tuple[Stmt, ...]


def rows(r: Request) -> LoopNest:
    """Any number of stages whose temporaries are all local to a row."""
    axes, stages = row_stages(r)
    found = exponentials(stages)
    if found is not None:
        stages = with_reciprocal(stages, found)
        if not only_shares(stages, found):
            found = None
    return _Nest(r, axes, hoisted(stages), found).nest()


class _Nest:
    """Writes the statements of the nest."""

    def __init__(
        self, r: Request, axes: list[Axis], stages: list[RowStage], found: Exponentials | None
    ) -> None:
        self.r, self.stages, self.outer = r, stages, axes
        self.scalars = {s.scalar for s in stages if s.scalar is not None}
        self.locals: list[Local] = []
        self.lanes = bool(axes) and self.side_by_side(axes[-1])
        self.setup: Body = ()
        self.q: Expr = Var("q")
        self.size = self.group_size(axes[-1]) if axes else 1
        self.count: Expr = index(self.size)
        self.place: dict[Expr, Expr] = {}
        if self.size == 1:
            self.q = ZERO
        else:
            self.cut(axes[-1])
        self.symbols: tuple[str, ...] = ()
        self.found = found if found is not None and self.callable(found) else None
        # Offset of an element of a temporary's row: its number times a step, plus that of the row.
        self.lines: dict[str, Expr] = {}
        for s in stages:
            if s.scalar is not None:
                self.local(s.scalar.name, s.scalar.dtype, index(self.size))
            elif s.offset is None:
                self.temporary(s)

    # --- groups -------------------------------------------------------------------------------

    def side_by_side(self, lane: Axis) -> bool:
        """Whether rows are neighbours in memory where their own elements are not."""
        found = False
        for s in self.stages:
            inner = [*s.inner, *(a for x in s.reduces for a in x.axes)]
            at = [x.index[0] for x in loads(s.value) if x.buffer not in self.temporaries()]
            for o in [*at, *([s.offset] if s.offset is not None else [])]:
                if any(coefficient(o, a) is ONE for a in inner):
                    return False
                found = found or (bool(inner) and coefficient(o, lane) is ONE)
        return found

    def temporaries(self) -> set[str]:
        return {s.buffer for s in self.stages if s.offset is None}

    def work(self, s: RowStage) -> Expr:
        return product(a.extent for a in [*s.inner, *(a for x in s.reduces for a in x.axes)])

    def group_size(self, axis: Axis) -> int:
        """The number of rows that go through a stage together."""
        lengths = [as_int(self.work(s)) for s in self.stages]
        extent = as_int(axis.extent)
        if None in lengths:
            size = LANES // 4 if self.lanes else ROWS // 4
        else:
            longest = max(1, *(n or 0 for n in lengths))
            if extent is not None and extent * longest <= FEW:
                return 1
            fit = ELEMENTS // longest
            size = max(16, min(LANES, fit)) if self.lanes else max(1, min(ROWS, fit))
        if extent:
            size = -(-extent // -(-extent // size))
        return min(extent, -(-size // 16) * 16) if self.lanes and extent else size

    def cut(self, axis: Axis) -> None:
        """Replaces the last row axis by blocks of it and the place in a block."""
        extent = as_int(axis.extent)
        self.outer = self.outer[:-1]
        start: Expr = ZERO
        if extent != self.size:
            block = Axis(axis.name, ceil_div(axis.extent, self.size))
            self.outer.append(block)
            start = poly_mul(block, index(self.size))
            if extent is None or extent % self.size:
                self.count = Var("rows")
                rest = apply("min", index(self.size), axis.extent - start)
                self.setup = (Assign(Var("rows"), rest),)
        self.place = {axis: start + self.q}

    def each(self, *body: Stmt) -> Body:
        """For each row of the group."""
        if self.q is ZERO:
            return body
        return (For(Var("q"), ZERO, self.count, body),)

    # --- memory -------------------------------------------------------------------------------

    def local(self, name: str, dtype: str, count: Expr) -> None:
        size = as_int(count)
        stack = size is not None and size * 8 <= STACK_BYTES
        self.locals.append(Local(name, dtype, count, stack))

    def temporary(self, s: RowStage) -> None:
        if self.found is not None and s.buffer in self.found.buffers:
            return
        count = product(a.extent for a in s.inner)
        self.lines[s.buffer] = count
        dtype = self.r.kernel.types[s.buffer].dtype
        self.local(s.buffer, dtype, poly_mul(count, index(self.size)))

    def element(self, buffer: str, at: Expr) -> Expr:
        """Where element `at` of the row lies in a temporary."""
        if self.lanes:
            return poly_mul(at, index(self.size)) + self.q
        return at + poly_mul(self.lines[buffer], self.q)

    def resolved(self, e: Expr) -> Expr:
        """An expression in terms of the group."""
        temps = self.temporaries()

        def put(x: Load) -> Expr | None:
            if x.buffer not in temps:
                return None
            if self.found is not None and self.found.each is not None:
                if x.buffer == self.found.each.buffer:
                    return self.strip(x.index[0])
            return Load(x.buffer, (self.element(x.buffer, x.index[0]),), x.dtype)

        return substitute(map_loads(e, put), self.place)

    # --- stages -------------------------------------------------------------------------------

    def nest(self) -> LoopNest:
        body: list[Stmt] = list(self.setup)
        work: Expr = ONE
        for n, s in enumerate(self.stages):
            work = work + self.work(s)
            if self.found is not None and s.buffer in self.found.buffers:
                if s.scalar is self.found.total.scalar:
                    body += self.call(self.found)
            elif self.lanes:
                body += self.in_lanes(n, s)
            else:
                body += self.in_rows(n, s)
        split = tile_axes(self.outer, typical(work * self.size))
        nest, tiles = with_tiles(self.outer[:split], inner_loops(self.outer[split:], *body))
        return finish_nest(
            self.r, nest, tiles, "rows", locals=tuple(self.locals), symbols=self.symbols
        )

    def in_rows(self, n: int, s: RowStage) -> Body:
        """One row after the other, each with accumulators of its own."""
        value = self.resolved(s.value)
        body: list[Stmt] = [
            Assign(v, Load(v.name, (self.q,), v.dtype)) for v in used(value, self.scalars)
        ]
        for m, red in enumerate([x for x in walk(value) if isinstance(x, Reduce)]):
            live = [a for a in red.axes if a.extent is not ONE]
            code, acc = accumulate(red, live, f"acc{n}_{m}")
            body += code
            value = replace_node(value, red, acc)
        if s.scalar is not None:
            return self.each(*body, Store(s.scalar.name, self.q, value))
        loops, at, value = join_loops(list(s.inner), self.target(s), value)
        return self.each(*body, *inner_loops(loops, Store(s.buffer, at, value)))

    def in_lanes(self, n: int, s: RowStage) -> Body:
        """All rows of the group side by side, accumulators too."""
        value = self.resolved(s.value)
        value = substitute(value, {v: Load(v.name, (self.q,), v.dtype) for v in self.scalars})
        body: list[Stmt] = []
        for m, red in enumerate([x for x in walk(value) if isinstance(x, Reduce)]):
            name = f"acc{n}_{m}"
            self.local(name, red.dtype, index(self.size))
            acc = Load(name, (self.q,), red.dtype)
            guard, inside = guarded(red)
            step: Body = (Store(name, self.q, combine(red.fn, acc, inside)),)
            if guard is not None and self.q not in leaves(guard):
                step = (If(guard, self.each(*step)),)
            else:
                step = self.each(*(step if guard is None else (If(guard, step),)))
            body += self.each(Store(name, self.q, identity(red.fn, red.dtype)))
            body += inner_loops([a for a in red.axes if a.extent is not ONE], *step)
            value = replace_node(value, red, acc)
        if s.scalar is not None:
            return (*body, *self.each(Store(s.scalar.name, self.q, value)))
        store = Store(s.buffer, self.target(s), value)
        return (*body, *inner_loops(s.inner, *self.each(store)))

    def target(self, s: RowStage) -> Expr:
        if s.offset is not None:
            return substitute(s.offset, self.place)
        at: Expr = index(0)
        for a in s.inner:
            at = at * a.extent + a
        return self.element(s.buffer, at)

    # --- exponentials -------------------------------------------------------------------------

    def callable(self, found: Exponentials) -> bool:
        """Whether the micro-kernel computes the exponentials."""
        stages = [s.value.dtype for s in (found.highest, found.total)]
        length = as_int(found.axis.extent)
        short = length is not None and length < SHORTEST
        return not self.lanes and not short and set(stages) == {FLOAT}

    def strip(self, at: Expr) -> Load:
        """The exponential of element `at` of the row."""
        return Load("strip", (at + poly_mul(self.line(), self.q),), FLOAT)

    def line(self) -> Expr:
        """The distance of rows of exponentials, whole vectors."""
        assert self.found is not None
        return poly_mul(ceil_div(self.found.axis.extent, 16), index(16))

    def call(self, found: Exponentials) -> Body:
        highest, total = found.highest.scalar, found.total.scalar
        assert highest is not None and total is not None
        self.local("strip", FLOAT, poly_mul(self.line(), index(self.size)))
        value = self.resolved(found.value)
        arguments: tuple[Expr | Address, ...] = (Address("strip", ZERO), self.line())
        body: list[Stmt] = []
        if self.contiguous(found, value):
            assert isinstance(value, Load)
            start = substitute(value.index[0], {found.axis: ZERO, Var("q"): ZERO})
            distance = coefficient(value.index[0], Var("q")) or ZERO
            arguments = (Address(value.buffer, start), distance, *arguments)
        else:
            known = [Assign(v, Load(v.name, (self.q,), v.dtype)) for v in used(value, self.scalars)]
            copy = Store("strip", self.strip(found.axis).index[0], value)
            body += self.each(*known, *inner_loops([found.axis], copy))
            arguments = (*arguments, *arguments)
        symbol = microkernels.softmax(isa_of(self.r.target))
        self.symbols = (symbol,)
        arguments = (
            *arguments, self.count, found.axis.extent,
            Address(highest.name, ZERO), Address(total.name, ZERO),
        )  # fmt: skip
        sum_ = Load(total.name, (self.q,), FLOAT)
        nothing = apply("eq", sum_, Const(0.0, FLOAT))
        undefined = apply("select", nothing, Const(float("nan"), FLOAT), sum_)
        return (
            *body,
            *self.each(Store(highest.name, self.q, Const(float("-inf"), FLOAT))),
            Call(symbol, arguments),
            *self.each(Store(total.name, self.q, undefined)),
        )

    def contiguous(self, found: Exponentials, value: Expr) -> bool:
        """Whether rows can be read where they are."""
        if (
            not isinstance(value, Load)
            or value.buffer in self.temporaries()
            or value.dtype != FLOAT
        ):
            return False
        at = value.index[0]
        if coefficient(at, found.axis) is not ONE or loads(at):
            return False
        return self.q is ZERO or coefficient(at, Var("q")) is not None


def used(e: Expr, scalars: Collection[Var]) -> list[Var]:
    """The scalars of an expression, in the order of their names."""
    found = [v for v in leaves(e) if isinstance(v, Var) and v in scalars]
    return sorted(found, key=lambda v: v.name)


__all__ = ["rows"]
