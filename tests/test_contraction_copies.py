"""Operands that micro-kernels transpose on their way: rows and columns against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernels_support import close, lower_model, model, run_program, sample
from onnx import helper

from onnxjit.codegen import microkernels

RNG = np.random.default_rng(5)


def check(low, feeds: dict[str, np.ndarray], want: np.ndarray, note: str | None) -> None:
    (got,) = run_program(low, feeds)
    close(got, want.astype(np.float32))
    notes = " ".join(n for c in low.generated.scheduled for n in c.nest.notes)
    symbols = {s for c in low.generated.scheduled for s in c.nest.symbols}
    if note is not None:
        assert note in notes
        assert any(s.startswith("pack_") for s in symbols)


@pytest.mark.parametrize("channels", [5, 16, 48, 64, 608])
@pytest.mark.parametrize("filters", [4, 33, 64])
@pytest.mark.parametrize("free", [False, True])
def test_one_by_one_convolution_of_row_major_data(channels: int, filters: int, free: bool) -> None:
    w, b = sample(RNG, "float32", (filters, channels, 1, 1)), sample(RNG, "float32", (filters,))
    shape = ["n", channels, "h", "w"] if free else [2, channels, 7, 7]
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"])]
    low = lower_model(model(nodes, {"x": ("float32", shape)}, ["y"], {"w": w, "b": b}))
    sizes = [(2, 7, 7)] if not free else [(0, 3, 3), (1, 1, 1), (1, 13, 1), (3, 5, 29), (1, 17, 19)]
    for n, h, wide in sizes:
        x = sample(RNG, "float32", (n, channels, h, wide))
        want = np.einsum("nchw,oc->nohw", x.astype(np.float64), w[:, :, 0, 0].astype(np.float64))
        want += b[:, None, None]
        check(low, {"x": x}, want, None)
    # Panels of pixels are plain copies, except where filters fill theirs much better.
    transposed = "rows transposed into scratch" in str(low.generated.scheduled)
    assert transposed == (filters == 64 and channels % 16 == 0 and not free)


@pytest.mark.parametrize("m", [1, 13, 300])
@pytest.mark.parametrize("n", [5, 33, 1000])
@pytest.mark.parametrize("k", [3, 64, 700])
def test_panels_packed_at_run_time_serve_all_rows(m: int, n: int, k: int) -> None:
    for shape in ([2, m, k], ["b", "m", k]):
        y = [2, k, n] if shape[0] == 2 else ["b", k, n]
        nodes = [helper.make_node("MatMul", ["x", "y"], ["z"])]
        low = lower_model(model(nodes, {"x": ("float32", shape), "y": ("float32", y)}, ["z"]))
        feeds = {"x": sample(RNG, "float32", (2, m, k)), "y": sample(RNG, "float32", (2, k, n))}
        want = feeds["x"].astype(np.float64) @ feeds["y"].astype(np.float64)
        check(low, feeds, want, None)


@pytest.mark.parametrize("m", [1, 6, 7, 72, 73, 217])
@pytest.mark.parametrize("k", [1819, 3072, 4099])
@pytest.mark.parametrize("relu", [False, True])
def test_long_sums_in_blocks(m: int, k: int, relu: bool) -> None:
    w = sample(RNG, "float32", (k, 37))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"])]
    nodes += [helper.make_node("Relu" if relu else "Identity", ["t"], ["y"])]
    low = lower_model(model(nodes, {"x": ("float32", [m, k])}, ["y"], {"w": w}))
    x = sample(RNG, "float32", (m, k))
    want = x.astype(np.float64) @ w
    check(low, {"x": x}, np.maximum(want, 0) if relu else want, None)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("n", [15, 16, 17, 31, 32, 48, 64, 65, 96, 97])
def test_whole_tiles_go_to_the_result_at_once(n: int, free: bool) -> None:
    """A product with nothing behind it; the same with a bias goes through its epilogue."""
    w, b = sample(RNG, "float32", (20, n)), sample(RNG, "float32", (n,))
    plain = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    biased = [
        helper.make_node("MatMul", ["x", "w"], ["t"]),
        helper.make_node("Add", ["t", "b"], ["y"]),
    ]
    shape = ["m", 20] if free else [29, 20]
    for nodes, bias in ((plain, 0), (biased, b)):
        weights = {"w": w, "b": b} if nodes is biased else {"w": w}
        low = lower_model(model(nodes, {"x": ("float32", shape)}, ["y"], weights))
        for m in (0, 1, 6, 13, 29, 100) if free else (29,):
            x = sample(RNG, "float32", (m, 20))
            check(low, {"x": x}, x.astype(np.float64) @ w + bias, None)
        (step,) = low.generated.scheduled
        tile = microkernels.row(next(s for s in step.nest.symbols if s.startswith("gemm")))
        at_once = nodes is plain and n % tile.nr == 0
        assert any(local.buffer == "acc" for local in step.nest.locals) != at_once


@pytest.mark.parametrize("k", [16, 96, 21])
def test_product_with_transposed_rows(k: int) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    w = sample(RNG, "float32", (k, 40))
    low = lower_model(model(nodes, {"x": ("float32", ["n", k, "m"])}, ["y"], {"w": w}))
    for n, m in [(1, 1), (2, 14), (1, 15), (3, 200), (2, 0)]:
        x = sample(RNG, "float32", (n, k, m))
        want = x.astype(np.float64).transpose(0, 2, 1) @ w
        check(low, {"x": x}, want, None if k % 16 else "rows transposed into scratch")


@pytest.mark.parametrize("k", [1, 15, 16, 64, 130])
@pytest.mark.parametrize("free", [False, True])
def test_product_with_columns_along_k(k: int, free: bool) -> None:
    nodes = [
        helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "t"], ["y"]),
    ]
    for n, m, columns in [(2, 9, 33), (1, 1, 31), (3, 14, 64), (1, 29, 65)]:
        shapes = {
            "a": ("float32", ["n", "m", k] if free else [n, m, k]),
            "b": ("float32", ["n", "c", k] if free else [n, columns, k]),
        }
        low = lower_model(model(nodes, shapes, ["y"]))
        a, b = sample(RNG, "float32", (n, m, k)), sample(RNG, "float32", (n, columns, k))
        want = a.astype(np.float64) @ b.astype(np.float64).transpose(0, 2, 1)
        check(low, {"a": a, "b": b}, want, "tile" if k >= 16 else None)
