"""Element types of ONNX and the decoding of `TensorProto` contents into NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from .errors import ModelError

if TYPE_CHECKING:
    from onnx import TensorProto

# TensorProto.DataType -> our dtype name. "string" is the only one that is not a NumPy dtype name.
_NAMES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1fn",
    24: "float8_e8m0fnu",
    25: "uint2",
    26: "int2",
    27: "float6_e2m3fn",
    28: "float6_e3m2fn",
}
_CODES = {name: code for code, name in _NAMES.items()}
_PACKED_BITS = {
    "uint4": 4,
    "int4": 4,
    "float4_e2m1fn": 4,
    "uint2": 2,
    "int2": 2,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
}
_FIELDS = {
    "float32": "float_data",
    "complex64": "float_data",
    "float64": "double_data",
    "complex128": "double_data",
    "int64": "int64_data",
    "uint32": "uint64_data",
    "uint64": "uint64_data",
}


def dtype_name(code: int) -> str:
    """The dtype name of a TensorProto.DataType; "" when there is none."""
    return _NAMES.get(code, "")


def dtype_code(name: str) -> int:
    """The TensorProto.DataType of a dtype name; 0 (undefined) when there is none."""
    return _CODES.get(name, 0)


def array_dtype(name: str) -> np.dtype:
    """The dtype of arrays that hold elements of the dtype called `name` (object for "string")."""
    if name == "string":
        return np.dtype(object)
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def array_dtype_name(array: np.ndarray) -> str:
    """The dtype name of an array; the inverse of `array_dtype`."""
    return "string" if array.dtype.kind in "OUS" else array.dtype.name


def tensor_shape(dims: Iterable[int], name: str) -> tuple[int, ...]:
    """The shape `dims` of tensor `name`; ModelError when it has a negative dimension."""
    shape = tuple(dims)
    if any(dim < 0 for dim in shape):
        raise ModelError(f"tensor {name!r} has the impossible shape {shape}")
    return shape


LARGE = 1 << 20
"""Bytes from which an array may be an unaligned view of the file it is in."""


def raw_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in `raw_data`."""
    count = math.prod(shape)
    if dtype in _PACKED_BITS:
        return -(-count * _PACKED_BITS[dtype] // 8)
    return count * array_dtype(dtype).itemsize


def decode_raw(data: np.ndarray, dtype: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The tensor whose little-endian bytes are the uint8 vector `data`.

    A view if it is aligned, or `LARGE`: large tensors are copied only once, when they are packed.
    """
    if data.size != raw_size(dtype, shape):
        raise ModelError(
            f"tensor {name!r} of type {dtype}{list(shape)} takes {raw_size(dtype, shape)} bytes, "
            f"but has {data.size}"
        )
    return _from_bytes(data, dtype, shape)


def decode_fields(tensor: TensorProto, dtype: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The tensor whose elements are in the typed field that belongs to its dtype."""
    if dtype == "string":
        strings = [item.decode("utf-8", "surrogateescape") for item in tensor.string_data]
        _expect(len(strings), math.prod(shape), dtype, shape, name)
        array = np.empty(len(strings), object)
        array[:] = strings
        return array.reshape(shape)
    field = _FIELDS.get(dtype, "int32_data")
    data = np.array(getattr(tensor, field))
    count = math.prod(shape)
    if dtype in _PACKED_BITS and _PACKED_BITS[dtype] != 6:
        packed = data.astype(np.int32).astype(np.uint8)
        _expect(packed.size, raw_size(dtype, shape), dtype, shape, name)
        return _from_bytes(packed, dtype, shape)
    if dtype.startswith("complex"):
        _expect(data.size, 2 * count, dtype, shape, name)
        real = np.float32 if dtype == "complex64" else np.float64
        return data.astype(real).view(dtype).reshape(shape)
    _expect(data.size, count, dtype, shape, name)
    target = array_dtype(dtype)
    if field == "int32_data" and target.kind not in "iub":
        # Floats of one or two bytes are stored as bit patterns.
        bits = data.astype(np.int32).astype(f"u{target.itemsize}")
        return bits.view(target).reshape(shape)
    return data.astype(target).reshape(shape)


def _from_bytes(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    target = array_dtype(dtype)
    if dtype in _PACKED_BITS:
        return _unpack(data, _PACKED_BITS[dtype], math.prod(shape)).view(target).reshape(shape)
    if dtype == "bool":
        # A bool array may hold no other byte than 0 and 1.
        return (data != 0).reshape(shape)
    array = data.view(target).reshape(shape)
    if array.flags.aligned or array.nbytes >= LARGE:
        return array
    aligned = np.empty(shape, target)
    aligned.reshape(-1).view(np.uint8)[:] = data  # as bytes: NumPy copies those at full speed
    return aligned


def _unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Elements of `bits` bits, least significant bits first, as one uint8 each."""
    if bits == 4:
        both = np.empty((data.size, 2), np.uint8)
        np.bitwise_and(data, 15, out=both[:, 0])
        np.right_shift(data, 4, out=both[:, 1])
        return both.reshape(-1)[:count]
    digits = np.unpackbits(data, bitorder="little", count=count * bits).reshape(count, bits)
    return np.packbits(digits, axis=1, bitorder="little").reshape(count)


def _expect(found: int, wanted: int, dtype: str, shape: tuple[int, ...], name: str) -> None:
    if found != wanted:
        raise ModelError(
            f"tensor {name!r} of type {dtype}{list(shape)} takes {wanted} entries, but has {found}"
        )
