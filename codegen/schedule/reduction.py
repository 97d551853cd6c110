"""Schedules for one stage with one reduction that is not a matrix product.

Two loop orders, chosen by which axis is contiguous in memory:

- *scalar*: the reduced axis is contiguous; each output element has one accumulator and LLVM
  vectorises the reduction itself;
- *block*: an output axis is contiguous; a block of outputs is accumulated side by side, so that the
  inner loop is a vector operation. Small constant windows (pooling, depthwise convolution) are
  unrolled where no border condition can fail, and keep a checked loop at the border.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from onnxjit.codegen.expr import (
    FALSE,
    INDEX,
    ONE,
    TRUE,
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
    substitute,
    walk,
)
from onnxjit.codegen.kernel import product
from onnxjit.codegen.loops import Assign, For, If, Local, LoopNest, Stmt, Store, loop
from onnxjit.codegen.scalar_functions import COMBINE, FUNCTIONS, reduction_identity
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    coefficient,
    join_loops,
    magnitude,
    merge_axes,
    typical,
    without,
)
from onnxjit.codegen.schedule.borders import conjuncts, slack
from onnxjit.codegen.schedule.pointwise import (
    finish_nest,
    inner_loops,
    rename,
    tile_axes,
    with_tiles,
)
from onnxjit.codegen.schedule.request import Declined, Request, single_stage

BLOCK = 256
"""Outputs accumulated side by side: 1 KB of float32, a quarter of what L1 gives two streams."""

UNROLL = 32
"""Largest constant window that is written out."""

RUN = 8
"""Contiguous elements from which a reduction along them is vectors: the 3 columns of a window of
many channels are none (64 x 64 channels of 56 x 56 integers, 3 x 3: 12 ms for 107)."""

STEPS = 4
"""Largest distance of neighbouring outputs' reads that still makes vectors worth while."""


def identity(fn: str, dtype: str) -> Const:
    return Const(reduction_identity(fn, dtype), dtype)


def combine(fn: str, a: Expr, b: Expr) -> Expr:
    return apply(COMBINE[fn], a, b)


def reduction(r: Request) -> LoopNest:
    """A single stage with exactly one reduction."""
    s = single_stage(r)
    found = [x for x in walk(s.value) if isinstance(x, Reduce)]
    if len(found) != 1:
        raise Declined(f"{len(found)} reductions in one stage")
    red = found[0]
    order = by_stride(s.axes, s.offset)
    lane = lane_axis(s, red, order)
    if lane is None:
        return scalar(r, s, order)
    return block(r, s, order, lane)


def unit_stride(offsets: Sequence[Expr], a: Axis) -> bool:
    return any(coefficient(o, a) is ONE for o in offsets)


def lane_axis(s: FlatStage, red: Reduce, order: Sequence[Axis]) -> Axis | None:
    """The output axis to vectorise over, or None when the reduced axis is the contiguous one."""
    reads = [x.index[0] for x in loads(red.body)]
    if not order:
        return None
    last = order[-1]
    if any(unit_stride(reads, a) for a in red.axes):
        near = any((as_int(coefficient(o, last) or ZERO) or STEPS + 1) <= STEPS for o in reads)
        if not near or (as_int(last.extent) or 64) < 8:
            return None
        small = as_int(product(a.extent for a in red.axes))
        runs = [as_int(a.extent) or RUN for a in red.axes if unit_stride(reads, a)]
        return last if (small is not None and small <= UNROLL) or max(runs) < RUN else None
    candidates = [a for a in s.axes if unit_stride(reads, a)]
    return candidates[0] if candidates else last


def ordered_reduction(red: Reduce) -> list[Axis]:
    """Reduced axes from the largest read stride to the smallest."""
    reads = [x.index[0] for x in loads(red.body)]

    def key(a: Axis) -> float:
        costs = [magnitude(c) for o in reads if (c := coefficient(o, a)) is not None]
        return -max(costs, default=0.0)

    return sorted(red.axes, key=key)


def scalar(r: Request, s: FlatStage, order: list[Axis]) -> LoopNest:
    """One accumulator per output element, outer loops over outputs."""
    (red,) = [x for x in walk(s.value) if isinstance(x, Reduce)]
    raxes = ordered_reduction(red)
    names, (offset, value) = rename([*order, *raxes], [s.offset, s.value], "i")
    (red,) = [x for x in walk(value) if isinstance(x, Reduce)]
    inner = names[len(order) :]
    stmts, result = accumulate(red, inner)
    final = replace_node(value, red, result)
    outer = names[: len(order)]
    split = tile_axes(outer, typical(product(a.extent for a in inner)))
    body: tuple[Stmt, ...]
    if split < len(outer) and red.dtype == r.kernel.types[s.buffer].dtype and costly(final):
        # The sums first: the function of them is then a loop of its own, which vectorises.
        body = inner_loops(outer[split:], *stmts, Store(s.buffer, offset, result))
        again = replace_node(value, red, Load(s.buffer, (offset,), red.dtype))
        flat, rest = merge_axes(FlatStage(s.buffer, tuple(outer), offset, again), outer[split:])
        rest, (offset, again) = rename(rest, [flat.offset, flat.value], "j")
        body = (*body, *inner_loops(rest, Store(s.buffer, offset, again)))
    else:
        body = inner_loops(outer[split:], *stmts, Store(s.buffer, offset, final))
    nest, tiles = with_tiles(outer[:split], body)
    return finish_nest(r, nest, tiles, "reduction: scalar accumulators")


