"""Kernel source -> LLVM IR, through Numba's front end, type inference and lowering.

The parts of Numba that suit array programs are left out: the typing and lowering contexts hold
nothing but the dialect, so a name has one meaning and typing is fast, and Numba's own LLVM
optimisation, NRT and wrappers never run. What comes out is unoptimised IR for the
caller's pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from types import FunctionType
from typing import Any

from llvmlite import ir
from numba.core import bytecode, compiler, cpu, funcdesc, interpreter, types, typing
from numba.core.callconv import create_error_model
from numba.core.compiler_lock import global_compiler_lock
from numba.core.errors import NumbaWarning, WarningsFixer
from numba.core.targetconfig import ConfigStack
from numba.core.transforms import canonicalize_cfg
from numba.core.typeinfer import TypeInferer

from onnxjit.codegen.dialect_convert import I64, POINTER, convert, llvm_type
from onnxjit.codegen.dialect_formulas import Formula
from onnxjit.codegen.dialect_lowering import Lowering
from onnxjit.codegen.dialect_types import (
    EMITTERS,
    Buffer,
    Operation,
    PointerTable,
    ScratchMemory,
    is_scalar,
    resolve,
    typing_registry,
)

FASTMATH = ("contract", "nsz", "reassoc")
ARGUMENTS = (PointerTable(), Buffer("int64", "ints"), ScratchMemory(), types.int64, types.int64)
_FLAGGED = frozenset(("fadd", "fsub", "fmul", "fdiv", "fneg"))


def _key(function: Any) -> Any:
    return function.typing_key if isinstance(function, types.Function) else function


class _Typing(typing.BaseContext):
    """A typing context that knows the dialect only."""

    def refresh(self) -> None:
        self.install_registry(typing_registry)

    def resolve_function_type(self, func: Any, args: Any, kws: Any) -> Any:
        key = _key(func)
        return key.resolve(args) if isinstance(key, Formula) else resolve(key, args, kws)

    def resolve_value_type(self, val: Any) -> Any:
        if isinstance(val, Formula):
            return val.callee
        if isinstance(val, Operation):  # without asking first whether it is a number or an array
            return self._lookup_global(val)
        return super().resolve_value_type(val)


class _Bound:
    """An emitter in the form that lowering calls."""

    __slots__ = ("context", "emit", "sig")

    def __init__(self, emit: Any, context: Any, sig: Any) -> None:
        self.emit = emit
        self.context = context
        self.sig = sig

    def __call__(self, builder: ir.IRBuilder, args: Any, loc: Any = None) -> Any:
        return self.emit(self.context, builder, self.sig, args)


class _Target(cpu.CPUContext):
    """A lowering context that knows the dialect only."""

    def refresh(self) -> None:
        self.typing_context.refresh()

    def get_function(self, fn: Any, sig: Any, _firstcall: bool = True) -> Any:
        key = _key(fn)
        emit = key.emit if isinstance(key, Formula) else EMITTERS.get(key)
        if emit is None:
            raise NotImplementedError(f"the kernel dialect has no {fn}")
        return _Bound(emit, self, sig)

    def cast(self, builder: ir.IRBuilder, val: Any, fromty: Any, toty: Any) -> Any:
        if fromty == toty:
            return val
        if is_scalar(fromty) and is_scalar(toty):
            return convert(builder, val, fromty, toty)
        return super().cast(builder, val, fromty, toty)

    def get_constant_generic(self, builder: ir.IRBuilder, ty: Any, val: Any) -> Any:
        if is_scalar(ty):
            number = float(val) if isinstance(ty, types.Float) else int(val)
            return ir.Constant(llvm_type(types.unliteral(ty)), number)
        return self.get_dummy_value()

    def post_lowering(self, mod: ir.Module, library: Any) -> None:
        pass

    def pair_first(self, builder: ir.IRBuilder, val: Any, ty: Any) -> Any:
        return val[0]

    def pair_second(self, builder: ir.IRBuilder, val: Any, ty: Any) -> Any:
        return val[1]


class _Library:
    """What lowering needs of a code library: a place for its module."""

    def __init__(self, codegen: Any, native_half: bool) -> None:
        self.codegen = codegen
        self.native_half = native_half
        self.module: ir.Module | None = None

    def create_ir_module(self, name: str) -> ir.Module:
        module = self.codegen._create_empty_module("kernel")
        module.onnxjit_native_half = self.native_half
        return module

    def add_ir_module(self, module: ir.Module) -> None:
        self.module = module

    def add_linking_library(self, library: Any) -> None:
        raise AssertionError("the dialect has no separately compiled parts")


def _mangle(name: str, argtypes: Any, *, abi_tags: Any = (), uid: Any = None) -> str:
    """Numba's default counts compilations; the same source should give the same text."""
    return "onnxjit.environment" if "NumbaEnv" in name else "onnxjit.body"


