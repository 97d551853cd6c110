"""`range` of the kernel dialect: plain signed 64-bit counting loops without an up-front trip count.

The iterator is a stack slot {next, stop, step}, which LLVM turns into registers. A literal step (or
none) leaves the canonical `i < stop; i += step`; a step known only at run time may have any sign
except zero.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default
from numba.core.typing import signature

from onnxjit.codegen.dialect_convert import I64
from onnxjit.codegen.dialect_types import literal_int, register

_STATE = ir.LiteralStructType([I64, I64, I64])


class Range(types.SimpleIterableType):
    """A range of int64 whose step has the sign `direction` (0: unknown)."""

    def __init__(self, direction: int) -> None:
        self.direction = direction
        super().__init__(f"onnxjit.Range({direction})", RangeIterator(direction))


class RangeIterator(types.SimpleIteratorType):
    def __init__(self, direction: int) -> None:
        self.direction = direction
        super().__init__(f"onnxjit.RangeIterator({direction})", types.int64)


@register_default(Range)
class _RangeModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _STATE)


@register_default(RangeIterator)
class _IteratorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _STATE.as_pointer())


def _range_rule(*args: types.Type) -> Any:
    if not 1 <= len(args) <= 3 or not all(isinstance(a, types.Integer) for a in args):
        return None
    direction = 1
    if len(args) == 3:
        step = literal_int(args[2])
        direction = 0 if step is None else (step > 0) - (step < 0)
        if step == 0:
            return None
    return signature(Range(direction), *[types.int64] * len(args))


def _emit_range(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    start, stop, step = {1: (zero, *args, one), 2: (*args, one), 3: tuple(args)}[len(args)]
    state = ir.Constant(_STATE, ir.Undefined)
    for i, value in enumerate((start, stop, step)):
        state = builder.insert_value(state, value, i)
    return state


def _field(builder: Any, state: Any, i: int) -> Any:
    return builder.gep(
        state, [ir.Constant(ir.IntType(32), 0), ir.Constant(ir.IntType(32), i)],
        inbounds=True,
    )  # fmt: skip


def _getiter_rule(iterable: types.Type) -> Any:
    if isinstance(iterable, Range):
        return signature(iterable.iterator_type, iterable)
    return None


def _emit_getiter(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    with builder.goto_entry_block():
        state = builder.alloca(_STATE)
    for i in range(3):
        builder.store(builder.extract_value(args[0], i), _field(builder, state, i))
    return state


def _iternext_rule(iterator: types.Type) -> Any:
    if isinstance(iterator, RangeIterator):
        return signature(types.Pair(types.int64, types.boolean), iterator)
    return None


def _emit_iternext(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    direction = sig.args[0].direction
    place = _field(builder, args[0], 0)
    value = builder.load(place)
    stop = builder.load(_field(builder, args[0], 1))
    step = builder.load(_field(builder, args[0], 2))
    up, down = builder.icmp_signed("<", value, stop), builder.icmp_signed(">", value, stop)
    if direction:
        valid = up if direction > 0 else down
    else:
        positive = builder.icmp_signed(">", step, ir.Constant(I64, 0))
        valid = builder.select(positive, up, down)
    # Overflow is only possible after the last valid value, and LLVM may then assume anything.
    builder.store(builder.add(value, step, flags=("nsw",)), place)
    pair = ir.Constant(ir.LiteralStructType([I64, ir.IntType(1)]), ir.Undefined)
    return builder.insert_value(builder.insert_value(pair, value, 0), valid, 1)


def _pair_rule(position: int) -> Any:
    def rule(pair: types.Type) -> Any:
        if isinstance(pair, types.Pair):
            return signature((pair.first_type, pair.second_type)[position], pair)
        return None

    return rule


def _emit_pair(position: int) -> Any:
    return lambda context, builder, sig, args: builder.extract_value(args[0], position)


register(range, _range_rule, _emit_range)
register("getiter", _getiter_rule, _emit_getiter)
register("iternext", _iternext_rule, _emit_iternext)
register("pair_first", _pair_rule(0), _emit_pair(0))
register("pair_second", _pair_rule(1), _emit_pair(1))
