"""Compiles kernel sources into object files: in parallel processes, each only once.

Numba compiles under a global lock, so parallel builds need processes. They are started with
`subprocess` and not with `multiprocessing`: a script needs no `__main__` guard, nothing is forked
from a process that has threads, and a worker that crashes is an error message and not a hang.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxjit.codegen import build_worker
from onnxjit.codegen.build_process import (
    BuildError,
    CompileError,
    Refused,
    WorkerError,
    WorkerProcess,
)
from onnxjit.codegen.build_queue import JobQueue
from onnxjit.codegen.cache import Cache
from onnxjit.codegen.dialect_table import CALLABLE, linked, places_of_calls
from onnxjit.codegen.fingerprint import content_key, modules_digest
from onnxjit.codegen.target import Target, host

MAX_JOBS = 32
NICE = 10
"""How much the last of as many workers as there are cores yields to this process, which finds
their work: contending for a core with it made cold starts a tenth to a fifth longer."""


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a kernel in the dialect, the micro-kernels it calls, and a name for messages.

    With `wide`, LLVM's vectoriser may use 512-bit vectors where the target has them. `name` does
    not take part in the key: equal kernels are built once whatever they are called.
    """

    text: str
    symbols: tuple[str, ...] = ()
    name: str = "kernel"
    wide: bool = False


def key(source: Source, target: Target) -> str:
    """32 hexadecimal digits that identify the machine code of `source` on `target`."""
    return _key("kernel", target, source.text, *sorted(source.symbols), f"wide={source.wide}")


def tile_key(symbol: str, target: Target) -> str:
    """32 hexadecimal digits that identify the machine code of a micro-kernel on `target`."""
    return _key("tile", target, symbol)


def symbol_of(key: str) -> str:
    """The symbol that a kernel's object file defines."""
    return f"k_{key}"


