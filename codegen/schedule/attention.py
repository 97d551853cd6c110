"""Schedule for attention: one pass over the keys for a block of queries, nothing written between.

A tile is a batch index (batch and head) and a block of query rows. Keys come in blocks: a block's
keys are packed into panels (transposed) and its values copied into panels, then for every register
tile of rows: scores into a strip of L1, their tails and the softmax on the strip, and the strip
times the values onto the rows' outputs. Where the keys need several blocks, running maxima and sums
rescale what was there before (Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018; Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021). Sums are divided once
per output element, at the end.
"""

from __future__ import annotations

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    FALSE,
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Var,
    apply,
    as_int,
    index,
    loads,
    poly_mul,
    substitute,
)
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Local, LoopNest, Stmt, Store
from onnxjit.codegen.schedule.attention_blocks import CONFLICT, FLOAT, Blocks
from onnxjit.codegen.schedule.attention_match import SCORE, WEIGHTED, recognise
from onnxjit.codegen.schedule.axes import ceil_div, coefficient
from onnxjit.codegen.schedule.pointwise import finish_nest, with_tiles
from onnxjit.codegen.schedule.register_tile import tile_call
from onnxjit.codegen.schedule.request import Request

LOWEST = Const(float("-inf"), FLOAT)
NOTHING = Const(0.0, FLOAT)

Body = tuple[Stmt, ...]


