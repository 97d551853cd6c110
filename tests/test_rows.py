"""Stages done for groups of rows: softmax by its micro-kernel, rows side by side, odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from kernels_support import check_kernel, compile_kernel, define

from onnxjit.codegen.expr import apply
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.schedule import Request, schedule
from onnxjit.codegen.schedule.rows import SHORTEST, rows
from onnxjit.codegen.target import host
from onnxjit.codegen.tensor import Tensor, elementwise, materialize, reduce
from onnxjit.operators.norm import lrn, moments
from onnxjit.operators.softmax import hardmax_of, log_softmax_of, softmax_of

F = "float32"
SIZES = [{"n": n} for n in (0, 1, 3, 7, 8, 15, 17, 33, 101)]


def row_kernel(f: Callable[[Tensor], Tensor], *shape: int | str, dtype: str = F) -> Kernel:
    return define(f, {"x": (dtype, shape)})


def symbols(k: Kernel) -> tuple[str, ...]:
    return schedule(Request(k, {}, host())).symbols


@pytest.mark.parametrize("function", [softmax_of, log_softmax_of])
@pytest.mark.parametrize("shape", [("n", 37), (5, "n"), ("n", 2, 64), (1, 4999), ("n", 19, 3)])
def test_softmax(function: Callable[..., Tensor], shape: tuple[int | str, ...]) -> None:
    for axis in range(1, len(shape)):
        kernel = row_kernel(partial(function, axes=[axis]), *shape)
        sizes = SIZES if "n" in shape else [{}]
        check_kernel(kernel, *sizes, rule=rows)
        long = isinstance(shape[axis], str) or shape[axis] >= SHORTEST
        assert bool(symbols(kernel)) == (axis == len(shape) - 1 and long)


@pytest.mark.parametrize("function", [softmax_of, log_softmax_of])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_softmax_of_other_dtypes(function: Callable[..., Tensor], dtype: str) -> None:
    kernel = row_kernel(lambda x: function(x, [1]), "n", 21, dtype=dtype)
    check_kernel(kernel, *SIZES, rule=rows)
    assert bool(symbols(kernel)) == (dtype == "float16")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", [softmax_of, log_softmax_of])
def test_special_values(function: Callable[..., Tensor], axis: int) -> None:
    x = np.random.default_rng(3).standard_normal((6, 70)).astype(F)
    x[0, 69], x[1, :], x[2, 5], x[3, 7], x[4, :] = np.nan, -np.inf, np.inf, -np.inf, 1e30
    x[5, ::3] = -200
    x = x if axis else np.ascontiguousarray(x.T)
    kernel = row_kernel(lambda v: function(v, [axis]), *x.shape)
    (got,) = compile_kernel(kernel)({"x": x}, {})
    with np.errstate(all="ignore"):
        d = x.astype(np.float64) - x.max(axis, keepdims=True)
        total = np.exp(d).sum(axis, keepdims=True)
        want = np.exp(d) / total if function is softmax_of else d - np.log(total)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-37)


def test_exponentials_without_their_sum() -> None:
    """A row of -inf has a NaN for each of its exponentials, which the micro-kernel has not."""

    def f(x: Tensor) -> Tensor:
        top = reduce("max", x, [1], keepdims=True)
        e = materialize(elementwise(lambda v, m: apply("exp", v - m), x, top))
        return e * reduce("sum", e, [1], keepdims=True)

    kernel = row_kernel(lambda x: f(x) + softmax_of(x, [1]), 3, 40)
    check_kernel(kernel, {}, rule=rows)
    x = np.full((3, 40), -np.inf, F)
    (got,) = compile_kernel(kernel)({"x": x}, {})
    assert np.isnan(got).all()


@pytest.mark.parametrize("shape", [("n", 24, 5), (2, "n", 40), (3, 5, "n"), (1, 200, 300)])
@pytest.mark.parametrize("axis", [1, 2])
def test_moments(shape: tuple[int | str, ...], axis: int) -> None:
    def f(x: Tensor) -> Tensor:
        mean, inverse = moments(x, [axis], 1e-3)
        return (x - mean) * inverse

    sizes = SIZES[1:] if "n" in shape else [{}]
    check_kernel(row_kernel(f, *shape), *sizes, rule=rows)


def test_mean_far_from_zero() -> None:
    def f(x: Tensor) -> Tensor:
        mean, inverse = moments(x, [1], 1e-6)
        return (x - mean) * inverse

    x = (1e4 + np.random.default_rng(0).standard_normal((9, 1000))).astype(F)
    (got,) = compile_kernel(row_kernel(f, 9, 1000))({"x": x}, {})
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_logarithm_of_large_numbers() -> None:
    """x - max is exact, and the logarithm is subtracted from that, not added to the maximum."""
    x = (1e4 + np.random.default_rng(0).standard_normal((9, 100))).astype(F)
    (got,) = compile_kernel(row_kernel(lambda v: log_softmax_of(v, [1]), 9, 100))({"x": x}, {})
    d = x.astype(np.float64) - x.max(1, keepdims=True)
    want = d - np.log(np.exp(d).sum(1, keepdims=True))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 7, "n"), (1, 64, 5, "n"), (1, 3, 300)])
def test_windows_over_rows_side_by_side(shape: tuple[int | str, ...]) -> None:
    sizes = SIZES if "n" in shape else [{}]
    check_kernel(row_kernel(lambda x: lrn(x, size=5), *shape), *sizes, rule=rows)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(31, 33), ("n", 5), (5, "n")])
def test_first_maximum(shape: tuple[int | str, ...], axis: int) -> None:
    kernel = row_kernel(lambda x: hardmax_of(x, [axis]), *shape)
    check_kernel(kernel, *(SIZES[1:] if "n" in shape else [{}]), rule=rows)
