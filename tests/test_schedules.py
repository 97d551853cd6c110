"""Schedules: every rule on odd sizes, layouts, views and dtypes, against direct evaluation.

All buffers lie between guard bands, scratch memory starts as NaN, and tiles run in random order
(`kernels_support`). Symbolic sizes are compiled once and bound to several values, 0 among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from kernels_support import (
    check_kernel,
    close,
    compile_kernel,
    define,
    lower_model,
    model,
    run_program,
    samples,
)
from onnx import helper

from onnxjit.codegen.evaluate import evaluate
from onnxjit.codegen.expr import ZERO, Expr, apply, cast, index
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.loops import For, statements
from onnxjit.codegen.schedule import schedule
from onnxjit.codegen.schedule.contraction import contraction
from onnxjit.codegen.schedule.pointwise import pointwise
from onnxjit.codegen.schedule.reduction import reduction
from onnxjit.codegen.schedule.request import Declined, Request
from onnxjit.codegen.schedule.row_windows import row_windows
from onnxjit.codegen.schedule.rows import rows
from onnxjit.codegen.schedule.transposition import transposition
from onnxjit.codegen.target import host
from onnxjit.codegen.tensor import (
    Tensor,
    cast_to,
    compute,
    concat,
    elementwise,
    expand,
    materialize,
    pad_with,
    reduce,
    reduce_identity,
    reduce_over,
    reshape,
    select,
    slice_axis,
    transpose,
)
from onnxjit.operators.sampling import grid_sample

SIZES = [{"n": n} for n in (0, 1, 2, 7, 63, 64, 65, 300)]
FEW = [{"n": n} for n in (0, 1, 5, 33)]
LAST = (0, 2, 3, 1)
"""Channels last: the physical axis order of an image."""

F = "float32"
Shape = Sequence[int | str]


def one(*shape: int | str, dtype: str = F) -> dict[str, tuple[str, Shape]]:
    return {"x": (dtype, shape)}


def two(first: Shape, second: Shape) -> dict[str, tuple[str, Shape]]:
    return {"x": (F, first), "y": (F, second)}


# --- pointwise ---------------------------------------------------------------------------------

MAPS: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, Shape]]]] = {
    "scalar": (lambda x: x + 1, one()),
    "flat": (lambda x: x * x + 1, one("n")),
    "constant size": (lambda x: x * 2, one(4097)),
    "row of a matrix": (lambda x, y: x + y, two((5, "n"), ("n",))),
    "column of a matrix": (lambda x, y: x * y, two((5, "n"), (5, 1))),
    "both stretched": (lambda x, y: x - y, two((7, 1), (1, "n"))),
    "transposed": (lambda x: transpose(x, (1, 0)) + 1, one(9, "n")),
    "three axes rotated": (lambda x: transpose(x, (2, 0, 1)), one(3, 17, "n")),
    "four axes, heads swapped": (lambda x: transpose(x, (0, 2, 1, 3)), one(2, "n", 3, 8)),
    "merged axes": (lambda x: reshape(x, (15, 4)) + 1, one(3, 5, 4)),
    "merged with a symbolic axis": (
        lambda x: reshape(transpose(x, (1, 0, 2)), (5, x.shape[0] * 4)),
        one("n", 5, 4),
    ),
    "split axis": (lambda x: transpose(reshape(x, (*x.shape[:1], 3, 4)), (1, 0, 2)), one("n", 12)),
    "split and merged": (
        lambda x: reshape(transpose(reshape(x, (*x.shape[:1], 3, 4)), (0, 2, 1)), x.shape),
        one("n", 12),
    ),
    "every second": (lambda x: slice_axis(x, 1, 1, 4, 2), one("n", 9)),
    "backwards": (lambda x: slice_axis(x, 1, 8, 9, -1), one("n", 9)),
    "stretched": (lambda x: expand(x, (*x.shape[:1], index(6), index(5))), one("n", 1, 5)),
    "padded": (lambda x: pad_with(x, (1, 0), (2, 3), 7.0), one(4, "n")),
    "cropped": (lambda x: pad_with(x, (-1, 0), (-1, 2), 0.0), one(6, "n")),
    "chosen": (
        lambda x, y: select(elementwise("lt", x, y), elementwise("exp", x), y * 3),
        two((3, "n"), (3, "n")),
    ),
    "two results": (lambda x: (x + 1, cast_to(x * 2, "float64")), one(5, "n")),
    "results of other shapes": (lambda x, y: (x * 2, y + 1), two((5, "n"), (3, 7))),
    "joined": (lambda x, y: concat([x, y, x], 1), two((3, "n"), (3, 5))),
    "joined first axis": (lambda x, y: concat([x, y], 0), two(("n", 6), (3, 6))),
    "joined views": (lambda x, y: concat([transpose(x, (1, 0)), y * 2], 0), two((5, "n"), (4, 5))),
    "index of a coordinate": (
        lambda x: compute(x.shape, "int64", lambda i, j: i * 10 + apply("mod", j, 3)),
        one("n", 7),
    ),
    "mixed sizes": (
        lambda x: x + compute((x.shape[1],), F, lambda j: cast(x.shape[0] - j, F)),
        one("n", 11),
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_pointwise(name: str) -> None:
    fn, types = MAPS[name]
    check_kernel(define(fn, types), *(SIZES if "n" in str(types) else [{}]), rule=pointwise)


TRANSPOSED: dict[str, tuple[Shape, Sequence[int]]] = {
    "whole vectors": ((64, "n"), (1, 0)),
    "one more": ((65, "n"), (1, 0)),
    "one less": ((63, "n"), (1, 0)),
    "one vector": ((16, "n"), (1, 0)),
    "a vector and one": ((17, "n"), (1, 0)),
    "three blocks": ((131, "n"), (1, 0)),
    "many of them": ((3, 40, "n"), (0, 2, 1)),
    "merged rows": ((40, "n", 7), (1, 2, 0)),
    "between": ((19, 3, "n"), (2, 1, 0)),
    "constant sizes": ((67, 129), (1, 0)),
    "results a kilobyte apart": ((256, "n"), (1, 0)),
    "and in cut blocks": ((72, 32, "n"), (2, 1, 0)),
    "with a column more than vectors": ((33, 256, "n"), (2, 1, 0)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposition(name: str) -> None:
    shape, order = TRANSPOSED[name]
    kernel = define(lambda x: transpose(x, order), one(*shape))
    check_kernel(kernel, *(SIZES if "n" in shape else [{}]), rule=transposition)


def test_transposition_to_channels_last() -> None:
    kernel = define(lambda x: slice_axis(x, 1, 2, 17, 1), one(2, 21, "n", 9))
    check_kernel(kernel, *FEW, layouts={"y0": LAST}, rule=transposition)


def test_transposition_declines() -> None:
    for fn, types, why in [
        (lambda x: x * 2, one(64, "n"), "not a copy"),
        (lambda x: transpose(x, (1, 0)), one(64, "n", dtype="float16"), "not a copy"),
        (lambda x: transpose(x, (1, 0, 2)), one(64, "n", 32), "same axis"),
        (lambda x: transpose(x, (1, 0)), one("n", 64), "unknown number"),
        (lambda x: transpose(x, (1, 0)), one(64, 3), "shorter than a vector"),
        (lambda x: transpose(x, (1, 0)), one(3, 64), "shorter than a vector"),
    ]:
        with pytest.raises(Declined, match=why):
            compile_kernel(define(fn, types), rule=transposition)


IMAGES: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, Shape]]]] = {
    "one image": (lambda x: x * 2, one(2, 5, "n", 7)),
    "image and bias": (lambda x, y: x + y, two((2, 5, "n", 7), (5, 1, 1))),
    "two images": (lambda x, y: x + y, two((2, 5, "n", 7), (2, 5, "n", 7))),
    "joined channels": (lambda x, y: concat([x, y], 1), two((2, 5, "n", 7), (2, 3, "n", 7))),
    "upsampled": (
        lambda x: compute(
            (*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2),
            F,
            lambda b, c, i, j: x.at(b, c, i // 2, j // 2),
        ),
        one(1, 5, "n", 3),
    ),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("out_last", [False, True], ids=["to rows", "to channels"])
def test_pointwise_between_layouts(name: str, out_last: bool) -> None:
    fn, types = IMAGES[name]
    kernel = define(fn, types)
    layouts = {b: LAST for b, (_, shape) in types.items() if len(shape) == 4}
    if out_last:
        layouts["y0"] = LAST
    check_kernel(kernel, *FEW, layouts=layouts, rule=pointwise)
    if out_last:  # from rows to channels
        check_kernel(kernel, *FEW, layouts={"y0": LAST}, rule=pointwise)


DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_dtypes(dtype: str) -> None:
    def fn(x: Tensor, y: Tensor) -> Any:
        other = elementwise("eq", x, y)
        moved = select(other, x, y)
        if dtype == "bool":
            return elementwise("logical_xor", moved, x), other
        return x * y + moved, elementwise("max", x, y), other

    types: dict[str, tuple[str, Shape]] = {"x": (dtype, ("n", 3)), "y": (dtype, (3,))}
    check_kernel(define(fn, types), *FEW)


@pytest.mark.parametrize("source", DTYPES)
def test_pointwise_casts(source: str) -> None:
    """One input to every other dtype, as the outputs of one kernel."""
    targets = [d for d in DTYPES if d != source]
    kernel = define(lambda x: tuple(cast_to(x, t) for t in targets), one("n", dtype=source))
    compiled = compile_kernel(kernel)
    rng = np.random.default_rng(0)
    for n in (1, 37):
        x = samples(kernel, {"n": n})["x"]
        if x.dtype.kind not in "iub":
            x = np.where(rng.random(n) < 0.1, np.float32(3.7e4), np.abs(x)).astype(x.dtype)
        for got, want in zip(compiled({"x": x}, {"n": n}), evaluate(kernel, {"x": x}, {"n": n}),
                             strict=True):  # fmt: skip
            np.testing.assert_array_equal(got, want)


def test_an_index_from_data_stays_inside_its_buffer() -> None:
    """Whatever an index tensor holds, no kernel reads or writes elsewhere."""

    def fn(x: Tensor, where: Tensor) -> Tensor:
        return compute((where.shape[0], x.shape[1]), F, lambda i, j: x.at(where.at(i), j))

    kernel = define(fn, {"x": (F, (6, 5)), "where": ("int64", ("n",))})
    compiled = compile_kernel(kernel)
    x = np.arange(30, dtype=np.float32).reshape(6, 5)
    where = np.array([0, 5, 3, -(2**62), 2**62, -1, 6], np.int64)
    (got,) = compiled({"x": x, "where": where}, {"n": 7})
    np.testing.assert_array_equal(got, x[np.clip(where, 0, 5)])


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 16, "n"])
@pytest.mark.parametrize("last", [False, True])
def test_places_that_are_found_once_for_all_channels(channels: int | str, last: bool) -> None:
    """The innermost loop is a block of channels, but where they lie next to each other anyhow."""
    types = {"x": (F, (2, channels, 5, 6)), "grid": (F, (2, 4, 3, 2))}
    kernel = define(lambda x, grid: grid_sample(x, grid), types)
    layouts = {"y0": LAST} if last else {}
    sizes = SIZES if channels == "n" else [{}]
    check_kernel(kernel, *sizes, layouts=layouts, rule=pointwise)
    nest = pointwise(Request(kernel, layouts, host(), frozenset()))
    *_, innermost = (s for s in statements(nest.body) if isinstance(s, For))
    assert (innermost.start is not ZERO) == (channels != 1 and not last)


def test_places_that_are_found_at_once_are_found_again() -> None:
    """A place that an index alone tells is no reason to leave the order of the memory."""
    kernel = define(
        lambda x, at: compute((x.shape[0], at.shape[0]), F, lambda i, j: x.at(i, at.at(j))),
        {"x": (F, (40, 9)), "at": ("int64", ("n",))},
    )
    nest = pointwise(Request(kernel, {}, host(), frozenset()))
    *_, innermost = (s for s in statements(nest.body) if isinstance(s, For))
    assert innermost.start is ZERO


def test_pointwise_declines_reductions() -> None:
    kernel = define(lambda x: reduce("sum", x, [0]), one(4, 5))
    with pytest.raises(Declined, match="reduces"):
        compile_kernel(kernel, rule=pointwise)


# --- reductions --------------------------------------------------------------------------------

REDUCED: dict[str, tuple[Shape, list[int]]] = {
    "rows": ((5, "n"), [1]),
    "columns": (("n", 37), [0]),
    "columns, wide": ((7, 300), [0]),
    "everything": ((3, "n"), [0, 1]),
    "middle": ((3, "n", 17), [1]),
    "outer and inner": ((4, 5, "n"), [0, 2]),
    "outer and middle": ((2, "n", 9), [0, 1]),
    "few columns": ((65, 3), [0]),
    "long row": ((3, 1025), [1]),
    "vector": (("n",), [0]),
    "planes": ((3, "n", 9), [1, 2]),
    "planes of a constant size": ((5, 7, 7), [1, 2]),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reduction(name: str) -> None:
    shape, axes = REDUCED[name]
    kernel = define(lambda x: reduce("sum", x, axes), one(*shape))
    sizes = SIZES if "n" in shape else [{}]
    check_kernel(kernel, *sizes, rule=reduction)


def test_a_reduction_of_one_element_each_is_a_map() -> None:
    kernel = define(lambda x: reduce("sum", x, [1]) * 2, one("n", 1))
    check_kernel(kernel, *FEW, rule=pointwise)


@pytest.mark.parametrize("fn", ["sum", "prod", "max", "min"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "float32", "float64"])
def test_reduction_functions(fn: str, dtype: str) -> None:
    """Rows and columns in one kernel each; integers wrap around as NumPy's of that dtype do."""
    for axis in (0, 1):
        kernel = define(lambda x, axis=axis: reduce(fn, x, [axis]), one(13, "n", dtype=dtype))
        check_kernel(kernel, *FEW, tolerance=1e-4)


