"""The kernel dialect: compiled kernels against NumPy and against their interpreted form."""

import ctypes
import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from numba.core.errors import TypingError

from onnxjit.codegen import dialect, dialect_python

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

HEAD = "def kernel(ptrs, ints, scratch, begin, end):\n"
GEMM = "gemm_f32_4x8_scalar"
DTYPES = {
    **{n: np.dtype(n) for n in ("float32", "float64", "float16", "bool")},
    **{n: np.dtype(n) for b in (8, 16, 32, 64) for n in (f"int{b}", f"uint{b}")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


def optimise(text: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    module = llvm.parse_assembly(text)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = True
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return module, machine


class Kernel:
    """A compiled kernel that takes arrays."""

    def __init__(
        self, source: str, symbols: dict[str, int] | None = None, native_half: bool = True
    ) -> None:
        for symbol, address in (symbols or {}).items():
            llvm.add_symbol(symbol, address)
        text = dialect.compile_ir(source, symbols or {}, native_half=native_half)
        self.ir, machine = optimise(text)
        self.text = str(self.ir)
        self.engine = llvm.create_mcjit_compiler(self.ir, machine)
        self.engine.finalize_object()
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)
        self.entry = prototype(self.engine.get_function_address("kernel"))

    def __call__(self, arrays: list, ints: list[int], begin: int, end: int) -> None:
        table = (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
        values = np.array(ints or [0], np.int64)
        scratch = np.zeros(65536, np.uint8)
        self.entry(ctypes.addressof(table), values.ctypes.data, scratch.ctypes.data, begin, end)


def run_both(body: str, arrays: list, ints: list[int], begin: int, end: int) -> None:
    """Run the kernel compiled, in place on `arrays`, and check the interpreted form against it."""
    source = HEAD + body
    copies = [a.copy() for a in arrays]
    Kernel(source)(arrays, ints, begin, end)
    scratch = np.zeros(65536, np.uint8)
    dialect_python.run(source, (), copies, np.array(ints or [0], np.int64), scratch, begin, end)
    for compiled, interpreted in zip(arrays, copies, strict=True):
        wide = "f8" if compiled.dtype.kind in "fV" else compiled.dtype
        np.testing.assert_allclose(compiled.astype(wide), interpreted.astype(wide), rtol=3e-7)


def pointwise(expression: str, source: str = "float32", target: str = "float32") -> str:
    return f"""
    x = buffer_{source}(ptrs, 0)
    y = buffer_{target}(ptrs, 1)
    for i in range(begin, end):
        y[i] = {expression}
"""


def test_relu_is_vectorised_without_overlap_checks() -> None:
    kernel = Kernel(HEAD + pointwise("max_(x[i], float32(0.0))"))
    assert "vector.body" in kernel.text and re.search(r"store <\d+ x float>", kernel.text)
    assert "memcheck" not in kernel.text
    x = np.array([-1, 2, np.nan, np.inf, -np.inf] * 20, np.float32)
    y = np.zeros_like(x)
    kernel([x, y], [], 3, 100)
    np.testing.assert_array_equal(y[3:], np.maximum(x, 0)[3:])
    assert not y[:3].any()
    kernel([x, x], [], 0, 100)  # in place
    np.testing.assert_array_equal(x[3:], y[3:])


def test_packed_instructions() -> None:
    module, machine = optimise(dialect.compile_ir(HEAD + pointwise("max_(x[i], float32(0.0))")))
    assembly = machine.emit_assembly(module)
    assert re.search(r"\bv?maxps\b|\bfmaxnm?\s+v|\bfmax\s+v", assembly)


@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "sigmoid", "log"])
def test_functions_vectorise(name: str) -> None:
    kernel = Kernel(HEAD + pointwise(f"{name}(x[i])"))
    assert re.search(r"fmul <\d+ x float>", kernel.text)
    assert "memcheck" not in kernel.text


def test_nothing_of_numba_is_left() -> None:
    module, _ = optimise(dialect.compile_ir(HEAD + pointwise("x[i] * x[i] + float32(1.0)")))
    names = [f.name for f in module.functions if not f.name.startswith("llvm.")]
    assert names == ["kernel"]
    assert not list(module.global_variables)


def test_same_source_same_text() -> None:
    source = HEAD + pointwise("exp(x[i]) + log(x[i])")
    assert dialect.compile_ir(source) == dialect.compile_ir(source)


def test_fast_math() -> None:
    source = HEAD + pointwise("x[i] * x[i] + exp(x[i])")
    text = dialect.compile_ir(source)
    assert re.search(r"fadd (contract|nsz|reassoc| )+float", text)
    strict = dialect.compile_ir("FASTMATH = ()\n" + source)
    assert "contract" not in strict and "reassoc" not in strict
    assert not re.search(r"\b(fast|nnan|ninf|arcp|afn)\b", text)


def test_reductions_vectorise() -> None:
    kernel = Kernel(
        HEAD
        + """
    x = buffer_float32(ptrs, 0)
    y = buffer_float32(ptrs, 1)
    n = ints[0]
    for r in range(begin, end):
        m = float32(-inf)
        s = float32(0.0)
        for j in range(n):
            m = max_(m, x[r * n + j])
        for j in range(n):
            s += exp(x[r * n + j] - m)
        for j in range(n):
            y[r * n + j] = exp(x[r * n + j] - m) / s
"""
    )
    assert re.search(r"vector\.reduce\.fmaximum", kernel.text)
    assert re.search(r"vector\.reduce\.fadd", kernel.text)
    x = np.random.default_rng(0).normal(size=(5, 77)).astype(np.float32) * 5
    x[3, 9] = np.nan
    y = np.zeros_like(x)
    kernel([x, y], [77], 1, 5)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(y[1:], (e / e.sum(1, keepdims=True))[1:], rtol=1e-5)
    assert not y[0].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_floating_point_casts(dtype: str) -> None:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e-8, 5.96e-8, 65504, 65519.9, 65520,
               1e39, 3.3895e38, 1.00390625, 1.01171875, -1.00390625]  # fmt: skip
    x = np.concatenate([special, np.random.default_rng(2).normal(size=200) * 100])
    with np.errstate(over="ignore"):
        x32 = x.astype(np.float32) if dtype != "float64" else x
    out = np.zeros(x.size, DTYPES[dtype])
    source = "float64" if dtype == "float64" else "float32"
    run_both(pointwise("x[i]", source, dtype), [x32, out], [], 0, x.size)
    with np.errstate(all="ignore"):
        wanted = x32.astype(DTYPES[dtype])
    np.testing.assert_array_equal(out.astype(float), wanted.astype(float))
    assert (np.signbit(out) == np.signbit(wanted))[:4].all()
    back = np.zeros(x.size, np.float32)
    run_both(pointwise("x[i]", dtype, "float32"), [out, back], [], 0, x.size)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(back, out.astype(np.float32))


