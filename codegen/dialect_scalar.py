"""Scalar operations of the kernel dialect: conversions, arithmetic, comparison, logic, functions.

Operators of generated sources (`+`, `//`, `<` ...) are these operations too, so integers keep their
width and wrap, nothing promotes float32 to float64, and nothing raises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing import signature

from onnxjit.codegen import dialect_integer, scalar_math
from onnxjit.codegen.dialect_convert import (
    F32,
    F64,
    I1,
    I32,
    STORAGE,
    convert,
    from_memory,
    kind_of,
    llvm_type,
    to_memory,
)
from onnxjit.codegen.dialect_types import (
    Operation,
    common,
    is_scalar,
    register,
)
from onnxjit.codegen.scalar_builder import declare


def _float(type_: types.Type | None) -> bool:
    return isinstance(type_, types.Float)


def _int(type_: types.Type | None) -> bool:
    return isinstance(type_, types.Integer)


def _same(arity: int, accept: Callable[[types.Type], bool] | None = None) -> Callable[..., Any]:
    """Rule: operands meet in one type, which is the result's."""

    def rule(*args: types.Type) -> Any:
        meet = common(*args) if len(args) == arity else None
        if meet is None or (accept is not None and not accept(meet)):
            return None
        return signature(meet, *[meet] * arity)

    return rule


def _predicate(arity: int) -> Callable[..., Any]:
    def rule(*args: types.Type) -> Any:
        meet = common(*args) if len(args) == arity else None
        return None if meet is None else signature(types.boolean, *[meet] * arity)

    return rule


def _as_integer(type_: types.Type) -> types.Type:
    return types.int64 if isinstance(type_, types.Boolean) else type_


def _arithmetic_rule(*args: types.Type) -> Any:
    """As `_same(2)`; booleans count as int64, as in Python."""
    meet = common(*args) if len(args) == 2 else None
    if meet is None:
        return None
    meet = _as_integer(meet)
    return signature(meet, meet, meet)


def _arithmetic(name: str) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        prefix = "f" if _float(sig.return_type) else ""
        return getattr(builder, prefix + name)(*args)

    return emit


def _emit_neg(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0]) if _float(sig.return_type) else builder.neg(args[0])


