"""What a kernel means: direct evaluation with NumPy, one stage at a time (small shapes only).

Every schedule and emitter is checked against this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxjit.codegen.expr import (
    Apply,
    Axis,
    Const,
    Dim,
    Expr,
    Load,
    Poly,
    Reduce,
)
from onnxjit.codegen.kernel import Kernel, Stage, parts_in_time
from onnxjit.codegen.scalar_functions import (
    FUNCTIONS,
    REDUCTIONS,
    numpy_dtype,
    reduction_identity,
)


def evaluate_int(e: Expr, dims: Mapping[str, int]) -> int:
    """The value of a size expression for given dims."""
    return int(_Evaluator(dims, {}).value(e, ()))


def evaluate(
    kernel: Kernel, inputs: Mapping[str, np.ndarray], dims: Mapping[str, int] | None = None
) -> list[np.ndarray]:
    """Runs a kernel on arrays given by buffer name; returns its outputs in order."""
    dims = dims or {}
    buffers: dict[str, np.ndarray] = dict(inputs)
    for b in dict.fromkeys(s.buffer for s in kernel.stages):
        t = kernel.types[b]
        shape = [evaluate_int(d, dims) for d in t.shape]
        buffers[b] = np.zeros(shape, numpy_dtype(t.dtype))
    ev = _Evaluator(dims, buffers)
    if kernel.clock is None:
        for s in kernel.stages:
            _store(s, s.axes, ev)
        return [buffers[b] for b in kernel.outputs]
    before, during, after = parts_in_time(kernel)
    for s in before:
        _store(s, s.axes, ev)
    for now in range(evaluate_int(kernel.clock.extent, dims)):
        ev.fixed = {kernel.clock: now}
        for s in during:
            _store(s, tuple(a for a in s.axes if a is not kernel.clock), ev)
    for s in after:
        _store(s, s.axes, ev)
    return [buffers[b] for b in kernel.outputs]


def _store(s: Stage, axes: tuple[Axis, ...], ev: _Evaluator) -> None:
    """Computes a stage for all values of `axes`."""
    sizes = [evaluate_int(a.extent, ev.dims) for a in axes]
    if 0 in sizes:
        return
    target = ev.buffers[s.buffer]
    full = np.broadcast_to(ev.value(s.value, axes), sizes)
    if s.index:
        where = tuple(np.broadcast_to(ev.value(i, axes), sizes) for i in s.index)
        target[where] = full
    else:
        target[...] = full


_SUMMED = ("float32", "float64", "int32", "int64")
"""Where NumPy's einsum computes what a product and then a sum would."""


