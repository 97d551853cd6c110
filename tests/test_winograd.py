"""Minimal filtering of 3x3 correlations: odd sizes, borders, epilogues, accuracy, declined cases.

The rule's choice by cost is replaced where small kernels are compiled, because it would leave them
to the direct convolution. Buffers lie between guard bands, scratch memory starts as NaN and tiles
run in random order (`kernels_support`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from kernels_support import (
    Guarded,
    check_kernel,
    close,
    compile_kernel,
    define,
    lab,
    lower_model,
    model,
    run_program,
    samples,
)
from onnx import helper

from onnxjit.codegen import microkernels
from onnxjit.codegen.expr import apply, index
from onnxjit.codegen.instruction_sets import ISAS, isa_of, runs
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.loops import LoopNest
from onnxjit.codegen.minimal_filtering import F2, F4, Algorithm
from onnxjit.codegen.packing import Packing, pack
from onnxjit.codegen.schedule.request import Declined, Request
from onnxjit.codegen.schedule.winograd import WinogradNest, winograd
from onnxjit.codegen.schedule.winograd_cost import Choice
from onnxjit.codegen.schedule.winograd_match import correlation
from onnxjit.codegen.target import cpu_target, host
from onnxjit.codegen.tensor import Tensor, elementwise, materialize, pad_with, reduce_over
from onnxjit.runtime.link import link

F = "float32"
LAST = (0, 2, 3, 1)
ALGORITHMS = [pytest.param(a, id=a.name) for a in (F2, F4)]

Pads = tuple[int, int, int, int]
"""Rows above and columns left of the input, rows below and columns right of it."""

Epilogue = Callable[..., Tensor]


def forced(algorithm: Algorithm, tiles: int = 6, group: int = 0) -> Callable[[Request], LoopNest]:
    """The rule with small blocks, whatever it is estimated to cost."""

    def rule(r: Request) -> LoopNest:
        isa = isa_of(r.target)
        narrow = [t for t in microkernels.rows(isa) if t.mr == 4 and t.nr <= 16]
        tile = max(narrow, key=lambda t: t.nr)
        return WinogradNest(r, correlation(r), Choice(algorithm, tiles, tile, group, 0.0)).nest()

    return rule


def kernel(
    x: Sequence[int | str],
    n: int,
    pads: Pads = (1, 1, 1, 1),
    epilogue: Epilogue | None = None,
    fill: float = 0.0,
    before: Callable[[Tensor], Tensor] = lambda x: x,
    **inputs: tuple[str, Sequence[int | str]],
) -> Kernel:
    """A correlation of x [batch, channels, height, width] with n constant filters w."""

    def body(x: Tensor, w: Tensor, *more: Tensor) -> Tensor:
        source = before(x)
        if any(pads):
            low, high = (0, 0, *pads[:2]), (0, 0, *pads[2:])
            source = materialize(pad_with(source, low, high, fill), "pad")
        height, width = (d - 2 for d in source.shape[2:])
        out = reduce_over(
            "sum",
            (x.shape[0], index(n), apply("max", height, 0), apply("max", width, 0)),
            (x.shape[1], index(3), index(3)),
            lambda i, k: apply(
                "mul",
                source.at(i[0], k[0], i[2] + k[1], i[3] + k[2]),
                w.at(i[1], k[0], k[1], k[2]),
            ),
        )
        return out if epilogue is None else epilogue(out, x, *more)

    c = x[1]
    assert isinstance(c, int)
    return define(body, {"x": (F, x), "w": (F, (n, c, 3, 3)), **inputs})


def check(
    k: Kernel, algorithm: Algorithm, *sizes: dict[str, int], constants: Sequence[str] = ("w",),
    layouts: dict[str, tuple[int, ...]] | None = None, **options: int,
) -> None:  # fmt: skip
    layouts = {"x": LAST, "y0": LAST} if layouts is None else layouts
    compiled = check_kernel(
        k, *(sizes or ({},)), layouts=layouts, constants=constants,
        rule=forced(algorithm, **options),
    )  # fmt: skip
    assert compiled.nest.rule == "winograd"


# --- sizes and borders -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("shape", "n"), [
    ((1, 16, 8, 8), 37), ((2, 5, 9, 11), 16), ((1, 33, 2, 13), 3), ((3, 17, 7, 2), 37),
    ((1, 256, 4, 5), 64),
], ids=str)  # fmt: skip
def test_fixed_sizes(algorithm: Algorithm, shape: tuple[int, ...], n: int) -> None:
    check(kernel(shape, n), algorithm, group=2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pads", [
    (0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 3), (0, 2, 0, 0), (0, 0, 3, 1), (7, 5, 6, 9),
    (-1, 0, 1, -2),
], ids=str)  # fmt: skip
def test_borders(algorithm: Algorithm, pads: Pads) -> None:
    fill = 0.5 if sum(pads) > 6 else 0.0
    check(kernel((2, 18, 9, 10), 20, pads, fill=fill), algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 0, 0, 0), (2, 1, 0, 1)], ids=str)
def test_symbolic_sizes(algorithm: Algorithm, pads: Pads) -> None:
    k = kernel(("b", 20, "h", "w"), 35, pads)
    sizes = [(0, 4, 4), (1, 2, 2), (1, 3, 40), (2, 8, 8), (3, 13, 5), (1, 2, 0), (5, 6, 7)]
    check(k, algorithm, *({"b": b, "h": h, "w": w} for b, h, w in sizes), tiles=5, group=2)


@pytest.mark.parametrize(("tiles", "group"), [(1, 0), (2, 5), (7, 0), (64, 1), (100, 2), (9, 100)])
def test_blocks(tiles: int, group: int) -> None:
    check(kernel((2, 16, 15, 22), 70), F4, tiles=tiles, group=group)


@pytest.mark.parametrize("layouts", [
    {}, {"x": LAST}, {"y0": LAST}, {"x": (2, 0, 3, 1), "y0": (3, 1, 2, 0)},
], ids=str)  # fmt: skip
def test_layouts(layouts: dict[str, tuple[int, ...]]) -> None:
    check(kernel((2, 19, 9, 10), 20, (1, 0, 2, 1)), F4, layouts=layouts)


def test_an_index_map_at_the_output() -> None:
    """Filters stored as pixels of a larger image, as behind a PixelShuffle."""
    m = model(
        [
            helper.make_node("Conv", ["x", "m"], ["a"]),
            helper.make_node("Conv", ["a", "w"], ["c"], pads=[1] * 4),
            helper.make_node("DepthToSpace", ["c"], ["y"], blocksize=2),
        ],
        {"x": (F, (1, 8, 56, 56))},
        ["y"],
        {"w": normal(128, 64, 3, 3), "m": normal(64, 8, 1, 1)},
    )
    low = lower_model(m)
    assert "winograd" in low.rules
    x = normal(1, 8, 56, 56)
    mixed = np.einsum("kc,bchw->bkhw", constant(m, "m")[:, :, 0, 0], x)
    out = convolved(mixed, constant(m, "w"))
    out = out.reshape(1, 2, 2, 32, 56, 56).transpose(0, 3, 4, 1, 5, 2).reshape(1, 32, 112, 112)
    close(run_program(low, {"x": x})[0], out.astype(np.float32))


# --- what is around the sum --------------------------------------------------------------------

EPILOGUES: dict[str, tuple[Epilogue, dict[str, tuple[str, Sequence[int | str]]]]] = {
    "bias and relu": (
        lambda y, x, b: elementwise("max", y + b, 0.0), {"b": (F, (40, 1, 1))},
    ),
    "silu": (lambda y, x: y / (elementwise("exp", y * -1.0) + 1.0), {}),
    "residual": (
        lambda y, x, r: elementwise("max", y + r, 0.0), {"r": (F, ("b", 40, "h", "w"))},
    ),
    "gate of a channel": (lambda y, x, g: y * g, {"g": (F, ("b", 40, 1, 1))}),
    "its own input": (lambda y, x: y + x, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str) -> None:
    epilogue, inputs = EPILOGUES[name]
    k = kernel(("b", 40, "h", "w"), 40, epilogue=epilogue, **inputs)
    layouts = {"x": LAST, "y0": LAST, "r": LAST}
    fixed = ["w", "b"] if "b" in inputs else ["w"]
    sizes = [{"b": b, "h": h, "w": w} for b, h, w in ((1, 4, 4), (2, 7, 9))]
    check(k, F4, *sizes, constants=fixed, layouts=layouts)


def test_work_on_the_input_inside_the_border() -> None:
    """A norm's scale and ReLU in front: zero outside the input, not the image of zero."""

    def before(x: Tensor) -> Tensor:
        return elementwise("max", x * 2.0 + 1.0, 0.0)

    check(kernel((2, 20, 9, 10), 20, (1, 2, 1, 0), before=before), F4)
    check(kernel(("b", 20, "h", 10), 20, before=before), F2, {"b": 2, "h": 5}, {"b": 1, "h": 18})


