"""The parent's end of a build process, and the errors that come from there.

The process is a fresh interpreter that imports the same packages as this one; `build_worker` says
what it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from onnxjit.codegen import build_worker
from onnxjit.codegen.target import Target

_TAIL_BYTES = 4000

_BOOT = (
    "import json, sys; hello = json.loads(sys.stdin.buffer.readline()); "
    "sys.path[:] = hello['path']; "
    "from onnxjit.codegen.build_worker import serve; serve(hello)"
)


class BuildError(RuntimeError):
    """A kernel could not be built; the message names it."""


class CompileError(BuildError):
    """The compiler refuses a kernel; the message holds its name, its file and the traceback."""


class WorkerError(BuildError):
    """A build process could not be started or died; the message holds the end of its log."""


class Refused(Exception):
    """A compile error on its way from the compiler; the text is the traceback."""


class WorkerProcess:
    """The parent's end of one worker process. One thread feeds it; any thread may stop it.

    `nice` is how much the process yields to others, as `os.nice` counts.
    """

    def __init__(self, target: Target, nice: int = 0) -> None:
        self._hello = {"target": build_worker.pack_target(target), "nice": nice}
        self._lock = threading.Lock()
        self._stopped = False
        self._greeted = False
        self._failure = ""
        self._spawn()

    def compile(self, request: Mapping[str, Any], label: str) -> bytes:
        """Have the process do a job. A process that died is replaced at the next job."""
        if self._failure:
            raise WorkerError(self._failure)
        if self._process.poll() is not None:
            with self._lock:
                if self._stopped:
                    raise WorkerError(f"the builder was closed before {label} was built")
                self.dispose()
                self._spawn()
        if not self._greeted:
            self._greet()
        with contextlib.suppress(OSError):  # it is gone; the missing answer tells how
            build_worker.write_frame(self._input, request)
        answer = build_worker.read_frame(self._output)
        if answer is None:
            raise WorkerError(self._obituary(f"while it built {label}"))
        header, body = answer
        if not header["ok"]:
            raise Refused(body.decode())
        return body

    def stop(self) -> None:
        """End the process, whatever it does; the thread that feeds it has to `dispose` of it."""
        with self._lock:
            self._stopped = True
            self._process.kill()
            self._process.wait()

    def dispose(self) -> None:
        """Close this end of a process that has ended."""
        for file in (self._output, self._log):
            file.close()
        with contextlib.suppress(OSError):  # bytes that it did not read
            self._input.close()

    def _spawn(self) -> None:
        self._greeted = False
        self._log = tempfile.TemporaryFile()
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-P", "-c", _BOOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=_environment(),
                process_group=0,  # an interrupt from the terminal is the parent's to handle
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(
                f"cannot start a build process with {sys.executable!r}: {error}; "
                "without processes, jobs=0 compiles in the calling thread"
            ) from error
        assert self._process.stdin and self._process.stdout
        self._input: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._output: BinaryIO = self._process.stdout  # type: ignore[assignment]
        hello = {"path": _search_path(), **self._hello}
        with contextlib.suppress(OSError):  # it died at once; the greeting tells how
            self._input.write(json.dumps(hello).encode() + b"\n")
            self._input.flush()

    def _greet(self) -> None:
        greeting = build_worker.read_frame(self._output)
        if greeting is None:
            self._failure = self._obituary("before its first job")
        elif greeting[0]["file"] != os.path.abspath(build_worker.__file__):
            self._failure = (
                f"the build process imports another onnxjit, {greeting[0]['file']}, "
                f"instead of {build_worker.__file__}"
            )
        if self._failure:
            raise WorkerError(self._failure)
        self._greeted = True

    def _obituary(self, when: str) -> str:
        if self._stopped:
            return f"the builder was closed {when}"
        self._process.kill()  # it may have closed its output only
        code = self._process.wait()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        log = self._log.read().decode(errors="replace").strip()
        cause = f"ended with status {code}"
        if code < 0:
            cause = f"was killed by {signal.Signals(-code).name}"
            cause += " (often for lack of memory)" if code == -signal.SIGKILL else ""
        return f"the build process {cause} {when}; its log ends with:\n{log or '(nothing)'}"


def _environment() -> dict[str, str]:
    # Settings of Numba would change the code behind the key's back; a worker needs one thread.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONHASHSEED": "0"}


def _search_path() -> list[str]:
    # The worker imports what this process imports, whatever either one's folder and script are.
    return [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
