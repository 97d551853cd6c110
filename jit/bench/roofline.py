"""What this machine can do, measured: multiply-adds per dtype and instruction set, and bandwidth
per level of the memory hierarchy, on as many threads as the model is run with.

A result is kept in the cache folder (`roofline/KEY.json`, plain JSON) for each machine and number
of threads. It is the best of several rounds: a busy machine is underestimated, not overestimated.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxjit.bench import roofline_code as code
from onnxjit.bench.machine import key_facts, machine
from onnxjit.codegen.target import Target, host, limited, target_machine

FORMAT = 1
LEVELS = ("L1", "L2", "L3", "memory")

_PART = 0.004  # seconds of a measured part
_ROUNDS = 12
_LOOKS = 5
_LEAST_MEMORY = 64 << 20
_MOST_MEMORY = 1 << 30

_COUNT = object()  # stands for the number of repetitions among arguments

Work = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second of one level, over all threads: of reading, and of copying (bytes read plus
    bytes written). `footprint` is what all threads together touch."""

    level: str
    footprint: int
    read: float
    copy: float

    @property
    def best(self) -> float:
        """The greater of the two: what no mixture of reads and writes exceeds by much."""
        return max(self.read, self.copy)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Peaks (operations per second by "dtype/isa") and bandwidths of a machine with `threads`
    threads; `frequency` is the clock in Hz that one thread was seen to run at; `sizes` are the
    bytes of each cache level over all threads."""

    threads: int
    frequency: float
    peaks: dict[str, float]
    bandwidths: tuple[Bandwidth, ...]
    sizes: dict[str, int]
    date: str

    def peak(self, dtype: str) -> float:
        """Operations per second with the best instructions for a dtype; those for float32 where
        it has none of its own."""
        own = [peak for name, peak in self.peaks.items() if name.startswith(f"{dtype}/")]
        return max(own) if own else self.peak("float32")

    def level(self, footprint: float) -> Bandwidth:
        """The innermost level that holds so many bytes."""
        for row in self.bandwidths:
            if footprint <= self.sizes.get(row.level, 0):
                return row
        return self.bandwidths[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> Roofline | None:
        """None for data of another format."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            return None
        fields = {name: data[name] for name in Roofline.__dataclass_fields__}
        fields["bandwidths"] = tuple(Bandwidth(**row) for row in data["bandwidths"])
        return Roofline(**fields)


def roofline(threads: int, *, again: bool = False, folder: Path | None = None) -> Roofline:
    """The machine's roofline for so many threads: from the cache, measured (some seconds) when it
    is not there or `again`. `folder` is the cache's by default."""
    from onnxjit.codegen.cache import Cache
    from onnxjit.codegen.private_files import private_folder, replace

    folder = Cache().root / "roofline" if folder is None else folder
    path = folder / f"{_key(threads)}.json"
    if not again:
        try:
            found = Roofline.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            found = None  # absent or damaged: measured again
        if found is not None:
            return found
    measured = measure(threads)
    private_folder(folder)
    replace(path, json.dumps(measured.to_json(), indent=1).encode())
    return measured


def _key(threads: int) -> str:
    target = host()
    facts = [FORMAT, key_facts(machine()), target.code_key, target.l1, target.l2, target.l3]
    return hashlib.blake2b(json.dumps([facts, threads]).encode(), digest_size=12).hexdigest()


