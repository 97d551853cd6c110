"""Reads ONNX models from files, bytes and protos, and the bytes of their tensors.

Only this module touches the file system for a model. External tensor data may lie in the model's
folder and below, nowhere else.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ModelError, NotAModelError
from .proto_fields import require_text
from .tensors import decode_fields, decode_raw, dtype_name, raw_size, tensor_shape
from .wire import Tickets, strip_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, SparseTensorProto, TensorProto

_EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL


class ModelSource:
    """A parsed ModelProto and the means to read its tensors.

    Arrays come back read-only and C-contiguous, and aligned if they are below `tensors.LARGE`. They
    view the model file or the external data file where they can, so a file must not change while
    its graph is in use.
    """

    def __init__(self, proto: ModelProto, tickets: Tickets, label: str, folders: tuple[Path, ...]):
        self.proto = proto
        self.label = label
        self._tickets = tickets
        self._folders = folders
        self._files: dict[Path, np.ndarray] = {}
        self.maps: list[Any] = []  # the buffers of files that arrays may view

    def release_pages(self) -> None:
        """Hand the memory of mapped files back to the system; they are read again when needed."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        for data in self.maps:
            if advice is not None and isinstance(data, mmap.mmap):
                data.madvise(advice)

    def array(self, tensor: TensorProto, name: str = "") -> np.ndarray:
        """The values of `tensor`; `name` is what messages call it.

        Sub-byte types are unpacked to one byte an element (`ml_dtypes`); strings are an object
        array of `str`. Raises ModelError when the data does not fit the declared type and shape.
        """
        name = name or tensor.name
        if tensor.HasField("segment"):
            raise ModelError(f"tensor {name!r} is stored in segments, which ONNX does not define")
        dtype = dtype_name(tensor.data_type)
        if not dtype:
            raise ModelError(f"tensor {name!r} has the unknown element type {tensor.data_type}")
        shape = tensor_shape(tensor.dims, name)
        if tensor.data_location == _EXTERNAL:
            array = decode_raw(self._external(tensor, dtype, shape, name), dtype, shape, name)
        elif tensor.HasField("raw_data") and dtype != "string":
            data = self._tickets.redeem(tensor.raw_data)
            array = decode_raw(np.frombuffer(data, np.uint8), dtype, shape, name)
        else:
            array = decode_fields(tensor, dtype, shape, name)
        array.flags.writeable = False
        return array

    def dense(self, sparse: SparseTensorProto, name: str) -> np.ndarray:
        """The dense form of a sparse tensor (indices linear, or one coordinate row each)."""
        values = self.array(sparse.values, name)
        indices = self.array(sparse.indices, name)
        shape = tensor_shape(sparse.dims, name)
        try:
            if indices.dtype != np.int64 or values.ndim != 1:
                raise ValueError("values must be a vector and indices int64")
            if indices.ndim == 2:
                if indices.shape[1] != len(shape):
                    raise ValueError("the indices have another rank than the tensor")
                indices = np.ravel_multi_index(tuple(indices.T), shape)
            if indices.shape != values.shape:
                raise ValueError("there are more values than indices, or fewer")
            if indices.size and (indices.min() < 0 or indices.max() >= np.prod(shape)):
                raise ValueError("an index is out of range")
            array = np.zeros(shape, values.dtype)
            array.reshape(-1)[indices] = values
        except (ValueError, IndexError, MemoryError) as error:
            raise ModelError(f"sparse tensor {name!r} is malformed: {error}") from error
        array.flags.writeable = False
        return array

    def _external(
        self, tensor: TensorProto, dtype: str, shape: tuple[int, ...], name: str
    ) -> np.ndarray:
        """The bytes of a tensor that is stored in another file, as a view of that file."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        require_text(*entries, *entries.values())
        if dtype == "string":
            raise ModelError(f"tensor {name!r}: strings cannot be external data")
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries["length"]) if "length" in entries else raw_size(dtype, shape)
        except ValueError as error:
            raise ModelError(f"external data of tensor {name!r}: {error}") from error
        data = self._file(entries.get("location", ""), name)
        if offset < 0 or length < 0 or offset + length > data.size:
            raise ModelError(
                f"external data of tensor {name!r} is truncated: {entries['location']!r} has "
                f"{data.size} bytes, bytes {offset} to {offset + length} are needed"
            )
        return data[offset : offset + length]

    def locate(self, location: str, name: str) -> Path:
        """The file that holds external data of tensor `name`. Raises ModelError if it may not."""
        if not self._folders:
            raise ModelError(
                f"tensor {name!r} is external data in {location!r}, but the model was not given as "
                f"a path, so the folder is unknown"
            )
        if not location or "\0" in location:
            raise ModelError(f"tensor {name!r} has no valid external data location")
        try:
            path = (self._folders[0] / location).resolve()
            if not any(path.is_relative_to(folder.resolve()) for folder in self._folders):
                raise ModelError(
                    f"external data {location!r} of tensor {name!r} lies outside the model's folder"
                )
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"external data {location!r} of tensor {name!r} cannot be read: {error}"
            ) from error
        return path

    def _file(self, location: str, name: str) -> np.ndarray:
        path = self.locate(location, name)
        try:
            if path not in self._files:
                self.maps.append(_map(path))
                self._files[path] = np.frombuffer(self.maps[-1], np.uint8)
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"external data {location!r} of tensor {name!r} cannot be read: {error}"
            ) from error
        return self._files[path]


def read_model(model: Any, folder: str | os.PathLike[str] | None = None) -> ModelSource:
    """Read a model from a path, bytes, a binary file object, or an `onnx.ModelProto`.

    `folder` is where external data is looked for; a path has its own folder as default. When the
    path is a symbolic link, as in download caches, the folder of its target counts too.
    Raises ModelError when there is no readable ONNX model.
    """
    from onnx import ModelProto

    folders: tuple[Path, ...] = (Path(folder),) if folder is not None else ()
    if isinstance(model, ModelProto):
        return ModelSource(model, Tickets(), "the ModelProto", folders)
    if isinstance(model, (str, os.PathLike)):
        path = Path(os.fsdecode(model))
        label = repr(str(path))
        try:
            data: Any = _map(path)
            folders = folders or (path.parent, path.resolve().parent)
        except FileNotFoundError as error:
            raise ModelError(f"there is no file {label}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{label} cannot be read: {error}") from error
    else:
        label = "the given data"
        data = model.read() if hasattr(model, "read") else model
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(
                "a model is a path, bytes, a binary file object or an onnx.ModelProto, not "
                f"{type(model).__name__}"
            )
        data = bytes(data)
    source = ModelSource(*_parse(data, label), label, folders)
    source.maps.append(data)
    return source


def _parse(data: Any, label: str) -> tuple[ModelProto, Tickets]:
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    if not len(data):
        raise NotAModelError(f"{label} is not an ONNX model: it is empty")
    small, tickets = strip_tensors(data)
    proto = ModelProto()
    try:
        proto.ParseFromString(bytes(small))
    except (DecodeError, ValueError, RuntimeError, MemoryError) as error:
        raise NotAModelError(f"{label} is not an ONNX model: {error}") from error
    if not proto.HasField("graph"):
        raise ModelError(f"{label} is not an ONNX model: it has no graph")
    return proto, tickets


def _map(path: Path) -> Any:
    """The content of a regular file as a read-only buffer, mapped into memory."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could wait forever
        raise OSError("it is not a regular file")
    with io.FileIO(path, "r") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
