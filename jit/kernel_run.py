"""One kernel of a model by itself, on random data: native, in plain Python, and against the clock.

Arrays of a `Problem` are in logical axis order; what a kernel gets is laid out and packed as its
signature says, between guard bands that show a store outside of a buffer.
"""

from __future__ import annotations

import ctypes
import itertools
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.codegen.dialect_python import run as run_python
from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.codegen.expr import Load, walk
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.layout import elements, span, strides
from onnxjit.codegen.packing import Packing, pack
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.signature import Signature
from onnxjit.kernel_sizes import Sizes
from onnxjit.runtime.link import Library, link

if TYPE_CHECKING:
    from onnxjit.kernel_source import Built

GUARD_BYTES = 4096
_SEAL = 0xA5
_UNWRITTEN = 0xFF  # NaN, or -1: no plausible result
_PIECES = 5
_DRAWN = 1_000_003  # a prime number: how many random floats repeat in larger arrays

Entry = Callable[[Any, Any, Any, int, int], None]


class Misuse(Exception):
    """A kernel stored where it must not."""


class Loaded:
    """A kernel's machine code in this process, to be called through `entry`."""

    def __init__(self, built: Built) -> None:
        self._library: Library = link([built.image, *built.tiles.values()])
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        kind = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, integer, integer)
        self.entry: Entry = kind(self._library.address(built.symbol))


class _Guarded:
    """A flat array between guard bands, on a 64-byte boundary."""

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        nbytes = count * dtype.itemsize
        self._memory = np.full(nbytes + 2 * GUARD_BYTES + 64, _SEAL, np.uint8)
        self._start = GUARD_BYTES + -(self._memory.ctypes.data + GUARD_BYTES) % 64
        self._stop = self._start + nbytes
        self.array = self._memory[self._start : self._stop].view(dtype)
        self.array.view(np.uint8)[:] = _UNWRITTEN

    @property
    def address(self) -> int:
        return int(self._memory.ctypes.data) + self._start

    def check(self, what: str) -> None:
        for side, band in (
            ("before", self._memory[: self._start]),
            ("behind", self._memory[self._stop :]),
        ):
            if (band != _SEAL).any():
                raise Misuse(f"stores {side} {what}")


@dataclass(frozen=True, slots=True)
class Problem:
    """A kernel at given sizes with arrays for its inputs, by the buffers of its signature; `made`
    keeps what `physical` has made of them."""

    signature: Signature
    sizes: Sizes
    inputs: Mapping[str, np.ndarray]
    made: dict[tuple[str, Packing | None], np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def tiles(self) -> int:
        """Tiles of the parallel index space."""
        return max(evaluate_int(self.signature.tiles, self.sizes), 0)

    @property
    def rounds(self) -> int:
        """Equal parts of the tiles, each of which is finished before the next one begins."""
        return max(evaluate_int(self.signature.rounds, self.sizes), 1)

    @property
    def scratch_bytes(self) -> int:
        return max(evaluate_int(self.signature.scratch, self.sizes), 0)

    @property
    def ints(self) -> np.ndarray:
        """The run-time sizes, in the order of the kernel's `ints`."""
        return np.array([evaluate_int(e, self.sizes) for e in self.signature.sizes], np.int64)

    def expected(self) -> list[np.ndarray]:
        """The outputs by the kernel's definition."""
        with np.errstate(all="ignore"):
            return evaluate(self.signature.definition, self.inputs, self.sizes)

    def shape(self, buffer: str) -> list[int]:
        """The logical shape of a buffer."""
        return [evaluate_int(d, self.sizes) for d in self.signature.definition.types[buffer].shape]

    def steps(self, buffer: str) -> list[int]:
        """Elements between neighbours along each axis of a buffer, as it lies in memory."""
        s = self.signature
        steps = strides(s.definition.types[buffer], s.layouts.get(buffer))
        return [evaluate_int(e, self.sizes) for e in steps]

    def memory(self, buffer: str) -> int:
        """Elements of memory that a buffer takes, gaps included."""
        return span(self.shape(buffer), self.steps(buffer))

    def physical(self, buffer: str) -> np.ndarray:
        """An input as the kernel gets it: flat, where its layout has it, packed."""
        packing = self.signature.packings.get(buffer)
        if (buffer, packing) not in self.made:
            data = self.inputs[buffer]
            flat = np.empty(self.memory(buffer), data.dtype)
            flat.view(np.uint8)[:] = _UNWRITTEN
            self.logical(buffer, flat)[...] = data
            self.made[buffer, packing] = flat if packing is None else pack(flat, packing)
        return self.made[buffer, packing]

    def logical(self, buffer: str, flat: np.ndarray) -> np.ndarray:
        """The elements of a buffer in logical order, as a view of its memory."""
        return elements(flat, self.shape(buffer), self.steps(buffer))

    def native(self, entry: Entry, seed: int = 0) -> list[np.ndarray]:
        """The outputs that machine code computes, the tiles of a round in pieces and in no order.

        Raises `Misuse` where it stores outside of its buffers or into an input.
        """
        buffers = self._buffers()
        params = self.signature.params
        pointers = np.array([buffers[p.buffer].address for p in params] or [0], np.int64)
        ints = np.append(self.ints, 0)
        for begin, end in _pieces(self.tiles, self.rounds, seed):
            scratch = _Guarded(self.scratch_bytes, np.dtype(np.uint8))
            entry(pointers.ctypes.data, ints.ctypes.data, scratch.address, begin, end)
            scratch.check("its scratch memory")
        for number, p in enumerate(params):
            held = buffers[p.buffer]
            held.check(f"buffer {number} ({'an output' if p.written else 'an input'})")
            if not p.written and not _same_bytes(held.array, self.physical(p.buffer)):
                raise Misuse(f"stores into buffer {number}, an input")
            if p.written and self._fills_gaps(p.buffer, held.array):
                raise Misuse(f"stores between the elements of buffer {number}, an output")
        return self._outputs({b: g.array for b, g in buffers.items()})

    def interpret(
        self, text: str, symbols: Sequence[str], begin: int, end: int, filename: str
    ) -> list[np.ndarray]:
        """The outputs after tiles [begin, end) of a source in plain Python, which a debugger may
        step through under `filename`. Elements that no tile has written are NaN, or -1.

        Raises IndexError for an access outside of a buffer.
        """
        buffers = self._buffers()
        scratch = _Guarded(self.scratch_bytes, np.dtype(np.uint8))
        pointers = [buffers[p.buffer].array for p in self.signature.params]
        run_python(text, symbols, pointers, self.ints, scratch.array, begin, end, filename)
        return self._outputs({b: g.array for b, g in buffers.items()})

    def _buffers(self) -> dict[str, _Guarded]:
        made = {}
        for p in self.signature.params:
            if p.written:
                made[p.buffer] = _Guarded(self.memory(p.buffer), numpy_dtype(p.dtype))
            else:
                data = self.physical(p.buffer)
                made[p.buffer] = _Guarded(data.size, numpy_dtype(p.dtype))
                made[p.buffer].array[:] = data
        return made

    def _fills_gaps(self, buffer: str, flat: np.ndarray) -> bool:
        gaps = np.ones(flat.size, bool)
        self.logical(buffer, gaps)[...] = False
        return bool((flat[gaps].view(np.uint8) != _UNWRITTEN).any())

    def _outputs(self, flat: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [self.logical(b, flat[b]) for b in self.signature.definition.outputs]


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.view(np.uint8) == np.ascontiguousarray(b).view(np.uint8)).all())


