"""The dialect of generated CUDA kernel sources: every name they may use, in two forms.

A kernel source defines

    BUFFERS = ("float32", "bool")      # element dtypes of the pointer parameters, in order
    THREADS = 256                      # threads of a block
    def kernel(b0, b1, n0): ...        # pointers first, then run-time sizes (int64)

and reads `cuda` (thread and block numbers, shared memory, barriers) and `types` (Numba's, for the
element type of shared memory). The scalar functions are those of the CPU dialect, with the same
typing rules and meaning: `namespace` gives them as Numba CUDA intrinsics over libdevice,
`simulator_namespace` as plain Python for NUMBA_ENABLE_CUDASIM=1.

16-bit floats are uint16 in memory and float32 as values (`from_float16`, `to_float16` ...);
booleans are uint8 in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

MEMORY: dict[str, str] = {"float16": "uint16", "bfloat16": "uint16", "bool": "uint8"}
"""dtype -> dtype of its elements in memory, where the two differ."""


def memory_dtype(dtype: str) -> str:
    """The NumPy dtype as which a kernel parameter of element type `dtype` is passed."""
    return MEMORY.get(dtype, dtype)


_LIBDEVICE: dict[str, str] = {
    "exp": "exp", "log": "log", "erf": "erf", "tanh": "tanh", "sin": "sin", "cos": "cos",
    "tan": "tan", "asin": "asin", "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh",
    "asinh": "asinh", "acosh": "acosh", "atanh": "atanh", "log1p": "log1p", "expm1": "expm1",
    "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "rint",
    "abs": "fabs", "pow": "pow", "mod_trunc": "fmod",
}  # fmt: skip
"""Function of the dialect -> its name in libdevice (`__nv_NAMEf` for float32)."""


@cache
def namespace() -> dict[str, Any]:
    """Globals in which a kernel source is compiled by Numba CUDA (needs no device)."""
    from numba import cuda
    from numba.core import types

    names: dict[str, Any] = {
        "cuda": cuda, "types": types, "range": range, "nan": math.nan, "inf": math.inf,
    }  # fmt: skip
    for name, (rule, emit) in _operations().items():
        names[name] = _intrinsic(name, rule, emit)
    for name in ("pow", "abs", "round"):
        names[f"{name}_"] = names[name]
    return names


def simulator_namespace() -> dict[str, Any]:
    """The same names for Numba's CUDA simulator, as Python functions on NumPy scalars."""
    import ml_dtypes
    import numpy as np
    from numba import cuda
    from numba.core import types

    from onnxjit.codegen.dialect_python import python_namespace

    names = dict(python_namespace())
    for dtype, type_ in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        names[f"from_{dtype}"] = lambda x, t=type_: np.float32(np.uint16(x).view(t))
        names[f"to_{dtype}"] = lambda x, r=names[f"round_{dtype}"], t=type_: t(r(x)).view(np.uint16)
    return {**names, "cuda": cuda, "types": types}


