"""Sampling at computed positions: GridSample, AffineGrid, DeformConv."""

from __future__ import annotations

from collections.abc import Sequence

from onnxjit.codegen.expr import TRUE, Const, Expr, apply, cast, index
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    compute,
    materialize,
    reduce_over,
    reshape,
)
from onnxjit.operators.conv import group_size, with_bias
from onnxjit.operators.matmul import times, wide_dtype
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.resample import Taps, clamped, cubic_weight, within
from onnxjit.operators.samples import draw
from onnxjit.operators.window import spatial_list


def linear_at(v: Expr) -> Taps:
    """The two neighbours of a float coordinate and their weights."""
    low = apply("floor", v)
    f = v - low
    i = cast(low, "int64")
    return [(i, Const(1.0, v.dtype) - f), (i + 1, f)]


def cubic_at(v: Expr) -> Taps:
    """The four neighbours of a float coordinate and their weights (Keys, a = -0.75)."""
    low = apply("floor", v)
    f = v - low
    i = cast(low, "int64")
    distances = [f + 1.0, f, Const(1.0, v.dtype) - f, Const(2.0, v.dtype) - f]
    return [(i + k - 1, cubic_weight(d, -0.75)) for k, d in enumerate(distances)]


def reflect(v: Expr, low: Expr, high: Expr) -> Expr:
    """`v` mirrored at the borders until it lies in [low, high]."""
    span = apply("max", high - low, Const(1e-30, v.dtype))
    below = apply("lt", v, low)
    away = apply("select", below, low - v, v - high)
    turns = apply("floor", apply("div", away, span))
    rest = away - turns * span
    even = apply("eq", apply("fmod", turns, Const(2.0, v.dtype)), 0.0)
    near_low = apply("eq", cast(even, "int32"), cast(below, "int32"))
    mirrored = apply("select", near_low, low + rest, high - rest)
    outside = apply("logical_or", below, apply("lt", high, v))
    return apply("select", outside, mirrored, v)


def _positions(size: Expr, n: Expr, align: bool) -> tuple[Expr, Expr, Expr]:
    """The coordinate for a normalised position in [-1, 1], and the borders of the axis."""
    length = cast(size, n.dtype)
    if align:
        return (n + 1.0) * 0.5 * (length - 1.0), Const(0.0, n.dtype), length - 1.0
    return ((n + 1.0) * length - 1.0) * 0.5, Const(-0.5, n.dtype), length - 0.5


_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def _sample_cases() -> list[Case]:
    cases = []
    for mode in ("linear", "nearest", "cubic"):
        for padding in ("zeros", "border", "reflection"):
            if (mode, padding) == ("cubic", "border"):
                continue  # the ONNX reference clamps the coordinate instead of the taps
            for align in (0, 1):
                cases.append(
                    Case(
                        draw("float32[2,3,4,5]", "float32[2,6,3,2]", low=-1.4, high=1.4),
                        {"mode": mode, "padding_mode": padding, "align_corners": align},
                        label=f"{mode} {padding} {align}",
                    )
                )
    return cases


