"""The input transform of minimal filtering: patches of pixels become rows of products."""

from __future__ import annotations

from collections.abc import Callable

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import ZERO, Axis, Expr, Load, Var, apply, index, poly_mul, substitute
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Local, Stmt, Store
from onnxjit.codegen.schedule.axes import ceil_div, coefficient
from onnxjit.codegen.schedule.winograd_tiles import F, Tiles

FIRST, LAST = Var("vfirst"), Var("vlast")
"""The rows of a patch that are inside the input: from one up to the other."""


class Inputs(Tiles):
    """The input half of `WinogradNest`."""

    def input_transform(self) -> tuple[Stmt, ...]:
        """inputs[e][t][k]: element e of the transformed patch of the block's tile t.

        `lines` keeps 2 m columns, transformed once: column w is at w % (2 m), so that a patch is
        the m columns of one half and the first two of the other.
        """
        c, m, a = self.c, self.m, self.a
        step = self.run if self.windowed else self.step
        tx, w, i = Var("tx"), Var("w"), Var("i")
        ty, top, t, done = Var("ty"), Var("top"), Var("t"), Var("done")
        k = Axis("ik", index(self.run) if self.windowed else c.k.extent)
        slot = Var("slot")

        def vertical(lines: list[Expr], *setup: Stmt) -> Stmt:
            body = self.line("o", lines, self.alg.inputs, "lines", slot + k, step)
            return For(k, ZERO, k.extent, (*setup, *body))

        copy: tuple[Stmt, ...] = ()
        if self.windowed:
            copy, columns = self.copy_window(), self.from_window(vertical, k)
        else:
            columns = self.from_input(vertical, k)
        half = m * a * step
        columns = (Assign(slot, poly_mul(apply("mod", w, 2 * m), index(a * step))), *columns)

        kp = Axis("ip", index(self.run))
        near, far = Var("near"), Var("far")
        lines: list[Expr] = [near + j * (a * step) for j in range(m)]
        lines += [far + j * (a * step) for j in range(a - m)]
        edge, first_k = tx * m + a, self.first_k()
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
                    For(w, done, edge, columns),
                    Assign(done, edge),
                    Assign(Var("half"), poly_mul(apply("mod", tx, 2), index(half))),
                    For(i, ZERO, index(a), (
                        For(kp, ZERO, kp.extent, (
                            Assign(near, Var("half") + i * step + kp),
                            Assign(far, half + i * step + kp - Var("half")),
                            *self.line(
                                "o", [Load("lines", (e,), F) for e in lines], self.alg.inputs,
                                "inputs", i * (a * self.plane) + t * self.step + first_k + kp,
                                self.plane,
                            ),
                        )),
                    )),
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

    def from_window(self, vertical: Callable[..., Stmt], k: Axis) -> tuple[Stmt, ...]:
        """The column's transform with all rows read from the window."""
        start, near = Var("source"), Var("near")
        row = self.window_pixels() * self.run
        reads = [Load("window", (near + n * row,), F) for n in range(self.a)]
        column = Var("w") - poly_mul(self.x0, index(self.m))
        return Assign(start, column * self.run), vertical(reads, Assign(near, start + k))

    def from_input(self, vertical: Callable[..., Stmt], k: Axis) -> tuple[Stmt, ...]:
        """The column's transform with rows read where they are, or from a copy at the border."""
        c, a, step, w, i = self.c, self.a, self.step, Var("w"), Var("i")
        column_inside = between(c.columns.low, w, c.columns.high)
        all_inside = apply("logical_and", apply("le", FIRST, 0), apply("le", index(a), LAST))
        self.locals.append(Local("column", F, index(a * step), stack=False))

        def filled(value: Expr) -> tuple[Stmt, ...]:
            return (For(k, ZERO, k.extent, (Store("column", i * step + k, value),)),)

        inside = apply("logical_and", column_inside, between(FIRST, i, LAST))
        copied: tuple[Stmt, ...] = (
            For(i, ZERO, index(a), (If(inside, filled(self.pixel(i, k)), filled(c.fill)),)),
            vertical([Load("column", (k + n * step,), F) for n in range(a)]),
        )
        if not c.contiguous:
            return copied
        direct = self.direct(vertical, k)
        return (If(apply("logical_and", column_inside, all_inside), direct, copied),)

    def pixel(self, row: Expr, k: Expr) -> Expr:
        """The input at row `row` of the patch, column `w` and channel `k`, inside the border."""
        c = self.c
        table = {c.ph: Var("top") + row, c.pw: Var("w"), c.k: k, **self.image()}
        return substitute(c.pixel, table)

    def direct(self, vertical: Callable[..., Stmt], k: Axis) -> tuple[Stmt, ...]:
        """The column's transform with all rows read in place."""
        pixels = [self.pixel(index(n), k) for n in range(self.a)]
        first = pixels[0]
        if not isinstance(first, Load):
            return (vertical(pixels),)
        start, near = Var("source"), Var("near")
        reads: list[Expr] = []
        for p in pixels:
            assert isinstance(p, Load)
            reads.append(Load(p.buffer, (near + (p.index[0] - first.index[0]),), F))
        at = substitute(first.index[0], {k: ZERO})
        return Assign(start, at), vertical(reads, Assign(near, start + k))


def between(low: Expr, e: Expr, high: Expr) -> Expr:
    return apply("logical_and", apply("le", low, e), apply("lt", e, high))


__all__ = ["Inputs"]
