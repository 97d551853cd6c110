"""Schedules for stages without reductions: one pass over the output in its storage order."""

from __future__ import annotations

from collections.abc import Sequence

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Expr,
    Var,
    apply,
    as_int,
    axes_of,
    index,
    leaves,
    loads,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import product, rename_axes
from onnxjit.codegen.loops import TILE, Assign, For, If, LoopNest, Stmt, Store, loop
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    ceil_div,
    flatten_stage,
    merge_axes,
    split_axes,
    typical,
)
from onnxjit.codegen.schedule.request import Declined, Request, expressions, sizes_of

BLOCK = 4096
"""Elements of one tile of a flat loop: 16 KB of float32, so that a few streams fit into L1."""

UNROLL = 8
"""Longest innermost loop that is written out."""

LONG = 8
"""Operations that find the places to read from, from which they are worth to be shared."""

SHARED = 8
"""Elements that are read at places found once: as many lines as a set of L1 has, for a plane of an
image is often a multiple of what its sets span (measured on 64 x 64: 2, 4, 8 and 16 of them take
0.83, 0.54, 0.48 and 0.98 of the time of one)."""

GRAIN = 2048
"""Fewest elements that a tile of a nested loop should compute."""


def pointwise(r: Request) -> LoopNest:
    """Every stage is a map (a concatenation has one stage per part); tiles cut the outer axes."""
    k = r.kernel
    if any(s.reduces for s in k.stages):
        raise Declined("the kernel reduces")
    if k.temporaries:
        raise Declined("a stage reads another stage's result")
    parts = []
    for n, s in enumerate(k.stages):
        flat = flatten_stage(s, k.types, r.layouts)
        parts.append(tiled_map(flat, f"i{n}_" if len(k.stages) > 1 else "i"))
    body, tiles = concatenated(parts)
    return finish_nest(r, body, tiles, "pointwise")


def finish_nest(
    r: Request,
    body: tuple[Stmt, ...],
    tiles: Expr,
    rule: str,
    **more: object,
) -> LoopNest:
    used = [*expressions(body), *(x.nbytes for x in more.get("locals", ()))]  # type: ignore[attr-defined]
    if "threads" in more:
        used.append(tiles)  # a CUDA kernel walks its tiles by itself
    if "parts" in more:
        used.append(more["parts"])  # type: ignore[arg-type]
    sizes = sizes_of(used)
    return LoopNest(r.kernel.name, r.params(), sizes, tiles, body, rule=rule, **more)  # type: ignore[arg-type]


def concatenated(parts: Sequence[tuple[tuple[Stmt, ...], Expr]]) -> tuple[tuple[Stmt, ...], Expr]:
    """One tile space for several independent bodies: the first takes the first tiles, and so on."""
    body, total = parts[-1]
    if len(parts) == 1:
        return body, total
    starts: list[Expr] = []
    at: Expr = ZERO
    for _, n in parts:
        starts.append(at)
        at = at + n
    local = Var("part_tile")

    def shifted(n: int) -> tuple[Stmt, ...]:
        b = tuple(rename_statement(s, {TILE: local}) for s in parts[n][0])
        return (Assign(local, TILE - starts[n]), *b)

    out: tuple[Stmt, ...] = shifted(len(parts) - 1)
    for k in range(len(parts) - 2, -1, -1):
        out = (If(apply("lt", TILE, starts[k + 1]), shifted(k), out),)
    return out, at


def rename_statement(s: Stmt, table: dict[Expr, Expr]) -> Stmt:
    from onnxjit.codegen.loops import Address, Barrier, Call

    def sub(e: Expr) -> Expr:
        return substitute(e, table)

    if isinstance(s, For):
        body = tuple(rename_statement(x, table) for x in s.body)
        return For(s.var, sub(s.start), sub(s.stop), body, s.unroll, s.step)
    if isinstance(s, If):
        return If(
            sub(s.cond),
            tuple(rename_statement(x, table) for x in s.then),
            tuple(rename_statement(x, table) for x in s.orelse),
        )
    if isinstance(s, Assign):
        return Assign(s.var, sub(s.value))
    if isinstance(s, Store):
        return Store(s.buffer, sub(s.offset), sub(s.value))
    if isinstance(s, Barrier):
        return s
    args = tuple(
        (a if a.offset is None else Address(a.buffer, sub(a.offset)))
        if isinstance(a, Address)
        else sub(a)
        for a in s.args
    )
    return Call(s.fn, args)


def tiled_map(s: FlatStage, prefix: str = "i") -> tuple[tuple[Stmt, ...], Expr]:
    """The tile body and the number of tiles of one map stage."""
    s = split_axes(s)
    order = by_stride(s.axes, s.offset)
    s, order = merge_axes(s, order)
    names, (offset, value) = rename(order, [s.offset, s.value], prefix)
    if not names:
        return (Store(s.buffer, offset, value),), ONE
    stores: list[Stmt] = [Store(s.buffer, offset, value)]
    short = as_int(names[-1].extent)
    if len(names) > 1 and short is not None and short <= UNROLL:
        # A short innermost loop leaves nothing to vectorise; written out, the next one does.
        points: list[dict[Expr, Expr]] = [{names[-1]: index(k)} for k in range(short)]
        stores = [Store(s.buffer, substitute(offset, p), substitute(value, p)) for p in points]
        names = names[:-1]
    if len(names) == 1:
        return blocked(names[0], *stores)
    shared = sharing_indices(names, value)
    if shared is not None:
        names, stores = innermost_block(names, shared, stores)
    return nested(names, *stores)


def sharing_indices(names: Sequence[Axis], value: Expr) -> int | None:
    """The position of an outer axis all of whose elements are read at the same places, where it
    takes long to find them.

    Places that depend on what is read, in each turn of the innermost loop anew, keep that loop from
    being vectorised; what is computed to find them serves the whole outer axis.
    """
    read = [where for x in loads(value) for where in loads(x.index[0])]
    if not any(names[-1] in axes_of(where) for where in read):
        return None
    for n in range(len(names) - 2, -1, -1):
        if not any(names[n] in axes_of(where) for where in read):
            found = (e for e in walk(value) if isinstance(e, Apply) and names[n] not in leaves(e))
            return n if sum(not {*read}.isdisjoint(loads(e)) for e in found) >= LONG else None
    return None


def innermost_block(
    names: Sequence[Axis], at: int, body: Sequence[Stmt]
) -> tuple[list[Axis], list[Stmt]]:
    """The loops and their body with `SHARED` turns of one of the loops inside of all others."""
    a = names[at]
    count = as_int(a.extent)
    block = Axis(f"{a.name}b", ceil_div(a.extent, SHARED))
    stop: Expr = block * SHARED + SHARED
    if count is None or count % SHARED:
        stop = apply("min", stop, a.extent)
    return [*names[:at], block, *names[at + 1 :]], [For(a, block * SHARED, stop, tuple(body))]


def rename(
    order: Sequence[Axis], exprs: Sequence[Expr], prefix: str
) -> tuple[list[Axis], list[Expr]]:
    """Gives loop axes their canonical names."""
    new = [Axis(f"{prefix}{k}", a.extent) for k, a in enumerate(order)]
    table: dict[Expr, Expr] = dict(zip(order, new, strict=True))
    return new, [rename_axes(e, table) for e in exprs]


def blocked(a: Axis, *body: Stmt) -> tuple[tuple[Stmt, ...], Expr]:
    """A single loop cut into blocks."""
    n = as_int(a.extent)
    if n is not None and n <= BLOCK:
        return (loop(a, *body),), ONE
    start = TILE * BLOCK
    stop = apply("min", start + BLOCK, a.extent)
    return (For(a, start, stop, tuple(body)),), ceil_div(a.extent, BLOCK)


def nested(names: Sequence[Axis], *body: Stmt) -> tuple[tuple[Stmt, ...], Expr]:
    """Outer axes form the tile space until what remains inside is large enough."""
    split = tile_axes(names[:-1], typical(names[-1].extent))
    return with_tiles(names[:split], inner_loops(names[split:], *body))


def tile_axes(outer: Sequence[Axis], work: int) -> int:
    """How many of the outer axes number the tiles: at least one, and no more than leave a tile
    `GRAIN` elements, where all inside of the outer axes is `work` of them."""
    split = len(outer)
    while split > 1 and typical(product(a.extent for a in outer[split:])) * work < GRAIN:
        split -= 1
    return split


def inner_loops(names: Sequence[Axis], *body: Stmt) -> tuple[Stmt, ...]:
    out: tuple[Stmt, ...] = tuple(body)
    for a in reversed(names):
        out = (loop(a, *out),)
    return out


def with_tiles(outer: Sequence[Axis], body: tuple[Stmt, ...]) -> tuple[tuple[Stmt, ...], Expr]:
    """Derives the outer axes from the tile number."""
    tiles = product(a.extent for a in outer)
    sets: list[Stmt] = []
    rest: Expr = TILE
    if len(outer) == 1:
        sets = [Assign(Var(outer[0].name), TILE)]
    else:
        for k in range(len(outer) - 1, -1, -1):
            a = outer[k]
            value = rest if k == 0 else apply("mod", rest, a.extent)
            sets.append(Assign(Var(a.name), value))
            rest = apply("floordiv", rest, a.extent)
    table: dict[Expr, Expr] = {a: Var(a.name) for a in outer}
    return (*sets, *(rename_statement(s, table) for s in body)), tiles


__all__ = ["blocked", "concatenated", "finish_nest", "nested", "pointwise", "tiled_map"]
