"""Where the elements of a value lie: in an axis order of its own, or inside of a larger value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxjit.codegen.expr import ONE, Expr, poly_mul
from onnxjit.codegen.kernel import TensorType


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements between neighbours along each logical axis, of a value that has gaps because it is
    part of another one."""

    steps: tuple[Expr, ...]


Order = tuple[int, ...]
"""The axes from the outermost to the innermost, of a value without gaps."""

Layout = Order | Strided


def strides(t: TensorType, layout: Layout | None = None) -> tuple[Expr, ...]:
    """Elements between neighbours along each logical axis; row-major without a `layout`."""
    if isinstance(layout, Strided):
        return layout.steps
    order = layout or tuple(range(t.rank))
    out: list[Expr] = [ONE] * t.rank
    step: Expr = ONE
    for k in reversed(order):
        out[k] = step
        step = poly_mul(step, t.shape[k])
    return tuple(out)


def span(shape: Sequence[int], steps: Sequence[int]) -> int:
    """Elements of memory from the first to the last element, gaps included."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True))


def elements(flat: np.ndarray, shape: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """The elements of a value in the memory `flat`, in logical order, as a writable view."""
    return np.lib.stride_tricks.as_strided(
        flat[: span(shape, steps)], shape, [s * flat.itemsize for s in steps]
    )
