"""What the CUDA tests run: kernels with inputs, and what their definitions say about the outputs.

Blocks have 16 threads unless a check says otherwise, so that small sizes span several blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import onnx

import onnxjit.operators  # noqa: F401  (fills the operator table)
from onnxjit.codegen import build_cuda
from onnxjit.codegen.dialect_cuda import memory_dtype
from onnxjit.codegen.dialect_table import DTYPES
from onnxjit.codegen.emit_cuda import emit
from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.codegen.expr import Const, Dim, Expr, Load, Reduce, apply, cast, fresh_axis, index
from onnxjit.codegen.kernel import Kernel, Stage, TensorType
from onnxjit.codegen.loops import LoopNest
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.schedule import NoSchedule, Request, schedule
from onnxjit.codegen.target import host
from onnxjit.codegen.tensor import NeedsValue, Trace, finish, placeholder
from onnxjit.codegen_calls import single_stages
from onnxjit.importer import import_model
from onnxjit.operators import registry
from onnxjit.operators.registry import Case, Operator
from onnxjit.passes.fuse import fuse
from onnxjit.passes.lower import lower
from onnxjit.program import KernelCall
from onnxjit.tensors import array_dtype_name

# --- kernels -----------------------------------------------------------------------------------


def trace(
    row: Operator, arrays: Sequence[Any], keywords: Mapping[str, Any], symbolic: Sequence[int] = ()
) -> Kernel:
    """The kernel of an operator on inputs like `arrays`; sizes in `symbolic` become dims."""
    names = [f"x{k}" for k in range(len(arrays))]
    known: set[str] = set()

    def size(d: int) -> Expr:
        return Dim(f"n{d}") if d in symbolic else index(d)

    while True:
        t = Trace()
        try:
            with t.active():
                tensors = []
                for name, a in zip(names, arrays, strict=True):
                    if a is None:
                        tensors.append(None)
                        continue
                    fixed = name in known
                    shape = tuple(index(d) if fixed else size(d) for d in a.shape)
                    type_ = TensorType(array_dtype_name(a), shape)
                    tensors.append(placeholder(name, type_, known=a if fixed else None))
                out = row.define(*tensors, **keywords)
                results = out if isinstance(out, tuple) else (out,)
                return finish("case", t, [(f"y{k}", r) for k, r in enumerate(results)], names)
        except NeedsValue as e:
            if e.buffer not in names or e.buffer in known:
                raise
            known.add(e.buffer)


def scheduled(kernel: Kernel, target: Any) -> list[tuple[Kernel, LoopNest]]:
    """The nests of a kernel, stage by stage where no rule takes it whole."""
    try:
        return [(kernel, schedule(Request(kernel, {}, target)))]
    except NoSchedule:
        parts = single_stages(KernelCall(kernel, ()))
        if len(parts) == 1:
            raise
        return [n for p in parts for n in scheduled(p.kernel, target)]


@dataclass(frozen=True)
class Check:
    """A kernel, inputs by buffer name, sizes; `symbolic` dims are named by their value."""

    kernel: Kernel
    feeds: Mapping[str, np.ndarray]
    dims: Mapping[str, int] = field(default_factory=dict)
    threads: int = 16

    def nests(self, threads: int | None = None) -> list[tuple[Kernel, LoopNest]]:
        return scheduled(self.kernel, build_cuda.cuda_target(threads=threads or self.threads))

    def buffers(self) -> dict[str, np.ndarray]:
        """Flat memory of every buffer; what kernels must write starts as garbage."""
        out = {}
        for b, t in self.kernel.types.items():
            if b in self.feeds:
                data = np.ascontiguousarray(self.feeds[b]).reshape(-1)
                out[b] = data.view(memory_dtype(t.dtype)).copy()
            else:
                count = int(np.prod([evaluate_int(d, self.dims) for d in t.shape], dtype=int))
                raw = np.full(count * numpy_dtype(t.dtype).itemsize, 0xA5, np.uint8)
                out[b] = raw.view(memory_dtype(t.dtype))
        return out

    def job(self) -> Any:
        calls = []
        for _, nest in self.nests():
            blocks = min(build_cuda.launch(nest, dict(self.dims)).blocks, 3)
            sizes = tuple(evaluate_int(e, self.dims) for e in nest.sizes)
            calls.append((emit(nest), tuple(p.buffer for p in nest.params), sizes, blocks))
        return self.buffers(), calls

    def verify(self, memory: Mapping[str, np.ndarray]) -> None:
        with np.errstate(all="ignore"):
            want = evaluate(self.kernel, self.feeds, self.dims)
        for b, w in zip(self.kernel.outputs, want, strict=True):
            dtype = self.kernel.types[b].dtype
            got = memory[b].view(numpy_dtype(dtype)).reshape(w.shape)
            if dtype == "bool":
                assert set(np.unique(memory[b])) <= {0, 1}
            if np.dtype(w.dtype).kind in "biu":
                np.testing.assert_array_equal(got, w)
                continue
            inputs = [t.dtype for t in self.kernel.types.values()]
            narrow = [TOLERANCE.get(d, 0.0) for d in (dtype, *inputs)]
            bound = max(narrow) if dtype != "float64" else 1e-7
            np.testing.assert_allclose(
                got.astype(np.float64), w.astype(np.float64), rtol=bound, atol=bound
            )


TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-7}


# --- what is checked ---------------------------------------------------------------------------

RNG = np.random.default_rng(7)


def real(*shape: int, dtype: str = "float32", low: float = -3, high: float = 3) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(numpy_dtype(dtype))


def whole(*shape: int, dtype: str = "int64", low: int = -9, high: int = 9) -> np.ndarray:
    return RNG.integers(max(low, 0) if dtype[0] == "u" else low, high, shape).astype(dtype)


def op(
    name: str,
    version: int,
    *arrays: Any,
    symbolic: Sequence[int] = (),
    outputs: int = 1,
    **attrs: Any,
) -> Check:
    """A check of one operator; sizes in `symbolic` are run-time integers."""
    row = registry.find("", name, version)
    assert row is not None
    keywords = registry.keyword_arguments(row, attrs, outputs, version)
    kernel = trace(row, arrays, keywords, symbolic)
    feeds = {f"x{k}": a for k, a in enumerate(arrays) if a is not None}
    return Check(kernel, feeds, {f"n{d}": d for d in symbolic})


def with_epilogue(check: Check, fn: Callable[[Expr, tuple[Expr, ...]], Expr]) -> Check:
    """The check with `fn(value, index)` applied to every element of the last stage."""
    *before, last = check.kernel.stages
    value = fn(last.value, last.axes)
    stages = (*before, replace(last, value=value))
    return replace(check, kernel=replace(check.kernel, stages=stages))


def scaled_relu(check: Check) -> Check:
    """Scale and shift by channel (axis 1), then clip at zero: batch normalisation and ReLU."""
    channels = check.kernel.types["y0"].shape[1]
    types = {**check.kernel.types}
    for b in ("scale", "shift"):
        types[b] = TensorType("float32", (channels,))
    inputs = (*check.kernel.inputs, "scale", "shift")
    check = replace(check, kernel=replace(check.kernel, types=types, inputs=inputs))
    n = evaluate_int(channels, check.dims)
    feeds = {**check.feeds, "scale": real(n), "shift": real(n)}
    check = replace(check, feeds=feeds)

    def fn(value: Expr, idx: tuple[Expr, ...]) -> Expr:
        at = [Load(b, (idx[1],), "float32") for b in ("scale", "shift")]
        return apply("max", apply("add", apply("mul", value, at[0]), at[1]), Const(0, "float32"))

    return with_epilogue(check, fn)


def casts(source: str, target: str, data: np.ndarray) -> Check:
    a = fresh_axis(data.size)
    stage = Stage("y0", (a,), cast(Load("x0", (a,), source), target))
    types = {d: TensorType(t, (index(data.size),)) for d, t in (("x0", source), ("y0", target))}
    return Check(Kernel("cast", ("x0",), ("y0",), (stage,), types), {"x0": data})


def nested_sum() -> Check:
    """max over j of (sum over k of x[i, j, k]) * y[i, j]: a reduction inside a reduction."""
    i, j, k = fresh_axis(3), fresh_axis(5), fresh_axis(7)
    inner = Reduce("sum", (k,), Load("x0", (i, j, k), "float32"))
    body = apply("mul", inner, Load("x1", (i, j), "float32"))
    types = {
        "x0": TensorType("float32", (index(3), index(5), index(7))),
        "x1": TensorType("float32", (index(3), index(5))),
        "y0": TensorType("float32", (index(3),)),
    }
    stage = Stage("y0", (i,), Reduce("max", (j,), body))
    feeds = {"x0": real(3, 5, 7), "x1": real(3, 5)}
    return Check(Kernel("nested", ("x0", "x1"), ("y0",), (stage,), types), feeds)


def exact_row() -> Check:
    """A row temporary longer than fits into shared memory: computed again by its readers."""
    return op("Softmax", 13, real(2, 3001), axis=1)


def make_checks() -> dict[str, Check]:
    values = [0.0, -0.0, 1.5, -1.5, 2.5, 126.7, 255.5, -300.0, 1e10, -1e20, 3e38, np.inf, -np.inf,
              np.nan, 0.49999997, 65504.0, 65519.9, 1e-8]  # fmt: skip
    edge = np.array(values, np.float32)
    scores = np.array([[2.0, np.nan, 1.0], [np.inf, 1.0, -np.inf], [0.0, -0.0, 3.0]], np.float32)
    c: dict[str, Check] = {
        # Pointwise: broadcasting, permutations, parts, gathers, sizes 0 and 1, several blocks.
        "add": op("Add", 14, real(5, 1, 7), real(3, 1)),
        "add_symbolic": op("Add", 14, real(5, 1, 7), real(3, 1), symbolic=(3, 5, 7)),
        "add_large": op("Add", 14, real(211), real(211)),
        "add_empty": op("Add", 14, real(0, 4), real(1), symbolic=(0,)),
        "add_scalar": op("Add", 14, real(), real()),
        "add_one": op("Add", 14, real(1, 1), real(1)),
        "sub_int32": op("Sub", 14, whole(13, dtype="int32"), whole(1, dtype="int32")),
        "mul_uint8": op("Mul", 14, whole(17, dtype="uint8", high=255), whole(17, dtype="uint8")),
        "div_int64": op("Div", 14, whole(29), np.where(whole(29) == 0, 3, whole(29))),
        "mod_int64": op("Mod", 13, whole(29), np.where((d := whole(29)) == 0, -4, d)),
        "mod_float": op("Mod", 13, real(29), real(29, low=0.5), fmod=1),
        "transpose": op("Transpose", 13, real(3, 5, 7), perm=(2, 0, 1)),
        "transpose_symbolic": op("Transpose", 13, real(3, 5, 7), perm=(1, 2, 0), symbolic=(5, 7)),
        "concat": op("Concat", 13, real(2, 3, 5), real(2, 1, 5), real(2, 0, 5), axis=1),
        "concat_symbolic": op("Concat", 13, real(2, 31), real(2, 5), axis=-1, symbolic=(31, 5)),
        "gather": op("Gather", 13, real(5, 7), whole(3, 2, low=-7, high=7), axis=1),
        "gather_clamped": op("Gather", 13, real(5), np.array([0, 99, -99, 4])),
        "where": op("Where", 16, whole(1, 7, high=2, low=0).astype(bool), real(5, 1), real(7)),
        "where_bool": op("Not", 1, whole(37, low=0, high=2).astype(bool)),
        "less": op("Less", 13, real(31), real(31)),
        "and": op("And", 7, whole(9, low=0, high=2) > 0, whole(9, low=0, high=2) > 0),
        "max_nan": op("Max", 13, scores, scores.T.copy()),
        "pad": op("Pad", 13, real(3, 5), np.array([1, 2, 0, 1]), np.float32(4.0)[()] * real(1)[0]),
        "half_add": op("Add", 14, real(3, 7, dtype="float16"), real(7, dtype="float16")),
        "bfloat16_mul": op("Mul", 14, real(3, 7, dtype="bfloat16"), real(7, dtype="bfloat16")),
        "double_tanh": op("Tanh", 13, real(19, dtype="float64")),
        "gelu": op("Gelu", 20, real(3, 11), approximate="tanh"),
        "erf": op("Erf", 13, real(23)),
        "sigmoid": op("Sigmoid", 13, real(23, low=-90, high=90)),
        "round": op("Round", 11, np.array([0.5, 1.5, -2.5, 2.4, -0.4, np.inf], np.float32)),
        "sign": op("Sign", 13, np.array([0.0, -0.0, np.nan, -3.0, 9.0], np.float32)),
        "pow": op("Pow", 15, real(11, low=0.1), real(11)),
        "bit_shift": op("BitShift", 11, whole(9, dtype="uint8", low=0, high=255),
                        whole(9, dtype="uint8", low=0, high=9), direction="LEFT"),
        # Reductions: one thread an output, one block an output, none to reduce, one output.
        "sum_rows": op("ReduceSum", 13, real(5, 300), np.array([1]), keepdims=0),
        "sum_columns": op("ReduceSum", 13, real(13, 19), np.array([0]), keepdims=1),
        "sum_all": op("ReduceSum", 13, real(3, 131), symbolic=(131,)),
        "sum_empty": op("ReduceSum", 13, real(3, 0), np.array([1]), keepdims=0),
        "sum_int64": op("ReduceSum", 13, whole(2, 257), np.array([1])),
        "sum_int32": op("ReduceSum", 13, whole(7, 3, dtype="int32"), np.array([1])),
        "sum_half": op("ReduceSum", 13, real(2, 200, dtype="float16"), np.array([1])),
        "sum_bfloat16": op("ReduceSum", 13, real(2, 20, dtype="bfloat16"), np.array([0])),
        "max_rows": op("ReduceMax", 18, real(3, 150), np.array([1])),
        "max_rows_nan": op("ReduceMax", 18, np.repeat(scores, 50, 1), np.array([1])),
        "min_uint8": op("ReduceMin", 18, whole(3, 129, dtype="uint8", low=3, high=255),
                        np.array([1])),
        "prod": op("ReduceProd", 18, real(4, 5, low=0.5, high=2), np.array([1])),
        "mean": op("ReduceMean", 18, real(4, 5, 6), np.array([0, 2])),
        "log_sum_exp": op("ReduceLogSumExp", 18, real(4, 150), np.array([1])),
        "l2": op("ReduceL2", 18, real(4, 9), np.array([1])),
        "argmax": op("ArgMax", 13, real(5, 9), axis=1),
        "nested": nested_sum(),
        # Windows.
        "max_pool": op("MaxPool", 12, real(1, 3, 9, 7), kernel_shape=(3, 3), strides=(2, 2),
                       pads=(1, 1, 1, 1), ceil_mode=1),
        "average_pool": op("AveragePool", 11, real(2, 2, 7, 7), kernel_shape=(2, 3),
                           pads=(0, 1, 1, 0)),
        "global_pool": op("GlobalAveragePool", 1, real(2, 3, 13, 11)),
        # Rows.
        "softmax": op("Softmax", 13, real(5, 37)),
        "softmax_symbolic": op("Softmax", 13, real(5, 150), symbolic=(5, 150)),
        "softmax_inner": op("Softmax", 13, real(2, 5, 3), axis=1),
        "softmax_half": op("Softmax", 13, real(3, 21, dtype="float16")),
        "softmax_bfloat16": op("Softmax", 13, real(3, 21, dtype="bfloat16")),
        "softmax_one": op("Softmax", 13, real(3, 1)),
        "softmax_empty": op("Softmax", 13, real(0, 7), symbolic=(0,)),
        "softmax_long": exact_row(),
        "log_softmax": op("LogSoftmax", 13, real(4, 19)),
        "layer_norm": op("LayerNormalization", 17, real(2, 3, 45), real(45), real(45)),
        "layer_norm_symbolic": op("LayerNormalization", 17, real(5, 45), real(45),
                                  symbolic=(5, 45)),
        "layer_norm_outputs": op("LayerNormalization", 17, real(5, 45), real(45), outputs=3),
        "group_norm": op("GroupNormalization", 21, real(2, 6, 5), real(6), real(6), num_groups=3),
        "instance_norm": op("InstanceNormalization", 6, real(2, 3, 5, 4), real(3), real(3)),
        # Sums of products.
        "matmul": op("MatMul", 13, real(37, 23), real(23, 19)),
        "matmul_symbolic": op("MatMul", 13, real(3, 37, 5), real(5, 7), symbolic=(3, 37, 5)),
        "matmul_batched": op("MatMul", 13, real(2, 1, 5, 7), real(3, 7, 11)),
        "matmul_half": op("MatMul", 13, real(9, 7, dtype="float16"), real(7, 5, dtype="float16")),
        "matmul_bfloat16": op("MatMul", 13, real(9, 7, dtype="bfloat16"),
                              real(7, 5, dtype="bfloat16")),
        "matmul_double": op("MatMul", 13, real(9, 7, dtype="float64"), real(7, 5, dtype="float64")),
        "matmul_vector": op("MatMul", 13, real(23), real(23, 19)),
        "matmul_depth_0": op("MatMul", 13, real(5, 0), real(0, 7)),
        "matmul_integer": op("MatMulInteger", 10, whole(9, 7, dtype="uint8", low=0, high=255),
                             whole(7, 5, dtype="int8"), np.uint8(7)[()] * np.ones((), np.uint8)),
        "gemm": op("Gemm", 13, real(7, 9), real(11, 7), real(11), transA=1, transB=1,
                   alpha=0.5, beta=2.0),
        "conv": op("Conv", 11, real(1, 3, 9, 7), real(5, 3, 3, 3), real(5), pads=(1, 1, 1, 1)),
        "conv_stride": op("Conv", 11, real(2, 3, 9, 7), real(5, 3, 3, 3), pads=(1, 0, 1, 2),
                          strides=(2, 2), dilations=(1, 2)),
        "conv_group": op("Conv", 11, real(1, 8, 7, 5), real(8, 4, 3, 3), group=2,
                         pads=(1, 1, 1, 1)),
        "conv_depthwise": op("Conv", 11, real(1, 5, 7, 9), real(5, 1, 3, 3), group=5,
                             pads=(1, 1, 1, 1), strides=(2, 1)),
        "conv_symbolic": op("Conv", 11, real(2, 3, 9, 7), real(5, 3, 3, 3), symbolic=(2, 9, 7),
                            pads=(1, 1, 1, 1)),
        "conv_1d": op("Conv", 11, real(2, 3, 17), real(4, 3, 5), pads=(2, 2)),
        "conv_transpose": op("ConvTranspose", 11, real(1, 4, 5, 3), real(4, 6, 3, 3),
                             strides=(2, 2), pads=(1, 1, 0, 1)),
        # Epilogues.
        "matmul_epilogue": scaled_relu(op("MatMul", 13, real(18, 7), real(7, 13))),
        "conv_epilogue": scaled_relu(op("Conv", 11, real(1, 3, 6, 7), real(5, 3, 3, 3),
                                        pads=(1, 1, 1, 1))),
        "pool_epilogue": scaled_relu(op("MaxPool", 12, real(1, 3, 9, 7), kernel_shape=(3, 3))),
        "sum_epilogue": with_epilogue(op("ReduceSum", 13, real(5, 300), np.array([1]), keepdims=0),
                                      lambda v, _: apply("tanh", v)),
        # Blocks of another size.
        "softmax_64": replace(op("Softmax", 13, real(2, 70)), threads=64),
        "matmul_64": replace(op("MatMul", 13, real(35, 17), real(17, 33)), threads=64),
    }  # fmt: skip
    for target in (
        "int8",
        "uint8",
        "int32",
        "int64",
        "uint64",
        "bool",
        "float16",
        "bfloat16",
        "float64",
    ):
        c[f"cast_float32_{target}"] = casts("float32", target, edge)
    for source in ("float16", "bfloat16"):
        with np.errstate(all="ignore"):
            c[f"cast_{source}_int32"] = casts(source, "int32", edge.astype(numpy_dtype(source)))
            c[f"cast_{source}_float32"] = casts(source, "float32", edge.astype(numpy_dtype(source)))
    for target in ("int8", "uint16", "float32", "bool", "int64"):
        c[f"cast_int64_{target}"] = casts("int64", target, whole(21, low=-(2**40), high=2**40))
    c["cast_bool_float32"] = casts("bool", "float32", whole(9, low=0, high=2) > 0)
    c["cast_uint64_float32"] = casts("uint64", "float32", np.array([2**64 - 1, 5, 0], np.uint64))
    return c


CHECKS = make_checks()


# --- operators' own cases ----------------------------------------------------------------------

SIMULATED_WORK = 3000
"""Most elements and operations of a case that is simulated."""

STEP = 17
"""Every STEP-th case of the operator table is simulated, every seventh of these compiled."""


@cache
def sample() -> dict[str, Check]:
    """A fixed selection of the operators' cases, their sizes symbolic where the case allows it."""
    cases = [
        (row, k)
        for row in registry.table()
        for k, case in enumerate(row.cases)
        if not row.host and not case.bench
    ]
    out = {}
    for row, k in cases[::STEP]:
        case = row.cases[k]
        arrays = case.inputs()
        made = case_check(row, case, arrays)
        # Lowering splits a recurrence; `models` has some.
        whole = made.kernel.clock is None
        if whole and all(t.dtype in DTYPES for t in made.kernel.types.values()):
            out[f"{row.name}-{row.since}-{k}"] = made
    return out


