"""The kernel dialect as plain Python over NumPy scalars, for stepping through a kernel.

Slow by nature. Values are NumPy scalars of the dialect's types (float16 and bfloat16 elements load
as float32), so integers wrap; run a kernel inside `numpy.errstate(all="ignore")`, as `run` does.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from onnxjit.codegen.dialect_table import (
    DTYPES,
    GEMM_SIZE,
    PACK_SYMBOL,
    WINDOW_SYMBOL,
    WINOGRAD_SYMBOL,
    family_of,
)
from onnxjit.codegen.minimal_filtering import ALGORITHMS, Algorithm

_NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in DTYPES
}
_HALVES = ("float16", "bfloat16")


class Buffer:
    """Elements of `dtype` from `address` on; `owner` keeps the memory alive, and is its limit where
    it is an array."""

    __slots__ = ("address", "dtype", "limits", "owner")

    def __init__(self, dtype: str, address: int, owner: Any = None) -> None:
        self.dtype = dtype
        self.address = address
        self.owner = owner
        self.limits: tuple[int, int] | None = None
        if isinstance(owner, np.ndarray):
            self.limits = owner.ctypes.data, owner.ctypes.data + owner.nbytes

    def view(self, start: int, count: int) -> np.ndarray[Any, Any]:
        """The memory of `count` elements from index `start` on, as an array. IndexError outside."""
        type_ = _NUMPY[self.dtype]
        size = int(count) * type_.itemsize
        first = self.address + int(start) * type_.itemsize
        if self.limits is not None and size:
            if first < self.limits[0] or first + size > self.limits[1]:
                held = (self.limits[1] - self.address) // type_.itemsize
                raise IndexError(
                    f"{count} element(s) from index {start} on, in a buffer of {held} {self.dtype}"
                )
        raw = (ctypes.c_uint8 * size).from_address(first)
        return np.ctypeslib.as_array(raw).view(type_)

    def __getitem__(self, index: int) -> Any:
        value = self.view(index, 1)[0]
        if self.dtype == "bool":
            return np.bool_(self.view(index, 1).view(np.uint8)[0] != 0)
        return np.float32(value) if self.dtype in _HALVES else value

    def __setitem__(self, index: int, value: Any) -> None:
        type_ = _NUMPY[self.dtype]
        if self.dtype in _HALVES:
            value = convert("float32", value)
        else:
            value = convert(self.dtype, value)
        self.view(index, 1)[0] = type_.type(value)


def convert(dtype: str, x: Any) -> Any:
    """The dialect's cast: C-like, but float to integer saturates and NaN becomes 0."""
    target = _NUMPY[dtype].type
    if dtype == "bool":
        return np.bool_(x != 0)
    if dtype in ("float32", "float64"):
        return target(x)
    info = np.iinfo(target)
    if isinstance(x, float | np.floating):
        if math.isnan(x):
            return target(0)
        if math.isinf(x):
            return target(info.max if x > 0 else info.min)
        return target(min(max(int(x), int(info.min)), int(info.max)))
    span = int(info.max) - int(info.min) + 1
    return target((int(x) - int(info.min)) % span + int(info.min))


def _meet(*args: Any) -> tuple[Any, ...]:
    """The operands in their common type: a Python integer adapts, a Python float is float64."""
    firm = [np.float64(a) if type(a) is float else np.bool_(a) if type(a) is bool else a
            for a in args]  # fmt: skip
    kinds = [type(a) for a in firm if not isinstance(a, int)]
    if not kinds:
        return tuple(np.int64(a) for a in firm)

    def rank(t: Any) -> tuple[int, int, bool]:
        d = np.dtype(t)
        return "biuf".index(d.kind) and (3 if d.kind == "f" else 2), d.itemsize, d.kind == "i"

    name = np.dtype(max(kinds, key=rank)).name
    return tuple(convert(name, a) for a in firm)


def _is_float(x: Any) -> bool:
    return isinstance(x, np.floating)


def _rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in float64, rounded to the operands' type."""

    def call(*args: Any) -> Any:
        values = _meet(*args)
        if not _is_float(values[0]):
            raise TypeError("only defined for floating-point operands")
        return type(values[0])(function(*(np.float64(v) for v in values)))

    return call


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        values = _meet(*args)
        return type(values[0])(function(*values))

    return call