class Builder:
    """Builds kernels and micro-kernels for one target; safe to use from several threads.

    Use it in a `with`, or `close` it: the worker processes end then, and also when this process
    ends. `jobs=0` compiles in the calling thread, without processes.
    """

    def __init__(
        self, target: Target | None = None, jobs: int | None = None, cache: Cache | None = None
    ) -> None:
        """`target` is this machine when None, `jobs` one for each core this process may use."""
        self.target = host() if target is None else target
        self.jobs = min(self.target.cores, MAX_JOBS) if jobs is None else jobs
        self.cache = cache
        self.compiled = 0  # how many jobs neither a cache nor a like one answered
        self._futures: dict[str, Future[bytes]] = {}
        self._twins: dict[str, _Job] = {}
        self._queue: JobQueue[tuple[_Job, Future[bytes]]] = JobQueue()
        self._workers: list[WorkerProcess] = []
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._closed = False

    def start(self, workers: int = 4) -> None:
        """Start worker processes now, so that they import Numba while the caller is busy.

        At most `workers`: more of them start when there are jobs for them.
        """
        with self._lock:
            while len(self._workers) < min(self.jobs, workers):
                self._add_worker()

    def submit(self, source: Source) -> str:
        """Queue a kernel, and the micro-kernels it calls, and return the kernel's key."""
        for symbol in source.symbols:
            self._submit(_tile_job(symbol, self.target))
        return self._submit(_kernel_job("object", source, self.target))

    def submit_words(self, source: str, symbols: Mapping[str, str]) -> str:
        """Queue functions in the language of `word_compiler`, and return their key.

        Their object file defines the C symbols that are the values of `symbols`, by names in
        `source`.
        """
        own = _key("words", self.target, source, repr(sorted(symbols.items())))
        request = {"do": "words", "text": source, "symbols": dict(symbols)}
        return self._submit(_Job("kernels", own, "the executor", request, len(source)))

    def result(self, key: str) -> bytes:
        """The object file of a submitted key; waits for it. It defines `symbol_of(key)`.

        Raises `CompileError` when the compiler refuses the kernel, `WorkerError` when the process
        that compiled it died, `BuildError` when it was dropped.
        """
        try:
            return self._futures[key].result()
        except CancelledError:
            raise BuildError(
                f"{symbol_of(key)} was dropped: the builder was closed, or another kernel failed"
            ) from None

    def ready(self, keys: Iterable[str], seconds: float) -> set[str]:
        """Those of the submitted keys that have a result, or failed, within `seconds`; the others
        are dropped."""
        futures = {self._futures[key]: key for key in keys}
        done, late = wait(futures, max(0.0, seconds))
        for future in late:
            future.cancel()
        return {futures[future] for future in done}

    def build(
        self,
        sources: Iterable[Source],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, bytes]:
        """Object files of `sources` by key; `progress(done, total)` is told of each new one.

        Raises like `result`, for the first kernel that fails; the ones not begun are dropped.
        """
        keys = list(dict.fromkeys(self.submit(source) for source in sources))
        futures = {self._futures[key]: key for key in keys}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                self.result(futures[future])
                if progress is not None:
                    progress(number, len(keys))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return {key: future.result() for future, key in futures.items()}

    def tile_objects(self, symbols: Iterable[str]) -> dict[str, bytes]:
        """Object files of micro-kernels by symbol. Raises like `result`."""
        keys = {symbol: self._submit(_tile_job(symbol, self.target)) for symbol in symbols}
        return {symbol: self.result(key) for symbol, key in keys.items()}

    def tile_object(self, symbol: str) -> bytes:
        """The object file of one micro-kernel. Raises like `result`."""
        return self.tile_objects([symbol])[symbol]

    def inspect(self, source: Source, what: str) -> str:
        """The optimised LLVM IR ("llvm") or the assembly ("asm") of a kernel."""
        if what not in ("llvm", "asm"):
            raise ValueError(f"cannot inspect {what!r}: it is llvm or asm")
        return self.result(self._submit(_kernel_job(what, source, self.target))).decode()

    def close(self) -> None:
        """End the worker processes; jobs that are not finished are cancelled."""
        if os.getpid() != self._owner:  # a fork has no claim on its parent's processes
            return
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, []
        for future in self._futures.values():
            future.cancel()
        self._queue.close()
        for worker in workers:
            worker.stop()

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, job: _Job) -> str:
        with self._lock:
            known = self._futures.get(job.key)
            if known is not None and not _failed(known):
                return job.key
            if self._closed or os.getpid() != self._owner:
                raise BuildError("this builder is closed, or was made before a fork")
            future: Future[bytes] = Future()
            self._futures[job.key] = future
        found = self.cache.get(job.kind, job.key) if self.cache and job.kind else None
        if found is None:
            self._start(job, future)
        elif future.set_running_or_notify_cancel():
            future.set_result(found)
        return job.key

    def _start(self, job: _Job, future: Future[bytes]) -> None:
        twin = self._twin(job)
        if twin is not None:
            self._futures[twin.key].add_done_callback(
                lambda done: self._rename(job, future, twin, done)
            )
        elif self.jobs == 0:
            future.set_running_or_notify_cancel()
            self._finish(job, future, self._compile_here)
        else:
            self._enqueue(job, future)

    def _twin(self, job: _Job) -> _Job | None:
        """Another job whose result is this one's but for names, if there is one."""
        if not job.names:
            return None
        with self._lock:
            twin = self._twins.get(job.likeness)
            if twin is not None and twin.key != job.key and not _failed(self._futures[twin.key]):
                return twin
            self._twins[job.likeness] = job
        return None

    def _rename(self, job: _Job, future: Future[bytes], twin: _Job, done: Future[bytes]) -> None:
        if done.cancelled():  # by those who wanted that one
            self._start(job, future)
        elif future.set_running_or_notify_cancel():
            table = dict(zip(twin.names, job.names, strict=True))
            self._finish(job, future, lambda *_: _with_names(done.result(), table), compiled=0)

    def _enqueue(self, job: _Job, future: Future[bytes]) -> None:
        with self._lock:
            if self._closed:
                future.cancel()
                return
            try:
                if len(self._workers) < self.jobs:
                    self._add_worker()
            except WorkerError as error:
                future.set_exception(error)
            else:
                self._queue.put((job, future), job.size)

    def _add_worker(self) -> None:
        shares = len(self._workers) + 1 == self.target.cores
        worker = WorkerProcess(self.target, NICE if shares else 0)
        self._workers.append(worker)
        threading.Thread(
            target=self._feed, args=(worker,), name="onnxjit-build", daemon=True
        ).start()

    def _feed(self, worker: WorkerProcess) -> None:
        while (item := self._queue.take()) is not None:
            job, future = item
            if future.set_running_or_notify_cancel():
                self._finish(job, future, worker.compile)
        worker.dispose()

    def _finish(
        self,
        job: _Job,
        future: Future[bytes],
        compiler: Callable[[Mapping[str, Any], str], bytes],
        compiled: int = 1,
    ) -> None:
        try:
            if job.kind == "kernels":
                self._store(Cache.put_source, job, job.request["text"])
            data = compiler(job.request, job.label)
            with self._lock:
                self.compiled += compiled
            if job.kind:
                self._store(Cache.put, job, data)
        except Refused as refusal:
            future.set_exception(self._compile_error(job, str(refusal)))
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(data)

    def _store(self, write: Callable[..., None], job: _Job, content: str | bytes) -> None:
        if self.cache is None:
            return
        try:
            write(self.cache, job.kind, job.key, content)
        except OSError as error:
            warnings.warn(f"cannot keep {job.label} in the cache: {error}", stacklevel=2)

    def _compile_here(self, request: Mapping[str, Any], label: str) -> bytes:
        try:
            with _HERE:
                return build_worker.perform(request, self.target)
        except Exception as error:
            raise Refused(traceback.format_exc()) from error

    def _compile_error(self, job: _Job, report: str) -> CompileError:
        where = ""
        if self.cache and job.kind == "kernels":
            where = f" ({self.cache.source_path(job.kind, job.key)})"
        return CompileError(f"cannot compile {job.label}{where}:\n{report}")