COSTLY = 15
"""Functions from this cost on (exp, sigmoid, …) are worth a second pass over results in L1."""


def costly(e: Expr) -> bool:
    return any(isinstance(x, Apply) and FUNCTIONS[x.fn].cost >= COSTLY for x in walk(e))


def replace_node(e: Expr, node: Expr, by: Expr) -> Expr:
    from onnxjit.codegen.expr import rebuild

    memo: dict[Expr, Expr] = {node: by}

    def go(x: Expr) -> Expr:
        done = memo.get(x)
        if done is None:
            done = memo[x] = rebuild(x, go)
        return done

    return go(e)


def accumulate(red: Reduce, order: Sequence[Axis], name: str = "acc") -> tuple[list[Stmt], Var]:
    """Statements that leave the reduction in a scalar.

    Reduced axes that lie side by side are one loop: what a vector loop leaves over is then left
    over once, not in each row (the sums of 64 planes of 56 x 56: 12 µs for 63).
    """
    acc = Var(name, red.dtype)
    order, _, joined = join_loops(order, ZERO, red.body)
    red = Reduce(red.fn, red.axes if not order else tuple(order), joined)
    step: Stmt = Assign(acc, combine(red.fn, acc, red.body))
    guard, body = guarded(red)
    if guard is not None:
        step = If(guard, (Assign(acc, combine(red.fn, acc, body)),))
    out: tuple[Stmt, ...] = (step,)
    for a in reversed(order):
        out = (loop(a, *out),)
    return [Assign(acc, identity(red.fn, red.dtype)), *out], acc


def guarded(red: Reduce) -> tuple[Expr | None, Expr]:
    """Splits a body `select(c, x, identity)` into its condition and `x`."""
    b = red.body
    if isinstance(b, Apply) and b.fn == "select" and b.args[2] is identity(red.fn, red.dtype):
        if not loads(b.args[0]):
            return b.args[0], b.args[1]
    if red.fn == "sum" and isinstance(b, Apply) and b.fn == "mul":
        for k in (0, 1):
            x = b.args[k]
            if (
                isinstance(x, Apply)
                and x.fn == "select"
                and isinstance(x.args[2], Const)
                and x.args[2].value == 0
                and not loads(x.args[0])
            ):
                # 0 * y is 0 for finite y only; padding that meets an infinite weight is no
                # defined result, and skipping it is what every other engine computes.
                other = b.args[1 - k]
                pair = (x.args[1], other) if k == 0 else (other, x.args[1])
                return x.args[0], apply("mul", *pair)
    return None, b


def block(r: Request, s: FlatStage, order: list[Axis], lane: Axis) -> LoopNest:
    """A block of outputs along `lane` at a time."""
    (red,) = [x for x in walk(s.value) if isinstance(x, Reduce)]
    outer_axes = [a for a in order if a is not lane]
    raxes = ordered_reduction(red)
    s, outer_axes = merge_axes(s, outer_axes)
    names, (offset, value) = rename([*outer_axes, lane, *raxes], [s.offset, s.value], "i")
    (red,) = [x for x in walk(value) if isinstance(x, Reduce)]
    outer = names[: len(outer_axes)]
    c = names[len(outer_axes)]
    raxes = names[len(outer_axes) + 1 :]
    guard, body = guarded(red)
    window = as_int(product(a.extent for a in raxes))
    hoisted = guard is None or c not in axes_of(guard)
    straight = window is not None and window <= UNROLL and hoisted
    lane_extent = as_int(c.extent)
    width = BLOCK if lane_extent is None else min(lane_extent, BLOCK)
    acc = Local("acc", red.dtype, index(width))

    start = Var("c0")
    whole = lane_extent is not None and lane_extent <= BLOCK
    count: Expr = c.extent if whole else apply("min", BLOCK, c.extent - start)
    base: Expr = index(0) if whole else start
    v = Var(c.name)
    table: dict[Expr, Expr] = {c: base + v}

    def lanes(*stmts: Stmt) -> For:
        return For(v, index(0), count, tuple(stmts))

    load_acc = _local(acc, v)
    update = Store("acc", v, combine(red.fn, load_acc, substitute(body, table)))
    reduced: tuple[Stmt, ...] = (lanes(update),)
    if guard is not None:
        outside, low, high, rest = lane_bounds(guard, c)
        if rest is not TRUE:
            reduced = (lanes(If(substitute(guard, table), (update,))),)
        elif not hoisted:
            first = apply("max", low - base, 0)
            reduced = (For(v, first, apply("min", high - base, count), (update,)),)
        if outside is not TRUE:
            reduced = (If(outside, reduced),)
    for a in reversed(raxes):
        reduced = (loop(a, *reduced),)
    offset = substitute(offset, table)
    result = substitute(replace_node(value, red, Var("acc_value", red.dtype)), table)
    result = substitute(result, {Var("acc_value", red.dtype): load_acc})
    final = Store(s.buffer, offset, result)
    general: tuple[Stmt, ...] = (
        lanes(Store("acc", v, identity(red.fn, red.dtype))),
        *reduced,
        lanes(final),
    )
    locals_: tuple[Local, ...] = (acc,)
    if straight:
        general, needs_acc = unrolled(
            red, raxes, guard, body, value, table, offset, lanes, s.buffer, general
        )
        locals_ = (acc,) if needs_acc else ()
    if not whole:
        blocks = (c.extent + (BLOCK - 1)) // BLOCK
        ax = Axis("cb", blocks)
        general = (Assign(start, ax * BLOCK), *general)
        outer = [*outer, ax]
    work = typical(product(a.extent for a in raxes)) * (lane_extent or BLOCK)
    split = tile_axes(outer, work)
    nest, tiles = with_tiles(outer[:split], inner_loops(outer[split:], *general))
    return finish_nest(r, nest, tiles, "reduction: blocks of outputs", locals=locals_)