def test_half_precision_without_instructions() -> None:
    """Every half and a lot of floats, on a target that cannot convert by itself."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    rng = np.random.default_rng(5)
    floats = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    near = rng.normal(size=50_000) * np.exp2(rng.integers(-28, 18, 50_000))
    with np.errstate(all="ignore"):
        ties = (halves[:-1].astype(np.float64) + halves[1:].astype(np.float64)) / 2
        floats = np.concatenate([floats, near, ties[np.isfinite(ties)]]).astype(np.float32)
        rounded = floats.astype(np.float16)
    for source, x, wanted in (
        (pointwise("x[i]", "float16"), halves, halves.astype(np.float32)),
        (pointwise("x[i]", "float32", "float16"), floats, rounded),
    ):
        text = dialect.compile_ir(HEAD + source, native_half=False)
        assert not re.search(r"\bhalf\b", text)
        for native in (False, True):
            y = np.zeros(x.size, wanted.dtype)
            Kernel(HEAD + source, native_half=native)([x, y], [], 0, x.size)
            np.testing.assert_array_equal(y, wanted)
            assert (np.signbit(y) == np.signbit(wanted))[~np.isnan(wanted)].all()


def test_control_flow() -> None:
    body = """
    x = buffer_float32(ptrs, 0)
    y = buffer_int32(ptrs, 1)
    for i in range(begin, end):
        v = x[i]
        if v > 1 and v < 4 or v == 9:
            k = int32(1)
        else:
            k = int32(0) if not v < 0 else int32(2)
        while v > 0:
            v = v - 3
            k += 10
        y[i] = k