@pytest.mark.parametrize("fn", ["any", "all"])
def test_logical_reductions(fn: str) -> None:
    check_kernel(define(lambda x: reduce(fn, x, [1]), one("n", 3, dtype="bool")), *FEW)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_reductions_of_narrow_floats_accumulate_in_float32(dtype: str) -> None:
    kernel = define(lambda x: cast_to(reduce("sum", x, [1]), dtype), one(5, "n", dtype=dtype))
    check_kernel(kernel, *FEW)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_max_and_min_of_nan_and_infinities(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((6, 40)).astype(dtype)
    x[0, 3], x[1, :], x[2, 5], x[3, 7] = np.nan, -np.inf, np.inf, -np.inf
    for fn, axis in (("max", 1), ("min", 1), ("max", 0), ("min", 0)):
        kernel = define(lambda v, fn=fn, axis=axis: reduce(fn, v, [axis]), one(6, "n", dtype=dtype))
        (got,) = compile_kernel(kernel)({"x": x}, {"n": 40})
        want = getattr(np, fn)(x, axis=axis)
        np.testing.assert_array_equal(got, want, err_msg=f"{fn} over axis {axis}")


def window(fn: str, taps: int, stride: int, pad: int) -> Callable[[Tensor], Tensor]:
    """A pooling window over the last two axes; outside elements do not count."""

    def define_it(x: Tensor) -> Tensor:
        out = [(d + 2 * pad - taps) // stride + 1 for d in x.shape[2:]]

        def body(i: Any, r: Any) -> Expr:
            at = [a * stride + k - pad for a, k in zip(i[2:], r, strict=True)]
            inside: Expr | None = None
            for a, d in zip(at, x.shape[2:], strict=True):
                for c in (apply("le", 0, a), apply("lt", a, d)):
                    inside = c if inside is None else apply("logical_and", inside, c)
            assert inside is not None
            return apply("select", inside, x.at(i[0], i[1], *at), reduce_identity(fn, x.dtype))

        return reduce_over(fn, (*x.shape[:2], *out), (taps, taps), body)

    return define_it


@pytest.mark.parametrize(
    ("fn", "taps", "stride", "pad"),
    [("max", 3, 2, 1), ("max", 2, 2, 0), ("sum", 3, 1, 1), ("sum", 5, 3, 2), ("max", 7, 1, 3)],
)
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels"])
def test_windows(fn: str, taps: int, stride: int, pad: int, last: bool) -> None:
    kernel = define(window(fn, taps, stride, pad), one(2, 5, "n", 8))
    layouts = {"x": LAST, "y0": LAST} if last else {}
    sizes = [{"n": n} for n in (taps, taps + 1, 13)]
    check_kernel(kernel, *sizes, layouts=layouts, rule=reduction)


@pytest.mark.parametrize(
    ("fn", "taps", "stride", "pad"),
    [("max", 3, 2, 1), ("min", 2, 2, 0), ("sum", 3, 1, 1), ("sum", 5, 3, 2), ("max", 7, 4, 3)],
)
@pytest.mark.parametrize("shape", [(2, 5, "n", 41), (2, 3, 4, "n"), (1, 1, "n", 2067)])
def test_windows_of_lines(fn: str, taps: int, stride: int, pad: int, shape: Shape) -> None:
    """Lines and columns of which blocks are cut and left over."""
    if shape[2] == 4 and taps > 4 + 2 * pad:
        pytest.skip("the window is larger than the image")
    kernel = define(window(fn, taps, stride, pad), one(*shape))
    wide = [{"n": n} for n in (255 * stride + taps - 2 * pad, 1500)] if shape[-1] == "n" else []
    check_kernel(kernel, *[{"n": n} for n in (taps, taps + 1, 29)], *wide, rule=row_windows)


@pytest.mark.parametrize("dtype", ["int32", F])
def test_windows_of_many_channels(dtype: str) -> None:
    """A window whose contiguous elements are few is summed up beside its neighbours."""

    def fn(x: Tensor) -> Tensor:
        def body(i: Any, r: Any) -> Expr:
            return x.at(r[0], i[0] + r[1])

        return reduce_over("sum", (x.shape[1] - 2,), (40, 3), body)

    for width, sizes in (("n", (2, 3, 10, 259, 300)), (19, (19,))):
        kernel = define(fn, one(40, width, dtype=dtype))
        check_kernel(kernel, *[{"n": n} for n in sizes], rule=reduction)


def test_windows_of_one_line_and_of_volumes() -> None:
    def line(x: Tensor) -> Tensor:
        def body(i: Any, r: Any) -> Expr:
            at = i[0] * 2 + r[0] * 3 - 1
            inside = apply("logical_and", apply("le", 0, at), apply("lt", at, x.shape[0]))
            return apply("select", inside, x.at(at), reduce_identity("sum", F))

        return reduce_over("sum", ((x.shape[0] - 5) // 2 + 1,), (3,), body)

    check_kernel(define(line, one("n")), *[{"n": n} for n in (5, 6, 40, 1029)], rule=row_windows)

    def volume(x: Tensor) -> Tensor:
        shape = [x.shape[0], *(d - 1 for d in x.shape[1:])]

        def body(i: Any, r: Any) -> Expr:
            return x.at(i[0], *(a + k for a, k in zip(i[1:], r, strict=True))) * 2

        return reduce_over("max", shape, (2, 2, 2), body) + 1

    check_kernel(define(volume, one(3, 4, "n", 12)), *[{"n": n} for n in (2, 9)], rule=row_windows)


def test_windows_of_lines_propagate_nan_and_infinities() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 23)).astype(F)
    x[0, 0, 4, 7], x[0, 1, 0, 22], x[0, 1, 5:8, 3:9], x[0, 0, 8, 0] = (
        np.nan,
        np.nan,
        -np.inf,
        np.inf,
    )
    for fn in ("max", "min", "sum"):
        kernel = define(window(fn, 3, 2, 1), one(*x.shape))
        (got,) = compile_kernel(kernel, rule=row_windows)({"x": x}, {})
        (want,) = evaluate(kernel, {"x": x}, {})
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=fn)


def test_means_divide_by_what_is_inside() -> None:
    """The count has an expression of its own at both ends of a line."""

    def mean(x: Tensor) -> Tensor:
        total = window("sum", 5, 1, 2)(x)

        def inside(a: Expr, d: Expr) -> Expr:
            last = apply("min", d - a + 2, 5)
            return apply("max", last - apply("max", 2 - a, 0), 0)

        return compute(
            total.shape,
            F,
            lambda b, c, i, j: apply(
                "div",
                total.at(b, c, i, j),
                cast(inside(i, x.shape[2]) * inside(j, x.shape[3]), F),
            ),
        )

    for width in (8, 9, 31, "n"):
        kernel = define(mean, one(1, 2, "n", width))
        check_kernel(kernel, *[{"n": n} for n in (5, 8, 13)], rule=row_windows)


def test_row_windows_decline() -> None:
    for fn, types, why in [
        (window("max", 3, 1, 1), one(1, 2, "n", 7), "short"),
        (lambda x: reduce("sum", x, [1]), one(9, 64), "columns of a window"),
        (lambda x: reduce("sum", x, [0]), one(9, 64), "no rows"),
    ]:
        with pytest.raises(Declined, match=why):
            compile_kernel(define(fn, types), rule=row_windows)


def test_reduction_with_a_formula_around_it() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        mean = reduce("sum", x * x, [1], keepdims=True) / 7.0
        return elementwise("sqrt", mean) + y

    check_kernel(define(fn, two((9, 7), (9, 1))), {})
    check_kernel(define(fn, two(("n", 7), ("n", 1))), *FEW)


# --- rows --------------------------------------------------------------------------------------


def softmax(x: Tensor, axis: int) -> Tensor:
    top = reduce("max", x, [axis], keepdims=True)
    e = materialize(elementwise("exp", x - top))
    return e / reduce("sum", e, [axis], keepdims=True)


def layer_norm(x: Tensor, scale: Tensor, count: int = 1) -> Tensor:
    axes = list(range(x.rank - count, x.rank))
    total = cast(x.shape[-1] if count == 1 else x.shape[-1] * x.shape[-2], x.dtype)
    mean = reduce("sum", x, axes, keepdims=True) / Tensor((), x.dtype, lambda _: total)
    centred = x - mean
    square = reduce("sum", centred * centred, axes, keepdims=True)
    variance = square / Tensor((), x.dtype, lambda _: total)
    return centred * elementwise("rsqrt", variance + 1e-3) * scale


@pytest.mark.parametrize("length", [1, 16, 63, 65, 6625, "n"])
def test_softmax_of_long_rows(length: int | str) -> None:
    kernel = define(lambda x: softmax(x, 1), one(3, length))
    check_kernel(kernel, *({"n": n} for n in (0, 1, 15, 16, 97)), rule=rows)
    kernel = define(lambda x, b: softmax(x * 0.125 + b, 1), two((2, length), (length,)))
    check_kernel(kernel, *({"n": n} for n in (1, 50)), rule=rows)


def test_softmax_of_nan_and_infinities() -> None:
    x = np.random.default_rng(3).standard_normal((6, 70)).astype(F)
    x[0, 69], x[1, :], x[2, 5], x[3, 7], x[4, :] = np.nan, -np.inf, np.inf, -np.inf, 1e30
    (got,) = compile_kernel(define(lambda v: softmax(v, 1), one(6, "n")))({"x": x}, {"n": 70})
    with np.errstate(all="ignore"):
        e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        want = e / e.sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, "n", 17), ("n", 5, 6), (4, 3, "n")])
