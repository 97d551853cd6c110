"""Micro-kernels of depthwise convolutions against NumPy, with unreadable memory around them."""

import ctypes
from itertools import product

import numpy as np
import pytest
from kernels_support import lower_model, model
from onnx import helper
from test_microkernels import Fenced

from onnxjit.codegen import microkernel_depthwise as micro
from onnxjit.codegen.instruction_sets import ISAS, runs
from onnxjit.codegen.microkernels import object_code
from onnxjit.codegen.target import host, limited
from onnxjit.runtime.link import link

RUNNABLE = [isa for isa in ISAS if runs(ISAS[isa], host())]
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 1), (3, 3, 2, 1), (5, 5, 1, 2), (8, 3, 1, 1), (8, 7, 1, 1),
          (4, 2, 4, 3), (7, 4, 3, 2)]  # fmt: skip


def entry(symbol, isa):
    library = link([object_code(symbol, limited(host(), isa) if isa != "neon" else host())])
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    kinds = (pointer, *[integer] * 3, pointer, *[integer] * 3, pointer, *[integer] * 4)
    return library, ctypes.CFUNCTYPE(None, *kinds)(library.address(symbol))


KINDS = ("depthwise", "sumpool", "maxpool")


def check(symbol, isa, pixels, taps, stride, dilation, channels, rows):
    library, function = entry(symbol, isa)
    rng = np.random.default_rng(channels * 100 + taps)
    columns = (pixels - 1) * stride + (taps - 1) * dilation + 1
    gap, ldy = channels + 3, channels + 5
    row = columns * gap + 7
    x = Fenced(max(0, (rows - 1) * row + (columns - 1) * gap + channels), np.nan)
    w = Fenced(max(0, (rows * taps - 1) * gap + channels), np.nan)
    y = Fenced((pixels - 1) * ldy + channels, 777.0)
    kind = symbol.partition("_")[0]
    want = np.full((pixels, channels), -np.inf if kind == "maxpool" else 0.0)
    x.array[:] = rng.standard_normal(x.array.size)
    w.array[:] = rng.standard_normal(w.array.size)
    for p in range(pixels):
        for i in range(rows):
            for j in range(taps):
                at = i * row + (p * stride + j * dilation) * gap
                k = (i * taps + j) * gap
                left = x.array[at : at + channels].astype(np.float64)
                if kind == "maxpool":
                    want[p] = np.maximum(want[p], left)
                else:
                    want[p] += left * (w.array[k : k + channels] if kind == "depthwise" else 1)
    step = gap if "border" not in symbol else gap * dilation
    weights = (w.address, taps * gap, gap, taps)
    function(x.address, row, step, rows, *weights, y.address, ldy, channels, row, 2)
    for p in range(pixels):
        got = y.array[p * ldy : p * ldy + channels]
        np.testing.assert_allclose(got, want[p], rtol=1e-4, atol=1e-4)
        assert (y.array[p * ldy + channels : (p + 1) * ldy] == 777.0).all()
    assert (y.before == 777.0).all()
    del library


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels(isa, kind, shape):
    symbol = micro.pixels(kind, *shape, isa)
    lanes = ISAS[isa].lanes
    for channels in (lanes, lanes + 1, 4 * lanes + 3):
        for rows in (0, 1, 3):
            check(symbol, isa, *shape, channels, rows)


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [1, 2, 5])
def test_border(isa, kind, taps):
    lanes = ISAS[isa].lanes
    for channels in (lanes, 4 * lanes, 9 * lanes + 1):
        for rows in (0, 1, 4):
            check(micro.border(kind, isa), isa, 1, taps, 1, 2, channels, rows)


@pytest.mark.parametrize(
    "symbol",
    [
        "depthwise_f32_9x3s1d1_avx2",
        "depthwise_f32_2x17s1d1_avx2",
        "depthwise_f32_2x3s1d1_mmx",
        "depthwise_f32_2x3_avx2",
    ],
)
def test_unknown_symbols(symbol):
    with pytest.raises(KeyError):
        micro.window(symbol)


def test_pixels_fit_the_registers():
    for isa in ISAS:
        sizes = product(KINDS, range(1, micro.WIDEST + 1), (1, 2, 4), (1, 3))
        for kind, taps, stride, dilation in sizes:
            most = micro.most_pixels(kind, isa, taps, stride, dilation)
            live = micro.live_vectors(kind, most, taps, stride, dilation)
            assert most == 1 or live <= ISAS[isa].registers
            for count in (1, 2, 7, 30):
                chosen = micro.choose_pixels(kind, count, isa, taps, stride, dilation)
                assert 1 <= chosen <= min(most, count)


def test_live_vectors():
    """Of neighbouring pixels, one vector of x leaves with each that comes; with a stride of two,
    the even columns stay while the odd ones are used, one by one."""
    assert micro.live_vectors("depthwise", 8, 5, 1, 1) == 8 + 7 + 1
    assert micro.live_vectors("depthwise", 1, 9, 1, 1) == 3
    assert micro.live_vectors("depthwise", 4, 3, 2, 1) == 4 + 4 + 1


def test_rule_takes_channels_last_and_says_why_not():
    """Channels-last data goes to the micro-kernel; too few channels for a vector do not."""

    def rules(channels):
        w = np.ones((channels, 1, 3, 3), np.float32)
        mix = np.ones((channels, channels, 1, 1), np.float32)
        nodes = [
            helper.make_node("Conv", ["x", "mix"], ["m"]),
            helper.make_node("Conv", ["m", "w"], ["y"], group=channels, pads=[1] * 4),
            helper.make_node("Conv", ["y", "mix"], ["z"]),
        ]
        inputs = {"x": ("float32", (1, channels, 6, 6))}
        low = lower_model(model(nodes, inputs, ["z"], {"w": w, "mix": mix}))
        return {c.nest.rule: c.nest.declined for c in low.generated.scheduled}

    assert "depthwise" in rules(24)
    few = rules(3)
    assert "depthwise" not in few
    assert any(rule == "depthwise" for d in few.values() for rule, _ in d), few