"""
    x = np.array([-1, 0, 2, 5, 9], np.float32)
    y = np.zeros(5, np.int32)
    run_both(body, [x, y], [], 0, 5)
    assert y.tolist() == [2, 0, 11, 20, 31]


def test_rounding_to_half_rounds_once() -> None:
    x = np.array([1 + 2.0**-11 + 2.0**-30, 1 + 2.0**-11, 1 + 2.0**-8 + 2.0**-30, -1e-30, np.nan, 7])
    for dtype in ("float16", "bfloat16"):
        y = np.zeros(x.size, np.float32)
        run_both(pointwise(f"round_{dtype}(x[i])", "float64"), [x, y], [], 0, x.size)
        wanted = {"float16": [1 + 2.0**-10, 1.0, 1 + 2.0**-8], "bfloat16": [1, 1, 1 + 2.0**-7]}
        np.testing.assert_array_equal(y[:3], wanted[dtype])
        assert np.isnan(y[4]) and y[5] == 7


def saturate(x: np.ndarray, dtype: np.dtype) -> list:
    info = np.iinfo(dtype)
    clipped = [0 if v != v else min(max(v, info.min), info.max) for v in x.tolist()]
    return [int(v) for v in clipped]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if "int" in d])
def test_float_to_integer_saturates(dtype: str) -> None:
    x = np.array([0.0, -0.9, 1.5, -1.5, 127.9, 128, 300, -300, 1e5, 4e9, -4e9, 1e19, -1e19, 2e19,
                  np.inf, -np.inf, np.nan])  # fmt: skip
    for source in ("float64", "float32"):
        values = x.astype(source)
        y = np.zeros(x.size, dtype)
        run_both(pointwise(f"{dtype}(x[i])", source, dtype), [values, y], [], 0, x.size)
        assert y.tolist() == saturate(values, np.dtype(dtype))


def test_integer_and_bool_casts() -> None:
    x = np.array([0, 1, -1, 127, 128, 255, 256, -129, 2**31, -(2**63), 2**63 - 1], np.int64)
    for dtype in ("int8", "uint8", "int32", "uint32", "uint64", "float32", "bool"):
        y = np.zeros(x.size, dtype)
        name = "bool_" if dtype == "bool" else dtype
        run_both(pointwise(f"{name}(x[i])", "int64", dtype), [x, y], [], 0, x.size)
        np.testing.assert_array_equal(y, x.astype(dtype))
    flags = np.array([0, 1, 2, 255], np.uint8)  # any non-zero byte is true
    y = np.zeros(4, np.float32)
    Kernel(HEAD + pointwise("float32(x[i]) + 1", "bool"))([flags, y], [], 0, 4)
    assert y.tolist() == [1, 2, 2, 2]
    nan = np.array([np.nan, 0.0, -0.0, 0.5], np.float32)
    b = np.zeros(4, np.bool_)
    run_both(pointwise("bool_(x[i])", "float32", "bool"), [nan, b], [], 0, 4)
    assert b.tolist() == [True, False, False, True]


def two_operands(expression: str, dtype: str, target: str) -> str:
    return f"""
    x = buffer_{dtype}(ptrs, 0)
    y = buffer_{dtype}(ptrs, 1)
    z = buffer_{target}(ptrs, 2)
    for i in range(begin, end):
        z[i] = {expression}
