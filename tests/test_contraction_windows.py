"""Windows of padded input and outputs along rows: convolutions of row-major data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from kernels_support import close, lower_model, model, run_program, sample
from onnx import helper

import onnxjit

RNG = np.random.default_rng(11)


def convolution(
    x: list[int | str], w: np.ndarray, *, relu: bool = False, **attributes: object
) -> onnx.ModelProto:
    """One convolution of a row-major input with a row-major output, a bias and maybe a ReLU."""
    b = sample(RNG, "float32", (w.shape[0],))
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c" if relu else "y"], **attributes)]
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"]))
    return model(nodes, {"x": ("float32", x)}, ["y"], {"w": w, "b": b})


def direct(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, pads: list[int], strides: list[int], dilation: int
) -> np.ndarray:
    """The convolution in float64, tap by tap."""
    spatial = x.ndim - 2
    ends = list(zip(pads[:spatial], pads[spatial:], strict=True))
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *ends])
    sizes = [
        (n - dilation * (k - 1) - 1) // s + 1
        for n, k, s in zip(x.shape[2:], w.shape[2:], strides, strict=True)
    ]
    out = np.zeros((x.shape[0], w.shape[0], *sizes))
    for tap in np.ndindex(*w.shape[2:]):
        places = tuple(
            slice(t * dilation, t * dilation + (n - 1) * s + 1, s)
            for t, n, s in zip(tap, sizes, strides, strict=True)
        )
        part = x[(slice(None), slice(None), *places)]
        out += np.einsum("nc...,oc->no...", part, w[(slice(None), slice(None), *tap)])
    return out + b.reshape(1, -1, *[1] * spatial)


def constants(m: onnx.ModelProto) -> tuple[np.ndarray, np.ndarray]:
    found = {i.name: onnx.numpy_helper.to_array(i) for i in m.graph.initializer}
    return found["w"], found["b"]


ONE_DIMENSION = [
    # channels, filters, taps, pads, stride, dilation
    (1, 5, 3, [1, 1], 1, 1),
    (3, 33, 3, [1, 0], 2, 1),
    (15, 32, 5, [0, 3], 1, 2),
    (16, 8, 3, [2, 2], 2, 1),
    (17, 31, 4, [1, 1], 3, 1),
    (80, 48, 3, [1, 1], 1, 1),
]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("channels, filters, taps, pads, stride, dilation", ONE_DIMENSION)
def test_one_dimension(channels, filters, taps, pads, stride, dilation, free) -> None:
    w = sample(RNG, "float32", (filters, channels, taps))
    options = {"pads": pads, "strides": [stride], "dilations": [dilation]}
    lengths = [12, 13, 179, 401, 1009]
    free_model = convolution([1, channels, "t"], w, **options)
    low = lower_model(free_model) if free else None
    for length in lengths:
        m = free_model if free else convolution([1, channels, length], w, **options)
        x = sample(RNG, "float32", (1, channels, length))
        (got,) = run_program(low or lower_model(m), {"x": x})
        want = direct(x, *constants(m), pads, [stride], dilation)
        close(got, want.astype(np.float32))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 15, 16, 33])
@pytest.mark.parametrize("size", [(9, 11), (23, 31), (40, 17)])
def test_two_dimensions(channels: int, size: tuple[int, int], relu: bool) -> None:
    for taps, pads, strides in [
        ((3, 3), [1, 1, 0, 0], [2, 2]),
        ((7, 7), [3, 3, 3, 3], [2, 2]),
        ((5, 1), [0, 0, 3, 0], [1, 1]),
        ((2, 3), [0, 2, 0, 1], [3, 1]),
    ]:
        w = sample(RNG, "float32", (34, channels, *taps))
        m = convolution([2, channels, *size], w, relu=relu, pads=pads, strides=strides)
        x = sample(RNG, "float32", (2, channels, *size))
        (got,) = run_program(lower_model(m), {"x": x})
        want = direct(x, *constants(m), pads, strides, 1)
        close(got, np.maximum(want, 0).astype(np.float32) if relu else want.astype(np.float32))


@pytest.mark.parametrize(
    "x, w, pads, strides",
    [
        ([1, 8, 74, 74], (32, 8, 3, 3), [1, 1, 0, 0], [2, 2]),
        ([1, 8, 37, 37], (32, 8, 4, 4), [0, 0, 0, 0], [1, 1]),
        ([1, 20, 1000], (33, 20, 3), [1, 0], [1]),
        ([1, 3, 61, 61], (32, 3, 7, 7), [3, 3, 3, 3], [2, 2]),
    ],
)
def test_nothing_outside_of_a_buffer_is_read(x, w, pads, strides) -> None:
    # The last block of rows is smaller than the others: its window ends with the input.
    m = convolution(x, sample(RNG, "float32", w), pads=pads, strides=strides)
    compiled = onnxjit.compile(m, cache=False, threads=1)
    (kernel,) = compiled.kernels.values()
    assert kernel.rule.startswith("contraction")
    (got,) = kernel.interpret(end=None, seed=1)
    assert np.isfinite(got).all()
    kernel.check(kernel.source)


def test_rows_of_results_are_stored_along_rows() -> None:
    # 1x1: no window, the output is row-major; several strips, a last panel with one column. Where
    # pixels fill the panels about as well as filters do, they are the columns.
    for filters, size in [
        (65, (7, 7)),
        (64, (14, 14)),
        (64, (56, 56)),
        (33, (13, 29)),
        (5, (1, 1)),
    ]:
        w = sample(RNG, "float32", (filters, 64, 1, 1))
        m = convolution([1, 64, *size], w)
        low = lower_model(m)
        turned = any("turned" in str(c.nest) for c in low.generated.scheduled)
        assert turned == (size in ((7, 7), (14, 14)))
        x = sample(RNG, "float32", (1, 64, *size))
        (got,) = run_program(low, {"x": x})
        close(got, direct(x, *constants(m), [0] * 4, [1, 1], 1).astype(np.float32))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("taps", "stride", "dilation"), [(5, 2, 1), (3, 2, 2), (4, 1, 1), (2, 3, 1)]
)
def test_windows_without_a_border(
    taps: int, stride: int, dilation: int, group: int, *, free: bool
) -> None:
    """Channels in short runs of taps become runs of channels, as with a border."""
    w = sample(RNG, "float32", (11 * group, 17, taps, taps - 1))
    shape: list[int | str] = ["n", 17 * group, "h", "w"] if free else [2, 17 * group, 13, 29]
    settings = {"strides": [stride, 1], "dilations": [dilation, dilation], "group": group}
    m = convolution(shape, w, relu=True, **settings)
    low = lower_model(m)
    assert all(c.nest.rule == "contraction: window" for c in low.generated.scheduled)
    sizes = [(2, 13, 29), (1, 9, 9), (3, 10, 60), (0, 12, 12)] if free else [(2, 13, 29)]
    bias = constants(m)[1]
    for n, h, wide in sizes:
        x = sample(RNG, "float32", (n, 17 * group, h, wide))
        parts = [
            direct(
                x[:, g * 17 : g * 17 + 17],
                w[g * 11 : g * 11 + 11],
                bias[g * 11 : g * 11 + 11],
                [0] * 4,
                [stride, 1],
                dilation,
            )
            for g in range(group)
        ]
        (got,) = run_program(low, {"x": x})
        close(got, np.maximum(np.concatenate(parts, 1), 0).astype(np.float32))


def test_a_window_without_a_border_is_read_again_by_the_epilogue() -> None:
    w = sample(RNG, "float32", (16, 16, 2, 2))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Slice", ["x", "from", "to", "axes"], ["s"]),
        helper.make_node("Add", ["c", "s"], ["y"]),
    ]
    given = {"from": [0, 0], "to": [8, 20], "axes": [2, 3]}
    fixed = {"w": w, **{k: np.array(v) for k, v in given.items()}}
    low = lower_model(model(nodes, {"x": ("float32", [1, 16, 9, 21])}, ["y"], fixed))
    x = sample(RNG, "float32", (1, 16, 9, 21))
    want = direct(x, w, np.zeros(16, np.float32), [0] * 4, [1, 1], 1) + x[:, :, :8, :20]
    (got,) = run_program(low, {"x": x})
    close(got, want.astype(np.float32))
