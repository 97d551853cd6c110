"""Loads object files with LLVM's ORC JIT: those of every system that `elf` does not load itself.

ORC works with JITLink here: sections of one object lie next to each other, and calls to far
symbols go through stubs, so no relocation can overflow however large the process is.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm

_LOCK = threading.Lock()
_NUMBER = itertools.count()


class Code:
    """What ORC loaded; it is unloaded before the JIT that owns its memory goes."""

    __slots__ = ("_jit", "_tracker")

    def __init__(self, jit: Any, tracker: Any) -> None:
        self._jit = jit
        self._tracker = tracker

    def __del__(self) -> None:
        self._tracker = None
        self._jit = None


def load(
    objects: Sequence[bytes], imports: Mapping[str, int], exports: Sequence[str]
) -> tuple[Code, dict[str, int]]:
    """Load objects, and the addresses of the symbols `exports` that they define.

    ORC wants the exported names when it links: looking each one up afterwards takes half as much
    time again. Raises RuntimeError.
    """
    _initialise()
    builder = llvm.JITLibraryBuilder()
    for image in objects:
        builder.add_object_img(image)
    for name, address in imports.items():
        builder.import_symbol(name, address)
    for name in exports:
        builder.export_symbol(name)
    with _LOCK:
        jit = llvm.create_lljit_compiler(use_jit_link=True, suppress_errors=True)
        tracker = builder.link(jit, f"onnxjit{next(_NUMBER)}")
    return Code(jit, tracker), {name: tracker[name] for name in exports}


@functools.cache
def _initialise() -> None:
    if llvm.llvm_version_info < (20,):
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