def _pieces(tiles: int, rounds: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    share = tiles // rounds
    found = []
    for first in range(0, tiles, max(share, 1)):
        cuts = sorted({0, share, *rng.integers(0, share + 1, _PIECES).tolist()})
        pieces = [(first + a, first + b) for a, b in itertools.pairwise(cuts)]
        rng.shuffle(pieces)
        found += pieces
    return found


def random_problem(
    signature: Signature, sizes: Sizes, seed: int = 0, positive: bool = False
) -> Problem:
    """Random arrays for a kernel's inputs: floats from the normal distribution (`positive`: their
    absolute values), small integers, and valid indices where integers are used as such."""
    rng = np.random.default_rng(seed)
    limits = index_limits(signature.definition, sizes)
    inputs = {}
    for b in signature.definition.inputs:
        t = signature.definition.types[b]
        shape = [evaluate_int(d, sizes) for d in t.shape]
        inputs[b] = _random(rng, numpy_dtype(t.dtype), shape, limits.get(b), positive)
    return Problem(signature, sizes, inputs)


def index_limits(kernel: Kernel, sizes: Sizes) -> dict[str, int]:
    """For each input whose elements decide where another buffer is read or written: how many
    elements there are to choose from."""
    limits: dict[str, int] = {}
    for s in kernel.stages:
        places = [(s.buffer, s.index)]
        for e in (s.value, *s.index):
            places += [(x.buffer, x.index) for x in walk(e) if isinstance(x, Load)]
        for buffer, where in places:
            shape = kernel.types[buffer].shape
            for extent, i in zip(shape, where, strict=False):
                for x in walk(i):
                    if isinstance(x, Load) and x.buffer in kernel.inputs:
                        n = evaluate_int(extent, sizes)
                        limits[x.buffer] = min(n, limits.get(x.buffer, n))
    return limits


def _random(
    rng: np.random.Generator,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    limit: int | None,
    positive: bool,
) -> np.ndarray:
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind not in "iu":
        count = int(np.prod(shape, dtype=np.int64))
        data = rng.standard_normal(min(count, _DRAWN), np.float32)
        return np.resize((np.abs(data) if positive else data).astype(dtype), shape)
    signed = dtype.kind == "i" and not positive
    if limit is not None:  # ONNX counts negative indices from the end
        high = max(limit, 1)
        high = min(high, np.iinfo(dtype).max)
        return rng.integers(-high if signed else 0, high, shape).astype(dtype)
    if dtype.itemsize == 1:
        info = np.iinfo(dtype)
        return rng.integers(0 if positive else info.min, info.max + 1, shape).astype(dtype)
    return rng.integers(-9 if signed else 0, 10, shape).astype(dtype)


def shown(filename: str, text: str) -> None:
    """Let tracebacks and pdb show the lines of a source that is no file."""
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
