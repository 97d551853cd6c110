"""Integer operations of the kernel dialect that take more than one instruction; none can trap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from onnxjit.codegen import scalar_math
from onnxjit.codegen.dialect_convert import kind_of


def guarded(builder: Any, x: Any, y: Any, signed: bool) -> tuple[Any, Any]:
    """(divisor without traps, whether the true one is zero); MIN / -1 wraps to MIN."""
    zero, one = ir.Constant(y.type, 0), ir.Constant(y.type, 1)
    is_zero = builder.icmp_unsigned("==", y, zero)
    trap = is_zero
    if signed:
        lowest = ir.Constant(y.type, -(1 << (y.type.width - 1)))
        overflow = builder.and_(
            builder.icmp_signed("==", x, lowest),
            builder.icmp_signed("==", y, ir.Constant(y.type, -1)),
        )
        trap = builder.or_(is_zero, overflow)
    return builder.select(trap, one, y), is_zero


def division(floor: bool, remainder: bool, force_unsigned: bool) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, y = args
        signed = sig.return_type.signed and not force_unsigned
        safe, is_zero = guarded(builder, x, y, signed)
        zero = ir.Constant(x.type, 0)
        if not signed:
            result = builder.urem(x, safe) if remainder else builder.udiv(x, safe)
            return builder.select(is_zero, zero, result)
        result = builder.srem(x, safe) if remainder else builder.sdiv(x, safe)
        if floor:
            rest = result if remainder else builder.sub(x, builder.mul(result, safe))
            wrong = builder.and_(
                builder.icmp_signed("!=", rest, zero),
                builder.icmp_signed("<", builder.xor(rest, safe), zero),
            )
            if remainder:
                result = builder.add(result, builder.select(wrong, safe, zero))
            else:
                result = builder.sub(result, builder.zext(wrong, x.type))
        return builder.select(is_zero, zero, result)

    return emit


def emit_abs(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if kind_of(sig.return_type) != "i":
        return args[0]
    negative = builder.icmp_signed("<", args[0], ir.Constant(args[0].type, 0))
    return builder.select(negative, builder.neg(args[0]), args[0])


def emit_sign(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    zero = ir.Constant(args[0].type, 0)
    if kind_of(sig.return_type) != "i":
        return builder.zext(builder.icmp_unsigned("!=", args[0], zero), args[0].type)
    positive = builder.zext(builder.icmp_signed(">", args[0], zero), args[0].type)
    negative = builder.zext(builder.icmp_signed("<", args[0], zero), args[0].type)
    return builder.sub(positive, negative)


def emit_pow(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Square and multiply, modulo 2**bits; a negative exponent counts as a huge one."""
    type_ = args[0].type
    name = f"{scalar_math.PREFIX}pow.i{type_.width}"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(type_, [type_, type_]), name)
        function.linkage = "internal"
        entry = function.append_basic_block("entry")
        loop, done = function.append_basic_block("loop"), function.append_basic_block("done")
        b = ir.IRBuilder(entry)
        b.branch(loop)
        b.position_at_end(loop)
        zero, one = ir.Constant(type_, 0), ir.Constant(type_, 1)
        result, base, rest = b.phi(type_), b.phi(type_), b.phi(type_)
        odd = b.icmp_unsigned("!=", b.and_(rest, one), zero)
        following = b.mul(result, b.select(odd, base, one))
        square, half = b.mul(base, base), b.lshr(rest, one)
        for phi, first, next_ in (
            (result, one, following), (base, function.args[0], square),
            (rest, function.args[1], half),
        ):  # fmt: skip
            phi.add_incoming(first, entry)
            phi.add_incoming(next_, loop)
        b.cbranch(b.icmp_unsigned("!=", half, zero), loop, done)
        b.position_at_end(done)
        b.ret(following)
    return builder.call(function, args)


def shift(left: bool) -> Callable[..., Any]:
    """Amounts outside of [0, bits) give 0, or the sign for an arithmetic right shift."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, amount = args
        arithmetic = not left and kind_of(sig.return_type) == "i"
        last = ir.Constant(amount.type, amount.type.width - 1)
        inside = builder.icmp_unsigned("<=", amount, last)
        safe = builder.select(inside, amount, last)
        if arithmetic:
            return builder.ashr(value, safe)
        result = builder.shl(value, safe) if left else builder.lshr(value, safe)
        return builder.select(inside, result, ir.Constant(value.type, 0))

    return emit