def case_check(row: Operator, case: Case, arrays: Sequence[Any]) -> Check:
    sizes = {d for a in arrays if a is not None for d in a.shape if d > 1 and d not in case.fixed}
    symbolic = sorted(sizes) if case.symbolic else []
    version = case.version or row.since
    keywords = registry.keyword_arguments(row, case.attrs, case.outputs, version)
    kernel = trace(row, arrays, keywords, symbolic)
    feeds = {f"x{k}": a for k, a in enumerate(arrays) if a is not None}
    return Check(kernel, feeds, {f"n{d}": d for d in symbolic})


def is_tiny(check: Check) -> bool:
    work = evaluate_int(check.kernel.flops(), check.dims)
    return work + sum(b.size for b in check.buffers().values()) <= SIMULATED_WORK


def models() -> dict[str, onnx.ModelProto]:
    """Small graphs whose kernels the passes fuse."""
    texts = {
        "mlp": """
            <ir_version: 8, opset_import: ["": 20]>
            g (float[N, 9] x, float[9, 7] w, float[7] b) => (float[N, 7] y) {
                m = MatMul (x, w)
                a = Add (m, b)
                y = Gelu (a)
            }""",
        "attention": """
            <ir_version: 8, opset_import: ["": 20]>
            g (float[B, S, 6] q, float[B, S, 6] k, float[B, S, 6] v) => (float[B, S, 6] y) {
                t = Transpose <perm = [0, 2, 1]> (k)
                s = MatMul (q, t)
                p = Softmax (s)
                y = MatMul (p, v)
            }""",
        "block": """
            <ir_version: 8, opset_import: ["": 20]>
            g (float[N, 3, 8, 6] x, float[5, 3, 3, 3] w, float[5] b, float[5] s)
                => (float[N, 10] y) {
                c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
                n = BatchNormalization (c, s, b, b, s)
                r = Relu (n)
                m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
                a = GlobalAveragePool (m)
                e = GlobalMaxPool (m)
                j = Concat <axis = 1> (a, e)
                y = Flatten (j)
            }""",
        "lstm": """
            <ir_version: 8, opset_import: ["": 17]>
            g (float[S, B, 3] x, float[2, 20, 3] w, float[2, 20, 5] r, float[2, 40] b)
                => (float[S, 2, B, 5] y, float[2, B, 5] h, float[2, B, 5] c) {
                y, h, c = LSTM <hidden_size = 5, direction = "bidirectional"> (x, w, r, b)
            }""",
        "gru": """
            <ir_version: 8, opset_import: ["": 17]>
            g (float[S, B, 3] x, float[1, 15, 3] w, float[1, 15, 5] r) => (float[S, 1, B, 5] y) {
                y = GRU <hidden_size = 5, direction = "reverse"> (x, w, r)
            }""",
    }
    return {name: onnx.parser.parse_model(text) for name, text in texts.items()}


def fused_checks(model: onnx.ModelProto, sizes: Mapping[str, int]) -> list[Check]:
    """One check for every kernel of a model after fusion, with random inputs."""
    program = fuse(lower(import_model(model)), host())
    labels = {d.name: sizes[d.label] for d in program.dims}
    out = []
    for call in program.kernels():
        feeds = {}
        for b in call.inputs:
            t = call.kernel.types[b]
            shape = [evaluate_int(d, labels) for d in t.shape]
            data = program.constants.get(b)
            feeds[b] = real(*shape, low=0.1).astype(t.dtype) if data is None else data
        out.append(Check(call.kernel, feeds, labels))
    return out


@cache
def fused() -> dict[str, Check]:
    sizes = {"N": 5, "B": 2, "S": 7}
    return {
        f"{name}-{k}": check
        for name, model in models().items()
        for k, check in enumerate(fused_checks(model, sizes))
    }
