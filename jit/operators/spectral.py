"""Fourier transforms as contractions with a table of cosines and sines, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnxjit.codegen.expr import ONE, Const, Expr, apply, as_int, cast, index
from onnxjit.codegen.tensor import (
    DefinitionError,
    Index,
    Tensor,
    cast_to,
    compute,
    materialize,
    reduce_over,
)
from onnxjit.operators.matmul import times, wide_dtype
from onnxjit.operators.norm import axis_number
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.tensors import dtype_name

LARGEST_TABLE = 4096


def _angle(n: Expr, k: Expr, length: Expr) -> Expr:
    """2π n k / length in float64, reduced to one turn before it is rounded."""
    turn = apply("mod", n * k, length)
    return apply("div", cast(turn, "float64") * (2 * math.pi), cast(length, "float64"))


def twiddle(n: Expr, c: Expr, k: Expr, part: Expr, length: Expr, inverse: bool) -> Expr:
    """The factor of input part `c` (0 real, 1 imaginary) of element `n` in output part `part`
    of bin `k`, in float64."""
    angle = _angle(n, k, length)
    cosine, sine = apply("cos", angle), apply("sin", angle)
    if inverse:
        sine = -sine
    same = apply("eq", c, part)
    # (a + ib)(cos - i sin): real = a cos + b sin, imaginary = b cos - a sin.
    cross = apply("select", apply("lt", c, part), -sine, sine)
    return apply("select", same, cosine, cross)


def _factors(
    shape: Sequence[Expr | int], dtype: str, fn: Callable[..., Expr], length: Expr
) -> Tensor:
    """A table of factors as a stage, or the function itself where the table would be large."""
    table = compute(shape, dtype, lambda *i: cast(fn(*i), dtype))
    n = as_int(length)
    return materialize(table, "twiddle") if n is not None and n <= LARGEST_TABLE else table


def transform(x: Tensor, axis: int, length: Expr, inverse: bool, onesided: bool) -> Tensor:
    """The discrete Fourier transform of [..., N, ..., 1 or 2] along `axis`."""
    wide = wide_dtype(x.dtype)
    parts = x.shape[-1]
    real_output = inverse and onesided
    bins = length // 2 + 1 if onesided and not inverse else length
    available = length // 2 + 1 if real_output else length
    terms = apply("min", x.shape[axis], available)
    out_parts = index(1 if real_output else 2)

    def factor(n: Expr, c: Expr, k: Expr, part: Expr) -> Expr:
        f = twiddle(n, c, k, part, length, inverse)
        if real_output:
            # The bins that are left out are the conjugates of those between the first and the last.
            single = apply("logical_or", apply("eq", n, index(0)), apply("eq", n * 2, length))
            f = f * apply("select", single, Const(1.0, "float64"), Const(2.0, "float64"))
        return apply("div", f, cast(length, "float64")) if inverse else f

    table = _factors((terms, parts, bins, out_parts), wide, factor, length)
    shape = list(x.shape)
    shape[axis], shape[-1] = bins, out_parts

    def body(i: Index, r: Index) -> Expr:
        source = list(i)
        source[axis], source[-1] = r
        return times(x.at(*source), table.at(r[0], r[1], i[axis], i[-1]))

    return cast_to(reduce_over("sum", shape, (terms, parts), body), x.dtype)


def _dft(x: Tensor, dft_length: Tensor | None, axis: int, inverse: int, onesided: int) -> Tensor:
    k = axis_number(axis, x.rank)
    if k == x.rank - 1:
        raise DefinitionError("the last axis of a DFT holds real and imaginary parts")
    if dft_length is not None:
        length = dft_length.scalar()
    elif inverse and onesided:
        length = (x.shape[k] - 1) * 2
    else:
        length = x.shape[k]
    return transform(x, k, length, bool(inverse), bool(onesided))


@operator(
    "DFT",
    since=20,
    cases=[
        Case(draw("float32[2,10,3,1]", None, np.array(1)), label="real"),
        Case(draw("float32[2,10,3,2]", np.array(12), np.array(1)), label="padded"),
        Case(draw("float32[2,10,2]", np.array(7)), {"inverse": 1}, label="inverse, cut"),
        Case(draw("float32[2,10,1]"), {"onesided": 1}, label="onesided"),
    ],
)
def dft(
    x: Tensor,
    dft_length: Tensor | None = None,
    axis: Tensor | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The discrete Fourier transform along an axis."""
    return _dft(x, dft_length, -2 if axis is None else axis.ints()[0], inverse, onesided)