class _Interpreter(interpreter.Interpreter):
    """Bytecode -> Numba IR without what follows for `with`, `try` and starred arguments."""

    def post_process(self, peepholes: Any, func_ir: Any) -> Any:
        return func_ir


def _interpret(function: FunctionType) -> Any:
    """Numba's IR of a function; lifetimes of variables are left out, as nothing is counted."""
    func_id = bytecode.FunctionIdentity.from_function(function)
    func_ir = _Interpreter(func_id).interpret(bytecode.ByteCode(func_id))
    func_ir.blocks = canonicalize_cfg(func_ir.blocks)
    func_ir.generator_info = None
    return func_ir


class _Silent(WarningsFixer):
    """Typing asks for a place for warnings at each constraint; the dialect's rules have none."""

    def __init__(self) -> None:
        super().__init__(NumbaWarning)

    def catch_warnings(self, filename: Any = None, lineno: Any = None) -> Any:
        return nullcontext()


def _infer(typing_context: _Typing, func_ir: Any) -> tuple[Any, Any, Any]:
    """(types of variables, type of the result, signatures of calls)."""
    inference = TypeInferer(typing_context, func_ir, _Silent())
    for position, (name, type_) in enumerate(zip(func_ir.arg_names, ARGUMENTS, strict=True)):
        inference.seed_argument(name, position, type_)
    inference.seed_return(types.none)
    inference.build_constraint()
    inference.propagate()
    found: tuple[Any, Any, Any] = inference.unify()
    return found


@cache
def _contexts() -> tuple[_Typing, _Target]:
    typing_context = _Typing()
    target = _Target(typing_context)
    return typing_context, target


@global_compiler_lock
def lower(
    function: FunctionType, fastmath: Iterable[str] = FASTMATH, native_half: bool = True
) -> str:
    """LLVM IR text whose one external definition is `function` under the name "kernel".

    `function` has the five kernel arguments and returns nothing. Raises Numba's TypingError where
    the source uses a name or a combination of types that the dialect does not have.
    """
    typing_context, target = _contexts()
    flags = compiler.Flags()
    flags.error_model = "numpy"
    flags.no_cpython_wrapper = True
    with ConfigStack().enter(flags):
        context = target.subtarget(error_model=create_error_model("numpy", target))
        typing_context.refresh()
        context.refresh()
        func_ir = _interpret(function)
        typemap, return_type, calltypes = _infer(typing_context, func_ir)
        fndesc = funcdesc.PythonFunctionDescriptor.from_specialized_function(
            func_ir, typemap, return_type, calltypes, mangler=_mangle,
            inline=False, noalias=False, abi_tags=(),
        )  # fmt: skip
        library = _Library(context.codegen(), native_half)
        with context.push_code_library(library):
            Lowering(context, library, fndesc, func_ir).lower()
    module = library.module
    assert module is not None
    inner = module.globals[fndesc.llvm_func_name]
    _finish(module, inner, tuple(fastmath))
    return str(module)


def _finish(module: ir.Module, inner: ir.Function, fastmath: tuple[str, ...]) -> None:
    """Add alias scopes, fast-math flags and the C entry point to a lowered module."""
    accesses: dict[str, list[Any]] = {}
    for block in inner.blocks:
        for instruction in block.instructions:
            if instruction.opname in _FLAGGED:
                instruction.flags.extend(f for f in fastmath if f not in instruction.flags)
            scope = getattr(instruction, "onnxjit_scope", None)
            if scope is not None:
                accesses.setdefault(scope, []).append(instruction)
    _add_scopes(module, accesses)
    inner.linkage = "internal"
    inner.attributes.add("alwaysinline")
    for name in [n for n in module.globals if "environment" in n]:
        del module.globals[name]
    _add_entry_point(module, inner)


def _add_scopes(module: ir.Module, accesses: dict[str, list[Any]]) -> None:
    domain = module.add_metadata(["onnxjit"])
    scopes = {name: module.add_metadata([f"onnxjit.{name}", domain]) for name in accesses}
    for name, instructions in accesses.items():
        own = module.add_metadata([scopes[name]])
        others = module.add_metadata([s for other, s in scopes.items() if other != name])
        for instruction in instructions:
            instruction.set_metadata("alias.scope", own)
            if len(scopes) > 1:
                instruction.set_metadata("noalias", others)


def _add_entry_point(module: ir.Module, inner: ir.Function) -> None:
    """void kernel(ptr, ptr, ptr, i64, i64), which ignores Numba's status: nothing raises."""
    type_ = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER, I64, I64])
    entry = ir.Function(module, type_, "kernel")
    entry.attributes.add("nounwind")
    builder = ir.IRBuilder(entry.append_basic_block("entry"))
    status = len(inner.args) - len(entry.args)
    values = [builder.alloca(a.type.pointee) for a in inner.args[:status]]
    for argument, parameter in zip(entry.args, inner.args[status:], strict=True):
        same = argument.type == parameter.type
        values.append(argument if same else builder.bitcast(argument, parameter.type))
    builder.call(inner, values)
    builder.ret_void()
