"""Compiled models in the cache: found by content, loaded without onnx and Numba."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.artifact import Artifact, Place, header, restore, write_constants
from onnxjit.codegen.fingerprint import content_key, stamp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from onnxjit.codegen.cache import Cache, StoredModel
    from onnxjit.codegen.packing import Packed
    from onnxjit.codegen.target import Target

HEADER, CODE, CONSTANTS, KERNELS = "model.json", "code.bin", "constants.bin", "kernels.json"


def model_key(
    content: str,
    target: Target,
    overrides: Mapping[str, int] | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    cache: Cache | None = None,
) -> str:
    """32 hexadecimal digits that identify a compiled model: content, machine, options, code.

    `cache` may know the digest of the code already.
    """
    options = json.dumps([sorted((overrides or {}).items()), shapes])
    parts = [content.encode(), target.code_key.encode(), options.encode()]
    return content_key(parts, code_key(cache).encode())


def code_key(cache: Cache | None = None) -> str:
    """The content key of onnxjit's code and of the versions of what it compiles with.

    Reading all of that takes a third of a warm start, so a cache notes the key beside the stamps of
    the files; a dependency is known by the stamp of its first module.
    """
    global _code_key
    if not _code_key:
        versions = str(sys.version_info[:3]).encode()
        known = cache.known_key(__file__, versions) if cache is not None else None
        if known is None:
            files = sorted({path for folder in _folders() for path in folder.glob("**/*.py")})
            stamps = stamp([*files, *_dependencies()])
            names = " ".join(path.name for path in files)
            known = content_key([*files, names.encode(), _versions().encode()], versions)
            if cache is not None:
                cache.remember_key(__file__, stamps, known, versions)
        _code_key = known
    return _code_key


_code_key = ""


def _folders() -> list[Path]:
    from pathlib import Path

    import onnxjit.codegen
    import onnxjit.runtime

    found = Path(__file__).parent, onnxjit.codegen.__path__[0], onnxjit.runtime.__path__[0]
    return [Path(folder) for folder in found]


_DEPENDENCIES = ("numba", "llvmlite", "numpy", "onnx")


def _versions() -> str:
    from importlib.metadata import version

    return " ".join(f"{name} {version(name)}" for name in _DEPENDENCIES)


def _dependencies() -> list[str]:
    from importlib.util import find_spec

    specs = [find_spec(name) for name in _DEPENDENCIES]
    return [spec.origin for spec in specs if spec is not None and spec.origin is not None]


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

    def constants(self, arrays: Iterator[np.ndarray | Packed]) -> None:
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
