"""The register tile of a product: the cheapest by estimate, or the one that a variant says; its
call, and the columns and rows of what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import Expr, Var, apply, as_int, index, poly_mul
from onnxjit.codegen.loops import Address, Call, If, Stmt
from onnxjit.codegen.microkernels import Cover
from onnxjit.codegen.schedule.axes import ceil_div
from onnxjit.codegen.schedule.request import Request

LINE = 16
"""Elements of a cache line."""

SHARERS = 4
"""Tiles that together prefetch a block of a panel."""

HEIGHTS = 3
"""Heights of a tile of one width that are offered, the cheapest ones by estimate."""

SLOWER = 1.15
"""How much longer the products alone may take for the sake of the result."""

BLOCK = 256
PIECE = 45.0
"""Cycles that it takes to go on to another row of a result that does not stay in L2, for each block
of so many bytes that is touched. Fitted on Cascade Lake to convolutions of 64 and 96 channels:
without other operands of the result's size 43 and 57, with one 108."""


def register_tile(
    r: Request, m: int | None, n: int | None, depth: int = 1, streams: int = 0
) -> Cover:
    """A cover of m x n (None: known at run time only).

    depth: about the length of k. streams: how many buffers of the result's size, itself among them,
    pass by because they do not fit in L2.
    """

    def cycles(c: Cover) -> float:
        rows = 1 if m is None else m
        pieces = rows * (1 / c.nr if c.panels is None else c.panels)
        # Pieces that do not divide a block begin in the middle of one now and then.
        blocks = pieces if BLOCK % (4 * c.nr) == 0 else 1.5 * pieces
        return c.cycles * depth + PIECE * streams * blocks

    if n is None or n * 4 % BLOCK:
        streams = 0  # rows begin anywhere in a block
    covers = list(microkernels.covers(m, n, r.target))
    fast = [c for c in covers if c.cycles <= SLOWER * covers[0].cycles]
    covers = [*sorted(fast, key=cycles), *covers[len(fast) :]]
    nr = r.choice("tile_columns", covers[0].nr, sorted({c.nr for c in covers}))
    covers = [c for c in covers if c.nr == nr]
    heights = [c.main.mr for c in covers[:HEIGHTS]]
    mr = r.choice("tile_rows", heights[0], heights)
    return next(c for c in covers if c.main.mr == mr)


def tile_call(
    cover: Cover, arguments: tuple[Expr | Address, ...], rows: Expr, symbols: Sequence[str]
) -> tuple[Stmt, ...]:
    """The micro-kernel call for the `rows` rows of a tile: for all of them, or for what is left at
    the end. `symbols` are those of the cover's main tile and its tail."""
    if cover.main.any_rows:
        return (Call(symbols[0], (*arguments, rows)),)
    if cover.tail is None:
        return (Call(symbols[0], arguments),)
    full = apply("eq", rows, cover.main.mr)
    return (If(full, (Call(symbols[0], arguments),), (Call(symbols[1], arguments),)),)


def tile_symbols(cover: Cover) -> list[str]:
    """The symbols of a cover's main tile, and of its tail if there is one."""
    return [t.symbol for t in (cover.main, cover.tail) if t is not None]


def ahead(nr: int, steps: Expr, tile: Expr) -> Expr:
    """Where the `tile`-th of the tiles that share a block of a panel prefetches, in elements from
    its begin on: its share of the block behind that."""
    share = apply("floordiv", steps, index(SHARERS)) * nr
    return steps * nr + apply("mod", tile, index(SHARERS)) * share


def panel_columns(n: Expr, nr: int, loops_: Callable[[Expr], tuple[Stmt, ...]]) -> tuple[Stmt, ...]:
    """`loops_` over the columns of the panel `panel`, of which the last may have fewer than nr of
    all n."""
    fixed = as_int(n)
    if fixed is None:
        # A constant number of columns where there are as many: it decides the vector width.
        left = n - poly_mul(Var("panel"), index(nr))
        return (If(apply("le", index(nr), left), loops_(index(nr)), loops_(left)),)
    whole, rest = divmod(fixed, nr)
    if not rest:
        return loops_(index(nr))
    if not whole:
        return loops_(index(rest))
    return (If(apply("lt", Var("panel"), whole), loops_(index(nr)), loops_(index(rest))),)


def odd_lines(elements: Expr) -> Expr:
    """At least so many elements, in an odd number of cache lines: columns that far apart do not
    share a set of L1."""
    return ceil_div(elements, 2 * LINE) * (2 * LINE) + LINE


__all__ = [
    "LINE", "ahead", "odd_lines", "panel_columns", "register_tile", "tile_call", "tile_symbols",
]  # fmt: skip
