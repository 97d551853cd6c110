"""Schedules for CUDA: which thread computes what. A tile is the work of one block of threads.

- `contraction`: a sum of products over a square block of outputs, operands staged in shared
  memory, 4 x 4 outputs a thread;
- `rows`: several stages that share rows (softmax, layer norm), one row a block, or a thread;
- `reduction`: one long contiguous sum, maximum ... an output element, one element a block;
- `elements`: anything else that is one stage or the parts of a concatenation, one output element a
  thread, neighbouring threads on neighbouring elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
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
from onnxjit.codegen.kernel import Kernel, Stage, inline, product, rename_axes
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
    loop,
)
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    ceil_div,
    coefficient,
    flat_offset,
    flatten_stage,
    merge_axes,
    split_axes,
    typical,
)
from onnxjit.codegen.schedule.pointwise import concatenated, finish_nest, inner_loops
from onnxjit.codegen.schedule.reduction import (
    combine,
    guarded,
    identity,
    ordered_reduction,
    replace_node,
)
from onnxjit.codegen.schedule.request import Declined, Request
from onnxjit.codegen.schedule.rows import align_rows

ITEMS = 4
"""Outputs of one thread in `elements`; amortises the tile loop."""

SHARED_BYTES = 16384
"""Largest row temporary in shared memory; a longer one is computed again where it is read."""

SHARED_TOTAL = 40960
"""Static shared memory of all temporaries of a block; every device has 48 KB."""

SHORT_ROW = 32
"""Rows with no longer loop than this are computed by one thread each."""

LONG = 128
"""Shortest reduction that a whole block computes."""

SERIAL = 4096
"""A reduction so long is split over a block even when its elements are not contiguous, if there
are few outputs."""


def block_threads(r: Request) -> int:
    """The target's threads of a block."""
    for f in r.target.features:
        if f.startswith("block="):
            return int(f.removeprefix("block="))
    return 256


# --- pieces shared by the rules ----------------------------------------------------------------


def positions(axes: Sequence[Axis], linear: Expr) -> tuple[list[Stmt], dict[Expr, Expr]]:
    """Statements that derive each axis from its row-major linear index, and axis -> variable."""
    if len(axes) == 1:
        return [], {axes[0]: linear}
    out: list[Stmt] = []
    rest = linear
    for k in range(len(axes) - 1, -1, -1):
        a = axes[k]
        out.append(Assign(Var(a.name), rest if k == 0 else apply("mod", rest, a.extent)))
        rest = apply("floordiv", rest, a.extent)
    return out, {a: Var(a.name) for a in axes}


def replaced(s: Stmt, table: Mapping[Expr, Expr]) -> Stmt:
    """A statement with leaves of its expressions replaced."""
    if isinstance(s, For):
        body = tuple(replaced(x, table) for x in s.body)
        start, stop = substitute(s.start, table), substitute(s.stop, table)
        return replace(s, start=start, stop=stop, body=body)
    if isinstance(s, If):
        then = tuple(replaced(x, table) for x in s.then)
        other = tuple(replaced(x, table) for x in s.orelse)
        return If(substitute(s.cond, table), then, other)
    if isinstance(s, Assign):
        return Assign(s.var, substitute(s.value, table))
    if isinstance(s, Store):
        return Store(s.buffer, substitute(s.offset, table), substitute(s.value, table))
    assert isinstance(s, Barrier)
    return s


def over_threads(var: Var, count: Expr, threads: int, *body: Stmt) -> For:
    """`for var in range(thread, count, threads)`: the block's threads share the range."""
    return For(var, THREAD, count, tuple(body), step=threads)


def outermost(e: Expr) -> list[Reduce]:
    """Reductions of `e` that are in no other reduction, in a deterministic order."""
    found = [x for x in walk(e) if isinstance(x, Reduce)]
    inner = {y for x in found for y in walk(x.body) if isinstance(y, Reduce)}
    return [x for x in found if x not in inner]