@operator(
    "GridSample",
    since=16,
    cases=[
        *_sample_cases(),
        Case(draw("float32[1,2,3,4,5]", "float32[1,2,3,4,3]", low=-1.2, high=1.2), label="volume"),
        Case(
            draw("float32[1,32,64,64]", "float32[1,64,64,2]", low=-1.0, high=1.0),
            bench=True,
            label="warp",
        ),
    ],
)
def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Values of `x` at the positions in the last axis of `grid`, innermost axis first."""
    mode = _MODES.get(mode, mode)
    if mode not in ("linear", "nearest", "cubic"):
        raise DefinitionError(f"unknown mode {mode!r}")
    if padding_mode not in ("zeros", "border", "reflection"):
        raise DefinitionError(f"unknown padding_mode {padding_mode!r}")
    rank = x.rank - 2
    sizes = x.shape[2:]
    real = wide_dtype(grid.dtype)
    wide = "float64" if x.dtype in ("float64", "int32", "int64") else "float32"

    def axis_taps(k: int, at: Index) -> tuple[Taps, Expr, Expr]:
        n = cast(grid.at(*at, rank - 1 - k), real)
        v, low, high = _positions(sizes[k], n, bool(align_corners))
        if mode == "nearest":
            v = apply("round", v)
        if padding_mode == "border" and mode != "cubic":
            # Cubic taps are clamped one by one, as PyTorch and ONNX Runtime do.
            v = apply("min", apply("max", v, 0.0), cast(sizes[k] - 1, real))
        elif padding_mode == "reflection":
            v = reflect(v, low, high)
        if mode == "nearest":
            return [(cast(v, "int64"), Const(1.0, real))], low, high
        return (linear_at(v) if mode == "linear" else cubic_at(v)), low, high

    def at(idx: Index) -> Expr:
        place = (idx[0], *idx[2:])
        axes = [axis_taps(k, place) for k in range(rank)]

        def pixel(source: Sequence[Expr]) -> Expr:
            inside: Expr = TRUE
            where = []
            for i, size, (_, low, high) in zip(source, sizes, axes, strict=True):
                if padding_mode == "zeros":
                    inside = apply("logical_and", inside, within(i, size))
                elif padding_mode == "reflection":
                    i = cast(reflect(cast(i, real), low, high), "int64")
                where.append(i if padding_mode == "zeros" else clamped(i, size))
            return apply("select", inside, x.at(*idx[:2], *where), 0)

        if mode == "nearest":
            return pixel([taps[0][0] for taps, _, _ in axes])

        def blend(k: int, source: tuple[Expr, ...]) -> Expr:
            if k == rank:
                return cast(pixel(source), wide)
            terms = [blend(k + 1, (*source, i)) * cast(w, wide) for i, w in axes[k][0]]
            total = terms[0]
            for t in terms[1:]:
                total = total + t
            return total

        return cast(blend(0, ()), x.dtype)

    return Tensor((*x.shape[:2], *grid.shape[1:-1]), x.dtype, at)


@operator(
    "AffineGrid",
    since=20,
    cases=[
        Case(draw("float32[2,2,3]", [2, 3, 4, 5]), label="2d"),
        Case(draw("float32[2,2,3]", [2, 3, 4, 5]), {"align_corners": 1}, label="2d aligned"),
        Case(draw("float32[1,3,4]", [1, 1, 2, 3, 4]), label="3d"),
    ],
)
def affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """Sampling positions for GridSample: an affine map of the output's own normalised positions."""
    _, _, *spatial = size.values()
    rank = len(spatial)
    wide = wide_dtype(theta.dtype)

    def place(i: Expr, n: Expr) -> Expr:
        if align_corners:
            steps = cast(apply("max", n - 1, index(1)), wide)
            return apply("div", cast(i * 2, wide), steps) - 1.0
        return apply("div", cast(i * 2 + 1, wide), cast(n, wide)) - 1.0

    def at(n: Expr, *rest: Expr) -> Expr:
        row = rest[-1]
        total = cast(theta.at(n, row, rank), wide)
        for k in range(rank):
            own = place(rest[rank - 1 - k], spatial[rank - 1 - k])
            total = total + cast(theta.at(n, row, k), wide) * own
        return cast(total, theta.dtype)

    return compute((theta.shape[0], *spatial, rank), theta.dtype, at)


