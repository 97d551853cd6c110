"""Normalisations: moments over some axes as stages, then one pass over the elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxjit.codegen.expr import ONE, Const, Expr, apply, cast, index
from onnxjit.codegen.kernel import product
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    cast_to,
    compute,
    elementwise,
    materialize,
    pad_with,
    reduce,
    reduce_over,
)
from onnxjit.operators.matmul import wide_dtype
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw

STASH = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}


def axis_number(axis: int, rank: int) -> int:
    """A non-negative axis."""
    if not -rank <= axis < rank:
        raise DefinitionError(f"axis {axis} is outside a tensor of rank {rank}")
    return axis % rank


def keep(x: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """A reduced tensor seen with its reduced axes as axes of size 1."""
    kept = [k for k in range(rank) if k not in axes]
    shape: list[Expr] = [ONE] * rank
    for k, d in zip(kept, x.shape, strict=True):
        shape[k] = d
    return Tensor(shape, x.dtype, lambda idx: x.at(*(idx[k] for k in kept)))


def mean_of(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over `axes` as a stage, in the dtype of `x`, without the reduced axes."""
    count = cast(product(x.shape[k] for k in axes), x.dtype)
    total = reduce("sum", x, axes)
    return materialize(elementwise(lambda v: apply("div", v, count), total))


def moments(x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + epsilon) over `axes`, which stay with size 1.

    Two passes: the variance sums centred squares, which does not cancel.
    """
    mean = keep(mean_of(x, axes), axes, x.rank)
    count = cast(product(x.shape[k] for k in axes), x.dtype)
    centred = x - mean
    squares = reduce("sum", centred * centred, axes)
    inverse = materialize(
        elementwise(lambda v: apply("rsqrt", apply("div", v, count) + epsilon), squares)
    )
    return mean, keep(inverse, axes, x.rank)


def per_channel(x: Tensor, rank: int) -> Tensor:
    """A vector over channels that broadcasts against [N, C, spatial...]."""
    return compute((x.shape[0], *[1] * (rank - 2)), x.dtype, lambda c, *_: x.at(c))


def batch(*shape: int, dtype: str = "float32") -> Callable[[], Sequence[np.ndarray]]:
    """Inputs of BatchNormalization for data of `shape`."""
    sizes = ",".join(map(str, shape))
    make = draw(f"{dtype}[{sizes}]", *[f"{dtype}[{shape[1]}]"] * 4)

    def inputs() -> Sequence[np.ndarray]:
        *rest, var = make()
        return [*rest, np.abs(var) + np.asarray(0.5, dtype)]

    return inputs


def _normalized(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float
) -> Tensor:
    """x · a + (b - mean · a) with a = scale / sqrt(var + epsilon): two stages without `x`."""
    wide = wide_dtype(x.dtype)
    parts = [cast_to(t, wide) for t in (scale, bias, mean, var)]
    factor = materialize(
        elementwise(lambda s, v: s * apply("rsqrt", v + epsilon), parts[0], parts[3]), "scale"
    )
    shift = materialize(parts[1] - parts[2] * factor, "shift")
    if scale.rank == 1:
        factor, shift = per_channel(factor, x.rank), per_channel(shift, x.rank)
    return cast_to(cast_to(x, wide) * factor + shift, x.dtype)


def _trained(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    epsilon: float,
    momentum: float,
) -> tuple[Tensor, ...]:
    """Normalisation with the statistics of this batch, the running and the batch statistics."""
    wide = wide_dtype(x.dtype)
    data = cast_to(x, wide)
    axes = [0, *range(2, x.rank)]
    batch_mean = mean_of(data, axes)
    centred = data - keep(batch_mean, axes, x.rank)
    batch_var = mean_of(centred * centred, axes)
    y = _normalized(x, scale, bias, batch_mean, batch_var, epsilon)

    def running(old: Tensor, new: Tensor) -> Tensor:
        out = cast_to(old, wide) * momentum + cast_to(new, wide) * (1.0 - momentum)
        return cast_to(out, old.dtype)

    saved = cast_to(batch_mean, mean.dtype), cast_to(batch_var, var.dtype)
    return (y, running(mean, batch_mean), running(var, batch_var), *saved)


@operator(
    "BatchNormalization",
    since=14,
    cases=[
        Case(batch(2, 3, 4, 5), label="inference"),
        Case(batch(2, 3), {"epsilon": 0.01}, label="matrix"),
        Case(batch(2, 3, 4, dtype="float16"), label="half"),
        Case(batch(2, 3, 4, 5), {"training_mode": 1}, outputs=3, label="training"),
        Case(batch(1, 256, 56, 56), bench=True, label="resnet"),
    ],
)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    outputs: int = 1,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """Normalises each channel with given statistics, or with those of the batch when training."""
    if training_mode:
        return _trained(x, scale, bias, mean, var, epsilon, momentum)[: min(outputs, 3)]
    return _normalized(x, scale, bias, mean, var, epsilon)


@operator("BatchNormalization", since=1, until=9, cases=[Case(batch(2, 3, 4, 5))])
def batch_normalization_1(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    outputs: int = 1,
    consumed_inputs: Sequence[int] | None = None,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The early versions: a node with more than one output trains; `spatial=0` has statistics for
    every element of a sample instead of every channel."""
    if outputs > 1:
        if not spatial:
            raise DefinitionError("training BatchNormalization with spatial=0 is not supported")
        return _trained(x, scale, bias, mean, var, epsilon, momentum)[:outputs]
    return _normalized(x, scale, bias, mean, var, epsilon)


