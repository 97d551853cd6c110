"""Scalar types of the kernel dialect: their LLVM types, conversions, and form in memory."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from onnxjit.codegen.scalar_builder import declare

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
I1 = ir.IntType(1)
F32, F64 = ir.FloatType(), ir.DoubleType()
POINTER = I8.as_pointer()  # printed as "ptr"; Numba's lowering needs a pointee type
HALF = ir.HalfType()

STORAGE: dict[str, tuple[ir.Type, int, types.Type]] = {
    "float32": (F32, 4, types.float32),
    "float64": (F64, 8, types.float64),
    "float16": (I16, 2, types.float32),
    "bfloat16": (I16, 2, types.float32),
    "int8": (I8, 1, types.int8),
    "int16": (I16, 2, types.int16),
    "int32": (I32, 4, types.int32),
    "int64": (I64, 8, types.int64),
    "uint8": (I8, 1, types.uint8),
    "uint16": (I16, 2, types.uint16),
    "uint32": (I32, 4, types.uint32),
    "uint64": (I64, 8, types.uint64),
    "bool": (I8, 1, types.boolean),
}
"""dtype -> (LLVM type in memory, bytes, Numba type of a loaded element)."""


def llvm_type(type_: types.Type) -> ir.Type:
    """LLVM type of a scalar's value (booleans are i1)."""
    if isinstance(type_, types.Boolean):
        return I1
    if isinstance(type_, types.Integer):
        return ir.IntType(type_.bitwidth)
    return F32 if type_ == types.float32 else F64


def kind_of(type_: types.Type) -> str:
    if isinstance(type_, types.Boolean):
        return "b"
    if isinstance(type_, types.Integer):
        return "i" if type_.signed else "u"
    return "f"


def convert(builder: ir.IRBuilder, value: Any, source: types.Type, target: types.Type) -> Any:
    """C-like conversion between scalars; float to integer saturates and NaN becomes 0."""
    source, target = types.unliteral(source), types.unliteral(target)
    if source == target:
        return value
    a, b = kind_of(source), kind_of(target)
    result = llvm_type(target)
    if b == "b":
        zero = ir.Constant(llvm_type(source), 0)
        if a == "f":
            return builder.fcmp_unordered("!=", value, zero)
        return builder.icmp_unsigned("!=", value, zero)
    if a == "f" and b == "f":
        wider = target.bitwidth > source.bitwidth
        return builder.fpext(value, result) if wider else builder.fptrunc(value, result)
    if b == "f":
        cast = builder.sitofp if a == "i" else builder.uitofp
        return cast(value, result)
    if a == "f" and target.bitwidth < 32:
        return _narrowed(builder, value, result, signed=b == "i")
    if a == "f":
        bits = source.bitwidth
        name = f"llvm.fpto{'s' if b == 'i' else 'u'}i.sat.i{target.bitwidth}.f{bits}"
        return builder.call(declare(builder.module, name, result, [value.type]), [value])
    if value.type.width >= result.width:
        return value if value.type.width == result.width else builder.trunc(value, result)
    return builder.sext(value, result) if a == "i" else builder.zext(value, result)


def _narrowed(builder: ir.IRBuilder, value: Any, result: ir.Type, signed: bool) -> Any:
    """A float as an integer of 8 or 16 bits: within its range, and by way of 32 bits, so that a
    loop of it has vectors. LLVM's saturating intrinsic converts x86 vectors element by element:
    200704 values quantized to uint8 took 197 µs for 66 (one core of Zen 3).
    """
    bits = result.width - signed
    low, high = (
        ir.Constant(value.type, float(x)) for x in (-(2**bits) if signed else 0, 2**bits - 1)
    )
    if signed:
        known = builder.fcmp_ordered("ord", value, value)
        value = builder.select(known, value, ir.Constant(value.type, 0.0))
    # In this order NaN becomes `low`, and both are one instruction of x86.
    value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
    value = builder.select(builder.fcmp_ordered("<", value, high), value, high)
    return builder.trunc(builder.fptosi(value, I32), result)