@operator("DFT", since=17, until=19, cases=[Case(draw("float32[2,10,3,2]"), {"axis": 1})])
def dft_17(
    x: Tensor,
    dft_length: Tensor | None = None,
    *,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The discrete Fourier transform with its axis as an attribute."""
    return _dft(x, dft_length, axis, inverse, onesided)


@operator(
    "STFT",
    since=17,
    cases=[
        Case(draw("float32[2,30,1]", np.array(4), "float32[8]"), label="window"),
        Case(
            draw("float32[1,30,1]", np.array(5), None, np.array(9)), {"onesided": 0}, label="length"
        ),
        Case(draw("float32[1,16000,1]", np.array(160), "float32[400]"), bench=True, label="speech"),
    ],
)
def stft(
    x: Tensor,
    frame_step: Tensor,
    window: Tensor | None = None,
    frame_length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Fourier transforms of overlapping windowed frames: [batch, frames, bins, 2]."""
    step = frame_step.scalar()
    signal, parts = x.shape[1], x.shape[2] if x.rank == 3 else ONE
    if frame_length is not None:
        length = frame_length.scalar()
    else:
        length = signal if window is None else window.shape[0]
    wide = wide_dtype(x.dtype)
    bins = length // 2 + 1 if onesided else length
    frames = apply("floordiv", signal - length, step) + 1

    def factor(n: Expr, c: Expr, k: Expr, part: Expr) -> Expr:
        f = twiddle(n, c, k, part, length, False)
        return f if window is None else f * cast(window.at(n), "float64")

    table = _factors((length, parts, bins, 2), wide, factor, length)

    def body(i: Index, r: Index) -> Expr:
        at = i[1] * step + r[0]
        read = x.at(i[0], at, r[1]) if x.rank == 3 else x.at(i[0], at)
        return times(read, table.at(r[0], r[1], i[2], i[3]))

    out = reduce_over("sum", (x.shape[0], frames, bins, 2), (length, parts), body)
    return cast_to(out, x.dtype)


def _window(name: str, label: str, fn: Callable[[Expr], Expr]) -> None:
    def define(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
        n = size.scalar()
        turn = n if periodic else apply("max", n - 1, index(1))
        dtype = dtype_name(output_datatype)

        def at(i: Expr) -> Expr:
            angle = apply("div", cast(i, "float64") * (2 * math.pi), cast(turn, "float64"))
            return cast(fn(angle), dtype)

        return compute((n,), dtype, at)

    define.__doc__ = f"The {label} window of a given size."
    cases = [Case(draw(np.array(10)), {"periodic": p}, label=f"periodic {p}") for p in (0, 1)]
    operator(name, since=17, cases=cases)(define)


def _cosines(*factors: float) -> Callable[[Expr], Expr]:
    """Σ factor · cos(k · angle)."""

    def at(angle: Expr) -> Expr:
        total = apply("cos", angle) * factors[1] + factors[0]
        for k, f in enumerate(factors[2:], 2):
            total = total + apply("cos", angle * float(k)) * f
        return total

    return at


_window("HannWindow", "Hann", _cosines(0.5, -0.5))
_window("HammingWindow", "Hamming", _cosines(25 / 46, -21 / 46))
_window("BlackmanWindow", "Blackman", _cosines(0.42, -0.5, 0.08))


@operator(
    "MelWeightMatrix",
    since=17,
    cases=[
        Case(
            draw(
                *(np.array(8), np.array(64), np.array(8000)),
                *(np.array(20.0, "float32"), np.array(3800.0, "float32")),
            )
        )
    ],
)
def mel_weight_matrix(
    num_mel_bins: Tensor,
    dft_length: Tensor,
    sample_rate: Tensor,
    lower_edge_hertz: Tensor,
    upper_edge_hertz: Tensor,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """Triangular filters with a peak of 1, equally spaced on the mel scale: [bins, filters]."""
    count, length = num_mel_bins.scalar(), dft_length.scalar()
    dtype = dtype_name(output_datatype)
    decade = math.log(10.0)

    def mel(t: Tensor) -> Expr:
        hertz = cast(t.at(*[0] * t.rank), "float64")
        return apply("log1p", apply("div", hertz, 700.0)) * (2595.0 / decade)

    low = mel(lower_edge_hertz)
    step = apply("div", mel(upper_edge_hertz) - low, cast(count + 2, "float64"))
    rate = cast(sample_rate.at(*[0] * sample_rate.rank), "float64")

    def edge(i: Expr) -> Expr:
        point = cast(i, "float64") * step + low
        hertz = apply("expm1", point * (decade / 2595.0)) * 700.0
        scaled = cast(length + 1, "float64") * hertz
        return cast(apply("floor", apply("div", scaled, rate)), "int64")

    def at(j: Expr, i: Expr) -> Expr:
        left, centre, right = edge(i), edge(i + 1), edge(i + 2)

        def ratio(a: Expr, b: Expr) -> Expr:
            b = apply("max", b, index(1))
            return apply("div", cast(a, "float64"), cast(b, "float64"))

        rising = ratio(j - left, centre - left)
        peak = apply("eq", left, centre)
        rising = apply("select", peak, cast(apply("eq", j, centre), "float64"), rising)
        rises = apply("logical_and", apply("le", left, j), apply("le", j, centre))
        falls = apply("logical_and", apply("le", centre, j), apply("lt", j, right))
        value = apply("select", rises, rising, 0.0)
        return cast(apply("select", falls, ratio(right - j, right - centre), value), dtype)

    return compute((length // 2 + 1, count), dtype, at)
