"""Files of a folder that only its user may write, each with a digest of its content.

The digests guard against damage, the folder's mode against other users. Paths are plain strings
here and in the rest of the warm path: importing pathlib takes several milliseconds of a start.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat

from onnxjit.codegen.blake2 import blake2b

TEMPORARY = ".tmp-"

AnyPath = str | os.PathLike[str]

_MAGIC = b"onnxjit1"  # closes a file, after its digest; loaders of object files ignore both
_DIGEST = 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class CacheError(OSError):
    """The cache folder cannot be used safely; the message names the folder and the remedy."""


def private_folder(path: AnyPath) -> None:
    """Make a folder for this user alone, or check one that is there. Raises `CacheError`."""
    try:
        if not os.path.isdir(path):
            os.makedirs(path, 0o700, exist_ok=True)
        facts = os.stat(path)
    except OSError as error:
        raise CacheError(
            f"cannot create the cache folder {path}: {error.strerror}; "
            "set ONNXJIT_CACHE to a folder of your own"
        ) from error
    mode = stat.S_IMODE(facts.st_mode)
    if facts.st_uid != os.geteuid():
        raise CacheError(
            f"the cache folder {path} (mode {mode:04o}) belongs to user {facts.st_uid}, not to "
            f"you ({os.geteuid()}): code from it will not be run; set ONNXJIT_CACHE to another one"
        )
    if mode & 0o022:
        raise CacheError(
            f"the cache folder {path} (mode {mode:04o}) can be written by other users: code from "
            "it will not be run; correct it with chmod go-w, or set ONNXJIT_CACHE to another one"
        )


def checked(name: str) -> str:
    """`name` if it is a plain file name; raises ValueError otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a name of the cache: {name!r}")
    return name


def temporary_name() -> str:
    """A name that no other process or thread uses, to be renamed when its content is whole."""
    return f"{TEMPORARY}{os.getpid()}-{os.urandom(8).hex()}"


def write_private(path: AnyPath, data: bytes) -> None:
    """Write a new file that only this user may read. Raises FileExistsError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def replace(path: AnyPath, data: bytes) -> None:
    """Write a file so that every reader finds the old content or the new, whole."""
    temporary = os.path.join(os.path.dirname(path), temporary_name())
    try:
        write_private(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _seal(kind: str, key: str, data: bytes) -> bytes:
    # Kind and key are part of the digest: an entry that ends up under another name is refused.
    person = blake2b(f"{kind}/{key}".encode(), digest_size=16).digest()
    return blake2b(data, digest_size=_DIGEST, person=person).digest() + _MAGIC


def sealed(kind: str, key: str, data: bytes) -> bytes:
    """`data` followed by a digest of it and of the name that it is stored under."""
    return data + _seal(kind, key, data)


def unsealed(kind: str, key: str, image: bytes) -> bytes | None:
    """The data of `sealed`, None when the image or its name is not what was sealed."""
    size = len(image) - _DIGEST - len(_MAGIC)
    if size < 0:
        return None
    data = image[:size]
    return data if image[size:] == _seal(kind, key, data) else None


def touch(path: AnyPath) -> None:
    """Note that a file was used now, for the sake of what is removed first."""
    with contextlib.suppress(OSError):  # another process removed it
        os.utime(path)
