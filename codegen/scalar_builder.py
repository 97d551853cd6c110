"""Expression-like wrapper of llvmlite's builder for floating-point code without fast-math flags."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from llvmlite import ir


@dataclass(frozen=True, slots=True)
class Format:
    """An IEEE format: LLVM type, integer type of the same width, stored mantissa bits."""

    type: ir.Type
    bits: ir.Type
    mantissa: int
    bias: int
    suffix: str
    pack: str


FLOAT32 = Format(ir.FloatType(), ir.IntType(32), 23, 127, "f32", "<fI")
FLOAT64 = Format(ir.DoubleType(), ir.IntType(64), 52, 1023, "f64", "<dQ")


def declare(module: ir.Module, name: str, result: ir.Type, args: Iterable[ir.Type]) -> ir.Function:
    """The declaration of `name` in `module`, added if it is not there."""
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    return ir.Function(module, ir.FunctionType(result, list(args)), name)


class Scalar:
    """Emits operations of one floating-point format; Python numbers are constants.

    `functions(module, name, type)` resolves `call`.
    """

    def __init__(
        self, builder: ir.IRBuilder, format_: Format, functions: Callable[..., ir.Function]
    ) -> None:
        self.builder = builder
        self.format = format_
        self.functions = functions
        self.mantissa_bits = format_.mantissa
        self.smallest_normal = 2.0 ** (1 - format_.bias)

    def value(self, x: Any) -> Any:
        return ir.Constant(self.format.type, float(x)) if isinstance(x, int | float) else x

    def integer(self, x: Any) -> Any:
        return ir.Constant(self.format.bits, x) if isinstance(x, int) else x

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(self.value(a), self.value(b))

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(self.value(a), self.value(b))

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(self.value(a), self.value(b))

    def div(self, a: Any, b: Any) -> Any:
        return self.builder.fdiv(self.value(a), self.value(b))

    def rem(self, a: Any, b: Any) -> Any:
        return self.builder.frem(self.value(a), self.value(b))

    def neg(self, a: Any) -> Any:
        return self.builder.fneg(a)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c: one rounding where the target has the instruction, else two."""
        return self.intrinsic("fmuladd", self.value(a), self.value(b), self.value(c))

    def poly(self, x: Any, coefficients: Iterable[float]) -> Any:
        """A polynomial, highest power first: Horner's scheme in x² over pairs of coefficients, a
        chain half as long as in x for one more product (Knuth, TAOCP 4.6.4, second order)."""
        head, *rest = coefficients
        result = self.value(head)
        if len(rest) < 3:
            for c in rest:
                result = self.fma(result, x, c)
            return result
        if len(rest) % 2:
            result = self.fma(x, head, rest.pop(0))
        square = self.mul(x, x)
        for odd, even in zip(rest[::2], rest[1::2], strict=True):
            result = self.fma(result, square, self.fma(x, odd, even))
        return result

    def intrinsic(self, name: str, *args: Any) -> Any:
        operands = [self.value(a) for a in args]
        types = [self.format.type] * len(operands)
        name = f"llvm.{name}.{self.format.suffix}"
        return self.builder.call(
            declare(self.builder.module, name, self.format.type, types), operands
        )

    def external(self, name: str, *args: Any) -> Any:
        types = [self.format.type] * len(args)
        return self.builder.call(
            declare(self.builder.module, name, self.format.type, types), list(args)
        )

    def call(self, name: str, *args: Any) -> Any:
        callee = self.functions(self.builder.module, name, self.format.type)
        return self.builder.call(callee, [self.value(a) for a in args])

    def abs(self, a: Any) -> Any:
        return self.intrinsic("fabs", a)

    def copysign(self, size: Any, sign: Any) -> Any:
        return self.intrinsic("copysign", size, sign)

    def lt(self, a: Any, b: Any) -> Any:
        return self.builder.fcmp_ordered("<", self.value(a), self.value(b))

    def eq(self, a: Any, b: Any) -> Any:
        return self.builder.fcmp_ordered("==", self.value(a), self.value(b))

    def ne(self, a: Any, b: Any) -> Any:
        return self.builder.fcmp_unordered("!=", self.value(a), self.value(b))

    def is_nan(self, a: Any) -> Any:
        return self.builder.fcmp_unordered("uno", a, a)

    def both(self, a: Any, b: Any) -> Any:
        return self.builder.and_(a, b)

    def either(self, a: Any, b: Any) -> Any:
        return self.builder.or_(a, b)

    def negate(self, a: Any) -> Any:
        return self.builder.not_(a)

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        return self.builder.select(condition, self.value(a), self.value(b))

    def clamp_keep_nan(self, x: Any, low: float, high: float) -> Any:
        x = self.select(self.lt(x, low), low, x)
        return self.select(self.lt(high, x), high, x)

    def differ_in_sign(self, a: Any, b: Any) -> Any:
        both = self.ixor(self.to_bits(a), self.to_bits(b))
        return self.builder.icmp_signed("<", both, self.integer(0))

    def nearest(self, x: Any) -> tuple[Any, Any]:
        """x rounded to an integer, as float and as integer; |x| < 2**(mantissa bits - 2)."""
        magic = 1.5 * 2.0**self.mantissa_bits
        shifted = self.add(x, magic)
        return self.sub(shifted, magic), self.isub(self.to_bits(shifted), self.bits_of(magic))

    def scale(self, y: Any, k: Any) -> Any:
        """y * 2**k for k within twice the exponent range."""
        first = self.ashr(k, 1)
        for part in (first, self.isub(k, first)):
            power = self.shl(self.iadd(part, self.format.bias), self.mantissa_bits)
            y = self.mul(y, self.from_bits(power))
        return y

    def bits_of(self, x: float) -> int:
        return int(struct.unpack(self.format.pack[0] + self.format.pack[2],
                                 struct.pack(self.format.pack[:2], x))[0])  # fmt: skip

    def to_bits(self, x: Any) -> Any:
        return self.builder.bitcast(x, self.format.bits)

    def from_bits(self, x: Any) -> Any:
        return self.builder.bitcast(x, self.format.type)

    def iadd(self, a: Any, b: Any) -> Any:
        return self.builder.add(a, self.integer(b))

    def isub(self, a: Any, b: Any) -> Any:
        return self.builder.sub(a, self.integer(b))

    def iand(self, a: Any, b: Any) -> Any:
        return self.builder.and_(a, self.integer(b))

    def ixor(self, a: Any, b: Any) -> Any:
        return self.builder.xor(a, self.integer(b))

    def shl(self, a: Any, b: Any) -> Any:
        return self.builder.shl(a, self.integer(b))

    def ashr(self, a: Any, b: Any) -> Any:
        return self.builder.ashr(a, self.integer(b))

    def odd(self, a: Any) -> Any:
        return self.builder.icmp_signed("!=", self.iand(a, 1), self.integer(0))

    def int_to_float(self, a: Any) -> Any:
        return self.builder.sitofp(a, self.format.type)

    def wide(self) -> Scalar:
        """The same builder in double precision."""
        return Scalar(self.builder, FLOAT64, self.functions)

    def extend(self, x: Any) -> Any:
        return self.builder.fpext(x, FLOAT64.type)

    def truncate(self, x: Any) -> Any:
        return self.builder.fptrunc(x, self.format.type)

    def narrow_int(self, x: Any) -> Any:
        return self.builder.trunc(x, self.format.bits)


@cache
def inverse_turn_chunks(bits: int = 29, count: int = 7) -> tuple[float, ...]:
    """1 / (2 pi) as a sum of `count` numbers of at most `bits` significant bits each.

    pi from Machin's formula in integer arithmetic.
    """
    precision = bits * count + 64

    def arctan_of_inverse(n: int) -> int:
        term = (1 << precision) // n
        total, k, sign = term, 1, 1
        while term:
            term //= n * n
            k, sign = k + 2, -sign
            total += sign * (term // k)
        return total

    pi = 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))
    value = (1 << (2 * precision)) // (2 * pi)  # 1 / (2 pi) scaled by 2**precision
    top = value.bit_length()
    chunks = []
    for i in range(count):
        shift = top - bits * (i + 1)
        part = (value >> shift) << shift
        value -= part
        chunks.append(float(Fraction(part, 1 << precision)))
    return tuple(chunks)
