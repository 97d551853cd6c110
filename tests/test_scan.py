"""Running sums and products: the scan's nest against NumPy in float64, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels_support import close, compile_kernel, define, lower_model, model, run_program
from onnx import helper

from onnxjit.codegen.expr import Expr, apply, index
from onnxjit.codegen.schedule.request import Declined
from onnxjit.codegen.schedule.scan import scan
from onnxjit.codegen.tensor import Tensor, reduce, reduce_identity, reduce_over

F = "float32"


def running(x: np.ndarray, axis: int, exclusive: int, reverse: int) -> np.ndarray:
    """The running sum in float64 (integers wrap around as they are)."""
    wide = x.astype(np.float64) if x.dtype.kind == "f" else x
    wide = np.flip(wide, axis) if reverse else wide
    total = np.cumsum(wide, axis)
    if exclusive:
        total = total - wide
    return (np.flip(total, axis) if reverse else total).astype(x.dtype)


def lowered(shape: list[int | str], axis: int, exclusive: int, reverse: int, dtype: str) -> Any:
    node = helper.make_node("CumSum", ["x", "a"], ["y"], exclusive=exclusive, reverse=reverse)
    low = lower_model(model([node], {"x": (dtype, shape)}, ["y"], {"a": np.array(axis, np.int64)}))
    if shape[axis] != 1:
        assert low.generated.scheduled[-1].nest.rule == "scan"
    return low


def check(low: Any, shape: list[int], axis: int, exclusive: int, reverse: int, dtype: str) -> None:
    rng = np.random.default_rng(len(shape))
    x = (rng.standard_normal(shape) * 9).astype(dtype)
    want = running(x, axis, exclusive, reverse)
    close(run_program(low, {"x": x})[0], want, 1e-4, what=f"{shape}, axis {axis}")


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_running_sums_of_a_symbolic_length(axis: int, exclusive: int, reverse: int) -> None:
    declared: list[int | str] = [3, 5, 4]
    declared[axis] = "n"
    low = lowered(declared, axis, exclusive, reverse, F)
    for n in (0, 1, 2, 63, 64, 65, 127, 300):
        shape = [3, 5, 4]
        shape[axis] = n
        check(low, shape, axis, exclusive, reverse, F)


@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 320, 1031])
@pytest.mark.parametrize("axis", [0, 1])
def test_running_sums_of_a_constant_length(n: int, axis: int) -> None:
    """Up to four blocks the definition is one reduction, and beyond them two."""
    for exclusive, reverse in ((0, 0), (1, 1), (0, 1)):
        shape = [n, 3] if axis == 0 else [3, n]
        low = lowered(list(shape), axis, exclusive, reverse, F)
        check(low, shape, axis, exclusive, reverse, F)


@pytest.mark.parametrize("dtype", ["float64", "int32", "int64"])
def test_running_sums_of_other_types(dtype: str) -> None:
    for axis in (0, 1):
        low = lowered([67, "n"], axis, 0, 0, dtype)
        for n in (1, 255, 256, 257, 530):
            check(low, [67, n], axis, 0, 0, dtype)


def test_running_sums_of_nan_and_infinities() -> None:
    x = np.ones((3, 300), F)
    x[0, 70], x[1, 5], x[2, 280] = np.nan, np.inf, -np.inf
    for reverse in (0, 1):
        (got,) = run_program(lowered([3, 300], 1, 0, reverse, F), {"x": x})
        np.testing.assert_array_equal(got, running(x, 1, 0, reverse))


def prefix(up_to: Any) -> Any:
    def fn(x: Tensor) -> Tensor:
        def body(i: Any, r: Any) -> Expr:
            return apply("select", up_to(i, r), x.at(i[0], r[0]), reduce_identity("max", F))

        return reduce_over("max", x.shape, (x.shape[1],), body)

    return fn


def test_running_maximum() -> None:
    """Any reduction up to a place is taken, whatever the operator."""
    kernel = define(prefix(lambda i, r: apply("le", r[0], i[1])), {"x": (F, (5, "n"))})
    compiled = compile_kernel(kernel, rule=scan)
    for n in (0, 1, 65):
        x = np.random.default_rng(n).standard_normal((5, n)).astype(F)
        np.testing.assert_array_equal(compiled({"x": x}, {"n": n})[0], np.maximum.accumulate(x, 1))


def test_what_is_no_scan() -> None:
    x = {"x": (F, (9, "n"))}
    for fn in (
        lambda x: reduce("sum", x, [1]),
        prefix(lambda i, r: apply("le", r[0], i[1] * 2)),
        prefix(lambda i, r: apply("le", r[0], i[1] + 1)),
        prefix(lambda i, r: apply("le", r[0] + i[0], i[1])),
        prefix(lambda i, r: apply("lt", r[0], index(3))),
    ):
        with pytest.raises(Declined):
            compile_kernel(define(fn, x), rule=scan)