# --- row-major data ----------------------------------------------------------------------------

ROW_MAJOR: dict[str, tuple[int, ...]] = {}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("shape", "n"), [
    ((1, 16, 8, 8), 37), ((2, 5, 9, 11), 16), ((1, 33, 2, 13), 3), ((3, 17, 7, 2), 37),
    ((1, 100, 1, 1), 20), ((1, 200, 5, 41), 18), ((2, 256, 4, 5), 64),
], ids=str)  # fmt: skip
def test_row_major_sizes(algorithm: Algorithm, shape: tuple[int, ...], n: int) -> None:
    check(kernel(shape, n), algorithm, layouts=ROW_MAJOR, group=2)


@pytest.mark.parametrize("pads", [
    (0, 0, 0, 0), (2, 0, 1, 3), (0, 0, 3, 1), (7, 5, 6, 9), (1, 12, 1, 12), (-1, 0, 1, -2),
], ids=str)  # fmt: skip
def test_row_major_borders(pads: Pads) -> None:
    fill = 0.5 if sum(pads) > 6 else 0.0
    check(kernel((2, 18, 9, 10), 20, pads, fill=fill), F4, layouts=ROW_MAJOR, tiles=2)


@pytest.mark.parametrize("name", ["bias and relu", "residual", "its own input"])
def test_row_major_symbolic_sizes(name: str) -> None:
    epilogue, inputs = EPILOGUES[name]
    k = kernel(("b", 40, "h", "w"), 40, epilogue=epilogue, **inputs)
    sizes = [(0, 4, 4), (1, 2, 2), (1, 3, 40), (2, 8, 8), (3, 13, 5), (1, 2, 0)]
    fixed = ["w", "b"] if "b" in inputs else ["w"]
    dims = [{"b": b, "h": h, "w": w} for b, h, w in sizes]
    check(k, F4, *dims, constants=fixed, layouts=ROW_MAJOR, tiles=5, group=2)


