"""Convolutions: one reduction over (channels, taps) of a padded input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxjit.codegen.expr import ONE, Expr, apply, as_int, index
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    cast_to,
    compute,
    materialize,
    pad_with,
    reduce_over,
    reshape,
    same_dim,
    transpose,
)
from onnxjit.operators.matmul import times
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.operators.window import Window, clamp_low, spatial_list, windows


def group_size(channels: Expr, group: int) -> Expr:
    """Channels of one group; constant channel counts must divide evenly."""
    n = as_int(channels)
    if group < 1 or (n is not None and n % group):
        raise DefinitionError(f"{channels} channels do not form {group} groups")
    return apply("floordiv", channels, index(group))


def padded(x: Tensor, geometry: Sequence[Window], fill: Any = 0) -> Tensor:
    """`x` with `fill` around its spatial axes as a stage, or `x` where nothing is added."""
    if not any(w.clips for w in geometry):
        return x
    before = [index(0)] * 2 + [w.before for w in geometry]
    after = [index(0)] * 2 + [w.after for w in geometry]
    return materialize(pad_with(x, before, after, fill), "pad")


def convolve(
    x: Tensor,
    w: Tensor,
    geometry: Sequence[Window],
    group: int,
    fill: Any = 0,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Grouped convolution without bias, in the accumulation dtype, shape [N, K, out...].

    `view` is applied to the padded data (a quantized input less its zero point, which is `fill`).
    """
    channels, filters = group_size(x.shape[1], group), group_size(w.shape[0], group)
    each = same_dim(channels, w.shape[1])
    taps = [g.kernel for g in geometry]
    outer = [g.count for g in geometry]
    if each is ONE and filters is ONE and group > 1:
        return _depthwise(view(x), w, geometry)
    xp = view(padded(x, geometry, fill))

    def at(o: Index, k: Index) -> list[Expr]:
        return [i * g.stride + j * g.dilation for g, i, j in zip(geometry, o, k, strict=True)]

    if group == 1:
        return reduce_over(
            "sum",
            (x.shape[0], w.shape[0], *outer),
            (each, *taps),
            lambda i, r: times(xp.at(i[0], r[0], *at(i[2:], r[1:])), w.at(i[1], r[0], *r[1:])),
        )
    out = reduce_over(
        "sum",
        (x.shape[0], index(group), filters, *outer),
        (each, *taps),
        lambda i, r: times(
            xp.at(i[0], i[1] * each + r[0], *at(i[3:], r[1:])),
            w.at(i[1] * filters + i[2], r[0], *r[1:]),
        ),
    )
    return reshape(out, (x.shape[0], w.shape[0], *outer))


def _depthwise(x: Tensor, w: Tensor, geometry: Sequence[Window]) -> Tensor:
    """One filter a channel; padding is read as a condition so that no padded copy is made."""

    def body(i: Index, r: Index) -> Expr:

        conditions = [g.inside(o, k) for g, o, k in zip(geometry, i[2:], r, strict=True)]
        inside = conditions[0]
        for c in conditions[1:]:
            inside = apply("logical_and", inside, c)
        read = x.at(*i[:2], *(g.source(o, k) for g, o, k in zip(geometry, i[2:], r, strict=True)))
        return times(apply("select", inside, read, 0), w.at(i[1], 0, *r))

    shape = (x.shape[0], x.shape[1], *(g.count for g in geometry))
    return reduce_over("sum", shape, [g.kernel for g in geometry], body)


def with_bias(out: Tensor, bias: Tensor | None, dtype: str) -> Tensor:
    """Adds one value a channel and rounds to `dtype`."""
    if bias is not None:
        same_dim(bias.shape[0], out.shape[1])
        b = cast_to(bias, out.dtype)
        out = out + compute((out.shape[1], *[1] * (out.rank - 2)), out.dtype, lambda k, *_: b.at(k))
    return cast_to(out, dtype)


