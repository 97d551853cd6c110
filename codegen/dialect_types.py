"""Numba types of the kernel dialect and the table that ties names to typing rules and LLVM IR.

Every name is one `Operation`: a typing rule (Numba types -> signature or None) and an emitter.
There are no overloads: Numba spends most of its time trying them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default
from numba.core.errors import TypingError
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate
from numba.core.typing.templates import Registry as TypingRegistry

from onnxjit.codegen.dialect_convert import (
    I8,
    I64,
    POINTER,
    STORAGE,
    convert,
    from_memory,
    to_memory,
)

typing_registry = TypingRegistry()


class PointerTable(types.Type):
    """The kernel's first argument, void**."""

    def __init__(self) -> None:
        super().__init__("onnxjit.PointerTable")


class ScratchMemory(types.Type):
    """The kernel's third argument, void*."""

    def __init__(self) -> None:
        super().__init__("onnxjit.ScratchMemory")


class Buffer(types.Type):
    """Pointer to elements of `dtype`; accesses of different `scope`s never alias."""

    def __init__(self, dtype: str, scope: str) -> None:
        self.dtype = dtype
        self.scope = scope
        super().__init__(f"onnxjit.Buffer({dtype}, {scope})")

    @property
    def element(self) -> types.Type:
        return STORAGE[self.dtype][2]

    @property
    def memory(self) -> ir.Type:
        return STORAGE[self.dtype][0]

    @property
    def itemsize(self) -> int:
        return STORAGE[self.dtype][1]


@register_default(Buffer)
class _BufferModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Buffer) -> None:
        super().__init__(dmm, fe_type, fe_type.memory.as_pointer())


@register_default(PointerTable)
class _TableModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, POINTER.as_pointer())


@register_default(ScratchMemory)
class _ScratchModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, POINTER)


Rule = Callable[..., Any]
Emitter = Callable[..., Any]


class Operation:
    """A callable name of the dialect. Calling it from Python is an error: see dialect_python."""

    def __init__(self, name: str, rule: Rule, emit: Emitter) -> None:
        self.__name__ = name
        register(self, rule, emit)

    def __repr__(self) -> str:
        return f"<dialect operation {self.__name__}>"

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.__name__} only exists in compiled kernels")


EMITTERS: dict[Any, Emitter] = {}
_RULES: dict[Any, tuple[Rule, int, int]] = {}


class Callee(types.Function):
    """The type of a dialect name."""

    def get_call_type(self, context: Any, args: Any, kws: Any) -> Any:
        return resolve(self.typing_key, args, kws)


def register(key: Any, rule: Rule, emit: Emitter) -> None:
    """Give `key` its typing rule and its emitter.

    `key` is an Operation, a Python function or operator, or one of Numba's names of implicit
    operations, as "getiter". `rule` maps argument types to a signature, or None to reject them.
    """
    parameters = inspect.signature(rule).parameters.values()
    low = sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    _RULES[key] = rule, low, 99 if variadic else len(parameters)
    EMITTERS[key] = emit
    if not isinstance(key, str):
        template = type("Dialect", (AbstractTemplate,), {"key": key})
        typing_registry.register_global(key, Callee(template))


def resolve(key: Any, args: Sequence[types.Type], kws: Any) -> Any:
    """The signature of `key` on arguments of types `args`. Raises TypingError if there is none."""
    rule, low, high = _RULES.get(key, (None, 0, 0))
    result = rule(*args) if rule is not None and not kws and low <= len(args) <= high else None
    if result is None:
        name = getattr(key, "__name__", key)
        given = ", ".join(map(str, args))
        raise TypingError(f"the kernel dialect has no {name}({given})")
    return result


def literal_int(type_: types.Type) -> int | None:
    """The value of an integer literal's type, else None."""
    return type_.literal_value if isinstance(type_, types.IntegerLiteral) else None


def is_scalar(type_: types.Type) -> bool:
    return isinstance(type_, types.Number | types.Boolean)


def _rank(type_: types.Type) -> tuple[int, int, int]:
    if isinstance(type_, types.Float):
        return 3, type_.bitwidth, 0
    if isinstance(type_, types.Integer):
        return 2, type_.bitwidth, type_.signed
    return 1, 0, 0


def common(*args: types.Type) -> types.Type | None:
    """The type in which operands of `args` meet: the highest kind, then the widest.

    An integer literal adapts to the others, so float32 stays float32 and uint8 stays uint8.
    """
    if not all(is_scalar(a) for a in args):
        return None
    firm = [types.unliteral(a) for a in args if literal_int(a) is None]
    return max(firm or [types.unliteral(a) for a in args], key=_rank)


def _index_ok(index: types.Type) -> bool:
    return isinstance(index, types.Integer | types.Boolean)


def _getitem_rule(buffer: types.Type, index: types.Type) -> Any:
    if isinstance(buffer, Buffer) and _index_ok(index):
        return signature(buffer.element, buffer, types.int64)
    return None


def _setitem_rule(buffer: types.Type, index: types.Type, value: types.Type) -> Any:
    if isinstance(buffer, Buffer) and _index_ok(index) and is_scalar(value):
        return signature(types.void, buffer, types.int64, types.unliteral(value))
    return None


def element_pointer(builder: ir.IRBuilder, pointer: Any, index: Any) -> Any:
    return builder.gep(pointer, [index], inbounds=True)


def _tag(instruction: Any, buffer: Buffer) -> Any:
    instruction.align = buffer.itemsize
    instruction.onnxjit_scope = buffer.scope
    return instruction


