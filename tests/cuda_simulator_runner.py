"""Runs CUDA kernel sources in Numba's simulator, which is chosen before Numba is imported.

    NUMBA_ENABLE_CUDASIM=1 python cuda_simulator_runner.py

Reads pickled jobs from standard input until it ends, and answers each with a pickle on standard
output. A job is (buffers, calls): `buffers` maps names to flat arrays in the kernels' memory
dtypes; a call is (source, buffer names, sizes, blocks). The answer is the buffers after the calls,
or the text of what a kernel raised.

Stricter than the hardware: an index outside of a buffer raises, shared memory starts as garbage.
"""

from __future__ import annotations

import pickle
import sys
import threading
import traceback
import warnings
from typing import Any

import numpy as np

Job = tuple[dict[str, np.ndarray], list[tuple[str, tuple[str, ...], tuple[int, ...], int]]]


class Checked:
    """A buffer that refuses every index outside of it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.data.size:
            raise IndexError(f"read of element {i} of {self.data.size}")
        return self.data[i]

    def __setitem__(self, i: Any, value: Any) -> None:
        if not 0 <= i < self.data.size:
            raise IndexError(f"write of element {i} of {self.data.size}")
        self.data[i] = value


def shared_array(lock: Any) -> Any:
    """A replacement of the simulator's allocation, which two threads may enter at once."""

    def array(self: Any, shape: int, dtype: Any, alignment: Any = None) -> Checked:
        frame = sys._getframe(1)
        key = (frame.f_code.co_filename, frame.f_lineno)
        with lock:
            if key not in self._allocations:
                raw = np.full(shape * np.dtype(dtype.name).itemsize, 0xFF, np.uint8)
                self._allocations[key] = Checked(raw.view(dtype.name))
        return self._allocations[key]

    return array


def run(job: Job) -> dict[str, np.ndarray]:
    from numba import cuda

    from onnxjit.codegen.dialect_cuda import simulator_namespace

    buffers, calls = job
    scope = simulator_namespace()
    for source, names, sizes, blocks in calls:
        if blocks == 0:
            continue
        exec(compile(source, "<kernel>", "exec"), scope)
        kernel = cuda.jit(scope["kernel"])
        arguments = [Checked(buffers[b]) for b in names]
        kernel[blocks, scope["THREADS"]](*arguments, *map(np.int64, sizes))
    return buffers


def main() -> None:
    from numba import cuda
    from numba.cuda.simulator.kernel import FakeCUDAKernel
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    assert isinstance(cuda.jit(run), FakeCUDAKernel), "NUMBA_ENABLE_CUDASIM=1 is not set"
    FakeCUDAShared.array = shared_array(threading.Lock())  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = run(job)
        except Exception:
            answer = traceback.format_exc(limit=-3)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
