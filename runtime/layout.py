"""Where CPython and NumPy keep the fields that the native executor reads, probed once at import.

The executor then checks and reads array arguments itself, instead of some 2 us of Python per array.
Nothing is assumed: each offset is confirmed on live objects of different shapes and types, and
where a probe fails (another Python, a free-threaded build, a changed struct) `LAYOUT` is None and
the slower Python path serves.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import numpy as np

from onnxjit.runtime.executor_source import ARRAY_DATA
from onnxjit.runtime.executor_source import LAYOUT as FIELDS

# NumPy's public flag bits (ndarraytypes.h): C-contiguous, and aligned to the element.
_C_CONTIGUOUS, _ALIGNED = 0x0001, 0x0100
# Functions of the stable ABI.
_FUNCTIONS = {
    "SAVE_THREAD": "PyEval_SaveThread",
    "RESTORE_THREAD": "PyEval_RestoreThread",
    "INCREF": "Py_IncRef",
}
_METH_FASTCALL = 0x0080
_WORD = ctypes.sizeof(ctypes.c_void_p)


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _half(address: int) -> int:
    return ctypes.c_int32.from_address(address).value


def _samples() -> list[np.ndarray]:
    block = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    return [
        block,
        np.zeros(7, np.int8),
        np.zeros((2, 0), np.float64),
        np.array(5, np.int64),
        block[:, ::2],
        block.T,
        block.reshape(-1).view(np.uint8)[1:9].view(np.float32),
    ]


def probe() -> dict[str, int] | None:
    """Byte offsets by field name (see `executor_source.LAYOUT`), or None if they cannot be told."""
    if sys.implementation.name != "cpython" or _WORD != 8 or sys.byteorder != "little":
        return None
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    head = object.__basicsize__
    if head != ARRAY_DATA:
        return None
    items = (object(), object(), object())
    found = {
        "TUPLE_SIZE": head,
        "TUPLE_ITEMS": tuple.__basicsize__,
        "LIST_ITEMS": head + 8,
        "OBJECT_TYPE": head - 8,
        "ARRAY_TYPE": id(np.ndarray),
        "ARRAY_RANK": head + 8,
        "ARRAY_SHAPE": head + 16,
        "ARRAY_DTYPE": head + 40,
        "ARRAY_FLAGS": head + 48,
        "FLAGS_NEEDED": _C_CONTIGUOUS | _ALIGNED,
    }
    end = np.ndarray.__basicsize__
    if end < found["ARRAY_FLAGS"] + 4 or tuple.__basicsize__ < head + 8:
        return None
    if _word(id(items) + found["TUPLE_SIZE"]) != len(items):
        return None
    if [_word(id(items) + found["TUPLE_ITEMS"] + 8 * i) for i in range(3)] != [*map(id, items)]:
        return None
    sequence = list(items)
    if list.__basicsize__ < head + 16:
        return None
    # ob_item is only followed when it can be recognised as an address inside the process.
    if _word(id(sequence) + head) != len(sequence):
        return None
    start = _word(id(sequence) + found["LIST_ITEMS"])
    if start <= 4096 or [_word(start + 8 * i) for i in range(3)] != [*map(id, sequence)]:
        return None
    if not all(_agrees(found, array) for array in _samples()):
        return None
    for name, symbol in _FUNCTIONS.items():
        function = getattr(ctypes.pythonapi, symbol)
        found[name] = ctypes.cast(function, ctypes.c_void_p).value or 0
    return found | {"TRUE": id(True), "FALSE": id(False)}


def _agrees(found: dict[str, int], array: np.ndarray) -> bool:
    at = id(array)
    if _word(at + found["OBJECT_TYPE"]) != id(np.ndarray):
        return False
    if _word(at + ARRAY_DATA) != array.ctypes.data:
        return False
    if _half(at + found["ARRAY_RANK"]) != array.ndim:
        return False
    if _word(at + found["ARRAY_DTYPE"]) != id(array.dtype):
        return False
    flags = _half(at + found["ARRAY_FLAGS"])
    if bool(flags & _C_CONTIGUOUS) != array.flags.c_contiguous:
        return False
    if bool(flags & _ALIGNED) != array.flags.aligned:
        return False
    shape = _word(at + found["ARRAY_SHAPE"])
    return all(_word(shape + 8 * i) == size for i, size in enumerate(array.shape))


def _table() -> np.ndarray | None:
    found = probe()
    if found is None:
        return None
    table = np.zeros(len(FIELDS), np.int64)
    for name, offset in FIELDS.items():
        table[offset // 8] = found[name]
    return table


TABLE = _table()


class _MethodDef(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@cache
def _method(address: int) -> _MethodDef:
    # A builtin points at its definition for as long as it lives: these are never freed.
    return _MethodDef(b"run", address, _METH_FASTCALL, None)


def builtin(address: int, bound: object) -> Callable[..., bool]:
    """A Python builtin over native code at `address`, called as `f(bound, arguments*, count)`.

    A call costs a tenth of one through ctypes. The code must outlive the function.
    """
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype = ctypes.py_object
    make.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return make(ctypes.byref(_method(address)), bound, None)