def serial(value: Expr, prefix: str = "acc") -> tuple[list[Stmt], Expr]:
    """Statements that compute every reduction of `value` in scalars, and what is left of it."""
    stmts: list[Stmt] = []
    for n, red in enumerate(outermost(value)):
        acc = Var(f"{prefix}_{n}", red.dtype)
        guard, body = guarded(red)
        inner, body = serial(body, f"{prefix}_{n}")
        step: tuple[Stmt, ...] = (*inner, Assign(acc, combine(red.fn, acc, body)))
        if guard is not None and not any(isinstance(x, Reduce) for x in walk(guard)):
            step = (If(guard, step),)
        elif guard is not None:
            inner, body = serial(red.body, f"{prefix}_{n}")
            step = (*inner, Assign(acc, combine(red.fn, acc, body)))
        for a in reversed(ordered_reduction(red)):
            step = (loop(a, *step),)
        stmts += [Assign(acc, identity(red.fn, red.dtype)), *step]
        value = replace_node(value, red, acc)
    return stmts, value


def numbered(exprs: Sequence[Expr], axes: Sequence[Axis], prefix: str) -> list[Expr]:
    """`exprs` with `axes` and all reduced axes renamed to prefix0, prefix1 ..."""
    table: dict[Expr, Expr] = {}
    reduced = [a for e in exprs for x in walk(e) if isinstance(x, Reduce) for a in x.axes]
    for a in dict.fromkeys([*axes, *reduced]):
        table[a] = Axis(f"{prefix}{len(table)}", a.extent)
    return [rename_axes(e, table) for e in (*exprs, *axes)]


# --- one output element a thread ---------------------------------------------------------------


def elements(r: Request) -> LoopNest:
    """Stages that read no other stage's result, each output element computed by one thread."""
    k = r.kernel
    made = {s.buffer for s in k.stages}
    if any(x.buffer in made for s in k.stages for x in loads(s.value)):
        raise Declined("a stage reads another stage's result")
    if any(x.buffer in made for s in k.stages for i in s.index for x in loads(i)):
        raise Declined("a stage is placed by another stage's result")
    threads = block_threads(r)
    parts = []
    for n, s in enumerate(k.stages):
        prefix = f"i{n}_" if len(k.stages) > 1 else "i"
        parts.append(piece(flatten_stage(s, k.types, r.layouts), threads, prefix))
    # Only one part runs in a tile, and its loops end before the tile does.
    body, tiles = concatenated(parts)
    return finish_nest(r, body, tiles, "elements", threads=threads)


def piece(s: FlatStage, threads: int, prefix: str) -> tuple[tuple[Stmt, ...], Expr]:
    """The tile body and the number of tiles of one stage."""
    s = split_axes(s)
    s, order = merge_axes(s, by_stride(s.axes, s.offset))
    offset, value, *axes = numbered([s.offset, s.value], order, prefix)
    total = product(a.extent for a in axes if isinstance(a, Axis))
    stmts, value = serial(value, f"acc{prefix}")
    e = Var(f"e{prefix}")
    sets, table = positions([a for a in axes if isinstance(a, Axis)], e)
    work = [*sets, *(replaced(x, table) for x in (*stmts, Store(s.buffer, offset, value)))]
    if not axes:
        return (If(apply("lt", THREAD, 1), tuple(work)),), ONE
    chunk = threads * ITEMS
    stop = apply("min", TILE * chunk + chunk, total)
    return (For(e, TILE * chunk + THREAD, stop, tuple(work), step=threads),), ceil_div(total, chunk)


# --- one row a block ---------------------------------------------------------------------------


def reduction(r: Request) -> LoopNest:
    """A single stage whose reductions are long: the block's threads share each reduction."""
    k = r.kernel
    if len(k.stages) != 1:
        raise Declined("more than one stage")
    flat = split_axes(flatten_stage(k.stages[0], k.types, r.layouts))
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

    def layout(self, buffer: str) -> tuple[int, ...] | None:
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


# --- sums of products --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Product:
    """A stage that is a sum of `x * y`: its axes by role, all renamed."""

    stage: FlatStage
    red: Reduce
    x: Expr
    y: Expr
    batch: tuple[Axis, ...]
    m: tuple[Axis, ...]
    n: tuple[Axis, ...]
    k: tuple[Axis, ...]