@operator(
    "Conv",
    since=1,
    cases=[
        Case(
            draw("float32[2,3,8,9]", "float32[4,3,3,3]", "float32[4]"),
            {"pads": [1, 1, 1, 1]},
            label="3x3",
        ),
        Case(draw("float32[1,3,9,9]", "float32[4,3,3,2]"), {"strides": [2, 3]}, label="strides"),
        Case(
            draw("float32[1,2,12]", "float32[3,2,3]", "float32[3]"),
            {"dilations": [2], "auto_pad": "SAME_UPPER", "strides": [2]},
            label="1d same",
        ),
        Case(
            draw("float32[1,2,5,5]", "float32[3,2,2,2]"),
            {"auto_pad": "SAME_LOWER"},
            label="same lower",
        ),
        Case(
            draw("float32[1,2,4,5,4]", "float32[2,2,2,3,2]"),
            {"pads": [1, 0, 0, 0, 1, 1]},
            label="3d",
        ),
        Case(
            draw("float32[2,6,7,7]", "float32[6,1,3,3]", "float32[6]"),
            {"group": 6, "pads": [1, 1, 1, 1], "strides": [2, 2]},
            label="depthwise",
        ),
        Case(
            draw("float32[1,4,6,6]", "float32[6,2,3,3]", "float32[6]"),
            {"group": 2},
            label="grouped",
        ),
        Case(draw("float32[1,3,6,6]", "float32[6,1,3,3]"), {"group": 3}, label="multiplier"),
        Case(
            draw("float16[1,4,6,6]", "float16[2,4,3,3]", "float16[2]"),
            {"pads": [1, 1, 1, 1]},
            label="half",
        ),
        Case(
            draw("float32[1,64,56,56]", "float32[64,64,3,3]", "float32[64]"),
            {"pads": [1, 1, 1, 1]},
            bench=True,
            label="resnet 3x3",
        ),
        Case(
            draw("float32[1,64,56,56]", "float32[256,64,1,1]", "float32[256]"),
            bench=True,
            label="resnet 1x1",
        ),
        Case(
            draw("float32[1,144,56,56]", "float32[144,1,3,3]", "float32[144]"),
            {"pads": [1, 1, 1, 1], "group": 144},
            bench=True,
            label="mobilenet depthwise",
        ),
    ],
)
def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Cross-correlation of [N, C, spatial...] with [K, C / group, taps...]."""
    geometry = conv_windows(x, w, auto_pad, dilations, kernel_shape, pads, strides)
    return with_bias(convolve(x, w, geometry, group), bias, x.dtype)


def conv_windows(
    x: Tensor,
    w: Tensor,
    auto_pad: str,
    dilations: Sequence[int] | None,
    kernel_shape: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> list[Window]:
    """The windows of a convolution; kernel_shape defaults to the weight's spatial sizes."""
    if x.rank < 3 or x.rank != w.rank:
        raise DefinitionError("Conv needs an input and weights of equal rank 3 or more")
    taps = list(w.shape[2:])
    if kernel_shape:
        taps = [same_dim(index(k), d) for k, d in zip(kernel_shape, taps, strict=True)]
    return windows(
        x.shape[2:], taps, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad
    )


