"""Schedule for recurrences: every step is a round of tiles, over threads like any other kernel.

A tile is a direction, a panel of units and some rows of the batch. It multiplies the rows of the
state with the panel's columns of every gate, which were packed side by side when the model was
compiled, and computes the gates' elementwise stages while their sums are in L1. Between two rounds
all threads meet, since a step reads all units of the one before; each thread then finds its own
panels in its caches. States get their initial values in a round before the first step, and what
follows the last one is a round too.

Factors that are no constants of float32 are read where they are, a column at a time.
"""

from __future__ import annotations

from dataclasses import replace

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Var,
    apply,
    as_int,
    index,
    loads,
    map_loads,
    poly_mul,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Stage
from onnxjit.codegen.loops import Address, Assign, For, If, Local, LoopNest, Stmt, Store
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.scalar_functions import FUNCTIONS
from onnxjit.codegen.schedule.axes import ceil_div, coefficient, flat_offset, without
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.recurrence_match import STEP, Phase, Product, Recurrence, recognise
from onnxjit.codegen.schedule.register_tile import tile_call, tile_symbols
from onnxjit.codegen.schedule.request import Request

ROWS = 64
"""Most rows of a tile: enough for weights that come from L3 not to matter."""

TILES = 4
"""Tiles of a round that are wanted, if only rows can be cut for them."""

STACK_BYTES = 16384
"""Largest tile of sums on the stack."""

Body = tuple[Stmt, ...]


LONG_COST = 15
"""Cost of the elementary functions (see `scalar_functions`)."""


def is_long(s: Stage) -> bool:
    """Whether a stage has an elementary function."""
    return any(isinstance(x, Apply) and FUNCTIONS[x.fn].cost >= LONG_COST for x in walk(s.value))


def recurrence(r: Request) -> LoopNest:
    """Steps over a clock: LSTM, GRU, RNN."""
    return RecurrenceNest(r, recognise(r)).nest()


