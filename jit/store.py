"""Compiled models in the cache: found by content, loaded without onnx and Numba."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.artifact import Artifact, Place, header, restore, write_constants
from onnxjit.codegen.fingerprint import content_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxjit.codegen.cache import Cache, StoredModel
    from onnxjit.codegen.target import Target

HEADER, CODE, CONSTANTS, KERNELS = "model.json", "code.bin", "constants.bin", "kernels.json"


def model_key(
    content: str,
    target: Target,
    overrides: Mapping[str, int] | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
) -> str:
    """32 hexadecimal digits that identify a compiled model: content, machine, options, code."""
    options = json.dumps([sorted((overrides or {}).items()), shapes])
    return content_key(
        [content.encode(), target.code_key.encode(), options.encode()], code_digest()
    )


@functools.cache
def code_digest() -> bytes:
    """A digest of all of onnxjit's code and of the versions of what it compiles with."""
    from importlib.metadata import version

    package = Path(__file__).parent
    digest = blake2b(digest_size=16)
    for folder in (package, *_folders()):
        for path in sorted(folder.glob("**/*.py")):
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(data)}\n".encode())
            digest.update(data)
    versions = [f"{name} {version(name)}" for name in ("numba", "llvmlite", "numpy", "onnx")]
    digest.update("\n".join([*versions, str(sys.version_info[:3])]).encode())
    return digest.digest()


def _folders() -> list[Path]:
    import onnxjit.codegen
    import onnxjit.runtime

    return [Path(p.__path__[0]) for p in (onnxjit.codegen, onnxjit.runtime)]


def load(cache: Cache, key: str) -> Artifact | None:
    """The compiled model under a key; None if there is none, or a damaged one."""
    found = cache.open_model(key)
    return None if found is None else _artifact(found)


def _artifact(stored: StoredModel) -> Artifact | None:
    try:
        return restore(stored[HEADER], stored[CODE], stored[CONSTANTS], stored[KERNELS])
    except (KeyError, ValueError, TypeError):
        return None


class Entry:
    """A compiled model on its way into the cache; leaving the `with` without `finish` drops it."""

    def __init__(self, cache: Cache) -> None:
        self._writer = cache.model_writer()
        self._stack = ExitStack()
        self._places: list[Place] = []

    def __enter__(self) -> Entry:
        self._stack.enter_context(self._writer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def constants(self, arrays: Iterator[np.ndarray]) -> None:
        """Write the plan's constants, which `arrays` may make as it goes."""
        with self._writer.open(CONSTANTS) as file:
            self._places = write_constants(file, arrays)

    def finish(self, artifact: Artifact, key: str) -> None:
        """Write all the rest, to be found under `key`."""
        self._writer.key = key
        self._writer.write(KERNELS, artifact.kernels)
        self._writer.write(CODE, artifact.objects)
        self._writer.write(HEADER, header(artifact, self._places))

    def open(self) -> Artifact:
        """The model as it was published: after the `with`."""
        assert self._writer.model is not None
        artifact = _artifact(self._writer.model)
        assert artifact is not None
        return artifact


def dump(artifact: Artifact) -> dict[str, Any]:
    """An artifact as bytes by name (its constants in one block)."""
    import io

    file = io.BytesIO()
    places = write_constants(file, iter(artifact.constants))
    return {
        HEADER: header(artifact, places),
        CODE: b"".join(artifact.objects),
        CONSTANTS: file.getvalue(),
        KERNELS: bytes(artifact.kernels),
    }


def undump(files: Mapping[str, Any]) -> Artifact:
    """The inverse of `dump`."""
    return restore(files[HEADER], files[CODE], files[CONSTANTS], files[KERNELS])
