"""Calls of micro-kernels: external C symbols in kernel sources (see dialect_table)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing import signature

from onnxjit.codegen.dialect_convert import I64, POINTER
from onnxjit.codegen.dialect_types import Buffer, Operation, element_pointer
from onnxjit.codegen.scalar_builder import declare

_OPERATIONS: dict[tuple[str, tuple[str, ...]], Operation] = {}


def external_function(symbol: str, parameters: tuple[str, ...]) -> Operation:
    """The operation that calls C function `symbol` with `parameters` (see Family)."""
    key = symbol, parameters
    if key not in _OPERATIONS:
        _OPERATIONS[key] = _make(symbol, parameters)
    return _OPERATIONS[key]


def _make(symbol: str, parameters: tuple[str, ...]) -> Operation:
    def rule(*args: types.Type) -> Any:
        rest = list(args)
        typed: list[types.Type] = []
        for parameter in parameters:
            if not rest:
                return None
            if parameter != "int64":
                buffer = rest.pop(0)
                if not isinstance(buffer, Buffer) or buffer.dtype != parameter[:-1]:
                    return None
                typed.append(buffer)
            if not rest or not isinstance(rest.pop(0), types.Integer):
                return None
            typed.append(types.int64)
        return None if rest else signature(types.void, *typed)

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        values = iter(args)
        operands = []
        for parameter in parameters:
            value = next(values)
            if parameter != "int64":
                value = builder.bitcast(element_pointer(builder, value, next(values)), POINTER)
            operands.append(value)
        llvm_types = [I64 if p == "int64" else POINTER for p in parameters]
        callee = declare(builder.module, symbol, ir.VoidType(), llvm_types)
        callee.attributes.add("nounwind")
        builder.call(callee, operands)
        return context.get_dummy_value()

    return Operation(symbol, rule, emit)
