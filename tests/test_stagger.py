"""Gaps between rows that would share cache sets."""

from __future__ import annotations

import numpy as np
import pytest
from kernels_support import close, lower_model, model, run_program, sample
from onnx import helper

import onnxjit
from onnxjit.codegen.expr import ONE, as_int
from onnxjit.codegen.layout import Strided

RNG = np.random.default_rng(17)


def network(hidden: int, outputs: list[str], rows: int | str = "m"):
    """x @ a -> relu -> @ b, plus the sum of the hidden rows."""
    a, b = sample(RNG, "float32", (24, hidden)), sample(RNG, "float32", (hidden, 40))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("Relu", ["p"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
        helper.make_node("ReduceMax", ["h", "axis"], ["s"], keepdims=0),
    ]
    return (
        model(
            nodes, {"x": ("float32", [rows, 24])}, outputs, {"a": a, "b": b, "axis": np.array([1])}
        ),
        a,
        b,
    )


def gaps(low) -> list[int]:
    p = low.program
    steps = [p.layouts[v].steps for v in p.places if isinstance(p.layouts[v], Strided)]
    return [as_int(s[0]) for s in steps if s[1] is ONE]


@pytest.mark.parametrize("hidden", [1024, 2048])
def test_rows_a_multiple_of_4_kb_apart_get_a_gap(hidden: int) -> None:
    m, a, b = network(hidden, ["y", "s"])
    low = lower_model(m)
    assert gaps(low) == [hidden + 16]
    for rows in (0, 1, 2, 13, 14, 15, 28, 131):
        x = sample(RNG, "float32", (rows, 24))
        y, s = run_program(low, {"x": x})
        h = np.maximum(x.astype(np.float64) @ a, 0)
        close(y, (h @ b).astype(np.float32))
        close(s, h.max(axis=1).astype(np.float32))


@pytest.mark.parametrize(
    "hidden, outputs, rows",
    [(1000, ["y"], "m"), (1024, ["y", "h"], "m"), (1024, ["y"], 8)],
    ids=["no conflict", "an output of the model", "few rows"],
)
def test_rows_without_a_gap(hidden: int, outputs: list[str], rows: int | str) -> None:
    m, a, b = network(hidden, outputs, rows)
    low = lower_model(m)
    assert gaps(low) == []
    x = sample(RNG, "float32", (8, 24))
    y = run_program(low, {"x": x})[0]
    close(y, (np.maximum(x.astype(np.float64) @ a, 0) @ b).astype(np.float32))


def test_channels_last_rows_get_a_gap_after_each_pixel() -> None:
    w, v = sample(RNG, "float32", (1024, 5, 3, 3)), sample(RNG, "float32", (7, 1024, 1, 1))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["h"]),
        helper.make_node("Conv", ["h", "v"], ["d"]),
        helper.make_node("GlobalAveragePool", ["h"], ["q"]),
    ]
    m = model(nodes, {"x": ("float32", ["n", 5, 6, 7])}, ["d", "q"], {"w": w, "v": v})
    assert lower_model(m).program.places
    compiled = onnxjit.compile(m, cache=False)
    for n in (1, 3):
        x = sample(RNG, "float32", (n, 5, 6, 7))
        padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
        taps = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        h = np.maximum(np.einsum("nchwij,ocij->nohw", taps, w), 0)
        d, q = compiled(x)
        close(d, np.einsum("nohw,po->nphw", h, v[:, :, 0, 0]).astype(np.float32))
        close(q, h.mean(axis=(2, 3), keepdims=True).astype(np.float32))
