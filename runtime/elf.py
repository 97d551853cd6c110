"""Reads ELF-64 object files, and loads those for x86-64 without a linker of the system's.

What LLVM emits for kernels (position-independent code of the small model) takes seven kinds of
relocation, so that loading is: lay the sections out, write the addresses, protect the pages.
Sources: System V ABI, chapter 4 (object files); its AMD64 supplement 1.0, table 4.9 (relocations).
"""

# Annotations are no strings here: each would be compiled at every start, for `NamedTuple`.
import ctypes
import os
import struct
from collections.abc import Mapping, Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, PROT_EXEC, PROT_READ, PROT_WRITE, mmap
from typing import NamedTuple

MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
X86_64 = 62

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QIIq")

_SYMTAB, _RELA, _NOBITS, _REL = 2, 4, 8, 9  # kinds of section
_WRITE, _ALLOC, _EXECINSTR, _TLS = 1, 2, 4, 1 << 10  # flags of sections
_LOCAL, _RESERVED = 0, 0xFF00  # a symbol's binding; the first index that is no section's

_64, _PC32, _PLT32, _GOTPCREL, _PC64, _GOTPCRELX, _REX_GOTPCRELX = 1, 2, 4, 9, 24, 41, 42
_TO_SLOT = (_GOTPCREL, _GOTPCRELX, _REX_GOTPCRELX)

# jmp [rip + 2], two bytes of padding, and the slot that holds the address.
_STUB = struct.Struct("<6s2xQ")
_JUMP = b"\xff\x25\x02\x00\x00\x00"
_SLOT = 8


class Section(NamedTuple):
    """A section's header; `offset` and `size` are in bytes of the file."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class Symbol(NamedTuple):
    """A symbol: `section` is 0 if it is not defined here, `value` an offset into its section."""

    name: str
    is_global: bool
    section: int
    value: int


class Relocation(NamedTuple):
    """The place to relocate is `offset` bytes into a section; `symbol` is an index."""

    section: int
    offset: int
    kind: int
    symbol: int
    addend: int


class ObjectFile(NamedTuple):
    """An object file's tables; `machine` is the number of the architecture that it is for."""

    image: bytes
    machine: int
    sections: list[Section]
    symbols: list[Symbol]
    relocations: list[Relocation]

    def global_symbols(self) -> list[tuple[str, bool]]:
        """(name, is it defined here) of each global symbol."""
        return [(s.name, s.section != 0) for s in self.symbols if s.is_global]


def read(image: bytes) -> ObjectFile:
    """The tables of an object file. Raises ValueError, IndexError or struct.error if it is not
    whole."""
    if image[:6] != MAGIC:
        raise ValueError(f"it begins with {bytes(image[:6])!r}")
    _, _, machine, _, _, _, at, _, _, _, _, size, count, _ = _HEADER.unpack_from(image)
    sections = [Section._make(_SECTION.unpack_from(image, at + size * n)) for n in range(count)]
    symbols: list[Symbol] = []
    relocations: list[Relocation] = []
    for section in sections:
        if section.kind == _NOBITS:
            continue
        table = image[section.offset : section.offset + section.size]
        if len(table) != section.size:
            raise ValueError("a section ends after the file")
        if section.kind == _SYMTAB:
            names = sections[section.link].offset
            for name, info, _, index, value, _ in _SYMBOL.iter_unpack(table):
                text = image[names + name : image.index(0, names + name)].decode("ascii")
                symbols.append(Symbol(text, info >> 4 != _LOCAL and bool(name), index, value))
        elif section.kind == _RELA:
            for offset, kind, symbol, addend in _RELOCATION.iter_unpack(table):
                relocations.append(Relocation(section.info, offset, kind, symbol, addend))
    return ObjectFile(image, machine, sections, symbols, relocations)


