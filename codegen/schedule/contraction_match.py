"""Recognises sums of products by their structure and sorts their axes by role."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import (
    ONE,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    as_int,
    axes_of,
    fresh_axis,
    loads,
    walk,
)
from onnxjit.codegen.kernel import Stage, product
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    coefficient,
    flatten_stage,
    magnitude,
    merge_axes,
    split_axes,
    typical,
)
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Declined, Request

FEWEST = 4
"""Columns that make a tile worth while."""


LONG = 64
"""Columns that fill the widest tile."""

RUN = 16
"""Channels that make long runs."""

FULLER = 1.04
"""How much longer the products may take so that neither rows nor results are transposed."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """A stage recognised as a contraction, its axes sorted by role.

    With a `prologue`, rows are its values instead of what `x` reads; x then stands for the axes and
    the order in which they lie."""

    stage: FlatStage
    red: Reduce
    x: Load
    y: Load
    batch: tuple[Axis, ...]
    m: tuple[Axis, ...]
    n: tuple[Axis, ...]
    k: tuple[Axis, ...]
    window: Stage | None
    prologue: Expr | None = None


def recognise(r: Request, *, turned: bool = False) -> Contraction:
    """The contraction that a kernel is, or `Declined`. With `turned`, a constant may have the rows
    where that suits the layouts, which passes that still decide on those must not ask for."""
    k = r.kernel
    window: Stage | None = None
    final = k.stages[-1]
    layouts = dict(r.layouts)
    if len(k.stages) == 2 and not k.stages[0].reduces and not k.stages[0].index:
        window = k.stages[0]
        rank = len(window.axes)
        layouts[window.buffer] = (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))
    elif len(k.stages) != 1:
        raise Declined(f"{len(k.stages)} stages")
    if sum(s.buffer == final.buffer for s in k.stages) > 1:
        raise Declined("several stages store the output")
    reds = final.reduces
    if len(reds) != 1 or reds[0].fn != "sum":
        raise Declined("not one sum")
    body = reds[0].body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype == "float32"):
        raise Declined(f"the sum is not over a product of float32 values but {body.dtype}")
    if sum(isinstance(a, Load) for a in body.args) < (2 if window is not None else 1):
        raise Declined("a factor is not a plain read")
    if as_int(product(a.extent for a in reds[0].axes)) == 0:
        raise Declined("nothing is summed")
    if any(as_int(a.extent) == 0 for a in final.axes):
        raise Declined("nothing is stored")
    stage = split_axes(flatten_stage(final, k.types, layouts))
    if not any(isinstance(x, Reduce) for x in walk(stage.value)):
        raise Declined("the sum has one term")
    order = sorted(stage.axes, key=lambda a: stride_of(stage.offset, a), reverse=True)
    if window is None:
        stage, order = merge_axes(stage, order)
    (red,) = [x for x in walk(stage.value) if isinstance(x, Reduce)]
    p, q = red.body.args  # type: ignore[attr-defined]
    computed = next((a for a in (p, q) if not isinstance(a, Load)), None)
    if computed is not None:
        p, q = carrier(computed, (*order, *red.axes), red.axes), q if computed is p else p
    if not isinstance(q, Load):
        raise Declined("a factor is not a plain read")
    in_p, in_q = axes_of(p.index[0]), axes_of(q.index[0])
    inner = order[-1] if order else None
    swap = inner is not None and inner in in_p and inner not in in_q
    fixed = [v.buffer in r.constants for v in (p, q)]
    if computed is not None:
        swap = False
    elif window is not None:
        swap = q.buffer == window.buffer
    elif k.types[final.buffer].rank > 2 and fixed[0] != fixed[1]:
        # The constant has the columns, unless they are too few for a tile or rows suit it better.
        constant, other = (in_p, q) if fixed[0] else (in_q, p)
        rows = few_columns(order, constant, stage.offset) or (
            turned and better_rows(r, order, constant, other, stage.offset)
        )
        swap = fixed[0] != rows
    elif not any(a in in_q and a not in in_p for a in order):
        swap = True
    x, y = (q, p) if swap else (p, q)
    in_x, in_y = (in_q, in_p) if swap else (in_p, in_q)
    for e in (x.index[0], y.index[0], stage.offset):
        for a in (*order, *red.axes):
            if coefficient(e, a) is None:
                raise Declined("an index is not affine")
    if any(isinstance(v, Load) for e in (x.index[0], y.index[0]) for v in walk(e)):
        raise Declined("an operand is read through data")
    others = [v for v in loads(replace_node(stage.value, red, Const(0, red.dtype)))]
    if computed is not None:
        others += loads(computed)
    if any(v.buffer in (y.buffer, window.buffer if window else None) for v in others):
        raise Declined("an operand is read again after the sum")
    m = tuple(a for a in order if a in in_x and a not in in_y)
    n = tuple(a for a in order if a in in_y and a not in in_x)
    batch = tuple(a for a in order if (a in in_x) == (a in in_y))
    if not n and window is not None and y.buffer in r.constants and m:
        # One filter: a tile with one useful column still beats a scalar sum over the window.
        n = (fresh_axis(ONE),)
    if not n:
        raise Declined("no column axis")
    if window is not None and x.buffer != window.buffer:
        raise Declined("the padded operand is the column operand")
    if any(a not in in_x and a not in in_y for a in red.axes):
        raise Declined("a summed axis occurs in no operand")
    width = as_int(column_axis(n, stage.offset).extent)
    if width is not None and width < FEWEST and window is None:
        raise Declined(f"only {width} columns")
    if computed is not None and len(m) not in (1, 2):
        raise Declined("computed rows that do not follow each other, or no rows")
    return Contraction(stage, red, x, y, batch, m, n, red.axes, window, computed)


def windowed(r: Request) -> Request:
    """A request that reads overlapping windows of channels that are not contiguous (a convolution
    of row-major data) through a copy like that of a padded input, which makes runs of k as long as
    the channels from runs of a few taps."""
    k = r.kernel
    reds = k.stages[0].reduces
    if len(k.stages) != 1 or len(reds) != 1 or not isinstance(reds[0].body, Apply):
        return r
    summed = {a for a in reds[0].axes if a.extent is not ONE}
    for x in loads(k.stages[0].value):
        if x.buffer in r.constants or len(x.index) < 3 or x not in reds[0].body.args:
            continue
        channels = axes_of(x.index[1]) & summed
        long = any((as_int(a.extent) or 0) >= RUN for a in channels)
        if not long or len(channels) > 1 or r.strides(x.buffer)[1] is ONE:
            continue
        if any(coefficient(x.index[1], a) is not ONE for a in channels):
            continue
        if any(coefficient(e, a) is None for e in x.index for a in axes_of(e)):
            continue
        taps = summed - channels
        if not any(axes_of(e) & taps and axes_of(e) - summed for e in x.index[2:]):
            continue
        name, kind = f"{x.buffer}_window", k.types[x.buffer]
        axes = tuple(fresh_axis(e) for e in kind.shape)
        copy = Stage(name, axes, Load(x.buffer, axes, x.dtype))
        value = replace_node(k.stages[0].value, x, Load(name, x.index, x.dtype))
        stages = copy, replace(k.stages[0], value=value)
        return replace(r, kernel=replace(k, stages=stages, types={**k.types, name: kind}))
    return r


def carrier(value: Expr, axes: Sequence[Axis], summed: Sequence[Axis]) -> Load:
    """The read that computed rows follow: it depends on all axes that they depend on, and on the
    only summed one contiguously."""
    reads = loads(value)
    if len(summed) != 1 or as_int(summed[0].extent) is None:
        raise Declined("a factor is not a plain read")
    if any(isinstance(x, Reduce) for x in walk(value)) or any(
        coefficient(v.index[0], a) is None for v in reads for a in axes
    ):
        raise Declined("a factor is computed from more than affine reads")
    for v in reads:
        if axes_of(value) <= axes_of(v.index[0]) and coefficient(v.index[0], summed[0]) is ONE:
            return v
    raise Declined("a factor is not a plain read, and no read of it is contiguous along the sum")


def few_columns(order: Sequence[Axis], of: Collection[Axis], offset: Expr) -> bool:
    """Whether a constant over the axes `of` has less than FEWEST columns."""
    columns = [a for a in order if a in of]
    width = as_int(column_axis(columns, offset).extent) if columns else None
    return width is not None and width < FEWEST


def better_rows(
    r: Request, order: Sequence[Axis], of: Collection[Axis], other: Load, offset: Expr
) -> bool:
    """Whether the other operand and the result are contiguous along the rows of a constant over the
    axes `of` (row-major images): panels of those are plain copies, and results need no
    transposition. Not where the panels would be filled much worse."""
    columns, inner = [a for a in order if a in of], order[-1]
    if not columns or inner in of:
        return False
    if any(coefficient(e, inner) is not ONE for e in (other.index[0], offset)):
        return False
    width, length = as_int(column_axis(columns, offset).extent), as_int(inner.extent)
    if width is None or length is None:
        return True
    sizes = ((width, length), (length, width))
    rows, usual = (microkernels.select(m, n, r.target).cycles for m, n in sizes)
    return rows <= FULLER * usual


def stride_of(e: Expr, a: Axis) -> float:
    c = coefficient(e, a)
    return magnitude(c) if c is not None else 0.0


def column_axis(n: Sequence[Axis], offset: Expr) -> Axis:
    """The column axis that register tiles run along: contiguous in the output, or the longest; of
    several that fill any tile, the one with the least stride."""

    def key(a: Axis) -> tuple[bool, int, float]:
        size = typical(a.extent)
        contiguous = coefficient(offset, a) is ONE and size >= 8
        return contiguous, min(size, LONG), -stride_of(offset, a)

    return max(n, key=key)


__all__ = ["Contraction", "column_axis", "recognise", "stride_of", "windowed"]