def test_softmax_over_any_axis(axis: int, shape: Shape) -> None:
    kernel = define(lambda x: softmax(x, axis), one(*shape))
    check_kernel(kernel, *[{"n": n} for n in (1, 2, 16, 33, 129)], rule=rows)


@pytest.mark.parametrize("size", [1, 5, 768, 5000])
def test_layer_norm(size: int) -> None:
    """The longest row does not fit the stack and takes scratch memory."""
    kernel = define(layer_norm, two(("n", 2, size), (size,)))
    check_kernel(kernel, {"n": 0}, {"n": 1}, {"n": 3}, rule=rows)


def test_layer_norm_of_a_symbolic_row() -> None:
    kernel = define(layer_norm, two((3, "n"), ("n",)))
    check_kernel(kernel, *[{"n": n} for n in (1, 7, 64, 2049)], rule=rows)


def test_layer_norm_over_two_axes() -> None:
    kernel = define(lambda x, y: layer_norm(x, y, 2), two(("n", 6, 5), (6, 5)))
    check_kernel(kernel, *FEW, rule=rows)
    kernel = define(lambda x, y: layer_norm(x, y, 2), two((3, "n", 7), ("n", 1)))
    check_kernel(kernel, *FEW, rule=rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_softmax_of_other_floats(dtype: str) -> None:
    def fn(x: Tensor) -> Tensor:
        wide = x if dtype == "float64" else cast_to(x, F)
        return cast_to(softmax(wide, 1), dtype)

    check_kernel(define(fn, one(5, "n", dtype=dtype)), {"n": 1}, {"n": 33})


def test_rows_with_two_results() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        top = reduce("max", x, [1], keepdims=True)
        return x - top, top

    check_kernel(define(fn, one("n", 9)), *FEW, rule=rows)


def test_rows_between_layouts() -> None:
    """Normalisation over the channels of an image that is stored channels last, and not."""
    kernel = define(lambda x: softmax(x, 1), one(2, 19, "n", 5))
    for layouts in ({"x": LAST, "y0": LAST}, {"x": LAST}, {"y0": LAST}, {}):
        check_kernel(kernel, *[{"n": n} for n in (1, 6)], layouts=layouts)


# --- contraction -------------------------------------------------------------------------------


def product_of(x: Tensor, y: Tensor, spec: str) -> Tensor:
    """A sum of products by its Einstein notation, as "mk,kn->mn"."""
    left, out = spec.split("->")
    a, b = left.split(",")
    sizes = {**dict(zip(b, y.shape, strict=True)), **dict(zip(a, x.shape, strict=True))}
    summed = [c for c in dict.fromkeys(a + b) if c not in out]

    def body(i: Any, r: Any) -> Expr:
        at = {**dict(zip(out, i, strict=True)), **dict(zip(summed, r, strict=True))}
        return apply("mul", x.at(*(at[c] for c in a)), y.at(*(at[c] for c in b)))

    return reduce_over("sum", [sizes[c] for c in out], [sizes[c] for c in summed], body)


def product_kernel(spec: str, sizes: dict[str, int | str], epilogue: Any = None) -> Kernel:
    a, b = spec.split("->")[0].split(",")

    def fn(x: Tensor, y: Tensor) -> Tensor:
        out = product_of(x, y, spec)
        return out if epilogue is None else epilogue(out)

    return define(fn, two([sizes[c] for c in a], [sizes[c] for c in b]))


def product_check(
    kernel: Kernel, spec: str, *dims: dict[str, int], constants: Sequence[str] = (),
    after: Callable[[np.ndarray], np.ndarray] = lambda v: v, rule: Any = contraction,
) -> None:  # fmt: skip
    """Against NumPy in float64: `evaluate` would make the whole M x N x K array."""
    fixed = {b: samples(kernel, dims[0], seed=99)[b] for b in constants}
    compiled = compile_kernel(kernel, {}, fixed, rule)
    for k, d in enumerate(dims):
        arrays = {**samples(kernel, d, seed=k), **fixed}
        want = after(np.einsum(spec, *(arrays[b].astype(np.float64) for b in ("x", "y"))))
        close(compiled(arrays, d, seed=k)[0], want.astype(np.float32), what=f"{compiled.nest} {d}")


@pytest.mark.parametrize("n", [4, 5, 16, 17, 33, 70])
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 50])
def test_products_of_constant_size(m: int, n: int) -> None:
    sizes: dict[str, int | str] = {"m": m, "n": n, "k": 19}
    product_check(product_kernel("mk,kn->mn", sizes), "mk,kn->mn", {}, constants=["y"])


