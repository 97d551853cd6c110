"""Where a model came from: its content key, and reading it again for another specialisation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onnxjit.codegen.fingerprint import Stamp, bulk_key, stamp
from onnxjit.errors import ModelError

if TYPE_CHECKING:
    from onnxjit.proto import ModelSource


class Origin:
    """A model as the caller gave it: a path, bytes, a binary file object or a `ModelProto`.

    `folder` is where external data lies when there is no path.
    """

    def __init__(self, model: Any, folder: str | os.PathLike[str] | None = None) -> None:
        self.path: str | None = None
        self.folder = None if folder is None else os.path.abspath(folder)
        self._data: Any = None
        if isinstance(model, (str, os.PathLike)):
            self.path = os.path.abspath(os.fsdecode(model))
        elif isinstance(model, (bytes, bytearray, memoryview)):
            self._data = bytes(model)
        elif hasattr(model, "SerializeToString"):
            self._data = model
        elif hasattr(model, "read"):
            self._data = model.read()
            if not isinstance(self._data, bytes):
                raise TypeError("a model's file object must be binary")
        else:
            raise TypeError(
                "a model is a path, bytes, a binary file object or an onnx.ModelProto, not "
                f"{type(model).__name__}"
            )

    def stamps(self) -> tuple[Stamp, ...]:
        """The present stamp of the model file; none for a model without a path."""
        if self.path is None:
            return ()
        try:
            return stamp([self.path])
        except FileNotFoundError as error:
            raise ModelError(f"there is no file {self.path!r}") from error
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path!r} cannot be read: {error}") from error

    def own_key(self, seed: int) -> str | None:
        """A key of the model's content without external data, see `bulk_key`; None for a model of
        over 2 GiB that is not a file."""
        if self.path is not None:
            return bulk_key([self.path], seed)
        if isinstance(self._data, bytes):
            return bulk_key([self._data], seed)
        try:
            return bulk_key([self._data.SerializeToString(deterministic=True)], seed)
        except Exception:  # protobuf's limit has another exception in each of its versions
            return None

    def read(self) -> ModelSource:
        """The parsed model. Raises `ModelError`."""
        from onnxjit.proto import read_model

        return read_model(self.path if self.path is not None else self._data, self.folder)

    def kept(self, again: bool) -> Origin:
        """What a compiled model holds on to: a copy that later changes of a proto do not reach,
        or, unless it may be read `again`, nothing but the path."""
        made = Origin.__new__(Origin)
        made.path, made.folder, made._data = self.path, self.folder, None
        if again and self._data is not None:
            made.__setstate__(self.__getstate__())
        return made

    def __getstate__(self) -> tuple[Any, ...]:
        data = self._data
        if data is not None and not isinstance(data, bytes):
            data = data.SerializeToString(deterministic=True)
        return self.path, self.folder, data

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.folder, self._data = state


def external_files(source: ModelSource) -> list[str]:
    """Absolute paths of the files that hold tensors of a model, each once, in order of use."""
    tensors = list(_tensors(source.proto.graph))
    for function in source.proto.functions:
        for node in function.node:
            tensors += _of_node(node)
    found: dict[str, None] = {}
    for tensor in tensors:
        if tensor.data_location == 1:  # TensorProto.EXTERNAL
            location = next((e.value for e in tensor.external_data if e.key == "location"), "")
            found[str(source.locate(location, tensor.name))] = None
    return list(found)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _tensors(graph)