def recognise(r: Request) -> Product:
    """The sum of products that a kernel is, producers without reductions substituted into it."""
    *before, final = r.kernel.stages
    if final.index:
        raise Declined("the stage stores through an index map")
    if any(s.reduces or s.index or s.buffer in r.kernel.outputs for s in before):
        raise Declined("an earlier stage reduces, is a part, or is an output")
    value = final.value
    for s in reversed(before):
        value = inline(value, s)
    final = replace(final, value=value)
    stage = split_axes(flatten_stage(final, r.kernel.types, r.layouts))
    reds = [x for x in walk(stage.value) if isinstance(x, Reduce)]
    if len(reds) != 1 or reds[0].fn != "sum":
        raise Declined("not one sum")
    body = reds[0].body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype in _MATRIX_DTYPES):
        raise Declined(f"the sum is not over a product but over {body.dtype} values")
    order = by_stride(stage.axes, stage.offset)
    offset, value, *axes = numbered([stage.offset, stage.value], order, "i")
    order = [a for a in axes if isinstance(a, Axis)]
    stage = FlatStage(stage.buffer, tuple(order), offset, value)
    red = outermost(value)[0]
    assert isinstance(red.body, Apply)
    x, y = red.body.args
    unit = [a for a in order if coefficient(offset, a) is ONE]
    in_x, in_y = axes_of(x), axes_of(y)
    if any(a in in_x and a not in in_y for a in unit):
        x, y, in_x, in_y = y, x, in_y, in_x
    if any(a not in in_x and a not in in_y for a in red.axes):
        raise Declined("a summed axis occurs in no operand")
    m = tuple(a for a in order if a in in_x and a not in in_y)
    n = tuple(a for a in order if a in in_y and a not in in_x)
    for axes_, what in ((m, "rows"), (n, "columns")):
        count = as_int(product(a.extent for a in axes_))
        if count is not None and count < 4:
            raise Declined(f"only {count} {what}")
    batch = tuple(a for a in order if (a in in_x) == (a in in_y))
    return Product(stage, red, x, y, batch, m, n, tuple(ordered_reduction(red)))


_MATRIX_DTYPES = ("float32", "float64", "int32", "uint32")


def contraction(r: Request) -> LoopNest:
    """A square tile of outputs a block; V. Volkov and J. Demmel, "Benchmarking GPUs to tune dense
    linear algebra" (2008): several outputs a thread, so that registers feed most multiplications.
    """
    c = recognise(r)
    threads = block_threads(r)
    side = int(threads**0.5)
    rm, rn = (registers(product(a.extent for a in axes), side) for axes in (c.m, c.n))
    return _Tile(r, c, side, rm, rn).nest()


def registers(extent: Expr, side: int) -> int:
    """Outputs of one thread along a direction: 1, 2 or 4, no more than the extent fills."""
    n = typical(extent)
    return 4 if n > 2 * side else 2 if n > side else 1