def measure(threads: int, part: float = _PART, rounds: int = _ROUNDS) -> Roofline:
    """Measure now. `part` is the seconds of each measured part; the parts take turns, until
    `rounds` rounds in a row have made nothing faster by a hundredth (four times as many at most),
    so that other work on the machine has to last to be noticed."""
    target = host()
    parts = {**_product_parts(target, threads), **_memory_parts(target, threads)}
    parts["frequency"] = _frequency_part(target)
    counts = dict.fromkeys(parts, 1)
    best = dict.fromkeys(parts, 0.0)
    for name, one in parts.items():
        # Not by one look: a thread that had to wait would make the part too short for good.
        for _ in range(_LOOKS):
            counts[name] = _repetitions(one.work, counts[name], part)
    done = idle = 0
    while idle < rounds and done < 4 * rounds:
        better = False
        for name, one in parts.items():
            found = one.amount * counts[name] / _together(one.work, counts[name])
            better |= found > 1.01 * best[name]
            best[name] = max(best[name], found)
        done, idle = done + 1, 0 if better else idle + 1
    sizes = {"L1": target.l1 * threads, "L2": target.l2 * threads, "L3": target.l3}
    return Roofline(
        threads,
        best["frequency"],
        {p.name: best[p.name] for p in code.PRODUCTS if p.name in best},
        tuple(
            Bandwidth(level, footprint, best[f"{level} read"], best[f"{level} copy"])
            for level, footprint in _footprints(target, threads)
        ),
        {level: size for level, size in sizes.items() if size},
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing to measure: a call for each thread that takes the number of repetitions, and what
    one repetition of all of them amounts to (operations, bytes or cycles)."""

    work: Sequence[Work]
    amount: float


def _product_parts(target: Target, threads: int) -> dict[str, _Part]:
    found = {}
    for product in code.PRODUCTS:
        if not _is_own(product, target):
            continue
        own = limited(target, product.isa) if target.arch == "x86_64" else target
        built = _build(code.products(product), own)
        function = built("products", ctypes.c_int64, ctypes.c_void_p)
        blocks = [_zeros(64 * 32) for _ in range(threads)]
        work = [_repeated(function, [_COUNT, block]) for block in blocks]
        found[product.name] = _Part(work, code.rounds_of(product) * threads)
    return found


def _is_own(product: code.Product, target: Target) -> bool:
    """Whether to measure it: "scalar" on other processors than x86 means what they have anyway."""
    return product.runs_on(target) and (target.arch == "x86_64" or product.isa != "scalar")


def _footprints(target: Target, threads: int) -> list[tuple[str, int]]:
    """(level, bytes over all threads), well inside the level and well outside the one before."""
    inner = (target.l2 or target.l1) * threads
    wanted = {"L1": target.l1 // 4 * 3 * threads, "L2": target.l2 // 2 * threads}
    if target.l3 > 2 * inner:
        wanted["L3"] = max(target.l3 // 2, 2 * inner)
    wanted["memory"] = min(max(4 * max(target.l3, inner), _LEAST_MEMORY), _MOST_MEMORY)
    unit = 2 * code.STEP * threads  # every thread has the same, and halves of it are whole steps
    return [(level, size // unit * unit) for level, size in wanted.items() if size >= unit]


def _memory_parts(target: Target, threads: int) -> dict[str, _Part]:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    built = _build(code.memory(target.vector_bytes), target)
    read = built("read", pointer, integer, integer, pointer)
    copy = built("copy", pointer, pointer, integer, integer)
    found = {}
    for level, footprint in _footprints(target, threads):
        size = footprint // threads
        half = size // 2  # a copy reads one half and writes the other
        blocks = [_zeros(size) for _ in range(threads)]
        reads = [_repeated(read, [block, size, _COUNT, _zeros(64)]) for block in blocks]
        copies = [_repeated(copy, [b[:half], b[half:], half, _COUNT]) for b in blocks]
        found[f"{level} read"] = _Part(reads, size * threads)
        found[f"{level} copy"] = _Part(copies, 2 * half * threads)
    return found


def _frequency_part(target: Target) -> _Part:
    function = _build(code.chain(), target)("chain", ctypes.c_int64, ctypes.c_void_p)
    return _Part([_repeated(function, [_COUNT, _zeros(64)])], code.CHAIN)


def _zeros(size: int) -> np.ndarray:
    from onnxjit.runtime.threads import aligned

    block = aligned(size, 4096)
    block[:] = 0
    return block


def _repeated(function: Any, arguments: list[Any]) -> Work:
    """A call of a native function that takes the number of repetitions, which stands at `_COUNT`;
    arrays are passed by address and live as long as the call."""
    at = next(i for i, a in enumerate(arguments) if a is _COUNT)
    before = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments[:at]]
    after = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments[at + 1 :]]

    def work(count: int, keep: list[Any] = arguments) -> None:
        function(*before, count, *after)

    return work


def _repetitions(work: Sequence[Work], count: int, part: float) -> int:
    """How many repetitions, at least `count`, take about `part` seconds."""
    while (seconds := _together(work, count)) < part / 2:
        count = min(count * 8, max(count + 1, int(count * part / max(seconds, 1e-7))))
    return count


def _together(work: Sequence[Work], count: int) -> float:
    """Seconds from the first thread's start to the last one's end."""
    clock = time.perf_counter
    if len(work) == 1:
        begin = clock()
        work[0](count)
        return clock() - begin
    spans: list[tuple[float, float]] = []
    barrier = threading.Barrier(len(work))

    def run(one: Work) -> None:
        barrier.wait()
        begin = clock()
        one(count)
        spans.append((begin, clock()))

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def _build(text: str, target: Target) -> Callable[..., Any]:
    """Compile a module for `target` and load it: `built(name, *argument types)` is a function that
    releases the GIL."""
    from llvmlite import binding

    from onnxjit.runtime.link import link

    machine_ = target_machine(target, wide=True)
    module = binding.parse_assembly(text)
    module.triple = target.triple
    module.data_layout = str(machine_.target_data)
    module.verify()
    library = link([machine_.emit_object(module)])

    def built(name: str, *types: Any) -> Any:
        function = ctypes.CFUNCTYPE(None, *types)(library.address(name))
        function.keep = library  # type: ignore[attr-defined]
        return function

    return built
