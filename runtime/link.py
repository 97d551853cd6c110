"""Loads object files into this process and gives the addresses of what they define.

This is the warm path: x86-64 objects of ELF are loaded by `elf`, without LLVM; all others by
`orc`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence

from onnxjit.runtime import elf


class LinkError(RuntimeError):
    """An object file cannot be loaded: damaged, defined twice, or a symbol is missing."""


class Library:
    """Machine code loaded from object files; the code lives as long as this object does."""

    __slots__ = ("_addresses", "_code")

    def __init__(self, code: object, addresses: Mapping[str, int]) -> None:
        self._code = code
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


def link(objects: Sequence[bytes], externals: Mapping[str, int] | None = None) -> Library:
    """Link object files with each other, with ``externals`` and with this process.

    ``externals`` maps symbol names to addresses and wins over the process, whose libc and libm
    symbols (``expf``, ``memset``, ...) serve the rest. Everything is loaded at once. Raises
    `LinkError` that names the missing symbols, a symbol that two objects define, or the object
    that is no object file.
    """
    externals = externals or {}
    owner: dict[str, int] = {}
    needed: dict[str, int] = {}
    files: list[elf.ObjectFile] = []
    for index, image in enumerate(objects):
        try:
            if image[: len(elf.MAGIC)] == elf.MAGIC:
                files.append(elf.read(image))
                symbols = files[-1].global_symbols()
            else:
                symbols = list(macho_symbols(image))
        except (struct.error, ValueError, IndexError) as error:
            raise LinkError(f"object {index} is not a whole object file: {error}") from error
        for name, defined in symbols:
            if not defined:
                needed.setdefault(name, index)
            elif owner.setdefault(name, index) != index:
                raise LinkError(
                    f"objects {owner[name]} and {index} both define the symbol {name!r}"
                )
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
    try:
        if len(files) == len(objects) and all(file.machine == elf.X86_64 for file in files):
            return Library(*elf.load(files, imports))
        from onnxjit.runtime import orc

        return Library(*orc.load(objects, imports, list(owner)))
    except (struct.error, ValueError, IndexError, OSError, RuntimeError) as error:
        raise LinkError(f"cannot link {len(objects)} objects: {error}") from error


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


def macho_symbols(image: bytes) -> Iterator[tuple[str, bool]]:
    """(name, is it defined here) of each global symbol of a Mach-O object file.

    Source: <mach-o/loader.h> and <mach-o/nlist.h>, symtab_command and nlist_64.
    """
    if image[:4] != b"\xcf\xfa\xed\xfe":
        raise ValueError(f"it begins with {bytes(image[:6])!r}")
    (commands,) = struct.unpack_from("<I", image, 16)
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<II", image, at)
        if command == 2:  # LC_SYMTAB
            table, count, names = struct.unpack_from("<III", image, at + 8)
            for offset in range(table, table + 16 * count, 16):
                name, kind = struct.unpack_from("<IB", image, offset)
                if kind & 0xE0 == 0 and kind & 1:  # no debug entry, external
                    text = image[names + name : image.index(0, names + name)].decode("ascii")
                    yield text.removeprefix("_"), kind & 0x0E != 0
        at += size
