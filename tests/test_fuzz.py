"""Random small graphs of registered operators against the ONNX reference evaluator.

Every graph is compiled once, with some sizes symbolic, and runs at several sizes: kernel by kernel
on guarded buffers, and through the executor with its arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels_support import close, lower_model, model, run_model, run_program, sample
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxjit.runtime.executor import AssumptionError

BINDINGS = 3
Size = tuple[int, ...]
"""A size at every binding of the symbolic dims; all equal for a constant one."""


@dataclass(frozen=True)
class Val:
    """A value of the graph. `exact`: no rounding lies behind it, so that a function with jumps may
    take it. `bounded`: its elements are about 1, so that products of it stay small."""

    name: str
    dtype: str
    shape: tuple[Size, ...]
    exact: bool = True
    bounded: bool = True

    @property
    def rank(self) -> int:
        return len(self.shape)

    def elements(self) -> int:
        return max(int(np.prod([d[b] for d in self.shape])) for b in range(BINDINGS))


@dataclass
class Graph:
    """A graph that grows node by node."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, tuple[str, list[int | str]]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    symbols: dict[str, Size] = field(default_factory=dict)
    values: list[Val] = field(default_factory=list)

    def pick(self, options: Sequence):  # type: ignore[no-untyped-def, type-arg]
        return options[int(self.rng.integers(len(options)))]

    def name(self) -> str:
        return f"t{len(self.nodes)}_{len(self.constants)}"

    def value(self, dtype: str = "float32", rank: int = 0) -> Val | None:
        """A random earlier value, later ones more often."""
        found = [v for v in self.values if v.dtype == dtype and v.rank >= rank]
        if not found:
            return None
        return found[-1] if self.rng.random() < 0.5 else self.pick(found)

    def constant(self, data: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = data
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attrs: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        return names

    def add(
        self,
        op: str,
        inputs: Sequence[Val | str],
        shape: Sequence[Size],
        dtype: str = "float32",
        exact: bool = False,
        bounded: bool = True,
        **attrs: Any,
    ) -> None:
        names = [x if isinstance(x, str) else x.name for x in inputs]
        (out,) = self.node(op, names, **attrs)
        exact = exact and all(isinstance(x, str) or x.exact for x in inputs)
        self.values.append(Val(out, dtype, tuple(shape), exact, bounded))

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(np.array(values, np.int64))


def fixed(n: int) -> Size:
    return (n,) * BINDINGS


def is_fixed(d: Size) -> bool:
    return len(set(d)) == 1


def new_input(g: Graph) -> None:
    dtype = g.pick(["float32"] * 5 + ["int64", "int32"])
    shape: list[Size] = []
    declared: list[int | str] = []
    for _ in range(int(g.rng.integers(1, 5))):
        if g.rng.random() < 0.3:
            if g.symbols and g.rng.random() < 0.6:
                s = g.pick(sorted(g.symbols))
            else:
                s = f"s{len(g.symbols)}"
                g.symbols[s] = tuple(int(g.pick([1, 2, 3, 5, 8, 11])) for _ in range(BINDINGS))
            shape.append(g.symbols[s])
            declared.append(s)
        else:
            n = int(g.pick([1, 2, 3, 4, 6, 7, 16, 17]))
            shape.append(fixed(n))
            declared.append(n)
    name = f"x{len(g.inputs)}"
    v = Val(name, dtype, tuple(shape))
    if v.elements() <= 6000:
        g.inputs[name] = dtype, declared
        g.values.append(v)


# --- operators ---------------------------------------------------------------------------------


def unary(g: Graph) -> None:
    x = g.value()
    if x is None:
        return
    op = g.pick(["Neg", "Abs", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Softplus", "Elu",
                 "LeakyRelu", "Gelu", "Mish", "Sin", "Identity"])  # fmt: skip
    g.add(op, [x], x.shape, exact=op in ("Neg", "Abs", "Relu", "Identity"), bounded=x.bounded)


def jump(g: Graph) -> None:
    x = g.value()
    if x is None or not x.exact:
        return
    op = g.pick(["Floor", "Ceil", "Sign", "Round"])
    g.add(op, [x], x.shape, exact=True, bounded=x.bounded)


def joined(a: Val, b: Val) -> tuple[Size, ...] | None:
    out: list[Size] = []
    for k in range(max(a.rank, b.rank)):
        p = a.shape[a.rank - 1 - k] if k < a.rank else fixed(1)
        q = b.shape[b.rank - 1 - k] if k < b.rank else fixed(1)
        if p != q and fixed(1) not in (p, q):
            return None
        out.append(q if p == fixed(1) else p)
    return tuple(out[::-1])


def binary(g: Graph) -> None:
    a, b = g.value(), g.value()
    if a is None or b is None:
        return
    shape = joined(a, b)
    if shape is None:  # a constant that broadcasts instead
        tail = a.shape[int(g.rng.integers(0, a.rank + 1)) :] if a.rank else ()
        if not all(is_fixed(d) for d in tail):
            return
        data = g.rng.standard_normal([d[0] for d in tail]).astype(np.float32)
        g.add(g.pick(["Add", "Mul", "Sub"]), [a, g.constant(data)], a.shape, bounded=a.bounded)
        return
    op = g.pick(["Add", "Sub", "Mul", "Max", "Min"])
    if op == "Mul" and not (a.bounded and b.bounded):
        return
    exact = op in ("Max", "Min")
    g.add(op, [a, b], shape, exact=exact, bounded=op != "Mul" and a.bounded and b.bounded)


def divide(g: Graph) -> None:
    a, b = g.value(), g.value()
    if a is None or b is None or (shape := joined(a, b)) is None:
        return
    (m,) = g.node("Abs", [b.name])
    (d,) = g.node("Add", [m, g.constant(np.array(1.0, np.float32))])
    g.add("Div", [a, d], shape, bounded=a.bounded)


def choose(g: Graph) -> None:
    a, b = g.value(), g.value()
    if a is None or b is None or not (a.exact and b.exact) or (shape := joined(a, b)) is None:
        return
    (c,) = g.node(g.pick(["Greater", "LessOrEqual", "Equal"]), [a.name, b.name])
    if g.rng.random() < 0.3:
        (c,) = g.node("Not", [c])
    g.add("Where", [c, a, b], shape, exact=True, bounded=a.bounded and b.bounded)


def integers(g: Graph) -> None:
    dtype = g.pick(["int64", "int32"])
    a, b = g.value(dtype), g.value(dtype)
    if a is None or b is None or (shape := joined(a, b)) is None:
        return
    op = g.pick(["Add", "Sub", "Max", "Min", "Div", "Mod"])
    if op in ("Div", "Mod"):
        (m,) = g.node("Abs", [b.name])
        (d,) = g.node("Add", [m, g.constant(np.array(1, dtype))])
        g.add(op, [a, d], shape, dtype, exact=True)
    else:
        g.add(op, [a, b], shape, dtype, exact=True)


def convert(g: Graph) -> None:
    source = g.pick(["float32", "int64", "int32"])
    target = g.pick([d for d in ("float32", "int64", "int32") if d != source])
    x = g.value(source)
    if x is None or (source == "float32" and not x.exact):
        return
    to = int(onnx.TensorProto.DataType.Value({"float32": "FLOAT"}.get(target, target.upper())))
    g.add("Cast", [x], x.shape, target, exact=True, bounded=False, to=to)


def transpose(g: Graph) -> None:
    x = g.value(rank=2)
    if x is None:
        return
    perm = [int(p) for p in g.rng.permutation(x.rank)]
    g.add("Transpose", [x], [x.shape[p] for p in perm], exact=True, bounded=x.bounded, perm=perm)


def merge(g: Graph) -> None:
    """Two neighbouring axes into one."""
    x = g.value(rank=2)
    if x is None:
        return
    if any(0 in d for d in x.shape):  # the reference cannot infer -1 then
        return
    k = int(g.rng.integers(0, x.rank - 1))
    size = tuple(p * q for p, q in zip(x.shape[k], x.shape[k + 1], strict=True))
    target = [*([0] * k), -1, *(_static(d) for d in x.shape[k + 2 :])]
    if any(t is None for t in target):
        return
    shape = [*x.shape[:k], size, *x.shape[k + 2 :]]
    g.add("Reshape", [x, g.ints(target)], shape, exact=True, bounded=x.bounded)  # type: ignore[arg-type]


def _static(d: Size) -> int | None:
    return d[0] if is_fixed(d) else None


def split_axis(g: Graph) -> None:
    """One axis into two, sometimes followed by a transposition as in attention."""
    x = g.value(rank=1)
    if x is None or x.rank > 4:
        return
    k = int(g.rng.integers(0, x.rank))
    n = _static(x.shape[k])
    divisors = [c for c in (2, 3, 4, 8) if n is not None and n % c == 0]
    if n is None or not divisors or any(not is_fixed(d) for d in x.shape[k + 1 :]):
        return
    c = g.pick(divisors)
    target = [0] * k + [n // c, c] + [d[0] for d in x.shape[k + 1 :]]
    shape = [*x.shape[:k], fixed(n // c), fixed(c), *x.shape[k + 1 :]]
    g.add("Reshape", [x, g.ints(target)], shape, exact=True, bounded=x.bounded)
    if g.rng.random() < 0.5:
        transpose(g)


def reshape_by_shape(g: Graph) -> None:
    """A shape computed from another value's, as exporters write it."""
    x = g.value(rank=2)
    if x is None or any(0 in d for d in x.shape):
        return
    (s,) = g.node("Shape", [x.name])
    (first,) = g.node("Gather", [s, g.ints([0])], axis=0)
    (target,) = g.node("Concat", [first, g.ints([-1])], axis=0)
    rest = tuple(int(np.prod([d[b] for d in x.shape[1:]])) for b in range(BINDINGS))
    g.add("Reshape", [x, target], [x.shape[0], rest], exact=True, bounded=x.bounded)


def ones(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None:
        return
    units = [k for k, d in enumerate(x.shape) if d == fixed(1)]
    if units and g.rng.random() < 0.5:
        k = g.pick(units)
        shape = [d for q, d in enumerate(x.shape) if q != k]
        g.add("Squeeze", [x, g.ints([k])], shape, exact=True, bounded=x.bounded)
    elif x.rank < 5:
        k = int(g.rng.integers(0, x.rank + 1))
        shape = [*x.shape[:k], fixed(1), *x.shape[k:]]
        g.add("Unsqueeze", [x, g.ints([k])], shape, exact=True, bounded=x.bounded)


def slice_(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None:
        return
    k = int(g.rng.integers(0, x.rank))
    start, step = int(g.pick([0, 1, 2, -2, -1])), int(g.pick([1, 1, 2, -1, -2]))
    stop = int(g.pick([2**40, -1, 3])) if step > 0 else int(g.pick([-(2**40), 0]))
    ends = [None if stop < -n else stop for n in x.shape[k]]
    sizes = tuple(len(range(n)[start:e:step]) for n, e in zip(x.shape[k], ends, strict=True))
    shape = [*x.shape[:k], sizes, *x.shape[k + 1 :]]
    arguments: list[Val | str] = [x, *(g.ints([c]) for c in (start, stop, k, step))]
    g.add("Slice", arguments, shape, exact=True, bounded=x.bounded)


def concat(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None:
        return
    k = int(g.rng.integers(0, x.rank))
    same = [
        v
        for v in g.values
        if v.dtype == x.dtype
        and v.rank == x.rank
        and all(p == q for i, (p, q) in enumerate(zip(v.shape, x.shape, strict=True)) if i != k)
    ]
    parts = [g.pick(same) for _ in range(int(g.rng.integers(1, 4)))] + [x]
    size = tuple(sum(v.shape[k][b] for v in parts) for b in range(BINDINGS))
    shape = [*x.shape[:k], size, *x.shape[k + 1 :]]
    out = Val("", x.dtype, tuple(shape))
    if out.elements() <= 20000:
        bounded = all(v.bounded for v in parts)
        g.add("Concat", parts, shape, exact=True, bounded=bounded, axis=k - g.pick([0, x.rank]))


def split(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None:
        return
    k = int(g.rng.integers(0, x.rank))
    n = _static(x.shape[k])
    if n is None or n < 2:
        return
    cut = int(g.rng.integers(1, n))
    outs = g.node("Split", [x.name, g.ints([cut, n - cut])], 2, axis=k)
    for o, m in zip(outs, (cut, n - cut), strict=True):
        shape = (*x.shape[:k], fixed(m), *x.shape[k + 1 :])
        g.values.append(Val(o, x.dtype, shape, x.exact, x.bounded))


def pad(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None:
        return
    low = min(min(d) for d in x.shape)
    mode = g.pick(["constant", "edge", "reflect"])
    if mode != "constant" and low < 3:
        return
    amounts = [int(g.pick([0, 0, 1, 2])) for _ in range(2 * x.rank)]
    shape = [tuple(n + amounts[k] + amounts[k + x.rank] for n in d) for k, d in enumerate(x.shape)]
    if Val("", "", tuple(shape)).elements() <= 20000:
        g.add("Pad", [x, g.ints(amounts)], shape, exact=True, bounded=x.bounded, mode=mode)


def gather(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None:
        return
    k = int(g.rng.integers(0, x.rank))
    low = min(x.shape[k])
    if not low:
        return
    where = g.rng.integers(-low, low, int(g.rng.integers(1, 6))).astype(np.int64)
    shape = [*x.shape[:k], fixed(len(where)), *x.shape[k + 1 :]]
    g.add("Gather", [x, g.constant(where)], shape, exact=True, bounded=x.bounded, axis=k)


def tile(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None or x.elements() > 2000:
        return
    repeats = [int(g.pick([1, 1, 2, 3])) for _ in x.shape]
    shape = [tuple(n * r for n in d) for d, r in zip(x.shape, repeats, strict=True)]
    g.add("Tile", [x, g.ints(repeats)], shape, exact=True, bounded=x.bounded)


def expand(g: Graph) -> None:
    x, y = g.value(), g.value()
    if x is None or y is None or (shape := joined(x, y)) is None:
        return
    (s,) = g.node("Shape", [y.name])
    g.add("Expand", [x, s], shape, exact=True, bounded=x.bounded)


def reduce(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None or not x.elements() or any(0 in d for d in x.shape):
        return
    fn = g.pick(["Mean", "Max", "Min", "Sum", "L2", "L1", "LogSumExp"])
    if fn == "LogSumExp" and not x.bounded:
        return
    axes = sorted({int(g.rng.integers(0, x.rank)) for _ in range(2)})
    keep = int(g.rng.integers(0, 2))
    shape = [fixed(1) if k in axes else d for k, d in enumerate(x.shape) if keep or k not in axes]
    bounded = x.bounded and fn in ("Mean", "Max", "Min", "LogSumExp")
    given_axes = g.ints([a - int(g.pick([0, x.rank])) for a in axes])
    exact = fn in ("Max", "Min")
    g.add(f"Reduce{fn}", [x, given_axes], shape, exact=exact, bounded=bounded, keepdims=keep)


def normalise(g: Graph) -> None:
    x = g.value(rank=1)
    if x is None or any(0 in d for d in x.shape) or not x.bounded:
        return
    k = int(g.rng.integers(0, x.rank))
    op = g.pick(["Softmax", "LogSoftmax", "LayerNormalization"])
    if op != "LayerNormalization":
        g.add(op, [x], x.shape, axis=k)
        return
    n = _static(x.shape[-1])
    if n is None or n < 2:
        return
    data = [g.constant(g.rng.standard_normal(n).astype(np.float32)) for _ in range(2)]
    g.add(op, [x, *data], x.shape, axis=-1, epsilon=1e-2)


def matmul(g: Graph) -> None:
    x = g.value(rank=2)
    if x is None or not x.bounded:
        return
    partner = [
        v
        for v in g.values
        if v.dtype == "float32" and v.bounded and 2 <= v.rank <= 3 and v.shape[-2] == x.shape[-1]
    ]
    if partner and g.rng.random() < 0.4:
        y = g.pick(partner)
        heads = joined(Val("", "", x.shape[:-2]), Val("", "", y.shape[:-2]))
        if heads is not None:
            g.add("MatMul", [x, y], [*heads, x.shape[-2], y.shape[-1]], bounded=False)
        return
    k = _static(x.shape[-1])
    if not k:
        return
    n = int(g.pick([1, 3, 4, 8, 17, 33]))
    w = g.constant((g.rng.standard_normal((k, n)) / k).astype(np.float32))
    g.add("MatMul", [x, w], [*x.shape[:-1], fixed(n)])
    if g.rng.random() < 0.5:
        y = g.values[-1]
        b = g.constant(g.rng.standard_normal(n).astype(np.float32))
        g.add("Add", [y, b], y.shape)


def conv(g: Graph) -> None:
    x = g.value(rank=4)
    if x is None or x.rank != 4 or not x.bounded:
        return
    c = _static(x.shape[1])
    if not c or min(*x.shape[2], *x.shape[3]) < 3:
        return
    taps, p = int(g.pick([1, 3])), int(g.pick([0, 1]))
    p = p if taps == 3 else 0
    stride = int(g.pick([1, 1, 2]))
    group = c if g.rng.random() < 0.25 else 1
    n = c if group > 1 else int(g.pick([1, 2, 5, 16, 17]))
    w = g.rng.standard_normal((n, c // group, taps, taps)) / (taps * taps * c // group)
    spatial = [tuple((s + 2 * p - taps) // stride + 1 for s in d) for d in x.shape[2:]]
    weights = g.constant(w.astype(np.float32))
    shape = [x.shape[0], fixed(n), *spatial]
    g.add("Conv", [x, weights], shape, pads=[p] * 4, strides=[stride] * 2, group=group)


def pool(g: Graph) -> None:
    x = g.value(rank=3)
    if x is None or x.rank not in (3, 4) or any(min(d) < 2 for d in x.shape[2:]):
        return
    taps = [2] * (x.rank - 2)
    shape = [*x.shape[:2], *(tuple((s - 2) // 2 + 1 for s in d) for d in x.shape[2:])]
    op = g.pick(["MaxPool", "AveragePool"])
    exact = op == "MaxPool"
    g.add(op, [x], shape, exact=exact, bounded=x.bounded, kernel_shape=taps, strides=taps)


GROW: list[Callable[[Graph], None]] = [
    unary, unary, jump, binary, binary, divide, choose, integers, convert, transpose, transpose,
    merge, split_axis, reshape_by_shape, ones, slice_, concat, split, pad, gather, tile, expand,
    reduce, reduce, normalise, normalise, matmul, matmul, conv, conv, pool,
]  # fmt: skip


def random_graph(seed: int, length: int) -> Graph:
    g = Graph(np.random.default_rng(seed))
    while not g.inputs:
        new_input(g)
    if g.rng.random() < 0.5:
        new_input(g)
    if g.rng.random() < 0.25:  # something that convolutions take
        shape: list[int | str] = [2, 3, "h", 8]
        g.symbols["h"] = (7, 9, 4)
        g.inputs["image"] = "float32", shape
        sizes = (fixed(2), fixed(3), g.symbols["h"], fixed(8))
        g.values.append(Val("image", "float32", sizes))
    tries = 0
    while len(g.nodes) < length and tries < 20 * length:
        tries += 1
        before = len(g.values)
        g.pick(GROW)(g)
        if len(g.values) > before and g.values[-1].elements() > 40000:
            break
    return g


def outputs_of(g: Graph) -> list[Val]:
    """What nothing reads, and sometimes a value in the middle."""
    read = {i for n in g.nodes for i in n.input}
    made = {o for n in g.nodes for o in n.output}
    ends = [v for v in g.values if v.name in made and v.name not in read]
    inner = [v for v in g.values if v.name in made and v.name in read]
    if inner and g.rng.random() < 0.4:
        ends.append(g.pick(inner))
    return ends


def feeds_of(g: Graph, binding: int) -> dict[str, np.ndarray]:
    sizes = {s: d[binding] for s, d in g.symbols.items()}
    return {
        n: sample(g.rng, dtype, [d if isinstance(d, int) else sizes[d] for d in shape])
        for n, (dtype, shape) in g.inputs.items()
    }


def check(seed: int, length: int) -> None:
    g = random_graph(seed, length)
    outs = outputs_of(g)
    if not outs:
        return
    m = model(g.nodes, g.inputs, [v.name for v in outs], g.constants, opset=20)
    low = lower_model(m)
    whole = run_model(m)
    reference = ReferenceEvaluator(m)
    for b in range(BINDINGS):
        feeds = feeds_of(g, b)
        with np.errstate(all="ignore"):
            wanted = [np.asarray(w) for w in reference.run(None, feeds)]
        try:
            got = whole(feeds)
        except AssumptionError:
            # Sizes agree in a way that compilation did not foresee: such shapes get their own code.
            shapes = [feeds[n].shape for n in g.inputs]
            special = lower_model(m, shapes)
            runs = (
                ("model", run_model(m, shapes)(feeds)),
                ("kernels", run_program(special, feeds)),
            )
        else:
            runs = (("model", got), ("kernels", run_program(low, feeds, seed)))
        for how, got in runs:
            for v, a, w in zip(outs, got, wanted, strict=True):
                assert w.shape == tuple(d[b] for d in v.shape), f"{v.name}: this test is wrong"
                close(a, w, 1e-4, f"seed {seed}, length {length}, {how}, {v.name}")


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_random_graphs(seed: int, length: int) -> None:
    check(seed, length)