def test_row_major_work_on_the_input() -> None:
    """What is computed from the input cannot be copied in registers: read pixel by pixel."""
    k = kernel((2, 20, 9, 10), 20, before=lambda x: elementwise("max", x * 2.0 + 1.0, 0.0))
    check(k, F4, layouts=ROW_MAJOR)


def test_results_do_not_depend_on_the_layout() -> None:
    k = kernel((2, 150, 13, 27), 40)
    data = samples(k)
    one, other = (
        compile_kernel(k, layouts, {"w": data["w"]}, forced(F4, tiles=7))
        for layouts in (ROW_MAJOR, {"x": LAST, "y0": LAST})
    )
    assert any("pack" in s for s in one.nest.symbols)
    assert not any("pack" in s for s in other.nest.symbols)
    np.testing.assert_array_equal(one(data)[0], other(data)[0])


# --- whole models ------------------------------------------------------------------------------


def normal(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal(shape).astype(np.float32)


def constant(m: Any, name: str) -> np.ndarray:
    from onnx import numpy_helper

    return next(numpy_helper.to_array(t) for t in m.graph.initializer if t.name == name)


def convolved(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The correlation with a border of one, in float64."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    view = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return np.moveaxis(np.tensordot(view, w.astype(np.float64), ((1, 4, 5), (1, 2, 3))), 3, 1)


def test_a_block_of_a_network() -> None:
    """Two correlations with bias, ReLU and a residual, on run-time sizes, chosen by the cost."""
    m = model(
        [
            helper.make_node("Conv", ["x", "m"], ["a"]),
            helper.make_node("Conv", ["a", "w1", "b1"], ["c1"], pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1] * 4),
            helper.make_node("Add", ["c2", "a"], ["s"]),
            helper.make_node("Relu", ["s"], ["y"]),
        ],
        {"x": (F, ("b", 8, "h", "w"))},
        ["y"],
        {
            "m": normal(64, 8, 1, 1),
            "w1": normal(64, 64, 3, 3), "b1": normal(64),
            "w2": normal(64, 64, 3, 3), "b2": normal(64),
        },
    )  # fmt: skip
    low = lower_model(m)
    assert low.rules.count("winograd") == 2
    for shape in ((1, 8, 5, 7), (2, 8, 17, 30), (0, 8, 4, 4)):
        x = normal(*shape)
        a = np.einsum("kc,bchw->bkhw", constant(m, "m")[:, :, 0, 0].astype(np.float64), x)
        b1, b2 = (constant(m, b).reshape(-1, 1, 1) for b in ("b1", "b2"))
        r = np.maximum(convolved(a, constant(m, "w1")) + b1, 0)
        want = np.maximum(convolved(r, constant(m, "w2")) + b2 + a, 0)
        close(run_program(low, {"x": x})[0], want.astype(np.float32), what=str(shape))


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "largest", "typical"),
    [pytest.param(F2, 2e-6, 1e-6, id="F2"), pytest.param(F4, 6e-6, 3e-6, id="F4")],
)
def test_error_against_float64(algorithm: Algorithm, largest: float, typical: float) -> None:
    """512 channels of normal data: largest error of the largest value, and root mean squares."""
    k = kernel((1, 512, 14, 14), 48)
    data = samples(k)
    run = compile_kernel(
        k, {"x": LAST, "y0": LAST}, {"w": data["w"]}, forced(algorithm, tiles=28, group=2)
    )
    (got,) = run(data)
    want = convolved(data["x"], data["w"])
    error = got - want
    assert np.abs(error).max() <= largest * np.abs(want).max()
    assert np.sqrt(np.mean(error**2)) <= typical * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_transforms_are_exact_in_exact_arithmetic(algorithm: Algorithm) -> None:
    """Aᵀ [(G g Gᵀ) * (Bᵀ d B)] A is the correlation, evaluated in float64."""
    rng = np.random.default_rng(0)
    d, g = rng.standard_normal((algorithm.a, algorithm.a)), rng.standard_normal((3, 3))
    rows = [matrix(algorithm, line) for line in (algorithm.inputs, algorithm.outputs)]
    b, a, f = rows[0], rows[1], np.array(algorithm.filter)
    got = a @ ((f @ g @ f.T) * (b @ d @ b.T)) @ a.T
    want = [
        [(d[i : i + 3, j : j + 3] * g).sum() for j in range(algorithm.m)]
        for i in range(algorithm.m)
    ]
    np.testing.assert_allclose(got, want, atol=1e-12)