PRODUCTS = {
    "matrix": "mk,kn->mn",
    "second transposed": "mk,nk->mn",
    "first transposed": "km,kn->mn",
    "both transposed": "km,nk->mn",
    "result transposed": "mk,kn->nm",
    "batch": "bmk,bkn->bmn",
    "rows of a batch": "bmk,kn->bmn",
    "heads": "bmhk,bnhk->bhmn",
    "heads merged": "bhmk,bkhn->bmhn",
    "two sums": "mkj,kjn->mn",
    "vector times matrix": "k,kn->n",
}
SYMBOLIC = [
    {"m": m, "n": n, "k": k, "b": b}
    for m, n, k, b in [(1, 1, 1, 1), (16, 16, 16, 2), (17, 33, 5, 3), (0, 5, 3, 1), (5, 0, 3, 2),
                       (3, 4, 0, 1), (65, 7, 40, 1)]
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "free"),
    [
        (name, free)
        for name, spec in PRODUCTS.items()
        for free in ("m", "mb", "mnb", "k")
        if set(free) <= set(spec)
    ],
)
def test_products_of_symbolic_size(name: str, free: str) -> None:
    spec = PRODUCTS[name]
    fixed: dict[str, int | str] = {"m": 9, "n": 20, "k": 13, "b": 2, "h": 3, "j": 2}
    sizes = {**fixed, **{c: c for c in free}}
    kernel = product_kernel(spec, sizes)
    dims = [{c: d[c] for c in free} for d in SYMBOLIC]
    product_check(kernel, spec, *dims, rule=schedule)


