"""Recognises attention: softmax over the scores of queries and keys, then a weighted sum of values.

The stages, in the order of a kernel: scores (a sum of products with any elementwise tail: scale,
biases, masks), their row maximum, `exp(score - maximum)`, its row sum, the quotient, and the sum of
products with the values. Everything is expressed in the axes of the last stage, by following the
index with which each stage reads the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    as_int,
    axes_of,
    loads,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Stage, inline, product
from onnxjit.codegen.schedule.axes import coefficient, drop_unit, flat_offset, flatten_loads
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Declined, Request

SCORE = Var("scalar_score", "float32")
"""Stands for the sum of products in the expression of a score."""

WEIGHTED = Var("scalar_weighted", "float32")
"""Stands for the weighted sum of values in the expression of an output element."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One element of the output per (batch, row, column); all offsets are flat.

    `score` and `result` are the elementwise tails of the two products, over `SCORE` and
    `WEIGHTED`. `row` is None where there is one query. Shares are 0 in rows where `empty` holds,
    and with `no_nan` where they would be NaN (a row of -inf, which sees no key).
    """

    batch: tuple[Axis, ...]
    row: Axis | None
    column: Axis
    key: Axis
    depth: Axis
    query: Load
    keys: Load
    values: Load
    score: Expr
    result: Expr
    buffer: str
    offset: Expr
    no_nan: bool
    empty: Expr | None


def recognise(r: Request) -> Attention:
    """The attention that a kernel is, or `Declined`."""
    k = r.kernel
    stages = {s.buffer: s for s in k.stages}
    if len(k.stages) < 6 or len(stages) != len(k.stages) or any(s.index for s in k.stages[:-1]):
        raise Declined(f"{len(k.stages)} stages")
    final = k.stages[-1]
    gone: dict[Expr, Expr] = {a: ZERO for a in final.axes if a.extent is ONE}
    value = substitute(drop_unit(final.value), gone)
    weighted, (first, second) = product_of(value)
    share, values = (first, second) if first.buffer in stages else (second, first)
    if share.buffer not in stages or values.buffer in stages or len(weighted.axes) != 1:
        raise Declined("the last stage sums no product of a share and a value")
    (key,) = weighted.axes
    where = [p for p, i in enumerate(share.index) if i is key]
    if len(where) != 1 or any(key in axes_of(i) for i in share.index if i is not key):
        raise Declined("the share is not read along one axis")
    scores, no_nan, empty = softmax(stages, stages[share.buffer], where[0])
    table: dict[Expr, Expr] = dict(zip(scores.axes, share.index, strict=True))
    if empty is not None:
        own: dict[Expr, Expr] = dict(zip(stages[share.buffer].axes, share.index, strict=True))
        empty = flatten_loads(substitute(empty, own), k.types, r.layouts)
    score, (query, keys) = product_of(substitute(drop_unit(scores.value), table))
    if len(score.axes) != 1:
        raise Declined("scores sum over several axes")
    (depth,) = score.axes

    def flat(x: Load) -> Load:
        at = flat_offset(x.index, k.types[x.buffer], r.layouts.get(x.buffer))
        return Load(x.buffer, (at,), x.dtype)

    query, keys, values = flat(query), flat(keys), flat(values)
    if key not in axes_of(keys.index[0]):
        query, keys = keys, query
    rows = [i for p, i in enumerate(share.index) if p != where[0]]
    shared = axes_of(keys.index[0]) | axes_of(values.index[0])
    plain = [i for i in rows if isinstance(i, Axis) and i not in shared]
    row = plain[-1] if plain else None
    live = [a for a in final.axes if a.extent is not ONE]
    used = {a for i in rows for a in axes_of(i)}
    columns = [a for a in live if a not in used]
    batch = tuple(a for a in live if a in used and a is not row)
    if len(columns) != 1 or columns[0] not in axes_of(values.index[0]):
        raise Declined("not one column axis")
    if product(a.extent for a in live if a in used) is not product(
        d for p, d in enumerate(k.types[scores.buffer].shape) if p != where[0]
    ):
        raise Declined("a row of shares is used more than once")
    (column,) = columns
    check_affine(query, keys, values, row, key, depth, column)
    return Attention(
        batch, row, column, key, depth, query, keys, values,
        tail(substitute(drop_unit(scores.value), table), score, SCORE, r),
        tail(value, weighted, WEIGHTED, r),
        final.buffer,
        substitute(flat_offset(final.store, k.types[final.buffer], r.layouts.get(final.buffer),
                               False), gone),
        no_nan,
        empty,
    )  # fmt: skip


def check_affine(
    query: Load, keys: Load, values: Load, row: Axis | None, key: Axis, depth: Axis, column: Axis
) -> None:
    q, k, v = query.index[0], keys.index[0], values.index[0]
    if key in axes_of(q) or any(loads(e) for e in (q, k, v)):
        raise Declined("scores are no product of queries and keys")
    steps = [coefficient(q, depth), coefficient(k, key), coefficient(k, depth)]
    steps += [coefficient(v, key), coefficient(v, column)]
    if row is not None:
        steps.append(coefficient(q, row))
    if any(s is None for s in steps):
        raise Declined("an index is not affine")
    if not as_int(depth.extent) or not as_int(column.extent) or as_int(key.extent) == 0:
        raise Declined("head sizes are not constant, or there is no key")


def product_of(value: Expr) -> tuple[Reduce, tuple[Load, Load]]:
    """The only reduction of an expression, a float32 sum of products, and its two factors."""
    reds = [x for x in walk(value) if isinstance(x, Reduce)]
    if len(reds) != 1 or reds[0].fn != "sum":
        raise Declined("not one sum")
    body = reds[0].body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype == "float32"):
        raise Declined("the sum is not over a product of float32 values")
    a, b = body.args
    if not (isinstance(a, Load) and isinstance(b, Load)):
        raise Declined("a factor is not a plain read")
    return reds[0], (a, b)


def softmax(stages: dict[str, Stage], share: Stage, axis: int) -> tuple[Stage, bool, Expr | None]:
    """The stage of the scores whose softmax along `axis` is `share`, whether a NaN becomes 0, and
    the condition (over the axes of `share`) of rows that are 0."""
    value, no_nan = share.value, False
    empty: Expr | None = None
    if isinstance(value, Apply) and value.fn == "select":
        test, zero, value = value.args
        if not (isinstance(zero, Const) and zero.value == 0):
            raise Declined("shares are changed after the softmax")
        no_nan = isinstance(test, Apply) and test.fn == "isnan" and test.args == (value,)
        if not no_nan:
            empty = test
            if share.axes[axis] in axes_of(test) or {x.buffer for x in loads(test)} & {*stages}:
                raise Declined("shares are changed after the softmax")
    part, total = arguments(value, "div")
    e = own_stage(stages, part, share.axes)
    own_total = reduced(stages, total, share.axes, axis, "sum", e.buffer)
    (difference,) = arguments(e.value, "exp")
    read, highest = arguments(difference, "sub")
    scores = own_stage(stages, read, e.axes)
    own_highest = reduced(stages, highest, e.axes, axis, "max", scores.buffer)
    left = [s for b, s in stages.items() if b not in {share.buffer, e.buffer, own_total,
                                                      own_highest, scores.buffer}][:-1]  # fmt: skip
    return with_maps(stages, scores, left), no_nan, empty


def with_maps(stages: dict[str, Stage], scores: Stage, left: Sequence[Stage]) -> Stage:
    """The scores with elementwise stages before them written into their expression."""
    for _ in range(len(left)):
        made = [x for x in loads(scores.value) if x.buffer in stages]
        if scores.reduces or len(made) != 1:
            break
        before = own_stage(stages, made[0], scores.axes)
        scores = Stage(scores.buffer, scores.axes, inline(scores.value, before))
        left = [s for s in left if s is not before]
    if left or not scores.reduces:
        raise Declined("a stage between the scores and their softmax")
    return scores


def arguments(e: Expr, fn: str) -> tuple[Expr, ...]:
    if not (isinstance(e, Apply) and e.fn == fn and e.dtype == "float32"):
        raise Declined(f"no softmax: {fn} is missing")
    return e.args


def same_point(index: Sequence[Expr], axes: Sequence[Axis]) -> bool:
    """Whether an index is the reader's own position."""
    return len(index) == len(axes) and all(
        i is a or (i is ZERO and a.extent is ONE) for i, a in zip(index, axes, strict=True)
    )


