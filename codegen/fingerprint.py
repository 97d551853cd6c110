"""Keys from content, and stat data that tells cheaply whether a file is still the same."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from onnxjit.codegen.blake2 import blake2b

if TYPE_CHECKING:
    from pathlib import Path

KEY_BYTES = 16
_CHUNK = 4 << 20

Content = str | os.PathLike[str] | bytes | memoryview


class Stamp(NamedTuple):
    """What stat tells of a file: absolute path, size in bytes, times in nanoseconds, identity.

    The change time is part of it because tools that keep the modification time cannot set it.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


def stamp(paths: Iterable[str | os.PathLike[str]]) -> tuple[Stamp, ...]:
    """The present stamps of files, in order; raises OSError if one cannot be read.

    Take them before reading the files, so that a change during the reading shows afterwards.
    """
    stamps = []
    for path in paths:
        facts = os.stat(path)
        times = facts.st_mtime_ns, facts.st_ctime_ns
        name = os.path.abspath(path)
        stamps.append(Stamp(name, facts.st_size, *times, facts.st_ino, facts.st_dev))
    return tuple(stamps)


def boot_id() -> str:
    """What Linux calls this run of the machine; empty where it does not tell.

    A crash of the machine can take what files hold and leave their stamps."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def content_key(parts: Content | Sequence[Content], extra: bytes = b"") -> str:
    """32 hexadecimal digits that identify the content of `parts` and `extra` (BLAKE2b).

    A part is bytes, or the path of a file: a model is its own file, then its external data files
    in the order of their use. Paths themselves do not count, only what the files hold.
    """
    if isinstance(parts, (str, bytes, memoryview, os.PathLike)):
        parts = (parts,)
    digest = blake2b(digest_size=KEY_BYTES)
    for part in (extra, *parts):
        size = 0
        for piece in _pieces(part):
            digest.update(piece)
            size += len(piece)
        # The length closes each part, so that bytes cannot move from one part to the next.
        digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


def bulk_key(parts: Sequence[Content], seed: int) -> str:
    """32 hexadecimal digits that identify large contents at the speed of memory (XXH3).

    `seed` is a secret number of 64 bits: without it, nobody can make two contents with one key.
    """
    import xxhash

    digests = []
    for part in parts:
        digest, size = xxhash.xxh3_128(seed=seed), 0
        for piece in _pieces(part):
            digest.update(piece)
            size += len(piece)
        digests.append(digest.digest() + size.to_bytes(8, "little"))
    return content_key(digests)


def modules_digest(folder: Path, package: str, *roots: str) -> str:
    """A content key of modules of the package in `folder` and of all they import from it.

    Imports are read from the text, also those inside functions; nothing is imported.
    """
    waiting, texts = list(roots), dict[str, bytes]()
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if name not in texts and path.is_file():
            texts[name] = path.read_bytes()
            waiting += _imports(texts[name], package)
    return content_key([part for name in sorted(texts) for part in (name.encode(), texts[name])])


_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))",
    re.MULTILINE,
)
_COMMENT = re.compile(r"#[^\n]*")


def _imports(text: bytes, package: str) -> Iterator[str]:
    # Parsing would take 0.13 s for all of the compiler, in each process that compiles.
    prefix = f"{package}."
    for found in _IMPORT.finditer(text):
        module, names, plain = (part.decode() for part in found.groups(b""))
        listed = [
            name.split()[0]
            for name in _COMMENT.sub("", names or plain).strip("()").split(",")
            if name.strip()
        ]
        if module.startswith("."):
            module = f"{package}.{module.lstrip('.')}".rstrip(".")
        full = [f"{module}.{name}" for name in listed] if module else listed
        yield from (name[len(prefix) :].split(".")[0] for name in full if name.startswith(prefix))


def _pieces(part: Content) -> Iterator[bytes | memoryview]:
    if isinstance(part, (bytes, memoryview)):
        yield memoryview(part).cast("B")
        return
    buffer = memoryview(bytearray(_CHUNK))
    with open(part, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            yield buffer[:size]
