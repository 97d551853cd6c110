"""The transforms of minimal filtering F(m x m, 3 x 3), whose patches have a = m + 2 lines.

    winograd_in_f32_{m}_{isa}

    void f(const float* near, const float* far, int64 step, int64 apart,
           float* dst, int64 dstep, int64 dapart, int64 n, int64 count)
    dst[l*dapart + i*dstep + c] = sum(j < a) Bᵀ[i, j] * line(l, j)[c]    for l < count, i < a, c < n

one direction of `count` times a lines of n channels: line(l, j) is near + l*apart + j*step for
j < 2, and far + l*apart + (j - 2)*step for the m others.

    winograd_out_f32_{m}_{isa}

    void f(const float* src, float* dst, int64 dstep, int64 n)
    dst[i*dstep + o*n + c] = (Aᵀ y[c] A)[i, o]                             for i, o < m, c < n

both directions of a tile, whose elements y[c][i, j] are at src[(i*a + j)*n + c].

Vectors run along channels; those left over are single. Nothing outside the elements named is
touched, and no alignment but that of the elements is needed. The straight-line forms of Bᵀ and Aᵀ
are those of `minimal_filtering`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir

from onnxjit.codegen.ir_loops import counted
from onnxjit.codegen.minimal_filtering import Algorithm

_F32 = ir.FloatType()
_I64 = ir.IntType(64)
_PTR = ir.PointerType()

_ARGUMENTS = {
    "in": [_PTR, _PTR, _I64, _I64, _PTR, _I64, _I64, _I64, _I64],
    "out": [_PTR, _PTR, _I64, _I64],
}


def module(name: str, direction: str, algorithm: Algorithm, lanes: int) -> ir.Module:
    """A module that defines exactly `name`, the transform of inputs ("in") or outputs ("out")."""
    result = ir.Module(name=name)
    function = ir.Function(result, ir.FunctionType(ir.VoidType(), _ARGUMENTS[direction]), name)
    function.attributes.add("nounwind")
    build = ir.IRBuilder(function.append_basic_block("entry"))
    emit = _inputs if direction == "in" else _outputs
    emit(build, algorithm, lanes, function.args)
    build.ret_void()
    return result


def _channels(
    build: ir.IRBuilder, n: Any, lanes: int, body: Callable[[ir.Type, Any], None]
) -> None:
    """Loops over n channels; `body` emits the transform of as many as its type has."""

    def emit(kind: ir.Type, c: Any, _: list[Any]) -> list[Any]:
        body(kind, c)
        return []

    whole = build.and_(n, ir.Constant(_I64, -lanes))
    vector = ir.VectorType(_F32, lanes) if lanes > 1 else _F32
    counted(build, ir.Constant(_I64, 0), whole, lanes, [], partial(emit, vector))
    counted(build, whole, n, 1, [], partial(emit, _F32))


def _inputs(build: ir.IRBuilder, algorithm: Algorithm, lanes: int, args: Sequence[Any]) -> None:
    near, far, step, apart, dst, dstep, dapart, n, count = args
    m, a = algorithm.m, algorithm.a

    def line(_: Any, pointers: list[Any]) -> list[Any]:
        near, far, dst = pointers
        lines = [_at(build, near, step, j) for j in range(a - m)]
        lines += [_at(build, far, step, j) for j in range(m)]
        results = [_at(build, dst, dstep, i) for i in range(a)]

        def body(kind: ir.Type, c: Any) -> None:
            values = [_load(build, kind, line, c) for line in lines]
            for result, value in zip(results, algorithm.inputs(values), strict=True):
                build.store(value.ir, _element(build, result, c), align=4)

        _channels(build, n, lanes, body)
        return [_element(build, p, by) for p, by in ((near, apart), (far, apart), (dst, dapart))]

    counted(build, ir.Constant(_I64, 0), count, 1, [near, far, dst], line)


def _outputs(build: ir.IRBuilder, algorithm: Algorithm, lanes: int, args: Sequence[Any]) -> None:
    src, dst, dstep, n = args
    m, a = algorithm.m, algorithm.a
    elements = [[_at(build, src, n, i * a + j) for j in range(a)] for i in range(a)]
    results = [[_at(build, _at(build, dst, dstep, i), n, o) for o in range(m)] for i in range(m)]

    def body(kind: ir.Type, c: Any) -> None:
        columns = [
            algorithm.outputs([_load(build, kind, elements[i][j], c) for i in range(a)])
            for j in range(a)
        ]
        for i in range(m):
            values = algorithm.outputs([columns[j][i] for j in range(a)])
            for result, value in zip(results[i], values, strict=True):
                build.store(value.ir, _element(build, result, c), align=4)

    _channels(build, n, lanes, body)


class _Value:
    """A value of a straight-line form: what is done with it is emitted."""

    __slots__ = ("build", "ir")

    def __init__(self, build: ir.IRBuilder, value: Any) -> None:
        self.build, self.ir = build, value

    def __add__(self, other: _Value) -> _Value:
        return _Value(self.build, self.build.fadd(self.ir, other.ir, flags=("contract",)))

    def __sub__(self, other: _Value) -> _Value:
        return _Value(self.build, self.build.fsub(self.ir, other.ir, flags=("contract",)))

    def __rmul__(self, factor: float) -> _Value:
        kind = self.ir.type
        splat = [factor] * kind.count if isinstance(kind, ir.VectorType) else factor
        constant = ir.Constant(kind, splat)
        return _Value(self.build, self.build.fmul(constant, self.ir, flags=("contract",)))


def _load(build: ir.IRBuilder, kind: ir.Type, line: Any, c: Any) -> _Value:
    return _Value(build, build.load(_element(build, line, c), align=4, typ=kind))


def _at(build: ir.IRBuilder, pointer: Any, step: Any, times: int) -> Any:
    return _element(build, pointer, build.mul(step, ir.Constant(_I64, times)))


def _element(build: ir.IRBuilder, pointer: Any, index: Any) -> Any:
    return build.gep(pointer, [index], source_etype=_F32)


__all__ = ["module"]
