"""Recognises 3x3 correlations with stride 1 over channels by the indices of their operands."""

from __future__ import annotations

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
    apply,
    as_int,
    axes_of,
    index,
    loads,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Stage
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    coefficient,
    flatten_loads,
    flatten_stage,
    without,
)
from onnxjit.codegen.schedule.borders import conjuncts, loop_bound
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Declined, Request

TAPS = 3


@dataclass(frozen=True, slots=True)
class Range:
    """Coordinates of the padded input, along one side, that are inside the input."""

    low: Expr
    high: Expr


@dataclass(frozen=True, slots=True)
class Correlation:
    """out[batch, n, row, column] = epilogue(sum over k of filter * input[row + i, column + j]).

    `pixel` is the input at (batch, k, ph, pw) where both coordinates are in their ranges; outside
    it is `fill`. `total` stands for the sum in `stage.value`. `weights` are the filter's buffer and
    offset and (extent, stride) of its columns, k and the taps.
    """

    stage: FlatStage
    total: Reduce
    batch: Axis | None
    n: Axis
    row: Axis
    column: Axis
    k: Axis
    ph: Axis
    pw: Axis
    pixel: Expr
    fill: Expr
    rows: Range
    columns: Range
    contiguous: bool
    weights: tuple[str, int, tuple[int, int], tuple[tuple[int, int], ...]]


def correlation(r: Request) -> Correlation:
    """The correlation that a kernel is, or `Declined`."""
    final, window = stages_of(r)
    red, x, w = factors(r, final)
    if window is not None and x.buffer != window.buffer:
        raise Declined("the padded operand is not the input")
    if len(red.axes) != 3 or len(x.index) != 4:
        raise Declined("no sum over two taps and a channel")
    row, column = (spatial(e, final, red) for e in x.index[2:])
    if row is None or column is None:
        raise Declined("no 3x3 window with stride 1")
    (o_h, t_h), (o_w, t_w) = row, column
    (k,) = [a for a in red.axes if a not in (t_h, t_w)] if t_h is not t_w else (None,)
    if k is None or k not in axes_of(x.index[1]) or axes_of(x.index[1]) != {k}:
        raise Declined("the channel is not one summed axis")
    batch = axes_of(x.index[0])
    if len(batch) > 1 or not batch <= set(final.axes):
        raise Declined("the batch is not one axis")
    rest = [a for a in final.axes if a.extent is not ONE and a not in {o_h, o_w, *batch}]
    if len(rest) != 1 or rest[0] in axes_of(x):
        raise Declined("not one axis of output channels")
    weights = filter_strides(r, w, rest[0], (k, t_h, t_w))

    ph, pw = Axis("ph", o_h.extent + (TAPS - 1)), Axis("pw", o_w.extent + (TAPS - 1))
    read: Expr = substitute(x, {o_h: ph, o_w: pw, t_h: ZERO, t_w: ZERO})
    assert isinstance(read, Load)
    if window is not None:
        read = substitute(window.value, dict(zip(window.axes, read.index, strict=True)))
    pixel, fill, rows, columns = bounded(read, ph, pw)
    pixel = flatten_loads(pixel, r.kernel.types, r.layouts)
    reads = [v for v in loads(pixel) if k in axes_of(v)]
    contiguous = bool(reads) and all(coefficient(v.index[0], k) is ONE for v in reads)
    stage = flatten_stage(final, r.kernel.types, r.layouts)
    (total,) = [v for v in walk(stage.value) if isinstance(v, Reduce)]
    hidden = {w.buffer} | ({window.buffer} if window is not None else set())
    others = loads(replace_node(stage.value, total, Const(0, total.dtype)))
    if any(v.buffer in hidden for v in others):
        raise Declined("an operand is read again after the sum")
    if any(v.buffer == w.buffer for v in loads(pixel)):
        raise Declined("the input is computed from the filter")
    return Correlation(
        stage, total, next(iter(batch), None), rest[0], o_h, o_w, k, ph, pw, pixel, fill,
        rows, columns, contiguous, weights,
    )  # fmt: skip


