"""How exact compiled kernels are: elementary functions, long sums, and any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from recurrences import Problem
from test_scalar_math import EDGES, sigmoid, ulps

import onnxjit
from onnxjit.codegen.target import host, limited

ISAS = ["", "avx2", "scalar"]


@pytest.fixture(params=ISAS, ids=lambda isa: isa or "widest")
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compiled for an instruction set and what is below it."""
    if request.param and limited(host(), request.param) == host():
        pytest.skip(f"this machine has nothing above {request.param}")
    if request.param:
        monkeypatch.setenv("ONNXJIT_ISA", request.param)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return onnxjit.compile(model.SerializeToString(), threads=1)(x)


# --- elementary functions ------------------------------------------------------------------------

STRIDE = 4093
"""A prime number: one of that many bit patterns of float32 is tried, of all exponents and signs."""

WANTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Exp": np.exp,
    "Log": np.log,
    "Tanh": np.tanh,
    "Erf": np.vectorize(math.erf, otypes=[float]),
    "Sigmoid": sigmoid,
}
MOST_ULP = 4
SMALLEST = 2.0**-126
"""The smallest normal number. A run treats denormal numbers as zero, arguments and results."""


def patterns() -> np.ndarray:
    every = np.arange(0, 2**32, STRIDE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([every, EDGES])


def normal(x: np.ndarray) -> np.ndarray:
    """Denormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(0, x), x)


@pytest.mark.parametrize("op", WANTED)
def test_elementary_functions(op: str, isa: None) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[n] x) => (float[n] y) {{ y = {op} (x) }}"""
    )
    x = patterns()
    y = run(model, x)
    with np.errstate(all="ignore"):
        wanted = normal(WANTED[op](normal(x).astype(np.float64)))
        error = ulps(y, wanted)
    # Next to the smallest normal number a result may be rounded to zero.
    error[(y == 0) & (np.abs(wanted) < SMALLEST * (1 + MOST_ULP * 2.0**-23))] = 0
    worst = int(error.argmax())
    assert error[worst] <= MOST_ULP, (x[worst], y[worst], wanted[worst])
    assert (np.isnan(y) == np.isnan(wanted)).all()
    assert (np.isinf(y) == np.isinf(wanted.astype(np.float32))).all()


# --- sums of products ----------------------------------------------------------------------------

RELATIVE = 1e-5
"""Largest difference to sums in float64, of the largest of them."""


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return model


def near(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= RELATIVE * np.abs(wanted).max(initial=0)


@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize(("k", "n"), [(1, 33), (127, 64), (768, 31), (4608, 96)])
def test_products_of_matrices(m: int, k: int, n: int, isa: None) -> None:
    rng = np.random.default_rng(k)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n)))
    text = f"g (float[m, {k}] x) => (float[m, {n}] y) {{ y = MatMul (x, w) }}"
    y = run(model_of(text, w=w), x)
    near(y, x.astype(np.float64) @ w)


CONVOLUTIONS = [
    # channels, filters, side, kernel, stride, pad
    (512, 64, 7, 3, 1, 1),  # 4608 products in a sum
    (512, 32, 9, 3, 2, 1),
    (3, 32, 23, 7, 2, 3),
    (67, 33, 11, 1, 1, 0),
    (16, 24, 13, 5, 1, 2),
]


@pytest.mark.parametrize(("c", "f", "side", "size", "stride", "pad"), CONVOLUTIONS)
def test_convolutions(
    c: int, f: int, side: int, size: int, stride: int, pad: int, isa: None
) -> None:
    rng = np.random.default_rng(c)
    x = rng.standard_normal((2, c, side, side)).astype(np.float32)
    w = rng.standard_normal((f, c, size, size)).astype(np.float32)
    out = (side + 2 * pad - size) // stride + 1
    text = f"""g (float[2, {c}, {side}, {side}] x) => (float[2, {f}, {out}, {out}] y) {{
        y = Conv <strides = [{stride}, {stride}], pads = [{pad}, {pad}, {pad}, {pad}]> (x, w)
    }}"""
    y = run(model_of(text, w=w), x)
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    near(y, np.einsum("bcijhw,fchw->bfij", windows, w, optimize=True))


# --- threads -------------------------------------------------------------------------------------


def convolutional() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A direct convolution, one by minimal filtering, a depthwise one, and their mean."""
    rng = np.random.default_rng(1)
    shapes = {"a": (32, 3, 5, 5), "b": (64, 32, 3, 3), "c": (64, 1, 3, 3), "d": (64, 10)}
    weights = {n: rng.standard_normal(s).astype(np.float32) * 0.1 for n, s in shapes.items()}
    text = """g (float[2, 3, 61, 59] x) => (float[2, 10] y, float[2, 64, 31, 30] q) {
        s = Conv <strides = [2, 2], pads = [2, 2, 2, 2]> (x, a)
        r = Relu (s)
        t = Conv <pads = [1, 1, 1, 1]> (r, b)
        u = Sigmoid (t)
        q = Conv <pads = [1, 1, 1, 1], group = 64> (u, c)
        m = GlobalAveragePool (q)
        f = Flatten (m)
        z = MatMul (f, d)
        y = Softmax (z)
    }"""
    x = rng.standard_normal((2, 3, 61, 59)).astype(np.float32)
    return model_of(text, **weights), {"x": x}


def transformer() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Attention over several blocks of keys, a normalisation, a wide product."""
    rng = np.random.default_rng(2)
    weights = {
        "w": rng.standard_normal((64, 512)).astype(np.float32) * 0.1,
        "g": np.ones(64, np.float32),
    }
    text = """g (float[B, S, 64] q, float[B, S, 64] k, float[B, S, 64] v)
            => (float[B, S, 512] y, float[B, S] m) {
        t = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul (q, t)
        p = Softmax (s)
        a = MatMul (p, v)
        n = LayerNormalization (a, g)
        h = MatMul (n, w)
        y = Gelu (h)
        m = ReduceMean <axes = [2], keepdims = 0> (h)
    }"""
    text = text.replace("y = Gelu (h)", "y = Tanh (h)")
    feeds = {n: rng.standard_normal((3, 523, 64)).astype(np.float32) for n in "qkv"}
    return model_of(text, **weights), feeds


def recurrent() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    p = Problem("LSTM", 11, 5, 48, 130, "blh", "bidirectional")
    data = p.data()
    return p.model(data), p.feeds(data)


@pytest.mark.parametrize("make", [convolutional, transformer, recurrent])
def test_threads_do_not_change_a_bit(make: Callable[[], Any]) -> None:
    model, feeds = make()
    first, *others = (onnxjit.compile(model.SerializeToString(), threads=n) for n in (1, 2, 3, 4))
    wanted = first(**feeds)
    assert all(np.isfinite(w).all() for w in wanted)
    for other in others:
        for _ in range(3):
            for g, w in zip(other(**feeds), wanted, strict=True):
                np.testing.assert_array_equal(g.view(np.uint32), w.view(np.uint32))