@pytest.mark.parametrize("m", [1, 9, 40, "m"])
@pytest.mark.parametrize("n", [5, 48, 100])
@pytest.mark.parametrize("constant", [True, False], ids=["packed", "run time"])
def test_long_sums_are_blocked(m: int | str, n: int, constant: bool) -> None:
    kernel = product_kernel("mk,kn->mn", {"m": m, "n": n, "k": 2333})
    dims = [{"m": v} for v in (1, 0, 16, 37)] if m == "m" else [{}]
    product_check(kernel, "mk,kn->mn", *dims, constants=["y"] if constant else [])


EPILOGUES: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {
    "relu": (lambda t: elementwise("max", t, 0.0), lambda v: np.maximum(v, 0)),
    "used twice": (lambda t: t * elementwise("sigmoid", t), lambda v: v / (1 + np.exp(-v))),
    "shifted": (
        lambda t: t + compute((t.shape[-1],), F, lambda j: cast(j, F)),
        lambda v: v + np.arange(v.shape[-1]),
    ),
    "transposed": (lambda t: transpose(t, (1, 0)), lambda v: v.T),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("k", [7, 2050])
def test_epilogues(name: str, k: int) -> None:
    fn, after = EPILOGUES[name]
    kernel = product_kernel("mk,kn->mn", {"m": "m", "n": 21, "k": k}, fn)
    dims = [{"m": v} for v in (1, 18, 0)]
    product_check(kernel, "mk,kn->mn", *dims, constants=["y"], after=after, rule=schedule)


def test_contraction_declines_what_it_cannot_do() -> None:
    cases: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, Shape]]]] = {
        "not one sum": (lambda x, y: x + y, two((4, 4), (4, 4))),
        "only 2 columns": (lambda x, y: product_of(x, y, "mk,kn->mn"), two((4, 4), (4, 2))),
        "not over a product": (lambda x: reduce("sum", x, [0]), one(4, 5)),
    }
    for reason, (fn, types) in cases.items():
        with pytest.raises(Declined, match=reason):
            compile_kernel(define(fn, types), rule=contraction)


