"""`range` of the kernel dialect: plain signed 64-bit counting loops without an up-front trip count.

The iterator is a stack slot for the next value, which LLVM turns into a register, with a bound and
a step. A literal step (or none) leaves the canonical `i < stop; i += step`; a step known only at
run time may have any sign except zero. Ranges, iterators and the pairs that those give are tuples
of LLVM values, which no stack slot holds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing import signature

from onnxjit.codegen.dialect_convert import I64
from onnxjit.codegen.dialect_types import literal_int, register


class Range(types.SimpleIterableType):
    """A range of int64 whose step has the sign `direction` (0: unknown)."""

    def __init__(self, direction: int) -> None:
        self.direction = direction
        super().__init__(f"onnxjit.Range({direction})", RangeIterator(direction))


class RangeIterator(types.SimpleIteratorType):
    def __init__(self, direction: int) -> None:
        self.direction = direction
        super().__init__(f"onnxjit.RangeIterator({direction})", types.int64)


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
    return {1: (zero, *args, one), 2: (*args, one), 3: tuple(args)}[len(args)]


def _getiter_rule(iterable: types.Type) -> Any:
    if isinstance(iterable, Range):
        return signature(iterable.iterator_type, iterable)
    return None


def _emit_getiter(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    start, stop, step = args[0]
    with builder.goto_entry_block():
        place = builder.alloca(I64)
    builder.store(start, place)
    return place, stop, step


def _iternext_rule(iterator: types.Type) -> Any:
    if isinstance(iterator, RangeIterator):
        return signature(types.Pair(types.int64, types.boolean), iterator)
    return None


def _emit_iternext(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    direction = sig.args[0].direction
    place, stop, step = args[0]
    value = builder.load(place)
    if direction:
        valid = builder.icmp_signed("<" if direction > 0 else ">", value, stop)
    else:
        up, down = builder.icmp_signed("<", value, stop), builder.icmp_signed(">", value, stop)
        positive = builder.icmp_signed(">", step, ir.Constant(I64, 0))
        valid = builder.select(positive, up, down)
    # Overflow is only possible after the last valid value, and LLVM may then assume anything.
    builder.store(builder.add(value, step, flags=("nsw",)), place)
    return value, valid


def _pair_rule(position: int) -> Any:
    def rule(pair: types.Type) -> Any:
        if isinstance(pair, types.Pair):
            return signature((pair.first_type, pair.second_type)[position], pair)
        return None

    return rule


def _emit_pair(position: int) -> Any:
    return lambda context, builder, sig, args: args[0][position]


register(range, _range_rule, _emit_range)
register("getiter", _getiter_rule, _emit_getiter)
register("iternext", _iternext_rule, _emit_iternext)
register("pair_first", _pair_rule(0), _emit_pair(0))
register("pair_second", _pair_rule(1), _emit_pair(1))