class RecurrenceNest:
    """Writes the statements of the nest."""

    def __init__(self, r: Request, found: Recurrence) -> None:
        self.r, self.found = r, found
        self.direction, self.row, self.unit = found.direction, found.row, found.unit
        m = as_int(self.row.extent)
        self.cover = microkernels.select(
            None if m is None else max(m, 1), as_int(self.unit.extent) or None, r.target
        )
        self.mr, self.nr = self.cover.main.mr, self.cover.nr
        uneven = self.cover.main.any_rows
        self.height: Expr = Var("height") if uneven else index(self.mr)
        self.row_tiles = ceil_div(self.row.extent, self.mr)
        self.panels = ceil_div(self.unit.extent, self.nr)
        self.symbols: list[str] = []
        self.packings: list[Packing] = []
        self.locals = [Local("segments", "int64", ONE)]
        self.tiles: dict[str, str] = {}
        self.first, self.last = Var("mt0"), Var("mt1")
        self.u0 = Var("panel") * self.nr

    # --- assembly -----------------------------------------------------------------------------

    def nest(self) -> LoopNest:
        found, phases = self.found, len(self.found.phases)
        at = Var("round")
        steps = poly_mul(found.count, index(phases))
        rounds = steps + 2
        parts = [self.phase(p) for p in found.phases]
        body = parts[-1]
        for n in reversed(range(phases - 1)):
            body = (If(apply("eq", Var("part"), n), parts[n], body),)
        sets: Body = (Assign(STEP, at - 1),)
        if phases > 1:
            sets = (
                Assign(STEP, apply("floordiv", at - 1, phases)),
                Assign(Var("part"), apply("mod", at - 1, phases)),
            )
        body = (
            *self.block(),
            If(
                apply("eq", at, 0),
                self.rows_of(found.before),
                (If(apply("eq", at, rounds - 1), self.rows_of(found.after), (*sets, *body)),),
            ),
        )
        outer = [Axis("round", rounds), self.direction]
        if not self.resident():
            outer.reverse()
            rounds = rounds * self.direction.extent
        outer += [Axis("panel", self.panels), Axis("rb", self.row_blocks())]
        nest, tiles = with_tiles(outer, body)
        note = (
            f"tile {self.mr}x{self.nr}; {phases} round{'s' if phases > 1 else ''} of tiles a step"
        )
        made = finish_nest(
            self.r, nest, tiles, "recurrence",
            locals=tuple(self.locals),
            symbols=tuple(dict.fromkeys(self.symbols)),
            notes=(note,),
            rounds=rounds,
        )  # fmt: skip
        return replace(made, packings=tuple(dict.fromkeys(self.packings)))

    def resident(self) -> bool:
        """Whether L2 holds the packed weights of all directions from one step to the next. If not,
        a direction makes all its steps before the other begins."""
        return sum(p.elements for p in self.packings) * 4 <= self.r.target.l2 // 2

    def row_blocks(self) -> Expr:
        tiles = self.row_tiles
        most = max(1, ROWS // self.mr)
        wanted = -(-TILES // ((as_int(self.direction.extent) or 1) * (as_int(self.panels) or 1)))
        blocks = apply("max", ceil_div(tiles, most), apply("min", index(wanted), tiles))
        return apply("max", blocks, 1)

    def block(self) -> Body:
        """The row tiles [first, last) of a tile."""
        blocks = self.row_blocks()
        size = apply("floordiv", self.row_tiles + blocks - 1, blocks)
        sets: Body = (
            Assign(self.first, poly_mul(Var("rb"), size)),
            Assign(self.last, apply("min", self.first + size, self.row_tiles)),
            Store("segments", ZERO, ZERO),
        )
        if isinstance(self.height, Var):
            # Tiles of equal height: of 128 rows ten times 13, not nine times 14 and 2.
            tiles = apply("max", self.row_tiles, 1)
            height = apply("floordiv", self.row.extent + tiles - 1, tiles)
            sets = (Assign(self.height, height), *sets)
        return sets

    def row_tile(self, *body: Stmt) -> Body:
        """`body` for each row tile of the block, with `m0` and `rows`."""
        mt, m0 = Var("mt"), Var("m0")
        place: Body = (
            Assign(m0, poly_mul(mt, self.height)),
            Assign(Var("rows"), apply("min", self.height, self.row.extent - m0)),
        )
        return (For(mt, self.first, self.last, (*place, *body)),)

    def rows_of(self, stages: tuple[Stage, ...]) -> Body:
        """Elementwise stages over the places of a tile."""
        return self.row_tile(*self.elements(stages)) if stages else ()

    def phase(self, p: Phase) -> Body:
        out: list[Stmt] = []
        for q in p.products:
            out += self.product(q)
        return self.row_tile(*out, *self.elements(p.stages))

    # --- elementwise stages -------------------------------------------------------------------

    def elements(self, stages: tuple[Stage, ...]) -> Body:
        """The stages over the elements of a row tile, in as many loops as have elementary
        functions: of several in one body an out-of-order core keeps one in flight, of one in its
        own loop the compiler interleaves several vectors."""
        runs: list[list[Stage]] = []
        for s in stages:
            if not runs or (is_long(s) and any(map(is_long, runs[-1]))):
                runs.append([])
            runs[-1].append(s)
        out: list[Stmt] = []
        for n, run in enumerate(runs):
            later = {x.buffer for r in runs[n + 1 :] for s in r for x in loads(s.value)}
            out += self.loops(run, later)
        return tuple(out)

    def loops(self, stages: list[Stage], later: set[str]) -> Body:
        """One loop over all stages; what `later` ones read is kept in a tile."""
        i, j = Var("i"), Var("j")
        here = i * self.nr + j
        table: dict[Expr, Expr] = {self.row: Var("m0") + i, self.unit: self.u0 + j}
        scalars: dict[str, Var] = {}
        types, layouts = self.r.kernel.types, self.r.layouts

        def read(x: Load) -> Expr:
            if x.buffer in scalars:
                return scalars[x.buffer]
            if x.buffer in self.tiles:
                group = x.index[2] if len(x.index) == 4 else ZERO
                at = poly_mul(group, index(self.mr * self.nr)) + here
                return Load(self.tiles[x.buffer], (at,), x.dtype)
            at = flat_offset(x.index, types[x.buffer], layouts.get(x.buffer))
            return Load(x.buffer, (substitute(at, table),), x.dtype)

        body: list[Stmt] = []
        for s in stages:
            value = substitute(map_loads(s.value, read), table)
            if s.buffer in self.r.kernel.outputs:
                where = flat_offset(s.store, types[s.buffer], layouts.get(s.buffer), clamp=False)
                body.append(Store(s.buffer, substitute(where, table), value))
                continue
            scalars[s.buffer] = Var(f"v{len(scalars)}", s.value.dtype)
            body.append(Assign(scalars[s.buffer], value))
            if s.buffer in later:
                body.append(Store(self.tile(s.buffer), here, scalars[s.buffer]))

        def over(stop: Expr) -> Body:
            return (For(i, ZERO, Var("rows"), (For(j, ZERO, stop, tuple(body)),)),)

        n = as_int(self.unit.extent)
        if n is not None and n % self.nr == 0:
            return over(index(self.nr))
        left = self.unit.extent - self.u0
        if n is not None and n < self.nr:
            return over(index(n))
        # A constant number of columns where there are as many: it decides the vector width.
        return (If(apply("le", self.nr, left), over(index(self.nr)), over(left)),)

    def tile(self, buffer: str, groups: int = 1) -> str:
        """Memory for a temporary of one row tile."""
        if buffer not in self.tiles:
            name = self.tiles[buffer] = f"acc{len(self.tiles)}"
            cells = groups * self.mr * self.nr
            dtype = self.r.kernel.types[buffer].dtype
            self.locals.append(Local(name, dtype, index(cells), cells * 4 <= STACK_BYTES))
        return self.tiles[buffer]

    # --- products -----------------------------------------------------------------------------

    def product(self, q: Product) -> Body:
        """The sums of one row tile, group after group."""
        name = self.tile(q.buffer, q.groups)
        packing = self.packed(q)
        if packing is None:
            return self.in_place(q, name)
        self.packings.append(packing)
        k = packing.inner[-1][0]
        x = self.flat(q.x)
        step = coefficient(x, self.row)
        assert step is not None
        group, size = Var("g"), k * self.nr
        panel = (poly_mul(self.direction, self.panels) + Var("panel")) * q.groups + group
        start = substitute(x, {self.row: Var("m0"), q.k: ZERO})
        # Where weights stay in L2 from step to step, asking for each line takes a third longer.
        inside = packing.elements * 4 <= self.r.target.l2 // 2
        next_ = panel * size + size if inside else panel * size
        arguments = (
            Address(q.x.buffer, start), step, Address("segments", ZERO), ONE, index(k),
            Address(q.y.buffer, panel * size), Address(name, group * (self.mr * self.nr)),
            index(self.nr), ZERO, Address(q.y.buffer, next_),
        )  # fmt: skip
        symbols = tile_symbols(self.cover)
        self.symbols += symbols
        call = tile_call(self.cover, arguments, Var("rows"), symbols)
        return (For(group, ZERO, index(q.groups), call),)

    def packed(self, q: Product) -> Packing | None:
        """How the columns are packed, panel by panel, in a panel group by group; None where they
        are no constants of float32."""
        x, y = self.flat(q.x), self.flat(q.y)
        axes = (self.direction, q.group, self.unit, q.k)
        steps = [as_int(c) if (c := coefficient(y, a)) is not None else None for a in axes]
        sizes = [as_int(a.extent) for a in axes]
        fixed = (
            all(v is not None for v in (*steps, *sizes)) and as_int(without(y, axes)) is not None
        )
        plain = q.x.dtype == q.y.dtype == "float32" and coefficient(x, q.k) is ONE
        if not fixed or not plain or q.y.buffer not in self.r.constants or 0 in sizes:
            return None
        pairs = [(n or 0, c or 0) for n, c in zip(sizes, steps, strict=True)]
        offset = as_int(without(y, axes)) or 0
        return Packing(q.y.buffer, offset, (pairs[0],), pairs[2], (pairs[1], pairs[3]), self.nr)

    def flat(self, x: Load) -> Expr:
        return flat_offset(x.index, self.r.kernel.types[x.buffer], self.r.layouts.get(x.buffer))

    def in_place(self, q: Product, name: str) -> Body:
        g, i, j, k = Var("g"), Var("i"), Var("j"), Var("k")
        dtype = self.r.kernel.types[q.buffer].dtype
        acc = Var("scalar_acc", dtype)
        table: dict[Expr, Expr] = {
            self.row: Var("m0") + i, self.unit: self.u0 + j, q.group: g, q.k: k,
        }  # fmt: skip
        x, y = (Load(v.buffer, (substitute(self.flat(v), table),), v.dtype) for v in (q.x, q.y))
        add = For(k, ZERO, q.k.extent, (Assign(acc, acc + x * y),))
        store = Store(name, (g * self.mr + i) * self.nr + j, acc)
        stop = apply("min", index(self.nr), self.unit.extent - self.u0)
        columns = For(j, ZERO, stop, (Assign(acc, Const(0.0, dtype)), add, store))
        return (For(g, ZERO, index(q.groups), (For(i, ZERO, Var("rows"), (columns,)),)),)


__all__ = ["recurrence"]