def _emit_getitem(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    buffer = sig.args[0]
    pointer = element_pointer(builder, *args)
    value = _tag(builder.load(pointer), buffer)
    if buffer.scope == "ints":
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return from_memory(builder, buffer.dtype, value)


def _emit_setitem(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    buffer, _, value_type = sig.args
    pointer = element_pointer(builder, args[0], args[1])
    value = convert(builder, args[2], value_type, buffer.element)
    _tag(builder.store(to_memory(builder, buffer.dtype, value), pointer), buffer)
    return context.get_dummy_value()


register(operator.getitem, _getitem_rule, _emit_getitem)
register(operator.setitem, _setitem_rule, _emit_setitem)


def _make_pointer_buffer(dtype: str) -> Operation:
    def rule(table: types.Type, k: types.Type, scope: types.Type | None = None) -> Any:
        number = literal_int(k)
        if not isinstance(table, PointerTable) or number is None:
            return None
        shared = number if scope is None else literal_int(scope)
        if shared is None:
            return None
        extra = () if scope is None else (scope,)
        return signature(Buffer(dtype, f"p{shared}"), table, k, *extra)

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        number = ir.Constant(I64, literal_int(sig.args[1]))
        pointer = builder.load(builder.gep(args[0], [number], inbounds=True))
        pointer.set_metadata("invariant.load", builder.module.add_metadata([]))
        return builder.bitcast(pointer, sig.return_type.memory.as_pointer())

    return Operation(f"buffer_{dtype}", rule, emit)


def _make_scratch_buffer(dtype: str) -> Operation:
    def rule(scratch: types.Type, offset: types.Type, scope: types.Type | None = None) -> Any:
        if not isinstance(scratch, ScratchMemory) or not _index_ok(offset):
            return None
        if scope is None:
            return signature(Buffer(dtype, "scratch"), scratch, types.int64)
        if literal_int(scope) is None:
            return None
        return signature(Buffer(dtype, f"s{literal_int(scope)}"), scratch, types.int64, scope)

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = builder.gep(args[0], [args[1]], inbounds=True)
        return builder.bitcast(pointer, sig.return_type.memory.as_pointer())

    return Operation(f"scratch_{dtype}", rule, emit)


def _make_stack_buffer(dtype: str) -> Operation:
    def rule(count: types.Type, scope: types.Type | None = None) -> Any:
        if literal_int(count) is None or (scope is not None and literal_int(scope) is None):
            return None
        if scope is None:
            return signature(Buffer(dtype, "stack"), count)
        return signature(Buffer(dtype, f"t{literal_int(scope)}"), count, scope)

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        type_ = ir.ArrayType(STORAGE[dtype][0], literal_int(sig.args[0]) or 1)
        with builder.goto_entry_block():
            slot = builder.alloca(type_)
        slot.align = 64
        return builder.bitcast(slot, type_.element.as_pointer())

    return Operation(f"stack_{dtype}", rule, emit)


def _address_rule(buffer: types.Type, index: types.Type) -> Any:
    if isinstance(buffer, Buffer) and _index_ok(index):
        return signature(types.int64, buffer, types.int64)
    return None


def _emit_address(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return builder.ptrtoint(element_pointer(builder, *args), I64)


def _offset_rule(buffer: types.Type, index: types.Type) -> Any:
    if isinstance(buffer, Buffer) and _index_ok(index):
        return signature(buffer, buffer, types.int64)
    return None


def _emit_offset(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return element_pointer(builder, *args)


def _bytes(builder: ir.IRBuilder, pointer: Any) -> Any:
    return builder.bitcast(pointer, POINTER)


def _zero_rule(buffer: types.Type, count: types.Type) -> Any:
    if isinstance(buffer, Buffer) and _index_ok(count):
        return signature(types.void, buffer, types.int64)
    return None


def _emit_zero(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    buffer = sig.args[0]
    size = builder.mul(args[1], ir.Constant(I64, buffer.itemsize))
    function = builder.module.declare_intrinsic("llvm.memset", [POINTER, I64])
    false = ir.Constant(ir.IntType(1), 0)
    call = builder.call(function, [_bytes(builder, args[0]), ir.Constant(I8, 0), size, false])
    call.onnxjit_scope = buffer.scope
    return context.get_dummy_value()


def _copy_rule(target: types.Type, source: types.Type, count: types.Type) -> Any:
    if isinstance(target, Buffer) and isinstance(source, Buffer) and _index_ok(count):
        if target.dtype == source.dtype:
            return signature(types.void, target, source, types.int64)
    return None


def _emit_copy(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    size = builder.mul(args[2], ir.Constant(I64, sig.args[0].itemsize))
    function = builder.module.declare_intrinsic("llvm.memcpy", [POINTER, POINTER, I64])
    pointers = [_bytes(builder, p) for p in args[:2]]
    builder.call(function, [*pointers, size, ir.Constant(ir.IntType(1), 0)])
    return context.get_dummy_value()


def buffer_operations() -> dict[str, Operation]:
    """Names that make, move, fill and copy buffers."""
    makers = (_make_pointer_buffer, _make_scratch_buffer, _make_stack_buffer)
    made = [make(dtype) for make in makers for dtype in STORAGE]
    made += [
        Operation("address", _address_rule, _emit_address),
        Operation("offset", _offset_rule, _emit_offset),
        Operation("zero", _zero_rule, _emit_zero),
        Operation("copy", _copy_rule, _emit_copy),
    ]
    return {op.__name__: op for op in made}
