"""Runs compiled kernels in a hostile setting: guard bands, NaN scratch memory, tiles out of order.

`Lab` compiles kernels in this process, each distinct source once. `check_kernel` runs one scheduled
kernel, `run_program` every kernel of a lowered model, one after the other, so that a store outside
a buffer, a read of memory that nothing wrote, or a tile that depends on another one shows up.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxjit.codegen.build import Builder, Source, symbol_of
from onnxjit.codegen.emit_cpu import emit
from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.codegen.expr import Dim, Expr, index
from onnxjit.codegen.kernel import Kernel, TensorType
from onnxjit.codegen.layout import Layout, elements, span, strides
from onnxjit.codegen.loops import LoopNest
from onnxjit.codegen.packing import pack
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.schedule import Request, schedule
from onnxjit.codegen.target import Target, host
from onnxjit.codegen.tensor import Tensor, Trace, finish, placeholder
from onnxjit.codegen_calls import Generated, ScheduledCall, generate, wide
from onnxjit.compiler import build_model, packed_constants, with_shapes
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline
from onnxjit.program import Program
from onnxjit.runtime.executor import Executable
from onnxjit.runtime.link import Library, link
from onnxjit.runtime.plan import NO_FAULT

GUARD = 96
"""Elements of guard band on either side of every buffer."""

Layouts = Mapping[str, Layout]
Entry = Callable[[Any, Any, Any, int, int], None]


class Lab:
    """Compiles kernels for one target without worker processes and keeps the machine code."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.builder = Builder(target, jobs=0)
        self._code: dict[str, tuple[Library, Entry]] = {}

    def entry(self, source: Source) -> Entry:
        key = self.builder.submit(source)
        if key not in self._code:
            objects = [self.builder.result(key)]
            objects += self.builder.tile_objects(source.symbols).values()
            library = link(objects)
            pointer, integer = ctypes.c_void_p, ctypes.c_int64
            kind = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, integer, integer)
            self._code[key] = library, kind(library.address(symbol_of(key)))
        return self._code[key][1]


@cache
def lab() -> Lab:
    return Lab(host())


# --- guarded memory ----------------------------------------------------------------------------


class Guarded:
    """A flat array between guard bands. It starts one element past a 64-byte boundary, because
    nothing but the dtype's own alignment is promised for inputs and outputs."""

    def __init__(self, count: int, dtype: np.dtype[Any], shift: int = 1) -> None:
        self.count, item = count, dtype.itemsize
        self.memory = np.full((count + 2 * GUARD) * item + 128, 0xA5, np.uint8)
        base = -self.memory.ctypes.data % 64 + (GUARD * item + 63) // 64 * 64 + shift * item
        base = min(base, self.memory.nbytes - count * item)
        self.start, self.stop = base, base + count * item
        self.array = self.memory[base : self.stop].view(dtype)
        self.array.view(np.uint8)[:] = 0xFF  # NaN, or -1: never a plausible result

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + self.start

    def check(self, what: str) -> None:
        before, after = self.memory[: self.start], self.memory[self.stop :]
        assert (before == 0xA5).all(), f"{what}: a store before its first element"
        assert (after == 0xA5).all(), f"{what}: a store after its last element"


# --- one kernel --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compiled:
    """A scheduled kernel: its nest, source and machine code, and the constants it was made for."""

    kernel: Kernel
    nest: LoopNest
    source: Source
    layouts: Layouts
    constants: Mapping[str, np.ndarray]
    entry: Entry

    def __call__(
        self, inputs: Mapping[str, np.ndarray], dims: Mapping[str, int] | None = None, seed: int = 0
    ) -> list[np.ndarray]:
        """Outputs in logical axis order. The tiles run in one go and again in random pieces."""
        dims = dims or {}
        physical: dict[str, np.ndarray] = {}
        packings = {q.buffer: q for q in self.nest.packings}
        for p in self.nest.params:
            if p.written:
                continue
            data = self.constants[p.buffer] if p.buffer in self.constants else inputs[p.buffer]
            flat = laid_out(data, self.kernel.types[p.buffer], self.layouts.get(p.buffer), dims)
            physical[p.buffer] = pack(flat, packings[p.buffer]) if p.buffer in packings else flat
        tiles = evaluate_int(self.nest.tiles, dims)
        types = self.kernel.types
        pieces = random_pieces(self.nest, dims, np.random.default_rng(seed))
        whole, again = (
            execute(self.nest, self.entry, physical, types, dims, p, self.layouts)
            for p in ([(0, tiles)], pieces)
        )
        for b, a in whole.items():
            np.testing.assert_array_equal(again[b], a, err_msg="the order of tiles matters")
        out = []
        for b in self.kernel.outputs:
            out.append(logical(whole[b], self.kernel.types[b], self.layouts.get(b), dims))
        return out