class _Evaluator:
    def __init__(self, dims: Mapping[str, int], buffers: dict[str, np.ndarray]) -> None:
        self.dims = dims
        self.buffers = buffers
        self.fixed: dict[Axis, int] = {}

    def value(self, e: Expr, axes: tuple[Axis, ...]) -> Any:
        """`e` as an array that broadcasts over `axes` in order."""
        return self._go(e, axes, {})

    def _go(self, e: Expr, axes: tuple[Axis, ...], memo: dict[Expr, Any]) -> Any:
        if e in memo:
            return memo[e]
        out = memo[e] = self._compute(e, axes, memo)
        return out

    def _compute(self, e: Expr, axes: tuple[Axis, ...], memo: dict[Expr, Any]) -> Any:
        if isinstance(e, Const):
            return numpy_dtype(e.dtype).type(e.value)
        if isinstance(e, Dim):
            return np.int64(self.dims[e.name])
        if isinstance(e, Axis):
            if e in self.fixed:
                return np.int64(self.fixed[e])
            k = axes.index(e)
            n = evaluate_int(e.extent, self.dims)
            shape = [1] * len(axes)
            shape[k] = n
            return np.arange(n, dtype=np.int64).reshape(shape)
        if isinstance(e, Poly):
            total: Any = np.int64(0)
            for atoms, c in e.terms:
                term: Any = np.int64(c)
                for a in atoms:
                    term = term * self._go(a, axes, memo)
                total = total + term
            return total
        if isinstance(e, Load):
            data = self.buffers[e.buffer]
            if not e.index:
                return data[()]
            if data.size == 0:
                return numpy_dtype(e.dtype).type(0)
            whole = self._whole(e, data, axes)
            if whole is not None:
                return whole.astype(numpy_dtype(e.dtype), copy=False)
            # Reads outside the buffer occur only in branches that a selection discards.
            where = tuple(
                np.clip(self._go(i, axes, memo), 0, n - 1)
                for i, n in zip(e.index, data.shape, strict=True)
            )
            return np.asarray(data[where]).astype(numpy_dtype(e.dtype), copy=False)
        if isinstance(e, Apply):
            args = [self._go(a, axes, memo) for a in e.args]
            if e.fn == "cast":
                return FUNCTIONS["cast"].evaluate(args[0], e.dtype)
            out = FUNCTIONS[e.fn].evaluate(*args)
            return np.asarray(out).astype(numpy_dtype(e.dtype), copy=False)
        assert isinstance(e, Reduce)
        return self._reduce(e, axes)

    def _whole(self, e: Load, data: np.ndarray, axes: tuple[Axis, ...]) -> np.ndarray | None:
        """A load that goes once over all of `data`, as a view without indices; else None."""
        places = [axes.index(i) if i in axes and i not in self.fixed else -1 for i in e.index]
        if -1 in places or len(set(places)) < len(places):
            return None
        extents = [evaluate_int(axes[k].extent, self.dims) for k in places]
        if extents != list(data.shape):
            return None
        shape = [1] * len(axes)
        for k, n in zip(places, extents, strict=True):
            shape[k] = n
        return data.transpose(np.argsort(places)).reshape(shape)

    def _reduce(self, e: Reduce, axes: tuple[Axis, ...]) -> Any:
        both = (*axes, *e.axes)
        sizes = [evaluate_int(a.extent, self.dims) for a in both]
        dtype = numpy_dtype(e.dtype)
        where = tuple(range(len(axes), len(both)))
        product = e.fn == "sum" and isinstance(e.body, Apply) and e.body.fn == "mul"
        if product and e.dtype in _SUMMED and 0 not in sizes:
            memo: dict[Expr, Any] = {}
            factors = [self._go(x, both, memo) for x in e.body.args]  # type: ignore[attr-defined]
            return _sum_of_products(factors, sizes, len(axes)).astype(dtype)
        body = np.asarray(self.value(e.body, both))
        body = body.reshape((1,) * (len(both) - body.ndim) + body.shape)
        body = np.broadcast_to(body, [*body.shape[: len(axes)], *sizes[len(axes) :]])
        if any(sizes[k] == 0 for k in where):
            identity = reduction_identity(e.fn, e.dtype)
            return np.full(body.shape[: len(axes)], identity).astype(dtype)
        return np.asarray(REDUCTIONS[e.fn](body, axis=where)).astype(dtype)


def _sum_of_products(factors: list[Any], sizes: list[int], kept: int) -> np.ndarray:
    """The sum over all axes but the first `kept` of a product of arrays that broadcast to `sizes`;
    what it returns broadcasts to the kept sizes. The products themselves are never in memory: those
    of a convolution would take gigabytes."""
    operands: list[Any] = []
    present: set[int] = set()
    for x in map(np.asarray, factors):
        shape = (1,) * (len(sizes) - x.ndim) + x.shape
        places = [k for k, n in enumerate(shape) if n > 1]
        operands += [x.reshape([shape[k] for k in places]), places]
        present.update(places)
    left = [k for k in range(kept) if k in present]
    total = np.einsum(*operands, left, optimize=True)
    # An axis that no factor depends on repeats the same product.
    repeats = math.prod(n for k, n in enumerate(sizes) if k >= kept and k not in present)
    return total.reshape([sizes[k] if k in left else 1 for k in range(kept)]) * repeats
