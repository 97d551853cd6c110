"""Operations on plain addresses: memory, atomics, calls by pointer; and the executor's IR.

Every value is an int64; addresses are integers. Nothing here refers to an external symbol, so that
an object made of these needs no linking: C functions are called through pointers that the caller
stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import llvmlite.binding as llvm
from llvmlite import ir

from onnxjit.codegen.target import Target, host, target_machine
from onnxjit.codegen.word_compiler import I64, Operation, compile_words

_I32, _VOID = ir.IntType(32), ir.VoidType()
_PTR = ir.PointerType()

Builder: TypeAlias = ir.IRBuilder
Value: TypeAlias = ir.Value


def _at(builder: Builder, address: Value, element: ir.Type = I64) -> Value:
    # llvmlite's atomic instructions read the element type off the pointer, even with LLVM's opaque
    # ones.
    return builder.inttoptr(address, element.as_pointer())


def _pointer(builder: Builder, address: Value) -> Value:
    return builder.inttoptr(address, _PTR)


def _call(builder: Builder, result: ir.Type, address: Value, args: list[Value]) -> Value:
    # llvmlite asks the callee for its function type: a typed pointer carries it.
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(builder.inttoptr(address, kind.as_pointer()), args)


def load(builder: Builder, address: Value) -> Value:
    """The int64 at an address."""
    return builder.load(_at(builder, address), align=8)


def load32(builder: Builder, address: Value) -> Value:
    """The int32 at an address, sign-extended."""
    return builder.sext(builder.load(_at(builder, address, _I32), align=4), I64)


def store(builder: Builder, address: Value, value: Value) -> None:
    """Write an int64."""
    builder.store(value, _at(builder, address), align=8)


def atomic_load(builder: Builder, address: Value) -> Value:
    """Read an int64, acquire."""
    return builder.load_atomic(_at(builder, address), "acquire", 8)


def atomic_store(builder: Builder, address: Value, value: Value) -> None:
    """Write an int64, release."""
    builder.store_atomic(value, _at(builder, address), "release", 8)


def atomic_add(builder: Builder, address: Value, value: Value) -> Value:
    """Add to an int64 and return what it was, sequentially consistent."""
    return builder.atomic_rmw("add", _at(builder, address), value, "seq_cst")


def compare_exchange(builder: Builder, address: Value, expected: Value, value: Value) -> Value:
    """Replace an int64 if it equals `expected`; whether it did (acquire and release)."""
    pair = builder.cmpxchg(_at(builder, address), expected, value, "acq_rel", "acquire")
    return builder.extract_value(pair, 1)


def pause(builder: Builder) -> None:
    """Tell the core that this is a spin loop; nothing where the architecture has no such hint."""
    triple = builder.module.triple
    if triple.startswith(("x86_64", "i686", "i386")):
        builder.call(_declared(builder, "llvm.x86.sse2.pause", []), [])
    elif triple.startswith(("aarch64", "arm64")):
        builder.call(_declared(builder, "llvm.aarch64.hint", [_I32]), [_I32(1)])  # yield


def flush_denormals(builder: Builder) -> Value:
    """Make this thread treat denormal floats as zero; gives what `restore_denormals` needs.

    x86 takes a hundred cycles and more for an instruction that meets one.
    """
    triple = builder.module.triple
    if triple.startswith("x86_64"):
        word = _control_word(builder)
        builder.call(_declared(builder, "llvm.x86.sse.stmxcsr", [_PTR]), [word])
        old = builder.load(word, typ=_I32)
        builder.store(builder.or_(old, _I32(0x8040)), word)  # FTZ and DAZ
        builder.call(_declared(builder, "llvm.x86.sse.ldmxcsr", [_PTR]), [word])
        return builder.zext(old, I64)
    if triple.startswith(("aarch64", "arm64")):
        old = builder.call(_declared(builder, "llvm.aarch64.get.fpcr", [], I64), [])
        new = builder.or_(old, I64(1 << 24))  # FZ
        builder.call(_declared(builder, "llvm.aarch64.set.fpcr", [I64]), [new])
        return old
    return I64(0)


def restore_denormals(builder: Builder, control: Value) -> None:
    """Undo `flush_denormals`."""
    triple = builder.module.triple
    if triple.startswith("x86_64"):
        word = _control_word(builder)
        builder.store(builder.trunc(control, _I32), word)
        builder.call(_declared(builder, "llvm.x86.sse.ldmxcsr", [_PTR]), [word])
    elif triple.startswith(("aarch64", "arm64")):
        builder.call(_declared(builder, "llvm.aarch64.set.fpcr", [I64]), [control])


def _control_word(builder: Builder) -> Value:
    with builder.goto_entry_block():
        return builder.bitcast(builder.alloca(_I32), _PTR)


def _declared(
    builder: Builder, name: str, parameters: list[ir.Type], result: ir.Type = _VOID
) -> Value:
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, parameters), name)


def call_kernel(
    builder: Builder,
    function: Value,
    ptrs: Value,
    ints: Value,
    scratch: Value,
    begin: Value,
    end: Value,
) -> None:
    """Call a kernel: `void f(void** ptrs, int64* ints, void* scratch, int64 begin, int64 end)`."""
    pointers = [_pointer(builder, a) for a in (ptrs, ints, scratch)]
    _call(builder, _VOID, function, [*pointers, begin, end])


def call0(builder: Builder, function: Value) -> Value:
    """Call `int f(void)` at an address."""
    return builder.sext(_call(builder, _I32, function, []), I64)


def call0_pointer(builder: Builder, function: Value) -> Value:
    """Call `void* f(void)` at an address."""
    return builder.ptrtoint(_call(builder, _PTR, function, []), I64)


def call1_void(builder: Builder, function: Value, first: Value) -> None:
    """Call `void f(void*)` at an address."""
    _call(builder, _VOID, function, [_pointer(builder, first)])


def call1(builder: Builder, function: Value, first: Value) -> Value:
    """Call `int f(void*)` at an address."""
    return builder.sext(_call(builder, _I32, function, [_pointer(builder, first)]), I64)


def call2(builder: Builder, function: Value, first: Value, second: Value) -> Value:
    """Call `int f(void*, void*)` at an address."""
    pointers = [_pointer(builder, a) for a in (first, second)]
    return builder.sext(_call(builder, _I32, function, pointers), I64)


def clock_ns(builder: Builder, function: Value, clock: Value) -> Value:
    """Nanoseconds from `int clock_gettime(int, struct timespec*)` (64-bit fields) at an address."""
    with builder.goto_entry_block():
        time = builder.alloca(ir.ArrayType(I64, 2))
    _call(builder, _I32, function, [builder.trunc(clock, _I32), builder.bitcast(time, _PTR)])
    seconds, rest = (builder.load(builder.gep(time, [_I32(0), _I32(i)])) for i in range(2))
    return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)


OPERATIONS: dict[str, Operation] = {
    f.__name__: f
    for f in (load, load32, store, atomic_load, atomic_store, atomic_add, compare_exchange, pause,
              flush_denormals, restore_denormals, call_kernel, call0, call0_pointer, call1,
              call1_void, call2, clock_ns)
}  # fmt: skip


def executor_ir(source: str, symbols: Mapping[str, str], target: Target | None = None) -> str:
    """Optimised LLVM IR of the functions `symbols` (name -> C symbol) of a text in the language of
    `word_compiler`.

    Every function takes and returns int64. All else is internal: the IR declares no symbol outside
    LLVM's own, which is checked. Raises `RuntimeError` if something else is left, SyntaxError for
    what the language does not have.
    """
    target = target or host()
    machine = target_machine(target)
    made = compile_words(source, symbols, OPERATIONS, target.triple)
    module = llvm.parse_assembly(str(made))
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    left = [f.name for f in module.functions
            if f.is_declaration and not f.name.startswith("llvm.")]  # fmt: skip
    left += [v.name for v in module.global_variables]
    if left:
        raise RuntimeError(f"the executor refers to {left}")
    return str(module)


def object_code(source: str, symbols: Mapping[str, str], target: Target) -> bytes:
    """The object file of `executor_ir`."""
    module = llvm.parse_assembly(executor_ir(source, symbols, target))
    return bytes(target_machine(target).emit_object(module))