def execute(
    nest: LoopNest,
    entry: Entry,
    physical: Mapping[str, np.ndarray],
    types: Mapping[str, TensorType],
    dims: Mapping[str, int],
    pieces: Sequence[tuple[int, int]],
    layouts: Layouts,
) -> dict[str, np.ndarray]:
    """Runs ranges of tiles on fresh guarded buffers; `types` and `layouts` are of the outputs.

    Inputs and outputs are as they lie in memory; scratch memory is new for every piece.
    """
    buffers: dict[str, Guarded] = {}
    for p in nest.params:
        dtype = numpy_dtype(p.dtype)
        if p.written:
            g = Guarded(memory(types[p.buffer], layouts.get(p.buffer), dims), dtype)
        else:
            g = Guarded(physical[p.buffer].size, dtype)
            g.array[:] = physical[p.buffer]
        buffers[p.buffer] = g
    pointers = (ctypes.c_void_p * max(1, len(buffers)))(
        *(buffers[p.buffer].address for p in nest.params)
    )
    values = [evaluate_int(e, dims) for e in nest.sizes]
    ints = (ctypes.c_int64 * max(1, len(values)))(*values)
    nbytes = evaluate_int(nest.scratch, dims)
    for begin, end in pieces:
        scratch = Guarded(nbytes, np.dtype(np.uint8), shift=0)
        entry(pointers, ints, scratch.address, begin, end)
        scratch.check("scratch")
    for p in nest.params:
        g = buffers[p.buffer]
        g.check(p.buffer)
        if not p.written:
            given = np.ascontiguousarray(physical[p.buffer]).view(np.uint8)
            assert (g.array.view(np.uint8) == given).all(), f"a store to the input {p.buffer}"
            continue
        gaps = np.ones(g.count, bool)
        logical(gaps, types[p.buffer], layouts.get(p.buffer), dims)[...] = False
        assert (g.array[gaps].view(np.uint8) == 0xFF).all(), f"{p.buffer}: a store into a gap"
    return {p.buffer: buffers[p.buffer].array.copy() for p in nest.params if p.written}