class _Tile:
    """Builds the body of one tile: `rm * side` rows times `rn * side` columns."""

    def __init__(self, r: Request, c: Product, side: int, rm: int, rn: int) -> None:
        self.r, self.c, self.side, self.rm, self.rn = r, c, side, rm, rn
        self.rows, self.columns, self.depth = rm * side, rn * side, side
        self.m = product(a.extent for a in c.m)
        self.n = product(a.extent for a in c.n)
        self.k = product(a.extent for a in c.k)

    def nest(self) -> LoopNest:
        c, side = self.c, self.side
        m_tiles, n_tiles = ceil_div(self.m, self.rows), ceil_div(self.n, self.columns)
        rest = apply("floordiv", TILE, n_tiles)
        m0, n0, k0 = Var("base_m"), Var("base_n"), Var("base_k")
        body: list[Stmt] = [
            Assign(n0, apply("mod", TILE, n_tiles) * self.columns),
            Assign(m0, apply("mod", rest, m_tiles) * self.rows),
        ]
        sets, self.outer = positions(c.batch, apply("floordiv", rest, m_tiles))
        if len(c.batch) == 1:
            sets = [Assign(Var(c.batch[0].name), self.outer[c.batch[0]])]
            self.outer = {c.batch[0]: Var(c.batch[0].name)}
        ty, tx = Var("ty"), Var("tx")
        body += [
            *sets,
            Assign(ty, apply("floordiv", THREAD, side)),
            Assign(tx, apply("mod", THREAD, side)),
        ]
        dtype = c.red.dtype
        self.acc = [[Var(f"acc{i}_{j}", dtype) for j in range(self.rn)] for i in range(self.rm)]
        body += [Assign(v, identity("sum", dtype)) for row in self.acc for v in row]
        step: list[Stmt] = [
            self.stage_in("x_tile", c.x, c.m, m0, self.m, self.rows, k0),
            self.stage_in("y_tile", c.y, c.n, n0, self.n, self.columns, k0),
            Barrier(),
            self.multiply(tx, ty),
            Barrier(),
        ]
        body.append(For(k0, ZERO, self.k, tuple(step), step=self.depth))
        body += self.results(m0, n0, tx, ty)
        tiles = product(a.extent for a in c.batch) * m_tiles * n_tiles
        # A padded row keeps the threads that fill a column out of each other's memory banks.
        shared = (
            Local("x_tile", c.x.dtype, index(self.depth * (self.rows + 1)), stack=False),
            Local("y_tile", c.y.dtype, index(self.depth * (self.columns + 1)), stack=False),
        )
        rule = f"contraction: {self.rows}x{self.columns} outputs a block"
        return finish_nest(self.r, tuple(body), tiles, rule, locals=shared, threads=side * side)

    def stage_in(
        self, buffer: str, e: Expr, axes: Sequence[Axis], base: Var, extent: Expr, width: int,
        k0: Var,
    ) -> For:  # fmt: skip
        """Copies one operand's tile to shared memory, zeros beyond its edges."""
        p, mine, k = Var(f"p_{buffer[0]}"), Var(f"a_{buffer[0]}"), Var(f"k_{buffer[0]}")
        reads = [x.index[0] for x in loads(e)]
        by_k = any(coefficient(o, a) is ONE for o in reads for a in self.c.k)
        inner = self.depth if by_k else width
        fast, slow = apply("mod", p, inner), apply("floordiv", p, inner)
        along, down = (slow, fast) if by_k else (fast, slow)
        at = down * (width + 1) + along
        sets_a, table_a = positions(axes, mine)
        sets_k, table_k = positions(self.c.k, k)
        value = substitute(e, {**self.outer, **table_a, **table_k})
        inside = apply("logical_and", apply("lt", mine, extent), apply("lt", k, self.k))
        return over_threads(
            p,
            index(width * self.depth),
            self.side * self.side,
            Assign(mine, base + along),
            Assign(k, k0 + down),
            If(
                inside,
                (*sets_a, *sets_k, Store(buffer, at, value)),
                (Store(buffer, at, Const(0, e.dtype)),),
            ),
        )

    def multiply(self, tx: Var, ty: Var) -> For:
        c, side = self.c, self.side
        kk = Var("kk")
        xs = [Var(f"x{i}", c.x.dtype) for i in range(self.rm)]
        ys = [Var(f"y{j}", c.y.dtype) for j in range(self.rn)]
        body: list[Stmt] = []
        for i, v in enumerate(xs):
            at = kk * (self.rows + 1) + ty + i * side
            body.append(Assign(v, Load("x_tile", (at,), c.x.dtype)))
        for j, v in enumerate(ys):
            at = kk * (self.columns + 1) + tx + j * side
            body.append(Assign(v, Load("y_tile", (at,), c.y.dtype)))
        for i, x in enumerate(xs):
            for j, y in enumerate(ys):
                acc = self.acc[i][j]
                body.append(Assign(acc, apply("add", acc, apply("mul", x, y))))
        return For(kk, ZERO, index(self.depth), tuple(body))

    def results(self, m0: Var, n0: Var, tx: Var, ty: Var) -> list[Stmt]:
        """The epilogue and the store of every output that lies inside."""
        c, side = self.c, self.side
        out: list[Stmt] = []
        for i in range(self.rm):
            m = Var(f"at_m{i}")
            sets_m, table_m = positions(c.m, m)
            inner: list[Stmt] = []
            for j in range(self.rn):
                n = Var(f"at_n{j}")
                sets_n, table_n = positions(c.n, n)
                table = {**self.outer, **table_m, **table_n}
                value = substitute(replace_node(c.stage.value, c.red, self.acc[i][j]), table)
                store = Store(c.stage.buffer, substitute(c.stage.offset, table), value)
                inner += [
                    Assign(n, n0 + tx + j * side),
                    If(apply("lt", n, self.n), (*sets_n, store)),
                ]
            out += [
                Assign(m, m0 + ty + i * side),
                If(apply("lt", m, self.m), (*sets_m, *inner)),
            ]
        return out


RULES = (contraction, rows, reduction, elements)

__all__ = ["RULES", "contraction", "elements", "reduction", "rows"]