"""


def grid(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(dtype)
    values = {0, 1, 2, 3, 7, info.max, info.max - 1, info.min, info.min + 1}
    values |= {-1, -2, -5} if info.min else set()
    table = np.array(sorted(values), dtype)
    a, b = np.meshgrid(table, table)
    return a.ravel().copy(), b.ravel().copy()


def exact(name: str, a: int, b: int) -> int:
    q = 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return {
        "add(x[i], y[i])": lambda: a + b, "x[i] - y[i]": lambda: a - b,
        "x[i] * y[i]": lambda: a * b,
        "div(x[i], y[i])": lambda: q, "x[i] // y[i]": lambda: a // b if b else 0,
        "mod_floor(x[i], y[i])": lambda: a % b if b else 0,
        "mod_trunc(x[i], y[i])": lambda: a - q * b if b else 0,
        "min_(x[i], y[i])": lambda: min(a, b), "max_(x[i], y[i])": lambda: max(a, b),
        "bit_and(x[i], y[i])": lambda: a & b, "x[i] | y[i]": lambda: a | b,
        "bit_xor(x[i], y[i])": lambda: a ^ b, "bit_not(x[i])": lambda: ~a, "-x[i]": lambda: -a,
        "abs(x[i])": lambda: abs(a), "sign(x[i])": lambda: (a > 0) - (a < 0),
        "fma(x[i], y[i], x[i])": lambda: a * b + a,
    }[name]()  # fmt: skip


INTEGER_OPERATIONS = (
    "add(x[i], y[i])", "x[i] - y[i]", "x[i] * y[i]", "div(x[i], y[i])", "x[i] // y[i]",
    "mod_floor(x[i], y[i])", "mod_trunc(x[i], y[i])", "min_(x[i], y[i])", "max_(x[i], y[i])",
    "bit_and(x[i], y[i])", "x[i] | y[i]", "bit_xor(x[i], y[i])", "bit_not(x[i])", "-x[i]",
    "abs(x[i])", "sign(x[i])", "fma(x[i], y[i], x[i])",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
def test_integer_arithmetic_wraps(dtype: str) -> None:
    """All operations in one kernel; the width must hold even inside of an expression."""
    a, b = grid(dtype)
    count = len(INTEGER_OPERATIONS)
    lines = [f"        z[i * {count} + {k}] = {e}\n" for k, e in enumerate(INTEGER_OPERATIONS)]
    body = two_operands("x[i]", dtype, dtype).replace("        z[i] = x[i]\n", "".join(lines))
    z = np.zeros((a.size, count), dtype)
    Kernel(HEAD + body)([a, b, z], [], 0, a.size)
    wrap = 1 << (8 * a.itemsize)
    low = int(np.iinfo(dtype).min)
    for k, expression in enumerate(INTEGER_OPERATIONS):
        wanted = [
            (exact(expression, x, y) - low) % wrap + low
            for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert z[:, k].tolist() == wanted, expression


def test_interpreted_integers() -> None:
    a, b = grid("int32")
    for expression in (*(e for e in INTEGER_OPERATIONS if "//" not in e), "pow(x[i], y[i])",
                       "shift_left(x[i], y[i])", "shift_right(x[i], y[i])",
                       "udiv_(x[i], y[i])", "umod_(x[i], y[i])"):  # fmt: skip
        z = np.zeros_like(a)
        run_both(two_operands(expression, "int32", "int32"), [a, b, z], [], 0, a.size)


def test_literals_adapt_and_division_by_a_constant_multiplies() -> None:
    kernel = Kernel(HEAD + pointwise("x[i] // 10 + 200", "uint8", "uint8"))
    x = np.arange(256, dtype=np.uint8)
    y = np.zeros_like(x)
    kernel([x, y], [], 0, 256)
    np.testing.assert_array_equal(y, x // 10 + np.uint8(200))
    source = HEAD + pointwise("floordiv(i, 7)", target="int64")
    module, machine = optimise(dialect.compile_ir(source))
    assert "div" not in machine.emit_assembly(module)
    module, _ = optimise(dialect.compile_ir(HEAD + pointwise("umod_(i, 8)", target="int64")))
    assert re.search(r"and <?.*i64", str(module)) and "rem" not in str(module)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_selection(dtype: str) -> None:
    values = np.array([0.0, 1, -1, 2.5, np.inf, -np.inf, np.nan], dtype)
    a, b = (g.ravel().copy() for g in np.meshgrid(values, values))
    cases = {
        "min_(x[i], y[i])": np.minimum, "max_(x[i], y[i])": np.maximum,
        "select(x[i] < y[i], x[i], 3)": lambda a, b: np.where(a < b, a, 3),
        "float32(isnan(x[i])) + float32(isinf(y[i]))": lambda a, b: 1.0 * np.isnan(a) + np.isinf(b),
        "bool_(logical_xor(x[i], y[i] >= 1))": lambda a, b: (a != 0) ^ (b >= 1),
        "logical_and(x[i] != y[i], logical_not(y[i] == 1))": lambda a, b: (a != b) & (b != 1),
        "logical_or(x[i] > y[i], x[i] <= -1)": lambda a, b: (a > b) | (a <= -1),
        "sign(x[i]) + trunc(y[i])": lambda a, b: np.sign(a) + np.trunc(b),
        "fma(x[i], y[i], 1)": lambda a, b: a * b + 1,
        "floordiv(x[i], y[i] + 2)": lambda a, b: np.floor(a / (b + 2)),
    }  # fmt: skip
    for expression, reference in cases.items():
        z = np.zeros(a.size, dtype)
        run_both(two_operands(expression, dtype, dtype), [a, b, z], [], 0, a.size)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(z, reference(a, b).astype(dtype), err_msg=expression)


def test_every_function_interpreted() -> None:
    """Compiled and interpreted forms agree on every elementary function."""
    names = ["exp", "exp2", "log", "log1p", "expm1", "tanh", "erf", "sigmoid", "sqrt", "rsqrt",
             "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "atanh",
             "acosh", "floor", "ceil", "round_", "trunc", "abs_", "sign"]  # fmt: skip
    x = np.array([0.1, 0.25, 0.5, 0.75, 0.9], np.float32)
    lines = [f"        y[i * {len(names)} + {k}] = {n}(x[i])\n" for k, n in enumerate(names)]
    y = np.zeros((x.size, len(names)), np.float32)
    run_both(pointwise("0").replace("        y[i] = 0\n", "".join(lines)), [x, y], [], 0, x.size)
    assert y[:, : names.index("acosh")].all()
    assert set(dialect.namespace()) == set(dialect_python.python_namespace())


def test_bit_casts() -> None:
    x = np.array([1.0, -2.0, np.inf], np.float32)
    y = np.zeros(3, np.int32)
    run_both(pointwise("bitcast_int32(x[i]) ^ 1", "float32", "int32"), [x, y], [], 0, 3)
    np.testing.assert_array_equal(y, x.view(np.int32) ^ 1)


def test_memory_operations() -> None:
    body = """
    x = buffer_float32(ptrs, 0)
    y = buffer_float32(ptrs, 1, 1)
    z = buffer_float32(ptrs, 2, 1)
    s = scratch_float32(scratch, 64, 7)
    t = stack_float32(16, 8)
    a = stack_int64(1, 9)
    for i in range(begin, end, 16):
        copy(s, offset(x, i), 16)
        for j in range(16):
            t[j] = s[15 - j]
        copy(offset(y, i), t, 16)
    zero(offset(y, 3), 2)
    for i in range(end - 1, begin - 1, -1):
        z[i] = y[i] + z[i]
    a[0] = address(y, 5) - address(y, 1)
    z[0] = a[0]
    assume(begin >= 0)