def lane_bounds(guard: Expr, c: Axis) -> tuple[Expr, Expr, Expr, Expr]:
    """A border condition as what `c` is not in, bounds low <= c < high, and what is neither."""
    outside: Expr = TRUE
    rest: Expr = TRUE
    low: Expr = ZERO
    high: Expr = c.extent
    for e in conjuncts(guard):
        if c not in axes_of(e):
            outside = apply("logical_and", outside, e)
            continue
        room = slack(e)
        if room is not None and room.dtype != INDEX:
            room = None
        step = as_int(coefficient(room, c) or ZERO) if room is not None else 0
        if room is None or not step:
            rest = apply("logical_and", rest, e)
        elif step > 0:
            low = apply("max", low, apply("floordiv", step - 1 - without(room, [c]), step))
        else:
            high = apply("min", high, apply("floordiv", without(room, [c]), -step) + 1)
    return outside, low, high, rest


def _local(acc: Local, at: Expr) -> Expr:
    return Load(acc.buffer, (at,), acc.dtype)


def unrolled(
    red: Reduce,
    raxes: Sequence[Axis],
    guard: Expr | None,
    body: Expr,
    value: Expr,
    table: dict[Expr, Expr],
    offset: Expr,
    lanes: object,
    buffer: str,
    general: tuple[Stmt, ...],
) -> tuple[tuple[Stmt, ...], bool]:
    """The window written out as one expression, used where every tap is inside."""
    total, inside = written_out(red, raxes, guard, body)
    if inside is FALSE:
        return general, True
    result = substitute(replace_node(value, red, total), table)
    fast: tuple[Stmt, ...] = (lanes(Store(buffer, offset, result)),)  # type: ignore[operator]
    if inside is TRUE:
        return fast, False
    return (If(inside, fast, general),), True


def written_out(
    red: Reduce, axes: Sequence[Axis], guard: Expr | None, body: Expr
) -> tuple[Expr, Expr]:
    """`body` joined over axes of constant extents as one expression, and the condition under which
    `guard` holds for all of it."""
    total: Expr | None = None
    inside: Expr = TRUE
    for point in itertools.product(*(range(as_int(a.extent) or 0) for a in axes)):
        at: dict[Expr, Expr] = {a: index(p) for a, p in zip(axes, point, strict=True)}
        one = substitute(body, at)
        total = one if total is None else combine(red.fn, total, one)
        if guard is not None:
            inside = apply("logical_and", inside, substitute(guard, at))
    return identity(red.fn, red.dtype) if total is None else total, strongest(inside)


def strongest(cond: Expr) -> Expr:
    """Drops conjuncts that others imply: of `0 <= x + c` only the least c matters, and so on."""
    from onnxjit.codegen.expr import poly_terms

    best: dict[Expr, tuple[int, Expr]] = {}
    rest: list[Expr] = []
    for p in conjuncts(cond):
        room = slack(p)
        if room is None:
            rest.append(p)
            continue
        # The smallest constant in what must not be negative decides.
        constant = poly_terms(room).get((), 0)
        key = room - constant
        if key not in best or constant < best[key][0]:
            best[key] = (constant, p)
    out: Expr = TRUE
    for p in [*rest, *(b[1] for b in best.values())]:
        out = apply("logical_and", out, p)
    return out


__all__ = ["accumulate", "combine", "identity", "reduction", "replace_node"]