# --- convolutions ------------------------------------------------------------------------------


def convolved(
    x: np.ndarray,
    w: np.ndarray,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    group: int,
) -> np.ndarray:
    """Convolution in float64."""
    rank = x.ndim - 2
    border = [(pads[i], pads[i + rank]) for i in range(rank)]
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *border])
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, 2 + rank)))
    steps = [*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations)]
    view = view[(slice(None), slice(None), *steps)]
    channels, filters = w.shape[1], w.shape[0] // group
    summed = [1, *range(2 + rank, 2 + 2 * rank)], [1, *range(2, 2 + rank)]
    parts = [
        np.moveaxis(
            np.tensordot(
                view[:, g * channels : (g + 1) * channels],
                w[g * filters : (g + 1) * filters].astype(np.float64),
                axes=summed,
            ),
            -1,
            1,
        )
        for g in range(group)
    ]
    return np.concatenate(parts, axis=1)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": dict(x=(2, 5, 9, 11), w=(17, 5, 3, 3), pads=(1, 1, 1, 1)),
    "3x3, no border": dict(x=(1, 16, 9, 11), w=(33, 16, 3, 3)),
    "3x3, stride 2": dict(x=(3, 3, 13, 12), w=(16, 3, 3, 3), pads=(1, 1, 1, 1), strides=(2, 2)),
    "uneven border": dict(x=(1, 3, 8, 9), w=(5, 3, 3, 2), pads=(0, 2, 1, 0)),
    "wide border": dict(x=(1, 3, 4, 4), w=(8, 3, 5, 5), pads=(4, 4, 4, 4)),
    "dilated": dict(x=(1, 4, 12, 11), w=(7, 4, 3, 3), dilations=(2, 3), pads=(2, 1, 0, 3)),
    "dilated, stride 3": dict(x=(1, 4, 14, 15), w=(6, 4, 2, 3), dilations=(3, 2), strides=(3, 2)),
    "1x1": dict(x=(2, 33, 6, 7), w=(20, 33, 1, 1)),
    "1x1, stride 2": dict(x=(1, 17, 7, 9), w=(16, 17, 1, 1), strides=(2, 2)),
    "1x1, one channel": dict(x=(2, 1, 5, 5), w=(8, 1, 1, 1)),
    "1x1, one pixel": dict(x=(1, 40, 1, 1), w=(10, 40, 1, 1)),
    "1x1, border": dict(x=(1, 8, 4, 5), w=(16, 8, 1, 1), pads=(1, 0, 1, 2)),
    "one filter": dict(x=(1, 5, 6, 6), w=(1, 5, 3, 3), pads=(1, 1, 1, 1)),
    "three filters": dict(x=(1, 5, 6, 6), w=(3, 5, 3, 3), pads=(1, 1, 1, 1)),
    "70 filters": dict(x=(1, 3, 5, 18), w=(70, 3, 3, 3), pads=(1, 1, 1, 1)),
    "many channels": dict(x=(1, 200, 3, 3), w=(24, 200, 3, 3), pads=(1, 1, 1, 1)),
    "1x1, long sum": dict(x=(1, 1300, 2, 3), w=(24, 1300, 1, 1)),
    "7x7, stride 2": dict(x=(1, 3, 20, 21), w=(64, 3, 7, 7), pads=(3, 3, 3, 3), strides=(2, 2)),
    "1x5": dict(x=(1, 6, 3, 30), w=(16, 6, 1, 5), pads=(0, 2, 0, 2)),
    "5x1": dict(x=(1, 6, 30, 3), w=(16, 6, 5, 1), pads=(2, 0, 2, 0)),
    "taller than the tile": dict(x=(1, 64, 60, 8), w=(16, 64, 3, 3), pads=(1, 1, 1, 1)),
    "groups": dict(x=(2, 6, 7, 8), w=(9, 2, 3, 3), pads=(1, 1, 1, 1), group=3),
    "groups of 16": dict(x=(1, 32, 7, 8), w=(64, 16, 3, 3), pads=(1, 1, 1, 1), group=2),
    "groups, 1x1": dict(x=(1, 12, 5, 6), w=(20, 3, 1, 1), group=4),
    "depthwise": dict(x=(2, 17, 8, 9), w=(17, 1, 3, 3), pads=(1, 1, 1, 1), group=17),
    "depthwise, stride 2": dict(x=(1, 8, 9, 9), w=(8, 1, 5, 5), pads=(2,) * 4, strides=(2, 2),
                                group=8),
    "depthwise, dilated": dict(x=(1, 3, 9, 8), w=(3, 1, 3, 3), dilations=(2, 2), group=3),
    "depthwise, two filters each": dict(x=(1, 5, 8, 7), w=(10, 1, 3, 3), pads=(1,) * 4, group=5),
    "line": dict(x=(2, 5, 40), w=(12, 5, 3), pads=(1, 1)),
    "line, stride 2": dict(x=(1, 80, 31), w=(24, 80, 3), pads=(1, 1), strides=(2,)),
    "depthwise, 7x7": dict(x=(1, 96, 9, 7), w=(96, 1, 7, 7), pads=(3,) * 4, group=96),
    "depthwise, wide": dict(x=(1, 20, 4, 60), w=(20, 1, 3, 3), pads=(1,) * 4, group=20),
    "depthwise, blocks of channels": dict(x=(1, 200, 3, 70), w=(200, 1, 3, 3), pads=(1,) * 4,
                                          group=200),
    "depthwise, stride 2, dilated": dict(x=(2, 33, 19, 18), w=(33, 1, 5, 5), pads=(4,) * 4,
                                         strides=(2, 2), dilations=(2, 2), group=33),
    "depthwise, stride 3": dict(x=(1, 16, 11, 13), w=(16, 1, 2, 3), strides=(3, 3), group=16),
    "depthwise, uneven border": dict(x=(1, 18, 6, 9), w=(18, 1, 3, 4), pads=(2, 0, 0, 3),
                                     group=18),
    "depthwise, windows beside the image": dict(x=(1, 16, 2, 2), w=(16, 1, 3, 3), pads=(6,) * 4,
                                                dilations=(3, 3), group=16),
    "depthwise, 1x3": dict(x=(1, 24, 3, 9), w=(24, 1, 1, 3), pads=(0, 1, 0, 1), group=24),
    "depthwise, 3x1": dict(x=(1, 24, 9, 3), w=(24, 1, 3, 1), pads=(1, 0, 1, 0), group=24),
    "depthwise, one column": dict(x=(1, 24, 9, 1), w=(24, 1, 3, 3), pads=(1,) * 4, group=24),
    "depthwise line": dict(x=(1, 7, 33), w=(7, 1, 4), pads=(3, 0), group=7),
    "volume": dict(x=(1, 3, 5, 6, 7), w=(9, 3, 3, 2, 3), pads=(1, 0, 1, 1, 1, 0)),
    "volume, stride 2": dict(x=(2, 4, 6, 5, 4), w=(16, 4, 2, 2, 2), strides=(2, 1, 2)),
}  # fmt: skip


