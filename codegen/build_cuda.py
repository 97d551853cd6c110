"""CUDA kernel sources to PTX and cubins; neither needs a device.

Numba CUDA and NVVM turn a source into PTX; nvJitLink (through cuda.core) assembles a cubin.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from onnxjit.codegen.dialect_cuda import memory_dtype, namespace
from onnxjit.codegen.evaluate import evaluate_int
from onnxjit.codegen.loops import LoopNest
from onnxjit.codegen.target import Target

THREADS = 256
"""Threads of a block, unless a schedule wants fewer."""

_EXTRA = "(install the extra cuda12 or cuda13)"

LARGEST_GRID = 2**31 - 1


def cuda_target(cc: tuple[int, int] = (8, 0), threads: int = THREADS) -> Target:
    """A CUDA device of compute capability `cc` whose blocks have at most `threads` threads.

    `threads` is a power of 4, at least 16 (blocks of tiled products are square).
    """
    if threads not in (16, 64, 256, 1024):
        raise ValueError(f"blocks of {threads} threads: must be 16, 64, 256 or 1024")
    features = frozenset({f"block={threads}"})
    cpu = f"sm_{cc[0]}{cc[1]}"
    return Target("cuda", "nvptx64-nvidia-cuda", cpu, features, 16, 0, 4 << 20, 0, 1)


@dataclass(frozen=True, slots=True)
class Launch:
    """Grid and block sizes of one launch; `blocks` is 0 when there is nothing to compute."""

    blocks: int
    threads: int


def launch(nest: LoopNest, dims: dict[str, int]) -> Launch:
    """Launch sizes for given run-time sizes: one block a tile, blocks stride beyond the limit."""
    return Launch(min(evaluate_int(nest.tiles, dims), LARGEST_GRID), nest.threads)


def compile_ptx(source: str, cc: tuple[int, int] = (8, 0)) -> str:
    """PTX of a kernel source for compute capability `cc`; its entry is `entry_name(ptx)`.

    Raises Numba's TypingError for a name or a combination of types that the dialect lacks.
    """
    from numba import cuda
    from numba.core import types

    scope = dict(namespace())
    exec(compile(source, "<kernel>", "exec"), scope)
    kernel, buffers = scope["kernel"], scope["BUFFERS"]
    sizes = kernel.__code__.co_argcount - len(buffers)
    pointers = [types.CPointer(getattr(types, memory_dtype(d))) for d in buffers]  # type: ignore[attr-defined]
    sig = types.void(*pointers, *[types.int64] * sizes)
    ptx, _ = cuda.compile_ptx(kernel, sig, cc=cc, device=False)
    return str(ptx)


def entry_name(ptx: str) -> str:
    """The symbol of the kernel in a PTX text. Raises ValueError if there is none."""
    found = re.search(r"\.entry\s+([\w$]+)", ptx)
    if found is None:
        raise ValueError("the PTX has no entry")
    return found[1]


def assemble(ptx: str, arch: str) -> bytes:
    """The cubin of a PTX text for an architecture such as "sm_90"."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=arch))
    return bytes(linker.link("cubin").code)


def build(source: str, archs: tuple[str, ...]) -> tuple[str, dict[str, bytes]]:
    """PTX of a source for the oldest of `archs` ("sm_80" ...), and a cubin for each of them."""
    oldest = min(int(a.removeprefix("sm_")) for a in archs)
    ptx = compile_ptx(source, divmod(oldest, 10))
    return ptx, {a: assemble(ptx, a) for a in archs}


def toolchain_problem() -> str | None:
    """Why kernels cannot be compiled for CUDA here, as one sentence, or None."""
    if importlib.util.find_spec("numba_cuda") is None:
        return f"CUDA kernels cannot be compiled: numba-cuda is not installed {_EXTRA}."
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return f"CUDA kernels cannot be assembled: cuda-core is not installed {_EXTRA}."
    return None


@cache
def device_problem() -> str | None:
    """Why device="cuda" cannot be used in this process, as one sentence, or None.

    Asks the driver itself; imports neither CuPy nor Numba.
    """
    count = _device_count()
    if isinstance(count, str):
        return count
    if count == 0:
        return 'device="cuda" cannot be used: the NVIDIA driver finds no CUDA device.'
    for module, package in (("cupy", "cupy-cuda12x or cupy-cuda13x"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(module) is None:
            return f'device="cuda" cannot be used: {package} is not installed {_EXTRA}.'
    return None


def _device_count() -> int | str:
    """Devices that the driver reports, or the sentence that says why it cannot be asked."""
    import ctypes
    import sys

    none = 'device="cuda" cannot be used: no NVIDIA driver is installed on this machine.'
    if sys.platform == "darwin":
        return 'device="cuda" cannot be used: macOS has no CUDA driver.'
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver: Any = ctypes.CDLL(library)
    except OSError:
        return none
    count = ctypes.c_int(0)
    for status in (driver.cuInit(0), driver.cuDeviceGetCount(ctypes.byref(count))):
        if status == 100:
            return 0
        if status != 0:
            return f'device="cuda" cannot be used: the NVIDIA driver reports error {status}.'
    return count.value


__all__ = [
    "Launch", "assemble", "build", "compile_ptx", "cuda_target", "device_problem", "entry_name",
    "launch", "toolchain_problem",
]  # fmt: skip
