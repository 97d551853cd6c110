"""The input transform of minimal filtering: patches of pixels become rows of products."""

from __future__ import annotations

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    TRUE,
    ZERO,
    Axis,
    Expr,
    Load,
    Var,
    apply,
    index,
    poly_mul,
    substitute,
)
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Local, Stmt, Store
from onnxjit.codegen.schedule.axes import ceil_div, coefficient
from onnxjit.codegen.schedule.winograd_tiles import F, Tiles

FIRST, LAST = Var("vfirst"), Var("vlast")
"""The rows of a patch that are inside the input: from one up to the other."""

SLOT, HALF = Var("slot"), Var("half")
"""Where a transformed column is kept, and all new ones of a patch."""

Columns = tuple[tuple[Stmt, ...], tuple[Expr, Stmt] | None]
"""What transforms column `w`, and if there is one, a call for all new columns of a patch from `w`
on, with its condition."""


class Inputs(Tiles):
    """The input half of `WinogradNest`."""

    def input_transform(self) -> tuple[Stmt, ...]:
        """inputs[e][t][k]: element e of the transformed patch of the block's tile t.

        `lines` keeps 2 m columns, transformed once: column w is at (w - 2) % (2 m), so that a patch
        is the last two columns of one half and all m of the other, which are new.
        """
        c, m, a = self.c, self.m, self.a
        step = self.channel_step()
        tx, w = Var("tx"), Var("w")
        ty, top, t, done = Var("ty"), Var("top"), Var("t"), Var("done")
        self.transform = microkernels.winograd("in", m, self.isa.name)
        self.symbols.append(self.transform)
        copy = self.copy_window() if self.windowed else ()
        one, several = self.from_window() if self.windowed else self.from_input()
        half, edge = m * a * step, tx * m + a
        slot = apply("mod", w + (2 * m - 2), 2 * m)
        columns: tuple[Stmt, ...] = (
            For(w, done, edge, (Assign(SLOT, poly_mul(slot, index(a * step))), *one)),
        )
        if several is not None:
            inside, call = several
            new = apply("logical_and", apply("eq", edge - done, m), inside)
            columns = (If(new, (Assign(w, done), call), columns),)
        patch = Call(
            self.transform,
            (
                Address("lines", index((2 * m - 2) * a * step) - HALF),
                Address("lines", HALF),
                index(a * step),
                index(step),
                Address("inputs", t * self.step + self.first_k()),
                index(self.plane),
                index(a * self.plane),
                index(self.run),
                index(a),
            ),
        )
        body: tuple[Stmt, ...] = (
            Assign(t, ZERO),
            For(Var("g"), Var("g0"), Var("g1"), (
                *self.place(),
                Assign(top, ty * m),
                Assign(FIRST, c.rows.low - top),
                Assign(LAST, c.rows.high - top),
                Assign(done, poly_mul(self.x0, index(m))),
                *copy,
                For(tx, self.x0, self.x1, (
                    Assign(HALF, poly_mul(apply("mod", tx, 2), index(half))),
                    *columns,
                    Assign(done, edge),
                    patch,
                    Assign(t, t + 1),
                )),
            )),
        )  # fmt: skip
        self.locals += [
            Local("lines", F, index(2 * m * a * step), stack=False),
            Local("inputs", F, index(a * a * self.plane), stack=False),
        ]
        return (For(Var("kb"), ZERO, index(self.runs), body),) if self.runs > 1 else body

    def first_k(self) -> Expr:
        """The first of the channels that are transformed at a time."""
        return Var("kb") * self.run if self.runs > 1 else ZERO

    def copy_window(self) -> tuple[Stmt, ...]:
        """window[i][w][k]: the pixels of a row of tiles, with the border, channels innermost."""
        c, run, lanes = self.c, self.run, self.isa.lanes
        assert isinstance(c.pixel, Load)
        stride = coefficient(c.pixel.index[0], c.k)
        assert stride is not None
        i, w, block, fk = Var("i"), Var("w"), Var("cb"), Axis("fk", index(run))
        left, right, low, high = Var("done"), Var("right"), Var("w0"), Var("w1")
        symbol = microkernels.pack(lanes, self.isa.name)
        self.symbols.append(symbol)
        self.locals.append(
            Local("window", F, index(self.a * self.window_pixels() * run), stack=False)
        )

        def at(column: Expr) -> Expr:
            return (i * self.window_pixels() + column - left) * run

        def filled(start: Expr, stop: Expr) -> Stmt:
            return For(w, start, stop, (
                For(fk, ZERO, fk.extent, (Store("window", at(w) + fk, c.fill),)),
            ))  # fmt: skip

        first = self.first_k() + block * lanes
        source = self.pixel(i, first)
        assert isinstance(source, Load)
        call = Call(
            symbol,
            (
                Address(source.buffer, substitute(source.index[0], {w: low})),
                stride,
                apply("min", index(lanes), c.k.extent - first),
                high - low,
                Address("window", at(low) + block * lanes),
                index(run),
            ),
        )
        # Channels past the last are left as they are: no product reads what is made of them.
        blocks = apply("min", index(run // lanes), ceil_div(c.k.extent - self.first_k(), lanes))
        inside = between(FIRST, i, LAST)
        return (
            Assign(right, self.x1 * self.m + (self.a - self.m)),
            Assign(low, apply("min", apply("max", left, c.columns.low), right)),
            Assign(high, apply("max", low, apply("min", right, c.columns.high))),
            For(i, ZERO, index(self.a), (
                If(
                    inside,
                    (filled(left, low), For(block, ZERO, blocks, (call,)), filled(high, right)),
                    (filled(left, right),),
                ),
            )),
        )  # fmt: skip

    def window_pixels(self) -> int:
        return self.line_pixels + self.a - self.m

    def channel_step(self) -> int:
        """From one transformed line to the next."""
        return self.run if self.windowed else self.step

    def column(
        self, buffer: str, first: Expr, row: Expr, channels: Expr, pixel: Expr | None = None
    ) -> Stmt:
        """The transform of a column of pixels whose rows are `row` apart; with `pixel`, of all new
        columns of a patch, which are so far apart."""
        step, several = self.channel_step(), pixel is not None
        return Call(
            self.transform,
            (
                Address(buffer, first),
                Address(buffer, first + row * 2),
                row,
                pixel if pixel is not None else ZERO,
                Address("lines", HALF if several else SLOT),
                index(step),
                index(self.a * step),
                channels,
                index(self.m if several else 1),
            ),
        )

    def from_window(self) -> Columns:
        """The transforms of columns with all rows read from the window."""
        first = (Var("w") - poly_mul(self.x0, index(self.m))) * self.run
        row, run = index(self.window_pixels() * self.run), index(self.run)
        several = TRUE, self.column("window", first, row, run, run)
        return (self.column("window", first, row, run),), several

    def from_input(self) -> Columns:
        """The transforms of columns with rows read where they are, or from a copy: at the border,
        and where channels are not contiguous or computed."""
        c, a, step, w, i = self.c, self.a, self.step, Var("w"), Var("i")
        k = Axis("ik", c.k.extent)
        column_inside = between(c.columns.low, w, c.columns.high)
        all_inside = apply("logical_and", apply("le", FIRST, 0), apply("le", index(a), LAST))
        self.locals.append(Local("column", F, index(a * step), stack=False))

        def filled(value: Expr) -> tuple[Stmt, ...]:
            return (For(k, ZERO, k.extent, (Store("column", i * step + k, value),)),)

        inside = apply("logical_and", column_inside, between(FIRST, i, LAST))
        copied: tuple[Stmt, ...] = (
            For(i, ZERO, index(a), (If(inside, filled(self.pixel(i, k)), filled(c.fill)),)),
            self.column("column", ZERO, index(step), k.extent),
        )
        first = self.pixel(ZERO, ZERO)
        if not (c.contiguous and isinstance(first, Load)):
            return copied, None
        (at,) = first.index
        below, right = (substitute(at, {v: v + 1}) - at for v in (Var("top"), w))
        direct = (self.column(first.buffer, at, below, k.extent),)
        one = If(apply("logical_and", column_inside, all_inside), direct, copied)
        edge = Var("tx") * self.m + a
        low = apply("le", c.columns.low, Var("done"))
        both = apply("logical_and", low, apply("le", edge, c.columns.high))
        all_inside = apply("logical_and", both, all_inside)
        return (one,), (all_inside, self.column(first.buffer, at, below, k.extent, right))

    def pixel(self, row: Expr, k: Expr) -> Expr:
        """The input at row `row` of the patch, column `w` and channel `k`, inside the border."""
        c = self.c
        table = {c.ph: Var("top") + row, c.pw: Var("w"), c.k: k, **self.image()}
        return substitute(c.pixel, table)


def between(low: Expr, e: Expr, high: Expr) -> Expr:
    return apply("logical_and", apply("le", low, e), apply("lt", e, high))


__all__ = ["Inputs"]
