"""The CUDA dialect's scalar operations, compiled for this CPU, against the table of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from onnxjit.codegen import build_cuda
from onnxjit.codegen.scalar_functions import FUNCTIONS, numpy_dtype

if build_cuda.toolchain_problem():
    pytest.skip(str(build_cuda.toolchain_problem()), allow_module_level=True)

VALUES: dict[str, list[Any]] = {
    "f": [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.7, -7.2, 100.25, 1e-3, np.inf, -np.inf, np.nan],
    "i": [0, 1, -1, 2, -3, 7, -100, 100],
    "u": [0, 1, 2, 3, 7, 100, 200, 255],
}
UNARY = (
    "neg", "abs", "sign", "sqrt", "rsqrt", "exp", "log", "erf", "sigmoid", "tanh", "sin", "cos",
    "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "log1p", "expm1",
    "floor", "ceil", "trunc", "round", "isnan", "isinf",
)  # fmt: skip
BINARY = (
    "div", "floordiv", "mod", "fmod", "min", "max", "pow", "lt", "le", "eq", "ne",
    "bit_and", "bit_or", "bit_xor", "shift_left", "shift_right",
)  # fmt: skip
SPELLED = {"min": "min_", "max": "max_", "mod": "mod_floor", "fmod": "mod_trunc"}
INTEGER_UNARY = ("neg", "abs", "sign", "floor", "isnan")
BITWISE = ("bit_and", "bit_or", "bit_xor", "shift_left", "shift_right")


@cache
def on_cpu() -> Callable[[str, Sequence[str]], Callable[..., Any]]:
    """Compiles an operation of the CUDA dialect for this CPU: the emitters are target-neutral, and
    libdevice's functions have the C library's names."""
    import ctypes
    import ctypes.util

    from llvmlite import binding, ir
    from numba.core import types

    from onnxjit.codegen.dialect_convert import llvm_type
    from onnxjit.codegen.dialect_cuda import _operations

    operations = _operations()
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    alive: list[Any] = []

    def define(name: str, dtypes: Sequence[str]) -> Callable[..., Any]:
        key = "_".join((name, *dtypes))
        module = ir.Module(key)
        args = [getattr(types, d) for d in dtypes]
        rule, emitter = operations[name]
        sig = rule(*args)
        assert sig is not None and list(sig.args) == args, (name, dtypes)
        is_bool = sig.return_type == types.boolean
        result = ir.IntType(8) if is_bool else llvm_type(sig.return_type)
        function = ir.Function(module, ir.FunctionType(result, [llvm_type(a) for a in args]), key)
        builder = ir.IRBuilder(function.append_basic_block())
        value = emitter(None, builder, sig, list(function.args))
        builder.ret(builder.zext(value, result) if is_bool else value)
        parsed = binding.parse_assembly(str(module))
        for f in parsed.functions:
            if f.is_declaration and f.name.startswith("__nv_"):
                address = ctypes.cast(getattr(libm, f.name[5:]), ctypes.c_void_p).value
                binding.add_symbol(f.name, address)
        # Without the processor's own conversions, those of float16 are calls of compiler-rt.
        features = binding.get_host_cpu_features().flatten()
        machine = binding.Target.from_default_triple().create_target_machine(
            features=features, jit=True
        )
        engine = binding.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        out = "bool" if is_bool else str(sig.return_type)
        kinds = [np.ctypeslib.as_ctypes_type(np.dtype(d)) for d in (out, *dtypes)]
        call = ctypes.CFUNCTYPE(*kinds)(engine.get_function_address(key))
        alive.append(engine)
        return lambda *values: np.dtype(out).type(call(*values))

    return define


def pairs(dtype: str) -> list[tuple[Any, Any]]:
    values = [np.dtype(dtype).type(v) for v in VALUES[np.dtype(dtype).kind]]
    return [(a, b) for a in values for b in values]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int64", "uint8", "uint32"])
def test_scalar_operations(dtype: str) -> None:
    """Every operation of the CUDA dialect means what the table of functions says."""
    kind = np.dtype(dtype).kind
    define = on_cpu()
    for name in UNARY if kind == "f" else INTEGER_UNARY:
        run = define(SPELLED.get(name, name), [dtype])
        for v in VALUES[kind]:
            a = np.dtype(dtype).type(v)
            agree(name, run(a), FUNCTIONS[name].evaluate(a), a)
    for name in BINARY:
        if kind == "f" and name in BITWISE:
            continue
        run = define(SPELLED.get(name, name), [dtype, dtype])
        for a, b in pairs(dtype):
            if kind != "f" and (
                (name == "pow" and b < 0)
                or (name.startswith("shift") and not 0 <= b < 8 * a.itemsize)
            ):
                continue
            if kind == "f" and name == "pow" and a == -np.inf and b == 0.5:
                continue  # +inf in C, NaN in some NumPy builds
            agree(name, run(a, b), meaning(name, a, b), (a, b))


def meaning(name: str, a: Any, b: Any) -> Any:
    with np.errstate(all="ignore"):
        if name == "floordiv" and np.asarray(a).dtype.kind == "f":
            return np.floor(a / b)  # the quotient is rounded first, unlike NumPy's
        return FUNCTIONS[name].evaluate(a, b)


def agree(name: str, got: Any, want: Any, at: Any) -> None:
    with np.errstate(all="ignore"):
        tolerance = 2e-6 if np.asarray(want).dtype.kind == "f" else 0
        np.testing.assert_allclose(got, want, rtol=tolerance, err_msg=f"{name}{at}")


def test_scalar_conversions() -> None:
    define = on_cpu()
    edges = [0.0, -0.0, 0.5, -0.7, 1.9, -1.9, 127.0, 128.0, -128.9, 255.0, 256.5, 3e9, -3e9, 1e19,
             -1e19, 3e38, np.inf, -np.inf, np.nan]  # fmt: skip
    for target in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        for source in ("float32", "float64"):
            run = define(target, [source])
            for v in edges:
                a = np.dtype(source).type(v)
                assert run(a) == FUNCTIONS["cast"].evaluate(a, target), (source, target, v)
    for dtype in ("float16", "bfloat16"):
        to, back = define(f"to_{dtype}", ["float32"]), define(f"from_{dtype}", ["uint16"])
        rounded = define(f"round_{dtype}", ["float32"])
        for v in (0.0, -0.0, 1.0, 1 / 3, 65504.0, 65519.0, 65520.0, 1e-7, 6e-8, 3.4e38, np.inf):
            with np.errstate(all="ignore"):
                want = np.float32(v).astype(numpy_dtype(dtype))
            bits = int(want.view(np.uint16))
            assert int(to(np.float32(v))) == bits
            assert back(np.uint16(bits)) == want.astype(np.float32) == rounded(np.float32(v))
        assert np.isnan(back(to(np.float32(np.nan))))