class AttentionNest(Blocks):
    """Writes the statements of the nest."""

    def choice(self, few: Body, many: Body) -> Body:
        if isinstance(self.few, Const):
            return few if self.few.value else many
        return (If(self.few, few, many),)

    # --- assembly -----------------------------------------------------------------------------

    def nest(self) -> LoopNest:
        mt, m0, rows, kb = Var("mt"), Var("m0"), Var("rows"), Var("kb")
        place: Body = (
            Assign(m0, poly_mul(mt, self.height)),
            Assign(rows, apply("min", self.height, self.m - m0)),
        )
        setup: Body = (
            Store("segments", ZERO, ZERO),
            Assign(self.first, poly_mul(Var("rb"), self.block)),
            Assign(self.last, apply("min", self.first + self.block, self.row_tiles)),
            *self.set_height(),
            *self.copy_queries(),
        )
        inner = (
            *place,
            *self.choice(self.scores_in_place(), self.scores()),
            *self.softmax(),
            *self.choice(self.weigh_in_place(), self.weigh()),
        )
        if self.single:
            block: Body = (For(mt, self.first, self.last, (*inner, *self.rows_of(self.finish()))),)
            body: Body = (*setup, *self.pack(), *block)
            body = (Assign(kb, ZERO), *self.block_sizes(), *body)
        else:
            block = (*self.block_sizes(), *self.pack(), For(mt, self.first, self.last, inner))
            body = (
                *setup,
                *self.no_keys(),
                For(kb, ZERO, self.key_blocks, block),
                For(mt, self.first, self.last, (*place, *self.rows_of(self.finish()))),
            )
        nest, tiles = with_tiles([*self.batch, Axis("rb", self.row_blocks)], body)
        note = (
            f"tile {self.mr}x{self.nr}, values {self.mr}x{self.vr}; "
            f"blocks of {self.keys_in_block} keys"
        )
        return finish_nest(
            self.r, nest, tiles, "attention",
            locals=tuple(self.locals),
            symbols=tuple(dict.fromkeys(self.symbols)),
            notes=(note,),
        )  # fmt: skip

    def set_height(self) -> Body:
        """Tiles of equal height: of 128 rows ten times 13, not nine times 14 and 2."""
        if not isinstance(self.height, Var):
            return ()
        tiles = apply("max", self.row_tiles, 1)
        return (Assign(self.height, apply("floordiv", self.m + tiles - 1, tiles)),)

    def block_sizes(self) -> Body:
        k0 = Var("k0")
        count = self.n if self.single else apply("min", index(self.keys_in_block), self.n - k0)
        return (
            Assign(k0, Var("kb") * self.keys_in_block),
            Assign(Var("kn"), count),
            Assign(Var("panels"), ceil_div(count, self.nr)),
        )

    def rows_of(self, body: Body) -> Body:
        return (For(Var("i"), ZERO, Var("rows"), body),)

    def no_keys(self) -> Body:
        """Sums over no key are 0."""
        if as_int(self.n) is not None:
            return ()
        k = Var("z")
        count = (self.last - self.first) * self.mr
        return (
            If(
                apply("eq", self.n, 0),
                (
                    For(k, ZERO, count, (Store("total", k, Const(1.0, FLOAT)),)),
                    For(k, ZERO, count * self.line, (Store("out", k, NOTHING),)),
                ),
            ),
        )

    # --- operands -----------------------------------------------------------------------------

    def copy_queries(self) -> Body:
        """Queries are read in place where a row's elements are contiguous."""
        step = coefficient(self.query, self.row) if self.row is not None else ZERO
        assert step is not None
        size = as_int(step)
        conflict = size is not None and size > 0 and size % CONFLICT == 0 and self.mr > 8
        if coefficient(self.query, self.d) is ONE and not conflict:
            self.query_buffer = self.source
            self.query_step = step
            self.query_at = substitute(self.query, {self.d: ZERO, **self.row_is(Var("m0"))})
            return ()
        i, k = Var("qi"), Var("qk")
        base = poly_mul(self.first, self.height)
        most = self.mr * self.most_tiles
        self.locals.append(Local("queries", FLOAT, index(most * self.depth), False))
        source = substitute(self.query, {self.d: k, **self.row_is(base + i)})
        value = Load(self.source, (source,), FLOAT)
        stop = apply("min", poly_mul(self.last, self.height), self.m) - base
        self.query_step = index(self.depth)
        self.query_at = poly_mul(Var("m0") - base, index(self.depth))
        self.query_buffer = "queries"
        copy: Body = (Store("queries", i * self.depth + k, value),)
        return (For(i, ZERO, stop, (For(k, ZERO, index(self.depth), copy),)),)

    def row_is(self, at: Expr) -> dict[Expr, Expr]:
        return {self.row: at} if self.row is not None else {}

    def pack(self) -> Body:
        return self.choice((), (*self.pack_keys(), *self.pack_values()))

    def pack_keys(self) -> Body:
        panel, kn = Var("panel"), Var("kn")
        start = panel * self.nr
        count = apply("min", index(self.nr), kn - start)
        at = start * self.depth
        if coefficient(self.keys, self.d) is ONE:
            symbol = microkernels.pack(self.nr, self.isa)
            self.symbols.append(symbol)
            source = substitute(self.keys, {self.d: ZERO, self.key: Var("k0") + start})
            step = coefficient(self.keys, self.key)
            assert step is not None
            arguments = (
                Address(self.key_buffer, source), step, count, index(self.depth),
                Address("keys", at), index(self.nr),
            )  # fmt: skip
            return (For(panel, ZERO, Var("panels"), (Call(symbol, arguments),)),)
        j, k = Var("pj"), Var("pk")

        source = substitute(self.keys, {self.d: k, self.key: Var("k0") + start + j})
        copy = Store("keys", at + k * self.nr + j, Load(self.key_buffer, (source,), FLOAT))
        columns = For(j, ZERO, count, (copy,))
        return (For(panel, ZERO, Var("panels"), (For(k, ZERO, index(self.depth), (columns,)),)),)

    def pack_values(self) -> Body:
        """Columns beyond the last are left as they are: what becomes of them is never stored."""
        out: list[Stmt] = []
        k, j = Var("pk"), Var("pj")
        for p in range(self.value_panels):
            where: dict[Expr, Expr] = {self.key: Var("k0") + k, self.column: index(p * self.vr) + j}
            at = (k + p * self.keys_in_block) * self.vr + j
            value = Load(self.value_buffer, (substitute(self.values, where),), FLOAT)
            stop = index(min(self.vr, self.width - p * self.vr))
            out.append(For(j, ZERO, stop, (Store("values", at, value),)))
        if coefficient(self.values, self.column) is ONE:
            return (For(k, ZERO, Var("kn"), tuple(out)),)
        return tuple(For(k, ZERO, Var("kn"), (s,)) for s in out)

    # --- products -----------------------------------------------------------------------------

    def product(self, columns: int, arguments: tuple[Expr | Address, ...]) -> Body:
        """The micro-kernel call for the rows of a tile: all of it, or what is left at the end."""
        main, tail = self.cover.main, self.cover.tail
        names = [
            microkernels.gemm(t.mr, columns, self.isa, any_rows=t.any_rows)
            for t in (main, tail) if t is not None
        ]  # fmt: skip
        self.symbols += names
        return tile_call(self.cover, arguments, Var("rows"), names)

    def scores(self) -> Body:
        panel, size = Var("panel"), self.nr * self.depth
        arguments = (
            Address(self.query_buffer, self.query_at), self.query_step,
            Address("segments", ZERO), ONE, index(self.depth),
            Address("keys", panel * size), Address("strip", panel * self.nr), index(self.strip),
            ZERO, Address("keys", panel * size + size),
        )  # fmt: skip
        return (For(panel, ZERO, Var("panels"), self.product(self.nr, arguments)),)

    def weigh(self) -> Body:
        """The strip times the block's values; the first block overwrites."""
        out: list[Stmt] = []
        size = self.keys_in_block * self.vr
        for p in range(self.value_panels):
            arguments = (
                Address("strip", ZERO), index(self.strip),
                Address("segments", ZERO), ONE, Var("kn"),
                Address("values", index(p * size)),
                Address("out", self.slot * (self.mr * self.line) + p * self.vr), index(self.line),
                ZERO if self.single else Var("kb"), Address("values", index(p * size + size)),
            )  # fmt: skip
            out += self.product(self.vr, arguments)
        return tuple(out)

    # --- products of few rows ------------------------------------------------------------------

    def scores_in_place(self) -> Body:
        """One key after the other: the inner loop is a product of two contiguous vectors."""
        if self.few is FALSE:
            return ()
        t, k, i, acc = Var("t"), Var("pk"), Var("i"), Var("scalar_acc", FLOAT)
        where: dict[Expr, Expr] = {self.d: k, self.key: Var("k0") + t}
        query = self.query_at + poly_mul(self.query_step, i) + k
        x = Load(self.query_buffer, (query,), FLOAT)
        y = Load(self.key_buffer, (substitute(self.keys, where),), FLOAT)
        add = For(k, ZERO, index(self.depth), (Assign(acc, acc + x * y),))
        store = Store("strip", i * self.strip + t, acc)
        return self.rows_of((For(t, ZERO, Var("kn"), (Assign(acc, NOTHING), add, store)),))

    def weigh_in_place(self) -> Body:
        if self.few is FALSE:
            return ()
        t, c, i = Var("t"), Var("c"), Var("i")
        at = (self.slot * self.mr + i) * self.line + c
        where: dict[Expr, Expr] = {self.column: c, self.key: Var("k0") + t}
        y = Load(self.value_buffer, (substitute(self.values, where),), FLOAT)
        x = Load("strip", (i * self.strip + t,), FLOAT)
        add = Store("out", at, Load("out", (at,), FLOAT) + x * y)
        width = index(self.width)
        clear: Body = (For(c, ZERO, width, (Store("out", at, NOTHING),)),)
        if not self.single:
            clear = (If(apply("eq", Var("kb"), 0), clear),)
        return self.rows_of((*clear, For(t, ZERO, Var("kn"), (For(c, ZERO, width, (add,)),))))

    # --- softmax ------------------------------------------------------------------------------

    def softmax(self) -> Body:
        """Scores of the strip become exponentials of their distance to the row's maximum."""
        i, kb = Var("i"), Var("kb")
        symbol = microkernels.softmax(self.isa)
        self.symbols.append(symbol)
        arguments = (
            Address("strip", ZERO), index(self.strip), Address("strip", ZERO), index(self.strip),
            Var("rows"), Var("kn"), Address("highest", ZERO), Address("sums", ZERO),
        )  # fmt: skip
        lowest = self.rows_of((Store("highest", i, LOWEST),))
        call = Call(symbol, arguments)
        if self.single:
            return (*self.tails(), *lowest, call)
        here = self.slot * self.mr + i
        before = Load("maxima", (here,), FLOAT)
        known = self.rows_of((Store("highest", i, before),))
        later = apply("lt", ZERO, kb)
        return (
            *self.tails(),
            If(later, known, lowest),
            call,
            If(later, self.rows_of(self.rescale(here, before))),
            *self.rows_of(
                (
                    Store("maxima", here, Load("highest", (i,), FLOAT)),
                    Store("total", here, Load("sums", (i,), FLOAT)),
                )
            ),
        )

    def tails(self) -> Body:
        """The elementwise tail of every score: scale, bias, mask."""
        if self.score is SCORE:
            return ()
        t, i = Var("t"), Var("i")

        def each(at: Expr) -> Body:
            place = i * self.strip + at
            table = {SCORE: Load("strip", (place,), FLOAT), self.key: Var("k0") + at}
            value = substitute(self.score, {**table, **self.row_is(Var("m0") + i)})
            return (Store("strip", place, value),)

        if not loads(self.score):
            # Columns beyond the last key may be computed too: no loop over what is left.
            block = For(t, ZERO, index(self.nr), each(Var("panel") * self.nr + t))
            return self.rows_of((For(Var("panel"), ZERO, Var("panels"), (block,)),))
        return self.rows_of((For(t, ZERO, Var("kn"), each(t)),))

    def rescale(self, here: Expr, before: Expr) -> Body:
        """What earlier blocks left for row `i`, measured against the new maximum."""
        c, i = Var("c"), Var("i")
        factor, top = Var("scalar_factor", FLOAT), Var("scalar_top", FLOAT)
        at = here * self.line + c
        scaled = Store("out", at, Load("out", (at,), FLOAT) * factor)
        total = Load("sums", (i,), FLOAT) + Load("total", (here,), FLOAT) * factor
        return (
            Assign(top, Load("highest", (i,), FLOAT)),
            # A row of -inf so far has no maximum to be distant from.
            Assign(top, apply("select", apply("eq", top, LOWEST), NOTHING, top)),
            Assign(factor, apply("exp", before - top)),
            Store("sums", i, total),
            For(c, ZERO, index(self.line), (scaled,)),
        )

    def finish(self) -> Body:
        """Row `i` of the tile: divide by the sum, apply the tail, store."""
        here = self.slot * self.mr + Var("i")
        total, share = Var("scalar_total", FLOAT), Var("scalar_share", FLOAT)
        one = Const(1.0, FLOAT)
        c = Var("c")
        quotient = apply("div", one, total)
        weighted = Load("out", (here * self.line + c,), FLOAT) * share
        off = Var("scalar_off", "bool")
        set_off: Body = ()
        if self.no_nan:
            # A row without keys has a sum of 0 and only weights of 0.
            quotient = apply("select", apply("eq", total, NOTHING), one, quotient)
            set_off = (Assign(off, apply("isnan", total)),)
        elif self.empty is not None:
            where = self.row_is(Var("m0") + Var("i"))
            set_off = (Assign(off, substitute(self.empty, where)),)
        if set_off:
            weighted = apply("select", off, NOTHING, weighted)
        table = {WEIGHTED: weighted, self.column: c, **self.row_is(Var("m0") + Var("i"))}
        store = Store(self.buffer, substitute(self.offset, table), substitute(self.result, table))
        return (
            Assign(total, Load("sums" if self.single else "total", (here,), FLOAT)),
            Assign(share, quotient),
            *set_off,
            For(c, ZERO, index(self.width), (store,)),
        )


def attention(r: Request) -> LoopNest:
    """The nest of an attention kernel."""
    return AttentionNest(r, recognise(r)).nest()


__all__ = ["attention"]