def random_pieces(
    nest: LoopNest, dims: Mapping[str, int], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """The tiles of each round of a nest cut at random and shuffled: they must not depend on each
    other."""
    tiles, rounds = (evaluate_int(e, dims) for e in (nest.tiles, nest.rounds))
    share, found = tiles // max(rounds, 1), []
    for first in range(0, tiles, max(share, 1)):
        cuts = sorted({0, share, *rng.integers(0, share + 1, 5).tolist()})
        pieces = [(first + a, first + b) for a, b in itertools.pairwise(cuts)]
        rng.shuffle(pieces)
        found += pieces
    return found


def placement(
    t: TensorType, layout: Layout | None, dims: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Sizes and element strides of a value."""
    return [evaluate_int(d, dims) for d in t.shape], [
        evaluate_int(s, dims) for s in strides(t, layout)
    ]


def memory(t: TensorType, layout: Layout | None, dims: Mapping[str, int]) -> int:
    """Elements that a value takes, gaps included."""
    return span(*placement(t, layout, dims))


def logical(
    flat: np.ndarray, t: TensorType, layout: Layout | None, dims: Mapping[str, int]
) -> np.ndarray:
    """The elements of a value in logical order, as a view of its memory."""
    return elements(flat, *placement(t, layout, dims))


def laid_out(
    data: np.ndarray, t: TensorType, layout: Layout | None, dims: Mapping[str, int]
) -> np.ndarray:
    """The memory of a value; gaps are NaN or -1."""
    flat = np.empty(memory(t, layout, dims), data.dtype)
    flat.view(np.uint8)[:] = 0xFF
    logical(flat, t, layout, dims)[...] = data
    return flat


def compile_kernel(
    kernel: Kernel,
    layouts: Layouts | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
    rule: Callable[[Request], LoopNest] = schedule,
) -> Compiled:
    """Schedules, prints and compiles a kernel. `rule` is one schedule rule instead of the first
    that applies; it raises `Declined` when it does not."""
    constants = constants or {}
    request = Request(kernel, layouts or {}, lab().target, frozenset(constants))
    nest = rule(request)
    source = Source(emit(nest), nest.symbols, kernel.name, wide=wide(nest))
    return Compiled(kernel, nest, source, layouts or {}, constants, lab().entry(source))


def define(
    fn: Callable[..., Any], types: Mapping[str, tuple[str, Sequence[int | str]]], name: str = "test"
) -> Kernel:
    """The kernel of a definition: `types` gives dtype and sizes (strings are symbolic dims)."""
    trace = Trace()
    with trace.active():
        args = [placeholder(b, tensor_type(*t)) for b, t in types.items()]
        made = fn(*args)
        results: Sequence[Tensor] = made if isinstance(made, tuple) else (made,)
        return finish(name, trace, [(f"y{k}", t) for k, t in enumerate(results)], list(types))


def tensor_type(dtype: str, shape: Sequence[int | str]) -> TensorType:
    return TensorType(dtype, tuple(size(d) for d in shape))


def size(d: int | str) -> Expr:
    return Dim(d) if isinstance(d, str) else index(d)


def sample(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Small numbers of either sign, exact in every dtype where that is possible."""
    t = numpy_dtype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if t.kind in "iu":
        return rng.integers(0 if t.kind == "u" else -9, 10, shape).astype(t)
    return rng.standard_normal(shape).astype(np.float32).astype(t)


def samples(
    kernel: Kernel, dims: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random arrays for every input of a kernel."""
    rng = np.random.default_rng(seed)
    out = {}
    for b in kernel.inputs:
        t = kernel.types[b]
        out[b] = sample(rng, t.dtype, [evaluate_int(d, dims or {}) for d in t.shape])
    return out


def check_kernel(
    kernel: Kernel,
    *sizes: Mapping[str, int],
    layouts: Layouts | None = None,
    constants: Sequence[str] = (),
    rule: Callable[[Request], LoopNest] = schedule,
    tolerance: float | None = None,
) -> Compiled:
    """Compiles once and compares with `evaluate` at every binding of the symbolic dims."""
    fixed: dict[str, np.ndarray] = {}
    if constants:
        first = samples(kernel, sizes[0] if sizes else {}, seed=99)
        fixed = {b: first[b] for b in constants}
    compiled = compile_kernel(kernel, layouts, fixed, rule)
    for k, dims in enumerate(sizes or ({},)):
        arrays = {**samples(kernel, dims, seed=k), **fixed}
        wanted = evaluate(kernel, arrays, dims)
        for got, want in zip(compiled(arrays, dims, seed=k), wanted, strict=True):
            close(got, want, tolerance, f"{compiled.nest.rule} at {dims}")
    return compiled


TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}


def close(
    got: np.ndarray, want: np.ndarray, tolerance: float | None = None, what: str = ""
) -> None:
    """Equal, or close relative to the largest value; NaNs and infinities in the same places."""
    want = np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    limit = TOLERANCE[want.dtype.name] if tolerance is None else tolerance
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    same = np.where(finite, 0, b)
    np.testing.assert_array_equal(np.where(finite & np.isfinite(a), 0, a), same, err_msg=what)
    if finite.any():
        scale = max(1e-30, np.abs(b[finite]).max())
        worst = np.abs(a - b)[finite].max() / scale
        assert worst <= limit, f"{what}: error {worst:.2e} of the largest value"


# --- whole models ------------------------------------------------------------------------------


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[str, Sequence[int | str]]],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model; constants become initializers, and the outputs' types are left to inference."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(n, _element(dtype), list(shape))
            for n, (dtype, shape) in inputs.items()
        ],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])


def _element(dtype: str) -> int:
    return int(
        TensorProto.DataType.Value(
            {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
        )
    )


@dataclass(frozen=True, slots=True)
class Lowered:
    """A model after all passes, and what code generation made of it."""

    names: tuple[str, ...]
    program: Program
    generated: Generated
    constants: Mapping[str, np.ndarray]

    @property
    def kernels(self) -> list[Kernel]:
        return [c.call.kernel for c in self.generated.scheduled if isinstance(c, ScheduledCall)]

    @property
    def rules(self) -> list[str]:
        return [c.nest.rule for c in self.generated.scheduled if isinstance(c, ScheduledCall)]


def lower_model(m: onnx.ModelProto, shapes: Sequence[Sequence[int]] | None = None) -> Lowered:
    """The model after all passes, in general or for inputs of exactly these shapes."""
    graph = import_model(m.SerializeToString())
    if shapes is not None:
        graph = with_shapes(graph, shapes)
    program = run_pipeline(graph, lab().target)
    generated = generate(program, lab().target)
    packed = dict(zip(generated.constants, packed_constants(program, generated), strict=True))
    return Lowered(tuple(v.name for v in graph.inputs), program, generated, packed)


def bind(low: Lowered, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Values of the symbolic dims, read from the inputs."""
    p = low.program
    arrays = {v: feeds[n] for v, n in zip(p.inputs, low.names, strict=True)}
    dims = {}
    for d in p.dims:
        n = arrays[d.value].shape[d.axis] - d.offset
        assert n % d.factor == 0
        dims[d.name] = n // d.factor
    return dims


def run_program(low: Lowered, feeds: Mapping[str, np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Every kernel in order, each on guarded buffers; returns the model's outputs."""
    p = low.program
    dims = bind(low, feeds)
    # What lies in memory, by value id; parts of joined values are in those.
    flat = {b: a.reshape(-1) for b, a in low.constants.items()}
    for v, n in zip(p.inputs, low.names, strict=True):
        flat[v] = np.ascontiguousarray(feeds[n]).reshape(-1)
    types = dict(p.types)

    def value(v: str) -> np.ndarray:
        t, base, start = types[v], v, 0
        if v in p.places:
            base, start = p.places[v].base, evaluate_int(p.places[v].offset, dims)
        if base not in flat:
            count = evaluate_int(types[base].elements, dims)
            flat[base] = np.full(count * numpy_dtype(t.dtype).itemsize, 0xFF, np.uint8).view(
                numpy_dtype(t.dtype)
            )
        return logical(flat[base][start:], t, p.layouts.get(v), dims)

    for c in low.generated.scheduled:
        assert isinstance(c, ScheduledCall), "host steps are not for this test"
        types.update(c.call.kernel.types)
        pairs = list(zip(c.nest.params, c.buffers, strict=True))
        physical = {
            x.buffer: flat[b]
            if b in low.constants
            else laid_out(value(b), types[b], p.layouts.get(b), dims)
            for x, b in pairs
            if not x.written
        }
        written = {x.buffer: b for x, b in pairs if x.written}
        pieces = random_pieces(c.nest, dims, np.random.default_rng(seed))
        made = execute(
            c.nest,
            lab().entry(c.source),
            physical,
            {x: types[b] for x, b in written.items()},
            dims,
            pieces,
            {x: p.layouts[b] for x, b in written.items() if b in p.layouts},
        )
        for x, b in written.items():
            value(b)[...] = logical(made[x], types[b], p.layouts.get(b), dims)
    results = [value(v) for v in p.outputs]
    count = len(results) - len(p.faults)
    assert all(found == NO_FAULT for found in results[count:])
    return results[:count]


def run_model(
    m: onnx.ModelProto,
    shapes: Sequence[Sequence[int]] | None = None,
    threads: int = 2,
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """The model as a function of named arrays, compiled and run by the executor."""
    graph, parts = build_model(m.SerializeToString(), shapes=shapes, builder=lab().builder)
    library = link(list(parts.objects.values()))
    run = Executable(parts.generated.plan, library, parts.constants, threads)
    names = [v.name for v in graph.inputs]
    return lambda feeds: run(*(feeds[n] for n in names))