def _operations() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """name -> (typing rule, emitter). Rules and target-neutral emitters are the CPU dialect's."""
    from numba.core import types
    from numba.core.typing import signature

    from onnxjit.codegen import dialect_integer
    from onnxjit.codegen.dialect_convert import STORAGE, from_memory, to_memory
    from onnxjit.codegen.dialect_scalar import _TABLE, _by_kind, _float, _same
    from onnxjit.codegen.dialect_types import is_scalar

    rows = {name: row for name, row in _TABLE.items() if name not in ("fma", "assume")}
    for name, row in list(rows.items()):
        if name in ("floor", "ceil", "round", "trunc", "abs", "sign"):
            whole = {"abs": dialect_integer.emit_abs, "sign": dialect_integer.emit_sign}
            real = _emit_sign if name == "sign" else _libdevice(_LIBDEVICE[name])
            rows[name] = (row[0], _by_kind(real, whole.get(name, lambda c, b, s, a: a[0])))
    for name in _LIBDEVICE:
        rows.setdefault(name, (_same(1, _float), _libdevice(_LIBDEVICE[name])))
    rows["pow"] = (rows["pow"][0], _by_kind(_libdevice("pow"), dialect_integer.emit_pow))
    rows["min_"] = (_same(2), _by_kind(_extreme("<"), _extreme_integer("<")))
    rows["max_"] = (_same(2), _by_kind(_extreme(">"), _extreme_integer(">")))
    rows["isinf"] = (rows["isinf"][0], _emit_isinf)
    rows["rsqrt"] = (_same(1, _float), _emit_rsqrt)
    rows["sigmoid"] = (_same(1, _float), _emit_sigmoid)
    division = dialect_integer.division
    rows["floordiv"] = (rows["floordiv"][0], _by_kind(_emit_floordiv, division(True, False, False)))
    rows["mod_floor"] = (rows["mod_floor"][0], _by_kind(_emit_modulo, division(True, True, False)))
    rows["mod_trunc"] = (
        rows["mod_trunc"][0],
        _by_kind(_libdevice("fmod"), division(False, True, False)),
    )

    def cast_rule(target: types.Type) -> Callable[..., Any]:
        return lambda x: signature(target, types.unliteral(x)) if is_scalar(x) else None  # type: ignore[attr-defined]

    def cast(target: types.Type) -> Callable[..., Any]:
        return lambda context, builder, sig, args: _convert(builder, args[0], sig.args[0], target)

    def rounded(dtype: str) -> Callable[..., Any]:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return from_memory(builder, dtype, to_memory(builder, dtype, args[0]))

        return emit

    for dtype, (_, _, type_) in STORAGE.items():
        if dtype in ("float16", "bfloat16"):
            narrow = lambda x: signature(types.float32, types.float32) if is_scalar(x) else None  # noqa: E731
            rows[f"round_{dtype}"] = (narrow, rounded(dtype))
            rows[f"from_{dtype}"] = (
                lambda x: signature(types.float32, types.uint16),
                lambda c, b, s, a, d=dtype: from_memory(b, d, a[0]),
            )
            rows[f"to_{dtype}"] = (
                lambda x: signature(types.uint16, types.float32) if is_scalar(x) else None,
                lambda c, b, s, a, d=dtype: to_memory(b, d, a[0]),
            )
        else:
            name = "bool_" if dtype == "bool" else dtype
            rows[name] = (cast_rule(type_), cast(type_))
    return rows


def _intrinsic(name: str, rule: Callable[..., Any], emit: Callable[..., Any]) -> Any:
    """A Numba CUDA intrinsic with the dialect's typing rule."""
    import inspect

    from numba.core.errors import TypingError
    from numba.cuda.extending import intrinsic

    arity = _ARITY.get(name) or len(inspect.signature(rule).parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(rule).parameters.values()):
        arity = _ARITY.get(name, 1)

    def resolve(args: tuple[Any, ...]) -> Any:
        sig = rule(*args)
        if sig is None:
            given = ", ".join(map(str, args))
            raise TypingError(f"the kernel dialect has no {name}({given})")
        return sig, emit

    if arity == 1:

        def one(context, a):  # type: ignore[no-untyped-def]
            return resolve((a,))

        return intrinsic(one)
    if arity == 2:

        def two(context, a, b):  # type: ignore[no-untyped-def]
            return resolve((a, b))

        return intrinsic(two)

    def three(context, a, b, c):  # type: ignore[no-untyped-def]
        return resolve((a, b, c))

    return intrinsic(three)


_ARITY = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "floordiv", "mod_floor", "mod_trunc", "udiv_", "umod_", "pow",
         "min_", "max_", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
         "logical_xor", "bit_and", "bit_or", "bit_xor", "shift_left", "shift_right"), 2,
    ),
    "select": 3,
}  # fmt: skip


# --- emitters ----------------------------------------------------------------------------------


def _call(builder: Any, name: str, *args: Any) -> Any:
    """A libdevice function on floats of one type."""
    from llvmlite import ir

    from onnxjit.codegen.scalar_builder import declare

    type_ = args[0].type
    suffix = "f" if isinstance(type_, ir.FloatType) else ""
    callee = declare(builder.module, f"__nv_{name}{suffix}", type_, [type_] * len(args))
    return builder.call(callee, list(args))


def _libdevice(name: str) -> Callable[..., Any]:
    return lambda context, builder, sig, args: _call(builder, name, *args)