def matrix(algorithm: Algorithm, line: Any) -> np.ndarray:
    """The matrix of a straight-line transform, by transforming unit vectors."""
    return np.array(line(list(np.eye(algorithm.a))))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("channels", [0, 1, 7, 8, 9, 16, 31, 48])
@pytest.mark.parametrize("isa", [n for n, isa in ISAS.items() if runs(isa, host())])
def test_transforms_of_lines_and_tiles(algorithm: Algorithm, channels: int, isa: str) -> None:
    """Both micro-kernels between guard bands, against the matrices in float64."""
    m, a, n = algorithm.m, algorithm.a, channels
    gap, count = n + 3, 3
    pointer, integer = ctypes.c_void_p, ctypes.c_int64

    def run(direction: str, kinds: list[Any], *arguments: int) -> None:
        symbol = microkernels.winograd(direction, m, isa)
        library = link([microkernels.object_code(symbol, host())])
        ctypes.CFUNCTYPE(None, *kinds)(library.address(symbol))(*arguments)

    near, far = normal(a - m, count, gap), normal(m, count, gap)
    out = Guarded(count * a * gap, np.dtype(np.float32))
    run("in", [pointer, pointer, integer, integer, pointer, *[integer] * 4],
        near.ctypes.data, far.ctypes.data, count * gap, gap,
        out.address, gap, a * gap, n, count)  # fmt: skip
    out.check("lines")
    got = out.array.reshape(count, a, gap)
    lines = np.concatenate([near, far]).astype(np.float64)
    want = np.einsum("ij,jlc->lic", matrix(algorithm, algorithm.inputs), lines)
    np.testing.assert_allclose(got[..., :n], want[..., :n], atol=2e-6)
    assert np.isnan(got[..., n:]).all()

    y = normal(a, a, n)
    out = Guarded(m * m * gap, np.dtype(np.float32))
    run("out", [pointer, pointer, integer, integer], y.ctypes.data, out.address, m * gap, n)
    out.check("tile")
    got = out.array.reshape(m, m * gap)
    at = matrix(algorithm, algorithm.outputs)
    want = np.einsum("ip,oq,pqc->ioc", at, at, y.astype(np.float64)).reshape(m, m * n)
    np.testing.assert_allclose(got[:, : m * n], want, atol=2e-5)
    assert np.isnan(got[:, m * n :]).all()