def convolution(
    name: str, *, free: Sequence[int] = (), before: bool = False, constant: bool = True,
    epilogue: str = "",
) -> Callable[[int], None]:  # fmt: skip
    """Compiles a convolution and returns a check at another size of the `free` axes of x.

    `before` puts a 1x1 convolution in front, so that the input is stored channels last.
    """
    row = CONVOLUTIONS[name]
    shape, rank = tuple(row["x"]), len(row["x"]) - 2
    group = row.get("group", 1)
    strides = row.get("strides", (1,) * rank)
    dilations = row.get("dilations", (1,) * rank)
    pads = row.get("pads", (0,) * 2 * rank)
    rng = np.random.default_rng(len(name))
    w = (rng.standard_normal(row["w"]) / np.prod(row["w"][1:])).astype(np.float32)
    b = rng.standard_normal(row["w"][0]).astype(np.float32)
    mix = rng.standard_normal((shape[1], shape[1], *[1] * rank)) / shape[1]
    mix = mix.astype(np.float32)
    declared = [f"d{k}" if k in free else d for k, d in enumerate(shape)]
    inputs: dict[str, tuple[str, Sequence[int | str]]] = {"x": (F, declared)}
    constants: dict[str, np.ndarray] = {"b": b}
    nodes = []
    source = "x"
    if before:
        constants["mix"] = mix
        nodes.append(helper.make_node("Conv", ["x", "mix"], ["mixed"]))
        source = "mixed"
    if constant:
        constants["w"] = w
    else:
        inputs["w"] = F, w.shape
    attrs = {"strides": strides, "dilations": dilations, "pads": pads, "group": group}
    nodes.append(helper.make_node("Conv", [source, "w", "b"], ["c"], **attrs))
    last = "c"
    if epilogue == "add and relu":
        inputs["r"] = F, [f"r{k}" for k in range(rank + 2)]
        nodes.append(helper.make_node("Add", ["c", "r"], ["s"]))
        nodes.append(helper.make_node("Relu", ["s"], ["o"]))
        last = "o"
    elif epilogue == "silu":
        nodes.append(helper.make_node("Sigmoid", ["c"], ["s"]))
        nodes.append(helper.make_node("Mul", ["c", "s"], ["o"]))
        last = "o"
    low = lower_model(model(nodes, inputs, [last], constants))

    def check(more: int) -> None:
        sizes = [d + more if k in free else d for k, d in enumerate(shape)]
        feeds = {"x": rng.standard_normal(sizes).astype(np.float32)}
        x = feeds["x"]
        if before:
            x = convolved(x, mix, (1,) * rank, (1,) * rank, (0,) * 2 * rank, 1)
        want = convolved(x, w, strides, dilations, pads, group)
        want = want + b.reshape(-1, *[1] * rank)
        if not constant:
            feeds["w"] = w
        if epilogue == "add and relu":
            feeds["r"] = rng.standard_normal(want.shape).astype(np.float32)
            want = np.maximum(want + feeds["r"], 0)
        elif epilogue == "silu":
            want = want / (1 + np.exp(-want))
        close(run_program(low, feeds, more)[0], want.astype(np.float32), what=f"{name} + {more}")

    return check


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    convolution(name)(0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_of_symbolic_size_inside_a_region(name: str) -> None:
    """Batch and all spatial sizes are symbolic, the input is stored channels last."""
    rank = len(CONVOLUTIONS[name]["x"])
    check = convolution(name, free=(0, *range(2, rank)), before=True, epilogue="silu")
    for more in (0, 1, 16) if CONVOLUTIONS[name]["x"][1] <= 40 else (0, 1):
        check(more)


@pytest.mark.parametrize(
    "name", ["3x3", "3x3, stride 2", "1x1", "1x1, stride 2", "groups", "depthwise", "line"]
)
@pytest.mark.parametrize("free", [(), (3,), (0,)], ids=["fixed", "width", "batch"])
def test_convolution_with_residual(name: str, free: tuple[int, ...]) -> None:
    free = tuple(k for k in free if k < len(CONVOLUTIONS[name]["x"]))
    check = convolution(name, free=free, epilogue="add and relu", before=bool(free))
    for more in (0, 3) if free else (0,):
        check(more)


@pytest.mark.parametrize(
    "name", ["3x3", "3x3, no border", "1x1", "dilated", "groups", "depthwise", "line", "volume"]
)
def test_convolution_with_run_time_weights(name: str) -> None:
    convolution(name, constant=False)(0)
    convolution(name, constant=False, before=True, free=(0, 2))(2)