def load(files: Sequence[ObjectFile], imports: Mapping[str, int]) -> tuple[mmap, dict[str, int]]:
    """Place x86-64 objects in new pages of this process, next to each other, and relocate them.

    Returns the pages, which are unmapped when that object dies, and the address of each global
    symbol that the objects define. `imports` has the addresses of those that they do not. Code can
    be run but not written, constants only be read. Raises ValueError that names what is not
    supported (thread-local data, common symbols, other relocations), OSError if the system does
    not allow it.
    """
    stubs = {name: _STUB.size * n for n, name in enumerate(_with_stubs(files, imports))}
    places, segments, size = _layout(files, _STUB.size * len(stubs))
    pages = mmap(-1, max(size, 1), MAP_PRIVATE | MAP_ANONYMOUS, PROT_READ | PROT_WRITE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    addresses: dict[str, int] = {}
    for number, file in enumerate(files):
        for index, section in enumerate(file.sections):
            at = places.get((number, index))
            if at is not None and section.kind != _NOBITS:
                data = file.image[section.offset : section.offset + section.size]
                pages[at : at + section.size] = data
        for symbol in file.symbols:
            if symbol.is_global and symbol.section:
                addresses[symbol.name] = base + _offset(symbol, places, number)
    for name, at in stubs.items():
        _STUB.pack_into(pages, at, _JUMP, addresses[name] if name in addresses else imports[name])
    for number, file in enumerate(files):
        for relocation in file.relocations:
            place = places.get((number, relocation.section))
            if place is not None:
                at = place + relocation.offset
                symbol = file.symbols[relocation.symbol]
                if symbol.name in addresses and not symbol.section:
                    target: int | None = addresses[symbol.name] - base
                elif symbol.section:
                    target = _offset(symbol, places, number)
                else:
                    target = None
                _relocate(pages, base, at, relocation, target, stubs.get(symbol.name))
    for start, end, protection in segments:
        _protect(base + start, end - start, protection)
    return pages, addresses


def _with_stubs(files: Sequence[ObjectFile], imports: Mapping[str, int]) -> list[str]:
    """Names whose address is kept in a slot: those that may be far, or that are read from one."""
    names = dict.fromkeys(imports)
    for file in files:
        for relocation in file.relocations:
            if relocation.kind in _TO_SLOT:
                names[file.symbols[relocation.symbol].name] = None
    return list(names)


def _layout(
    files: Sequence[ObjectFile], stubs: int
) -> tuple[dict[tuple[int, int], int], list[tuple[int, int, int]], int]:
    """Offsets by (file, section), the (begin, end, protection) of each segment, the whole size.

    `stubs` bytes at the beginning of the code are kept free.
    """
    places = {}
    segments: list[tuple[int, int, int]] = []
    end = stubs
    for protection in (PROT_READ | PROT_EXEC, PROT_READ, PROT_READ | PROT_WRITE):
        start = -(-end // PAGESIZE) * PAGESIZE if segments else 0
        end = max(start, end)
        for number, file in enumerate(files):
            for index, section in enumerate(file.sections):
                if section.flags & _ALLOC and _protection(section) == protection:
                    end = -(-end // max(1, section.align)) * max(1, section.align)
                    places[number, index] = end
                    end += section.size
        segments.append((start, end, protection))
    return places, segments, end


def _protection(section: Section) -> int:
    if section.flags & _TLS:
        raise ValueError("thread-local data is not supported")
    if section.flags & _EXECINSTR:
        return PROT_READ | PROT_EXEC
    return PROT_READ | (PROT_WRITE if section.flags & _WRITE else 0)


def _offset(symbol: Symbol, places: Mapping[tuple[int, int], int], number: int) -> int:
    place = places.get((number, symbol.section))
    if place is None:
        raise ValueError(f"the symbol {symbol.name!r} is in no section that is loaded")
    return place + symbol.value


def _relocate(
    pages: mmap, base: int, at: int, what: Relocation, target: int | None, stub: int | None
) -> None:
    """Write one address; `at`, `target` and `stub` are offsets into the pages."""
    if what.kind in _TO_SLOT and stub is not None:
        struct.pack_into("<i", pages, at, stub + _SLOT + what.addend - at)
    elif what.kind == _PLT32 and target is None and stub is not None:
        struct.pack_into("<i", pages, at, stub + what.addend - at)
    elif what.kind in (_PC32, _PLT32) and target is not None:
        struct.pack_into("<i", pages, at, target + what.addend - at)
    elif what.kind == _PC64 and target is not None:
        struct.pack_into("<q", pages, at, target + what.addend - at)
    elif what.kind == _64 and target is not None:
        struct.pack_into("<Q", pages, at, base + target + what.addend)
    else:
        raise ValueError(f"relocations of kind {what.kind} are not supported here")


def _protect(address: int, size: int, protection: int) -> None:
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    if size and mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        number = ctypes.get_errno()
        raise OSError(number, f"memory cannot be made executable: {os.strerror(number)}")