def test_filters_are_transformed_when_they_are_packed() -> None:
    w = normal(37, 5, 3, 3)
    strides = [s // 4 for s in w.strides]
    inner = tuple(zip((5, 3, 3), strides[1:], strict=True))
    p = Packing("w", 0, (), (37, strides[0]), inner, 16, F4.filter)
    packed = pack(w, p).reshape(3, 6, 6, 5, 16)
    g = np.array(F4.filter)
    want = np.einsum("ai,bj,ncij->abcn", g, g, w.astype(np.float64))
    got = packed.transpose(1, 2, 3, 0, 4).reshape(6, 6, 5, 48)
    np.testing.assert_array_equal(got[..., :37], want.astype(np.float32))
    assert not got[..., 37:].any()


# --- declined ----------------------------------------------------------------------------------


def test_other_kernels_are_declined() -> None:
    def strided(x: Tensor, w: Tensor, step: int, reach: int, taps: int = 3) -> Tensor:
        return reduce_over(
            "sum", (x.shape[0], w.shape[0], index(5), index(5)), (x.shape[1], taps, taps),
            lambda i, k: apply(
                "mul",
                x.at(i[0], k[0], i[2] * step + k[1] * reach, i[3] * step + k[2] * reach),
                w.at(i[1], k[0], k[1], k[2]),
            ),
        )  # fmt: skip

    def shape(taps: int) -> dict[str, tuple[str, Sequence[int | str]]]:
        return {"x": (F, (1, 32, 16, 16)), "w": (F, (32, 32, taps, taps))}

    cases: dict[str, tuple[Kernel, Sequence[str]]] = {
        "3x3 window with stride 1": (define(lambda x, w: strided(x, w, 2, 1), shape(3)), "w"),
        "window with stride 1": (define(lambda x, w: strided(x, w, 1, 2), shape(3)), "w"),
        "3x3 window": (define(lambda x, w: strided(x, w, 1, 1, 5), shape(5)), "w"),
        "filter is not constant": (kernel((1, 32, 56, 56), 32), ""),
        "channels are too few": (kernel((1, 3, 56, 56), 64), "w"),
        "of the direct convolution's time": (kernel((1, 512, 2, 2), 512), "w"),
        "padded input is an output": (define(lambda x: (x + 1, x * 2), {"x": (F, (3,))}), ""),
        "not one sum": (define(lambda x: x + 1, {"x": (F, (3,))}), ""),
    }
    layouts = {"x": LAST, "y0": LAST}
    for reason, (k, constants) in cases.items():
        request = Request(k, layouts, lab().target, frozenset(constants))
        with pytest.raises(Declined, match=reason):
            winograd(request)


def test_the_choice_follows_the_size() -> None:
    """Large images take the larger tiles; few pixels with many channels the smaller ones."""

    def note(x: tuple[int, ...], n: int, resident: bool = False) -> str:
        request = Request(
            kernel(x, n), {"x": LAST, "y0": LAST}, lab().target, frozenset("w"), resident=resident
        )
        return winograd(request).notes[0]

    assert F4.name in note((1, 64, 56, 56), 64)
    # Filters that stay in a cache may grow, as far as they still stay there.
    assert F4.name in note((1, 256, 7, 7), 256, resident=True)
    assert F2.name in note((1, 512, 7, 7), 512, resident=True)


def test_the_choice_follows_the_vectors() -> None:
    """Products that take half as long hide less of the filters' way from memory."""

    def note(name: str, side: int) -> str:
        isa, caches = ISAS[name], {"l1": 32 << 10, "l2": 512 << 10, "l3": 32 << 20}
        target = cpu_target("x86_64-unknown-linux-gnu", isa.features, cores=2, **caches)
        x, layouts = (1, 512, side, side), {"x": LAST, "y0": LAST}
        return winograd(Request(kernel(x, 512), layouts, target, frozenset("w"))).notes[0]

    assert F4.name in note("avx2", 14) and F2.name in note("avx512", 14)
    assert F2.name in note("avx2", 7)
    with pytest.raises(Declined, match="of the direct convolution's time"):
        note("avx512", 7)
