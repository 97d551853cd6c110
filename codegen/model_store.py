"""The files of cached models: each model is a folder that appears whole, with one rename.

Small files are read and digested at once; large ones are mapped, so that packed constants are
shared by all processes and are read from disk when they are used.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from mmap import ACCESS_READ, mmap
from typing import BinaryIO

from onnxjit.codegen.blake2 import blake2b
from onnxjit.codegen.private_files import (
    AnyPath,
    CacheError,
    checked,
    private_folder,
    sealed,
    temporary_name,
    unsealed,
    write_private,
)

MANIFEST = "manifest.json"

_DIGEST = 16
_LARGE = 1 << 20  # bytes from which a file is mapped, and digested with xxh3_128


class StoredModel:
    """The files of a cached model. Small ones are held in memory, large ones are mapped."""

    def __init__(self, path: str, files: Mapping[str, bytes | memoryview]) -> None:
        self.path = path
        self._files = files

    def __getitem__(self, name: str) -> bytes | memoryview:
        """A file's content, read-only, as it was when its digest was checked."""
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)


class ModelStore:
    """Models by key, below one folder; `published` is told of the bytes of each new one."""

    def __init__(self, folder: str, published: Callable[[int], None]) -> None:
        self.folder = folder
        self.published = published

    def open(self, key: str, check_large: bool) -> StoredModel | None:
        """The checked files of a model; a damaged one is removed and is None like an absent one."""
        folder = os.path.join(self.folder, checked(key))
        model = _load(folder, key, check_large)
        if model is None and os.path.exists(folder):
            self.remove(folder)
        return model

    def remove(self, folder: AnyPath) -> None:
        """Remove a model's folder; processes that have its files mapped keep them."""
        import shutil

        # Renamed first: a model disappears at once or not at all.
        doomed = os.path.join(self.folder, temporary_name())
        try:
            os.rename(folder, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)


class ModelWriter:
    """Collects the files of a model in a temporary folder; leaving the `with` publishes them under
    `key`.

    `model` holds them then. An exception inside the `with` discards everything, and so does the
    lack of a key.
    """

    def __init__(self, store: ModelStore, key: str | None) -> None:
        self._store = store
        self.key = key
        self._folder = os.path.join(store.folder, temporary_name())
        self.model: StoredModel | None = None

    def write(self, name: str, data: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
        """Write a file from bytes, or from pieces that follow each other."""
        with self.open(name) as file:
            for piece in (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data:
                file.write(piece)

    def open(self, name: str) -> BinaryIO:
        """A new binary file to be filled in any order, or mapped and written in place."""
        if name == MANIFEST:
            raise ValueError(f"{name} is the cache's own file")
        return open(os.path.join(self._folder, checked(name)), "x+b")

    def __enter__(self) -> ModelWriter:
        private_folder(self._folder)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        import shutil

        try:
            if kind is None and self.key is not None:
                self.model = self._publish(checked(self.key))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _publish(self, key: str) -> StoredModel:
        files: dict[str, bytes | memoryview] = {}
        facts: dict[str, dict[str, int | str]] = {}
        for name in sorted(os.listdir(self._folder)):
            path = os.path.join(self._folder, name)
            data = files[name] = _content(path, os.path.getsize(path))
            facts[name] = {"bytes": len(data), "digest": _digest(data)}
        manifest = json.dumps({"files": facts}, indent=1).encode()
        write_private(os.path.join(self._folder, MANIFEST), sealed("models", key, manifest))
        target = os.path.join(self._store.folder, key)
        for _ in range(10):
            try:
                os.rename(self._folder, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                # Another process published the same key first. If its copy is damaged, opening
                # removes it and the next try succeeds.
                found = self._store.open(key, check_large=True)
                if found is not None:
                    return found
            else:
                self._store.published(sum(map(len, files.values())))
                return StoredModel(target, files)
        raise CacheError(f"cannot publish {target}")


def _load(folder: str, key: str, check_large: bool) -> StoredModel | None:
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            manifest = unsealed("models", key, file.read())
        if manifest is None:
            return None
        files = {}
        for name, facts in json.loads(manifest)["files"].items():
            size = facts["bytes"]
            path = os.path.join(folder, name)
            if os.path.getsize(path) != size:
                return None
            data = files[name] = _content(path, size)
            if (check_large or size < _LARGE) and _digest(data) != facts["digest"]:
                return None
    except OSError:
        return None
    return StoredModel(folder, files)


def _content(path: str, size: int) -> bytes | memoryview:
    with open(path, "rb") as file:
        if size < _LARGE:
            return file.read()
        return memoryview(mmap(file.fileno(), size, access=ACCESS_READ))


def _digest(data: bytes | memoryview) -> str:
    if len(data) < _LARGE:
        return blake2b(data, digest_size=_DIGEST).hexdigest()
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)
