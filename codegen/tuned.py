"""What tuning found: the fastest variant of each kernel, in JSON that people can read and share.

A table is a file of the cache, `tuning/<instruction set>-<threads>.json`: copied into the cache of
another machine, it serves there. Kernels are found by their structure (`signature.structure`).
Nothing of a table reaches generated code but integers that a schedule rule offers as an option
(`Request.choice`). A row that makes no sense is left out with a warning, and so is a table that was
measured with other schedules, whose choices may mean something else.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from onnxjit.codegen.blake2 import blake2b
from onnxjit.codegen.fingerprint import content_key
from onnxjit.codegen.instruction_sets import isa_of
from onnxjit.codegen.private_files import AnyPath, replace

if TYPE_CHECKING:
    from onnxjit.codegen.cache import Cache
    from onnxjit.codegen.target import Target

FORMAT = 1
_STRUCTURE = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_MOST_CHOICES, _MOST_VALUE = 16, 1 << 20


class Tuned(NamedTuple):
    """The fastest variant of a kernel: `choices` beside those of the cost models (none: theirs are
    the fastest). `seconds` is one execution of it, `usual` one without choices, measured in turns;
    `kernel` and `sizes` (of free dimensions) are for readers."""

    choices: Mapping[str, int]
    seconds: float = 0.0
    usual: float = 0.0
    kernel: str = ""
    sizes: Mapping[str, int] = {}

    @property
    def gain(self) -> float:
        """How many times as fast as without choices."""
        return self.usual / self.seconds if self.choices and self.seconds else 1.0


class Table:
    """Tuned kernels by structure, of one instruction set and number of threads.

    `path` is the file behind it; None keeps them in memory alone.
    """

    def __init__(
        self, path: AnyPath | None = None, rows: Mapping[str, Tuned] | None = None
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self.rows = dict(rows or {})

    @staticmethod
    def open(cache: Cache | None, target: Target, threads: int) -> Table:
        """The table of a cache for this processor; empty where nothing was tuned yet."""
        if cache is None:
            return Table()
        path = os.path.join(cache.tuning, f"{isa_of(target)}-{threads}.json")
        return Table(path, read(path))

    def remember(self, structure: str, tuned: Tuned) -> None:
        """Add a row, and write it to the file beside what other processes have written since."""
        self.rows[structure] = tuned
        if self.path is None:
            return
        try:
            with _locked(self.path):
                rows = {**read(self.path, quiet=True), structure: tuned}
                replace(self.path, _text(self.path, rows).encode())
        except OSError as error:
            warnings.warn(f"cannot keep what tuning found in {self.path}: {error}", stacklevel=2)

    def key(self, plain: str, structures: Iterable[str]) -> str:
        """The key of a model with kernels of these structures, from its key without a table."""
        used = {s: sorted(self.rows[s].choices.items()) for s in sorted(structures)
                if s in self.rows and self.rows[s].choices}  # fmt: skip
        return content_key([plain.encode(), json.dumps(used).encode()]) if used else plain


def read(path: AnyPath, quiet: bool = False) -> dict[str, Tuned]:
    """The rows of a table that make sense, for these schedules; none where there is no file."""
    try:
        with open(path, "rb") as file:
            data = json.load(file)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}")
        found = dict(data["kernels"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _note(quiet, f"{path} is no table of tuned kernels and is ignored: {error}")
        return {}
    if data.get("code") != code():
        _note(quiet, f"{path} was measured with other schedules than these and is ignored")
        return {}
    rows = {s: row for s, given in found.items() if (row := _row(s, given)) is not None}
    if len(rows) < len(found):
        _note(quiet, f"{path}: {len(found) - len(rows)} of {len(found)} kernels are ignored: they "
                     "have no structure, choices and times")  # fmt: skip
    return rows


def tables(cache: Cache) -> dict[str, dict[str, Tuned]]:
    """The rows of every table of a cache, by the file's name."""
    found = sorted(name for name in os.listdir(cache.tuning) if name.endswith(".json"))
    return {
        name.removesuffix(".json"): read(os.path.join(cache.tuning, name), quiet=True)
        for name in found
    }


@functools.cache
def code() -> str:
    """A digest of what gives the choices their meaning: schedule rules and micro-kernels."""
    from pathlib import Path

    folder = Path(__file__).parent
    digest = blake2b(digest_size=8)
    for path in sorted(
        [
            *folder.glob("schedule/*.py"),
            *folder.glob("microkernel*.py"),
            folder / "instruction_sets.py",
        ]
    ):
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


def _row(structure: str, given: Any) -> Tuned | None:
    try:
        choices, sizes = dict(given["choices"]), dict(given["sizes"])
        times = given["microseconds"], given["usual"]
        whole = all(
            _NAME.fullmatch(name) and type(value) is int and 0 <= value <= _MOST_VALUE
            for name, value in choices.items()
        )
        whole &= all(type(t) in (int, float) and math.isfinite(t) and t >= 0 for t in times)
        whole &= all(type(n) is int for n in sizes.values())
        if not whole or not _STRUCTURE.fullmatch(structure) or len(choices) > _MOST_CHOICES:
            return None
        seconds, usual = (t / 1e6 for t in times)
        return Tuned(choices, seconds, usual, str(given["kernel"]), sizes)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _text(path: str, rows: Mapping[str, Tuned]) -> str:
    name = os.path.basename(path).removesuffix(".json")
    isa, _, threads = name.rpartition("-")
    head = {"format": FORMAT, "code": code(), "instruction_set": isa, "threads": int(threads)}
    kernels = {
        s: {
            "kernel": t.kernel,
            "sizes": dict(t.sizes),
            "choices": dict(t.choices),
            "microseconds": round(t.seconds * 1e6, 3),
            "usual": round(t.usual * 1e6, 3),
        }
        for s, t in rows.items()
    }
    return json.dumps({**head, "kernels": kernels}, indent=1) + "\n"


def _note(quiet: bool, text: str) -> None:
    if not quiet:
        warnings.warn(text, stacklevel=4)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """One process at a time adds to a table."""
    import fcntl

    with open(path.removesuffix(".json") + ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
