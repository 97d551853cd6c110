"""Concatenations without a copy: what is placed, what is copied, and that the numbers are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_support import (
    Lowered,
    check_kernel,
    close,
    define,
    laid_out,
    logical,
    lower_model,
    model,
    run_model,
    run_program,
    samples,
)
from onnx.helper import make_node as node
from onnx.reference import ReferenceEvaluator
from test_cuda_emission import Simulator
from test_winograd import forced

import onnxjit
from onnxjit.codegen import tensor as T
from onnxjit.codegen.build_cuda import cuda_target
from onnxjit.codegen.emit_cuda import emit
from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.codegen.expr import apply, index, poly_mul
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.layout import Layout, Strided
from onnxjit.codegen.minimal_filtering import F4
from onnxjit.codegen.schedule import Request, schedule
from onnxjit.codegen.tensor import Tensor, elementwise, materialize, pad_with, reduce_over
from onnxjit.program import JoinCall

F = "float32"
Inputs = dict[str, tuple[str, Sequence[int | str]]]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def joins(low: Lowered) -> int:
    return sum(isinstance(c, JoinCall) for c in low.program.calls)


def copies(low: Lowered) -> list[int]:
    """The number of parts that each kernel that is left of a concatenation copies."""
    return [len(k.stages) for k in low.kernels if k.name == "concat"]


def feeds_of(m: onnx.ModelProto, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    out = {}
    for v in m.graph.input:
        dims = v.type.tensor_type.shape.dim
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims]
        out[v.name] = normal(*shape, seed=seed + len(out))
    return out


def compared(m: onnx.ModelProto, *sizes: dict[str, int]) -> Lowered:
    """Each kernel on guarded memory, and the whole by the executor, against the reference."""
    low = lower_model(m)
    run = run_model(m)
    for at in sizes or ({},):
        feeds = feeds_of(m, **at)
        want = ReferenceEvaluator(m).run(None, feeds)
        for got in (run_program(low, feeds), run(feeds), run(feeds)):
            for a, b in zip(got, want, strict=True):
                close(a, np.asarray(b), 1e-5, str(at))
    return low


# --- models ------------------------------------------------------------------------------------

SIZES = [{"n": 1, "h": 9, "w": 11}, {"n": 3, "h": 2, "w": 1}, {"n": 0, "h": 4, "w": 4},
         {"n": 2, "h": 13, "w": 16}]  # fmt: skip
IMAGES: Inputs = {"x": (F, ("n", 8, "h", "w"))}


def conv(x: str, y: str, w: str, pad: int = 0, **attributes: int) -> list[onnx.NodeProto]:
    return [
        node("Conv", [x, w], [y + "_"], pads=[pad] * 4, **attributes),
        node("Relu", [y + "_"], [y]),
    ]


def test_parts_of_every_kind() -> None:
    """An inception block: 1x1, 3x3, strided, depthwise and pooled branches."""
    nodes = [
        *conv("x", "s", "w0"),
        *conv("s", "a", "w1"),
        *conv("s", "b", "w3", 1),
        *conv("s", "d", "wd", 1, group=24),
        node("MaxPool", ["s"], ["e"], kernel_shape=[3, 3], pads=[1] * 4),
        node("AveragePool", ["s"], ["f"], kernel_shape=[3, 3], pads=[1] * 4),
        node("Concat", ["a", "b", "d", "e", "f"], ["c"], axis=1),
        *conv("c", "y", "w5"),
    ]
    constants = {"w0": normal(24, 8, 1, 1), "w1": normal(17, 24, 1, 1), "w3": normal(33, 24, 3, 3),
                 "wd": normal(24, 1, 3, 3), "w5": normal(9, 122, 1, 1)}  # fmt: skip
    low = compared(model(nodes, IMAGES, ["y"], constants), *SIZES)
    assert joins(low) == 1 and not copies(low)


def dense_block(flat: bool) -> onnx.ModelProto:
    """Layers that read all before them: each joins the newest part to the last join, or all."""
    nodes, constants = conv("x", "x0", "w0"), {"w0": normal(16, 8, 1, 1)}
    parts, last = ["x0"], "x0"
    for k in range(4):
        channels = 16 * (k + 1)
        nodes += [
            node("Mul", [last, f"s{k}"], [f"m{k}"]),
            node("Relu", [f"m{k}"], [f"r{k}"]),
            *conv(f"r{k}", f"x{k + 1}", f"w{k + 1}", 1),
        ]
        constants |= {f"s{k}": normal(channels, 1, 1), f"w{k + 1}": normal(16, channels, 3, 3)}
        parts.append(f"x{k + 1}")
        new = f"c{k}"
        nodes.append(node("Concat", parts if flat else [last, parts[-1]], [new], axis=1))
        last = new
    nodes.append(node("GlobalAveragePool", [last], ["y"]))
    return model(nodes, IMAGES, ["y"], constants)


@pytest.mark.parametrize("flat", [False, True])
def test_a_dense_block_lives_in_one_buffer(flat: bool) -> None:
    low = compared(dense_block(flat), *SIZES[:2], SIZES[3])
    assert joins(low) == 4 and not copies(low)
    assert len({place.base for place in low.program.places.values()}) == 1


def test_skip_connections() -> None:
    """A small U-Net: the skip is read by pooling long before it is joined."""
    nodes = [
        *conv("x", "a", "w0", 1),
        node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        *conv("p", "b", "w1", 1),
        node("ConvTranspose", ["b", "u"], ["t"], strides=[2, 2]),
        node("Concat", ["t", "a"], ["c"], axis=1),
        *conv("c", "y", "w2", 1),
    ]
    constants = {"w0": normal(16, 8, 3, 3), "w1": normal(32, 16, 3, 3), "u": normal(32, 16, 2, 2),
                 "w2": normal(5, 32, 3, 3)}  # fmt: skip
    m = model(nodes, {"x": (F, ("n", 8, "2*h", "2*w"))}, ["y"], constants)
    low = lower_model(m)
    run = run_model(m)
    assert joins(low) == 1 and not copies(low)
    for n, h, w in [(1, 4, 6), (2, 2, 2), (1, 10, 14)]:
        feeds = {"x": normal(n, 8, h, w)}
        (want,) = ReferenceEvaluator(m).run(None, feeds)
        for got in (run_program(low, feeds), run(feeds)):
            close(got[0], np.asarray(want), 1e-5)


def test_what_cannot_be_placed_is_copied() -> None:
    """An input, a constant, an output of the model, a part that occurs again, one that has its
    place elsewhere, and one that has to be computed."""
    nodes = [
        *conv("x", "a", "w0"),
        *conv("x", "b", "w1", 1),
        *conv("x", "e", "w1", 1),
        node("Concat", ["e", "i", "k", "b", "e", "a"], ["c"], axis=1),
        *conv("c", "y", "w2"),
        node("Neg", ["b"], ["n"]),
        node("Concat", ["n", "a", "y"], ["d"], axis=1),
        *conv("d", "z", "w3"),
    ]
    constants = {
        "w0": normal(16, 8, 1, 1),
        "w1": normal(16, 8, 3, 3),
        "k": normal(1, 16, 5, 6),
        "w2": normal(24, 96, 1, 1),
        "w3": normal(8, 56, 1, 1),
    }
    inputs: Inputs = {"x": (F, (1, 8, 5, 6)), "i": (F, (1, 16, 5, 6))}
    low = compared(model(nodes, inputs, ["z", "b"], constants))
    assert joins(low) == 2 and sorted(copies(low)) == [1, 5]


def test_a_joined_output_of_the_model_is_written_by_its_parts() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Softmax", ["a"], ["s"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Concat", ["s", "b"], ["y"], axis=-1),
    ]
    constants = {"w": normal(8, 24), "v": normal(8, 40)}
    m = model(nodes, {"x": (F, ("n", 8))}, ["y"], constants)
    low = compared(m, *({"n": n} for n in (0, 1, 2, 13, 70)))
    assert joins(low) == 1 and not copies(low)
    (place,) = {p.base for p in low.program.places.values()}
    assert place == low.program.outputs[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_row_major_parts_along_each_axis(axis: int) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("ReduceSum", ["x", "two"], ["r"]),
        node("Mul", ["r", "x"], ["b"]),
        node("Concat", ["a", "b", "a"], ["c"], axis=axis),
        node("Neg", ["c"], ["y"]),
    ]
    m = model(nodes, {"x": (F, ("n", 3, 32))}, ["y"], {"w": normal(32, 32), "two": np.array([2])})
    low = compared(m, *({"n": n} for n in (0, 1, 5)))
    assert joins(low) == 1 and copies(low) == [2]  # the product is computed there


def test_flattened_maps_of_several_scales() -> None:
    """Heads of a detector: channels-last maps, transposed, flattened and joined along rows."""
    nodes = [
        *conv("x", "a", "w0", 1),
        node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        *conv("a", "h0", "w1"),
        *conv("p", "h1", "w1"),
        *(node("Transpose", [f"h{k}"], [f"t{k}"], perm=[0, 2, 3, 1]) for k in (0, 1)),
        *(node("Reshape", [f"t{k}", "rows"], [f"f{k}"]) for k in (0, 1)),
        node("Concat", ["f0", "f1"], ["c"], axis=1),
        node("Neg", ["c"], ["y"]),
    ]
    constants = {
        "w0": normal(16, 8, 3, 3),
        "w1": normal(20, 16, 1, 1),
        "rows": np.array([0, -1, 20]),
    }
    m = model(nodes, {"x": (F, ("n", 8, 6, 10))}, ["y"], constants)
    low = compared(m, {"n": 1}, {"n": 3})
    assert joins(low) == 1 and not copies(low)


def test_short_runs_and_sizes_known_late_are_left_alone() -> None:
    narrow = model(
        [
            *(node("MatMul", ["x", f"w{k}"], [f"a{k}"]) for k in (0, 1)),
            node("Concat", ["a0", "a1"], ["c"], axis=1),
            node("Neg", ["c"], ["y"]),
        ],
        {"x": (F, ("n", 8))}, ["y"], {"w0": normal(8, 5), "w1": normal(8, 3)},
    )  # fmt: skip
    low = compared(narrow, {"n": 1}, {"n": 9})
    assert not joins(low) and copies(low) == [2]
    late = model(
        [
            node("Exp", ["x"], ["e"]),
            node("ReduceSum", ["e", "one"], ["s"], keepdims=1),
            node("Mul", ["s", "x"], ["a"]),
            node("NonZero", ["x"], ["z"]),
            node("Cast", ["z"], ["f"], to=1),
            node("Transpose", ["f"], ["g"]),
            node("MatMul", ["g", "u"], ["b"]),
            node("Concat", ["a", "b"], ["c"], axis=0),
            node("Neg", ["c"], ["y"]),
        ],
        {"x": (F, ("n", 20))}, ["y"], {"u": normal(2, 20), "one": np.array([1])},
    )  # fmt: skip
    assert not joins(lower_model(late))
    compiled = onnxjit.compile(late, threads=2)
    for n in (1, 6):
        feeds = {"x": normal(n, 20)}
        feeds["x"][:, ::3] = 0
        (want,) = ReferenceEvaluator(late).run(None, feeds)
        close(compiled.run([feeds["x"]])[0], np.asarray(want), 1e-5)


def test_wide_rows_get_a_gap() -> None:
    """Channels a multiple of 4 KB apart would share cache sets: the parts make room."""
    nodes = [
        *conv("x", "a", "w0"),
        *conv("x", "b", "w0", 0),
        node("Concat", ["a", "b"], ["c"], axis=1),
        *conv("c", "y", "w1"),
    ]
    constants = {"w0": normal(512, 8, 1, 1), "w1": normal(5, 1024, 1, 1) / 32}
    low = compared(model(nodes, IMAGES, ["y"], constants), *SIZES[:3])
    assert joins(low) == 2 and not copies(low)
    steps = [low.program.layouts[v] for v in low.program.places]
    assert all(isinstance(s, Strided) and index(1040) in s.steps for s in steps)


def test_values_that_host_steps_see_stay_whole() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "u"], ["b"]),
        node("Concat", ["a", "b"], ["c"], axis=1),
        node("Abs", ["c"], ["y"]),
        node("NonZero", ["a"], ["z"]),
    ]
    constants = {"w": normal(8, 16), "u": normal(8, 32)}
    m = model(nodes, {"x": (F, (5, 8))}, ["y", "z"], constants)
    low = lower_model(m)
    assert joins(low) == 1 and copies(low) == [1]
    feeds = {"x": normal(5, 8)}
    want = ReferenceEvaluator(m).run(None, feeds)
    for got, w in zip(onnxjit.compile(m, threads=2).run([feeds["x"]]), want, strict=True):
        close(got, np.asarray(w), 1e-5)


def test_joins_are_told_of() -> None:
    """Every node of a dense block occurs in the report, and a strided kernel can be checked."""
    m = dense_block(False)
    compiled = onnxjit.compile(m, threads=1)
    text = compiled.report()
    assert all(f"Concat '{n.name}'" in text or not n.name for n in m.graph.node)
    low = lower_model(m)
    assert "join " in str(low.program)
    for kernel in compiled.kernels.values():
        kernel.check(kernel.source)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_joins_of_joins(data: st.DataObject) -> None:
    """Random nests of concatenations of three-dimensional values, some of them read again."""
    values: dict[str, list[int]] = {"x": [2, 3, 16]}
    nodes = []
    for k in range(data.draw(st.integers(2, 6))):
        name = data.draw(st.sampled_from(sorted(values)))
        if data.draw(st.booleans()):
            nodes.append(
                node(data.draw(st.sampled_from(["Relu", "Neg", "Softmax"])), [name], [f"v{k}"])
            )
            values[f"v{k}"] = values[name]
            continue
        axis = data.draw(st.integers(0, 2))
        fits = [
            v for v, s in values.items()
            if all(s[d] == values[name][d] for d in range(3) if d != axis)
        ]  # fmt: skip
        parts = data.draw(st.lists(st.sampled_from(sorted(fits)), min_size=1, max_size=4))
        nodes.append(node("Concat", [name, *parts], [f"v{k}"], axis=axis))
        shape = list(values[name])
        shape[axis] = sum(values[v][axis] for v in [name, *parts])
        values[f"v{k}"] = shape
    read = {i for n in nodes for i in n.input}
    outputs = [v for v in values if v not in read and v != "x"]
    outputs += [v for v in sorted(read - {"x"}) if data.draw(st.booleans())]
    m = model(nodes, {"x": (F, (2, 3, 16))}, outputs, {})
    feeds = {"x": normal(2, 3, 16)}
    want = ReferenceEvaluator(m).run(None, feeds)
    for got, w in zip(run_program(lower_model(m), feeds), want, strict=True):
        close(got, np.asarray(w), 1e-5)


# --- every rule, with gaps between the elements of what it reads and writes ---------------------


def gaps(
    k: Kernel, order: Sequence[int] | None = None, constants: Sequence[str] = ()
) -> dict[str, Layout]:
    """Strides of all buffers as parts of values that are five longer along each axis."""
    out: dict[str, Layout] = {}
    for b in (*k.inputs, *k.outputs):
        t = k.types[b]
        if b in constants or not t.rank:
            continue
        axes = list(order) if order is not None and len(order) == t.rank else list(range(t.rank))
        steps = [index(1)] * t.rank
        step = index(1)
        for d in reversed(axes):
            steps[d] = step
            step = poly_mul(step, t.shape[d] + 5)
        out[b] = Strided(tuple(steps))
    return out


def correlation(x: Tensor, w: Tensor, pad: int, group: int = 1) -> Tensor:
    source = pad_with(x, (0, 0, pad, pad), (0, 0, pad, pad), 0.0) if pad else x
    if pad and group == 1:
        source = materialize(source, "pad")
    n, taps = w.shape[0], w.shape[2]
    shape = (x.shape[0], n, *(d - (taps - 1) for d in source.shape[2:]))
    if group > 1:
        return reduce_over(
            "sum", shape, (taps, taps),
            lambda i, k: apply("mul", source.at(i[0], i[1], i[2] + k[0], i[3] + k[1]),
                               w.at(i[1], 0, *k)),
        )  # fmt: skip
    return reduce_over(
        "sum", shape, (x.shape[1], taps, taps),
        lambda i, k: apply("mul", source.at(i[0], k[0], i[2] + k[1], i[3] + k[2]), w.at(i[1], *k)),
    )  # fmt: skip


LAST = (0, 2, 3, 1)
Definition = tuple[Callable[..., Tensor], Inputs, Sequence[str], Sequence[int] | None, str]
MAPS: Inputs = {"x": (F, ("n", 20, "h", "w"))}


def row_sums(x: Tensor) -> Tensor:
    return T.reduce("sum", x, [2])


def window(x: Tensor, fn: str = "min") -> Tensor:
    shape = (*x.shape[:2], x.shape[2] - 1, x.shape[3] - 1)
    return reduce_over(fn, shape, (2, 2), lambda i, k: x.at(i[0], i[1], i[2] + k[0], i[3] + k[1]))


def softmax(x: Tensor) -> Tensor:
    e = materialize(elementwise("exp", x), "e")
    return elementwise("div", e, T.reduce("sum", e, [2], keepdims=True))


def product(x: Tensor, y: Tensor) -> Tensor:
    """Of matrices, or of each matrix of a batch."""
    *batch, m, k = x.shape
    return reduce_over(
        "sum", (*batch, m, y.shape[-1]), (k,),
        lambda i, r: apply("mul", x.at(*i[:-1], r[0]), y.at(*i[:-2], r[0], i[-1])),
    )  # fmt: skip


ROWS: Inputs = {"x": (F, ("n", "h", "w"))}
DEFINITIONS: dict[str, Definition] = {
    "pointwise": (lambda x, y: elementwise("add", x, y),
                  {"x": (F, ("n", 3, "h", 19)), "y": (F, ("h", 1))}, (), None, "pointwise"),
    "transposed": (lambda x: T.transpose(x, (0, 3, 1, 2)), MAPS, (), LAST, "pointwise"),
    "row sums": (row_sums, ROWS, (), None, "reduction"),
    "window": (window, MAPS, (), LAST, "reduction"),
    "pooling": (lambda x: window(x, "max"), MAPS, (), LAST, "depthwise"),
    "softmax": (softmax, ROWS, (), None, "rows"),
    "matrices": (product, {"x": (F, ("n", 20)), "w": (F, (20, 37))}, ("w",), None, "contraction"),
    "run-time matrices": (product, {"x": (F, ("n", "h", 16)), "y": (F, ("n", 16, "w"))}, (), None,
                          "contraction"),
    "convolution": (lambda x, w: correlation(x, w, 2), {**MAPS, "w": (F, (33, 20, 5, 5))}, ("w",),
                    LAST, "contraction"),
    "depthwise": (lambda x, w: correlation(x, w, 1, 20), {**MAPS, "w": (F, (20, 1, 3, 3))}, (),
                  LAST, "depthwise"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
def test_rules_with_gaps(name: str) -> None:
    fn, inputs, constants, order, rule = DEFINITIONS[name]
    k = define(fn, inputs)
    layouts = gaps(k, order, constants)
    if name == "depthwise":
        layouts["w"] = (1, 2, 3, 0)
    dims = {d for _, shape in inputs.values() for d in shape if isinstance(d, str)}
    sizes = [{"n": 1, "h": 7, "w": 13}, {"n": 3, "h": 4, "w": 17}, {"n": 2, "h": 1, "w": 4},
             {"n": 0, "h": 6, "w": 6}, {"n": 15, "h": 16, "w": 33}]  # fmt: skip
    sizes = [
        {d: s[d] for d in dims}
        for s in sizes
        if (fn is not window and name != "pooling") or min(s.values()) != 1
    ]
    compiled = check_kernel(k, *sizes, layouts=layouts, constants=constants)
    assert compiled.nest.rule.startswith(rule), compiled.nest.declined


def test_minimal_filtering_with_gaps() -> None:
    k = define(lambda x, w: correlation(x, w, 1), {**MAPS, "w": (F, (35, 20, 3, 3))})
    sizes = [{"n": n, "h": h, "w": w} for n, h, w in [(1, 8, 9), (3, 5, 2), (2, 1, 1), (0, 4, 4)]]
    layouts = gaps(k, LAST, ["w"])
    compiled = check_kernel(k, *sizes, layouts=layouts, constants=["w"], rule=forced(F4))
    assert compiled.nest.rule == "winograd"


@pytest.mark.parametrize("name", ["pointwise", "transposed", "row sums", "softmax", "matrices"])
def test_cuda_rules_with_gaps(name: str, simulator: Simulator) -> None:
    fn, inputs, _, order, _ = DEFINITIONS[name]
    k = define(fn, inputs)
    layouts = gaps(k, order)
    sizes = {d: 2 for _, shape in inputs.values() for d in shape if isinstance(d, str)}
    nest = schedule(Request(k, layouts, cuda_target(threads=16)))
    feeds = samples(k, sizes)
    memory = {b: laid_out(a, k.types[b], layouts.get(b), sizes) for b, a in feeds.items()}
    (want,) = evaluate(k, feeds, sizes)
    (out,) = k.outputs
    memory[out] = laid_out(np.full_like(want, np.nan), k.types[out], layouts[out], sizes)
    dims = tuple(evaluate_int(e, sizes) for e in nest.sizes)
    result = simulator.run((memory, [(emit(nest), tuple(p.buffer for p in nest.params), dims, 2)]))
    assert not isinstance(result, str), result
    close(logical(result[out], k.types[out], layouts[out], sizes), want, 1e-5)
    assert np.isnan(result[out]).sum() == result[out].size - want.size


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    made = Simulator()
    yield made
    made.close()
