"""Accuracy of the elementary functions, compiled and vectorised on this machine."""

import ctypes
import math
import re

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from onnxjit.codegen import scalar_math

I64, POINTER = ir.IntType(64), ir.PointerType()


def add_loop(module: ir.Module, name: str, type_: ir.Type) -> None:
    """void loop_NAME(in..., out, n) with non-aliasing arrays."""
    callee = scalar_math.function(module, name, type_)
    arity = len(callee.args)
    signature = ir.FunctionType(ir.VoidType(), [POINTER] * (arity + 1) + [I64])
    loop = ir.Function(module, signature, f"loop_{name}")
    for argument in loop.args[:-1]:
        argument.add_attribute("noalias")
    entry, body, done = (loop.append_basic_block(n) for n in ("entry", "body", "done"))
    b = ir.IRBuilder(entry)
    b.branch(body)
    b.position_at_end(body)
    i = b.phi(I64)
    at = [b.gep(p, [i], source_etype=type_) for p in loop.args[:-1]]
    b.store(b.call(callee, [b.load(p, typ=type_) for p in at[:arity]]), at[arity])
    following = b.add(i, ir.Constant(I64, 1))
    i.add_incoming(ir.Constant(I64, 0), entry)
    i.add_incoming(following, body)
    b.cbranch(b.icmp_signed("<", following, loop.args[-1]), body, done)
    b.position_at_end(done)
    b.ret_void()


class Compiled:
    def __init__(self, dtype: type) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.dtype = dtype
        module = ir.Module("functions")
        module.triple = llvm.get_process_triple()
        for name in (*scalar_math.UNARY, *scalar_math.BINARY):
            add_loop(module, name, ir.FloatType() if dtype is np.float32 else ir.DoubleType())
        self.text = str(module)
        self.module = llvm.parse_assembly(self.text)
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        tuning = llvm.create_pipeline_tuning_options(speed_level=3)
        tuning.loop_vectorization = True
        builder = llvm.create_pass_builder(machine, tuning)
        builder.getModulePassManager().run(self.module, builder)
        self.optimised = {f.name: str(f) for f in self.module.functions if not f.is_declaration}
        self.engine = llvm.create_mcjit_compiler(self.module, machine)
        self.engine.finalize_object()

    def __call__(self, name: str, *inputs: np.ndarray) -> np.ndarray:
        arrays = [np.ascontiguousarray(x, self.dtype) for x in inputs]
        result = np.empty_like(arrays[0])
        address = self.engine.get_function_address(f"loop_{name}")
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, result)]
        argtypes = [ctypes.c_void_p] * len(pointers)
        ctypes.CFUNCTYPE(None, *argtypes, ctypes.c_int64)(address)(*pointers, result.size)
        return result


@pytest.fixture(scope="module")
def single() -> Compiled:
    return Compiled(np.float32)


@pytest.fixture(scope="module")
def double() -> Compiled:
    return Compiled(np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


REFERENCE = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "tanh": np.tanh, "erf": np.vectorize(math.erf, otypes=[float]), "sigmoid": sigmoid,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos,
    "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh,
    "cosh": np.cosh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "floor": np.floor, "ceil": np.ceil, "round": np.rint, "trunc": np.trunc, "abs": np.abs,
    "sign": np.sign,
}  # fmt: skip

MAX_ULP = {"sqrt": 0.51, "exp": 1.1, "log": 1.1, "erf": 3, "tanh": 2.5, "sigmoid": 3} | {
    name: 0 for name in ("floor", "ceil", "round", "trunc", "abs", "sign")
}
ZERO_BELOW = {"exp": 2.0**-126, "exp2": 2.0**-126, "sigmoid": 2.0**-126}
"""Results that may be zero: denormals are within a run."""

EDGES = np.array([
    0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, -1e-40, 1.1754944e-38,
    3.4028235e38, -3.4028235e38, 88.72, 88.73, 89.5, -87.3, -87.4, -103.2, -103.9, -104.0, -150.0,
    127.9, 128.0, -126.0, -149.0, -151.0, 0.5, -0.5, 1.5, 2.5, -2.5, 8388607.5, 0.625, 0.92773,
    math.pi / 2, math.pi, 1e5, 16367173.0, 2.0**100, 1 - 2.0**-24, -(1 - 2.0**-24), 1 + 2.0**-23,
], np.float32)  # fmt: skip


