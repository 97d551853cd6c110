"""Numba intrinsics on plain addresses: memory, atomics, calls by pointer; and the executor's IR.

Every value is an int64; addresses are integers. Nothing here refers to an external symbol, so that
an object made of these needs no linking: C functions are called through pointers that the caller
stores.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from onnxjit.codegen.fingerprint import content_key
from onnxjit.codegen.target import Target

_I32, _I64, _VOID = ir.IntType(32), ir.IntType(64), ir.VoidType()
_PTR = ir.PointerType()
i64 = types.int64


def _at(builder: ir.IRBuilder, address: ir.Value, element: ir.Type = _I64) -> ir.Value:
    # llvmlite's atomic instructions read the element type off the pointer, even with LLVM's opaque
    # ones.
    return builder.inttoptr(address, element.as_pointer())


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _PTR)


@intrinsic
def load(typingctx, address):
    """The int64 at an address."""

    def emit(context, builder, signature, args):
        return builder.load(_at(builder, args[0]), align=8)

    return i64(i64), emit


@intrinsic
def load32(typingctx, address):
    """The int32 at an address, sign-extended."""

    def emit(context, builder, signature, args):
        return builder.sext(builder.load(_at(builder, args[0], _I32), align=4), _I64)

    return i64(i64), emit


@intrinsic
def store(typingctx, address, value):
    """Write an int64."""

    def emit(context, builder, signature, args):
        builder.store(args[1], _at(builder, args[0]), align=8)
        return context.get_dummy_value()

    return types.void(i64, i64), emit


@intrinsic
def atomic_load(typingctx, address):
    """Read an int64, acquire."""

    def emit(context, builder, signature, args):
        return builder.load_atomic(_at(builder, args[0]), "acquire", 8)

    return i64(i64), emit


@intrinsic
def atomic_store(typingctx, address, value):
    """Write an int64, release."""

    def emit(context, builder, signature, args):
        builder.store_atomic(args[1], _at(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(i64, i64), emit


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to an int64 and return what it was, sequentially consistent."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0]), args[1], "seq_cst")

    return i64(i64, i64), emit


@intrinsic
def compare_exchange(typingctx, address, expected, value):
    """Replace an int64 if it equals `expected`; whether it did (acquire and release)."""

    def emit(context, builder, signature, args):
        pair = builder.cmpxchg(_at(builder, args[0]), args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(i64, i64, i64), emit


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin loop; nothing where the architecture has no such hint."""

    def emit(context, builder, signature, args):
        triple = llvm.get_process_triple()
        if triple.startswith(("x86_64", "i686", "i386")):
            hint = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VOID, []), hint), [])  # fmt: skip
        elif triple.startswith(("aarch64", "arm64")):
            builder.asm(ir.FunctionType(_VOID, []), "yield", "", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_kernel(typingctx, function, ptrs, ints, scratch, begin, end):
    """Call a kernel: `void f(void** ptrs, int64* ints, void* scratch, int64 begin, int64 end)`."""

    def emit(context, builder, signature, args):
        kernel = ir.FunctionType(_VOID, [_PTR, _PTR, _PTR, _I64, _I64])
        pointers = [_pointer(builder, a) for a in args[1:4]]
        _call(builder, kernel, args[0], [*pointers, *args[4:]])
        return context.get_dummy_value()

    return types.void(i64, i64, i64, i64, i64, i64), emit


def _call(builder: ir.IRBuilder, kind: ir.FunctionType, address: ir.Value, args: list[ir.Value]):
    # llvmlite asks the callee for its function type: a typed pointer carries it.
    return builder.call(builder.inttoptr(address, kind.as_pointer()), args)


@intrinsic
def call0(typingctx, function):
    """Call `int f(void)` at an address."""

    def emit(context, builder, signature, args):
        return builder.sext(_call(builder, ir.FunctionType(_I32, []), args[0], []), _I64)

    return i64(i64), emit


@intrinsic
def call0_pointer(typingctx, function):
    """Call `void* f(void)` at an address."""

    def emit(context, builder, signature, args):
        result = _call(builder, ir.FunctionType(_PTR, []), args[0], [])
        return builder.ptrtoint(result, _I64)

    return i64(i64), emit


@intrinsic
def call1_void(typingctx, function, first):
    """Call `void f(void*)` at an address."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_VOID, [_PTR])
        _call(builder, kind, args[0], [_pointer(builder, args[1])])
        return context.get_dummy_value()

    return types.void(i64, i64), emit


@intrinsic
def call1(typingctx, function, first):
    """Call `int f(void*)` at an address."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_I32, [_PTR])
        return builder.sext(_call(builder, kind, args[0], [_pointer(builder, args[1])]), _I64)

    return i64(i64, i64), emit


@intrinsic
def call2(typingctx, function, first, second):
    """Call `int f(void*, void*)` at an address."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_I32, [_PTR, _PTR])
        pointers = [_pointer(builder, a) for a in args[1:]]
        return builder.sext(_call(builder, kind, args[0], pointers), _I64)

    return i64(i64, i64, i64), emit


@intrinsic
def clock_ns(typingctx, function, clock):
    """Nanoseconds from `int clock_gettime(int, struct timespec*)` (64-bit fields) at an address."""

    def emit(context, builder, signature, args):
        time = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        kind = ir.FunctionType(_I32, [_I32, _PTR])
        _call(builder, kind, args[0], [builder.trunc(args[1], _I32), builder.bitcast(time, _PTR)])
        seconds, rest = (builder.load(builder.gep(time, [_I32(0), _I32(i)])) for i in range(2))
        return builder.add(builder.mul(seconds, _I64(1_000_000_000)), rest)

    return i64(i64, i64), emit


INTRINSICS: dict[str, Any] = {
    "load": load,
    "load32": load32,
    "store": store,
    "atomic_load": atomic_load,
    "atomic_store": atomic_store,
    "atomic_add": atomic_add,
    "compare_exchange": compare_exchange,
    "pause": pause,
    "call_kernel": call_kernel,
    "call0": call0,
    "call0_pointer": call0_pointer,
    "call1": call1,
    "call1_void": call1_void,
    "call2": call2,
    "clock_ns": clock_ns,
}


def executor_key(source: str, symbols: Mapping[str, str], target: Target) -> str:
    """32 hexadecimal digits that identify the executor's machine code."""
    own = Path(__file__).read_bytes()
    parts = [own, source.encode(), repr(sorted(symbols.items())).encode()]
    return content_key([*parts, target.code_key.encode(), llvmlite.__version__.encode()])


def executor_ir(source: str, symbols: Mapping[str, str]) -> str:
    """LLVM IR of the functions `symbols` (name -> C symbol) of a module text in this dialect.

    Every function takes and returns int64. All else is internal: the IR declares no symbol outside
    LLVM's own, which is checked. Raises `RuntimeError` if something else is left.
    """
    namespace: dict[str, Any] = dict(INTRINSICS)
    exec(compile(source, "<executor>", "exec"), namespace)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True,
               "no_cfunc_wrapper": True}  # fmt: skip
    for name, value in list(namespace.items()):
        if isinstance(value, FunctionType):
            namespace[name] = numba.njit(**options)(value)
    module: llvm.ModuleRef | None = None
    wrappers = []
    for name, symbol in symbols.items():
        dispatcher = namespace[name]
        arity = len(inspect.signature(dispatcher.py_func).parameters)
        signature = (i64,) * arity
        dispatcher.compile(signature)
        compiled = dispatcher.overloads[signature]
        if types.unliteral(compiled.signature.return_type) != i64:
            raise RuntimeError(f"{name} returns {compiled.signature.return_type}")
        part = llvm.parse_assembly(compiled.library.get_llvm_str())
        if module is None:
            module = part
        else:
            module.link_in(part)
        wrappers.append(_wrapper(symbol, compiled.fndesc.llvm_func_name, arity))
    assert module is not None
    # Numba's calling convention: (result*, exception**, arguments) -> status.
    text = f'target triple = "{module.triple}"\ntarget datalayout = "{module.data_layout}"\n'
    module.link_in(llvm.parse_assembly(text + "\n".join(wrappers)))
    for function in module.functions:
        if not function.is_declaration and function.name not in symbols.values():
            function.linkage = "internal"
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    _optimise(module)
    left = [f.name for f in module.functions
            if f.is_declaration and not f.name.startswith("llvm.")]  # fmt: skip
    left += [v.name for v in module.global_variables]
    if left:
        raise RuntimeError(f"the executor refers to {left}")
    return str(module)


def _wrapper(symbol: str, inner: str, arity: int) -> str:
    types_ = ", ".join(["ptr", "ptr", *["i64"] * arity])
    params = ", ".join(f"i64 %a{i}" for i in range(arity))
    passed = ", ".join(["ptr %result", "ptr %error", *(f"i64 %a{i}" for i in range(arity))])
    return f"""
declare i32 @"{inner}"({types_})
define i64 @{symbol}({params}) {{
  %result = alloca i64
  %error = alloca ptr
  %status = call i32 @"{inner}"({passed})
  %value = load i64, ptr %result
  ret i64 %value
}}
"""


def _optimise(module: llvm.ModuleRef) -> None:
    target = llvm.Target.from_triple(module.triple)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(target.create_target_machine(opt=2), options)
    builder.getModulePassManager().run(module, builder)