"""
    x = np.arange(64, dtype=np.float32)
    y = np.zeros_like(x)
    z = np.ones_like(x)
    run_both(body, [x, y, z], [], 0, 64)
    wanted = x.reshape(4, 16)[:, ::-1].ravel().copy()
    wanted[3:5] = 0
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(z[1:], wanted[1:] + 1)
    assert z[0] == 16


def test_stack_alignment_and_runtime_step() -> None:
    body = """
    y = buffer_int64(ptrs, 0)
    t = stack_float32(16, 3)
    y[0] = address(t, 0) % 64
    k = 1
    for i in range(begin, end, ints[0]):
        y[k] = i
        k += 1
"""
    for step in (3, -3):
        y = np.zeros(8, np.int64)
        first, last = (0, 10) if step > 0 else (10, 0)
        run_both(body, [y], [step], first, last)
        assert y[0] == 0
        assert y[1:5].tolist() == list(range(first, last, step))


def test_variables_with_several_definitions_or_uses() -> None:
    """Values where there is one definition in front of all uses, stack slots elsewhere."""
    body = """
    y = buffer_int64(ptrs, 0)
    for i in range(begin, end):
        if i % 3 == 0:
            continue
        if i % 3 == 1:
            a = i * 10
        else:
            a = -i
        if i == 4:
            once = i + 100
        y[i] = a
        last = i
    for i in range(end, end + 3):
        for j in range(2):
            y[i] += last * j
            last = i - j
    r = range(3)
    for i in r:
        y[end + 3] += i
    for i in r:
        y[end + 3] += once
        kept = i
    y[end + 4] = kept