def _emit_floor_float(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    name = f"llvm.floor.f{sig.return_type.bitwidth}"
    quotient = builder.fdiv(*args)
    return builder.call(declare(builder.module, name, quotient.type, [quotient.type]), [quotient])


def _by_kind(for_float: Callable[..., Any], for_int: Callable[..., Any]) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        chosen = for_float if _float(sig.args[0]) else for_int
        return chosen(context, builder, sig, args)

    return emit


def _math(name: str) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        callee = scalar_math.function(builder.module, name, args[0].type)
        return builder.call(callee, args)

    return emit


def _identity(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


def _extreme(name: str) -> Callable[..., Any]:
    """minimum or maximum; NaN if either operand is."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        type_ = args[0].type
        if _float(sig.return_type):
            full = f"llvm.{name}imum.f{sig.return_type.bitwidth}"
            callee = declare(builder.module, full, type_, [type_] * 2)
            return builder.call(callee, args, fastmath=("nsz",))
        kind = "s" if kind_of(sig.return_type) == "i" else "u"
        full = f"llvm.{kind}{name}.i{type_.width}"
        return builder.call(declare(builder.module, full, type_, [type_] * 2), args)

    return emit


def _compare(op: str) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = kind_of(sig.args[0])
        if kind == "f":
            fcmp = builder.fcmp_unordered if op == "!=" else builder.fcmp_ordered
            return fcmp(op, *args)
        return (builder.icmp_signed if kind == "i" else builder.icmp_unsigned)(op, *args)

    return emit


def _emit_isnan(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if not _float(sig.args[0]):
        return ir.Constant(I1, 0)
    return builder.fcmp_unordered("uno", args[0], args[0])


def _emit_isinf(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if not _float(sig.args[0]):
        return ir.Constant(I1, 0)
    type_ = args[0].type
    name = f"llvm.fabs.f{sig.args[0].bitwidth}"
    size = builder.call(declare(builder.module, name, type_, [type_]), args)
    return builder.fcmp_ordered("==", size, ir.Constant(type_, float("inf")))


def _truth_rule(arity: int) -> Callable[..., Any]:
    def rule(*args: types.Type) -> Any:
        if len(args) != arity or not all(is_scalar(a) for a in args):
            return None
        return signature(types.boolean, *[types.boolean] * arity)

    return rule


def _plain(name: str) -> Callable[..., Any]:
    return lambda context, builder, sig, args: getattr(builder, name)(*args)


def _select_rule(condition: types.Type, a: types.Type, b: types.Type) -> Any:
    meet = common(a, b)
    if meet is None or not is_scalar(condition):
        return None
    return signature(meet, types.boolean, meet, meet)


def _emit_fma(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if not _float(sig.return_type):
        return builder.add(builder.mul(args[0], args[1]), args[2])
    type_ = args[0].type
    name = f"llvm.fmuladd.f{sig.return_type.bitwidth}"
    return builder.call(declare(builder.module, name, type_, [type_] * 3), args)


def _cast_operation(name: str, target: types.Type) -> Operation:
    def rule(x: types.Type) -> Any:
        return signature(target, types.unliteral(x)) if is_scalar(x) else None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return convert(builder, args[0], sig.args[0], target)

    return Operation(name, rule, emit)


def _round_to_odd(builder: Any, x: Any) -> Any:
    """float64 -> float32 such that rounding the result again is rounding x once."""
    near = builder.fptrunc(x, F32)
    back = builder.fpext(near, F64)
    bits = builder.bitcast(near, I32)
    size = [builder.call(declare(builder.module, "llvm.fabs.f64", F64, [F64]), [v])
            for v in (back, x)]  # fmt: skip
    above = builder.zext(builder.fcmp_ordered(">", *size), I32)
    inexact = builder.zext(builder.fcmp_ordered("!=", *size), I32)
    return builder.bitcast(builder.or_(builder.sub(bits, above), inexact), F32)


def _round_operation(name: str, dtype: str) -> Operation:
    def rule(x: types.Type) -> Any:
        return signature(types.float32, types.unliteral(x)) if is_scalar(x) else None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source = sig.args[0]
        if kind_of(source) in "iu" or source == types.float64:
            exact = convert(builder, args[0], source, types.float64)
            value = _round_to_odd(builder, exact)
        else:
            value = convert(builder, args[0], source, types.float32)
        return from_memory(builder, dtype, to_memory(builder, dtype, value))

    return Operation(name, rule, emit)


def _bitcast_operation(dtype: str) -> Operation:
    target = STORAGE[dtype][2]

    def rule(x: types.Type) -> Any:
        x = types.unliteral(x)
        if not isinstance(x, types.Number) or x.bitwidth != target.bitwidth:
            return None
        return signature(target, x)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], llvm_type(target))

    return Operation(f"bitcast_{dtype}", rule, emit)


def _assume_rule(condition: types.Type) -> Any:
    return signature(types.void, types.boolean) if is_scalar(condition) else None


def _emit_assume(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    builder.call(declare(builder.module, "llvm.assume", ir.VoidType(), [I1]), args)
    return context.get_dummy_value()


_Row = tuple[Callable[..., Any], Callable[..., Any]]
_floor = dialect_integer.division(floor=True, remainder=False, force_unsigned=False)
_modulo = dialect_integer.division(floor=True, remainder=True, force_unsigned=False)
_FLOORDIV: _Row = (_arithmetic_rule, _by_kind(_emit_floor_float, _floor))
_MOD_FLOOR: _Row = (_arithmetic_rule, _by_kind(_math("mod_floor"), _modulo))
_MOD_TRUNC: _Row = (_arithmetic_rule, _by_kind(_math("mod_trunc"), dialect_integer.division(
    floor=False, remainder=True, force_unsigned=False)))  # fmt: skip
_DIV: _Row = (_arithmetic_rule, _by_kind(_arithmetic("div"), dialect_integer.division(
    floor=False, remainder=False, force_unsigned=False)))  # fmt: skip
_POW: _Row = (_arithmetic_rule, _by_kind(_math("pow"), dialect_integer.emit_pow))
_ADD: _Row = (_arithmetic_rule, _arithmetic("add"))
_SUB: _Row = (_arithmetic_rule, _arithmetic("sub"))
_MUL: _Row = (_arithmetic_rule, _arithmetic("mul"))
_NEG: _Row = (_same(1), _emit_neg)
_NOT: _Row = (_truth_rule(1), _plain("not_"))
_not_float = lambda t: not _float(t)  # noqa: E731
_AND: _Row = (_same(2, _not_float), _plain("and_"))
_OR: _Row = (_same(2, _not_float), _plain("or_"))
_XOR: _Row = (_same(2, _not_float), _plain("xor"))
_INVERT: _Row = (_same(1, _not_float), _plain("not_"))
_LEFT: _Row = (_same(2, _int), dialect_integer.shift(left=True))
_RIGHT: _Row = (_same(2, _int), dialect_integer.shift(left=False))

_TABLE: dict[str, _Row] = {
    "add": _ADD,
    "sub": _SUB,
    "mul": _MUL,
    "neg": _NEG,
    "div": _DIV,
    "floordiv": _FLOORDIV,
    "mod_floor": _MOD_FLOOR,
    "mod_trunc": _MOD_TRUNC,
    "udiv_": (_same(2, _int), dialect_integer.division(False, False, True)),
    "umod_": (_same(2, _int), dialect_integer.division(False, True, True)),
    "pow": _POW,
    "min_": (_same(2), _extreme("min")),
    "max_": (_same(2), _extreme("max")),
    "eq": (_predicate(2), _compare("==")),
    "ne": (_predicate(2), _compare("!=")),
    "lt": (_predicate(2), _compare("<")),
    "le": (_predicate(2), _compare("<=")),
    "gt": (_predicate(2), _compare(">")),
    "ge": (_predicate(2), _compare(">=")),
    "isnan": (_predicate(1), _emit_isnan),
    "isinf": (_predicate(1), _emit_isinf),
    "logical_and": (_truth_rule(2), _plain("and_")),
    "logical_or": (_truth_rule(2), _plain("or_")),
    "logical_xor": (_truth_rule(2), _plain("xor")),
    "logical_not": _NOT,
    "bit_and": _AND,
    "bit_or": _OR,
    "bit_xor": _XOR,
    "bit_not": _INVERT,
    "shift_left": _LEFT,
    "shift_right": _RIGHT,
    "select": (_select_rule, lambda c, builder, sig, args: builder.select(*args)),
    "fma": (_same(3), _emit_fma),
    "divide_by": (_same(2, _float), _math("divide_by")),
    "minus": (_same(2, _float), _math("minus")),
    "assume": (_assume_rule, _emit_assume),
    "abs": (_same(1), _by_kind(_math("abs"), dialect_integer.emit_abs)),
    "sign": (_same(1), _by_kind(_math("sign"), dialect_integer.emit_sign)),
    **{
        name: (_same(1), _by_kind(_math(name), _identity))
        for name in ("floor", "ceil", "round", "trunc")
    },
}

for _op, _row in {
    operator.add: _ADD, operator.iadd: _ADD, operator.sub: _SUB, operator.isub: _SUB,
    operator.mul: _MUL, operator.imul: _MUL, operator.truediv: _DIV, operator.itruediv: _DIV,
    operator.floordiv: _FLOORDIV, operator.ifloordiv: _FLOORDIV, operator.mod: _MOD_FLOOR,
    operator.imod: _MOD_FLOOR, operator.pow: _POW, operator.neg: _NEG, operator.not_: _NOT,
    operator.pos: (_same(1), _identity), bool: (_truth_rule(1), _identity),
    operator.and_: _AND, operator.or_: _OR, operator.xor: _XOR, operator.invert: _INVERT,
    operator.iand: _AND, operator.ior: _OR, operator.ixor: _XOR,
    operator.lshift: _LEFT, operator.rshift: _RIGHT,
    operator.eq: _TABLE["eq"], operator.ne: _TABLE["ne"], operator.lt: _TABLE["lt"],
    operator.le: _TABLE["le"], operator.gt: _TABLE["gt"], operator.ge: _TABLE["ge"],
}.items():  # fmt: skip
    register(_op, *_row)


def scalar_operations() -> dict[str, Operation]:
    """Casts, bit casts, and the scalar functions by name."""
    made = [Operation(name, rule, emit) for name, (rule, emit) in _TABLE.items()]
    for name in scalar_math.UNARY:
        if name not in _TABLE:
            made.append(Operation(name, _same(1, _float), _math(name)))
    for dtype, (_, _, type_) in STORAGE.items():
        if dtype not in ("float16", "bfloat16", "bool"):
            made.append(_cast_operation(dtype, type_))
            made.append(_bitcast_operation(dtype))
    made.append(_cast_operation("bool_", types.boolean))
    for dtype in ("float16", "bfloat16"):
        made += [_round_operation(dtype, dtype), _round_operation(f"round_{dtype}", dtype)]
    names = {op.__name__: op for op in made}
    return {**names, **{f"{name}_": names[name] for name in ("pow", "abs", "round")}}