_HERE = threading.Lock()


def _failed(future: Future[bytes]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


@dataclass(frozen=True, slots=True)
class _Job:
    """One request to a worker; `kind` is the cache's folder for the result, "" for none.

    `size` says when it is taken (`JobQueue`). Results of jobs with equal `likeness` differ at most
    in `names`, symbols that are equally long.
    """

    kind: str
    key: str
    label: str
    request: Mapping[str, Any]
    size: int
    likeness: str = ""
    names: tuple[str, ...] = ()


def _kernel_job(do: str, source: Source, target: Target) -> _Job:
    own = key(source, target)
    symbol = symbol_of(own)
    request = {
        "do": do,
        "text": source.text,
        "externals": {s: linked(s) if do == "object" else s for s in source.symbols},
        "symbol": symbol,
        "file": f"<{symbol}>",
        "wide": source.wide,
    }
    label = f"kernel {source.name!r}"
    size = len(source.text)
    if do != "object":
        return _Job("", f"{own}.{do}", label, request, size)
    places = places_of_calls(source.text)
    likeness = CALLABLE.sub(lambda m: places[m[0]], source.text)
    names = (symbol, *map(linked, places))
    return _Job("kernels", own, label, request, size, f"{source.wide} {likeness}", names)


def _with_names(image: bytes, names: Mapping[str, str]) -> bytes:
    """An object file with other symbols in the places of some, as long as those."""
    table = {old.encode(): new.encode() for old, new in names.items()}
    return re.sub(b"|".join(table), lambda m: table[m[0]], image)


def _tile_job(symbol: str, target: Target) -> _Job:
    request = {"do": "tile", "symbol": symbol}
    return _Job("tiles", tile_key(symbol, target), f"micro-kernel {symbol!r}", request, 0)


def _key(kind: str, target: Target, *parts: str) -> str:
    return content_key([part.encode() for part in (kind, target.code_key, *parts)], _toolchain())


@functools.cache
def _toolchain() -> bytes:
    """What else decides machine code: the versions of the compilers, and our own code."""
    names = "numba", "llvmlite", "numpy"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    versions.append(f"{sys.implementation.cache_tag} {sys.version_info[:3]}")
    folder = Path(__file__).parent
    code = modules_digest(folder, "onnxjit.codegen", "build_worker")
    return "\n".join([*versions, code]).encode()
