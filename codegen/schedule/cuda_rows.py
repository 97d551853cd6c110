"""CUDA schedules in which a block computes a row: softmax, layer norm, long reductions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Axis,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    as_int,
    axes_of,
    index,
    loads,
    map_loads,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Kernel, Stage, product, rename_axes
from onnxjit.codegen.layout import Layout
from onnxjit.codegen.loops import (
    THREAD,
    TILE,
    Assign,
    Barrier,
    For,
    If,
    Local,
    LoopNest,
    Stmt,
    Store,
)
from onnxjit.codegen.schedule.axes import (
    ceil_div,
    coefficient,
    flat_offset,
    typical,
)
from onnxjit.codegen.schedule.cuda_threads import (
    block_threads,
    outermost,
    over_threads,
    positions,
    replaced,
)
from onnxjit.codegen.schedule.pointwise import finish_nest, inner_loops
from onnxjit.codegen.schedule.reduction import (
    combine,
    guarded,
    identity,
    ordered_reduction,
    replace_node,
)
from onnxjit.codegen.schedule.request import Declined, Request, single_stage
from onnxjit.codegen.schedule.row_stages import align_rows

SHORT_ROW = 32
"""Rows with no longer loop than this are computed by one thread each."""

SHARED_BYTES = 16384
"""Largest row temporary in shared memory; a longer one is computed again where it is read."""

SHARED_TOTAL = 40960
"""Static shared memory of all temporaries of a block; every device has 48 KB."""

LONG = 128
"""Shortest reduction that a whole block computes."""

SERIAL = 4096
"""A reduction so long is split over a block even when its elements are not contiguous, if there
are few outputs."""


def reduction(r: Request) -> LoopNest:
    """A single stage whose reductions are long: the block's threads share each reduction."""
    flat = single_stage(r)
    reds = outermost(flat.value)
    if not reds:
        raise Declined("nothing is reduced")
    outputs = typical(product(a.extent for a in flat.axes))
    for red in reds:
        count = typical(product(a.extent for a in red.axes))
        reads = [x.index[0] for x in loads(red.body)]
        contiguous = any(coefficient(o, a) is ONE for o in reads for a in red.axes)
        if count < LONG or not (contiguous or (count >= SERIAL and outputs < 1024)):
            raise Declined("the reduction is short or not contiguous")
        if any(isinstance(x, Reduce) for x in walk(red.body)):
            raise Declined("a reduction inside a reduction")
    row = [a for a in flat.axes if a in axes_of(flat.offset) or a in axes_of(flat.value)]
    row = [*row, *(a for a in flat.axes if a not in row)]
    stage = Stage(flat.buffer, tuple(row), flat.value, (flat.offset,))
    return _Rows(r, row, flat=True).nest([stage], "reduction: one block an output")


def rows(r: Request) -> LoopNest:
    """Any number of stages whose temporaries are all local to a row of the last stage."""
    k = r.kernel
    if len(k.stages) < 2:
        raise Declined("one stage")
    shared, named = align_rows(k.stages, set(k.outputs))
    return _Rows(r, [a for a in shared if a.extent is not ONE]).nest(named, "rows: one block a row")