def stages_of(r: Request) -> tuple[Stage, Stage | None]:
    """The stage with the sum, and the padded input where there is one."""
    stages = r.kernel.stages
    if len(stages) == 2 and not stages[0].reduces and not stages[0].index:
        if stages[0].buffer in r.kernel.outputs:
            raise Declined("the padded input is an output")
        return stages[1], stages[0]
    if len(stages) != 1:
        raise Declined(f"{len(stages)} stages")
    return stages[0], None


def factors(r: Request, final: Stage) -> tuple[Reduce, Load, Load]:
    """The sum and its two reads: the input and the constant filter."""
    reds = final.reduces
    if len(reds) != 1 or reds[0].fn != "sum":
        raise Declined("not one sum")
    body = reds[0].body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype == "float32"):
        raise Declined("not a sum of float32 products")
    p, q = body.args
    if not (isinstance(p, Load) and isinstance(q, Load)):
        raise Declined("a factor is not a plain read")
    if (p.buffer in r.constants) == (q.buffer in r.constants):
        raise Declined("the filter is not constant")
    return (reds[0], q, p) if p.buffer in r.constants else (reds[0], p, q)


def spatial(e: Expr, final: Stage, red: Reduce) -> tuple[Axis, Axis] | None:
    """Output axis and tap of an index `output + tap` over three taps."""
    axes = axes_of(e)
    taps = [a for a in axes if a in red.axes and as_int(a.extent) == TAPS]
    outputs = [a for a in axes if a in final.axes]
    if len(axes) != 2 or len(taps) != 1 or len(outputs) != 1:
        return None
    if any(coefficient(e, a) is not ONE for a in axes):
        return None
    return outputs[0], taps[0]


def filter_strides(
    r: Request, w: Load, n: Axis, inner: tuple[Axis, ...]
) -> tuple[str, int, tuple[int, int], tuple[tuple[int, int], ...]]:
    flat = flatten_loads(w, r.kernel.types, r.layouts)
    assert isinstance(flat, Load)
    offset = flat.index[0]
    pairs = []
    for a in (n, *inner):
        extent, step = as_int(a.extent), coefficient(offset, a)
        stride = as_int(step) if step is not None else None
        if not extent or not stride:
            raise Declined("the filter's sizes are not constant")
        pairs.append((extent, stride))
    if axes_of(offset) != {n, *inner}:
        raise Declined("the filter depends on another axis")
    base = as_int(without(offset, [n, *inner]))
    if base is None:
        raise Declined("the filter's sizes are not constant")
    return w.buffer, base, pairs[0], tuple(pairs[1:])


def bounded(read: Expr, ph: Axis, pw: Axis) -> tuple[Expr, Expr, Range, Range]:
    """A padded pixel as its inner value, the padding and the coordinates inside."""
    zero: Expr = Const(0.0, "float32")
    rows, columns = Range(ZERO, ph.extent), Range(ZERO, pw.extent)
    if not (isinstance(read, Apply) and read.fn == "select" and not loads(read.args[0])):
        return read, zero, rows, columns
    fill = read.args[2]
    if not isinstance(fill, Const):
        raise Declined("the padding is not constant")
    lows: dict[Axis, Expr] = {ph: ZERO, pw: ZERO}
    highs: dict[Axis, Expr] = {ph: ph.extent, pw: pw.extent}
    for c in conjuncts(read.args[0]):
        (a,) = axes_of(c) if len(axes_of(c)) == 1 else (None,)
        bound = loop_bound(c, a) if a in (ph, pw) and a is not None else None
        if bound is None or a is None:
            raise Declined("a condition on more than a row or a column of the input")
        side = lows if bound[0] == "low" else highs
        side[a] = apply("max" if bound[0] == "low" else "min", side[a], index(bound[1]))
    return read.args[1], fill, Range(lows[ph], highs[ph]), Range(lows[pw], highs[pw])


__all__ = ["TAPS", "Correlation", "correlation"]
