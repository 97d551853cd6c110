"""A compiled model as plain data: what the cache stores, what a pickle holds, what is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from onnxjit.runtime.plan import Plan, dtype_of
from onnxjit.runtime.threads import aligned

if TYPE_CHECKING:
    from onnxjit.codegen.packing import Packed

FORMAT = 1
ALIGNMENT = 64

Blob = bytes | memoryview


class TensorInfo(NamedTuple):
    """An input or output: dtype is NumPy's name, `shape` has an int, the model's name of a free
    dimension, or None for one without a name."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Artifact(NamedTuple):
    """Everything that running and explaining a compiled model takes.

    `objects` are object files (the executor's among them) and `constants` the plan's constant
    arrays. `kernels` is the JSON text that `kernels.kernels_of` reads. `target` is the
    `Target.code_key` that the objects were made for.
    """

    plan: Plan
    objects: tuple[bytes, ...]
    constants: tuple[np.ndarray, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: Mapping[str, Any]
    kernels: Blob
    target: str
    specialised: tuple[tuple[int, ...], ...] | None = None
    notes: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a constant lies in the blob; strings are listed instead of stored there."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    strings: tuple[str, ...] | None = None


def write_constants(file: BinaryIO, arrays: Iterable[np.ndarray | Packed]) -> list[Place]:
    """Write arrays one after the other, each aligned; a packed one is made piece by piece."""
    places = []
    at = 0
    for array in arrays:
        if isinstance(array, np.ndarray) and array.dtype == object:
            places.append(Place(at, "string", array.shape, tuple(map(str, array.ravel()))))
            continue
        gap = -at % ALIGNMENT
        places.append(Place(at + gap, array.dtype.name, array.shape))
        file.write(bytes(gap))
        pieces = (array,) if isinstance(array, np.ndarray) else array.pieces()
        for piece in pieces if array.nbytes else ():
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        at += gap + array.nbytes
    return places


def views(blob: Blob, places: Iterable[Place]) -> tuple[np.ndarray, ...]:
    """The constants in a blob, as read-only arrays over its memory where that is aligned."""
    whole = np.frombuffer(blob, np.uint8) if len(blob) else np.zeros(0, np.uint8)
    if whole.ctypes.data % ALIGNMENT:
        copy = aligned(len(whole), ALIGNMENT)
        copy[:] = whole
        whole = copy
        whole.flags.writeable = False
    made = []
    for p in places:
        if p.strings is not None:
            array = np.empty(len(p.strings), dtype=object)
            array[:] = p.strings
            made.append(array.reshape(p.shape))
            continue
        dtype = dtype_of(p.dtype)
        count = int(np.prod(p.shape, dtype=np.int64))
        part = whole[p.offset : p.offset + count * dtype.itemsize]
        made.append(part.view(dtype).reshape(p.shape))
    return tuple(made)


def header(artifact: Artifact, places: Sequence[Place]) -> bytes:
    """All of an artifact but its blobs, as JSON."""
    return json.dumps(
        {
            "format": FORMAT,
            "plan": artifact.plan.to_json(),
            "objects": [len(image) for image in artifact.objects],
            "constants": [[p.offset, p.dtype, p.shape, p.strings] for p in places],
            "inputs": artifact.inputs,
            "outputs": artifact.outputs,
            "metadata": artifact.metadata,
            "target": artifact.target,
            "specialised": artifact.specialised,
            "notes": artifact.notes,
        },
        separators=(",", ":"),
    ).encode()


def restore(text: Blob, code: Blob, constants: Blob, kernels: Blob) -> Artifact:
    """The inverse of `header` and its blobs. ValueError for another format."""
    data = json.loads(bytes(text))
    if data.get("format") != FORMAT:
        raise ValueError("not a compiled model of this version")
    view, at, objects = memoryview(code), 0, []
    for size in data["objects"]:
        objects.append(bytes(view[at : at + size]))
        at += size
    places = [Place(o, d, tuple(s), t) for o, d, s, t in data["constants"]]
    shapes = data["specialised"]
    return Artifact(
        Plan.from_json(data["plan"]),
        tuple(objects),
        views(constants, places),
        _infos(data["inputs"]),
        _infos(data["outputs"]),
        data["metadata"],
        kernels,
        data["target"],
        None if shapes is None else tuple(map(tuple, shapes)),
        tuple(data["notes"]),
    )


def _infos(rows: Sequence[Sequence[Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, dtype, tuple(shape)) for name, dtype, shape in rows)