def samples(count: int) -> np.ndarray:
    """Every magnitude of float32, the interesting range more densely, and the edges."""
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    near = [rng.normal(size=count // 4) * s for s in (1e-3, 0.5, 3.0, 30.0)]
    return np.concatenate([bits, *(n.astype(np.float32) for n in near), EDGES])


def ulps(actual: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Error of float32 `actual` in units of the last place of float64 `wanted`."""
    with np.errstate(all="ignore"):
        rounded = wanted.astype(np.float32)
        unit = np.maximum(np.spacing(np.abs(rounded)).astype(np.float64), 2.0**-149)
        error = np.abs(actual.astype(np.float64) - wanted) / unit
    special = ~np.isfinite(rounded)
    same = np.where(np.isnan(wanted), np.isnan(actual), actual == rounded)
    error[special] = np.where(same[special], 0, np.inf)
    return error


@pytest.mark.parametrize("name", scalar_math.UNARY)
def test_single_precision(single: Compiled, name: str) -> None:
    x = samples(20_000 if name == "erf" else 200_000)
    with np.errstate(all="ignore"):
        wanted = REFERENCE[name](x.astype(np.float64))
        actual = single(name, x)
    error = ulps(actual, wanted)
    error[(actual == 0) & (np.abs(wanted) < ZERO_BELOW.get(name, 0.0))] = 0
    worst = int(error.argmax())
    assert error[worst] <= MAX_ULP.get(name, 4), (x[worst], actual[worst], wanted[worst])


@pytest.mark.parametrize("name", ["exp", "log", "sin", "tanh", "erf", "sigmoid", "pow"])
def test_vectorises(single: Compiled, name: str) -> None:
    body = single.optimised[f"loop_{name}"]
    assert re.search(r"fmul (\w+ )*<\d+ x (float|double)>", body)
    assert not re.search(r"call \w+ @(?!llvm\.)", body)


@pytest.mark.parametrize("name", ["sin", "tanh", "erf", "asin", "atan", "sinh", "round", "expm1"])
def test_negative_zero(single: Compiled, name: str) -> None:
    result = single(name, np.array([-0.0] * 40))
    assert np.signbit(result).all() and not result.any()


@pytest.mark.parametrize("name", scalar_math.UNARY)
def test_double_precision(double: Compiled, name: str) -> None:
    x = np.concatenate([np.random.default_rng(1).normal(size=4000) * 20, EDGES, [5e-324, 1e300]])
    with np.errstate(all="ignore"):
        wanted = REFERENCE[name](x)
        actual = double(name, x)
        close = np.abs(actual - wanted) <= 4 * np.maximum(np.spacing(np.abs(wanted)), 5e-324)
    close |= (actual == wanted) | (np.isnan(actual) & np.isnan(wanted))
    assert close.all(), (x[~close], actual[~close], wanted[~close])


def test_power(single: Compiled, double: Compiled) -> None:
    rng = np.random.default_rng(3)
    x = np.concatenate([np.abs(rng.normal(size=20_000)) * 10, -rng.uniform(0, 9, 2000)])
    y = np.concatenate([rng.normal(size=20_000) * 10, rng.integers(-9, 9, 2000)])
    y[:4000] = rng.choice([1, 2, 3, 0.5, -1, -0.75], 4000)
    edges = np.array(
        [0.0, -0.0, 1, -1, 2, -2, 0.5, -0.5, -0.75, 3, -3, np.inf, -np.inf, np.nan, 1e38]
    )
    grid = np.meshgrid(edges, edges)
    x = np.concatenate([x, grid[0].ravel()]).astype(np.float32).astype(np.float64)
    y = np.concatenate([y, grid[1].ravel()]).astype(np.float32).astype(np.float64)
    with np.errstate(all="ignore"):
        wanted = np.power(x, y)
    error = ulps(single("pow", x, y), wanted)
    worst = int(error.argmax())
    assert error[worst] <= 1.5, (x[worst], y[worst])
    np.testing.assert_allclose(double("pow", x, y), wanted, rtol=1e-15)


@pytest.mark.parametrize(("name", "reference"), [("mod_floor", np.mod), ("mod_trunc", np.fmod)])
def test_remainders(single: Compiled, name: str, reference: np.ufunc) -> None:
    rng = np.random.default_rng(4)
    edges = np.array([0.0, -0.0, 1, -1, 2.5, -2.5, np.inf, -np.inf, np.nan])
    grid = np.meshgrid(edges, edges)
    x = np.concatenate([rng.normal(size=2000) * 10, grid[0].ravel()]).astype(np.float32)
    y = np.concatenate([rng.normal(size=2000), grid[1].ravel()]).astype(np.float32)
    with np.errstate(all="ignore"):
        wanted = reference(x, y)
    np.testing.assert_array_equal(single(name, x, y), wanted)


def test_division_by_a_constant(single: Compiled) -> None:
    """Nearly always as a division rounds it; multiples of the constant give integers."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.normal(size=200_000) * 10, EDGES]).astype(np.float32)
    x = x[(np.abs(x) > 1e-30) | (x == 0) | np.isnan(x)]  # denormal remainders are not corrected
    whole = np.arange(-9999, 9999, dtype=np.float32)
    for c in (6.0, 3.0, math.sqrt(2), -0.7, 255.0, 1e-3, 49.0, 1.1e12):
        c = float(np.float32(c))
        with np.errstate(all="ignore"):
            wanted = x.astype(np.float64) / c
            actual = single("divide_by", x, np.full_like(x, c))
        assert ulps(actual, wanted).max() < 0.51
        multiples = (whole * np.float64(c)).astype(np.float32)
        np.testing.assert_array_equal(
            single("divide_by", multiples, np.full_like(whole, c)), multiples / np.float32(c)
        )


def test_no_fast_math_flags(single: Compiled) -> None:
    assert not re.search(r"\b(fast|reassoc|contract|nnan|ninf|nsz|arcp|afn)\b", single.text)


def test_external_symbols(single: Compiled, double: Compiled) -> None:
    known = set(scalar_math.external_symbols())
    for compiled in (single, double):
        names = {f.name for f in compiled.module.functions if f.is_declaration}
        assert {n for n in names if not n.startswith("llvm.")} <= known