def from_memory(builder: ir.IRBuilder, dtype: str, value: Any) -> Any:
    """Memory representation -> the element's Numba value."""
    if dtype == "float16":
        if native_half(builder):
            return builder.fpext(builder.bitcast(value, HALF), F32)
        return builder.call(_half_to_float(builder.module), [value])
    if dtype == "bfloat16":
        wide = builder.shl(builder.zext(value, I32), ir.Constant(I32, 16))
        return builder.bitcast(wide, F32)
    if dtype == "bool":
        return builder.icmp_unsigned("!=", value, ir.Constant(I8, 0))
    return value


def to_memory(builder: ir.IRBuilder, dtype: str, value: Any) -> Any:
    """The element's Numba value -> memory representation; rounds to nearest even."""
    if dtype == "float16":
        if native_half(builder):
            return builder.bitcast(builder.fptrunc(value, HALF), I16)
        return builder.call(_float_to_half(builder.module), [value])
    if dtype == "bfloat16":
        bits = builder.bitcast(value, I32)
        even = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        rounded = builder.add(bits, builder.add(even, ir.Constant(I32, 0x7FFF)))
        quiet = builder.or_(bits, ir.Constant(I32, 0x400000))
        nan = builder.fcmp_unordered("uno", value, value)
        high = builder.lshr(builder.select(nan, quiet, rounded), ir.Constant(I32, 16))
        return builder.trunc(high, I16)
    if dtype == "bool":
        return builder.zext(value, I8)
    return value


def native_half(builder: ir.IRBuilder) -> bool:
    """Whether the module's target converts between half and float by itself.

    Otherwise LLVM would call functions of compiler-rt, which nothing provides.
    """
    return getattr(builder.module, "onnxjit_native_half", True)


def _conversion(module: ir.Module, name: str, result: ir.Type, argument: ir.Type) -> Any:
    """(function, builder or None if it is there already)."""
    existing = module.globals.get(name)
    if existing is not None:
        return existing, None
    function = ir.Function(module, ir.FunctionType(result, [argument]), name)
    function.linkage = "internal"
    function.attributes.add("alwaysinline")
    return function, ir.IRBuilder(function.append_basic_block("entry"))


def _half_to_float(module: ir.Module) -> ir.Function:
    """F. Giesen's conversion: multiplying by 2**112 moves the exponent and normalises."""
    function, b = _conversion(module, "onnxjit.half_to_float", F32, I16)
    if b is None:
        return function
    bits = b.zext(function.args[0], I32)
    size = b.shl(b.and_(bits, ir.Constant(I32, 0x7FFF)), ir.Constant(I32, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(size, F32), ir.Constant(F32, 2.0**112)), I32)
    special = b.icmp_unsigned(">=", size, ir.Constant(I32, 0x7C00 << 13))
    scaled = b.select(special, b.or_(scaled, ir.Constant(I32, 0x7F800000)), scaled)
    sign = b.shl(b.and_(bits, ir.Constant(I32, 0x8000)), ir.Constant(I32, 16))
    b.ret(b.bitcast(b.or_(scaled, sign), F32))
    return function


def _float_to_half(module: ir.Module) -> ir.Function:
    """F. Giesen's conversion, round to nearest even; every NaN becomes the quiet one."""
    function, b = _conversion(module, "onnxjit.float_to_half", I16, F32)
    if b is None:
        return function

    def constant(value: int) -> ir.Constant:
        return ir.Constant(I32, value)

    bits = b.bitcast(function.args[0], I32)
    size = b.and_(bits, constant(0x7FFFFFFF))
    # below 2**-14 the addition of 1/2 aligns the mantissa and rounds it
    half = constant(126 << 23)
    small = b.fadd(b.bitcast(size, F32), ir.Constant(F32, 0.5))
    small = b.sub(b.bitcast(small, I32), half)
    odd = b.and_(b.lshr(size, constant(13)), constant(1))
    normal = b.add(b.add(size, odd), constant(0xFFF - (112 << 23)))
    normal = b.lshr(normal, constant(13))
    result = b.select(b.icmp_unsigned("<", size, constant(113 << 23)), small, normal)
    large = b.icmp_unsigned(">=", size, constant(0x477FF000))  # 65520
    result = b.select(large, constant(0x7C00), result)
    result = b.select(b.icmp_unsigned(">", size, constant(0x7F800000)), constant(0x7E00), result)
    sign = b.and_(b.lshr(bits, constant(16)), constant(0x8000))
    b.ret(b.trunc(b.or_(result, sign), I16))
    return function