@operator(
    "InstanceNormalization",
    since=1,
    cases=[
        Case(draw("float32[2,3,4,5]", "float32[3]", "float32[3]"), label="2d"),
        Case(draw("float16[2,3,9]", "float16[3]", "float16[3]"), {"epsilon": 0.01}, label="half"),
        Case(
            draw("float32[1,64,56,56]", "float32[64]", "float32[64]"),
            bench=True,
            label="style transfer",
        ),
    ],
)
def instance_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    consumed_inputs: Sequence[int] | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalises every channel of every sample over its spatial axes."""
    wide = wide_dtype(x.dtype)
    data = cast_to(x, wide)
    mean, inverse = moments(data, range(2, x.rank), epsilon)
    factor, shift = (per_channel(cast_to(t, wide), x.rank) for t in (scale, bias))
    return cast_to((data - mean) * inverse * factor + shift, x.dtype)


def group_moments(x: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor, Expr]:
    """Mean and inverse deviation of every (sample, group), [N, G], and the channels of a group."""
    channels = apply("floordiv", x.shape[1], index(groups))
    view = Tensor(
        (x.shape[0], groups, channels, *x.shape[2:]),
        x.dtype,
        lambda i: x.at(i[0], i[1] * channels + i[2], *i[3:]),
    )
    axes = range(2, view.rank)
    mean, inverse = moments(view, axes, epsilon)
    ones = [0] * len(axes)

    def matrix(t: Tensor) -> Tensor:
        return Tensor(t.shape[:2], t.dtype, lambda i: t.at(*i, *ones))

    return matrix(mean), matrix(inverse), channels


@operator(
    "GroupNormalization",
    since=18,
    cases=[
        Case(draw("float32[2,6,4,5]", "float32[6]", "float32[6]"), {"num_groups": 3}, label="2d"),
        Case(
            draw("float32[2,4,9]", "float32[4]", "float32[4]"),
            {"num_groups": 2, "epsilon": 0.01},
            label="sequence",
        ),
        Case(
            draw("float32[1,320,32,32]", "float32[320]", "float32[320]"),
            {"num_groups": 32},
            bench=True,
            label="stable diffusion",
        ),
    ],
)
def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    version: int = 21,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> Tensor:
    """Normalises groups of channels; before version 21 scale and bias are per group."""
    wide = wide_dtype(x.dtype)
    data = cast_to(x, wide)
    mean, inverse, channels = group_moments(data, num_groups, epsilon)
    factor, shift = cast_to(scale, wide), cast_to(bias, wide)

    def at(idx: Index) -> Expr:
        n, c = idx[:2]
        g = c // channels
        k = g if version < 21 else c
        centred = data.at(*idx) - mean.at(n, g)
        return cast(centred * inverse.at(n, g) * factor.at(k) + shift.at(k), x.dtype)

    return Tensor(x.shape, x.dtype, at)


def stash_dtypes(x: Tensor, stash_type: int) -> tuple[str, str]:
    """The dtype to compute in (never narrower than float32 or `x`) and the dtype of statistics."""
    if stash_type not in STASH:
        raise DefinitionError(f"stash_type {stash_type} is not a floating-point type")
    stash = STASH[stash_type]
    return ("float64" if "float64" in (x.dtype, stash) else "float32"), stash


@operator(
    "LayerNormalization",
    since=17,
    cases=[
        Case(draw("float32[2,5,8]", "float32[8]", "float32[8]"), label="last axis"),
        Case(draw("float32[2,5,8]", "float32[5,8]"), {"axis": 1, "epsilon": 0.1}, label="two axes"),
        Case(draw("float32[2,5,8]", "float32[8]", "float32[8]"), outputs=3, label="statistics"),
        Case(draw("float16[3,33]", "float16[33]", "float16[33]"), label="half"),
        Case(draw("float32[1,128,768]", "float32[768]", "float32[768]"), bench=True, label="bert"),
        Case(draw("float32[1,3136,96]", "float32[96]", "float32[96]"), bench=True, label="swin"),
    ],
)
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: int = 1,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Normalises over the axes from `axis` on; also returns mean and inverse deviation."""
    wide, stash = stash_dtypes(x, stash_type)
    data = cast_to(x, wide)
    axes = range(axis_number(axis, x.rank), x.rank)
    mean, inverse = moments(data, axes, epsilon)
    out = (data - mean) * inverse * cast_to(scale, wide)
    if bias is not None:
        out = out + cast_to(bias, wide)
    y = cast_to(out, x.dtype)
    if outputs == 1:
        return y
    return (y, cast_to(mean, stash), cast_to(inverse, stash))[:outputs]