def _integral(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rounding functions leave integers alone."""
    return lambda x: type(x)(function(x)) if _is_float(x := _meet(x)[0]) else x


def _predicate(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: np.bool_(function(*_meet(*args)))


def _wrap(value: int, like: Any) -> Any:
    return convert(np.dtype(type(like)).name, value)


def _division(whole: Callable[[int, int], int], real: Callable[..., Any]) -> Callable[..., Any]:
    """`whole` on exact integers with a non-zero divisor (zero gives 0), `real` on floats."""

    def call(a: Any, b: Any) -> Any:
        a, b = _meet(a, b)
        if isinstance(a, np.bool_):
            a, b = np.int64(a), np.int64(b)
        if _is_float(a):
            return type(a)(real(a, b))
        return _wrap(0 if b == 0 else whole(int(a), int(b)), a)

    return call


def _truncated(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def _unsigned(whole: Callable[[int, int], int]) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        a, b = _meet(a, b)
        mask = (1 << (8 * a.itemsize)) - 1
        x, y = int(a) & mask, int(b) & mask
        return _wrap(0 if y == 0 else whole(x, y), a)

    return call


def _remainder(a: Any, b: Any) -> Any:
    r = np.fmod(a, b)
    if r == 0:
        return np.copysign(r, b)
    return r + b if (r < 0) != (b < 0) and not np.isnan(r) else r


def _power(a: Any, b: Any) -> Any:
    a, b = _meet(a, b)
    if _is_float(a):
        return type(a)(np.power(np.float64(a), np.float64(b)))
    bits = 8 * a.itemsize
    return _wrap(pow(int(a), int(b) % (1 << bits), 1 << bits), a)


def _shift(left: bool) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        a, b = _meet(a, b)
        bits = 8 * a.itemsize
        if not 0 <= int(b) < bits:
            return _wrap(-1 if not left and a < 0 else 0, a)
        return _wrap(int(a) << int(b) if left else int(a) >> int(b), a)

    return call


def _select(condition: Any, a: Any, b: Any) -> Any:
    a, b = _meet(a, b)
    return a if condition else b


def _fma(a: Any, b: Any, c: Any) -> Any:
    a, b, c = _meet(a, b, c)
    if isinstance(a, np.float32):
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    return type(a)(a * b + c)


def _sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return (e if x < 0 else 1.0) / (1.0 + e)


def _round_half(dtype: str) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        wide: Any = np.float64(x)
        if dtype == "bfloat16":  # ml_dtypes rounds float64 twice: round to odd in between
            near = np.float32(wide)
            if near != wide and not np.isnan(near):
                bits = int(near.view(np.uint32)) - int(abs(np.float64(near)) > abs(wide))
                near = np.uint32(bits | 1).view(np.float32)
            wide = near
        return np.float32(_NUMPY[dtype].type(wide))

    return call


def _bitcast(dtype: str) -> Callable[[Any], Any]:
    return lambda x: _meet(x)[0].view(_NUMPY[dtype])


def _pointer_buffer(dtype: str) -> Callable[..., Buffer]:
    def call(pointers: Any, k: int, scope: int | None = None) -> Buffer:
        pointer = pointers[k]
        if isinstance(pointer, np.ndarray):
            return Buffer(dtype, pointer.ctypes.data, pointer)
        return Buffer(dtype, int(pointer or 0))

    return call


def _scratch_buffer(dtype: str) -> Callable[..., Buffer]:
    def call(scratch: Any, offset: int, scope: int | None = None) -> Buffer:
        base = scratch.ctypes.data if isinstance(scratch, np.ndarray) else int(scratch or 0)
        return Buffer(dtype, base + int(offset), scratch)

    return call


def _stack_buffer(dtype: str) -> Callable[..., Buffer]:
    def call(count: int, scope: int | None = None) -> Buffer:
        memory = np.zeros(count * _NUMPY[dtype].itemsize + 64, np.uint8)
        return Buffer(dtype, -(-memory.ctypes.data // 64) * 64, memory)

    return call


def _offset(buffer: Buffer, index: int) -> Buffer:
    return Buffer(buffer.dtype, _address(buffer, index), buffer.owner)


def _address(buffer: Buffer, index: int) -> int:
    return buffer.address + int(index) * _NUMPY[buffer.dtype].itemsize


def _zero(buffer: Buffer, count: int) -> None:
    buffer.view(0, count).view(np.uint8)[:] = 0


def _copy(target: Buffer, source: Buffer, count: int) -> None:
    target.view(0, count)[:] = source.view(0, count)


def _gemm_rows(symbol: str) -> Callable[..., None]:
    match = GEMM_SIZE.search(symbol)
    assert match is not None
    nr = int(match["nr"])

    def call(
        a: Buffer, a_index: int, rs: int, segs: Buffer, segs_index: int, nseg: int,
        run: int, b: Buffer, b_index: int, c: Buffer, c_index: int, ldc: int, more: int,
        ahead: Buffer, ahead_index: int, rows: int,
    ) -> None:  # fmt: skip
        starts = segs.view(segs_index, nseg).tolist()
        for i in range(rows):
            row = c.view(int(c_index) + i * int(ldc), nr)
            parts = [a.view(int(a_index) + i * int(rs) + s, run) for s in starts]
            left = np.concatenate([np.zeros(0, row.dtype), *parts])
            right = b.view(b_index, len(left) * nr).reshape(len(left), nr)
            result = left @ right
            row[:] = row + result if more else result

    return call


def _window(symbol: str) -> Callable[..., None]:
    match = WINDOW_SYMBOL.fullmatch(symbol)
    assert match is not None
    pixels, stride, dilation = (int(match[k] or 1) for k in ("t", "stride", "dilation"))
    join = np.maximum if match["kind"] == "maxpool" else np.add
    first = -np.inf if match["kind"] == "maxpool" else 0.0

    def call(
        x: Buffer, x_index: int, row: int, pixel: int, rows: int,
        w: Buffer, w_index: int, wrow: int, wtap: int, taps: int,
        y: Buffer, y_index: int, ldy: int, n: int, line: int, fresh: int,
    ) -> None:  # fmt: skip
        for p in range(pixels):
            total = np.full(int(n), first, _NUMPY[x.dtype])
            for i in range(rows):
                for j in range(taps):
                    at = x_index + i * row + (p * stride + j * dilation) * pixel
                    value = x.view(at, n)
                    if match["kind"] == "depthwise":
                        value = value * w.view(w_index + i * wrow + j * wtap, n)
                    total = join(total, value)
            y.view(y_index + p * ldy, n)[:] = total

    return call


def _gemm(symbol: str) -> Callable[..., None]:
    match = GEMM_SIZE.search(symbol)
    assert match is not None
    return partial(_gemm_rows(symbol), rows=int(match["mr"]))


def _pack(symbol: str) -> Callable[..., None]:
    match = PACK_SYMBOL.fullmatch(symbol)
    assert match is not None
    nr = int(match["nr"])

    def call(
        src: Buffer, src_index: int, stride: int, rows: int, depth: int,
        dst: Buffer, dst_index: int, step: int,
    ) -> None:  # fmt: skip
        columns = np.empty((depth, nr), np.float32)
        for r in range(nr):
            columns[:, r] = src.view(int(src_index) + min(r, rows - 1) * int(stride), depth)
        for k in range(depth):
            dst.view(int(dst_index) + k * int(step), nr)[:] = columns[k]

    return call


def _softmax(symbol: str) -> Callable[..., None]:
    def call(
        source: Buffer, source_index: int, lds: int,
        target: Buffer, target_index: int, ldt: int, rows: int, n: int,
        highest: Buffer, highest_index: int, sums: Buffer, sums_index: int,
    ) -> None:  # fmt: skip
        for i in range(rows):
            row = source.view(int(source_index) + i * int(lds), n)
            out = target.view(int(target_index) + i * int(ldt), n)
            top = highest.view(int(highest_index) + i, 1)
            top[0] = np.fmax.reduce(row, initial=top[0])
            with np.errstate(all="ignore"):
                out[:] = np.exp(row - (0 if top[0] == -np.inf else top[0]))
            sums.view(int(sums_index) + i, 1)[0] = out.sum()

    return call


def _winograd_in(symbol: str) -> Callable[..., None]:
    algorithm = _algorithm(symbol)

    def call(
        near: Buffer, near_index: int, far: Buffer, far_index: int, step: int, apart: int,
        dst: Buffer, dst_index: int, dstep: int, dapart: int, n: int, count: int,
    ) -> None:  # fmt: skip
        m, a = algorithm.m, algorithm.a
        for k in range(count):
            first, second = int(near_index) + k * int(apart), int(far_index) + k * int(apart)
            lines = [near.view(first + j * int(step), n).copy() for j in range(a - m)]
            lines += [far.view(second + j * int(step), n).copy() for j in range(m)]
            for i, line in enumerate(algorithm.inputs(lines)):
                dst.view(int(dst_index) + k * int(dapart) + i * int(dstep), n)[:] = line

    return call


def _winograd_out(symbol: str) -> Callable[..., None]:
    algorithm = _algorithm(symbol)

    def call(
        src: Buffer, src_index: int, dst: Buffer, dst_index: int, dstep: int, n: int,
    ) -> None:  # fmt: skip
        a = algorithm.a
        y = src.view(src_index, a * a * int(n)).reshape(a, a, int(n)).copy()
        columns = [algorithm.outputs([y[i, j] for i in range(a)]) for j in range(a)]
        for i in range(algorithm.m):
            line = np.concatenate(algorithm.outputs([columns[j][i] for j in range(a)]))
            dst.view(int(dst_index) + i * int(dstep), len(line))[:] = line

    return call


def _algorithm(symbol: str) -> Algorithm:
    match = WINOGRAD_SYMBOL.fullmatch(symbol)
    assert match is not None
    return ALGORITHMS[int(match["m"])]


_CALLS: dict[str, Callable[[str], Callable[..., None]]] = {
    "gemm": _gemm, "gemm_rows": _gemm_rows, "pack": _pack, "softmax": _softmax,
    "window": _window, "winograd_in": _winograd_in, "winograd_out": _winograd_out,
}  # fmt: skip

_RANGED = {"floor": np.floor, "ceil": np.ceil, "round": np.rint, "trunc": np.trunc}

_ROUNDED: dict[str, Callable[..., Any]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "tanh": np.tanh, "erf": math.erf, "sigmoid": _sigmoid, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
}  # fmt: skip


def _names() -> dict[str, Any]:
    names: dict[str, Any] = {
        "range": range, "nan": math.nan, "inf": math.inf,
        "address": _address, "offset": _offset, "zero": _zero, "copy": _copy,
        "add": _exact(np.add), "sub": _exact(np.subtract), "mul": _exact(np.multiply),
        "neg": _exact(np.negative), "abs": _exact(np.abs), "sign": _exact(np.sign),
        "min_": _exact(np.minimum), "max_": _exact(np.maximum), "pow": _power,
        "div": _division(_truncated, np.true_divide),
        "divide_by": _division(_truncated, np.true_divide),
        "minus": _exact(np.subtract),
        "floordiv": _division(lambda a, b: a // b, lambda a, b: np.floor(a / b)),
        "mod_floor": _division(lambda a, b: a % b, _remainder),
        "mod_trunc": _division(lambda a, b: a - _truncated(a, b) * b, np.fmod),
        "udiv_": _unsigned(lambda a, b: a // b), "umod_": _unsigned(lambda a, b: a % b),
        "eq": _predicate(np.equal), "ne": _predicate(np.not_equal), "lt": _predicate(np.less),
        "le": _predicate(np.less_equal), "gt": _predicate(np.greater),
        "ge": _predicate(np.greater_equal), "isnan": _predicate(np.isnan),
        "isinf": _predicate(np.isinf),
        "logical_and": lambda a, b: np.bool_(a != 0 and b != 0),
        "logical_or": lambda a, b: np.bool_(a != 0 or b != 0),
        "logical_xor": lambda a, b: np.bool_((a != 0) != (b != 0)),
        "logical_not": lambda a: np.bool_(a == 0),
        "bit_and": _exact(np.bitwise_and), "bit_or": _exact(np.bitwise_or),
        "bit_xor": _exact(np.bitwise_xor), "bit_not": _exact(np.invert),
        "shift_left": _shift(True), "shift_right": _shift(False),
        "select": _select, "fma": _fma, "assume": lambda condition: None,
    }  # fmt: skip
    names.update((name, _integral(f)) for name, f in _RANGED.items())
    names.update((name, _rounded(f)) for name, f in _ROUNDED.items())
    for dtype in DTYPES:
        names[f"buffer_{dtype}"] = _pointer_buffer(dtype)
        names[f"scratch_{dtype}"] = _scratch_buffer(dtype)
        names[f"stack_{dtype}"] = _stack_buffer(dtype)
        if dtype in _HALVES:
            names[dtype] = names[f"round_{dtype}"] = _round_half(dtype)
        elif dtype != "bool":
            names[dtype] = lambda x, dtype=dtype: convert(dtype, x)
            names[f"bitcast_{dtype}"] = _bitcast(dtype)
    names["bool_"] = lambda x: convert("bool", x)
    for name in ("pow", "abs", "round"):
        names[f"{name}_"] = names[name]
    return names


def python_namespace(symbols: Iterable[str] = ()) -> dict[str, Any]:
    """The names of `dialect.namespace` as Python functions; micro-kernels run on NumPy."""
    names = _names()
    for symbol in symbols:
        names[symbol] = _CALLS[family_of(symbol).name](symbol)
    return names


def run(
    source: str,
    symbols: Iterable[str],
    pointers: Sequence[Any],
    ints: Any,
    scratch: Any,
    begin: int,
    end: int,
    filename: str = "<kernel>",
) -> None:
    """Interpret a kernel source on tiles [begin, end).

    `pointers` holds arrays or addresses, `ints` an int64 array, `scratch` an array or address.
    A breakpoint or pdb inside of the kernel sees its variables.
    """
    scope = python_namespace(symbols)
    exec(compile(source, filename, "exec"), scope)
    address = ints.ctypes.data if isinstance(ints, np.ndarray) else int(ints or 0)
    with np.errstate(all="ignore"):
        scope["kernel"](pointers, Buffer("int64", address, ints), scratch, begin, end)
