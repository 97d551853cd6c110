"""The on-disk store of everything that is compiled once and read many times.

Layout below the root, which only its user may write:

    kernels/<key>.o  <key>.py      machine code of a kernel, and its readable source
    tiles/<key>.o                  machine code of a micro-kernel
    models/<key>/manifest.json     digests of the files beside it: plan, packed constants, ...
    index/<digest>.json            stat data of a model file -> its content key; the kernels of a
                                   model, where their tuning decides which code it has; the boot
                                   of the machine in which its large files were digested
    tuning/<isa>-<threads>.json    tuned kernels: see codegen/tuned.py
    seed                           a secret that keys of models depend on

Every entry appears with one rename, so readers never see half of one, and several processes may
write the same key. Every load checks a digest (of large files: see `Cache.open_model`): a damaged
entry is removed and reported as absent, so that it is rebuilt and never run. The digests guard
against damage, the folder's mode against other users. Neither Numba nor onnx is imported: this is
the warm path.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxjit.codegen.fingerprint import Stamp, boot_id, content_key, stamp
from onnxjit.codegen.model_store import MANIFEST, ModelStore, ModelWriter, StoredModel
from onnxjit.codegen.private_files import (
    TEMPORARY,
    AnyPath,
    CacheError,
    checked,
    private_folder,
    replace,
    sealed,
    temporary_name,
    touch,
    unsealed,
    write_private,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "BLOBS", "DEFAULT_MAX_BYTES", "Cache", "CacheError", "Entry", "ModelWriter", "Stamp",
    "StoredModel", "content_key", "stamp",
]  # fmt: skip

BLOBS = {"kernels": ".o", "tiles": ".o"}
DEFAULT_MAX_BYTES = 10 << 30

_STALE_SECONDS = 3600.0
_NOTE_SECONDS = 90 * 86400.0  # a note of a content key costs one reading of the model to renew
_RACY_NS = 2_000_000_000


class Entry(NamedTuple):
    """One thing in the cache: `kind` is a folder below the root, `used` seconds since 1970."""

    kind: str
    key: str
    path: Path
    bytes: int
    used: float


class Cache:
    """The store below one folder; instances are safe to share between threads and processes."""

    def __init__(self, root: AnyPath | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """`root` is ONNXJIT_CACHE or the user's cache folder when None; it is created if needed.

        Raises `CacheError` when the folder cannot be created, belongs to another user, or can be
        written by others. After about `max_bytes`, entries that were not used for longest go.
        """
        self._root = os.path.abspath(_default_root() if root is None else root)
        self.max_bytes = max_bytes
        private_folder(self._root)
        for name in (*BLOBS, "models", "index", "tuning"):
            private_folder(self._folder(name))
        self.tuning = self._folder("tuning")
        self._models = ModelStore(self._folder("models"), self.wrote)
        self._lock = threading.Lock()
        self._unchecked = 0

    @property
    def root(self) -> Path:
        """The folder."""
        from pathlib import Path

        return Path(self._root)

    def _folder(self, name: str) -> str:
        return os.path.join(self._root, name)

    def get(self, kind: str, key: str) -> bytes | None:
        """The data stored under a key of `BLOBS`' kinds, None if absent or damaged."""
        data = self._read_blob(kind, key)
        if data is not None:
            touch(self._blob(kind, key))
        return data

    def put(self, kind: str, key: str, data: bytes, source: str | None = None) -> None:
        """Store data under a key; `source` is kept beside it as a readable Python file."""
        path = self._blob(kind, key)
        if source is not None:
            self.put_source(kind, key, source)
        replace(path, sealed(kind, key, data))
        self.wrote(len(data) + len(source or ""))

    def put_source(self, kind: str, key: str, source: str) -> None:
        """Store the readable source of a key, whose data may follow or may never be made."""
        replace(self.source_path(kind, key), source.encode())

    def source_path(self, kind: str, key: str) -> Path:
        """Where `put` keeps the readable source of a key (the file may not exist)."""
        return self.root / kind / f"{checked(key)}.py"

    def open_model(self, key: str) -> StoredModel | None:
        """The model's files, all checked; None if it is absent or damaged.

        Files of a mebibyte and more are digested once since the machine was started and after
        every change of their stamps, so that a warm start need not read all of its constants.
        """
        folder, boot = os.path.join(self._models.folder, checked(key)), boot_id()
        known = self.known_key(folder) == boot
        stamps = () if known else _stamps(folder)  # before it is read
        model = self._models.open(key, check_large=not known)
        if model is not None:
            touch(os.path.join(model.path, MANIFEST))
            if boot and stamps:
                self.remember_key(folder, stamps, boot)
        return model

    def model_writer(self, key: str | None = None) -> ModelWriter:
        """A context manager that collects and publishes the files of a model; its `key` may be set
        until the end."""
        return ModelWriter(self._models, key)

    def write_model(
        self,
        key: str,
        files: Mapping[str, bytes | memoryview | Iterable[bytes | memoryview]],
    ) -> StoredModel:
        """Store a model whose files are at hand; `model_writer` is for files written in parts."""
        with self.model_writer(key) as writer:
            for name, data in files.items():
                writer.write(name, data)
        assert writer.model is not None
        return writer.model

    def known_key(self, path: AnyPath, extra: bytes = b"") -> str | None:
        """The content key that `remember_key` noted for a file, without reading the file.

        None when the file, or another file of the same model, changed since, or was changed so
        shortly before the note that a later change could carry the same time stamp.
        """
        try:
            entry = _json(self._index(path, extra))
            noted = [Stamp(*row) for row in entry["stamps"]]
            now = stamp(item.path for item in noted)
            if list(now) != noted or entry["path"] != os.path.abspath(path):
                return None
            newest = max(max(item.mtime_ns, item.ctime_ns) for item in noted)
            return str(entry["key"]) if newest < entry["written_ns"] - _RACY_NS else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember_key(
        self, path: AnyPath, stamps: Iterable[Stamp], key: str, extra: bytes = b""
    ) -> None:
        """Note that the file at `path` has content `key` as long as `stamps` hold.

        `stamps` are `stamp()`s of the file and its external data, taken *before* they were read.
        """
        rows = [[one.path, one.size, one.mtime_ns, one.ctime_ns, one.inode, one.device]
                for one in stamps]  # fmt: skip
        now = time.time_ns()
        entry = {"path": os.path.abspath(path), "key": key, "stamps": rows, "written_ns": now}
        replace(self._index(path, extra), json.dumps(entry).encode())

    def known_kernels(self, key: str) -> list[str] | None:
        """The structures of a model's kernels that `remember_kernels` noted under its key."""
        try:
            return [str(s) for s in _json(self._kernels_note(key))]
        except (OSError, ValueError, TypeError):
            return None

    def remember_kernels(self, key: str, structures: Iterable[str]) -> None:
        """Note the structures of a model's kernels: with them its tuning is found unopened."""
        replace(self._kernels_note(key), json.dumps(sorted(structures)).encode())

    def _kernels_note(self, key: str) -> str:
        return self._note(content_key(checked(key).encode(), b"kernels"))

    @functools.cached_property
    def seed(self) -> int:
        """A secret number of this cache, made once: see `fingerprint.bulk_key`."""
        path = self._folder("seed")
        if not os.path.exists(path):
            temporary = self._folder(temporary_name())
            write_private(temporary, os.urandom(8))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(temporary, path)
            os.unlink(temporary)
        with open(path, "rb") as file:
            return int.from_bytes(file.read(8), "little")

    def entries(self) -> list[Entry]:
        """Everything stored, least recently used first."""
        found = []
        for kind, suffix in BLOBS.items():
            for path in self._paths(kind):
                if path.suffix == suffix or not path.with_suffix(suffix).exists():
                    size, used = _usage((path, path.with_suffix(".py")))
                    found.append(Entry(kind, path.stem, path, size, used))
        for folder in self._paths("models"):
            size, used = _usage(folder.glob("*"))
            found.append(Entry("models", folder.name, folder, size, used))
        return sorted(found, key=lambda entry: entry.used)

    def verify(self) -> list[Entry]:
        """Check the digest of everything stored; damaged entries are removed and returned."""
        damaged = []
        for entry in self.entries():
            if entry.path.suffix == ".py":  # the source of a kernel that did not compile
                continue
            if entry.kind == "models":
                whole = self._models.open(entry.key, check_large=True) is not None
            else:
                whole = self._read_blob(entry.kind, entry.key) is not None
            if not whole:
                damaged.append(entry)
        return damaged

    def trim(self, max_bytes: int | None = None) -> int:
        """Remove the least recently used entries above `max_bytes`; returns the bytes freed.

        Also removes what killed processes left half-written more than an hour ago, and old notes.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        self._sweep()
        entries = self.entries()
        excess = sum(entry.bytes for entry in entries) - limit
        freed = 0
        for entry in entries:
            if freed >= excess:
                break
            self._remove(entry)
            freed += entry.bytes
        return freed

    def clear(self) -> None:
        """Remove everything. Processes that have a model mapped keep their copy."""
        for entry in self.entries():
            self._remove(entry)
        for path in (*self._paths("index"), *self._paths("tuning")):
            path.unlink(missing_ok=True)
        self._sweep()

    def wrote(self, amount: int) -> None:
        """Count bytes written, and trim once they could have added a sixteenth of the cap."""
        with self._lock:
            self._unchecked += amount
            if self._unchecked * 16 < self.max_bytes:
                return
            self._unchecked = 0
        self.trim()

    def _read_blob(self, kind: str, key: str) -> bytes | None:
        path = self._blob(kind, key)
        try:
            with open(path, "rb") as file:
                image = file.read()
        except FileNotFoundError:
            return None
        data = unsealed(kind, key, image)
        if data is None:
            _remove_blob(path)
        return data

    def _blob(self, kind: str, key: str) -> str:
        return os.path.join(self._folder(kind), checked(key) + BLOBS[kind])

    def _index(self, path: AnyPath, extra: bytes) -> str:
        return self._note(content_key(os.fsencode(os.path.abspath(path)), extra))

    def _note(self, name: str) -> str:
        return os.path.join(self._folder("index"), f"{name}.json")

    def _paths(self, kind: str) -> list[Path]:
        found = (self.root / kind).iterdir()
        return [path for path in found if not path.name.startswith(TEMPORARY)]

    def _remove(self, entry: Entry) -> None:
        if entry.kind == "models":
            self._models.remove(entry.path)
        else:
            _remove_blob(entry.path)

    def _sweep(self) -> None:
        import shutil

        leftovers = self.root.glob(f"*/{TEMPORARY}*")
        for path, age in (
            *((path, _STALE_SECONDS) for path in leftovers),
            *((path, _NOTE_SECONDS) for path in self._paths("index")),
        ):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > age:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _default_root() -> str:
    chosen = os.environ.get("ONNXJIT_CACHE")
    if chosen:
        return os.path.expanduser(chosen)
    import platformdirs

    return platformdirs.user_cache_dir("onnxjit")


def _json(path: str) -> Any:
    with open(path, "rb") as file:
        return json.load(file)


def _remove_blob(path: AnyPath) -> None:
    for each in (path, os.path.splitext(path)[0] + ".py"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each)


def _stamps(folder: str) -> tuple[Stamp, ...]:
    """Of the files of a model, but of its manifest, which is touched when it is used."""
    try:
        names = sorted(name for name in os.listdir(folder) if name != MANIFEST)
        return stamp(os.path.join(folder, name) for name in names)
    except OSError:
        return ()


def _usage(paths: Iterable[Path]) -> tuple[int, float]:
    size, used = 0, 0.0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            size += facts.st_size
            used = max(used, facts.st_mtime)
    return size, used