@operator(
    "RMSNormalization",
    since=23,
    cases=[
        Case(draw("float32[2,5,8]", "float32[8]"), label="last axis"),
        Case(draw("float32[2,5,8]", "float32[8]"), {"axis": 1}, label="broadcast scale"),
        Case(draw("float16[3,33]", "float16[33]"), label="half"),
        Case(draw("float32[1,128,4096]", "float32[4096]"), bench=True, label="llama"),
    ],
)
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) · scale over the axes from `axis` on."""
    wide, _ = stash_dtypes(x, stash_type)
    data = cast_to(x, wide)
    axes = range(axis_number(axis, x.rank), x.rank)
    count = cast(product(x.shape[k] for k in axes), wide)
    squares = reduce("sum", data * data, axes)
    inverse = materialize(
        elementwise(lambda v: apply("rsqrt", apply("div", v, count) + epsilon), squares)
    )
    out = data * keep(inverse, axes, x.rank) * cast_to(scale, wide)
    return cast_to(out, scale.dtype)


def _even_neighbours(x: np.ndarray) -> np.ndarray:
    """What LRN computes for size 4, one channel before and two behind."""
    padded = np.pad(x * x, [(0, 0), (1, 2), (0, 0), (0, 0)])
    total = sum(padded[:, k : k + x.shape[1]] for k in range(4))
    return x / np.sqrt(2.0 + 0.02 / 4 * total)


@operator(
    "LRN",
    since=1,
    cases=[
        Case(draw("float32[2,7,4,5]"), {"size": 3}, label="odd"),
        Case(
            draw("float32[2,7,4,3]"),
            {"size": 4, "alpha": 0.02, "beta": 0.5, "bias": 2.0},
            expect=_even_neighbours,
            label="even",
        ),
        Case(draw("float32[1,64,56,56]"), {"size": 5}, bench=True, label="googlenet"),
    ],
)
def lrn(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Divides by a power of the mean square over neighbouring channels.

    The squares of a row of channels, with zeros on either side, are a stage of their own: every
    sum then has the same number of terms, and is written out.
    """
    wide = wide_dtype(x.dtype)
    before = (size - 1) // 2
    data = cast_to(x, wide)
    others = [0] * (x.rank - 2)
    squares = pad_with(data * data, [0, before, *others], [0, size - 1 - before, *others], 0)
    if size <= _WRITTEN_OUT:
        row = materialize(squares, "squares")

        def window(n: Expr, c: Expr, *at: Expr) -> Expr:
            total = row.at(n, c, *at)
            for k in range(1, size):
                total = total + row.at(n, c + k, *at)
            return total

        total = compute(x.shape, wide, window)
    else:
        total = reduce_over(
            "sum", x.shape, (size,), lambda i, r: squares.at(i[0], i[1] + r[0], *i[2:])
        )

    def at(v: Expr, s: Expr) -> Expr:
        base = s * (alpha / size) + bias
        return v * apply("pow", base, Const(-beta, wide))

    return cast_to(elementwise(at, data, total), x.dtype)


_WRITTEN_OUT = 16
"""Most channels of a window whose sum is written out."""

_EACH_CHANNEL = [0, 2, 3]


@operator(
    "MeanVarianceNormalization",
    since=9,
    cases=[
        Case(draw("float32[2,3,4,5]"), label="default axes"),
        Case(draw("float32[2,3,4]"), {"axes": [-1]}, label="last axis"),
    ],
)
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = _EACH_CHANNEL) -> Tensor:
    """(x - mean) / (deviation + 1e-9)."""
    wide = wide_dtype(x.dtype)
    data = cast_to(x, wide)
    over = sorted({axis_number(a, x.rank) for a in axes})
    centred = data - keep(mean_of(data, over), over, x.rank)
    variance = keep(mean_of(centred * centred, over), over, x.rank)
    deviation = elementwise(lambda v: apply("sqrt", v) + 1e-9, variance)
    return cast_to(centred / deviation, x.dtype)


@operator(
    "LpNormalization",
    since=1,
    cases=[
        Case(draw("float32[2,3,4]"), label="p = 2"),
        Case(
            lambda: [np.array([[1, -2, 0], [0, 0, 0]], "float32")],
            {"p": 1, "axis": 1},
            label="zero",
        ),
    ],
)
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x divided by its 1- or 2-norm along an axis; 0 where the norm is 0."""
    if p not in (1, 2):
        raise DefinitionError(f"LpNormalization has p = 1 or 2, not {p}")
    wide = wide_dtype(x.dtype)
    data = cast_to(x, wide)
    over = [axis_number(axis, x.rank)]
    powers = elementwise("abs", data) if p == 1 else data * data
    norm = reduce("sum", powers, over)
    if p == 2:
        norm = elementwise("sqrt", norm)
    norm = keep(materialize(norm), over, x.rank)
    out = elementwise(
        lambda v, n: apply("select", apply("eq", n, 0.0), 0.0, apply("div", v, n)), data, norm
    )
    return cast_to(out, x.dtype)
