"""Sliding windows over spatial axes: the geometry that convolutions and pools share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxjit.codegen.expr import TRUE, Expr, apply, as_int, index
from onnxjit.codegen.tensor import DefinitionError


@dataclass(frozen=True, slots=True)
class Window:
    """One spatial axis: `count` windows of `kernel` taps over `size` elements.

    Tap k of window o reads element `o * stride + k * dilation - before`. `ceil` says that the last
    window may reach beyond the padding.
    """

    size: Expr
    kernel: Expr
    stride: int
    dilation: int
    before: Expr
    after: Expr
    count: Expr
    ceil: bool = False

    def source(self, o: Expr, k: Expr) -> Expr:
        return o * self.stride + k * self.dilation - self.before

    def inside(self, o: Expr, k: Expr) -> Expr:
        """Whether the tap reads an element rather than padding."""
        i = self.source(o, k)
        cond: Expr = TRUE
        if as_int(self.before) != 0:
            cond = apply("le", index(0), i)
        if as_int(self.after) != 0 or self.ceil:
            cond = apply("logical_and", cond, apply("lt", i, self.size))
        return cond

    @property
    def clips(self) -> bool:
        """Whether some tap may read padding."""
        return self.ceil or as_int(self.before) != 0 or as_int(self.after) != 0

    def taps(self, o: Expr, padding: bool) -> Expr:
        """How many taps of window `o` lie on elements (and on padding, where `padding`)."""
        start = o * self.stride - self.before
        low: Expr = index(0)
        high = self.size
        if padding:
            low, high = low - self.before, high + self.after
        d = index(self.dilation)
        first = apply("max", ceil_div(low - start, d), index(0))
        last = apply("min", ceil_div(high - start, d), self.kernel)
        return apply("max", last - first, index(0))


def ceil_div(a: Expr, b: Expr | int) -> Expr:
    return apply("floordiv", a + index(b) - 1, index(b))


def clamp_low(e: Expr) -> Expr:
    return apply("max", e, index(0))


def spatial_list(value: Sequence[int] | None, rank: int, default: int, what: str) -> list[int]:
    """An attribute with one number per spatial axis."""
    if not value:
        return [default] * rank
    if len(value) != rank:
        raise DefinitionError(f"{what} has {len(value)} values for {rank} spatial axes")
    return [int(v) for v in value]


def windows(
    sizes: Sequence[Expr],
    kernel: Sequence[Expr | int],
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> list[Window]:
    """The windows of every spatial axis, from the attributes that Conv and the pools share."""
    rank = len(sizes)
    stride = spatial_list(strides, rank, 1, "strides")
    dilation = spatial_list(dilations, rank, 1, "dilations")
    pad = spatial_list(pads, 2 * rank, 0, "pads")
    if len(kernel) != rank:
        raise DefinitionError(f"kernel_shape has {len(kernel)} values for {rank} spatial axes")
    if min(stride, default=1) < 1 or min(dilation, default=1) < 1:
        raise DefinitionError("strides and dilations must be positive")
    out = []
    for k, size in enumerate(sizes):
        taps, s, d = index(kernel[k]), stride[k], dilation[k]
        reach = (taps - 1) * d + 1
        before, after, count = _placed(size, reach, s, pad[k], pad[rank + k], auto_pad, ceil_mode)
        out.append(Window(size, taps, s, d, before, after, count, bool(ceil_mode)))
    return out


def _placed(
    size: Expr, reach: Expr, stride: int, before: int, after: int, auto_pad: str, ceil_mode: int
) -> tuple[Expr, Expr, Expr]:
    """Padding before and after one axis, and the number of windows."""
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        count = ceil_div(size, stride)
        total = clamp_low((count - 1) * stride + reach - size)
        half = total // 2
        rest = total - half
        return (half, rest, count) if auto_pad == "SAME_UPPER" else (rest, half, count)
    if auto_pad == "VALID":
        before = after = 0
    elif auto_pad not in ("NOTSET", ""):
        raise DefinitionError(f"unknown auto_pad {auto_pad!r}")
    low, high = index(before), index(after)
    room = size + low + high - reach
    if not ceil_mode:
        return low, high, apply("floordiv", room, index(stride)) + 1
    count = ceil_div(room, stride) + 1
    # A window that would start in the padding behind the data is dropped.
    beyond = apply("le", size + low, (count - 1) * stride)
    return low, high, apply("select", beyond, count - 1, count)