@operator(
    "DeformConv",
    since=19,
    cases=[
        Case(
            draw("float32[1,4,5,6]", "float32[3,4,2,2]", "float32[1,8,4,5]", "float32[3]"),
            label="bias",
        ),
        Case(
            draw(
                *("float32[2,4,5,6]", "float32[2,2,3,3]", "float32[2,36,3,3]"),
                *(None, "float32[2,18,3,3]"),
            ),
            {"group": 2, "offset_group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2]},
            label="groups, mask",
        ),
    ],
)
def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution whose taps are moved by `offset` and read by linear interpolation.

    The moved taps of every channel are one stage (columns), which the weights then contract.
    """
    rank = x.rank - 2
    stride = spatial_list(strides, rank, 1, "strides")
    dilation = spatial_list(dilations, rank, 1, "dilations")
    pad = spatial_list(pads, 2 * rank, 0, "pads")
    taps, out = w.shape[2:], offset.shape[2:]
    each, per_offset = group_size(x.shape[1], group), group_size(x.shape[1], offset_group)
    filters = group_size(w.shape[0], group)
    real = wide_dtype(offset.dtype)
    wide = wide_dtype(x.dtype)
    moved = reshape(offset, (x.shape[0], offset_group, *taps, rank, *out))
    scale = None if mask is None else reshape(mask, (x.shape[0], offset_group, *taps, *out))

    def column(n: Expr, c: Expr, *rest: Expr) -> Expr:
        tap, o = rest[:rank], rest[rank:]
        g = apply("floordiv", c, per_offset)
        axes = []
        for k in range(rank):
            base = cast(o[k] * stride[k] + tap[k] * dilation[k] - pad[k], real)
            axes.append(linear_at(base + cast(moved.at(n, g, *tap, k, *o), real)))

        def blend(k: int, source: tuple[Expr, ...]) -> Expr:
            if k == rank:
                inside: Expr = TRUE
                for i, size in zip(source, x.shape[2:], strict=True):
                    inside = apply("logical_and", inside, within(i, size))
                return apply("select", inside, cast(x.at(n, c, *source), wide), 0)
            (i, p), (j, q) = axes[k]
            left, right = blend(k + 1, (*source, i)), blend(k + 1, (*source, j))
            return left * cast(p, wide) + right * cast(q, wide)

        value = blend(0, ())
        return value if scale is None else value * cast(scale.at(n, g, *tap, *o), wide)

    columns = materialize(compute((*x.shape[:2], *taps, *out), wide, column), "columns")
    groups = (index(group),) if group > 1 else ()

    def body(i: Index, r: Index) -> Expr:
        g = i[1] if groups else index(0)
        k, o = i[1 + len(groups)], i[2 + len(groups) :]
        weight = w.at(g * filters + k, *r)
        return times(columns.at(i[0], g * each + r[0], *r[1:], *o), weight)

    total = reduce_over("sum", (x.shape[0], *groups, filters, *out), (each, *taps), body)
    total = reshape(total, (x.shape[0], w.shape[0], *out)) if groups else total
    return with_bias(total, bias, x.dtype)


@operator(
    "Col2Im",
    since=18,
    cases=[
        Case(draw("float32[1,8,6]", [3, 4], [2, 2]), label="2d"),
        Case(
            draw("float32[2,8,6]", [3, 5], [2, 2]),
            {"strides": [2, 2], "pads": [1, 0, 0, 1], "dilations": [1, 1]},
            label="strides, pads",
        ),
    ],
)
def col2im(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Adds up overlapping blocks: each pixel sums the taps of the windows that cover it."""
    sizes, taps = image_shape.values(), block_shape.values()
    rank = len(sizes)
    stride = spatial_list(strides, rank, 1, "strides")
    dilation = spatial_list(dilations, rank, 1, "dilations")
    pad = spatial_list(pads, 2 * rank, 0, "pads")
    block: Expr = index(1)
    for t in taps:
        block = block * t
    counts = [
        apply(
            "floordiv", size + pad[k] + pad[rank + k] - (t - 1) * dilation[k] - 1, index(stride[k])
        )
        + 1
        for k, (size, t) in enumerate(zip(sizes, taps, strict=True))
    ]
    channels = apply("floordiv", x.shape[1], block)
    view = reshape(x, (x.shape[0], channels, *taps, *counts))

    def body(i: Index, r: Index) -> Expr:
        inside: Expr = TRUE
        windows = []
        for k in range(rank):
            at = i[2 + k] + pad[k] - r[k] * dilation[k]
            o = apply("floordiv", at, index(stride[k]))
            inside = apply("logical_and", inside, within(o, counts[k]))
            if stride[k] > 1:
                exact = apply("eq", apply("mod", at, index(stride[k])), index(0))
                inside = apply("logical_and", inside, exact)
            windows.append(o)
        value = cast(view.at(*i[:2], *r, *windows), wide_dtype(x.dtype))
        return apply("select", inside, value, 0)

    total = reduce_over("sum", (x.shape[0], channels, *sizes), taps, body)
    return Tensor(total.shape, x.dtype, lambda idx: cast(total.at(*idx), x.dtype))


@operator(
    "CenterCropPad",
    since=18,
    cases=[
        Case(draw("float32[6,5,4]", [3, 8, 4]), label="crop and pad"),
        Case(draw("float32[6,5,4]", [7, 2]), {"axes": [1, -1]}, label="axes"),
    ],
)
def center_crop_pad(x: Tensor, shape: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """The centre of an axis cut to a size, or the axis between zeros; odd rests go to the end."""
    over = [a % x.rank for a in axes] if axes else list(range(x.rank))
    wanted = dict(zip(over, shape.values(), strict=True))
    sizes = [wanted.get(k, d) for k, d in enumerate(x.shape)]
    cut, put = {}, {}
    for k, n in wanted.items():
        cut[k] = apply("max", x.shape[k] - n, index(0)) // 2
        put[k] = apply("max", n - x.shape[k], index(0)) // 2

    def at(idx: Index) -> Expr:
        source = list(idx)
        inside: Expr = TRUE
        for k in wanted:
            source[k] = idx[k] - put[k] + cut[k]
            inside = apply("logical_and", inside, within(source[k], x.shape[k]))
        return apply("select", inside, x.at(*source), 0)

    return Tensor(sizes, x.dtype, at)
