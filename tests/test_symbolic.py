"""Symbolic sizes: small networks of every kind compile once and run at twenty sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest
from kernels_support import close, lab, lower_model, model, run_model, run_program
from onnx import TensorProto
from onnx.helper import make_node
from onnx.reference import ReferenceEvaluator

import onnxjit
from onnxjit.codegen.build import Builder
from onnxjit.runtime.executor import InputError

F, I64 = "float32", "int64"


class Net:
    """Nodes and constants of a network under construction; weights are small random numbers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(0)

    def __call__(
        self, op: str, *inputs: str | np.ndarray, outputs: int = 1, **attrs: object
    ) -> str:
        """Adds a node and returns the name of its (first) output."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(make_node(op, names, made, **attrs))
        return made[0]

    def constant(self, data: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = data
        return name

    def weight(self, *shape: int) -> np.ndarray:
        scale = max(1, int(np.prod(shape[1:]))) ** -0.5
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def linear(self, x: str, n: int, m: int) -> str:
        return self("Add", self("MatMul", x, self.weight(n, m)), self.weight(m))

    def size(self, x: str, axis: int) -> str:
        return self("Gather", self("Shape", x), ints(axis), axis=0)

    def norm(self, x: str, n: int) -> str:
        return self("LayerNormalization", x, 1 + self.weight(n), self.weight(n), axis=-1)

    def gelu(self, x: str) -> str:
        half = self("Mul", x, scalar(0.5))
        bent = self("Erf", self("Div", x, scalar(2**0.5)))
        return self("Mul", half, self("Add", bent, scalar(1)))

    def rms_norm(self, x: str, n: int) -> str:
        square = self("ReduceMean", self("Pow", x, scalar(2)), ints(-1))
        root = self("Sqrt", self("Add", square, scalar(1e-5)))
        return self("Mul", self.weight(n) + 1, self("Div", x, root))

    def heads(self, x: str, count: int, width: int) -> str:
        split = self("Reshape", x, np.array([0, 0, count, width]))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def joined(self, x: str, width: int) -> str:
        return self("Reshape", self("Transpose", x, perm=[0, 2, 1, 3]), np.array([0, 0, width]))

    def named(self, x: str, name: str) -> None:
        self.nodes.append(make_node("Identity", [x], [name]))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(v: float) -> np.ndarray:
    return np.array(v, np.float32)


Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    model: onnx.ModelProto
    feeds: Callable[[np.random.Generator, Sequence[int]], Feeds]
    sizes: Sequence[Sequence[int]]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def encoder() -> Network:
    """Like BERT: lookups, positions cut from a table, a padding mask, two outputs."""
    g, d = Net(), 24
    table = g.weight(1, 512, d)
    length = g.size("ids", 1)
    places = g("Slice", table, ints(0), length, ints(1))
    x = g.norm(g("Add", g("Gather", g.weight(60, d), "ids"), places), d)
    mask = g("Cast", g("Unsqueeze", "mask", ints(1, 2)), to=TensorProto.FLOAT)
    mask = g("Mul", g("Sub", scalar(1), mask), scalar(-1e4))
    for _ in range(2):
        q, k, v = (g.heads(g.linear(x, d, d), 3, 8) for _ in range(3))
        scores = g("MatMul", g("Mul", q, scalar(8**-0.5)), g("Transpose", k, perm=[0, 1, 3, 2]))
        p = g("Softmax", g("Add", scores, mask), axis=-1)
        x = g.norm(g("Add", x, g.linear(g.joined(g("MatMul", p, v), d), d, d)), d)
        x = g.norm(g("Add", x, g.linear(g.gelu(g.linear(x, d, 40)), 40, d)), d)
    g.named(x, "hidden")
    g.named(g("Tanh", g.linear(g("Gather", x, ints(0), axis=1), d, d)), "pooled")

    def feeds(rng: np.random.Generator, at: Sequence[int]) -> Feeds:
        b, s = at
        mask = np.ones((b, s), np.int64)
        mask[:, max(1, s - s // 3) :] = 0
        return {"ids": rng.integers(0, 60, (b, s)), "mask": mask}

    inputs = {"ids": (I64, ("b", "s")), "mask": (I64, ("b", "s"))}
    lengths = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33)
    return Network(
        model(g.nodes, inputs, ["hidden", "pooled"], g.constants),
        feeds,
        [(b, s) for b in (1, 3) for s in lengths],
    )


def decoder() -> Network:
    """Like GPT-2 and Llama: a cache that grows, a causal mask from sizes, rotary positions,
    one key head for two query heads, a mask whose length is the sum of two other sizes."""
    g, d, w = Net(), 16, 8
    seq, past = g.size("ids", 1), g.size("past_k", 2)
    total = g("Add", seq, past)
    zero, one = g.constant(np.array(0)), g.constant(np.array(1))
    where = g("Range", g("Squeeze", past), g("Squeeze", total), one)
    at = g("Unsqueeze", where, ints(-1))
    keys = g("Unsqueeze", g("Range", zero, g("Squeeze", total), one), ints(0))
    allowed = g("LessOrEqual", keys, at)
    given = g("Cast", g("Unsqueeze", "mask", ints(1, 2)), to=TensorProto.BOOL)
    bias = g("Where", g("And", allowed, given), scalar(0), scalar(-1e9))
    rate = (10000.0 ** (-np.arange(w // 2) / (w // 2))).astype(np.float32)
    angle = g("Mul", g("Cast", at, to=TensorProto.FLOAT), rate)
    angle = g("Concat", angle, angle, axis=-1)
    cos, sin = g("Cos", angle), g("Sin", angle)

    def turned(x: str) -> str:
        first = g("Split", x, ints(w // 2, w // 2), outputs=2, axis=-1)
        second = first.replace("_0", "_1")
        swapped = g("Concat", g("Neg", second), first, axis=-1)
        return g("Add", g("Mul", x, cos), g("Mul", swapped, sin))

    x = g("Gather", g.weight(60, d), "ids")
    h = g.rms_norm(x, d)
    q = turned(g.heads(g("MatMul", h, g.weight(d, 4 * w)), 4, w))
    k = turned(g.heads(g("MatMul", h, g.weight(d, 2 * w)), 2, w))
    v = g.heads(g("MatMul", h, g.weight(d, 2 * w)), 2, w)
    k = g("Concat", "past_k", k, axis=2)
    v = g("Concat", "past_v", v, axis=2)
    g.named(k, "present_k")
    g.named(v, "present_v")
    batch = g.size("ids", 0)

    def repeated(x: str) -> str:
        shape = g("Concat", batch, ints(2, 2), total, ints(w), axis=0)
        wide = g("Expand", g("Unsqueeze", x, ints(2)), shape)
        return g("Reshape", wide, g("Concat", batch, ints(4), total, ints(w), axis=0))

    scores = g("MatMul", q, g("Transpose", repeated(k), perm=[0, 1, 3, 2]))
    p = g("Softmax", g("Add", g("Mul", scores, scalar(w**-0.5)), bias), axis=-1)
    x = g("Add", x, g("MatMul", g.joined(g("MatMul", p, repeated(v)), 4 * w), g.weight(4 * w, d)))
    h = g.rms_norm(x, d)
    gate = g("MatMul", h, g.weight(d, 30))
    gate = g("Mul", gate, g("Sigmoid", gate))
    x = g("Add", x, g("MatMul", g("Mul", gate, g("MatMul", h, g.weight(d, 30))), g.weight(30, d)))
    g.named(g("MatMul", g.rms_norm(x, d), g.weight(d, 60)), "logits")

    def feeds(rng: np.random.Generator, at: Sequence[int]) -> Feeds:
        b, s, p = at
        return {
            "ids": rng.integers(0, 60, (b, s)),
            "mask": np.ones((b, p + s), np.int64),
            "past_k": normal(rng, b, 2, p, w),
            "past_v": normal(rng, b, 2, p, w),
        }

    inputs = {
        "ids": (I64, ("b", "s")),
        "mask": (I64, ("b", "total")),
        "past_k": (F, ("b", 2, "past", w)),
        "past_v": (F, ("b", 2, "past", w)),
    }
    outputs = ["logits", "present_k", "present_v"]
    return Network(
        model(g.nodes, inputs, outputs, g.constants),
        feeds,
        [(b, s, p) for b in (1, 2) for s in (1, 7) for p in (0, 1, 16, 33, 62)],
    )


def recogniser() -> Network:
    """Like PP-OCR's: convolutions over a line of text of any width, attention to channels,
    the height averaged away, classes for every column."""
    g = Net()

    def conv(x: str, n: int, m: int, taps: int, strides: Sequence[int], group: int = 1) -> str:
        pads = [taps // 2] * 4
        w = g.weight(m, n // group, taps, taps)
        y = g("Conv", x, w, g.weight(m), strides=strides, pads=pads, group=group)
        part = g("HardSigmoid", y, alpha=1 / 6)
        return g("Mul", y, part)

    x = conv("x", 3, 8, 3, (2, 2))
    x = conv(x, 8, 8, 3, (1, 1), group=8)
    x = conv(x, 8, 17, 1, (1, 1))
    gate = g("GlobalAveragePool", x)
    gate = g("Relu", g("Conv", gate, g.weight(5, 17, 1, 1)))
    gate = g("HardSigmoid", g("Conv", gate, g.weight(17, 5, 1, 1)))
    x = g("Mul", x, gate)
    x = conv(x, 17, 17, 5, (2, 1), group=17)
    x = g("MaxPool", conv(x, 17, 24, 1, (1, 1)), kernel_shape=[2, 2], strides=[2, 2])
    x = g("AveragePool", x, kernel_shape=[2, 1], strides=[2, 1])
    x = g("Transpose", g("Squeeze", x, ints(2)), perm=[0, 2, 1])
    x = g.norm(g.linear(x, 24, 24), 24)
    g.named(g("Softmax", g.linear(x, 24, 33), axis=-1), "y")
    return Network(
        model(g.nodes, {"x": (F, ("b", 3, 16, "w"))}, ["y"], g.constants),
        lambda rng, at: {"x": normal(rng, at[0], 3, 16, at[1])},
        [(b, w) for b in (1, 2) for w in (4, 5, 8, 13, 32, 33, 64, 70, 100, 131)],
    )


def painter() -> Network:
    """Like a U-Net: down by strides, up by transposed convolution and by resizing, skips."""
    g = Net()

    def conv(x: str, n: int, m: int, stride: int = 1) -> str:
        y = g("Conv", x, g.weight(m, n, 3, 3), strides=[stride] * 2, pads=[1] * 4)
        stats = [1 + g.weight(m), g.weight(m), g.weight(m), 1 + g.weight(m) ** 2]
        return g("Relu", g("BatchNormalization", y, *stats))

    a = conv("image", 3, 8)
    b = conv(conv(a, 8, 16, 2), 16, 16)
    c = conv(g("MaxPool", b, kernel_shape=[2, 2], strides=[2, 2]), 16, 24)
    up = g("ConvTranspose", c, g.weight(24, 16, 2, 2), strides=[2, 2])
    b = conv(g("Concat", up, b, axis=1), 32, 16)
    scales = np.array([1, 1, 2, 2], np.float32)
    up = g("Resize", b, "", g.constant(scales), mode="nearest", nearest_mode="floor",
           coordinate_transformation_mode="asymmetric")  # fmt: skip
    a = conv(g("Concat", up, a, axis=1), 24, 8)
    g.named(g("Sigmoid", g("Conv", a, g.weight(2, 8, 1, 1), g.weight(2))), "y")
    areas = [(1, 1), (1, 2), (2, 1), (3, 5), (5, 3), (4, 4), (2, 7), (7, 2), (6, 3), (1, 9)]
    sizes = [(b, h, w) for b in (1, 2) for h, w in areas]
    return Network(
        model(g.nodes, {"image": (F, ("b", 3, "4*h", "4*w"))}, ["y"], g.constants),
        lambda rng, at: {"image": normal(rng, at[0], 3, 4 * at[1], 4 * at[2])},
        sizes,
    )


NETWORKS = {f.__name__: cache(f) for f in (encoder, decoder, recogniser, painter)}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_compilation_serves_twenty_sizes(name: str) -> None:
    net = NETWORKS[name]()
    assert len(net.sizes) == 20
    run = run_model(net.model)
    compiled = lab().builder.compiled
    reference = ReferenceEvaluator(net.model)
    rng = np.random.default_rng(1)
    for at in (*net.sizes, *net.sizes[:3]):
        feeds = net.feeds(rng, at)
        for got, want in zip(run(feeds), reference.run(None, feeds), strict=True):
            close(got, np.asarray(want), 2e-5, f"{name} at {at}")
    assert lab().builder.compiled == compiled


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_stay_inside_their_buffers_at_any_size(name: str) -> None:
    net = NETWORKS[name]()
    low = lower_model(net.model)
    reference = ReferenceEvaluator(net.model)
    rng = np.random.default_rng(2)
    for at in net.sizes[::4]:
        feeds = net.feeds(rng, at)
        for got, want in zip(run_program(low, feeds), reference.run(None, feeds), strict=True):
            close(got, np.asarray(want), 2e-5, f"{name} at {at}")


def test_the_public_way_in_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS["encoder"]()
    compiled = onnxjit.compile(net.model, cache=False, threads=2)

    def refuse(*_: object) -> None:
        raise AssertionError("a kernel is compiled for a new size")

    monkeypatch.setattr(Builder, "_submit", refuse)
    reference = ReferenceEvaluator(net.model)
    rng = np.random.default_rng(3)
    for at in net.sizes:
        feeds = net.feeds(rng, at)
        for got, want in zip(compiled(**feeds), reference.run(None, feeds), strict=True):
            close(got, np.asarray(want), 2e-5, str(at))
    assert compiled.specialisations == ()


def test_sizes_that_contradict_each_other_are_refused() -> None:
    net = NETWORKS["decoder"]()
    run = run_model(net.model)
    feeds = net.feeds(np.random.default_rng(0), (1, 3, 4))
    with pytest.raises(InputError, match=r"mask|total"):
        run({**feeds, "mask": np.ones((1, 9), np.int64)})
    with pytest.raises(InputError, match="past_v"):
        run({**feeds, "past_v": feeds["past_v"][:, :, 1:]})
    assert run(feeds)[0].shape == (1, 3, 60)


def test_an_empty_batch_gives_empty_results() -> None:
    for name in ("recogniser", "painter"):
        net = NETWORKS[name]()
        at = (0, *net.sizes[0][1:])
        (got,) = run_model(net.model)(net.feeds(np.random.default_rng(0), at))
        assert got.shape[0] == 0 and got.ndim >= 3


def test_sizes_as_outputs() -> None:
    """Shapes and sizes that depend on symbolic dims, as results of the model."""
    nodes = [
        make_node("Shape", ["x"], ["s"]),
        make_node("Size", ["x"], ["n"]),
        make_node("Gather", ["s", "k"], ["h"]),
        make_node("Div", ["h", "two"], ["half"]),
        make_node("Range", ["zero", "h", "one"], ["r"]),
        make_node("ConstantOfShape", ["s"], ["z"]),
    ]
    constants = {
        "k": np.array(1),
        "two": np.array(2),
        "zero": np.array(0),
        "one": np.array(1),
    }
    outputs = ["s", "n", "half", "r", "z"]
    m = model(nodes, {"x": (F, ("a", "b", 3))}, outputs, constants)
    run, low = run_model(m), lower_model(m)
    for a, b in ((1, 1), (4, 7), (0, 5), (2, 0)):
        feeds = {"x": np.zeros((a, b, 3), np.float32)}
        sizes = np.array([a, b, 3])
        want = [sizes, np.array(a * b * 3), np.array(b // 2), np.arange(b), feeds["x"]]
        for got in (run(feeds), run_program(low, feeds)):
            for g, w in zip(got, want, strict=True):
                close(g, w)
