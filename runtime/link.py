"""Loads object files into this process and gives the addresses of what they define.

Linking goes through LLVM's ORC JIT with JITLink: sections of one object lie next to each other,
and calls to far symbols go through stubs, so no relocation can overflow however large the
process is. Only ``llvmlite.binding`` is imported: this is the warm path, Numba stays out of it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm

_LOCK = threading.Lock()
_NUMBER = itertools.count()
_READY = False

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_MACHO64_LITTLE = b"\xcf\xfa\xed\xfe"


class LinkError(RuntimeError):
    """An object file cannot be loaded: damaged, defined twice, or a symbol is missing."""


class Library:
    """Machine code loaded from object files; the code lives as long as this object does."""

    __slots__ = ("_addresses", "_jit", "_tracker")

    def __init__(self, jit: Any, tracker: Any, addresses: Mapping[str, int]) -> None:
        self._jit = jit
        self._tracker = tracker
        self._addresses = dict(addresses)

    def address(self, symbol: str) -> int:
        """The address of a symbol that one of the objects defines; ``KeyError`` otherwise."""
        try:
            return self._addresses[symbol]
        except KeyError:
            raise KeyError(f"no linked object defines the symbol {symbol!r}") from None

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of all symbols that the objects define, in the order of the objects."""
        return tuple(self._addresses)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._addresses

    def __del__(self) -> None:
        # The code is unloaded before the JIT that owns its memory goes.
        self._tracker = None
        self._jit = None


def link(objects: Sequence[bytes], externals: Mapping[str, int] | None = None) -> Library:
    """Link object files with each other, with ``externals`` and with this process.

    ``externals`` maps symbol names to addresses and wins over the process, whose libc and libm
    symbols (``expf``, ``memset``, ...) serve the rest. Everything is loaded at once. Raises
    `LinkError` that names the missing symbols, a symbol that two objects define, or the object
    that is no object file.
    """
    _initialise()
    externals = externals or {}
    owner: dict[str, int] = {}
    needed: dict[str, int] = {}
    for index, image in enumerate(objects):
        try:
            for name, defined in _global_symbols(image):
                if not defined:
                    needed.setdefault(name, index)
                elif owner.setdefault(name, index) != index:
                    raise LinkError(
                        f"objects {owner[name]} and {index} both define the symbol {name!r}"
                    )
        except (struct.error, ValueError, IndexError) as error:
            raise LinkError(f"object {index} is not a whole object file: {error}") from error
    imports = {
        name: externals[name] if name in externals else _process_address(name)
        for name in needed
        if name not in owner
    }
    if not all(imports.values()):
        uses = (
            f"{name!r} (wanted by object {needed[name]})"
            for name, address in imports.items()
            if not address
        )
        raise LinkError(f"missing symbols: {', '.join(uses)}")
    builder = llvm.JITLibraryBuilder()
    for image in objects:
        builder.add_object_img(image)
    for name, address in imports.items():
        builder.import_symbol(name, address)
    for name in owner:
        builder.export_symbol(name)
    with _LOCK:
        jit = llvm.create_lljit_compiler(use_jit_link=True, suppress_errors=True)
        try:
            tracker = builder.link(jit, f"onnxjit{next(_NUMBER)}")
        except RuntimeError as error:
            raise LinkError(f"cannot link {len(objects)} objects: {error}") from error
    return Library(jit, tracker, {name: tracker[name] for name in owner})


def _initialise() -> None:
    global _READY
    with _LOCK:
        if not _READY:
            if llvm.llvm_version_info < (20,):
                llvm.initialize()
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            _READY = True


@functools.cache
def _process_address(name: str) -> int:
    """Address of a libc, libm or otherwise global symbol of this process, 0 if there is none."""
    # A Python whose `math` is a shared module has libm only in that module's private scope.
    for library in (None, "libSystem.dylib" if sys.platform == "darwin" else "libm.so.6"):
        try:
            function = getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _global_symbols(image: bytes) -> Iterator[tuple[str, bool]]:
    """(name, is it defined here) of each global symbol of an ELF or Mach-O object file.

    ORC wants the exported names when it links: looking each one up afterwards takes half as
    much time again.
    """
    if image[:6] == _ELF64_LITTLE:
        return _elf_symbols(image)
    if image[:4] == _MACHO64_LITTLE:
        return _macho_symbols(image)
    raise ValueError(f"it begins with {bytes(image[:6])!r}")


def _elf_symbols(image: bytes) -> Iterator[tuple[str, bool]]:
    # ELF-64 object file format, version 1.5 draft 2: figures 2 (header), 8 (section), 14 (symbol).
    (sections_at,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", image, sections_at + size * index)
        for index in range(count)
    ]
    for _, kind, _, _, at, length, strings, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[strings][4]
        for offset in range(at, at + length, entry):
            name, info, _, section = struct.unpack_from("<IBBH", image, offset)
            if info >> 4 != 0 and name:  # not STB_LOCAL
                yield _text(image, names + name), section != 0


def _macho_symbols(image: bytes) -> Iterator[tuple[str, bool]]:
    # <mach-o/loader.h> and <mach-o/nlist.h>: symtab_command and nlist_64.
    (commands,) = struct.unpack_from("<I", image, 16)
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<II", image, at)
        if command == 2:  # LC_SYMTAB
            table, count, names = struct.unpack_from("<III", image, at + 8)
            for offset in range(table, table + 16 * count, 16):
                name, kind = struct.unpack_from("<IB", image, offset)
                if kind & 0xE0 == 0 and kind & 1:  # no debug entry, external
                    yield _text(image, names + name).removeprefix("_"), kind & 0x0E != 0
        at += size


def _text(image: bytes, at: int) -> str:
    return image[at : image.index(0, at)].decode("ascii")
