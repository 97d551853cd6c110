"""`onnxjit.compile`: a model in, a compiled model out, through the cache where there is one."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxjit.codegen.cache import Cache
from onnxjit.codegen.fingerprint import Stamp, bulk_key, stamp
from onnxjit.codegen.target import host
from onnxjit.codegen.tuned import Table
from onnxjit.compiled import CompiledModel
from onnxjit.debug import debug_level, show_compiled
from onnxjit.devices import resolve
from onnxjit.errors import ModelError
from onnxjit.origin import Origin, external_files
from onnxjit.runtime.threads import MAX_THREADS, available_threads

if TYPE_CHECKING:
    import numpy as np

    from onnxjit.artifact import Artifact
    from onnxjit.codegen.build import Builder
    from onnxjit.codegen.packing import Packed
    from onnxjit.proto import ModelSource
    from onnxjit.tuning import Budget

Progress = Callable[[int, int], None]
TUNE_SECONDS = 60.0
_SPARE_BYTES = 32 << 20
Shapes = tuple[tuple[int, ...], ...]


def compile(
    model: Any,
    *,
    device: str = "auto",
    threads: int | None = None,
    cache: bool | str | os.PathLike[str] | Cache = True,
    overrides: Mapping[str, int] | None = None,
    folder: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    tune: bool | float = False,
    sizes: Mapping[str, int] | None = None,
) -> CompiledModel:
    """Compile an ONNX model into a callable.

    model: a path, bytes, a binary file object or an `onnx.ModelProto`. device: "cpu", "cuda" or
    "auto". threads: at most this many per call; by default as many as this process may use.
    cache: True for the user's cache (or ONNXJIT_CACHE), False for none, or a folder; a model that
    is there is loaded instead of compiled. overrides: sizes of free dimensions, by the model's
    names of them. folder: where external data lies if `model` is not a path. jobs: processes
    that compile kernels, by default one for each core; 0 compiles in this process. progress: told
    (kernels done, kernels in all). tune: measure variants of the kernels on this machine and take
    the fastest, for about so many seconds (True: a minute). What was found stays in the cache,
    serves every later compilation for as many threads, and is not measured again. sizes: of free
    dimensions, by name, to measure at; the code serves all sizes.

    Raises `ModelError` for a model that is broken, `UnsupportedOperators` with every node that
    has no implementation, `DeviceError` when the device is not there.
    """
    seconds = TUNE_SECONDS if tune is True else float(tune)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"tune takes a number of seconds, not {tune!r}")
    level = debug_level()
    resolve(device)
    chosen = dict(overrides or {})
    origin = Origin(model, folder)
    store = cache if isinstance(cache, Cache) else None
    if store is None and cache is not False:
        store = Cache(None if cache is True else cache)  # type: ignore[arg-type]
    request = Request(origin, chosen, store, jobs, progress, threads)
    request.tune_seconds, request.tune_sizes = seconds, dict(sizes or {})
    start = time.perf_counter()
    artifact = request.artifact()
    again = any(check.assumed for check in artifact.plan.checks)
    seconds, found = time.perf_counter() - start, request.found
    compiled = CompiledModel(artifact, threads, request.kept(again), seconds, found)
    if level:
        show_compiled(compiled, level, origin, chosen)
    return compiled


class Request:
    """A model with its options: makes the artifact, for free sizes or for given input shapes."""

    def __init__(
        self,
        origin: Origin,
        overrides: Mapping[str, int],
        cache: Cache | None,
        jobs: int | None = None,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> None:
        self.origin = origin
        self.overrides = overrides
        self.cache = cache
        self.jobs = jobs
        self.progress = progress
        self.threads = min(threads or available_threads(), MAX_THREADS)
        self.tune_seconds = 0.0
        self.tune_sizes: dict[str, int] = {}
        self.tuned = Table()
        """What is known of variants; without a cache, what this compilation has found."""
        self.found = False
        """Whether the last artifact came from the cache."""
        self.content: str | None = None  # what the first artifact was made of
        self.stamps: tuple[Stamp, ...] = ()

    def kept(self, again: bool) -> Request:
        """What a compiled model keeps; `again`: it may have to be compiled for other sizes."""
        origin = self.origin.kept(again)
        made = Request(origin, self.overrides, self.cache, self.jobs, None, self.threads)
        made.content, made.stamps, made.tuned = self.content, self.stamps, self.tuned
        return made

    def __getstate__(self) -> tuple[Any, ...]:
        return self.origin, dict(self.overrides), self.stamps, self.threads

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        origin, overrides, stamps, threads = state
        # Caches stay at home, and what was tuned there with them.
        self.__init__(origin, overrides, None, None, None, threads)  # type: ignore[misc]
        self.stamps = stamps

    def artifact(self, shapes: Shapes | None = None) -> Artifact:
        """The compiled model, from the cache if it is there."""
        self.found = False
        if shapes is None:
            self.stamps = self.origin.stamps()
        if self.cache is not None:
            self.tuned = Table.open(self.cache, host(), self.threads)
        known = self._known() if self.cache is not None else None
        found = self._load(known, shapes)
        if found is not None:
            return found
        return self._compile(shapes)

    def _known(self) -> str | None:
        """The content key, as far as it takes no parsing."""
        assert self.cache is not None
        if self.content is not None:
            return self.content
        if self.origin.path is not None:
            return self.cache.known_key(self.origin.path)
        return self.origin.own_key(self.cache.seed) if self.origin.folder is None else None

    def _load(self, content: str | None, shapes: Shapes | None) -> Artifact | None:
        if self.cache is None or content is None:
            return None
        from onnxjit.store import load, model_key

        key = model_key(content, host(), self.overrides, shapes, self.cache)
        if self.tune_seconds or self.tuned.rows:
            # Which code a model has depends on its kernels' rows alone, not on the whole table.
            known = self.cache.known_kernels(key)
            if known is None or (self.tune_seconds and not self.tuned.rows.keys() >= set(known)):
                return None
            key = self.tuned.key(key, known)
        artifact = load(self.cache, key)
        if artifact is not None:
            self.content, self.found = content, True
        return artifact

    def _compile(self, shapes: Shapes | None) -> Artifact:
        from onnxjit.codegen.build import Builder

        stamps = self.origin.stamps()
        if self.content is None and self.stamps and stamps[:1] != self.stamps[:1]:
            raise ModelError(f"{self.origin.path!r} has changed since it was compiled")
        with Builder(host(), self.jobs, self.cache) as builder:
            builder.start()
            digest = _Digest(self.origin, self.cache.seed) if self.cache is not None else None
            source = self.origin.read()
            content = None
            if digest is not None:
                content, stamps = self._content(source, digest, stamps)
            self.stamps = stamps
            found = self._load(content, shapes)
            return found or self._build(source, builder, content, shapes)

    def _content(
        self, source: ModelSource, digest: _Digest, stamps: tuple[Stamp, ...]
    ) -> tuple[str | None, tuple[Stamp, ...]]:
        """The key of the model and its external data, noted for the next process."""
        files = external_files(source)
        try:
            stamps += stamp(files)
            content = digest.result()
            if content is not None and files:
                assert self.cache is not None
                content = bulk_key([content.encode(), *files], self.cache.seed)
        except OSError as error:
            raise ModelError(f"the model's files cannot be read: {error}") from error
        if self.content is not None and content != self.content:
            raise ModelError(f"{self.origin.path!r} has changed since it was compiled")
        self.content = content
        if self.cache is not None and self.origin.path is not None and content is not None:
            self.cache.remember_key(self.origin.path, stamps, content)
        return content, stamps

    def _build(
        self, source: ModelSource, builder: Builder, content: str | None, shapes: Shapes | None
    ) -> Artifact:
        from onnxjit.compiler import artifact_of, build_model
        from onnxjit.store import Entry, model_key

        target = builder.target
        options: dict[str, Any] = {
            "overrides": self.overrides,
            "shapes": shapes,
            "target": target,
            "cache": self.cache,
            "builder": builder,
            "progress": self.progress,
            "tuned": self.tuned,
            "budget": self._budget(),
        }
        if self.cache is None or content is None:
            graph, parts = build_model(source, **options)
            return artifact_of(graph, parts, target, shapes)
        entry = Entry(self.cache)
        try:
            with entry:

                def write(arrays: Iterator[np.ndarray | Packed]) -> None:
                    entry.constants(_sparing(arrays, source))

                graph, parts = build_model(source, **options, constants=write)
                key = model_key(content, target, self.overrides, shapes, self.cache)
                kernels = {k.structure for k in parts.generated.planned}
                self.cache.remember_kernels(key, kernels)
                entry.finish(
                    artifact_of(graph, parts, target, shapes), self.tuned.key(key, kernels)
                )
                del graph, parts  # publishing reads the constants back: not both at the same time
                source.release_pages()
            return entry.open()
        except OSError as error:  # a full disk; if it was the model's file, it shows again
            warnings.warn(f"the compiled model is not kept in the cache: {error}", stacklevel=2)
        graph, parts = build_model(source, **options)
        return artifact_of(graph, parts, target, shapes)

    def _budget(self) -> Budget | None:
        if not self.tune_seconds:
            return None
        from onnxjit.tuning import Budget

        return Budget(self.tune_seconds, self.threads, self.tune_sizes)


def _sparing(
    arrays: Iterator[np.ndarray | Packed], source: ModelSource
) -> Iterator[np.ndarray | Packed]:
    """The same arrays; what was read of the model for them does not stay in memory."""
    read = 0
    for array in arrays:
        yield array
        read += array.nbytes
        if read > _SPARE_BYTES:
            source.release_pages()
            read = 0
    source.release_pages()


class _Digest:
    """The content key of a model, computed beside the rest."""

    def __init__(self, origin: Origin, seed: int) -> None:
        self._origin, self._seed = origin, seed
        self._answer: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="onnxjit-digest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._origin.own_key(self._seed)
        except BaseException as error:
            self._error = error

    def result(self) -> str | None:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer
