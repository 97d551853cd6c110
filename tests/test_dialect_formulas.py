"""Formulas compute what Numba computes of the same operations one by one."""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba.core.errors import TypingError
from test_dialect import HEAD, Kernel, pointwise

from onnxjit.codegen import dialect, dialect_formulas

RNG = np.random.default_rng(3)


def both(source: str, monkeypatch: pytest.MonkeyPatch, symbols: dict[str, int] | None = None):
    """The kernel with formulas, of which there are some, and the kernel without."""
    scope = dialect.namespace(symbols or {})
    before = set(scope)
    dialect_formulas.compiled(source, "x", scope)
    assert set(scope) - before, "nothing became a formula"
    made = Kernel(source, symbols)
    with monkeypatch.context() as patch:
        patch.setattr(dialect_formulas, "FEWEST", 10**9)
        return made, Kernel(source, symbols)


def same(source: str, arrays: list, ints: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kernel in both(source, monkeypatch):
        copies = [a.copy() for a in arrays]
        kernel(copies, ints, 0, len(arrays[-1]))
        results.append(copies)
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "expression",
    [
        "x[i]*x[i] + x[i] - float32(1.5)",
        "x[i] + 1 + x[i]*2",
        "float32(-0.0) - x[i]*x[i]",
        "float32(0.0) - x[i]*x[i]",
        "select(x[i] < 0, x[i] / float32(3.0), -x[i] * float32(inf))",
        "float32(nan) if isnan(x[i] * x[i]) else x[i] ** 2 + 1",
        "max_(min_(x[i], float32(0.25)), -0.5) + sqrt(abs_(x[i]))",
        "x[i] if x[i] > 0 and not x[i] * 2 > 1 else x[i] * 3 + i % 7 // 2",
        "float32((i & 12 | 1) ^ (i << 2) >> 1) + float32(~i)",
        "float32(True) + x[i] * x[(i + 1) % 5]",
    ],
)
def test_floats(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.standard_normal(37).astype(np.float32)
    same(HEAD + pointwise(expression), [x, np.zeros_like(x)], [], monkeypatch)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64"])
def test_a_literal_adapts_to_its_neighbour(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.integers(0, 120, 37).astype(dtype)
    source = HEAD + pointwise("(x[i] + 100) * 3 // (2 + x[i]) - 1", dtype, dtype)
    same(source, [x, np.zeros_like(x)], [], monkeypatch)


def test_one_and_one_point_nought(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are equal for Python, and so are formulas with them in the same places."""
    for number in ("1", "1.0", "2", "2.0"):
        source = HEAD + pointwise(f"(x[i] + x[i]) // {number} * {number}", "int32", "float64")
        x = np.arange(-9, 9, dtype=np.int32)
        same(source, [x, np.zeros(18)], [], monkeypatch)


def test_names_of_the_source_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        HEAD
        + """
    exp = buffer_float32(ptrs, 0)
    y = buffer_float32(ptrs, 1)
    inf = float32(2.0)
    for i in range(begin, end):
        a, nan = exp[i] * inf + 1, i * 2 + 1
        t = a
        t *= inf * a + nan
        if nan * 2 > 9:
            t = exp[(i + 3) // 2] * inf - t
        y[(i + begin) * 1] = t
"""
    )
    x = RNG.standard_normal(37).astype(np.float32)
    same(source, [x, np.zeros_like(x)], [], monkeypatch)


def test_variables_made_between_operations_stay() -> None:
    source = HEAD + pointwise("(t := x[i] * 2) + t * t")
    scope = dialect.namespace()
    before = set(scope)
    dialect_formulas.compiled(source, "x", scope)
    assert set(scope) == before


def test_micro_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    words = ctypes.c_int64
    kinds = (ctypes.c_void_p, words, words, words, ctypes.c_void_p, words)

    @ctypes.CFUNCTYPE(None, *kinds)
    def pack(a, step, rows, depth, out, columns):
        seen.append((a, step, rows, depth, out, columns))

    address = ctypes.cast(pack, ctypes.c_void_p).value
    assert address is not None
    llvm.add_symbol("pack_f32_8_scalar", address)
    source = (
        HEAD
        + """
    b0 = buffer_float32(ptrs, 0)
    b1 = buffer_float32(ptrs, 1)
    n0 = ints[0]
    for i in range(begin, end):
        pack_f32_8_scalar(b0, i*n0 + 3, n0 - 1, min_(4, n0), 2, b1, i*8, 5)
"""
    )
    arrays = [np.zeros(100, np.float32), np.zeros(100, np.float32)]
    for kernel in both(source, monkeypatch, {"pack_f32_8_scalar": address}):
        kernel(arrays, [6], 1, 3)
    a, b = (x.ctypes.data for x in arrays)
    want = [(a + 4 * (6 * i + 3), 5, 4, 2, b + 32 * i, 5) for i in (1, 2)]
    assert seen == want * 2


def test_errors_name_the_operation_and_the_line() -> None:
    with pytest.raises(TypingError, match=r"dialect has no add\(float32, onnxjit.Buffer") as caught:
        dialect.compile_ir(HEAD + pointwise("x[i] + x + 1"), filename="<mine>")
    assert "<mine>" in str(caught.value)
