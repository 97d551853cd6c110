"""Pooling of channels-last data: the window micro-kernels in a nest, against NumPy in float64."""

from itertools import product

import numpy as np
import pytest
from kernels_support import close, lower_model, model, run_program
from onnx import helper

F = "float32"

# Operator, input (n, h, w, c), attributes.
POOLS = {
    "max": ("MaxPool", (2, 9, 11, 16), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)),
    "max, overlapping": ("MaxPool", (1, 8, 19, 17), dict(kernel_shape=[3, 3], pads=[1] * 4)),
    "max, no border": ("MaxPool", (1, 7, 37, 33), dict(kernel_shape=[2, 3], strides=[1, 3])),
    "max, dilated": ("MaxPool", (1, 13, 14, 20),
                     dict(kernel_shape=[3, 2], dilations=[2, 3], pads=[2, 1, 1, 2])),
    "max, ceiling": ("MaxPool", (1, 9, 10, 16),
                     dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "max, large strides": ("MaxPool", (1, 17, 23, 40), dict(
        kernel_shape=[5, 5], strides=[3, 2], pads=[2] * 4)),
    "max, two rows": ("MaxPool", (1, 2, 5, 300), dict(kernel_shape=[3, 3], pads=[1] * 4)),
    "max, wide": ("MaxPool", (1, 3, 41, 16), dict(kernel_shape=[1, 18], pads=[0, 4, 0, 4])),
    "max, line": ("MaxPool", (3, 31, 24), dict(kernel_shape=[4], strides=[3], pads=[1, 2])),
    "mean": ("AveragePool", (1, 9, 12, 64), dict(kernel_shape=[3, 3], pads=[1] * 4)),
    "mean, padding counts": ("AveragePool", (2, 8, 9, 18), dict(
        kernel_shape=[3, 3], pads=[1, 0, 1, 2], count_include_pad=1, strides=[2, 2])),
    "mean, large": ("AveragePool", (1, 15, 16, 40), dict(kernel_shape=[13, 13])),
    "mean, beside the image": ("AveragePool", (1, 2, 3, 16), dict(
        kernel_shape=[5, 5], pads=[2] * 4)),
    "mean, many channels": ("AveragePool", (1, 7, 40, 530), dict(
        kernel_shape=[2, 2], strides=[2, 2])),
}  # fmt: skip


def pooled(op: str, x: np.ndarray, attrs: dict) -> np.ndarray:
    """The pool of channels-last data, window by window."""
    rank = x.ndim - 2
    kernel = attrs["kernel_shape"]
    strides, dilations = (attrs.get(k, [1] * rank) for k in ("strides", "dilations"))
    pads = attrs.get("pads", [0] * 2 * rank)
    sizes = x.shape[1:-1]
    counts = []
    for k in range(rank):
        room = sizes[k] + pads[k] + pads[rank + k] - (kernel[k] - 1) * dilations[k] - 1
        count = -(-room // strides[k]) if attrs.get("ceil_mode") else room // strides[k]
        if attrs.get("ceil_mode") and count * strides[k] >= sizes[k] + pads[k]:
            count -= 1
        counts.append(count + 1)
    out = np.zeros((x.shape[0], *counts, x.shape[-1]))
    for o in product(*map(range, counts)):
        taps = []
        for t in product(*map(range, kernel)):
            places = zip(o, strides, t, dilations, pads, strict=False)
            at = [a * s + b * d - p for a, s, b, d, p in places]
            if all(0 <= a < n for a, n in zip(at, sizes, strict=True)):
                taps.append(x[(slice(None), *at)].astype(np.float64))
        if op == "MaxPool":
            value = np.maximum.reduce(taps)
        else:
            value = sum(taps) / (np.prod(kernel) if attrs.get("count_include_pad") else len(taps))
        out[(slice(None), *o)] = value
    return out


def lowered(name: str, free: bool, after: str):
    op, shape, attrs = POOLS[name]
    rank = len(shape)
    declared = [f"d{k}" if free and k < rank - 1 else d for k, d in enumerate(shape)]
    first, last = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=first),
        helper.make_node(op, ["t"], ["p"], **attrs),
        *([helper.make_node(after, ["p"], ["q"])] if after else []),
        helper.make_node("Transpose", ["q" if after else "p"], ["y"], perm=last),
    ]
    return lower_model(model(nodes, {"x": (F, declared)}, ["y"]))


@pytest.mark.parametrize("after", ["", "Sigmoid"])
@pytest.mark.parametrize("name", POOLS)
def test_pool(name: str, after: str) -> None:
    op, shape, attrs = POOLS[name]
    low = lowered(name, False, after)
    stride, taps = attrs.get("strides", [1])[-1], attrs["kernel_shape"][-1]
    shared = 2 * stride <= taps * attrs.get("dilations", [1])[-1]
    assert (low.generated.scheduled[0].nest.rule == "depthwise") == shared
    x = np.random.default_rng(len(name)).standard_normal(shape).astype(F)
    want = pooled(op, x, attrs)
    want = 1 / (1 + np.exp(-want)) if after else want
    close(run_program(low, {"x": x})[0], want.astype(F), what=name)


@pytest.mark.parametrize("name", [n for n in POOLS if "ceiling" not in n])
def test_pool_of_symbolic_size(name: str) -> None:
    op, shape, attrs = POOLS[name]
    low = lowered(name, True, "Relu")
    for more in (0, 1, 9):
        sizes = (*(d + more for d in shape[:-1]), shape[-1])
        x = np.random.default_rng(more).standard_normal(sizes).astype(F)
        want = np.maximum(pooled(op, x, attrs), 0).astype(F)
        close(run_program(low, {"x": x}, more)[0], want, what=f"{name} + {more}")


@pytest.mark.parametrize("name", ["max", "max, overlapping", "max, no border"])
def test_maximum_of_nan_and_infinities(name: str) -> None:
    op, shape, attrs = POOLS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(F)
    x[0, 2:5, 3:6, 1:4] = -np.inf
    x[0, 1, 2, 3], x[0, 4, 6, 5], x[0, 0, 0, 0] = np.nan, np.inf, -np.inf
    (got,) = run_program(lowered(name, False, ""), {"x": x})
    np.testing.assert_array_equal(got, pooled(op, x, attrs).astype(F))