"""
    y = np.zeros(16, np.int64)
    run_both(body, [y], [], 1, 9)
    assert y.tolist() == [0, 10, -2, 0, 40, -5, 0, 70, -8, 9, 10, 11, 315, 2, 0, 0]


def test_a_variable_that_no_way_defines_is_zero_and_one_range_is_one_range() -> None:
    y = np.ones(2, np.int64)
    body = "    y = buffer_int64(ptrs, 0)\n    if begin < end:\n        r = 7\n    y[1] = r\n"
    Kernel(HEAD + body)([y], [], 1, 0)
    assert y.tolist() == [1, 0]
    choice = "    for i in (range(3) if begin < end else range(5)):\n        y[i] = 1\n"
    with pytest.raises(TypeError, match=r"Range.*can have one definition only"):
        Kernel(HEAD + body + choice)


def test_shared_scope_sees_overlap() -> None:
    """Two buffers of one scope may overlap: the stores of one are seen through the other."""
    body = """
    x = buffer_float32(ptrs, 0, 5)
    y = buffer_float32(ptrs, 1, 5)
    for i in range(begin, end):
        y[i] = x[i] + 1
"""
    memory = np.zeros(101, np.float32)
    Kernel(HEAD + body)([memory, memory[1:]], [], 0, 100)
    np.testing.assert_array_equal(memory, np.arange(101))


def test_micro_kernel_call() -> None:
    body = f"""
    a = buffer_float32(ptrs, 0)
    b = buffer_float32(ptrs, 1)
    c = buffer_float32(ptrs, 2)
    segs = stack_int64(2, 50)
    segs[0] = 0
    segs[1] = ints[0]
    for i in range(begin, end):
        {GEMM}(a, i, ints[1], segs, 0, 2, 3, b, 0, c, i * 8, 8, 0, b, 9)
"""
    source = HEAD + body
    calls = []
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    )  # fmt: skip

    @prototype
    def callback(a, rs, segs, nseg, run, b, c, ldc, more, ahead):
        calls.append((a, rs, segs[:nseg], nseg, run, b, c, ldc, more, ahead))

    kernel = Kernel(source, {GEMM: ctypes.cast(callback, ctypes.c_void_p).value})
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=100).astype(np.float32), rng.normal(size=48).astype(np.float32)
    c = np.zeros(64, np.float32)
    kernel([a, b, c], [10, 20], 1, 2)
    (one,) = calls
    assert one[:4] == (a.ctypes.data + 4, 20, [0, 10], 2)
    assert one[4:] == (3, b.ctypes.data, c.ctypes.data + 32, 8, 0, b.ctypes.data + 36)

    dialect_python.run(source, [GEMM], [a, b, c], np.array([10, 20]), None, 1, 2)
    rows = [np.concatenate([a[1 + 20 * i :][:3], a[11 + 20 * i :][:3]]) for i in range(4)]
    want = np.float64(rows) @ b.reshape(6, 8)
    np.testing.assert_allclose(c[8:40].reshape(4, 8), want, rtol=0, atol=1e-6 * abs(want).max())
    assert not c[:8].any()


@pytest.mark.parametrize(
    "expression", ["x[i] + unknown", "exp(1)", "len(x)", "x[1.5]", "bit_and(x[i], 1)"]
)
def test_rejected(expression: str) -> None:
    with pytest.raises(TypingError):
        dialect.compile_ir(HEAD + pointwise(expression))


def test_rejected_symbols() -> None:
    with pytest.raises(ValueError, match="family"):
        dialect.namespace(["system"])
    with pytest.raises(ValueError, match="family"):
        dialect_python.python_namespace(["gemm_f32_4x8_scalar; evil"])


def test_interpreter_needs_no_numba() -> None:
    """A kernel can be stepped through where compilation is switched off."""
    source = HEAD + pointwise("max_(x[i], 1)")
    code = (
        "import sys, numpy as np\n"
        "from onnxjit.codegen import dialect_python as d\n"
        "x, y = np.arange(3, dtype=np.float32), np.zeros(3, np.float32)\n"
        f"d.run({source!r}, (), [x, y], None, None, 0, 3)\n"
        "assert y.tolist() == [1, 1, 2]\n"
        "assert 'numba' not in sys.modules\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