def own_stage(stages: dict[str, Stage], x: Expr, axes: Sequence[Axis]) -> Stage:
    """The stage that `x` reads at the reader's own position."""
    if not (isinstance(x, Load) and x.buffer in stages and same_point(x.index, axes)):
        raise Declined("no softmax: a stage is not read element by element")
    return stages[x.buffer]


def reduced(
    stages: dict[str, Stage], x: Expr, axes: Sequence[Axis], axis: int, fn: str, of: str
) -> str:
    """The buffer that `x` reads, which reduces all of `of` along `axis` with `fn`."""
    if not (isinstance(x, Load) and x.buffer in stages):
        raise Declined(f"no softmax: no {fn} of a row")
    s = stages[x.buffer]
    kept = len(s.axes) == len(axes) and s.axes[axis].extent is ONE
    at = x.index[:axis] + x.index[axis + kept :]
    rest = s.axes[:axis] + s.axes[axis + kept :]
    red = s.value
    if not (isinstance(red, Reduce) and red.fn == fn and len(red.axes) == 1):
        raise Declined(f"no softmax: no {fn} of a row")
    if not same_point(at, [a for p, a in enumerate(axes) if p != axis]):
        raise Declined(f"no softmax: the {fn} of another row")
    whole = [*rest[:axis], red.axes[0], *rest[axis:]]
    if not (isinstance(red.body, Load) and red.body.buffer == of):
        raise Declined(f"no softmax: the {fn} is of something else")
    if not same_point(red.body.index, whole):
        raise Declined("no softmax: a row is not reduced in order")
    return s.buffer


def tail(value: Expr, red: Reduce, stand_in: Var, r: Request) -> Expr:
    """`value` over flat reads, with the sum replaced."""
    e = replace_node(value, red, stand_in)
    if any(isinstance(x, Reduce) for x in walk(e)):
        raise Declined("a second sum")
    return flatten_loads(e, r.kernel.types, r.layouts)


__all__ = ["SCORE", "WEIGHTED", "Attention", "recognise"]
