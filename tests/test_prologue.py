"""Elementwise work on the rows of a contraction, computed while they are copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from kernels_support import (
    Lowered,
    check_kernel,
    close,
    define,
    lower_model,
    model,
    run_model,
    run_program,
)
from onnx.helper import make_node as node
from onnx.reference import ReferenceEvaluator

from onnxjit.codegen.expr import Expr, apply
from onnxjit.codegen.schedule.contraction import contraction
from onnxjit.codegen.tensor import Tensor, reduce_over

F = "float32"
Inputs = dict[str, tuple[str, Sequence[int | str]]]
IMAGES: Inputs = {"x": (F, ("n", 8, "h", "w"))}
SIZES = [(1, 9, 11), (3, 2, 3), (0, 4, 4), (2, 16, 13), (1, 28, 29)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compared(m: onnx.ModelProto) -> Lowered:
    low, run = lower_model(m), run_model(m)
    for n, h, w in SIZES:
        feeds = {"x": normal(n, 8, h, w)}
        want = ReferenceEvaluator(m).run(None, feeds)
        for got in (run_program(low, feeds), run(feeds)):
            for a, b in zip(got, want, strict=True):
                close(a, np.asarray(b), 1e-5, f"{n} x {h} x {w}")
    return low


def before(channels: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """A convolution whose result `a` another node reads too, its scale, bias and Relu: `r`."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("GlobalMaxPool", ["a"], ["g"]),
        node("Mul", ["a", "s"], ["m"]),
        node("Add", ["m", "b"], ["t"]),
        node("Relu", ["t"], ["r"]),
    ]
    constants = {"w0": normal(channels, 8, 1, 1), "s": normal(channels, 1, 1, seed=1),
                 "b": normal(channels, 1, 1, seed=2)}  # fmt: skip
    return nodes, constants


@pytest.mark.parametrize("channels", [5, 16, 48])
@pytest.mark.parametrize(("taps", "pad", "stride"), [(1, 0, 1), (3, 1, 1), (3, 1, 2), (5, 2, 1)])
def test_normalised_input_of_a_convolution(channels: int, taps: int, pad: int, stride: int) -> None:
    nodes, constants = before(channels)
    nodes.append(node("Conv", ["r", "w1"], ["y"], pads=[pad] * 4, strides=[stride] * 2))
    constants["w1"] = normal(33, channels, taps, taps)
    low = compared(model(nodes, IMAGES, ["y", "g"], constants))
    assert "pointwise" not in low.rules


def test_scaled_channels() -> None:
    """The factor of each image and channel that a squeeze-and-excitation block computes."""
    nodes, constants = before(24)
    nodes = [
        *nodes[:2],
        node("Conv", ["g", "w1"], ["e"]),
        node("Sigmoid", ["e"], ["f"]),
        node("Mul", ["a", "f"], ["r"]),
        node("Conv", ["r", "w2"], ["y"]),
    ]
    constants = {"w0": constants["w0"], "w1": normal(24, 24, 1, 1), "w2": normal(20, 24, 1, 1)}
    low = compared(model(nodes, IMAGES, ["y"], constants))
    assert "pointwise" not in low.rules


def test_what_stays_a_pass_of_its_own() -> None:
    """A value with two readers, one that is an output, a costly function, a few elements, and
    channels that are not side by side."""

    def passes(outputs: Sequence[str], *more: onnx.NodeProto, last: str = "r", **sizes: int) -> int:
        nodes, constants = before(16)
        nodes += [*more, node("Conv", [last, "w1"], ["y"])]
        constants["w1"] = normal(20, 16, 1, 1)
        inputs: Inputs = {"x": (F, (1, 8, 6, 5))} if sizes else IMAGES
        return lower_model(model(nodes, inputs, outputs, constants)).rules.count("pointwise")

    assert passes(["y", "g"]) == 0
    assert passes(["y", "g", "r"]) == 1
    assert passes(["y", "g", "p"], node("GlobalMaxPool", ["r"], ["p"])) == 1
    assert passes(["y", "g"], node("Tanh", ["r"], ["h"]), last="h") == 1
    assert passes(["y", "g"], h=6, w=5) == 1
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Conv", ["r", "w"], ["y"]),
    ]
    low = compared(model(nodes, IMAGES, ["y"], {"w": normal(20, 8, 1, 1)}))
    assert low.rules.count("pointwise") == 1


def computed(x: Tensor, s: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """max(x * s + b, 0) times w."""

    def factor(*i: Expr) -> Expr:
        scaled = apply("add", apply("mul", x.at(*i), s.at(i[-1])), b.at(i[-1]))
        return apply("max", scaled, 0.0)

    *rows, k = x.shape
    return reduce_over(
        "sum", (*rows, w.shape[1]), (k,),
        lambda i, r: apply("mul", factor(*i[:-1], r[0]), w.at(r[0], i[-1])),
    )  # fmt: skip


@pytest.mark.parametrize(("k", "n"), [(1, 8), (5, 33), (64, 130), (1024, 32), (1700, 100)])
def test_products_of_computed_rows(k: int, n: int) -> None:
    """Fixed and free numbers of rows, one and several blocks of k, part panels."""
    for m in (1, 13, 14, 15, 97, "m"):
        inputs: Inputs = {"x": (F, (m, k)), "s": (F, (k,)), "b": (F, (k,)), "w": (F, (k, n))}
        sizes = [{"m": i} for i in (0, 1, 14, 43)] if m == "m" else [{}]
        kernel = define(computed, inputs)
        if k == 1 or m == 1:
            check_kernel(kernel, *sizes, constants=["w"])
        else:
            check_kernel(kernel, *sizes, constants=["w"], rule=contraction)


def test_rows_that_follow_each_other_with_gaps_between_groups() -> None:
    """A factor of each group of rows keeps the groups apart."""

    def scaled(x: Tensor, f: Tensor, w: Tensor) -> Tensor:
        return reduce_over(
            "sum", (*x.shape[:2], w.shape[1]), (x.shape[2],),
            lambda i, r: apply(
                "mul", apply("mul", f.at(i[0], r[0]), x.at(i[0], i[1], r[0])), w.at(r[0], i[2])
            ),
        )  # fmt: skip

    inputs: Inputs = {"x": (F, ("b", "m", 48)), "f": (F, ("b", 48)), "w": (F, (48, 40))}
    sizes = [{"b": b, "m": m} for b, m in [(1, 1), (3, 17), (2, 300), (0, 5), (4, 0)]]
    compiled = check_kernel(define(scaled, inputs), *sizes, constants=["w"], rule=contraction)
    assert "rows computed into scratch" in compiled.nest.notes


def test_an_operand_that_is_packed_is_not_read_again() -> None:
    """The rows are computed from the constant whose packed form the product reads."""

    def squared(x: Tensor, w: Tensor) -> Tensor:
        return reduce_over(
            "sum", (x.shape[0], 16), (16,),
            lambda i, r: apply(
                "mul", apply("add", x.at(i[0], r[0]), w.at(0, r[0])), w.at(r[0], i[1])
            ),
        )  # fmt: skip

    kernel = define(squared, {"x": (F, ("m", 16)), "w": (F, (16, 16))})
    check_kernel(kernel, {"m": 1}, {"m": 30}, constants=["w"])