def _number(like: Any, value: float) -> Any:
    from llvmlite import ir

    return ir.Constant(like.type, value)


def _extreme(op: str) -> Callable[..., Any]:
    """Minimum or maximum of floats; NaN if either operand is."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = args
        first = builder.or_(builder.fcmp_ordered(op, a, b), builder.fcmp_unordered("uno", a, a))
        return builder.select(first, a, b)

    return emit


def _extreme_integer(op: str) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        signed = getattr(sig.return_type, "signed", False)
        compare = builder.icmp_signed if signed else builder.icmp_unsigned
        return builder.select(compare(op, *args), *args)

    return emit


def _emit_isinf(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    from llvmlite import ir
    from numba.core import types

    if not isinstance(sig.args[0], types.Float):
        return ir.Constant(ir.IntType(1), 0)
    size = _call(builder, "fabs", args[0])
    return builder.fcmp_ordered("==", size, _number(size, math.inf))


def _emit_sign(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    (x,) = args
    zero, one = _number(x, 0.0), _number(x, 1.0)
    y = builder.select(builder.fcmp_ordered(">", x, zero), one, x)
    y = builder.select(builder.fcmp_ordered("<", x, zero), _number(x, -1.0), y)
    return builder.select(builder.fcmp_ordered("==", x, zero), zero, y)


def _emit_rsqrt(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fdiv(_number(args[0], 1.0), _call(builder, "sqrt", args[0]))


def _emit_sigmoid(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """1 / (1 + e^-|x|), or e^-|x| times that: no overflow on either side."""
    (x,) = args
    one = _number(x, 1.0)
    size = _call(builder, "fabs", x)
    e = _call(builder, "exp", builder.fsub(_number(x, -0.0), size))
    negative = builder.fcmp_ordered("<", x, _number(x, 0.0))
    return builder.fdiv(builder.select(negative, e, one), builder.fadd(one, e))


def _emit_floordiv(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _call(builder, "floor", builder.fdiv(*args))


def _emit_modulo(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Python's float modulo: the result has the sign of the divisor."""
    x, y = args
    zero = _number(x, 0.0)
    r = _call(builder, "fmod", x, y)
    differ = builder.xor(builder.fcmp_ordered("<", r, zero), builder.fcmp_ordered("<", y, zero))
    wrong = builder.and_(builder.fcmp_unordered("!=", r, zero), differ)
    shifted = builder.select(wrong, builder.fadd(r, y), r)
    signed_zero = _call(builder, "copysign", zero, y)
    return builder.select(builder.fcmp_ordered("==", r, zero), signed_zero, shifted)


def _convert(builder: Any, value: Any, source: Any, goal: Any) -> Any:
    """The dialect's cast; NVVM has no saturating conversion, so float to integer selects."""
    from llvmlite import ir
    from numba.core import types

    from onnxjit.codegen.dialect_convert import convert, llvm_type

    source = types.unliteral(source)  # type: ignore[attr-defined]
    if not (isinstance(source, types.Float) and isinstance(goal, types.Integer)):
        return convert(builder, value, source, goal)
    target: Any = goal
    bits = target.bitwidth
    low = -(2 ** (bits - 1)) if target.signed else 0
    high = 2 ** (bits - 1) if target.signed else 2**bits
    whole = llvm_type(target)
    # Powers of two are exact in either format; what is below `high` truncates into range.
    inside = builder.and_(
        builder.fcmp_ordered(">", value, ir.Constant(value.type, float(low))),
        builder.fcmp_ordered("<", value, ir.Constant(value.type, float(high))),
    )
    safe = builder.select(inside, value, ir.Constant(value.type, 0.0))
    result = (builder.fptosi if target.signed else builder.fptoui)(safe, whole)
    above = builder.fcmp_ordered(">=", value, ir.Constant(value.type, float(high)))
    below = builder.fcmp_ordered("<=", value, ir.Constant(value.type, float(low)))
    result = builder.select(above, ir.Constant(whole, high - 1), result)
    return builder.select(below, ir.Constant(whole, low), result)


__all__ = ["MEMORY", "memory_dtype", "namespace", "simulator_namespace"]
