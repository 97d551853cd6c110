"""Types of the session interface: enumerations, descriptions of values, `OrtValue`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from onnxjit.runtime.plan import dtype_of

__all__ = [
    "ExecutionMode", "ExecutionOrder", "GraphOptimizationLevel", "ModelMetadata", "NodeArg",
    "OrtAllocatorType", "OrtMemType", "OrtValue", "type_text",
]  # fmt: skip


class ExecutionMode(IntEnum):
    """Whether independent nodes may run at the same time. Kernels use all threads either way."""

    ORT_SEQUENTIAL = 0
    ORT_PARALLEL = 1


class ExecutionOrder(IntEnum):
    """The order of the nodes of a graph."""

    DEFAULT = 0
    PRIORITY_BASED = 1
    MEMORY_EFFICIENT = 2


class GraphOptimizationLevel(IntEnum):
    """How much a graph is rewritten. Compilation is the same at every level."""

    ORT_DISABLE_ALL = 0
    ORT_ENABLE_BASIC = 1
    ORT_ENABLE_EXTENDED = 2
    ORT_ENABLE_LAYOUT = 3
    ORT_ENABLE_ALL = 99


class OrtAllocatorType(IntEnum):
    """Kinds of allocators."""

    INVALID = -1
    ORT_DEVICE_ALLOCATOR = 0
    ORT_ARENA_ALLOCATOR = 1


class OrtMemType(IntEnum):
    """What memory is for."""

    CPU_INPUT = -2
    CPU_OUTPUT = -1
    DEFAULT = 0
    CPU = -1


@dataclass(frozen=True, slots=True)
class NodeArg:
    """An input or output: `type` is text such as "tensor(float)"; `shape` has an int, a name, or
    None for each axis, and is empty when the rank is unknown."""

    name: str
    type: str
    shape: list[int | str | None]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What the model file says of itself."""

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 2**63 - 1
    custom_metadata_map: Mapping[str, str] = field(default_factory=dict)


_TYPES = {
    "float32": "float",
    "float64": "double",
    "float8_e4m3fn": "float8e4m3fn",
    "float8_e4m3fnuz": "float8e4m3fnuz",
    "float8_e5m2": "float8e5m2",
    "float8_e5m2fnuz": "float8e5m2fnuz",
    "float8_e8m0fnu": "float8e8m0",
    "float4_e2m1fn": "float4e2m1",
}


def type_text(dtype: str) -> str:
    """onnxruntime's text for a type: "tensor(float)" for float32, "seq(tensor(int64))", ..."""
    outer, paren, inner = dtype.partition("(")
    inner = inner.removesuffix(")")
    if not paren:
        return f"tensor({_TYPES.get(dtype, dtype)})"
    if outer == "sequence":
        return f"seq({type_text(inner)})"
    if outer == "map":
        key, _, value = inner.partition(",")
        return f"map({_TYPES.get(key, key)},{type_text(value)})"
    if outer == "sparse":
        return f"sparse_{type_text(inner)}"
    return f"{outer}({type_text(inner)})"


class OrtValue:
    """A tensor, or a sequence of tensors, in the memory of this machine."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @classmethod
    def ortvalue_from_numpy(
        cls, numpy_obj: np.ndarray, /, device_type: str = "cpu", device_id: int = 0,
        vendor_id: int = -1,
    ) -> OrtValue:  # fmt: skip
        """A value over the array's own memory. ValueError for a device other than the CPU."""
        _only_cpu(device_type)
        return cls(np.asarray(numpy_obj))

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: Sequence[int], element_type: Any, device_type: str = "cpu", device_id: int = 0,
        vendor_id: int = -1, memory_info: Any = None,
    ) -> OrtValue:  # fmt: skip
        """A value with memory of its own; `element_type` is a NumPy type or ONNX's number of it."""
        _only_cpu(device_type)
        if isinstance(element_type, int):
            from onnxjit.tensors import array_dtype, dtype_name

            element_type = array_dtype(dtype_name(element_type))
        return cls(np.zeros(tuple(shape), element_type))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.numpy().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def numpy(self) -> np.ndarray:
        """The tensor as an array. ValueError for a sequence or an empty optional."""
        if not isinstance(self._value, np.ndarray):
            raise ValueError("only a tensor has a NumPy array")
        return self._value

    def shape(self) -> list[int]:
        return list(self.numpy().shape)

    def data_type(self) -> str:
        """Text such as "tensor(float)"."""
        if isinstance(self._value, list):
            first = OrtValue(self._value[0]).data_type() if self._value else "tensor(float)"
            return f"seq({first})"
        return type_text(array_dtype_text(self.numpy()))

    def element_type(self) -> int:
        """ONNX's number of the element type."""
        from onnxjit.tensors import dtype_code

        return dtype_code(array_dtype_text(self.numpy()))

    def device_name(self) -> str:
        return "cpu"

    def data_ptr(self) -> int:
        return int(self.numpy().ctypes.data)

    def tensor_size_in_bytes(self) -> int:
        return int(self.numpy().nbytes)

    def has_value(self) -> bool:
        return self._value is not None

    def is_tensor(self) -> bool:
        return isinstance(self._value, np.ndarray)

    def is_sparse_tensor(self) -> bool:
        return False

    def is_tensor_sequence(self) -> bool:
        return isinstance(self._value, list)

    def update_inplace(self, data: np.ndarray) -> None:
        """Overwrites the tensor with an array of the same shape and type."""
        mine = self.numpy()
        if data.shape != mine.shape or data.dtype != mine.dtype:
            raise ValueError(f"{data.dtype}{data.shape} does not fit {mine.dtype}{mine.shape}")
        mine[...] = data


def array_dtype_text(array: np.ndarray) -> str:
    """The dtype name of an array, "string" for text."""
    return "string" if array.dtype.kind in "OSUT" else array.dtype.name


def same_type(array: np.ndarray, dtype: str) -> bool:
    """Whether an array may be given for an input of the dtype called `dtype`."""
    return array_dtype_text(array) == dtype or (
        dtype != "string" and array.dtype.newbyteorder("=") == dtype_of(dtype)
    )


def _only_cpu(device_type: str) -> None:
    if device_type.lower() != "cpu":
        raise ValueError(f"values live on the CPU only, not on {device_type!r}")