class _Rows:
    """Builds the body of one row: stages in order, a barrier wherever threads exchange data."""

    def __init__(self, r: Request, row: Sequence[Axis], flat: bool = False) -> None:
        self.r, self.flat = r, flat
        self.k: Kernel = r.kernel
        self.row = list(row)
        self.temps = set(self.k.temporaries)
        self.counter = 0
        self.canonical: dict[Expr, Expr] = {a: self.axis(a.extent) for a in self.row}
        self.locals: list[Local] = []
        self.bytes = 0
        self.scalars: dict[str, Expr] = {}
        self.again: dict[str, tuple[list[int], list[Axis], Expr]] = {}
        self.body: list[Stmt] = []
        self.threads = 0
        self.alone = False

    def axis(self, extent: Expr) -> Axis:
        self.counter += 1
        return Axis(f"i{self.counter - 1}", extent)

    def nest(self, stages: Sequence[Stage], rule: str) -> LoopNest:
        self.threads = self.block_size(stages)
        read = {x.buffer for s in stages for x in loads(s.value)}
        for n, s in enumerate(stages):
            self.stage(n, s, s.buffer in read)
        order = [a for a in self.canonical.values() if isinstance(a, Axis)]
        tiles = product(a.extent for a in order)
        e: Expr = Var("row") if self.alone else TILE
        sets, table = positions(order, e)
        body = [*sets, *(replaced(x, table) for x in self.body)]
        if self.alone:
            assert isinstance(e, Var)
            stop = apply("min", TILE * self.threads + self.threads, tiles)
            start = TILE * self.threads + THREAD
            body = [For(e, start, stop, tuple(body), step=self.threads)]
            tiles, rule = ceil_div(tiles, self.threads), "rows: one thread a row"
        elif self.locals:
            body.append(Barrier())
        return finish_nest(
            self.r, tuple(body), tiles, rule, locals=tuple(self.locals), threads=self.threads
        )

    def block_size(self, stages: Sequence[Stage]) -> int:
        """A power of two near the longest loop of a row; a whole block for short rows together."""
        longest = 1
        for s in stages:
            inner = product(a.extent for a in s.axes if a not in self.row)
            counts = [product(a.extent for a in x.axes) for x in s.reduces]
            longest = max(longest, *(typical(c) for c in (inner, *counts)))
        threads, most = 32, block_threads(self.r)
        if longest < SHORT_ROW:
            self.alone = True
            return most
        while threads < most and threads < longest:
            threads *= 2
        return min(threads, most)

    def stage(self, n: int, s: Stage, exchanged: bool) -> None:
        gone: dict[Expr, Expr] = {a: ZERO for a in s.axes if a.extent is ONE}
        inner = [a for a in s.axes if a not in self.row and a.extent is not ONE]
        table: dict[Expr, Expr] = {**self.canonical, **gone}
        for a in [*inner, *(a for x in s.reduces for a in x.axes)]:
            table[a] = self.axis(a.extent)
        value = self.reads(rename_unit(s.value, table))
        loops = [a for a in (table[b] for b in inner) if isinstance(a, Axis)]
        for m, red in enumerate(outermost(value)):
            if any(isinstance(x, Reduce) for x in walk(red.body)):
                raise Declined("a reduction inside a reduction")
            if any(a in axes_of(red) for a in loops):
                raise Declined("a reduction that varies inside the row")
            value = replace_node(value, red, self.reduce(red, f"{n}_{m}"))
        if s.buffer in self.temps:
            self.temporary(n, s, loops, inner, value, exchanged)
            return
        offset = s.store[0] if self.flat else None
        if offset is None:
            where = [substitute(i, table) for i in s.store]
            offset = flat_offset(where, self.k.types[s.buffer], self.layout(s.buffer), False)
        else:
            offset = substitute(offset, table)
        self.each(n, loops, Store(s.buffer, offset, value))
        if exchanged and not self.alone:
            self.body.append(Barrier())

    def layout(self, buffer: str) -> Layout | None:
        return self.r.layouts.get(buffer)

    def each(self, n: int, loops: list[Axis], store: Store) -> None:
        """The store for every element of the row, shared by the threads."""
        if self.alone:
            self.body += inner_loops(loops, store)
            return
        if not loops:
            self.body.append(If(apply("lt", THREAD, 1), (store,)))
            return
        e = Var(f"e{n}")
        sets, table = positions(loops, e)
        count = product(a.extent for a in loops)
        self.body.append(over_threads(e, count, self.threads, *sets, replaced(store, table)))

    def temporary(
        self,
        n: int,
        s: Stage,
        loops: list[Axis],
        inner: list[Axis],
        value: Expr,
        exchanged: bool,
    ) -> None:
        """A scalar of the row, an array in shared memory, or nothing but a rule to recompute."""
        dtype = self.k.types[s.buffer].dtype
        if not loops:
            v = Var(f"scalar{n}", dtype)
            self.body.append(Assign(v, value))
            self.scalars[s.buffer] = v
            return
        count = as_int(product(a.extent for a in loops))
        fits = count is not None and count * 8 <= min(SHARED_BYTES, SHARED_TOTAL - self.bytes)
        if count is None or not fits or self.alone:
            self.again[s.buffer] = ([s.axes.index(a) for a in inner], loops, value)
            return
        self.bytes += count * 8
        self.locals.append(Local(s.buffer, dtype, index(max(count, 1)), stack=False))
        self.each(n, loops, Store(s.buffer, row_offset(loops), value))
        if exchanged:
            self.body.append(Barrier())

    def reads(self, e: Expr) -> Expr:
        """Loads of parameters at flat offsets, of temporaries where `temporary` put them."""

        def put(x: Load) -> Expr | None:
            if x.buffer not in self.temps:
                if self.flat:
                    return None
                t = self.k.types[x.buffer]
                return Load(x.buffer, (flat_offset(x.index, t, self.layout(x.buffer)),), x.dtype)
            if x.buffer in self.scalars:
                return self.scalars[x.buffer]
            if x.buffer in self.again:
                where, axes, value = self.again[x.buffer]
                table: dict[Expr, Expr] = {a: x.index[p] for a, p in zip(axes, where, strict=True)}
                return substitute(value, table)
            at: Expr = ZERO
            for i, d in zip(x.index, self.k.types[x.buffer].shape, strict=True):
                if d is not ONE and i not in self.canonical.values():
                    at = at * d + i
            return Load(x.buffer, (at,), x.dtype)

        return map_loads(e, put)

    def reduce(self, red: Reduce, name: str) -> Var:
        """A reduction over the threads of the block; every thread ends with the result."""
        acc = Var(f"acc{name}", red.dtype)
        guard, body = guarded(red)
        step: Stmt = Assign(acc, combine(red.fn, acc, body))
        if guard is not None:
            step = If(guard, (step,))
        axes = ordered_reduction(red)
        if self.alone:
            self.body += [Assign(acc, identity(red.fn, red.dtype)), *inner_loops(axes, step)]
            return acc
        count = product(a.extent for a in axes)
        e = Var(f"k{name}")
        sets, table = positions(axes, e)
        partial = self.partial(red.dtype)
        mine = Load(partial, (THREAD,), red.dtype)
        self.body += [
            Assign(acc, identity(red.fn, red.dtype)),
            over_threads(e, count, self.threads, *sets, replaced(step, table)),
            Store(partial, THREAD, acc),
            Barrier(),
        ]
        half = Var("half")
        other = Load(partial, (THREAD + half,), red.dtype)
        store = Store(partial, THREAD, combine(red.fn, mine, other))
        halving: tuple[Stmt, ...] = (
            If(apply("lt", THREAD, half), (store,)),
            Barrier(),
            Assign(half, apply("floordiv", half, 2)),
        )
        steps = index(self.threads.bit_length() - 1)
        self.body += [
            Assign(half, index(self.threads // 2)),
            For(Var("level"), ZERO, steps, halving),
        ]
        self.body += [Assign(acc, Load(partial, (ZERO,), red.dtype)), Barrier()]
        return acc

    def partial(self, dtype: str) -> str:
        """One shared array a dtype, with an element for every thread."""
        name = f"partial_{dtype}"
        if all(x.buffer != name for x in self.locals):
            self.locals.append(Local(name, dtype, index(self.threads), stack=False))
        return name


def row_offset(loops: Sequence[Axis]) -> Expr:
    at: Expr = ZERO
    for a in loops:
        at = at * a.extent + a
    return at


def rename_unit(e: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Renames axes, binders included; axes that are gone become zero."""
    gone = {a: b for a, b in table.items() if not isinstance(b, Axis)}
    return rename_axes(substitute(e, gone), {a: b for a, b in table.items() if a not in gone})


__all__ = ["reduction", "rows"]