@operator(
    "ConvTranspose",
    since=1,
    cases=[
        Case(draw("float32[1,3,4,5]", "float32[3,2,3,3]", "float32[2]"), label="plain"),
        Case(
            draw("float32[2,3,4,5]", "float32[3,2,3,3]", "float32[2]"),
            {"strides": [3, 2], "pads": [1, 0, 2, 1], "output_padding": [1, 1]},
            label="strides, pads, output_padding",
        ),
        Case(
            draw("float32[1,3,4,5]", "float32[3,2,3,3]"),
            {"strides": [3, 2], "output_shape": [10, 8]},
            label="output_shape",
        ),
        Case(
            draw("float32[1,4,4,5]", "float32[4,2,3,3]"),
            {"strides": [2, 2], "auto_pad": "SAME_UPPER", "group": 2, "dilations": [1, 2]},
            label="same, group, dilation",
        ),
        Case(
            draw("float32[2,3,4,5]", "float32[3,2,2,3]"),
            {"strides": [2, 3]},
            label="kernel = stride",
        ),
        Case(
            draw("float32[1,4,3,5]", "float32[4,3,2,2]", "float32[6]"),
            {"strides": [2, 2], "group": 2},
            label="kernel = stride, grouped",
        ),
        Case(
            draw("float32[1,2,6]", "float32[2,3,4]", "float32[3]"),
            {"strides": [2], "pads": [1, 1]},
            label="1d",
        ),
        Case(
            draw("float32[1,64,28,28]", "float32[64,32,2,2]", "float32[32]"),
            {"strides": [2, 2]},
            bench=True,
            label="upsampling",
        ),
    ],
)
def conv_transpose(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The transpose of convolution: out[o] = Σ x[i] w[k], i · stride + k · dilation = o + pad."""
    rank = x.rank - 2
    if rank < 1 or x.rank != w.rank:
        raise DefinitionError("ConvTranspose needs an input and weights of equal rank 3 or more")
    taps = list(w.shape[2:])
    if kernel_shape:
        taps = [same_dim(index(k), d) for k, d in zip(kernel_shape, taps, strict=True)]
    stride = spatial_list(strides, rank, 1, "strides")
    dilation = spatial_list(dilations, rank, 1, "dilations")
    extra = spatial_list(output_padding, rank, 0, "output_padding")
    wanted = None
    if output_shape:
        # Early exporters wrote the batch and channel sizes too.
        wanted = spatial_list(output_shape[-rank:], rank, 0, "output_shape")
    pad = spatial_list(pads, 2 * rank, 0, "pads")
    before: list[Expr] = []
    sizes: list[Expr] = []
    for k, size in enumerate(x.shape[2:]):
        span = (size - 1) * stride[k] + extra[k] + (taps[k] - 1) * dilation[k] + 1
        low, high = index(pad[k]), index(pad[rank + k])
        if wanted is not None or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            target = index(wanted[k]) if wanted is not None else size * stride[k]
            total = clamp_low(span - target)
            half = total // 2
            low = half if auto_pad == "SAME_UPPER" else total - half
            sizes.append(target)
        else:
            if auto_pad == "VALID":
                low = high = index(0)
            sizes.append(span - low - high)
        before.append(low)
    channels = group_size(x.shape[1], group)
    same_dim(x.shape[1], w.shape[0])
    plain = all(as_int(b) == 0 for b in before) and all(
        as_int(t) == s and (d == 1 or s == 1) and target is size * s
        for t, s, d, target, size in zip(taps, stride, dilation, sizes, x.shape[2:], strict=True)
    )
    if plain:
        out = _blocks(x, w, group, channels)
    else:
        out = _scattered(x, w, group, channels, stride, dilation, before, sizes)
    return with_bias(out, bias, x.dtype)


def _blocks(x: Tensor, w: Tensor, group: int, channels: Expr) -> Tensor:
    """kernel == stride: every input pixel makes its own block of outputs."""
    rank = x.rank - 2
    spatial, taps, filters = x.shape[2:], w.shape[2:], w.shape[1]
    groups = (index(group),) if group > 1 else ()

    def body(i: Index, r: Index) -> Expr:
        g = i[1] if groups else index(0)
        rest = i[1 + len(groups) :]
        pixel, k, tap = rest[:rank], rest[rank], rest[rank + 1 :]
        c = g * channels + r[0]
        return times(x.at(i[0], c, *pixel), w.at(c, k, *tap))

    shape = (x.shape[0], *groups, *spatial, filters, *taps)
    out = reduce_over("sum", shape, (channels,), body)
    first = 1 + len(groups)
    perm = [*range(first), first + rank]
    for k in range(rank):
        perm += [first + k, first + rank + 1 + k]
    out = transpose(out, perm)
    sizes = [d * t for d, t in zip(spatial, taps, strict=True)]
    return reshape(out, (x.shape[0], filters * group, *sizes))


def _scattered(
    x: Tensor,
    w: Tensor,
    group: int,
    channels: Expr,
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[Expr],
    sizes: Sequence[Expr],
) -> Tensor:
    """A stride-1 convolution of the zero-inserted input with the weights turned around."""
    taps, filters = w.shape[2:], w.shape[1]
    lead = [(t - 1) * d - b for t, d, b in zip(taps, dilation, before, strict=True)]
    spread = [o + (t - 1) * d for o, t, d in zip(sizes, taps, dilation, strict=True)]

    def inserted(n: Expr, c: Expr, *j: Expr) -> Expr:
        inside: Expr | None = None
        source = []
        for i, l, s, size in zip(j, lead, stride, x.shape[2:], strict=True):
            at = i - l
            tests = [apply("le", index(0), at), apply("lt", at, (size - 1) * s + 1)]
            if s > 1:
                tests.append(apply("eq", at % s, index(0)))
            for t in tests:
                inside = t if inside is None else apply("logical_and", inside, t)
            source.append(at // s)
        assert inside is not None
        return apply("select", inside, x.at(n, c, *source), 0)

    xz = materialize(compute((x.shape[0], x.shape[1], *spread), x.dtype, inserted), "pad")
    groups = (index(group),) if group > 1 else ()

    def body(i: Index, r: Index) -> Expr:
        g = i[1] if groups else index(0)
        k, pixel = i[1 + len(groups)], i[2 + len(groups) :]
        c = g * channels + r[0]
        source = [o + t * d for o, t, d in zip(pixel, r[1:], dilation, strict=True)]
        turned = [n - 1 - t for n, t in zip(taps, r[1:], strict=True)]
        return times(xz.at(i[0], c, *source), w.at(c, k, *turned))

    shape = (x.shape[0], *groups, filters, *sizes)
    out = reduce_over("sum", shape, (channels, *taps), body)
    return reshape(out, (x.shape[0], filters * group, *sizes)) if groups else out
